# SPDX-License-Identifier: GPL-3.0-only
r"""
Tokenizers: text becomes ids, and ids become the same text again.

    python tokenizer.py --train --input=notes.txt --vocab_size=4096 --out=data/my-tokenizer
    python tokenizer.py --inspect="Hello, world!" --tokenizer=gpt2      # ids and pieces
    python tokenizer.py --compare=bpe,unigram,char --input=notes.txt    # which needs the fewest tokens?

    tokenizer = train("bpe", ["some", "texts"], vocab_size=4096)
    ids = tokenizer.encode("def f(x):")
    assert tokenizer.decode(ids) == "def f(x):"
    tokenizer.save("data/mine/tokenizer"); tokenizer = load_from("data/mine")

Four kinds are learned from text:

char        One id per distinct character: the smallest vocabulary, the longest sequences.
bpe         Byte-pair encoding (Sennrich 2016, arXiv 1508.07909). Start from single
            characters; repeatedly merge the most frequent pair into a new piece.
unigram     (Kudo 2018, arXiv 1804.10959). Start from many pieces, each with a probability;
            repeatedly remove those that matter least to the likelihood of the text. A text
            is cut into its likeliest pieces.
simple_bpe  Byte-pair encoding again, in 60 lines to read: `train_bpe` and `encode_bpe` below. Slow.

SentencePiece learns bpe and unigram. text/pretrained.py reads other models' vocabularies:
GPT-2's, Llama's.

A token stands for bytes, not for characters: an emoji may take four tokens. So
`decode` joins the bytes of all tokens before it decodes the UTF-8.

Special tokens are inserted by id: "<|endoftext|>" in a text stays text. In a chat
they mark the turns:

    <|system|>Be brief.<|end|><|user|>Hello<|end|><|assistant|>Hi!<|end|>

A prompt (`chat`) ends with <|assistant|>. A model learns the answer and its <|end|>
(`conversation`).
"""
import contextlib
import functools
import hashlib
import io
import json
import math
import os
import re
import shlex
import shutil
import struct
from collections import Counter, defaultdict
from dataclasses import dataclass, field

# (First, so that an interrupted or failing import is no traceback.)
from runtime.console import UserError, command_line, needs, note, say, show, public
import numpy as np

from text import pretrained
from text.pretrained import careful, read
from runtime.files import PlainUnpickler, is_gguf, open_file
from runtime.settings import check_limits
from runtime.settings import load as load_settings

END_OF_TEXT = "<|endoftext|>"  # before every document
END = "<|end|>"  # behind every message of a chat
SPECIAL = (END_OF_TEXT, "<|system|>", "<|user|>", "<|assistant|>", END)
# Our chat format for other programs, in Jinja. What is learned stands between the
# generation tags, for trl's assistant_only_loss.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% elif message['role'] in ['system', 'user'] %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% else %}{{ raise_exception('the roles are system, user and assistant') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}")
LEARNED = ("bpe", "unigram", "char", "simple_bpe")
SAMPLE_BYTES = 10_000_000  # a vocabulary is learned from at most this much text


def code_points(text):
    """The code points of a text: (n,) uint32."""
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


# ---------- Text to ids

class Learned(pretrained.Tokenizer):
    """What char, bpe and unigram have in common: the chat format."""

    def chat(self, messages):
        """The ids of a prompt: [{"role": "user", "content": "..."}, ...] and the beginning of an answer."""
        ids, _ = self.conversation(messages)
        return [*ids, self.special["<|assistant|>"]]

    def continued(self, messages):
        """The ids of a conversation whose last message is not over yet."""
        ids, _ = self.conversation(messages)
        return ids[:-1]  # without its end token

    def conversation(self, messages):
        """(ids, mask), two lists: the mask is 1 on each answer to learn, and on its end token.

        Each message is encoded alone: the ids before an answer are those of its prompt.
        """
        # 1. A chat needs the tokens that mark its turns, which nanoGPT's characters
        #    do not have.
        if not self.special.keys() >= set(SPECIAL):
            raise UserError("this vocabulary has no tokens that mark the turns of a chat",
                            f"--tokenizer=bpe, or {pretrained.CHAT_FIX}")
        pretrained.check_messages(messages, ("system", "user", "assistant"))
        # 2. Message by message: its marker, its text, its end.
        ids, mask = [], []
        for message in messages:
            said = [*self.encode(message["content"]), self.special[END]]
            learned = pretrained.is_learned(message)
            # The marker is never learned: the prompt ends with it.
            ids += [self.special[f"<|{message['role']}|>"], *said]
            mask += [0] + [int(learned)] * len(said)
        return ids, mask


class CharTokenizer(Learned):
    """One id per character, after the special tokens."""

    kind = "char"

    def __init__(self, characters, special=SPECIAL):
        self.characters = characters
        self.special = {name: i for i, name in enumerate(special)}
        self.vocab_size = len(self.special) + len(characters)
        # The id of every code point there is, -1 for none: a text is encoded by one
        # look-up (4 MB).
        self.table = np.full(0x110000, -1, dtype=np.int32)
        self.table[code_points(characters)] = np.arange(len(self.special), self.vocab_size)
        self.bytes = [b""] * len(self.special) + [character.encode() for character in characters]
        self.files = {"vocab.json": json.dumps(list(characters), ensure_ascii=False).encode()}

    def encode_to_numpy(self, text, follows=False):
        ids = self.table.take(code_points(text))
        if ids.size and ids.min() < 0:
            new = text[int(ids.argmin())]
            raise UserError(f"the character {new!r} (U+{ord(new):04X}) is not among the "
                            f"{len(self.characters)} of this vocabulary",
                            "leave it out, or --tokenizer=bpe, which encodes any text")
        return ids


# ---------- Byte-pair encoding, slow and clear

# Pairs are merged inside of words only. A word is a run of letters, digits,
# punctuation or white space; each but the last may begin with one space. Longer words
# are cut, to bound the time that one takes.
WORDS = re.compile("| ?".join([" ?[A-Za-z\x80-\U0010ffff]{1,64}", "[0-9]{1,64}", "[!-/:-@\\[-`{-~]{1,64}"])
                   + "|[^!-~\x80-\U0010ffff]{1,64}")
SIMPLE_BYTES = 1_000_000  # train_bpe takes about half a minute for so much text


def merge(ids, pair, new):
    """The list with `new` in place of every `pair`: merge([1, 2, 3, 1, 2], (1, 2), 9) -> [9, 3, 9]."""
    # From left to right: of "aaa", the first two letters are merged.
    merged, i = [], 0
    while i < len(ids):
        if tuple(ids[i:i + 2]) == pair:
            merged.append(new)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


def train_bpe(text, n):
    """Learn n merges {pair of ids: new id}, the most frequent pair first (Sennrich 2016, arXiv 1508.07909).

    The ids 0 to 255 are the bytes; the first merge makes the id 256. For
    "aaabdaaabac" and n = 3:

        97  97  97  98 100  97  97  97  98  97  99     a a a b d a a a b a c
        256     97  98 100 256      97  98  97  99     (97, 97) was there 4 times
        256    257     100 256     257      97  99     (97, 98) was there twice, as (256, 97) was
        258            100 258              97  99     (256, 257)
    """
    # 1. Each word once, as ids, and how often it occurs.
    often = Counter(word.encode() for word in WORDS.findall(text))
    words = {word: list(word) for word in often}
    # 2. How often each pair occurs, and in which words.
    counts, where = Counter(), defaultdict(set)
    for word, ids in words.items():
        for pair in zip(ids, ids[1:]):
            counts[pair] += often[word]
            where[pair].add(word)
    # 3. Merge the most frequent pair, of equals the one with the lowest ids, again
    #    and again.
    merges = {}
    while counts and len(merges) < n:
        best = max(counts, key=lambda pair: (counts[pair], -pair[0], -pair[1]))
        if counts[best] < 2:
            break  # a token for a pair that occurs once saves nothing
        merges[best] = 256 + len(merges)
        # Only words that hold the pair change, and with them the counts of their pairs.
        for word in where.pop(best):
            before = words[word]
            after = words[word] = merge(before, best, merges[best])
            for pair in zip(before, before[1:]):
                counts[pair] -= often[word]
            for pair in zip(after, after[1:]):
                counts[pair] += often[word]
                where[pair].add(word)
        del counts[best]
    return merges


def encode_bpe(word, merges):
    """The ids of a word: its bytes, joined by the merges in the order in which they were learned.

    With the merges of the example above, encode_bpe(b"aaab", merges) -> [258].
    """
    ids = list(word)
    while len(ids) > 1:
        # Of all pairs in the word, the one that was learned first.
        first = min(zip(ids, ids[1:]), key=lambda pair: merges.get(pair, math.inf))
        if first not in merges:
            break
        ids = merge(ids, first, merges[first])
    return ids


class SimpleBPETokenizer(Learned):
    """Byte-pair encoding by the functions above. Its ids: special tokens, bytes, merges in their order."""

    kind = "simple_bpe"

    def __init__(self, merges):
        self.merges = merges
        self.files = {"merges.json": json.dumps(list(merges)).encode()}
        self.special = {name: i for i, name in enumerate(SPECIAL)}
        # A merge stands for the bytes of its two halves.
        tokens = [bytes([byte]) for byte in range(256)]
        for left, right in merges:
            tokens.append(tokens[left] + tokens[right])
        self.bytes = [b""] * len(SPECIAL) + tokens
        self.vocab_size = len(self.bytes)
        # Words come again and again; each is encoded once.
        self.encode_word = functools.lru_cache(1 << 16)(lambda word: encode_bpe(word.encode(), merges))

    def encode_to_numpy(self, text, follows=False):
        ids = []
        for word in WORDS.findall(text):
            ids += self.encode_word(word)
        return np.array(ids, dtype=np.int32) + len(SPECIAL)


def train_simple_bpe(texts, vocab_size, enlarge):
    # 1. Is it a text for a slow algorithm?
    text, smallest = "\n".join(texts), len(SPECIAL) + 256
    size = len(text.encode())
    if size > SIMPLE_BYTES:
        raise UserError(f"simple_bpe learns from at most {SIMPLE_BYTES / 1e6:.0f} MB of text, not {size / 1e6:.1f}",
                        "--tokenizer=bpe, the fast one")
    # 2. Bytes and special tokens have an id each; what is beyond them are merges.
    if vocab_size <= smallest:
        if not enlarge:
            raise UserError(f"vocab_size={vocab_size} is too small: bytes and special tokens need {smallest}",
                            f"--vocab_size={smallest + 64} or more")
        vocab_size = smallest + 64
    return SimpleBPETokenizer(train_bpe(text, vocab_size - smallest))


# ---------- Byte-pair encoding and unigram, by SentencePiece

SPACE_MARK = "\u2581"  # SentencePiece writes a space as this character
# Parts of about 2000 characters, each up to the end of a word, which no piece crosses:
# SentencePiece encodes short texts twice as fast.
PARTS = re.compile(r".{2000}.*?(?<=\S)(?= [^\W\d_])|.+", re.DOTALL)


class SentencePieceTokenizer(Learned):
    """bpe or unigram. model: the bytes of SentencePiece's file."""

    def __init__(self, model, kind):
        self.model, self.kind, self.files = model, kind, {"tokenizer.model": model}
        library = needs("sentencepiece", "bpe and unigram")
        self.processor = library.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self.processor.vocab_size()
        self.special = {name: self.processor.piece_to_id(name) for name in SPECIAL}
        # What each id stands for, so that decoding is a join of bytes, here as in
        # every other tokenizer.
        self.bytes = [self.spelled(i) for i in range(self.vocab_size)]
        # A mark in the text would come back as a space. The pieces of its three bytes
        # spell it instead.
        self.mark_ids = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]

    def spelled(self, i):
        """The bytes that the id stands for."""
        if self.processor.is_control(i) or self.processor.is_unknown(i):
            return b""
        piece = self.processor.id_to_piece(i)
        if self.processor.is_byte(i):
            return bytes.fromhex(piece[3:5])  # "<0x0A>" is the byte 10
        return piece.replace(SPACE_MARK, " ").encode()

    def encode_to_numpy(self, text, follows=False):
        # SentencePiece turns spaces into marks and back. A mark that is in the text
        # is taken out before.
        ids = []
        for between_marks in text.split(SPACE_MARK):
            for part in self.processor.encode(PARTS.findall(between_marks), num_threads=1):
                ids += part
            ids += self.mark_ids
        return np.array(ids[:-3], dtype=np.int32)  # there is no mark after the last


# ---------- Learning a vocabulary

# SentencePiece (Kudo and Richardson 2018, arXiv 1808.06226), so that it keeps every
# space and character
OPTIONS = dict(
    normalization_rule_name="identity",  # no NFKC: what goes in comes out
    remove_extra_whitespaces=False,
    add_dummy_prefix=False,  # no space before the text
    byte_fallback=True,  # what has no piece is spelled in bytes
    required_chars=SPACE_MARK,  # but a space must have a piece: its bytes spell the mark
    control_symbols=list(SPECIAL),  # text never becomes one of these
    unk_id=0, bos_id=-1, eos_id=-1, pad_id=-1,
    allow_whitespace_only_pieces=True,  # an indentation can be one token
    split_by_unicode_script=False,  # so that "(self," can be one: 7% fewer tokens on Python
    split_digits=True,  # 2026 is four tokens
    hard_vocab_limit=False,  # a short text has fewer pieces than asked for
    num_threads=16,  # fixed: it decides the order of sums, and so the pieces of unigram
    max_sentence_length=1 << 16, minloglevel=2)
LINES = re.compile(r".{1,2000}(?<=\n)|.{1,2000}", re.DOTALL)  # some lines each, with their line ends


def train(kind, texts, vocab_size=4096, character_coverage=1.0, enlarge=False):
    """A new tokenizer, learned from an iterable of texts, all of which are held in memory.

    enlarge: where vocab_size is too small, take 64 tokens more than the characters need.
    """
    if kind == "char":
        return CharTokenizer("".join(sorted(set().union(*texts))))
    if kind not in LEARNED:
        raise UserError(f"{kind!r} is not a learnable tokenizer", f"one of {', '.join(LEARNED)}")
    if kind == "simple_bpe":
        return train_simple_bpe(texts, vocab_size, enlarge)
    # 1) the pieces
    lines = [line for text in texts for line in LINES.findall(text)]
    model = io.BytesIO()
    try:
        needs("sentencepiece", "bpe and unigram").SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, model_type=kind, vocab_size=vocab_size,
            character_coverage=character_coverage, **OPTIONS)
    # 2) too few of them, or none
    except RuntimeError as error:
        too_small = re.search(r"smaller than required_chars. \d+ vs (\d+)", str(error))
        if not too_small:  # only line ends, for example
            raise UserError(f"nothing to learn a vocabulary from: {error}", "more text") from None
        smallest = int(too_small[1])
        if enlarge:
            return train(kind, lines, smallest + 64, character_coverage)
        raise UserError(
            f"vocab_size={vocab_size} is too small: characters, bytes and special tokens need {smallest:,}",
            f"--vocab_size={smallest} or more, a smaller --character_coverage, or --tokenizer=char") from None
    # 3) the tokenizer
    tokenizer = SentencePieceTokenizer(model.getvalue(), kind)
    if kind == "unigram":
        tokenizer = SentencePieceTokenizer(round_scores(tokenizer), kind)
    if tokenizer.vocab_size < vocab_size:
        note(f"the text is too short for {vocab_size:,} tokens: the vocabulary has {tokenizer.vocab_size:,}")
    return tokenizer


SCORE_STEPS = 64  # scores are multiples of 1/64: float32 then adds some 30,000 of them exactly


def round_scores(tokenizer):
    """The bytes of a unigram model whose scores are multiples of 1 / SCORE_STEPS.

    The same pieces in another order are equally likely, and then rounding decides.
    With exact sums, every program that reads this model decides alike.
    """
    # The file is a protocol buffer. The scores are changed where they stand, so that
    # nothing else changes.
    model, at = bytearray(tokenizer.model), 0
    for i in range(tokenizer.vocab_size):
        piece = tokenizer.processor.id_to_piece(i).encode()
        score = tokenizer.processor.get_score(i)
        # Field 1: the piece with its length. Field 2: the score, a float32.
        entry = bytes([0x0A, len(piece)]) + piece + b"\x15"
        at = model.index(entry + struct.pack("<f", score), at) + len(entry)
        struct.pack_into("<f", model, at, round(score * SCORE_STEPS) / SCORE_STEPS)
    return bytes(model)


def sample(texts, total_bytes):
    """Up to SAMPLE_BYTES of the texts: the start of each long one, and some of the short ones, whole."""
    # 1. More text makes learning slower, and the vocabulary hardly better.
    share, due = min(1.0, SAMPLE_BYTES / max(total_bytes, 1)), 0.0
    if share < 1:
        note(f"the vocabulary is learned from a sample: {SAMPLE_BYTES / 1e6:.0f} MB of the "
             f"{total_bytes / 1e6:,.0f}")
    # 2. `due`: how many characters should have been given by now. A part of less than
    #    2,000 waits.
    for text in texts:
        due += len(text) * share
        if due >= min(len(text), 2000):
            part = text[:round(due)]
            due -= len(part)
            yield part


# ---------- Folders

def load_from(path, sha256=None):
    """The tokenizer of a tokenizer folder, of prepared data (nanoGPT's too), a run, a Hugging Face folder or a .gguf.

    sha256: the fingerprint that it must have.
    """
    # 1. Which folder? An exported Hugging Face folder holds ours, too.
    folder = os.path.join(path, "tokenizer")
    if not os.path.isdir(folder):
        folder = path
    if is_gguf(path):
        from text.gguf_file import from_gguf  # rarely needed
        tokenizer = from_gguf(path)
    elif os.path.exists(os.path.join(folder, "tokenizer.json")):
        tokenizer = pretrained.from_hugging_face(folder)
    elif is_nanogpt(path):
        meta = os.path.join(path, "meta.pkl")
        tokenizer = nanogpt_characters(meta) if os.path.exists(meta) else pretrained.GPT2()
    else:
        with careful(f"{folder} holds no tokenizer, or a damaged one"):
            tokenizer = load_ours(folder)
    # 2. Ids of another tokenizer would be read as a text that nobody wrote.
    if sha256 not in (None, fingerprint(tokenizer)):
        raise UserError(f"{folder} is not the expected tokenizer ({sha256[:12]})",
                        "restore tokenizer/ from a copy, or prepare the data again")
    return tokenizer


def is_nanogpt(folder):
    """Has nanoGPT's prepare.py written this folder? It has no meta.json; without a meta.pkl, the ids are GPT-2's."""
    names = [name for name in ("train.bin", "val.bin", "meta.json") if os.path.exists(os.path.join(folder, name))]
    return names == ["train.bin", "val.bin"]


def nanogpt_characters(path, vocab_size=0):
    """The tokenizer in nanoGPT's meta.pkl: a pickle of dict(itos={0: "a", ...}). vocab_size: what it must have."""
    try:
        with open_file(path, most=1 << 24) as file:
            itos = PlainUnpickler(file).load()["itos"]
        vocab_size = vocab_size or len(itos)
        characters = "".join(itos[i] for i in range(vocab_size))
        if len(characters) != vocab_size:
            raise ValueError("not one character per id")
        return CharTokenizer(characters, special=())
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{path} cannot be used: {error!r}", "run nanoGPT's own prepare.py again") from None


def load_ours(folder):
    """What `save` wrote. Raises all kinds of errors."""
    about = json.loads(read(folder, "config.json"))
    kind = about["kind"]
    if kind == "char":
        return CharTokenizer("".join(json.loads(read(folder, "vocab.json"))), about["special"])
    if kind == "simple_bpe":
        merges = [(int(left), int(right)) for left, right in json.loads(read(folder, "merges.json"))]
        return SimpleBPETokenizer({pair: 256 + i for i, pair in enumerate(merges)})
    if kind == "gpt2":
        return pretrained.GPT2(folder)
    if kind == "tiktoken":
        return pretrained.TiktokenTokenizer({name: read(folder, name) for name in pretrained.ENCODING})
    if kind not in LEARNED:
        raise ValueError(f"unknown kind {kind!r}")
    return SentencePieceTokenizer(read(folder, "tokenizer.model"), kind)


def get(name):
    """The tokenizer of a folder or a .gguf file, or one of tiktoken's encodings."""
    if os.path.isdir(name) or is_gguf(name):
        return load_from(name)
    encodings = pretrained.tiktoken().list_encoding_names()
    if name in encodings:
        return pretrained.from_tiktoken(name)
    raise UserError(f"there is no tokenizer {name!r}",
                    f"one of {', '.join([*LEARNED, *encodings])}; or a run, data or model folder")


def fingerprint(tokenizer):
    """The sha256 of all that `save` writes: two tokenizers with the same one give the same ids."""
    # Names and lengths go in too, so that no two sets of files look alike.
    sha256 = hashlib.sha256()
    for name, content in sorted(pretrained.files_of(tokenizer).items()):
        sha256.update(f"{name} {len(content)}\n".encode() + content)
    return sha256.hexdigest()


def keep(tokenizer, folder, sha256):
    """Write a tokenizer to folder/tokenizer, unless it is there. Another one becomes tokenizer.damaged."""
    path = os.path.join(folder, "tokenizer")
    part, damaged = path + ".part", path + ".damaged"
    # 1. It is there.
    with contextlib.suppress(UserError):
        load_from(path, sha256)
        return
    # 2. Written under another name first: a kill in between leaves no half of a
    #    tokenizer.
    with writing(path):
        shutil.rmtree(part, ignore_errors=True)
        tokenizer.save(part)
        if os.path.lexists(path):
            shutil.rmtree(damaged, ignore_errors=True)
            os.replace(path, damaged)
        os.replace(part, path)


@contextlib.contextmanager
def writing(path):
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}", "free space, or another folder") from None


def ends(tokenizer):
    """The ids after which a text, or an answer in a chat, is over."""
    # A Hugging Face tokenizer names its own end in its settings.
    names = END_OF_TEXT, END, tokenizer.settings.get("eos_token")
    return {tokenizer.special[name] for name in names if name in tokenizer.special} | set(tokenizer.stops)


# ---------- The command line

@dataclass
class TokenizerConfig:
    # Choose one:
    train: bool = False  # learn a tokenizer from --input, and write it to --out
    inspect: str = ""  # show this text as ids and pieces; --chat: as a user's message, in the chat format
    compare: str = ""  # tokenizers to compare on --input: bpe,gpt2,out/small; bpe is learned from it
    # Options:
    input: list[str] = field(default_factory=list)  # files, folders, patterns or URLs of text
    text_field: str = "text"  # --input: the field or column of a row that holds the text
    tokenizer: str = "bpe"  # --train: bpe, unigram, char or simple_bpe; --inspect: gpt2, ..., or a folder with one
    vocab_size: int = 4096  # bpe, unigram: number of tokens; 32,000 for a few GB of text
    character_coverage: float = 1.0  # bpe, unigram: share of characters with a token; 0.9995 suits Chinese
    out: str = ""  # --train: output folder, by default data/KIND-tokenizer
    chat: bool = False  # --inspect: the text is a message in a chat


def main(argv):
    # 1. Settings.
    settings, _, bare = load_settings(TokenizerConfig, argv)
    check_limits(settings, {"vocab_size": (1, 1_000_000), "character_coverage": (0.98, 1)})
    if bool(settings.train) + bool(settings.inspect) + bool(settings.compare) != 1:
        raise UserError("expected exactly one of --train, --inspect and --compare",
                        '--train --input=FILE, --inspect="a text" or --compare=bpe,gpt2 --input=FILE')
    # 2. One of three.
    settings.input += bare
    if settings.inspect:
        inspect(settings)
    elif settings.compare:
        compare(re.split(" *, *", settings.compare), Corpus(settings))
    else:
        learn(settings, Corpus(settings))


class Corpus:
    """The text of --input, which is read anew for each use."""

    def __init__(self, settings):
        from text.sources import fetch  # with the downloader, which is loaded only where texts are read
        self.settings = settings
        self.sources, _ = fetch(settings.input)
        self.bytes = sum(len(text.encode()) for text in self)
        if not self.bytes:
            raise UserError("no text to learn from or compare", "--input=FILE")

    def __iter__(self):
        from text.sources import documents
        found = documents(self.sources, self.settings.text_field)
        return (block for document in found for block in document.blocks())

    def learn(self, kind):
        texts = sample(self, self.bytes) if kind != "char" else self
        return train(kind, texts, self.settings.vocab_size, self.settings.character_coverage)


def learn(settings, corpus):
    """--train: learn a tokenizer, and write it."""
    out = settings.out or f"data/{settings.tokenizer}-tokenizer"
    if os.path.isdir(out) and os.listdir(out):
        raise UserError(f"{out} is not empty", "--out=ANOTHER_FOLDER")
    tokenizer = corpus.learn(settings.tokenizer)
    with writing(out):
        tokenizer.save(out)
    say(f"{out}: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens from {corpus.bytes:,} bytes")
    options = [f"--text_field={settings.text_field}"] if settings.text_field != "text" else []
    say("next: " + shlex.join(["python", "prepare.py", *map(public, settings.input), f"--tokenizer={out}", *options]))


def inspect(settings):
    """--inspect: each id, and what it stands for."""
    if settings.tokenizer in LEARNED:
        raise UserError("--inspect needs an existing tokenizer", "--tokenizer=gpt2, or data/stdlib")
    tokenizer, text = get(settings.tokenizer), settings.inspect
    message = dict(role="user", content=text)
    ids = tokenizer.chat([message]) if settings.chat else tokenizer.encode(text)
    names = {i: name for name, i in tokenizer.special.items()}
    for i in ids:
        # A token may be a part of a character: then its bytes are shown.
        piece = tokenizer.token_bytes(i)
        try:
            show(f"{i:7} {names.get(i) or repr(piece.decode())}")
        except UnicodeDecodeError:
            show(f"{i:7} {piece!r}")
    say(f"{len(ids)} tokens for {len(text.encode())} bytes; vocabulary {tokenizer.vocab_size:,}")


def compare(names, corpus):
    """--compare: how many tokens each needs for the text, and does the text come back?"""
    say(f"{corpus.bytes:,} bytes of text; bpe, unigram and char are learned from it")
    print(f"{'tokenizer':24} {'vocabulary':>10} {'tokens':>12} {'bytes per token':>15}  round trip")
    for name in names:
        tokenizer = corpus.learn(name) if name in LEARNED else get(name)
        tokens, result = 0, "exact"
        for text in corpus:
            # A vocabulary of others may change a text, in a normal form of Unicode
            # for example.
            ids = tokenizer.encode(text)
            tokens += len(ids)
            if tokenizer.decode(ids) != text:
                result = "lossy"
        density = corpus.bytes / max(tokens, 1)
        print(f"{name:24} {tokenizer.vocab_size:10,} {tokens:12,} {density:15.3f}  {result}", flush=True)


if __name__ == "__main__":
    command_line(main)

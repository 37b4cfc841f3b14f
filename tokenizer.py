# SPDX-License-Identifier: GPL-3.0-only
r"""
Tokenizers: text to ids and back, without loss.

    python tokenizer.py --train --input=notes.txt --tokenizer=bpe --vocab_size=4096 --out=data/my-tokenizer
    python tokenizer.py --inspect="Hello, world!" --tokenizer=gpt2      # ids and pieces
    python tokenizer.py --compare=bpe,unigram,char --input=notes.txt    # which needs the fewest tokens?

    tokenizer = train("bpe", ["some", "texts"], vocab_size=4096)
    ids = tokenizer.encode("def f(x):\n\treturn x")
    assert tokenizer.decode(ids) == "def f(x):\n\treturn x"
    tokenizer.save("data/mine/tokenizer"); tokenizer = load("data/mine/tokenizer")

Three kinds are learned from the text itself:

char     One id per distinct character: the smallest vocabulary, the longest sequences, and no id for a character that
         the training text did not contain.
bpe      Byte-pair encoding (Sennrich 2016, arXiv 1508.07909), trained by SentencePiece. Start from single characters;
         again and again, make a new piece of the most frequent pair. The rest is spelled in bytes.
unigram  (Kudo 2018, arXiv 1804.10959), also by SentencePiece. Start from many pieces with a probability each; again
         and again, remove those that the likelihood of the text needs least. A text becomes its likeliest pieces.

The vocabularies of others, such as GPT-2's and Llama's, are read by text/pretrained.py.

A token stands for bytes, not for characters: an emoji may be spread over four tokens. So `decode` joins the bytes of
all tokens before it decodes the UTF-8.

Special tokens are inserted by id. The characters "<|endoftext|>" in a text are encoded as characters, so nobody can
forge one. In a chat they mark the turns:

    <|system|>Be brief.<|end|><|user|>Hello<|end|><|assistant|>Hi!<|end|>

A prompt (`chat`) ends with <|assistant|>. What follows, up to its <|end|>, is what a model learns (`conversation`).
"""
import contextlib
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import struct
import tempfile
import time
from dataclasses import dataclass, field

import numpy as np

from text import pretrained
from text.pretrained import careful, read
from runtime.console import UserError, command_line, needs, note, say, show, public
from runtime.settings import check_limits
from runtime.settings import load as load_settings

END_OF_TEXT = "<|endoftext|>"  # before every document
END = "<|end|>"  # behind every message of a chat
SPECIAL = (END_OF_TEXT, "<|system|>", "<|user|>", "<|assistant|>", END)
ROLES = ("system", "user", "assistant")
CHAT_TEMPLATE = (  # our chat format for other programs, in Jinja
    "{% for message in messages %}{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('the roles are system, user and assistant') }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}")
LEARNED = ("bpe", "unigram", "char")
SAMPLE_BYTES = 10_000_000  # a vocabulary is learned from at most this much text
SPACE_MARK = "\u2581"  # SentencePiece writes a space as this character
SCORE_STEPS = 64  # scores of unigram pieces are multiples of 1/64: float32 then adds some 30,000 of them exactly
# Parts of about 2000 characters, which end where a word does, so no piece crosses a border. SentencePiece encodes
# short texts twice as fast.
PARTS = re.compile(r".{2000}.*?(?<=\S)(?= [^\W\d_])|.+", re.DOTALL)


def code_points(text):
    """The code points of a text: (n,) uint16, or uint32 where one is beyond 65,535."""
    raw = text.encode("utf-16-le")
    return np.frombuffer(raw, "<u2") if len(raw) == 2 * len(text) else np.frombuffer(text.encode("utf-32-le"), "<u4")


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizers that are learned here

class Learned(pretrained.Tokenizer):
    """What they have in common: the chat format."""

    def chat(self, messages, answer=True):
        """The ids of a conversation, [{"role": "user", "content": "..."}, ...].

        answer: end with the beginning of the assistant's turn.
        """
        return self.conversation(messages)[0] + [self.special["<|assistant|>"]] * bool(answer)

    def conversation(self, messages):
        """(ids, mask) of a conversation, two lists: the mask is 1 on each answer that is not empty, and its end token.

        Each message is encoded alone, so that the ids before an answer are those of the prompt that asks for it.
        """
        if not self.special.keys() >= set(SPECIAL):  # nanoGPT's characters have none
            raise UserError("this vocabulary has no tokens that mark the turns of a chat",
                            f"--tokenizer=bpe, or {pretrained.CHAT_FIX}")
        pretrained.check_messages(messages, ROLES)
        ids, mask = [], []
        for message in messages:
            said = [*self.encode(message["content"]), self.special[END]]
            learned = message["role"] == "assistant" and message["content"] != ""
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
        self.table = np.full(0x110000, -1, dtype=np.int32)  # the id of every code point
        self.table[code_points(characters)] = np.arange(len(self.special), self.vocab_size)
        self.bytes = [b""] * len(self.special) + [character.encode() for character in characters]
        self.files = {"vocab.json": json.dumps(list(characters), ensure_ascii=False).encode()}

    def encode_to_numpy(self, text, follows=False):
        ids = self.table.take(code_points(text))
        if ids.size and ids.min() < 0:
            character = text[int(ids.argmin())]
            raise UserError(f"the character {character!r} (U+{ord(character):04X}) is not among the "
                            f"{len(self.characters)} of this character vocabulary",
                            "leave it out, or --tokenizer=bpe, which spells anything")
        return ids


class SentencePieceTokenizer(Learned):
    """bpe or unigram, by SentencePiece."""

    def __init__(self, model, kind):
        self.model, self.kind, self.files = model, kind, {"tokenizer.model": model}
        self.processor = processor = needs("sentencepiece", "bpe and unigram").SentencePieceProcessor(model_proto=model)
        self.vocab_size = processor.vocab_size()
        self.special = {name: processor.piece_to_id(name) for name in SPECIAL}
        # SentencePiece turns spaces into U+2581 and back, so a U+2581 in the text would come back as a space. Its
        # three bytes, which have pieces like every byte, spell it instead.
        self.space_mark_ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self.bytes = []
        for i in range(self.vocab_size):
            piece = processor.id_to_piece(i)
            if processor.is_control(i) or processor.is_unknown(i):
                self.bytes.append(b"")
            elif processor.is_byte(i):
                self.bytes.append(bytes([int(piece[3:5], 16)]))  # "<0x0A>" is the byte 10
            else:
                self.bytes.append(piece.replace(SPACE_MARK, " ").encode())

    def encode(self, text):
        ids = []
        for i, between_marks in enumerate(text.split(SPACE_MARK)):
            ids += self.space_mark_ids if i else []
            for part_ids in self.processor.encode(PARTS.findall(between_marks), num_threads=1):
                ids += part_ids
        return ids

    def encode_to_numpy(self, text, follows=False):
        return np.array(self.encode(text), dtype=np.int32)


def train(kind, texts, vocab_size=4096, character_coverage=1.0):
    """A new tokenizer, learned from an iterable of texts, all of which are held in memory."""
    if kind == "char":
        return CharTokenizer("".join(sorted(set().union(*texts))))
    if kind in LEARNED:
        return train_sentencepiece(kind, texts, vocab_size, character_coverage)
    raise UserError(f"{kind!r} is no tokenizer that can be learned", f"one of {', '.join(LEARNED)}")


def train_sentencepiece(kind, texts, vocab_size, character_coverage=1.0):
    """SentencePiece (Kudo and Richardson 2018, arXiv 1808.06226), with options that keep every space and character.

    character_coverage: the share of all characters that get a piece; the rarest, beyond it, are spelled in bytes.
    """
    # 1) pieces of bounded length: some lines each, with their line ends
    lines, counts = [], np.zeros(0x110000, dtype=np.int64)
    for text in texts:
        found = np.bincount(code_points(text))
        counts[:len(found)] += found
        start = 0
        while start < len(text):
            end = text.rfind("\n", start, start + 2000) + 1 or start + 2000
            lines.append(text[start:end])
            start = end

    # 2) is it possible?
    smallest = smallest_vocab(counts, character_coverage)
    if vocab_size < smallest:
        raise UserError(f"vocab_size={vocab_size} is too small: the characters of this text, the 256 bytes and the "
                        f"special tokens need {smallest:,}",
                        f"--vocab_size={smallest} or more, a smaller --character_coverage, or --tokenizer=char")
    if not any(line.strip() for line in lines):
        raise UserError("nothing to learn a vocabulary from but white space", "more text, or --tokenizer=char")

    # 3) the vocabulary
    model = io.BytesIO()
    needs("sentencepiece", "bpe and unigram").SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type=kind, vocab_size=vocab_size,
        hard_vocab_limit=False,  # a short text has fewer pieces than asked for
        normalization_rule_name="identity",  # no NFKC: what goes in comes out
        remove_extra_whitespaces=False, add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,  # an indentation can be one token
        split_by_unicode_script=False,  # so that "(self," can be one: 7% fewer tokens on Python
        split_digits=True,  # 2026 is four tokens
        character_coverage=character_coverage, byte_fallback=True,  # what has no piece is spelled in bytes
        required_chars=SPACE_MARK,  # but a space must have one: as bytes, the mark would come back in its place
        control_symbols=list(SPECIAL), unk_id=0, bos_id=-1, eos_id=-1, pad_id=-1,  # text never becomes a control symbol
        num_threads=16,  # fixed: it decides the order of sums, and so the pieces of unigram
        max_sentence_length=1 << 16, minloglevel=2)
    tokenizer = SentencePieceTokenizer(model.getvalue(), kind)
    if kind == "unigram":
        tokenizer = SentencePieceTokenizer(round_scores(tokenizer), kind)
    if tokenizer.vocab_size < vocab_size:
        note(f"the text is too small for {vocab_size:,} tokens: the vocabulary has {tokenizer.vocab_size:,}")
    return tokenizer


def round_scores(tokenizer):
    """The bytes of a unigram model whose scores are multiples of 1 / SCORE_STEPS.

    Often two ways to cut a text are equally likely (the same pieces in another order), and then rounding decides.
    Where sums are exact, every program that reads this model decides alike.
    """
    model, at = bytearray(tokenizer.model), 0
    for i in range(tokenizer.vocab_size):
        piece, score = tokenizer.processor.id_to_piece(i).encode(), tokenizer.processor.get_score(i)
        entry = bytes([0x0A, len(piece)]) + piece + b"\x15"  # in the file: the piece, and the score as a float32
        at = model.index(entry + struct.pack("<f", score), at) + len(entry)
        struct.pack_into("<f", model, at, round(score * SCORE_STEPS) / SCORE_STEPS)
    return bytes(model)


def smallest_vocab(counts, character_coverage=1.0):
    """The smallest vocabulary for bpe and unigram: the characters, 256 bytes, the specials and the unknown.

    counts: how often every code point occurs. SentencePiece takes characters in, the most frequent first, until their
    share of the text is character_coverage.
    """
    counts = counts.copy()
    counts[ord(SPACE_MARK)] += counts[ord(" ")]
    counts[[ord(" "), 0]] = 0  # a space is written as the mark; NUL never has a piece
    order = np.argsort(-counts, kind="stable")[:np.count_nonzero(counts)]
    falling = counts[order]
    before = (np.cumsum(falling) - falling) / max(falling.sum(), 1)  # the share of those before it
    taken = set(order[before < character_coverage].tolist()) | {ord(SPACE_MARK)}
    return len(taken) + 256 + len(SPECIAL) + 1


def sample(texts, total_bytes):
    """Up to SAMPLE_BYTES of texts with so many bytes in all, spread evenly over them.

    That is the start of each long text, and some of the short ones, whole: half words would become pieces.
    """
    share, due = min(1.0, SAMPLE_BYTES / max(total_bytes, 1)), 0.0
    if share < 1:
        note(f"the vocabulary is learned from a sample: {SAMPLE_BYTES / 1e6:.0f} MB of the {total_bytes / 1e6:,.0f}")
    for text in texts:
        due += len(text) * share  # characters that should have been given by now
        if due >= min(len(text), 2000):
            part = text[:round(due)]
            due -= len(part)
            yield part


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers that exist already

def load(folder):
    """The tokenizer that `save` wrote into this folder. Raises UserError where it is damaged."""
    with careful(f"the tokenizer in {folder} is damaged"):
        about = json.loads(read(folder, "config.json"))
        kind = about["kind"]
        if kind == "char":
            return CharTokenizer("".join(json.loads(read(folder, "vocab.json"))), about["special"])
        if kind in ("bpe", "unigram"):
            return SentencePieceTokenizer(read(folder, "tokenizer.model"), kind)
        if kind == "tiktoken":
            return pretrained.TiktokenTokenizer({name: read(folder, name) for name in pretrained.ENCODING})
        if kind == "hugging_face":
            return pretrained.from_hugging_face(folder)
        raise ValueError(f"there is no kind {kind!r}")


def load_from(path, sha256=None):
    """The tokenizer of a tokenizer folder, of prepared data, of a run or of a Hugging Face folder.

    sha256: the fingerprint that it must have.
    """
    both = path, os.path.join(path, "tokenizer")  # (an exported Hugging Face folder holds ours as well)
    folder = next(filter(is_ours, both), None)
    if folder is None and not os.path.exists(os.path.join(path, "tokenizer.json")):
        raise UserError(f"{path} holds no tokenizer", "--tokenizer=bpe, or a folder that prepare.py or train.py wrote")
    tokenizer = None if folder else pretrained.from_hugging_face(path)
    if sha256 is not None:
        found = digest(files_in(folder)) if folder else fingerprint(tokenizer)
        if found != sha256:
            raise UserError(f"{folder or path} is another tokenizer ({found[:12]}) than the one meant ({sha256[:12]})",
                            "take the folder tokenizer/ from a copy, or prepare the data again")
    return tokenizer or load(folder)


def is_ours(folder):
    """Is there a config.json as `save` writes it? A Hugging Face folder has one about the model."""
    return os.path.isfile(os.path.join(folder, "config.json")) and b'"kind"' in read(folder, "config.json")


def get(name):
    """The tokenizer of a folder, or one of tiktoken's encodings."""
    if os.path.isdir(name):
        return load_from(name)
    encodings = pretrained.tiktoken().list_encoding_names()
    if name in encodings:
        return pretrained.from_tiktoken(name)
    raise UserError(f"there is no tokenizer {name!r}",
                    f"one of {', '.join((*LEARNED, *encodings))}; or the folder of a run, of data or of a model")


def fingerprint(tokenizer):
    """The sha256 of all that `save` writes: two tokenizers with the same one give the same ids."""
    return digest(pretrained.files_of(tokenizer))


def digest(files):
    sha256 = hashlib.sha256()
    for name, content in sorted(files.items()):
        sha256.update(f"{name} {len(content)}\n".encode() + content)
    return sha256.hexdigest()


def files_in(folder):
    """{name: bytes} of all files in it."""
    return {name: read(folder, name) for name in os.listdir(folder) if os.path.isfile(os.path.join(folder, name))}


def keep(tokenizer, folder, sha256):
    """Write a tokenizer to folder/tokenizer, unless it is there. Another one becomes tokenizer.damaged."""
    path = os.path.join(folder, "tokenizer")
    with contextlib.suppress(UserError):
        load_from(folder, sha256)
        return
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".tokenizer-") as part:
            tokenizer.save(os.path.join(part, "new"))
            if os.path.lexists(path):
                shutil.rmtree(path + ".damaged", ignore_errors=True)
                os.replace(path, path + ".damaged")
            os.replace(os.path.join(part, "new"), path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}", "make room, or another --out_dir") from None


def ends(tokenizer):
    """The ids after which a text, or an answer in a chat, is over."""
    names = END_OF_TEXT, END, tokenizer.settings.get("eos_token")
    return {tokenizer.special[name] for name in names if name in tokenizer.special}


# ---------------------------------------------------------------------------------------------------------------------
# The command line

@dataclass
class TokenizerConfig:
    # One of three things to do:
    train: bool = False  # learn a tokenizer from --input, and write it to --out
    inspect: str = ""  # show this text as ids and pieces; --chat: as a user's message, in the chat format
    compare: str = ""  # tokenizers to compare on --input: bpe,gpt2,out/small (bpe, unigram and char are learned there)
    # With what:
    input: list[str] = field(default_factory=list)  # files, folders, patterns or addresses of text
    tokenizer: str = ""  # --train: bpe (the default), unigram or char; --inspect: gpt2, ..., or a folder that holds one
    vocab_size: int = 4096  # bpe, unigram: number of tokens; 32,000 suit a few GB of text
    character_coverage: float = 1.0  # bpe, unigram: share of the characters that get a token; 0.9995 suits Chinese
    out: str = ""  # --train: the folder to write, by default data/KIND-tokenizer
    chat: bool = False  # --inspect: the text is a message in a chat


def main(argv):
    # The downloader is loaded only where texts are read.
    from text.sources import fetch
    settings, _, bare = load_settings(TokenizerConfig, argv)
    check_limits(settings, {"vocab_size": (1, 1_000_000), "character_coverage": (0.98, 1)})
    if [settings.train, settings.inspect != "", settings.compare != ""].count(True) != 1:
        raise UserError("one thing at a time is to be done",
                        '--train --input=FILE, --inspect="a text" or --compare=bpe,gpt2 --input=FILE')
    if settings.inspect:
        inspect(settings)
        return
    settings.input += bare
    if not settings.input:
        raise UserError("no text to learn from or to compare on", "--input=FILE")
    sources, _ = fetch(settings.input)
    total = sum(len(block.encode()) for block in blocks(sources))
    if not total:
        raise UserError("there is no text in it", "--input=FILE with text")
    if settings.compare:
        compare(settings, sources, total)
        return
    kind = settings.tokenizer or "bpe"
    out = settings.out or f"data/{kind}-tokenizer"
    if os.path.isdir(out) and os.listdir(out):
        raise UserError(f"{out} is not empty", "--out=ANOTHER_FOLDER")
    tokenizer = learn(kind, settings, sources, total)
    try:
        tokenizer.save(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}", "--out=ANOTHER_FOLDER") from None
    say(f"{out}: {kind}, {tokenizer.vocab_size:,} tokens from {total:,} bytes")
    say("next: " + shlex.join(["python", "prepare.py", *map(public, settings.input), f"--tokenizer={out}"]))


def blocks(sources):
    from text.sources import documents
    return (block for document in documents(sources) for block in document.blocks())


def learn(kind, settings, sources, total):
    texts = blocks(sources) if kind == "char" else sample(blocks(sources), total)
    return train(kind, texts, settings.vocab_size, settings.character_coverage)


def inspect(settings):
    if settings.tokenizer in ("", *LEARNED):
        raise UserError("--inspect needs a tokenizer that exists", "--tokenizer=gpt2, or a folder: data/stdlib")
    tokenizer = get(settings.tokenizer)
    if settings.chat:
        ids = tokenizer.chat([dict(role="user", content=settings.inspect)])
    else:
        ids = tokenizer.encode(settings.inspect)
    names = {i: name for name, i in tokenizer.special.items()}
    for i in ids:
        piece = tokenizer.token_bytes(i)
        try:
            show(f"{i:7} {names.get(i) or repr(piece.decode())}")
        except UnicodeDecodeError:  # a part of a character
            print(f"{i:7} {piece!r}")
    say(f"{len(ids)} tokens, of {tokenizer.vocab_size:,}, for {len(settings.inspect.encode())} bytes")


def compare(settings, sources, total):
    """One row per tokenizer: how many tokens it needs for the text, how fast, and whether the text comes back."""
    say(f"{total:,} bytes of text; bpe, unigram and char are learned from it")
    print(f"{'tokenizer':24} {'vocabulary':>10} {'tokens':>12} {'bytes per token':>15} {'MB/s':>6}  round trip")
    names = [name.strip() for name in settings.compare.split(",")]
    existing = {name: get(name) for name in names if name not in LEARNED}
    for name in names:
        tokenizer = existing[name] if name in existing else learn(name, settings, sources, total)
        tokens, seconds, lost = 0, 0, False
        for block in blocks(sources):
            start = time.perf_counter()
            ids = tokenizer.encode_to_numpy(block)
            seconds += time.perf_counter() - start
            tokens += len(ids)
            lost |= tokenizer.decode(ids.tolist()) != block
        print(f"{name:24} {tokenizer.vocab_size:10,} {tokens:12,} {total / max(tokens, 1):15.3f} "
              f"{total / 1e6 / max(seconds, 1e-9):6.1f}  {'lossy' if lost else 'exact'}", flush=True)


if __name__ == "__main__":
    command_line(main)

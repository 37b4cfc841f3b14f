# SPDX-License-Identifier: GPL-3.0-only
"""
Tokenizers: text to ids and back, without loss.

    tokenizer = train("bpe", ["some", "texts"], vocab_size=4096)
    ids = tokenizer.encode("def f(x):\\n\\treturn x")
    assert tokenizer.decode(ids) == "def f(x):\\n\\treturn x"
    tokenizer.save("data/mine/tokenizer"); tokenizer = load("data/mine/tokenizer")

A language model never sees text, it sees integers. There are two ways to make them here:

char    one id per distinct character of the training text. The smallest vocabulary, the longest sequences, and no id
        for a character that was never seen.
bpe     byte-pair encoding (Gage 1994; Sennrich 2016, arXiv 1508.07909), trained by SentencePiece: start from single
        characters, and again and again make one piece of the pair that occurs most often. What no piece covers is
        spelled in bytes, so that any text can be encoded.

Both offer the same six things: encode, decode, token_bytes, vocab_size, special, save. A token stands for *bytes*, not
for characters (an emoji may be spread over four tokens), so text is put together by joining token_bytes and decoding
the UTF-8 once; decode does that for a whole text and sample.py for a text that grows.

The special tokens below exist in every vocabulary and are put in by id alone: text that merely contains the characters
"<|endoftext|>" is encoded as these characters, so no document and no user can forge one.
"""
import hashlib
import io
import json
import os
import shutil

from config import UserError, note

END_OF_TEXT = "<|endoftext|>"  # stands before every document: "what follows has nothing to do with what came before"
SPECIAL = (END_OF_TEXT, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")  # the others mark the turns of a chat
SAMPLE_BYTES = 10_000_000  # a vocabulary is learned from at most this much text: more changes few pieces
SPACE_MARK = "\u2581"  # SentencePiece writes a space as this character


class CharTokenizer:
    """One id per character: first the specials, then the characters of the training text in code point order."""

    kind = "char"

    def __init__(self, characters):
        self.characters = characters
        self.special = {name: i for i, name in enumerate(SPECIAL)}
        self.ids = {character: i for i, character in enumerate(characters, len(SPECIAL))}
        self.vocab_size = len(SPECIAL) + len(characters)

    def encode(self, text):
        try:
            return [self.ids[character] for character in text]
        except KeyError as error:
            character = error.args[0]
            raise UserError(f"the character {character!r} (U+{ord(character):04X}) is not among the "
                            f"{len(self.characters)} that this character vocabulary was made from",
                            "leave it out, or prepare the data with --tokenizer=bpe, which spells anything") from None

    def token_bytes(self, i):
        return self.characters[i - len(SPECIAL)].encode() if len(SPECIAL) <= i < self.vocab_size else b""

    def decode(self, ids):
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def save(self, folder):
        write_config(folder, self)
        with open(os.path.join(folder, "vocab.json"), "w", encoding="utf-8") as file:
            json.dump(list(self.characters), file, ensure_ascii=False)

    @classmethod
    def load(cls, folder):
        with open(os.path.join(folder, "vocab.json"), encoding="utf-8") as file:
            return cls("".join(json.load(file)))


class SentencePieceTokenizer:
    """Byte-pair encoding by SentencePiece, with the options that make it lossless (see train_sentencepiece)."""

    def __init__(self, model, kind):
        self.model, self.kind = model, kind
        self.processor = processor = sentencepiece().SentencePieceProcessor(model_proto=model)
        self.vocab_size = processor.vocab_size()
        self.special = {name: processor.piece_to_id(name) for name in SPECIAL}
        # SentencePiece turns spaces into U+2581 and back, so a U+2581 in the text would come back as a space. It is
        # kept by spelling it in the three bytes of its UTF-8 form, which have pieces of their own, like every byte.
        self.space_mark_ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self.bytes = []
        for i in range(self.vocab_size):
            if processor.is_control(i) or processor.is_unknown(i):
                self.bytes.append(b"")
            elif processor.is_byte(i):
                self.bytes.append(bytes([int(processor.id_to_piece(i)[3:5], 16)]))  # "<0x0A>" is the byte 10
            else:
                self.bytes.append(processor.id_to_piece(i).replace(SPACE_MARK, " ").encode())

    def encode(self, text):
        first, *rest = text.split(SPACE_MARK)
        ids = self.processor.encode(first)
        for part in rest:
            ids += self.space_mark_ids + self.processor.encode(part)
        return ids

    def token_bytes(self, i):
        return self.bytes[i] if i < self.vocab_size else b""

    def decode(self, ids):
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def save(self, folder):
        write_config(folder, self)
        with open(os.path.join(folder, "tokenizer.model"), "wb") as file:
            file.write(self.model)

    @classmethod
    def load(cls, folder, kind="bpe"):
        with open(os.path.join(folder, "tokenizer.model"), "rb") as file:
            return cls(file.read(), kind)


def train(kind, texts, vocab_size=4096):
    """A new tokenizer, learned from an iterable of texts. All of them are read into memory: give a sample."""
    if kind == "char":
        return CharTokenizer("".join(sorted(set().union(*texts))))
    if kind == "bpe":
        return train_sentencepiece(texts, vocab_size, kind)
    raise UserError(f"there is no tokenizer {kind!r}", "--tokenizer=bpe or --tokenizer=char")


def train_sentencepiece(texts, vocab_size, kind):
    """SentencePiece (Kudo and Richardson 2018, arXiv 1808.06226), told to keep every space and every character."""
    lines, characters = [], set()
    for text in texts:
        characters.update(text)
        start = 0
        while start < len(text):  # it wants pieces of bounded length: some lines each, with their line ends
            end = text.rfind("\n", start, start + 2000) + 1 or start + 2000
            lines.append(text[start:end])
            start = end
    smallest = smallest_vocab(characters)
    if vocab_size < smallest:
        raise UserError(f"vocab_size={vocab_size} is too small: this text has {len(characters):,} distinct characters, "
                        f"and they, 256 bytes and {len(SPECIAL) + 1} special tokens need {smallest:,}",
                        f"--vocab_size={smallest} or more, or --tokenizer=char")
    if vocab_size > 1_000_000 or not any(line.strip() for line in lines):
        raise UserError(f"vocab_size={vocab_size} for {sum(map(len, lines))} characters of text (white space included)",
                        "a --vocab_size of at most a million, more text, or --tokenizer=char")
    model = io.BytesIO()
    sentencepiece().SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type=kind, vocab_size=vocab_size,
        hard_vocab_limit=False,  # a short text has fewer pieces than asked for: make what there is
        normalization_rule_name="identity",  # no NFKC: what goes in comes out
        remove_extra_whitespaces=False, add_dummy_prefix=False,  # nor are spaces removed or added
        allow_whitespace_only_pieces=True,  # so that an indentation is one token
        split_by_unicode_script=False,  # so that "(self," can be one: 7% fewer tokens on Python
        split_digits=True,  # 2026 is four tokens: numbers are spelled alike wherever they stand
        character_coverage=1.0, byte_fallback=True,  # each character of the sample has a piece, others are bytes
        control_symbols=list(SPECIAL), unk_id=0, bos_id=-1, eos_id=-1, pad_id=-1,  # text never becomes a control symbol
        max_sentence_length=1 << 16, num_threads=os.cpu_count() or 1, minloglevel=2)
    tokenizer = SentencePieceTokenizer(model.getvalue(), kind)
    if tokenizer.vocab_size < vocab_size:
        note(f"the text is too small for {vocab_size:,} tokens: the vocabulary has {tokenizer.vocab_size:,}")
    return tokenizer


def smallest_vocab(characters):
    """The fewest tokens that bpe can do with: the characters of the text, 256 bytes, the specials and the unknown."""
    alphabet = {SPACE_MARK if character == " " else character for character in characters} - {"\0"}
    return len(alphabet) + 256 + len(SPECIAL) + 1


def load(folder):
    """The tokenizer that `save` wrote into this folder. Raises UserError where it is damaged."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            kind = json.load(file)["kind"]
        if kind not in ("char", "bpe"):
            raise ValueError(f"unknown kind {kind!r}")
        return CharTokenizer.load(folder) if kind == "char" else SentencePieceTokenizer.load(folder, kind)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise UserError(f"the tokenizer in {folder} is damaged: {type(error).__name__}: {error}",
                        "take the folder tokenizer/ from a copy, or prepare the data again") from None


def load_from(path, sha256=None):
    """The tokenizer of a tokenizer folder, of prepared data or of a run; with sha256, exactly the one meant."""
    for folder in (path, os.path.join(path, "tokenizer")):
        if os.path.exists(os.path.join(folder, "config.json")):
            tokenizer, found = load(folder), fingerprint(folder)
            if sha256 and found != sha256:
                raise UserError(f"{folder} is another tokenizer ({found[:12]}) than the one meant ({sha256[:12]})",
                                "take the folder tokenizer/ from a copy, or prepare the data again")
            return tokenizer
    raise UserError(f"{path} holds no tokenizer (no config.json, no tokenizer/config.json)",
                    "--tokenizer=bpe, or a folder that prepare.py or train.py has written")


def copy(source, target, sha256):
    """Copy source/tokenizer to target/tokenizer, unless the same one is there."""
    try:
        load_from(target, sha256)
    except UserError:
        shutil.rmtree(os.path.join(target, "tokenizer"), ignore_errors=True)
        shutil.copytree(os.path.join(source, "tokenizer"), os.path.join(target, "tokenizer"))


def fingerprint(folder):
    """A sha256 over all that `save` wrote: two tokenizers with the same one give the same ids."""
    digest = hashlib.sha256()
    for name in sorted(os.listdir(folder)):
        with open(os.path.join(folder, name), "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def write_config(folder, tokenizer):
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump(dict(kind=tokenizer.kind, vocab_size=tokenizer.vocab_size, special=tokenizer.special), file, indent=1)


def sentencepiece():
    try:
        import sentencepiece
        return sentencepiece
    except ImportError:
        raise UserError("the tokenizer bpe needs the package sentencepiece", "pip install sentencepiece, or "
                        "--tokenizer=char") from None

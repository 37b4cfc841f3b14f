# SPDX-License-Identifier: GPL-3.0-only
"""
GGUF: a model of llama.cpp, Ollama or LM Studio in one file. Here: what the file says, and its vocabulary.

    fields, tensors, data = read_gguf("model.gguf")
    tokenizer = from_gguf("model.gguf")

A file is a list of named values, a list of tensors (name, shape, kind of numbers, place), and the numbers.
Its vocabulary becomes the files of a Hugging Face folder, which text/pretrained.py reads.
"""
import json
import os

import numpy as np

from runtime.console import UserError
from runtime.files import open_file
from text.pretrained import MOST_IDS, HuggingFaceTokenizer, careful

FIX = "download the file again"
NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
STRING, ARRAY = 8, 9
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # kinds of tokens


class Cursor:
    """Reads one value after the other. Raises ValueError at the end of the file."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, dtype, n=1):
        size = n * np.dtype(dtype).itemsize
        if size > len(self.data) - self.at:
            raise ValueError("it is cut off")
        self.at += size
        return self.data[self.at - size:self.at].view(dtype)

    def number(self, dtype="<u4"):
        found = self.take(dtype)[0]
        return float(str(found)) if dtype == "<f4" else found.item()  # 1e-05, not 9.999999747378752e-06

    def text(self):
        return self.take("u1", self.number("<u8")).tobytes().decode()

    def value(self, kind):
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.number(NUMBERS[kind])
        kind, n = self.number(), self.number("<u8")
        if kind in NUMBERS:
            return self.take(NUMBERS[kind], n)
        if n > MOST_IDS:
            raise ValueError(f"a list of {n:,}")
        return [self.value(kind) for _ in range(n)]


def read_gguf(path):
    """({name: value}, {name: (shape, kind of numbers, place)}, the numbers). Raises all kinds of errors."""
    # 1. The beginning.
    with open_file(path) as file:
        data = np.memmap(file, np.uint8, "r")
    cursor = Cursor(data)
    begin, version = cursor.take("u1", 4).tobytes(), cursor.number()
    if begin != b"GGUF" or version not in (2, 3):
        raise ValueError(f"it begins with {begin!r}, version {version}, and not with GGUF, version 2 or 3")
    # 2. Named values, and the names, shapes and places of tensors.
    n_tensors, n_fields = cursor.number("<u8"), cursor.number("<u8")
    fields, tensors = {}, {}
    for _ in range(n_fields):
        name = cursor.text()
        add(fields, name, cursor.value(cursor.number()))
    for _ in range(n_tensors):
        name, dimensions = cursor.text(), cursor.number()
        shape = cursor.take("<u8", dimensions).tolist()
        add(tensors, name, (shape[::-1], cursor.number(), cursor.number("<u8")))
    # 3. The numbers begin at a multiple.
    step = fields.get("general.alignment", 32)
    if step < 8 or step % 8:
        raise ValueError(f"its alignment is {step}")
    return fields, tensors, data[cursor.at + -cursor.at % step:]


def add(found, name, value):
    if name in found:
        raise ValueError(f"{name} is there twice")
    found[name] = value


# ---------- The vocabulary

# How text is cut into words, by tokenizer.ggml.pre.
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS = {"gpt-2": [GPT2], "gpt2": [GPT2], "smollm": [r"\p{N}", GPT2], "llama-bpe": [LLAMA3], "llama3": [LLAMA3],
         "llama-v3": [LLAMA3], "qwen2": [QWEN2], "deepseek-r1-qwen": [QWEN2]}


def from_gguf(path):
    with careful(f"{path} is damaged, or no GGUF file", FIX):
        return tokenizer_of(read_gguf(path)[0], os.path.basename(path))


def tokenizer_of(fields, name):
    """The tokenizer that the fields of a file describe."""
    about = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
    tokens, kind = about["tokens"], about["model"]
    if kind not in KINDS:
        raise UserError(f"{name} has a vocabulary of the kind {kind}, not {' or '.join(KINDS)}", "another file")
    kinds = about.get("token_type", np.full(len(tokens), NORMAL))
    if len(set(tokens)) < len(tokens) or len(kinds) != len(tokens):
        raise ValueError(f"{len(tokens):,} tokens, of which some are equal or of no kind")

    # 1. The special tokens, and those that a text may contain.
    ids = {role: about[key] for role, key in ROLES.items() if 0 <= about.get(key, -1) < len(tokens)}
    special = {i for i, value in enumerate(kinds) if value == CONTROL} | set(ids.values())
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    added = [dict(plain, id=i, content=token, special=i in special) for i, token in enumerate(tokens)
             if i in special or kinds[i] == USER_DEFINED]

    # 2. The files of a folder.
    spec = dict(version="1.0", added_tokens=added, **KINDS[kind](about, kinds))
    begins = kind == "llama" or about.get("pre") in ("llama-bpe", "llama3", "llama-v3")
    if about.get("add_bos_token", begins) and "bos_token" in ids:
        spec["post_processor"] = begin_with(tokens[ids["bos_token"]], ids["bos_token"])
    settings = {role: tokens[i] for role, i in ids.items()}
    files = {"tokenizer.json": json.dumps(spec).encode(), "tokenizer_config.json": json.dumps(settings).encode()}
    if "tokenizer.chat_template" in fields:
        files["chat_template.jinja"] = fields["tokenizer.chat_template"].encode()
    tokenizer = HuggingFaceTokenizer(name, files)
    tokenizer.stops = [ids[role] for role in ("eos_token", "eot_token") if role in ids]
    return tokenizer


ROLES = dict(bos_token="bos_token_id", eos_token="eos_token_id", eot_token="eot_token_id",
             unk_token="unknown_token_id", pad_token="padding_token_id")


def begin_with(token, i):
    """The step of a tokenizer.json that puts a token before every text."""
    single = [dict(SpecialToken=dict(id=token, type_id=0)), dict(Sequence=dict(id="A", type_id=0))]
    return dict(type="TemplateProcessing", single=single, pair=[*single, dict(Sequence=dict(id="B", type_id=1))],
                special_tokens={token: dict(id=token, ids=[i], tokens=[token])})


def byte_level(about, kinds):
    """GPT-2's kind: bytes, and merges in their order."""
    words = about.get("pre", "gpt-2")
    if words not in WORDS:
        raise UserError(f"this vocabulary cuts texts into words as {words} does, which is not known here",
                        "the Hugging Face folder of the same model")
    split = [dict(type="Split", pattern=dict(Regex=regex), behavior="Isolated", invert=False) for regex in WORDS[words]]
    visible = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    model = dict(type="BPE", vocab={token: i for i, token in enumerate(about["tokens"])}, merges=about["merges"],
                 ignore_merges=WORDS[words] == [LLAMA3])
    return dict(model=model, pre_tokenizer=dict(type="Sequence", pretokenizers=[*split, visible]), decoder=visible,
                normalizer=dict(type="NFC") if words == "qwen2" else None)


def by_scores(about, kinds):
    """SentencePiece's kind: of all pairs that make a token, the one with the highest score is joined first."""
    ids = {token: i for i, token in enumerate(about["tokens"])}
    joined = [token for token, i in ids.items() if kinds[i] in (NORMAL, USER_DEFINED)]
    longest = max(map(len, joined))
    if longest > 1000:
        raise ValueError(f"a token of {longest:,} characters")
    pairs = [(-float(about["scores"][ids[token]]), ids[left], ids[right], left, right) for token in joined
             for left, right in ((token[:n], token[n:]) for n in range(1, len(token))) if left in ids and right in ids]
    merges = [pair[3:] for pair in sorted(pairs)]
    unknown = about["tokens"][about.get("unknown_token_id", 0)]
    model = dict(type="BPE", vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    mark, back = dict(type="Replace", pattern=dict(String=" "), content="\u2581"), dict(
        type="Replace", pattern=dict(String="\u2581"), content=" ")
    first, last = [dict(type="Prepend", prepend="\u2581")], [dict(type="Strip", content=" ", start=1, stop=0)]
    if not about.get("add_space_prefix", True):
        first, last = [], []
    decoders = [back, dict(type="ByteFallback"), dict(type="Fuse"), *last]
    return dict(model=model, normalizer=dict(type="Sequence", normalizers=[*first, mark]),
                decoder=dict(type="Sequence", decoders=decoders))


KINDS = {"gpt2": byte_level, "llama": by_scores}  # by tokenizer.ggml.model

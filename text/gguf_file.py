# SPDX-License-Identifier: GPL-3.0-only
"""
GGUF, the file of llama.cpp, Ollama and LM Studio: named values, tensors, and the vocabulary in the values.

    fields, tensors, data = read_gguf("model.gguf")
    tokenizer = from_gguf("model.gguf")
"""
import json
import os

import numpy as np

from runtime.console import UserError, needs
from runtime.files import open_file
from text.pretrained import MOST_IDS, HuggingFaceTokenizer, careful

NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
STRING, ARRAY = 8, 9


class Cursor:
    """Reads one value after the other. Raises ValueError where the file is cut off, and others."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, dtype, n=1):
        self.at += n * np.dtype(dtype).itemsize
        if self.at > len(self.data) or n > MOST_IDS:
            raise ValueError("it is cut off")
        return self.data[self.at - n * np.dtype(dtype).itemsize:self.at].view(dtype)

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
        return [self.value(kind) for _ in range(min(n, MOST_IDS))]  # more do not fit into a file that is read


def read_gguf(path):
    """({name: value}, {name: (shape, kind of numbers, place)}, the numbers). Raises all kinds of errors."""
    with open_file(path) as file:
        cursor = Cursor(np.memmap(file, np.uint8, "r"))
    begin, version = cursor.take("u1", 4).tobytes(), cursor.number()
    if begin != b"GGUF" or version not in (2, 3):
        raise ValueError(f"it begins with {begin!r}, version {version}, and not with GGUF, version 2 or 3")
    n_tensors, n_fields = cursor.number("<u8"), cursor.number("<u8")
    fields, tensors = {}, {}
    for _ in range(n_fields):
        name = cursor.text()
        fields[name] = cursor.value(cursor.number())
    for _ in range(n_tensors):
        name = cursor.text()
        shape = cursor.take("<u8", cursor.number())[::-1].tolist()
        tensors[name] = shape, cursor.number(), cursor.number("<u8")
    if len(tensors) < n_tensors or len(fields) < n_fields:
        raise ValueError("a name comes twice")
    step = max(8, fields.get("general.alignment", 32))
    return fields, tensors, cursor.data[cursor.at + -cursor.at % step:]


# ---------- The vocabulary, as the files of a Hugging Face folder

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # kinds of tokens
ROLES = dict(bos_token="bos_token_id", eos_token="eos_token_id", eot_token="eot_token_id", unk_token="unknown_token_id",
             pad_token="padding_token_id")
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS = {  # how a text is cut into words, by tokenizer.ggml.pre
    "gpt-2": [GPT2], "smollm": [r"\p{N}", GPT2], "llama-bpe": [LLAMA3], "qwen2": [QWEN2], "deepseek-r1-qwen": [QWEN2]}


def from_gguf(path):
    with careful(f"{path} is damaged, or no GGUF file", "download the file again"):
        return tokenizer_of(read_gguf(path)[0], os.path.basename(path))


def tokenizer_of(fields, name):
    """The tokenizer that the fields of a file describe."""
    library = needs("tokenizers", "GGUF files")
    about = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
    tokens, kinds = about["tokens"], about["token_type"]
    model, words = about["model"], about.get("pre", "gpt-2")
    if model not in ("gpt2", "llama") or model == "gpt2" and words not in WORDS:
        raise UserError(f"{name} has a vocabulary of the kind {model}, {words}, which is not known here",
                        "the Hugging Face folder of the same model")
    made = by_scores(library, about) if model == "llama" else by_merges(library, about, words)
    # 1. The special tokens, and those that a text may contain.
    ids = {role: about[key] for role, key in ROLES.items() if 0 <= about.get(key, -1) < len(tokens)}
    special = {i for i, kind in enumerate(kinds) if kind == CONTROL} | set(ids.values())
    made.add_tokens([library.AddedToken(token, normalized=False, special=i in special)
                     for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
                     if i in special or kind == USER_DEFINED])
    if [made.token_to_id(token) for token in tokens] != list(range(len(tokens))):
        raise ValueError("two tokens are equal")
    # 2. The token before every text.
    if about.get("add_bos_token", model == "llama" or words == "llama-bpe") and "bos_token" in ids:
        bos = tokens[ids["bos_token"]]
        made.post_processor = library.processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B:1"], special_tokens=[(bos, ids["bos_token"])])
    # 3. The folder.
    settings = {role: tokens[i] for role, i in ids.items()} | dict(chat_template=fields.get("tokenizer.chat_template"))
    files = {"tokenizer.json": made.to_str().encode(), "tokenizer_config.json": json.dumps(settings).encode()}
    tokenizer = HuggingFaceTokenizer(name, files)
    tokenizer.stops = [ids[role] for role in ("eos_token", "eot_token") if role in ids]
    return tokenizer


def by_merges(library, about, words):
    """GPT-2's kind: bytes, and pairs to merge, in their order."""
    merges = [tuple(pair.split(" ")) for pair in about["merges"]]
    made = library.Tokenizer(library.models.BPE(
        {token: i for i, token in enumerate(about["tokens"])}, merges, ignore_merges=words == "llama-bpe"))
    steps = [library.pre_tokenizers.Split(library.Regex(regex), "isolated") for regex in WORDS[words]]
    steps.append(library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    made.pre_tokenizer = library.pre_tokenizers.Sequence(steps)
    made.decoder = library.decoders.ByteLevel()
    if words == "qwen2":
        made.normalizer = library.normalizers.NFC()
    return made


def by_scores(library, about):
    """SentencePiece's kind: of all pairs that make a token, that of the highest score is merged first."""
    ids = {token: i for i, token in enumerate(about["tokens"])}
    pairs = []
    for token, i in ids.items():
        if about["token_type"][i] in (NORMAL, USER_DEFINED):
            cuts = [(token[:n], token[n:]) for n in range(1, min(len(token), 1000))]
            pairs += [(-float(about["scores"][i]), ids[left], ids[right], left, right)
                      for left, right in cuts if left in ids and right in ids]
    made = library.Tokenizer(library.models.BPE(
        ids, [pair[3:] for pair in sorted(pairs)], fuse_unk=True, byte_fallback=True,
        unk_token=about["tokens"][about.get("unknown_token_id", 0)]))
    prefix = about.get("add_space_prefix", True)  # a space before the text, which decoding takes away
    steps, back = library.normalizers, library.decoders
    made.normalizer = steps.Sequence([steps.Prepend("\u2581")] * prefix + [steps.Replace(" ", "\u2581")])
    made.decoder = back.Sequence([back.Replace("\u2581", " "), back.ByteFallback(), back.Fuse()]
                                 + [back.Strip(" ", 1, 0)] * prefix)
    return made

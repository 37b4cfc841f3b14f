# SPDX-License-Identifier: GPL-3.0-only
"""
Other people's vocabularies, with the ids that their models have learned, and their chat formats.

    tokenizer = from_tiktoken("gpt2")           # an encoding of tiktoken: gpt2, cl100k_base, o200k_base, ...
    tokenizer = from_hugging_face("SmolLM2")    # a folder with a tokenizer.json: Llama, Mistral, Gemma, Qwen, ...
    ids = tokenizer.chat([{"role": "user", "content": "Hello"}])    # a prompt, in the model's own chat format
    ids, mask = tokenizer.conversation([..., {"role": "assistant", "content": "Hi!"}])  # what to learn: mask 1

GPT-2 and most models after it start from bytes (Radford et al. 2019): 256 tokens can spell any text, and merges, in
the order in which they were learned, join them to longer ones. A regular expression first cuts the text into words,
which no merge crosses. Llama 2, Mistral and Gemma start from characters, as SentencePiece does, and spell in bytes
what has no token ("byte fallback"). The packages tiktoken and tokenizers do this work. Here stands which bytes a token
stands for, and that a text never becomes a special token.
"""
import base64
import contextlib
import functools
import itertools
import json
import os
import re
from datetime import datetime

import numpy as np

from runtime.console import UserError, needs
from runtime.files import open_file

# GPT-2's expression: contractions, words and numbers with the space before them, runs of other signs, white space. The
# last space before a word is left to that word.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LONG_RUN = 1 << 14  # tiktoken's expression engine overflows its stack in some 100,000 white spaces in a row
MOST_IDS = 1 << 24  # each takes memory
CHAT_FIX = "the folder of a chat model, with its tokenizer_config.json or chat_template.jinja"
MESSAGES_FIX = '[{"role": "user", "content": "..."}, ...]'
SOURCE_FIX = "take the tokenizer's files from their source again, or prepare the data again"
ENCODING = ("encoding.json", "encoding.tiktoken")  # what `save` writes of a tiktoken encoding
PARTS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")  # what `save` copies of a folder
# Noncharacters, which no ordinary text contains:
BREAK = "\ufdd0\ufdd9\ufdd3"  # stands inside what only looks like a special token
BEFORE = "\ufdd4"  # stands for any text before


class Tokenizer:
    """What all tokenizers have in common. They add encode_to_numpy, and chat and conversation.

    special: {text: id} of the tokens that text never becomes. bytes: what each id stands for. files: {name: bytes} that
    `save` writes. template: the chat format of a model of others; settings: the special tokens that it names.
    missing: bytes that no token stands for. rewrites: can a text come back changed otherwise?
    prefix: is a space put before a text, which `decode` takes away?
    """

    missing, rewrites, prefix, template, settings = b"", False, False, "", {}

    def encode(self, text):
        return self.encode_to_numpy(text).tolist()

    def token_bytes(self, i):
        return self.bytes[i] if i < self.vocab_size else b""

    def decode(self, ids):
        raw = b"".join(map(self.token_bytes, ids))
        return raw.removeprefix(b" " * self.prefix).decode(errors="replace")

    def save(self, folder):
        os.makedirs(folder, exist_ok=True)
        for name, content in files_of(self).items():
            with open(os.path.join(folder, name), "wb") as file:
                file.write(content)

    def chat(self, messages, answer=True):
        raise UserError(f"the tokenizer {self.name} has no chat template", f"--tokenizer=bpe, or {CHAT_FIX}")

    conversation = chat


def read(folder, name):
    with open_file(os.path.join(folder, name), most=1 << 28) as file:
        return file.read()


def files_of(tokenizer):
    """{name: bytes} of all that `save` writes."""
    about = dict(kind=tokenizer.kind, vocab_size=tokenizer.vocab_size, special=tokenizer.special)
    return {**tokenizer.files, "config.json": json.dumps(about, indent=1).encode()}


@contextlib.contextmanager
def careful(fact):
    """Whatever a stranger's file does to a library becomes a UserError. (A panic of Rust is no Exception.)"""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{fact}: {type(error).__name__}: {error}", SOURCE_FIX) from None


def check_ids(ids):
    """Raises ValueError where an id is out of range, or given twice."""
    if len(set(ids)) < len(ids) or not all(type(i) is int and 0 <= i < MOST_IDS for i in ids):
        raise ValueError(f"an id is given twice, or is no number from 0 to {MOST_IDS - 1:,}")


# ---------------------------------------------------------------------------------------------------------------------
# tiktoken's encodings

def from_tiktoken(name):
    """An encoding by its name in tiktoken, which fetches it once."""
    library = tiktoken()
    try:
        encoding = library.get_encoding(name)
    except Exception as error:  # of requests, of the disk, or a wrong checksum
        reason = f"{type(error).__name__}: {error}".split("(Caused")[0][:200]
        raise UserError(f"tiktoken cannot fetch the vocabulary {name}: {reason}",
                        "connect to the network once; or set TIKTOKEN_CACHE_DIR to a copy of tiktoken's cache; or "
                        "--tokenizer=bpe") from None
    about = dict(name=name, pattern=encoding._pat_str, special=encoding._special_tokens)
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in encoding._mergeable_ranks.items())
    return TiktokenTokenizer({"encoding.json": json.dumps(about).encode(), "encoding.tiktoken": b"".join(lines)})


def tiktoken():
    return needs("tiktoken", "byte-level vocabularies")


class TiktokenTokenizer(Tokenizer):
    """An encoding from the two files that `save` writes: no network is needed any more.

    ranks: {bytes: id} of all tokens; an earlier one is merged first.
    """

    kind = "tiktoken"

    def __init__(self, files):
        about, lines = json.loads(files["encoding.json"]), files["encoding.tiktoken"].splitlines()
        self.files, self.name, self.pattern, self.special = files, about["name"], about["pattern"], about["special"]
        self.ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
        check_ids([*self.ranks.values(), *self.special.values()])
        # Special tokens are inserted here, but without any, tiktoken looks for an empty one behind every character.
        self.encoding = tiktoken().Encoding(self.name, pat_str=self.pattern, mergeable_ranks=self.ranks,
                                            special_tokens={"<|unused|>": max(self.ranks.values()) + 1})
        self.vocab_size = max(*self.ranks.values(), *self.special.values()) + 1
        self.bytes = [b""] * self.vocab_size
        for token, rank in self.ranks.items():
            self.bytes[rank] = token
        self.encode("a")  # the thread that comes first owns a cache: better not one of many that work

    def encode_to_numpy(self, text, follows=False):
        with careful(f"the tokenizer {self.name} fails on a text"):
            ids = [self.encoding.encode_to_numpy(part, disallowed_special=()) for part in short_runs(text)]
        return np.concatenate(ids)


def short_runs(text):
    """A text in parts without a very long run of white space. Nearly always it is one part."""
    start = 0
    for i in range(0, len(text) - LONG_RUN + 1, LONG_RUN):
        if text[i:i + LONG_RUN].isspace():
            yield text[start:i]
            start = i
    yield text[start:]


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face's tokenizer.json

def from_hugging_face(folder):
    """The tokenizer of a Hugging Face folder. Raises UserError where its files cannot be read."""
    path = os.path.join(folder, "tokenizer.json")
    with careful(f"{path} is damaged, or of an unknown layout"):
        files = {name: read(folder, name) for name in PARTS if os.path.isfile(os.path.join(folder, name))}
        return HuggingFaceTokenizer(os.path.basename(os.path.abspath(folder)), path, files)


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, read by the package tokenizers, with the chat format beside it."""

    kind, unforged = "hugging_face", {}

    def __init__(self, name, path, files):
        self.name, self.files = name, files
        spec, config = json.loads(files["tokenizer.json"]), json.loads(files.get("tokenizer_config.json", b"{}"))
        self.settings, self.template = named_tokens(config), chat_template(files, config)

        # 1) the special tokens: those that either file calls special
        added = {token["content"]: token for token in spec.get("added_tokens") or []}
        for text, token in added.items():
            token["special"] |= text in self.settings.values()
        self.added_special = {text: token for text, token in added.items() if token["special"]}
        ends = ("<|endoftext|>", "<|end_of_text|>", self.settings.get("eos_token"))
        end = next((text for text in ends if text in self.added_special), None)
        if end is None:
            raise UserError(f"{path} names no special token for the end of a text, <|endoftext|> or an eos_token",
                            "add the folder's tokenizer_config.json, which names it")
        self.special = {"<|endoftext|>": self.added_special[end]["id"]}  # the name that the other scripts know
        self.special |= {text: token["id"] for text, token in self.added_special.items()}
        self.special_of = {token["id"]: token for token in self.added_special.values()}
        self.special_names = tree(self.added_special)

        # 2) the library, which gets what concerns the text alone
        spec["model"].pop("dropout", None)
        spec.update(truncation=None, padding=None)
        self.library = needs("tokenizers", "Hugging Face tokenizers").Tokenizer.from_str(json.dumps(spec))
        self.library.encode_special_tokens = True  # in a text, the name of a special token is text
        vocabulary = self.library.get_vocab()
        check_ids(vocabulary.values())
        if any(text == "" or vocabulary.get(text) != token["id"] for text, token in added.items()):
            raise ValueError("an added token has no text, or not the id of the vocabulary")

        # 3) the bytes of each token
        before, decoder = steps(spec.get("normalizer")) + steps(spec.get("pre_tokenizer")), steps(spec.get("decoder"))
        byte_level = any(step["type"] == "ByteLevel" for step in before + decoder)
        self.vocab_size = max(vocabulary.values()) + 1
        self.bytes = [b""] * self.vocab_size
        for text, i in vocabulary.items():
            if i not in self.special_of:
                self.bytes[i] = spelled(text, decoder, byte_level and text not in added)
        if byte_level:
            self.missing = bytes(byte for character, byte in ALPHABET.items() if character not in vocabulary)
        self.rewrites = bool(spec.get("normalizer")) or not byte_level

        # 4) what is put before a text
        unknown = self.encode(BEFORE)
        self.n_before = len(unknown)
        self.prefix = b"".join(map(self.token_bytes, self.encode("a"))).startswith(b" ")
        self.prefix_once = any(step.get("prepend_scheme") == "first" for step in before)

        # 5) special tokens that the model itself makes of their names, as Unigram does: they are spelled in two parts.
        # (Not the one that any unknown character becomes.)
        parts = {}
        for text, i in self.special.items():
            if i in self.encode(text) + self.encode(text, follows=True) and i not in unknown:
                parts[i] = self.encode(text[:1], follows=True) + self.encode(text[1:], follows=True)
        self.unforged = {i: [j for j in ids if j not in parts] for i, ids in parts.items()}

    def encode(self, text, follows=False):
        """The ids of a text. follows: another text comes before it, so no space is put there."""
        shown = BEFORE + text if follows and self.prefix else text
        with careful(f"the tokenizer {self.name} fails on a text"):
            found, = self.library.encode_batch_fast([shown], add_special_tokens=False)  # (lets other threads work)
        ids = found.ids if shown is text else found.ids[self.n_before:]
        if self.unforged and not self.unforged.keys().isdisjoint(ids):
            ids = [j for i in ids for j in self.unforged.get(i, [i])]
        return ids

    def encode_to_numpy(self, text, follows=False):
        return np.array(self.encode(text, follows), dtype=np.uint32)

    def encode_with_special(self, text, before=()):
        """The ids of a chat, in whose text the names of special tokens stand for these. before: the ids before it."""
        parts = re.split(f"({self.special_names})", text)  # text, name, text, ..., name, text
        ids = list(before)
        for part, name in itertools.zip_longest(parts[::2], parts[1::2]):
            last = self.special_of.get(ids[-1]) if ids else None
            if last and last["rstrip"]:  # it takes in the white space behind it
                part = part.lstrip()
            if name and self.added_special[name]["lstrip"]:
                part = part.rstrip()
            if part:
                begins = not ids or last and not self.prefix_once  # where the library puts its space
                ids += self.encode(part.replace(BREAK, ""), follows=not begins)
            if name:
                ids.append(self.special[name])
        return ids[len(before):]

    def chat(self, messages, answer=True):
        """The ids of a conversation, [{"role": "user", "content": "..."}, ...], in this model's own format.

        answer: end with the beginning of the assistant's turn. The format is a Jinja template that came with the
        model. What a message contains stays text: "<|im_end|>" in it ends nothing.
        """
        return self.encode_with_special(self.fill(self.guard(messages), answer))

    def conversation(self, messages):
        """(ids, mask) of a conversation, two lists: the mask is 1 on each answer that is not empty, and its end token.

        A template does not say which of its text comes from which message. So it is asked for the text up to each
        answer, as for a prompt, and for the text with that answer; each has to begin with the one before.
        """
        guarded = self.guard(messages)
        end = self.special.get(self.settings.get("eos_token"))
        text, ids, mask = "", [], []

        def go_on(longer, learned):
            nonlocal text
            if not longer.startswith(text):
                raise UserError(f"the chat template of {self.name} rewrites earlier text as a conversation goes on",
                                "conversations of one question and one answer, or another template")
            new = self.encode_with_special(longer[len(text):], before=ids)
            if learned and end not in new:
                raise UserError(f"the chat template of {self.name} puts no eos_token behind an answer, so a model "
                                "would not learn to end", "name the token that it puts there as eos_token in the "
                                "folder's tokenizer_config.json")
            n = new.index(end) + 1 if learned else 0
            ids.extend(new)
            mask.extend([1] * n + [0] * (len(new) - n))
            text = longer

        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                go_on(self.fill(guarded[:i], True), learned=False)
                go_on(self.fill(guarded[:i + 1], False), learned=message["content"] != "")
        go_on(self.fill(guarded, False), learned=False)
        if self.special["<|endoftext|>"] in ids:
            raise UserError(f"the chat template of {self.name} contains its end-of-text token, which stands between "
                            "conversations in prepared data", "a model whose turns end with another token")
        return ids, mask

    def guard(self, messages):
        """The messages with BREAK inside of everything that looks like a special token."""
        if not self.template:
            super().chat(messages)
        check_messages(messages)
        return changed(messages, self.broken)

    def broken(self, text):
        text = re.sub(f"(?={self.special_names})(?s:.)", lambda found: found[0] + BREAK, text)
        if re.search(self.special_names, text):  # one of a single character
            raise UserError("a message contains a special token of this model", "leave it out")
        return text

    def fill(self, messages, answer):
        return render(self.template, messages=messages, add_generation_prompt=answer, **self.settings)


def named_tokens(config):
    """{name: text} of the special tokens that a tokenizer_config.json names, such as eos_token."""
    found = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def chat_template(files, config):
    template = files.get("chat_template.jinja", b"").decode() or config.get("chat_template") or ""
    if isinstance(template, list):  # several, each with a name
        template = next((one["template"] for one in template if one["name"] == "default"), "")
    return template


def steps(part):
    """The steps of a part of a tokenizer.json: one, a Sequence of several, or none."""
    if not part or part["type"] != "Sequence":
        return [part] if part else []
    inner = part.get("normalizers") or part.get("pretokenizers") or part.get("decoders") or []
    return [step for one in inner for step in steps(one)]


def byte_alphabet():
    """GPT-2's way to write bytes as visible characters: {character: byte}. A space is written as U+0120."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(others)}


ALPHABET = byte_alphabet()


def spelled(token, decoder, byte_level):
    """The bytes that a token stands for: what the steps of the decoder make of it."""
    if byte_level:
        known = all(character in ALPHABET for character in token)
        return bytes(ALPHABET[character] for character in token) if known else token.encode()
    for step in decoder:
        kind = step["type"]
        if kind == "ByteFallback" and re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])  # "<0x0A>" is the byte 10
        if kind == "Metaspace":
            token = token.replace(step["replacement"], " ")
        elif kind == "Replace" and "String" in step["pattern"]:
            token = token.replace(step["pattern"]["String"], step["content"])
        elif kind == "BPEDecoder":
            token = token.replace(step["suffix"], " ")
        elif kind == "WordPiece":
            token = token.removeprefix(step["prefix"]) if token.startswith(step["prefix"]) else " " + token
    return token.encode()


# ---------------------------------------------------------------------------------------------------------------------
# Chats

def tree(texts):
    """An expression that finds any of the texts, the longest first. It tries a common beginning only once: special
    tokens number thousands."""
    start = os.path.commonprefix([*texts])
    branches = {}
    for text in texts:
        rest = text[len(start):]
        branches.setdefault(rest[:1], []).append(rest)
    end = "?" if branches.pop("", None) else ""
    return re.escape(start) + (f"(?:{'|'.join(map(tree, branches.values()))}){end}" if branches else "")


def check_messages(messages, roles=()):
    """Raises UserError where a message has no text, or a role that is none of these (without any: all are allowed)."""
    for message in messages:
        if not (isinstance(message, dict) and isinstance(message.get("content"), str) and "role" in message):
            raise UserError("a message without role or without text", MESSAGES_FIX)
        if roles and message["role"] not in roles:
            raise UserError(f"a message of {message['role']!r}: the roles are {', '.join(roles)}", MESSAGES_FIX)


def changed(value, change):
    """Lists and dicts with every text in them changed."""
    if isinstance(value, dict):
        return {key: changed(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [changed(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def render(template, **values):
    """Fill in a chat template. Raises UserError where it fails."""
    try:
        text = compiled(template).render(**values)
        text.encode()  # half a character (a surrogate) cannot be tokenized
        return text
    except UserError:  # jinja2 is missing
        raise
    except Exception as error:  # a template is a program
        raise UserError(f"the chat template fails on these messages: {type(error).__name__}: {error}",
                        "check the roles and their order: most want user and assistant to alternate") from None


# Filters and methods that make a long text of a short one.
PADDING = {"center", "expandtabs", "format", "format_map", "ljust", "rjust", "zfill"}


@functools.lru_cache(maxsize=8)  # it takes a hundred times as long as filling it in
def compiled(template):
    """A chat template: Jinja in its sandbox, which keeps it from running code, with what such templates expect."""
    needs("jinja2", "chat templates")
    import jinja2.sandbox

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, indent=None):  # Jinja's own escapes HTML
        return json.dumps(value, ensure_ascii=False, indent=indent and min(indent, 8))

    def strftime_now(form):
        return datetime.now().strftime(form)

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        """Jinja's own keeps a template from running code; this one also from filling the memory in a moment."""

        intercepted_binops = frozenset(["**", "*", "%"])

        def call_binop(self, context, operator, left, right):
            if operator == "**" or not all(type(n) in (int, float) and abs(n) < 1e9 for n in (left, right)):
                raise jinja2.TemplateError(f"{operator} is for small numbers here")
            return super().call_binop(context, operator, left, right)

        def is_safe_attribute(self, value, name, found):
            return name not in PADDING and super().is_safe_attribute(value, name, found)

        def wrap_str_format(self, method):
            return None  # (Jinja would allow a `format` of its own, which pads as well)

    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    for name in PADDING & sandbox.filters.keys():
        del sandbox.filters[name]
    sandbox.filters["tojson"] = tojson
    sandbox.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    # {% generation %} marks what the assistant says, for training; here it is an `if` that is always true.
    template = re.sub(r"({%-?\s*)(end)?generation(\s*-?%})",
                      lambda tag: tag[1] + ("endif" if tag[2] else "if true") + tag[3], template)
    return sandbox.from_string(template)

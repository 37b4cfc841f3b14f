# SPDX-License-Identifier: GPL-3.0-only
"""
Other people's vocabularies, with the ids that their models have learned, and their chat formats.

    tokenizer = from_tiktoken("gpt2")           # or cl100k_base, o200k_base, ...
    tokenizer = from_hugging_face("SmolLM2")    # a folder with a tokenizer.json: Llama, Gemma, Qwen, ...
    ids = tokenizer.chat([{"role": "user", "content": "Hello"}])    # a prompt, in the model's own format

GPT-2 and most models after it start from bytes (Radford et al. 2019): 256 tokens can spell any text, and
merges join them, in the order in which they were learned. Before, a regular expression cuts the text into
words, which no merge crosses. Llama 2, Mistral and Gemma start from characters and spell in bytes what has no
token ("byte fallback"). The packages tiktoken and tokenizers do this. Added here: the bytes of each token,
and the promise that text never becomes a special token.
"""
import base64
import contextlib
import copy
import functools
import itertools
import json
import os
import re
import time

import numpy as np

from runtime.console import UserError, needs
from runtime.files import open_file

LONG_RUN = 1 << 14  # of white space; in some 100,000 characters of it, tiktoken's stack overflows
MOST_IDS = 1 << 24  # each takes memory
ENCODING = ("encoding.json", "encoding.tiktoken")  # what `save` writes of a tiktoken encoding
# What `save` copies of a folder; the last one only where tokenizer_config.json has no eos_token.
PARTS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
KEPT = ("role", "content", "tool_calls", "tool_call_id", "name")  # what a chat template sees of a message
# Noncharacters, which no ordinary text contains:
BREAK = "\ufdd0\ufdd9\ufdd3"  # stands inside what only looks like a special token
BEFORE = "\ufdd4"  # stands for any text before
HERE = "\ufdd5"  # ends a message that is not over yet

SOURCE_FIX = "download the tokenizer's files again, or prepare the data again"
CHAT_FIX = "the folder of a chat model, with its tokenizer_config.json or chat_template.jinja"
MESSAGES_FIX = '[{"role": "user", "content": "..."}, ...]'
TOOLS_FIX = "leave tools out, or the folder of a chat model whose template has a form for them"
TEMPLATE_FIX = "check the roles and their order: most want user and assistant to alternate"
NETWORK_FIX = "connect to the network once; or TIKTOKEN_CACHE_DIR=a copy of its cache; or --tokenizer=bpe"


class Tokenizer:
    """What all tokenizers have in common. They add encode_to_numpy, chat and conversation.

    special: {text: id} of the tokens that text never becomes. bytes: what each id stands for.
    files: {name: bytes} that `save` writes. missing: bytes that no token stands for.
    template, settings: a chat format, and the special tokens that it names.
    prefix: is a space put before a text, which `decode` takes away? start: ids before a prompt.
    stops: ids that end a text, besides the eos_token.
    """

    missing, prefix, template, settings, start, stops = b"", False, "", {}, (), ()

    def encode(self, text):
        return self.encode_to_numpy(text).tolist()

    def prompt(self, text):
        """The ids of a text to continue; with many models, it begins with a token of its own."""
        return [*self.start, *self.encode(text)]

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

    conversation = continued = chat


def read(folder, name):
    with open_file(os.path.join(folder, name), most=1 << 28) as file:
        return file.read()


def files_of(tokenizer):
    """{name: bytes} of all that `save` writes."""
    about = dict(kind=tokenizer.kind, vocab_size=tokenizer.vocab_size, special=tokenizer.special)
    return {**tokenizer.files, "config.json": json.dumps(about, indent=1).encode()}


@contextlib.contextmanager
def careful(fact, fix=SOURCE_FIX):
    """Whatever a stranger's file does to a library becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        kind = type(error).__name__
        if not isinstance(error, Exception) and kind != "PanicException":  # Rust's, which is no Exception
            raise
        raise UserError(f"{fact}: {kind}: {error}"[:400], fix) from None


def check_ids(ids):
    """Raises ValueError where an id is out of range, or given twice."""
    if len(set(ids)) < len(ids) or not all(type(i) is int and 0 <= i < MOST_IDS for i in ids):
        raise ValueError(f"an id is repeated, or not a number from 0 to {MOST_IDS - 1:,}")


# ---------- tiktoken's encodings

def tiktoken():
    return needs("tiktoken", "byte-level vocabularies")


def from_tiktoken(name):
    """An encoding by its name in tiktoken, which fetches it once."""
    library = tiktoken()
    with careful(f"tiktoken cannot fetch the vocabulary {name}", NETWORK_FIX):
        encoding = library.get_encoding(name)
    about = dict(name=name, pattern=encoding._pat_str, special=encoding._special_tokens)
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in encoding._mergeable_ranks.items()]
    contents = json.dumps(about).encode(), b"".join(lines)
    return TiktokenTokenizer(dict(zip(ENCODING, contents)))


class TiktokenTokenizer(Tokenizer):
    """An encoding from the two files that `save` writes. ranks: {bytes: id}; lower ids are merged first."""

    kind = "tiktoken"

    def __init__(self, files):
        self.files = files
        about = json.loads(files["encoding.json"])
        self.name, self.pattern, self.special = about["name"], about["pattern"], about["special"]
        lines = map(bytes.split, files["encoding.tiktoken"].splitlines())
        self.ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        ids = [*self.ranks.values(), *self.special.values()]
        check_ids(ids)
        self.vocab_size = max(ids) + 1
        self.bytes = [b""] * self.vocab_size
        for token, rank in self.ranks.items():
            self.bytes[rank] = token
        # Without any special token, tiktoken looks for an empty one behind every character.
        unused = {"<|unused|>": max(self.ranks.values()) + 1}
        self.encoding = tiktoken().Encoding(
            self.name, pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens=unused)
        self.encode("a")  # the thread that comes first owns a cache: better not one of many that work

    def encode_to_numpy(self, text, follows=False):
        with careful(f"the tokenizer {self.name} fails on a text"):
            ids = [self.encoding.encode_to_numpy(part, disallowed_special=()) for part in short_runs(text)]
        return np.concatenate(ids)


class GPT2(Tokenizer):
    """GPT-2's encoding by its name: ids can be trained on, and only a text needs the vocabulary, here or fetched.

    folder: where `save` has written a copy.
    """

    kind = name = "gpt2"
    vocab_size, special, files = 50257, {"<|endoftext|>": 50256}, {}

    def __init__(self, folder=""):
        self.folder = folder

    @functools.cached_property
    def whole(self):
        if not os.path.exists(os.path.join(self.folder, ENCODING[1])):
            return from_tiktoken("gpt2")
        with careful(f"{self.folder} is damaged"):
            return TiktokenTokenizer({name: read(self.folder, name) for name in ENCODING})

    def __getattr__(self, name):  # the bytes of the tokens, the words, how a text is encoded
        return getattr(self.whole, name)

    def save(self, folder):
        with contextlib.suppress(UserError):
            self.whole.save(folder)
        super().save(folder)  # its config.json takes the place of the other


def short_runs(text):
    """A text in parts without a very long run of white space. Nearly always it is one part."""
    start = 0
    for i in range(0, len(text) - LONG_RUN + 1, LONG_RUN):
        if text[i:i + LONG_RUN].isspace():
            yield text[start:i]
            start = i
    yield text[start:]


# ---------- Hugging Face's tokenizer.json

def from_hugging_face(folder):
    """The tokenizer of a Hugging Face folder. Raises UserError where its files cannot be read."""
    with careful(f"{os.path.join(folder, PARTS[0])} is damaged, or has an unknown layout"):
        found = [name for name in PARTS if os.path.isfile(os.path.join(folder, name))]
        files = {name: read(folder, name) for name in found}
        if "eos_token" in json.loads(files.get(PARTS[1], b"{}")):
            files.pop(PARTS[3], None)
        return HuggingFaceTokenizer(os.path.basename(os.path.abspath(folder)), files)


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, read by the package tokenizers, with the chat format beside it.

    names: {id: text} of the special tokens. named: an expression that finds them in a text.
    """

    kind = "hugging_face"

    def __init__(self, name, files):
        self.name, self.files = name, files
        spec = json.loads(files["tokenizer.json"])
        config = json.loads(files.get("tokenizer_config.json", b"{}"))
        self.settings = named_tokens(json.loads(files.get(PARTS[3], b"{}"))) | named_tokens(config)
        self.template = chat_template(files, config)
        self.special = special_tokens(spec, self.settings, name)
        self.names = {i: text for text, i in self.special.items()}
        # (Thousands of names may differ in a number alone: <|reserved_17|>. One expression for them is fast.)
        self.named = "|".join({re.sub(r"\d+", r"\\d+", re.escape(text)) for text in self.special})

        # 1) the library
        spec["model"].pop("dropout", None)
        spec.update(truncation=None, padding=None)
        self.library = needs("tokenizers", "Hugging Face tokenizers").Tokenizer.from_str(json.dumps(spec))
        self.library.encode_special_tokens = True  # in a text, the name of a special token is text
        vocabulary = self.library.get_vocab()
        check_ids(vocabulary.values())
        added = {token["content"]: token["id"] for token in spec["added_tokens"]}
        if "" in added or not added.items() <= vocabulary.items():
            raise ValueError("an added token has no text or the wrong id")

        # 2) the bytes of each token
        parts = [spec.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]
        byte_level = '"ByteLevel"' in json.dumps(parts)
        decoder = None if byte_level else self.library.decoder
        self.vocab_size = max(vocabulary.values()) + 1
        self.bytes = [b""] * self.vocab_size
        for text in vocabulary.keys() - self.names.values():
            self.bytes[vocabulary[text]] = spelled(text, decoder, byte_level and text not in added)
        if byte_level:
            alphabet = byte_alphabet()
            self.missing = bytes(alphabet[visible] for visible in alphabet if visible not in vocabulary)
        letter = min((text for text in vocabulary if len(text) == 1 and text.isalnum()), default="a")
        self.prefix = self.decode(self.encode(letter)).startswith(" ")
        # What transformers puts before a text stands in the post_processor, and nowhere else.
        whole = self.library.encode(letter)
        added = zip(whole.ids, whole.special_tokens_mask)
        self.start = [i for i, _ in itertools.takewhile(lambda pair: pair[1], added)]
        if any(i >= self.vocab_size for i in self.start):
            raise ValueError("the post_processor has an id that does not exist")
        self.cut_names()

    def cut_names(self):
        """Cut the names of special tokens that the model itself would make, as Unigram does, in two."""
        from tokenizers import Regex, pre_tokenizers  # (here, because the package is optional)
        places = []
        for name, i in self.special.items():
            made = []
            with contextlib.suppress(UserError):  # a vocabulary of characters may not have these
                made = self.encode(name) + self.encode(name, follows=True)
            if i in made:
                places.append(f"{re.escape(name[0])}(?={re.escape(name[1:])})")
        if places:
            split = pre_tokenizers.Split(Regex("|".join(places)), "merged_with_previous")
            steps = filter(None, [self.library.pre_tokenizer, split])
            self.library.pre_tokenizer = pre_tokenizers.Sequence([*steps])

    @functools.cached_property
    def chat_library(self):
        """The library for chats: it finds special tokens by name, and drops BREAK from the text between."""
        from tokenizers import normalizers
        library = copy.deepcopy(self.library)
        library.encode_special_tokens = False
        steps = filter(None, [normalizers.Replace(BREAK, ""), library.normalizer])
        library.normalizer = normalizers.Sequence([*steps])
        return library

    def encode(self, text, follows=False):
        """The ids of a text. follows: another text comes before it, so no space is put there."""
        before = BEFORE if follows and self.prefix else ""
        return self.encode_behind(before, text, self.library)

    def encode_to_numpy(self, text, follows=False):
        return np.array(self.encode(text, follows), dtype=np.uint32)

    def encode_with_special(self, text, before=()):
        """The ids of a chat, where the names of special tokens stand for these. before: the ids before it."""
        if before and before[-1] in self.names:
            return self.encode_behind(self.names[before[-1]], text, self.chat_library)
        return self.encode_behind(BEFORE if before and self.prefix else "", text, self.chat_library)

    def encode_behind(self, before, text, library):
        """The ids of `text` where `before` stands in front of it."""
        def encode(shown):  # as a batch, which lets other threads work
            return library.encode_batch_fast([shown], add_special_tokens=False)[0].ids

        with careful(f"the tokenizer {self.name} fails on a text"):
            n_before = len(encode(before)) if before else 0
            return encode(before + text)[n_before:]

    def chat(self, messages, answer=True):
        """The ids of a conversation, [{"role": "user", "content": "..."}, ...], in this model's own format.

        answer: end with the beginning of the assistant's turn. "<|im_end|>" in a message is only text.
        """
        return self.encode_with_special(self.fill(self.guard(messages), answer))

    def conversation(self, messages):
        """(ids, mask) of a conversation: the mask is 1 on answers that are not empty, and their end tokens."""
        template = f"the chat template of {self.name}"
        end = self.special.get(self.settings.get("eos_token"))
        text, ids, mask = "", [], []
        for longer, learned in self.stages(messages):
            if not longer.startswith(text):
                raise UserError(f"{template} rewrites earlier text as a conversation grows",
                                "use conversations of one question and one answer, or another template")
            new = self.encode_with_special(longer[len(text):], before=ids)
            if learned and end not in new:
                raise UserError(f"{template} puts no eos_token after an answer",
                                "in tokenizer_config.json, set eos_token to the token that it puts there")
            n = new.index(end) + 1 if learned else 0
            ids += new
            mask += [1] * n + [0] * (len(new) - n)
            text = longer
        if self.special["<|endoftext|>"] in ids:
            raise UserError(f"{template} contains its end-of-text token, which separates conversations "
                            "in prepared data", "a model whose turns end with another token")
        return ids, mask

    def continued(self, messages):
        """The ids of a conversation whose last message is not over yet, as transformers has them."""
        *before, last = self.guard(messages)
        # A template that trims messages would remove the space.
        text = self.fill([*before, last | {"content": f"{last['content']}{HERE} "}], answer=False)
        text, found, rest = text.rpartition(HERE)
        if not found:
            raise UserError(f"the chat template of {self.name} leaves out the last message", TEMPLATE_FIX)
        return self.encode_with_special(text if rest.startswith(" ") else text.rstrip())

    def stages(self, messages):
        """A conversation as it grows: (all text up to here, is the last of it an answer to learn?).

        A template does not say which text comes from which message. So it is filled in up to each answer, as
        for a prompt, and with it.
        """
        guarded = self.guard(messages)
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                yield self.fill(guarded[:i], True), False
                yield self.fill(guarded[:i + 1], False), is_learned(message)
        whole = self.fill(guarded, False)
        for message in guarded:
            said = [call["function"]["name"] for call in message.get("tool_calls", [])]
            if message["role"] == "tool":
                said.append(message["content"].strip())
            # Some templates write an answer as JSON.
            if not all(text in whole or json.dumps(text, ensure_ascii=False)[1:-1] in whole for text in said):
                raise UserError(f"the chat template of {self.name} has no form for tools", TOOLS_FIX)
        yield whole, False

    def guard(self, messages):
        """The messages, as a template may read them, with a BREAK in all that looks like a special token, behind
        its first character."""
        if not self.template:
            super().chat(messages)
        check_messages([message for message in messages if not message.get("tool_calls")])

        def broken(value):
            if isinstance(value, dict):
                return {broken(key): broken(item) for key, item in value.items()}
            if isinstance(value, list):
                return [broken(item) for item in value]
            if not isinstance(value, str):
                return value
            if any(len(name) == 1 and name in value for name in self.special):
                raise UserError("a message contains a special token of this model", "leave it out")
            return re.sub(f"(?={self.named})(?s:.)", rf"\g<0>{BREAK}", value)

        texts = [{key: message[key] for key in KEPT if key in message} for message in messages]
        return broken([text | dict(role=str(text["role"])) for text in texts])

    def fill(self, messages, answer):
        return render(self.template, messages=messages, add_generation_prompt=answer, tools=None, documents=None,
                      **self.settings)


def named_tokens(config):
    """{name: text} of the special tokens that a tokenizer_config.json names, such as eos_token."""
    found = {}
    for name, value in config.items():
        if isinstance(value, dict):
            value = value.get("content")
        if name.endswith("_token") and isinstance(value, str):
            found[name] = value
    return found


def chat_template(files, config):
    template = files.get("chat_template.jinja", b"").decode() or config.get("chat_template") or ""
    if isinstance(template, list):  # several, each with a name
        template = {one["name"]: one["template"] for one in template}.get("default", "")
    return template


def special_tokens(spec, settings, name):
    """{text: id} of the tokens that one of the files calls special; from now on `spec` does."""
    special = {}
    for token in spec.get("added_tokens") or []:
        token["special"] |= token["content"] in settings.values()
        if token["special"]:
            token["normalized"] = False  # a chat spells it exactly
            special[token["content"]] = token["id"]
    for end in ("<|endoftext|>", "<|end_of_text|>", settings.get("eos_token")):
        if end in special:
            return {"<|endoftext|>": special[end]} | special  # the name that the other scripts know
    raise UserError(f"{name} has no end-of-text token, neither <|endoftext|> nor an eos_token",
                    "add the folder's tokenizer_config.json, which names it")


@functools.cache
def byte_alphabet():
    """How GPT-2 writes bytes as visible characters: {character: byte}. A space is written as U+0120."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(others)}


def spelled(token, decoder, byte_level):
    """The bytes that a token stands for within a text."""
    alphabet = byte_alphabet()
    if byte_level and alphabet.keys() >= set(token):
        return bytes(alphabet[character] for character in token)
    if decoder:
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])  # "<0x0A>" is the byte 10
        end = decoder.decode(["x", "x"])[1:]  # "x", or " x" where a space is put between tokens
        token = decoder.decode(["x", token, "x"]).removeprefix("x").removesuffix(end)
    return token.encode()


# ---------- Chats

def check_messages(messages, roles=()):
    """Raises UserError for a message without text, or with a role that is none of these. (): any role."""
    for message in messages:
        if roles and isinstance(message, dict) and message.get("tool_calls"):
            raise UserError("this chat format has no form for tools", TOOLS_FIX)
        if not (isinstance(message, dict) and isinstance(message.get("content"), str) and "role" in message):
            raise UserError("a message has no role or no text", MESSAGES_FIX)
        if roles and message["role"] not in roles:
            fact = f"unknown role {message['role']!r}: the roles are {', '.join(roles)}"
            raise UserError(fact, MESSAGES_FIX)


def is_learned(message):
    """Is this an answer to learn? (`weight` 0 marks one that is only read.)"""
    says_something = message["content"] or message.get("tool_calls")
    return message["role"] == "assistant" and bool(says_something) and message.get("weight") != 0


def render(template, **values):
    """Fill in a chat template. Raises UserError where it fails."""
    with careful("the chat template fails on these messages", TEMPLATE_FIX):
        text = compiled(template).render(**values)
        text.encode()  # half a character (a surrogate) cannot be tokenized
        return text


# Filters and methods that make a long text of a short one.
PADDING = {"center", "expandtabs", "format", "format_map", "ljust", "rjust", "zfill"}


@functools.lru_cache(maxsize=8)  # it takes a hundred times as long as filling it in
def compiled(template):
    """A chat template: Jinja in a sandbox, with what such templates expect."""
    needs("jinja2", "chat templates")
    import jinja2.sandbox

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        """Jinja's own keeps a template from running code, this one also from filling the memory."""

        intercepted_binops = frozenset(["**", "*", "%"])

        def call_binop(self, context, operator, left, right):
            small = all(type(n) in (int, float) and abs(n) < 1e9 for n in (left, right))
            if operator == "**" or not small:
                raise jinja2.TemplateError(f"{operator} is for small numbers here")
            return super().call_binop(context, operator, left, right)

        def is_safe_attribute(self, value, name, found):
            return name not in PADDING and super().is_safe_attribute(value, name, found)

        def wrap_str_format(self, method):
            return None  # (Jinja would allow a `format` of its own, which pads as well)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):  # Jinja's escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent and min(indent, 8), separators=separators,
                          sort_keys=sort_keys)

    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    for name in PADDING & sandbox.filters.keys():
        del sandbox.filters[name]
    sandbox.filters["tojson"] = tojson
    sandbox.globals.update(raise_exception=raise_exception, strftime_now=time.strftime)
    # {% generation %} marks what the assistant says, for training; here it is an `if` that is always true.
    template = re.sub(r"({%-?\s*)generation(\s*-?%})", r"\1if true\2", template)
    template = re.sub(r"({%-?\s*)endgeneration(\s*-?%})", r"\1endif\2", template)
    return sandbox.from_string(template)

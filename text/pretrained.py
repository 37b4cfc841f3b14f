# SPDX-License-Identifier: GPL-3.0-only
"""
Byte-level BPE: the vocabularies of GPT-2 and of most that came after it, read from where they are published.

    tokenizer = from_tiktoken("gpt2")           # an encoding that tiktoken knows: gpt2, cl100k_base, o200k_base, ...
    tokenizer = from_hugging_face("SmolLM2")    # a folder with tokenizer.json: GPT-2, SmolLM2, Llama 3, Qwen, ...
    ids = tokenizer.chat([{"role": "user", "content": "Hello"}])        # a prompt, in the model's own chat format
    ids, mask = tokenizer.conversation([..., {"role": "assistant", "content": "Hi!"}])     # what to learn: mask 1

Where SentencePiece starts from characters, these start from bytes (Radford et al. 2019): 256 tokens can spell any text,
and the merges, in the order in which they were learned, join them to longer ones. Before that a regular expression cuts
the text into words, which no merge crosses; it is what distinguishes one such tokenizer from the next.

Both kinds of files hold the same three things, the expression, the merges and the special tokens, and tiktoken's fast
core does the rest. The ids are those that tiktoken and transformers give; what would not be the same is refused.
"""
import base64
import functools
import json
import os
import re
import unicodedata
from datetime import datetime

import numpy as np

from runtime.files import open_file
from runtime.console import UserError, needs

# GPT-2's expression, which is also what "ByteLevel" means in a tokenizer.json: contractions, words and numbers with the
# space before them, runs of other signs, white space. The last space before a word is left to that word.
CONTRACTION = r"'(?:[sdmt]|ll|ve|re)"
GPT2 = CONTRACTION + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same behind a "Digits" step, which makes pieces of all digits first: no number takes a space with it, and white
# space before a digit is like white space at an end.
DIGITS = CONTRACTION + r"|\p{N}%s| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LONG_RUN = 20_000  # tiktoken's expression engine overflows its stack in some 100,000 white spaces in a row
MOST_IDS = 1 << 24  # each takes memory, and none of the vocabularies that exist has a tenth of them
CHAT_FIX = "the folder of a chat model, with its tokenizer_config.json or chat_template.jinja"
MESSAGES_FIX = '[{"role": "user", "content": "..."}, ...]'
ENCODING = ("encoding.json", "encoding.tiktoken")  # what `save` writes of a tiktoken encoding
PARTS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")  # of a Hugging Face folder; copied by `save`


class ByteBPETokenizer:
    """A byte-level vocabulary: see from_tiktoken and from_hugging_face.

    pattern: the expression that cuts text into words. tokens: {bytes: rank}, in the order of the merges.
    ids: the id of each rank, a uint32 array. special: {text: id} of the tokens that text never becomes. added: {text:
    id} of tokens that it does become, as wholes, before anything else. unused: {id: bytes} of tokens that no merge
    makes. files: {name: bytes}, what `save` writes. nfc: is the text brought into Unicode's composed form first?
    template: the chat format; settings: the names of special tokens that it asks for.
    """

    def __init__(self, kind, name, pattern, tokens, ids, special, files, added={}, unused={}, nfc=False, template="",
                 settings={}):
        self.kind, self.name, self.pattern, self.ids, self.files, self.nfc = kind, name, pattern, ids, files, nfc
        self.special, self.added, self.template, self.settings, self.ranks = special, added, template, settings, tokens
        if b"" in tokens or not all(isinstance(text, str) and text for text in (*special, *added)):
            raise ValueError("there is a token without text")
        # (Special tokens are ours to put in, but without any, tiktoken looks for an empty one behind every character.)
        self.encoding = tiktoken().Encoding(name, pat_str=pattern, mergeable_ranks=tokens,
                                            special_tokens={"<|unused|>": max(tokens.values()) + 1})
        self.vocab_size = int(max([*ids, *special.values(), *added.values(), *unused])) + 1
        self.bytes = [b""] * self.vocab_size
        for i, token in [*unused.items(), *((ids[rank], token) for token, rank in tokens.items()),
                         *((i, text.encode()) for text, i in added.items())]:
            self.bytes[i] = token
        self.missing = bytes(b for b in range(256) if bytes([b]) not in tokens)
        self.encode("a")  # the thread that comes first owns a cache: better not one of many that work

    def encode(self, text):
        return self.encode_to_numpy(text).tolist()

    def encode_to_numpy(self, text):
        return self.encode_with(self.added, text)

    def encode_with(self, wholes, text, hidden=""):
        """The ids of a text in which some pieces, {text: id}, stand for one token each: a uint32 array.

        hidden: a character that is taken out of the text between these pieces.
        """
        if not wholes:
            return self.encode_words(text)
        parts = re.split(alternatives(wholes), text)  # text, whole, text, ..., text
        return np.concatenate([np.array([wholes[part]], np.uint32) if i % 2 else
                               self.encode_words(part.replace(hidden, "")) for i, part in enumerate(parts)])

    def encode_words(self, text):
        text = composed(text) if self.nfc else text
        run = len(text) > LONG_RUN and any(text[i:i + LONG_RUN].isspace() for i in range(0, len(text), LONG_RUN))
        if run or self.missing and len(raw := text.encode()) != len(raw.translate(None, self.missing)):
            ranks = self.word_by_word(text)
        else:
            try:
                ranks = self.encoding.encode_to_numpy(text, disallowed_special=())
            except BaseException as error:  # (a panic of Rust is no Exception)
                if not isinstance(error, ValueError) and type(error).__name__ != "PanicException":
                    raise
                raise UserError(f"the expression of the tokenizer {self.name} fails on a text: {error}",
                                "take the tokenizer's files from their source again") from None
        return self.ids[ranks]

    def word_by_word(self, text):
        """The slow way, for what the fast one cannot do: words that are cut by another engine, or that lose bytes.

        A byte without a token is dropped, as transformers does, and its neighbours are merged as if it had not been.
        """
        import regex  # what tiktoken itself depends on
        pattern = self.pattern.replace(r"\s", r"\p{White_Space}").replace(r"\S", r"\P{White_Space}")
        # It may know more of Unicode than tiktoken's engine: a character that is a letter only to it is hidden from it.
        alphabet = {bytes([byte]): byte for byte in range(256)}
        engine = tiktoken().Encoding("words", pat_str=r"[\p{L}\p{N}\s]", mergeable_ranks=alphabet, special_tokens={})
        new = [c for c in set(text) if unicodedata.category(c) == "Cn" and not engine.encode_ordinary(c)]
        shown = text.translate({ord(c): "\ufffe" for c in new})
        ranks = []
        for match in regex.finditer(pattern, shown):
            if piece := text[match.start():match.end()].encode().translate(None, self.missing):
                ranks += self.encoding._encode_single_piece(piece)
        return np.array(ranks, dtype=np.uint32)

    def token_bytes(self, i):
        return self.bytes[i] if i < self.vocab_size else b""

    def decode(self, ids):
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def chat(self, messages, answer=True):
        """The ids of a conversation in this model's own format. messages: [{"role": "user", "content": "..."}, ...].

        answer: end with the beginning of the assistant's turn. The format is a Jinja template that came with the
        model; it runs in Jinja's sandbox. What a message contains stays text: "<|im_end|>" in it ends nothing (unless
        the template itself makes a special token out of parts of it).
        """
        guarded, encode = self.guard(messages)
        return not_nothing(encode(self.fill(guarded, answer)))

    def conversation(self, messages):
        """(ids, mask) of a whole conversation, two lists of the same length: the mask is 1 on what is to be learned.

        That is every answer of the assistant with the end token behind it, but for empty ones. A template is a program,
        and does not say which of its text comes from which message. So it is asked for the text up to each answer, as
        for a prompt, and for the text with that answer; each has to begin with the one before.
        """
        guarded, encode = self.guard(messages)
        eos_token, text, ids, mask = self.settings.get("eos_token"), "", [], []
        if eos_token not in self.special:
            raise UserError(f"the tokenizer {self.name} names no special token as its eos_token, which ends an answer",
                            "name it in the folder's tokenizer_config.json")

        def go_on(longer, learned):
            nonlocal text
            if not longer.startswith(text):
                raise UserError(f"the chat template of {self.name} rewrites earlier text as a conversation goes on, so "
                                "it cannot be told what to learn", "conversations of one question and one answer, or "
                                "another template")
            new = encode(longer[len(text):])
            if learned and self.special[eos_token] not in new:
                raise UserError(f"the chat template of {self.name} puts no {eos_token} behind an answer, so a model "
                                "would not learn to end", "in the folder's tokenizer_config.json, name as eos_token "
                                "what the template puts there")
            n = new.index(self.special[eos_token]) + 1 if learned else 0
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
        return not_nothing(ids), mask

    def guard(self, messages):
        """(messages, encode): what looks like a special token is broken up by a mark, which `encode` takes out."""
        if not self.template:
            raise UserError(f"the tokenizer {self.name} has no chat template", f"--tokenizer=bpe, or {CHAT_FIX}")
        check_messages(messages)
        wholes = {**self.special, **self.added}
        texts = []
        changed(messages, texts.append)
        said = "".join(texts)
        mark = next((chr(c) for c in range(0xFDD0, 0xFDF0) if chr(c) not in said), None)  # a noncharacter, in no text
        if mark is None or any(len(text) == 1 and text in said for text in wholes):
            raise UserError("a message contains characters that cannot be told from a special token of this model",
                            "leave them out")
        forged = re.compile(alternatives(wholes))
        guarded = changed(messages, lambda text: forged.sub(lambda found: mark.join(found[0]), text))
        return guarded, lambda text: self.encode_with(wholes, text, hidden=mark).tolist()

    def fill(self, messages, answer):
        return render(self.template, messages=messages, add_generation_prompt=answer, **self.settings)

    def save(self, folder):
        write(folder, self, self.files)


def read(folder, name):
    with open_file(os.path.join(folder, name), most=1 << 28) as file:
        return file.read()


def write(folder, tokenizer, files):
    """Write the files {name: bytes} of a tokenizer, and config.json: which kind it is, and its special tokens."""
    os.makedirs(folder, exist_ok=True)
    about = dict(kind=tokenizer.kind, vocab_size=tokenizer.vocab_size, special=tokenizer.special)
    for name, content in {**files, "config.json": json.dumps(about, indent=1).encode()}.items():
        with open(os.path.join(folder, name), "wb") as file:
            file.write(content)


@functools.cache
def many_marks():
    """An expression for marks in a row, as the accents of a letter are: the characters whose order NFC changes."""
    marks = [c for c in map(chr, range(0x20000)) if unicodedata.combining(unicodedata.normalize("NFD", c)[0])]
    return re.compile(f"[{''.join(marks)}]{{10,}}")


def composed(text):
    """The text in Unicode's composed form, NFC.

    Python's own takes the square of the length of a run of combining marks, minutes for a megabyte of them. So long
    runs are sorted first; a sample of every 32nd character finds those of 320 or more.
    """
    def ordered(run):
        single = "".join(unicodedata.normalize("NFD", mark) for mark in run[0])
        return "".join(sorted(single, key=unicodedata.combining))
    if many_marks().search(text[::32]):
        text = many_marks().sub(ordered, text)
    return unicodedata.normalize("NFC", text)


def check_messages(messages, roles=()):
    """Raises UserError where a message has no text, or a role that is none of these; without any, all may speak."""
    for message in messages:
        if not (isinstance(message, dict) and isinstance(message.get("content"), str) and "role" in message):
            raise UserError("a message without role or without text", MESSAGES_FIX)
        if roles and message["role"] not in roles:
            raise UserError(f"a message of {message['role']!r}, but those who speak are {', '.join(roles)}",
                            MESSAGES_FIX)


def not_nothing(ids):
    if not ids:
        raise UserError("the chat template makes nothing of these messages", CHAT_FIX)
    return ids


def changed(value, change):
    """Lists and dicts with every text in them changed."""
    if isinstance(value, dict):
        return {key: changed(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [changed(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def check_ids(tokens, added):
    """Raises ValueError where an id in either {token: id} is out of range, or where two of `tokens` have the same."""
    if not all(type(i) is int and 0 <= i < MOST_IDS for i in (*tokens.values(), *added.values())):
        raise ValueError(f"an id is not a number from 0 to {MOST_IDS - 1:,}")
    if len(set(tokens.values())) < len(tokens):
        raise ValueError("two tokens have the same id")


def alternatives(texts):
    """An expression that finds any of the texts, the longest first, as a group; for none of them, nothing."""
    return f"({tree(texts)})" if texts else "((?!))"


def tree(texts):
    """An expression for these texts as a tree: a common beginning is matched once, not once for each of a thousand."""
    start = os.path.commonprefix([*texts])
    branches = {}
    for text in texts:
        rest = text[len(start):]
        branches.setdefault(rest[:1], []).append(rest)
    end = "?" if branches.pop("", None) else ""
    return re.escape(start) + (f"(?:{'|'.join(map(tree, branches.values()))}){end}" if branches else "")


# ---------------------------------------------------------------------------------------------------------------------
# tiktoken's encodings

def from_tiktoken(name):
    """An encoding by its name in tiktoken, which fetches it once. Raises UserError where it cannot."""
    library = tiktoken()
    try:
        encoding = library.get_encoding(name)
    except Exception as error:  # of requests, of the disk, or a checksum that is not the due one
        reason = f"{type(error).__name__}: {error}".split("(Caused")[0][:200]
        raise UserError(f"tiktoken cannot fetch the vocabulary {name}: {reason}",
                        "connect to the network once; or copy tiktoken's cache from a machine that has it to a folder, "
                        "and set TIKTOKEN_CACHE_DIR to that; or --tokenizer=bpe") from None
    about = dict(name=name, pattern=encoding._pat_str, special=encoding._special_tokens)
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in encoding._mergeable_ranks.items())
    return tiktoken_tokenizer({"encoding.json": json.dumps(about).encode(), "encoding.tiktoken": b"".join(lines)})


def tiktoken_tokenizer(files):
    """An encoding from these files {name: bytes}, which `save` writes: no network is needed any more."""
    about, lines = json.loads(files["encoding.json"]), files["encoding.tiktoken"].splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    check_ids(ranks, about["special"])
    ids = np.arange(max(ranks.values()) + 1, dtype=np.uint32)  # here the rank of a token is its id
    return ByteBPETokenizer("tiktoken", about["name"], about["pattern"], ranks, ids, about["special"], files)


def tiktoken():
    return needs("tiktoken", "byte-level vocabularies")


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer.json

def byte_alphabet():
    """GPT-2's way to write bytes as visible characters: {character: byte}. A space is written as U+0120."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(others)}


def from_hugging_face(folder):
    """The tokenizer of a Hugging Face folder. Raises UserError for what is not byte-level BPE, naming what it is."""
    path = os.path.join(folder, "tokenizer.json")
    try:
        files = {name: read(folder, name) for name in PARTS if os.path.isfile(os.path.join(folder, name))}
        spec, config = json.loads(files["tokenizer.json"]), json.loads(files.get("tokenizer_config.json", b"{}"))
        return hugging_face_tokenizer(os.path.basename(os.path.abspath(folder)), path, spec, config, files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise UserError(f"{path} is damaged, or of an unknown layout: {type(error).__name__}: {error}",
                        "take the folder's tokenizer files from its source again") from None


def hugging_face_tokenizer(name, path, spec, config, files):
    def refuse(what):
        raise UserError(f"{path}: {what} cannot be read with the same ids as transformers gives",
                        "byte-level BPE as in GPT-2, SmolLM2, Llama 3 and Qwen; or --tokenizer=bpe, learned from text")
    # 1) what kind of tokenizer is this?
    model = spec["model"]
    if model["type"] != "BPE":
        refuse(f"a model of the type {model['type']}")
    for option in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk",
                   "byte_fallback"):
        if model.get(option):
            refuse(f"BPE with {option}={model[option]!r}")
    normalizer = spec.get("normalizer")
    if normalizer and normalizer["type"] != "NFC":
        refuse(f"the normalizer {normalizer['type']}")
    pattern = expression(spec["pre_tokenizer"], refuse)

    # 2) the tokens: bytes first, then what the merges make, in their order
    alphabet, vocabulary, added_tokens = byte_alphabet(), model["vocab"], spec.get("added_tokens") or []
    check_ids(vocabulary, {token["content"]: token["id"] for token in added_tokens})
    id_of = {bytes([byte]): vocabulary[character] for character, byte in alphabet.items() if character in vocabulary}
    written = {token: bytes(alphabet[character] for character in token) for token in vocabulary
               if all(character in alphabet for character in token)}
    for merge in model["merges"]:
        token = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        id_of.setdefault(written[token], vocabulary[token])
    ids = np.array(list(id_of.values()), dtype=np.uint32)
    unused = {i: written.get(token, token.encode()) for token, i in vocabulary.items()}  # those that no merge makes
    for i in id_of.values():
        unused.pop(i, None)
    rank_of = {token: rank for rank, token in enumerate(id_of)}

    # 3) the special tokens, and those that are text but were added after training ("<think>")
    special, added = {}, {}
    for token in added_tokens:
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            refuse(f"the added token {token['content']!r}, which takes the white space beside it,")
        (special if token["special"] else added)[token["content"]] = token["id"]
    texts = {key: value["content"] if isinstance(value, dict) else value for key, value in config.items()
             if key.endswith("_token")}
    settings = {key: text for key, text in texts.items() if isinstance(text, str)}
    ends = ("<|endoftext|>", "<|end_of_text|>", settings.get("eos_token"))
    end = next((text for text in ends if text in special), None)
    if end is None:
        raise UserError(f"{path} names no special token for the end of a text: neither <|endoftext|> nor an eos_token",
                        "add the folder's tokenizer_config.json, which names it")
    special = {"<|endoftext|>": special[end], **special}  # the name that the other scripts know

    # 4) the chat format
    template = files.get("chat_template.jinja", b"").decode() or config.get("chat_template") or ""
    if isinstance(template, list):  # several, each with a name
        template = next((one["template"] for one in template if one["name"] == "default"), "")
    if not isinstance(template, str) or len(template) > 1 << 20:  # a hundred times as long as the longest ones
        refuse("a chat template that is no text, or has more than a million characters,")
    for i in [*special.values(), *added.values()]:
        unused.pop(i, None)
    if model.get("ignore_merges") and unused:
        refuse(f"ignore_merges with {len(unused)} tokens that no merge makes")
    return ByteBPETokenizer("hugging_face", name, pattern, rank_of, ids, special, files, added=added, unused=unused,
                            nfc=normalizer is not None, template=template, settings=settings)


def expression(step, refuse):
    """The pre-tokenizer of a tokenizer.json as one regular expression. Refuses, by name, what cannot be one."""
    steps = step["pretokenizers"] if step and step["type"] == "Sequence" else [step or {"type": "none"}]
    kinds = " + ".join(one["type"] for one in steps)
    if kinds not in ("ByteLevel", "Digits + ByteLevel", "Split + ByteLevel"):
        refuse(f"the pre-tokenizer {kinds}")
    first, last = steps[0], steps[-1]
    if last.get("add_prefix_space"):
        refuse("the pre-tokenizer ByteLevel with add_prefix_space")
    if last.get("use_regex", True) == (first["type"] == "Split"):
        refuse(f"the pre-tokenizer {kinds} with use_regex={last.get('use_regex', True)}")
    if first["type"] == "ByteLevel":
        return GPT2
    if first["type"] == "Digits":
        return DIGITS % ("" if first["individual_digits"] else "+")
    how = first["behavior"], bool(first.get("invert"))
    if "Regex" not in first["pattern"] or how not in (("Isolated", False), ("Removed", True)):
        refuse(f"the pre-tokenizer Split with {first['pattern']}, {how[0]}, invert={how[1]}")
    # Isolated: what the expression leaves out is a word too. In all that we know, it leaves nothing out.
    rest = rf"|(?:(?!{first['pattern']['Regex']})[\s\S])+" if how[0] == "Isolated" else ""
    return first["pattern"]["Regex"] + rest


def render(template, **values):
    """Fill in a chat template. Raises UserError where it fails."""
    try:
        text = compiled(template).render(**values)
        text.encode()  # half a character (a surrogate) cannot be tokenized
        return text
    except UserError:
        raise
    except Exception as error:  # a template is a program: whatever it does wrong is its own
        raise UserError(f"the chat template fails on these messages: {type(error).__name__}: {error}",
                        "check the roles and their order: most want user and assistant to alternate") from None


# Filters and methods that make a long text of a short one.
PADDING = {"center", "expandtabs", "format", "format_map", "ljust", "rjust", "zfill"}


@functools.lru_cache(maxsize=8)  # it takes a hundred times as long as filling it in
def compiled(template):
    """A chat template: Jinja in its sandbox, with the filter and the functions that such templates expect."""
    needs("jinja2", "chat templates")
    import jinja2.sandbox

    def raise_exception(message):
        raise jinja2.TemplateError(message)

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
    sandbox.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False,
                                                                      indent=indent and min(indent, 8))
    sandbox.globals.update(raise_exception=raise_exception, strftime_now=lambda form: datetime.now().strftime(form))
    # {% generation %} marks what the assistant says, for training; here it is an `if` that is always true.
    template = re.sub(r"({%-?\s*)(end)?generation(\s*-?%})",
                      lambda tag: tag[1] + ("endif" if tag[2] else "if true") + tag[3], template)
    return sandbox.from_string(template)

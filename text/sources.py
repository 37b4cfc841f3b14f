# SPDX-License-Identifier: GPL-3.0-only
"""
Sources: where texts come from. Files, folders, names that everyone trains on, and addresses on the web.

    sources, origins = fetch(["stdlib", "notes.txt", "letters/", "https://example.org/book.txt"])
    for document in documents(sources):
        for block in document.blocks():  # texts of about a megabyte at most
            ...

    .txt .md .py         one document per file
    .jsonl               one per line, {"text": "..."}
    .json                SQuAD's layout: every paragraph's `context` is one
    .gz of these         the same; a folder is searched to the bottom, for all but .json, which may be anything

Nothing is read before it is needed, nothing is kept after it was given, and what is wrong with a file is said with
the place where it is wrong.
"""
import codecs
import glob
import gzip
import hashlib
import os
import re
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Callable, Iterator
from urllib.parse import unquote, urlsplit

from runtime.files import file_sha256, open_file
from runtime.console import UserError, note, origin, public
from text.download import download
from text.rows import field, json_lines, records, squad

KINDS = (".txt", ".md", ".py", ".jsonl")
CHAT_FIELDS = [{"messages"}, {"conversations"}, {"prompt", "completion"}, {"instruction", "output"},
               {"question", "answer"}]  # by which a conversation is known, see text/chats.py
BLOCK_BYTES = 1 << 20


@dataclass
class Document:
    """One text: `blocks()` reads it from the start, in pieces of about a megabyte."""

    name: str
    blocks: Callable[[], Iterator[str]]
    held_out: bool | None = None  # None: prepare.py's split decides
    messages: list | None = None  # of a conversation (text/chats.py): [{"role", "content"}, ...]; None: a text


# ---------------------------------------------------------------------------------------------------------------------
# Names

# Modules of the standard library that are held out: chosen once, before any model was trained, from every corner and
# size of it, among those that Python 3.10 to 3.14 all have. About 5%.
HELD_OUT = """asyncio/queues.py calendar.py concurrent/futures/thread.py copy.py csv.py email/message.py
    functools.py heapq.py html/parser.py http/cookies.py importlib/util.py json/decoder.py logging/config.py
    multiprocessing/pool.py random.py sched.py shelve.py textwrap.py tkinter/dialog.py unittest/suite.py
    urllib/parse.py wsgiref/headers.py xml/sax/handler.py""".split()
# Not text to learn from: other people's packages, tests, tables written by programs, and old or second copies.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test", "encodings", "lib2to3",
            "distutils", "pydoc_data", "turtledemo", "ensurepip", "__pycache__", "_pydecimal.py", "_pyio.py",
            "_pydatetime.py", "_pylong.py", "_pyrepl", "entities.py", "_vendor"}


def stdlib_documents():
    """The source files of the Python that runs this, documentation strings and all."""
    root = sysconfig.get_paths()["stdlib"]
    for path in sorted(glob.glob("**/*.py", root_dir=root, recursive=True)):
        parts = path.split(os.sep)
        build = path.startswith("_sysconfigdata") or "-" in parts[0]  # config-3.12-x86_64-linux-gnu/...
        if not build and not LEFT_OUT.intersection(parts):
            yield Document(path, lambda path=path: text_blocks(os.path.join(root, path)), "/".join(parts) in HELD_OUT)


@dataclass
class Remote:
    """A file of a name that downloads: its address, and what it must be."""

    url: str
    size: int
    sha256: str


SQUAD = "https://rajpurkar.github.io/SQuAD-explorer/dataset/"
TINY_STORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/"
NAMES = {
    "shakespeare": [Remote("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                           1_115_394, "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")],
    # Both versions, as the original OpenLLM: v2.0 repeats nearly all paragraphs of v1.1, and here each counts once.
    "squad": [Remote(SQUAD + "train-v1.1.json", 30_288_272,
                     "3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955"),
              Remote(SQUAD + "dev-v1.1.json", 4_854_279,
                     "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9"),
              Remote(SQUAD + "train-v2.0.json", 42_123_633,
                     "68dcfbb971bd3e96d5b46c7177b16c1a4e7d4bdef19fb204502738552dede002"),
              Remote(SQUAD + "dev-v2.0.json", 4_370_528,
                     "80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8")],
    "tinystories": [Remote(TINY_STORIES + "TinyStories-train.txt", 1_924_281_556,
                           "c5cf5e22ff13614e830afbe61a99fbcbe8bcb7dd72252b989fa1117a368d401f"),
                    Remote(TINY_STORIES + "TinyStories-valid.txt", 19_447_282,
                           "94e431816c4cce81ff71e4408ff8d3bda9a42e8d2663986697c3954288cb38b4")],
}
LICENCES = {"stdlib": "Python Software Foundation License", "shakespeare": "public domain", "squad": "CC BY-SA 4.0",
            "tinystories": "CDLA-Sharing-1.0"}  # of the texts; a model card states them


def is_url(source):
    return source.startswith(("http://", "https://"))


def fetch(sources, inputs=(), mirror="", kinds=KINDS, follow_links=False):
    """Resolve names, addresses and folders: (sources, origins), where every source is a pair (name or None, path).

    inputs: files to take for a name instead of downloading it. mirror: "https://host" to fetch from in place of the
    host that a name has. What is not there yet is downloaded. origins: what meta.json says about where texts are from.
    """
    if inputs and (len(sources) != 1 or sources[0] not in NAMES):
        raise UserError(f"--input gives files for one of {', '.join(NAMES)}", "python prepare.py FILE, for other text")
    resolved, origins, downloads = [], [], os.path.join("data", "downloads")
    for source in sources:
        known = source in NAMES and not os.path.exists(source)
        if known and kinds != KINDS:
            raise UserError(f"{source} is text, not conversations", "leave out --format=chat, or give a .jsonl file")
        if known and inputs:
            due = {remote.sha256 for remote in NAMES[source]}
            for path in inputs:
                if os.path.isfile(path) and file_sha256(path) not in due:
                    note(f"{path} is none of the files that {source} is made of, by its sha256; it is taken as it is")
                resolved.append((source, path))
        elif known:
            for remote in NAMES[source]:
                where = urlsplit(remote.url).path
                path = os.path.join(downloads, source, os.path.basename(where))
                url = mirror.rstrip("/") + where if mirror else remote.url
                resolved.append((source, download(url, path, remote.size, remote.sha256)))
        elif is_url(source):
            name = re.sub(r"[^\w.-]", "_", os.path.basename(unquote(public(source)))) or "index"
            check_kind(name, public(source), kinds)
            path = download(source, os.path.join(downloads, hashlib.sha256(source.encode()).hexdigest()[:8], name))
            resolved.append((None, path))
        elif os.path.isdir(source) and source != "stdlib":
            resolved += [(None, path) for path in files(source, kinds, follow_links)]
        else:
            resolved.append((None, source))
        origins.append(origin(source) + (f" (sha256 {file_sha256(path)})" if is_url(source) else ""))
    return resolved, origins


def documents(sources, text_field="text"):
    """The documents of all sources, in a fixed order. Raises UserError for what does not exist or cannot be read.

    sources: paths, "stdlib", or what `fetch` returns. text_field: the field of a .jsonl line that holds the text.
    """
    for source in sources:
        name, path = source if isinstance(source, tuple) else (None, source)
        if path == "stdlib":
            yield from stdlib_documents()
            continue
        for file in files(path):
            if name == "tinystories":
                yield from story_documents(file)
            elif kind(file) == ".jsonl":
                yield from jsonl_documents(file, text_field)
            elif kind(file) == ".json":
                yield from squad_documents(file)
            else:
                yield Document(file, lambda file=file: text_blocks(file))


# ---------------------------------------------------------------------------------------------------------------------
# Files

def kind(path):
    """The ending that says how to read a file: notes.txt.gz -> .txt, notes.gz -> .txt"""
    stem, ending = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] or ".txt" if ending == ".gz" else ending


def check_kind(name, source, kinds):
    if kind(name) not in (*kinds, ".json"):
        fix = f"if it is plain text: mv {quote(name)} {quote(name + '.txt')}"
        if kinds != KINDS:
            fix = "leave out --format=chat" if kind(name) in KINDS else f"{fix}, and leave out --format=chat"
        raise UserError(f"{source} is none of the kinds that can be read: {', '.join(kinds)}, .json, or .gz of these",
                        fix)


def files(source, kinds=KINDS, follow_links=False):
    """The files that a path means: itself, all of these kinds below a folder, or what matches a pattern."""
    if os.path.isdir(source):
        wanted, here, found = kinds, "holds no", walk(source, follow_links)
    elif os.path.exists(source):
        check_kind(source, source, kinds)
        return [source]
    else:
        wanted = (*kinds, ".json") if ".json" in source else kinds
        here = "does not exist, nor does a name or pattern of it match a"
        found = matches(source, follow_links)
    found = sorted(path for path in found if kind(path) in wanted)
    if not found:
        names = ["stdlib", *(NAMES if kinds == KINDS else ())]
        raise UserError(f"{source} {here} {', '.join(wanted)} file (or .gz of these)",
                        f"give a file, a folder, a pattern, an address, or one of: {', '.join(names)}")
    return found


def matches(pattern, follow_links):
    """The files that a pattern matches. (Unlike glob, pathlib follows no links to folders, which may go in circles.)"""
    root = os.path.splitdrive(pattern)[0] + os.sep if os.path.isabs(pattern) else ""
    found = Path(root).glob(os.path.relpath(pattern, root) if root else pattern)
    return [str(path) for path in found if path.is_file() and (follow_links or not path.is_symlink())]


def walk(folder, follow_links):
    """The paths of all files below a folder. A link may lead anywhere, and is read with follow_links alone; then each
    folder is read once, however links lead there."""
    found, left_out, folders, seen = [], 0, [folder], {os.path.realpath(folder)}
    while folders:
        try:
            for entry in os.scandir(folders.pop()):
                if entry.is_file(follow_symlinks=follow_links):
                    found.append(entry.path)
                elif not entry.is_dir(follow_symlinks=follow_links):
                    left_out += 1
                elif (real := os.path.realpath(entry.path)) not in seen:
                    seen.add(real)
                    folders.append(entry.path)
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}",
                            "change its permissions, or move it away") from None
    if left_out:
        note(f"{left_out:,} links, pipes and devices in {folder} are left out (prepare.py has --follow_links)")
    return found


def decoded(path):
    """Read a UTF-8 file (or .gz) as strings of about BLOCK_BYTES, cut anywhere; line ends stay as they are."""
    decoder, offset = codecs.getincrementaldecoder("utf-8-sig")(), 0
    try:
        with open_file(path) as raw_file, gzip.open(raw_file) if path.lower().endswith(".gz") else raw_file as file:
            while True:
                raw = file.read(BLOCK_BYTES)
                if offset == 0 and raw.count(0) > len(raw) // 100:
                    raise UserError(f"{path} is not text: {raw.count(0)} of its first {len(raw)} bytes are NUL",
                                    f"iconv -f utf-16 -t utf-8 {quote(path)} > utf8.txt, if it is UTF-16")
                text = decoder.decode(raw, final=not raw)
                offset += len(raw)
                if text:
                    yield text
                if not raw:
                    return
    except UnicodeDecodeError as error:  # error.object: what was being decoded, the end of which is `raw`
        at = offset + len(raw) - len(error.object) + error.start
        raise UserError(f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {at}",
                        f"iconv -f latin1 -t utf-8 {quote(path)} > utf8.txt, with the encoding that it has") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}",
                        "check the file, or leave it out") from None


def text_blocks(path):
    """Read a file as texts of about a megabyte, each ending where no tokenizer would join it to the next."""
    rest = ""
    for text in decoded(path):
        rest += text
        if len(rest) >= BLOCK_BYTES // 4:
            end = seam(rest)
            yield rest[:end]
            rest = rest[end:]
    if rest:
        yield rest


def seam(text):
    """The last place where a text can be cut without a token noticing: in front of a single space.

    All tokenizers here begin a token at such a space. Text without any (Chinese) is cut where a line begins.
    """
    near = max(len(text) - (1 << 16), 0)
    end = text.rfind(" ", 1, -1)
    while end > near and (text[end - 1].isspace() or text[end + 1].isspace()):
        end = text.rfind(" ", 1, end)
    if end > near:
        return end
    end = text.rfind("\n", 0, -1)
    while end >= near and text[end + 1].isspace():
        end = text.rfind("\n", 0, end)
    return end + 1 if end >= near else len(text)


def in_memory(name, text, held_out=None, messages=None):
    """A document that is in memory already."""
    return Document(name, lambda: iter([text]), held_out, messages)


def jsonl_documents(path, text_field):
    """One document per line of JSON; the text is in one field."""
    fix = f'every line must be like {{"{text_field}": "..."}}; mend the line or delete it'
    for where, row in json_lines(path, decoded(path), fix):
        if isinstance(row, dict) and text_field not in row:
            fix = fix_for_fields(row, fix)
        yield in_memory(where, field(row, text_field, str, where, fix))


def fix_for_fields(row, fix):
    """What to type for a row with other fields than the one that was looked for."""
    texts = [name for name, value in row.items() if isinstance(value, str)]
    if texts:
        fix = f"--text_field={quote(texts[0])}"
    if any(row.keys() >= fields for fields in CHAT_FIELDS):
        chat = "--format=chat, if these are conversations to learn to answer from"
        fix = f"{chat}; or {fix}" if texts else chat
    return fix


def squad_documents(path):
    """The paragraphs of a file in SQuAD's layout."""
    for where, context, _ in squad(path, questions=False):
        yield in_memory(where, context)


def story_documents(path):
    """TinyStories (Eldan and Li 2023, arXiv 2305.07759): stories between <|endoftext|>; a file for each split."""
    for number, story in enumerate(records(path, decoded(path), "<|endoftext|>"), 1):
        yield in_memory(f"{path}, story {number}", story.strip(), "valid" in os.path.basename(path))

# SPDX-License-Identifier: GPL-3.0-only
"""
Sources: where texts come from. Files, folders, well-known data sets, and addresses on the web.

    paths, origins = fetch(["stdlib", "notes.txt", "letters/", "https://example.org/book.txt"])
    for document in documents(paths):
        for block in document.blocks():  # texts of about a megabyte at most
            ...

    .txt .md .py         one document per file; in a .txt, a line <|endoftext|> ends one and begins the next
    .jsonl               one per line, {"text": "..."}
    .csv .tsv .parquet   one per row, the column `text`
    .json                a list of such rows; SQuAD's layout: every paragraph's `context` is one
    .gz .bz2 of these    the same; a folder is searched to the bottom for the first two kinds
"""
import codecs
import collections
import contextlib
import glob
import hashlib
import importlib.metadata
import importlib.util
import itertools
import os
import platform
import re
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from urllib.parse import unquote, urlsplit

from runtime.console import UserError, needs, note, origin, public
from runtime.files import PACKED, file_sha256, open_unpacked
from text.download import download
from text.rows import STRICT, csv_rows, field, json_lines, json_list, parquet_rows, squad

KINDS = (".txt", ".md", ".py", ".jsonl")
TABLES = (".json", ".csv", ".tsv", ".parquet")  # read where they are named; those in a folder may be anything
BLOCK_BYTES = 1 << 20
LONG_LINE = 1 << 20  # characters; a line is held in memory up to here
DOWNLOADS = os.path.join("data", "downloads")


@dataclass
class Document:
    """One text: `blocks()` reads it, in pieces of about a megabyte, before the next document is asked for."""

    name: str
    blocks: Callable
    held_out: bool | None = None  # for validation? None: prepare.py decides
    messages: list | None = None  # of a conversation (text/chats.py): [{"role", "content"}, ...]; None: a text


# ---------- Names

# The validation split of the standard library: about 5%, chosen once, before any model was trained, from every corner
# and size of it, among the modules that Python 3.10 to 3.14 all have.
HELD_OUT = """asyncio/queues.py calendar.py concurrent/futures/thread.py copy.py csv.py email/message.py
    functools.py heapq.py html/parser.py http/cookies.py importlib/util.py json/decoder.py logging/config.py
    multiprocessing/pool.py random.py sched.py shelve.py textwrap.py tkinter/dialog.py unittest/suite.py
    urllib/parse.py wsgiref/headers.py xml/sax/handler.py""".split()
# Not text to learn from: other people's packages, tests, tables written by programs, and old or second copies.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test", "encodings", "lib2to3",
            "distutils", "pydoc_data", "turtledemo", "ensurepip", "__pycache__", "_pydecimal.py", "_pyio.py",
            "_pydatetime.py", "_pylong.py", "_pyrepl", "entities.py", "_vendor", "testing", "_triton_ops_meta.py"}


SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
SQUAD = "https://rajpurkar.github.io/SQuAD-explorer/dataset/"
STORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/"
NAMES = {  # what is downloaded: address, bytes, sha256
    "shakespeare": [(SHAKESPEARE + "input.txt", 1_115_394,
                     "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")],
    # Both versions, as in the original OpenLLM: v2.0 repeats nearly all paragraphs of v1.1, and each counts once.
    "squad": [(SQUAD + "train-v1.1.json", 30_288_272,
               "3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955"),
              (SQUAD + "dev-v1.1.json", 4_854_279,
               "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9"),
              (SQUAD + "train-v2.0.json", 42_123_633,
               "68dcfbb971bd3e96d5b46c7177b16c1a4e7d4bdef19fb204502738552dede002"),
              (SQUAD + "dev-v2.0.json", 4_370_528,
               "80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8")],
    "tinystories": [(STORIES + "TinyStories-train.txt", 1_924_281_556,
                     "c5cf5e22ff13614e830afbe61a99fbcbe8bcb7dd72252b989fa1117a368d401f"),
                    (STORIES + "TinyStories-valid.txt", 19_447_282,
                     "94e431816c4cce81ff71e4408ff8d3bda9a42e8d2663986697c3954288cb38b4")],
}
LICENCES = {"stdlib": "Python Software Foundation License", "pytorch": "BSD 3-Clause", "shakespeare": "public domain",
            "squad": "CC BY-SA 4.0", "tinystories": "CDLA-Sharing-1.0"}  # of the texts; a model card states them


def fetch(sources, mirror="", kinds=KINDS, follow_links=False):
    """Find the files of all sources, and download what is not here yet. Returns (paths, origins for meta.json).

    mirror: "https://host" to download from, in place of the host that a name has.
    """
    found, origins = [], []
    for source in sources:
        about = origin(source)
        named = not os.path.exists(source)  # a folder that bears a name is taken for it
        if kinds != KINDS and named and source in ("pytorch", *NAMES):
            raise UserError(f"{source} is text, not conversations", "leave out --format=chat")
        if named and source in INSTALLED:
            about = with_version(source)
            found.append(source)
        elif named and source in NAMES:
            for url, size, sha256 in NAMES[source]:
                where = urlsplit(url).path
                if mirror:
                    url = mirror.rstrip("/") + where
                path = os.path.join(DOWNLOADS, source, os.path.basename(where))
                found.append(download(url, path, size, sha256))
        elif source.startswith(("http://", "https://")):
            check_kind(public(source), kinds)
            name = re.sub(r"[^\w.-]", "_", os.path.basename(unquote(public(source))))
            folder = hashlib.sha256(source.encode()).hexdigest()[:8]
            path = download(source, os.path.join(DOWNLOADS, folder, name))
            about += f" (sha256 {file_sha256(path)})"
            found.append(path)
        else:
            found += files(source, kinds, follow_links)
        origins.append(about)
    return found, origins


# ---------- Documents

def documents(sources, text_field="text", skipped=STRICT, separator="<|endoftext|>"):
    """The documents of all sources, in a fixed order. A text is read once, before the next document is asked for.

    text_field: the field of a row that holds the text. skipped: collects rows and files that cannot be read.
    separator: what stands alone on a line between the documents of a .txt; "": each is one document.
    """
    for source in sources:
        for path in files(source):
            yield from skipped.file(file_documents(path, text_field, skipped, separator))


def file_documents(path, text_field, skipped, separator):
    if path in INSTALLED:
        yield from INSTALLED[path]()
    elif layout(path) in ROWS:
        yield from row_documents(path, text_field, skipped)
    elif kind(path) == ".json":
        yield from squad_documents(path)
    elif kind(path) == ".txt" and separator:
        yield from text_documents(path, separator)
    else:
        yield in_file(path, path)


def pytorch_documents():
    """The Python files of the PyTorch that is installed: 2,100 files, 40 MB."""
    [root] = importlib.util.find_spec("torch").submodule_search_locations
    for path in sorted(glob.glob("**/*.py", root_dir=root, recursive=True)):
        if not LEFT_OUT.intersection(path.split(os.sep)):
            yield in_file("torch/" + path, os.path.join(root, path))


def stdlib_documents():
    """The source files of the Python that runs this, documentation strings and all."""
    root = sysconfig.get_paths()["stdlib"]
    for path in sorted(glob.glob("**/*.py", root_dir=root, recursive=True)):
        parts = path.split(os.sep)
        build = path.startswith("_sysconfigdata") or "-" in parts[0]  # config-3.12-x86_64-linux-gnu/...
        if not build and not LEFT_OUT.intersection(parts):
            yield in_file(path, os.path.join(root, path), "/".join(parts) in HELD_OUT)


# What is on every machine that runs this.
INSTALLED = {"stdlib": stdlib_documents, "pytorch": pytorch_documents}


def with_version(name):
    """An installed source for meta.json: its text depends on the version."""
    if name == "stdlib":
        return f"stdlib of Python {platform.python_version()}"
    return f"pytorch {importlib.metadata.version('torch')}"


# ---------- Files

def kind(path):
    """The ending that says how to read a file: notes.txt.gz -> .txt, notes.gz -> .txt"""
    stem, ending = os.path.splitext(path.lower())
    if ending in PACKED:
        ending = os.path.splitext(stem)[1] or ".txt"
    return ending


# What turns other kinds of files into one that can be read.
TOOLS = {".pdf": "pdftotext {file} {text}", ".xz": "unxz {file}", ".zst": "zstd -d {file}", ".zip": "unzip {file}",
         ".tar": "tar xf {file}", ".tgz": "tar xf {file}", ".xlsx": "in the program that wrote it, save it as .csv",
         **dict.fromkeys(".docx .odt .rtf .epub .html .htm .tex .rst".split(), "pandoc {file} -t plain -o {text}")}


def check_kind(path, kinds):
    if kind(path) in (*kinds, *TABLES):
        return
    fix = "leave out --format=chat" if kind(path) in KINDS else TOOLS.get(kind(path), "rename plain text to .txt")
    fix = fix.format(file=quote(path), text=quote(os.path.splitext(path)[0] + ".txt"))
    raise UserError(f"{path} is not a supported kind of file ({', '.join((*kinds, *TABLES))}, or .gz of these)", fix)


def files(source, kinds=KINDS, follow_links=False):
    """The paths of a source: a file, all files of these kinds below a folder, what matches a pattern, or "stdlib"."""
    # 1. What is there?
    if source in INSTALLED and not os.path.exists(source):
        return [source]
    if os.path.isdir(source):
        found, all_of, lacks = walk(source, follow_links), f"{source}/**/*", "holds no"
    elif os.path.exists(source):
        check_kind(source, kinds)
        return [source]
    else:
        lacks = "matches no" if set("*?[") & set(source) else ""
        found, all_of = matches(source, follow_links), source.rstrip("*.") + "*"
        kinds = (*kinds, *(ending for ending in TABLES if ending in source))
    # 2. What of it can be read?
    paths = sorted(path for path in found if kind(path) in kinds)
    others = collections.Counter(kind(path) for path in found if kind(path) not in kinds)
    if paths and others:
        counts = [f"{n:,} {ending or 'without an extension'}" for ending, n in others.most_common(5)]
        note(f"{source}: left out {', '.join(counts)}")
    if not paths:
        tables = [quote(all_of + ending) for ending in TABLES if ending in others]
        names = ", ".join([*INSTALLED, *NAMES])
        fact = f"{lacks} {', '.join(kinds)} file (or .gz of these)" if lacks else "does not exist"
        raise UserError(f"{source} {fact}",
                        " or ".join(tables) or f"give a file, a folder, a pattern, a URL, or one of: {names}")
    return paths


def matches(pattern, follow_links):
    """The files that a pattern matches. (Unlike glob, pathlib follows no links to folders, which may form a circle.)"""
    root = Path(Path(pattern).anchor)
    found = root.glob(str(Path(pattern).relative_to(root)))
    return [str(path) for path in found if path.is_file() and (follow_links or not path.is_symlink())]


def walk(folder, follow_links):
    """All files below a folder. Links may lead anywhere: they are read only with follow_links, each folder once."""
    def stop(error):
        raise UserError(f"cannot read {error.filename}: {error.strerror}", "change its permissions") from None

    found, links, seen = [], 0, set()
    for parent, folders, names in os.walk(folder, onerror=stop, followlinks=follow_links):
        if os.path.realpath(parent) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        folders.sort()
        for path in [os.path.join(parent, name) for name in folders + names]:
            if os.path.islink(path) and not follow_links:
                links += 1
            elif os.path.isfile(path):
                found.append(path)
    if links:
        note(f"skipped {links:,} links in {folder} (see prepare.py --follow_links)")
    return found


# What a file's first bytes announce; the mark of UTF-32 begins like that of UTF-16.
MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
         codecs.BOM_UTF16_BE: "utf-16", b"": "utf-8-sig"}


def convert(path, raw):
    """The command that turns a file into UTF-8, with the encoding that its bytes most likely have."""
    name = likely_encoding(raw)
    if not name:
        return "leave it out; it does not look like text"
    show = {".gz": "zcat", ".bz2": "bzcat"}.get(os.path.splitext(path.lower())[1], "cat")
    # Of damaged UTF-8, what is no text is dropped.
    iconv = "tr -d '\\000' | iconv -c" if name == "UTF-8" else "iconv"
    return f"{show} {quote(path)} | {iconv} -f {name} -t UTF-8 > utf8{kind(path)} (it looks like {name})"


WESTERN = "äöüßÄÖÜáàâãåæçéèêëíìîïñóòôõøœúùûÿÁÀÉÈÇÑÓ„“”‚‘’–—…€§°«»¿¡"
# Python's names of what iconv knows by the same names.
OTHERS = ("gb18030 big5 cp932 euc_jp cp949 koi8_r cp1250 cp1251 cp1253 cp1254 cp1255 cp1256 cp874 "
          "utf_16le utf_16be").split()


def likely_encoding(raw):
    """The name that iconv has for the encoding of these bytes, by their statistics; "" where none fits."""
    # 1. UTF-32 and UTF-16 without a mark. Other bytes are hardly ever valid UTF-32; of UTF-16, every other byte is 0
    #    in Latin text, and in line ends.
    for name in ("UTF-32LE", "UTF-32BE"):
        with contextlib.suppress(UnicodeDecodeError):
            if raw[:len(raw) // 4 * 4].decode(name):
                return name
    even, odd = raw[::2].count(0), raw[1::2].count(0)
    if max(even, odd) > min(8, len(raw) // 8) and min(even, odd) < max(even, odd) / 20:
        return "UTF-16BE" if even > odd else "UTF-16LE"
    # 2. UTF-8 with some damage? English lines do not tell.
    raw = b"\n".join(line for line in raw.split(b"\n") if not line.isascii())[:1 << 16]
    text = raw.decode(errors="replace")
    damaged = text.count("\ufffd")
    if 10 * damaged <= sum(letter > "\x7f" for letter in text) - damaged:
        return "UTF-8"
    # 3. Western text from Windows, of which statistics see too little: a few letters and quotes.
    letters = [letter for letter in raw.decode("cp1252", errors="replace") if letter > "\x7f"]
    if sum(letter in WESTERN for letter in letters) > 0.95 * len(letters):
        return "WINDOWS-1252"
    # 4. The others. (requests brings the package.)
    library = needs("charset_normalizer", "other encodings than UTF-8")
    best = library.from_bytes(raw, cp_isolation=OTHERS).best()
    return best.encoding.upper().replace("_", "-").replace("UTF-16-", "UTF-16") if best else ""


def decoded(path):
    """Read a text file, packed or not, as strings of about BLOCK_BYTES, cut anywhere; line ends stay as they are.

    It is UTF-8, or with a byte order mark UTF-16 or UTF-32.
    """
    offset = 0
    try:
        with open_unpacked(path) as file:
            more = raw = file.read(BLOCK_BYTES)
            encoding = next(name for mark, name in MARKS.items() if raw.startswith(mark))
            decoder = codecs.getincrementaldecoder(encoding)()
            if encoding == "utf-8-sig" and raw.count(0) > len(raw) // 100:
                fact = f"{path} is not UTF-8 text: {raw.count(0)} of its first {len(raw)} bytes are NUL"
                raise UserError(fact, convert(path, raw))
            while more:
                raw = more
                offset += len(raw)
                if text := decoder.decode(raw):
                    yield text
                more = file.read(BLOCK_BYTES)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:  # error.object: what was being decoded, up to the offset
        at = offset - len(error.object) + error.start
        name = encoding.removesuffix("-sig").upper()
        raise UserError(f"{path} is not {name}: byte 0x{error.object[error.start]:02x} at offset {at}",
                        convert(path, raw)) from None


def text_blocks(parts):
    """A text, cut anywhere, as blocks of about a megabyte, each ending where no tokenizer would join it to the next."""
    rest = ""
    for text in parts:
        rest += text
        if len(rest) >= BLOCK_BYTES // 4:
            end = seam(rest)
            yield rest[:end]
            rest = rest[end:]
    if rest:
        yield rest


# The last place where a cut changes no token: before a single space, where all tokenizers here begin one; in text
# without any (Chinese), where a line begins. The `.*` is greedy.
SEAMS = re.compile(r".*(?<=\S)(?= \S)", re.DOTALL), re.compile(r".*\n(?=\S)", re.DOTALL)


def seam(text):
    """Where to cut a text, near its end."""
    near = max(len(text) - (1 << 16), 0)
    for place in SEAMS:
        found = place.match(text[near:])
        if found:
            return near + found.end()
    return len(text)


def in_file(name, path, held_out=None):
    """A document that is all of a file."""
    return Document(name, lambda: text_blocks(decoded(path)), held_out)


def separated(blocks, separator):
    """A text in parts, cut anywhere, and None for each line that holds the separator and nothing else."""
    at_end = re.compile(re.escape(separator) + r"[ \t]*\r?(\n|\Z)")  # of a line; of these, some are at its start
    rest, line_starts = "", True
    for block in itertools.chain(blocks, [""]):
        # 1. A last line that may become a separator waits for its end.
        rest += block
        end = rest.rfind("\n") + 1
        begins = separator.startswith(rest[end:end + len(separator)])
        if not (block and begins) or len(rest) - end > LONG_LINE:
            end = len(rest)
        text, rest = rest[:end], rest[end:]
        # 2. Their separators.
        start = 0
        for found in at_end.finditer(text):
            at = found.start()
            if text[at - 1] == "\n" if at else line_starts:
                yield text[start:at]
                yield None
                start = found.end()
        yield text[start:]
        line_starts = text.endswith("\n") if text else line_starts


def unless_blank(parts):
    """The parts of a text, or None where all of it is white space."""
    text = ""
    for part in parts:
        text += part
        if text.strip() or len(text) > LONG_LINE:
            return itertools.chain([text], parts)


def text_documents(path, separator):
    """The documents of a text file: what stands between the separators. Blank ones are none."""
    # TinyStories (Eldan and Li 2023, arXiv 2305.07759) has a file for each split.
    name, number = os.path.basename(path), 0
    held_out = "valid" in name if name.startswith("TinyStories") else None
    # A document may be longer than the memory: it is read when it is asked for, but for its beginning.
    for ends, parts in itertools.groupby(separated(decoded(path), separator), lambda part: part is None):
        if not ends and (text := unless_blank(parts)):
            number += 1
            name = path if number == 1 else f"{path}, document {number}"
            blocks = text_blocks(text)
            yield Document(name, lambda blocks=blocks: blocks, held_out)
    if not number:
        yield in_memory(path, "")


def in_memory(name, text, held_out=None, messages=None):
    """A document that is in memory already."""
    return Document(name, lambda: iter([text]), held_out, messages)


# What reads the rows of a file.
ROWS = {".jsonl": json_lines, ".json": json_list, ".csv": csv_rows, ".tsv": csv_rows, ".parquet": parquet_rows}


def layout(path):
    """The kind of a file by its content: some .json hold lines as a .jsonl does; "object": neither lines nor a list."""
    if kind(path) != ".json":
        return kind(path)
    head = next(decoded(path), "").lstrip()
    first, _, more = head.partition("\n")
    if first.startswith("{") and first.rstrip().endswith("}") and more.lstrip().startswith("{"):
        return ".jsonl"
    return ".json" if head.startswith("[") else "object"


def file_rows(path, fix, skipped=STRICT):
    """(where, row) for every row of a file: a line, an element of a list, a row of a table."""
    return ROWS.get(layout(path), json_list)(path, decoded(path), fix, skipped)


def row_documents(path, text_field, skipped):
    """One document per row; the text is in one field."""
    fix = f'every row must be like {{"{text_field}": "..."}}; fix the row or delete it'
    for where, row in file_rows(path, fix, skipped):
        if isinstance(row, dict) and text_field not in row:
            sizes = {name: len(value) for name, value in row.items() if isinstance(value, str)}
            longest = [f"--text_field={quote(max(sizes, key=sizes.get))}"] if sizes else []
            fix = " or ".join([*longest, "prepare.py --format=chat, if these are conversations"])
        try:
            text = field(row, text_field, str, where, fix)
        except UserError as error:
            skipped.add(error)
            continue
        yield in_memory(where, text)


def squad_documents(path):
    """The paragraphs of a file in SQuAD's layout."""
    for where, context, _ in squad(path, questions=False):
        yield in_memory(where, context)

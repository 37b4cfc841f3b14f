# SPDX-License-Identifier: GPL-3.0-only
"""
Data: text in, two files of token ids out; and how training reads them back.

    python prepare.py stdlib                               # Python's own source code: 8 MB of text on every machine
    python prepare.py notes.txt --out=data/notes           # a file, a folder or 'a pattern/*.md'; .gz of these too
    python prepare.py shakespeare.txt --out=data/shakespeare_char --tokenizer=char --val_fraction=0.1

.txt, .md and .py files are one document each; in a .jsonl file every line is one, {"text": "..."}. A folder is searched
for these kinds, to the bottom. What is written:

    data/NAME/train.bin, val.bin    token ids, uint16 (uint32 for more than 65,536 tokens), one after the other;
                                    np.memmap(path, dtype=np.uint16) reads them
    data/NAME/meta.json             how many tokens, documents and bytes, and the checksum of each file
    data/NAME/tokenizer/            the tokenizer that turned the text into these ids

<|endoftext|> stands before every document. The text is read in blocks of a megabyte, three times (to count, to learn
the vocabulary, to encode), so memory does not grow with it.

The second half of this file is the reader. Two ideas there are worth the visit: the batch of a step is a pure function
of (seed, step), so that a run can be stopped, resumed or split over processes without anything to remember; and
the validation loss is one fixed pass over all held-out text, also in bits per byte, which can be compared between
tokenizers.
"""
import codecs
import glob
import gzip
import hashlib
import json
import math
import os
import platform
import shutil
import sysconfig
import time
import zlib
from array import array
from dataclasses import dataclass
from typing import Callable, Iterator

import numpy as np

import tokenizer as tokenizers
from config import UserError, command_line, load, note, say


@dataclass
class PrepareConfig:
    out: str = ""  # folder to write; by default data/NAME, with the name of the first source
    tokenizer: str = "bpe"  # bpe or char, learned from this text; or a folder that holds a tokenizer: a run, data/NAME
    vocab_size: int = 0  # bpe: number of tokens; 0: 4,096, less for under 400 KB of text; 32,000 suit a few GB
    val_fraction: float = 0.05  # share of the text that is held out to measure the loss on


KINDS = (".txt", ".md", ".py", ".jsonl")
BLOCK_BYTES = 1 << 20
MANY = 200  # from this many documents on, whole documents are held out; with fewer, the end of each
# What config/train_small.py wants of a text: its context, the tokens of its updates, and their number.
RECIPE_BLOCK_SIZE, RECIPE_TOKENS, RECIPE_STEPS = 256, 12 * 256, 1000


@dataclass
class Document:
    """One text: `blocks()` reads it from the start, in pieces of about a megabyte that end at a line end."""

    name: str
    blocks: Callable[[], Iterator[str]]
    held_out: bool | None = None  # None: the split decides


# ---------------------------------------------------------------------------------------------------------------------
# Sources: where documents come from

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


BUILT_IN = {"stdlib": stdlib_documents}


def documents(sources):
    """The documents of all sources, in a fixed order. Raises UserError for what does not exist or cannot be read."""
    for source in sources:
        if source in BUILT_IN:
            yield from BUILT_IN[source]()
            continue
        for path in files(source):
            if kind(path) == ".jsonl":
                yield from jsonl_documents(path)
            else:
                yield Document(path, lambda path=path: text_blocks(path))


def kind(path):
    """The ending that says how to read a file: notes.txt.gz -> .txt"""
    return os.path.splitext(path.removesuffix(".gz"))[1].lower()


def files(source):
    """The files that a path means: itself, all texts below a folder, or what matches a pattern."""
    if os.path.isfile(source):
        if kind(source) not in KINDS:
            raise UserError(f"{source} is none of the kinds that can be read: {', '.join(KINDS)}, or .gz of these",
                            f"rename it to {source}.txt if it is plain text")
        return [source]
    if os.path.isdir(source):
        found = glob.glob(os.path.join(glob.escape(source), "**", "*"), recursive=True)
    else:
        found = glob.glob(source, recursive=True)
    found = sorted(path for path in found if os.path.isfile(path) and kind(path) in KINDS)
    if not found:
        here = "holds no" if os.path.isdir(source) else "does not exist, nor does a name or pattern of it match a"
        raise UserError(f"{source} {here} {', '.join(KINDS)} file (or .gz of these)",
                        f"give a text file, a folder, a pattern, or one of: {', '.join(BUILT_IN)}")
    return found


def text_blocks(path, whole_lines=False):
    """Read a UTF-8 file (or .gz) as texts of about BLOCK_BYTES that end at a line end; line ends stay as they are."""
    decoder, offset, rest = codecs.getincrementaldecoder("utf-8-sig")(), 0, ""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            while True:
                raw = file.read(BLOCK_BYTES)
                if offset == 0 and raw.count(0) > len(raw) // 100:
                    raise UserError(f"{path} is not text: {raw.count(0)} of its first {len(raw)} bytes are NUL",
                                    "save it as UTF-8 text, or leave it out")
                rest += decoder.decode(raw, final=not raw)
                offset += len(raw)
                end = rest.rfind("\n") + 1 or (0 if whole_lines else len(rest))
                if not raw:
                    end = len(rest)
                if end:
                    yield rest[:end]
                    rest = rest[end:]
                if not raw:
                    return
    except UnicodeDecodeError as error:  # error.object: what was being decoded, the end of which is `raw`
        at = offset + len(raw) - len(error.object) + error.start
        raise UserError(f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {at}",
                        f"iconv -f latin1 -t utf-8 {path} > utf8.txt, with the encoding that it has") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}",
                        "check the file, or leave it out") from None


def jsonl_documents(path):
    """One document per line of JSON; the text is in the field `text`."""
    number = 0
    for block in text_blocks(path, whole_lines=True):
        for line in block.removesuffix("\n").split("\n"):
            number += 1
            if line.strip():
                text = jsonl_text(line, f"{path}, line {number}")
                yield Document(f"{path}, line {number}", lambda text=text: iter([text]))


def jsonl_text(line, where):
    def bad(reason):
        return UserError(f"{where}: {reason}", 'every line must be like {"text": "..."}; mend the line or delete it')
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise bad(f"not JSON: {error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError) as error:  # brackets or digits without end
        raise bad(f"not to be read: {error}") from None
    if not isinstance(row, dict) or "text" not in row:
        raise bad(f"no field `text`, but {', '.join(row) if isinstance(row, dict) else type(row).__name__}")
    if not isinstance(row["text"], str):
        raise bad(f"`text` is not a text but {type(row['text']).__name__}")
    try:
        row["text"].encode()
    except UnicodeEncodeError as error:
        raise bad(f"`text` has half a character, \\u{ord(error.object[error.start]):04x}") from None
    return row["text"]


# ---------------------------------------------------------------------------------------------------------------------
# The split, and writing

SKIP, TRAIN, VAL, CUT = range(4)  # what becomes of a document: dropped, one side or the other, or its end held out


@dataclass
class Plan:
    """What the first reading found: for each document its fate and its length in characters; and the totals."""

    fate: array
    length: array
    characters: set
    bytes: int = 0
    documents: int = 0
    duplicates: int = 0
    empty: int = 0


def make_plan(sources, val_fraction):
    """Read everything once: find duplicates, and decide what is held out. Keeps 9 bytes and a hash per document."""
    plan, seen = Plan(array("b"), array("q"), set()), set()
    lowest, highest = (2.0, 0), (-1.0, 0)  # (fraction, document) with the smallest and the largest fraction
    source_decides, progress = False, Progress("reading")
    for i, document in enumerate(documents(sources)):
        digest, size, length = hashlib.sha256(), 0, 0
        for block in document.blocks():
            raw = block.encode()
            digest.update(raw)
            size, length = size + len(raw), length + len(block)
            plan.characters.update(block)
            progress.add(len(raw))
        key = digest.digest()[:16]
        plan.length.append(length)
        plan.empty += size == 0
        plan.duplicates += key in seen
        if key in seen or size == 0:
            plan.fate.append(SKIP)
            continue
        seen.add(key)
        plan.bytes += size
        plan.documents += 1
        fraction = int.from_bytes(key[:8], "big") / 2**64  # uniform in [0, 1), the same wherever the document stands
        if document.held_out is not None:
            source_decides, fraction = True, 0.0 if document.held_out else 1.0
        plan.fate.append(VAL if fraction < val_fraction else TRAIN)
        lowest, highest = min(lowest, (fraction, i)), max(highest, (fraction, i))
    if plan.documents == 0:
        raise UserError(f"{' '.join(sources)} has no text ({plan.empty} empty documents)", "give a file with text")
    if plan.documents < MANY and not source_decides:
        plan.fate = array("b", (SKIP if fate == SKIP else CUT for fate in plan.fate))
    else:
        plan.fate[lowest[1]], plan.fate[highest[1]] = VAL, TRAIN  # so that neither side is ever empty
    return plan


def split_texts(sources, plan, val_fraction):
    """Read everything again: yields (TRAIN or VAL, does a document start here, text).

    What stands before `cut` in a document is for training, what stands after it is held out.
    """
    for i, document in enumerate(documents(sources)):
        if i >= len(plan.fate):
            raise UserError(f"{document.name} appeared while the text was being read", "run the command again")
        fate, length = plan.fate[i], plan.length[i]
        if fate == SKIP:
            continue
        cut = length if fate == TRAIN else 0 if fate == VAL else length - math.ceil(length * val_fraction)
        near = cut - (length - cut) // 2  # a line end that is not further away than this is the better place
        position, fresh = 0, {TRAIN, VAL}  # fresh: the sides that have nothing of this document yet
        for block in document.blocks():
            here = min(max(cut - position, 0), len(block))
            if fate == CUT and 0 < here < len(block):
                here = block.rfind("\n", max(near - position, 0), here) + 1 or here
                cut = position + here
            for side, text in ((TRAIN, block[:here]), (VAL, block[here:])):
                if text:
                    yield side, side in fresh, text
                    fresh.discard(side)
            position += len(block)


def learn_tokenizer(name, vocab_size, sources, plan, val_fraction):
    """The tokenizer that the settings ask for, learned from the training side alone (char: from every character)."""
    if os.path.isdir(name):
        return tokenizers.load_from(name)
    if name == "char":
        return tokenizers.train("char", plan.characters)
    # A token that is seen a few times only is not learned: a hundred bytes of text for each at least.
    vocab_size = vocab_size or max(tokenizers.smallest_vocab(plan.characters) + 64, min(4096, plan.bytes // 100))
    share = min(1.0, tokenizers.SAMPLE_BYTES / plan.bytes)
    if share < 1:
        note(f"the vocabulary is learned from a sample of {tokenizers.SAMPLE_BYTES / 1e6:.0f} MB of the "
             f"{plan.bytes / 1e6:,.0f} MB, spread evenly")
    sample = (text[:math.ceil(len(text) * share)] for split, _, text in split_texts(sources, plan, val_fraction)
              if split == TRAIN)
    return tokenizers.train(name, sample, vocab_size)


class BinWriter:
    """Writes one .bin file and counts what goes in."""

    def __init__(self, path, dtype, vocab_size):
        self.file, self.dtype, self.vocab_size = open(path, "wb"), dtype, vocab_size
        self.digest = hashlib.sha256()
        self.tokens = self.documents = self.bytes = 0

    def write(self, ids, starts_document, n_bytes):
        ids = np.asarray(ids)
        if ids.size and ids.max() >= self.vocab_size:  # numpy would wrap 70000 to 4464 in uint16 without a word
            raise ValueError(f"id {ids.max()} does not fit into a vocabulary of {self.vocab_size}")
        raw = ids.astype(self.dtype).tobytes()
        self.file.write(raw)
        self.digest.update(raw)
        self.tokens += ids.size
        self.documents += starts_document
        self.bytes += n_bytes

    def close(self):
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return dict(tokens=self.tokens, documents=self.documents, bytes=self.bytes, sha256=self.digest.hexdigest())


class Progress:
    """One line every two seconds: how much of how much, how fast, how much longer."""

    def __init__(self, what, total=0):
        self.what, self.total, self.done, self.start = what, total, 0, time.monotonic()
        self.next = self.start + 2

    def add(self, n):
        self.done += n
        if time.monotonic() > self.next:
            self.next = time.monotonic() + 2
            speed = self.done / (time.monotonic() - self.start)
            left = f" of {self.total / 1e6:,.1f}" if self.total else ""
            eta = f", {(self.total - self.done) / speed:.0f} s left" if self.total else ""
            say(f"{self.what}: {self.done / 1e6:,.1f}{left} MB, {speed / 1e6:.1f} MB/s{eta}")


def encode(texts, tokenizer, dtype, folder, total_bytes):
    """Write train.bin and val.bin from what split_texts yields. Returns the counts of both, as meta.json has them."""
    writers = {TRAIN: BinWriter(os.path.join(folder, "train.bin"), dtype, tokenizer.vocab_size),
               VAL: BinWriter(os.path.join(folder, "val.bin"), dtype, tokenizer.vocab_size)}
    progress = Progress("encoding", total_bytes)
    for side, starts, text in texts:
        n_bytes = len(text.encode())
        start = [tokenizer.special[tokenizers.END_OF_TEXT]] if starts else []
        writers[side].write(start + tokenizer.encode(text), starts, n_bytes)
        progress.add(n_bytes)
    counts = dict(train=writers[TRAIN].close(), val=writers[VAL].close())
    if not counts["train"]["tokens"] or not counts["val"]["tokens"]:
        raise UserError(f"{total_bytes} bytes of text are too few to train on some and hold some out", "give more text")
    return counts


def prepare(sources, settings):
    """Write data/NAME. Everything goes into a folder beside it first, so that what bears the name is whole."""
    started = time.monotonic()
    if not 0 < settings.val_fraction < 1:
        raise UserError(f"val_fraction={settings.val_fraction} is not between 0 and 1", "--val_fraction=0.05")
    path = os.path.normpath(sources[0])
    if glob.has_magic(path) and not os.path.exists(path):
        path = os.path.dirname(path.split("*")[0])  # 'letters/*.txt' -> letters
    out = os.path.normpath(settings.out or os.path.join("data", os.path.basename(path).split(".")[0] or "text"))
    out = os.path.realpath(out) if os.path.islink(out) else out
    for folder in (out, out + ".part", out + ".old"):  # what is about to be replaced must be ours
        ours = {"train.bin", "val.bin", "meta.json", "tokenizer", "config.json", "vocab.json", "tokenizer.model"}
        held = os.path.join(folder, "tokenizer")
        found = {"a file of this name"} if os.path.isfile(folder) else set()
        found = set(os.listdir(folder)) if os.path.isdir(folder) else found
        other = sorted((found | set(os.listdir(held) if os.path.isdir(held) else ())) - ours)
        if other:
            raise UserError(f"{folder} holds something other than prepared data: {other[0]}",
                            "--out=data/ANOTHER_NAME")

    # 1) count, find duplicates, decide what is held out  2) learn the vocabulary  3) encode
    plan = make_plan(sources, settings.val_fraction)
    tokenizer = learn_tokenizer(settings.tokenizer, settings.vocab_size, sources, plan, settings.val_fraction)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    part = out + ".part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        os.makedirs(part)
        tokenizer.save(os.path.join(part, "tokenizer"))
        counts = encode(split_texts(sources, plan, settings.val_fraction), tokenizer, dtype, part, plan.bytes)
        source = [f"stdlib of Python {platform.python_version()}" if name == "stdlib" else name for name in sources]
        meta = dict(format=1, dtype=dtype.name, vocab_size=tokenizer.vocab_size, special=tokenizer.special,
                    source=source, tokenizer_sha256=tokenizers.fingerprint(os.path.join(part, "tokenizer")), **counts)
        with open(os.path.join(part, "meta.json"), "w", encoding="utf-8") as file:
            json.dump(meta, file, indent=1)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {part}: {error.strerror}", "--out=A_FOLDER_ON_ANOTHER_DISK") from None
        raise
    shutil.rmtree(out + ".old", ignore_errors=True)
    if os.path.exists(out):
        note(f"{out} is replaced; runs that were trained on what it held cannot be resumed with this")
        os.replace(out, out + ".old")
    os.replace(part, out)
    shutil.rmtree(out + ".old", ignore_errors=True)

    seconds = time.monotonic() - started
    say(f"\n{' '.join(source)}: {plan.documents:,} documents, {plan.bytes:,} bytes; dropped {plan.duplicates:,} exact "
        f"duplicates and {plan.empty:,} empty ones")
    say(f"tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens, "
        f"{plan.bytes / (meta['train']['tokens'] + meta['val']['tokens']):.2f} bytes per token")
    for name in ("train", "val"):
        say(f"{out}/{name}.bin: {meta[name]['tokens']:,} tokens of {meta[name]['documents']:,} documents, "
            f"{meta[name]['bytes']:,} bytes of text")
    say(f"took {seconds:.1f} s, {plan.bytes / 1e6 / seconds:.1f} MB/s")
    return out, meta


def next_command(out, meta, settings):
    """What to type after preparing: the small recipe, with a context and a length that fit the text."""
    name = os.path.relpath(out, "data")
    longest = min(meta["train"]["tokens"], meta["val"]["tokens"]) - 1
    block = "" if longest >= RECIPE_BLOCK_SIZE else f" --block_size={1 << max(longest.bit_length() - 1, 0)}"
    steps = round(10 * meta["train"]["tokens"] / RECIPE_TOKENS)  # ten times through the text: more is learning by heart
    short = "" if steps >= RECIPE_STEPS else f" --max_iters={max(steps, 50)} --eval_interval={max(steps // 5, 10)}"
    target = "" if name == "stdlib" else f" --dataset={name} --out_dir=out/{os.path.basename(out)}"
    if os.path.exists(os.path.join(settings.tokenizer, "best.pt")):  # the tokenizer of a run: to continue from it
        return f"python train.py --init_from={settings.tokenizer}{target} --learning_rate=1e-3 --warmup_iters=5{short}"
    return f"python train.py config/train_small.py{target}{block}{short}"


def main(argv):
    settings, _, sources = load(PrepareConfig, argv)
    if not sources:
        raise UserError("no text was named", f"python prepare.py FILE, a folder, or one of: {', '.join(BUILT_IN)}")
    out, meta = prepare(sources, settings)
    say(f"next: {next_command(out, meta, settings)}")


# ---------------------------------------------------------------------------------------------------------------------
# The reader

@dataclass
class Data:
    """A prepared folder: its meta.json, and its two sides."""

    folder: str
    meta: dict
    files: dict

    @classmethod
    def open(cls, folder):
        """Raises UserError when the folder is missing, or when a file is not what meta.json says."""
        try:
            with open(os.path.join(folder, "meta.json"), encoding="utf-8") as file:
                meta = json.load(file)
            check_meta(meta)
        except FileNotFoundError:
            raise UserError(f"there is no prepared data in {folder} (no meta.json)",
                            f"python prepare.py YOUR_TEXT.txt --out={folder}") from None
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(f"{folder}/meta.json cannot be read: {type(error).__name__}: {error}",
                            "run prepare.py again") from None
        files = {}
        for side in ("train", "val"):
            path, item = os.path.join(folder, side + ".bin"), np.dtype(meta["dtype"]).itemsize
            size, due = os.path.getsize(path) if os.path.exists(path) else 0, meta[side]["tokens"] * item
            if size != due:
                raise UserError(f"{path} has {size:,} bytes, but meta.json says {meta[side]['tokens']:,} tokens of "
                                f"{item} bytes = {due:,}", f"it was cut or changed; prepare {folder} again")
            files[side] = open(path, "rb")  # held open: a file that takes its place later is not read by this run
            if size <= HASHED_BYTES and (found := file_sha256(path)) != meta[side]["sha256"]:
                raise UserError(f"{path} has the checksum {found[:12]}, but meta.json says {meta[side]['sha256'][:12]}",
                                f"it was changed or damaged; prepare {folder} again")
        return cls(folder, meta, files)

    def check_tokenizer(self):
        """Raises UserError where the tokenizer is not the one that these ids were written with."""
        size = tokenizers.load_from(self.folder, self.meta["tokenizer_sha256"]).vocab_size
        if size != self.meta["vocab_size"]:
            raise UserError(f"{self.folder}/meta.json says vocab_size={self.meta['vocab_size']}, but the tokenizer "
                            f"there has {size} tokens", f"prepare {self.folder} again")

    def check(self, block_size):
        """Raises UserError where a side is too short for one window of block_size + 1 tokens."""
        shortest = min(self.meta[side]["tokens"] for side in ("train", "val"))
        for side in ("train", "val"):
            if self.meta[side]["tokens"] <= block_size:
                smaller = f"--block_size={1 << ((shortest - 1).bit_length() - 1)}, or " if shortest > 1 else ""
                raise UserError(f"{self.folder}/{side}.bin has {self.meta[side]['tokens']:,} tokens, but block_size="
                                f"{block_size} needs at least {block_size + 1}", smaller + "more text")

    def tokens(self, side, start, count):
        """`count` ids from position `start` of a side, (count,) int64."""
        dtype = np.dtype(self.meta["dtype"])
        self.files[side].seek(start * dtype.itemsize)
        ids = np.frombuffer(self.files[side].read(count * dtype.itemsize), dtype)
        if ids.max() >= self.meta["vocab_size"]:
            raise UserError(f"{self.folder}/{side}.bin has the token {ids.max()} near position {start}, but the "
                            f"vocabulary has {self.meta['vocab_size']}", f"it is damaged; prepare {self.folder} again")
        return ids.astype(np.int64)

    def batch(self, block_size, batch_size, seed, step, micro=0, micros=1):
        """The micro-batch number `micro` of the `micros` that make up a step: (idx, targets), each (B, T) int64."""
        import torch
        starts = self.starts(block_size, batch_size, seed, step, micro, micros)
        rows = np.stack([self.tokens("train", start, block_size + 1) for start in starts.tolist()])  # (B, T + 1)
        return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())

    def starts(self, block_size, batch_size, seed, step, micro=0, micros=1):
        """Where the windows of that micro-batch begin: (B,) int64.

        The training side is cut into windows of block_size tokens, and an epoch visits every window once, in shuffled
        order. Sample number g of the whole run is window shuffled(g mod n) of epoch g // n: nothing is remembered from
        one batch to the next, so a resumed run continues with exactly the data it would have seen, validation cannot
        disturb it, and it does not matter which process takes which micro-batch.
        """
        tokens = self.meta["train"]["tokens"]
        n = max(1, tokens // block_size - 1)  # windows of an epoch: one fewer than fit, which leaves room ...
        room = tokens - n * block_size  # ... for every epoch to begin its first window at another place
        sample = (step * micros + micro) * batch_size + np.arange(batch_size)  # (B,)
        starts = np.empty(batch_size, dtype=np.int64)
        for epoch in set((sample // n).tolist()):
            here = sample // n == epoch
            window = shuffled(sample[here] % n, n, fold("epoch", seed, epoch))
            starts[here] = fold("offset", seed, epoch) % room + window * block_size
        return starts

    def val_batch(self, i, block_size, batch_size):
        """Batch number i of the one pass over the held-out side: (idx, targets), each (B, T) int64; -1 after the end.

        Every token but the first is predicted once, from the tokens before it in its window. All batches have the same
        shape, the last one too, so that compiled code is compiled once.
        """
        import torch
        start, size = i * block_size * batch_size, block_size * batch_size
        ids = self.tokens("val", start, min(size + 1, self.meta["val"]["tokens"] - start))
        rows = np.zeros((2, size), dtype=np.int64)
        rows[1] = -1
        rows[0, :len(ids) - 1], rows[1, :len(ids) - 1] = ids[:-1], ids[1:]
        idx, targets = torch.from_numpy(rows).view(2, batch_size, block_size)
        return idx, targets

    def n_val_batches(self, block_size, batch_size, at_most=0):
        """How many batches the pass has; at_most: no more than this, 0 for all."""
        n = math.ceil((self.meta["val"]["tokens"] - 1) / (block_size * batch_size))
        return min(n, at_most or n)

    def bits_per_byte(self, loss):
        """A validation loss in nats per token as bits per byte of the held-out text.

        The loss depends on how long the tokens are: fewer, longer tokens are each harder to guess. The information in
        all of them together, spread over the bytes of the text, can be compared between tokenizers. (End-of-text tokens
        count as information, not as bytes. Where only a part was read, its mean stands for the whole.)
        """
        return loss * (self.meta["val"]["tokens"] - 1) / self.meta["val"]["bytes"] / math.log(2)


HASHED_BYTES = 1 << 30  # files up to this size are hashed whenever they are opened, which takes a second at the most


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_meta(meta):
    """Raises ValueError, KeyError or TypeError where a meta.json is not as `prepare` writes it."""
    counts = [meta[side][key] for side in ("train", "val") for key in ("tokens", "bytes")]
    texts = [meta["tokenizer_sha256"], *meta["source"], *(meta[side]["sha256"] for side in ("train", "val"))]
    if meta["format"] != 1 or meta["dtype"] not in ("uint16", "uint32") or not all(isinstance(t, str) for t in texts):
        raise ValueError("not format 1")
    if not all(isinstance(n, int) and n > 0 for n in (*counts, meta["vocab_size"])):
        raise ValueError("a count is not a positive number")


def fold(*parts):
    """A 63-bit seed for a purpose: fold("epoch", seed, 3). The same on every machine; parts: texts and plain ints."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def shuffled(i, n, key):
    """Where index i (an array) lands when 0..n-1 are shuffled with this key: a permutation, computed, not stored.

    A Feistel network (the idea behind DES) turns any mixing function into a permutation of pairs (left, right): each
    round xors one half with a scramble of the other half, which can be undone whatever the scramble is. It permutes
    the numbers of 2 * bits bits, the smallest such range that holds n; a result beyond n is put in again until it is
    below, which follows a cycle of the permutation, so that no two indices can meet. A billion windows need no list
    of a billion numbers.
    """
    bits = np.uint64(max(1, math.ceil((int(n) - 1).bit_length() / 2)))
    mask = np.uint64((1 << int(bits)) - 1)
    i = np.array(i, dtype=np.uint64)
    outside = np.ones(i.shape, dtype=bool)
    while outside.any():
        left, right = i[outside] >> bits, i[outside] & mask
        for turn in range(6):
            scramble = (right + np.uint64(fold(key, turn))) * np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio
            left, right = right, left ^ ((scramble ^ (scramble >> np.uint64(29))) >> np.uint64(32) & mask)
        i[outside] = left << bits | right
        outside = i >= n
    return i.astype(np.int64)


def validation_sums(loss_of, data, block_size, batch_size, batches, before_each=lambda: None, rank=0, world=1):
    """(sum of the loss in nats, number of tokens) over the first `batches` batches of the held-out side, in float64.

    loss_of: (idx, targets) -> the mean loss over the targets that are not -1, as a number. Of several processes, each
    takes every world-th batch; the mean is the quotient of their sums. before_each is called equally often in all.
    """
    total = count = 0
    for first in range(0, batches, world):
        before_each()
        if first + rank < batches:
            idx, targets = data.val_batch(first + rank, block_size, batch_size)
            n = int((targets >= 0).sum())
            total += float(loss_of(idx, targets)) * n
            count += n
    return total, count


if __name__ == "__main__":
    command_line(main)

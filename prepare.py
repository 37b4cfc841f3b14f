# SPDX-License-Identifier: GPL-3.0-only
"""
Prepare: text in, two files of token ids out.

    python prepare.py stdlib                  # Python's own source code (8 MB, already installed)
    python prepare.py notes.txt               # a file, a folder or 'a pattern/*.md'; also .gz
    python prepare.py rows.csv                # the column `text`; also .jsonl, .parquet and .json
    python prepare.py shakespeare --tokenizer=char                    # a download
    python prepare.py stdlib --format=chat --tokenizer=out/small      # conversations
    python prepare.py --inspect data/notes    # check it all and show an excerpt

text/sources.py reads the texts, text/chats.py the conversations. What is written:

    data/NAME/train.bin, val.bin    token ids, uint16 (uint32 beyond 65,536 tokens), with
                                    <|endoftext|> before every document
    data/NAME/train.mask.bin, ...   for conversations, a byte per token: 1 where the loss counts,
                                    on the assistant's words and the token that ends them
    data/NAME/meta.json             counts, the checksum of each file, the report
    data/NAME/tokenizer/            the tokenizer that turned the text into these ids

np.memmap(path, dtype=np.uint16) reads a .bin file.

The text is read in two or three passes, a megabyte at a time: choose each document's
split, learn a vocabulary if needed, encode. Between passes, about 75 bytes per document
stay in memory. The result does not depend on the number of threads; the folder appears
when it is complete.
"""
import glob
import hashlib
import json
import math
import os
import re
import runpy
import shlex
import shutil
import time
from array import array
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal
from zlib import crc32

# (First, so that an interrupted or failing import is no traceback.)
from runtime.console import Progress, UserError, command_line, counted, note, origin, public, say, warn
import numpy as np

from text import chats
import dataset as datasets
import tokenizer as tokenizers
from runtime.files import PACKED, file_sha256, is_gguf, locked
from runtime.settings import check_limits, load, or_else
from text.leaks import Characters, characters, overlap
from text.rows import Skipped
from text.sources import BLOCK_BYTES, INSTALLED, KINDS, NAMES, TABLES, documents, fetch, kind


@dataclass
class PrepareConfig:
    out: str = ""  # output folder; by default data/NAME or data/NAME-chat, named after the first source
    overwrite: bool = False  # replace the folder even if it holds other sources or the other format
    format: Literal["text", "chat"] = "text"  # chat: conversations, with the fields that text/chats.py lists
    follow_links: bool = False  # follow links inside folders; a link named on the command line is always followed
    text_field: str = "text"  # .jsonl, .csv, .parquet: the field or column that holds the text
    fields: str = ""  # chat: the fields of a question and its answer, such as question,response; text: as text_field
    separator: str = "<|endoftext|>"  # .txt: a line with only this separates documents; empty: none does
    strict: bool = False  # stop at the first unreadable row instead of skipping it
    mirror: str = ""  # https://HOST to download from, instead of a source's usual host
    tokenizer: str = "bpe"  # bpe, unigram, char, simple_bpe: learned from this text; gpt2, ...; or a folder with one
    vocab_size: Literal["auto"] | int = "auto"  # bpe, unigram; auto: 4,096, fewer below 400 KB; try 32,000 for GBs
    character_coverage: float = 1.0  # bpe, unigram: share of the characters that get a token; 0.9995 suits Chinese
    val_fraction: float = 0.05  # share of the text held out for validation
    min_words: int = 0  # leave out documents with fewer words
    num_proc: Literal["auto"] | int = "auto"  # blocks of text encoded at once; auto: one per processor
    inspect: bool = False  # only check an existing folder: every hash, id and count


LIMITS = {"min_words": (0, 1 << 30), "num_proc": (1, 1 << 20), "val_fraction": (1e-9, 0.999),
          "character_coverage": (0.98, 1), "vocab_size": (1, 1_000_000)}
MANY = 200  # with this many documents or more, validation takes whole ones; with fewer, the end of each
# A word is a run of letters and digits; in the scripts from Thai to Chinese, many of
# which have no spaces, one of them.
WORD = re.compile(r"[^\W_\u0e00-\u9fff]+|(?=\w)[\u0e00-\u9fff]")

# ---------- 1. The plan: which documents are kept, and in which split

UNREADABLE = -1  # in place of a size
SKIP, TRAIN, VAL, CUT = range(4)  # a document is dropped, is in one split, or is cut near its end


@dataclass
class Plan:
    """What the first reading found."""

    split_of: np.ndarray  # SKIP, TRAIN, VAL or CUT, for each document
    length: np.ndarray  # of each document, in characters
    counts: np.ndarray  # how often each code point occurs
    sizes: np.ndarray  # of the documents that are kept, in bytes
    bytes: int  # the sum of these
    dropped: str  # how many documents are not kept, and why

    def without(self, sizes, seen):
        """Take out conversations of these sizes and characters, which cannot be encoded."""
        left = Counter(self.sizes.tolist()) - Counter(sizes)
        self.sizes = np.array(list(left.elements()))
        self.bytes -= sum(sizes)
        seen.count()
        self.counts -= seen.counts


def read(sources, settings, skipped=None):
    """The documents of the sources. skipped: collects the rows that cannot be read."""
    # Each pass skips the same rows; only the first, in `make_plan`, shows them.
    skipped = skipped or Skipped(settings.strict)
    if settings.format == "chat":
        names = [name for name in settings.fields.split(",") if name]
        return chats.conversations(sources, names, skipped)
    return documents(sources, settings.fields or settings.text_field, skipped, settings.separator)


def make_plan(sources, settings):
    """Read everything once: find duplicates, choose the splits, count characters."""
    # 1) Per document: a key that equal documents share, its size, and what its source
    #    says of the split.
    seen, progress, skipped = Characters(settings.separator), Progress("reading"), Skipped(settings.strict)
    keys, sizes, lengths, splits = array("Q"), array("q"), array("q"), array("b")
    for document in read(sources, settings, skipped):
        try:
            key, size, length, n_words = measure(document, seen, settings.min_words, progress)
        except UserError as error:
            # A file that is not UTF-8: later passes do not open it, since its split is
            # SKIP.
            skipped.add(error)
            key, size, length, n_words = 0, UNREADABLE, 0, 0
        split = {None: CUT, False: TRAIN, True: VAL}[document.held_out]
        keys.append(key)
        sizes.append(size)
        lengths.append(length)
        splits.append(split if size > 0 and n_words >= settings.min_words else SKIP)
    seen.count()
    say_skipped(skipped, sum(size != UNREADABLE for size in sizes))
    if seen.found:
        warn(f"{settings.separator} occurs {counted(seen.found, 'time')} inside a text and stays text: "
             "only alone on a line of a .txt, it separates documents")

    # 2) Drop what is empty or short, and what has been there before.
    keys, sizes, split_of = np.array(keys), np.array(sizes), np.array(splits)
    first_of_each = np.unique(keys, return_index=True)[1]
    again = ~np.isin(np.arange(len(keys)), first_of_each)
    reasons = {"exact duplicates": again & (split_of != SKIP), "empty": sizes == 0,
               "with too few words": (split_of == SKIP) & (sizes > 0)}
    counts = [f"{which.sum():,} {why}" for why, which in reasons.items() if which.any()]
    dropped = ", ".join(counts) or "nothing"
    split_of[again] = SKIP
    kept = split_of != SKIP
    if not kept.any():
        raise UserError(f"no text is left; dropped: {dropped}",
                        "give a file with text, or a smaller --min_words")

    # 3) Choose the splits.
    split_of[kept] = choose_splits(keys[kept], split_of[kept], settings)
    sizes = sizes[kept]
    return Plan(split_of, np.array(lengths), seen.counts, sizes, int(sizes.sum()), dropped)


def measure(document, seen, min_words, progress):
    """(key, bytes, characters, words) of a document. Equal ones have the same key; words count up to min_words."""
    # A long document comes in blocks, so that memory does not grow with it.
    digest = hashlib.sha256()
    size = length = n_words = 0
    for block in document.blocks():
        raw = block.encode()
        digest.update(raw)
        size += len(raw)
        length += len(block)
        seen.add(block)
        if n_words < min_words:
            n_words += len(WORD.findall(block))
        progress.add(len(raw))
    # Eight bytes of the hash: among a billion documents, two are confused with a
    # chance of 3%.
    key = int.from_bytes(digest.digest()[:8], "big")
    # The same words by other speakers are no duplicate. The upper half of the key,
    # which decides on the split, stays: they belong into the same one.
    if document.messages:
        speakers = [(said["role"], len(said["content"] or ""), said.get("weight")) for said in document.messages]
        key ^= crc32(repr(speakers).encode())
    return key, size, length, n_words


def say_skipped(skipped, readable):
    """Show what could not be read; where that is all, it is an error."""
    # A single bad file, or rows of a layout that is unknown: the error has the fix.
    if skipped.count and not readable:
        raise skipped.shown[0]
    for error in skipped.shown:
        warn(f"left out: {error.fact}")
    if skipped.count:
        warn(f"{skipped.count:,} unreadable, {readable:,} read; --strict stops at the first")


def choose_splits(keys, split_of, settings):
    """The split of each document, where its source leaves it to us. Neither split is ever empty."""
    if (split_of == split_of[0]).all():
        split_of[:] = CUT  # a source that has one split only
    # Of a few documents, whole ones would be too coarse a share: the end of each is
    # cut off instead.
    free = np.flatnonzero(split_of == CUT)
    if not len(free) or (len(free) < MANY and settings.format == "text"):
        return split_of
    # A number in [0, 1) from the text itself: the same text is in the same split
    # wherever it stands.
    share = keys[free] / 2.0**64
    split_of[free] = np.where(share < settings.val_fraction, VAL, TRAIN)
    split_of[free[share.argmin()]] = VAL
    split_of[free[share.argmax()]] = TRAIN
    return split_of


def split_texts(sources, plan, settings):
    """Read it again: yields ("train" or "val", the document, does it start here, text).

    The text of a document before `cut` is for training, the rest for validation.
    """
    for document, split_of, length in zip(read(sources, settings), plan.split_of, plan.length):
        if split_of == SKIP:
            continue
        end = math.ceil(length * settings.val_fraction)  # characters for validation
        cut = {TRAIN: length, VAL: 0, CUT: length - end}[split_of]
        # A line end is a better place to cut, if it is not further away than this.
        near = cut - (length - cut) // 2
        # The splits that have nothing of this document yet: it starts there with an
        # end-of-text token.
        position, fresh = 0, {"train", "val"}
        for block in document.blocks():
            here = min(max(cut - position, 0), len(block))
            if split_of == CUT and 0 < here < len(block):
                here = block.rfind("\n", max(near - position, 0), here) + 1 or here
                cut = position + here
            for split, text in (("train", block[:here]), ("val", block[here:])):
                if text:
                    yield split, document, split in fresh, text
                    fresh.discard(split)
            position += len(block)


# ---------- 2. The vocabulary

def learn_tokenizer(sources, plan, settings, existing):
    """The tokenizer: one that exists, or learned, from the training split alone (char: from all)."""
    # 1) One that exists, or one id per character, for which the plan has all that is
    #    needed.
    if existing or settings.tokenizer == "char":
        tokenizer = existing or tokenizers.train("char", map(chr, np.flatnonzero(plan.counts)))
        if settings.vocab_size not in ("auto", tokenizer.vocab_size):
            note(f"--vocab_size has no effect here: this vocabulary has {tokenizer.vocab_size:,} tokens")
        return tokenizer
    # 2) A token that is seen a few times only is not learned: a hundred bytes of text
    #    for each at least.
    vocab_size = or_else(settings.vocab_size, max(1, min(4096, plan.bytes // 100)))
    # 3) The validation split stays unseen, here too.
    texts = (text for split, _, _, text in split_texts(sources, plan, settings) if split == "train")
    texts = tokenizers.sample(texts, plan.bytes)
    return tokenizers.train(settings.tokenizer, texts, vocab_size, settings.character_coverage,
                            enlarge=settings.vocab_size == "auto")


# ---------- 3. Encoding

def encode(texts, plan, tokenizer, dtype, folder, settings):
    """Write train.bin and val.bin, of conversations their masks too, from what split_texts yields.

    Returns the counts of both splits, as meta.json has them, and the names of the
    documents in val.bin. What a chat format refuses is taken out of the plan.
    """
    chat, threads = settings.format == "chat", or_else(settings.num_proc, os.cpu_count() or 1)
    counts, validation = dict(train=Counter(), val=Counter()), []
    known = range(tokenizer.vocab_size) if chat else ()
    lengths = np.array([len(tokenizer.token_bytes(i)) for i in known])
    progress = Progress("encoding", plan.bytes)
    refused, sizes, seen = Skipped(settings.strict), [], Characters()

    def work(batch):
        return batch[0][0], *encode_batch(batch, tokenizer, chat)

    # 1) Encode: the threads work on batches, this one writes and counts.
    for split, batch, ids, mask, errors in in_threads(work, batches(texts), threads):
        for error, text in errors:
            refused.add(error)
            sizes.append(len(text.encode()))
            seen.add(text)
        started = [document.name for _, document, starts, _ in batch if starts]
        size = sum(len(text.encode()) for *_, text in batch)
        append(os.path.join(folder, f"{split}.bin"), ids.astype(dtype))
        counts[split].update(tokens=ids.size, documents=len(started), bytes=size)
        if chat:
            append(os.path.join(folder, f"{split}.mask.bin"), mask)
            learned = ids[mask == 1]
            trained_bytes = int(lengths[learned].sum())
            counts[split].update(trained=learned.size, trained_bytes=trained_bytes)
        if split == "val":
            validation += started
        progress.add(size)

    if refused.count:
        say_skipped(refused, sum(n["documents"] for n in counts.values()))
        plan.without(sizes, seen)

    # 2) Is it what was planned, and enough?
    if counts["train"]["bytes"] + counts["val"]["bytes"] != plan.bytes:
        raise UserError("the text changed while it was being read", "run the command again")
    for split, n in counts.items():
        if not n["tokens"]:
            raise UserError(f"too little text for two splits: {counted(plan.bytes, 'byte')}", "give more text")
        if chat and not n["trained_bytes"]:
            raise UserError(f"the assistant says nothing in any of the {n['documents']:,} conversations of the {split} "
                            "split", "give more conversations with answers")
        n["sha256"] = sealed(os.path.join(folder, f"{split}.bin"))
        if chat:
            n["mask_sha256"] = sealed(os.path.join(folder, f"{split}.mask.bin"))
    return counts, validation


def append(path, array):
    with open(path, "ab") as file:
        file.write(array.data)


def sealed(path):
    """The sha256 of a file, after all of it is on the disk."""
    # The folder gets its name only after this: it can never hold half of the data.
    with open(path, "r+b") as file:
        os.fsync(file.fileno())
    return file_sha256(path)


def batches(texts):
    """What split_texts yields, as lists of half a megabyte of one split, the work of a thread."""
    # The order within a split is that of the text, whatever the number of threads.
    batch, size = dict(train=[], val=[]), dict(train=0, val=0)
    for item in texts:
        split = item[0]
        batch[split].append(item)
        size[split] += len(item[-1])
        if size[split] > BLOCK_BYTES // 2:
            yield batch[split]
            batch[split], size[split] = [], 0
    yield from filter(None, batch.values())


def in_threads(function, items, threads):
    """map(function, items) in a few threads, in order, with at most two items per thread in memory."""
    # Threads are enough: the tokenizers encode in C++ or Rust, without Python's lock.
    with ThreadPoolExecutor(threads) as pool:
        running = deque()
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) > 2 * threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def encode_batch(batch, tokenizer, chat):
    """(what of a batch is encoded, ids, their mask, [(error, text)] of what a chat format refuses).

    batch: a list of what split_texts yields.
    """
    end = np.array([tokenizer.special[tokenizers.END_OF_TEXT]], dtype=np.int32)
    encoded, ids, mask, errors = [], [end[:0]], [], []
    for item in batch:
        _, document, starts, text = item
        if chat:
            try:
                spoken, learned = tokenizer.conversation(document.messages)
            except UserError as error:
                errors.append((UserError(f"{document.name}: {error.fact}", error.fix), text))
                continue
            mask += [0, *learned]
        else:
            # `follows`: it goes on in a text that began before, where some tokenizers
            # add a space.
            spoken = tokenizer.encode_to_numpy(text, follows=not starts)
        # An end-of-text token before every document: the first one begins with it too.
        if starts:
            ids.append(end)
        ids.append(np.array(spoken, dtype=np.int32))
        encoded.append(item)
    ids = np.concatenate(ids)
    # numpy would turn 70000 into 4464 in uint16 without a word.
    assert ids.max(initial=0) < tokenizer.vocab_size
    return encoded, ids, np.array(mask, dtype=np.uint8), errors


# ---------- All of it

def prepare(sources, settings):
    """Write data/NAME, and return (data/NAME, what its meta.json says)."""
    check_limits(settings, LIMITS)
    settings.separator = settings.separator.strip()
    if "\n" in settings.separator:
        raise UserError(f"--separator={settings.separator!r} has several lines", "--separator='ONE LINE'")
    for source in sources:
        if os.path.exists(os.path.join(source, "train.bin")):
            raise UserError(f"{source} is prepared already", f"python train.py --dataset={shlex.quote(source)}")
    # 1) Where, and is there something else?
    out = folder_to_write(sources, settings)
    new, missing = contents(sources, settings.format == "chat"), not os.path.exists(out)
    try:
        os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
        # 2) Of two commands that need the same new data, the second waits for the first.
        with locked(out, wait=missing):
            held = held_by(out)
            if held and held != new and not settings.overwrite:
                raise UserError(f"{out} holds {held}; {new} would replace it",
                                "--overwrite, or --out=data/ANOTHER_NAME")
            if held and missing:
                note(f"{out} has just been written by another process")
                return out, datasets.read_meta(out)
            if held:
                note(f"replacing {out}, which holds {held}")
            # 3) What is half done goes, whatever happens.
            try:
                return out, write(sources, settings, out)
            finally:
                shutil.rmtree(out + ".part", ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}", "--out=A_FOLDER_ON_ANOTHER_DISK") from None


def folder_to_write(sources, settings):
    """--out, or data/NAME after the first source, for conversations data/NAME-chat."""
    # 1) The name: notes.txt.gz -> notes, 'letters/*.txt' -> letters.
    path = os.path.normpath(public(sources[0]))
    if glob.has_magic(path) and not os.path.exists(path):
        path = os.path.dirname(path.split("*")[0])
    name = os.path.basename(path)
    if os.path.splitext(name)[1].lower() in PACKED:
        name = os.path.splitext(name)[0]
    if kind(name) in (*KINDS, *TABLES):
        name = os.path.splitext(name)[0]
    name = name.lstrip(".") or "text"
    if settings.format == "chat":
        name += "-chat"
    out = os.path.normpath(settings.out or os.path.join("data", name))
    if os.path.islink(out):
        out = os.path.realpath(out)
    # 2) Nothing is written over that prepare.py has not written.
    for folder in (out, out + ".part", out + ".old"):
        if other := datasets.not_ours(folder):
            raise UserError(f"{folder} is not prepared data: {other}",
                            "--out=data/ANOTHER_NAME")
    return out


def held_by(out):
    """What a folder holds, in the words of `contents`; nothing of one that is missing or empty."""
    if not any(files for *_, files in os.walk(out)):
        return ""
    try:
        meta = datasets.read_meta(out)
    except UserError:
        return "data with no readable meta.json"
    return contents(meta["source"], meta.get("chat", False))


def contents(sources, chat):
    """What data are made of, in words: the same words when it is prepared again, by whatever Python."""
    accidents = re.compile(r"^\./|/$|(?<=^stdlib) of Python .*|(?<=^pytorch) \d.*| \(sha256 \w+\)$")
    names = [accidents.sub("", origin(name)) for name in sources]
    return f"{'conversations' if chat else 'text'} from {', '.join(names)}"


def write(sources, settings, out):
    """Write all files into `out`.part, then rename it. Returns what meta.json says."""
    started, part, chat = time.monotonic(), out + ".part", settings.format == "chat"
    existing = None
    if settings.tokenizer not in tokenizers.LEARNED:
        existing = tokenizers.get(settings.tokenizer)
        if tokenizers.END_OF_TEXT not in existing.special:
            raise UserError(f"the characters in {settings.tokenizer} have no end-of-text token", "--tokenizer=char")
    kinds = chats.KINDS if chat else KINDS
    sources, origins = fetch(sources, settings.mirror, kinds, settings.follow_links)

    # 1) The plan, the vocabulary, the ids.
    plan = make_plan(sources, settings)
    tokenizer = learn_tokenizer(sources, plan, settings, existing)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(part)
    tokenizer.save(os.path.join(part, "tokenizer"))
    texts = split_texts(sources, plan, settings)
    counts, validation = encode(texts, plan, tokenizer, dtype, part, settings)

    # 2) What is known about them.
    end = tokenizer.special[tokenizers.END_OF_TEXT]
    about_overlap = overlap(part, dtype, counts, end, validation)
    meta = dict(format=1, dtype=dtype.name, vocab_size=tokenizer.vocab_size,
                special=tokenizer.special, source=origins, **counts,
                tokenizer_sha256=tokenizers.fingerprint(tokenizer),
                report=report(plan, about_overlap, tokenizer, counts))
    if chat:
        meta["chat"] = True
    with open(os.path.join(part, "meta.json"), "w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1)

    # 3) The old data go when the new are complete.
    shutil.rmtree(out + ".old", ignore_errors=True)
    if os.path.exists(out):
        os.replace(out, out + ".old")
    os.replace(part, out)
    shutil.rmtree(out + ".old", ignore_errors=True)
    seconds = time.monotonic() - started
    say("\n" + "\n".join([f"{out}: {', '.join(origins)}", *meta["report"],
                          f"took {seconds:.1f} s, {plan.bytes / 1e6 / seconds:.1f} MB/s"]))
    return meta


def report(plan, about_overlap, tokenizer, counts):
    """What to know about this text before a model is trained on it: lines."""
    # 1) The text.
    what = "conversation" if "trained" in counts["train"] else "document"
    tokens = counts["train"]["tokens"] + counts["val"]["tokens"]
    median, longest = np.median(plan.sizes), plan.sizes.max()
    lines = [f"{counted(len(plan.sizes), what)}, {plan.bytes:,} bytes; dropped: {plan.dropped}",
             f"median size {median:,.0f} bytes, longest {longest:,}",
             *characters(plan.counts), *about_overlap,
             f"tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens, "
             f"{plan.bytes / tokens:.2f} bytes per token"]
    # 2) What a vocabulary of others cannot spell.
    lacks = [byte for byte in getattr(tokenizer, "missing", b"") if byte < 128]
    if lost := plan.counts[lacks].sum():
        lines.append(f"dropped: {lost:,} control characters that this vocabulary has no token for")
    # 3) The files.
    for split, n in counts.items():
        learned = f"; loss on {counted(n['trained'], 'token')}" if "trained" in n else ""
        lines.append(f"{split}.bin: {counted(n['tokens'], 'token')} of {counted(n['documents'], what)}, "
                     f"{counted(n['bytes'], 'byte')} of text{learned}")
    return lines


LARGE_VOCABULARY = 20_000
# Where to start: with a new model, or with the weights that the tokenizer's folder
# holds, of a run or of others.
RECIPES = {
    ("text", "scratch"): ["config/train_small.py"],
    ("text", "char"): ["config/train_shakespeare_char.py"],
    ("text", "run"): ["--learning_rate=1e-3", "--warmup_iters=5"],
    ("text", "hugging_face"): ["--learning_rate=1e-4"],
    ("chat", "scratch"): ["config/train_small.py", "config/finetune_chat.py", "--init_from=scratch"],
    ("chat", "run"): ["config/finetune_chat.py"],
    ("chat", "hugging_face"): ["config/finetune_lora.py"],
}


def next_command(out, meta, settings):
    """What to type next: a recipe, with a context and a number of steps that fit the text."""
    # 1) Where to start.
    model, start = settings.tokenizer, "scratch"
    if os.path.exists(os.path.join(model, "best.pt")):
        start = "run"
    elif is_gguf(model) or glob.glob(os.path.join(glob.escape(model), "model.safetensors*")):
        start = "hugging_face"
    elif settings.format == "text" and model == "char":
        start = "char"
    elif settings.format == "chat":
        note(f"--tokenizer={model} is not a trained model; to fine-tune one, prepare with --tokenizer=RUN")
    arguments = list(RECIPES[settings.format, start])
    if start in ("run", "hugging_face"):
        arguments.append(f"--init_from={model}")
    # A token that occurs a few times is not learned: the text should have a hundred for
    # each.
    elif meta["vocab_size"] > LARGE_VOCABULARY and meta["train"]["tokens"] < 100 * meta["vocab_size"]:
        note(f"{meta['vocab_size']:,} tokens is a large vocabulary for so short a text; "
             "--tokenizer=bpe learns a small one")

    # 2) The data, and a run of their own.
    name = os.path.relpath(out, "data")
    if name.startswith(".."):
        name = os.path.abspath(out)
    if name != "stdlib":
        arguments += [f"--dataset={name}", f"--out_dir=out/{os.path.basename(out)}"]

    # 3) A context that fits: a power of two.
    longest = max(min(meta["train"]["tokens"], meta["val"]["tokens"]) - 1, 1)
    recipe = [name for name in ["config/train_small.py", *arguments] if name.endswith(".py")][-1]
    values = runpy.run_path(os.path.join(os.path.dirname(__file__), recipe))
    usual = values.get("block_size", 256)
    block_size = min(usual, 1 << (longest.bit_length() - 1))
    if settings.format == "text" and (block_size < usual or start == "hugging_face"):
        arguments.append(f"--block_size={block_size}")

    # 4) Fewer steps for a short text: in more epochs than these, it is learned by heart.
    epochs = 5 if settings.format == "chat" else 10
    tokens_per_step = values["batch_size"] * usual
    steps = max(round(epochs * meta["train"]["tokens"] / tokens_per_step), 50)
    if steps < values["max_iters"]:
        arguments += [f"--max_iters={steps}", f"--eval_interval={steps // 5}"]
    return shlex.join(["python", "train.py", *arguments])


def main(argv):
    # 1) --inspect only reads.
    settings, _, sources = load(PrepareConfig, argv)
    if settings.inspect:
        if len(sources) != 1:
            raise UserError("--inspect takes one folder", "python prepare.py --inspect data/NAME")
        datasets.inspect(sources[0])
        return
    if not sources:
        names = ", ".join([*INSTALLED, *NAMES])
        raise UserError("no text was given",
                        f"python prepare.py SOURCE: a file, folder, URL or one of {names}")
    # 2) Prepare, and show what to do with it. A look at a conversation shows what is
    #    learned of it.
    out, meta = prepare(sources, settings)
    if settings.format == "chat":
        data = datasets.Dataset.open(out)
        say("an example:\n" + datasets.example(data, data.load_tokenizer()))
    say(f"next: {next_command(out, meta, settings)}")


if __name__ == "__main__":
    command_line(main)

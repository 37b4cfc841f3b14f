# SPDX-License-Identifier: GPL-3.0-only
"""
Prepare: text in, two files of token ids out.

    python prepare.py stdlib                               # Python's own source code: 8 MB of text on every machine
    python prepare.py notes.txt --out=data/notes           # a file, a folder or 'a pattern/*.md'; .gz of these too
    python prepare.py shakespeare --tokenizer=char --val_fraction=0.1 --out=data/shakespeare_char   # a download
    python prepare.py stdlib --format=chat --tokenizer=out/small    # conversations, into data/stdlib-chat
    python prepare.py --inspect data/notes                 # check all of it, and show a part

text/sources.py reads the texts, text/chats.py the conversations. What is written:

    data/NAME/train.bin, val.bin    token ids, uint16 (uint32 for more than 65,536 tokens), <|endoftext|> before every
                                    document; np.memmap(path, dtype=np.uint16) reads them
    data/NAME/train.mask.bin, ...   of conversations, a byte per token: 1 for what is learned (what the assistant says
                                    and the token that ends it), 0 for what is only read
    data/NAME/meta.json             how many tokens, documents and bytes, the checksum of each file, the report
    data/NAME/tokenizer/            the tokenizer that turned the text into these ids

The text is read a megabyte at a time, two or three times: to choose the split of each document, to learn a vocabulary
if need be, and to encode. Only about 75 bytes per document stay in memory in between. The result depends on the text
and the settings alone, not on the number of threads, and gets its name when it is complete.
"""
import glob
import hashlib
import json
import math
import os
import platform
import re
import runpy
import shlex
import shutil
import time
from array import array
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal
from zlib import crc32

import numpy as np

from text import chats
import dataset as datasets
import tokenizer as tokenizers
from runtime.files import locked
from runtime.console import Progress, UserError, command_line, note, say, origin, public
from runtime.settings import check_limits, load
from text.leaks import Census, histogram, overlap
from training.log import read_header
from text.sources import BLOCK_BYTES, KINDS, NAMES, documents, fetch, kind


@dataclass
class PrepareConfig:
    out: str = ""  # folder to write; by default data/NAME, or data/NAME-chat, with the name of the first source
    overwrite: bool = False  # replace what the folder holds, even if that has other sources or the other format
    format: Literal["text", "chat"] = "text"  # chat: conversations, with the fields that text/chats.py lists
    input: list[str] = field(default_factory=list)  # the files of a name that downloads, if you have them; or any text
    follow_links: bool = False  # read what links below a folder lead to; a link that is named itself is always read
    text_field: str = "text"  # .jsonl: the field of a line that holds the text
    mirror: str = ""  # https://HOST to download from, in place of the host that a name comes from
    tokenizer: str = "bpe"  # bpe, unigram, char: learned from this text; gpt2, ...; or a folder: a run, data/NAME, ...
    vocab_size: int = 0  # bpe, unigram: tokens; 0: 4,096, less for under 400 KB of text; 32,000 suit a few GB
    character_coverage: float = 1.0  # bpe, unigram: share of the characters that get a token; 0.9995 suits Chinese
    val_fraction: float = 0.05  # share of the text that is kept for validation
    min_words: int = 0  # leave out documents with fewer words
    num_proc: int = 0  # blocks of text that are encoded at the same time; 0: as many as there are processors
    inspect: bool = False  # only check a folder that is there: every hash, every id, every count


MANY = 200  # from this many documents on, validation takes whole documents; with fewer, the end of each
LARGE_VOCABULARY = 20_000  # tokens, beyond which they are most of a small model
# A word is a run of letters and digits; in scripts without spaces (Thai to Myanmar, Khmer, kana, Chinese), one of them.
UNSPACED = "\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
WORD = re.compile(f"[^\\W_{UNSPACED}]+|[{UNSPACED}]")

# ---------------------------------------------------------------------------------------------------------------------
# 1. The plan: which documents are kept, and in which split

SKIP, TRAIN, VAL, CUT = range(4)  # a document is dropped, is in one split, or is cut near its end


@dataclass
class Plan:
    """What the first reading found: the split and the length in characters of each document, and the totals."""

    split_of: np.ndarray
    length: np.ndarray
    census: Census
    sizes: str  # how many documents have how many bytes
    bytes: int  # these and the next count what is kept
    documents: int
    duplicates: int
    empty: int
    short: int


def read(sources, settings):
    if settings.format == "chat":
        return chats.conversations(sources)
    return documents(sources, settings.text_field)


def make_plan(sources, settings):
    """Read everything once: find duplicates, choose the splits, count characters."""
    # 1) Per document: a key that equal documents share, its size, and what is known about its split.
    census, progress = Census(), Progress("reading")
    keys, sizes, lengths, splits, unanswered = array("Q"), array("q"), array("q"), array("b"), array("b")
    for document in read(sources, settings):
        digest, size, length, n_words = hashlib.sha256(), 0, 0, 0
        for block in document.blocks():
            raw = block.encode()
            digest.update(raw)
            size += len(raw)
            length += len(block)
            census.add(block)
            if n_words < settings.min_words:
                n_words += len(WORD.findall(block))
            progress.add(len(raw))
        key = int.from_bytes(digest.digest()[:8], "big")
        messages = document.messages or []
        if messages:  # the same words from others: no duplicate; but the upper half is equal, and so is the split
            key ^= crc32(repr([(said["role"], len(said["content"])) for said in messages]).encode())
        split = {None: CUT, False: TRAIN, True: VAL}[document.held_out]
        keys.append(key)
        sizes.append(size)
        lengths.append(length)
        splits.append(split if size and n_words >= settings.min_words else SKIP)
        unanswered.append(not any(said["role"] == "assistant" and said["content"] for said in messages))
    census.count()

    # 2) Drop the duplicates: sorted by key (stable), equal texts are neighbours, the first of them in front.
    keys, sizes, split_of = np.array(keys), np.array(sizes), np.array(splits)
    empty, dropped = int((sizes == 0).sum()), int((split_of == SKIP).sum())
    order = np.argsort(keys, kind="stable")
    order = order[split_of[order] != SKIP]
    again = keys[order[1:]] == keys[order[:-1]]
    split_of[order[1:][again]] = SKIP
    kept = np.flatnonzero(split_of != SKIP)
    if not len(kept):
        few, fix = "", "give a file with text"
        if settings.min_words:
            few = f", {dropped - empty} with fewer than {settings.min_words} words"
            fix += ", or a smaller --min_words"
        raise UserError(f"there is no text ({empty} empty documents{few})", fix)

    # 3) Choose the splits.
    split_of[kept] = choose_splits(keys[kept], split_of[kept], np.array(unanswered)[kept], settings)
    return Plan(split_of, np.array(lengths), census, histogram(sizes[sizes > 0]), int(sizes[kept].sum()), len(kept),
                duplicates=len(order) - len(kept), empty=empty, short=dropped - empty)


def choose_splits(keys, split_of, unanswered, settings):
    """The split of each document, where its source leaves it to us. Neither split is ever empty."""
    if (split_of == TRAIN).all() or (split_of == VAL).all():
        split_of[:] = CUT  # a source that has one split only
    free = np.flatnonzero(split_of == CUT)
    if not len(free) or (len(free) < MANY and settings.format == "text"):
        return split_of
    # A number in [0, 1) from the text itself: the same text is in the same split wherever it stands.
    number = keys[free] / 2.0**64
    split_of[free] = np.where(number < settings.val_fraction, VAL, TRAIN)
    # The smallest number is for validation, the largest for training: among the conversations with an answer, if any.
    last = unanswered[free] * (settings.format == "chat")
    smallest = (number + last).argmin()
    last[smallest] = 2  # not the same one
    largest = (number - last).argmax()
    split_of[free[smallest]] = VAL
    split_of[free[largest]] = TRAIN
    return split_of


def split_texts(sources, plan, settings):
    """Read it again: yields ("train" or "val", the document, does it start here, text).

    The text of a document before `cut` is for training, the rest for validation.
    """
    for i, document in enumerate(read(sources, settings)):
        if i >= len(plan.split_of):
            raise UserError(f"{document.name} appeared while the text was being read", "run the command again")
        split_of, length = int(plan.split_of[i]), int(plan.length[i])
        if split_of == SKIP:
            continue
        cut = {TRAIN: length, VAL: 0, CUT: length - math.ceil(length * settings.val_fraction)}[split_of]
        near = cut - (length - cut) // 2  # a line end that is not further away than this is the better place
        position, fresh = 0, {"train", "val"}  # fresh: the splits that have nothing of this document yet
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


# ---------------------------------------------------------------------------------------------------------------------
# 2. The vocabulary

def learn_tokenizer(sources, plan, settings, existing):
    """The tokenizer: one that exists, or learned, from the training split alone (char: from all)."""
    if existing or settings.tokenizer == "char":
        tokenizer = existing or tokenizers.train("char", map(chr, np.flatnonzero(plan.census.counts)))
        if settings.vocab_size and settings.vocab_size != tokenizer.vocab_size:
            note(f"--vocab_size has no effect here: this vocabulary has {tokenizer.vocab_size:,} tokens")
        return tokenizer
    # A token that is seen a few times only is not learned: a hundred bytes of text for each at least.
    vocab_size = settings.vocab_size or max(1, min(4096, plan.bytes // 100))
    texts = (text for split, _, _, text in split_texts(sources, plan, settings) if split == "train")
    return tokenizers.train(settings.tokenizer, tokenizers.sample(texts, plan.bytes), vocab_size,
                            settings.character_coverage, enlarge=not settings.vocab_size)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Encoding

class BinWriter:
    """Writes one .bin file."""

    def __init__(self, path):
        self.file, self.digest = open(path, "wb"), hashlib.sha256()

    def write(self, array):
        self.file.write(array.data)
        self.digest.update(array.data)

    def close(self):
        """The sha256 of all that was written."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return self.digest.hexdigest()


def encode(texts, plan, tokenizer, dtype, folder, settings):
    """Write train.bin and val.bin, of conversations their masks too, from what split_texts yields.

    Returns the counts of both splits, as meta.json has them, the names of the documents in val.bin, and those of the
    conversations without an answer.
    """
    chat, threads = settings.format == "chat", settings.num_proc or os.cpu_count() or 1
    counts, validation, unanswered = dict(train=Counter(), val=Counter()), [], []
    files = {split: BinWriter(os.path.join(folder, f"{split}.bin")) for split in counts}
    masks = {split: BinWriter(os.path.join(folder, f"{split}.mask.bin")) for split in counts if chat}
    lengths = np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size if chat else 0)])
    progress = Progress("encoding", plan.bytes)

    def work(batch):
        return encode_batch(batch, tokenizer, dtype, chat)

    for batch, ids, mask, silent in in_threads(work, batches(texts), threads):
        split = batch[0][0]
        started = [document.name for _, document, starts, _ in batch if starts]
        size = sum(len(text.encode()) for *_, text in batch)
        files[split].write(ids)
        counts[split].update(tokens=ids.size, documents=len(started), bytes=size)
        if chat:
            masks[split].write(mask)
            learned = ids[mask == 1]
            counts[split].update(trained=learned.size, trained_bytes=int(lengths[learned].sum()))
        if split == "val":
            validation += map(origin, started)
        unanswered += map(origin, silent)
        progress.add(size)

    for split in counts:
        counts[split]["sha256"] = files[split].close()
        if chat:
            counts[split]["mask_sha256"] = masks[split].close()
    check_counts(counts, plan, chat)
    return counts, validation, unanswered


def batches(texts):
    """What split_texts yields, as lists of half a megabyte of one split: less is not worth a thread's while."""
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
    """map(function, items) in a few threads, which run side by side where the work is done in C, as in tokenizers.

    The results come in the order of the items; no more than two items for each thread are in memory.
    """
    with ThreadPoolExecutor(threads) as pool:
        running = deque()
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) > 2 * threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def encode_batch(batch, tokenizer, dtype, chat):
    """(batch, its ids, their mask, names of conversations without an answer); batch: a list of what split_texts yields.
    """
    end = np.array([tokenizer.special[tokenizers.END_OF_TEXT]])
    ids, mask, silent = [], [], []
    for _, document, starts, text in batch:
        if starts:
            ids.append(end)
        if not chat:
            ids.append(tokenizer.encode_to_numpy(text, follows=not starts))
            continue
        try:
            spoken, learned = tokenizer.conversation(document.messages)
        except UserError as error:
            raise UserError(f"{document.name}: {error.fact}", error.fix) from None
        ids.append(np.array(spoken))
        mask += [0, *learned]
        if not any(learned):
            silent.append(document.name)
    return batch, packed(ids, dtype, tokenizer.vocab_size), np.array(mask, dtype=np.uint8), silent


def packed(ids, dtype, vocab_size):
    """Arrays of ids as one of the type that is written."""
    ids = np.concatenate(ids)
    largest = ids.max(initial=0)
    if largest >= vocab_size:  # a mistake of ours; numpy would wrap 70000 to 4464 in uint16 without a word
        raise ValueError(f"id {largest} does not fit into a vocabulary of {vocab_size}")
    return ids.astype(dtype)


def check_counts(counts, plan, chat):
    """Raises UserError where the text changed while it was read, or is too short for two splits."""
    if counts["train"]["bytes"] + counts["val"]["bytes"] != plan.bytes:
        raise UserError("the text changed while it was being read", "run the command again")
    if not counts["train"]["tokens"] or not counts["val"]["tokens"]:
        few = f"{plan.documents} conversation is" if chat else f"{plan.bytes} bytes of text are"
        raise UserError(f"{few} too few for two splits", "give more text")
    for split, n in counts.items():
        if chat and not n["trained_bytes"]:
            raise UserError(f"in none of the {n['documents']:,} conversations of the {split} split does the "
                            "assistant say anything", "give more conversations with answers")


# ---------------------------------------------------------------------------------------------------------------------
# All of it

def prepare(sources, settings):
    """Write data/NAME, and return (data/NAME, what its meta.json says)."""
    check_limits(settings, {"min_words num_proc": (0, 1 << 30), "val_fraction": (1e-9, 0.999),
                            "character_coverage": (0.98, 1), "vocab_size": (0, 1_000_000)})
    out = folder_to_write(sources, settings)
    new, missing = contents(sources, settings.format == "chat"), not os.path.exists(out)
    try:
        os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
        with locked(out, wait=missing):  # of two commands that need the same new data, the second waits
            held = held_by(out)
            if held and held != new and not settings.overwrite:
                raise UserError(f"{out} holds {held}; {new} would replace it",
                                "--overwrite, or --out=data/ANOTHER_NAME")
            if held and missing:
                note(f"{out} has just been written by another process, with settings of its own")
                return out, datasets.read_meta(out)
            if held:
                note(f"{out} holds {held} and is going to be replaced; a run that was trained on it can be resumed "
                     "only if the new data are equal")
            try:
                return out, write(sources, settings, out)
            finally:
                shutil.rmtree(out + ".part", ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}", "--out=A_FOLDER_ON_ANOTHER_DISK") from None


def folder_to_write(sources, settings):
    """--out, or data/NAME after the first source, for conversations data/NAME-chat. What is in it must be ours."""
    path = os.path.normpath(public(sources[0]))
    if glob.has_magic(path) and not os.path.exists(path):
        path = os.path.dirname(path.split("*")[0])  # 'letters/*.txt' -> letters
    name = os.path.basename(path.removesuffix(".gz"))
    if kind(name) in (*KINDS, ".json"):
        name = os.path.splitext(name)[0]
    name = name.lstrip(".") or "text"
    if settings.format == "chat":
        name += "-chat"
    out = os.path.normpath(settings.out or os.path.join("data", name))
    if os.path.islink(out):
        out = os.path.realpath(out)
    if os.path.ismount(out) or os.path.abspath(out) == os.getcwd():
        raise UserError(f"{out} cannot be replaced by another folder", "--out=data/ANOTHER_NAME")
    for folder in (out, out + ".part", out + ".old"):
        if other := datasets.not_ours(folder):
            raise UserError(f"{folder} holds something other than prepared data: {other}", "--out=data/ANOTHER_NAME")
    return out


def held_by(out):
    """What a folder holds, in the words of `contents`; nothing of one that is missing or empty."""
    if not any(files for *_, files in os.walk(out)):
        return ""
    try:
        meta = datasets.read_meta(out)
    except UserError:
        return "data without a meta.json that can be read"
    return contents(meta["source"], meta.get("chat", False))


def contents(sources, chat):
    """What data are made of, in words: the same words when it is prepared again, by whatever Python."""
    names = [re.sub(r"^\./|/$|(?<=^stdlib) of Python .*| \(sha256 \w+\)$", "", origin(name)) for name in sources]
    return f"{'conversations' if chat else 'text'} from {', '.join(names)}"


def write(sources, settings, out):
    """Write all files into `out`.part, then rename it. Returns what meta.json says."""
    started, part = time.monotonic(), out + ".part"
    existing = None if settings.tokenizer in tokenizers.LEARNED else tokenizers.get(settings.tokenizer)
    kinds = chats.KINDS if settings.format == "chat" else KINDS
    sources, origins = fetch(sources, settings.input, settings.mirror, kinds, settings.follow_links)

    # 1) The plan, the vocabulary, the ids.
    plan = make_plan(sources, settings)
    tokenizer = learn_tokenizer(sources, plan, settings, existing)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(part)
    tokenizer.save(os.path.join(part, "tokenizer"))
    texts = split_texts(sources, plan, settings)
    counts, validation, unanswered = encode(texts, plan, tokenizer, dtype, part, settings)

    # 2) What is known about them.
    end = tokenizer.special[tokenizers.END_OF_TEXT]
    about_overlap, leaked = overlap(part, dtype, counts, end, validation)
    origins = [f"stdlib of Python {platform.python_version()}" if name == "stdlib" else name for name in origins]
    meta = dict(format=1, dtype=dtype.name, vocab_size=tokenizer.vocab_size, special=tokenizer.special,
                source=origins, tokenizer_sha256=tokenizers.fingerprint(tokenizer), **counts,
                report=report(plan, about_overlap, tokenizer, counts, unanswered), leaked=leaked)
    if settings.format == "chat":
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


def report(plan, about_overlap, tokenizer, counts, unanswered):
    """What a reader should know about this text before a model is trained on it: lines."""
    what = "conversations" if "trained" in counts["train"] else "documents"
    dropped = [(plan.duplicates, "exact duplicates"), (plan.empty, "empty ones"), (plan.short, "with too few words")]
    lacks = [byte for byte in getattr(tokenizer, "missing", b"") if byte < 128]
    dropped.append((int(plan.census.counts[lacks].sum()), "control characters that this vocabulary has no token for"))
    dropped = ", ".join(f"{n:,} {name}" for n, name in dropped if n)
    of_all = "of all that was read, " if dropped else ""
    tokens = counts["train"]["tokens"] + counts["val"]["tokens"]
    lines = [f"{plan.documents:,} {what}, {plan.bytes:,} bytes; dropped: {dropped or 'nothing'}",
             f"{of_all}documents by bytes: {plan.sizes}", *plan.census.report(), *about_overlap,
             f"tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens, {plan.bytes / tokens:.2f} bytes per token"]
    for split, n in counts.items():
        learned = f"; {n['trained']:,} tokens to be learned" if "trained" in n else ""
        lines.append(f"{split}.bin: {n['tokens']:,} tokens of {n['documents']:,} {what}, {n['bytes']:,} bytes of text"
                     + learned)
    if unanswered:
        more = ", ..." if len(unanswered) > 1 else ""
        lines.append(f"in {len(unanswered):,} of them the assistant says nothing to learn from: {unanswered[0]}{more}")
    return lines


def next_command(out, meta, settings):
    """What to type next: a recipe, with a context and a number of steps that fit the text."""
    # 1) Where to start: at the weights of the model whose tokenizer was taken, if there are any.
    model, start = settings.tokenizer, "nothing"
    has = [name for name in ("best.pt", "model.safetensors", "model.safetensors.index.json")
           if os.path.exists(os.path.join(model, name))]
    if has:
        run = read_header(os.path.join(model, "log.jsonl")).get("settings", {})
        start = "large" if "best.pt" not in has or run.get("lora_rank") else "small"
    if start == "nothing" and settings.format == "chat":
        note(f"--tokenizer={model} is no trained model; to fine-tune one, prepare with --tokenizer=RUN")
        model = "scratch"
    elif start == "nothing" and meta["vocab_size"] > LARGE_VOCABULARY:
        note(f"{meta['vocab_size']:,} tokens of 256 numbers each are {meta['vocab_size'] * 256 / 1e6:.0f} million "
             "parameters, most of this recipe's model: --tokenizer=bpe suits a small one better")

    # 2) The recipe, with a context that fits the text.
    longest = min(meta["train"]["tokens"], meta["val"]["tokens"]) - 1
    block = [] if longest >= 256 else [f"--block_size={1 << max(longest.bit_length() - 1, 0)}"]
    recipes, more = {
        ("text", "nothing"): (["config/train_small.py"], block),
        ("text", "small"): ([], ["--learning_rate=1e-3", "--warmup_iters=5"]),
        ("text", "large"): ([], [*(block or ["--block_size=256"]), "--learning_rate=1e-4"]),
        ("chat", "nothing"): (["config/train_small.py", "config/finetune_chat.py"], []),
        ("chat", "small"): (["config/finetune_chat.py"], []),
        ("chat", "large"): (["config/finetune_lora.py"], []),
    }[settings.format, start]
    arguments = list(recipes)
    if has or settings.format == "chat":
        arguments.append(f"--init_from={model}")

    # 3) The data, and a run of their own.
    inside = os.path.abspath(out).startswith(os.path.abspath("data") + os.sep)
    name = os.path.relpath(out, "data") if inside else os.path.abspath(out)
    run = f"out/{os.path.basename(out)}"
    if os.path.exists(run):
        run += "-2"
    if name != "stdlib":
        arguments += [f"--dataset={name}", f"--out_dir={run}"]
    arguments += more

    # 4) Fewer steps for a short text: read more than 10 times (conversations 5 times), it is learned by heart.
    epochs, fewest = (5, 10) if settings.format == "chat" else (10, 50)
    recipe = runpy.run_path(os.path.join(os.path.dirname(__file__), ["config/train_small.py", *recipes][-1]))
    tokens_per_step = recipe["batch_size"] * recipe.get("block_size", 256)
    steps = max(round(epochs * meta["train"]["tokens"] / tokens_per_step), fewest)
    if steps < recipe["max_iters"]:
        arguments += [f"--max_iters={steps}", f"--eval_interval={steps // 5}"]
        if settings.format == "chat":
            arguments.append(f"--warmup_iters={steps // 10}")
    return shlex.join(["python", "train.py", *arguments])


def main(argv):
    settings, _, sources = load(PrepareConfig, argv)
    if settings.inspect:
        if len(sources) != 1:
            raise UserError("--inspect wants one folder", "python prepare.py --inspect data/NAME")
        datasets.inspect(sources[0])
        return
    if not sources:
        sources, settings.input = settings.input, []
    if not sources:
        raise UserError("no text was named",
                        f"python prepare.py FILE, a folder, an address, or one of: stdlib, {', '.join(NAMES)}")
    out, meta = prepare(sources, settings)
    if settings.format == "chat":
        data = datasets.Dataset.open(out)
        say("one of them:\n" + datasets.example(data, data.check_tokenizer()))
    say(f"next: {next_command(out, meta, settings)}")


if __name__ == "__main__":
    command_line(main)

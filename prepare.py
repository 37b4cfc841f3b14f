# SPDX-License-Identifier: GPL-3.0-only
"""
Data: text in, two files of token ids out.

    python prepare.py stdlib                               # Python's own source code: 8 MB of text on every machine
    python prepare.py notes.txt --out=data/notes           # a file, a folder or 'a pattern/*.md'; .gz of these too
    python prepare.py shakespeare --tokenizer=char --val_fraction=0.1 --out=data/shakespeare_char   # a download
    python prepare.py stdlib --format=chat --tokenizer=out/small    # conversations, into data/stdlib-chat
    python prepare.py --inspect data/notes                 # check all of it, and show a part

text/sources.py says which texts there are and how they are read, text/chats.py does for conversations. What is written:

    data/NAME/train.bin, val.bin    token ids, uint16 (uint32 for more than 65,536 tokens), one after the other;
                                    np.memmap(path, dtype=np.uint16) reads them
    data/NAME/train.mask.bin, ...   of conversations, a byte per token: 1 where the model is to learn it, which is what
                                    the assistant says and the token that ends it; 0 where it only reads
    data/NAME/meta.json             how many tokens, documents and bytes, the checksum of each file, the report
    data/NAME/tokenizer/            the tokenizer that turned the text into these ids

<|endoftext|> stands before every document. The text is read a megabyte at a time, two or three times: to decide which
documents are kept and which are held out, to learn a vocabulary if need be, and to encode. Nothing of it is kept in
between but some 75 bytes per document, so memory does not grow with their length. The result depends on the text and
the settings alone, not on the number of threads, and appears under its name when it is whole.
"""
import glob
import hashlib
import json
import math
import os
import platform
import re
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
from runtime.console import Progress, UserError, command_line, note, say
from runtime.settings import check_limits, load
from text.leaks import Census, histogram, overlap
from training.log import read_header
from text.sources import BLOCK_BYTES, KINDS, NAMES, documents, fetch, is_url, kind, origin


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
    val_fraction: float = 0.05  # share of the text that is held out to measure the loss on
    min_words: int = 0  # leave out documents with fewer words
    num_proc: int = 0  # blocks of text that are encoded at the same time; 0: as many as there are processors
    inspect: bool = False  # only check a folder that is there: every hash, every id, every count


MANY = 200  # from this many documents on, whole documents are held out; with fewer, the end of each
# A word is a run of letters and digits; in scripts without spaces (Thai to Myanmar, Khmer, kana, Chinese), one of them.
UNSPACED = "\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
WORD = re.compile(f"[^\\W_{UNSPACED}]+|[{UNSPACED}]")
# What config/train_small.py wants of a text: its context, the tokens of its updates, and their number.
RECIPE_BLOCK_SIZE, RECIPE_TOKENS, RECIPE_STEPS, LARGE_VOCABULARY = 256, 12 * 256, 1000, 20_000

# ---------------------------------------------------------------------------------------------------------------------
# 1. What is kept, and what is held out

SKIP, TRAIN, VAL, CUT = range(4)  # what becomes of a document: dropped, one side or the other, or its end held out


@dataclass
class Plan:
    """What the first reading found: for each document its fate and its length in characters; and the totals."""

    fate: np.ndarray
    length: np.ndarray
    census: Census
    sizes: str  # how many documents have how many bytes
    bytes: int  # these and the next three count what is kept
    documents: int
    duplicates: int
    empty: int
    short: int


def read(sources, settings):
    """The documents of all sources: texts, or conversations."""
    return chats.conversations(sources) if settings.format == "chat" else documents(sources, settings.text_field)


def make_plan(sources, settings):
    """Read everything once: find duplicates, decide what is held out, count characters."""
    census, progress = Census(), Progress("reading")
    keys, sizes, lengths, fates, silent = array("Q"), array("q"), array("q"), array("b"), array("b")
    waiting, weight = [], 0  # short texts are counted together: a call of numpy costs as much as a thousand characters
    for document in read(sources, settings):
        digest, size, length, n_words = hashlib.sha256(), 0, 0, 0
        for block in document.blocks():
            raw = block.encode()
            digest.update(raw)
            size, length = size + len(raw), length + len(block)
            waiting.append(block)
            weight += len(block)
            if weight > BLOCK_BYTES // 4:
                census.add("".join(waiting))
                waiting, weight = [], 0
            if n_words < settings.min_words:
                n_words += len(WORD.findall(block))
            progress.add(len(raw))
        silent.append(document.messages is not None and not any(
            said["role"] == "assistant" and said["content"] for said in document.messages))
        key = int.from_bytes(digest.digest()[:8], "big")
        if document.messages:  # the same words from others: no duplicate, but, by the upper half, on the same side
            key ^= crc32(repr([(said["role"], len(said["content"])) for said in document.messages]).encode())
        keys.append(key)
        sizes.append(size)
        lengths.append(length)
        side = CUT if document.held_out is None else VAL if document.held_out else TRAIN
        fates.append(SKIP if n_words < settings.min_words or size == 0 else side)
    census.add("".join(waiting))

    keys, sizes, fate = np.array(keys), np.array(sizes), np.array(fates)
    empty, dropped = int((sizes == 0).sum()), int((fate == SKIP).sum())
    order = np.argsort(keys, kind="stable")  # equal texts stand together, the first of them in front
    order = order[fate[order] != SKIP]
    fate[order[1:][keys[order[1:]] == keys[order[:-1]]]] = SKIP
    kept = np.flatnonzero(fate != SKIP)
    if not len(kept):
        few = f", {dropped - empty} with fewer than {settings.min_words} words" if settings.min_words else ""
        raise UserError(f"there is no text ({empty} empty documents{few})",
                        "give a file with text" + ", or a smaller --min_words" * bool(few))
    if (fate[kept] == TRAIN).all() or (fate[kept] == VAL).all():
        fate[kept] = CUT  # a source that has one side only leaves the other to us
    undecided = kept[fate[kept] == CUT]
    if len(undecided) >= (1 if settings.format == "chat" else MANY):  # otherwise each is cut near its end
        # A number in [0, 1) from the text itself decides: the same text is on the same side wherever it stands.
        fraction = keys[undecided] / 2.0**64
        fate[undecided] = np.where(fraction < settings.val_fraction, VAL, TRAIN)
        last = np.array(silent)[undecided]  # those with nothing to learn, which are taken where there are no others
        held_out = (fraction + last).argmin()
        fate[undecided[held_out]] = VAL  # so that neither side is ever empty
        last[held_out] = 2
        fate[undecided[(fraction - last).argmax()]] = TRAIN
    return Plan(fate, np.array(lengths), census, histogram(sizes[sizes > 0]), int(sizes[kept].sum()), len(kept),
                duplicates=len(order) - len(kept), empty=empty, short=dropped - empty)


def split_texts(sources, plan, settings):
    """Read it again: yields ("train" or "val", the document, does it start here, text).

    What stands before `cut` in a document is for training, what stands after it is held out.
    """
    for i, document in enumerate(read(sources, settings)):
        if i >= len(plan.fate):
            raise UserError(f"{document.name} appeared while the text was being read", "run the command again")
        fate, length = int(plan.fate[i]), int(plan.length[i])
        if fate == SKIP:
            continue
        cut = length if fate == TRAIN else 0 if fate == VAL else length - math.ceil(length * settings.val_fraction)
        near = cut - (length - cut) // 2  # a line end that is not further away than this is the better place
        position, fresh = 0, {"train", "val"}  # fresh: the splits that have nothing of this document yet
        for block in document.blocks():
            here = min(max(cut - position, 0), len(block))
            if fate == CUT and 0 < here < len(block):
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
    smallest = tokenizers.smallest_vocab(plan.census.counts, settings.character_coverage)
    vocab_size = settings.vocab_size or max(smallest + 64, min(4096, plan.bytes // 100))
    texts = (text for split, _, _, text in split_texts(sources, plan, settings) if split == "train")
    return tokenizers.train(settings.tokenizer, tokenizers.sample(texts, plan.bytes), vocab_size,
                            settings.character_coverage)


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


@dataclass
class Part:
    """Some documents of one split, encoded. mask: of conversations."""

    split: str
    ids: np.ndarray
    mask: np.ndarray | None
    documents: list[str]  # those that start here
    bytes: int
    silent: list[str]  # conversations in which nobody answers


def packed(ids, dtype, vocab_size):
    """Arrays of ids as one of the type that is written. An id beyond the vocabulary is a mistake of ours."""
    largest = max((int(part.max()) for part in ids if part.size), default=0)
    if largest >= vocab_size:  # numpy would wrap 70000 to 4464 in uint16 without a word
        raise ValueError(f"id {largest} does not fit into a vocabulary of {vocab_size}")
    return np.concatenate(ids, dtype=dtype, casting="unsafe")


def encode(texts, plan, tokenizer, dtype, folder, settings):
    """Write train.bin and val.bin, of conversations their masks too, from what split_texts yields.

    Returns the counts of both splits, as meta.json has them, the names of the documents in val.bin, and those of the
    conversations in which nobody answers.

    A few threads encode a megabyte each; tokenizers and arrays work in C, where threads run side by side. What they
    return is written in the order of the text, so that their number changes nothing.
    """
    chat, threads = settings.format == "chat", settings.num_proc or os.cpu_count() or 1
    counts, validation, silent = dict(train=Counter(), val=Counter()), [], []
    writers = {name: BinWriter(os.path.join(folder, f"{name}.bin")) for name in counts}
    masks = {name: BinWriter(os.path.join(folder, f"{name}.mask.bin")) for name in counts} if chat else {}
    progress = Progress("encoding", plan.bytes)
    start = np.array([tokenizer.special[tokenizers.END_OF_TEXT]])
    lengths = np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)]) if chat else None

    def work(batch):
        ids, mask, silent = [], [], []
        for split, document, starts, text in batch:
            ids += [start] * starts
            if not chat:
                ids.append(tokenizer.encode_to_numpy(text, follows=not starts))
                continue
            try:
                spoken, learned = map(np.array, tokenizer.conversation(document.messages))
            except UserError as error:
                raise UserError(f"{document.name}: {error.fact}", error.fix) from None
            ids.append(spoken)
            mask += [np.zeros(1, np.uint8), learned.astype(np.uint8)]
            silent += [document.name] * (not learned.any())
        n_bytes = sum(len(text) if text.isascii() else len(text.encode()) for *_, text in batch)
        return Part(split, packed(ids, dtype, tokenizer.vocab_size), np.concatenate(mask) if chat else None,
                    [document.name for _, document, starts, _ in batch if starts], n_bytes, silent)

    def finish(future):
        part = future.result()
        writers[part.split].write(part.ids)
        counts[part.split].update(tokens=part.ids.size, documents=len(part.documents), bytes=part.bytes)
        if chat:
            masks[part.split].write(part.mask)
            learned = part.ids[part.mask == 1]
            counts[part.split].update(trained=learned.size, trained_bytes=int(lengths[learned].sum()))
        validation.extend(map(origin, part.documents) if part.split == "val" else ())
        silent.extend(map(origin, part.silent))
        progress.add(part.bytes)

    with ThreadPoolExecutor(threads) as pool:
        running = deque()
        for batch in batches(texts):
            running.append(pool.submit(work, batch))
            if len(running) > 2 * threads:  # no more than this in memory
                finish(running.popleft())
        while running:
            finish(running.popleft())
    for name, writer in writers.items():
        counts[name]["sha256"] = writer.close()
    for name, writer in masks.items():
        counts[name]["mask_sha256"] = writer.close()
    if counts["train"]["bytes"] + counts["val"]["bytes"] != plan.bytes:
        raise UserError("the text changed while it was being read", "run the command again")
    if not counts["train"]["tokens"] or not counts["val"]["tokens"]:
        few = f"{plan.documents} conversation is" if chat else f"{plan.bytes} bytes of text are"
        raise UserError(f"{few} too few to train on some and hold some out", "give more text")
    for name in masks:
        if not counts[name]["trained_bytes"]:
            raise UserError(f"in none of the {counts[name]['documents']:,} conversations of the side {name} does the "
                            "assistant say anything", "give more conversations with answers")
    return counts, validation, silent


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


# ---------------------------------------------------------------------------------------------------------------------
# All of it

def prepare(sources, settings, only_if_missing=False):
    """Write data/NAME, and return (data/NAME, what its meta.json says).

    only_if_missing: leave data that are there as they are, and wait where another process is writing them.
    """
    check_limits(settings, {"min_words num_proc": (0, 1 << 30), "val_fraction": (1e-9, 0.999),
                            "character_coverage": (0.98, 1), "vocab_size": (0, 1_000_000)})
    out = folder_to_write(sources, settings)
    part = out + ".part"
    try:
        os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
        with locked(out, wait=only_if_missing):
            if only_if_missing and os.path.exists(out):
                return out, datasets.read_meta(out)
            check_replaced(out, sources, settings)
            try:
                return out, write(sources, settings, out, part)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}", "--out=A_FOLDER_ON_ANOTHER_DISK") from None


def write(sources, settings, out, part):
    """Everything goes into the folder `part` first, so that what bears the name is whole. Returns meta.json."""
    started = time.monotonic()
    existing = None if settings.tokenizer in tokenizers.LEARNED else tokenizers.get(settings.tokenizer)
    kinds = chats.KINDS if settings.format == "chat" else KINDS
    sources, origins = fetch(sources, settings.input, settings.mirror, kinds, settings.follow_links)

    plan = make_plan(sources, settings)
    tokenizer = learn_tokenizer(sources, plan, settings, existing)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(part)
    tokenizer.save(os.path.join(part, "tokenizer"))
    counts, validation, silent = encode(split_texts(sources, plan, settings), plan, tokenizer, dtype, part, settings)
    end = tokenizer.special[tokenizers.END_OF_TEXT]
    about_overlap, leaked = overlap(part, dtype, counts, end, validation)
    origins = [f"stdlib of Python {platform.python_version()}" if name == "stdlib" else name for name in origins]
    meta = dict(format=1, dtype=dtype.name, vocab_size=tokenizer.vocab_size, special=tokenizer.special,
                source=origins, tokenizer_sha256=tokenizers.fingerprint(tokenizer), **counts,
                report=report(plan, about_overlap, tokenizer, counts, silent), leaked=leaked,
                **(dict(chat=True) if settings.format == "chat" else {}))
    with open(os.path.join(part, "meta.json"), "w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1)
    shutil.rmtree(out + ".old", ignore_errors=True)
    if os.path.exists(out):
        os.replace(out, out + ".old")
    os.replace(part, out)
    shutil.rmtree(out + ".old", ignore_errors=True)

    seconds = time.monotonic() - started
    say("\n" + "\n".join([f"{out}: {', '.join(origins)}", *meta["report"],
                          f"took {seconds:.1f} s, {plan.bytes / 1e6 / seconds:.1f} MB/s"]))
    return meta


def folder_to_write(sources, settings):
    """--out, or data/NAME after the first source, for conversations data/NAME-chat. What is in it must be ours."""
    path = os.path.normpath(sources[0].split("?")[0] if is_url(sources[0]) else sources[0])
    if glob.has_magic(path) and not os.path.exists(path):
        path = os.path.dirname(path.split("*")[0])  # 'letters/*.txt' -> letters
    name = os.path.basename(path.removesuffix(".gz"))
    name = os.path.splitext(name)[0] if kind(name) in (*KINDS, ".json") else name
    name = (name.lstrip(".") or "text") + "-chat" * (settings.format == "chat")
    out = os.path.normpath(settings.out or os.path.join("data", name))
    out = os.path.realpath(out) if os.path.islink(out) else out
    if os.path.ismount(out) or os.path.abspath(out) == os.getcwd():
        raise UserError(f"{out} cannot be replaced by another folder", "--out=data/ANOTHER_NAME")
    for folder in (out, out + ".part", out + ".old"):
        if other := datasets.not_ours(folder):
            raise UserError(f"{folder} holds something other than prepared data: {other}", "--out=data/ANOTHER_NAME")
    return out


def check_replaced(out, sources, settings):
    """Say what will be replaced. Raises UserError where it is something else, which only --overwrite replaces."""
    if not any(files for *_, files in os.walk(out)):
        return
    try:
        meta = datasets.read_meta(out)
        held = contents(meta["source"], meta.get("chat", False))
    except UserError:
        held = "data without a meta.json that can be read"
    new = contents(sources, settings.format == "chat")
    if held != new and not settings.overwrite:
        raise UserError(f"{out} holds {held}; {new} would replace it", "--overwrite, or --out=data/ANOTHER_NAME")
    note(f"{out} holds {held} and is going to be replaced; a run that was trained on it can be resumed only if the new "
         "data are equal")


def contents(sources, chat):
    """What data are made of, in words: the same words when it is prepared again, by whatever Python."""
    names = (re.sub(r"^\./|/$|(?<=^stdlib) of Python .*| \(sha256 \w+\)$", "", name) for name in map(origin, sources))
    return f"{'conversations' if chat else 'text'} from {', '.join(names)}"


def report(plan, about_overlap, tokenizer, counts, silent):
    """What a reader should know about this text before a model is trained on it: lines."""
    dropped = [f"{n:,} {what}" for n, what in ((plan.duplicates, "exact duplicates"), (plan.empty, "empty ones"),
                                               (plan.short, "with too few words")) if n]
    tokens = counts["train"]["tokens"] + counts["val"]["tokens"]
    lacks = tokenizer.missing
    if lacks and (n := sum(int(plan.census.counts[byte]) for byte in lacks if byte < 128)):
        dropped.append(f"{n:,} control characters that this vocabulary has no token for")
    chat = "trained" in counts["train"]
    kind = "conversations" if chat else "documents"
    lines = [f"{plan.documents:,} {kind}, {plan.bytes:,} bytes; dropped: {', '.join(dropped) or 'nothing'}",
             f"{'of all that was read, ' * bool(dropped)}documents by bytes: {plan.sizes}",
             *plan.census.report(), *about_overlap,
             f"tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens, {plan.bytes / tokens:.2f} bytes per token"]
    for split, n in counts.items():
        lines.append(f"{split}.bin: {n['tokens']:,} tokens of {n['documents']:,} {kind}, {n['bytes']:,} bytes of text"
                     + f"; {n['trained']:,} tokens to be learned" * chat)
    if silent:
        lines.append(f"in {len(silent):,} of them the assistant says nothing to learn from: {silent[0]}"
                     + ", ..." * (len(silent) > 1))
    return lines


def next_command(out, meta, settings):
    """What to type after preparing: the small recipe, with a context and a length that fit the text."""
    inside = os.path.abspath(out).startswith(os.path.abspath("data") + os.sep)
    name = os.path.relpath(out, "data") if inside else os.path.abspath(out)
    longest = min(meta["train"]["tokens"], meta["val"]["tokens"]) - 1
    block = "" if longest >= RECIPE_BLOCK_SIZE else f" --block_size={1 << max(longest.bit_length() - 1, 0)}"
    steps = round(10 * meta["train"]["tokens"] / RECIPE_TOKENS)  # ten times through the text: more is learning by heart
    short = "" if steps >= RECIPE_STEPS else f" --max_iters={max(steps, 50)} --eval_interval={max(steps // 5, 10)}"
    run = f"out/{os.path.basename(out)}"
    run += "-2" if os.path.exists(run) else ""  # (that of another run)
    target = shlex.join([f"--dataset={name}", f"--out_dir={run}"])
    target = "" if name == "stdlib" else " " + target
    has = {name for name in ("best.pt", "model.safetensors", "model.safetensors.index.json")
           if os.path.exists(os.path.join(settings.tokenizer, name))}
    start = shlex.quote(f"--init_from={settings.tokenizer}" if has else "--init_from=scratch")
    if meta.get("chat"):
        return next_chat(start, has, target, meta, settings)
    if "best.pt" in has:  # the tokenizer of a run: to continue from it
        return f"python train.py {start}{target} --learning_rate=1e-3 --warmup_iters=5{short}"
    if has:  # a Hugging Face model, whose context may be long
        return f"python train.py {start}{target}{block or ' --block_size=256'} --learning_rate=1e-4{short}"
    if meta["vocab_size"] > LARGE_VOCABULARY:
        note(f"{meta['vocab_size']:,} tokens of 256 numbers each are {meta['vocab_size'] * 256 / 1e6:.0f} million "
             "parameters, most of this recipe's model: --tokenizer=bpe suits a small one better")
    return f"python train.py config/train_small.py{target}{block}{short}"


def next_chat(start, has, target, meta, settings):
    """The command that makes a model answer: one that has the vocabulary of these conversations."""
    recipe, updates, tokens = "config/finetune_chat.py", 300, 16 * 256
    if not has:
        note(f"--tokenizer={settings.tokenizer} is no trained model; to fine-tune one, prepare with --tokenizer=RUN")
        recipe = f"config/train_small.py {recipe}"
    elif has != {"best.pt"} or read_header(os.path.join(settings.tokenizer, "log.jsonl")).get(
            "settings", {}).get("lora_rank"):
        recipe, updates, tokens = "config/finetune_lora.py", 100, 4 * 512
    steps = max(10, round(5 * meta["train"]["tokens"] / tokens))  # five times through few conversations, at the most
    short = f" --max_iters={steps} --eval_interval={steps // 5} --warmup_iters={steps // 10}" * (steps < updates)
    return f"python train.py {recipe} {start}{target}{short}"


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
        raise UserError("no text was named", f"python prepare.py FILE, a folder, an address, or one of: stdlib, "
                        f"{', '.join(NAMES)}")
    out, meta = prepare(sources, settings)
    if settings.format == "chat":
        data = datasets.Dataset.open(out)
        say("one of them:\n" + datasets.example(data, data.check_tokenizer()))
    say(f"next: {next_command(out, meta, settings)}")


if __name__ == "__main__":
    command_line(main)

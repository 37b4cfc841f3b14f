# SPDX-License-Identifier: GPL-3.0-only
"""
What is a batch, and what is a validation loss? Prepared data, read back.

    data = Dataset.open("data/stdlib")
    idx, targets = data.batch(block_size=256, batch_size=12, seed=1337, step=0)  # (B, T) each, int64

The batch of a step is a pure function of (seed, step): a run can be stopped,
resumed or split over processes, and no loader has a state to save. The
validation loss is the mean over the whole split.

A text is one long sequence of tokens, and a window of it may begin anywhere.
A window of conversations begins where a conversation begins, and the mask
beside the tokens says which are learned: the assistant's.
"""
import difflib
import functools
import glob
import hashlib
import itertools
import math
import os
import re
from dataclasses import dataclass, field
from shlex import quote

import numpy as np

import tokenizer as tokenizers  # our tokenizer.py: a `tokenizer` is an object here
from runtime.console import UserError, origin, say, show, warn  # say: progress, on stderr; show: a result, on stdout
from runtime.files import check_like, file_sha256, foreign, read_json

SPLITS = "train", "val"
HASHED_BYTES = 1 << 30  # larger files are hashed by prepare.py --inspect only
CHUNK = 1 << 20  # tokens read at once where all of a split is read


class Changed(UserError):
    """The data are not what they were when they were opened."""


@dataclass
class Dataset:
    """A folder of prepared data: meta.json, and its files, opened.

    If prepare.py replaces a file, the one opened here can still be read. If
    it is written to, `check_unchanged` notices.
    """

    folder: str
    meta: dict
    files: dict  # {"train": file, "val": file}; of conversations also "train.mask", "val.mask"
    stamps: list  # (size, time of the last change) of each file when it was opened
    found: dict = field(default_factory=dict)  # what `chat_windows` has found

    # How an epoch is shuffled; a run with another order cannot be continued.
    ORDER = "permutation"

    @classmethod
    def open(cls, folder, hash_all=False):
        """Raises UserError where a file is not what meta.json says."""
        if tokenizers.is_nanogpt(folder):
            return cls.of_nanogpt(folder, hash_all)
        meta, files = read_meta(folder), {}
        for split in SPLITS:
            about = meta[split]
            # Sizes and checksums catch a copy that was cut off, and files of two
            # different runs of prepare.py.
            size = about["tokens"] * np.dtype(meta["dtype"]).itemsize
            files[split] = open_part(folder, split, size, about["sha256"], hash_all)
            if meta.get("chat"):
                mask = split + ".mask"
                files[mask] = open_part(
                    folder, mask, about["tokens"], about["mask_sha256"], hash_all)
        return cls(folder, meta, files, stamps=[stamp(file) for file in files.values()])

    @classmethod
    def of_nanogpt(cls, folder, check_all):
        """Data that nanoGPT's prepare.py wrote: the same .bin files, and what the ids mean in meta.pkl."""
        tokenizer, files = tokenizers.load_from(folder), {}
        meta = dict(format=1, dtype="uint16", vocab_size=tokenizer.vocab_size, special=tokenizer.special,
                    tokenizer_sha256=tokenizers.fingerprint(tokenizer), source=[origin(os.path.basename(folder))],
                    report=[f"written by nanoGPT's prepare.py; tokenizer: {tokenizer.kind}"])
        for split in SPLITS:
            files[split] = open(os.path.join(folder, split + ".bin"), "rb")
            size = os.fstat(files[split].fileno()).st_size
            about = f"{size} bytes, {file_sha256(files[split].name, HASHED_BYTES)}"
            meta[split] = dict(tokens=size // 2, sha256=hashlib.sha256(about.encode()).hexdigest())
        data = cls(folder, meta, files, stamps=[stamp(file) for file in files.values()])
        if check_all:
            data.count_ids("train")
        # Bits per byte need the length of the validation text.
        counts = data.count_ids("val")
        try:
            lengths = [len(tokenizer.token_bytes(i)) for i in range(len(counts))]
            meta["val"]["bytes"] = int(counts @ lengths) or 1
        except UserError as error:
            warn(f"{error.fact}; the ids in {folder} can be trained on, but bits per byte and texts need it")
            meta["val"]["bytes"] = math.nan
        return data

    def count_ids(self, split):
        """How often each id occurs in a split."""
        tokens, counts = self.meta[split]["tokens"], np.zeros(self.meta["vocab_size"], np.int64)
        for start in range(0, tokens, CHUNK):
            ids = self.read_ids(split, start, min(CHUNK, tokens - start))
            counts += np.bincount(ids, minlength=len(counts))
        return counts

    def check_unchanged(self, ranks):
        """Raises Changed where a file was written to: in all ranks if one of them finds it.

        ranks: the processes of the run (runtime/processes.py); each has a
        number, its rank.
        """
        # A batch of a file that is being rewritten would be garbage, and the
        # run would learn it.
        changed = [stamp(file) for file in self.files.values()] != self.stamps
        if ranks.all_reduce_max(int(changed)):
            raise self.changed_error("was changed while it was being read")

    def changed_error(self, what, alone=False):
        """A Changed to raise.

        alone: only this process has noticed, so it ends without waiting for
        the others.
        """
        fix = f"prepare {self.folder} again, or restore all of its files"
        return Changed(f"{self.folder} {what}", fix, alone=alone)

    @property
    def chat(self):
        """Are they conversations?"""
        return self.meta.get("chat", False)

    def sha256(self):
        """The checksums of all files."""
        names = ["sha256", "mask_sha256"] if self.chat else ["sha256"]
        return [self.meta[split][name] for name in names for split in SPLITS]

    def load_tokenizer(self):
        """The tokenizer of these ids. Raises UserError where it is another one."""
        return tokenizers.load_from(self.folder, self.meta["tokenizer_sha256"])

    def check(self, block_size):
        """Raises UserError where a split is too short for block_size, or no window of it has an answer."""
        shortest = min(self.meta[split]["tokens"] for split in SPLITS)
        for split in SPLITS:
            path, tokens = f"{self.folder}/{split}.bin", self.meta[split]["tokens"]
            if self.chat and not len(self.chat_windows(split, block_size)):
                raise UserError(
                    f"block_size={block_size} is too small: no window of {path} reaches an answer",
                    "a larger --block_size")
            if not self.chat and tokens <= block_size:
                raise UserError(
                    f"{path} has {tokens:,} tokens, but "
                    f"block_size={block_size} needs at least {block_size + 1}",
                    f"--block_size={max(1, shortest - 1)}, or more text")

    # ---------- Reading

    # By seek and read, not np.memmap: mapped pages count as memory of the
    # process, and if a mapped file is cut short, the process is killed.

    def read(self, name, offset, size):
        """Bytes of a file. Raises Changed where it has become shorter."""
        file = self.files[name]
        file.seek(offset)
        raw = file.read(size)
        if len(raw) < size:
            raise self.changed_error(f"was changed: {name}.bin has become shorter", alone=True)
        return raw

    def read_ids(self, split, start, count):
        """`count` ids from position `start` of a split, (count,) int64."""
        dtype, vocab_size = np.dtype(self.meta["dtype"]), self.meta["vocab_size"]
        raw = self.read(split, start * dtype.itemsize, count * dtype.itemsize)
        ids = np.frombuffer(raw, dtype)
        # An id beyond the vocabulary would be an index out of range, on a GPU
        # without a useful message.
        if ids.max(initial=0) >= vocab_size:
            what = f"has token {ids.max()} in a vocabulary of {vocab_size} ({split}.bin)"
            raise self.changed_error(what, alone=True)
        return ids.astype(np.int64)

    def read_mask(self, split, start, count):
        """Which of `count` tokens of conversations are learned: (count,) uint8, 1 or 0."""
        return np.frombuffer(self.read(split + ".mask", start, count), np.uint8)

    def read_windows(self, split, spans, block_size):
        """The windows at these (start, end): (idx, targets), each (B, T) int64."""
        windows = []
        for start, end in spans:
            ids = self.read_ids(split, start, end - start)
            # The mask belongs to targets, which are one token later than inputs.
            learned = True
            if self.chat:
                learned = self.read_mask(split, start + 1, end - start - 1) == 1
            windows.append((ids, learned))
        return to_batch(windows, block_size)

    # ---------- The training split

    def batch(self, block_size, batch_size, seed, step, micro=0, micros=1):
        """Micro-batch number `micro` of a step: (idx, targets), each (B, T) int64.

        A step reads `micros` of them one after the other, to save memory.
        """
        spans = self.spans(block_size, batch_size, seed, step, micro, micros)
        return self.read_windows("train", spans.tolist(), block_size)

    def spans(self, block_size, batch_size, seed, step, micro=0, micros=1):
        """Where the windows of a micro-batch, as in `batch`, begin and end: (B, 2) int64.

        An epoch visits each of the n windows of the training split once, in
        shuffled order: sample g of the whole run is number g mod n of epoch
        g // n. So no batch depends on another.
        """
        # 1. Which samples are those of this micro-batch?
        n = self.n_windows(block_size)
        first = (step * micros + micro) * batch_size
        # 2. The n windows leave some tokens of a text over (see `n_windows`).
        #    So the first window of an epoch can begin at any of the first
        #    `spare` tokens: windows do not always begin at the same tokens.
        #    Conversations begin where they begin: with 1, the offset is 0.
        spare = 1 if self.chat else self.meta["train"]["tokens"] - n * block_size
        # 3. Sample by sample, since a batch may reach into the next epoch.
        spans = []
        for sample in range(first, first + batch_size):
            epoch, i = divmod(sample, n)
            window = int(shuffled(n, seed, epoch)[i])  # (one permutation per epoch)
            offset = seed_for("offset", seed, epoch) % spare
            spans.append(self.span("train", window, block_size, offset))
        return np.array(spans, dtype=np.int64)  # (B, 2)

    def span(self, split, window, block_size, offset=0):
        """Where a window begins and ends. offset: of a text, where its first window begins."""
        if self.chat:
            return self.chat_windows(split, block_size)[window, :2].tolist()
        # One token more than inputs: the target of the last. At the end of a
        # split there may be fewer.
        start = offset + window * block_size
        return start, min(start + block_size + 1, self.meta[split]["tokens"])

    def n_windows(self, block_size, split="train"):
        """How many windows a split has."""
        if self.chat:
            return len(self.chat_windows(split, block_size))
        tokens = self.meta[split]["tokens"]
        # One window fewer than fit. That leaves one to two windows of spare
        # tokens, and the start of an epoch moves within them (see `spans`).
        if split == "train":
            return max(1, tokens // block_size - 1)
        # Every token but the first is a target once; the last window may be
        # short.
        return math.ceil((tokens - 1) / block_size)

    def epochs(self, windows, block_size):
        """How many passes over the training split a number of windows is."""
        return windows / self.n_windows(block_size)

    def chat_windows(self, split, block_size):
        """The windows of conversations, (n, 3) int64: start, end, number of learned tokens.

        A window starts where a conversation starts, as a prompt does, and
        holds as many whole conversations as fit; later ones can see earlier
        ones. A conversation longer than a window is cut. A window that
        teaches nothing is left out.
        """
        if (split, block_size) in self.found:
            return self.found[split, block_size]
        # 1. An end-of-text token stands before each conversation: it starts
        #    after that, and ends before the next.
        tokens = self.meta[split]["tokens"]
        border = self.meta["special"][tokenizers.END_OF_TEXT]
        borders = []
        for start in range(0, tokens, CHUNK):
            ids = self.read_ids(split, start, min(CHUNK, tokens - start))
            borders.append(start + np.flatnonzero(ids == border))
        starts = np.concatenate(borders) + 1
        ends = np.append(starts[1:] - 1, tokens)
        # 2. As many whole ones as fit. None is cut to fill a window: half a
        #    question before an answer teaches the wrong thing.
        windows, i = [], 0
        while i < len(starts):
            start = int(starts[i])
            limit = start + block_size + 1  # block_size inputs, and the target of the last
            # The first conversation that no longer fits; at least one is taken.
            next_i = max(i + 1, int(np.searchsorted(ends, limit, side="right")))
            end = min(int(ends[next_i - 1]), limit)
            learned = int(self.read_mask(split, start + 1, max(end - start - 1, 0)).sum())
            if learned:
                windows.append((start, end, learned))
            i = next_i
        self.found[split, block_size] = np.array(windows, np.int64).reshape(-1, 3)
        return self.found[split, block_size]

    # ---------- The validation split

    def val_batch(self, i, block_size, batch_size):
        """Batch i of one pass over the validation split: (idx, targets). Each target occurs once."""
        last = min((i + 1) * batch_size, self.n_windows(block_size, "val"))
        spans = [self.span("val", number, block_size) for number in range(i * batch_size, last)]
        # The last batch is filled up to the shape of the others, for which
        # code was compiled, by windows of one token: they have no target.
        spans += [(0, 1)] * (batch_size - len(spans))
        return self.read_windows("val", spans, block_size)

    def n_val_batches(self, block_size, batch_size, at_most=0):
        """How many batches the pass has, and no more than at_most; 0: all."""
        # The last batch counts, however short it is.
        n = math.ceil(self.n_windows(block_size, "val") / batch_size)
        return min(n, at_most or n)

    def bits_per_byte(self, loss):
        """A validation loss in nats per token as bits per byte of the validation text.

        A loss per token says little: a long token is harder to predict, but
        there are fewer of them. Per byte of text, models with different
        tokenizers can be compared. For conversations, only what the assistant
        says counts.
        """
        val = self.meta["val"]
        if self.chat:
            # (Of the validation split, they are the learned ones: the
            # assistant's.)
            tokens_per_byte = val["trained"] / val["trained_bytes"]
        else:
            predicted = val["tokens"] - 1  # the first has no context
            tokens_per_byte = predicted / val["bytes"]
        return loss * tokens_per_byte / math.log(2)

    def prompt(self, block_size):
        """Ids to go on from, a list, taken from the validation split.

        For conversations, the first one up to its answer; for a text, the
        end-of-text token and up to 24 more.
        """
        if self.chat:
            # The mask is 0 on the question and 1 on the answer: argmax finds
            # where it begins.
            start, end, _ = self.chat_windows("val", block_size)[0].tolist()
            answer = int(self.read_mask("val", start, end - start).argmax())
            return self.read_ids("val", start, answer).tolist()
        count = 1 + min(24, block_size // 2)
        return self.read_ids("val", 0, min(count, self.meta["val"]["tokens"])).tolist()


def seed_for(*parts):
    """A 63-bit seed for a purpose, the same on every machine: seed_for("dropout", seed, 3)."""
    # Not hash(), which differs between processes.
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@functools.lru_cache(maxsize=1)  # the epoch that is being read
def shuffled(n, seed, epoch):
    """The numbers 0 to n - 1 in the order of an epoch, (n,) int64.

    10 billion tokens in windows of 1,024 take 80 MB and a second.
    """
    return np.random.Generator(np.random.PCG64((seed, epoch))).permutation(n)


def to_batch(windows, block_size):
    """(ids, learned) of B windows as one batch: (idx, targets), each (B, T) int64.

    The target of a token is the one after it. It is -1 after the end of a
    short window, and where `learned` is False. learned: a bool for each
    target, or one for all.
    """
    import torch  # prepare.py does without
    # A short window is padded with token 0; its targets there are -1.
    idx = np.zeros((len(windows), block_size), dtype=np.int64)
    targets = np.full_like(idx, -1)
    for row, (ids, learned) in enumerate(windows):
        # n inputs, and as many targets: the last token is a target only.
        n = len(ids) - 1
        idx[row, :n] = ids[:n]
        targets[row, :n] = np.where(learned, ids[1:], -1)
    return torch.from_numpy(idx), torch.from_numpy(targets)


def validation_sums(loss_of, batch_at, n_batches, ranks, before_each=lambda number: None):
    """One pass over n_batches: (sum of the loss in nats, number of targets).

    loss_of: (idx, targets) -> the mean loss over the targets that are not -1.
    batch_at: number -> (idx, targets). ranks: the Processes of the run. Rank r
    of `world` takes the batches r, r + world, and so on. For the same
    batches, the sums are the same to the last bit for any number of ranks.
    before_each: called equally often in each rank, so that all can stop
    together.
    """
    # A place for each batch: a sum of floats depends on the order of its
    # terms, and that order must not depend on the number of processes.
    nats = [0.0] * n_batches
    count = 0
    for first in range(0, n_batches, ranks.world):
        before_each(first)
        number = first + ranks.rank
        if number < n_batches:
            idx, targets = batch_at(number)
            # Batches differ in their number of targets, so that a mean of
            # means would be wrong.
            n = int((targets >= 0).sum())
            nats[number] = float(loss_of(idx, targets)) * n
            count += n
    *nats, count = ranks.all_reduce_sum([*nats, count])
    return math.fsum(nats), count


# ---------- The folder


def read_meta(folder):
    """Its meta.json. Raises UserError where that is not as prepare.py writes it."""
    path, fix = os.path.join(folder, "meta.json"), "run prepare.py again"
    if not os.path.exists(path):
        raise no_data(folder)
    meta = read_json(path, fix)
    check_like(meta, dict(train={}), path)  # (is there a "train" to look into?)
    # 1. Does it have all that is read, with the right types? 0 or 1 stands
    #    for any whole number, "" for any text. Splits of conversations have
    #    three more fields.
    chat = "trained" in meta["train"]
    split = dict(tokens=1, bytes=1, documents=1, sha256="")
    if chat:
        split |= dict(trained=1, trained_bytes=1, mask_sha256="")
    special = {tokenizers.END_OF_TEXT: 0}
    like = dict(format=1, dtype="", vocab_size=1, tokenizer_sha256="", source=[""], report=[""],
                special=special, train=split, val=split)
    check_like(meta, like, path)
    # 2. Are the values possible? What is written as 1 above must be at least 1.
    counts = [meta[name][key] for name in SPLITS for key, like in split.items() if like == 1]
    known = meta["format"] == 1 and meta["dtype"] in ("uint16", "uint32")
    consistent = meta.get("chat", False) is chat
    if not (known and consistent) or min(meta["vocab_size"], *counts) < 1:
        raise UserError(f"{path} is not valid format 1", fix)
    # Older files hold whole paths.
    meta["source"] = [origin(source) for source in meta["source"]]
    return meta


def no_data(folder):
    """The error where a folder has no data: a text must be prepared first, a name may be misspelt."""
    name = os.path.relpath(folder, "data")
    if os.path.isfile(name):
        stem = os.path.basename(name).partition(".")[0]
        return UserError(f"{name} is a text that has not been prepared",
                         f"python prepare.py {quote(name)}, then --dataset={quote(stem)}")
    prepared = [os.path.basename(os.path.dirname(path)) for path in glob.glob("data/*/meta.json")]
    near = [f"--dataset={quote(other)}, or " for other in difflib.get_close_matches(name, prepared, 1)]
    return UserError(f"there is no prepared data in {folder} (no meta.json)",
                     f"{''.join(near)}python prepare.py YOUR_TEXT.txt --out={quote(folder)}")


def is_data(folder):
    """Does it hold prepared data?"""
    return os.path.exists(os.path.join(folder, "meta.json")) or tokenizers.is_nanogpt(folder)


def stamp(file):
    """What changes when an open file is written to."""
    about = os.fstat(file.fileno())
    return about.st_size, about.st_mtime_ns  # a file that is replaced stays open as it was


def open_part(folder, name, due, sha256, hash_all):
    """Open a file after checking its size, `due` bytes, and its checksum."""
    path = os.path.join(folder, name + ".bin")
    size = os.path.getsize(path) if os.path.exists(path) else 0
    if size != due:
        raise UserError(f"{path} has {size:,} bytes, but meta.json says {due:,}",
                        f"prepare {folder} again")
    # Hashing takes about a second per gigabyte.
    if hash_all or size <= HASHED_BYTES:
        found = file_sha256(path)
        if found != sha256:
            raise UserError(
                f"{path} has the checksum {found[:12]}, but meta.json says {sha256[:12]}",
                f"prepare {folder} again")
    return open(path, "rb")


# All that prepare.py writes into a folder.
OURS = re.compile(r"(train|val)(\.mask)?\.bin|meta\.json"
                  r"|tokenizer/[a-z_]+\.(json|model|tiktoken|jinja)")


def not_ours(folder):
    """Why a folder is not prepared data: what is in it that prepare.py did not write; "" if it is."""
    # A folder with a stranger's file in it is never replaced.
    if os.path.isdir(folder):
        name = os.path.basename(foreign(folder, OURS.fullmatch))
        return name and f"it holds {name}"
    return "it is a file" if os.path.lexists(folder) else ""


def inspect(folder):
    """prepare.py --inspect data/NAME: compare every checksum, and show what the folder holds."""
    data = Dataset.open(folder, hash_all=True)
    tokenizer = data.load_tokenizer()
    sources = ", ".join(data.meta["source"])
    checked = "all ids exist" if tokenizers.is_nanogpt(folder) else "all checksums match"
    say(f"{folder}: {sources}; {data.meta['dtype']}, {checked}")
    for line in data.meta["report"]:
        say(line)
    show(example(data, tokenizer))


def example(data, tokenizer):
    """A piece of the training split: where two documents meet, or a conversation."""
    ids = data.read_ids("train", 0, min(CHUNK, data.meta["train"]["tokens"]))
    borders = np.flatnonzero(ids == tokenizer.special.get(tokenizers.END_OF_TEXT, -1))
    # The first is empty; each other one begins with end-of-text.
    documents = np.split(ids, borders)
    # 1. A text: the end of one document and the beginning of the next.
    if len(documents) == 1:
        return tokenizer.decode(ids[:180].tolist())
    if not data.chat:
        middle = len(documents) // 2
        before = tokenizer.decode(documents[middle - 1][1:][-60:].tolist())
        after = tokenizer.decode(documents[middle][1:120].tolist())
        return f"{before}\n--- {tokenizers.END_OF_TEXT} ---\n{after}"
    # 2. The first conversation that teaches, with brackets around what is learned.
    masks = np.split(data.read_mask("train", 0, len(ids)), borders)
    number = next((i for i, mask in enumerate(masks) if mask.any()), -1)
    pairs = zip(documents[number][1:400].tolist(), masks[number][1:400].tolist())
    names = {i: name.encode() for name, i in tokenizer.special.items()}
    text = ""
    for learned, run in itertools.groupby(pairs, lambda pair: pair[1]):
        parts = [names.get(i) or tokenizer.token_bytes(i) for i, _ in run]
        part = b"".join(parts).decode(errors="replace")
        text += f"\u27e6{part}\u27e7" if learned else part
    return text + "\n(learned: the text between \u27e6 and \u27e7)"


if __name__ == "__main__":
    print("dataset.py is a module; to see what a folder holds: python prepare.py --inspect data/NAME")

# SPDX-License-Identifier: GPL-3.0-only
"""
Dataset: how prepared data is read back, in batches.

    data = Dataset.open("data/stdlib")
    idx, targets = data.batch(block_size=256, batch_size=12, seed=1337, step=0)  # (B, T) each, int64

Two ideas here are worth the visit. The batch of a step is a pure function of (seed, step), so that a run can be
stopped, resumed or split over processes without anything to remember. And the validation loss is one fixed pass over
all held-out text, also in bits per byte, which can be compared between tokenizers.

At the end, `inspect` is what `python prepare.py --inspect data/NAME` does: it believes nothing and counts again.
"""
import hashlib
import json
import math
import os
from dataclasses import dataclass

import numpy as np

import tokenizer as tokenizers
from config import UserError, say
from download import file_sha256

HASHED_BYTES = 1 << 30  # files up to this size are hashed whenever they are opened, which takes a second at the most


@dataclass
class Dataset:
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
        """The tokenizer of these ids. Raises UserError where it is not the one that they were written with."""
        tokenizer = tokenizers.load_from(self.folder, self.meta["tokenizer_sha256"])
        if tokenizer.vocab_size != self.meta["vocab_size"]:
            raise UserError(f"{self.folder}/meta.json says vocab_size={self.meta['vocab_size']}, but the tokenizer "
                            f"there has {tokenizer.vocab_size} tokens", f"prepare {self.folder} again")
        return tokenizer

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


def check_meta(meta):
    """Raises ValueError, KeyError or TypeError where a meta.json is not as `prepare` writes it."""
    counts = [meta[side][key] for side in ("train", "val") for key in ("tokens", "bytes", "documents")]
    texts = [meta["tokenizer_sha256"], *meta["source"], *(meta[side]["sha256"] for side in ("train", "val"))]
    if meta["format"] != 1 or meta["dtype"] not in ("uint16", "uint32") or not all(isinstance(t, str) for t in texts):
        raise ValueError("not format 1")
    if not all(isinstance(line, str) for line in meta["report"]) or not 0 <= meta["leaked"] <= 1:
        raise ValueError("the report is damaged")
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


# All that prepare.py writes into a folder, and into tokenizer/ in it.
OURS = {"train.bin", "val.bin", "meta.json"}
TOKENIZER_FILES = {"config.json", "vocab.json", "tokenizer.model", "encoding.json", "encoding.tiktoken",
                   *tokenizers.bytebpe.PARTS}


def not_ours(folder):
    """The first thing in a folder that no prepare.py wrote, or an empty text."""
    if not os.path.isdir(folder):
        return "a file of this name" if os.path.lexists(folder) else ""
    try:
        for entry in os.scandir(folder):
            inside = os.scandir(entry) if entry.name == "tokenizer" and entry.is_dir(follow_symlinks=False) else None
            if inside is None and not (entry.name in OURS and entry.is_file(follow_symlinks=False)):
                return entry.name
            for file in inside or ():
                if not (file.name in TOKENIZER_FILES and file.is_file(follow_symlinks=False)):
                    return file.name
    except OSError as error:
        return f"{error.strerror}"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# python prepare.py --inspect data/NAME

def inspect(folder, sample_tokens=120):
    """Check every byte of a prepared folder, and show what it holds. Raises UserError at the first damage."""
    data = Dataset.open(folder)
    tokenizer, meta = data.check_tokenizer(), data.meta
    lengths = np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])
    end = tokenizer.special[tokenizers.END_OF_TEXT]
    drops = getattr(tokenizer, "missing", b"") or getattr(tokenizer, "nfc", False)  # its tokens spell the text nearly
    say(f"{folder}: {', '.join(meta['source'])}\n{tokenizer.kind} tokenizer, {tokenizer.vocab_size:,} tokens, "
        f"{meta['dtype']}")
    for side in ("train", "val"):
        due, digest, found = meta[side], hashlib.sha256(), dict(tokens=0, documents=0, bytes=0)
        for start in range(0, due["tokens"], 1 << 20):
            ids = data.tokens(side, start, min(1 << 20, due["tokens"] - start))  # refuses an id that is too large
            digest.update(ids.astype(np.dtype(meta["dtype"])))
            found["tokens"] += len(ids)
            found["documents"] += int((ids == end).sum())
            found["bytes"] += int(lengths[ids].sum())
        path = os.path.join(folder, side + ".bin")
        if digest.hexdigest() != due["sha256"]:
            raise UserError(f"{path} has the checksum {digest.hexdigest()[:12]}, but meta.json says "
                            f"{due['sha256'][:12]}", f"it was changed or damaged; prepare {folder} again")
        for what, number in found.items():
            if number != due[what] and not (what == "bytes" and drops):
                raise UserError(f"{path} holds {number:,} {what}, but meta.json says {due[what]:,}",
                                f"meta.json or the tokenizer was changed; prepare {folder} again")
        say(f"{path}: {due['tokens']:,} tokens, {due['documents']:,} documents, {due['bytes']:,} bytes of text, "
            f"{due['bytes'] / due['tokens']:.2f} per token: as meta.json says")
    if meta["special"] != tokenizer.special:
        raise UserError(f"{folder}/meta.json and the tokenizer there do not name the same special tokens",
                        f"meta.json was changed; prepare {folder} again")
    for line in meta["report"]:
        say(line)
    # A window around the border between two documents, if there is one.
    ids = data.tokens("train", 0, min(1 << 20, meta["train"]["tokens"]))
    borders = np.flatnonzero(ids == end)
    middle = int(borders[len(borders) // 2])
    ids = ids[max(middle - sample_tokens // 2, 0):middle + sample_tokens].tolist()
    text = b"".join(b"\n--- " + tokenizers.END_OF_TEXT.encode() + b" ---\n" if i == end else tokenizer.token_bytes(i)
                    for i in ids)
    say("a sample of the training side:\n")
    print(text.decode(errors="replace"))

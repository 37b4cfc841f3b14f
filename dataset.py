# SPDX-License-Identifier: GPL-3.0-only
"""
Dataset: how prepared data is read back, in batches.

    data = Dataset.open("data/stdlib")
    idx, targets = data.batch(block_size=256, batch_size=12, seed=1337, step=0)  # (B, T) each, int64

Two ideas here are worth the visit. The batch of a step is a pure function of (seed, step), so that a run can be
stopped, resumed or split over processes without anything to remember. And the validation loss is one fixed pass over
all held-out text, also in bits per byte, which can be compared between tokenizers.

A text is one long line of tokens, and a window of it may begin anywhere. Conversations are not: a window begins where
one begins, and of its targets only those remain that the mask beside the tokens allows, the assistant's words.

At the end, `inspect` is what `python prepare.py --inspect data/NAME` does: it believes nothing and counts again.
"""
import hashlib
import itertools
import json
import math
import os
from dataclasses import dataclass, field
from shlex import quote

import numpy as np

import tokenizer as tokenizers
from runtime.files import check_like, file_sha256, open_file
from runtime.console import UserError, say, show, warn
from text.sources import origin

HASHED_BYTES = 1 << 30  # files up to this size are hashed whenever they are opened, which takes a second at the most


def version(file):
    """By which a file is known to be unchanged: its size, and when it was written last."""
    about = os.fstat(file.fileno())
    return about.st_size, about.st_mtime_ns


class Changed(UserError):
    """The data are not what they were when they were opened."""


@dataclass
class Dataset:
    """A prepared folder: its meta.json, and its two sides. files: {"train": file, "train.mask": file, ...}"""

    folder: str
    meta: dict
    files: dict
    layouts: dict = field(default_factory=dict)  # what `layout` has found: {(side, block_size): spans}
    versions: list = field(default_factory=list)  # of the files, when they were opened
    gone: bool = False  # have files been deleted or replaced since then?

    @classmethod
    def open(cls, folder, hash_all=False):
        """Raises UserError when the folder is missing, or when a file is not what meta.json says."""
        meta = read_meta(folder)
        files, kinds = {}, [("", np.dtype(meta["dtype"]).itemsize, "sha256")]  # part of the name, bytes of a token
        if meta.get("chat"):
            kinds.append((".mask", 1, "mask_sha256"))
        for side, (kind, item, sha256) in itertools.product(("train", "val"), kinds):
            path, due = os.path.join(folder, f"{side}{kind}.bin"), meta[side]["tokens"] * item
            size = os.path.getsize(path) if os.path.exists(path) else 0
            if size != due:
                raise UserError(f"{path} has {size:,} bytes, but meta.json says {meta[side]['tokens']:,} tokens of "
                                f"{item} bytes = {due:,}", f"it was cut or changed; prepare {folder} again")
            files[side + kind] = open(path, "rb")  # held open: a file that takes its place is not read by this run
            if (hash_all or size <= HASHED_BYTES) and (found := file_sha256(path)) != meta[side][sha256]:
                raise UserError(f"{path} has the checksum {found[:12]}, but meta.json says {meta[side][sha256][:12]}",
                                f"it was changed or damaged; prepare {folder} again")
        return cls(folder, meta, files, versions=[version(file) for file in files.values()])

    def check_unchanged(self, any_process=bool):
        """Raises Changed where somebody has written into a file since it was opened; warns, once, where one was deleted
        or replaced: the open file still has its content.

        any_process: is it so for any of several processes? (All of them have to raise.)
        """
        if any_process([version(file) for file in self.files.values()] != self.versions):
            raise Changed(f"{self.folder} was changed while it was being read", f"prepare {self.folder} again")
        if not self.gone and not all(os.path.exists(file.name) and os.path.samefile(file.name, file.fileno())
                                     for file in self.files.values()):
            self.gone = True
            warn(f"{self.folder} was deleted or replaced: this run continues with the files that it has open; to "
                 "resume it, the same data must be there again")

    def read(self, name, offset, size):
        """Bytes of a file. Raises Changed where it has become shorter."""
        file = self.files[name]
        file.seek(offset)
        raw = file.read(size)
        if len(raw) < size and version(file) not in self.versions:  # (else it is just the end of the file)
            raise Changed(f"{file.name} was cut while it was being read", f"prepare {self.folder} again", alone=True)
        return raw

    @property
    def chat(self):
        """Is this conversations, of which only a part is to be learned?"""
        return self.meta.get("chat", False)

    def sha256(self):
        """The checksums of all that is learned from and measured on."""
        return [self.meta[side][kind] for kind in ("sha256", "mask_sha256") for side in ("train", "val")
                if kind in self.meta[side]]

    def check_tokenizer(self):
        """The tokenizer of these ids. Raises UserError where it is not the one that they were written with."""
        tokenizer = tokenizers.load_from(self.folder, self.meta["tokenizer_sha256"])
        if (self.meta["vocab_size"], self.meta.get("special")) != (tokenizer.vocab_size, tokenizer.special):
            raise UserError(f"{self.folder}/meta.json and its tokenizer, of {tokenizer.vocab_size} tokens, do "
                            "not have the same tokens", f"meta.json was changed; prepare {self.folder} again")
        return tokenizer

    def check(self, block_size):
        """Raises UserError where a side has nothing to learn in windows of block_size + 1 tokens."""
        shortest = min(self.meta[side]["tokens"] for side in ("train", "val"))
        for side in ("train", "val"):
            if self.chat and not len(self.layout(side, block_size)):
                enough = block_size
                while not all(len(self.layout(each, enough)) for each in ("train", "val")):
                    enough *= 2
                raise UserError(f"block_size={block_size} cuts every conversation of {self.folder}/{side}.bin off "
                                "before the assistant says anything", f"--block_size={enough} or more")
            if not self.chat and self.meta[side]["tokens"] <= block_size:
                smaller = f"--block_size={1 << ((shortest - 1).bit_length() - 1)}, or " if shortest > 1 else ""
                raise UserError(f"{self.folder}/{side}.bin has {self.meta[side]['tokens']:,} tokens, but block_size="
                                f"{block_size} needs at least {block_size + 1}", smaller + "more text")

    def tokens(self, side, start, count):
        """`count` ids from position `start` of a side, (count,) int64."""
        dtype = np.dtype(self.meta["dtype"])
        ids = np.frombuffer(self.read(side, start * dtype.itemsize, count * dtype.itemsize), dtype)
        if ids.max(initial=0) >= self.meta["vocab_size"]:
            raise Changed(f"{self.folder}/{side}.bin has the token {ids.max()} near position {start}, but the "
                          f"vocabulary has {self.meta['vocab_size']}", f"it is damaged; prepare {self.folder} again",
                          alone=True)
        return ids.astype(np.int64)

    def mask(self, side, start, count):
        """Of conversations, which of `count` tokens are to be learned: (count,) uint8, 1 or 0."""
        return np.frombuffer(self.read(side + ".mask", start, count), np.uint8)

    def rows(self, side, spans, block_size):
        """Windows that begin and end at these positions: (idx, targets), each (B, T) int64.

        The target of a token is the one after it, or -1 where nothing is to be learned: after the end of a window that
        is shorter than the others, and at what the mask leaves out.
        """
        import torch
        idx = np.zeros((len(spans), block_size), dtype=np.int64)
        targets = np.full_like(idx, -1)
        for row, (start, end) in enumerate(spans):
            n = max(end - start - 1, 0)
            ids = self.tokens(side, start, n + 1)
            idx[row, :n], targets[row, :n] = ids[:n], ids[1:]
            if self.chat:
                targets[row, :n][self.mask(side, start + 1, n) == 0] = -1
        return torch.from_numpy(idx), torch.from_numpy(targets)

    def batch(self, block_size, batch_size, seed, step, micro=0, micros=1):
        """The micro-batch number `micro` of the `micros` that make up a step: (idx, targets), each (B, T) int64."""
        return self.rows("train", self.spans(block_size, batch_size, seed, step, micro, micros).tolist(), block_size)

    def spans(self, block_size, batch_size, seed, step, micro=0, micros=1):
        """Where the windows of that micro-batch begin and end: (B, 2) int64.

        The training side is cut into windows of block_size tokens, and an epoch visits every window once, in shuffled
        order. Sample number g of the whole run is window shuffled(g mod n) of epoch g // n: nothing is remembered from
        one batch to the next, so a resumed run continues with exactly the data it would have seen, validation cannot
        disturb it, and it does not matter which process takes which micro-batch.
        """
        n = self.windows(block_size)
        room = self.meta["train"]["tokens"] - n * block_size  # for an epoch of a text to begin at another place
        sample = (step * micros + micro) * batch_size + np.arange(batch_size)  # (B,)
        spans = np.empty((batch_size, 2), dtype=np.int64)
        for epoch in set((sample // n).tolist()):
            here = sample // n == epoch
            window = shuffled(sample[here] % n, n, fold("epoch", seed, epoch))
            if self.chat:
                spans[here] = self.layout("train", block_size)[window, :2]
            else:
                start = fold("offset", seed, epoch) % room + window * block_size
                spans[here] = np.stack((start, start + block_size + 1), axis=1)
        return spans

    def windows(self, block_size):
        """How many windows an epoch has. (Of a text, one fewer than fit: see `room` in `spans`.)"""
        return len(self.layout("train", block_size)) if self.chat else max(
            1, self.meta["train"]["tokens"] // block_size - 1)

    def epochs(self, windows, block_size):
        """How often so many windows read the training side."""
        return windows / self.windows(block_size) if self.chat else windows * block_size / self.meta["train"]["tokens"]

    def layout(self, side, block_size):
        """The windows of conversations: (n, 3) int64, where each begins and ends, and how many tokens it teaches.

        A window begins with the first token of a conversation, as a prompt does, and holds as many whole ones as fit
        (the later ones can see the earlier ones, past the end-of-text token between them). A conversation that is
        longer than a window is cut at its end. A window that teaches nothing is left out.
        """
        if (side, block_size) not in self.layouts:
            tokens, border = self.meta[side]["tokens"], self.meta["special"][tokenizers.END_OF_TEXT]
            first = np.concatenate([start + 1 + np.flatnonzero(self.tokens(side, start, 1 << 20) == border)
                                    for start in range(0, tokens, 1 << 20)])  # of each conversation
            past = np.append(first[1:] - 1, tokens)  # its end: where the end-of-text token before the next one stands
            spans, i = [], 0
            while i < len(first):
                limit = int(first[i]) + block_size + 1  # block_size inputs, and the target of the last
                fit = max(i + 1, int(np.searchsorted(past, limit, side="right")))
                start, end = int(first[i]), min(int(past[fit - 1]), limit)
                spans.append((start, end, int(self.mask(side, start + 1, max(end - start - 1, 0)).sum())))
                i = fit
            self.layouts[side, block_size] = np.array([span for span in spans if span[2]], np.int64).reshape(-1, 3)
        return self.layouts[side, block_size]

    def val_batch(self, i, block_size, batch_size):
        """Batch number i of the one pass over the held-out side: (idx, targets), each (B, T) int64; -1 after the end.

        Every token but the first of a text, and every one that a conversation teaches, is predicted once, from the
        tokens before it in its window. All batches have the same shape, the last one too, so that compiled code is
        compiled once.
        """
        numbers, tokens = range(i * batch_size, (i + 1) * batch_size), self.meta["val"]["tokens"]
        if self.chat:
            layout = self.layout("val", block_size)[:, :2].tolist()
            spans = [layout[n] if n < len(layout) else (0, 0) for n in numbers]
        else:
            spans = [(n * block_size, min((n + 1) * block_size + 1, tokens)) for n in numbers]
        return self.rows("val", spans, block_size)

    def prompt(self, block_size, nothing=False):
        """Ids to go on from, a list: the first held-out conversation up to its answer, or the first held-out words.

        nothing: of a text, the end-of-text token alone.
        """
        if self.chat:
            start, end, _ = self.layout("val", block_size)[0].tolist()
            end = start + int(self.mask("val", start, end - start).argmax())
            return self.tokens("val", start, end - start).tolist()
        return self.tokens("val", 0, 1 if nothing else 1 + min(24, block_size // 2)).tolist()

    def n_val_batches(self, block_size, batch_size, at_most=0):
        """How many batches the pass has; at_most: no more than this, 0 for all."""
        windows = len(self.layout("val", block_size)) if self.chat else (self.meta["val"]["tokens"] - 1) / block_size
        n = math.ceil(windows / batch_size)
        return min(n, at_most or n)

    def bits_per_byte(self, loss):
        """A validation loss in nats per token as bits per byte of the held-out text.

        The loss depends on how long the tokens are: fewer, longer tokens are each harder to guess. The information in
        all of them together, spread over the bytes of the text, can be compared between tokenizers. (End-of-text tokens
        count as information, not as bytes. Where only a part was read, its mean stands for the whole.) Of
        conversations, what the assistant says counts.
        """
        val = self.meta["val"]
        tokens, size = (val["trained"], val["trained_bytes"]) if self.chat else (val["tokens"] - 1, val["bytes"])
        return loss * tokens / size / math.log(2)


def read_meta(folder):
    """What its meta.json says. Raises UserError where there is none, or where it is not as `prepare` writes it."""
    path = os.path.join(folder, "meta.json")
    try:
        with open_file(path, most=10 << 20) as file:
            meta = json.load(file)
    except FileNotFoundError:
        raise UserError(f"there is no prepared data in {folder} (no meta.json)",
                        f"python prepare.py YOUR_TEXT.txt --out={quote(folder)}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {type(error).__name__}: {error}", "run prepare.py again") from None
    check_meta(meta, path)
    meta["source"] = [origin(source) for source in meta["source"]]  # (an older meta.json may hold more)
    return meta


def check_meta(meta, path):
    """Raises UserError where a meta.json is not as `prepare` writes it."""
    check_like(meta, dict(format=1, dtype="", vocab_size=1, tokenizer_sha256="", source=[""], report=[""], leaked=0.0,
                          train={}, val={}), path)
    chat = meta.get("chat", False)
    counts = ["tokens", "bytes", "documents"] + (["trained", "trained_bytes"] if chat else [])
    side = dict.fromkeys(counts, 1) | dict.fromkeys(["sha256", "mask_sha256"] if chat else ["sha256"], "")
    check_like(meta, dict(train=side, val=side), path)
    numbers = [meta["vocab_size"], *(meta[side][name] for side in ("train", "val") for name in counts)]
    if meta["format"] != 1 or meta["dtype"] not in ("uint16", "uint32") or chat is not ("trained" in meta["train"]) \
            or not all(0 < n < 1 << 60 for n in numbers):
        raise UserError(f"{path} is not as format 1 should be", "run prepare.py again")


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
OURS = {"train.bin", "val.bin", "train.mask.bin", "val.mask.bin", "meta.json"}
TOKENIZER_FILES = {"config.json", "vocab.json", "tokenizer.model", "encoding.json", "encoding.tiktoken",
                   *tokenizers.pretrained.PARTS}


def not_ours(folder):
    """The first thing in a folder that no prepare.py wrote, or an empty text."""
    if not os.path.isdir(folder):
        return "a file of this name" if os.path.lexists(folder) else ""
    ours = OURS | {os.path.join("tokenizer", name) for name in TOKENIZER_FILES}
    for parent, folders, files in os.walk(folder):
        for path in (os.path.join(parent, name) for name in folders + files):
            if os.path.relpath(path, folder) not in ours and (os.path.islink(path) or not os.path.isdir(path)):
                return os.path.basename(path)
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# python prepare.py --inspect data/NAME

def example(data, tokenizer, longest=400):
    """The first conversation that teaches something, as a text in which \u27e6 and \u27e7 enclose what is learned."""
    names, text = {i: name for name, i in tokenizer.special.items()}, ""
    n = min(1 << 20, data.meta["train"]["tokens"])
    ids, mask = data.tokens("train", 0, n), data.mask("train", 0, n)
    border = np.append(np.flatnonzero(ids == tokenizer.special[tokenizers.END_OF_TEXT]), n)
    start = border[np.searchsorted(border, mask.argmax()) - 1] + 1  # of the one that has the first token to learn
    end = min(border[np.searchsorted(border, start)], start + longest)
    for learned, run in itertools.groupby(zip(ids[start:end].tolist(), mask[start:end].tolist()), lambda pair: pair[1]):
        part = b"".join(names[i].encode() if i in names else tokenizer.token_bytes(i) for i, _ in run)
        part = part.decode(errors="replace")
        text += f"\u27e6{part}\u27e7" if learned else part
    return text + "\n(learned: what stands between \u27e6 and \u27e7)"


def inspect(folder, sample_tokens=120):
    """Check every byte of a prepared folder, and show what it holds. Raises UserError at the first damage."""
    data = Dataset.open(folder, hash_all=True)
    tokenizer, meta = data.check_tokenizer(), data.meta
    lengths = np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])
    end = tokenizer.special[tokenizers.END_OF_TEXT]
    drops = tokenizer.missing or tokenizer.rewrites  # its tokens spell the text nearly
    say(f"{folder}: {', '.join(meta['source'])}\n{tokenizer.kind} tokenizer, {tokenizer.vocab_size:,} tokens, "
        f"{meta['dtype']}")
    for side in ("train", "val"):
        due, found = meta[side], dict(tokens=0, documents=0, bytes=0)
        found |= dict(trained=0, trained_bytes=0) if data.chat else {}
        for start in range(0, due["tokens"], 1 << 20):
            ids = data.tokens(side, start, min(1 << 20, due["tokens"] - start))  # refuses an id that is too large
            found["tokens"] += len(ids)
            found["documents"] += int((ids == end).sum())
            found["bytes"] += int(lengths[ids].sum())
            if data.chat:
                learned = ids[data.mask(side, start, len(ids)) == 1]
                found["trained"] += len(learned)
                found["trained_bytes"] += int(lengths[learned].sum())
        path = os.path.join(folder, side + ".bin")
        for what, number in found.items():
            # (Between the messages of a conversation, a format of others may have text of its own.)
            if number != due[what] and not (what.endswith("bytes") and drops or what == "bytes" and data.chat):
                raise UserError(f"{path} holds {number:,} {what}, but meta.json says {due[what]:,}",
                                f"meta.json or the tokenizer was changed; prepare {folder} again")
        learning = f", {due['trained']:,} to be learned" if data.chat else ""
        say(f"{path}: {due['tokens']:,} tokens, {due['documents']:,} documents, {due['bytes']:,} bytes of text, "
            f"{due['bytes'] / due['tokens']:.2f} per token{learning}: as meta.json says")
    for line in meta["report"]:
        say(line)
    if data.chat:
        say("the first conversation:")
        show(example(data, tokenizer))
        return
    # A window around the border between two documents, if there is one.
    ids = data.tokens("train", 0, min(1 << 20, meta["train"]["tokens"]))
    borders = np.flatnonzero(ids == end)
    middle = int(borders[len(borders) // 2])
    ids = ids[max(middle - sample_tokens // 2, 0):middle + sample_tokens].tolist()
    text = b"".join(b"\n--- " + tokenizers.END_OF_TEXT.encode() + b" ---\n" if i == end else tokenizer.token_bytes(i)
                    for i in ids)
    say("a sample of the training side:\n")
    show(text.decode(errors="replace"))

# SPDX-License-Identifier: GPL-3.0-only
"""
Leaks: what is in a text, and how much of the validation split is also in the training split.

Most bad data can be seen by counting. `Characters` counts what prepare.py reads. `overlap` counts the validation text
that the model has also trained on: it may know that by heart, and then its validation loss says nothing.
"""
import os

import numpy as np

from runtime.console import Progress, origin

RUN_BYTES = 80  # about 13 English words, which hardly ever recur by chance (Brown et al. 2020, appendix C)
SAMPLE = 500_000  # of more runs in the validation split than this, an even sample is looked up
SLICE = 1 << 18  # tokens, or characters, that are counted at a time
FACTOR = 0x9E3779B97F4A7C15  # odd, so that multiplication by it loses nothing mod 2^64


class Characters:
    """How often each code point occurs: counts, (0x110000,) int64; and a text, such as <|endoftext|>: found."""

    def __init__(self, text=""):
        self.text, self.found = text, 0
        self.counts = np.zeros(0x110000, dtype=np.int64)
        self.waiting, self.size = [], 0  # a call of numpy costs as much as 1,000 characters

    def add(self, text):
        self.found += text.count(self.text) if self.text else 0
        self.waiting.append(text)
        self.size += len(text)
        if self.size > SLICE:
            self.count()

    def count(self):
        """Count the texts that wait."""
        text = "".join(self.waiting)
        found = np.bincount(np.frombuffer(text.encode("utf-32-le"), "<u4"))  # of each code point
        self.counts[:len(found)] += found
        self.waiting, self.size = [], 0


def characters(counts):
    """Lines for a reader: which languages there are, and what should make one look, the most frequent first.

    UTF-8 that was once read as another encoding shows by Ã and © in place of é, a damaged text by U+FFFD and control
    characters.
    """
    plain, hidden = [], []
    order = np.argsort(-counts, kind="stable")[:np.count_nonzero(counts)].tolist()  # the most frequent first
    for i in order:
        if chr(i) in "\t\n\r" or " " <= chr(i) <= "~":
            continue
        if chr(i).isprintable() and i != 0xFFFD:
            plain.append(f"{chr(i)} {counts[i]:,}")
        else:
            hidden.append(f"U+{i:04X} {counts[i]:,}")
    lines = [f"{counts.sum():,} characters, {len(order):,} different; not ASCII: {', '.join(plain[:8]) or 'none'}"]
    if hidden:
        lines.append(f"control and other odd characters: {', '.join(hidden[:8])}")
    return lines


# ---------- What the splits have in common

def overlap(folder, dtype, counts, end, names):
    """Lines for a reader: how many validation documents repeat runs of k tokens of the training split, and which.

    counts: as meta.json has them; end: the token before each document; names: of the documents in val.bin.
    """
    run_tokens = RUN_BYTES * counts["train"]["tokens"] / counts["train"]["bytes"]
    k = 1 << int(np.clip(round(np.log2(run_tokens)), 3, 7))
    one_in = 1 + counts["val"]["tokens"] // SAMPLE
    train, val = os.path.join(folder, "train.bin"), os.path.join(folder, "val.bin")
    repeated, total = repeated_runs(train, val, dtype, end, k, one_in)
    if not total.any():
        return [f"overlap: not checked, no validation document has {k} tokens"]
    share = repeated / np.maximum(total, 1)  # of each document
    sampled = f", of which 1 in {one_in:,} was checked" if one_in > 1 else ""
    lines = [f"overlap: {np.count_nonzero(share):,} of {np.count_nonzero(total):,} validation documents repeat at "
             f"least one run of {k} tokens from the training split "
             f"({repeated.sum() / total.sum():.2%} of all such runs{sampled})"]
    most = np.argsort(-share, kind="stable")[:3]
    worst = [f"{origin(names[i])} ({share[i]:.1%})" for i in most if share[i]]
    if worst:
        lines.append("highest: " + ", ".join(worst))
    return lines


def repeated_runs(train, val, dtype, end, k, one_in=1):
    """For each document in val: how many of its runs of k tokens are in train, and how many were looked up.

    train, val: paths of files of token ids; one_in: look up a sample of the runs, one in this many.
    """
    # 1) The runs of val, as hashes. A run does not cross from one document to the next.
    limit = np.uint64(((1 << 64) - 1) // one_in)  # runs with a larger hash are not in the sample
    runs, owners, before = [], [], 0
    for ids in slices(val, dtype, k):
        border, hashes = ids == end, hashed(ids, k)
        document = before + np.cumsum(border)  # its number, from 1
        before += np.count_nonzero(border[:SLICE])
        first, last = (document - border)[:len(hashes)], document[k - 1:]
        kept = (first == last) & (hashes <= limit)
        runs.append(hashes[kept])
        owners.append(last[kept] - 1)
    runs, where = np.unique(np.concatenate(runs), return_inverse=True)
    owners = np.concatenate(owners)

    # 2) Which of them are in train? A table of the last bits spares most searches; sorted, the others are faster.
    found = np.zeros(len(runs), dtype=bool)
    table, last_bits = np.zeros(1 << 22, dtype=bool), np.uint64((1 << 22) - 1)
    table[runs & last_bits] = True
    progress = Progress("comparing the splits", os.path.getsize(train))
    for ids in slices(train, dtype, k):
        hashes = hashed(ids, k)
        hashes = np.sort(hashes[(hashes <= limit) & table[hashes & last_bits]])
        at = np.minimum(np.searchsorted(runs, hashes), len(runs) - 1)
        found[at[runs[at] == hashes]] = True
        progress.add(ids.nbytes)
    n_documents = document[-1]
    return np.bincount(owners, found[where], n_documents), np.bincount(owners, minlength=n_documents)


def slices(path, dtype, k):
    """A file of ids in parts that hold every run of k ids once: each begins with the last k - 1 of the one before."""
    n = os.path.getsize(path) // dtype.itemsize
    for start in range(0, max(n - k + 1, 1), SLICE):  # not a memmap, whose pages would count as memory of this process
        yield np.fromfile(path, dtype, SLICE + k - 1, offset=start * dtype.itemsize)


def hashed(ids, k):
    """A hash of each run of k ids, a power of two: (n,) -> (n - k + 1,) uint64.

    A polynomial in FACTOR whose coefficients are the ids. Two runs of m make one of 2m, so that log2(k) steps suffice.
    """
    h, m = ids.astype(np.uint64) * np.uint64(FACTOR), 1
    while m < k:
        h = h[:-m] * np.uint64(pow(FACTOR, m, 1 << 64)) + h[m:]
        m *= 2
    return h

# SPDX-License-Identifier: GPL-3.0-only
"""
Leaks: what is in a text, and how much of the validation split is also in the training split.

Most bad runs are bad data, and most bad data can be seen by counting. `Census` counts every character that prepare.py
reads. `overlap` counts the validation text that the model has also trained on: it may know that by heart, and then its
validation loss says nothing. Both work on whole arrays, a bounded part of the text at a time.
"""
import os
import re
import unicodedata
from collections import Counter

import numpy as np

from runtime.console import Progress
from tokenizer import code_points

# What UTF-8 looks like after someone has read it as Windows-1252: two or more characters from these two sets.
MOJIBAKE = re.compile("[\u00c2-\u00f4][" + re.escape(bytes(range(0x80, 0xC0)).decode("cp1252", "ignore")) + "]+")
# Signs of damage that are not control characters by their category: the replacement of what could not be decoded, a
# byte order mark inside the text, and characters that turn the reading direction (CVE-2021-42574).
SUSPICIOUS = {0xFFFD, 0xFEFF, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}

RUN_BYTES = 80  # about 13 English words, which hardly ever recur by chance (Brown et al. 2020, appendix C)
SAMPLE = 500_000  # of more runs in the validation split than this, an even sample is looked up
SLICE = 1 << 18  # tokens, or characters, that are counted at a time
FACTOR = 0x9E3779B97F4A7C15  # odd, so that multiplication by it loses nothing mod 2^64


class Census:
    """How often each character occurs, and how much was decoded twice."""

    def __init__(self):
        self.counts = np.zeros(0x110000, dtype=np.int64)
        self.mojibake, self.example = 0, ""
        self.waiting, self.size = [], 0  # a call of numpy costs as much as 1,000 characters

    def add(self, text):
        self.waiting.append(text)
        self.size += len(text)
        if self.size > SLICE:
            self.count()

    def count(self):
        """Count the texts that wait."""
        text = "".join(self.waiting)
        self.waiting, self.size = [], 0
        found = np.bincount(code_points(text))
        self.counts[:len(found)] += found
        if found[0xC2:0xF5].any():
            for match in MOJIBAKE.finditer(text):
                try:
                    meant = match[0].encode("cp1252").decode()
                except UnicodeDecodeError:
                    continue
                self.mojibake += 1
                self.example = self.example or f"{match[0]!r} for {meant!r}"

    def report(self):
        """Lines for a reader: letters by script, and every kind of character that should make one look."""
        scripts, odd = Counter(), Counter()
        for i in np.flatnonzero(self.counts).tolist():
            category = unicodedata.category(chr(i))
            if category[0] == "L":
                scripts[unicodedata.name(chr(i), "OTHER").split()[0]] += int(self.counts[i])
            elif category in ("Cc", "Co", "Cn") and chr(i) not in "\t\n\r" or i in SUSPICIOUS:
                odd[f"U+{i:04X}"] = int(self.counts[i])
        letters = ", ".join(f"{name.capitalize()} {n / scripts.total():.2%}" for name, n in scripts.most_common(6))
        more = ", ..." if len(scripts) > 6 else ""
        lines = [f"{self.counts.sum():,} characters, {np.count_nonzero(self.counts):,} different; "
                 f"letters: {letters or 'none'}{more}"]
        if odd:
            worst = ", ".join(f"{name} {n:,}" for name, n in odd.most_common(8))
            more = ", ..." if len(odd) > 8 else ""
            lines.append(f"control and other odd characters: {odd.total():,} ({worst}{more})")
        if self.mojibake:
            lines.append(f"mojibake: {self.mojibake:,} places where UTF-8 was read as another encoding: {self.example}")
        return lines


def histogram(sizes):
    """Sizes counted by powers of two, as a line: '512: 3, 1k: 40, 2k: 7', each number from that size to the next."""
    counts = np.bincount(np.frexp(sizes)[1] - 1)
    return ", ".join(f"{1 << k % 10}{('', *'kMGTPE')[k // 10]}: {n:,}" for k, n in enumerate(counts) if n)


# ---------------------------------------------------------------------------------------------------------------------
# What the splits have in common

def overlap(folder, dtype, counts, end, names):
    """(lines for a reader, the share of all runs of k tokens in val.bin that are also in train.bin).

    counts: as meta.json has them; end: the token before each document; names: of the documents in val.bin.
    """
    k = 1 << int(np.clip(round(np.log2(RUN_BYTES * counts["train"]["tokens"] / counts["train"]["bytes"])), 3, 7))
    one_in = 1 + counts["val"]["tokens"] // SAMPLE
    train, val = os.path.join(folder, "train.bin"), os.path.join(folder, "val.bin")
    repeated, total = repeated_runs(train, val, dtype, end, k, one_in)
    if not total.any():
        return [f"overlap: not looked for, no validation document has {k} tokens"], 0.0
    share, whole = repeated / np.maximum(total, 1), float(repeated.sum() / total.sum())
    found = np.count_nonzero(share)
    sampled = f", of which 1 in {one_in:,} was looked up" if one_in > 1 else ""
    lines = [f"overlap: {found:,} of {np.count_nonzero(total):,} validation documents repeat at least one run of {k} "
             f"tokens from the training split ({whole:.2%} of all such runs{sampled}); "
             f"mostly repeated: {np.count_nonzero(share > 0.5) or 'none'}"]
    if found:
        worst = np.argsort(-share, kind="stable")[:min(found, 3)]
        lines.append("most of all: " + ", ".join(f"{names[i]} ({share[i]:.1%})" for i in worst))
    return lines, whole


def repeated_runs(train, val, dtype, end, k, one_in=1):
    """For each document in val: how many of its runs of k tokens are in train, and how many were looked up.

    train, val: paths of files of token ids; one_in: look up a sample of the runs, one in so many.
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

    # 2) Which of them are in train? A search costs as much as a hundred additions: a table of the last bits of the
    # hashes spares most of them, and in ascending order they find their place in the cache.
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
    return np.bincount(owners, found[where], document[-1]), np.bincount(owners, minlength=document[-1])


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

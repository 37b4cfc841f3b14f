# SPDX-License-Identifier: GPL-3.0-only
"""
Forensics: what is in a text, before a model finds out.

Most bad runs are bad data, and most bad data can be seen by counting. `Census` counts every character that prepare.py
reads (scripts, control characters, text that was decoded twice). `overlap` counts how much of the validation split also
stands in the training split: a model may know that by heart, and its validation loss then says nothing. Both work on
whole arrays, a bounded part of the text at a time.
"""
import os
import re
import unicodedata
from collections import Counter

import numpy as np

from runtime.console import Progress

# What UTF-8 looks like after someone has read it as Windows-1252: two or more characters from these two sets.
MOJIBAKE = re.compile("[\u00c2-\u00f4][" + re.escape(bytes(range(0x80, 0xC0)).decode("cp1252", "ignore")) + "]+")
# Signs of damage or of a trap, which are no control characters by their category: the replacement of what could not be
# decoded, a byte order mark inside the text, and those that turn the reading direction (CVE-2021-42574).
SUSPICIOUS = {0xFFFD, 0xFEFF, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}

RUN_BYTES = 80  # about 13 English words, which hardly ever recur by chance (Brown et al. 2020, appendix C)
SAMPLE = 500_000  # of more runs in the validation split than this, an even sample is looked up
SLICE = 1 << 18  # tokens at a time
FACTOR = 0x9E3779B97F4A7C15  # odd: multiplication by it loses nothing mod 2^64


def code_points(text):
    """The numbers of the characters of a text: (n,) uint16, or uint32 where one is beyond 65,535."""
    raw = text.encode("utf-16-le")
    return np.frombuffer(raw, "<u2") if len(raw) == 2 * len(text) else np.frombuffer(text.encode("utf-32-le"), "<u4")


class Census:
    """How often each character occurs, and how much was decoded twice."""

    def __init__(self):
        self.counts = np.zeros(0x110000, dtype=np.int64)
        self.mojibake, self.example = 0, ""
        self.waiting, self.size = [], 0  # short texts are counted together: a call of numpy costs 1,000 characters

    def add(self, text):
        self.waiting.append(text)
        self.size += len(text)
        if self.size > 1 << 18:
            self.count()

    def count(self):
        """Count the texts that were added since the last time."""
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
        for i in np.flatnonzero(self.counts):
            character, n = chr(i), int(self.counts[i])
            kind = unicodedata.category(character)
            if kind[0] == "L":
                scripts[unicodedata.name(character, "OTHER").split()[0]] += n
            elif kind in ("Cc", "Co", "Cn") and character not in "\t\n\r" or i in SUSPICIOUS:
                odd[f"U+{i:04X}"] = n
        letters = ", ".join(f"{name.capitalize()} {n / scripts.total():.2%}" for name, n in scripts.most_common(6))
        lines = [f"{self.counts.sum():,} characters, {np.count_nonzero(self.counts):,} different; letters: "
                 + (letters or "none") + ", ..." * (len(scripts) > 6)]
        if odd:
            worst = ", ".join(f"{name} {n:,}" for name, n in odd.most_common(8)) + ", ..." * (len(odd) > 8)
            lines.append(f"control and other odd characters: {odd.total():,} ({worst})")
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
    sampled = f", of which 1 in {one_in:,} was looked up" * (one_in > 1)
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
    limit = np.uint64(((1 << 64) - 1) // one_in)  # runs with a larger hash are left out
    runs, owners, before = [], [], 0
    for ids in slices(val, dtype, k):
        border, hashes = ids == end, hashed(ids, k)
        document = before + np.cumsum(border)  # its number, from 1
        before += np.count_nonzero(border[:SLICE])
        first, last = (document - border)[:len(hashes)], document[k - 1:]
        kept = (first == last) & (hashes <= limit)  # a run does not cross from one document to the next
        runs.append(hashes[kept])
        owners.append(last[kept] - 1)
    runs, where = np.unique(np.concatenate(runs), return_inverse=True)
    found = np.zeros(len(runs), dtype=bool)
    # A search costs as much as a hundred additions. A table of the last bits of the hashes makes most of them needless,
    # and in ascending order they find their place in the cache.
    table, last_bits = np.zeros(1 << 22, dtype=bool), np.uint64((1 << 22) - 1)
    table[runs & last_bits] = True
    progress = Progress("comparing the splits", os.path.getsize(train))
    for ids in slices(train, dtype, k):
        hashes = hashed(ids, k)
        hashes = hashes[hashes <= limit]
        hashes = np.sort(hashes[table[hashes & last_bits]])
        at = np.minimum(np.searchsorted(runs, hashes), len(runs) - 1)
        found[at[runs[at] == hashes]] = True
        progress.add(ids.nbytes)
    owners = np.concatenate(owners)
    return np.bincount(owners, found[where], document[-1]), np.bincount(owners, minlength=document[-1])


def slices(path, dtype, k):
    """A file of ids in parts that hold every run of k ids once: each begins with the last k - 1 of the one before."""
    n = os.path.getsize(path) // dtype.itemsize
    for start in range(0, max(n - k + 1, 1), SLICE):  # not a memmap, whose pages would count as memory of this process
        yield np.fromfile(path, dtype, SLICE + k - 1, offset=start * dtype.itemsize)


def hashed(ids, k):
    """A number for each run of k ids, a power of two: (n,) -> (n - k + 1,) uint64. Equal runs, equal numbers.

    A polynomial in FACTOR whose coefficients are the ids. Two runs of m make one of 2m, so that log2(k) steps suffice.
    """
    h, m = ids.astype(np.uint64) * np.uint64(FACTOR), 1
    while m < k:
        h = h[:-m] * np.uint64(pow(FACTOR, m, 1 << 64)) + h[m:]
        m *= 2
    return h

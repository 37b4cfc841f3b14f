# SPDX-License-Identifier: GPL-3.0-only
"""
Forensics: what is in a text, before a model finds out.

Most bad runs are bad data, and most bad data can be seen by counting. Two things are counted here while prepare.py
reads: `Census`, every character (scripts, control characters, text that was decoded twice), and `Leaks`, how much of
the held-out text also stands in the training text. A model knows the latter by heart, and its validation loss says
nothing about it.

Both are written for text that does not fit into memory, at some 100 MB/s: whole arrays instead of loops, and a bounded
number of everything that is kept.
"""
import hashlib
import re
import unicodedata

import numpy as np

GRAM = 13  # words in a row that hardly ever occur twice by chance (Brown et al. 2020, appendix C)
KEPT = 500_000  # so many such runs of the held-out text are looked for; where it has more, an even share of them
MIX, STEP = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1342543DE82EF95)  # odd: multiplication can be undone mod 2^64
SLICE = 1 << 16  # characters that are worked on at once: so much stays in a processor's cache

# What UTF-8 looks like after someone has read it as Windows-1252: two or more characters from these two sets.
WINDOWS = {byte: bytes([byte]).decode("cp1252", errors="ignore") or chr(byte) for byte in range(0x80, 0x100)}
CONTINUED = [ord(WINDOWS[byte]) for byte in range(0x80, 0xC0)]
MOJIBAKE = re.compile("[\u00c2-\u00f4][" + "".join(re.escape(chr(point)) for point in CONTINUED) + "]+")
TO_BYTE = {ord(character): byte for byte, character in WINDOWS.items()}


def code_points(text):
    """The numbers of the characters of a text: (n,) uint16, or uint32 where one is beyond 65,535."""
    raw = text.encode("utf-16-le")
    return np.frombuffer(raw, "<u2") if len(raw) == 2 * len(text) else np.frombuffer(text.encode("utf-32-le"), "<u4")


class Census:
    """How often each character occurs, how long the documents are, and how much was decoded twice."""

    def __init__(self):
        self.counts = np.zeros(0x110000, dtype=np.int64)
        self.lengths = [0] * 64  # number of documents with 2^k <= bytes < 2^(k + 1)
        self.mojibake, self.example = 0, ""

    def add(self, text):
        """Count a text; returns the characters that had not been seen before."""
        points = code_points(text)
        found = np.bincount(points)
        new = np.flatnonzero((found > 0) & (self.counts[:len(found)] == 0))
        self.counts[:len(found)] += found
        if len(found) > 0xC2 and found[0xC2:0xF5].any():
            first = np.flatnonzero((points[:-1] >= 0xC2) & (points[:-1] <= 0xF4))
            for i in first[np.isin(points[first + 1], CONTINUED)]:
                try:
                    match = MOJIBAKE.match(text, i)
                    meant = bytes(TO_BYTE[ord(character)] for character in match[0]).decode()
                except (UnicodeDecodeError, KeyError):
                    continue
                self.mojibake += 1
                self.example = self.example or f"{match[0]!r} for {meant!r}"
        return map(chr, new)

    def add_length(self, size):
        self.lengths[max(size.bit_length() - 1, 0)] += 1

    def report(self):
        """Lines for a reader: lengths, letters by script, and every kind of character that should make one look."""
        lines = [f"documents by bytes: {histogram(self.lengths)}"]
        scripts, odd = {}, {}
        for i in np.flatnonzero(self.counts):
            character, n = chr(i), int(self.counts[i])
            kind = unicodedata.category(character)
            if kind[0] == "L":
                script = unicodedata.name(character, "OTHER").split()[0]
                scripts[script] = scripts.get(script, 0) + n
            elif kind in ("Cc", "Co", "Cn") and character not in "\t\n\r" or i in SUSPICIOUS:
                odd[f"U+{i:04X}"] = n
        total, letters = max(int(self.counts.sum()), 1), max(sum(scripts.values()), 1)
        shares = sorted(scripts.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{name.capitalize()} {n / letters:.2%}" for name, n in shares[:6])
        lines.append(f"{total:,} characters, {np.count_nonzero(self.counts):,} different; letters: {shown or 'none'}"
                     + f" and {len(shares) - 6} other scripts" * (len(shares) > 6))
        worst = sorted(odd.items(), key=lambda item: -item[1])
        if odd:
            lines.append(f"control and other odd characters: {sum(odd.values()):,} ("
                         + ", ".join(f"{name} {n:,}" for name, n in worst[:8]) + ", ..." * (len(worst) > 8) + ")")
        if self.mojibake:
            lines.append(f"mojibake: {self.mojibake:,} places where UTF-8 was read as another encoding: {self.example}")
        return lines


# Signs of damage or of a trap, which are no control characters by their category: the replacement of what could not be
# decoded, a byte order mark inside the text, and those that turn the reading direction (CVE-2021-42574).
SUSPICIOUS = {0xFFFD, 0xFEFF, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}


def histogram(lengths):
    """Counts by powers of two as a line: '512: 3, 1k: 40, 2k: 7', each number from that size to the next."""
    names = [f"{1 << k % 10}{'kMGTPE'[k // 10 - 1] if k >= 10 else ''}" for k in range(64)]
    return ", ".join(f"{name}: {n:,}" for name, n in zip(names, lengths) if n) or "none"


# ---------------------------------------------------------------------------------------------------------------------
# Words, and thirteen of them in a row

UNSPACED = {"CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"}  # written without spaces
BORDER = "\ufdd1"  # put between documents: a word of its own that is in no text, so that no 13 words cross it


class Words:
    """Cuts text into words: runs of letters and digits, without case; in scripts without spaces, single characters.

    A word is never made as a string. It becomes a number, the sum of a random number for each of its letters times a
    power of STEP for its place in the word, which arrays can do for all words at once: with running sums over the
    whole text, the sum over a word is the difference of two of them, divided by the power at its start. (Thirteen
    Chinese characters say less than thirteen words: texts in Chinese share them more easily.)
    """

    def __init__(self):
        self.value, self.alone = np.zeros(0x110000, dtype=np.uint64), np.zeros(0x110000, dtype=bool)
        self.power = np.cumprod(np.full(SLICE, STEP))  # STEP^1, STEP^2, ...
        self.unpower = np.cumprod(np.full(SLICE, np.uint64(pow(int(STEP), -1, 1 << 64))))
        self.learn(BORDER)

    def learn(self, characters):
        """Every character has to be shown once before texts with it are cut."""
        for character in characters:
            if character.isalnum() or unicodedata.category(character)[0] == "M" or character == BORDER:  # M: accents
                lower = hashlib.blake2b(character.lower().encode(), digest_size=8).digest()
                self.value[ord(character)] = int.from_bytes(lower, "little") | 1
                script = unicodedata.name(character, "").split(" ")[0]
                self.alone[ord(character)] = script in UNSPACED or character == BORDER

    def count(self, text):
        return sum(len(starts) for _, starts in self.starts(text))

    def starts(self, text):
        """For each slice of the text: the value of each character, and where in it words start."""
        start = 0
        while start < len(text):
            end = min(start + SLICE, len(text))
            if end < len(text):
                end = max(text.rfind(" ", start, end), text.rfind("\n", start, end)) + 1 or end  # not in a word
            points = code_points(text[start:end])
            values = self.value.take(points)
            letter = values != 0
            first = letter.copy()
            first[1:] &= ~letter[:-1]
            if points.max() >= 0xE00:  # the first script without spaces, Thai
                alone = self.alone.take(points)
                first[1:] |= letter[1:] & alone[:-1]
                first |= alone
            yield values, np.flatnonzero(first)
            start = end

    def grams(self, text):
        """A number for each GRAM words in a row of the text: (n,) uint64. Equal words, equal number."""
        words = [self.numbers(values, starts) for values, starts in self.starts(text)]
        words = np.concatenate(words) if words else np.zeros(0, dtype=np.uint64)
        found = []  # the same again, one level up: words instead of letters, and every window of GRAM of them
        for start in range(0, len(words) - GRAM + 1, SLICE - GRAM):  # parts overlap, so that no window is lost
            part = words[start:start + SLICE - 1]
            sums = np.cumsum(part * self.power[:len(part)])
            sums[GRAM:] -= sums[:-GRAM].copy()
            found.append(mixed(sums[GRAM - 1:] * self.unpower[:len(part) - GRAM + 1]))
        return np.concatenate(found) if found else np.zeros(0, dtype=np.uint64)

    def numbers(self, values, starts):
        """A number for each word of a slice."""
        if not len(starts):
            return np.zeros(0, dtype=np.uint64)
        sums = np.cumsum(values * self.power[:len(values)])
        before = sums.take(starts - 1)  # the sum up to each word; what stands between two words counts zero
        if starts[0] == 0:
            before[0] = 0
        return mixed(np.diff(before, append=sums[-1]) * self.unpower.take(starts))


def mixed(numbers):
    """Spread the difference of two numbers over all their bits (products leave it in the high ones)."""
    result = numbers >> np.uint64(32)
    result ^= numbers
    result *= MIX
    return result


def part_of(numbers, left, right):
    """Some bits of each number: (n,) int64."""
    return (numbers << np.uint64(left) >> np.uint64(right)).view(np.int64)


class Leaks:
    """How much of the held-out text also stands in the training text, in units of GRAM words in a row.

    First every held-out document is given to `hold`, then every text of the training side to `look`, in any order and
    from any thread. Where the held-out side has more than KEPT of them, only those below a limit are kept, a limit that
    falls by half as often as needed: an even and repeatable sample.
    """

    def __init__(self):
        self.names, self.held, self.size, self.limit = [], [], 0, 1 << 64
        self.keys = None

    def hold(self, name, grams):
        """Take in a held-out document, or the next part of the one before. Where nothing is kept, it is forgotten."""
        grams = self.sampled(grams)
        if not len(grams):
            return
        if self.names[-1:] == [name]:
            self.size -= len(self.held[-1])
            grams = np.concatenate([self.held.pop(), grams])
            self.names.pop()
        self.names.append(name)
        self.held.append(grams)
        self.size += len(grams)
        while self.size > KEPT:
            self.limit //= 2
            fewer = [(name, some) for name, grams in zip(self.names, self.held) if len(some := self.sampled(grams))]
            self.names, self.held = [name for name, _ in fewer], [some for _, some in fewer]
            self.size = sum(map(len, self.held))

    def sampled(self, grams):
        return grams if self.limit == 1 << 64 else grams[grams < np.uint64(self.limit)]

    def freeze(self):
        """All that is held out has been seen: make it ready to be looked up."""
        keys = np.sort(np.concatenate([*self.held, np.zeros(0, dtype=np.uint64)]))
        self.keys = keys[np.append(True, keys[1:] != keys[:-1])[:len(keys)]]
        self.found = np.zeros(len(self.keys), dtype=bool)
        bits = min(max(len(self.keys).bit_length() + 4, 12), 24)
        # A search costs as much as a hundred additions. Two tables, of the first and the last bits of the keys, rule
        # nearly everything out before it.
        self.shifts = [(0, 64 - bits), (64 - bits, 64 - bits)]  # left, then right
        self.tables = [np.zeros(1 << bits, dtype=bool) for _ in self.shifts]
        for table, shift in zip(self.tables, self.shifts):
            table[part_of(self.keys, *shift)] = True

    def look(self, grams):
        """Mark which of these training grams are held out."""
        for table, shift in zip(self.tables, self.shifts):
            grams = grams.take(np.flatnonzero(table.take(part_of(grams, *shift))))
        if len(grams):
            at = np.minimum(np.searchsorted(self.keys, grams), len(self.keys) - 1)
            self.found[at[self.keys[at] == grams]] = True

    def shares(self):
        """[(share of its grams that were found, name, number of grams)] of every held-out document that has any."""
        return [(float(self.found[np.searchsorted(self.keys, grams)].mean()), name, len(grams))
                for name, grams in zip(self.names, self.held)]

    def report(self):
        """(lines for a reader, the share of all that is held out and was found: a number from 0 to 1)."""
        shares = sorted(self.shares(), key=lambda share: -share[0])
        if not shares:
            return [f"leaks: not looked for, what is held out has no {GRAM} words in a row"], 0.0
        leaked = [share for share in shares if share[0] > 0]
        mostly = [share for share in shares if share[0] > 0.5]
        whole = sum(share * n for share, _, n in shares) / self.size
        part = f" (looked for 1 in {(1 << 64) // self.limit})" if self.limit < 1 << 64 else ""
        lines = [f"leaks: {len(leaked):,} of {len(shares):,} held-out documents share {GRAM} words in a row with the "
                 f"training side, {len(mostly):,} of them more than half of theirs; {whole:.2%} of all that are held "
                 f"out{part}"]
        if leaked:
            lines.append("most of all: " + ", ".join(f"{name} ({share:.1%})" for share, name, _ in leaked[:3]))
        return lines, whole

# SPDX-License-Identifier: GPL-3.0-only
"""
Perplexity: how well does a model predict a text?

    text = read_text("data/stdlib")                         # its held-out side; or a file
    measure_text(model, tokenizer, text, block_size=256, stride=64)["bits_per_byte"]

A model gives a probability to every token that could come next. -log2 of the one that it gave to the token that did
come is its surprise, in bits; a text that surprises little is predicted well. The sum of all surprises is how long the
text would be if the model were used to compress it. What is this sum divided by?

by the tokens   perplexity, 2 to the power of the mean: the model is as unsure as if it chose among so many tokens. Of
                another tokenizer, with longer tokens, each is harder to guess: the numbers cannot be compared.
by the words    the same for words between spaces, which tokenizers do not change; of no use in Chinese.
by the bytes    bits per byte: for every language and every tokenizer.

Two more things change it: how much context a token has behind it (block_size and stride), and what was counted. Here
every token but the first is predicted exactly once, in one pass, and nothing is put before the text.
"""
import math
import os
import time
from dataclasses import dataclass, field
from shlex import quote

import numpy as np
import torch
from torch.nn import functional as F

import tokenizer as tokenizers
from runtime.console import UserError
from dataset import Dataset
from runtime.processes import Processes
from text.sources import documents


@dataclass
class Text:
    """What is to be predicted. apart: an end-of-text token stands before the first document too, as in prepared data.
    """
    name: str
    documents: list[str]
    apart: bool
    sha256: list = field(default_factory=list)  # of the two sides of prepared data

    def counts(self):
        return dict(documents=len(self.documents), bytes=sum(len(text.encode()) for text in self.documents),
                    words=sum(len(text.split()) for text in self.documents))

    def ids(self, tokenizer):
        """All of it as one sequence. Nothing is put before a text; between documents stands the end-of-text token."""
        ids, end = [], tokenizer.special.get(tokenizers.END_OF_TEXT)
        for i, text in enumerate(self.documents):
            ids += [end] if end is not None and (i or self.apart) else []
            ids += tokenizer.encode(text)
        return torch.tensor(ids, dtype=torch.int64)


def read_text(source, megabytes=0.0, text_field="text"):
    """A Text: the held-out side of data/NAME, or a file as prepare.py reads it; of it no more than so many megabytes.
    """
    folder = next((path for path in (source, os.path.join("data", source))
                   if os.path.exists(os.path.join(path, "meta.json"))), None)
    name, sha256 = folder or os.path.basename(os.path.normpath(source)), []
    room, texts = megabytes * 1e6 or math.inf, []
    if folder:
        data = Dataset.open(folder)
        if data.chat:
            raise UserError(f"{folder} holds conversations, of which train.py measures what the assistant says",
                            "--data=A_TEXT; the log.jsonl of a run has the loss on its own conversations")
        tokenizer, ids = data.check_tokenizer(), data.tokens("val", 0, data.meta["val"]["tokens"])
        borders = (ids == tokenizer.special[tokenizers.END_OF_TEXT]).nonzero()[0]
        found = ([tokenizer.decode(part[1:].tolist())] for part in np.split(ids, borders)[1:])
        sha256 = [data.meta[side]["sha256"] for side in ("train", "val")]
    elif os.path.exists(source):
        found = (document.blocks() for document in documents([source], text_field))
    else:
        raise UserError(f"there is no text {source}", f"python prepare.py {quote(source)}, or --data=FILE.txt")
    for blocks in found:
        parts, size = [], 0
        for block in blocks:
            parts.append(block.encode())
            size += len(parts[-1])
            if size >= room:
                parts[-1] = parts[-1][:len(parts[-1]) - int(size - room)]
                break
        room -= size
        text = b"".join(parts).decode(errors="ignore")  # (half a character at the end is left out)
        texts += [text] if text or not megabytes else []
        if room <= 0:
            break
    return Text(name, texts, apart=bool(folder), sha256=sha256)


def silent(done, total):
    """What tells how far the work is, where nobody listens."""


@torch.inference_mode()
def total_loss(model, ids, block_size, stride, batch_size, processes=None, tell=silent):
    """The sum of -ln p over all tokens but the first, in nats: each is predicted once, in one pass. ids: (N,) int64.

    A window of block_size tokens moves on by `stride`. The first one predicts a token for each of its own; every other
    one only those `stride` that are new, which have at least block_size - stride tokens before them: a small stride is
    fairer to the model, and takes longer. Each window is summed up in float64, and the windows in the order of the
    text, so that it does not matter which process had which.
    """
    T, n, processes = block_size, len(ids) - 1, processes or Processes()  # n tokens to predict
    count = 1 + math.ceil(max(0, n - T) / stride)
    sums, device = torch.zeros(count, dtype=torch.float64), model.lm_head.weight.device
    for i in list(range(0, count, batch_size))[processes.rank::processes.world]:
        tell(i, count)
        B = min(batch_size, count - i)
        idx, targets = torch.zeros(B, T, dtype=torch.int64), torch.full((B, T), -1)
        for row in range(B):
            start = (i + row) * stride
            length = min(T, n - start)
            idx[row, :length], targets[row, :length] = ids[start:start + length], ids[start + 1:start + length + 1]
            targets[row, :T - stride if start else 0] = -1  # the window before has predicted them
        x = model.trunk(idx.to(device))  # (B, T, C)
        wanted = targets >= 0
        x, window, targets = x[wanted.to(device)], wanted.nonzero()[:, 0], targets[wanted].to(device)  # (scored, ...)
        step = max(1, (1 << 24) // model.config.vocab_size)  # scores for a large vocabulary fill the memory
        for j in range(0, len(targets), step):
            logits = model.logits(x[j:j + step]).float()  # (step, vocab_size)
            losses = F.cross_entropy(logits, targets[j:j + step], reduction="none")
            sums[i:i + B].index_add_(0, window[j:j + step], losses.cpu().double())
    return math.fsum(processes.all_reduce_sum(sums.tolist()))


def measure_text(model, tokenizer, text, block_size=0, stride=0, batch_size=0, processes=None, tell=silent):
    """The numbers of a model on a Text. block_size: of 0, all of its context; stride: of 0, block_size.

    Raises UserError for what is too short or too long, and where the tokenizer has no token for a character.
    """
    started, counts, context = time.perf_counter(), text.counts(), model.config.block_size
    block_size = block_size or context
    stride = stride or block_size
    if block_size > context:
        raise UserError(f"block_size={block_size}, but its context is {context}", f"--block_size={context}")
    if stride > block_size:
        raise UserError(f"stride={stride} is more than block_size={block_size}: some tokens would be left out",
                        f"--stride={block_size}")
    ids = text.ids(tokenizer)
    if len(ids) < 2 or not counts["bytes"]:
        what = f"{len(ids)} tokens, and the first is not predicted" if counts["bytes"] else "no text"
        raise UserError(f"{text.name} has {what}", "a longer text")
    nats = total_loss(model, ids, block_size, stride, batch_size or max(1, 4096 // block_size), processes, tell)
    if not math.isfinite(nats):
        raise UserError("its loss is not a finite number", "--dtype=float32, or another checkpoint")
    return dict(bits_per_byte=nats / math.log(2) / counts["bytes"], perplexity=power(nats / (len(ids) - 1)),
                word_perplexity=power(nats / counts["words"]) if counts["words"] else None, tokens=len(ids), **counts,
                block_size=block_size, stride=stride, seconds=time.perf_counter() - started)


def power(x):
    """e to the x; None where that is more than a float can be (a word of a language without spaces is a sentence)."""
    return math.exp(x) if x < 709 else None

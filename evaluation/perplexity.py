# SPDX-License-Identifier: GPL-3.0-only
"""
Perplexity: how well does a model predict a text?

    text = read_text("data/stdlib")                         # its validation split; or a file
    measure_text(model, tokenizer, text, block_size=256, stride=64)["bits_per_byte"]

-log2 of the probability that a model gave to a token is its surprise, in bits. The sum over a text is its length after
compression with the model. It is divided by

the tokens   perplexity, 2 to the power of the mean: the model is as unsure as if it chose evenly among that many
             tokens. It depends on the tokenizer: the longer its tokens, the harder each is to guess.
the words    the same for words between spaces, whatever the tokenizer; of no use in Chinese.
the bytes    bits per byte, for every language and every tokenizer.

Every token but the first is predicted exactly once. block_size and stride say how much context it has.
"""
import math
import os
import sys
from dataclasses import dataclass
from shlex import quote

import numpy as np
import torch
from torch.nn import functional as F

import tokenizer as tokenizers
from dataset import Dataset, is_data, to_batch, validation_sums
from runtime import machine
from runtime.console import Progress, UserError, counted, note
from runtime.processes import Processes
from text.sources import documents


@dataclass
class Text:
    """What is to be predicted. sha256: of prepared data, which has end-of-text before the first document too."""
    name: str
    documents: list[str]
    sha256: list[str] | None = None

    def counts(self):
        return dict(documents=len(self.documents), bytes=sum(len(text.encode()) for text in self.documents),
                    words=sum(len(text.split()) for text in self.documents))

    def ids(self, tokenizer):
        """All of it, (N,) int64, with the end-of-text token between documents."""
        end = tokenizer.special.get(tokenizers.END_OF_TEXT)
        ids = []
        for i, text in enumerate(self.documents):
            if end is not None and (i > 0 or self.sha256):
                ids.append(end)
            ids += tokenizer.encode(text)
        return np.array(ids, dtype=np.int64)


def read_text(source, megabytes=0.0, text_field="text"):
    """The Text of data/NAME, its validation split, or of a file. megabytes: 0 for all."""
    for folder in (source, os.path.join("data", source)):
        if is_data(folder):
            data = Dataset.open(folder)
            return Text(folder, cut(split_documents(data), megabytes), data.sha256())
    if not os.path.exists(source):
        raise UserError(f"there is no text {source}", f"python prepare.py {quote(source)}, or --data=FILE.txt")
    found = (document.blocks() for document in documents([source], text_field))
    return Text(os.path.normpath(source), cut(found, megabytes))


def split_documents(data):
    """The documents of the validation split, each as a list of one block of text."""
    if data.chat:
        raise UserError(f"{data.folder} holds conversations, not a text", "--data=A_TEXT")
    tokenizer, ids = data.load_tokenizer(), data.read_ids("val", 0, data.meta["val"]["tokens"])
    end = tokenizer.special.get(tokenizers.END_OF_TEXT, -1)  # nanoGPT's characters have none
    for part in np.split(ids, np.flatnonzero(ids == end)):
        if (part != end).any():
            yield [tokenizer.decode(part[part != end].tolist())]


def cut(found, megabytes):
    """Documents, each given as blocks of text, until they have this many megabytes."""
    texts, left = [], round(megabytes * 1e6) or sys.maxsize
    for blocks in found:
        raw = bytearray()
        for block in blocks:
            raw += block.encode()
            if len(raw) >= left:
                break
        texts.append(raw[:left].decode(errors="ignore"))  # half a character at the end is left out
        left -= len(raw)
        if left <= 0:
            break
    return texts


def longest_context(model):
    """The context of a model, or what fits into half of the free memory."""
    c = model.config
    size = 4 * (8 * c.n_embd + 4 * c.n_inner)  # bytes of a token, within one layer
    most = int(min(machine.free_memory(str(model.lm_head.weight.device)) / 2, 1e15) // size)
    if most < c.block_size:
        note(f"block_size={most:,} instead of {c.block_size:,}: half of the free memory holds no more")
    return min(c.block_size, most)


@torch.inference_mode()
def total_loss(model, ids, block_size, stride, batch_size, processes):
    """The sum of -ln p over all tokens but the first, in nats. ids: (N,) int64.

    A window of block_size tokens moves on by `stride`, and predicts the new ones. They have at least
    block_size - stride tokens before them: a small stride is fairer to the model, and takes longer.
    """
    ids, device = np.asarray(ids), model.lm_head.weight.device
    windows = 1 + math.ceil(max(0, len(ids) - 1 - block_size) / stride)
    starts = range(0, windows * stride, stride)
    progress = Progress("predicting", windows, unit="windows")

    def batch(number):
        """Batch `number` of the windows, (idx, targets). Targets that the window before has predicted are -1."""
        parts = []
        for start in starts[number * batch_size:][:batch_size]:
            part = ids[start:start + block_size + 1]
            new = (np.arange(len(part) - 1) >= block_size - stride) | (start == 0)
            parts.append((part, new))
        return to_batch(parts, max(len(new) for _, new in parts))  # a short text costs no whole context

    def loss_of(idx, targets):
        """The mean in float64, by way of the logits, which 8-bit models have too."""
        predicted = targets >= 0
        x = model.trunk(idx.to(device))[predicted.to(device)]  # (n, C)
        targets = targets[predicted].to(device)  # (n,)
        size = max(1, (1 << 24) // model.config.vocab_size)  # logits of a large vocabulary fill the memory
        nats = 0.0
        for some, due in zip(x.split(size), targets.split(size)):
            logits = model.logits(some).float()  # (size, vocab_size)
            nats += F.cross_entropy(logits, due, reduction="none").double().sum().item()
        return nats / len(targets)

    batches = math.ceil(windows / batch_size)
    return validation_sums(loss_of, batch, batches, processes, lambda number: progress.tell(number * batch_size))[0]


def measure_text(model, tokenizer, text, block_size=0, stride=0, batch_size=0, processes=None):
    """The numbers of a model on a Text. block_size: 0 for its context; stride: 0 for block_size.

    Raises UserError where the text is too short, the context too long, or a character has no token.
    """
    counts, context = text.counts(), model.config.block_size
    block_size = block_size or longest_context(model)
    stride = stride or block_size
    if not stride <= block_size <= context:
        raise UserError(f"stride={stride}, block_size={block_size}, context={context}: none may exceed the next",
                        f"--block_size={context}, or a smaller --stride")
    ids = text.ids(tokenizer)
    if len(ids) < 2 or not counts["bytes"]:
        raise UserError(f"{text.name} is too short: {counted(counts['bytes'], 'byte')}, "
                        f"{counted(len(ids), 'token')}", "a longer text")
    batch_size = batch_size or max(1, 4096 // block_size)
    nats = total_loss(model, ids, block_size, stride, batch_size, processes or Processes())
    if not math.isfinite(nats):
        raise UserError("its loss is not a finite number", "--dtype=float32, or another checkpoint")
    return dict(bits_per_byte=nats / math.log(2) / counts["bytes"], perplexity=power(nats, len(ids) - 1),
                word_perplexity=power(nats, counts["words"]), tokens=len(ids), **counts, block_size=block_size,
                stride=stride)


def power(nats, n):
    """e to the mean of n, or None where it overflows: without spaces, a word is a sentence."""
    return math.exp(nats / n) if n and nats / n < 709 else None

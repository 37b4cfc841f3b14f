# SPDX-License-Identifier: GPL-3.0-only
"""
The whole idea of a GPT in one file of plain arithmetic: no layers, no optimizer class, nothing for speed.

    python plain.py                                  # in under a minute: a small model learns from Python's library
    python plain.py --n_embd=128 --max_iters=1000    # every setting below can be given
    python -m bench parity --peer=plain.py           # train.py computes the same losses, up to the rounding of float32

A GPT reads a text and predicts, at every position, the token that comes next. Here a token is a character. Read from
top to bottom, in the order of a lecture: text becomes numbers, numbers become predictions, a loss says how wrong they
are, every weight takes a step that makes the loss smaller, and at the end the model writes. Only the gradient is left
to PyTorch: loss.backward() applies the chain rule to all that was computed.

model.py and train.py do the same fast, and the tests compare them with this file.
B, T, C, V in the comments: batch, time (positions), channels (n_embd), vocabulary.
"""
import ast
import math
import os
import sys
import time
from dataclasses import dataclass

import numpy
import torch

# ---------------------------------------------------------------------------------------------------------------------
# Settings, with nanoGPT's names; --name=value changes one

dataset = ""  # a folder data/NAME of token ids, see prepare.py; by default some files of Python's library
block_size = 64  # T: as far as the model looks back
n_layer = 2
n_head = 4
n_embd = 64  # C
batch_size = 12  # B
gradient_accumulation_steps = 1  # batches of a step
max_iters = 600
learning_rate = 1e-2
min_lr = 1e-3
warmup_iters = 20
lr_decay_iters = 0  # 0: max_iters
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.99
grad_clip = 1.0
log_interval = 50
seed = 1337


# ---------------------------------------------------------------------------------------------------------------------
# 1. Text becomes numbers


def load_tokens():
    """(ids to train on, ids to validate on, the character of each id): the last tenth of the text is for validation."""
    if dataset:
        ids = {}
        for split in ("train", "val"):
            path = os.path.join("data", dataset, f"{split}.bin")
            ids[split] = torch.from_numpy(numpy.fromfile(path, numpy.uint16).astype(numpy.int64))
        return ids["train"], ids["val"], []
    text = ""
    for name in ("argparse", "ast", "calendar", "difflib", "heapq", "random", "statistics", "textwrap"):
        with open(os.path.join(os.path.dirname(os.__file__), f"{name}.py"), encoding="utf-8") as file:
            text += file.read()
    characters = sorted(set(text))
    id_of = {character: i for i, character in enumerate(characters)}
    ids = torch.tensor([id_of[character] for character in text])
    border = len(ids) * 9 // 10
    return ids[:border], ids[border:], characters


def get_batch(ids):
    """Windows of the text: (inputs, targets), (B, T) each. The target of a token is the token after it."""
    starts = torch.randint(len(ids) - block_size, (batch_size,))  # (B,)
    windows = torch.stack([ids[start:start + block_size + 1] for start in starts])  # (B, T + 1)
    return windows[:, :-1], windows[:, 1:]


# ---------------------------------------------------------------------------------------------------------------------
# 2. Numbers become predictions


def softmax(x):
    """Any numbers become probabilities: positive, with the sum 1. (In float32, exp would need the maximum taken off.)
    """
    powers = x.exp()
    return powers / powers.sum(-1, keepdim=True)


def norm(x, weight):
    """LayerNorm (Ba 2016, arXiv 1607.06450): every vector gets mean 0 and variance 1, times a weight per channel."""
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred ** 2).mean(-1, keepdim=True)
    return centred / (variance + 1e-5).sqrt() * weight


def gelu(x):
    """x times the probability that a normal number is below x (Hendrycks and Gimpel 2016, arXiv 1606.08415)."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def attention(q, k, v):
    """One head (Vaswani 2017, arXiv 1706.03762): softmax(q k^T / sqrt(head_dim)) v. q, k, v: (B, T, head_dim).

    Every position compares its query with the keys of all positions and takes the mean of their values, weighted by how
    well they match. The future is masked: nothing may be predicted from what is to be predicted.
    """
    T, head_dim = q.shape[1:]
    scores = q @ k.transpose(1, 2) / math.sqrt(head_dim)  # (B, T, T)
    future = torch.ones(T, T).triu(1).bool()  # (T, T), true where the key comes after the query
    return softmax(scores.masked_fill(future, -math.inf)) @ v  # (B, T, head_dim)


@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    bias: bool = False  # GPT-2 adds biases; without them this file is shorter and a model as good


class GPT:
    """GPT-2 (Radford 2019) with its names: wte and wpe, the vectors of tokens and positions, h, the blocks."""

    def __init__(self, config):
        assert not config.bias, "plain.py has no biases; --bias=False"
        self.config = config
        C = config.n_embd
        shapes = {"transformer.wte.weight": (config.vocab_size, C), "transformer.wpe.weight": (config.block_size, C)}
        for i in range(config.n_layer):
            shapes[f"transformer.h.{i}.ln_1.weight"] = (C,)
            shapes[f"transformer.h.{i}.attn.c_attn.weight"] = (3 * C, C)  # query, key and value in one matrix
            shapes[f"transformer.h.{i}.attn.c_proj.weight"] = (C, C)
            shapes[f"transformer.h.{i}.ln_2.weight"] = (C,)
            shapes[f"transformer.h.{i}.mlp.c_fc.weight"] = (4 * C, C)
            shapes[f"transformer.h.{i}.mlp.c_proj.weight"] = (C, 4 * C)
        shapes["transformer.ln_f.weight"] = (C,)
        self.weights = {}
        for name, shape in shapes.items():
            # Norms begin with 1, matrices at random, such that a product has the size of its inputs (LeCun 1998).
            start = torch.ones(shape) if len(shape) == 1 else torch.randn(shape) / math.sqrt(shape[-1])
            self.weights[name] = start.requires_grad_()

    def logits(self, idx):
        """Token ids (B, T) -> for every position, how likely each token comes next, before the softmax (B, T, V)."""
        w = self.weights
        # The residual stream: a vector per position, to which every part of every block adds something.
        x = w["transformer.wte.weight"][idx] + w["transformer.wpe.weight"][:idx.size(1)]  # (B, T, C)
        for i in range(self.config.n_layer):
            block = f"transformer.h.{i}."
            # Attention: positions read from each other, with several heads that look for different things.
            qkv = norm(x, w[block + "ln_1.weight"]) @ w[block + "attn.c_attn.weight"].T  # (B, T, 3 C)
            q, k, v = (part.chunk(self.config.n_head, dim=-1) for part in qkv.chunk(3, dim=-1))  # n_head parts each
            heads = [attention(*head) for head in zip(q, k, v)]  # (B, T, head_dim) each
            x = x + torch.cat(heads, dim=-1) @ w[block + "attn.c_proj.weight"].T  # (B, T, C)
            # The MLP: every position works on what it has read.
            hidden = gelu(norm(x, w[block + "ln_2.weight"]) @ w[block + "mlp.c_fc.weight"].T)  # (B, T, 4 C)
            x = x + hidden @ w[block + "mlp.c_proj.weight"].T  # (B, T, C)
        # The vectors that read the tokens also predict them (Press and Wolf 2016, arXiv 1608.05859).
        return norm(x, w["transformer.ln_f.weight"]) @ w["transformer.wte.weight"].T  # (B, T, V)

    def forward(self, idx, targets):
        logits = self.logits(idx)
        return logits, cross_entropy(logits, targets)

    @torch.no_grad()
    def generate(self, idx, n, temperature=1.0, top_k=40):
        """Continue idx (B, T) by n tokens, each sampled from the top_k most likely (Fan 2018, arXiv 1805.04833)."""
        for _ in range(n):
            logits = self.logits(idx[:, -self.config.block_size:])[:, -1]  # (B, V): what comes after the last token
            values, ids = logits.topk(min(top_k, logits.size(-1)))  # (B, top_k) each
            chosen = torch.multinomial(softmax(values / temperature), 1)  # (B, 1)
            idx = torch.cat((idx, ids.gather(1, chosen)), dim=1)
        return idx


# ---------------------------------------------------------------------------------------------------------------------
# 3. How wrong is a prediction?


def cross_entropy(logits, targets):
    """The mean of -ln p(target), in nats (Shannon 1948). Guessing among V tokens costs ln V, certainty costs 0."""
    probability = softmax(logits).gather(-1, targets[..., None])  # (B, T, 1)
    return -probability.log().mean()


# ---------------------------------------------------------------------------------------------------------------------
# 4. Every weight takes a step


def learning_rate_at(step):
    """Up in a line, for the first gradients are wild, then down along half a cosine (arXiv 1608.03983)."""
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    last = lr_decay_iters or max_iters
    progress = min(1.0, (step - warmup_iters) / max(1, last - warmup_iters))
    return min_lr + (learning_rate - min_lr) * (1 + math.cos(math.pi * progress)) / 2


def clip_grad_norm_(weights, limit):
    """Shorten the gradient, all of it as one vector, to `limit` (Pascanu 2013, arXiv 1211.5063). Returns its length."""
    length = sum((w.grad ** 2).sum() for w in weights).sqrt()
    for w in weights:
        w.grad *= min(1.0, limit / length)
    return length


@torch.no_grad()
def adamw(w, mean, square, step, rate):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) for one tensor.

    A weight moves by about `rate`, against the running mean of its gradient divided by the root of the running mean of
    its square. Both begin at 0, which the powers of beta correct. Matrices also shrink a little.
    """
    mean.copy_(beta1 * mean + (1 - beta1) * w.grad)
    square.copy_(beta2 * square + (1 - beta2) * w.grad ** 2)
    direction = mean / (1 - beta1 ** (step + 1))
    size = (square / (1 - beta2 ** (step + 1))).sqrt() + 1e-8
    decay = weight_decay * w if w.dim() == 2 else 0.0
    w -= rate * (direction / size + decay)
    w.grad = None


def train(model, ids):
    means = {name: torch.zeros_like(w) for name, w in model.weights.items()}
    squares = {name: torch.zeros_like(w) for name, w in model.weights.items()}
    for step in range(max_iters + 1):
        started = time.perf_counter()
        for _ in range(gradient_accumulation_steps):
            _, loss = model.forward(*get_batch(ids))
            (loss / gradient_accumulation_steps).backward()  # gradients add up
        clip_grad_norm_(model.weights.values(), grad_clip)
        for name, w in model.weights.items():
            adamw(w, means[name], squares[name], step, learning_rate_at(step))
        if step % log_interval == 0:
            milliseconds = 1000 * (time.perf_counter() - started)
            print(f"iter {step}: loss {loss.item():.4f}, time {milliseconds:.2f}ms", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# 5. All of it


@torch.no_grad()
def validate(model, ids, batches=20):
    losses = [model.forward(*get_batch(ids))[1].item() for _ in range(batches)]
    return sum(losses) / batches


def main():
    for argument in sys.argv[1:]:
        name, _, value = argument.removeprefix("--").partition("=")
        if name not in globals():  # nanoGPT's others: device, dropout, compile, ...
            print(f"plain.py does without {name}")
        elif name == "dataset":
            globals()[name] = value
        else:
            globals()[name] = ast.literal_eval(value)
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.float64)  # what differs from model.py is then the rounding of float32 there
    ids, validation_ids, characters = load_tokens()
    vocab_size = 1 + max(ids.max().item(), validation_ids.max().item())
    model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd))
    train(model, ids)
    print(f"validation loss {validate(model, validation_ids):.4f}, a guess would have {math.log(vocab_size):.4f}")
    if characters:
        prompt = torch.tensor([[characters.index(character) for character in "    def "]])
        written = model.generate(prompt, 300, temperature=0.8)[0].tolist()
        print("".join(characters[i] for i in written))
    return model


if __name__ == "__main__":
    main()

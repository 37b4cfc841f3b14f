# SPDX-License-Identifier: GPL-3.0-only
"""
The whole idea of a GPT in one file: tensors and functions, no nn.Module, no optimizer
class, no speed tricks.

    python plain.py                                  # a small model learns from Python's standard library
    python plain.py --n_embd=128 --max_iters=1000
    python -m bench parity --peer=plain.py           # given train.py's weights and batches: are the losses the same?

A GPT predicts, at every position of a text, the next token, here a character. Text
becomes numbers, numbers become predictions, a loss says how wrong they are, and every
weight takes a step that makes the loss smaller. PyTorch provides the tensor operations
and computes the gradient.

B, T, C, V in the comments: batch, time (positions), channels (n_embd), vocabulary.
"""
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

# Settings. Each is also an argument: --n_embd=128.

dataset = ""  # data/NAME, of text with a small vocabulary (uint16); by default, files of Python's standard library
block_size = 64  # T
n_layer = 2
n_head = 4
n_embd = 64  # C
batch_size = 12  # B
gradient_accumulation_steps = 1  # batches per step
max_iters = 600
learning_rate = 1e-2
min_lr = 1e-3
warmup_iters = 20  # steps in which the rate rises to learning_rate
lr_decay_iters = 0  # step at which the rate reaches min_lr; 0: max_iters
weight_decay = 0.1  # how strongly matrices are pulled towards 0
beta1 = 0.9  # AdamW averages the gradient over about 1 / (1 - beta1) steps
beta2 = 0.99  # and its square over 1 / (1 - beta2)
grad_clip = 1.0  # a longer gradient is scaled down to this length
log_interval = 50
seed = 1337


# 1. Text becomes numbers

LIBRARY = "argparse", "ast", "calendar", "difflib", "heapq", "random", "statistics", "textwrap"


def read_ids(split):
    return torch.from_numpy(numpy.fromfile(f"data/{dataset}/{split}.bin", numpy.uint16)).long()


def load_tokens():
    """(ids to train on, ids to validate on, the character of each id)."""
    if dataset:
        return read_ids("train"), read_ids("val"), []
    # 1) A text that comes with Python: eight files of its standard library.
    library = Path(os.__file__).parent
    text = "".join((library / f"{name}.py").read_text(encoding="utf-8") for name in LIBRARY)
    # 2) The vocabulary: an id for every character that occurs.
    characters = sorted(set(text))
    id_of = {character: i for i, character in enumerate(characters)}
    ids = torch.tensor([id_of[character] for character in text])
    # 3) The last tenth is not trained on: only a text that the model has not seen
    #    shows what it has learned.
    border = len(ids) * 9 // 10
    return ids[:border], ids[border:], characters


def get_batch(ids):
    """Windows of the text: (inputs, targets), (B, T) each. The targets are one token later.

    For inputs "def f(" the targets are "ef f(x": each position is a task of its own,
    and one forward pass does all T.
    """
    starts = torch.randint(len(ids) - block_size, (batch_size,))  # (B,)
    windows = torch.stack([ids[start:start + block_size + 1] for start in starts])  # (B, T + 1)
    return windows[:, :-1], windows[:, 1:]


# 2. Numbers become predictions


def softmax(x):
    """Numbers become probabilities: positive, with the sum 1."""
    # In float32, exp overflows above 88, so one first subtracts the maximum, which
    # cancels in the division. `main` chooses float64, where the limit is 709, so plain
    # exp will do.
    powers = x.exp()
    return powers / powers.sum(-1, keepdim=True)


def norm(x, weight):
    """LayerNorm (Ba 2016, arXiv 1607.06450): mean 0 and variance 1, times a weight per channel."""
    # Every block adds to x (the residual stream, in GPT.logits), so its numbers grow. A
    # norm brings them back to one scale.
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred ** 2).mean(-1, keepdim=True)
    return centred / (variance + 1e-5).sqrt() * weight


def gelu(x):
    """x times the probability that a standard normal variable is below x (arXiv 1606.08415)."""
    # Without a nonlinearity, the two matrices of the MLP (multilayer perceptron)
    # would be one.
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def attention(q, k, v):
    """One head (Vaswani 2017, arXiv 1706.03762): softmax(q k^T / sqrt(head_dim)) v.

    From the vector of each position come three: a query (what it looks for), a key
    (what it can be found by) and a value (what it passes on). Every position takes a
    weighted mean of the values up to its own: the better its query matches a key, the
    greater the weight. Later positions are masked, since they are what is to be
    predicted. q, k, v: (B, T, head_dim).
    """
    T, head_dim = q.shape[1:]
    # 1) How well does each query match each key? A score is a sum of head_dim
    #    products, so its variance is about head_dim; divided by the root, about 1.
    #    With large scores, one position would get all the weight.
    scores = q @ k.transpose(1, 2) / math.sqrt(head_dim)  # (B, T, T)
    # 2) Row i may not see column j > i. exp(-inf) is 0, so the future has no weight.
    future = torch.ones(T, T).triu(1).bool()  # (T, T)
    weights = softmax(scores.masked_fill(future, -math.inf))  # (B, T, T), each row has the sum 1
    # 3) The mean of the values with these weights.
    return weights @ v  # (B, T, head_dim)


@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    bias: bool = False  # not read: bench/ makes this config as it makes nanoGPT's


class GPT:
    """A GPT in the shape of GPT-2 (Radford 2019), without biases. The weights have GPT-2's names.

    wte has the vectors of tokens, wpe of positions, h the blocks. The c_ in c_attn,
    c_proj and c_fc once meant convolution; they are plain matrices.
    """

    def __init__(self, config):
        self.config = config
        C = config.n_embd
        shapes = {"wte": (config.vocab_size, C), "wpe": (config.block_size, C)}
        for i in range(config.n_layer):
            block = f"h.{i}."
            shapes[block + "ln_1"] = (C,)
            shapes[block + "attn.c_attn"] = (3 * C, C)  # query, key, value
            shapes[block + "attn.c_proj"] = (C, C)
            shapes[block + "ln_2"] = (C,)
            shapes[block + "mlp.c_fc"] = (4 * C, C)
            shapes[block + "mlp.c_proj"] = (C, 4 * C)
        shapes["ln_f"] = (C,)
        self.weights = {}
        for name, shape in shapes.items():
            if len(shape) == 1:
                initial = torch.ones(shape)  # the weights of a norm
            else:
                # Scaled by 1 / sqrt(inputs), a random matrix keeps the magnitude of the
                # vectors that it multiplies (LeCun 1998). (wte is a matrix product only
                # at the end, where it predicts the tokens: see `logits`. wpe is only
                # looked up, so it need only be small.)
                initial = torch.randn(shape) / math.sqrt(shape[-1])
            # Named as in model.py, so that weights can be copied.
            self.weights[f"transformer.{name}.weight"] = initial.requires_grad_()

    def logits(self, idx):
        """Token ids (B, T) -> how likely each token is next, before the softmax (B, T, V)."""
        w = self.weights
        # The residual stream: a vector per position, to which every block adds
        # something.
        x = w["transformer.wte.weight"][idx] + w["transformer.wpe.weight"][:idx.size(1)]  # (B, T, C)
        for i in range(self.config.n_layer):
            block = f"transformer.h.{i}."
            # Attention: each position reads from itself and those before it; every head
            # looks for something different.
            qkv = norm(x, w[block + "ln_1.weight"]) @ w[block + "attn.c_attn.weight"].T  # (B, T, 3 C)
            q, k, v = qkv.chunk(3, dim=-1)  # (B, T, C) each
            pieces = [whole.chunk(self.config.n_head, dim=-1) for whole in (q, k, v)]  # n_head of each
            heads = [attention(*qkv_of_head) for qkv_of_head in zip(*pieces)]  # (B, T, head_dim) each
            # Adding, not replacing, lets the gradient pass through every block unchanged
            # (He 2015, arXiv 1512.03385).
            x = x + torch.cat(heads, dim=-1) @ w[block + "attn.c_proj.weight"].T  # (B, T, C)
            # The MLP: every position works on what it has read.
            hidden = gelu(norm(x, w[block + "ln_2.weight"]) @ w[block + "mlp.c_fc.weight"].T)  # (B, T, 4 C)
            x = x + hidden @ w[block + "mlp.c_proj.weight"].T  # (B, T, C)
        # Weight tying: the matrix that embeds tokens also predicts them (Press 2016,
        # arXiv 1608.05859).
        return norm(x, w["transformer.ln_f.weight"]) @ w["transformer.wte.weight"].T  # (B, T, V)

    def forward(self, idx, targets):
        logits = self.logits(idx)
        return logits, cross_entropy(logits, targets)

    @torch.no_grad()
    def generate(self, idx, n, temperature=1.0, top_k=40):
        """Continue idx (B, T) by n tokens, each sampled from the top_k most likely (arXiv 1805.04833).

        A temperature below 1 makes likely tokens likelier still.
        """
        for _ in range(n):
            # The whole context is read again for each token. model.py keeps keys and
            # values instead.
            logits = self.logits(idx[:, -self.config.block_size:])[:, -1]  # (B, V), of the last position
            best, ids = logits.topk(min(top_k, logits.size(-1)))  # (B, top_k) each
            chosen = torch.multinomial(softmax(best / temperature), 1)  # (B, 1)
            idx = torch.cat((idx, ids.gather(1, chosen)), dim=1)
        return idx


# 3. How wrong is a prediction?


def cross_entropy(logits, targets):
    """The mean of -ln p(target), in nats (Shannon 1948); a bit is ln 2 nats.

    Guessing evenly costs ln V; being certain and right costs 0.
    """
    # Of all V probabilities at a position, that of the token which really came.
    probability = softmax(logits).gather(-1, targets[..., None])  # (B, T, 1)
    return -probability.log().mean()


# 4. Every weight takes a step


def learning_rate_at(step):
    """Linear warm-up, then down half a cosine to min_lr (Loshchilov 2016, arXiv 1608.03983)."""
    # The first gradients, of random weights, are large and erratic.
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    last = lr_decay_iters or max_iters
    progress = min(1.0, (step - warmup_iters) / max(1, last - warmup_iters))
    return min_lr + (learning_rate - min_lr) * (1 + math.cos(math.pi * progress)) / 2


def clip_grad_norm_(weights, limit):
    """Scale a gradient that is longer than `limit` to that length (Pascanu 2013, arXiv 1211.5063).

    Returns its length before.
    """
    length = sum((w.grad ** 2).sum() for w in weights).sqrt()
    for w in weights:
        w.grad *= min(1.0, limit / length)
    return length


@torch.no_grad()
def adamw(w, mean, mean_square, step, rate):
    """AdamW (Loshchilov 2019, arXiv 1711.05101) for one tensor.

    A weight moves against mean / sqrt(mean_square), the running means of the gradient
    and of the gradient squared. Matrices also shrink a little.
    """
    # 1) The running means.
    mean.copy_(beta1 * mean + (1 - beta1) * w.grad)
    mean_square.copy_(beta2 * mean_square + (1 - beta2) * w.grad ** 2)
    # 2) They began at 0, so after s = step + 1 steps, this one included, they are only
    #    1 - beta^s times what they should be.
    direction = mean / (1 - beta1 ** (step + 1))
    size = (mean_square / (1 - beta2 ** (step + 1))).sqrt() + 1e-8
    # 3) The step. While a gradient stays the same, direction / size is 1 or -1: the
    #    weight moves by `rate`.
    decay = weight_decay * w if w.dim() == 2 else 0.0
    w -= rate * (direction / size + decay)


def train(model, ids):
    weights = model.weights.values()
    states = [(torch.zeros_like(w), torch.zeros_like(w)) for w in weights]
    for step in range(max_iters + 1):  # max_iters + 1 steps, as in nanoGPT; train.py makes max_iters
        started = time.perf_counter()
        # 1) The gradient: how the loss changes with each weight, computed backwards
        #    by the chain rule.
        for _ in range(gradient_accumulation_steps):
            _, loss = model.forward(*get_batch(ids))
            (loss / gradient_accumulation_steps).backward()  # gradients add up
        # 2) Now and then a batch has a huge gradient; it must not ruin the weights.
        clip_grad_norm_(weights, grad_clip)
        # 3) The step. The next one starts without a gradient.
        for w, (mean, mean_square) in zip(weights, states):
            adamw(w, mean, mean_square, step, learning_rate_at(step))
            w.grad = None
        if step % log_interval == 0:
            took = time.perf_counter() - started
            print(f"iter {step}: loss {loss:.4f}, time {1000 * took:.2f}ms", flush=True)


# 5. All of it


def main():
    if "--help" in sys.argv:
        print(__doc__)
        return None
    # 1) Settings from the command line. A command line for nanoGPT works here too:
    #    names that are unknown are reported and skipped.
    for argument in sys.argv[1:]:
        name, _, value = argument.removeprefix("--").partition("=")
        if name in globals():
            globals()[name] = type(globals()[name])(value)
        else:
            print(f"plain.py ignores {name}")
    # 2) The same random numbers in every run; float64, so that rounding here does not
    #    hide a difference from train.py.
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.float64)
    ids, validation_ids, characters = load_tokens()
    vocab_size = 1 + int(max(ids.max(), validation_ids.max()))
    model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd))
    train(model, ids)
    # 3) How good is it on a text that it has not seen (20 batches are an estimate),
    #    and what does it write?
    with torch.no_grad():
        loss = sum(model.forward(*get_batch(validation_ids))[1] for _ in range(20)) / 20
    print(f"validation loss {loss:.4f} (guessing: {math.log(vocab_size):.4f})")
    if characters:
        prompt = torch.tensor([[characters.index(character) for character in "    def "]])
        written = model.generate(prompt, 300, temperature=0.8)[0]
        print("".join(characters[i] for i in written))
    return model


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: GPL-3.0-only
"""
Where does the memory of training go?

    parts = training_memory(model, batch_size=8, width=2, optimizer_bytes=8)  # {"weights": 143294464, ...}

Weights, gradients and the averages of the optimizer take a few times the size of the model. Most of the rest are
activations: what the forward pass of a micro-batch leaves for the backward pass. So half the batch_size with twice
the gradient_accumulation_steps, which trains the same, takes about half the memory.
"""
from model import CHUNK_LOGITS, MOST_SCORES
from runtime import machine
from runtime.console import say, warn


def training_memory(model, batch_size, width, optimizer_bytes):
    """Bytes, within a quarter. width: bytes of a number in matrix products. optimizer_bytes: per weight."""
    c = model.config
    tokens = batch_size * c.block_size
    weights = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # What a layer keeps of a token: inputs and outputs of matrix products, and in float32 of the norms.
    attention = 8 * c.n_head * c.head_dim
    if tokens * c.n_head * c.block_size <= MOST_SCORES:
        attention += c.n_head * c.block_size  # the scores, where attention is computed by its formula
    mlp = c.n_inner * {"swiglu": 4, "gelu": 2, "gelu_exact": 2}[c.mlp]
    norms = c.n_embd * {"rmsnorm": 5, "layernorm": 2}[c.norm]
    layer = width * (attention + mlp) + 4 * norms
    # Copies of the weights in the dtype of the products, unless that is their own, float32.
    copies = weights * width
    if width == 4:
        copies = 0
    return dict(weights=4 * weights, gradients=4 * trained, optimizer=optimizer_bytes * trained,
                activations=tokens * c.n_layer * layer + copies,
                logits=min(tokens * c.vocab_size, CHUNK_LOGITS) * (2 * width + 12))


def say_memory(run):
    """About what training will take, and what there is."""
    optimizer_bytes = 4 if run.settings.optimizer == "muon" else 8  # one average of each gradient, or two
    needed = sum(training_memory(run.model, run.batch_size, run.dtype.itemsize, optimizer_bytes).values())
    free = machine.free_memory(run.device)
    if run.device == "cpu":
        needed *= run.ranks.local_world  # all processes take it from the same memory
    say(f"memory: about {needed / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free")
    if needed > free:
        warn("this may not fit; halve --batch_size and double --gradient_accumulation_steps")

# SPDX-License-Identifier: GPL-3.0-only
"""
One batch and one prompt through the code, with every tensor in numbers: the blocks of docs/walkthrough.md.

    python -m bench walkthrough

The model is real but tiny: one block, two heads, four channels, a few hundred parameters.
"""
import contextlib
import io
import math
import os
import tempfile
from dataclasses import dataclass

import torch
from torch.nn import functional as F

import dataset
import prepare
import sample
import train
from model import GPT, KVCache

TEXT = "the cat sat on the mat\nthe rat sat on the hat\n" * 40
STEPS = 400


@dataclass
class Settings:
    pass


def main(settings, _):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "cats.txt")
        with open(path, "w", encoding="utf-8") as file:
            file.write(TEXT)
        out = os.path.join(folder, "data")
        with contextlib.redirect_stderr(io.StringIO()):
            prepare.main([path, f"--out={out}", "--tokenizer=char", "--val_fraction=0.1"])
        data = dataset.Dataset.open(out)
        tokenizer = data.load_tokenizer()
    torch.manual_seed(0)
    model = walk_a_batch(data, tokenizer)
    walk_a_prompt(model, tokenizer)
    return 0


def title(text):
    print(f"\n# {text}")


def write(name, tensor, decimals=2):
    """Print a tensor: its name, its shape, and each row of it on a line."""
    print(f"{name}  {tuple(tensor.shape)}")
    for row in tensor.reshape(-1, tensor.shape[-1]).tolist():
        print("   ", " ".join(f"{value:{decimals + 4}.{decimals}f}" if isinstance(value, float) else f"{value:3}"
                              for value in row))


def walk_a_batch(data, tokenizer):
    settings = train.TrainConfig(
        n_layer=1, n_head=2, n_embd=4, block_size=8, vocab_size=tokenizer.vocab_size, batch_size=2,
        learning_rate=0.03, min_lr=0.003, warmup_iters=20, max_iters=STEPS)

    title("1. Text becomes ids")
    print("text   ", repr(TEXT[:22]))
    print("ids    ", *tokenizer.encode(TEXT[:22]))
    print("train.bin begins with", *data.read_ids("train", 0, 12), "(end of text, then the text)")

    title("2. Ids become a batch")
    idx, targets = data.batch(settings.block_size, settings.batch_size, seed=1, step=0)
    write("idx", idx)
    write("targets", targets)
    print("row 0 reads", repr(tokenizer.decode(idx[0].tolist())), "and predicts",
          repr(tokenizer.decode(targets[0].tolist())))

    title("3. The model")
    model = GPT(settings)
    for name, p in model.named_parameters():
        print(f"{name:34} {str(tuple(p.shape)):10}")
    print(f"{model.n_params()} parameters, without the padding of the vocabulary to {len(model.lm_head.weight)} rows")

    title("4. Ids become logits, and logits a loss")
    show_forward(model, idx, targets)

    title("5. One step")
    optimizers = train.make_optimizers(model, settings, "cpu")
    watched = model.transformer.h[0].attn.c_attn.weight
    for step in range(STEPS):
        factor = train.learning_rate_factor(step, settings, STEPS)
        for optimizer, peak_rate in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak_rate * factor
        idx, targets = data.batch(settings.block_size, settings.batch_size, seed=1, step=step)
        loss = model(idx, targets)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        before = watched[0, 0].item()
        gradient = watched.grad[0, 0].item()
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step == 0:
            print(f"norm of the gradient {norm:.2f}, learning rate {settings.learning_rate * factor:.4f}")
            print(f"h.0.attn.c_attn.weight[0, 0]: gradient {gradient:+.4f}, {before:+.4f} -> {watched[0, 0]:+.4f}")
            print(f"loss of this batch {loss:.3f} -> {model(idx, targets):.3f}")
    print(f"after {STEPS} steps: loss {loss:.2f}")
    model.eval()
    return model


def show_forward(model, idx, targets):
    """GPT.forward in single steps; of most tensors the first row of the batch, with a position on each line."""
    transformer, block = model.transformer, model.transformer.h[0]
    with torch.no_grad():
        x = transformer.wte(idx) + transformer.wpe.weight[:idx.size(1)]
        print(f"x = wte[idx] + wpe  {tuple(x.shape)}: B, T, C")
        write("x[0]", x[0], 3)
        show_attention(block, x)
        x = x + block.attn(block.ln_1(x))
        x = x + block.mlp(block.ln_2(x))
        write("x[0] after the block", x[0], 3)
        logits = model.logits(x)
        print(f"logits = ln_f(x) wte^T  {tuple(logits.shape)}: B, T, vocab_size")
        probability = logits.softmax(dim=-1).gather(-1, targets[..., None])[..., 0]
        write("the probability of each target", probability, 3)
        loss = -probability.log().mean()
        print(f"loss = mean of -ln p = {loss:.3f}; guessing has ln {logits.size(-1)} = {math.log(logits.size(-1)):.3f}")
        assert torch.isclose(loss, model(idx, targets), atol=1e-4)


def show_attention(block, x):
    """Attention up to its weights: with which the first head averages, in the first row of the batch."""
    attn = block.attn
    B, T, _ = x.shape
    heads = attn.c_attn(block.ln_1(x)).view(B, T, -1, attn.head_dim).transpose(1, 2)
    q, k, v = heads.split((attn.n_head, attn.n_kv_head, attn.n_kv_head), dim=1)
    print(f"q, k, v  {tuple(q.shape)} each: B, n_head, T, head_dim")
    scores = q @ k.transpose(-2, -1) / attn.head_dim ** 0.5  # (B, n_head, T, T)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
    write("softmax(q k^T / sqrt(head_dim))[0, 0]", weights[0, 0])


def walk_a_prompt(model, tokenizer):
    prompt = tokenizer.encode("the ")

    title("6. A prompt is read")
    idx = torch.tensor([prompt])  # (1, T)
    print("prompt 'the ' is", *prompt)
    with torch.no_grad():
        x = model.transformer.wte(idx) + model.transformer.wpe.weight[:len(prompt)]
        show_attention(model.transformer.h[0], x)
        cache = KVCache(model.config, batch_size=1)
        logits = model(idx, cache=cache)[:, -1]  # (1, vocab_size)
    print(f"keys in the cache {tuple(cache.k.shape)}: n_layer, B, n_kv_head, capacity, head_dim; {cache.length} in use")

    title("7. Logits become a token")
    show_likeliest(tokenizer, "softmax(logits)", logits)
    settings = sample.Sampling(temperature=0.8, top_k=3)
    cdf, ids = sample.candidates(logits, settings)  # (1, 3) each
    print("temperature 0.8, top_k 3:", *[repr(tokenizer.decode([i])) for i in ids[0].tolist()])
    write("their cumulative distribution", cdf)
    pick = sample.Sampler(settings, prompt, seed=1)
    token = pick(logits)
    print("sampled:", repr(tokenizer.decode(token.tolist())))

    title("8. And so on, a token at a time")
    with torch.no_grad():
        logits = model(token[:, None], cache=cache)[:, -1]
    print(f"only the new token is read: {tuple(token[:, None].shape)}; {cache.length} positions in the cache")
    show_likeliest(tokenizer, "softmax(logits)", logits)
    pick = sample.Sampler(settings, prompt, seed=1)
    ids = [token.item() for token in model.generate(torch.tensor([prompt]), 40, pick)]
    print("40 tokens:", repr("the " + tokenizer.decode(ids)))


def show_likeliest(tokenizer, name, logits, n=4):
    found = F.softmax(logits[0], dim=-1).topk(n)
    parts = [f"{tokenizer.decode([i])!r} {p:.2f}" for p, i in zip(found.values.tolist(), found.indices.tolist()) if p]
    print(f"{name}: {', '.join(parts)}")

# SPDX-License-Identifier: GPL-3.0-only
"""
Reading an export back: how other people's programs do it, one function per format.

    step = open_onnx("exports/small/model.onnx")
    ids = greedy(step, torch.tensor([[1, 2, 3]]), 50)       # the 50 likeliest tokens after these three

export.py runs this file in a process of its own (python -I), so nothing of ours is imported here.

A step(idx, past) -> (logits (B, T, vocab_size), past) reads the token ids idx (B, T) after the past, which
is None at first, and then what the step before returned.
"""
import sys

import torch


def open_hugging_face(path):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def step(idx, past):
        out = model(idx, past_key_values=past, use_cache=True)
        return out.logits, out.past_key_values
    return step


def open_gguf(path):
    from pathlib import Path
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM
    fields = GGUFReader(path).fields
    arch = bytes(fields["general.architecture"].parts[-1]).decode()

    def number(name):
        return int(fields[f"{arch}.{name}"].parts[-1][0])

    # transformers does not take these two from the file. (Qwen2's class has no head_dim.)
    more = {}
    if arch == "gpt2":
        more["n_positions"] = number("context_length")
    elif arch != "qwen2":
        more["head_dim"] = number("attention.key_length")
    path = Path(path)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, **more).eval()

    def step(idx, past):
        out = model(idx, past_key_values=past, use_cache=True)
        return out.logits, out.past_key_values
    return step


def open_onnx(path):
    """A graph with a cache: keys and values go in, and come out longer."""
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]  # three, then past_key_values.0.key, ...
    _, heads, _, head_dim = session.get_inputs()[-1].shape

    def step(idx, past):
        B, T = idx.shape
        if past is None:  # a past of length 0
            past = [torch.zeros(B, heads, 0, head_dim).numpy()] * (len(names) - 3)
        before = past[0].shape[2]
        mask = torch.ones(B, before + T, dtype=torch.long)  # no padding
        positions = torch.arange(before, before + T).expand(B, T)
        logits, *present = session.run(None, dict(zip(names, [idx.numpy(), mask.numpy(), positions.numpy(), *past])))
        return torch.from_numpy(logits), present
    return step


def open_torchscript(path):
    return without_cache(torch.jit.load(path))


def open_pt2(path):
    return without_cache(torch.export.load(path).module())


def without_cache(forward):
    """A step for a graph that reads the whole text again each time."""
    def step(idx, past):
        if past is not None:
            idx = torch.cat((past, idx), dim=1)
        return forward(idx), idx
    return step


def greedy(step, prompt, n):
    """The n likeliest tokens (n,) after the prompt (1, T)."""
    tokens, new, past = [], prompt, None
    for _ in range(n):
        logits, past = step(new, past)
        new = logits[:, -1].argmax(dim=-1, keepdim=True)
        tokens.append(new.item())
    return torch.tensor(tokens)


OPEN = {"onnx": open_onnx, "ts": open_torchscript, "pt2": open_pt2, "gguf": open_gguf}  # by the file's ending


@torch.no_grad()
def answer(path, questions):
    """questions: batches [idx (B, T)], the positions [(n,)] of their logits; prompt, n; lines of text.

    Returns logits [(B, n, vocab_size)], tokens (n,), and ids of the lines.
    """
    ending = path.rpartition(".")[2]
    step = OPEN.get(ending, open_hugging_face)(path)
    logits = [step(idx, None)[0][:, at] for idx, at in zip(questions["batches"], questions["positions"])]
    tokens = greedy(step, questions["prompt"], questions["n"])
    ids = None
    if ending not in OPEN:
        from transformers import AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained(path)
        ids = [tokenizer(line, add_special_tokens=False)["input_ids"] for line in questions["lines"]]
    return dict(logits=logits, tokens=tokens, ids=ids)


if __name__ == "__main__":
    path, questions, answers = sys.argv[1:]
    torch.save(answer(path, torch.load(questions, weights_only=True)), answers)

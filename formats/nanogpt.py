# SPDX-License-Identifier: GPL-3.0-only
"""
nanoGPT's checkpoints: out/ckpt.pt, as https://github.com/karpathy/nanoGPT writes it, becomes one of ours.

    checkpoint, tokenizer = convert(state, "out/ckpt.pt")  # state: the dict in the file

The weights have the same names. What the tokens mean is not in it: GPT-2's are known by their number,
characters stand in the meta.pkl beside the data.
"""
import os
import re
from dataclasses import asdict

from torch.nn import functional as F

import tokenizer as tokenizers
from model import GPTConfig, resolve, round_up
from runtime.console import UserError


OTHERS = {  # whose a checkpoint is, by the name of a tensor or of something beside the tensors
    "tok_embeddings.weight": "llama2.c or Meta's Llama", "transformer.h.0.attn.c_q.weight": "nanochat",
    "transformer.h.0.attn.attn.weight": "LitGPT", "transformer.h.0.attn.qkv.weight": "LitGPT",
    "language_model": "Megatron-LM", "embedding.word_embeddings.weight": "Megatron-LM",
    "model.embed_tokens.weight": "transformers", "h.0.attn.c_attn.weight": "transformers",
    "pytorch-lightning_version": "PyTorch Lightning", "code": "modded-nanogpt"}
BUFFERS = (".attn.bias", ".attn.masked_bias")  # masks, which older versions of PyTorch save


def plain_name(name):
    """The name of a tensor without what compiling and several processes put before it."""
    return re.sub(r"^((module|_orig_mod)\.)+", "", str(name))


def refuse_others(state, path):
    """Raises UserError where a .pt file is known to be another project's."""
    names = {plain_name(name) for part in (state, state.get("model", {})) for name in part}
    for name in OTHERS.keys() & names:
        raise UserError(f"{path} is a checkpoint of {OTHERS[name]}, which is not read here",
                        "its Hugging Face folder; llama2.c's export.py --version -1 and LitGPT's convert write one")


def convert(state, path):
    """(checkpoint of ours, tokenizer). The caller checks the weights."""
    try:
        data = state.get("config", {}).get("dataset", "")
        args = dict(state["model_args"])
        tokenizer = find_tokenizer(os.path.dirname(path) or ".", data, args["vocab_size"])
        # nanoGPT rounds GPT-2's 50,257 up to 50,304; the tokens that do not exist are cut off.
        args["vocab_size"] = min(args["vocab_size"], tokenizer.vocab_size)
        args.setdefault("bias", True)  # the oldest checkpoints do not say it
        config = resolve(GPTConfig(**args, mlp="gelu_exact"))
        weights = {plain_name(name): tensor for name, tensor in state["model"].items()}
        weights = {name: tensor for name, tensor in weights.items() if not name.endswith(BUFFERS)}
        rows = round_up(config.vocab_size, 64)  # of our matrices
        for name in ("transformer.wte.weight", "lm_head.weight"):
            matrix = weights[name][:rows]  # (vocab_size, C)
            weights[name] = F.pad(matrix, (0, 0, 0, rows - len(matrix)))  # (rows, C)
        step = int(state.get("iter_num", 0))
    except (AssertionError, LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} looks like nanoGPT's, but is not a valid model: {error!r}",
                        "use another checkpoint") from None
    return dict(format=1, step=step, model=weights, source=[data or path], settings=asdict(config),
                tokenizer_sha256=tokenizers.fingerprint(tokenizer)), tokenizer


def find_tokenizer(folder, data, vocab_size):
    """What the ids of the checkpoint in `folder` mean."""
    here = os.path.join(folder, "meta.pkl")
    for path in (here, os.path.join(folder, "..", "data", data, "meta.pkl")):
        if os.path.exists(path):
            return tokenizers.nanogpt_characters(path, vocab_size)
    if vocab_size in (50257, 50304):
        return tokenizers.get("gpt2")
    raise UserError(f"the checkpoint in {folder} does not say what its {vocab_size} tokens mean",
                    f"copy nanoGPT's data/{data or 'DATASET'}/meta.pkl to {here}")

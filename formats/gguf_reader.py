# SPDX-License-Identifier: GPL-3.0-only
"""
GGUF files as a RUN: what llama.cpp, Ollama and LM Studio have, with numbers of 4 bits or more.

    checkpoint, tokenizer = read("SmolLM2-135M-Instruct.Q4_1.gguf")     # in float32, on the CPU

text/gguf_file.py reads the file; the package gguf knows the names of tensors, and how their numbers are packed.
"""
import math
from dataclasses import asdict, replace

import numpy as np
import torch

import tokenizer as tokenizers
from formats import huggingface
from model import GPTConfig, outline, resolve, scale_rope
from runtime.console import UserError, needs
from text.gguf_file import read_gguf, tokenizer_of
from text.pretrained import careful

ARCHITECTURES = "llama", "qwen2", "qwen3", "gpt2"
SETTINGS = dict(  # ours: theirs, after the name of the architecture
    block_size="context_length", n_layer="block_count", n_head="attention.head_count",
    n_kv_head="attention.head_count_kv", head_dim="attention.key_length", n_embd="embedding_length",
    n_inner="feed_forward_length", rope_theta="rope.freq_base")
ROPE = "rope_freqs.weight"  # what Llama 3.1 and 3.2 divide the speed of each pair of channels by


def read(path):
    """(checkpoint, tokenizer) of a file, as of a Hugging Face folder. Raises UserError."""
    gguf, fix = needs("gguf", "GGUF files"), "download the file again, or use another model"
    with careful(f"{path} is damaged, or not supported", fix):
        # 1. The settings, and each tensor under its name in a Hugging Face folder.
        fields, tensors, data = read_gguf(path)
        arch, tokenizer = fields["general.architecture"], tokenizer_of(fields, path)
        if arch not in ARCHITECTURES:
            raise UserError(f"{path} is a model of the kind {arch}, not {', '.join(ARCHITECTURES)}", fix)
        config = our_config(fields, tensors)
        if ROPE in tensors:
            config.rope_scaling = llama3(config, numbers_of(gguf, *tensors.pop(ROPE), data))
        due = huggingface.their_views(outline(config, len(tensors)).state_dict(), config)
        known = next(known for known, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
        names = gguf.get_tensor_name_map(known, config.n_layer)
        names = {names.get_name(name, try_suffixes=(".weight", ".bias")): name for name in due}

        # 2. Their numbers.
        found = {}
        for name, place in tensors.items():
            tensor, name = numbers_of(gguf, *place, data), names.get(name, name)
            if arch == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
                tensor = tensor.T
            # Their Llama rotates channels 2 i and 2 i + 1 together, ours i and i + head_dim / 2.
            if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
                pairs = tensor.view(-1, config.head_dim // 2, 2, *tensor.shape[1:])
                tensor = pairs.transpose(1, 2).reshape(tensor.shape)
            found[name] = tensor
        weights = huggingface.our_weights(found, config, path)
    return dict(format=1, step=0, settings=asdict(config), model=weights, source=[path], kind="a GGUF model",
                tokenizer_sha256=tokenizers.fingerprint(tokenizer)), tokenizer


def our_config(fields, tensors):
    """The GPTConfig of a file, without Llama 3's scaling of rope. Raises ValueError and others."""
    arch = fields["general.architecture"]
    about = {name.removeprefix(f"{arch}."): value for name, value in fields.items()}
    _, _, shape = huggingface.KINDS[arch]
    shape = shape | {ours: about[theirs] for ours, theirs in SETTINGS.items() if theirs in about}
    norm = "layer_norm_epsilon" if arch == "gpt2" else "layer_norm_rms_epsilon"
    scaling = about.get("rope.scaling.type", "none")
    if scaling != "none":
        scaling += f",factor={about['rope.scaling.factor']}"
    if scaling.startswith("yarn"):
        old = about.get("rope.scaling.original_context_length", about["context_length"])
        scaling += f",original_max_position_embeddings={old}"
    shape.update(norm_eps=about[f"attention.{norm}"], vocab_size=tensors["token_embd.weight"][0][0],
                 tie_weights="output.weight" not in tensors, rope_scaling=scaling)
    config = resolve(GPTConfig(**shape))
    if about.get("rope.dimension_count", config.head_dim) != config.head_dim and config.pos == "rope":
        raise ValueError(f"rope rotates {about['rope.dimension_count']} of {config.head_dim} channels")
    return config


def llama3(config, divisors):
    """The rope_scaling with these divisors."""
    scaling = (f"llama3,factor={divisors.max().item()},low_freq_factor=1.0,high_freq_factor=4.0,"
               "original_max_position_embeddings=8192")
    half = config.head_dim // 2
    speed = 1 / config.rope_theta ** (torch.arange(half) / half)
    scaled, _ = scale_rope(speed, replace(config, rope_scaling=scaling))
    if not torch.allclose(speed / scaled, divisors, rtol=1e-3):
        raise ValueError(f"{ROPE} is not that of Llama 3.1 or 3.2")
    return scaling


def numbers_of(gguf, shape, kind, place, data):
    """A tensor in float32. Raises ValueError where it is not within the file."""
    kind = gguf.GGMLQuantizationType(kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]  # numbers of a block, and its bytes
    length = math.prod(shape[:4]) // block * size
    if len(shape) > 4 or shape[-1] % block or place + length > len(data):
        raise ValueError(f"a tensor {shape} of type {kind.name} is not within the file")
    rows = data[place:place + length].reshape(*shape[:-1], shape[-1] // block * size)
    return torch.from_numpy(np.array(gguf.quants.dequantize(rows, kind)))

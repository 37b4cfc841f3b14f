# SPDX-License-Identifier: GPL-3.0-only
"""GGUF files for tests, written by the package gguf as llama.cpp's converter writes them."""
import json

import numpy as np

from formats import huggingface
from text.pretrained import byte_alphabet

CONTROL, NORMAL, UNKNOWN, USER_DEFINED, BYTE = 3, 1, 2, 4, 6
PIECES = ["\u2581t", "he", "\u2581the", "at", "\u2581c", "\u2581cat", "in", "er", "th", "\u2581\u2581", "ab", "bc", "abc"]


def scored_vocabulary():
    """A small Llama 2: (tokens, kinds, scores)."""
    tokens, kinds = ["<unk>", "<s>", "</s>"], [UNKNOWN, CONTROL, CONTROL]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    kinds += [BYTE] * 256
    scores = [0.0] * 259 + [-float(i) for i in range(len(PIECES))]
    letters = ["\u2581", *"abcdefghijklmnopqrstuvwxyzABC.,!?0123456789", "é"]
    tokens += PIECES + letters
    kinds += [NORMAL] * (len(PIECES) + len(letters))
    return tokens, kinds, scores + [-100.0 - i for i in range(len(letters))]


def byte_vocabulary():
    """A small GPT-2 with two tokens of a chat: (tokens, kinds, merges)."""
    shown = list(byte_alphabet())
    merges = ["\u0120 t", "h e", "\u0120t he", "a t", "\u0120 c", "\u0120c at", "1 2", "12 3", "e r"]
    tokens = shown + [merge.replace(" ", "") for merge in merges] + ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"]
    kinds = [NORMAL] * (len(tokens) - 4) + [CONTROL] * 3 + [USER_DEFINED]
    return tokens, kinds, merges


TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"


def write(path, model, kind="F32", vocabulary="scores", pre="gpt-2", arch=None, change=lambda writer: None, freqs=None):
    """A file of a model of ours, whose matrices have numbers of this kind. change: adds what it wants."""
    import gguf
    c = model.config
    arch = arch or huggingface.their_config(c, "float32", {})["model_type"]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(c.n_inner)
    writer.add_head_count(c.n_head)
    if arch == "gpt2":
        writer.add_layer_norm_eps(c.norm_eps)
    else:
        writer.add_head_count_kv(c.n_kv_head)
        writer.add_layer_norm_rms_eps(c.norm_eps)
        writer.add_rope_freq_base(c.rope_theta)
        writer.add_rope_dimension_count(c.head_dim)
        writer.add_key_length(c.head_dim)
        writer.add_vocab_size(c.vocab_size)
    write_vocabulary(writer, vocabulary, pre)
    change(writer)
    write_tensors(writer, model, kind, arch, freqs)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_vocabulary(writer, vocabulary, pre):
    if vocabulary == "scores":
        tokens, kinds, scores = scored_vocabulary()
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(scores)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
    else:
        tokens, kinds, merges = byte_vocabulary()
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges(merges)
        writer.add_bos_token_id(tokens.index("<|endoftext|>"))
        writer.add_eos_token_id(tokens.index("<|im_end|>"))
        writer.add_chat_template(TEMPLATE)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)


def write_tensors(writer, model, kind, arch, freqs):
    import gguf
    c = model.config
    known = next(known for known, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(known, c.n_layer)
    if freqs is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(freqs, dtype=np.float32))
    for name, tensor in huggingface.their_weights(model).items():
        if arch == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.T.contiguous()
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            halves = tensor.view(-1, 2, c.head_dim // 2, *tensor.shape[1:])
            tensor = halves.transpose(1, 2).reshape(tensor.shape).contiguous()
        of = gguf.GGMLQuantizationType["F32" if tensor.dim() == 1 or "wpe" in name else kind]
        data = gguf.quants.quantize(tensor.numpy(), of)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), data, raw_dtype=of)


def fields_of(path):
    from gguf import GGUFReader
    return json.loads(json.dumps({name: field.contents() for name, field in GGUFReader(path).fields.items()}))

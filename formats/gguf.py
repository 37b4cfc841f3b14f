# SPDX-License-Identifier: GPL-3.0-only
"""
GGUF: a model and its tokenizer in one file, for llama.cpp, Ollama and LM Studio.

    write("model.gguf", model, tokenizer, "q8_0", chat=True)

A GGUF file is a list of settings and a list of tensors. The package gguf writes both; this file says under
which names llama.cpp looks for our settings, tensors and tokens.
"""
import json
import re

import torch

import tokenizer as tokenizers
from formats import huggingface
from formats.tokenizer_json import tokenizer_files
from runtime.console import UserError, needs

# How llama.cpp names the expression that cuts a text into words, by a part of ours.
WORDS = {r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*": "llama-bpe", r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*": "qwen2",
         r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+": "gpt-2"}
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # kinds of tokens
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0", "q4_1": "Q4_1"}


def write(path, model, tokenizer, dtype="float32", chat=False):
    """Write a file. Raises UserError for a model or a tokenizer that llama.cpp does not have.

    dtype: of the matrices, one of DTYPES; vectors stay float32. chat: has the model learned our chat format?
    """
    gguf = needs("gguf", "GGUF files")
    c = model.config
    if c.mlp == "gelu_exact":
        raise UserError("mlp=gelu_exact, but llama.cpp computes gelu by tanh", "--format=hf, onnx or pt2")
    if c.rope_scaling != "none":  # transformers, which proves the file, would not read it
        raise UserError(f"rope_scaling={c.rope_scaling} is not written to GGUF files", "--format=hf, onnx or pt2")
    arch = huggingface.their_config(c, "float32", {})["model_type"]
    writer = gguf.GGUFWriter(path, arch)

    # 1. The shape.
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(c.n_inner)
    writer.add_head_count(c.n_head)
    writer.add_vocab_size(c.vocab_size)
    if arch == "gpt2":
        writer.add_layer_norm_eps(c.norm_eps)
    else:
        writer.add_head_count_kv(c.n_kv_head)
        writer.add_layer_norm_rms_eps(c.norm_eps)
        writer.add_rope_freq_base(c.rope_theta)
        writer.add_rope_dimension_count(c.head_dim)
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)

    # 2. The vocabulary and the chat format.
    write_tokenizer(writer, tokenizer, c.block_size, chat)

    # 3. The tensors.
    known = next(known for known, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(known, c.n_layer)
    for name, tensor in their_tensors(model).items():
        kind = kind_of(name, tensor, dtype)
        data = gguf.quants.quantize(tensor.numpy(), kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def kind_of(name, tensor, dtype):
    """The type of a tensor in the file. A quantized row consists of blocks, of 32 weights."""
    import gguf
    kind = gguf.GGMLQuantizationType[DTYPES[dtype]]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    whole = tensor.dim() == 2 and tensor.size(1) % block == 0 and "wpe" not in name
    return kind if whole else gguf.GGMLQuantizationType.F32


@torch.no_grad()
def round_weights(model, dtype):
    """Round the weights of a model to what a file holds. To round them twice changes nothing.

    A block lies within a row, so our matrices can be rounded although the file has them split or reordered.
    """
    from gguf import quants
    for name, p in model.named_parameters():
        kind = kind_of(name, p, dtype)
        rounded = quants.dequantize(quants.quantize(p.numpy(), kind), kind)
        p.copy_(torch.from_numpy(rounded).view_as(p))


def their_tensors(model):
    """{transformers' name: tensor}, (out, in), with the rows of q and k in llama.cpp's order."""
    c, found = model.config, {}
    for name, tensor in huggingface.their_weights(model).items():
        if c.pos == "learned" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.T.contiguous()
        # Its Llama rotates channels 2 i and 2 i + 1 together; ours, and Qwen's, i and i + head_dim / 2.
        if c.pos == "rope" and not (c.qk_norm or c.qkv_bias) and (".q_proj." in name or ".k_proj." in name):
            halves = tensor.view(-1, 2, c.head_dim // 2, *tensor.shape[1:])  # (heads, 2, head_dim / 2, ...)
            tensor = halves.transpose(1, 2).reshape(tensor.shape).contiguous()
        found[name] = tensor
    return found


def write_tokenizer(writer, tokenizer, context, chat):
    """The tokens with their kinds, scores or merges, and the special ones."""
    special = {i: name for name, i in tokenizer.special.items()}
    if tokenizer.kind == "bpe":
        # SentencePiece's: pairs are merged by their scores, and the text is one word.
        processor, ids = tokenizer.processor, range(tokenizer.vocab_size)
        kinds = [CONTROL if i in special else BYTE if processor.is_byte(i) else NORMAL for i in ids]
        kinds[0] = UNKNOWN
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([processor.id_to_piece(i) for i in ids])
        writer.add_token_scores([processor.get_score(i) for i in ids])
        writer.add_add_space_prefix(False)
        writer.add_unk_token_id(0)
    else:
        files = tokenizer_files(tokenizer, context, chat)
        spec = json.loads(files["tokenizer.json"])
        words = word_rule(spec)
        by_id = {i: token for token, i in spec["model"]["vocab"].items()}
        by_id |= {added["id"]: added["content"] for added in spec["added_tokens"]}
        tokens = [by_id[i] for i in range(tokenizer.vocab_size)]
        kinds = [CONTROL if i in special else NORMAL for i in range(tokenizer.vocab_size)]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(words)
        writer.add_token_list(tokens)
        pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]]
        writer.add_token_merges(pairs)
    writer.add_token_types(kinds)
    writer.add_add_bos_token(bool(tokenizer.start))
    end = tokenizer.special.get(tokenizer.settings.get("eos_token"), tokenizer.special.get(tokenizers.END_OF_TEXT))
    stop = tokenizer.special.get(tokenizers.END) if chat else None
    if end is not None:
        writer.add_bos_token_id(tokenizer.special.get(tokenizer.settings.get("bos_token"), end))
        writer.add_eos_token_id(end if stop is None else stop)
    if stop is not None:
        writer.add_eot_token_id(stop)
    if chat:
        template = getattr(tokenizer, "template", "") or tokenizers.CHAT_TEMPLATE
        # Only transformers knows the tags of what is learned.
        writer.add_chat_template(re.sub("{%-? *(end)?generation *-?%}", "", template))


def word_rule(spec):
    """llama.cpp's name for the pre-tokenizer of a tokenizer.json. Raises UserError if it has none."""
    rule = json.dumps(spec.get("pre_tokenizer") or {}, ensure_ascii=False)
    if spec["model"].get("type") == "BPE" and "ByteLevel" in rule and not spec.get("normalizer"):
        for part, name in WORDS.items():
            if json.dumps(part, ensure_ascii=False)[1:-1] in rule:
                return name
        kinds = [part["type"] for part in spec["pre_tokenizer"].get("pretokenizers", [spec["pre_tokenizer"]])]
        if kinds == ["Digits", "ByteLevel"]:
            return "smollm"
        if kinds == ["ByteLevel"]:
            return "gpt-2"
    raise UserError("llama.cpp has no pre-tokenizer like this tokenizer's",
                    "a model with a vocabulary of kind bpe, gpt2 or cl100k_base, or a Hugging Face one")

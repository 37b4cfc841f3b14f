# SPDX-License-Identifier: GPL-3.0-only
"""
GGUF, both ways: a model and its tokenizer in one file, for llama.cpp, Ollama and LM Studio.

    write("model.gguf", model, tokenizer, "q8_0", chat=True)
    checkpoint, tokenizer = read("SmolLM2-135M-Instruct.Q4_1.gguf")     # in float32, on the CPU

A file is a list of settings and a list of tensors. The package gguf knows llama.cpp's names of the tensors,
and how numbers of few bits are packed. What a file says of its tokens, text/gguf_file.py reads.
"""
import json
import math
import re
from dataclasses import asdict, replace

import numpy as np
import torch

import tokenizer as tokenizers
from formats import huggingface
from formats.tokenizer_json import tokenizer_files
from model import GPTConfig, outline, resolve, scale_rope
from runtime.console import UserError, needs
from text.gguf_file import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, read_gguf, tokenizer_of
from text.pretrained import careful

SHAPE = dict(  # our setting: theirs, behind the name of the architecture
    block_size="context_length", n_layer="block_count", n_head="attention.head_count", n_embd="embedding_length",
    n_inner="feed_forward_length", vocab_size="vocab_size")
ROPE_SHAPE = SHAPE | dict(
    n_kv_head="attention.head_count_kv", head_dim="attention.key_length", rope_theta="rope.freq_base",
    norm_eps="attention.layer_norm_rms_epsilon")
SETTINGS = {"llama": ROPE_SHAPE, "qwen2": ROPE_SHAPE, "qwen3": ROPE_SHAPE,
            "gpt2": SHAPE | dict(norm_eps="attention.layer_norm_epsilon")}
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0", "q4_1": "Q4_1"}
CONVERTER = "--format=hf, then llama.cpp's convert_hf_to_gguf.py"
FREQS = "rope_freqs.weight"  # what Llama 3.1 and 3.2 divide the speed of each pair of channels by


def their_names(arch, n_layer, names):
    """{transformers' name of a tensor: llama.cpp's}"""
    import gguf
    known = next(known for known, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    found = gguf.get_tensor_name_map(known, n_layer)
    return {name: found.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}


def reorder(name, tensor, arch, pairs):
    """A tensor of transformers' as llama.cpp has it, with pairs=(2, head_dim / 2), or back: (head_dim / 2, 2)."""
    if arch == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return tensor.T.contiguous()
    if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
        # Rope rotates channels 2 i and 2 i + 1 together there, i and i + head_dim / 2 in transformers.
        rows = tensor.view(-1, *pairs, *tensor.shape[1:])
        return rows.transpose(1, 2).reshape(tensor.shape)
    return tensor


def rope_divisors(config):
    """What a rope_scaling divides the speed of each pair of channels by: (head_dim / 2,)."""
    half = config.head_dim // 2
    speed = 1 / config.rope_theta ** (torch.arange(half) / half)
    scaled, _ = scale_rope(speed, config)
    return speed / scaled


# ---------- Writing


def write(path, model, tokenizer, dtype="float32", chat=False):
    """Write a file. Raises UserError for a model or a tokenizer that llama.cpp does not have.

    dtype: of the matrices, one of DTYPES; vectors stay float32. chat: has the model learned our chat format?
    """
    gguf = needs("gguf", "GGUF files")
    c = model.config
    if c.mlp == "gelu_exact":
        raise UserError("mlp=gelu_exact, but llama.cpp computes gelu by tanh", "--format=hf, onnx or pt2")
    arch = huggingface.their_config(c, "float32", {})["model_type"]
    llama3 = arch == "llama" and c.rope_scaling.startswith("llama3")
    if c.rope_scaling != "none" and not llama3:  # transformers, which proves the file, would not read it
        raise UserError(f"rope_scaling={c.rope_scaling} is not written to GGUF files", CONVERTER)
    writer = gguf.GGUFWriter(path, arch)

    # 1. The shape.
    for ours, theirs in SETTINGS[arch].items():
        add = writer.add_float32 if isinstance(getattr(GPTConfig, ours), float) else writer.add_uint32
        add(f"{arch}.{theirs}", getattr(c, ours))
    if arch != "gpt2":
        writer.add_rope_dimension_count(c.head_dim)
        writer.add_value_length(c.head_dim)

    # 2. The tokens and the chat format.
    write_tokenizer(writer, tokenizer, c, chat)

    # 3. The tensors.
    weights = huggingface.their_weights(model)
    names = their_names(arch, c.n_layer, weights)
    if llama3:
        writer.add_tensor(FREQS, rope_divisors(c).numpy())
    for name, tensor in weights.items():
        kind = kind_of(name, tensor, dtype)
        tensor = reorder(name, tensor, arch, (2, c.head_dim // 2))
        writer.add_tensor(names[name], gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
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


def write_tokenizer(writer, tokenizer, config, chat):
    """The tokens with their kinds, scores or merges, the special ones, and the chat format."""
    # 1. {id: token}, {id: its kind}, and how a text becomes tokens.
    rows = range(config.vocab_size)
    kinds = dict.fromkeys(tokenizer.special.values(), CONTROL)
    if tokenizer.kind == "bpe":
        # SentencePiece's: pairs are merged by their scores, and the text is one word.
        processor = tokenizer.processor
        tokens = {i: processor.id_to_piece(i) for i in range(tokenizer.vocab_size)}
        kinds |= {i: BYTE for i in tokens if processor.is_byte(i)} | {0: UNKNOWN}
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([processor.get_score(i) if i in tokens else 0.0 for i in rows])
        writer.add_add_space_prefix(False)
        writer.add_unk_token_id(0)
    else:
        spec = json.loads(tokenizer_files(tokenizer, config.block_size, chat)["tokenizer.json"])
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(word_rule(spec))
        tokens = {i: token for token, i in spec["model"]["vocab"].items()}
        for added in spec["added_tokens"]:
            tokens[added["id"]] = added["content"]
            kinds.setdefault(added["id"], USER_DEFINED)  # such as <think>: never cut, but not special
        pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]]
        writer.add_token_merges(pairs)
    # Qwen's matrices have more rows than there are tokens, and llama.cpp wants one for each.
    writer.add_token_list([tokens.get(i, f"[PAD{i}]") for i in rows])
    writer.add_token_types([kinds.get(i, NORMAL if i in tokens else UNUSED) for i in rows])

    # 2. How a text begins and ends.
    special, settings = tokenizer.special, tokenizer.settings
    end = special.get(settings.get("eos_token"), special.get(tokenizers.END_OF_TEXT))
    stop = special.get(tokenizers.END) if chat else None
    writer.add_add_bos_token(bool(tokenizer.start))
    if end is not None:
        writer.add_bos_token_id(special.get(settings.get("bos_token"), end))
        writer.add_eos_token_id(end if stop is None else stop)
    if stop is not None:
        writer.add_eot_token_id(stop)
    if chat:
        template = tokenizer.template or tokenizers.CHAT_TEMPLATE
        # Only transformers knows the tags of what is learned.
        writer.add_chat_template(re.sub("{%-? *(end)?generation *-?%}", "", template))


# How llama.cpp names an expression that cuts a text into words, by a part of it
WORDS = {r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*": "llama-bpe", r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*": "qwen2",
         r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+": "gpt-2"}
RULES = {name: name for name in WORDS.values()} | {r"\p{N} gpt-2": "smollm"}  # of one step or two


def word_rule(spec):
    """llama.cpp's name for the pre-tokenizer of a tokenizer.json. Raises UserError if it has none."""
    rule = spec.get("pre_tokenizer") or {}
    steps = [cut_by(step) for step in rule.get("pretokenizers", [rule])]
    name = RULES.get(" ".join(filter(None, steps)))
    # (Qwen's have NFC, which llama.cpp leaves out: nearly all text is in it already.)
    normal = spec.get("normalizer") in (None, {"type": "NFC"})
    if name and normal and "merges" in spec["model"] and '"ByteLevel"' in json.dumps(rule):
        return name
    raise UserError("llama.cpp has no pre-tokenizer like this tokenizer's",
                    f"{CONVERTER}; or a vocabulary of kind bpe, gpt2 or cl100k_base")


def cut_by(step):
    """The expression by which a step of a pre-tokenizer cuts, by its name where it has one; "" for none."""
    kind, regex = step.get("type"), step.get("pattern", {}).get("Regex")
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return "gpt-2" if step.get("use_regex", True) else ""
    if kind == "Digits" and step["individual_digits"]:
        return r"\p{N}"
    if kind == "Split" and regex:
        return next((name for part, name in WORDS.items() if part in regex), regex)
    return str(kind)


# ---------- Reading


def read(path):
    """(checkpoint, tokenizer) of a file, as of a Hugging Face folder. Raises UserError."""
    gguf, fix = needs("gguf", "GGUF files"), "download the file again, or use another model"
    with careful(f"{path} is damaged, or not supported", fix):
        # 1. The settings, and each tensor under its name in a Hugging Face folder.
        fields, tensors, data = read_gguf(path)
        arch, parts = fields["general.architecture"], fields.get("split.count", 1)
        if parts > 1:
            raise UserError(f"{path} is one of {parts} parts", "llama-gguf-split --merge FIRST_PART whole.gguf")
        if arch not in SETTINGS:
            raise UserError(f"{path} is a model of the kind {arch}, not {', '.join(SETTINGS)}", fix)
        tokenizer = tokenizer_of(fields, path)
        config = our_config(fields, tensors)
        if FREQS in tensors:
            config.rope_scaling = rope_scaling_of(config, numbers_of(gguf, *tensors.pop(FREQS), data))
        due = huggingface.their_views(outline(config, len(tensors)).state_dict(), config)
        names = {theirs: name for name, theirs in their_names(arch, config.n_layer, due).items()}

        # 2. Their numbers.
        found = {}
        for theirs, place in tensors.items():
            name = names.get(theirs, theirs)
            tensor = numbers_of(gguf, *place, data)
            found[name] = reorder(name, tensor, arch, (config.head_dim // 2, 2))
        weights = huggingface.our_weights(found, config, path)
    return dict(format=1, step=0, settings=asdict(config), model=weights, source=[path], kind="a GGUF model",
                tokenizer_sha256=tokenizers.fingerprint(tokenizer)), tokenizer


def our_config(fields, tensors):
    """The GPTConfig of a file, without Llama 3's scaling of rope. Raises ValueError and others."""
    arch = fields["general.architecture"]
    about = {name.removeprefix(f"{arch}."): value for name, value in fields.items()}
    _, _, shape = huggingface.KINDS[arch]
    shape = shape | {ours: about[theirs] for ours, theirs in SETTINGS[arch].items() if theirs in about}
    scaling = about.get("rope.scaling.type", "none")
    if scaling != "none":
        scaling += f",factor={about['rope.scaling.factor']}"
    if scaling.startswith("yarn"):
        old = about.get("rope.scaling.original_context_length", about["context_length"])
        scaling += f",original_max_position_embeddings={old}"
    shape.update(vocab_size=tensors["token_embd.weight"][0][0],
                 tie_weights="output.weight" not in tensors, rope_scaling=scaling)
    config = resolve(GPTConfig(**shape))
    if about.get("rope.dimension_count", config.head_dim) != config.head_dim and config.pos == "rope":
        raise ValueError(f"rope rotates {about['rope.dimension_count']} of {config.head_dim} channels")
    return config


def rope_scaling_of(config, divisors):
    """Llama 3's rope_scaling with these divisors."""
    scaling = (f"llama3,factor={divisors.max().item()},low_freq_factor=1.0,high_freq_factor=4.0,"
               "original_max_position_embeddings=8192")
    if not torch.allclose(rope_divisors(replace(config, rope_scaling=scaling)), divisors, rtol=1e-3):
        raise ValueError(f"{FREQS} is not that of Llama 3.1 or 3.2")
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

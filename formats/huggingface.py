# SPDX-License-Identifier: GPL-3.0-only
"""
Hugging Face folders, both ways: the same models under other names.

    checkpoint, tokenizer = read("SmolLM2-135M")    # as a checkpoint of this project
    write("exports/small/hf", model, tokenizer)     # for AutoModelForCausalLM and AutoTokenizer

GPT-2, Llama, Mistral, Qwen2 and Qwen3 are this project's GPT under other names. One table translates the
settings both ways (KINDS), one function the tensors (their_views). What would not be the same is refused.
"""
import glob
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import torch

import tokenizer as tokenizers
from formats import safetensors
from model import ROPE_SCALING, GPTConfig, outline, read_rope_scaling, resolve
from runtime.console import UserError, note
from runtime.files import check_like, read_json

SOURCE = "download its files again; convert *.bin files with transformers' save_pretrained"

# ---------- The settings

LLAMA = dict(  # our setting: theirs
    block_size="max_position_embeddings", vocab_size="vocab_size", n_layer="num_hidden_layers",
    n_head="num_attention_heads", n_kv_head="num_key_value_heads", head_dim="head_dim", n_embd="hidden_size",
    n_inner="intermediate_size", norm_eps="rms_norm_eps", rope_theta="rope_theta",
    tie_weights="tie_word_embeddings")
GPT2 = dict(
    block_size="n_positions", vocab_size="vocab_size", n_layer="n_layer", n_head="n_head", n_embd="n_embd",
    n_inner="n_inner", norm_eps="layer_norm_epsilon", tie_weights="tie_word_embeddings")
MODERN = dict(
    pos="rope", norm="rmsnorm", mlp="swiglu", bias=False,
    n_kv_head="auto", rope_theta=10000.0, tie_weights=False)
KINDS = {  # by model_type: the class, the names of its settings, and ours where it has none
    "gpt2": ("GPT2LMHeadModel", GPT2, dict(bias=True, n_inner="auto", tie_weights=True)),
    "llama": ("LlamaForCausalLM", LLAMA | dict(bias="attention_bias"), dict(MODERN, head_dim="auto")),
    "mistral": ("MistralForCausalLM", LLAMA, dict(MODERN, head_dim="auto")),
    "qwen2": ("Qwen2ForCausalLM", LLAMA, dict(MODERN, head_dim="auto", qkv_bias=True)),
    "qwen3": ("Qwen3ForCausalLM", LLAMA, dict(MODERN, head_dim=128, qk_norm=True)),
}
GELU = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact"}  # theirs: ours
ONLY = dict(  # the one value that some of their settings may have
    quantization_config=None, is_causal=True, hidden_act="silu", use_sliding_window=False,
    layer_type="full_attention", partial_rotary_factor=1.0,
    scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)


def our_config(theirs):
    """The GPTConfig for a config.json (a dict). Raises UserError for what this model does not have."""
    try:
        return translate(theirs)
    except KeyError as error:
        detail = f"missing or unknown {error}"
    except (AssertionError, ValueError, TypeError, AttributeError) as error:
        detail = error
    raise UserError(f"config.json describes a model that cannot be built: {detail}", "use another model")


def translate(theirs):
    # 1. Their settings under our names. transformers 5 has rope_parameters, and prefers the older rope_scaling.
    model_type = theirs.get("model_type")
    if model_type not in KINDS:
        raise ValueError(f"model_type={model_type} is not one of {', '.join(KINDS)}")
    rope = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    given = {name: value for name, value in {**theirs, **rope}.items() if value is not None}
    _, names, default = KINDS[model_type]
    for name in default.keys() & names.keys():
        given.setdefault(names[name], default[name])
    shape = default | {ours: given[name] for ours, name in names.items()}
    if model_type == "gpt2":
        shape["mlp"] = GELU[given["activation_function"]]
    else:
        shape["rope_scaling"] = our_rope_scaling(rope, given)
    if model_type == "mistral":  # with all of the context in its window, a sliding one is none
        shape["block_size"] = min(shape["block_size"], theirs.get("sliding_window", 4096) or shape["block_size"])

    # 2. What this model cannot do.
    only = dict(ONLY, attention_bias=shape["bias"], mlp_bias=shape["bias"])
    layers = [("layer_type", value) for value in given.get("layer_types", [])]
    for name, value in (*given.items(), *layers):
        if name in only and value != only[name]:
            raise ValueError(f"{name}={value}, but only {only[name]} is supported")
    return resolve(GPTConfig(**shape))


def our_rope_scaling(rope, given):
    """The rope_scaling of GPTConfig for theirs, a dict. What it may hold, `resolve` knows."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return "none"
    numbers = {name: value for name, value in rope.items() if value is not None}
    for name in ("rope_type", "type", "rope_theta", "partial_rotary_factor"):
        numbers.pop(name, None)
    old = "original_max_position_embeddings"  # some files have it outside of rope's own, or not at all
    if old in ROPE_SCALING.get(kind, {}):
        numbers[old] = given.get(old, given["max_position_embeddings"])
    return ",".join([kind, *(f"{name}={value!r}" for name, value in sorted(numbers.items()))])


def their_rope(config):
    """rope_parameters, as a dict."""
    kind, numbers = read_rope_scaling(config)
    rope = dict(rope_type="default" if kind == "none" else kind, rope_theta=config.rope_theta)
    rope.update({name: value for name, value in numbers.items() if value != ROPE_SCALING[kind][name]})
    old = "original_max_position_embeddings"
    if old in rope:
        rope[old] = int(rope[old])
    return rope


def their_config(config, dtype, ends):
    """The config.json (a dict) of a GPTConfig. ends: {"bos_token_id": id, "eos_token_id": id}.

    Raises UserError for a switch that transformers' class does not have.
    """
    # 1. Our settings under their names.
    model_type = "gpt2"
    if config.pos == "rope":
        model_type = "qwen2" if config.qkv_bias else "llama"
        if config.qk_norm:
            model_type = "qwen3"
    cls, names, _ = KINDS[model_type]
    theirs = dict(architectures=[cls], model_type=model_type, dtype=dtype, **ends)
    theirs.update({name: getattr(config, ours) for ours, name in names.items()})
    if model_type == "gpt2":
        theirs["n_ctx"] = config.block_size  # an old name, which llama.cpp's converter reads
        theirs["activation_function"] = "gelu" if config.mlp == "gelu_exact" else "gelu_new"
        theirs.update(dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout))
    else:
        rope = their_rope(config)
        theirs.update(hidden_act="silu", rope_parameters=rope)
        if rope["rope_type"] != "default":  # for transformers 4
            theirs["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    if model_type == "llama":
        theirs["mlp_bias"] = config.bias

    # 2. What would come back as another model is refused.
    back = asdict(our_config(theirs))
    if model_type == "gpt2":
        back.update(bias=config.bias, qkv_bias=config.qkv_bias)  # biases of zero will do
    if model_type == "llama":
        back["n_embd"] -= config.n_embd % config.n_head  # its class wants a multiple
    for name in ("norm", "mlp", "qk_norm", "n_kv_head", "head_dim", "bias", "qkv_bias", "n_embd"):
        if getattr(config, name) != back[name]:
            raise UserError(f"{name}={getattr(config, name)}, but transformers' {cls} has {back[name]}",
                            "--format=onnx, pt2 or torchscript")
    return theirs


# ---------- The tensors

LLAMA_NAMES = {  # part of our name: of theirs; several where they split what is one product here
    "transformer.wte": ["model.embed_tokens"],
    "transformer.ln_f": ["model.norm"],
    "lm_head": ["lm_head"],
    "ln_1": ["input_layernorm"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.q_norm": ["self_attn.q_norm"],
    "attn.k_norm": ["self_attn.k_norm"],
    "attn.c_proj": ["self_attn.o_proj"],
    "ln_2": ["post_attention_layernorm"],
    "mlp.c_fc": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.c_proj": ["mlp.down_proj"],
}
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # which some files hold, too


def their_views(weights, config):
    """{their name: a view of our tensor}: copy from these views to write a folder, into them to read one.

    The padding of the vocabulary is left out, and the head where it is the embedding.
    """
    q_width = config.n_head * config.head_dim
    kv_width = config.n_kv_head * config.head_dim
    sizes = {2: [config.n_inner] * 2, 3: [q_width, kv_width, kv_width]}  # by the number of parts
    views = {}
    for name, tensor in weights.items():
        if name in ("transformer.wte.weight", "lm_head.weight"):
            tensor = tensor[:config.vocab_size]
        if name == "lm_head.weight" and config.tie_weights:
            continue
        if config.pos == "rope":  # Llama, Qwen3
            name = name.replace("transformer.h.", "model.layers.")
            part = next(part for part in LLAMA_NAMES if part in name)
            names = [name.replace(part, theirs) for theirs in LLAMA_NAMES[part]]
            views.update(zip(names, tensor.split(sizes.get(len(names), len(tensor)))))
        elif name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            views[name] = tensor.T  # GPT-2 has our names, but (in, out), as in the TensorFlow original
        else:
            views[name] = tensor
    return views


def their_weights(model, dtype=torch.float32):
    """{their name: tensor} of a model."""
    config, weights = model.config, model.state_dict()
    if config.pos == "learned":  # GPT-2's class always has biases: zeros where we have none
        like = outline(replace(config, bias=True), len(weights)).state_dict()
        weights = {name: torch.zeros(empty.shape) for name, empty in like.items()} | weights
    views = their_views(weights, config)
    return {name: view.to(dtype, copy=True).contiguous().cpu() for name, view in views.items()}


def our_weights(theirs, config, where):
    """Their tensors {name: tensor} under our names, as a state_dict of GPT(config), in float32.

    Raises UserError for a tensor that is missing, misshapen, of a wrong dtype or unknown.
    """
    # 1. Does each of their tensors have its place in an outline of the model, which takes no memory?
    prefix = "transformer." if config.pos == "learned" else "model."
    if not any(name.startswith(prefix) for name in theirs):  # saved without the head: GPT-2's own file
        theirs = {prefix + name: value for name, value in theirs.items()}
    try:
        like = outline(config, len(theirs)).state_dict()
    except AssertionError as error:
        raise UserError(f"{where} does not match its config.json: {error}", SOURCE) from None
    due = their_views(like, config)
    check_like(theirs, due, where)
    unknown = [name for name in theirs.keys() - due.keys() - {"lm_head.weight"} if not name.endswith(BUFFERS)]
    if unknown:
        names = ", ".join(sorted(unknown)[:20])
        raise UserError(f"{where} has tensors unknown to its config.json: {names}", SOURCE)

    # 2. Copy them. The padding of the vocabulary stays zero.
    weights = {name: torch.zeros(empty.shape) for name, empty in like.items()}
    if config.tie_weights:
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    for name, view in their_views(weights, config).items():
        view.copy_(theirs[name])
    head = theirs.get("lm_head.weight")
    embedding = weights["transformer.wte.weight"][:config.vocab_size]
    if config.tie_weights and head is not None and not torch.equal(head.float(), embedding):
        raise UserError(f"{where}: config.json says that lm_head.weight is the embedding, but it is not",
                        'set "tie_word_embeddings" to false there, if the file is right')
    return weights


# ---------- A folder


def is_folder(path):
    """Does it hold their weights, or a config.json with a model_type?"""
    if glob.glob("model.safetensors*", root_dir=path):
        return True
    try:
        return "model_type" in read_dict(os.path.join(path, "config.json"))
    except UserError:
        return False


def read_dict(path):
    value = read_json(path, SOURCE)
    check_like(value, {}, path)
    return value


def read(folder):
    """(checkpoint, tokenizer) of a Hugging Face folder; the checkpoint is like ours, in float32, on the CPU.

    It also has `dtype` of the tensors in the files, and `generation`, their settings for sampling.
    """
    theirs = read_dict(os.path.join(folder, "config.json"))
    config = our_config(theirs)
    longest = theirs.get("max_position_embeddings", 0)
    if config.block_size < longest:
        note(f"the context is {config.block_size:,} tokens, the window that slides over {longest:,} in {folder}")
    tensors = read_tensors(folder)
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    weights = our_weights(tensors, config, folder)
    generation = os.path.join(folder, "generation_config.json")
    generation = read_dict(generation) if os.path.exists(generation) else {}
    tokenizer = tokenizers.load_from(folder)
    stops = generation.get("eos_token_id", theirs.get("eos_token_id"))  # one, or a list
    tokenizer.stops = [i for i in (stops if isinstance(stops, list) else [stops]) if type(i) is int]
    return dict(format=1, step=0, settings=asdict(config), model=weights, source=[folder],
                generation=generation, kind="a Hugging Face model",
                dtype=dtypes.pop() if len(dtypes) == 1 else "float32",
                tokenizer_sha256=tokenizers.fingerprint(tokenizer)), tokenizer


def read_tensors(folder):
    """All tensors {name: tensor} of model.safetensors, or of the files that its index names."""
    files = ["model.safetensors"]
    index = os.path.join(folder, "model.safetensors.index.json")
    if os.path.exists(index) and not os.path.exists(os.path.join(folder, *files)):
        weight_map = read_dict(index).get("weight_map")
        check_like(weight_map, {}, index, "weight_map")
        files = {os.path.basename(str(name)) for name in weight_map.values()}
    tensors = {}
    for name in sorted(files):
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            raise UserError(f"{path} is missing", SOURCE)
        tensors.update(safetensors.read(path))
    return tensors


def write(folder, model, tokenizer, dtype=torch.float32, generation=None, chat=False):
    """Write a folder for AutoModelForCausalLM and AutoTokenizer. Raises UserError, OSError.

    generation: settings for sampling, if there are some already. chat: does the model know a chat format?
    """
    from formats.tokenizer_json import tokenizer_files  # not needed to read a folder

    # 1. What can be refused: the settings and the tokenizer.
    special = tokenizer.special
    end = special.get(tokenizers.END_OF_TEXT)
    start = special.get(tokenizer.settings.get("bos_token"), end)
    stop = special.get(tokenizer.settings.get("eos_token"), end)
    ends = dict(bos_token_id=start, eos_token_id=stop)
    config = their_config(model.config, str(dtype).removeprefix("torch."), ends)
    if not generation:
        generation = dict(ends, pad_token_id=stop, do_sample=True, temperature=0.8, top_k=50)
        if chat:
            generation["eos_token_id"] = sorted(tokenizers.ends(tokenizer))
    files = tokenizer_files(tokenizer, model.config.block_size, chat)
    files["config.json"] = json.dumps(config, indent=1).encode()
    files["generation_config.json"] = json.dumps(generation, indent=1).encode()

    # 2. The files.
    os.makedirs(folder, exist_ok=True)
    for name, content in files.items():
        Path(folder, name).write_bytes(content)
    if tokenizer.kind != "hugging_face":  # to read the very same one back
        tokenizer.save(os.path.join(folder, "tokenizer"))
    safetensors.write(os.path.join(folder, "model.safetensors"), their_weights(model, dtype))

# SPDX-License-Identifier: GPL-3.0-only
"""
Hugging Face folders, both ways: the same models under other names.

    checkpoint, tokenizer = read("SmolLM2-135M")    # config.json and *.safetensors, as a checkpoint of this project
    write("exports/small/hf", model, tokenizer)     # a folder for AutoModelForCausalLM and AutoTokenizer

GPT-2, Llama and Qwen3 are this project's GPT with other names for its parts. Two things are translated, and one
table or rule serves both directions: the settings (KINDS) and the tensors (`parts`). The tokenizer is read by
text/pretrained.py and written by formats/tokenizer_json.py. What would not be exactly the same is refused.
"""
import glob
import json
import os
import shutil
from dataclasses import asdict

import torch

import tokenizer as tokenizers
from model import GPTConfig, outline, resolve
from runtime.console import UserError, needs
from runtime.files import check_like, read_json

# ---------- The settings

LLAMA = {  # their name of a setting: ours
    "max_position_embeddings": "block_size", "vocab_size": "vocab_size", "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head", "num_key_value_heads": "n_kv_head", "hidden_size": "n_embd",
    "head_dim": "head_dim", "intermediate_size": "n_inner", "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_weights"}
GPT2 = {
    "n_positions": "block_size", "vocab_size": "vocab_size", "n_layer": "n_layer", "n_head": "n_head",
    "n_embd": "n_embd", "n_inner": "n_inner", "layer_norm_epsilon": "norm_eps", "tie_word_embeddings": "tie_weights"}
MODERN = dict(pos="rope", norm="rmsnorm", mlp="swiglu")
KINDS = {  # by model_type: the class, its settings, what they are if config.json leaves them out, and our switches
    "gpt2": dict(
        cls="GPT2LMHeadModel", names=GPT2, default=dict(n_inner=0, tie_word_embeddings=True),
        ours=dict(pos="learned", norm="layernorm", qk_norm=False)),
    "llama": dict(
        cls="LlamaForCausalLM", names=LLAMA,
        default=dict(num_key_value_heads=0, head_dim=0, tie_word_embeddings=False),
        ours=dict(MODERN, qk_norm=False)),
    "qwen3": dict(
        cls="Qwen3ForCausalLM", names=LLAMA,
        default=dict(num_key_value_heads=0, head_dim=128, tie_word_embeddings=False),
        ours=dict(MODERN, qk_norm=True, bias=False)),
}
GELU = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact"}  # theirs: ours; the first is GPT-2's
ONLY = dict(  # what this model cannot do: their setting, and the one value that it may have
    is_causal=True, hidden_act="silu", use_sliding_window=False, layer_type="full_attention", rope_type="default",
    type="default", partial_rotary_factor=1.0, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
    add_cross_attention=False)


def our_config(theirs):
    """The GPTConfig for a config.json (a dict). Raises UserError for what this model does not have."""
    try:
        return translate(theirs)
    except KeyError as error:
        fact = f"config.json lacks or has an unknown {error}"
    except (AssertionError, ValueError, TypeError, AttributeError) as error:
        fact = f"config.json describes no model that can be built: {error}"
    raise UserError(fact, "use another model")


def translate(theirs):
    # 1. The shape.
    if theirs.get("quantization_config"):
        raise ValueError("it is quantized")
    model_type = theirs.get("model_type")
    if model_type not in list(KINDS):
        raise ValueError(f"model_type={model_type} is none of {', '.join(KINDS)}")
    kind = KINDS[model_type]
    given = {name: value for name, value in theirs.items() if value is not None}
    both = kind["default"] | given
    shape = {ours: both[name] for name, ours in kind["names"].items()} | kind["ours"]
    only = dict(ONLY)
    # transformers 5 keeps everything about rope in rope_parameters; 4 had rope_theta and rope_scaling.
    rope = given.get("rope_parameters", {})
    if model_type == "gpt2":
        shape.update(mlp=GELU[given["activation_function"]], bias=True)
        # transformers prefers these names where a file has both.
        for name in ("max_position_embeddings", "num_hidden_layers", "num_attention_heads", "hidden_size"):
            only[name] = shape[LLAMA[name]]
    else:
        bias = given.get("attention_bias", False)
        only.update(attention_bias=shape.setdefault("bias", bias), mlp_bias=bias)
        shape["rope_theta"] = rope.get("rope_theta", given.get("rope_theta", 10000.0))

    # 2. What this model cannot do.
    layers = [dict(layer_type=value) for value in given.get("layer_types", [])]
    for settings in (given, rope, given.get("rope_scaling", {}), *layers):
        for name, value in only.items():
            if settings.get(name, value) != value:
                raise ValueError(f"{name}={settings[name]}, but this model has only {value}")
    return resolve(GPTConfig(**shape))


def their_kind(config):
    """gpt2, llama or qwen3, by the switches of a GPTConfig. Raises UserError where none has all of them."""
    if config.pos == "learned":
        kind = "gpt2"
    else:
        kind = "qwen3" if config.qk_norm else "llama"
    needed = dict(KINDS[kind]["ours"])
    if kind == "gpt2":
        needed.update(n_kv_head=config.n_head, head_dim=config.n_embd // config.n_head)
        if config.mlp == "swiglu":
            needed["mlp"] = "gelu or gelu_exact"
    if kind == "llama" and config.n_embd % config.n_head:  # (which Qwen3ForCausalLM does not ask for)
        needed["n_embd"] = f"a multiple of n_head={config.n_head}"
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise UserError(f"{name}={getattr(config, name)}: in transformers' {KINDS[kind]['cls']}, it is {value}",
                            "--format=onnx, pt2 or torchscript")
    return kind


def their_config(config, dtype, ends):
    """The config.json (a dict) of a GPTConfig. ends: {"bos_token_id": id, "eos_token_id": id}."""
    kind = their_kind(config)
    theirs = {name: getattr(config, ours) for name, ours in KINDS[kind]["names"].items()}
    if kind == "gpt2":
        theirs["activation_function"] = "gelu_new" if config.mlp == "gelu" else "gelu"
        theirs.update(dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout))
    else:
        rope = dict(rope_type="default", rope_theta=config.rope_theta)
        theirs.update(hidden_act="silu", attention_bias=config.bias, rope_parameters=rope,
                      rope_theta=config.rope_theta)  # (where transformers 4 and others look for it)
    if kind == "llama":
        theirs["mlp_bias"] = config.bias
    return dict(architectures=[KINDS[kind]["cls"]], model_type=kind, dtype=dtype, **ends, **theirs)


# ---------- The tensors

LLAMA_NAMES = {  # ours: theirs; in a block, after "transformer.h.3." here and "model.layers.3." there
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
SOURCE = "take the folder's files from their source again"
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # what some files hold beside the weights


def parts(name, tensor, config):
    """Our tensor as theirs: [(their name, a view of ours)]. To copy from these views is to write, into them to read.

    The padding of the vocabulary is left out. GPT-2 has our names, but stores its linear layers transposed: (in, out),
    as in the TensorFlow original. Llama and Qwen3 split what is one product here: q, k, v; gate and value of the MLP.
    """
    if name in ("transformer.wte.weight", "lm_head.weight"):
        tensor = tensor[:config.vocab_size]
    if config.pos == "learned":
        linear = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        return [(name, tensor.T if linear else tensor)]
    stem, what = name.rsplit(".", 1)  # weight or bias
    before = ""
    if stem.startswith("transformer.h."):
        layer, stem = stem.removeprefix("transformer.h.").split(".", 1)
        before = f"model.layers.{layer}."
    q_width, kv_width = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    sizes = {"attn.c_attn": [q_width, kv_width, kv_width], "mlp.c_fc": [config.n_inner] * 2}
    views = tensor.split(sizes.get(stem, [len(tensor)]))
    return [(f"{before}{theirs}.{what}", view) for theirs, view in zip(LLAMA_NAMES[stem], views)]


def their_weights(model, dtype=torch.float32):
    """{their name: tensor}: tied weights once, and zero biases where only their class has some."""
    config, weights = model.config, {}
    for name, ours in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_weights:
            continue
        for theirs, view in parts(name, ours, config):
            weights[theirs] = view.to(dtype, copy=True).contiguous().cpu()
            if config.pos == "learned" and not config.bias and name.startswith(("transformer.h.", "transformer.ln_f")):
                weights[theirs.removesuffix("weight") + "bias"] = torch.zeros(ours.size(0), dtype=dtype)
    return weights


def our_weights(theirs, config, where):
    """Their tensors {name: tensor} under our names, as a state_dict of GPT(config), in float32.

    Raises UserError for a tensor that is missing, misshapen, of a wrong dtype or unknown.
    """
    try:
        like = outline(config, len(theirs)).state_dict()  # takes no memory
    except AssertionError as error:
        raise UserError(f"{where} does not hold what its config.json says: {error}", SOURCE) from None
    prefix = "transformer." if config.pos == "learned" else "model."
    if not any(name.startswith(prefix) for name in theirs):  # saved without the head: GPT-2's own file
        theirs = {name if name.startswith("lm_head.") else prefix + name: value for name, value in theirs.items()}
    if config.tie_weights:
        del like["lm_head.weight"]
    weights = {}
    known = {"lm_head.weight"}
    for name, empty in like.items():
        for part, view in parts(name, empty, config):
            check_like(theirs.get(part), view, where, part)
            known.add(part)
        weights[name] = torch.zeros(empty.shape)  # the padding of the vocabulary stays zero
        for part, view in parts(name, weights[name], config):
            view.copy_(theirs[part])
    unknown = [name for name in theirs if name not in known and not name.endswith(BUFFERS)]
    if unknown:
        raise UserError(f"{where}: tensors that its config.json does not know of: {', '.join(unknown[:20])}", SOURCE)
    if config.tie_weights:
        weights["lm_head.weight"] = tied = weights["transformer.wte.weight"]
        head = theirs.get("lm_head.weight", tied[:config.vocab_size])
        if not torch.equal(head.float(), tied[:config.vocab_size]):
            raise UserError(f"{where}: config.json says that lm_head.weight is the embedding, and it is not",
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
    tensors = read_tensors(folder)
    weights = our_weights(tensors, config, folder)
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    tokenizer = tokenizers.load_from(folder)
    generation_path = os.path.join(folder, "generation_config.json")
    if os.path.exists(generation_path):
        generation = read_dict(generation_path)
    else:
        generation = {name: theirs[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in theirs}
    return dict(format=1, step=0, settings=asdict(config), model=weights, source=[folder], generation=generation,
                dtype=dtypes.pop() if len(dtypes) == 1 else "float32",
                tokenizer_sha256=tokenizers.fingerprint(tokenizer)), tokenizer


def read_tensors(folder):
    """All tensors {name: tensor} of model.safetensors, or of the files that model.safetensors.index.json names."""
    safetensors = needs("safetensors", "Hugging Face folders")
    index = os.path.join(folder, "model.safetensors.index.json")
    files = ["model.safetensors"]
    if os.path.exists(index) and not os.path.exists(os.path.join(folder, *files)):
        weight_map = read_dict(index).get("weight_map")
        check_like(weight_map, {}, index, "weight_map")
        files = sorted({os.path.basename(str(name)) for name in weight_map.values()})
    tensors = {}
    for name in files:
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            old = glob.glob("*.bin", root_dir=folder)
            fix = "transformers writes such files with save_pretrained" if old else SOURCE
            raise UserError(f"{path} is missing", fix)
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                tensors.update({name: file.get_tensor(name) for name in file.keys()})
        except (OSError, safetensors.SafetensorError, ValueError, RuntimeError, AttributeError) as error:
            raise UserError(f"{path} is damaged: {error}", SOURCE) from None
    return tensors


def write(folder, model, tokenizer, dtype=torch.float32, generation=None, chat=False):
    """Write a folder for AutoModelForCausalLM and AutoTokenizer. Raises UserError, OSError.

    generation: settings for sampling, if there are some already. chat: does the model know a chat format?
    """
    safetensors = needs("safetensors", "Hugging Face folders")
    from safetensors.torch import save_file
    from formats.tokenizer_json import tokenizer_files  # (not needed to read a folder)
    end = tokenizer.special.get(tokenizers.END_OF_TEXT)
    settings = tokenizer.settings
    start = tokenizer.special.get(settings.get("bos_token"), end)
    stop = tokenizer.special.get(settings.get("eos_token"), end)
    config = their_config(model.config, str(dtype).removeprefix("torch."), dict(bos_token_id=start, eos_token_id=stop))
    files = tokenizer_files(tokenizer, model.config.block_size, chat)
    if not generation:
        ends = sorted(tokenizers.ends(tokenizer)) if chat else stop
        generation = dict(bos_token_id=start, eos_token_id=ends, pad_token_id=stop, do_sample=True, temperature=0.8,
                          top_k=50)
    for name, value in {"config.json": config, "generation_config.json": generation}.items():
        files[name] = json.dumps(value, indent=1).encode()
    os.makedirs(folder, exist_ok=True)
    for name, content in files.items():
        with open(os.path.join(folder, name), "wb") as file:
            file.write(content)
    if tokenizer.kind != "hugging_face":  # to read the very same one back
        tokenizer.save(os.path.join(folder, "tokenizer"))
    path = os.path.join(folder, "model.safetensors")
    try:
        save_file(their_weights(model, dtype), path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:  # of a full disk, too
        raise OSError(str(error)) from None
    shutil.copymode(os.path.join(folder, "config.json"), path)  # safetensors makes it readable for its owner alone

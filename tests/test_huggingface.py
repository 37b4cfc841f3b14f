# SPDX-License-Identifier: GPL-3.0-only
"""Hugging Face folders, both ways: settings, tensors, tokenizers, and everything that can be wrong with a folder."""
import functools
import json
import os
import pathlib
import random
import shutil

import pytest
import torch
from conftest import FAMILIES, ROOT, error, nasty, package, random_model, script, turns, words

from text import pretrained
from formats import huggingface, tokenizer_json
import prepare
from training import checkpoint as ckpt
import sample
import tokenizer as tokenizers
import train

safetensors = package("safetensors.torch")
transformers = package("transformers")

HOLDABLE = {"gpt2": FAMILIES["gpt2"], "nanogpt": FAMILIES["nanogpt"], "modern": FAMILIES["modern"],
            "grouped": FAMILIES["grouped"], "llama": FAMILIES["llama"], "untied": dict(bias=True, tie_weights=False),
            "llama, biased": dict(FAMILIES["llama"], bias=True, tie_weights=False, vocab_size=128)}
CHARACTERS = tokenizers.CharTokenizer("\n" + "".join(map(chr, range(32, 127))))  # 101 tokens


def folder_of(path, seed=0, dtype=torch.float32, **shape):
    """A Hugging Face folder with a random model. Returns the model."""
    model = random_model(seed, **{"vocab_size": 101, **shape})
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.to(dtype))
    huggingface.write(str(path), model, CHARACTERS, dtype)
    return model


def edit(path, **change):
    values = json.loads(path.read_text())
    values.update(change)
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "DELETE"}))


def tensors_of(folder):
    return huggingface.read_tensors(str(folder))


# ----------------------------------------------------------------------------------------------------------------------
# Models


@pytest.mark.parametrize("name", HOLDABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_out_and_in_and_out_again(here, name, dtype):
    """The same tensors, bit for bit, and the same settings; between them, the same logits as the model's."""
    model = folder_of(here / "a", dtype=dtype, **{k: v for k, v in HOLDABLE[name].items() if k != "vocab_size"})
    loaded, _, run = ckpt.load_run("a")
    idx = torch.randint(101, (2, 24))
    with torch.no_grad():
        assert torch.equal(model(idx), loaded(idx))
    assert run["dtype"] == str(dtype).removeprefix("torch.")
    huggingface.write("b", loaded, CHARACTERS, dtype, run["generation"])
    a, b = tensors_of("a"), tensors_of("b")
    assert a.keys() == b.keys() and all(a[name].dtype == dtype and torch.equal(a[name], b[name]) for name in a)
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (here / "a" / file).read_bytes() == (here / "b" / file).read_bytes()
    assert a["transformer.wte.weight" if model.config.pos == "learned" else "model.embed_tokens.weight"].size(0) == 101
    assert ("lm_head.weight" in a) == (not model.config.tie_weights)


def test_what_no_class_of_theirs_holds(here):
    """The error names the switch, and nothing is written."""
    cases = {"norm": dict(norm="rmsnorm"), "mlp": dict(mlp="swiglu"), "n_kv_head": dict(n_kv_head=2),
             "qk_norm": dict(qk_norm=True), "head_dim": dict(head_dim=16)}
    cases = {**{name: [name, shape] for name, shape in cases.items()},
             "rope, layernorm": ["norm", dict(FAMILIES["modern"], norm="layernorm")],
             "rope, gelu": ["mlp", dict(FAMILIES["llama"], mlp="gelu")],
             "qwen3, bias": ["bias", dict(FAMILIES["modern"], bias=True)]}
    for switch, shape in cases.values():
        fact, fix = error(lambda _: huggingface.write("a", random_model(**{"vocab_size": 101, **shape}), CHARACTERS))
        assert fact.startswith(f"{switch}={getattr(random_model(**shape).config, switch)}, but transformers' ") and "--format=" in fix
        assert not os.path.exists("a")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_files_as_others_write_them(here, kind):
    """Several files, GPT-2's own without a prefix and with buffers; the logits are those of transformers."""
    torch.manual_seed(0)
    theirs = (transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=303, n_positions=24, n_embd=32, n_layer=2,
                                                                   n_head=4)) if kind == "gpt2" else
              transformers.LlamaForCausalLM(transformers.LlamaConfig(
                  vocab_size=303, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=24))).eval()
    theirs.save_pretrained("a", max_shard_size="20KB")
    huggingface_files(here / "a", small_encoding("cl100k"))
    assert (here / "a/model.safetensors.index.json").exists()
    idx = torch.randint(303, (2, 24))
    with torch.no_grad():
        expected = theirs(idx).logits
        assert (ckpt.load_run("a")[0](idx) - expected).abs().max() < 1e-5
        if kind == "gpt2":
            from safetensors.torch import save_file
            (here / "a/model.safetensors.index.json").unlink()
            bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors_of_all(here / "a").items()}
            save_file({**bare, "h.0.attn.bias": torch.ones(1, 1, 24, 24)}, "a/model.safetensors")
            assert (ckpt.load_run("a")[0](idx) - expected).abs().max() < 1e-5


def tensors_of_all(folder):
    from safetensors.torch import load_file
    return {name: tensor for path in folder.glob("model-*.safetensors") for name, tensor in load_file(path).items()}


# ----------------------------------------------------------------------------------------------------------------------
# What can be wrong with a folder


@pytest.fixture
def good(here):
    """The tensors of a whole folder, good/, with a small Llama."""
    folder_of(here / "good", **FAMILIES["llama"])
    return tensors_of("good")


def wrong(change):
    """What is said about a copy of good/ after change(the copy)."""
    shutil.rmtree("bad", ignore_errors=True)
    shutil.copytree("good", "bad")
    change(pathlib.Path("bad"))
    return " ".join(error(lambda _: ckpt.load_run("bad")))


def settings(**change):
    return wrong(lambda folder: edit(folder / "config.json", **change))


def tensors(good, **change):
    kept = {name: tensor for name, tensor in {**good, **change}.items() if tensor is not None}
    return wrong(lambda folder: safetensors.save_file(kept, folder / "model.safetensors"))


UNSUPPORTED = [
    (dict(model_type="bert"), "model_type=bert is not one of gpt2, llama, mistral, qwen2, qwen3"),
    (dict(model_type="qwen3", attention_bias=True), "attention_bias"),
    (dict(attention_bias=True), "mlp_bias=False, but only True is supported"),
    (dict(rope_parameters=dict(rope_type="yarn")), "factor is missing, unknown"),
    (dict(rope_scaling=dict(type="llama3")), "factor is missing, unknown"),
    (dict(rope_parameters=dict(partial_rotary_factor=0.5)), "partial_rotary_factor=0.5"),
    (dict(layer_types=["full_attention", "sliding_attention"]), "sliding_attention"),
    (dict(rope_parameters=dict(rope_type="linear", type="default")), "factor is missing, unknown"),
    (dict(is_causal=False), "is_causal=False"), (dict(hidden_act="gelu"), "hidden_act=gelu"),
    (dict(quantization_config=dict(bits=4)), "quantization_config={'bits': 4}, but"),
    (dict(hidden_size="DELETE"), "missing or unknown 'hidden_size'"),
    *((dict(rope_parameters=dict(rope_theta=theta)), "describes a model that cannot be built")
      for theta in (0, -5, float("nan"), 10**400, "1")),
    (dict(rms_norm_eps=float("nan")), "describes a model that cannot be built"),
    (dict(num_hidden_layers="two"), "describes a model that cannot be built"),
    (dict(num_attention_heads=5, head_dim="DELETE"), "describes a model that cannot be built"),
    (dict(max_position_embeddings=10**9), "is out of range; --"),
    (dict(num_hidden_layers=10**9), "is out of range; --"),
    (dict(max_position_embeddings=1 << 24, head_dim=512), "block_size=16,777,216 is too large for head_dim=512"),
    (dict(num_hidden_layers=10_000_000), "n_layer=10,000,000, but there are only 20 tensors"),
    (dict(num_hidden_layers=3), "model.layers.2.input_layernorm.weight is missing"),
    (dict(num_hidden_layers=1), "model.layers.1.input_layernorm.weight, model"),
    (dict(hidden_size=36, head_dim=8), "model.embed_tokens.weight is a tensor (101, 32) of type float, but should be a "
                                       "tensor (101, 36) of type float")]


def test_settings_that_are_not_supported(good):
    for change, said in UNSUPPORTED:
        assert said in settings(**change), change


def test_settings_that_are_no_settings(good):
    """Whatever type a value has, there is an error of two lines."""
    for name, value in dict(rms_norm_eps="1e-5", num_hidden_layers=2.0, head_dim=True, tie_word_embeddings="false",
                            vocab_size=10**30, max_position_embeddings=10**40, hidden_size=[32], model_type=["llama"],
                            rope_parameters=[3], layer_types=[[]], attention_bias="no").items():
        assert settings(**{name: value}), name


def test_tensors_that_do_not_fit(good):
    q, embedding = "model.layers.0.self_attn.q_proj.weight", good["model.embed_tokens.weight"]
    for change, said in (
            ({q: None}, f"{q} is missing"),
            ({q: good[q][1:].clone()}, f"{q} is a tensor (31, 32) of type float, but"),
            ({q: good[q].to(torch.int8)}, f"{q} is a tensor (32, 32) of type int8, but"),
            ({"lm_head.weight": torch.ones_like(embedding)}, "says that lm_head.weight is the embedding, but it is not"),
            ({"extra": torch.ones(1)}, "bad has tensors unknown to its config.json: extra"),
            ({q.replace("weight", "bias"): torch.ones(32)},
             "tensors unknown to its config.json: model.layers.0.self_attn.q_proj.bias")):
        assert said in tensors(good, **change), said

    def fewer(folder):
        edit(folder / "config.json", vocab_size=64)
        smaller = {**good, "model.embed_tokens.weight": embedding[:64].clone()}
        safetensors.save_file(smaller, folder / "model.safetensors")
    assert "101 tokens, the model only 64" in wrong(fewer)


def test_files_that_are_missing_or_damaged(good):
    assert "bad/model.safetensors is missing download its files again" in wrong(
        lambda folder: (folder / "model.safetensors").unlink())
    assert "convert *.bin files with transformers' save_pretrained" in wrong(
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"))

    def pipe(folder):
        (folder / "config.json").unlink()
        os.mkfifo(folder / "config.json")
    assert "config.json: it is a folder, a pipe" in wrong(pipe)  # and no waiting

    def no_tokenizer(folder):
        (folder / "tokenizer.json").unlink()
        shutil.rmtree(folder / "tokenizer")
    assert "has no tokenizer.json" in wrong(no_tokenizer)
    for name in ("generation_config.json", "config.json"):
        assert f"{name}: not JSON" in wrong(lambda folder: (folder / name).write_text("{"))
    content, rng = pathlib.Path("good/model.safetensors").read_bytes(), random.Random(0)
    for cut in [0, 8, *(rng.randrange(len(content)) for _ in range(20))]:
        assert "model.safetensors is damaged" in wrong(
            lambda folder: (folder / "model.safetensors").write_bytes(content[:cut])), cut


@pytest.mark.parametrize("index, said", [
    (dict(weight_map={"a": "model-1.safetensors"}), "model-1.safetensors is missing"),
    ([], "model.safetensors.index.json: all of it is of type list"),
    (dict(weight_map=[1]), "weight_map is of type list"),
    (dict(weight_map=dict(a="../good/model.safetensors")), "bad/model.safetensors is missing")])  # not outside of it
def test_a_wrong_index_of_files(good, index, said):
    def shards(folder):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert said in wrong(shards)


# ----------------------------------------------------------------------------------------------------------------------
# What a folder is for


def test_train_and_sample_from_a_folder(here, capsys):
    """sample.py reads it; train.py goes on from it, with a shorter context too, and prepare.py says how."""
    folder_of(here / "model", n_layer=1)
    (here / "text.txt").write_text(words(4000), encoding="utf-8")
    prepare.main(["text.txt", "--tokenizer=model"])
    assert "--init_from=model --dataset=text --out_dir=out/text" in capsys.readouterr().err
    assert sample.main(["model", "--prompt=the", "--temperature=0", "--max_new_tokens=5"]) is None
    assert capsys.readouterr().out.startswith("the")
    assert train.main(["--init_from=model", "--dataset=text", "--eval_only", "--device=cpu", "--compile=false"]) == 0
    before = capsys.readouterr().err
    assert "validation loss" in before
    args = ["--init_from=model", "--dataset=text", "--max_iters=20", "--warmup_iters=2", "--learning_rate=1e-2",
            "--device=cpu", "--compile=false", "--block_size=16", "--batch_size=4"]
    assert train.main(args) == 0
    model, _, run = ckpt.load_run("out/text")
    assert model.config.block_size == 16 and model.transformer.wpe.weight.size(0) == 16
    assert run["val_loss"] < float(before.split("validation loss ")[1].split(",")[0])
    assert "the shape comes with the weights" in error(train.main, *args, "--block_size=32", "--out_dir=out/b")[1]
    small_folder(here / "other")
    assert "other and data/text use different tokenizers" in error(train.main, *args, "--init_from=other", "--out_dir=out/c")[0]


def small_folder(path, **shape):
    """A folder with a model of 303 tokens and a byte-level vocabulary as others publish it. Returns both."""
    model = random_model(vocab_size=303, **shape)
    huggingface_files(path, small_encoding("cl100k"))
    tokenizer = pretrained.from_hugging_face(str(path))
    huggingface.write(str(path), model, tokenizer)
    return model, tokenizer


def test_chat(here, capsys, monkeypatch):
    """--chat speaks the folder's own format, remembers what was said, and stops at its end-of-turn token."""
    _, tokenizer = small_folder(here / "model", tie_weights=False, bias=True, block_size=128)
    (here / "model/chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}<assistant>")
    edit(here / "model/tokenizer_config.json", eos_token="<|im_end|>")
    assert ckpt.read_run("model")[0]["chat"] is True
    assert sample.main(["model", "--chat", "--prompt=the", "--temperature=0", "--max_new_tokens=5"]) is None
    assert "[5 tokens" in capsys.readouterr().err
    tensors = tensors_of("model")
    tensors["transformer.ln_f.weight"].zero_()  # a model that says nothing but 302, <|im_end|>
    tensors["transformer.ln_f.bias"].fill_(1.0)
    tensors["lm_head.weight"].zero_()[302] = 1.0
    safetensors.save_file(tensors, "model/model.safetensors")
    assert sample.main(["model", "--chat", "--prompt=the", "--temperature=0"]) is None
    found = capsys.readouterr()
    assert found.out == "\n" and "[1 token," in found.err

    seen, says = [], iter(["the", "one <|im_end|> two"])
    monkeypatch.setattr(sample, "write", lambda model, tokenizer, ids, *_: seen.append(ids) or "yes")
    monkeypatch.setattr("sys.stdin", type("Terminal", (), dict(isatty=lambda self: True))())
    monkeypatch.setattr("sys.stdout", type("Terminal", (), dict(isatty=lambda self: True))())
    monkeypatch.setattr("builtins.input", lambda _: next(says, None) or (_ for _ in ()).throw(EOFError))
    sample.main(["model", "--chat"])
    end = [302]
    first = tokenizer.encode("<user>the") + end + tokenizer.encode("<assistant>")
    assert seen == [first, first + tokenizer.encode("yes") + end + tokenizer.encode("<user>one <|im_end|> two") + end
                    + tokenizer.encode("<assistant>")]
    monkeypatch.undo()
    folder_of(here / "plain")
    assert ckpt.read_run(str(here / "plain"))[0]["chat"] is False
    assert "plain has no chat format" in error(sample.main, here / "plain", "--chat", "--prompt=x")[0]


@pytest.mark.parametrize("kind", ["char", "bpe", "unigram"])
def test_our_chat_format_leaves_and_comes_back(here, kind, capsys):
    """transformers makes the same prompts and stops where an answer ends; read back, it is a chat model still."""
    lines = mixed_lines()
    tokenizer = tokenizers.train(kind, lines, 1500)
    end, size = tokenizer.special["<|end|>"], dict(vocab_size=tokenizer.vocab_size, block_size=64)
    model = random_model(**size, tie_weights=False, bias=True)
    for name, chat in ("chat", True), ("text", False):
        huggingface.write(name, model, tokenizer, chat=chat)
        checkpoint, again = ckpt.read_run(name)
        assert checkpoint["chat"] is chat and again.chat(turns("a")) == tokenizer.chat(turns("a"))
        assert (here / name / "chat_template.jinja").exists() is chat
        assert checkpoint["generation"]["eos_token_id"] == ([tokenizer.special["<|endoftext|>"], end] if chat else
                                                            tokenizer.special["<|endoftext|>"])
    theirs = transformers.AutoTokenizer.from_pretrained("chat")
    for texts in zip(lines[::40], lines[7::40], lines[11::40]):
        for talk, answer in ((turns(*texts), True), (turns(*texts, "", system=texts[0]), False), (turns(" \n "), True)):
            due = theirs.apply_chat_template(talk, add_generation_prompt=answer, return_dict=False)
            assert (tokenizer.chat(talk) if answer else tokenizer.conversation(talk)[0]) == due, talk
    with pytest.raises(Exception, match="the roles are system, user and assistant"):
        theirs.apply_chat_template([dict(role="tool", content="x")])

    weights = model.state_dict()
    weights["transformer.ln_f.weight"].zero_()  # a model that says nothing but <|end|>
    weights["transformer.ln_f.bias"].fill_(1.0)
    weights["lm_head.weight"].zero_()[end] = 1.0
    huggingface.write("chat", model, tokenizer, chat=True)
    ids = torch.tensor([tokenizer.chat(turns("a"))])
    speaker = transformers.AutoModelForCausalLM.from_pretrained("chat")
    assert speaker.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9)[0].tolist() == [*ids[0], end]
    sample.main(["chat", "--chat", "--prompt=a", "--temperature=0"])
    found = capsys.readouterr()
    assert found.out == "\n" and "[1 token," in found.err


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers


@functools.cache
def mixed_lines(n=2000):
    """n lines or a few less: five languages, code, emoji, and strings that are meant to break a tokenizer.

    None spells a special token, which is the exception.
    """
    books = ["The old man sees a dog, doesn't he? It's 1984.", "El niño comió: ¡qué rápido! ¿Años?",
             "L'été, c'est déjà fini ; où êtes-vous ?", "Größe, Straße und Übermut — „so ist es“.",
             "天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。"]
    code = (ROOT / "model.py").read_text(encoding="utf-8").split("\n")
    rng = random.Random(5)
    pieces = [*books, *code, *"🙂 👩‍👩‍👧 🇫🇷 e\u0301 \t ▁ <0x41> <unk> 100% 3.14 \r".split(" "), *nasty(2000, seed=3)]
    lines = [rng.choice(["", "    ", "\t"]) + " ".join(rng.choice(pieces) for _ in range(rng.randrange(1, 5)))
             for _ in range(n)]
    return [line for line in lines if "<|" not in line]


@pytest.mark.parametrize("n", [2000, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["char", "bpe", "unigram", "gpt2", "cl100k", "o200k", "hugging_face"])
def test_tokenizers_give_the_same_ids(here, kind, n, request, monkeypatch):
    tokenizers_library, lines = package("tokenizers"), mixed_lines(n)
    if kind == "gpt2":
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", request.getfixturevalue("gpt2"))
        tokenizer = pretrained.from_tiktoken("gpt2")
    elif kind in ("cl100k", "o200k"):  # their expressions, with the merges that a few words need
        package("tiktoken")
        tokenizer = small_encoding(kind)
    elif kind == "hugging_face":
        huggingface_files(here / "source", small_encoding("cl100k"))
        tokenizer = pretrained.from_hugging_face("source")
    else:
        tokenizer = tokenizers.train(kind, lines if kind == "char" else lines[:3000], 1500)
    files = tokenizer_json.tokenizer_files(tokenizer, 64)
    library = tokenizers_library.Tokenizer.from_str(files["tokenizer.json"].decode())
    for line in lines:
        assert library.encode(line, add_special_tokens=False).ids == tokenizer.encode(line), repr(line)
    whole = "\n".join(lines)
    ids = tokenizer.encode(whole)
    assert library.encode(whole, add_special_tokens=False).ids == ids and library.decode(ids) == whole
    for name, i in tokenizer.special.items():
        assert library.token_to_id(name) == i and library.encode(name).ids == [i]  # the exception
    for name, content in files.items():
        (here / name).write_bytes(content)
    auto = transformers.AutoTokenizer.from_pretrained(".")
    assert auto(lines[7], add_special_tokens=False)["input_ids"] == tokenizer.encode(lines[7])
    assert auto.eos_token_id == tokenizer.special["<|endoftext|>"]


PATTERNS = {
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
              r"|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k": "|".join([r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
                       r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
                       r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
                       r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
                       r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"]),
}


def small_encoding(kind):
    """tiktoken's expression of that name with 256 bytes, some merges, and one token that only a whole word can be."""
    import base64
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [b"th", b"the", b" the", b"  ", b"    ", b"in", b"er", b" d", b"\xc3\xa9", b"\xe5\xa4", b"000", b"niqu"]
    lines = b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))
    about = dict(name=kind + "_base", pattern=PATTERNS[kind], special={"<|endoftext|>": 300, "<|im_end|>": 302})
    return pretrained.TiktokenTokenizer({"encoding.json": json.dumps(about).encode(), "encoding.tiktoken": lines})


def huggingface_files(folder, tokenizer):
    folder.mkdir(exist_ok=True)
    files = tokenizer_json.tokenizer_files(tokenizer, 64)
    spec = json.loads(files["tokenizer.json"])
    spec["model"]["ignore_merges"] = False
    spec["model"]["vocab"] = {token: i for token, i in spec["model"]["vocab"].items() if token not in ("000", "niqu")}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        dict(eos_token="<|endoftext|>", tokenizer_class="GPT2Tokenizer")))


def test_tokenizers_that_cannot_be_the_same_are_refused(monkeypatch):
    encoding = small_encoding("cl100k")
    encoding.name = "another"
    assert "the encoding another is not one of gpt2" in error(lambda _: tokenizer_json.tokenizer_files(encoding, 64))[0]
    monkeypatch.setattr(tokenizers, "round_scores", lambda tokenizer: tokenizer.model)
    old = tokenizers.train("unigram", [words(5000)], 300)
    assert "cannot be added exactly" in error(lambda _: tokenizer_json.tokenizer_files(old, 64))[0]


def test_the_quick_start_of_the_original_project(here):
    """Tokenizer, model, generate, decode, with a folder in place of the name on the hub."""
    folder_of(here / "model", **FAMILIES["gpt2"])
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained("model")
    model = AutoModelForCausalLM.from_pretrained("model")
    assert type(model).__name__ == "GPT2LMHeadModel"
    inputs = tokenizer("Hello", return_tensors="pt")
    outputs = model.generate(**inputs, max_length=20, do_sample=False, eos_token_id=[])
    text = tokenizer.decode(outputs[0], skip_special_tokens=True)
    done = script("sample.py", "model", "--prompt=Hello", "--temperature=0", "--max_new_tokens=15", "--ignore_eos")
    assert text.startswith("Hello") and done.stdout.rstrip("\n") == text.rstrip("\n")


# ----------------------------------------------------------------------------------------------------------------------
# A real model


QUESTIONS = """
    What is the capital of France? | Name three fruits. | Why is the sky blue? | Who wrote Hamlet? |
    What is 2 + 2? | Write a line about the sea. | How do I boil an egg? | What is a prime number? |
    Say hello in Spanish. | What is rain? | Tell me a joke. | What do bees make? |
    Explain gravity to a child. | What is Python? | List the primary colours. | What is the largest planet? |
    How many legs has a spider? | Why do we sleep? | What is a poem? | Help me."""


@pytest.mark.slow
def test_a_real_chat_model_enters_answers_and_leaves(here):
    """SMOLLM2 names the folder of SmolLM2-135M-Instruct, or of another chat model that transformers reads.

    (A folder made from a 4-bit file is as good here: its weights are numbers like others.)
    """
    if "SMOLLM2" not in os.environ:
        pytest.skip("the variable SMOLLM2 names no folder of a chat model such as SmolLM2-135M-Instruct")
    source = os.environ["SMOLLM2"]
    model, tokenizer, run = ckpt.load_run(source)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    questions = [question.strip() for question in QUESTIONS.split("|")]
    assert len(questions) == 20
    for question in questions:
        messages = [dict(role="user", content=question)]
        ids = tokenizer.chat(messages)
        assert ids == their_tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        idx = torch.tensor([ids])
        with torch.inference_mode():
            assert (model(idx) - theirs(idx).logits).abs().max() < 1e-4
            due = theirs.generate(idx, max_new_tokens=64, min_new_tokens=64, do_sample=False)[0, len(ids):].tolist()
        # (min_new_tokens forbids the end token until there are 64)
        ends = set(torch.tensor(theirs.generation_config.eos_token_id).flatten().tolist())

        def pick(logits):
            logits[:, sorted(ends)] = -torch.inf
            return logits.argmax(dim=-1)
        assert [token.item() for token in model.generate(idx, 64, pick)] == due
    done = script("sample.py", source, "--chat", "--prompt=What is the capital of France?", "--temperature=0")
    assert "Paris" in done.stdout
    huggingface.write("out", model, tokenizer, generation=run["generation"])
    before, after = tensors_of(source), tensors_of("out")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

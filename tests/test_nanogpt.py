# SPDX-License-Identifier: GPL-3.0-only
"""nanoGPT's checkpoints of all ages, and those of others, which are known by their names."""
import argparse
import os
import pickle

import pytest
import torch
from conftest import error, nanogpt, random_model

import sample
from training import checkpoint as ckpt

CHARACTERS = "".join(map(chr, range(33, 98)))  # 65


@pytest.fixture
def state(here):
    """out/ckpt.pt without biases, and the dict in it."""
    nanogpt(here, 65, characters=CHARACTERS)
    return torch.load("out/ckpt.pt")


def save(state, prefix="", drop=(), **weights):
    """Write it with other weights and arguments."""
    model = {prefix + name.removeprefix("_orig_mod."): tensor for name, tensor in {**state["model"], **weights}.items()}
    args = {name: value for name, value in state["model_args"].items() if name not in drop}
    torch.save({**state, "model": model, "model_args": args}, "out/ckpt.pt")


def biased(state):
    """The same with biases, and the model that it holds."""
    model = random_model(seed=3, vocab_size=65, mlp="gelu_exact", bias=True)
    weights = {name: tensor[:65] if "wte" in name or "lm_head" in name else tensor
               for name, tensor in model.state_dict().items()}
    return {**state, "model": weights, "model_args": {**state["model_args"], "bias": True}}, model


def test_bias_missing_means_true(state, capsys):
    """As in nanoGPT, whose GPTConfig has bias=True; before, they were dropped, and another text came out."""
    state, model = biased(state)
    idx = torch.randint(65, (2, 24))
    texts = []
    for drop in ((), ("bias",)):
        save(state, drop=drop)
        loaded = ckpt.load_run("out")[0]
        assert loaded.config.bias and torch.equal(loaded(idx), model(idx))
        sample.main(["out", "--prompt=ABC", "--temperature=0", "--max_new_tokens=9"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.",
                                    "_orig_mod._orig_mod.module."])
def test_every_prefix_of_compiling_and_of_ddp(state, prefix):
    due = ckpt.load_run("out")[0]
    save(state, prefix)
    loaded = ckpt.load_run("out")[0]
    assert all(torch.equal(a, b) for a, b in zip(due.state_dict().values(), loaded.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", ["transformer.h.0.attn.c_attn.bias", "transformer.h.1.mlp.c_gate.weight", "value_embeds",
                                  "transformer.h.2.ln_1.weight", "transformer.module.wte.weight"])
def test_a_tensor_without_a_place(state, name):
    """bias=False beside biases, a layer more, a fork's own: what is not used would be another model."""
    save(state, **{name: torch.ones(4)})
    fact, fix = error(lambda _: ckpt.load_run("out"))
    assert fact == f"out/ckpt.pt has tensors unknown to its settings: {name}" and "settings" in fix


def test_masks_are_no_tensors_of_the_model(state):
    save(state, "module.", **{"transformer.h.1.attn.bias": torch.ones(1, 1, 24, 24),
                              "transformer.h.1.attn.masked_bias": torch.tensor(-1e4)})
    ckpt.load_run("out")


def test_ours_have_no_more_tensors_either(tiny_run, here):
    state = ckpt.load_checkpoint(str(tiny_run / "out/words/best.pt"))
    state["model"]["transformer.h.0.attn.c_attn.bias"] = torch.ones(96)
    ckpt.save_checkpoint("best.pt", state)
    assert "unknown to its settings: transformer.h.0.attn.c_attn.bias" in error(lambda _: ckpt.load_checkpoint("best.pt"))[0]


LLAMA2C = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=64, multiple_of=32, max_seq_len=24, dropout=0.0)
STRANGERS = {
    "llama2.c": dict(model={"_orig_mod.tok_embeddings.weight": 1, "_orig_mod.layers.0.attention.wq.weight": 1},
                     model_args=LLAMA2C, iter_num=3, config=dict(dataset="tinystories")),
    "Meta's Llama": {"tok_embeddings.weight": 1, "layers.0.attention.wq.weight": 1},
    "nanochat": {"transformer.wte.weight": 1, "transformer.h.0.attn.c_q.weight": 1, "lm_head.weight": 1},
    "LitGPT": dict(model={"transformer.wte.weight": 1, "transformer.h.0.attn.qkv.weight": 1}),
    "Megatron-LM": dict(model=dict(language_model=dict(encoder={"a": 1})), checkpoint_version=3.0, iteration=5),
    "transformers": {"model.embed_tokens.weight": 1, "model.layers.0.self_attn.q_proj.weight": 1},
    "transformers, which": {"h.0.attn.c_attn.weight": 1, "wte.weight": 1},
    "PyTorch Lightning": {"pytorch-lightning_version": "2.1", "state_dict": {"net.weight": 1}, "epoch": 1},
    "modded-nanogpt": dict(step=1, code="import torch", model={"module.embed.weight": 1}, optimizers=[]),
}


def tensors(value):
    if isinstance(value, dict):
        return {key: tensors(item) for key, item in value.items()}
    return torch.ones(2, 2) if value == 1 and isinstance(value, int) else value


@pytest.mark.parametrize("whose", STRANGERS)
def test_others_are_known_by_their_names(here, whose):
    state = {key: tensors(value) if key != "model_args" else value for key, value in STRANGERS[whose].items()}
    torch.save(state, "model.pt")
    fact, fix = error(lambda _: ckpt.load_run("model.pt"))
    assert fact.startswith("model.pt is a checkpoint of ") and whose in fact and "folder" in fix.lower() or "nanoGPT" in fix


def test_what_nobody_knows(here):
    """A state_dict alone, a list, a tensor, a class: one line each, and nothing runs."""
    for value, said in (({"a.weight": torch.ones(2)}, "no format 1"), ([1], "damaged, or not a checkpoint"),
                        (torch.ones(3), "damaged, or not a checkpoint"),
                        (dict(args=argparse.Namespace(a=1)), "could run code")):
        torch.save(value, "model.pt")
        assert said in error(lambda _: ckpt.load_run("model.pt"))[0]
    with open("model.pt", "wb") as file:
        pickle.dump(dict(model={}), file)
    assert "damaged, or not a checkpoint" in error(lambda _: ckpt.load_run("model.pt"))[0]
    assert os.listdir() == ["model.pt"]

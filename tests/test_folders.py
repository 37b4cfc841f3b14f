# SPDX-License-Identifier: GPL-3.0-only
"""Folders as people have them: what is missing or of another kind is named, with what to do about it."""
import json
import shutil

import pytest
import torch
from conftest import error, package, random_model, words

import tokenizer as tokenizers
from formats import huggingface
from training import checkpoint as ckpt

FAMILY = dict(pos="rope", norm="rmsnorm", mlp="swiglu", bias=False)


@pytest.fixture(scope="module")
def vocabulary():
    return tokenizers.train("bpe", [words(20_000)], 300)


@pytest.fixture
def folder(here, vocabulary):
    """A Llama with a tokenizer.json."""
    model = random_model(vocab_size=vocabulary.vocab_size, **FAMILY)
    huggingface.write("a b", model, vocabulary, chat=True)
    shutil.rmtree("a b/tokenizer")
    (here / "a b/tokenizer.model").unlink()
    return here / "a b"


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_numbers_of_eight_bits(folder, dtype):
    theirs = package("safetensors.torch")
    weights = theirs.load_file(folder / "model.safetensors")
    theirs.save_file({name: value.to(getattr(torch, dtype)) for name, value in weights.items()}, folder / "model.safetensors")
    fact, fix = error(lambda _: ckpt.load_run("a b"))
    assert fact == f"a b/model.safetensors holds numbers of the dtype F8_{dtype[7:11].upper().rstrip('FN')}, which is not read here"
    assert fix == "the same model in bfloat16 or float32"


def test_what_git_lfs_has_not_fetched(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n")
    fact, fix = error(lambda _: ckpt.load_run("a b"))
    assert fact == "a b/model.safetensors is a pointer of git lfs, without the weights" and fix == "git lfs pull"


def test_without_a_tokenizer_json(folder):
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")  # as Llama 2 was first published
    fact, fix = error(lambda _: ckpt.load_run("a b"))
    assert fact == "a b has no tokenizer.json" and 'AutoTokenizer.from_pretrained(\'a b\').save_pretrained(\'a b\')' in fix


def test_special_tokens_that_only_their_map_names(folder):
    """Where tokenizer_config.json names an end, that file is left out: the fingerprint stays as it was."""
    kept, tokens = folder / "tokenizer_config.json", folder / "tokenizer.json"
    tokens.write_text(tokens.read_text().replace(tokenizers.END_OF_TEXT, "</s>"))
    about = json.loads(kept.read_text()) | dict(bos_token="</s>", eos_token="</s>")
    whole = json.dumps(about)
    kept.write_text(whole)
    _, due, _ = ckpt.load_run("a b")
    for name in ("bos_token", "eos_token"):
        del about[name]
    kept.write_text(json.dumps(about))
    assert "has no end-of-text token" in error(lambda _: ckpt.load_run("a b"))[0]
    (folder / "special_tokens_map.json").write_text(json.dumps(dict(eos_token=dict(content="</s>"), bos_token="</s>")))
    _, found, _ = ckpt.load_run("a b")
    assert found.settings["eos_token"] == "</s>" and tokenizers.ends(found) == tokenizers.ends(due)
    found.save("copy")
    assert tokenizers.fingerprint(tokenizers.load_from("copy")) == tokenizers.fingerprint(found)
    kept.write_text(whole)
    assert tokenizers.fingerprint(ckpt.load_run("a b")[1]) == tokenizers.fingerprint(due)


def test_a_file_of_weights_and_a_folder_of_gguf_files(folder, here):
    assert error(lambda _: ckpt.load_run("a b/model.safetensors")) == (
        "a b/model.safetensors is a part of a model", "name its folder: 'a b'")
    (here / "models").mkdir()
    for name in ("m-Q4_K_M.gguf", "m-Q8_0.gguf"):
        (here / "models" / name).write_bytes(b"GGUF")
    fact, fix = error(lambda _: ckpt.load_run("models"))
    assert fact == "there is no trained model in models" and fix == "models/m-Q4_K_M.gguf, or models/m-Q8_0.gguf"

# SPDX-License-Identifier: GPL-3.0-only
"""What export.py --format=gguf writes is a RUN again: the same tensors, settings, ids and ends."""
import pytest
import torch
from conftest import FAMILIES, nasty, package, random_model, turns, words

import tokenizer as tokenizers
from training import checkpoint as ckpt

package("gguf")
from formats import gguf

SHAPES = {name: FAMILIES[name] for name in ("gpt2", "modern", "grouped", "llama")}
SHAPES["qwen2"] = dict(FAMILIES["llama"], qkv_bias=True)


@pytest.mark.parametrize("name", SHAPES)
def test_the_same_model(here, name):
    vocabulary = tokenizers.train("bpe", [words(20_000)], 300)
    model = random_model(vocab_size=vocabulary.vocab_size, **SHAPES[name])
    gguf.write("a.gguf", model, vocabulary, chat=True)
    loaded, tokenizer, _ = ckpt.load_run("a.gguf")
    idx = torch.randint(vocabulary.vocab_size, (2, 24))
    assert loaded.config == model.config and torch.equal(loaded(idx), model(idx))
    for text in [words(300), *nasty(200)]:
        if "\u2581" not in text and "<|" not in text and text:  # (a mark is a space there)
            assert tokenizer.prompt(text) == vocabulary.encode(text)
    assert tokenizers.ends(tokenizer) == tokenizers.ends(vocabulary)
    assert tokenizer.chat(turns("the cat")) == vocabulary.chat(turns("the cat"))

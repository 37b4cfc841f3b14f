# SPDX-License-Identifier: GPL-3.0-only
"""The tokens of a GGUF file: one for each row of the matrix, each of its kind, as llama.cpp's converter has them."""
import json
import unicodedata

import pytest
import torch
from conftest import error, nasty, package, random_model
from ggufs import TEMPLATE, byte_vocabulary, fields_of, write as write_theirs

package("gguf")
import tokenizer as tokenizers
from formats import gguf
from runtime.console import UserError
from text import gguf_file, pretrained
from training import checkpoint as ckpt

ROWS = 320  # more than there are tokens, as in Qwen
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")
BYTES = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)


def qwen(model_type="BPE", normalizer="NFC", hole=False):
    """A tokenizer as Qwen's: NFC, a token for thoughts that is not special, and more rows than tokens."""
    tokens, kinds, merges = byte_vocabulary()
    ids = {token: i for i, token in enumerate(tokens)}
    if hole:
        ids["<think>"] += 3
    names = [token for token in tokens if token.startswith("<") and len(token) > 1]
    added = [dict(id=ids[name], content=name, special=name != "<think>", single_word=False, lstrip=False, rstrip=False,
                  normalized=False) for name in names]
    split = dict(type="Split", pattern=dict(Regex=QWEN2), behavior="Isolated", invert=False)
    model = dict(vocab={token: ids[token] for token in tokens if hole or token not in names}, merges=merges, type=model_type)
    spec = dict(version="1.0", added_tokens=added, decoder=BYTES, normalizer=normalizer and dict(type=normalizer),
                pre_tokenizer=dict(type="Sequence", pretokenizers=[split, BYTES]), model=model)
    if not model_type:
        del spec["model"]["type"]
    settings = dict(eos_token="<|im_end|>", chat_template=TEMPLATE)
    files = {"tokenizer.json": json.dumps(spec).encode(), "tokenizer_config.json": json.dumps(settings).encode()}
    return pretrained.HuggingFaceTokenizer("qwen", files)


def model_of(**more):
    shape = dict(pos="rope", norm="rmsnorm", mlp="swiglu", bias=False, qkv_bias=True, tie_weights=False)
    return random_model(**dict(shape, n_embd=64, vocab_size=ROWS, block_size=48) | more)


@pytest.mark.parametrize("changes", [{}, dict(model_type=""), dict(normalizer=None), dict(hole=True)])
def test_every_row_has_a_token_of_its_kind(here, changes):
    tokenizer, model = qwen(**changes), model_of()
    gguf.write("a.gguf", model, tokenizer, chat=True)
    fields = fields_of("a.gguf")
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert fields["tokenizer.ggml.pre"] == "qwen2" and fields["qwen2.vocab_size"] == len(tokens) == len(kinds) == ROWS
    vocabulary = tokenizer.library.get_vocab()
    assert all(tokens[i] == text for text, i in vocabulary.items())
    named = {tokens[i]: kind for i, kind in enumerate(kinds) if kind not in (gguf.NORMAL, gguf.UNUSED)}
    assert named == {"<|endoftext|>": 3, "<|im_start|>": 3, "<|im_end|>": 3, "<think>": 4}
    unused = [tokens[i] for i, kind in enumerate(kinds) if kind == gguf.UNUSED]
    assert unused == [f"[PAD{i}]" for i in range(ROWS) if i not in vocabulary.values()] and len(unused) > 9
    # The model and the ids come back.
    loaded, again, _ = ckpt.load_run("a.gguf")
    idx = torch.randint(ROWS, (1, 20))
    assert loaded.config == model.config and torch.equal(loaded(idx), model(idx))
    talk = [dict(role="user", content="<think>the cat</think> [PAD310]")]
    assert again.chat(talk) == tokenizer.chat(talk) and vocabulary["<think>"] in again.chat(talk)


def test_a_padded_gpt2_is_read_back_by_transformers(here):
    package("transformers"), package("accelerate")
    from formats import readback
    tokenizer = qwen(normalizer=None)
    model = random_model(vocab_size=ROWS, n_embd=64, block_size=48, bias=True)
    gguf.write("a.gguf", model, tokenizer)
    idx = torch.randint(ROWS, (1, 20))
    with torch.no_grad():
        logits, _ = readback.open_gguf("a.gguf")(idx, None)
        assert (logits - model(idx)).abs().max() < 1e-5


def test_numbers_are_of_the_types_that_llama_cpp_reads(here):
    """A config.json may have a whole number where a float belongs."""
    from gguf import GGUFReader, GGUFValueType
    gguf.write("a.gguf", model_of(rope_theta=1000000), qwen())
    fields = GGUFReader("a.gguf").fields
    assert fields["qwen2.rope.freq_base"].types == [GGUFValueType.FLOAT32]
    assert fields["qwen2.attention.layer_norm_rms_epsilon"].types == [GGUFValueType.FLOAT32]
    assert fields["qwen2.attention.head_count_kv"].types == [GGUFValueType.UINT32]
    assert fields["qwen2.rope.freq_base"].contents() == 1e6


@pytest.mark.parametrize("pre", gguf_file.WORDS)
def test_the_words_of_a_file_that_was_read(here, pre):
    """SmolLM2's digits are single there and back."""
    model = random_model(vocab_size=len(byte_vocabulary()[0]), n_embd=64, bias=True)
    write_theirs("a.gguf", model, vocabulary="bytes", pre=pre)
    loaded, tokenizer, _ = ckpt.load_run("a.gguf")
    gguf.write("b.gguf", loaded, tokenizer, chat=True)
    assert fields_of("b.gguf")["tokenizer.ggml.pre"] == {"deepseek-r1-qwen": "qwen2"}.get(pre, pre)
    again = tokenizers.load_from("b.gguf")
    for text in ["x123 it's", *nasty(200)]:
        if pre != "deepseek-r1-qwen" or unicodedata.is_normalized("NFC", text):  # (qwen2's texts become NFC)
            assert again.prompt(text) == tokenizer.prompt(text)


@pytest.mark.parametrize("change", [dict(add_prefix_space=True), dict(use_regex=True)])
def test_words_that_are_cut_otherwise(here, change):
    tokenizer = qwen()
    spec = json.loads(tokenizer.files["tokenizer.json"])
    spec["pre_tokenizer"]["pretokenizers"][-1].update(change)
    with pytest.raises(UserError, match="no pre-tokenizer like"):
        gguf.word_rule(spec)


@pytest.mark.parametrize("normalizer", ["NFKC", "Lowercase"])
def test_another_normal_form_is_refused(here, normalizer):
    fact, fix = error(lambda _: gguf.write("a.gguf", model_of(), qwen(normalizer=normalizer)), "")
    assert "no pre-tokenizer like this" in fact and "--format=hf" in fix


def test_a_part_of_a_file(here):
    """What llama-gguf-split has cut: the first part has the settings, and not all tensors."""
    def change(writer):
        writer.add_uint16("split.count", 3)
        writer.add_uint16("split.no", 0)
    write_theirs("a-00001-of-00003.gguf", model_of(), vocabulary="bytes", pre="qwen2", change=change)
    fact, fix = error(lambda _: ckpt.load_run("a-00001-of-00003.gguf"))
    assert fact == "a-00001-of-00003.gguf is one of 3 parts" and fix.startswith("llama-gguf-split --merge")

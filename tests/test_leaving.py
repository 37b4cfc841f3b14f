# SPDX-License-Identifier: GPL-3.0-only
"""Exports in other people's programs: padded batches, their trainers' masks, and the way back."""
import glob
import json

import pytest
import torch
from conftest import FAMILIES, error, nasty, random_model, words

transformers = pytest.importorskip("transformers", reason="pip install transformers")
pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
import export
from formats import huggingface
import tokenizer as tokenizers
from training import checkpoint as ckpt

TEXT = words(20_000)
TALK = [dict(role="system", content="the cat"), dict(role="user", content="a dog?"),
        dict(role="assistant", content="the old man sees"), dict(role="user", content="<|end|> "),
        dict(role="assistant", content="my friend")]


def write(folder, kind, family, chat=True):
    tokenizer = tokenizers.train(kind, [TEXT], 300)
    model = random_model(**FAMILIES[family] | dict(vocab_size=tokenizer.vocab_size, block_size=64))
    huggingface.write(folder, model, tokenizer, chat=chat)
    return model, tokenizer


def prompts_of(tokenizer):
    """Three of different lengths: (texts, ids)."""
    texts = [TEXT[100 * i:100 * i + 20 + 30 * i] for i in range(3)]
    return texts, [tokenizer.encode(text) for text in texts]


def greedy(model, ids, n=12):
    return [int(token) for token in model.generate(torch.tensor([ids]), n)]


@pytest.mark.parametrize("family", ["gpt2", "modern", "llama"])
def test_transformers_continues_a_padded_batch(here, family):
    model, tokenizer = write("a", "bpe", family)
    theirs = transformers.AutoTokenizer.from_pretrained("a")
    texts, ids = prompts_of(tokenizer)
    batch = theirs(texts, return_tensors="pt", padding=True)
    assert list(batch) == ["input_ids", "attention_mask"]  # no token_type_ids
    found = transformers.AutoModelForCausalLM.from_pretrained("a").generate(
        **batch, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert [row[-12:].tolist() for row in found] == [greedy(model, prompt) for prompt in ids]


@pytest.mark.parametrize("family", ["gpt2", "grouped"])
def test_the_onnx_graph_continues_a_padded_batch(here, family):
    """As optimum calls it: padding in front has mask 0, and positions count real tokens alone."""
    import onnxruntime
    model, tokenizer = write("a", "bpe", family)
    model.requires_grad_(False)
    export.write_onnx("a.onnx", model)
    session = onnxruntime.InferenceSession("a.onnx")
    _, prompts = prompts_of(tokenizer)
    length = max(map(len, prompts))

    # 1. The prompts in a batch of three, the shorter ones behind padding.
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts])
    tokens = torch.tensor([[1] * (length - len(ids)) + ids for ids in prompts])
    heads, head_dim = model.config.n_kv_head, model.config.head_dim
    past = [torch.zeros(3, heads, 0, head_dim).numpy()] * (2 * model.config.n_layer)
    names = [entry.name for entry in session.get_inputs()]
    found = [[], [], []]
    for _ in range(12):
        # 2. What is new, after the past.
        positions = (mask.cumsum(dim=1) - 1).masked_fill(mask == 0, 1)[:, -tokens.size(1):]
        values = [tokens.numpy(), mask.numpy(), positions.numpy(), *past]
        logits, *past = session.run(None, dict(zip(names, values)))
        assert torch.from_numpy(logits).isfinite().all()
        tokens = torch.from_numpy(logits[:, -1:].argmax(axis=2))
        mask = torch.cat((mask, torch.ones(3, 1, dtype=torch.long)), dim=1)
        for row, token in zip(found, tokens):
            row.append(token.item())
    assert found == [greedy(model, ids) for ids in prompts]


@pytest.mark.parametrize("kind", ["bpe", "unigram", "simple_bpe"])
def test_the_chat_template_says_what_is_learned(here, kind):
    """The mask that trl asks transformers for, with assistant_only_loss, is ours."""
    _, tokenizer = write("a", kind, "modern")
    theirs = transformers.AutoTokenizer.from_pretrained("a")
    due, mask = tokenizer.conversation(TALK[:3])
    found = theirs.apply_chat_template(TALK[:3], return_assistant_tokens_mask=True, return_dict=True)
    assert found["input_ids"] == list(due) and found["assistant_masks"] == list(map(int, mask))
    assert 0 < sum(mask) < len(mask)


@pytest.mark.parametrize("kind, chat", [("bpe", True), ("unigram", True), ("simple_bpe", True), ("char", False)])
def test_a_folder_that_transformers_saved_again_comes_back(here, kind, chat):
    """With the same ids, logits, ends and masks, although our own tokenizer/ is no longer in it."""
    model, tokenizer = write("a", kind, "modern", chat)
    transformers.AutoTokenizer.from_pretrained("a").save_pretrained("b")
    transformers.AutoModelForCausalLM.from_pretrained("a").save_pretrained("b")
    assert not glob.glob("b/tokenizer/*")
    again, back, run = ckpt.load_run("b")
    assert run["chat"] is chat and back.special == tokenizer.special
    known = set(TEXT) if kind == "char" else None
    for text in [TEXT[:500], *nasty(200)]:
        if known is None or set(text) <= known:
            ids = tokenizer.encode(text)
            assert back.encode(text) == ids and back.decode(ids) == text
    _, prompts = prompts_of(tokenizer)
    assert torch.equal(again(torch.tensor([prompts[0]])), model(torch.tensor([prompts[0]])))
    if chat:
        assert tokenizers.ends(back) == tokenizers.ends(tokenizer)
        assert [list(part) for part in back.conversation(TALK)] == [list(part) for part in tokenizer.conversation(TALK)]


def test_what_the_converter_of_llama_cpp_reads(here):
    """n_ctx of GPT-2; of bpe, SentencePiece's own file, and that no space is put before a text."""
    model, tokenizer = write("a", "bpe", "gpt2")
    assert json.load(open("a/config.json"))["n_ctx"] == model.config.block_size
    assert (here / "a/tokenizer.model").read_bytes() == tokenizer.model
    assert json.load(open("a/tokenizer_config.json"))["add_prefix_space"] is False
    write("b", "unigram", "gpt2")  # its scores would be read as those of bpe
    assert not (here / "b/tokenizer.model").exists()


def test_an_adapter_of_peft(here):
    (here / "a").mkdir()
    (here / "a/adapter_config.json").write_text("{}")
    fact, fix = error(lambda _: ckpt.load_run("a"), "")
    assert fact == "a is an adapter of peft, without the model that it corrects"
    assert "merge_and_unload().save_pretrained" in fix

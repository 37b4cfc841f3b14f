# SPDX-License-Identifier: GPL-3.0-only
"""GGUF files: transformers' reader finds the same model in them, and llama.cpp writes the same text."""
import json
import os
import subprocess

import pytest
import torch
from conftest import FAMILIES, error, nasty, random_model, script, turns, words

pytest.importorskip("gguf", reason="pip install gguf")
pytest.importorskip("transformers", reason="pip install transformers")
pytest.importorskip("accelerate", reason="pip install accelerate")
import export
from formats import gguf, readback
import tokenizer as tokenizers
from text import pretrained

SHAPES = {name: FAMILIES[name] for name in ("gpt2", "modern", "grouped", "llama")}
SHAPES["qwen2"] = dict(FAMILIES["llama"], qkv_bias=True)


@pytest.fixture(scope="module")
def vocabulary():
    return tokenizers.train("bpe", [words(20_000)], 300)


def model_of(family, vocabulary, **more):
    shape = dict(vocab_size=vocabulary.vocab_size, n_embd=64, block_size=48)
    return random_model(**SHAPES[family] | shape | more)


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("dtype", list(gguf.DTYPES))
def test_transformers_reads_the_same_model(here, vocabulary, family, dtype):
    model = model_of(family, vocabulary)
    gguf.write("a.gguf", model, vocabulary, dtype)
    step = readback.open_gguf("a.gguf")
    idx = torch.randint(vocabulary.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    exact = model(idx)
    gguf.round_weights(model, dtype)
    rounded = model(idx)
    with torch.no_grad():
        logits, _ = step(idx, None)
    assert (logits - rounded).abs().max() < 1e-4
    assert torch.equal(exact, rounded) == (dtype == "float32")


def test_the_tensors_are_ours_bit_for_bit(here, vocabulary):
    from gguf import GGUFReader
    model = model_of("modern", vocabulary)  # Qwen3, of which no row is moved
    gguf.write("a.gguf", model, vocabulary)
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in GGUFReader("a.gguf").tensors}
    weights = model.state_dict()
    assert torch.equal(tensors["token_embd.weight"], weights["transformer.wte.weight"][:vocabulary.vocab_size])
    q, k, v = (tensors[f"blk.1.attn_{part}.weight"] for part in "qkv")
    assert torch.equal(torch.cat((q, k, v)), weights["transformer.h.1.attn.c_attn.weight"])
    gate, up = tensors["blk.0.ffn_gate.weight"], tensors["blk.0.ffn_up.weight"]
    assert torch.equal(torch.cat((gate, up)), weights["transformer.h.0.mlp.c_fc.weight"])
    assert torch.equal(tensors["output_norm.weight"], weights["transformer.ln_f.weight"])


def test_the_vocabulary_and_the_chat_format(here, vocabulary):
    from gguf import GGUFReader
    gguf.write("a.gguf", model_of("llama", vocabulary), vocabulary, chat=True)
    fields = {name: field.contents() for name, field in GGUFReader("a.gguf").fields.items()}
    pieces = [vocabulary.processor.id_to_piece(i) for i in range(vocabulary.vocab_size)]
    assert fields["tokenizer.ggml.tokens"] == pieces
    assert fields["tokenizer.ggml.add_space_prefix"] is False and fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.ggml.eos_token_id"] == vocabulary.special[tokenizers.END]
    template, talk = fields["tokenizer.chat_template"], turns("a", "b", "c")
    assert "generation %}" not in template  # tags that only transformers knows
    assert pretrained.render(template, messages=talk) == pretrained.render(tokenizers.CHAT_TEMPLATE, messages=talk)
    kinds = fields["tokenizer.ggml.token_type"]
    assert all((kinds[i] == gguf.CONTROL) == (pieces[i] in tokenizers.SPECIAL) for i in range(len(pieces)))


# How well-known models cut a text into words, and llama.cpp's name for it
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
BYTES = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
REGEX_BYTES = dict(BYTES, use_regex=True)


def words_by(*steps):
    return dict(type="Sequence", pretokenizers=list(steps))


def split(regex):
    return dict(type="Split", pattern=dict(Regex=regex), behavior="Isolated", invert=False)


RULES = {
    "gpt-2": REGEX_BYTES,
    "llama-bpe": words_by(split(LLAMA3), BYTES),
    "qwen2": words_by(split(LLAMA3.replace("{1,3}", "")), BYTES),
    "smollm": words_by(dict(type="Digits", individual_digits=True), REGEX_BYTES),
}


def learned(rule):
    """A vocabulary that the package tokenizers learns with these words, as a Hugging Face tokenizer."""
    import tokenizers as library
    bytes_first = list(pretrained.byte_alphabet())
    trainer = library.trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"],
                                          initial_alphabet=bytes_first, show_progress=False)
    spec = dict(version="1.0", added_tokens=[], pre_tokenizer=rule, decoder=BYTES,
                model=dict(type="BPE", vocab={}, merges=[]))
    tokenizer = library.Tokenizer.from_str(json.dumps(spec))
    tokenizer.train_from_iterator([words(10_000) + " 1234567 it's\n\n  x"], trainer)
    return pretrained.HuggingFaceTokenizer("t", {"tokenizer.json": tokenizer.to_str().encode()})


@pytest.mark.parametrize("name", RULES)
def test_llama_cpps_name_of_the_words(here, name):
    tokenizer = learned(RULES[name])
    gguf.write("a.gguf", model_of("modern", tokenizer), tokenizer)
    from gguf import GGUFReader
    fields = {name: field.contents() for name, field in GGUFReader("a.gguf").fields.items()}
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", name)
    vocabulary = tokenizer.library.get_vocab()
    assert fields["tokenizer.ggml.tokens"] == sorted(vocabulary, key=vocabulary.get)


def test_a_byte_level_vocabulary_has_the_same_ids(here, gpt2, monkeypatch):
    from transformers import AutoTokenizer
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", gpt2)
    vocabulary = tokenizers.get("gpt2")
    model = random_model(vocab_size=vocabulary.vocab_size, **FAMILIES["gpt2"])
    gguf.write("a.gguf", model, vocabulary)
    theirs = AutoTokenizer.from_pretrained(".", gguf_file="a.gguf")
    for text in [words(200), *nasty(300)]:
        if "<|endoftext|>" not in text:
            assert theirs(text, add_special_tokens=False)["input_ids"] == vocabulary.encode(text)


def test_a_gelu_that_llama_cpp_does_not_have(here, vocabulary):
    model = model_of("gpt2", vocabulary, mlp="gelu_exact")
    fact, _ = error(lambda _: gguf.write("a.gguf", model, vocabulary), "")
    assert fact == "mlp=gelu_exact, but llama.cpp computes gelu by tanh"
    model = model_of("llama", vocabulary, rope_scaling="linear,factor=2.5")
    fact, _ = error(lambda _: gguf.write("a.gguf", model, vocabulary), "")
    assert fact == "rope_scaling=linear,factor=2.5 is not written to GGUF files"


@pytest.mark.parametrize("kind", ["char", "unigram", "simple_bpe"])
def test_vocabularies_that_llama_cpp_does_not_have(here, kind):
    vocabulary = tokenizers.train(kind, [words(20_000)], 300)
    fact, fix = error(lambda _: gguf.write("a.gguf", model_of("modern", vocabulary), vocabulary), "")
    assert "llama.cpp" in fact and "bpe" in fix


@pytest.fixture
def run(tiny_run, here, vocabulary):
    """A run whose tokenizer llama.cpp has."""
    from training import checkpoint as ckpt
    model = model_of("modern", vocabulary)
    checkpoint = ckpt.load_checkpoint(f"{tiny_run}/out/words/best.pt")
    os.makedirs("run")
    vocabulary.save("run/tokenizer")
    ckpt.save_checkpoint("run/best.pt", checkpoint | dict(
        model=model.state_dict(), settings=checkpoint["settings"] | vars(model.config),
        tokenizer_sha256=tokenizers.fingerprint(vocabulary)))
    return "run"


def test_export(run, here, capsys):
    """By the command line: proven, and with its row and its use in the model card."""
    assert export.main([run, "--format=gguf", "--quantize=q8_0", "--out=out"]) == 0
    said = capsys.readouterr()
    assert "gguf: logits within" in said.err
    assert "| model.gguf | 0.1 MB | 0.0e+00 |" in said.out  # rounded first, like the model that it is compared with
    card = (here / "out/README.md").read_text()
    assert "q8_0" in card and "model.gguf" in card and "ollama create" in card


def test_only_gguf_files_are_quantized_like_this(run, here):
    fact, fix = error(export.main, run, "--format=hf,gguf", "--quantize=q4_1")
    assert fact == "--quantize=q4_1 is only for GGUF files" and fix == "--format=gguf --quantize=q4_1"


def test_a_full_disk(run, here):
    done = script("export.py", run, "--out=x", "--format=gguf", cwd=here, file_size=40_000)
    assert done.returncode == 1 and done.stderr.count("error: cannot write") == 1, done.stderr
    assert "Traceback" not in done.stderr and not list(here.glob("x/*"))


def ask_llama_cpp(here, **questions):
    """Its ids of the texts, and greedy tokens after the prompts. Needs NODE_LLAMA_CPP, a folder of its package."""
    folder = os.environ.get("NODE_LLAMA_CPP")
    if not folder:
        pytest.skip("the environment variable NODE_LLAMA_CPP does not name a folder of node-llama-cpp")
    (here / "questions.json").write_text(json.dumps(questions))
    (here / "ask.mjs").write_text(ASK.replace("FOLDER", os.path.abspath(folder)))
    done = subprocess.run(["node", "ask.mjs"], capture_output=True, text=True, timeout=300, check=True)
    return json.loads(done.stdout.partition("ANSWER")[2])


@pytest.mark.slow
@pytest.mark.parametrize("family", SHAPES)
def test_llama_cpp_writes_the_same_text(here, vocabulary, family):
    model = model_of(family, vocabulary, block_size=256)
    gguf.write("a.gguf", model, vocabulary)
    texts = [words(80, seed=i) for i in range(20)]
    texts += [text for text in nasty(150) if text and not set(text) & {"\0", tokenizers.SPACE_MARK}]
    prompts = [vocabulary.encode(text)[:20] for text in texts[:4]]
    answer = ask_llama_cpp(here, texts=texts, prompts=prompts, n=24)
    assert answer["ids"] == [vocabulary.encode(text) for text in texts]
    for prompt, theirs in zip(prompts, answer["tokens"]):
        logits = model(torch.tensor([prompt + theirs[:-1]]))[0, -len(theirs):]
        chosen = logits[range(len(theirs)), theirs]
        assert (logits.amax(dim=1) - chosen).max() < 1e-2  # greedy, but for ties: its cache holds float16


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_llama_cpp_cuts_the_same_words(here, name):
    tokenizer = learned(RULES[name])
    gguf.write("a.gguf", model_of("modern", tokenizer), tokenizer)
    texts = [words(80, seed=i) + " 12345 it's I'LL" for i in range(5)]
    texts += [text for text in nasty(150) if text and "\0" not in text]
    answer = ask_llama_cpp(here, texts=texts, prompts=[], n=0)
    different = [text for text, ids in zip(texts, answer["ids"]) if ids != tokenizer.encode(text)]
    assert different == []


ASK = """
import {getLlama} from "FOLDER/node_modules/node-llama-cpp/dist/index.js";
import fs from "fs";
const {texts, prompts, n} = JSON.parse(fs.readFileSync("questions.json"));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", progressLogs: false});
const model = await llama.loadModel({modelPath: "a.gguf", gpuLayers: 0});
const answer = {ids: texts.map((text) => model.tokenize(text)), tokens: []};
for (const prompt of prompts) {
  const context = await model.createContext({contextSize: 256});
  const tokens = [];
  for await (const token of context.getSequence().evaluate(prompt, {temperature: 0})) {
    tokens.push(token);
    if (tokens.length >= n) break;
  }
  answer.tokens.push(tokens);
  await context.dispose();
}
console.log("ANSWER" + JSON.stringify(answer));
process.exit(0);
"""

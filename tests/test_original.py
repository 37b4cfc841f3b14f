# SPDX-License-Identifier: GPL-3.0-only
"""docs/from-the-original.md is true: all commands, options and fields of the original have a row, what stands beside
them exists here, a checkpoint comes over with its tokenizer, and the programs of its guides run word for word."""
import ast
import contextlib
import importlib
import io
import json
import math
import random
import re
import shlex
import shutil
import string
import subprocess

import pytest
import torch
from conftest import ROOT, chdir, error, nasty
from servers import serving
from torch.nn import functional as F

import evaluate
import export
from bench.__main__ import BENCHES
from formats import huggingface
from model import GPT, PRESETS, GPTConfig, outline
import prepare
from runtime.settings import load
import sample
import serve
import tokenizer as tokenizers
import train
from training import checkpoint as ckpt

PAGE = (ROOT / "docs/from-the-original.md").read_text(encoding="utf-8")
SETTINGS = {"train.py": train.TrainConfig, "sample.py": sample.SampleConfig, "prepare.py": prepare.PrepareConfig,
            "tokenizer.py": tokenizers.TokenizerConfig, "export.py": export.ExportConfig,
            "serve.py": serve.ServeConfig, "evaluate.py": evaluate.EvaluateConfig}

# What the original has, at commit 93f3cec: its scripts, their options, and the fields of its server.
SCRIPTS = """download_and_prepare train_tokenizer model_test train_model train_model_improved generate_text
    evaluate_model export_model inference_server optimized_inference_server quantization mixed_precision data_loader
    optimized_data_loader performance_monitor convert_10k_model enterprise_integration"""
COMMANDS = "prepare-data train-tokenizer test-model train-model inference evaluate"
OPTIONS = """output min-words input vocab-size model-type output-dir character-coverage max-sentence-length no-test
    model-size all-sizes device save-results tokenizer-dir data-file seq-len batch-size learning-rate max-steps
    warmup-steps gradient-accumulation-steps resume save-every model-path prompt max-length eval-data metrics
    validation-data eval-every early-stopping-patience model_dir max_length temperature top_k top_p eval_data
    generation_prompts format output_dir optimize_for_inference model_path host port use_quantization cache_size
    max_batch_size num_workers workers"""
SHAPE = "vocab_size n_layer n_head n_embd block_size dropout bias"
PATHS = """/generate /generate/stream /generate/batch /model-info /info /health /metrics /docs /redoc"""
FIELDS = """prompt max_length max_tokens temperature top_k top_p num_return_sequences stop_sequences prompts
    generated_text generation_time parameters token done model_name model_size vocab_size max_length format loaded_at
    n_layer n_head n_embd block_size device status model_loaded uptime_seconds total_requests detail"""
SAVED = "model_state_dict optimizer_state_dict scheduler_state_dict config epoch"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)


def run(program, names=None):
    """What a program of the page prints. names: those that a program before it has left."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(program, "a program of the page", "exec"), {} if names is None else names)
    return out.getvalue()


LINES = [line for block in blocks("sh") for line in block.replace("\\\n", " ").strip().split("\n")]
PROSE = re.sub(r"^```.*?^```\n", "", PAGE, flags=re.M | re.S)
QUOTED = re.findall(r"`([^`\n]+)`", PROSE)


# ----------------------------------------------------------------------------------------------------------------------
# The tables


@pytest.mark.parametrize("names, how", [
    (SCRIPTS, r"`{}\.py\b"), (COMMANDS, r"`main\.py {}\b"), (OPTIONS, r"--{}(?![\w-])"), (SHAPE, "`{}`"),
    (PATHS, "(GET|POST) {}[`,]"), (FIELDS, r'[`"]{}[`"]'), (SAVED, "`{}`")],
    ids=["scripts", "commands", "options", "shape", "paths", "fields", "saved"])
def test_all_names_of_the_original_are_on_the_page(names, how):
    for name in names.split():
        assert re.search(how.format(re.escape(name)), PROSE), name


def commands():
    """The new commands: those of the tables, and the lines of the blocks."""
    return [quote for quote in QUOTED if quote.startswith("python ")] + LINES


def test_there_are_commands():
    assert len(commands()) == 24 and {shlex.split(command)[1] for command in commands()} == {*SETTINGS, "-m"}


@pytest.mark.parametrize("command", commands())
def test_a_new_command_is_one(command):
    """Its settings exist and have values of the right type."""
    _, script, *arguments = shlex.split(command)
    if script == "-m":
        package, name = arguments
        assert package == "bench" and name in BENCHES and importlib.import_module(f"bench.{name}")
        return
    is_training = script == "train.py"
    _, _, bare = load(SETTINGS[script], arguments, presets=PRESETS if is_training else None, files=is_training)
    assert len(bare) <= (2 if script == "evaluate.py" else 1)


def test_a_new_option_is_one():
    """`train.py --max_iters` and so on."""
    found = [match.groups() for match in map(re.compile(r"(\w+\.py) --(\w+)(=.*)?").fullmatch, QUOTED) if match]
    found = [(script, name, value) for script, name, value in found if script in SETTINGS]  # not of the original
    assert len(found) == 29
    for script, name, value in found:
        assert name in SETTINGS[script].__dataclass_fields__, (script, name)
        if value:
            load(SETTINGS[script], [f"--{name}{value}"], presets=PRESETS if script == "train.py" else None)


def test_the_default_training_has_the_model_of_the_original():
    line, = (line for line in LINES if "out/as-before" in line)
    settings, _, _ = load(train.TrainConfig, shlex.split(line)[2:], presets=PRESETS, files=True)
    due = dict(vocab_size=32000, n_layer=6, n_head=8, n_embd=512, block_size=512, dropout=0.1, bias=True,
               mlp="gelu_exact", pos="learned", norm="layernorm", tie_weights=True, weight_decay=0.01, beta2=0.95)
    assert {name: getattr(settings, name) for name in due} == due
    for name, count in (("small", "35,823,616"), ("medium", "111,204,864"), ("large", "337,176,576")):
        model = outline(GPTConfig(**PRESETS[f"openllm-{name}"]), 1000)
        assert count in PROSE and f"{model.n_params():,}" == count


def test_a_run_has_what_the_page_says(tiny_run):
    folder = tiny_run / "out/words"
    assert {"best.pt", "ckpt_00000040.pt", "log.jsonl"} <= {path.name for path in folder.iterdir()}
    assert len(list(folder.glob("ckpt_*.pt"))) == 2
    best, last = (ckpt.load_checkpoint(str(folder / name)) for name in ("best.pt", "ckpt_00000040.pt"))
    assert {"model", "settings", "step"} <= best.keys() and "optimizer" in last and "optimizer" not in best


# ----------------------------------------------------------------------------------------------------------------------
# Data and a model of the original

OLD_SHAPE = dict(vocab_size=128, n_layer=2, n_head=2, n_embd=32, block_size=64, dropout=0.1, bias=True)
SAID = "the cat sees a dog my friend likes The History of old men caf\u00e9 na\u00efve hears finds 1991".split()


def passage(rng):
    return " ".join(rng.choice(SAID) for _ in range(rng.randrange(11, 40))) + "."


def old_checkpoint():
    """What train_model.py of the original writes, of random weights; the causal mask is one of the tensors."""
    numbers = torch.Generator().manual_seed(0)
    rows, C, T = OLD_SHAPE["vocab_size"], OLD_SHAPE["n_embd"], OLD_SHAPE["block_size"]
    shapes = {"wte.weight": (rows, C), "wpe.weight": (T, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    for i in range(OLD_SHAPE["n_layer"]):
        for name, out in (("ln_1", 0), ("attn.c_attn", 3 * C), ("attn.c_proj", C), ("ln_2", 0), ("mlp.c_fc", 4 * C),
                          ("mlp.c_proj", C)):
            width = 4 * C if name == "mlp.c_proj" else C
            shapes[f"h.{i}.{name}.weight"] = (out, width) if out else (C,)
            shapes[f"h.{i}.{name}.bias"] = (out or C,)
    weights = {f"transformer.{name}": torch.randn(shape, generator=numbers) * 0.2 for name, shape in shapes.items()}
    for i in range(OLD_SHAPE["n_layer"]):
        weights[f"transformer.h.{i}.attn.bias"] = torch.ones(T, T).tril().view(1, 1, T, T)
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    log = dict(step=3, loss=5.2, perplexity=181.3, learning_rate=3e-4, step_time=0.1, tokens_per_second=20.0)
    return dict(step=3, epoch=0, model_state_dict=weights, optimizer_state_dict=dict(state={}, param_groups=[]),
                scheduler_state_dict=dict(last_epoch=3), best_loss=5.2, training_log=[log],
                config=dict(OLD_SHAPE, model_name="gpt-small"))


def old_logits(weights, idx):
    """What the original's GPTModel computes: core/src/model.py, in functions."""
    w = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    B, T = idx.shape
    x = w["wte.weight"][idx] + w["wpe.weight"][:T]
    for i in range(OLD_SHAPE["n_layer"]):
        h = f"h.{i}"
        heads = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").view(B, T, 3, OLD_SHAPE["n_head"], -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (B, n_head, T, head_dim) each
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
        scores = scores.masked_fill(w[f"{h}.attn.bias"][:, :, :T, :T] == 0, -torch.inf)
        x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{h}.attn.c_proj")
        x = x + linear(F.gelu(linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")), f"{h}.mlp.c_proj")
    return norm(x, "ln_f") @ w["lm_head.weight"].T


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """A folder in which the original has prepared its data, learned its vocabulary and trained a tiny model."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    folder = tmp_path_factory.mktemp("old")
    for name in ("data/clean", "data/tokenizer", "models/mine"):
        (folder / name).mkdir(parents=True)
    rng = random.Random(0)
    lines = [passage(rng) for _ in range(400)]
    (folder / "data/clean/training_data.txt").write_text("".join(f"{line}\n" for line in lines + lines[:100]))
    with chdir(folder):
        sentencepiece.SentencePieceTrainer.train(  # with the options of its train_tokenizer.py
            input="data/clean/training_data.txt", model_prefix="data/tokenizer/tokenizer", minloglevel=2,
            vocab_size=OLD_SHAPE["vocab_size"], model_type="bpe", character_coverage=0.9995, max_sentence_length=4192,
            input_sentence_size=10_000_000, shuffle_input_sentence=True, pad_id=0, unk_id=1, bos_id=2, eos_id=3,
            split_by_unicode_script=True, split_by_whitespace=True, remove_extra_whitespaces=True,
            normalization_rule_name="identity")
        torch.save(old_checkpoint(), "models/mine/best_model.pt")
    return folder


@pytest.fixture(scope="module")
def brought(old):
    """The same folder, after the programs of the page."""
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    passages, model, *_ = blocks("python")
    with chdir(old):
        run(passages)
        run(model)
    return old


def test_files_of_the_original_are_refused(old, monkeypatch):
    """Checkpoints with the error that the page shows; exports and tokenizers, too."""
    monkeypatch.chdir(old)
    shown = re.search(r"^\$ python sample\.py (.*)\nerror: (.*)\nfix: (.*)\n", PAGE, re.M).groups()
    assert (shown[0], *error(sample.main, shown[0])) == shown
    (old / "exports").mkdir()
    (old / "exports/config.json").write_text(json.dumps(dict(OLD_SHAPE, model_type="gpt", architectures=["GPTModel"])))
    assert "model_type=gpt is not one of gpt2, llama, mistral, qwen2, qwen3" in error(sample.main, "exports")[0]
    text = "data/clean/training_data.txt"
    assert "data/tokenizer holds no tokenizer" in error(prepare.main, text, "--tokenizer=data/tokenizer")[0]


def test_a_checkpoint_comes_over_with_the_same_logits(brought):
    model, _, _ = ckpt.load_run(str(brought / "models/mine-hf"))
    assert vars(model.config).items() >= dict(OLD_SHAPE, dropout=0.0, mlp="gelu_exact").items()
    idx = torch.randint(OLD_SHAPE["vocab_size"], (2, OLD_SHAPE["block_size"]))
    with torch.no_grad():
        assert (model(idx) - old_logits(old_checkpoint()["model_state_dict"], idx)).abs().max() < 1e-5


def test_its_tokenizer_comes_over_with_the_same_ids(brought):
    import sentencepiece
    library = sentencepiece.SentencePieceProcessor(model_file=str(brought / "data/tokenizer/tokenizer.model"))
    tokenizer = tokenizers.load_from(str(brought / "models/mine-hf"))
    rng = random.Random(1)
    known = [passage(rng) for _ in range(100)]
    letters = ["".join(rng.choices("".join(SAID) + "    z\n", k=rng.randrange(40))) for _ in range(500)]
    others = [text for text in nasty(500) if "\u2581" not in text and "<unk>" not in text]
    assert len(others) > 400
    for text in known + letters + others:
        assert tokenizer.encode(text) == library.encode(text), text
    for text in known:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.special["<|endoftext|>"] == library.eos_id()


def test_every_passage_becomes_a_document(brought):
    lines = (brought / "data/clean/training_data.txt").read_text().splitlines()
    rows = [json.loads(row)["text"] for row in (brought / "passages.jsonl").read_text().splitlines()]
    assert rows == lines


def test_the_scripts_read_what_came_over(brought, monkeypatch, capsys):
    """The commands after the program."""
    monkeypatch.chdir(brought)
    lines = [line for line in LINES if "mine-hf" in line]
    assert [shlex.split(line)[1] for line in lines] == ["sample.py", "prepare.py", "train.py"]
    (_, _, *sampling), (_, _, *preparing), (_, _, *training) = map(shlex.split, lines)
    assert not sample.main(sampling) and capsys.readouterr().out.startswith("The history of")
    assert not prepare.main(preparing)
    said = capsys.readouterr().err
    assert "400 documents" in said and "100 exact duplicates" in said
    assert not train.main([*training, "--max_iters=3", "--eval_iters=1", "--compile=false", "--batch_size=2"])
    assert ckpt.load_checkpoint("out/passages/best.pt")["source"] == ["passages.jsonl"]


# ----------------------------------------------------------------------------------------------------------------------
# The programs of its guides


CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
PROGRAMS = blocks("python")[2:]
CURLS = [line for block in blocks("bash") for line in block.strip().split("\n\n")]


def goes_on(prompt, n):
    """What the model below writes after a prompt."""
    first = CHARACTERS.index(prompt[-1]) + 1
    return "".join(CHARACTERS[(first + i) % len(CHARACTERS)] for i in range(n))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with exports/small/hf: a model that knows the order of the characters, and nothing else.

    After each, the next one is so much more likely than all others that every way to sample gives it.
    """
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    folder, tokenizer = tmp_path_factory.mktemp("exported"), tokenizers.CharTokenizer(CHARACTERS)
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=104, block_size=256, vocab_size=tokenizer.vocab_size, bias=True,
                          tie_weights=False))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.transformer.ln_f.weight.fill_(1)
        for character in CHARACTERS:
            (i,), (following,) = tokenizer.encode(character), tokenizer.encode(goes_on(character, 1))
            model.transformer.wte.weight[i, i] = 1
            model.lm_head.weight[following, i] = 10
    huggingface.write(str(folder / "exports/small/hf"), model, tokenizer)
    return folder


@pytest.fixture(scope="module")
def client(exported):
    """A client to the server of that model."""
    loaded = ckpt.load_run(str(exported / "exports/small/hf"))
    with serving(*loaded[:2], run=loaded[2]) as client:
        assert client.server.state == "ok"
        yield client


def at(text, client):
    """A program or a line of the page, for this server."""
    assert "http://localhost:8000" in text
    return text.replace("http://localhost:8000", f"http://127.0.0.1:{client.port}")


def test_there_are_five_programs_and_three_lines():
    assert len(PROGRAMS) == 5 and len(CURLS) == 3 and all(line.startswith("curl ") for line in CURLS)
    assert "Louis Chua Bean Chong, GPL-3.0" in PAGE


def test_the_programs_for_transformers(exported, monkeypatch):
    """The quick start of the user guide, and its prompts in turn."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.chdir(exported)
    names = {}
    start = "The future of artificial intelligence"
    assert run(PROGRAMS[0], names=names) == f"{start}{goes_on(start, 100)}\n"
    due = [f"Prompt: {prompt}\nGenerated: {prompt}{goes_on(prompt, 50)}\n\n" for prompt in (
        "The history of computers", "Machine learning applications", "Future of technology")]
    assert run(PROGRAMS[1], names=names) == "".join(due)


def test_the_client_of_the_user_guide(client):
    assert run(at(PROGRAMS[2], client)) == goes_on("Explain machine learning", 50) + "\n"


def test_the_client_of_the_deployment_guide(client):
    assert run(at(PROGRAMS[3], client)) == f"Generated: {goes_on('Machine learning algorithms', 50)}\n"


def test_the_monitor_of_the_deployment_guide(client):
    health, info, seconds, status = run(at(PROGRAMS[4], client)).splitlines()
    assert (health, status) == ("Health: 200", "Status: 200")
    assert re.fullmatch(r"Response time: \d+\.\d\ds", seconds)
    info = ast.literal_eval(info.removeprefix("Model Info: "))
    assert info == client.get("/model-info").json
    assert (info["name"], info["context"], info["vocab_size"]) == ("hf", 256, 101)


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_curl_lines(client):
    def answer(line):
        done = subprocess.run(["bash", "-c", at(line, client)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    generated, info, health = map(answer, CURLS)
    assert generated["generated_text"] == goes_on("The history of artificial intelligence", 50)
    assert info == client.get("/model-info").json and health == {"status": "ok"}


# ----------------------------------------------------------------------------------------------------------------------
# The table of the server


def test_paths(client):
    paths = dict.fromkeys(("/model-info", "/info", "/health", "/metrics", "/"), 200) | {"/docs": 404, "/redoc": 404}
    assert set(re.findall(r"GET (/[\w/-]*)", PROSE)) == paths.keys()
    assert {path: client.get(path).status for path in paths} == paths
    for path in ("/generate/stream", "/generate/batch"):
        assert client.post(path, prompt="a").status == 404


def test_requests_and_replies(client):
    fields = dict(prompt="abc", temperature=0.7, top_k=40, top_p=0.9)
    reply = client.generate(**fields, max_length=5)
    assert reply["generated_text"] == "defgh" == client.text(**fields, max_tokens=5)
    assert type(reply["time"]) is float and not {"prompt", "parameters", "generation_time"} & reply.keys()
    *parts, end = client.events(prompt="abc", max_tokens=5)
    assert "".join(part["text"] for part in parts) == "defgh" and end["text"] == "" and end["finish_reason"] == "length"
    defaults = client.get("/info").json["defaults"]
    assert [defaults[name] for name in ("temperature", "top_k", "top_p", "max_tokens")] == [0.8, 50, 1, 128]


def test_old_fields_are_refused_by_name(client):
    for name, value in (("stop_sequences", ["c"]), ("num_return_sequences", 2), ("prompts", ["a", "b"])):
        message = client.refused(name, prompt="a", **{name: value})
        assert message.startswith(f'there is no field "{name}"'), message
    assert "does not fit in the context" in client.refused("max_length", prompt="a", max_length=256)
    assert client.text("abc", stop="f") == "de"
    both = client.complete(["abc", "xyz"], n=2, max_tokens=2)["choices"]
    assert [choice["text"] for choice in both] == ["de", "de", "{|", "{|"]
    assert client.post("/v1/completions", prompt=list(string.ascii_letters[:9])).error["param"] == "prompt"


def test_the_facts_of_the_model(client):
    info = client.get("/info").json
    row, = re.findall(r"^\| info: (.*) \| the same", PROSE, re.M)
    assert set(re.findall(r"`(\w+)`", row)) | {"name", "context"} <= info.keys()
    assert not {"model_name", "model_size", "max_length", "format", "loaded_at"} & info.keys()
    assert info["parameters"] == client.model.n_params()

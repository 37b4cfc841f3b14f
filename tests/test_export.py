# SPDX-License-Identifier: GPL-3.0-only
"""export.py: every format survives, proves itself, and is refused by name where it cannot hold a model."""
import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec

import numpy
import pytest
import torch
from conftest import FAMILIES, ROOT, chat_run, chdir, error, package, random_model, script, turns

import export
from formats import huggingface
import model as model_file
from formats import readback
from training import checkpoint as ckpt
import tokenizer as tokenizers

for name in ("transformers", "safetensors", "onnx", "onnxscript", "onnxruntime"):
    if not find_spec(name):  # (to import them all takes seconds)
        package(name)

CHARACTERS = tokenizers.CharTokenizer("\n" + "".join(map(chr, range(32, 127))))  # 101 tokens



@pytest.fixture
def quick_proof(monkeypatch):
    """Exports are read back in this process. That a process of its own does it is proven by `exported`."""
    monkeypatch.setattr(export, "prove", lambda path: readback.answer(
        str(path), ckpt.load_file(path.with_name("questions"))))


# ----------------------------------------------------------------------------------------------------------------------
# Any model

SEEDS = (1, 5, 8, 10)  # of models that have every switch between them

def random_shape(rng):
    """A tiny configuration with every switch at random and sizes that nobody would choose."""
    head, kv = rng.choice([(1, 1), (2, 1), (3, 3), (4, 2), (6, 3)])
    shape = dict(n_layer=rng.choice([1, 2]), n_head=head, n_kv_head=kv, head_dim=rng.choice([2, 6, 10]),
                 n_embd=rng.choice([7, 20, 33]), n_inner=rng.choice([0, 5, 31]), block_size=rng.choice([8, 21, 70]),
                 vocab_size=rng.choice([101, 127, 128, 129]), pos=rng.choice(["learned", "rope"]),
                 norm=rng.choice(["layernorm", "rmsnorm"]), mlp=rng.choice(["gelu", "gelu_exact", "swiglu"]),
                 qk_norm=rng.random() < 0.5, bias=rng.random() < 0.5, tie_weights=rng.random() < 0.5,
                 rope_theta=rng.choice([500.0, 10000.0]), norm_eps=rng.choice([1e-3, 1e-6]))
    if rng.random() < 0.6:  # most of them are no model of transformers: make this one
        shape.update(rng.choice([
            dict(pos="learned", norm="layernorm", mlp=rng.choice(["gelu", "gelu_exact"]), qk_norm=False, head_dim=0,
                 n_kv_head=0, n_embd=5 * head),
            dict(FAMILIES["llama"], n_kv_head=kv, n_embd=7 * head, bias=shape["bias"], rope_theta=shape["rope_theta"]),
            dict(FAMILIES["modern"], bias=False)]))
    return shape


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=[pytest.mark.slow][seed in SEEDS:]) for seed in range(12)])
def test_random_models_survive_every_format_that_can_hold_them(here, seed):
    shape = random_shape(random.Random(seed))
    model = random_model(seed, **shape)
    questions, ours = export.ask(model, CHARACTERS, None)
    assert {idx.size(1) for idx in questions["batches"]} == {1, 7, shape["block_size"]}
    assert ours["logits"][0].std() > 0.1
    formats = ["hf", "pt2", "torchscript"] + ["onnx"] * (seed % 2)  # (onnx takes its time)
    for name in formats:
        path = str(here / export.FORMATS[name].file)
        try:
            if name == "hf":
                huggingface.write(path, model, CHARACTERS)
            else:
                export.FORMATS[name].write(path, model)
        except export.UserError as refusal:
            assert name == "hf"
            switch, value = re.search(r"(\w+)=(\w+)", refusal.fact).groups()
            assert str(getattr(model.config, switch)) == value
            continue
        _, what, passes = export.compare(model, questions, ours, readback.answer(path, questions))
        assert passes, f"{name} of {shape}: {what}"


def test_random_models_cover_every_switch():
    shapes = [random_shape(random.Random(seed)) for seed in SEEDS]
    for name, values in dict(pos=2, norm=2, mlp=3, qk_norm=2, bias=2, tie_weights=2, block_size=3).items():
        assert len({shape[name] for shape in shapes}) == values, name
    kinds = set()
    for shape in shapes:
        with contextlib.suppress(export.UserError):
            config = model_file.resolve(model_file.GPTConfig(**shape))
            kinds.add(huggingface.their_config(config, "float32", {})["model_type"])
    assert kinds == {"gpt2", "llama", "qwen3"}


# ----------------------------------------------------------------------------------------------------------------------
# A trained run


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory):
    """tiny_run's model in all formats, as a user exports it: (the folder, what was printed)."""
    out = tmp_path_factory.mktemp("exports") / "words"
    done = script("export.py", "out/words", f"--out={out}", cwd=tiny_run)
    assert done.returncode == 0, done.stderr
    return out, done


def contents(folder):
    """{where: bytes} of all files below a folder, those in zip archives too."""
    found = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for path in filter(zipfile.is_zipfile, list(found)):
        with zipfile.ZipFile(path) as archive:
            found.update({f"{path}: {name}": archive.read(name) for name in archive.namelist()})
    return found


def test_no_file_tells_where_it_was_made_or_from(tiny_run, exported, here, quick_proof):
    """Neither folders of this machine nor what is secret in an address, even where the checkpoint has both."""
    shutil.copytree(tiny_run / "out/words", "run")
    run = ckpt.load_checkpoint("run/best.pt")
    run["settings"] |= dict(init_from=f"{here}/start", out_dir=f"{here}/run", dataset=f"{here}/data/words")
    run["source"] = ["https://jane:SECRET@example.org/a.txt?sig=SECRET (sha256 0)", f"{here}/b.txt"]
    ckpt.save_checkpoint("run/best.pt", run)
    assert export.main(["run", "--format=hf,torchscript,int8", "--out=x"]) == 0
    card = (here / "x/README.md").read_text()
    assert re.search(r"- source: https://example.org/a.txt \(licence: unknown\)\n- source: b.txt \(folder \w+\) \(lic", card)
    own = [str(folder).encode() for folder in (ROOT, here, tiny_run, exported[0], sys.prefix, os.path.expanduser("~"))]
    for name, content in {**contents(exported[0]), **contents(here / "x")}.items():
        told = [secret for secret in (b"SECRET", b"jane", *own) if secret in content]
        assert not told, f"{name} has {told}"


def test_a_trained_run_in_every_format(tiny_run, exported):
    """The same greedy text as sample.py everywhere; nothing else lies in the folder; the card has the facts."""
    out, done = exported
    assert sorted(os.listdir(out)) == ["README.md", "export.json", "hf", "model.onnx", "model.pt2", "model.ts"]
    assert done.stderr.count("24 greedy tokens within 0.0e+00 of the likeliest") == 4
    assert re.search(r"the same ids in ([\d,]+) of \1 lines", done.stderr)
    assert len(re.findall(r"^\| .* MB \| [\d.e+-]+ \|$", done.stdout, re.M)) == 4
    text = script("sample.py", "out/words", "--prompt=the", "--temperature=0", "--max_new_tokens=25", "--ignore_eos",
                  cwd=tiny_run).stdout.rstrip("\n")
    model, tokenizer, run = ckpt.load_run(str(tiny_run / "out/words"))
    prompt = torch.tensor([tokenizer.encode("the")])
    for name, format in export.FORMATS.items():
        if name in ("int8", "gguf"):  # only if asked for: test_int8.py, test_gguf.py
            continue
        path = str(out / format.file)
        reader = readback.OPEN.get(path.rpartition(".")[2], readback.open_hugging_face)
        with torch.no_grad():
            ids = readback.greedy(reader(path), prompt, 25)
        assert "the" + tokenizer.decode(ids.tolist()) == text, name
    card = (out / "README.md").read_text(encoding="utf-8")
    inner = (out / "hf/README.md").read_text(encoding="utf-8")
    assert inner.startswith("---\n") and "model.pt2" not in inner and "chat" not in card
    for fact in (f"{model.n_params():,}", "n_layer=2", "words.txt", f"{run['val_loss']:.4f} nats per token",
                 f"{run['val_bpb']:.4f} bits per byte"):
        assert fact in card, fact


def test_the_commands_of_the_card(exported):
    """The Python in it runs, in the folder of the card; that in hf too."""
    codes = [re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.S)[1]
             for folder in (exported[0], exported[0] / "hf")]
    between = "import os\nos.chdir('hf')\nprint('\\0')"
    done = subprocess.run([sys.executable, "-c", "\n".join([codes[0], between, codes[1]])], cwd=exported[0],
                          capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert [len(said) > 20 for said in done.stdout.split("\0")] == [True, True], done.stdout


def test_formats_are_read_without_this_project(exported, tmp_path):
    """TorchScript and pt2 in a process that cannot import this folder, several lengths up to the context."""
    out, _ = exported
    done = subprocess.run([sys.executable, "-I", "-c", READ, out], cwd=tmp_path, capture_output=True, text=True,
                          timeout=240)
    assert done.stdout == "[[1, 1], [3, 7], [2, 32]]\ntoo long\n" * 2, done.stderr


READ = """
import sys, torch
folder = sys.argv[1]
for model in (torch.jit.load(f"{folder}/model.ts"), torch.export.load(f"{folder}/model.pt2").module()):
    model(torch.zeros(1, 1, dtype=torch.long)).numpy()  # nothing wants gradients
    print([list(model(torch.zeros(*shape, dtype=torch.long)).shape[:2]) for shape in [(1, 1), (3, 7), (2, 32)]])
    try:
        model(torch.zeros(1, 33, dtype=torch.long))
    except Exception:
        print("too long")
assert not {"model", "config", "runtime", "tokenizer"} & set(sys.modules)
"""


def test_the_onnx_graph_has_the_names_of_optimum(exported):
    import onnxruntime
    session = onnxruntime.InferenceSession(exported[0] / "model.onnx")
    pairs = [f"{layer}.{what}" for layer in range(2) for what in ("key", "value")]
    assert [entry.name for entry in session.get_inputs()] == [
        "input_ids", "attention_mask", "position_ids", *(f"past_key_values.{pair}" for pair in pairs)]
    assert [entry.name for entry in session.get_outputs()] == ["logits", *(f"present.{pair}" for pair in pairs)]
    assert [entry.shape[1:2] + entry.shape[3:] for entry in session.get_inputs()[3:]] == [[2, 16]] * 4


def test_the_onnx_cache_at_every_border(exported, tiny_run):
    """A past of 0, 1 or more, and 1 or more tokens after it, for one text and for three, equal the whole at once."""
    model = ckpt.load_run(str(tiny_run / "out/words"))[0]
    step = readback.open_onnx(str(exported[0] / "model.onnx"))
    for B in (1, 3):
        for past, T in ((0, 1), (0, 32), (1, 1), (1, 5), (5, 1), (7, 9), (31, 1)):
            idx = torch.randint(model.config.vocab_size, (B, past + T))
            before = step(idx[:, :past], None)[1] if past else None
            with torch.no_grad():
                assert (step(idx[:, past:], before)[0] - model(idx)[:, past:]).abs().max() < 1e-4, (B, past, T)


def test_the_ten_line_loader_of_the_readme(tiny_run, tmp_path):
    """PyTorch native: best.pt without training/checkpoint.py."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", readme, re.S) if "best.pt" in block)
    assert code.count("\n") <= 10
    code = code.replace("out/small", str(tiny_run / "out/words"))
    done = subprocess.run([sys.executable, "-c", code + "\nprint(logits.double().sum().item())"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model, tokenizer, _ = ckpt.load_run(str(tiny_run / "out/words"))
    with torch.no_grad():
        expected = model(torch.tensor([tokenizer.encode("the")])).double().sum().item()
    assert float(done.stdout.split()[-1]) == pytest.approx(expected, rel=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Others' programs


@pytest.mark.parametrize("family", ["gpt2", "llama", "modern"])
def test_ctranslate2_accepts_the_folder(here, family):
    """A runtime by neither transformers nor this project converts the folder, and gives the same tokens."""
    ctranslate2 = package("ctranslate2")
    from ctranslate2.converters import TransformersConverter
    model = random_model(vocab_size=101, **FAMILIES[family])
    huggingface.write("hf", model, CHARACTERS)
    TransformersConverter("hf").convert("converted")
    text = "the old man"
    ids, names = CHARACTERS.encode(text), json.loads((here / "hf/tokenizer.json").read_text())["model"]["vocab"]
    names = {i: name for name, i in names.items()}
    generator = ctranslate2.Generator("converted")
    logits = torch.from_numpy(numpy.array(generator.forward_batch([[names[i] for i in ids]])))
    with torch.no_grad():
        assert (logits - model(torch.tensor([ids]))).abs().max() < 1e-4
    tokens = [token.item() for token in model.generate(torch.tensor([ids]), 10)]
    found = generator.generate_batch([[names[i] for i in ids]], max_length=10, sampling_topk=1, end_token=[],
                                     include_prompt_in_result=False)
    assert found[0].sequences_ids[0][:10] == tokens


# ----------------------------------------------------------------------------------------------------------------------
# What can go wrong


def test_a_wrong_export_is_not_kept(tiny_run, here, monkeypatch, capsys, quick_proof):
    """A mistake in one format (an epsilon): exit code 1, that file is not there, the others are."""
    pt2 = export.FORMATS["pt2"]

    def mistaken(path, model, *_):
        model.transformer.ln_f.eps, eps = 1e-2, model.transformer.ln_f.eps
        pt2.write(path, model)
        model.transformer.ln_f.eps = eps
    monkeypatch.setitem(export.FORMATS, "pt2", pt2._replace(write=mistaken))
    with chdir(tiny_run):
        assert export.main(["out/words", "--format=pt2,torchscript", f"--out={here}/x"]) == 1
    assert sorted(os.listdir("x")) == ["README.md", "export.json", "model.ts"]
    assert "pt2: logits within" in (said := capsys.readouterr().err) and "pt2 differs too much and is not kept" in said


def test_an_export_that_cannot_be_read_is_not_kept(tiny_run, here, monkeypatch):
    """By the process that has nothing of this project."""
    damaged = export.FORMATS["torchscript"]._replace(write=lambda path, *_: path.write_bytes(b"PK"))
    monkeypatch.setitem(export.FORMATS, "torchscript", damaged)
    with chdir(tiny_run):
        fact, fix = error(export.main, "out/words", "--format=torchscript", f"--out={here}/x")
    assert fact.startswith("model.ts cannot be read back: RuntimeError: PytorchStreamReader") and "free space" in fix
    assert not os.listdir("x")


def test_other_ids_and_other_tokens_are_noticed():
    model = random_model()
    questions, ours = export.ask(model, CHARACTERS, None)
    same = dict(ours, tokens=torch.cat(list(model.generate(questions["prompt"], 16)), dim=1)[0])
    what, passes = export.compare(model, questions, ours, same)[1:]
    assert "16 greedy tokens within 0.0e+00" in what and passes
    assert not export.compare(model, questions, ours, dict(same, ids=[[1]] + ours["ids"][1:]))[2]
    other = same["tokens"].clone()
    other[3] = (other[3] + 1) % 100
    what, passes = export.compare(model, questions, ours, dict(same, tokens=other))[1:]
    assert "16 greedy tokens within" in what and "tokens within 0.0e+00" not in what and not passes
    for i in range(len(ours["logits"])):  # a NaN in one place
        logits = [logits.clone() for logits in ours["logits"]]
        logits[i][0, 0, 0] = torch.nan
        assert not export.compare(model, questions, ours, dict(same, logits=logits))[2]


@pytest.mark.parametrize("largest", [1.0, 10.0, 1000.0])
def test_how_far_off_a_logit_may_be(largest):
    """By 1e-4, or by 1e-5 of the largest."""
    model = random_model()
    questions, _ = export.ask(model, CHARACTERS, None)
    ours = dict(logits=[torch.zeros(1, 2, 3, dtype=torch.float64)], ids=[])
    ours["logits"][0][0, 0, 0] = -largest
    tokens = torch.cat(list(model.generate(questions["prompt"], questions["n"])), dim=1)[0]
    allowed = max(1e-4, 1e-5 * largest)
    for off, due in ((0.99 * allowed, True), (1.01 * allowed, False), (-1.01 * allowed, False)):
        theirs = dict(logits=[ours["logits"][0] + torch.tensor([0, 0, off])], tokens=tokens, ids=None)
        assert export.compare(model, questions, ours, theirs)[2] is due


def test_errors(tiny_run, here, monkeypatch):
    run = str(tiny_run / "out/words")
    assert error(export.main, run, "--format=ggml")[0] == "there is no format 'ggml'"
    assert "there is no run nowhere" in error(export.main, "nowhere")[0]
    (here / "empty").mkdir()
    assert "there is no trained model in empty" in error(export.main, "empty")[0]
    (here / "mine/hf").mkdir(parents=True)
    (here / "mine/hf/thesis.txt").write_text("x")
    fact, _ = error(export.main, run, "--out=mine", "--format=hf")
    assert fact == "mine has files that export.py did not write"
    (here / "file").write_text("x")
    assert "cannot write file" in error(export.main, run, "--out=file", "--format=pt2")[0]
    for missing in ("onnx", "onnxruntime", "transformers"):
        monkeypatch.setitem(sys.modules, missing, None)  # as if it were not installed
    fact, fix = error(export.main, run, "--out=y")
    assert fact == "these exports need packages that are not installed: transformers, onnx, onnxruntime"
    assert fix.startswith("pip install transformers onnx onnxruntime; ") and not os.path.exists("y")
    assert os.listdir(here / "mine/hf") == ["thesis.txt"] and not os.path.exists("exports")


def save_run(folder, tiny_run, spoil=0.1, **shape):
    """A run folder with a random model of that shape, and tiny_run's tokenizer."""
    _, tokenizer, run = ckpt.load_run(str(tiny_run / "out/words"))
    model = random_model(vocab_size=tokenizer.vocab_size, **shape)
    model.transformer.wpe.weight.data[2, 3] = spoil
    os.makedirs(folder)
    settings = {**run["settings"], **vars(model.config)}
    ckpt.save_checkpoint(f"{folder}/best.pt", {**run, "settings": settings, "model": model.state_dict()})
    shutil.copytree(tiny_run / "out/words/tokenizer", f"{folder}/tokenizer")


def test_a_chat_model_stays_one(tiny_run, here, quick_proof):
    """Out, and out again from there; the card tells how to talk to it."""
    chat_run(tiny_run, here / "chat")
    for run, out in ("chat", "a"), ("a/hf", "b"):
        assert export.main([run, "--format=hf", f"--out={out}"]) == 0
        checkpoint, tokenizer = ckpt.read_run(f"{out}/hf")
        assert checkpoint["chat"] is True and checkpoint["generation"]["eos_token_id"] == [0, 4]
        assert (here / out / "hf/chat_template.jinja").read_text() == tokenizers.CHAT_TEMPLATE
        assert "apply_chat_template" in (here / out / "hf/README.md").read_text()
        assert tokenizer.chat(turns("a dog"))[-2:] == [tokenizer.special["<|end|>"], tokenizer.special["<|assistant|>"]]


def test_models_that_a_format_cannot_hold(tiny_run, here, capsys, quick_proof):
    save_run("a", tiny_run, norm="rmsnorm")
    assert error(export.main, "a", "--format=hf")[0].startswith("norm=rmsnorm, but transformers' ")
    assert export.main(["a", "--format=hf,pt2"]) == 0
    assert "note: skipped hf: norm=rmsnorm" in capsys.readouterr().err and "model.pt2" in os.listdir("exports/a")
    model = ckpt.load_run("a")[0]
    model.huge = torch.nn.Parameter(torch.empty(1).expand(600_000_000), requires_grad=False)
    assert "larger than 2 GB" in error(lambda _: export.write_onnx("a", model))[0]


@pytest.mark.parametrize("format", [name for name in export.FORMATS if name != "gguf"])  # its own: test_gguf.py
def test_a_full_disk(tiny_run, exported, here, format):
    """Wherever the writing stops, there is one error, what was there before stays, and nothing else is left."""
    shutil.copytree(exported[0], here / "x")
    if format == "int8":
        with chdir(tiny_run):
            assert export.main(["out/words", "--format=int8", f"--out={here}/x"]) == 0
    before = files(here / "x")
    done = script("export.py", tiny_run / "out/words", f"--out={here}/x", f"--format={format}", cwd=here,
                  file_size=40_000)
    assert done.returncode == 1 and done.stderr.count("error: cannot write") == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert files(here / "x") == before


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_formats_are_added_to_a_folder_and_replaced_in_it(tiny_run, here, quick_proof):
    """A row for each format; what a kill left goes."""
    with chdir(tiny_run):
        run = ["out/words", f"--out={here}/x"]
        (here / "x/.part/hf").mkdir(parents=True)  # a kill before anything was complete
        assert export.main([*run, "--format=hf"]) == export.main([*run, "--format=torchscript"]) == 0
        card = (here / "x/README.md").read_text()
        assert "| hf |" in card and "| model.ts |" in card
        (here / "x/.part/hf").mkdir(parents=True)
        assert export.main([*run, "--format=hf"]) == 0
        assert sorted(os.listdir(here / "x")) == ["README.md", "export.json", "hf", "model.ts"]
        (here / "x/export.json").write_text("{}")
        assert "export.json: rows is missing" in error(export.main, *run, "--format=hf")[0]


def test_weights_that_are_no_numbers(tiny_run, here):
    for value, dtype in ((7e4, "float16"), (torch.inf, "auto"), (torch.nan, "bfloat16")):
        shutil.rmtree("a", ignore_errors=True)
        save_run("a", tiny_run, spoil=value)
        fact, _ = error(export.main, "a", "--format=hf", f"--dtype={dtype}")
        assert fact.startswith("transformer.wpe.weight has a weight of ") and not os.path.exists("exports")


def test_a_type_of_16_bits(tiny_run, here, quick_proof):
    """--dtype: the tensors of hf/ have it, and what comes back are the rounded weights."""
    with chdir(tiny_run):
        assert export.main(["out/words", "--format=hf", "--dtype=bfloat16", f"--out={here}/x"]) == 0
    tensors = huggingface.read_tensors("x/hf")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((here / "x/hf/config.json").read_text())["dtype"] == "bfloat16"
    with chdir(here):  # a folder keeps its type
        assert export.main(["x/hf", "--format=hf", "--out=y"]) == 0
    again = huggingface.read_tensors("y/hf")
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())

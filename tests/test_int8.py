# SPDX-License-Identifier: GPL-3.0-only
"""8-bit integers in place of a trained model's matrices: how far they may be off, that no row feels its neighbours, and
the run folder that holds them, from export.py to the server."""
import contextlib
import copy
import io
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import FAMILIES, ROOT, TINY, chdir, error, random_model
from engines import Numbers, check_among_neighbours
from servers import (  # noqa: F401 (some are fixtures)
    no_key_fixture, serving)
from torch import nan

import evaluate
import export
from formats.quantized import Int8Linear, int8_top, quantize
from training import checkpoint as ckpt
import sample
import train
from serving.engine import Engine

FLOAT = 2.0**-24  # half of the last bit of a float32 number that is 1: what an operation may be off


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=["kernel", "fallback"])
def step(request, monkeypatch):
    """The distance of two neighbours of the numbers from -1 to 1 in 8 bits; with FBGEMM's kernel, and as on a processor
    that has none."""
    if request.param == "fallback":
        monkeypatch.delattr(torch, "fbgemm_pack_quantized_matrix", raising=False)
    int8_top.cache_clear()
    top = int8_top()
    if request.param == "kernel" and top is None:
        pytest.skip("this processor or PyTorch has no FBGEMM")
    assert (top is None) == (request.param == "fallback")
    yield 1 / 127 if top is None else (1 + top) / 255
    int8_top.cache_clear()


def in_float64(layer, x):
    """The formula of Int8Linear without any rounding of x; and how much at most a step of 1 could change it, times the
    top of the row: each of the K numbers is half a step off, all in the direction of their weights."""
    weight, x = layer.weight.double() * layer.scale.double()[:, None], x.double()
    y = x @ weight.T + (0 if layer.bias is None else layer.bias.double())
    return y, x.abs().amax(dim=-1, keepdim=True) * weight.abs().sum(dim=1) / 2


def check(layer, x, step):
    """Is layer(x) right, within half a step for each number of x, and within what K additions in float32 lose?"""
    y, (wanted, most) = layer(x), in_float64(layer, x)
    bias = 0 if layer.bias is None else layer.bias.abs()
    assert y.shape == wanted.shape and y.dtype == torch.float32
    assert ((y - wanted).abs() <= step * most + (x.size(-1) + 8) * FLOAT * (2 * most + bias)).all()


# ----------------------------------------------------------------------------------------------------------------------
# One layer


@pytest.mark.parametrize("lead", [(1,), (5,), (2, 3)], ids=str)
def test_the_formula_within_half_a_step_for_each_number(step, lead):
    """A layer of integers gives what its formula gives in float64, but for half a step of each number of x."""
    torch.manual_seed(0)
    for N, K in ((1, 1), (5, 7), (37, 53), (64, 512), (3, 1041)):
        for bias in (None, torch.randn(N)):
            check(Int8Linear(torch.randn(N, K) / 10, bias), torch.randn(*lead, K), step)


@pytest.mark.parametrize("K", [1, 7, 53, 512])
def test_nothing_but_the_rounding_of_x_is_lost(step, K):
    """The identity shows each number as it was rounded, to the next step. With these, the formula holds exactly."""
    torch.manual_seed(K)
    x = torch.cat((torch.randn(40, K), torch.linspace(-1, 1, 40)[:, None].expand(40, K)))
    rounded, tops = Int8Linear(torch.eye(K))(x).double(), x.abs().amax(dim=-1, keepdim=True)
    assert ((rounded - x).abs() <= (step / 2 + 4 * FLOAT) * tops).all()
    layer = Int8Linear(torch.randn(37, K), torch.randn(37))
    wanted, _ = in_float64(layer, rounded)
    terms = rounded.abs() @ (layer.weight.double() * layer.scale[:, None]).abs().T + layer.bias.abs()
    assert ((layer(x) - wanted).abs() <= (K + 8) * FLOAT * terms).all()


def test_weights_use_all_of_their_bits():
    """Each row of the matrix has a scale of its own, however large its neighbours are: its largest integer is 127."""
    weight = torch.randn(9, 33) * 10.0 ** torch.arange(-4, 5)[:, None]
    weight[3] = 0
    layer = Int8Linear(weight)
    assert layer.weight.int().abs().amax(dim=1).tolist() == [127] * 3 + [0] + [127] * 5
    error = (layer.weight * layer.scale[:, None] - weight).abs()
    assert (error <= layer.scale[:, None] * (0.5 + 256 * FLOAT)).all()  # half a step of this row


def test_rows_of_zeros_and_rows_with_an_outlier(step):
    """A row of zeros gives the bias; a number that is far too large spoils its own row alone."""
    torch.manual_seed(0)
    layer = Int8Linear(torch.randn(37, 53), torch.randn(37))
    x = torch.randn(6, 53)
    x[1], x[2], x[4, 17], x[5] = 0, 1e-38, 1e6, 1e20
    check(layer, x, step)  # the outlier is the top of its own row, and of no other
    assert torch.equal(layer(x)[1], layer.bias)
    assert torch.equal(Int8Linear(torch.randn(5, 53))(x[1:2]), torch.zeros(1, 5))


def test_a_row_has_the_same_bits_among_any_others():
    """With FBGEMM's kernel a row gets the same bits alone, in any batch and beside any values."""
    if int8_top() is None:
        pytest.skip("no FBGEMM here: sums of float32 numbers depend on the batch (see engine.batch_invariant_sizes)")
    for K in (1, 7, 8, 32, 53, 512):
        torch.manual_seed(K)
        layer, x = Int8Linear(torch.randn(19, K), torch.randn(19)), torch.randn(17, K)
        alone = torch.cat([layer(row[None]) for row in x])
        assert torch.equal(layer(x), alone) and torch.equal(layer(x.flip(0)), alone.flip(0))
        assert torch.equal(layer(x[:6].view(2, 3, K)).flatten(0, 1), alone[:6])
        for value in (0.0, 1e-30, 1e20):  # a whole row of it, or one number
            for at in ((5,), (5, K - 1)):
                among = x.clone()
                among[at] = value
                others = [i for i in range(17) if i != 5]
                assert torch.equal(layer(among)[others], alone[others])
                assert torch.equal(layer(among)[5], layer(among[5:6])[0])


def test_the_kernel_knows_of_other_weights():
    """What was laid out for the kernel is made anew where the weights are loaded, copied, kept in a file or moved."""
    layers, x = [Int8Linear(torch.randn(8, 16)) for _ in range(2)], torch.randn(3, 16)
    a, b = (layer(x) for layer in layers)
    copied = copy.deepcopy(layers[0])
    copied.load_state_dict(layers[1].state_dict())
    assert torch.equal(copied(x), b) and torch.equal(layers[0](x), a)
    kept = pickle.loads(pickle.dumps(layers[0]))
    assert torch.equal(kept(x), a)
    layers[0].load_state_dict(layers[1].state_dict())
    assert torch.equal(layers[0](x), b)
    layers[0].to(torch.device("cpu"))
    assert layers[0].compute is None and torch.equal(layers[0](x), b)


def test_weights_of_16_bits_are_rounded_from_float32():
    """Weights in bfloat16 become the integers that they become from float32."""
    weight = torch.linspace(-1, 1, 512).to(torch.bfloat16)[None]
    assert torch.equal(Int8Linear(weight).weight, Int8Linear(weight.float()).weight)


@pytest.mark.parametrize("at", [0, 1, 8, 16])
@pytest.mark.parametrize("value", [nan, torch.inf], ids=str)
def test_a_row_that_is_no_number_spoils_no_other(at, value):
    """A NaN or an infinity makes its own row not finite, and changes no other."""
    for K in (1, 7, 8, 32, 53, 512):
        layer, x = Int8Linear(torch.randn(19, K)), torch.randn(17, K)
        good, others = layer(x), [i for i in range(17) if i != at]
        for place in ((at,), (at, 0), (at, K - 1)):
            bad = x.clone()
            bad[place] = value
            y = layer(bad)
            assert not y[at].isfinite().any()
            if int8_top() is not None:  # else the same but for the order of additions
                assert torch.equal(y[others], good[others]), (K, place)
            assert torch.allclose(y[others], good[others], atol=1e-4), (K, place)


EXTREMES = """import json, torch
from formats import quantized

def extremes():
    layer = quantized.Int8Linear(torch.ones(3, 512))
    return [layer(torch.full((1, 512), x)).mean().item() for x in (1.0, -1.0)]

top, found = quantized.int8_top(), extremes()
quantized.int8_top = lambda: 1.0
print(json.dumps([top, found, extremes()]))"""


def test_sums_of_16_bits_do_not_overflow():
    """On a processor without VNNI, the largest weights at the largest x: right, which they are not with all 8 bits."""
    if int8_top() is None:
        pytest.skip("this processor or PyTorch has no FBGEMM")

    done = subprocess.run([sys.executable, "-c", EXTREMES], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"})
    assert done.returncode == 0, done.stderr
    top, found, wrong = json.loads(done.stdout)
    assert top == 3.0 and found == [pytest.approx(512, rel=2 / 255), pytest.approx(-512, rel=2 / 255)]
    assert wrong[0] < 0.6 * 512


# ----------------------------------------------------------------------------------------------------------------------
# A model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_8_bits(family):
    """Nearly the same scores. (A matrix product loses about 1%, half of it in x and half in the weights; what some ten
    of them lose one after the other adds up as chance does, to its root: 3 to 5%.)"""
    model = random_model(**FAMILIES[family])
    int8 = quantize(copy.deepcopy(model))
    assert int8.n_params() == model.n_params()
    assert {layer.weight.dtype for layer in int8.modules() if isinstance(layer, Int8Linear)} == {torch.int8}
    assert not any(isinstance(layer, torch.nn.Linear) for layer in int8.modules())
    head, embedding = int8.lm_head.weight, int8.transformer.wte.weight
    assert (head.data_ptr() == embedding.data_ptr()) == model.config.tie_weights and embedding.dtype == torch.int8
    assert int8.dtype() == torch.float32
    idx = torch.randint(100, (3, 24))
    with torch.no_grad():
        due, found = model(idx), int8(idx)
    assert (found - due).norm() < 0.1 * due.norm()
    with pytest.raises(AssertionError, match="cannot be trained"):
        int8(idx, idx)


def test_the_row_that_is_read_is_the_row_that_predicts():
    """With tied weights, embedding and head are the same integers."""
    model = quantize(random_model())
    rows = model.transformer.wte(torch.arange(100)[None])[0]
    assert torch.equal(rows, (model.lm_head.weight * model.lm_head.scale[:, None])[:100])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_changes_nothing(family):
    """Each token that generate writes, with its cache, is the likeliest after all that stands before it."""
    model = quantize(random_model(**FAMILIES[family]))
    idx = torch.randint(100, (2, 4))
    new = torch.cat(list(model.generate(idx, 20)), dim=1)
    with torch.no_grad():
        scores = model(torch.cat((idx, new[:, :-1]), dim=1))[:, 3:]
    assert torch.equal(scores.argmax(dim=-1), new)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_does_not_depend_on_its_neighbours(family):
    """The engine gives a request the same bits alone and among others, with integers too."""
    rows = Engine(quantize(random_model(block_size=48, **FAMILIES[family])), Numbers(), rows=8)
    check_among_neighbours(rows, random.Random(family), 3)


# ----------------------------------------------------------------------------------------------------------------------
# A run


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory):
    """tiny_run's model in 8 bits, as a user exports it: (the folder of the export, what was said)."""
    out, said = tmp_path_factory.mktemp("exports") / "words", io.StringIO()
    with chdir(tiny_run), contextlib.redirect_stderr(said):
        assert export.main(["out/words", "--format=int8", f"--out={out}"]) == 0
    return out, said.getvalue()


def test_the_folder_and_what_is_said_about_it(exported):
    """export.py writes a run of 8 bits, says what it costs in bits per byte, and how to use it."""
    out, said = exported
    assert sorted(os.listdir(out)) == ["README.md", "export.json", "int8"]
    assert sorted(os.listdir(out / "int8")) == ["best.pt", "tokenizer"]
    before, after = map(float, re.search(r"int8: ([\d.]+) bits per byte before, ([\d.]+) after", said).groups())
    assert 1 < before < 4 and abs(after / before - 1) < 0.01
    assert re.search(r"on the validation split of data/words; logits within .*\n", said)
    assert "python sample.py FOLDER/int8" in (out / "README.md").read_text()


def test_it_is_the_quantized_model_bit_for_bit(tiny_run, exported):
    """The export is what --quantize=int8 makes of the run, with all that is known about it."""
    model, tokenizer, run = ckpt.load_run(str(exported[0] / "int8"))
    original, theirs, was = ckpt.load_run(str(tiny_run / "out/words"))
    idx = torch.randint(tokenizer.vocab_size, (3, 32))
    with torch.no_grad():
        assert torch.equal(model(idx), quantize(original)(idx))
        assert torch.equal(model(idx), ckpt.load_run(str(tiny_run / "out/words"), int8=True)[0](idx))
    assert run["int8"] is True and was["int8"] is False and tokenizer.characters == theirs.characters
    assert all(run[name] == was[name] for name in ("step", "source", "chat", "tokenizer_sha256"))
    assert run["settings"] == {**vars(original.config), "dataset": was["settings"]["dataset"]}


def test_the_same_text_from_the_run_and_from_the_export(tiny_run, exported, capsys):
    """sample.py writes the same text from both, and says that it is in 8 bits."""
    texts = []
    for argv in ([str(tiny_run / "out/words"), "--quantize=int8"], [str(exported[0] / "int8")]):
        assert sample.main([*argv, "--prompt=the", "--max_new_tokens=60", "--seed=3", "--temperature=1"]) is None
        said = capsys.readouterr()
        texts.append(said.out)
        assert "steps on words.txt, 8-bit" in said.err
    assert texts[0] == texts[1] and len(texts[0]) > 40
    sample.main([str(tiny_run / "out/words"), "--prompt=the", "--max_new_tokens=9"])
    assert "8-bit" not in capsys.readouterr().err


def test_evaluate_measures_both_alike(tiny_run, exported, monkeypatch, tmp_path):
    """evaluate.py finds the same bits per byte for both, those that export.py has said."""
    monkeypatch.chdir(tiny_run)
    found = []
    for argv in (["out/words", "--quantize=int8"], [str(exported[0] / "int8")]):
        argv += ["--data=data/words", "--tasks=none", "--samples=0", f"--json={tmp_path}/a.json"]
        assert evaluate.main(argv) == 0
        found.append(json.loads((tmp_path / "a.json").read_text())["models"][0]["texts"]["data/words"]["bits_per_byte"])
    after = float(re.search(r"before, ([\d.]+) after", exported[1])[1])
    assert found[0] == found[1] == pytest.approx(after, abs=1e-4)


def test_the_server_says_what_it_serves(exported):
    """/model-info names int8 as the dtype of an export."""
    model, tokenizer, run = ckpt.load_run(str(exported[0] / "int8"))
    with serving(model, tokenizer, run=run) as client:
        assert client.get("/model-info").json["dtype"] == "int8"
        assert client.post("/generate", prompt="the", max_tokens=5).status == 200


def test_large_matrices_take_a_third(tiny_run, here, capsys):
    """Of a model whose matrices are large, best.pt has little more than a quarter of its bytes."""
    _, tokenizer, run = ckpt.load_run(str(tiny_run / "out/words"))
    model = random_model(n_layer=1, n_embd=256, vocab_size=tokenizer.vocab_size)
    os.mkdir("large")
    shutil.copytree(tiny_run / "out/words/tokenizer", "large/tokenizer")
    settings = {**run["settings"], **vars(model.config), "dataset": ""}
    ckpt.save_checkpoint("large/best.pt", {**run, "settings": settings, "model": model.state_dict()})
    assert export.main(["large", "--format=int8"]) == 0
    assert os.path.getsize("exports/large/int8/best.pt") < 0.35 * os.path.getsize("large/best.pt")
    assert "int8: logits within" in capsys.readouterr().err  # without the data, no bits per byte


def test_who_needs_the_weights_themselves_is_refused(tiny_run, exported, here):
    """Integers cannot be exported again, trained on, or be the base of a LoRA run; the error names the run they come
    from."""
    os.symlink(tiny_run / "data", "data")
    shutil.copytree(exported[0] / "int8", "int8")
    has = "int8/best.pt has 8-bit weights, for inference only"
    for format in export.FORMATS:
        fact, fix = error(export.main, "int8", f"--format={format}", "--out=x")
        assert has in fact and "the run that it was made from" in fix and not os.path.exists("x")
    argv = ["--dataset=words", *TINY, "--max_iters=1", "--warmup_iters=0", "--out_dir=a"]
    for more in ([], ["--lora_rank=2"]):
        assert has in error(train.main, *argv, "--init_from=int8", *more)[0] and not os.path.exists("a")
    shutil.copytree(tiny_run / "out/words", "base")  # a LoRA run whose base becomes integers afterwards
    assert train.main([*argv, "--init_from=base", "--lora_rank=2"]) == 0
    shutil.rmtree("base")
    shutil.copytree("int8", "base")
    assert "is a LoRA of base, which has changed" in error(lambda _: ckpt.load_run("a"))[0]


def test_a_damaged_one_is_refused(tiny_run, exported, here):
    """Weights of a wrong dtype, or missing, are an error that names them."""
    shutil.copytree(exported[0] / "int8", "int8")
    state = ckpt.load_checkpoint("int8/best.pt")
    layer = "transformer.h.1.mlp.c_fc."

    def fact(weights, **changes):
        ckpt.save_checkpoint("int8/best.pt", {**state, "model": weights, **changes})
        return error(lambda _: ckpt.load_run("int8"))[0]

    good = state["model"]
    for name, kind, is_now, due in ((layer + "weight", torch.float32, "float", "int8"),
                                    (layer + "scale", torch.int8, "int8", "float")):
        said = fact(good | {name: good[name].to(kind)})
        assert f"{name} is a tensor" in said and f"of type {is_now}, but should be" in said and said.endswith(due)
    without = {name: tensor for name, tensor in good.items() if name != layer + "scale"}
    assert f"{layer}scale is missing, but should be a tensor" in fact(without)
    floats = ckpt.load_checkpoint(str(tiny_run / "out/words/best.pt"))["model"]
    assert "weight is a tensor" in fact(floats) and "of type float, but should be" in fact(floats)
    said = fact(good, int8=False)
    assert "weight is a tensor" in said and "of type int8, but should be" in said


def test_both_folders_can_be_replaced_at_once(tiny_run, here, monkeypatch):
    """An export of two formats can be made again in the same place."""
    pytest.importorskip("safetensors", reason="safetensors is not installed: pip install -r requirements-dev.txt")
    monkeypatch.setattr(export, "find_spec", lambda _: True)
    # (Whether hf/ is right, test_export.py proves.)
    monkeypatch.setattr(export, "prove", lambda path: None)
    monkeypatch.setattr(export, "compare", lambda *_: (0.0, "", True))
    monkeypatch.chdir(tiny_run)
    for _ in range(2):
        assert export.main(["out/words", f"--out={here}/x", "--format=hf,int8"]) == 0
    assert sorted(os.listdir(here / "x")) == ["README.md", "export.json", "hf", "int8"]

# SPDX-License-Identifier: GPL-3.0-only
"""The doctor finds a healthy machine healthy, and notices what is broken. (Parity is in test_parity.py.)"""
import re

import pytest
import torch
from conftest import ROOT, error
from torch.nn import functional as F

from bench import __main__ as bench
from bench import doctor
from bench import generate as bench_generate
from bench import scaling as bench_scaling
from runtime import machine
import model
from runtime.console import UserError


def test_doctor(here, capsys):
    assert bench.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.count("[ok]") == 11 and "[FAIL]" not in out and out.endswith("\n0 failed\n")
    for line in ("versions", "device", "dtype", "compile", "gpt2: learns", "modern: no leak", "modern: cache"):
        assert f"   {line}" in out


@pytest.mark.parametrize("fault, line", [
    ("future", "gpt2: no leak"), ("deaf", "modern: learns"), ("cache", "gpt2: cache"), ("memory", "memory"),
    ("compile", "compile")])
def test_doctor_notices(here, capsys, monkeypatch, fault, line):
    other = "model_checks" if fault in ("memory", "compile") else "machine_checks"
    monkeypatch.setattr(doctor, other, lambda *_: [])
    if fault == "future":
        real = F.scaled_dot_product_attention
        monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, is_causal=False, **kw: real(*a, **kw))
    elif fault == "deaf":
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    elif fault == "cache":
        real = model.KVCache.extend
        monkeypatch.setattr(model.KVCache, "extend", lambda self, layer, k, v: real(self, layer, k * 1.01, v))
    elif fault == "memory":
        monkeypatch.setattr(machine, "free_memory", lambda device: 1e9)
    else:
        def broken(*args, **kw):
            raise RuntimeError("no C++ compiler here")
        monkeypatch.setattr(torch, "compile", broken)
    code = bench.main(["doctor"])
    out = capsys.readouterr().out
    if fault == "compile":  # no fault: training does without
        assert code == 0 and "[--]   compile              not available; training works without it: no C++ compiler here" in out
    else:
        assert code == 1 and f"[FAIL] {line}" in out and line in out.splitlines()[-1]


def test_the_names_of_benches(capsys):
    assert bench.main([]) == 0
    assert len(re.findall(r"^python -m bench \w+ +\w.*\?", capsys.readouterr().out, re.M)) == 9  # what each is for
    fact, fix = error(bench.main, "x")
    assert "no bench 'x'" in fact and "one of: doctor, walkthrough, parity" in fix


def test_a_bench_knows_its_own_settings_only(capsys):
    with pytest.raises(SystemExit):
        bench.main(["generate", "--help"])
    out = capsys.readouterr().out
    assert re.findall(r"^  --(\w+)=", out, re.M) == ["peer", "prompt", "new_tokens", "repeats", "tiny"]
    assert "python -m bench generate" in out and "no setting 'minutes'" in error(bench.main, "doctor", "--minutes=2")[0]


LAW = 1.2e6, 0.8, 1.1e6, 0.25  # A, a, B, b


def by_the_law(n, d):
    return bench_scaling.bits(LAW, n, d)


def curve(n, tokens, bits):
    return n, [dict(step=100, tokens=d, val_bpb=bits(n, d)) for d in tokens]


def test_the_law_is_found_in_its_own_points():
    found = bench_scaling.fit([curve(n, (2e5, 5e5, 1e6, 2e6), by_the_law) for n in (7e5, 2e6, 4e6, 9e6)])
    assert found == pytest.approx(LAW, rel=1e-3)
    assert bench_scaling.bits(found, 9e6, 1e8) == pytest.approx(0.7 + ((1.2 / 9) ** 0.8 + 1.1 / 100) ** 0.25, rel=1e-4)
    # Larger models that are worse: no such law says so, and what is found is one.
    worse = bench_scaling.fit([curve(n, (1e5, 1e6), lambda n, d: 1 + n / 1e8 - d / 1e8) for n in (1e6, 1e7)])
    large, small, sooner = (bench_scaling.bits(worse, n, d) for n, d in ((1e7, 1e6), (1e6, 1e6), (1e6, 1e5)))
    assert large <= small < sooner
    with pytest.raises(UserError, match="no validation after 60 steps"):
        bench_scaling.fit([curve(1e6, (1e6,), by_the_law), curve(2e6, (), by_the_law)])


def test_scaling_says_what_will_come_and_then_looks(here, capsys, monkeypatch):
    """With runs that obey a law, all is as it says. (The README's command trains.)"""
    asked = {}

    def trained(name, n_embd, settings, argv):
        asked[name], n = dict(argument[2:].split("=") for argument in argv), 10_000 * n_embd
        updates = int(asked[name].get("max_iters", 50_000 // n_embd))
        every = int(asked[name]["eval_interval"])
        rows = [dict(step=step, tokens=3072 * step, val_bpb=by_the_law(n, 3072 * step),
                     train_seconds=step * n_embd / 500, wall_seconds=1.0) for step in range(every, updates + 1, every)]
        return n, rows

    monkeypatch.setattr(bench_scaling, "trained", trained)
    assert not bench.main(["scaling", "--minutes=2"])
    out = capsys.readouterr().out
    best = re.search(r"after 30 minutes, (\d+) channels will be the best", out)[1]
    long = asked[f"{best}-long"]
    assert int(long["max_iters"]) == round(1800 / 1.05 / (int(best) / 500)) and asked[best]["budget"] == "120s"
    n, d = 10_000 * int(best), 3072 * int(long["max_iters"])
    others = [by_the_law(10_000 * w, 3072 * round(1800 / 1.05 / (w / 500))) for w in bench_scaling.SIZES]
    assert by_the_law(n, d) == pytest.approx(min(others), rel=1e-3)  # no other size is better
    said = float(re.search(r"with ([\d.]+) bits per byte", out)[1])
    assert said == pytest.approx(by_the_law(n, d), rel=2e-3)
    assert re.search(rf"\| {best}, the long run \| {n:,} \|.* [+-]0\.[01]\d% \|", out)


def test_generate_leaves_out_who_is_not_there(here, capsys, monkeypatch):
    monkeypatch.setattr(bench_generate, "find_spec", lambda name: None)
    monkeypatch.setattr(bench_generate, "load_model", lambda path, device: (None, None, {}))  # a tiny one is made
    assert not bench.main(["generate", "--tiny=true", "--repeats=1", "--new_tokens=8", "--prompt=4"])
    fact, _ = error(bench.main, "generate", "--tiny=true", "--prompt=449")
    assert "prompt=449 and new_tokens=64 exceed the context" in fact
    out, err = capsys.readouterr()
    assert "\n| float32 |" in out and "transformers" not in out and "nanoGPT" not in out
    assert "transformers is left out" in err and "nanoGPT is left out: --peer=FOLDER" in err
    for peer in ("nowhere", str(ROOT)):  # our own model.py is not nanoGPT's
        assert "is not a nanoGPT folder" in error(
            bench.main, "generate", "--tiny=true", "--new_tokens=8", f"--peer={peer}")[0]

# SPDX-License-Identifier: GPL-3.0-only
"""Golden losses: fixed tiny runs end where they have always ended. What harms (or helps) learning fails here first.

If a change means to alter how a model learns, run this file, see that the new losses are not worse, and write them down
here with the reason in the commit message. The numbers were measured with AVX-512, AVX2 and without either, with one
thread and with two: they agree to 1e-5. That is far less than what any mistake changes: a learning rate of 0.009
instead of 0.01 gives 0.7220 instead of 0.6998, a warm-up that is twice as long 0.7135, no weight decay 0.6949.
"""
import os

import pytest
from conftest import chdir, prepare_words

from training import log
from runtime import machine
import train

SETTINGS = ["--dataset=words", "--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--batch_size=8",
            "--max_iters=100", "--warmup_iters=10", "--learning_rate=1e-2", "--eval_interval=100", "--log_interval=50",
            "--compile=false", "--dtype=float32", "--device=cpu"]
GOLDEN = {
    "GPT-2 with AdamW": (["--bias=true"], 0.699825),
    "modern with AdamW": (["--preset=modern"], 0.276672),
    "modern with Muon": (["--preset=modern", "--optimizer=muon"], 0.253917),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    prepare_words(folder)
    return folder


@pytest.mark.parametrize("name", GOLDEN)
def test_a_fixed_run_ends_at_its_golden_loss(folder, name, monkeypatch):
    monkeypatch.setattr(machine, "has_bf16", lambda device: False)  # Muon's products then are float32, as everywhere
    arguments, golden = GOLDEN[name]
    out = f"out/{name}"
    with chdir(folder):
        assert train.main([*SETTINGS, *arguments, f"--out_dir={out}"]) == 0
        rows = list(log.read_rows(os.path.join(out, "log.jsonl")))
    assert rows[-1]["step"] == 100
    assert rows[-1]["val_loss"] == pytest.approx(golden, rel=1e-4)

# SPDX-License-Identifier: GPL-3.0-only
"""What a run shows while it trains: the line of a step, the picture of the loss, and Weights & Biases."""
import json
import math
import re
import sys
import types
import xml.etree.ElementTree

import pytest
from conftest import TINY, prepare_words

import train
from training import log as train_log

ROW = dict(step=200, loss=3.51249, lr=0.00283, grad_norm=0.414, tokens_per_second=11_300.4, wall_seconds=75.0)


@pytest.mark.parametrize("row, max_iters, share, left, due", [
    ({}, 700, 0.39 / 11_300, 250.0,
     "step 200/700 | loss 3.512 | lr 0.0028 | norm 0.41 | 11,300 tok/s, 39% of peak | 1m15s, 4m10s left"),
    (dict(val_loss=3.6, val_bpb=1.4), 246, 0.0, 23.0,
     "step 200/246 | loss 3.512 | validation 3.6000 = 1.4000 bits per byte | lr 0.0028 | norm 0.41 | "
     "11,300 tok/s, 0% of peak | 1m15s, 23 s left"),
    (dict(wall_seconds=8000.0, grad_norm=-1.0), 1000, 1e-5, 12_000.0,
     "step 200/1000 | loss 3.512 | lr 0.0028 | norm -1.00 | 11,300 tok/s, 11% of peak | 2h13m, 3h20m left"),
    ({}, 200, 0.0, 0.0, "step 200/200 | loss 3.512 | lr 0.0028 | norm 0.41 | 11,300 tok/s, 0% of peak | 1m15s, 0 s left"),
    # A budget has not chosen the end yet.
    ({}, math.inf, 5e-5, math.inf, "step 200 | loss 3.512 | lr 0.0028 | norm 0.41 | 11,300 tok/s, 57% of peak | 1m15s")])
def test_the_line_of_a_step(row, max_iters, share, left, due):
    assert train_log.progress_line(ROW | row, max_iters, share, left) == due


def attributes(picture, tag, *names):
    """Of every element of this kind, these attributes."""
    root = xml.etree.ElementTree.fromstring(picture)
    return [tuple(one.get(name) for name in names) for one in root.iter("{http://www.w3.org/2000/svg}" + tag)]


def test_the_picture_of_the_loss():
    """From (50, 20) to (700, 360): steps from 0 to the last, losses from the lowest to 0.1 above the highest."""
    picture = train_log.loss_svg([(10, 4.9, None), (20, 3.0, 3.5), (30, 2.0, None), (40, 1.0, 2.5)])
    grey, blue = attributes(picture, "polyline", "points", "stroke")
    assert grey == ("212.5,28.5 375.0,190.0 537.5,275.0 700.0,360.0", "#999")
    assert blue == ("375.0,147.5 700.0,232.5", "#0969da")
    assert attributes(picture, "circle", "cx", "cy") == [("375.0", "147.5"), ("700.0", "232.5")]
    heights = ["360.0", "275.0", "190.0", "105.0", "20.0"]
    assert attributes(picture, "line", "x1", "x2", "y1", "y2") == [("50", "700", y, y) for y in heights]
    texts = [one.text for one in xml.etree.ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")]
    assert texts[1:] == ["1", "0", "2", "10", "3", "20", "4", "30", "5", "40"]
    places = attributes(picture, "text", "x", "y")[1:]
    assert places[::2] == [("42", y) for y in heights]
    assert places[1::2] == [(x, "380") for x in ("50.0", "212.5", "375.0", "537.5", "700.0")]


def test_the_picture_of_a_long_run_has_a_thousand_points_and_every_validation():
    curve = [(step, 3.0, 3.0 if step % 100 == 0 else None) for step in range(1, 2501)]
    grey, blue = attributes(train_log.loss_svg(curve), "polyline", "points")
    assert len(grey[0].split()) == 834 and len(blue[0].split()) == 25  # every third step


@pytest.mark.parametrize("losses", [[3.0, 1e6], [0.1, 0.1], [1.0, 9.9]])
def test_the_picture_has_few_lines_whatever_the_loss(losses):
    picture = train_log.loss_svg([(i + 1, loss, loss) for i, loss in enumerate(losses)])
    assert picture.count('stroke="#ddd"') == 5
    numbers = re.findall(r'(?:[xy]|[xyc][xy12])="(-?[\d.]+)"', picture)
    assert all(0 <= float(number) <= 720 for number in numbers) and len(numbers) > 30


def test_rows_that_are_none_are_passed_over(tmp_path):
    """Half a line, no number, no step: what a kill or somebody else has left in log.jsonl."""
    good = [dict(step=1, loss=2.5), dict(step=2, loss=2.0, val_loss=3.0), dict(step=3, loss=1.0)]
    bad = ['{"step": 0, "loss": 1.0}', '{"step": -1, "loss": 1.0}', '{"step": 9, "loss": NaN}', '{"loss": 1.0}', "[3]",
           '{"step": 9, "loss": 1.0, "val_loss": Infinity}', '{"step": 9, "loss": "low"}', '{"step": 9, "lo', ""]
    lines = ['{"settings": {}}', json.dumps(good[0]), *bad, json.dumps(good[1]), *bad, json.dumps(good[2])]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert list(train_log.read_rows(tmp_path / "log.jsonl")) == good
    assert list(train_log.read_rows(tmp_path / "none.jsonl")) == []


# ---------- Weights & Biases


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package: (name of a call, what was passed), in their order."""
    calls = []
    session = types.SimpleNamespace(log=lambda row, step: calls.append(("log", step, row)),
                                    finish=lambda: calls.append(("finish",)))
    package = types.ModuleType("wandb")
    package.init = lambda project, name, config: calls.append(("init", project, name, config)) or session
    monkeypatch.setitem(sys.modules, "wandb", package)
    return calls


def run(*argv):
    return train.main(["--dataset=words", *TINY, *argv])


def test_wandb_gets_the_settings_every_row_and_the_end(here, wandb):
    prepare_words(here)
    run("--max_iters=4", "--log_interval=2", "--wandb_log=true", "--wandb_project=mine", "--wandb_run_name=first")
    (init, project, name, config), *logged, end = wandb
    assert (init, project, name, end) == ("init", "mine", "first", ("finish",))
    assert config["n_embd"] == 32 and config["vocab_size"] == 25 and config["max_iters"] == 4
    rows = list(train_log.read_rows("out/words/log.jsonl"))
    assert logged == [("log", row["step"], row) for row in rows] and [row["step"] for row in rows] == [2, 4]
    assert "val_loss" in logged[-1][2]
    wandb.clear()
    run("--max_iters=6")  # not asked for
    assert wandb == []


def test_wandb_is_not_needed(here, capsys, monkeypatch):
    prepare_words(here)
    monkeypatch.setitem(sys.modules, "wandb", None)
    run("--max_iters=1", "--wandb_log=true")
    assert "note: wandb is not installed" in capsys.readouterr().err

# SPDX-License-Identifier: GPL-3.0-only
"""nanoGPT's own config files: what they mean there, they mean here, on several processes, too."""
import json
import os
import pathlib
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, chdir, error, prepare_words

from model import PRESETS
from runtime.settings import load
from training import checkpoint as ckpt
from training import resume
import train

# As in config/finetune_shakespeare.py, of which every process makes another name; and a folder of that kind.
FINETUNE = """
import os
import time

out_dir = 'out-words' + os.environ.get('FOLDER', '')
eval_interval = 5
eval_iters = 40
wandb_log = False
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time()) + os.environ.get('RANK', '')
dataset = 'words'
always_save_checkpoint = False
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20
learning_rate = 3e-5
decay_lr = False
"""
SHAPE = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--device=cpu", "--compile=false"]


@pytest.fixture(name="data", scope="module")
def data_fixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare_words(folder)
    return folder / "data"


@pytest.fixture(name="lab")
def lab_fixture(data, here):
    os.symlink(data, here / "data")
    return here


def rows(run):
    return [json.loads(line) for line in pathlib.Path(run, "log.jsonl").read_text(encoding="utf-8").splitlines()[1:]]


def torchrun(*argv):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py"]
    return subprocess.run([*command, *argv], capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_the_time_in_a_name_on_two_processes(lab):
    """Names that differ do not matter: the first process's count. The run is that of one process, and is resumed."""
    # (RANK is set while a config file is read: the folders differ, whatever the clock says.)
    text = FINETUNE.replace("os.environ.get('FOLDER', '')", "os.environ.get('RANK', '0')")
    (lab / "theirs.py").write_text(text, encoding="utf-8")
    for steps in "20", "22":
        done = torchrun("theirs.py", *SHAPE, f"--max_iters={steps}")
        assert done.returncode == 0, done.stderr
    assert "resumed out-words0 after 20 of 22 steps" in done.stderr and not (lab / "out-words1").exists()
    train.main(["theirs.py", *SHAPE, "--out_dir=alone", "--max_iters=22"])
    one, two = rows("alone"), rows("out-words0")
    assert [row["lr"] for row in two] == [row["lr"] for row in one] == [3e-5] * 22
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], abs=1e-4)


def test_what_changes_the_result_must_agree(lab):
    """A rate that differs is an error with both values, as before."""
    text = FINETUNE + "learning_rate = 1e-4 * (1 + int(os.environ['RANK']))\n"
    (lab / "theirs.py").write_text(text, encoding="utf-8")
    done = torchrun("theirs.py", *SHAPE)
    assert done.returncode != 0 and "process 1 has learning_rate=0.0002, process 0 has 0.0001" in done.stderr


def test_which_settings_must_agree():
    names = resume.settings_of_result(train.TrainConfig())
    assert {"learning_rate", "seed", "batch_size", "max_iters", "eval_interval", "n_layer", "init_from"} <= set(names)
    assert not {"wandb_run_name", "wandb_project", "wandb_log", "out_dir", "dataset", "preset"} & set(names)


@pytest.mark.parametrize("warmup", [0, 5, 2000])
def test_a_constant_rate(lab, warmup):
    """decay_lr=False is learning_rate in every step: `lr = get_lr(iter_num) if decay_lr else learning_rate` there."""
    train.main(["--dataset=words", *TINY, "--decay_lr=false", f"--warmup_iters={warmup}", "--max_iters=4"])
    assert {row["lr"] for row in rows("out/words")} == {train.TrainConfig(**given_by(TINY)).learning_rate}
    _, _, run = ckpt.load_run("out/words")
    assert run["settings"]["decay_lr"] is False


def given_by(argv):
    return {name: getattr(load(train.TrainConfig, argv, presets=PRESETS, files=True)[0], name) for name in (
        "learning_rate", "min_lr")}


def test_a_config_without_a_dataset(lab, capsys):
    """One line says what nanoGPT would have taken, and what is taken; not for a recipe of this project."""
    without = FINETUNE.replace("dataset = 'words'\n", "")
    (lab / "theirs.py").write_text(without, encoding="utf-8")

    def said(*argv):
        settings, given, _ = load(train.TrainConfig, list(argv), presets=PRESETS, files=True)
        resume.note_defaults(settings, given)
        return capsys.readouterr().err
    line = ("note: theirs.py names no dataset: with nanoGPT it would mean dataset=openwebtext, warmup_iters=2000, "
            "lr_decay_iters=600000; here it means dataset=stdlib, warmup_iters=100, lr_decay_iters=auto\n")
    assert said("theirs.py") == line
    assert said("theirs.py", "--warmup_iters=7") == line.replace(", warmup_iters=2000", "").replace(
        ", warmup_iters=100", "")
    (lab / "empty.py").write_text("batch_size = 3\n", encoding="utf-8")
    assert "gradient_accumulation_steps=40, max_iters=600000, " in said("empty.py")
    for argv in (["theirs.py", "--dataset=words"], ["--batch_size=3"], [], ["train_gpt2"], ["config/train_gpt2.py"],
                 [str(ROOT / "config/train_gpt2.py")]):
        assert said(*argv) == "", argv
    with chdir(ROOT):
        assert said("config/train_gpt2.py") == ""
    assert "openwebtext" in line and error(train.main, "theirs.py", "--eval_interval=0")  # (before the data are read)
    assert capsys.readouterr().err == line

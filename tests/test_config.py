# SPDX-License-Identifier: GPL-3.0-only
"""Settings: types, order, nearest names, config files, help, and how an error leaves the program."""
import contextlib
import os
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest
from conftest import ROOT, error, script

from runtime import console
from runtime import settings as config
import evaluate
import export
import prepare
import sample
import serve
import tokenizer
import train
from model import PRESETS


@dataclass
class Some:
    """What the tests below fill."""

    batch_size: int = 8  # how many
    learning_rate: float = 1e-3  # how fast
    out_dir: str = "out"  # where
    bias: bool = False  # with or without
    compile: Literal["auto"] | bool = "auto"  # choose
    seed: int | None = None  # any
    stop: list[str] = field(default_factory=list)  # many
    preset: str = ""


def settings(*argv, **kw):
    return config.load(Some, list(argv), files=True, **kw)[0]


@pytest.mark.parametrize("argument, name, value", [
    ("--learning_rate=1", "learning_rate", 1.0), ("--batch_size=1e4", "batch_size", 10_000),
    ("--batch_size=1_000", "batch_size", 1000), ("--batch-size=3", "batch_size", 3), ("--bias=True", "bias", True),
    ("--bias=false", "bias", False), ("--bias", "bias", True), ("--compile=auto", "compile", "auto"),
    ("--compile=False", "compile", False), ("--seed=none", "seed", None), ("--seed=7", "seed", 7),
    ("--out_dir=a=b", "out_dir", "a=b"), ("--out_dir=1984", "out_dir", "1984"), ("--out_dir=", "out_dir", ""),
    ("--stop=x", "stop", ["x"]), ("--batch_size=9007199254740993", "batch_size", 9007199254740993)])
def test_types_come_from_the_annotations(argument, name, value):
    found = getattr(settings(argument), name)
    assert found == value and type(found) is type(value)


def test_a_value_may_follow_its_name():
    s = settings("--batch_size", "3", "--bias", "--learning_rate", "-1", "--stop", "a", "--stop", "b")
    assert (s.batch_size, s.bias, s.learning_rate, s.stop) == (3, True, -1.0, ["a", "b"])
    assert settings("--bias", "false").bias is False
    fact, _ = error(lambda argv: settings(*argv), "--batch_size")
    assert "--batch_size needs a value" in fact


@pytest.mark.parametrize("argument, words", [
    ("--batch_size=0.5", "'0.5' is not a whole number"), ("--learning_rate=fast", "'fast' is not a number"),
    ("--learning_rate=nan", "not a number"), ("--bias=2", "'2' is not true or false"),
    ("--compile=maybe", "'maybe' is not auto or true or false"), ("--seed=x", "whole number or none"),
    ("--batch_size=true", "'true' is not a whole number")])
def test_ill_typed(argument, words):
    fact, fix = error(lambda argv: settings(*argv), argument)
    assert words in fact and argument.split("=")[0] in fact


def test_unknown_names_the_nearest():
    fact, fix = error(train.main, "--learnin_rate=1")
    assert fact == "--learnin_rate: there is no setting 'learnin_rate'" and fix == "--learning_rate"
    assert "--help" in error(train.main, "--xyzzy=1")[1]


def test_files_and_flags_are_read_from_left_to_right(here):
    (here / "a.py").write_text("import time\nbatch_size = 4 * 5  # arithmetic\nlearning_rate = 1\n_private = 3\n")
    (here / "b.py").write_text("batch_size = 6\n")
    assert settings("a.py").batch_size == 20 and settings("a.py").learning_rate == 1.0
    assert settings("a.py", "b.py").batch_size == 6
    assert settings("--batch_size=1", "a.py").batch_size == 20
    assert settings("a.py", "--batch_size=1").batch_size == 1


@pytest.mark.parametrize("source, words", [
    ("batch_size = 1\nlearnin_rate = 2\n", ["learnin_rate"]),
    ("batch_size = 'x'\n", ["batch_size: 'x'", "whole"]), ("batch_size = \n", ["line 1", "SyntaxError"]),
    ("batch_size = 1\nout_dir = 1 / 0\n", ["line 2", "ZeroDivisionError"]),
    ("bias = 2\n", ["bias", "true or false"]), ("batch_size = 1\n\0", ["null bytes"])])
def test_errors_in_files(here, source, words):
    (here / "bad.py").write_text(source)
    fact, _ = error(lambda argv: settings(*argv), "bad.py")
    assert "bad.py" in fact and all(word in fact for word in words), fact


def test_missing_and_unreadable_files(here):
    fact, fix = error(train.main, "config/train_smal.py")
    assert "config/train_smal.py" in fact and fix == "config/train_small.py"
    (here / "image.py").write_bytes(b"\x89PNG\xff\xfe")
    assert "image.py, line 1" in error(train.main, "image.py")[0]
    (here / "folder.py").mkdir()
    assert "folder.py" in error(train.main, "folder.py")[0]
    (here / "mean.py").write_text("batch_size = 4\nimport statistics\nlearning_rate = statistics.mean([])\n")
    assert "mean.py, line 3: StatisticsError" in error(train.main, "mean.py")[0]


def test_every_spelling_of_zero_is_the_word():
    given = ["--grad_clip=0.00", "--patience=-0", "--eval_iters=0", "--save_interval=0e0", "--weight_decay=0"]
    found = config.load(train.TrainConfig, given)[0]
    assert (found.grad_clip, found.patience, found.eval_iters, found.save_interval) == ("none", "none", "all", "auto")
    assert found.weight_decay == 0 and found.lora_rank == 0


def test_a_full_standard_output(monkeypatch):
    full = open("/dev/full", "w")
    monkeypatch.setattr(sys, "stdout", full)
    assert error(lambda _: console.show("x" * 100_000)) == (
        "cannot write to standard output: No space left on device", "free disk space")
    with contextlib.suppress(OSError):
        full.close()


def test_presets_change_defaults_only():
    presets = {"wide": dict(batch_size=99, bias=True)}
    assert settings("--preset=wide", presets=presets).batch_size == 99
    assert settings("--batch_size=1", "--preset=wide", presets=presets).batch_size == 1
    fact, fix = error(train.main, "--preset=gpt3")
    assert "'gpt3'" in fact and "openllm-small" in fix
    for shape in PRESETS.values():  # every preset names real settings
        assert set(shape) <= set(train.TrainConfig.__dataclass_fields__)


SETTINGS = {train: train.TrainConfig, sample: sample.SampleConfig, evaluate: evaluate.EvaluateConfig,
            serve: serve.ServeConfig, export: export.ExportConfig, prepare: prepare.PrepareConfig,
            tokenizer: tokenizer.TokenizerConfig}


@pytest.mark.parametrize("script", SETTINGS, ids=lambda script: script.__name__)
def test_help_prints_every_setting_with_its_comment(script, capsys):
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for name in SETTINGS[script].__dataclass_fields__:
        assert f"  --{name}=" in shown, name


@pytest.mark.parametrize("name", ["train.py", "sample.py", "prepare.py", "evaluate.py"])
def test_an_error_is_two_lines_and_exit_code_2(name, here):
    done = script(name, "--nonsense=1", cwd=here)
    assert done.returncode == 2 and done.stdout == ""
    first, second = done.stderr.strip().split("\n")
    assert first.startswith("error: ") and "nonsense" in first and second.startswith("fix: ")


def test_every_source_file_names_its_licence():
    files = [p for pattern in ("*.py", "*/*.py") for p in ROOT.glob(pattern) if p.stat().st_size]
    assert len(files) > 10
    for path in files:
        assert "SPDX-License-Identifier: GPL-3.0-only" in path.read_text(encoding="utf-8").split("\n")[0], path


def test_what_a_terminal_obeys_is_written_as_escapes(capsys, monkeypatch):
    text = "title \x1b]0;mine\x07 \x9b2J over\rwritten \u202ereversed\x7f, but \t and \n and \u00e9\u4e2d stay"
    due = "title \\x1b]0;mine\\x07 \\x9b2J over\\rwritten \\u202ereversed\\x7f, but \t and \n and \u00e9\u4e2d stay"
    console.say(text)
    assert capsys.readouterr().err == due + "\n"
    console.show(text)  # to a pipe: exactly the text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    console.show(text)
    assert capsys.readouterr().out == f"{text}\n{due}\n"


@pytest.mark.skipif(os.name != "posix", reason="Windows cannot tell whether a pipe is ready")
def test_a_line_that_cannot_be_written_is_dropped_and_counted(tmp_path):
    """A full pipe, a reader that has left, a full disk: the program goes on, and says later how much was lost."""
    program = """if True:
        import os, sys
        from runtime import console
        read, write = os.pipe()
        stderr = os.dup(2)
        os.dup2(write, 2)
        for i in range(1000):
            console.say(f"line {i} " + 100 * "x")
        taken = len(os.read(read, 1 << 20))
        console.say("there is room again")
        assert b" lines could not be written here)" in os.read(read, 1 << 20)
        os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
        console.say("lost")
        os.dup2(stderr, 2)
        console.say("the end")
        print(taken)
        """
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr == "\n(1 line could not be written here)\nthe end\n" and 0 < int(done.stdout) < 100_000

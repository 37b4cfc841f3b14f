# SPDX-License-Identifier: GPL-3.0-only
"""The benches that run nanoGPT beside this project, and what people give them in its place."""
import shutil

import pytest
from conftest import ROOT, error, words

from bench import __main__ as bench
from bench import generate
from bench.measure import copy_peer

FIX = "git clone https://github.com/karpathy/nanoGPT, and --peer=nanoGPT"
COMMANDS = {"loss": ["loss", "words.txt", "--tiny"], "throughput": ["throughput", "--steps=6", "--tiny"],
            "parity": ["parity"], "generate": ["generate", "--tiny", "--new_tokens=4", "--prompt=4"]}


@pytest.fixture(autouse=True)
def no_real_model(monkeypatch):
    """openllm-small takes seconds, and --tiny replaces it."""
    monkeypatch.setattr(generate, "load_model", lambda path, device: (None, None, {}))
    monkeypatch.setattr(generate, "find_spec", lambda name: None)


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_not_nanogpt(here, name):
    """This project, another clone of it, a file, an empty folder: all have been given; nothing of it is run."""
    (here / "words.txt").write_text(words(2000), encoding="utf-8")
    (here / "empty").mkdir()
    (here / "clone").mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, here / "clone")
    peers = [str(ROOT), "clone", "./clone/", "empty", "nowhere", str(ROOT / "model.py")]
    for peer in peers + [""] * (name != "generate"):
        assert error(bench.main, *COMMANDS[name], f"--peer={peer}") == (f"--peer={peer!r} is not a nanoGPT folder", FIX)


def test_generate_without_a_peer(here, capsys):
    """It is left out, and the others are measured."""
    for argv in ([], ["--peer="]):
        assert not bench.main([*COMMANDS["generate"], "--repeats=1", *argv])
        shown = capsys.readouterr()
        assert "nanoGPT is left out: --peer=FOLDER" in shown.err and "| float32 |" in shown.out
        assert "nanoGPT" not in shown.out


def test_generate_with_a_peer(here, capsys):
    copy_peer(str(ROOT / "plain.py"), here / "nanoGPT")
    assert not bench.main([*COMMANDS["generate"], "--repeats=1", "--peer=nanoGPT"])
    assert "| nanoGPT, float32 |" in capsys.readouterr().out

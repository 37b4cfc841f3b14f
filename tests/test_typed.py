# SPDX-License-Identifier: GPL-3.0-only
"""What people type at a terminal in their first hour: it does what was meant, or the error has the line to type."""
import io
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, error, random_model, script, talks, words, write_talks

import dataset as datasets
import evaluate
import export
import prepare
from runtime import console
from runtime.settings import ELSEWHERE, help_text, load
import sample
import serve
import tokenizer as tokenizers
import train
from training import checkpoint as ckpt

SETTINGS = {"train": train.TrainConfig, "sample": sample.SampleConfig, "prepare": prepare.PrepareConfig,
            "tokenizer": tokenizers.TokenizerConfig, "evaluate": evaluate.EvaluateConfig, "serve": serve.ServeConfig,
            "export": export.ExportConfig}


@pytest.mark.parametrize("main, typed, fix", [
    (train.main, "--lr=1e-3", "--learning_rate"), (train.main, "--epochs=3", "--max_iters"),
    (train.main, "--steps=3", "--max_iters"), (train.main, "--data=notes", "--dataset"),
    (train.main, "--fp16", "--dtype=float16"), (train.main, "--model=gpt2", "--preset=NAME, or --init_from=RUN"),
    (train.main, "-batch_size", "--batch_size"), (train.main, "--resume", "--init_from=resume"),
    (sample.main, "--n=40", "--max_new_tokens"), (sample.main, "--length=40", "--max_new_tokens"),
    (sample.main, "--temp=1", "--temperature"), (sample.main, "--model-path=out/small", "give the RUN without an option"),
    (sample.main, "--max-length=40", "--max_new_tokens"), (prepare.main, "--output=x", "--out"),
    (sample.main, "--lenght=4", "--max_new_tokens"), (train.main, "--batchsize=4", "--batch_size"),
    (train.main, "--learning-rat=1", "--learning_rate"), (serve.main, "--workers=4", "--rows"), (export.main, "--output_dir=x", "--out")])
def test_names_from_elsewhere(here, main, typed, fix):
    assert error(main, typed)[1].startswith(fix)


def test_every_name_from_elsewhere_is_no_name_here_and_leads_to_one():
    for name, ours in ELSEWHERE.items():
        for setting in (option.partition("=")[0] for option in ours.split()):
            having = [cls for cls in SETTINGS.values() if setting in cls.__dataclass_fields__]
            assert having, (name, setting)
            assert not any(name in cls.__dataclass_fields__ for cls in having), (name, setting)


def test_recipes_are_found_by_their_name(here):
    for name in ("train_small", "train_small.py", "config/train_small.py", str(ROOT / "config/train_small.py")):
        settings = load(train.TrainConfig, [name], files=True)[0]
        assert settings.n_embd == 256 and settings.out_dir == "out/small"


def test_a_text_is_no_recipe(here):
    (here / "my notes.txt").write_text("a text")
    fact, fix = error(train.main, "my notes.txt")
    assert "is not a config file" in fact and fix == "for a text: python prepare.py 'my notes.txt', then --dataset='my notes'"


def test_data_that_are_a_text_or_misspelt(here):
    (here / "notes.txt").write_text(words(3000))
    fact, fix = error(train.main, "--dataset=notes.txt")
    assert "notes.txt is a text" in fact and fix == "python prepare.py notes.txt, then --dataset=notes"
    prepare.main(["notes.txt", "--tokenizer=char"])
    assert error(train.main, "--dataset=nots") == ("there is no prepared data in data/nots (no meta.json)",
                                                   "--dataset=notes, or python prepare.py YOUR_TEXT.txt --out=data/nots")


# ---------- A RUN, a prompt, or both

def test_a_prompt_needs_no_option(here, tiny_run, monkeypatch, capsys):
    monkeypatch.chdir(tiny_run)
    options = ["--max_new_tokens=4", "--temperature=0", "--seed=1"]

    def written(*typed):
        sample.main([*typed, *options])
        return capsys.readouterr().out

    expected = written("out/words", "--prompt=the cat")
    assert expected.startswith("the cat")
    assert written("the cat") == written("out/words", "the cat") == written("--prompt=the cat") == expected
    assert written("out/words", "dog") == written("--prompt=dog")  # beside a RUN, one word is a prompt, too
    fact, fix = error(sample.main, "the", "old", "man")
    assert "got 3 arguments" in fact and fix == "quote the prompt: python sample.py 'the old man'"
    assert "--start and --prompt" in error(sample.main, "--start=a", "--prompt=b")[0]


def test_runs_that_are_none(here, tiny_run, monkeypatch):
    monkeypatch.chdir(tiny_run)
    cases = {
        "out/wrods": ("there is no run out/wrods", "out/words"),
        "out": ("there is no trained model in out", "out/words"),
        "data": ("there is no trained model in data", "out/words"),
        "data/words": ("data/words is prepared data, not a run",
                       "python train.py config/train_small.py --dataset=words --out_dir=out/words"),
        "HuggingFaceTB/SmolLM2-135M": ("there is no folder HuggingFaceTB/SmolLM2-135M",
                                       "hf download HuggingFaceTB/SmolLM2-135M --local-dir SmolLM2-135M, then SmolLM2-135M"),
    }
    for run, expected in cases.items():
        for main in (sample.main, evaluate.main, export.main):
            assert error(main, run) == expected
    assert error(serve.main, "out/wrods") == cases["out/wrods"]
    monkeypatch.chdir(here)
    assert error(sample.main, "nowhere") == ("there is no run nowhere", "python train.py config/train_small.py")


# ---------- What is printed

@pytest.mark.parametrize("name", SETTINGS)
def test_the_help_is_a_table(name):
    text = help_text(SETTINGS[name])
    table = text.partition("Settings, with their defaults:")[2]
    for setting in SETTINGS[name].__dataclass_fields__:
        assert f"\n  --{setting}=" in table, setting
    assert not any(code in text for code in ("Literal[", "field(", ": str", ": int", "| None"))
    assert max(map(len, table.split("\n"))) <= 110
    assert text.count(f"python {name}.py") + text.count("torchrun") >= 3  # examples


def test_the_help_has_choices_ranges_and_groups():
    text = help_text(sample.SampleConfig)
    assert "--temperature=0.8" in text and "[0 to 2]" in text
    assert "[best, last]" in text and "\nhow tokens are chosen" in text


def test_files_that_are_no_programs_say_so():
    for name in ("model.py", "dataset.py", "config/train_small.py", "config/finetune_lora.py"):
        done = script(name)
        assert done.returncode == 0 and len(done.stdout.splitlines()) == 1 and "python " in done.stdout


def test_ctrl_c_during_the_imports_is_one_line(here):
    code = "import runtime.console; raise KeyboardInterrupt"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "stopped\n" and done.returncode != 0


def test_a_missing_package_is_two_lines(here):
    """As in a new terminal, without the virtual environment. The standard library is all that this Python has."""
    for name in ("train.py", "sample.py", "evaluate.py", "export.py", "serve.py", "prepare.py", "tokenizer.py"):
        done = subprocess.run([sys.executable, "-S", "-P", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
                               f"import runpy; runpy.run_path({str(ROOT / name)!r}, run_name='__main__')"],
                              cwd=here, capture_output=True, text=True)
        missing, fix = done.stderr.splitlines()
        assert missing.startswith("error: the package ") and " is not installed in " in missing, done.stderr
        assert fix == "fix: . .venv/bin/activate, or pip install -r requirements.txt" and done.returncode == 1


def test_a_line_moves_between_two_lines_of_the_log(here, tiny_run, monkeypatch, capsys):
    monkeypatch.chdir(tiny_run)
    monkeypatch.setattr(train, "REFRESH_SECONDS", 0.0)
    argv = ["--dataset=words", f"--out_dir={here}/moving", "--max_iters=4", "--log_interval=4", "--n_layer=1",
            "--n_head=1", "--n_embd=8", "--block_size=16", "--batch_size=2", "--compile=false", "--device=cpu"]
    for terminal in (True, False):
        shutil.rmtree(here / "moving", ignore_errors=True)
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
        assert train.main(argv) == 0
        said = capsys.readouterr().err
        assert re.findall(r"step (\d), loss \d+\.\d{3}\r", said) == ["1", "2", "3"] * terminal


@pytest.mark.parametrize("seconds, said", [(0.4, "0 s"), (8, "8 s"), (123, "2m03s"), (3600, "1h00m"), (12_000, "3h20m"),
                                           (200_000, "2 days"), (90 * 86400, "90 days")])
def test_durations(seconds, said):
    assert console.duration(seconds) == said


def test_progress_moves_on_a_terminal_and_is_a_line_in_a_file(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    for stream, expected in ((Terminal(), "reading: 3.0 of 9.0 MB, 1.0 MB/s, 6 s left\r"
                                          "\033[Kreading: 6.0 of 9.0 MB, 1.0 MB/s, 3 s left\r\033[Kdone\n"),
                             (io.StringIO(), "reading: 3.0 of 9.0 MB, 1.0 MB/s, 6 s left\ndone\n")):
        clock[0] = 0.0
        monkeypatch.setattr(sys, "stderr", stream)
        progress = console.Progress("reading", 9_000_000)
        for clock[0] in (1, 3, 6):
            progress.tell(int(clock[0] * 1e6))
        console.say("done")
        assert stream.getvalue() == expected


def test_a_run_of_days_is_begun_after_a_question(here, tiny_run, monkeypatch, capsys):
    monkeypatch.chdir(tiny_run)
    monkeypatch.setattr(train, "LONG_SECONDS", 0.0)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    asked = []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(1) or "n")
    argv = ["--dataset=words", f"--out_dir={here}/long", "--max_iters=2", "--n_layer=1", "--n_head=1", "--n_embd=8",
            "--block_size=16", "--batch_size=2", "--compile=false", "--device=cpu"]
    assert error(train.main, *argv)[0] == "cancelled" and asked and not os.path.exists(here / "long")
    assert "this will take about" in capsys.readouterr().err
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert train.main(argv) == 0


# ---------- A small chat set

def test_a_chat_begins_with_markers_as_likely_as_the_end_of_a_text():
    vocabulary = tokenizers.train("bpe", [words(20_000)], 300)
    model = random_model(vocab_size=vocabulary.vocab_size)
    before = model.lm_head.weight.clone()
    train.init_markers(model, vocabulary)
    ids = [vocabulary.special[name] for name in tokenizers.SPECIAL]
    end = before[vocabulary.special[tokenizers.END_OF_TEXT]]
    assert torch.equal(model.lm_head.weight[ids], end.expand(len(ids), -1))
    others = [i for i in range(vocabulary.vocab_size) if i not in ids]
    assert torch.equal(model.lm_head.weight[others], before[others])


def test_a_small_chat_set_teaches_to_stop(here):
    """60 conversations on top of a model that has read texts alone: it ends its answers."""
    (here / "words.txt").write_text(words(40_000))
    prepare.main(["words.txt", "--vocab_size=300"])
    tiny = ["--n_layer=2", "--n_head=2", "--n_embd=64", "--block_size=64", "--batch_size=8", "--log_interval=1000",
            "--eval_interval=1000", "--warmup_iters=5", "--compile=false", "--dtype=float32", "--device=cpu"]
    assert train.main(["--dataset=words", "--out_dir=base", "--max_iters=150", "--learning_rate=1e-2", *tiny]) == 0
    write_talks("talks.jsonl", talks(60))
    prepare.main(["talks.jsonl", "--format=chat", "--tokenizer=base"])
    assert train.main(["--init_from=base", "--dataset=talks-chat", "--out_dir=chat", "--max_iters=40",
                       "--learning_rate=3e-3", *tiny]) == 0
    model, tokenizer, _ = ckpt.load_run("chat")
    data, ended = datasets.Dataset.open("data/talks-chat"), 0
    for start, end, _ in data.chat_windows("train", 64).tolist()[:10]:
        answer = int(data.read_mask("train", start, end - start).argmax())
        prompt = torch.tensor([data.read_ids("train", start, answer).tolist()])
        ended += tokenizer.special[tokenizers.END] in [token.item() for token in model.generate(prompt, 30)]
    assert ended == 10

# SPDX-License-Identifier: GPL-3.0-only
"""sample.py between other programs: a prompt from a pipe, many prompts from a file."""
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, chat_run, error, turns, words

from runtime.console import UserError
from serving import engine
from training import checkpoint as ckpt
import sample

QUICK = "--max_new_tokens=12", "--seed=5"


@pytest.fixture
def write(tiny_run, monkeypatch, capsys):
    """write(*argv, stdin=bytes or None): what sample.py prints where this comes from a pipe; None: it is closed."""
    monkeypatch.chdir(tiny_run)

    def run(*argv, stdin=b""):
        with monkeypatch.context() as patch:
            if stdin is None:
                patch.setattr(sys, "stdin", None)
                sample.main([*QUICK, *argv])
            else:
                reading, writing = os.pipe()
                os.write(writing, stdin)
                os.close(writing)
                with open(reading, encoding="utf-8") as file:
                    patch.setattr(sys, "stdin", file)
                    sample.main([*QUICK, *argv])
        return capsys.readouterr()
    return run


# ----------------------------------------------------------------------------------------------------------------------
# Standard input


@pytest.mark.parametrize("typed, prompt", [
    (b"the cat\n", "the cat"), (b"the cat", "the cat"), (b"the cat\r\n", "the cat"), (b"the cat\n\n", "the cat\n"),
    (b"the\ncat \n", "the\ncat "), (b"\n\n", "\n")])
def test_a_piped_text_is_the_prompt(write, typed, prompt):
    """All of it, without the line end that echo adds: the same text as with --prompt."""
    assert write(stdin=typed).out == write(f"--prompt={prompt}").out


@pytest.mark.parametrize("nothing", [b"", b"\n", b"\r\n", None])
def test_no_text_is_no_prompt(write, nothing):
    """An empty pipe, a closed one, or an empty line: a text from its beginning, as before."""
    assert write(stdin=nothing).out == write("--prompt=").out != ""


def test_a_prompt_on_the_command_line_goes_first(write):
    """Then nothing is read, even where the prompt is empty: a script that is itself piped in keeps its lines."""
    for argv in (["--prompt=my "], ["--start=my "], ["out/words", "my "]):
        assert write(*argv, stdin=b"the cat").out == write(*argv).out
    for argv in ["--prompt="], ["--start="]:
        assert write(*argv, stdin=b"the cat").out == write(stdin=b"").out


def test_a_pipe_as_a_shell_makes_it(tiny_run):
    """The command of the documentation; and cron, where standard input is /dev/null or closed."""
    command = f"{sys.executable} {ROOT / 'sample.py'} out/words --max_new_tokens=5 --seed=5"
    outs = [subprocess.run(line, shell=True, cwd=tiny_run, capture_output=True, text=True, check=True,
                           stdin=subprocess.DEVNULL).stdout
            for line in (f"echo 'my dog' | {command}", f"{command} --prompt='my dog'", f"{command} <&-", command)]
    assert outs[0] == outs[1] and outs[0].startswith("my dog") and outs[2] == outs[3] != outs[0]


def test_a_pipe_that_nobody_writes_to(write, tiny_run, monkeypatch, capsys):
    """What is waited for is said, and how to go on without it."""
    reading, writing = os.pipe()
    real = sample.note
    monkeypatch.setattr(sample, "note", lambda text: (real(text), os.write(writing, b"my \n"), os.close(writing)))
    with open(reading, encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stdin", file)
        sample.main([*QUICK])
    said = capsys.readouterr()
    assert "waiting for a prompt on standard input; --prompt= " in said.err and said.out.startswith("my ")


def test_what_is_no_text(write):
    with pytest.raises(UserError, match="standard input is not UTF-8"):
        write(stdin=b"\xff\xfet\0h\0e\0")
    with pytest.raises(UserError, match=r"U\+003F"):
        write(stdin=b"the?")
    assert write("--prompt=FILE:words.txt").out  # FILE: is for the command line:
    with pytest.raises(UserError, match=r"U\+0046"):
        write(stdin=b"FILE:words.txt")


def test_each_line_is_a_message_of_one_conversation(write, here, tiny_run, monkeypatch):
    chat_run(tiny_run, here / "chat")
    _, tokenizer, _ = ckpt.load_run("chat")
    asked = []

    def sampler(settings, prompt, seed):
        asked.append(prompt)
        answer = iter([*tokenizer.encode("my dog"), tokenizer.special["<|end|>"]])
        return lambda logits: sample.torch.tensor([next(answer)])
    monkeypatch.setattr(sample, "Sampler", sampler)
    monkeypatch.chdir(here)
    assert write("chat", "--chat", stdin=b"a\n\n the \r\n").out == "my dog\nmy dog\n"
    assert asked == [tokenizer.chat(turns("a")), tokenizer.chat(turns("a", "my dog", " the "))]
    assert write("chat", "--chat", stdin=b"").out == "my dog\n" and asked[2:] == [tokenizer.chat(turns(""))]


# ----------------------------------------------------------------------------------------------------------------------
# --prompts


def rows_of(shown):
    return [json.loads(line) for line in shown.out.splitlines()]


def alone(write, prompt, seed, *argv):
    """The text of a prompt by itself."""
    return write(f"--prompt={prompt}", f"--seed={seed}", *argv).out.removeprefix(prompt).removesuffix("\n")


def test_a_prompt_per_line(write, tmp_path):
    """A line of JSON for each, in their order; each text is what its prompt gets alone, with the seed that it names."""
    prompts = [words(30, seed=i)[:i % 17 + 1] for i in range(40)]
    (tmp_path / "p.txt").write_text("\r\n".join(prompts) + "\n\n \n", encoding="utf-8-sig")
    rows = rows_of(write(f"--prompts={tmp_path}/p.txt", "--temperature=1"))
    assert [row["prompt"] for row in rows] == prompts and [row["line"] for row in rows] == list(range(1, 41))
    assert [row["seed"] for row in rows] == list(range(5, 45)) and all(1 <= row["tokens"] <= 12 for row in rows)
    for i in range(0, 40, 7):
        assert set(rows[i]) == {"line", "prompt", "text", "seed", "tokens"}
        assert rows[i]["text"] == alone(write, prompts[i], 5 + i, "--temperature=1")


def test_they_are_written_many_at_once(write, tmp_path, monkeypatch):
    """Sixteen, in the steps of one."""
    most, real = [0], engine.Engine.decode
    monkeypatch.setattr(engine.Engine, "decode",
                        lambda self, slots: (most.append(len(self.running)), real(self, slots))[1])
    (tmp_path / "p.txt").write_text("the \n" * 40, encoding="utf-8")
    write(f"--prompts={tmp_path}/p.txt")
    assert max(most) == 16 and len(most) < 40 * 12 / 8


@pytest.mark.parametrize("argv", [
    ["--stop=e"], ["--stop=\\n", "--stop= a"], ["--max_new_tokens=60"], ["--num_samples=2"],
    ["--repetition_penalty=1.5", "--top_p=0.9"], ["--temperature=0", "--max_new_tokens=40"]], ids=str)
def test_settings_and_long_texts(write, tmp_path, argv):
    """Every setting holds; a text or prompt that outgrows the context of 32 is what it is alone, too."""
    prompts = ["the cat", "my ", words(50, seed=2).strip(), words(31, seed=3)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(dict(prompt=p)) + "\n" for p in prompts), encoding="utf-8")
    rows = rows_of(write(f"--prompts={tmp_path}/p.jsonl", *argv))
    n = len(rows) // len(prompts)
    assert n == (2 if "--num_samples=2" in argv else 1) and [row["prompt"] for row in rows[::n]] == prompts
    for row in rows:
        assert row["text"] == alone(write, row["prompt"], row["seed"], *argv, "--num_samples=1")


def test_conversations(write, here, tiny_run):
    """Rows of messages, and with --chat every prompt is a question; a last answer that is begun goes on."""
    chat_run(tiny_run, here / "chat")
    model, tokenizer, _ = ckpt.load_run(str(here / "chat"))
    talks = [turns("a"), turns("a", "the", "my dog"), turns("the", "my "), turns("a", system="old")]
    (here / "t.jsonl").write_text("".join(json.dumps(dict(messages=talk)) + "\n" for talk in talks), encoding="utf-8")
    rows = rows_of(write(str(here / "chat"), f"--prompts={here}/t.jsonl"))
    assert [row["messages"] for row in rows] == talks
    begun = tokenizer.continued(talks[2])
    for ids, row in zip([tokenizer.chat(talks[0]), tokenizer.chat(talks[1]), begun, tokenizer.chat(talks[3])], rows):
        settings = sample.SampleConfig(max_new_tokens=12)
        due = "".join(text for _, text in sample.continuation(model, tokenizer, ids, settings, row["seed"]))
        assert row["text"] == due
    (here / "q.txt").write_text("a\nthe\n", encoding="utf-8")
    questions = rows_of(write(str(here / "chat"), "--chat", f"--prompts={here}/q.txt"))
    assert questions[0]["text"] == rows[0]["text"] and questions[0]["prompt"] == "a"


def test_rows_that_cannot_be_read(write, tmp_path):
    """They are counted, shown and skipped; --strict stops at the first; the others are answered under their line."""
    lines = ['{"prompt": "the"}', "{", '{"text": "x"}', "[]", '{"prompt": 5}', '{"prompt": "?"}',
             '{"prompt": "\\ud800"}', "", '{"prompt": "my"}', "null"]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    shown = write(f"--prompts={path}")
    assert [(row["line"], row["prompt"], row["seed"]) for row in rows_of(shown)] == [(1, "the", 5), (9, "my", 6)]
    assert "rows skipped: 7; --strict stops" in shown.err and shown.err.count("skipped: ") == 4
    assert "p.jsonl, line 2: not JSON" in shown.err and "line 3: no field `prompt`; found text" in shown.err
    assert "line 2" in error(sample.main, f"--prompts={path}", "--strict")[0]
    path.write_text('{"prompt": "?"}\n{"prompt": "the"}', encoding="utf-8")
    assert "p.jsonl, line 1: the character '?'" in error(sample.main, f"--prompts={path}", "--strict")[0]


def test_what_people_get_wrong(write, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n", encoding="utf-8")
    (tmp_path / "talk.jsonl").write_text(json.dumps(dict(messages=turns("a"))), encoding="utf-8")
    assert "has no prompts" in error(sample.main, f"--prompts={tmp_path}/empty.txt")[0]
    assert "missing.txt" in error(sample.main, "--prompts=missing.txt")[0]
    assert "has no chat format" in error(sample.main, f"--prompts={tmp_path}/talk.jsonl")[0]
    assert "give one of them" in error(sample.main, "--prompts=x", "--prompt=y")[1]


@pytest.mark.parametrize("argv, said", [
    (["--compile=False"], False), (["--compile"], True), (["--compile=true"], True)])
def test_compile_of_nanogpt(write, argv, said):
    """nanoGPT's option is understood; where it is asked for, it is said that it does nothing."""
    shown = write("--prompt=the", *argv)
    assert shown.out == write("--prompt=the").out and ("--compile has no effect" in shown.err) == said

# SPDX-License-Identifier: GPL-3.0-only
"""The commands of README.md and of the pages of docs/ run, one after the other, and make and say what the pages show."""
import contextlib
import json
import os
import queue
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import threading

import programs
import pytest
import requests
from conftest import ROOT, random_model, words
from pages import COMMANDS, PAGES, PROGRAMS, QUICK, bench_settings, blocks

from bench.measure import copy_peer
import export
from formats import huggingface
import tokenizer


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder that looks like a fresh clone, and the text files that a reader is supposed to have."""
    folder = tmp_path_factory.mktemp("clone")
    for path in [*ROOT.glob("*.py"), *ROOT.glob("requirements*.txt"), ROOT / "config", ROOT / "tests",
                 *(path.parent for path in ROOT.glob("*/__init__.py"))]:
        os.symlink(path, folder / path.name)
    (folder / "notes.txt").write_text(words(30_000), encoding="utf-8")
    (folder / "shakespeare.txt").write_text("ROMEO:\n" + words(30_000, seed=1), encoding="utf-8")
    (folder / "pytorch").mkdir()  # in place of what pip has installed
    (folder / "pytorch/a.py").write_text(" ".join(map(str, range(7, 10**9, 123457))), encoding="utf-8")
    (folder / "prompt.txt").write_text("def ", encoding="utf-8")
    (folder / "shakespeare").mkdir()  # in place of the download: a folder that bears a name is taken for it
    shutil.copy(folder / "shakespeare.txt", folder / "shakespeare/input.txt")
    for i, name in enumerate(("train-v1.1.json", "dev-v1.1.json")):
        paragraphs = [{"context": words(400, seed=j), "qas": []} for j in range(i * 100, i * 100 + 100)]
        (folder / name).write_text(json.dumps({"version": "1.1", "data": [{"paragraphs": paragraphs}]}))
    chats = [dict(prompt=words(5, seed=i), completion=words(5, seed=i + 1)) for i in range(200)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    write_model(folder / "SmolLM2-135M-Instruct")
    for name, seed in (("gsm8k_train.jsonl", 0), ("gsm8k_test.jsonl", 1)):
        rows = [dict(question=f"{a} and {a + seed}?", answer=f"#### {a + a + seed}") for a in range(220)]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    copy_peer(str(ROOT / "plain.py"), folder / "nanoGPT")  # in place of nanoGPT, which is not part of this project
    with open(folder / "nanoGPT/train.py", "a", encoding="utf-8") as file:
        file.write(SAVE)
    return folder


# What nanoGPT does at the end, and plain.py does not.
SAVE = """
import dataclasses, os, sys, torch
settings = dict(argument[2:].split("=") for argument in sys.argv[1:])
weights = {name: w.detach().float() for name, w in model.weights.items()}
weights["lm_head.weight"] = weights["transformer.wte.weight"]
os.makedirs(settings["out_dir"], exist_ok=True)
torch.save(dict(model=weights, model_args=dataclasses.asdict(model.config), iter_num=1,
                config=dict(dataset=settings["dataset"])), os.path.join(settings["out_dir"], "ckpt.pt"))
"""


def write_model(path):
    """A small random chat model as a Hugging Face folder, in place of the large one that the page names."""
    vocabulary = tokenizer.train("bpe", [words(20_000)], 400)
    model = random_model(vocab_size=vocabulary.vocab_size, block_size=512, bias=True)
    huggingface.write(str(path), model, vocabulary, chat=True)


@contextlib.contextmanager
def serving(clone, *arguments, expect=200):
    """A server on a free port; its address. It has to end well."""
    server = subprocess.Popen([sys.executable, "serve.py", *arguments, "--port=0"], cwd=clone, text=True,
                              stderr=subprocess.PIPE)
    log = queue.Queue()
    threading.Thread(target=lambda: [log.put(line) for line in server.stderr], daemon=True).start()
    try:
        port = re.search(r":(\d+); loading", log.get(timeout=60))[1]
        address = f"http://127.0.0.1:{port}"
        programs.until(lambda: get(f"{address}/health").json() != {"status": "loading"}, "the model is loaded")
        assert get(f"{address}/model-info").status_code == expect
        yield address
    finally:
        server.terminate()
        assert server.wait(timeout=60) == 0


def get(address):
    session = requests.Session()
    session.trust_env = False  # no proxy
    return session.get(address, timeout=60)


@pytest.fixture(scope="module")
def address(clone):
    with serving(clone) as address:
        yield address


# What is shown on a page is what the command said: the command, the page, how the block begins. Numbers and lists of
# names may be others.
SHOWN = {
    "python train.py config/train_small.py": ("docs/data.md", "395 documents"),
    "python prepare.py stdlib --format=chat --tokenizer=out/small": ("docs/chat.md", "<|user|>"),
    "python export.py out/small --format=int8": ("docs/formats.md", "int8: "),
}


def shape(line):
    """A line without its numbers, and without the names and words that depend on them."""
    line = re.sub(r"(not ASCII|highest): .*", r"\1: ...", line)
    line = re.sub(r"(<\|(?:user|assistant)\|>\u27e6?).+?(?=<\|end)", r"\1...", line)
    return re.sub(r"[+-]?\d[\d,.]*", "0", line)


def check_shown(command, said):
    page, start = SHOWN[command]
    block, = (block for block in blocks(page, "") if block.startswith(start))
    found = {shape(line) for line in said.splitlines()}
    counts = [int(re.search(r"(\d[\d,]*) (?:short )?conversations", text)[1].replace(",", ""))
              for text in (PAGES["README.md"], said) if start == "<|user|>"]
    assert not counts or counts[1] == pytest.approx(counts[0], rel=0.3), counts  # every Python has a library of its own
    for line in block.splitlines():
        if start == "<|user|>" and line.startswith(start):  # with one answer or with two
            assert any(re.fullmatch(r"(<.user.>\.\.\.<.end.><.assistant.>\u27e6\.\.\.<.end.>\u27e7){1,2}", each)
                       for each in found), found
        else:
            assert any(each.startswith(shape(line)) for each in found), (line, found)


def option(arguments, name, default=""):
    return next((argument.partition("=")[2] for argument in arguments if argument.startswith(f"--{name}=")), default)


def columns(heading):
    """The names of the columns of a table."""
    return {cell.strip() for cell in heading.split("|")} - {""}


def check_made(clone, program, arguments, said):
    """Has the command made what it is for?"""
    names = [argument for argument in arguments if not argument.startswith("--")]
    if "--help" in arguments:
        assert f"python {program}" in said.stdout and "--" in said.stdout
    elif program == "train.py":
        recipe = [runpy.run_path(str(ROOT / name)) for name in names]
        default = "out/" + option(arguments, "dataset", "stdlib")
        out = clone / option(arguments, "out_dir", recipe[0]["out_dir"] if recipe else default)
        rows = (out / "log.jsonl").read_text().splitlines()
        assert (out / "best.pt").exists() and len(rows) > 1 and (out / "tokenizer").is_dir()
    elif program == "prepare.py" and "--inspect" not in arguments:
        chat = "-chat" if "--format=chat" in arguments else ""
        out = clone / option(arguments, "out", f"data/{names[0].split('.')[0]}{chat}")
        meta = json.loads((out / "meta.json").read_text())
        assert all((out / f"{split}.bin").stat().st_size >= 2 * meta[split]["tokens"] > 0 for split in ("train", "val"))
        assert "next: python train.py " in said.stderr and all(line in said.stderr for line in meta["report"])
    elif program == "sample.py":
        prompt = option(arguments, "prompt")
        begin = "" if "--chat" in arguments or prompt.startswith("FILE:") else prompt
        ended = "--chat" in arguments or "[1 token," in said.stderr  # a text may end at once
        assert said.stdout.startswith(begin) and (len(said.stdout) > len(begin) + 1 or ended)
    elif program == "evaluate.py":
        assert said.stdout.startswith("| measure ") and "\n| parameters " in said.stdout
        if html := option(arguments, "html"):
            assert "<script" in (clone / html).read_text(encoding="utf-8")
    elif program == "export.py":
        out = clone / option(arguments, "out", f"exports/{os.path.basename(names[0])}")
        rows = re.findall(r"^\| (\S+) \| [\d.,]+ MB \| ", said.stdout, re.M)
        asked = [each.file for name, each in export.FORMATS.items()
                 if name in option(arguments, "format", "hf,onnx,torchscript,pt2").split(",")]
        assert set(asked) <= set(rows) and all((out / file).exists() for file in [*asked, "README.md"]), said.stdout
    elif program == "tokenizer.py" and "--train" in arguments:
        assert (clone / option(arguments, "out") / "config.json").exists()
    elif program == "bench" and arguments[0] not in ("doctor", "parity"):
        heading = columns(next(line for line in said.stdout.splitlines() if line.startswith("| ")))
        shown = map(columns, re.findall(r"^(\| .*)\n\|-", PAGES["docs/measurements.md"], re.M))
        assert max(len(heading & each) for each in shown) >= min(3, len(heading) - 1), heading
    else:
        assert said.stdout or said.stderr


# The model of the first recipe with fewer weights, for all that comes after it. (test_train.py trains the recipe itself.)
SMALLER = "--n_layer=1 --n_embd=64 --batch_size=4".split()
# And benches that would take a large model, or a large text, where none is named.
NAMED = {"serve": ["out/notes"], "ablation": ["--dataset=notes"]}
started = set()  # programs that have been started as they are typed


@pytest.mark.parametrize("command", [
    pytest.param(command, id=f"{page} {i}: {command[:60]}") for i, (page, command) in enumerate(COMMANDS)])
def test_command(clone, command, request):
    for part in command.split(" && "):
        program, *arguments = shlex.split(part, comments=True)
        if program == "pip":
            assert arguments[:2] == ["install", "-r"] and (ROOT / arguments[2]).exists()
        elif program == "pytest":  # this is it; CI runs the very same line
            assert command.strip() in (ROOT / ".ci/run").read_text(encoding="utf-8")
        elif program == "curl":
            address = request.getfixturevalue("address")
            line = part.replace("http://127.0.0.1:8000", address)
            done = subprocess.run(["bash", "-c", line], cwd=clone, capture_output=True, text=True, timeout=60)
            refused = done.stdout.startswith('{"error"')  # ("error" may also be a token of a text)
            assert done.returncode == 0 and done.stdout and not refused, done.stdout + done.stderr
        elif program == "head":
            assert subprocess.run(["bash", "-c", part], cwd=clone).returncode == 0
        elif arguments == ["serve.py"]:
            request.getfixturevalue("address")  # which stays for the lines after it
        elif arguments[:1] == ["serve.py"]:
            with serving(clone, *arguments[1:], expect=401 if "key" in part else 200):
                pass
        elif program == "torchrun":
            run_torchrun(clone, arguments)
        else:
            assert program == "python"
            run_python(clone, part, arguments)


def run_torchrun(clone, arguments):
    """The line on each machine that it names, all of which are this one."""
    arguments = [argument.replace("FIRST:29500", f"127.0.0.1:{programs.free_port()}") for argument in arguments]
    machines = 2 if "--nnodes=2" in arguments else 1
    argv = ["-m", "torch.distributed.run", *arguments, *shlex.split(QUICK["train.py"]), *SMALLER]
    runs = [subprocess.Popen([sys.executable, *argv], cwd=clone, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             text=True) for _ in range(machines)]
    out = [run.communicate(timeout=240)[0] for run in runs]
    assert [run.returncode for run in runs] == [0] * machines, out
    assert (clone / option(arguments, "out_dir") / "best.pt").exists()


def run_python(clone, part, arguments):
    """A script, with the settings that let it end in seconds; a new Python starts it when it comes for the first time."""
    target = None
    if ">" in arguments:
        target = arguments[arguments.index(">") + 1]
        arguments = arguments[:arguments.index(">")]
    program = arguments[1] if arguments[0] == "-m" else arguments[0]
    quick = [] if "--help" in arguments else shlex.split(QUICK.get(program, ""))
    if program == "bench":
        known = bench_settings(arguments[2])
        quick = [argument for argument in quick if argument[2:].partition("=")[0] in known]
        quick += NAMED.get(arguments[2], [])
    large = {"config/train_small.py", "config/openllm_small.py"} & set(arguments)
    argv = [*arguments, *quick, *(SMALLER if large else ())]
    if program in started:
        done = programs.run(*argv, cwd=clone)
    else:
        done = subprocess.run([sys.executable, *argv], cwd=clone, capture_output=True, text=True,
                              stdin=subprocess.DEVNULL, timeout=240)
    started.add(program)
    assert done.returncode == 0, f"{part}\n{done.stdout}\n{done.stderr}"
    check_made(clone, program, arguments[1 + (program == "bench"):], done)
    if part in SHOWN:
        check_shown(part, done.stderr)
    if target:
        (clone / target).write_text(done.stdout, encoding="utf-8")


@pytest.mark.parametrize("program", [pytest.param(p, id=f"{page} {p[:60]}".split("\n")[0]) for page, p in PROGRAMS])
def test_program(clone, address, program):
    """The programs that are shown for the server, as they stand."""
    done = subprocess.run([sys.executable, "-c", program.replace("http://127.0.0.1:8000", address)], cwd=clone,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and len(done.stdout) > 5, done.stdout + done.stderr



# SPDX-License-Identifier: GPL-3.0-only
"""README.md and the pages of docs/ are true: their commands run in their order, and the files, links, line counts and
settings that they name are right."""
import contextlib
import importlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest
import requests
from conftest import ROOT, random_model, words

from bench import __main__ as bench
from bench.measure import copy_peer
import evaluate
import export
from formats import huggingface
import prepare
import sample
import serve
import tokenizer
import train

# The pages with commands, in the order in which their commands run: each may use what those before it have made.
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in (
    "README.md", "docs/data.md", "docs/training.md", "docs/chat.md", "docs/evaluation.md", "docs/serving.md",
    "docs/formats.md", "docs/distributed.md", "docs/measurements.md")}
README, ALL = PAGES["README.md"], "\n".join(PAGES.values())
DOCS = {f"docs/{path.name}": path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.M | re.S)


COMMANDS = [(page, line) for page in PAGES for block in blocks(page, "sh")
            for line in block.replace("\\\n", " ").strip().split("\n") if line.strip()]
PROGRAMS = [(page, block) for page in PAGES for block in blocks(page, "python") if "127.0.0.1:8000" in block]
# The README's own words for trying a long command in seconds.
QUICK = dict(quick := re.findall(r"`(?:python -m )?(\w+(?:\.py)?)` in seconds: `([^`]+)`", ALL))


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
    port = re.search(r":(\d+) is open", server.stderr.readline())[1]
    address = f"http://127.0.0.1:{port}"
    threading.Thread(target=server.stderr.read, daemon=True).start()  # its log, or it would wait for us to read it
    while requests.get(f"{address}/health").json() == {"status": "loading"}:
        time.sleep(0.1)
    try:
        assert requests.get(f"{address}/model-info").status_code == expect
        yield address
    finally:
        server.terminate()
        assert server.wait(timeout=20) == 0


@pytest.fixture(scope="module")
def address(clone):
    with serving(clone) as address:
        yield address


def bench_settings(name):
    return importlib.import_module(f"bench.{name}").Settings.__dataclass_fields__


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
            assert done.returncode == 0 and done.stdout and '"error"' not in done.stdout, done.stdout + done.stderr
        elif program == "head":
            assert subprocess.run(["bash", "-c", part], cwd=clone).returncode == 0
        elif arguments == ["serve.py"]:
            request.getfixturevalue("address")  # which stays for the lines after it
        elif arguments[:1] == ["serve.py"]:
            with serving(clone, *arguments[1:], expect=401):
                pass
        elif program == "torchrun":
            quick = shlex.split(QUICK["train.py"])
            with socket.create_server(("127.0.0.1", 0)) as free:  # the port may be taken by another run of this test
                port = free.getsockname()[1]
            arguments = [argument.replace("FIRST:29500", f"127.0.0.1:{port}") for argument in arguments]
            machines = 2 if "--nnodes=2" in arguments else 1  # the same line on both
            runs = [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *arguments, *quick], cwd=clone,
                                     stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                    for _ in range(machines)]
            out = [run.communicate(timeout=300)[0] for run in runs]
            assert [run.returncode for run in runs] == [0] * machines, out
        else:
            assert program == "python"
            target = None
            if ">" in arguments:
                target = arguments[arguments.index(">") + 1]
                arguments = arguments[:arguments.index(">")]
            quick = shlex.split(QUICK.get(arguments[1] if arguments[0] == "-m" else arguments[0], ""))
            quick = [] if "--help" in arguments else quick
            if arguments[:2] == ["-m", "bench"]:
                known = bench_settings(arguments[2])
                quick = [argument for argument in quick if argument[2:].partition("=")[0] in known]
            done = subprocess.run([sys.executable, *arguments, *quick], cwd=clone, capture_output=True, text=True,
                                  stdin=subprocess.DEVNULL, timeout=300)
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
            if target:
                (clone / target).write_text(done.stdout, encoding="utf-8")


@pytest.mark.parametrize("program", [pytest.param(p, id=f"{page} {p[:60]}".split("\n")[0]) for page, p in PROGRAMS])
def test_program(clone, address, program):
    """The programs that are shown for the server, as they stand."""
    done = subprocess.run([sys.executable, "-c", program.replace("http://127.0.0.1:8000", address)], cwd=clone,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and len(done.stdout) > 5, done.stdout + done.stderr


def test_there_are_commands_and_quick_variants():
    assert {page for page, _ in COMMANDS} == set(PAGES) and len(PROGRAMS) == 3
    assert COMMANDS[0] == ("README.md", "pip install -r requirements.txt && python train.py config/train_small.py")
    assert set(QUICK) >= {"train.py", "sample.py", "evaluate.py", "bench"} and len(quick) == len(QUICK)
    commands = [command for _, command in COMMANDS]
    assert len(commands) >= 59 and len(set(commands)) == len(commands)  # each stands in one place


def test_the_front_page_is_short():
    assert README.count("\n") < 350 and len(README.split()) < 3000


def test_every_file_that_is_named_exists():
    folders = "bench|config|deploy|docs|evaluation|formats|runtime|serving|tests|text|training"
    for page in PAGES:
        assert len(re.findall(rf"`(?:{folders})/", PAGES[page]) + re.findall(r"\]\(", PAGES[page])) > 2
        for path in re.findall(rf"`((?:{folders})/[\w./-]*|\w+\.py|LICENSE)`", PAGES[page]):
            gone = path == "bench.py"  # with which some measurements were made
            assert (ROOT / path).exists() or gone, (page, path)


def anchors(text):
    """The names of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ["README.md", *sorted(DOCS)])
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        path = (ROOT / page).parent / path if path else ROOT / page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), link


def test_the_front_page_leads_to_every_page():
    assert set(re.findall(r"\]\((docs/\w[\w-]*\.md)", README)) == set(DOCS)


def test_line_counts_are_right():
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", README, re.M)
    assert {path for path, _ in rows} == {path.name for path in ROOT.glob("*.py")} and rows[0][0] == "plain.py"
    for path, count in rows:
        assert len((ROOT / path).read_text(encoding="utf-8").split("\n")) - 1 == int(count), path
    folders = set(re.findall(r"^\| `(\w+)/` \| *\|", README, re.M))
    assert folders >= {path.parent.name for path in ROOT.glob("*/__init__.py")}


def test_every_setting_that_is_named_exists():
    scripts = train.TrainConfig, sample.SampleConfig, prepare.PrepareConfig, tokenizer.TokenizerConfig, \
        export.ExportConfig, serve.ServeConfig, evaluate.EvaluateConfig
    known = set().union(*(settings.__dataclass_fields__ for settings in scripts), *map(bench_settings, bench.BENCHES))
    ours = re.sub(r"torchrun .*?(train\.py|evaluate\.py|`)|--max-restarts", "", ALL)  # it has settings of its own
    for name in re.findall(r"--([a-z]\w+)", ours):
        assert name in known | {"help"}, name


def test_no_path_of_a_machine_and_no_marketing():
    text = README + "".join(DOCS.values())
    for word in ("/home/", "/root/", "/work/", "/tmp/", "blazing", "state-of-the-art", "seamless", "powerful"):
        assert word not in text, word
    assert not re.search("[\U0001f300-\U0001faff\u2600-\u27bf]", text)  # no emoji


def test_the_fault_table_names_tests_that_exist():
    table = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\btest_\w+", table))
    exist = set(re.findall(r"^def (test_\w+)", "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")), re.M))
    assert len(named) > 40 and named <= exist, named - exist
    assert {int(n) for n in re.findall(r"^\| (\d+) \|", table, re.M)} == set(range(1, 34)) - {29}

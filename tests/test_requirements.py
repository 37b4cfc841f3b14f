# SPDX-License-Identifier: GPL-3.0-only
"""requirements.txt is enough: with nothing else, everything works, and what needs more says what to install."""
import contextlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib import metadata

import pytest
from conftest import ROOT, TINY, words
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def required():
    """The names of all packages that `pip install -r requirements.txt` brings."""
    waiting, found = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines(), set()
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        if name not in found and (not requirement.marker or requirement.marker.evaluate({"extra": ""})):
            found.add(name)
            waiting += metadata.requires(name) or []
    return found


def refused():
    """The modules that are installed here, but would not be with requirements.txt alone."""
    enough = required()
    return {module for module, packages in metadata.packages_distributions().items()
            if not enough & set(map(canonicalize_name, packages))}


# Python runs a file of this name when it starts: modules that are refused are as if they were not installed.
SITE = """
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in {refused!r}:
            return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""
# One command after the other; what each said at its end is printed as JSON.
DRIVER = """
import contextlib, importlib, io, json, sys
from runtime.console import UserError
found = []
for name, *argv in json.loads(sys.argv[1]):
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            code = importlib.import_module(name).main(argv) or 0
        found.append([code, said.getvalue(), ""])
    except UserError as error:
        found.append([error.code, error.fact, error.fix])
print(json.dumps(found))
"""
COMMANDS = [  # and the exit code, what is printed or the fact, and the fix
    (["prepare", "notes.txt", "--vocab_size=300"], 0, "", ""),
    (["train", "--dataset=notes", "--max_iters=2", *TINY], 0, "", ""),
    (["sample", "out/notes", "--prompt=the", "--max_new_tokens=5"], 0, "the", ""),
    (["evaluate", "out/notes", "--tasks=completion", "--limit=2", "--samples=1"], 0, r"\| completion", ""),
    (["export", "out/notes"], 2,
     "these exports need packages that are not installed: transformers, onnx, onnxscript, onnxruntime",
     "pip install transformers onnx onnxscript onnxruntime; or --format=pt2, which needs none"),
    (["export", "out/notes", "--format=pt2,int8"], 0, r"\| model.pt2 .*\n\| int8 ", ""),
    (["sample", "theirs"], 2, "theirs/model.safetensors is damaged: ValueError: 0 bytes", "download the file again"),
    (["prepare", "notes.txt", "--out=data/x", "--tokenizer=theirs"], 2,
     "Hugging Face tokenizers need the package tokenizers", "pip install tokenizers"),
]


def check(python, here, env=None):
    """Everything that a reader does first, by this Python in this environment."""
    env = {**os.environ, **(env or {})}
    (here / "notes.txt").write_text(words(9000), encoding="utf-8")
    (here / "theirs").mkdir()
    (here / "theirs/config.json").write_text(json.dumps(dict(
        model_type="gpt2", vocab_size=300, n_positions=16, n_embd=8, n_layer=1, n_head=2, layer_norm_epsilon=1e-5,
        activation_function="gelu_new")))
    (here / "theirs/tokenizer.json").write_text(json.dumps(dict(
        added_tokens=[dict(id=0, content="<|endoftext|>", special=True)], model=dict(type="BPE", vocab={}, merges=[]))))
    (here / "theirs/tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    (here / "theirs/model.safetensors").write_bytes(b"")
    commands = json.dumps([command for command, *_ in COMMANDS])
    done = subprocess.run([python, "-c", DRIVER, commands], cwd=here, capture_output=True, text=True, timeout=240,
                          env=env | dict(PYTHONPATH=os.pathsep.join([env.get("PYTHONPATH", ""), str(ROOT)])))
    assert done.returncode == 0, done.stderr
    for (command, *due), found in zip(COMMANDS, json.loads(done.stdout), strict=True):
        assert found[0] == due[0], (command, found, done.stderr)
        assert re.search(due[1], found[1]) and found[2].startswith(due[2]), (command, found)

    server = subprocess.Popen([python, ROOT / "serve.py", "out/notes", "--port=0"], cwd=here, text=True, env=env,
                              stderr=subprocess.PIPE)
    try:
        address = re.search(r"http://\S+:\d+", server.stderr.readline())[0]
        for _ in range(600):
            with contextlib.suppress(urllib.error.HTTPError):  # 503 while it loads the model
                urllib.request.urlopen(f"{address}/health", timeout=60).close()
                break
            time.sleep(0.1)
        request = urllib.request.Request(f"{address}/generate", b'{"prompt": "the", "max_tokens": 3}')
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["completion_tokens"] == 3
    finally:
        server.terminate()
        assert server.wait(60) == 0


def test_everything_works_with_what_requirements_txt_brings(here):
    """Every other package that is installed is refused by the import system."""
    without = refused()
    assert {"pytest", "transformers", "safetensors", "tokenizers", "onnx", "openai"} <= without
    assert not without & {"torch", "numpy", "sentencepiece", "tiktoken", "requests", "regex", "urllib3"}
    (here / "site").mkdir()
    (here / "site/sitecustomize.py").write_text(SITE.format(refused=without), encoding="utf-8")
    env = dict(PYTHONPATH=str(here / "site"))
    code = "from importlib.util import find_spec; print(find_spec('pytest'), find_spec('numpy') is not None)"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True)
    assert done.stdout == "None True\n", done.stderr
    check(sys.executable, here, env)


@pytest.mark.slow
def test_everything_works_in_a_new_environment(here):
    """The same where pip has installed requirements.txt, and nothing else."""
    subprocess.run([sys.executable, "-m", "venv", "venv"], check=True)
    python = here / "venv/bin/python"
    subprocess.run([python, "-m", "pip", "install", "-q", "-r", ROOT / "requirements.txt"], check=True)
    check(python, here)

# SPDX-License-Identifier: GPL-3.0-only
"""Which file may import which: arrows run down only, and a script loads no more than it needs."""
import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

# Of our own: what a file, or every file of a folder, may import when it is loaded. A name without a dot is a script
# or a whole folder. The scripts come last, each with the folder behind it.
MAY_IMPORT = {
    "plain": "",
    "runtime": "runtime",
    "model": "",
    "tokenizer": "runtime text.pretrained",
    "text": "runtime text",
    "dataset": "runtime tokenizer",
    "formats": "runtime model tokenizer text.pretrained text.gguf_file formats",
    "training": "runtime model tokenizer dataset formats training",
    "evaluation": "runtime tokenizer dataset text evaluation",
    "sample": "runtime model tokenizer text.pretrained training.checkpoint",
    "serving": "runtime model tokenizer text.pretrained text.rows training.checkpoint sample serving",
    "train": "runtime model tokenizer dataset training",
    "prepare": "runtime tokenizer dataset text",
    "evaluate": "runtime model tokenizer dataset training.checkpoint formats sample serving.engine evaluation",
    "serve": "runtime training.checkpoint training.log sample serving",
    "export": "runtime model tokenizer dataset text training.checkpoint sample evaluation.perplexity formats",
    "bench": "runtime model dataset training formats sample serving train prepare serve bench",
}
# And what it imports inside a function, because it is optional or rarely needed.
LATE = {
    "sample": "serving.batch",  # many prompts at once
    "tokenizer": "text",  # its command line reads texts to learn from
}



def modules():
    """{name: path} of all our modules: "model", "text.sources" ..."""
    paths = [*ROOT.glob("*.py"), *(path for init in ROOT.glob("*/__init__.py") for path in init.parent.glob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths if path.stat().st_size}


def imports(name, path):
    """The pairs (module of ours, is it imported when the file is loaded?)."""
    tree, ours = ast.parse(path.read_text(encoding="utf-8")), modules()
    for node in ast.walk(tree):
        found = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for other in found:
            if other in ours and other != name:
                yield other, node in tree.body


def allowed(other, names):
    return other in names.split() or other.split(".")[0] in names.split()


@pytest.mark.parametrize("name", modules())
def test_a_file_imports_only_what_stands_below_it(name):
    who = name.split(".")[0]
    for other, at_once in imports(name, modules()[name]):
        names = MAY_IMPORT[who] + ("" if at_once else " " + LATE.get(who, ""))
        assert allowed(other, names), f"{name} imports {other}"


def test_no_circle():
    """Every module can be put behind all that it imports."""
    waiting = {name: {other for other, at_once in imports(name, path) if at_once} for name, path in modules().items()}
    while waiting:
        free = [name for name, others in waiting.items() if not others & waiting.keys()]
        assert free, f"these import each other: {sorted(waiting)}"
        for name in free:
            del waiting[name]


@pytest.mark.parametrize("name, most", [("sample", 10), ("tokenizer", 5), ("dataset", 6)])
def test_a_script_loads_little(name, most):
    code = (f"import sys, {name}\n"
            "ours = [module.__name__ for module in sys.modules.values()\n"
            f"        if (getattr(module, '__file__', None) or '').startswith({str(ROOT)!r})]\n"
            "print(*sorted(ours))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    loaded = set(done.stdout.split()) & modules().keys()
    assert name in loaded, done.stderr
    assert len(loaded) <= most, loaded
    assert not loaded & {"text.download", "text.sources", "formats.tokenizer_json", "formats.huggingface"}


def test_the_top_level_is_short():
    assert len(list(ROOT.glob("*.py"))) <= 12
    assert {path.name for path in (ROOT / "config").glob("*.py")}  # recipes
    assert not any(path.stat().st_size for path in ROOT.glob("*/__init__.py"))  # a folder runs no code of its own


def test_files_of_tests_are_short_and_stand_alone():
    """Up to 600 lines, and what two of them need stands in a file that is no test."""
    for path in (ROOT / "tests").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 600, path.name
        assert not re.search(r"^\s*(from|import) test_", text, re.M), path.name

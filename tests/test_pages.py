# SPDX-License-Identifier: GPL-3.0-only
"""What README.md and the pages of docs/ say can be looked up: the files, links, settings, tests and numbers that they
name are right. test_readme.py runs their commands."""
import re

import pytest
from conftest import ROOT
from pages import COMMANDS, DOCS, PAGES, PROGRAMS, QUICK, README, TEXT, bench_settings

from bench import __main__ as bench
import evaluate
import export
import prepare
import sample
import serve
import tokenizer
from training import resume
import train


def test_there_are_commands_and_quick_variants():
    assert {page for page, _ in COMMANDS} == set(PAGES) and len(PROGRAMS) == 3
    assert COMMANDS[0] == ("README.md", "pip install -r requirements.txt && python train.py config/train_small.py")
    assert set(QUICK) == {"train.py", "sample.py", "evaluate.py", "bench"}
    commands = [command for _, command in COMMANDS]
    assert len(commands) >= 56 and len(set(commands)) == len(commands)  # each stands in one place


def test_the_front_page_is_short():
    assert README.count("\n") < 350 and len(README.split()) < 3000


def test_every_file_that_is_named_exists():
    folders = "bench|config|deploy|docs|evaluation|formats|pretrained|runtime|serving|tests|text|training"
    named = [(page, path) for page, text in PAGES.items()
             for path in re.findall(rf"`((?:{folders})/[\w./-]*|\w+\.py|LICENSE)`", text)]
    assert len(named) >= 82 and {page for page, _ in named} == set(PAGES), len(named)
    for page, path in named:
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
    ours = re.sub(r"torchrun .*?(train\.py|evaluate\.py|`)|--max-restarts", "", TEXT)  # it has settings of its own
    named = re.findall(r"--([a-z]\w+)", ours)
    theirs = {"local", "model", "model_args", "apply_chat_template", "merge"}  # of hf, lm_eval and llama.cpp
    assert set(named) <= known | theirs | {"help"}, set(named) - known
    assert len(named) >= 204, len(named)


def test_the_error_that_is_shown_is_the_one_that_comes():
    settings = train.TrainConfig(batch_size=12, block_size=1024, gradient_accumulation_steps=1)
    found = resume.explain(MemoryError(), settings, None)
    assert f"```\nerror: {found.fact}\nfix: {found.fix}\n```" in README


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
    assert len(named) >= 58 and named <= exist, (len(named), named - exist)
    assert {int(n) for n in re.findall(r"^\| (\d+) \|", table, re.M)} == set(range(1, 34)) - {29}

# SPDX-License-Identifier: GPL-3.0-only
"""The files around the code are true: what they name exists, CI runs .ci/run, and ruff has nothing to say."""
import ast
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
from conftest import ROOT

PAGES = ["CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "CHANGELOG.md"]
TEMPLATES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / ".github").rglob("*") if path.is_file())


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def defined(name):
    """The names that a Python file gives to something: functions, classes, fields, variables, attributes."""
    names = set()
    for node in ast.walk(ast.parse(read(name))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


def quoted(page):
    """The pairs (path, names) of a page: what stands in backticks after a path, up to the next path or paragraph."""
    pairs = []
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.M | re.S)
    for paragraph in re.split(r"\n(?=\n|- |\d+\. )", text):
        path, names = None, set()
        for quote in re.findall(r"`([^`\n]+)`", paragraph):
            if re.fullmatch(r"[\w./-]+(\.(py|md|txt|toml)|/|/run)", quote):
                path, names = quote, set()
                pairs.append((path, names))
            elif path and path.endswith(".py") and re.fullmatch(r"[A-Za-z_][\w.]*", quote):
                names.update(quote.split("."))
    return pairs


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page):
    for path, names in quoted(page):
        assert (ROOT / path).exists(), path
        missing = names - defined(path) if names and page == "CONTRIBUTING.md" else set()
        assert not missing, f"{path} does not define {', '.join(sorted(missing))}"
    for link in re.findall(r"\]\(([^)#]+)\)", read(page)):
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_contributing_names_what_to_touch():
    named = sum(len(names) for _, names in quoted("CONTRIBUTING.md"))
    assert named >= 69, named
    parts = re.findall(r"^### (.*)", read("CONTRIBUTING.md"), re.M)
    assert len(parts) == 8 and all(part.startswith(("A ", "An ")) for part in parts)


@pytest.mark.parametrize("name", [*PAGES, *TEMPLATES, "ruff.toml", "constraints.txt"])
def test_no_path_of_a_machine(name):
    assert not re.search("/home/|/root/|/work/|/tmp/|[\U0001f300-\U0001faff]", read(name))


def test_a_release_has_one_heading():
    """## 0.2.0 and so on, the newest first; only the first may be unreleased."""
    headings = re.findall(r"^## (.*)", read("CHANGELOG.md"), re.M)
    found = [re.fullmatch(r"(\d+)\.(\d+)\.(\d+)( \(unreleased\))?", heading) for heading in headings]
    assert found and all(found), headings
    versions = [tuple(map(int, version.groups()[:3])) for version in found]
    assert versions == sorted(set(versions), reverse=True)
    assert not any(version[4] for version in found[1:])


def test_ci_runs_what_a_contributor_runs():
    workflow = read(".github/workflows/test.yml")
    assert re.search(r"^ +- run: .*\.ci/run$", workflow, re.M) and os.access(ROOT / ".ci/run", os.X_OK)
    actions = re.findall(r"uses: (.*)", workflow)
    assert actions and all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", action) for action in actions)


def test_every_package_has_a_version():
    """constraints.txt pins what requirements-dev.txt asks for, by plain versions."""
    lines = read("constraints.txt").splitlines()
    pins = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    assert all(re.fullmatch(r"[\w.]+", version) for version in pins.values()), pins  # no +cpu, no path
    asked = read("requirements-dev.txt").splitlines() + read("requirements.txt").splitlines()
    assert {"-r requirements.txt", "-c constraints.txt"} <= set(asked)
    for line in asked:
        if not line.startswith("-"):
            name, version = re.fullmatch(r"([\w-]+)(.*)", line).groups()
            assert name in pins and (not version.startswith("==") or version[2:] == pins[name]), line


@pytest.mark.skipif(not find_spec("ruff"), reason="ruff is not installed: pip install -r requirements-dev.txt")
def test_ruff_has_nothing_to_say():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=ROOT, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr

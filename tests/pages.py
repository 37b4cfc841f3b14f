# SPDX-License-Identifier: GPL-3.0-only
"""The pages with commands, and what stands in them: for the tests that run it, and those that look it up."""
import importlib
import re

from conftest import ROOT

# In the order in which their commands run: each may use what those before it have made.
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in (
    "README.md", "docs/data.md", "docs/training.md", "docs/chat.md", "docs/evaluation.md", "docs/serving.md",
    "docs/formats.md", "docs/distributed.md", "docs/measurements.md")}
README, TEXT = PAGES["README.md"], "\n".join(PAGES.values())
DOCS = {f"docs/{path.name}": path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}


def blocks(page, language):
    """The blocks of code in a language, or, for "", of what is shown."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", PAGES[page], re.M | re.S)
    return [text for name, text in found if name == language]


# Pairs of a page, and a command line or a program for the server.
COMMANDS = [(page, line) for page in PAGES for block in blocks(page, "sh")
            for line in block.replace("\\\n", " ").strip().split("\n") if line.strip()]
PROGRAMS = [(page, block) for page in PAGES for block in blocks(page, "python") if "127.0.0.1:8000" in block]
# The README's own words for trying a long command in seconds.
QUICK = dict(re.findall(r"`(?:python -m )?(\w+(?:\.py)?)` in seconds: `([^`]+)`", TEXT))


def bench_settings(name):
    return importlib.import_module(f"bench.{name}").Settings.__dataclass_fields__

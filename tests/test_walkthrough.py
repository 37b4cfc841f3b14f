# SPDX-License-Identifier: GPL-3.0-only
"""docs/walkthrough.md shows what `python -m bench walkthrough` prints."""
import pathlib
import re

import pytest

import bench.__main__ as bench

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs/walkthrough.md"
NUMBER = re.compile(r"-?\d+\.\d+")


def test_the_page_shows_what_the_walkthrough_prints(capsys):
    blocks = re.findall(r"## (.*?)\n.*?```text\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    bench.main(["walkthrough"])
    printed = re.findall(r"\n# (.*?)\n(.*?)(?=\n# |\Z)", capsys.readouterr().out, re.DOTALL)
    assert len(printed) == 8 and [title for title, _ in printed] == [title for title, _ in blocks]
    for (_, shown), (title, found) in zip(blocks, printed):
        assert NUMBER.sub("#", found).split() == NUMBER.sub("#", shown).split(), title
        numbers = [[float(number) for number in NUMBER.findall(text)] for text in (found, shown)]
        assert numbers[0] == pytest.approx(numbers[1], abs=0.021), title  # processors round differently

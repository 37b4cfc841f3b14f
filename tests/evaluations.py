# SPDX-License-Identifier: GPL-3.0-only
"""What tests of evaluate.py share: models, questions, and the JSON that it writes."""
import json
import pathlib

import pytest
from conftest import FAMILIES, package, random_model, words

import evaluate
from formats import huggingface
import tokenizer as tokenizers

CHARACTERS = tokenizers.CharTokenizer("\n" + "".join(map(chr, range(32, 127))) + "\u00e9\u4e2d")
QUICK = ["--tasks=none", "--samples=0"]


def other(path, family="llama", block_size=48):
    """A Hugging Face folder with a random model, which is returned."""
    package("safetensors")
    model = random_model(vocab_size=CHARACTERS.vocab_size, block_size=block_size, **FAMILIES[family])
    huggingface.write(str(path), model, CHARACTERS)
    return model


def evaluated(*argv):
    """What evaluate.py writes to --json, which has to be JSON: no NaN, no Infinity."""
    assert evaluate.main([*map(str, argv), "--json=r.json"]) == 0
    return json.loads(pathlib.Path("r.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)


def task(name, *rows):
    pathlib.Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"--tasks={name}"


def sentences(n, **fields):
    """n questions that continue a sentence of `words`."""
    lines = words(9000).split("\n")
    return [{"prompt": lines[i][:8 + i % 3], "answers": [lines[i][8 + i % 3:]], **fields} for i in range(n)]

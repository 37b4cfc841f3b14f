# SPDX-License-Identifier: GPL-3.0-only
"""The small model that comes with the code."""
import pathlib
import textwrap

import sample
from evaluation.perplexity import measure_text, read_text
from training import checkpoint as ckpt


def test_the_small_model_knows_python(here):
    model, tokenizer, run = ckpt.load_run(ckpt.SMALL)
    assert run["int8"] and run["step"] == 1000 and model.n_params() == 4_508_160
    text = read_text(str(pathlib.Path(textwrap.__file__)))
    found = measure_text(model, tokenizer, text)
    assert 0.8 < found["bits_per_byte"] < 1.6


def test_it_is_taken_where_there_is_no_run(here, capsys):
    sample.main(["--prompt=def ", "--max_new_tokens=8", "--temperature=0"])
    shown = capsys.readouterr()
    assert "the small model that comes with the code" in shown.err and shown.out.startswith("def ")

# SPDX-License-Identifier: GPL-3.0-only
"""GPT-2's BPE by tiktoken itself: input.txt beside this file becomes train.bin and val.bin, nine tenths and one."""
import os

import numpy
import tiktoken

folder = os.path.dirname(os.path.abspath(__file__))
with open(os.path.join(folder, "input.txt"), encoding="utf-8") as file:
    text = file.read()
cut = len(text) * 9 // 10
for name, part in (("train.bin", text[:cut]), ("val.bin", text[cut:])):
    ids = tiktoken.get_encoding("gpt2").encode_ordinary(part)
    numpy.array(ids, dtype=numpy.uint16).tofile(os.path.join(folder, name))

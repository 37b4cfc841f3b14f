# SPDX-License-Identifier: GPL-3.0-only
"""Characters to ids in plain Python: input.txt beside this file becomes train.bin and val.bin, nine tenths and one."""
import os

import numpy

folder = os.path.dirname(os.path.abspath(__file__))
with open(os.path.join(folder, "input.txt"), encoding="utf-8") as file:
    text = file.read()
ids = {character: i for i, character in enumerate(sorted(set(text)))}
cut = len(text) * 9 // 10
for name, part in (("train.bin", text[:cut]), ("val.bin", text[cut:])):
    numpy.array([ids[character] for character in part], dtype=numpy.uint16).tofile(os.path.join(folder, name))

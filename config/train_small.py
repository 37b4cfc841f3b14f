# SPDX-License-Identifier: GPL-3.0-only
# The first lesson: a GPT that writes Python, trained in minutes on the source code of Python's standard library.
#
#     python train.py config/train_small.py
#     python train.py config/train_small.py --dataset=notes --out_dir=out/notes     # the same on your own text
#
# Validation loss 3.57 to 3.60 = 1.385 to 1.397 bits per byte, after 167 to 326 s of training, 179 to 358 s in all: 2
# cores of an AMD EPYC with AVX-512 bf16, torch 2.13.0, Python 3.11.7. In float32 with AVX2 alone, as on an older
# laptop: 1.3855, 483 to 646 s of training. What else was tried stands in docs/lab-notes.md.

dataset = "stdlib"
out_dir = "out/small"

# Wide and flat: on a CPU a few large products are faster than many small ones, and in so short a run a model that sees
# more text learns more than one that has more layers. 4,508,160 parameters, a quarter of them for reading tokens.
preset = "modern"
n_layer = 3
n_head = 2
n_embd = 256
block_size = 256
tie_weights = False

# 12 windows x 256 tokens = 3,072 tokens per step; 1,000 steps read 3.1 million tokens, the text 1.6 times
batch_size = 12
max_iters = 1000

# Muon moves the matrices of the blocks, AdamW the two of the vocabulary; their best rates are this far apart.
optimizer = "muon"
learning_rate = 0.03
muon_lr = 0.003
min_lr = 0
warmup_iters = 20
weight_decay = 0.1

eval_interval = 250
log_interval = 20

if __name__ == "__main__":
    print("a recipe for train.py: python train.py config/train_small.py")

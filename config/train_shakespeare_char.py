# SPDX-License-Identifier: GPL-3.0-only
# Shakespeare, one character at a time: as far as nanoGPT's recipe for a CPU gets, in a sixth of its time.
#
#     python prepare.py shakespeare.txt --out=data/shakespeare_char --tokenizer=char --val_fraction=0.1
#     python train.py config/train_shakespeare_char.py
#
# On tiny Shakespeare (1,115,394 bytes, sha256 86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed):
# validation loss 1.8985 per character (all of it, in windows of 64; 1.8698 with an earlier order of the data) after 18
# s, start to end; 2 cores of an AMD EPYC with AVX-512 bf16, torch 2.13.0. With --max_iters=500 it is 1.658 after 56 s.

dataset = "shakespeare_char"
out_dir = "out/shakespeare_char"

# 764,288 parameters
preset = "modern"
n_layer = 4
n_head = 2
n_embd = 128
n_inner = 320
block_size = 64

# 32 windows x 64 characters = 2,048 characters per step; 500 steps would read the text once
batch_size = 32
max_iters = 150

optimizer = "muon"
learning_rate = 1e-2
muon_lr = 1e-2
min_lr = 0
warmup_iters = 20
weight_decay = 0.0

eval_interval = 150
log_interval = 50

if __name__ == "__main__":
    print("a recipe for train.py: python train.py config/train_shakespeare_char.py")

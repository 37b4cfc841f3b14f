# SPDX-License-Identifier: GPL-3.0-only
# GPT-2 (124M) from nothing, on a large GPU. nanoGPT's file of this name runs as well; this one says the same.
#
#     python prepare.py YOUR_TEXT --out=data/mine --vocab_size=32000
#     python train.py config/train_gpt2.py --dataset=mine
#
# Not run to its end here: it is meant for weeks on one large GPU, days on eight. To see it run on a laptop, add
# --max_iters=2 --batch_size=1 --gradient_accumulation_steps=1 --eval_iters=1.

out_dir = "out/gpt2"

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024

# 12 windows x 1024 tokens x 40 micro-batches = 491,520 tokens per step, about as many as GPT-2 was trained with
batch_size = 12
gradient_accumulation_steps = 5 * 8

# 600,000 steps x 491,520 tokens = 295 billion tokens
max_iters = 600_000
warmup_iters = 2000
learning_rate = 6e-4
min_lr = 6e-5  # a tenth of it
weight_decay = 0.1

eval_interval = 1000
eval_iters = 200

if __name__ == "__main__":
    print("a recipe for train.py: python train.py config/train_gpt2.py")

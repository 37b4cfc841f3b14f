# SPDX-License-Identifier: GPL-3.0-only
# openllm-small: 35,823,616 parameters (6 layers, 8 heads, 512 wide, context 1,024, vocabulary 32,000).
#
#     python prepare.py YOUR_TEXT --out=data/mine --vocab_size=32000
#     python train.py config/openllm_small.py --dataset=mine
#
# Not run to its end here: a good model takes a GPU and 0.7 billion tokens of text (see below). docs/training.md has
# eighty minutes of it on two CPU cores.

preset = "openllm-small"
out_dir = "out/openllm-small"

# 16 windows x 1,024 tokens x 8 micro-batches = 131,072 tokens per step
batch_size = 16
gradient_accumulation_steps = 8

# A model is well used with about 20 tokens per parameter (Hoffmann 2022, arXiv 2203.15556):
# 20 x 35.8 million = 0.7 billion tokens; 5,500 steps x 131,072 = 0.7 billion
max_iters = 5500
warmup_iters = 275
learning_rate = 6e-4
min_lr = 6e-05
weight_decay = 0.1

eval_interval = 500
eval_iters = 100

if __name__ == "__main__":
    print("a recipe for train.py: python train.py config/openllm_small.py")

# SPDX-License-Identifier: GPL-3.0-only
# openllm-large: 337,176,576 parameters (24 layers, 16 heads, 1,024 wide, context 2,048, vocabulary 32,000).
#
#     python prepare.py YOUR_TEXT --out=data/mine --vocab_size=32000
#     python train.py config/openllm_large.py --dataset=mine
#
# Not run to its end here: for a good model it wants a GPU and 6.7 billion tokens of text (see below).

preset = "openllm-large"
out_dir = "out/openllm-large"

# 4 windows x 2,048 tokens x 64 micro-batches = 524,288 tokens per step
batch_size = 4
gradient_accumulation_steps = 64

# A model is well used with about 20 tokens per parameter (Hoffmann 2022, arXiv 2203.15556):
# 20 x 337 million = 6.7 billion tokens; 12,900 steps x 524,288 = 6.8 billion
max_iters = 12900
warmup_iters = 645
learning_rate = 3e-4
min_lr = 3e-05
weight_decay = 0.1

eval_interval = 500
eval_iters = 100

if __name__ == "__main__":
    print("a recipe for train.py: python train.py config/openllm_large.py")

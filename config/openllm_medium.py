# SPDX-License-Identifier: GPL-3.0-only
# openllm-medium: 111,204,864 parameters (12 layers, 12 heads, 768 wide, context 2,048, vocabulary 32,000).
#
#     python prepare.py YOUR_TEXT --out=data/mine --vocab_size=32000
#     python train.py config/openllm_medium.py --dataset=mine
#
# Not run to its end here: for a good model it wants a GPU and 2.2 billion tokens of text (see below).

preset = "openllm-medium"
out_dir = "out/openllm-medium"

# 8 windows x 2,048 tokens x 32 micro-batches = 524,288 tokens per step
batch_size = 8
gradient_accumulation_steps = 32

# A model is well used with about 20 tokens per parameter (Hoffmann 2022, arXiv 2203.15556):
# 20 x 111 million = 2.2 billion tokens; 4,200 steps x 524,288 = 2.2 billion
max_iters = 4200
warmup_iters = 210
learning_rate = 4e-4
min_lr = 4e-05
weight_decay = 0.1

eval_interval = 500
eval_iters = 100

if __name__ == "__main__":
    print("a recipe for train.py: python train.py config/openllm_medium.py")

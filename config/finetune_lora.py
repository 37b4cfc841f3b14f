# SPDX-License-Identifier: GPL-3.0-only
# A large model, fine-tuned on a small machine: only a correction of low rank is learned (see training/lora.py).
#
#     python prepare.py gsm8k_train.jsonl --format=chat --tokenizer=SmolLM2-135M-Instruct --out=data/gsm8k
#     python train.py config/finetune_lora.py --init_from=SmolLM2-135M-Instruct --dataset=gsm8k --out_dir=out/gsm8k
#
# For all weights instead: --lora_rank=0 --learning_rate=1e-4 (and four times the memory for the weights).

out_dir = "out/lora"

lora_rank = 8
lora_alpha = 16.0

# 4 windows x 512 tokens = 2,048 tokens per step
batch_size = 4
block_size = 512
max_iters = 100

learning_rate = 1e-3
min_lr = 0
warmup_iters = 10
weight_decay = 0.0

# 20 batches of held-out text are enough to see where it goes; all of it would take longer than the training
eval_interval = 50
eval_iters = 20
patience = 2
log_interval = 10

if __name__ == "__main__":
    print("a recipe for train.py: python train.py config/finetune_lora.py")

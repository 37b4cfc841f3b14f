# SPDX-License-Identifier: GPL-3.0-only
# From a text model to one that answers: the model of config/train_small.py learns the form of a conversation.
#
#     python train.py config/train_small.py
#     python prepare.py stdlib --format=chat --tokenizer=out/small
#     python train.py config/finetune_chat.py

init_from = "out/small"
dataset = "stdlib-chat"
out_dir = "out/stdlib-chat"

# 16 windows x 256 tokens = 4,096 tokens per step, of which about a half is learned
batch_size = 16
max_iters = 300

optimizer = "muon"
learning_rate = 2e-3
muon_lr = 6e-3
min_lr = 0
warmup_iters = 20
weight_decay = 0.0

eval_interval = 100
patience = 2
log_interval = 20

if __name__ == "__main__":
    print("a recipe for train.py: python train.py config/finetune_chat.py")

# draft
dataset = "stdlib"
out_dir = "out/small"
preset = "modern"
block_size = 256
n_layer = 4
n_head = 4
n_embd = 256
batch_size = 8
max_iters = 1200
optimizer = "muon"
learning_rate = 3e-3
muon_lr = 0.02
min_lr = 0
warmup_iters = 20
weight_decay = 0.0
eval_interval = 400
log_interval = 20

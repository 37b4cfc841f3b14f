# SPDX-License-Identifier: GPL-3.0-only
"""A GPT in plain float64 operations, to hold model.py against: no layers, no fused kernels, one formula a line."""
import math
import types
from dataclasses import dataclass

import torch


@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    bias: bool = False


class GPT:
    def __init__(self, config):
        self.config, self.training, C = config, True, config.n_embd
        shapes = {"transformer.wte.weight": (config.vocab_size, C), "transformer.wpe.weight": (config.block_size, C),
                  "transformer.ln_f.weight": (C,)}
        for i in range(config.n_layer):
            for name, shape in (("ln_1", (C,)), ("attn.c_attn", (3 * C, C)), ("attn.c_proj", (C, C)), ("ln_2", (C,)),
                                ("mlp.c_fc", (4 * C, C)), ("mlp.c_proj", (C, 4 * C))):
                shapes[f"transformer.h.{i}.{name}.weight"] = shape
        self.load_state_dict({name: torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape)
                              for name, shape in shapes.items()})

    def load_state_dict(self, weights, strict=True):
        self.weights = {name: w.double().requires_grad_() for name, w in weights.items() if name != "lm_head.weight"}
        return types.SimpleNamespace(missing_keys=[])

    def state_dict(self):
        weights = {name: w.detach().float() for name, w in self.weights.items()}
        return weights | {"lm_head.weight": weights["transformer.wte.weight"]}

    def train(self):
        self.training = True

    def eval(self):
        self.training = False
        return self

    def generate(self, idx, n, temperature=1.0, top_k=1):
        for _ in range(n):
            logits = self(idx, idx)[0][:, -1] / temperature
            values, ids = logits.topk(top_k)
            idx = torch.cat((idx, ids.gather(1, torch.multinomial(values.softmax(-1), 1))), dim=1)
        return idx

    def forward(self, idx, targets):
        w, T, n_head = self.weights, idx.size(1), self.config.n_head
        x = w["transformer.wte.weight"][idx] + w["transformer.wpe.weight"][:T]  # (B, T, C)
        future = torch.ones(T, T).triu(1).bool()
        for i in range(self.config.n_layer):
            block = f"transformer.h.{i}."
            q, k, v = (norm(x, w[block + "ln_1.weight"]) @ w[block + "attn.c_attn.weight"].T).chunk(3, dim=-1)
            heads = []
            for a, b, c in zip(q.chunk(n_head, -1), k.chunk(n_head, -1), v.chunk(n_head, -1)):  # (B, T, head_dim) each
                score = (a @ b.transpose(1, 2) / math.sqrt(a.size(-1))).masked_fill(future, -math.inf)  # (B, T, T)
                share = score.exp() / score.exp().sum(-1, keepdim=True)
                heads.append(share @ c)
            x = x + torch.cat(heads, -1) @ w[block + "attn.c_proj.weight"].T
            h = norm(x, w[block + "ln_2.weight"]) @ w[block + "mlp.c_fc.weight"].T
            h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))  # exact GELU
            x = x + h @ w[block + "mlp.c_proj.weight"].T
        logits = norm(x, w["transformer.ln_f.weight"]) @ w["transformer.wte.weight"].T  # (B, T, V)
        right = logits.gather(-1, targets[..., None])[..., 0]
        return logits, (logits.exp().sum(-1).log() - right).mean()

    __call__ = forward  # (whoever wraps `forward` on the class calls it by that name)


def norm(x, weight):
    centred = x - x.mean(-1, keepdim=True)
    return centred / ((centred ** 2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight

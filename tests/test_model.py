# SPDX-License-Identifier: GPL-3.0-only
"""The model against plain arithmetic: attention, cache, causality, counts."""
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILIES, random_model
from torch.nn import functional as F

import model
from model import GPT, GPTConfig, KVCache, PRESETS, argmax
from training import lora, memory
from training.memory import training_memory


def reference_logits(model, idx):
    """The same network in float64, written out: the softmax form of attention, one position table, no shortcuts."""
    c, weights = model.config, {name: p.detach().double() for name, p in model.named_parameters()}
    get = lambda name: weights.get("transformer." + name)

    def linear(x, name):
        bias = get(name + ".bias")
        return x @ get(name + ".weight").T + (0 if bias is None else bias)

    def norm(x, name, kind=c.norm):
        if kind == "rmsnorm":
            return x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * get(name + ".weight")
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + c.norm_eps).sqrt()
        return x * get(name + ".weight") + (0 if get(name + ".bias") is None else get(name + ".bias"))

    def turn(x):  # (B, heads, T, head_dim): complex rotation of the pairs (i, i + half)
        half = c.head_dim // 2
        speed = c.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.arange(x.size(2), dtype=torch.float64)[:, None] * speed
        z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((z.real, z.imag), dim=-1)

    B, T = idx.shape
    x = get("wte.weight")[idx]
    if c.pos == "learned":
        x = x + get("wpe.weight")[:T]
    for i in range(c.n_layer):
        q, k, v = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").split(
            (c.n_head * c.head_dim, c.n_kv_head * c.head_dim, c.n_kv_head * c.head_dim), dim=2)
        q, k, v = (t.view(B, T, -1, c.head_dim).transpose(1, 2) for t in (q, k, v))
        if c.qk_norm:
            q, k = norm(q, f"h.{i}.attn.q_norm", "rmsnorm"), norm(k, f"h.{i}.attn.k_norm", "rmsnorm")
        if c.pos == "rope":
            q, k = turn(q), turn(k)
        k, v = (t.repeat_interleave(c.n_head // c.n_kv_head, dim=1) for t in (k, v))
        att = q @ k.transpose(-2, -1) / math.sqrt(c.head_dim)
        att = att.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        y = (att.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, T, -1)
        x = x + linear(y, f"h.{i}.attn.c_proj")
        y = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        if c.mlp == "swiglu":
            y = F.silu(y[..., :c.n_inner]) * y[..., c.n_inner:]
        else:
            y = F.gelu(y, approximate="tanh" if c.mlp == "gelu" else "none")
        x = x + linear(y, f"h.{i}.mlp.c_proj")
    head = weights.get("lm_head.weight", get("wte.weight"))
    return (norm(x, "ln_f") @ head.T)[..., :c.vocab_size]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_loss_equal_plain_arithmetic(family):
    model = random_model(**FAMILIES[family])
    idx, targets = torch.randint(100, (2, 3, 24))
    due = reference_logits(model, idx)
    assert due.std() > 0.5  # a comparison of zeros would prove nothing
    assert torch.allclose(model(idx).double(), due, atol=1e-4)
    targets[0, :5] = -1
    loss = -due.log_softmax(dim=-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0][targets >= 0].mean()
    assert model(idx, targets).item() == pytest.approx(loss.item(), abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cached_decoding_equals_full_forward(family):
    model = random_model(**FAMILIES[family])
    idx = torch.randint(100, (3, 24))
    full = model(idx)
    cache = KVCache(model.config, batch_size=3)
    for t in range(24):  # token by token, up to the full context
        assert torch.allclose(model(idx[:, t:t + 1], cache=cache)[:, 0], full[:, t], atol=1e-4), t
    assert cache.length == 24
    cache = KVCache(model.config, batch_size=3)
    pieces = [model(part, cache=cache) for part in idx.split((7, 1, 10, 6), dim=1)]  # and in chunks
    assert torch.allclose(torch.cat(pieces, dim=1), full, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_later_token_never_changes_an_earlier_logit(family):
    model = random_model(**FAMILIES[family])
    idx = torch.randint(100, (2, 24))
    before = model(idx)
    for t in (1, 12, 23):
        changed = idx.clone()
        changed[:, t:] = torch.randint(100, (2, 24 - t))
        after = model(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t:], before[:, t:])


@torch.no_grad()
def test_generate_equals_recomputing_everything_and_goes_on_when_the_context_is_full():
    model = random_model(**FAMILIES["grouped"])
    idx = torch.randint(100, (3, 5))
    text = torch.cat((idx, *model.generate(idx, 60)), dim=1)
    assert text.shape == (3, 65)
    # What the model has seen at each step: everything up to 24 tokens, then the last 12 and what follows them.
    seen = 5
    for t in range(5, 65):
        if seen > 24:
            seen = 12
        assert torch.equal(text[:, t], argmax(model(text[:, t - seen:t])[:, -1])), t
        seen += 1
    long = torch.randint(100, (1, 40))  # a prompt longer than the context: its end counts
    assert torch.equal(next(model.generate(long, 1))[:, 0], argmax(model(long[:, -24:])[:, -1]))


def test_parameter_counts_are_exact():
    due = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
           "openllm-small": 35_823_616, "openllm-medium": 111_204_864, "openllm-large": 337_176_576}
    with torch.device("meta"):
        assert {name: GPT(GPTConfig(**PRESETS[name])).n_params() for name in due} == due
    model = random_model(vocab_size=100, tie_weights=False)  # both matrices are padded to 128 rows, and not counted
    assert model.lm_head.weight.size(0) == 128
    assert model.n_params() == sum(p.numel() for p in model.parameters()) - 2 * 28 * 32


def test_flops_per_token_is_what_the_products_cost():
    from torch.utils.flop_counter import FlopCounterMode
    for family in FAMILIES.values():
        model = random_model(**{**family, "vocab_size": 128})  # no padding, which would be counted here
        T = 24
        plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with FlopCounterMode(display=False) as counter, plain:
            model(torch.randint(100, (1, T)))
        assert model.flops_per_token(T) * T == 3 * counter.get_total_flops()  # backward is twice forward


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_per_token_with_lora_are_what_its_products_cost(family):
    """No gradient of a weight that is not trained: 4 operations each, not 6."""
    from torch.utils.flop_counter import FlopCounterMode
    gpt, T = random_model(**FAMILIES[family] | dict(vocab_size=128, tie_weights=False)).train(), 24
    lora.add(gpt, 3, 8)
    due = gpt.flops_per_token(T) * T
    gpt.transformer.wte.requires_grad_(True)  # so that the gradient goes through every product, as it is counted
    idx = torch.randint(100, (1, T))
    with FlopCounterMode(display=False) as counter:
        gpt(idx, idx).backward()
    assert due == counter.get_total_flops()


def test_a_fresh_model_knows_nothing():
    for family in FAMILIES.values():
        torch.manual_seed(0)
        model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=256, block_size=64, vocab_size=1000,
                              **{k: v for k, v in family.items() if k not in ("head_dim", "n_inner")}))
        loss = model(*torch.randint(1000, (2, 4, 64))).item()
        assert loss == pytest.approx(math.log(1000), abs=0.15)


def test_dropout_only_in_training():
    model = random_model(dropout=0.5)
    idx = torch.randint(100, (2, 24))
    assert torch.equal(model(idx), model(idx))
    model.train()
    assert not torch.equal(model(idx), model(idx))


def test_padding_of_the_vocabulary_is_never_seen():
    model = random_model(vocab_size=65)
    assert model(torch.zeros(1, 4, dtype=torch.long)).shape == (1, 4, 65)
    with torch.no_grad():
        model.lm_head.weight[65:] = 1e3  # were they looked at, they would always win
    tokens = torch.cat(list(model.generate(torch.zeros(4, 1, dtype=torch.long), 20)), dim=1)
    assert tokens.max() < 65


@pytest.mark.parametrize("shape, number", [
    (dict(n_embd=100, n_head=3), "n_embd=100"), (dict(n_kv_head=3), "n_kv_head=3"), (dict(n_layer=0), "n_layer=0"),
    (dict(pos="rope", head_dim=7), "head_dim=7"), (dict(dropout=1.5), "dropout=1.5")])
def test_impossible_shapes_say_why(shape, number):
    with pytest.raises(AssertionError, match=number):
        random_model(**shape)


def test_too_long_a_text_says_by_how_much():
    model = random_model()
    with pytest.raises(AssertionError, match="25 tokens do not fit into block_size=24"):
        model(torch.zeros(1, 25, dtype=torch.long))
    with pytest.raises(AssertionError, match="9 positions do not fit into a cache of 8"):
        model(torch.zeros(1, 9, dtype=torch.long), cache=KVCache(model.config, 1, capacity=8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "modern", "llama"])
def test_the_memory_estimate_is_what_autograd_keeps(family, dtype):
    model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=128, vocab_size=64, **FAMILIES[family]))
    idx, kept = torch.randint(64, (2, 128)), {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that its address is not used again
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            model(idx, idx)
    parts = training_memory(model, 2, dtype.itemsize, 8)
    assert 0.75 < parts["activations"] / sum(storage.nbytes() for storage in kept.values()) < 1.25


def test_every_part_of_the_memory_estimate_is_counted(monkeypatch):
    """By hand: 2 layers, 2 heads of 4 channels, 6 tokens of 3 windows, a vocabulary of 64."""
    gpt = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=8, block_size=6, vocab_size=64, tie_weights=False))
    n = sum(p.numel() for p in gpt.parameters())
    assert n == 2 * 64 * 8 + 6 * 8 + 2 * (12 * 8 * 8 + 2 * 8) + 8
    tokens, products, norms, scores = 18, 8 * 8 + 2 * 32, 2 * 8, 2 * 6
    due = dict(weights=4 * n, gradients=4 * n, optimizer=8 * n, logits=18 * 64 * (2 * 4 + 12),
               activations=tokens * 2 * (4 * (products + scores) + 4 * norms))
    assert training_memory(gpt, 3, 4, 8) == due
    monkeypatch.setattr(memory, "MOST_SCORES", tokens * scores)  # as many as there are
    assert training_memory(gpt, 3, 4, 8) == due
    monkeypatch.setattr(memory, "MOST_SCORES", tokens * scores - 1)  # then no scores are kept
    assert training_memory(gpt, 3, 4, 8) == due | dict(activations=tokens * 2 * (4 * products + 4 * norms))
    monkeypatch.setattr(memory, "CHUNK_LOGITS", 1000)
    half = training_memory(gpt, 3, 2, 4)  # bfloat16, with a copy of the weights; Muon
    assert half == dict(weights=4 * n, gradients=4 * n, optimizer=4 * n, logits=1000 * (2 * 2 + 12),
                        activations=tokens * 2 * (2 * products + 4 * norms) + 2 * n)
    lora.add(gpt, 1, 2)  # of each layer: 4 matrices, n x 1 and 1 x m
    more = 2 * ((8 + 24) + (8 + 8) + (8 + 32) + (32 + 8))
    parts = training_memory(gpt, 3, 4, 8)
    assert (parts["weights"], parts["gradients"], parts["optimizer"]) == (4 * (n + more), 4 * more, 8 * more)


@pytest.mark.parametrize("optimizer, device, processes, due", [
    ("adamw", "cpu", 1, 120), ("muon", "cpu", 1, 104), ("adamw", "cpu", 2, 240), ("adamw", "cuda", 2, 120)])
def test_the_memory_of_all_processes_on_a_machine_is_compared_with_what_is_free(
        optimizer, device, processes, due, monkeypatch, capsys):
    def parts(model, batch_size, width, optimizer_bytes):
        assert (model, batch_size, width) == ("model", 3, 2)
        return dict(some=88e6, optimizer=4e6 * optimizer_bytes)
    monkeypatch.setattr(memory, "training_memory", parts)
    run = SimpleNamespace(settings=SimpleNamespace(optimizer=optimizer), model="model", batch_size=3, device=device,
                          dtype=torch.bfloat16, ranks=SimpleNamespace(local_world=processes))
    for free, fits in ((due, True), (due - 1, False)):
        monkeypatch.setattr(memory.machine, "free_memory", lambda device: 1e6 * free)
        memory.say_memory(run)
        said = capsys.readouterr().err
        assert f"memory: about {due} MB needed, {free} MB free\n" in said
        assert ("warning: this may not fit; halve --batch_size" in said) != fits


@pytest.mark.parametrize("family", ["gpt2", "modern", "llama"])
def test_training_beyond_the_score_limit_is_the_same_training(family, monkeypatch):
    """PyTorch's kernel, which holds no scores, takes over there: the same loss and the same gradients."""
    gpt, idx, targets = random_model(**FAMILIES[family]).train(), *torch.randint(100, (2, 3, 24))
    scores, found, kernel = 3 * 4 * 24 * 24, [], []  # B n_head T^2
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **kw: kernel.append(kw) or real(*a, **kw))
    for most, calls in ((scores, 0), (scores - 1, 2)):  # of two layers
        monkeypatch.setattr(model, "MOST_SCORES", most)
        loss = gpt(idx, targets)
        found.append([loss, *torch.autograd.grad(loss, list(gpt.parameters()))])
        assert len(kernel) == calls
    for formula, fused in zip(*found):
        assert (formula - fused).abs().max() < 1e-5 * max(1, formula.abs().max())
    assert all(kw["is_causal"] and kw["dropout_p"] == 0 for kw in kernel)
    gpt.eval()(idx, targets)  # in a validation it is the kernel, whatever the size
    monkeypatch.setattr(model, "MOST_SCORES", 1 << 25)
    gpt(idx, targets)
    assert len(kernel) == 6


@pytest.mark.parametrize("most", [0, 1 << 25])
def test_dropout_of_attention_is_a_share_of_its_weights(most, monkeypatch):
    """A text of one token has one weight, 1: either the value is gone, or it is there 1 / (1 - p) times."""
    monkeypatch.setattr(model, "MOST_SCORES", most)
    torch.manual_seed(0)
    q, k, v = torch.ones(3, 100, 50, 1, 2).unbind()
    found = model.causal_attention(q, k, v, 0.3, True, False)
    assert found.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert (found == 0).float().mean() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(model.causal_attention(q, k, v, 0.3, False, False), v)  # not in a validation
    assert torch.equal(model.causal_attention(q, k, v, 0.0, True, False), v)


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_attention_by_its_formula_is_scaled_dot_product_attention(n_kv_head):
    q = torch.randn(2, 4, 9, 6, requires_grad=True)
    k, v = (torch.randn(2, n_kv_head, 9, 6, requires_grad=True) for _ in range(2))
    found = model.attention_by_formula(q, k, v)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert (found - expected).abs().max() < 1e-6
    above = torch.randn_like(found)
    for ours, theirs in zip(*(torch.autograd.grad(y, (q, k, v), above) for y in (found, expected))):
        assert (ours - theirs).abs().max() < 1e-5


def test_a_compiled_gelu_is_gelu(monkeypatch):
    """(Without compiling it: what takes another form in training is told that it is being compiled.)"""
    torch.manual_seed(0)
    mlp = model.MLP(model.resolve(GPTConfig(n_embd=8, n_head=1))).double()
    x = (5 * torch.randn(64, 8, dtype=torch.float64)).requires_grad_()
    due = mlp(x)
    due_grad, = torch.autograd.grad(due.square().sum(), x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(mlp.eval()(x), due)
    monkeypatch.setattr(F, "gelu", None)
    y = mlp.train()(x)
    torch.testing.assert_close((y, *torch.autograd.grad(y.square().sum(), x)), (due, due_grad), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("logits", [1, 700, 1 << 24])  # a chunk of one token, of some (the last one shorter), of all
@pytest.mark.parametrize("tie_weights", [True, False])
def test_the_loss_in_chunks_is_the_loss(monkeypatch, logits, tie_weights):
    gpt = random_model(vocab_size=101, tie_weights=tie_weights).train()
    idx, targets = torch.randint(101, (3, 23)), torch.randint(101, (3, 23))
    targets[0, :7] = targets[2] = -1  # where nothing is learned
    expected = F.cross_entropy(gpt(idx).flatten(0, 1), targets.flatten(), ignore_index=-1)
    wanted = torch.autograd.grad(expected, list(gpt.parameters()))
    monkeypatch.setattr(model, "CHUNK_LOGITS", logits)
    loss = gpt(idx, targets)
    assert abs(loss - expected) < 1e-6
    for found, right in zip(torch.autograd.grad(loss, list(gpt.parameters())), wanted):
        assert (found - right).abs().max() < 1e-6 * max(1, right.abs().max())
    gpt.requires_grad_(False)
    gpt.transformer.h[0].mlp.c_fc.weight.requires_grad_(True)  # as with LoRA: the head itself is not trained
    found = torch.autograd.grad(gpt(idx, targets), [gpt.transformer.h[0].mlp.c_fc.weight])
    assert len(found) == 1 and found[0].abs().sum() > 0


def test_a_validation_computes_no_gradients(monkeypatch):
    gpt, idx, contexts = random_model().train(), torch.randint(64, (2, 9)), []
    forward = model.CrossEntropy.forward
    monkeypatch.setattr(model.CrossEntropy, "forward",
                        staticmethod(lambda ctx, *args: (forward(ctx, *args), contexts.append(ctx.grads))[0]))
    expected = gpt(idx, idx)
    with torch.no_grad():
        assert gpt(idx, idx) == expected
    assert all(grad is not None for grad in contexts[0]) and contexts[1] == (None, None)


def test_the_gradient_of_a_frequent_token_fits_into_float16():
    """Of 6,000 tokens all have the same target: its row of the head gets a sum of 6,000 streams."""
    gpt = random_model(vocab_size=64, block_size=1000, n_layer=1, tie_weights=False).train()
    gpt.transformer.ln_f.weight.data.fill_(20.0)
    idx = torch.full((6, 1000), 3)
    wanted, = torch.autograd.grad(gpt(idx, idx + 1), [gpt.lm_head.weight])
    with torch.autocast("cpu", torch.float16):
        found, = torch.autograd.grad(gpt(idx, idx + 1), [gpt.lm_head.weight])
    assert torch.isfinite(found).all() and (found - wanted).abs().max() < 0.01 * wanted.abs().max()


def test_the_logits_of_all_tokens_never_exist_at_once(monkeypatch):
    gpt, sizes = random_model(vocab_size=101).train(), []
    monkeypatch.setattr(model, "CHUNK_LOGITS", 7 * 101)
    gpt.chunk_loss = lambda logits, targets: (sizes.append(logits.numel()), model.chunk_loss(logits, targets))[1]
    gpt(torch.randint(101, (3, 23)), torch.randint(101, (3, 23))).backward()
    assert sum(sizes) == 3 * 23 * 101 and max(sizes) <= 7 * 101

# SPDX-License-Identifier: GPL-3.0-only
"""Device and dtype choices, and checkpoints that are whole, safe and found."""
import os
import pickle

import torch
from conftest import chat_run, error, prepare_words, random_model

import machine
import runtime
import sample
import train


def whole(**state):
    """A checkpoint with all that every one has, and `state`."""
    return dict(format=1, step=0, model={}, settings={}, tokenizer_sha256="", source=[]) | state


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert machine.choose_device("auto") == machine.choose_device("cpu") == "cpu"
    fact, fix = error(lambda _: machine.choose_device("cuda:1"))
    assert "--device=cuda:1" in fact and torch.__version__ in fact and "--device=auto" in fix
    assert "mps" in error(lambda _: machine.choose_device("mps"))[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert machine.choose_device("auto") == "cuda"


def test_every_process_gets_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: None)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    for name, value in dict(RANK=3, WORLD_SIZE=4, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2).items():
        monkeypatch.setenv(name, str(value))
    assert machine.choose_device("auto", machine.Processes()) == "cuda:1" == taken[0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    fact, fix = error(lambda _: machine.choose_device("cuda", machine.Processes()))
    assert "2 processes, but this machine has 1 GPUs" in fact and fix == "--nproc_per_node=1"


def test_dtypes(monkeypatch):
    for device, capability, due in (("cuda", (8, 0), torch.bfloat16), ("cuda", (7, 5), torch.float16),
                                    ("mps", None, torch.float32)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        assert machine.choose_dtype("auto", device)[0] == due
    for has, due in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert machine.choose_dtype("auto", "cpu")[0] == due
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # a laptop's instructions, on request
    assert machine.choose_dtype("auto", "cpu")[0] == torch.float32
    assert machine.choose_dtype("float16", "cpu")[0] == torch.float16


def test_a_checkpoint_comes_back_as_it_was(here):
    state = whole(model=random_model().state_dict(), step=3, settings=dict(a=1, b="x", c=[1.5, None]))
    runtime.save_checkpoint("ckpt_00000003.pt", state)
    again = runtime.load_checkpoint("ckpt_00000003.pt")
    assert all(torch.equal(again["model"][name], p) for name, p in state["model"].items())
    assert again["settings"] == state["settings"] and os.listdir() == ["ckpt_00000003.pt"]


def test_saving_touches_the_disk_in_the_right_order(here, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (done.append(name), real(*a))[1])
    runtime.save_checkpoint("a.pt", whole(x=1))
    assert done == ["fsync", "replace", "fsync"]  # the bytes, the name, the folder


def test_a_failed_save_changes_nothing(here, monkeypatch):
    runtime.save_checkpoint("a.pt", whole(x=1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert "cannot write a.pt: [Errno 28]" in error(lambda _: runtime.save_checkpoint("a.pt", whole(x=2)))[0]
    assert runtime.load_checkpoint("a.pt") == whole(x=1) and os.listdir() == ["a.pt"]


def test_damaged_missing_and_malicious_files_are_refused(here):
    assert "there is no checkpoint x.pt" in error(lambda _: runtime.load_checkpoint("x.pt"))[0]
    runtime.save_checkpoint("a.pt", whole(x=torch.arange(1000)))
    raw = (here / "a.pt").read_bytes()
    for cut in (0, 10, len(raw) // 2, len(raw) - 1):
        (here / "b.pt").write_bytes(raw[:cut])
        assert "b.pt is damaged" in error(lambda _: runtime.load_checkpoint("b.pt"))[0]
    flipped = bytearray(raw)
    flipped[raw.index(torch.arange(1000).numpy().tobytes()) + 5000] ^= 1  # one bit of one weight
    (here / "b.pt").write_bytes(flipped)
    assert "b.pt is damaged" in error(lambda _: runtime.load_checkpoint("b.pt"))[0]

    class Evil:
        def __reduce__(self):
            return os.mkdir, ("pwned",)
    torch.save(dict(model=Evil()), "evil.pt")
    assert "could run code" in error(lambda _: runtime.load_checkpoint("evil.pt"))[0]
    torch.save(dict(model=1), "theirs.pt")
    assert "theirs.pt is not a checkpoint of this project" in error(lambda _: runtime.load_checkpoint("theirs.pt"))[0]
    (here / "plain.pt").write_bytes(pickle.dumps(Evil()))
    assert "plain.pt" in error(lambda _: runtime.load_checkpoint("plain.pt"))[0]
    assert not (here / "pwned").exists()


def test_checkpoints_are_ordered_by_number_and_pruned(here):
    for step in (100, 20, 3):  # the clock says otherwise
        runtime.save_checkpoint(f"ckpt_{step:08d}.pt", whole(step=step))
    runtime.save_checkpoint("best.pt", dict(step=1))
    os.utime("ckpt_00000003.pt")  # the oldest was touched last
    assert [runtime.load_checkpoint(path)["step"] for path in runtime.checkpoints(".")] == [3, 20, 100]
    runtime.prune_checkpoints(".")
    assert sorted(os.listdir()) == ["best.pt", "ckpt_00000020.pt", "ckpt_00000100.pt"]
    assert runtime.checkpoint_path(".") == "./best.pt" and runtime.checkpoint_path(".", "last") == "./ckpt_00000100.pt"


def test_weights_that_do_not_fit_are_named():
    model, other = random_model(), random_model(n_embd=64)
    fact, _ = error(lambda _: runtime.load_weights(model, other.state_dict(), "x.pt"))
    assert "x.pt has transformer.wte.weight of shape (128, 64), but the model has (128, 32)" in fact
    weights = model.state_dict()
    del weights["transformer.h.1.mlp.c_fc.weight"]
    assert "no transformer.h.1.mlp.c_fc.weight" in error(lambda _: runtime.load_weights(model, weights, "x.pt"))[0]


def test_a_run_knows_whether_it_can_chat(tiny_run, here):
    """All our tokenizers can; what a checkpoint says counts. (Hugging Face folders are in test_huggingface.py.)"""
    run = str(tiny_run / "out/words")
    assert runtime.load_run(run)[2]["chat"] is False
    chat_run(tiny_run, here / "chat")
    for path in ("chat", "chat/best.pt", "chat/ckpt_00000040.pt"):
        assert runtime.load_run(path)[2]["chat"] is True


def test_one_place_reads_checkpoints():
    from conftest import ROOT
    for path in [*ROOT.glob("*.py"), *ROOT.glob("config/*.py")]:
        source = path.read_text(encoding="utf-8")
        assert "weights_only=False" not in source and "pickle.load" not in source
        # (readback.py reads nothing but what export.py has just written, and imports nothing of ours)
        assert ("torch.load(" in source) == (path.name in ("runtime.py", "readback.py"))


# ----------------------------------------------------------------------------------------------------------------------
# nanoGPT's checkpoints


def nanogpt(folder, vocab_size=65, data="shakespeare_char", rows=None, characters=None):
    """A ckpt.pt as nanoGPT writes it, and its characters in data/. Returns our model with the same weights."""
    model = random_model(vocab_size=vocab_size, mlp="gelu_exact")
    rows = rows or vocab_size
    weights = {"_orig_mod." + name: tensor for name, tensor in model.state_dict().items()}
    for name in ("_orig_mod.transformer.wte.weight", "_orig_mod.lm_head.weight"):
        weights[name] = weights[name][:rows].clone()
    weights["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 24, 24)
    c = model.config
    args = dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, block_size=c.block_size, bias=False,
                vocab_size=rows, dropout=0.0)
    os.makedirs(folder / "out")
    torch.save(dict(model=weights, optimizer={}, model_args=args, iter_num=7, best_val_loss=torch.tensor(1.5),
                    config=dict(dataset=data, learning_rate=1e-3)), folder / "out/ckpt.pt")
    if characters:
        os.makedirs(folder / "data" / data)
        with open(folder / "data" / data / "meta.pkl", "wb") as file:
            pickle.dump(dict(vocab_size=len(characters), itos=dict(enumerate(characters)),
                             stoi={c: i for i, c in enumerate(characters)}), file)
    return model


def test_nanogpts_checkpoint(here, capsys):
    """Characters are found where nanoGPT keeps them; the logits are those of the weights, and sample.py writes."""
    characters = "\n !abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    model = nanogpt(here, len(characters), characters=characters)
    loaded, tokenizer, run = runtime.load_run("out")
    idx = torch.randint(len(characters), (2, 24))
    with torch.no_grad():
        assert torch.equal(model(idx), loaded(idx))
    assert run["step"] == 7 and run["source"] == ["shakespeare_char"] and run["chat"] is False
    assert tokenizer.encode("\n a!") == [0, 1, 3, 2] and tokenizer.decode([3, 4]) == "ab"
    for prompt in ("--prompt=abc", "--prompt="):
        sample.main(["out/ckpt.pt", prompt, "--max_new_tokens=5", "--seed=1"])
        assert "[5 tokens" in capsys.readouterr().err
    fact, _ = error(train.main, "--init_from=out", f"--dataset={prepared(here)}")
    assert "a character model of nanoGPT, which has no end-of-text token" in fact


def prepared(here):
    prepare_words(here)
    return "words"


def test_nanogpts_checkpoint_with_gpt2s_vocabulary(here, gpt2, monkeypatch):
    """Its 50,304 rows are cut to the 50,257 tokens that exist."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", gpt2)
    model = nanogpt(here, 50257, "openwebtext", rows=50304)
    loaded, tokenizer, _ = runtime.load_run("out")
    assert loaded.config.vocab_size == 50257 and tokenizer.decode(tokenizer.encode("don't")) == "don't"
    idx = torch.randint(50257, (1, 24))
    with torch.no_grad():
        assert torch.equal(model(idx), loaded(idx))


def test_what_can_be_wrong_with_nanogpts_checkpoint(here):
    nanogpt(here)
    fact, fix = error(lambda _: runtime.load_run("out"))
    assert "has 65 tokens" in fact and "copy nanoGPT's data/shakespeare_char/meta.pkl to out/meta.pkl" in fix

    class Code:
        def __reduce__(self):
            return os.mkdir, ("hacked",)
    for content, expected in ((pickle.dumps(Code()), "asks for posix.mkdir"), (b"x", "meta.pkl cannot be used"),
                              (pickle.dumps(dict(itos={0: "ab"})), "meta.pkl cannot be used"),
                              (pickle.dumps(dict(itos={i: "ab" for i in range(65)})), "not one character per id")):
        (here / "out/meta.pkl").write_bytes(content)
        assert expected in error(lambda _: runtime.load_run("out"))[0]
    assert not os.path.exists("hacked")
    (here / "out/meta.pkl").write_bytes(pickle.dumps(dict(itos={i: chr(97 + i) for i in range(65)})))
    state = torch.load("out/ckpt.pt")
    for change, expected in ((dict(model_args={}), "looks like nanoGPT's"), (dict(model=[]), "looks like nanoGPT's"),
                             (dict(model_args={**state["model_args"], "n_head": 5}), "looks like nanoGPT's"),
                             (dict(model_args={**state["model_args"], "n_layer": 3}), "has no transformer.h.2.ln_1")):
        torch.save({**state, **change}, "out/ckpt.pt")
        assert expected in error(lambda _: runtime.load_run("out"))[0]

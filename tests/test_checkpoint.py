# SPDX-License-Identifier: GPL-3.0-only
"""Checkpoints that are whole, safe and found."""
import io
import json
import os
import pickle
import shutil
import struct
import zipfile

import pytest
import torch
from conftest import chat_run, error, nanogpt, prepare_words, random_model, whole

from training import checkpoint as ckpt, lora
from training import resume
import sample
import tokenizer as tokenizers
import train
from training.muon import Muon


def test_a_checkpoint_comes_back_as_it_was(here):
    state = whole(step=3)
    state["settings"].update(a=1, b="x", c=1.5, d=None)
    ckpt.save_checkpoint("ckpt_00000003.pt", state)
    again = ckpt.load_checkpoint("ckpt_00000003.pt")
    assert all(torch.equal(again["model"][name], p) for name, p in state["model"].items())
    assert again["settings"] == state["settings"] and os.listdir() == ["ckpt_00000003.pt"]


def test_saving_touches_the_disk_in_the_right_order(here, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (done.append(name), real(*a))[1])
    ckpt.save_checkpoint("a.pt", whole(x=1))
    assert done == ["fsync", "replace", "fsync"]  # the bytes, the name, the folder


def test_a_failed_save_changes_nothing(here, monkeypatch):
    ckpt.save_checkpoint("a.pt", whole(x=1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert "cannot write a.pt: [Errno 28]" in error(lambda _: ckpt.save_checkpoint("a.pt", whole(x=2)))[0]
    assert ckpt.load_checkpoint("a.pt")["x"] == 1 and os.listdir() == ["a.pt"]


def test_damaged_missing_and_malicious_files_are_refused(here):
    assert "there is no checkpoint x.pt" in error(lambda _: ckpt.load_checkpoint("x.pt"))[0]
    ckpt.save_checkpoint("a.pt", whole(x=torch.arange(1000)))
    raw = (here / "a.pt").read_bytes()
    for cut in (0, 10, len(raw) // 2, len(raw) - 1):
        (here / "b.pt").write_bytes(raw[:cut])
        assert "b.pt is damaged" in error(lambda _: ckpt.load_checkpoint("b.pt"))[0]
    flipped = bytearray(raw)
    flipped[raw.index(torch.arange(1000).numpy().tobytes()) + 5000] ^= 1  # one bit of one weight
    (here / "b.pt").write_bytes(flipped)
    assert "b.pt is damaged" in error(lambda _: ckpt.load_checkpoint("b.pt"))[0]

    class Evil:
        def __reduce__(self):
            return os.mkdir, ("pwned",)
    torch.save(dict(model=Evil()), "evil.pt")
    assert "could run code" in error(lambda _: ckpt.load_checkpoint("evil.pt"))[0]
    torch.save(dict(weights=1), "theirs.pt")
    assert "theirs.pt is not a checkpoint of this project" in error(lambda _: ckpt.load_checkpoint("theirs.pt"))[0]
    (here / "plain.pt").write_bytes(pickle.dumps(Evil()))
    assert "plain.pt" in error(lambda _: ckpt.load_checkpoint("plain.pt"))[0]
    assert not (here / "pwned").exists()


def deflated(path):
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


one, large = torch.ones(1), torch.ones(1_000_000)
STRANGE = {
    "stride of 0": dict(model=dict(x=one.expand(10**12))),
    "a view many times": dict(model={str(i): large[:] for i in range(10)}),
    "sparse": dict(model=dict(x=torch.eye(3).to_sparse())),
    "meta": dict(weights=lambda w: w.to("meta")),
    "a huge number": dict(settings=dict(n_layer=-10**5000)),
    "layers": dict(settings=dict(n_layer=10**9)),
    "layers, a few": dict(settings=dict(n_layer=10**6)),
    "vocabulary": dict(settings=dict(vocab_size=10**9)),
    "context": dict(settings=dict(block_size=10**9, pos="rope")),
    "text for a number": dict(settings=dict(n_embd="32")),
    "NaN for a number": dict(settings=dict(n_head=float("nan"))),
    "NaN for an epsilon": dict(settings=dict(norm_eps=float("nan"))),
    "a family that is none": dict(settings=dict(norm="batchnorm")),
    "dataset": dict(settings=dict(dataset=3)),
    "weights of whole numbers": dict(weights=lambda w: w.int()),
    "complex weights": dict(weights=lambda w: w + 0j),
    "weights that are none": dict(weights=lambda w: w.tolist()),
    "names that are numbers": dict(model={1: one}),
    "source": dict(source=[7]), "validation loss": dict(val_loss="low"), "chat": dict(chat="yes"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_checkpoints_are_refused(here, name):
    """Before memory is taken, and with one line."""
    change = dict(STRANGE[name])
    state = whole()
    state["settings"] |= change.pop("settings", {})
    weights = change.pop("weights", lambda w: w)
    state["model"] = {key: weights(tensor) for key, tensor in state["model"].items()}
    torch.save(state | change, "a.pt")
    fact, _ = error(lambda _: ckpt.load_checkpoint("a.pt"))
    assert "a.pt" in fact and len(fact) < 300


def two_directories(path):
    """A large file deflated, in front of a small one: Python finds the directory of the second, torch the other."""
    def parts(content):
        at = content.rindex(b"PK\5\6")
        size, start = struct.unpack("<II", content[at + 12:at + 20])
        return content[:start], content[start:start + size]
    deflated(path)
    small = io.BytesIO()
    with zipfile.ZipFile(small, "w") as archive:
        archive.writestr("a", b"x")
    with open(path, "rb") as file:
        (large, theirs), (small, ours) = parts(file.read()), parts(small.getvalue())
    comment = len(theirs) - len(ours)  # so that both are of the same length
    place = len(large) - len(small)
    ours = ours[:32] + struct.pack("<H", comment) + ours[34:42] + struct.pack("<I", place) + ours[46:] + b" " * comment
    count, size = theirs.count(b"PK\1\2"), len(ours)
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, count, count, size, len(large), 0)
    with open(path, "wb") as file:
        file.write(large + theirs + small + ours + end)


@pytest.mark.parametrize("change", [deflated, two_directories])
def test_strange_archives_are_refused(here, change):
    torch.save(whole(), "a.pt")
    ckpt.load_checkpoint("a.pt")
    change("a.pt")
    assert "a.pt is damaged" in error(lambda _: ckpt.load_checkpoint("a.pt"))[0]


def test_what_is_no_file_is_no_run(here, monkeypatch):
    """Links to nothing, folders and pipes, where a checkpoint should be: an error, and no waiting."""
    os.makedirs("out/a")
    os.symlink("nowhere", "out/a/best.pt")
    for run in ("out/a", "out/a/best.pt"):
        assert "out/a" in error(lambda _: ckpt.read_run(run))[0]
    assert ckpt.find_run() == os.path.relpath(ckpt.SMALL)
    monkeypatch.setattr(ckpt, "SMALL", "nowhere")
    assert "no trained run in out/" in error(lambda _: ckpt.find_run())[0]
    for make, path in ((os.mkdir, "folder.pt"), (os.mkfifo, "pipe.pt")):
        make(path)
        assert path in error(lambda _: ckpt.load_checkpoint(path))[0]


def test_a_tokenizer_that_does_not_fit_is_refused(here):
    """Beside a run folder's best.pt, a file on its own, and a file in a Hugging Face tokenizer's folder."""
    state, small = whole(), tokenizers.CharTokenizer("abc")
    large = tokenizers.CharTokenizer("".join(map(chr, range(97, 197))))
    for tokenizer in small, large:
        tokenizer.save("out/tokenizer")
        state["tokenizer_sha256"] = tokenizers.fingerprint(tokenizer)
        ckpt.save_checkpoint("out/best.pt", state)
        os.makedirs(f"out{tokenizer.vocab_size}", exist_ok=True)
        shutil.copytree("out", f"out{tokenizer.vocab_size}", dirs_exist_ok=True)
    assert ckpt.load_run("out8")[1].vocab_size == 8
    for run in ("out105", "out105/best.pt"):
        assert "has 105 tokens, the model only 100" in error(lambda _: ckpt.load_run(run))[0]
    for sha256 in (tokenizers.fingerprint(small), ""):
        ckpt.save_checkpoint("out105/best.pt", state | dict(tokenizer_sha256=sha256))
        assert "out105/tokenizer is not the expected tokenizer" in error(lambda _: ckpt.load_run("out105"))[0]
    shutil.copy("out8/best.pt", "theirs.pt")
    files = tokenizers.pretrained.PARTS[:1]
    (here / files[0]).write_text(json.dumps(dict(TOKENIZER_JSON)))
    assert "is not the expected tokenizer" in error(lambda _: ckpt.load_run("theirs.pt"))[0]


ADDED = dict(id=1, content="<|endoftext|>", special=True, single_word=False, lstrip=False, rstrip=False,
             normalized=False)
TOKENIZER_JSON = dict(
    version="1.0", added_tokens=[ADDED], normalizer=None,
    pre_tokenizer=dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True), post_processor=None,
    decoder=None, model=dict(type="BPE", vocab=dict(a=0), merges=[]))


def optimizers():
    matrix, vector = (torch.nn.Parameter(torch.ones(*shape)) for shape in ((4, 6), (5,)))
    matrix.grad, vector.grad = torch.ones(4, 6), torch.ones(5)
    return [torch.optim.AdamW([matrix, vector], lr=1e-3, fused=True), Muon([matrix], lr=0.02)]


def test_the_state_of_an_optimizer_must_fit(here):
    """A fused kernel believes its shapes. What it is set to comes from the settings, and not from the file."""
    due = optimizers()
    for optimizer in due:
        optimizer.step()
    scaler = torch.amp.GradScaler("cpu")

    def load(change=lambda states: None, scaler_state=None):
        states = [optimizer.state_dict() for optimizer in due]
        torch.save(states, "states.pt")
        states = torch.load("states.pt")
        change(states)
        fresh = optimizers()
        resume.load_optimizers(fresh, scaler, dict(optimizer=states, scaler=scaler_state or scaler.state_dict()), "a")
        return fresh

    def put(number, index, name, value):
        return lambda states: states[number]["state"][index].__setitem__(name, value)
    for optimizer, again in zip(due, load(lambda states: states[0]["param_groups"][0].update(
            lr="x", betas=[9, 9], fused=False, params=[0, 0, 0])), strict=True):
        for one, other in zip(optimizer.state_dict()["state"].values(), again.state_dict()["state"].values()):
            assert all(torch.equal(one[name], other[name]) for name in one)
        assert optimizer.state_dict()["param_groups"] == again.state_dict()["param_groups"]
    for change in (put(0, 0, "exp_avg", torch.ones(2, 3)), put(0, 1, "exp_avg_sq", torch.ones(5).int()),
                   put(0, 1, "exp_avg_sq", 1.0), put(0, 0, "step", torch.ones(9)), put(0, 0, "step", 3),
                   put(1, 0, "momentum_buffer", torch.ones(24)), lambda states: states[0]["state"].pop(1),
                   lambda states: states.pop()):
        assert "a: the optimizers." in error(lambda _: load(change))[0]
    text = scaler.state_dict() | dict(scale="x")
    assert "the scaler.scale is of type str" in error(lambda _: load(scaler_state=text))[0]
    assert not load(lambda states: states[0].update(state={}))[0].state  # in float16, every update may have overflowed


def test_checkpoints_are_ordered_by_number_and_pruned(here):
    for step in (100, 20, 3):  # the clock says otherwise
        ckpt.save_checkpoint(f"ckpt_{step:08d}.pt", whole(step=step))
    ckpt.save_checkpoint("best.pt", dict(step=1))
    os.utime("ckpt_00000003.pt")  # the oldest was touched last
    assert [ckpt.load_checkpoint(path)["step"] for path in ckpt.checkpoints(".")] == [3, 20, 100]
    ckpt.prune_checkpoints(".")
    assert sorted(os.listdir()) == ["best.pt", "ckpt_00000020.pt", "ckpt_00000100.pt"]
    assert ckpt.checkpoint_path(".") == "./best.pt" and ckpt.checkpoint_path(".", "last") == "./ckpt_00000100.pt"


def test_weights_that_do_not_fit_are_named():
    model, other = random_model(), random_model(n_embd=64)
    fact, _ = error(lambda _: ckpt.load_weights(model, other.state_dict(), "x.pt"))
    assert fact == ("x.pt: transformer.wte.weight is a tensor (128, 64) of type float, "
                    "but should be a tensor (128, 32) of type float")
    weights = model.state_dict()
    del weights["transformer.h.1.mlp.c_fc.weight"]
    fact, _ = error(lambda _: ckpt.load_weights(model, weights, "x.pt"))
    assert "h.1.mlp.c_fc.weight is missing, but should be a tensor (128, 32) of type float" in fact


def test_a_run_knows_whether_it_can_chat(tiny_run, here):
    """All our tokenizers can; what a checkpoint says counts. (Hugging Face folders are in test_huggingface.py.)"""
    run = str(tiny_run / "out/words")
    assert ckpt.load_run(run)[2]["chat"] is False
    chat_run(tiny_run, here / "chat")
    for path in ("chat", "chat/best.pt", "chat/ckpt_00000040.pt"):
        assert ckpt.load_run(path)[2]["chat"] is True


def test_one_place_reads_checkpoints():
    from conftest import ROOT
    for path in [path for path in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")) if path.parent.name != "tests"]:
        source = path.read_text(encoding="utf-8")
        assert "weights_only=False" not in source and "pickle.load" not in source
        # (formats/readback.py reads nothing but what export.py has just written, and imports nothing of ours)
        assert ("torch.load(" in source) == (path.name in ("checkpoint.py", "readback.py"))


# ----------------------------------------------------------------------------------------------------------------------
# nanoGPT's checkpoints


def test_nanogpts_checkpoint(here, capsys):
    """Characters are found where nanoGPT keeps them; the logits are those of the weights, and sample.py writes."""
    characters = "\n !abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    model = nanogpt(here, len(characters), characters=characters)
    loaded, tokenizer, run = ckpt.load_run("out")
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
    loaded, tokenizer, _ = ckpt.load_run("out")
    assert loaded.config.vocab_size == 50257 and tokenizer.decode(tokenizer.encode("don't")) == "don't"
    idx = torch.randint(50257, (1, 24))
    with torch.no_grad():
        assert torch.equal(model(idx), loaded(idx))


def test_what_can_be_wrong_with_nanogpts_checkpoint(here):
    nanogpt(here)
    fact, fix = error(lambda _: ckpt.load_run("out"))
    assert "does not say what its 65 tokens mean" in fact and "copy nanoGPT's data/shakespeare_char/meta.pkl to out/meta.pkl" in fix

    class Code:
        def __reduce__(self):
            return os.mkdir, ("hacked",)
    for content, expected in ((pickle.dumps(Code()), "asks for posix.mkdir"), (b"x", "meta.pkl cannot be used"),
                              (pickle.dumps(dict(itos={0: "ab"})), "meta.pkl cannot be used"),
                              (pickle.dumps(dict(itos={i: "ab" for i in range(65)})), "not one character per id")):
        (here / "out/meta.pkl").write_bytes(content)
        assert expected in error(lambda _: ckpt.load_run("out"))[0]
    assert not os.path.exists("hacked")
    (here / "out/meta.pkl").write_bytes(pickle.dumps(dict(itos={i: chr(97 + i) for i in range(65)})))
    state = torch.load("out/ckpt.pt")
    for change, expected in ((dict(model_args={}), "looks like nanoGPT's"), (dict(model=[]), "not a checkpoint"),
                             (dict(model_args={**state["model_args"], "n_head": 5}), "looks like nanoGPT's"),
                             (dict(model_args={**state["model_args"], "n_layer": 3}),
                              "transformer.h.2.ln_1.weight is missing"),
                             (dict(model_args={**state["model_args"], "n_layer": 10**7}), "n_layer=10,000,000, but"),
                             (dict(iter_num=[]), "looks like nanoGPT's"),
                             (dict(model={"transformer.wte.weight": torch.zeros(2, 32)}), "looks like nanoGPT's")):
        torch.save({**state, **change}, "out/ckpt.pt")
        assert expected in error(lambda _: ckpt.load_run("out"))[0]


def test_a_base_that_is_not_there_is_not_looked_for_forever(here):
    model = random_model()
    lora.add(model, 2, 4)
    tokenizer = tokenizers.CharTokenizer("abc")
    tokenizer.save("out/tokenizer")
    state = whole(model=ckpt.trained_weights(model), base=dict(path="out/best.pt", sha256=""),
                  tokenizer_sha256=tokenizers.fingerprint(tokenizer))
    state["settings"] |= dict(lora_rank=2, lora_alpha=4.0)
    ckpt.save_checkpoint("out/best.pt", state)
    assert "and so on: more than 4" in error(lambda _: ckpt.read_run("out"))[0]

# SPDX-License-Identifier: GPL-3.0-only
"""Fine-tuning: only answers teach, whatever happens; LoRA; an end in time; and what it did, before and after."""
import copy
import hashlib
import json
import os
import shlex
import shutil
import signal

import pytest
import torch
from conftest import FAMILIES, ROOT, TINY, chdir, error, prepare_words, random_model, talks, turns, write_talks
from faults import Run, assert_same_run, rows, said, together

import dataset as datasets
import export
from formats import huggingface
from training import lora
import prepare
from training import checkpoint as ckpt
import sample
import train
from model import GPT

T = 64
FAST = ["--batch_size=4", "--learning_rate=1e-2", "--warmup_iters=2", "--eval_interval=5", "--log_interval=1",
        "--lr_decay_iters=20", "--compile=false", "--dtype=float32", "--device=cpu"]
CHAT = ["--dataset=talk", "--init_from=base", *FAST]
LORA = ["--lora_rank=2", "--lora_alpha=4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data/words, a run in base that has read it, and data/talk in its vocabulary."""
    folder = tmp_path_factory.mktemp("place")
    prepare_words(folder)
    with chdir(folder):
        assert train.main(["--dataset=words", *TINY, f"--block_size={T}", "--max_iters=20", "--out_dir=base"]) == 0
        write_talks("talk.jsonl", talks(60))
        prepare.main(["talk.jsonl", "--format=chat", "--tokenizer=base", "--val_fraction=0.2", "--out=data/talk"])
    return folder


@pytest.fixture
def lab(place, here):
    """A fresh current folder with all of this, which must not be changed."""
    os.mkdir("data")
    for name in ("base", "data/words", "data/talk"):
        os.symlink(place / name, name)
    return here


def tune(*argv):
    return train.main([*CHAT, *argv])


def weights(run, which="best"):
    return ckpt.read_run(run, which)[0]["model"]


def assert_equal(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ----------------------------------------------------------------------------------------------------------------------
# What is learned


def gradients(model, idx, targets):
    """(the loss, the gradient of every parameter), as the loop computes them for a micro-batch."""
    model.zero_grad(set_to_none=True)
    loss = model(idx, targets)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_a_prompt_without_an_answer_gives_no_gradient(lab):
    write_talks("mixed.jsonl", [*talks(20), turns("a dog sees"), turns("my friend", "")])
    prepare.main(["mixed.jsonl", "--format=chat", "--tokenizer=base", "--val_fraction=0.001"])
    data, model = datasets.Dataset.open("data/mixed-chat"), ckpt.load_run("base")[0]
    tokenizer, ids = data.load_tokenizer(), data.read_ids("train", 0, data.meta["train"]["tokens"]).tolist()
    spans = []
    for messages in (turns("a dog sees"), turns("my friend", "")):
        said, _ = tokenizer.conversation(messages)
        start = next(i for i in range(len(ids)) if ids[i:i + len(said)] == said)
        spans.append((start, start + len(said)))
    idx, targets = data.read_windows("train", spans, T)
    assert (targets == -1).all() and (idx != 0).any()
    loss, silent = gradients(model, idx, targets)
    assert loss == 0 and len(silent) > 10 and not any(grad.any() for grad in silent.values())
    # Beside others it counts for nothing: not for the sum, and not for the number that the sum is divided by.
    idx, targets = data.batch(T, 3, 0, 0)
    loss, alone = gradients(model, idx, targets)
    more = data.read_windows("train", spans, T)
    loss2, beside = gradients(model, torch.cat((idx, more[0])), torch.cat((targets, more[1])))
    assert loss2 == pytest.approx(loss, abs=1e-6)
    assert all(torch.allclose(alone[name], beside[name], rtol=0, atol=1e-6) for name in alone)
    spans = {tuple(span) for step in range(40) for span in data.spans(16, 4, 0, step).tolist()}  # short: one in each
    assert all(data.read_mask("train", start, end - start).any() for start, end in spans)  # none is even read


def test_8_windows_at_once_equal_8_one_by_one(lab, monkeypatch):
    """Loss, gradients and what comes of them, with answers of very different length; and an independent computation."""
    real, seen = torch.nn.utils.clip_grad_norm_, []

    def watched(parameters, limit):
        parameters = list(parameters)
        seen.append([p.grad.clone() for p in parameters])
        return real(parameters, limit)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    for micros in (1, 2, 8):
        tune(f"--out_dir={micros}", f"--batch_size={8 // micros}", f"--gradient_accumulation_steps={micros}",
             "--max_iters=6", "--learning_rate=1e-3")
    whole, *others = seen[:6], seen[6:12], seen[12:]
    for part in others:
        for one, other in zip(whole, part, strict=True):
            assert max((a - b).abs().max().item() for a, b in zip(one, other, strict=True)) < 1e-6
    for row, *rest in zip(*(rows(name) for name in ("1", "2", "8")), strict=True):
        for name in ("loss", "grad_norm"):
            assert [other[name] for other in rest] == pytest.approx([row[name]] * 2, abs=1e-6)
    end = [ckpt.load_checkpoint(f"{micros}/ckpt_00000006.pt")["model"] for micros in (1, 8)]
    assert max((end[0][name] - end[1][name]).abs().max().item() for name in end[0]) < 1e-5  # (AdamW divides)
    # Once more: the sum over all tokens that are trained, divided once by their number.
    data, model = datasets.Dataset.open("data/talk"), ckpt.load_run("base")[0]
    train.init_markers(model, data.load_tokenizer())
    idx, targets = data.batch(T, 8, 1337, 0)
    counts = (targets >= 0).sum(dim=1).tolist()
    assert max(counts) > 4 * min(counts) > 0
    nats = torch.nn.functional.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), ignore_index=-1,
                                             reduction="none").double().sum()
    (nats / sum(counts)).backward()
    assert rows("8")[0]["loss"] == pytest.approx(nats.item() / sum(counts), abs=1e-6)
    for grad, p in zip(seen[12], model.parameters(), strict=True):
        assert torch.allclose(grad, p.grad, rtol=0, atol=1e-6)


def test_the_validation_loss_of_a_chat_is_that_of_its_answers(lab):
    tune("--max_iters=5")
    data, (model, _, best) = datasets.Dataset.open("data/talk"), ckpt.load_run("out/talk")
    total = count = 0
    for start, end, n in data.chat_windows("val", T).tolist():
        ids, mask = data.read_ids("val", start, end - start), data.read_mask("val", start, end - start)
        logprobs = model(torch.from_numpy(ids[:-1])[None])[0].log_softmax(-1)
        total -= sum(logprobs[i - 1, ids[i]].item() for i in range(1, len(ids)) if mask[i])
        count += n
    assert best["val_loss"] == pytest.approx(total / count, abs=1e-5)
    assert best["val_bpb"] == pytest.approx(data.bits_per_byte(total / count), abs=1e-5)


HARD = ["--dropout=0.1", "--gradient_accumulation_steps=2", "--optimizer=muon", "--save_interval=3"]


@pytest.mark.parametrize("how", [[], [*LORA, "--optimizer=adamw"]])
def test_the_mask_survives_a_stop_and_a_kill(lab, how):
    argv = [*CHAT, *HARD, *how, "--max_iters=20"]
    stops = [("a", "", 0), ("b", f"signal_at_step:{signal.SIGTERM},9", 143), ("b", "die_at_step:0,14", 1), ("b", "", 0)]
    for out, fault, code in stops:
        assert Run(lab, *argv, f"--out_dir={out}", fault=fault, settings=[]).wait() == code, said(lab)
    assert "resumed b after 8 of 20" in said(lab) and "resumed b after 12 of 20" in said(lab)
    assert_same_run("a", "b", 20)
    assert [row["step"] for row in rows("b")] == list(range(1, 21)) and rows("b")[-1]["loss"] < rows("b")[0]["loss"]


@pytest.mark.parametrize("how", [["--learning_rate=1e-3"], LORA])
def test_the_mask_survives_two_processes(lab, how):
    argv = [*CHAT, *how, "--max_iters=10", "--gradient_accumulation_steps=2"]
    for world in (1, 2):
        assert together(world, lab, *argv, f"--out_dir={world}", settings=[]) == [0] * world, said(lab)
    for one, two in zip(rows("1"), rows("2"), strict=True):
        assert one.keys() == two.keys()
        for name in one:
            assert two[name] == pytest.approx(one[name], abs=1e-5), name
    assert rows("1")[9]["val_loss"] < rows("1")[4]["val_loss"]  # something was learned


def test_what_a_long_conversation_loses_is_said(lab, capsys):
    data = datasets.Dataset.open("data/talk")
    for block_size, cut in (32, True), (T, False):
        kept = sum(n for *_, n in data.chat_windows("train", block_size).tolist()) / data.meta["train"]["trained"]
        tune("--eval_only", f"--block_size={block_size}")
        warning = f"longer than block_size={block_size} are cut, losing {1 - kept:.1%} of the answers"
        assert (warning in capsys.readouterr().err) == (kept < 1)
        assert kept < 0.9 or not cut
    assert "block_size=4 is too small: no window" in error(lambda argv: tune(*argv), "--block_size=4")[0]


def test_a_chat_run_can_chat(lab, capsys):
    tune("--max_iters=5")
    shown = capsys.readouterr()
    assert "next: python sample.py out/talk --chat" in shown.err and " -> " in shown.out
    assert ckpt.read_run("out/talk")[0]["chat"] is True and ckpt.read_run("base")[0]["chat"] is False
    sample.main(["out/talk", "--chat", "--prompt=a dog sees", "--max_new_tokens=5"])
    assert "a conversation" not in error(sample.main, "base", "--chat", "--prompt=a dog sees")[0]
    # It stays one when it goes on with text.
    train.main(["--dataset=words", "--init_from=out/talk", "--out_dir=more", "--max_iters=1", *FAST])
    assert ckpt.read_run("more")[0]["chat"] is True


def test_the_next_command_can_be_typed_as_it_stands(lab, capsys):
    os.symlink(ROOT / "config", "config")
    _, tokenizer, _ = ckpt.load_run("base")
    huggingface.write("hf", random_model(vocab_size=tokenizer.vocab_size, block_size=1024, n_layer=1), tokenizer)
    write_talks("talk.jsonl", talks(60))
    small = ["--max_iters=1", "--batch_size=2", "--compile=false", "--device=cpu", "--eval_iters=1"]
    for name, due in (("base", "config/finetune_chat.py --init_from=base"),
                      ("hf", "config/finetune_lora.py --init_from=hf"), ("char", "--init_from=scratch"),
                      ("data/words", "--init_from=scratch")):
        prepare.main(["talk.jsonl", "--format=chat", f"--tokenizer={name}", "--out=data/my talk"])
        said = capsys.readouterr().err.split("next: python train.py ")[1].split("\n")[0]
        assert due in said
        assert train.main([*shlex.split(said), *small]) == 0
        shutil.rmtree("out/my talk")


# ----------------------------------------------------------------------------------------------------------------------
# LoRA


@pytest.mark.parametrize("family", FAMILIES)
def test_corrections_begin_at_nothing_and_can_be_merged(family):
    base, idx = random_model(**FAMILIES[family]), torch.randint(100, (2, 24))
    model = copy.deepcopy(base)
    lora.add(model, 4, 8)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 4 * 2 and all(".h." in name and name.endswith((".lora_A", ".lora_B")) for name in names)
    with torch.no_grad():
        due = base(idx)
        assert torch.equal(model(idx), due)  # bit for bit
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                p.normal_(std=0.1)
        corrections = lora.adapters(model.state_dict())
        before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        merged = lora.merge(base.state_dict(), corrections, 4, 8)
        again = GPT(base.config).eval()
        again.load_state_dict(merged)
        found = model(idx)
        assert (found - due).abs().max() > 0.1 and merged.keys() == before.keys()
        assert (again(idx) - found).abs().max() < 1e-5 * found.abs().max()
    assert_equal(base.state_dict(), before)
    model(idx, idx).backward()
    assert all((p.grad is not None) == (name in names) for name, p in model.named_parameters())


def test_a_lora_run_trains_and_keeps_the_corrections_alone(lab, monkeypatch, capsys):
    real, models = train.make_optimizers, []
    monkeypatch.setattr(train, "make_optimizers", lambda model, *args: models.append(model) or real(model, *args))
    assert tune(*LORA, "--max_iters=10") == 0
    model, base = models[0], weights("base")
    after = model.state_dict()
    assert_equal({name: after[name] for name in base}, base)
    for name in ("best.pt", "ckpt_00000010.pt"):
        state = ckpt.load_checkpoint(f"out/talk/{name}")
        assert state["model"].keys() == after.keys() - base.keys() and len(state["model"]) == 16
        assert all(name.endswith((".lora_A", ".lora_B")) for name in state["model"])
        assert state["base"] == ckpt.name_base("base", ckpt.read_run("base")[0])
        assert len(state["base"]["sha256"]) == 64 and state["base"]["path"] == "base"
    assert all(tensor.any() for tensor in state["model"].values())
    assert os.path.getsize("out/talk/best.pt") < os.path.getsize("base/best.pt") / 3
    merged, _, _ = ckpt.load_run("out/talk", "last")
    idx = torch.randint(20, (2, T))
    with torch.no_grad():
        assert (merged(idx) - model.eval()(idx)).abs().max() < 1e-5
    said, n = capsys.readouterr().err, sum(tensor.numel() for tensor in state["model"].values())
    assert f" parameters, {n:,} of them trained (LoRA): " in said
    assert tune(*LORA, "--max_iters=10") == 0 and "out/talk is finished: 10 steps" in capsys.readouterr().err


def test_lora_with_muon_goes_on_bit_for_bit(lab):
    """Which takes all corrections, so that AdamW has nothing to do."""
    for out, steps in (("a", 10), ("b", 5), ("b", 10)):
        tune(*LORA, "--optimizer=muon", f"--out_dir={out}", f"--max_iters={steps}")
    assert rows("a") == rows("b") and rows("a")[-1]["loss"] < rows("a")[0]["loss"]
    assert_equal(weights("a", "last"), weights("b", "last"))


def test_lora_on_a_lora_run_with_a_shorter_context(lab):
    """GPT-2's learned positions are cut; the base of the second is the merged first."""
    tune(*LORA, "--out_dir=a", "--max_iters=3", "--block_size=40")
    train.main([*CHAT, "--init_from=a", "--out_dir=b", "--lora_rank=1", "--max_iters=3"])
    model, _, run = ckpt.load_run("b")
    assert run["base"]["path"] == "a" and run["settings"]["block_size"] == model.config.block_size == 40
    a, b = weights("a"), weights("b")
    assert a.keys() == b.keys() and torch.equal(a["lm_head.weight"], b["lm_head.weight"])
    assert not torch.equal(a["transformer.h.0.mlp.c_fc.weight"], b["transformer.h.0.mlp.c_fc.weight"])
    train.main([*CHAT, "--init_from=b", "--out_dir=c", "--max_iters=1", "--block_size=32"])  # all weights again
    assert ckpt.load_run("c")[2]["base"] is None and ckpt.load_run("c")[0].config.block_size == 32


def test_a_base_that_is_gone_or_another(lab):
    shutil.copytree("base", "mine")
    argv = [*CHAT, "--init_from=mine", *LORA]
    train.main([*argv, "--max_iters=3"])
    os.rename("mine", "elsewhere")
    for use in (lambda _: ckpt.load_run("out/talk"), lambda _: train.main([*argv, "--max_iters=4"])):
        fact, fix = error(use)
        assert "out/talk is a LoRA of mine, which is missing" in fact
        assert "restore the old mine" in fix and "export.py" in fix
    os.rename("elsewhere", "mine")
    state = ckpt.load_checkpoint("mine/best.pt")
    state["model"]["lm_head.weight"][0, 0] += 1e-6
    ckpt.save_checkpoint("mine/best.pt", state)
    for use in (lambda _: ckpt.load_run("out/talk"), lambda _: train.main([*argv, "--max_iters=4"])):
        fact, fix = error(use)
        assert "is a LoRA of mine, which has changed" in fact and "restore the old mine" in fix


def test_what_people_get_wrong_with_lora(lab):
    for argv in (["--dataset=words", *TINY], ["--dataset=words", *TINY, "--init_from=scratch"]):
        fact, fix = error(train.main, *argv, "--lora_rank=8")
        assert "lora_rank=8 corrects weights, but init_from=" in fact and "--init_from=RUN" in fix
    assert not os.path.exists("out")
    tune(*LORA, "--max_iters=1")
    for argv, both in ((["--lora_rank=4", "--lora_alpha=4"], ("lora_rank=2", "lora_rank=4")),
                       (["--lora_rank=2", "--lora_alpha=8"], ("lora_alpha=4.0", "lora_alpha=8.0")),
                       ([], ("lora_rank=2", "lora_rank=0"))):
        fact, _ = error(lambda argv: tune(*argv), *argv, "--max_iters=2")
        assert all(value in fact for value in both)
    for argument in ("--lora_rank=-1", "--lora_alpha=0", "--patience=-1"):
        assert argument[2:].split("=")[0] in error(lambda argv: tune(*argv), argument)[0]


def test_a_lora_run_leaves_as_an_ordinary_model(lab):
    tune(*LORA, "--max_iters=3")
    assert export.main(["out/talk", "--format=hf", "--out=theirs"]) == 0
    found, tokenizer = ckpt.read_run("theirs/hf")
    model, _, _ = ckpt.load_run("out/talk")
    again, _, _ = ckpt.load_run("theirs/hf")
    due = huggingface.their_weights(model)
    assert_equal(huggingface.their_weights(again), due)
    assert found["chat"] is True and not any("lora" in name for name in due)
    assert not torch.equal(model.transformer.h[0].mlp.c_fc.weight, weights("base")["transformer.h.0.mlp.c_fc.weight"])


# ----------------------------------------------------------------------------------------------------------------------
# An end in time, and what it did


def validations(monkeypatch, *losses):
    """Let these be the next validation losses; after the last one, the process dies in a validation."""
    losses = iter(losses)

    def sums(*_):
        for loss in losses:
            return loss, 1
        raise ZeroDivisionError
    monkeypatch.setattr(datasets, "validation_sums", sums)


PATIENT = ["--dataset=words", *TINY, "--eval_interval=2", "--lr_decay_iters=20", "--max_iters=20", "--patience=2"]


def test_a_run_ends_when_nothing_gets_better(lab, monkeypatch, capsys):
    validations(monkeypatch, 3.0, 2.0, 2.5, 2.0)
    assert train.main([*PATIENT, "--out_dir=a"]) == 0
    shown = capsys.readouterr().err
    assert "stopping early (patience=2): lowest loss 2.0000" in shown
    assert "finished: 8 steps" in shown and "a/best.pt: validation loss 2.0000 after 4 steps" in shown
    assert ckpt.load_checkpoint("a/best.pt")["step"] == 4 and ckpt.checkpoints("a")[-1].endswith("00000008.pt")
    assert train.main([*PATIENT, "--out_dir=a"]) == 0
    assert "a is finished: 8 steps, ended by patience=2, validation loss 2.0000" in capsys.readouterr().err
    # Killed in a validation, it comes to the same end.
    validations(monkeypatch, 3.0, 2.0)
    with pytest.raises(ZeroDivisionError):
        train.main([*PATIENT, "--out_dir=b"])
    validations(monkeypatch, 2.5, 2.0)
    assert train.main([*PATIENT, "--out_dir=b"]) == 0 and "resumed b after 6 of 20" in capsys.readouterr().err
    assert_same_run("a", "b", 8)
    # More patience: it goes on from there, until it has read enough.
    validations(monkeypatch, 2.0, 1.5, *[1.6] * 9)
    assert train.main([*PATIENT, "--out_dir=b", "--patience=5"]) == 0
    assert ckpt.load_checkpoint("b/best.pt")["step"] == 10 and rows("b")[-1]["step"] == 20


def test_saving_seldom_does_not_change_where_patience_ends(lab, monkeypatch):
    """The end is saved by itself, though nothing else was due; before it, only the first validation."""
    validations(monkeypatch, 3.0, 3.1, 3.2)
    seldom = [*PATIENT, "--save_interval=100", "--always_save_checkpoint=false"]
    assert train.main(seldom) == 0
    assert [os.path.basename(path) for path in ckpt.checkpoints("out/words")] == [
        "ckpt_00000002.pt", "ckpt_00000006.pt"]
    assert train.main(seldom) == 0


def test_before_and_after_are_shown(lab, capsys):
    base = datasets.Dataset.open("data/talk")
    tune("--eval_only")
    due = capsys.readouterr().err
    loss = due.rsplit("validation loss ", 1)[1]
    bits = loss.split(", ")[1].split()[0]
    tune("--max_iters=3")
    assert f"validation loss {loss}" in capsys.readouterr().err
    tune("--max_iters=5")
    shown = capsys.readouterr()
    before, after = shown.err.split(f"--- before: {bits} bits per byte ---\n")[1].split("\n--- after: ")
    row = rows("out/talk")[-1]
    assert after.startswith(f"{row['val_bpb']:.4f} bits per byte, -")
    question = base.load_tokenizer().decode(base.prompt(T))
    assert before.startswith(question + " -> ") and shown.out.startswith(question + " -> ")
    epochs = 5 * 4 / base.n_windows(T)
    assert f"5 steps = {epochs:.1f} epochs" in shown.err and row["epoch"] == pytest.approx(epochs)
    assert f"finished: 5 steps = {epochs:.1f} epochs in " in shown.err and ", peak memory " in shown.err


def test_a_run_from_scratch_has_no_before(lab, capsys):
    train.main(["--dataset=talk", *TINY, f"--block_size={T}", "--max_iters=2"])
    shown = capsys.readouterr().err
    assert "before" not in shown and "--- after" not in shown
    assert ckpt.load_checkpoint("out/talk/best.pt")["before"] is None


# ----------------------------------------------------------------------------------------------------------------------


def test_runs_of_an_older_version_go_on(lab, capsys):
    """Their checkpoints know nothing of all this."""
    argv = ["--dataset=words", *TINY, "--max_iters=10", "--lr_decay_iters=20"]
    train.main([*argv, "--out_dir=a"])
    shutil.copytree("a", "b")
    for path in ("b/best.pt", "b/ckpt_00000010.pt"):
        state = ckpt.load_checkpoint(path)
        for name in ("chat", "base", "before"):
            del state[name]
        for name in ("lora_rank", "lora_alpha", "patience"):
            del state["settings"][name]
        ckpt.save_checkpoint(path, state)
    for more in ([], ["--patience=2"]):
        capsys.readouterr()
        assert train.main([*argv, "--out_dir=b", *more]) == 0
        assert "b is finished: 10 steps" in capsys.readouterr().err
    for out in "ab":
        train.main([*argv, f"--out_dir={out}", "--max_iters=20", "--patience=9"])
    assert_equal(weights("a", "last"), weights("b", "last"))
    assert [row["loss"] for row in rows("a")] == [row["loss"] for row in rows("b")]
    assert "lora_rank=0" in error(train.main, *argv, "--out_dir=b", "--max_iters=21", "--lora_rank=4")[0]
    tune("--init_from=b", "--max_iters=1")
    assert ckpt.read_run("b")[0]["chat"] is False


def test_corrections_that_are_damaged_are_refused(lab):
    assert train.main([*CHAT, *LORA, "--max_iters=2", "--out_dir=a"]) == 0
    state = ckpt.load_checkpoint("a/best.pt")
    name = next(name for name in state["model"] if name.endswith("lora_A"))

    def fact(**changes):
        ckpt.save_checkpoint("a/best.pt", {**state, **changes})
        return error(lambda _: ckpt.load_run("a"))[0]

    without = {key: value for key, value in state["model"].items() if key != name}
    assert "do not fit: KeyError" in fact(model=without)
    assert "do not fit: ValueError: there are none" in fact(model={})
    for change in (lambda A: A[:1], lambda A: A[:, :1], lambda A: torch.ones(2, 10**6)):  # (one product would be TBs)
        assert "do not fit: ValueError" in fact(model=state["model"] | {name: change(state["model"][name])})
    assert "base is of type str" in fact(base="base")
    assert "base.path is missing" in fact(base={})
    for shape in (dict(vocab_size=10**7), dict(n_layer=10**6)):  # which is that of the base, or else
        assert "a: " in (found := fact(settings=state["settings"] | shape)) or "a is not a valid model" in found


def test_another_mask_is_other_data(lab):
    assert train.main([*CHAT, "--max_iters=2", "--out_dir=a"]) == 0
    shutil.copytree("data/talk", "data/other")
    meta = json.loads(open("data/other/meta.json").read())
    mask = bytes([1]) * meta["train"]["tokens"]
    open("data/other/train.mask.bin", "wb").write(mask)
    meta["train"] |= dict(mask_sha256=hashlib.sha256(mask).hexdigest(), trained=len(mask))
    open("data/other/meta.json", "w").write(json.dumps(meta))
    again = [*CHAT, "--max_iters=4", "--out_dir=a", "--dataset=other"]
    assert "a holds a run on talk, not on other: it was started with data=" in error(train.main, *again)[0]
    for change in (dict(chat=False), dict(special={})):
        open("data/other/meta.json", "w").write(json.dumps(meta | change))
        fact = error(train.main, *CHAT, "--out_dir=b", "--dataset=other")[0]
        assert "is not valid format 1" in fact or "special.<|endoftext|> is missing" in fact

# SPDX-License-Identifier: GPL-3.0-only
"""A full disk, damaged files and changed data: what is on the disk stays whole, and what is not is named. Rows of
docs/reliability.md."""
import json
import os
import random
import shutil
import signal

import faults
import pytest
import torch
from conftest import error, prepare_words, whole, words
from faults import STEPS, digest, outcome, said

import evaluate
import export
from training import checkpoint as ckpt
import sample
from runtime.console import UserError


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return faults.Reference(tmp_path_factory.mktemp("reference"), prepare_words)


@pytest.fixture
def lab(reference, tmp_path):
    """A fresh folder with data/words; `finish` holds the run in it against one that nothing happened to."""
    return faults.Lab(reference, tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# The disk


def test_a_full_disk_does_not_end_a_run(lab):  # row 8
    """Saves 3 to 9 fail: the run goes on, says so, and is the same in the end."""
    assert lab.start(fault="full_disk:3,9").wait() == 0
    assert said(lab.path).count("warning: cannot write out/words/") == 7 and "No space left" in said(lab.path)
    lab.finish()


@pytest.mark.parametrize("fault", ["full_disk:8,99", "full_disk:1,99", "small_files:100000"])
def test_a_disk_that_is_full_at_the_end(lab, fault):  # row 8; small_files: the system itself refuses (RLIMIT_FSIZE)
    assert lab.start(fault=fault).wait() == 1
    assert "error: cannot write out/words/" in said(lab.path) and "fix: free disk space" in said(lab.path)
    assert not any(name.endswith(".part") for name in os.listdir(lab.run))
    assert lab.check_files() == (2 if fault == "full_disk:8,99" else 0)
    lab.finish()


def test_disk_full_at_many_offsets(lab, tmp_path, monkeypatch):  # row 8
    """Whatever fits: the old checkpoint stays, nothing half-written is left, and the error is ours."""
    monkeypatch.chdir(tmp_path)
    state = ckpt.load_checkpoint(lab.reference / f"out/a/ckpt_{STEPS:08d}.pt")
    ckpt.save_checkpoint("a.pt", state)
    size, due = os.path.getsize("a.pt"), digest("a.pt")
    real = torch.save
    for left in range(0, size, size // 50):
        monkeypatch.setattr(torch, "save", lambda state, file: real(state, faults.Cut(file, left, faults.full)))
        assert "cannot write a.pt" in error(lambda _: ckpt.save_checkpoint("a.pt", state))[0]
        assert digest("a.pt") == due and sorted(os.listdir()) == ["a.pt", "data"]


def test_a_log_that_cannot_be_written_waits(lab):  # rows 8 and 31
    assert lab.start(fault="full_log:17,23").wait() == 0
    assert said(lab.path).count("warning: cannot write out/words/log.jsonl") == 7
    lab.finish()


def test_a_listener_that_leaves_does_not_end_a_run(lab):
    """python train.py ... 2>&1 | head"""
    assert lab.start(fault="nobody_listens:10").wait() == 0
    lab.finish()


def test_the_tokenizer_of_a_run_is_that_of_its_data(lab):
    """One that was deleted comes back; another one that lies there is kept under another name."""
    assert lab.start(fault=f"signal_at_step:{signal.SIGTERM},9").wait() == 143
    (lab.run / "tokenizer/config.json").write_text("{}")
    assert lab.start(fault=f"signal_at_step:{signal.SIGTERM},19").wait() == 143
    assert (lab.run / "tokenizer.damaged/config.json").read_text() == "{}"
    shutil.rmtree(lab.run / "tokenizer.damaged")
    shutil.rmtree(lab.run / "tokenizer")
    lab.finish()
    assert ckpt.load_run(str(lab.run))[1].vocab_size == 25


def test_best_is_written_anew_where_it_cannot_be_used(lab):
    assert lab.start(fault=f"signal_at_step:{signal.SIGTERM},20").wait() == 143
    (lab.run / "best.pt").write_bytes(b"PK")
    shutil.copy(lab.reference / "out/a/best.pt", lab.run / "ckpt_00000099.pt")  # it is none to go on from
    assert lab.start().wait() == 0
    assert "ckpt_00000099.pt has no optimizer" in said(lab.path) and "best.pt cannot be used" in said(lab.path)
    os.unlink(lab.run / "ckpt_00000099.pt.damaged")
    lab.finish()
    state = ckpt.load_checkpoint(str(lab.run / f"ckpt_{STEPS:08d}.pt"))
    state["optimizer"][0]["state"].popitem()
    ckpt.save_checkpoint(str(lab.run / f"ckpt_{STEPS:08d}.pt"), state)
    assert lab.start(f"--max_iters={STEPS + 10}").wait() == 2 and "out/words: the optimizers.0.state." in said(lab.path)


def test_a_budget_for_a_run_that_was_stopped(lab):
    """It is counted by a clock that nobody can set."""
    assert lab.start(f"--lr_decay_iters={STEPS}", fault=f"signal_at_step:{signal.SIGTERM},20").wait() == 143
    fault = f"clock_is_set:20;signal_at_step:{signal.SIGTERM},25"
    assert lab.start(f"--lr_decay_iters={STEPS}", "--budget=1h", fault=fault).wait() == 143
    assert "budget: enough for" in said(lab.path)


@pytest.mark.parametrize("out_dir", ["words.txt", "words.txt/out", "/proc/nothing/here", "locked/out"])
def test_a_folder_that_cannot_be_written(lab, out_dir):  # row 9
    (lab.path / "words.txt").write_text("a file")
    os.makedirs(lab.path / "locked", mode=0o500)
    if out_dir == "locked/out" and os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    assert lab.start(f"--out_dir={out_dir}").wait() == 2
    assert f"error: cannot write to out_dir={out_dir}" in said(lab.path) and "step 1/" not in said(lab.path)


def test_a_disk_with_little_room_is_warned_of(lab):  # row 8
    assert lab.start("--max_iters=1", fault="little_room").wait() == 0
    assert "warning: the checkpoints need" in said(lab.path) and "1 MB left" in said(lab.path)


def test_retention(tmp_path, monkeypatch):  # row 24
    """100 saves, failing saves, kills and rotting files in any order: never fewer than two good ones; one after rot."""
    monkeypatch.chdir(tmp_path)
    rng, step = random.Random(11), 0
    good, event, real, small = [], "", torch.save, whole()
    for _ in range(100):
        step += rng.randrange(1, 5)
        event = "save" if event == "rot" else rng.choice(["save", "save", "save", "full", "kill", "rot"])
        state = dict(small, step=step, row=dict(small["row"], step=step))
        path = f"ckpt_{step:08d}.pt"
        if event == "save":
            ckpt.save_checkpoint(path, state)
            ckpt.prune_checkpoints(".")
            good.append(step)
        elif event == "full":
            with monkeypatch.context() as patch:
                patch.setattr(torch, "save", lambda state, file: real(state, faults.Cut(file, 100, faults.full)))
                error(lambda _: ckpt.save_checkpoint(path, state))
        elif event == "kill":
            (tmp_path / (path + ".part")).write_bytes(b"half")
        elif good:  # the newest rots on the disk; the run goes back to the one before
            (tmp_path / f"ckpt_{good[-1]:08d}.pt").write_bytes(b"rotten")
            good.pop()
            step = good[-1] if good else 0
            with ckpt.RunFolder(".") as folder:
                folder.make_ready(step, 0)
        kept = 1 if event == "rot" else 2
        assert all(ckpt.load_checkpoint(f"ckpt_{s:08d}.pt")["step"] == s for s in good[-kept:])
        if good:
            assert ckpt.find_checkpoint("auto", ".")["step"] == good[-1]


def test_the_disk_is_told_in_the_right_order(lab, tmp_path, monkeypatch):  # row 4
    """Power loss: the bytes are on the disk before their name is, and the name before the oldest one is deleted."""
    monkeypatch.chdir(tmp_path)
    done, state = [], ckpt.load_checkpoint(lab.reference / "out/a/best.pt")
    for name in ("fsync", "replace", "unlink"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (done.append(name), real(*a))[1])
    for step in (1, 2, 3):
        ckpt.save_checkpoint(f"ckpt_{step:08d}.pt", state)
        ckpt.prune_checkpoints(".")
    assert done == ["fsync", "replace", "fsync"] * 3 + ["unlink"]


# ----------------------------------------------------------------------------------------------------------------------
# Files that are not what they were


def test_truncated_checkpoints(lab, capsys):  # row 10
    """Cut at 50 places, the newest one is passed over for the one before, from which the run ends the same."""
    shutil.copytree(lab.reference / "out/a", lab.run)
    path = lab.run / f"ckpt_{STEPS:08d}.pt"
    raw = path.read_bytes()
    for size in range(0, len(raw), len(raw) // 49):
        path.write_bytes(raw[:size])
        assert ckpt.find_checkpoint("auto", str(lab.run))["step"] == 28
        assert f"{path} is damaged" in capsys.readouterr().err
    lab.finish()
    for name in ("ckpt_00000028.pt", "ckpt_00000030.pt"):
        (lab.run / name).write_bytes(b"PK")
    assert lab.start().wait() == 2 and "out/words/ckpt_00000028.pt is damaged" in said(lab.path)


def test_flipped_bits(lab, tmp_path):  # row 11
    """200 random single bits: each is noticed, or makes no difference to any number that was saved."""
    rng, noticed = random.Random(5), 0
    raw = (lab.reference / f"out/a/ckpt_{STEPS:08d}.pt").read_bytes()
    due = digest(lab.reference / f"out/a/ckpt_{STEPS:08d}.pt")
    tail = len(raw) - 12_000  # the directory of the file, where a flip is most likely to be taken for something else
    for i in range(200):
        at = rng.randrange(tail, len(raw)) if i % 2 else rng.randrange(len(raw))
        flipped = bytearray(raw)
        flipped[at] ^= 1 << rng.randrange(8)
        (tmp_path / "flipped.pt").write_bytes(flipped)
        try:
            assert digest(tmp_path / "flipped.pt") == due, f"a bit at {at} of {len(raw)} went unnoticed"
        except UserError as found:
            assert "damaged" in found.fact or "could run code" in found.fact or "not a checkpoint" in found.fact
            noticed += 1
    assert noticed > 100


def test_malicious_checkpoints_are_refused(lab, monkeypatch):  # row 12
    monkeypatch.chdir(lab.path)
    os.makedirs("out/words")

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(lab.path / "pwned"),)
    for name in ("ckpt_00000005.pt", "best.pt"):
        torch.save(dict(ckpt.load_checkpoint(lab.reference / "out/a/best.pt"), model=Evil()), f"out/words/{name}")
    for argv in ([], ["--init_from=out/words/best.pt", "--out_dir=out/b"]):
        assert lab.start(*argv).wait() == 2
        assert "could run code" in said(lab.path)
        os.unlink("said.0")
    for main in (sample.main, evaluate.main, export.main):
        assert "could run code" in error(main, "out/words")[0]
    assert not os.path.exists("pwned")


def test_a_checkpoint_of_another_run_is_refused(lab):  # row 13
    """Shape, tokenizer, data, schedule, format: exit 2, with both values."""
    assert lab.start("--max_iters=5").wait() == 0
    for argv, both in ((["--n_embd=32"], ("n_embd=64", "n_embd=32")),
                       (["--batch_size=3"], ("batch_size=4", "batch_size=3")),
                       (["--weight_decay=1"], ("weight_decay=0.1", "weight_decay=1.0")),
                       (["--init_from=scratch"], ("init_from=scratch", "ckpt_00000005.pt"))):
        assert lab.start(*argv).wait() == 2
        assert all(value in said(lab.path) for value in both)
    (lab.path / "other.txt").write_text(words(20_000, seed=3) + "0123456789")
    assert lab.start("other.txt", "--tokenizer=char", script="prepare").wait() == 0
    assert lab.start("--dataset=other", "--out_dir=out/words").wait() == 2
    assert "tokenizer=" in said(lab.path) and "data=" in said(lab.path)
    path = str(lab.run / "ckpt_00000005.pt")
    ckpt.save_checkpoint(path, dict(ckpt.load_checkpoint(path), format=2))
    assert lab.start().wait() == 2 and "not a checkpoint of this project (no format 1)" in said(lab.path)


def test_a_run_of_an_older_version_is_not_continued(lab):
    """It read its data in another order. It can be measured, give its weights to a new run, and be finished."""
    assert lab.start("--max_iters=7", f"--lr_decay_iters={STEPS}").wait() == 0
    for name in ("ckpt_00000005.pt", "ckpt_00000007.pt", "best.pt"):
        state = ckpt.load_checkpoint(str(lab.run / name))
        del state["order"]
        ckpt.save_checkpoint(str(lab.run / name), state)
    assert lab.start(f"--lr_decay_iters={STEPS}").wait() == 2
    assert "error: out/words is from an older version, which read the data in a different order" in said(lab.path)
    assert "fix: --init_from=out/words --out_dir=out/ANOTHER" in said(lab.path)
    assert lab.start("--max_iters=7", f"--lr_decay_iters={STEPS}").wait() == 0
    assert "out/words is finished" in said(lab.path)
    assert lab.start(f"--lr_decay_iters={STEPS}", "--eval_only").wait() == 0
    assert lab.start("--max_iters=2", "--init_from=out/words", "--out_dir=out/new").wait() == 0
    assert ckpt.load_run(str(lab.run))[2]["step"] == 7


@pytest.mark.parametrize("damage", ["short", "odd", "empty", "flipped", "uint32", "beyond", "gone", "tokenizer"])
def test_data_that_is_damaged(lab, damage):  # rows 25 and 26
    """Exit 2 and the file's name before the first step; also when it happens between two resumes."""
    os.unlink(lab.path / "data")
    shutil.copytree(lab.reference / "data", lab.path / "data")
    assert lab.start("--max_iters=6", f"--lr_decay_iters={STEPS}").wait() == 0
    folder = lab.path / "data/words"
    raw = (folder / "train.bin").read_bytes()
    meta = json.loads((folder / "meta.json").read_text())
    file = "train.bin"
    if damage in ("short", "odd", "empty", "flipped"):
        changed = dict(short=raw[:-200], odd=raw[:-1], empty=b"", flipped=raw[:1000] + b"\1" + raw[1001:])[damage]
        (folder / "train.bin").write_bytes(changed)
    elif damage == "uint32":
        meta["dtype"] = "uint32"
    elif damage == "beyond":
        meta["vocab_size"] = 20
    elif damage == "gone":
        os.unlink(folder / "val.bin")
        file = "val.bin"
    else:
        (folder / "tokenizer/vocab.json").write_text(json.dumps(list("abc")))
        file = "tokenizer"
    (folder / "meta.json").write_text(json.dumps(meta))
    for argv in ([f"--lr_decay_iters={STEPS}"], ["--out_dir=out/new"]):
        before = len(said(lab.path))
        assert lab.start(*argv).wait() == 2
        assert "step 7/" not in said(lab.path)[before:] and file in said(lab.path)[before:]


@pytest.fixture
def own_data(lab):
    """The lab with data of its own, which a test may change."""
    os.unlink(lab.path / "data")
    shutil.copytree(lab.reference / "data", lab.path / "data")
    return lab


@pytest.mark.parametrize("command, saved", [
    ("cp data/words/val.bin data/words/train.bin", 11),  # shorter: noticed when it is read
    ("dd if=/dev/zero of=data/words/train.bin bs=1 count=1 conv=notrunc 2> /dev/null", 14)])  # by the next validation
def test_data_that_change_while_a_run_reads_them(own_data, command, saved):
    lab = own_data
    assert lab.start(fault=f"shell:12,{command}").wait() == 2
    assert "data/words" in said(lab.path) and f"the run is saved at step {saved}\n" in said(lab.path)
    assert os.path.exists(lab.run / f"ckpt_{saved:08d}.pt") and "Traceback" not in said(lab.path)
    shutil.copy(lab.reference / "data/words/train.bin", lab.path / "data/words/train.bin")
    assert lab.start().wait() == 0
    if saved == 11:  # no step has read the other text
        assert outcome(lab.run) == lab.due


def test_data_that_are_deleted_while_a_run_reads_them(own_data):
    assert own_data.start(fault="shell:12,rm -r data").wait() == 0
    assert outcome(own_data.run) == own_data.due and "next: python sample.py out/words" in said(own_data.path)



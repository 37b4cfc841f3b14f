# SPDX-License-Identifier: GPL-3.0-only
"""Kill it at any moment and run the same command again: the same bits. The rows of docs/reliability.md."""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import faults
import pytest
import torch
from conftest import ROOT, error, prepare_words, whole, words
from faults import STEPS, Run, digest, outcome, said

import evaluate
import export
from training import checkpoint as ckpt
import sample
from runtime.console import UserError


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """(a folder with data/words, the outcome of an undisturbed run, the digest of the state after every step)."""
    folder = tmp_path_factory.mktemp("reference")
    prepare_words(folder)
    assert Run(folder, "--out_dir=out/a").wait() == 0
    started = time.monotonic()
    assert Run(folder, "--out_dir=out/b").wait() == 0
    took = time.monotonic() - started
    assert Run(folder, "--out_dir=out/all", "--save_interval=1", fault="keep_all").wait() == 0
    states = {step: digest(folder / f"out/all/ckpt_{step:08d}.pt") for step in range(1, STEPS + 1)}
    due = outcome(folder / "out/a")
    assert due[0] == states[STEPS] and [row["step"] for row in due[1]] == list(range(1, STEPS + 1))
    return folder, due, states, took


@pytest.fixture
def lab(reference, tmp_path):
    """A fresh folder with the data; `check` holds a run in it against the undisturbed one."""
    folder, due, states, took = reference
    os.symlink(folder / "data", tmp_path / "data")

    class Lab:
        path, run = tmp_path, tmp_path / "out/words"

        def start(self, *argv, **kw):
            return Run(tmp_path, *argv, **kw)

        def check_files(self):
            """Whatever has happened: every checkpoint that bears its name is whole, and is what it should be."""
            paths = ckpt.checkpoints(str(self.run))
            for path in paths:
                assert digest(path) == states[int(path[-11:-3])], path
            return len(paths)

        def finish(self):
            assert Run(tmp_path).wait() == 0, said(tmp_path)
            assert outcome(self.run) == due
            files = {name for name in os.listdir(self.run) if not name.startswith("ckpt_")}
            assert files == {"best.pt", "log.jsonl", "loss.svg", "tokenizer"} and self.check_files() == 2
    lab = Lab()
    lab.reference, lab.due, lab.took = folder, due, took
    return lab


# ----------------------------------------------------------------------------------------------------------------------
# Stopped, killed, interrupted


@pytest.mark.parametrize("step", [1, 5, 6, 29, 59])  # row 1
def test_stop_after_a_step(lab, step):
    assert lab.start(fault=f"signal_at_step:{signal.SIGTERM},{step + 1}").wait() == 143
    assert os.path.exists(lab.run / f"ckpt_{step:08d}.pt") and lab.check_files()
    lab.finish()


def test_ten_resumes_in_a_chain(lab):  # row 5
    for stop in range(6, 60, 6):
        assert lab.start(fault=f"signal_at_step:{signal.SIGTERM},{stop}").wait() == 143
    assert lab.start(fault=f"signal_at_step:{signal.SIGTERM},60").wait() == 143
    assert said(lab.path).count("resumed") == 9
    lab.finish()


def test_kill_9_at_random_moments(lab):  # rows 2 and 31
    """20 kills spread evenly over the length of a run; one that came to its end is checked and begun anew."""
    rng, killed = random.Random(7), 0
    while killed < 20:
        run = lab.start()
        time.sleep(rng.uniform(0, lab.took))
        if run.kill() == -9:
            killed += 1
            lab.check_files()
        else:
            lab.finish()
            shutil.rmtree(lab.run)
    lab.finish()


# Around every system call that matters and in the middle of the bytes: of checkpoints, best.pt, log and picture.
POINTS = [f"die_{when}:{what},{nth}" for what, calls in (("fsync", range(5, 9)), ("replace", range(1, 9)),
                                                         ("unlink", range(2, 6)))
          for nth in calls for when in ("before", "after")]
POINTS += [f"die_in_bytes:{nth},{size}" for nth in (2, 3, 5) for size in (0, 1000, 200_000, 400_000)]


@pytest.mark.parametrize("part", range(4))
def test_kill_9_inside_a_save(lab, part):  # row 3
    """One point after the other in the same run, so that each has to resume what the last has left."""
    points = POINTS[part::4]
    while points:
        code = lab.start(fault=points[0]).wait()
        if code == 9:
            lab.check_files()
            points.pop(0)
        else:  # it came to its end before the point
            assert code == 0
            lab.finish()
            shutil.rmtree(lab.run)
    lab.finish()


# ----------------------------------------------------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("fault, step", [
    ("signal_at_step:{},1", 0), ("signal_at_step:{},18", 17), ("signal_in_validation:{},3", 7),
    ("signals_in_save:{},4,1", 10), ("signal_while_opening:{}", None)])
def test_one_signal_saves_and_stops(lab, fault, step, number):  # rows 6 and 32
    """In the first step, a later one, a validation, a save (finished, and once), and before there is anything."""
    code = lab.start(fault=fault.format(number.value)).wait()
    if step is None:  # nothing is lost yet: the signal just ends it
        assert code in (-number, 128 + number)
    else:
        assert code == 128 + number
        assert f"stopped by {number.name} after {step} steps" in said(lab.path)
        assert not os.path.exists(lab.run) or step == 0 or os.path.exists(lab.run / f"ckpt_{step:08d}.pt")
        assert not any(name.endswith(".part") for name in os.listdir(lab.run))
    lab.finish()


def test_a_closed_terminal_saves(lab):
    """SIGHUP comes when the terminal is closed; under nohup it is ignored, and the run continues."""
    assert lab.start(fault=f"signal_at_step:{signal.SIGHUP},34").wait() == 129
    assert os.path.exists(lab.run / "ckpt_00000033.pt") and "stopped by SIGHUP after 33 steps" in said(lab.path)
    assert lab.start(fault=f"ignore_hangup;signal_at_step:{signal.SIGHUP},40").wait() == 0
    lab.finish()


def test_a_signal_while_nobody_reads_standard_error(lab):
    assert lab.start(fault=f"nobody_reads:16;signal_at_step:{signal.SIGTERM},18").wait() == 143
    assert os.path.exists(lab.run / "ckpt_00000017.pt")
    lab.finish()


def test_a_second_signal_ends_at_once(lab):  # row 7
    assert lab.start(fault=f"signals_in_save:{signal.SIGTERM},4,2").wait() == -signal.SIGTERM
    assert lab.check_files() == 2 and not os.path.exists(lab.run / "ckpt_00000010.pt")  # 5 and 7; 10 was being saved
    lab.finish()


# ----------------------------------------------------------------------------------------------------------------------
# The disk


def test_a_full_disk_does_not_end_a_run(lab):  # row 8
    """Saves 3 to 9 fail: the run goes on, says so, and is the same in the end."""
    assert lab.start(fault="full_disk:3,9").wait() == 0
    assert said(lab.path).count("warning: cannot write out/words/") == 7 and "No space left" in said(lab.path)
    lab.finish()


@pytest.mark.parametrize("fault", ["full_disk:13,99", "full_disk:1,99", "small_files:100000"])
def test_a_disk_that_is_full_at_the_end(lab, fault):  # row 8; small_files: the system itself refuses (RLIMIT_FSIZE)
    assert lab.start(fault=fault).wait() == 1
    assert "error: cannot write out/words/" in said(lab.path) and "fix: make room" in said(lab.path)
    assert not any(name.endswith(".part") for name in os.listdir(lab.run))
    assert lab.check_files() == (2 if fault == "full_disk:13,99" else 0)
    lab.finish()


def test_disk_full_at_many_offsets(lab, tmp_path, monkeypatch):  # row 8
    """Whatever fits: the old checkpoint stays, nothing half-written is left, and the error is ours."""
    monkeypatch.chdir(tmp_path)
    state = ckpt.load_checkpoint(lab.reference / "out/a/ckpt_00000060.pt")
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
    state = ckpt.load_checkpoint(str(lab.run / "ckpt_00000060.pt"))
    state["optimizer"][0]["state"].popitem()
    ckpt.save_checkpoint(str(lab.run / "ckpt_00000060.pt"), state)
    assert lab.start("--max_iters=70").wait() == 2 and "out/words: the optimizers.0.state." in said(lab.path)


def test_a_budget_for_a_run_that_was_stopped(lab):
    """It is counted by a clock that nobody can set."""
    assert lab.start("--lr_decay_iters=60", fault=f"signal_at_step:{signal.SIGTERM},20").wait() == 143
    fault = f"clock_is_set:20;signal_at_step:{signal.SIGTERM},30"
    assert lab.start("--lr_decay_iters=60", "--budget=1h", fault=fault).wait() == 143
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
    assert "warning: the checkpoints will take" in said(lab.path) and "1 MB left" in said(lab.path)


# ----------------------------------------------------------------------------------------------------------------------
# Files that are not what they were


def test_truncated_checkpoints(lab, capsys):  # row 10
    """Cut at 50 places, the newest one is passed over for the one before, from which the run ends the same."""
    shutil.copytree(lab.reference / "out/a", lab.run)
    path = lab.run / "ckpt_00000060.pt"
    raw = path.read_bytes()
    for size in range(0, len(raw), len(raw) // 49):
        path.write_bytes(raw[:size])
        assert ckpt.find_checkpoint("auto", str(lab.run))["step"] == 56
        assert f"{path} is damaged" in capsys.readouterr().err
    lab.finish()
    for name in ("ckpt_00000056.pt", "ckpt_00000060.pt"):
        (lab.run / name).write_bytes(b"PK")
    assert lab.start().wait() == 2 and "out/words/ckpt_00000056.pt is damaged" in said(lab.path)


def test_flipped_bits(lab, tmp_path):  # row 11
    """200 random single bits: each is noticed, or makes no difference to any number that was saved."""
    rng, noticed = random.Random(5), 0
    raw = (lab.reference / "out/a/ckpt_00000060.pt").read_bytes()
    due = digest(lab.reference / "out/a/ckpt_00000060.pt")
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
    assert lab.start("--max_iters=7", "--lr_decay_iters=60").wait() == 0
    for name in ("ckpt_00000005.pt", "ckpt_00000007.pt", "best.pt"):
        state = ckpt.load_checkpoint(str(lab.run / name))
        del state["order"]
        ckpt.save_checkpoint(str(lab.run / name), state)
    assert lab.start("--lr_decay_iters=60").wait() == 2
    assert "error: out/words was begun by an older version, which read the data in another order" in said(lab.path)
    assert "fix: --init_from=out/words --out_dir=out/ANOTHER" in said(lab.path)
    assert lab.start("--max_iters=7", "--lr_decay_iters=60").wait() == 0 and "out/words is finished" in said(lab.path)
    assert lab.start("--lr_decay_iters=60", "--eval_only").wait() == 0
    assert lab.start("--max_iters=2", "--init_from=out/words", "--out_dir=out/new").wait() == 0
    assert ckpt.load_run(str(lab.run))[2]["step"] == 7


@pytest.mark.parametrize("damage", ["short", "odd", "empty", "flipped", "uint32", "beyond", "gone", "tokenizer"])
def test_data_that_is_damaged(lab, damage):  # rows 25 and 26
    """Exit 2 and the file's name before the first step; also when it happens between two resumes."""
    os.unlink(lab.path / "data")
    shutil.copytree(lab.reference / "data", lab.path / "data")
    assert lab.start("--max_iters=6", "--lr_decay_iters=60").wait() == 0
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
    for argv in (["--lr_decay_iters=60"], ["--out_dir=out/new"]):
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
    assert "data/words" in said(lab.path) and f"the run is saved after {saved} steps" in said(lab.path)
    assert os.path.exists(lab.run / f"ckpt_{saved:08d}.pt") and "Traceback" not in said(lab.path)
    shutil.copy(lab.reference / "data/words/train.bin", lab.path / "data/words/train.bin")
    assert lab.start().wait() == 0
    if saved == 11:  # no step has read the other text
        assert outcome(lab.run) == lab.due


def test_data_that_are_deleted_while_a_run_reads_them(own_data):
    assert own_data.start(fault="shell:12,rm -r data").wait() == 0
    assert outcome(own_data.run) == own_data.due and "next: python sample.py out/words" in said(own_data.path)


def test_a_run_ends_with_the_prepare_that_it_has_started(lab):
    stdlib = ["--dataset=stdlib", "--max_iters=1"]
    assert lab.start(*stdlib, fault="prepare_by:exit 3").wait() == 2
    assert "error: prepare.py stdlib has failed" in said(lab.path)
    run = lab.start(*stdlib, fault="prepare_by:echo $$ > pid && exec sleep 60")
    while not (lab.path / "pid").exists() or not (lab.path / "pid").read_text():
        time.sleep(0.05)
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.wait() == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int((lab.path / "pid").read_text()), 0)


def test_prepare_killed_at_random_moments(lab):  # row 27
    """A folder data/NAME is whole or not there, and the next try writes the same bytes."""
    os.unlink(lab.path / "data")
    (lab.path / "books.txt").write_text(words(300_000, seed=2))
    argv = ["books.txt", "--vocab_size=300"]

    def files():
        paths = [path for path in (lab.path / "data").rglob("*") if path.is_file() and path.suffix != ".lock"]
        return {path.relative_to(lab.path): path.read_bytes() for path in paths}
    started = time.monotonic()
    assert Run(lab.path, *argv, script="prepare").wait() == 0
    took, due, rng, killed = time.monotonic() - started, files(), random.Random(3), 0
    while killed < 20:
        shutil.rmtree(lab.path / "data", ignore_errors=True)
        run = Run(lab.path, *argv, script="prepare")
        time.sleep(rng.uniform(0, took))
        killed += run.kill() == -9
        assert not (lab.path / "data/books").exists() or files() == due
    assert Run(lab.path, *argv, script="prepare").wait() == 0 and files() == due


# ----------------------------------------------------------------------------------------------------------------------
# Numbers, bugs, bystanders


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_no_number(lab, value):  # row 15
    """Stopped before the step, exit 3; the last checkpoint is the state before it; best.pt is untouched."""
    assert lab.start("--save_interval=1", fault=f"bad_loss:13,{value}").wait() == 3
    assert f"error: at step 13 the loss is {value}" in said(lab.path)
    assert "last good checkpoint: out/words/ckpt_00000012.pt" in said(lab.path)
    assert lab.check_files() == 2 and os.path.exists(lab.run / "ckpt_00000012.pt")
    assert ckpt.load_checkpoint(str(lab.run / "best.pt"))["step"] == 7
    lab.finish()


def test_a_bug_in_the_validation_costs_nothing(lab):  # row 20
    assert lab.start(fault="crash_in_validation").wait() == 1
    assert "ZeroDivisionError" in said(lab.path) and os.path.exists(lab.run / "ckpt_00000007.pt")  # a bug: a traceback
    lab.finish()


def test_two_runs_in_one_folder(lab):  # row 21
    first = lab.start(fault="slow_steps:0.02")
    while not os.path.exists(lab.run / "ckpt_00000005.pt"):
        time.sleep(0.02)
    assert lab.start().wait() == 2
    assert "error: another process is writing out/words/log.jsonl" in said(lab.path)
    assert first.wait() == 0
    lab.finish()


def test_two_runs_begun_at_the_same_moment(lab):  # row 21
    both = [lab.start(), lab.start()]
    assert sorted(run.wait() for run in both) == [0, 2]
    lab.finish()


def test_without_locks(lab, monkeypatch):
    """fcntl is absent on Windows: the run does without."""
    assert lab.start(fault="no_fcntl").wait() == 0
    lab.finish()


def test_resume_takes_little_memory(lab):  # row 28
    """Resuming a model of 30 MB takes at most twice what its state takes on the disk."""
    big = ["--n_embd=512", "--n_head=8", "--max_iters=1", "--optimizer=adamw", "--eval_iters=1"]
    assert lab.start(*big, fault="peak_memory:fresh").wait() == 0
    assert lab.start(*big[:-3], "--max_iters=2", *big[-2:], fault="peak_memory:resumed").wait() == 0
    state = os.path.getsize(lab.run / "ckpt_00000002.pt")
    fresh, resumed = (int((lab.path / name).read_text()) for name in ("fresh", "resumed"))
    assert state > 75e6 and resumed - fresh < 2 * state


def test_another_thread_count_is_a_warning(lab):  # row 30
    plain = ["--optimizer=adamw", "--learning_rate=1e-3"]
    assert lab.start(*plain, "--out_dir=out/due").wait() == 0
    assert lab.start(*plain, fault=f"signal_at_step:{signal.SIGTERM},20").wait() == 143
    assert lab.start(*plain, fault="another_thread").wait() == 0
    n = re.search(r"warning: resumed with changes \(threads (\d+) -> (\d+)\)", said(lab.path))
    assert int(n[2]) == int(n[1]) + 1
    for mine, due in zip(faults.rows(lab.run), faults.rows(lab.path / "out/due"), strict=True):
        assert mine["loss"] == pytest.approx(due["loss"], abs=1e-4)


def test_other_micro_batches_go_on_with_the_same_data(lab):
    """What the error for a full memory advises: half the batch, twice the accumulation, in the middle of a run."""
    plain = ["--dropout=0.0", "--optimizer=adamw"]
    assert lab.start(*plain, "--out_dir=out/due").wait() == 0
    assert lab.start(*plain, fault=f"signal_at_step:{signal.SIGTERM},20").wait() == 143
    assert lab.start(*plain, "--batch_size=2", "--gradient_accumulation_steps=4").wait() == 0
    assert "(batch_size 4 -> 2)" in said(lab.path)
    for mine, due in zip(faults.rows(lab.run), faults.rows(lab.path / "out/due"), strict=True):
        assert mine["loss"] == pytest.approx(due["loss"], abs=1e-4)


def test_out_of_memory_names_what_to_change(lab):
    argv = ["--block_size=512", "--batch_size=900", "--n_embd=256", "--eval_iters=1"]
    assert lab.start(*argv, fault="little_memory:2000000000").wait() == 2
    assert "error: out of memory with micro-batches of batch_size=900 windows of block_size=512" in said(lab.path)
    assert "fix: --batch_size=450 --gradient_accumulation_steps=4: the same steps" in said(lab.path)


def test_intervals_do_not_touch_the_weights(lab):
    assert lab.start("--eval_interval=60", "--log_interval=50", "--save_interval=17", "--eval_iters=1").wait() == 0
    assert digest(lab.run / "ckpt_00000060.pt") == lab.due[0]


def test_retention(tmp_path, monkeypatch):  # row 24
    """200 saves, failing saves, kills and rotting files in any order: never fewer than two good ones; one after rot."""
    monkeypatch.chdir(tmp_path)
    rng, step = random.Random(11), 0
    good, event, real = [], "", torch.save
    for _ in range(200):
        step += rng.randrange(1, 5)
        event = "save" if event == "rot" else rng.choice(["save", "save", "save", "full", "kill", "rot"])
        state = whole(step=step)
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
# As a user does it: a program in a process of its own, killed from outside


def as_a_user(lab, settings, kills, argv=()):
    command = [sys.executable, str(ROOT / "train.py"), *settings, *argv]
    os.symlink(ROOT / "config", lab.path / "config")

    def run(out, delay=None):
        with open(lab.path / "said.0", "a", encoding="utf-8") as file:
            process = subprocess.Popen([*command, f"--out_dir=out/{out}"], cwd=lab.path, stdout=file, stderr=file)
        try:
            return process.wait(delay)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()
    started = time.monotonic()
    assert run("a") == 0
    took, rng, killed = time.monotonic() - started, random.Random(1), 0
    steps = int(next(a for a in command if a.startswith("--max_iters=")).split("=")[1])
    due = outcome(lab.path / "out/a", steps)
    while killed < kills:
        code = run("b", rng.uniform(0, took))
        assert code in (0, -9), said(lab.path)[-2000:]
        if code == 0:
            assert outcome(lab.path / "out/b", steps) == due
            shutil.rmtree(lab.path / "out/b")
        else:
            killed += 1
    assert run("b") == 0 and outcome(lab.path / "out/b", steps) == due


RECIPE = ["config/train_small.py", "--eval_iters=2", "--eval_interval=20", "--save_interval=7", "--log_interval=1",
          "--compile=true", "--max_iters=60"]


def test_the_command_line_killed_three_times(lab):  # row 2, as a program
    as_a_user(lab, faults.BENCH, 3)


@pytest.mark.slow
def test_the_command_line_killed_twenty_times(lab):  # row 2, as a program
    as_a_user(lab, faults.BENCH, 20)


@pytest.mark.slow
def test_the_recipe_of_the_readme_killed_twenty_times(lab):  # row 2; bfloat16 where there is, compiled, Muon
    os.unlink(lab.path / "data")
    as_a_user(lab, RECIPE, 20)

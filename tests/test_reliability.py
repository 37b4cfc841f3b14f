# SPDX-License-Identifier: GPL-3.0-only
"""Kill it at any moment and run the same command again: the same bits. Rows of docs/reliability.md; test_damage.py has
those about the disk and about files."""
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import faults
import pytest
from conftest import ROOT, prepare_words, words
from faults import STEPS, digest, kill_at_random_moments, outcome, said, wait_for

from training import checkpoint as ckpt


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return faults.Reference(tmp_path_factory.mktemp("reference"), prepare_words)


@pytest.fixture
def lab(reference, tmp_path):
    """A fresh folder with data/words; `finish` holds the run in it against one that nothing happened to."""
    return faults.Lab(reference, tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Stopped, killed, interrupted


@pytest.mark.parametrize("step", [1, 5, 6, 17, 29])  # row 1
def test_stop_after_a_step(lab, step):
    assert lab.start(fault=f"signal_at_step:{signal.SIGTERM},{step + 1}").wait() == 143
    assert os.path.exists(lab.run / f"ckpt_{step:08d}.pt") and lab.check_files()
    lab.finish()


def test_ten_resumes_in_a_chain(lab):  # row 5
    for stop in range(3, STEPS + 1, 3):
        assert lab.start(fault=f"signal_at_step:{signal.SIGTERM},{stop}").wait() == 143
    assert said(lab.path).count("resumed") == 9
    lab.finish()


def test_kill_9_at_random_moments(lab):  # rows 2 and 31
    """20 kills spread evenly over the length of a run; one that came to its end is checked and begun anew."""
    for code in kill_at_random_moments(lab.start, lab.took, kills=20, seed=7):
        if code == -9:
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
        begun = lab.run.exists()
        code = lab.start(fault=points[0]).wait()
        if code == 9:
            lab.check_files()
            points.pop(0)
        else:  # it came to its end before the point, but not from its beginning on
            assert code == 0 and begun, points[0]
            lab.finish()
            shutil.rmtree(lab.run)
    lab.finish()


def test_a_run_ends_with_the_prepare_that_it_has_started(lab):
    stdlib = ["--dataset=stdlib", "--max_iters=1"]
    assert lab.start(*stdlib, fault="prepare_by:exit 3").wait() == 2
    assert "error: prepare.py stdlib failed" in said(lab.path)
    run, pid = lab.start(*stdlib, fault="prepare_by:echo $$ > pid && exec sleep 60"), lab.path / "pid"
    number = int(wait_for(lambda: pid.exists() and pid.read_text(), "prepare.py writes its pid", run))
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.wait() == 143
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


def test_prepare_killed_at_random_moments(lab):  # row 27
    """A folder data/NAME is whole or not there, and the next try writes the same bytes."""
    os.unlink(lab.path / "data")
    (lab.path / "books.txt").write_text(words(100_000, seed=2))

    def start():
        shutil.rmtree(lab.path / "data", ignore_errors=True)
        return lab.start("books.txt", "--vocab_size=300", script="prepare")

    def files():
        paths = [path for path in (lab.path / "data").rglob("*") if path.is_file() and path.suffix != ".lock"]
        return {path.relative_to(lab.path): path.read_bytes() for path in paths}
    started = time.monotonic()
    assert start().wait() == 0
    took, due = time.monotonic() - started, files()
    for _ in kill_at_random_moments(start, took, kills=20, seed=3):
        assert not (lab.path / "data/books").exists() or files() == due
    assert lab.start("books.txt", "--vocab_size=300", script="prepare").wait() == 0 and files() == due


# ----------------------------------------------------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("fault, step", [
    ("signal_at_step:{},1", 0), ("signal_at_step:{},18", 17), ("signal_in_validation:{},3", 7),
    ("signals_in_save:{},4,1", 10), ("signal_while_opening:{}", None)])
def test_one_signal_saves_and_stops(lab, fault, step, number):  # rows 6 and 32
    """In the first step, a later one, a validation, a save (finished, and once), and before there is anything."""
    code = lab.start(fault=fault.format(number.value)).wait()
    if step is None:  # nothing is lost yet: SIGTERM just ends it, and Ctrl-C with a word
        assert code == {signal.SIGTERM: -signal.SIGTERM, signal.SIGINT: 130}[number]
        assert ("stopped" in said(lab.path)) == (number == signal.SIGINT)
    else:
        assert code == 128 + number
        assert f"stopped by {number.name} after {step} steps" in said(lab.path)
        assert os.path.exists(lab.run / f"ckpt_{step:08d}.pt") == (step > 0)
        assert not any(name.endswith(".part") for name in os.listdir(lab.run))
    lab.finish()


def test_a_closed_terminal_saves(lab):
    """SIGHUP comes when the terminal is closed; under nohup it is ignored, and the run continues."""
    assert lab.start(fault=f"signal_at_step:{signal.SIGHUP},18").wait() == 129
    assert os.path.exists(lab.run / "ckpt_00000017.pt") and "stopped by SIGHUP after 17 steps" in said(lab.path)
    assert lab.start(fault=f"ignore_hangup;signal_at_step:{signal.SIGHUP},24").wait() == 0
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
    first = lab.start(fault="wait_at_step:6,second")
    wait_for((lab.run / "ckpt_00000005.pt").exists, "the first run saves step 5", first)
    assert lab.start().wait() == 2
    assert "error: another process is writing out/words/log.jsonl" in said(lab.path)
    (lab.path / "second").touch()
    assert first.wait() == 0
    lab.finish()


def test_two_runs_begun_at_the_same_moment(lab):  # row 21
    both = [lab.start(), lab.start()]
    assert sorted(run.wait() for run in both) == [0, 2]
    lab.finish()


def test_without_locks(lab):
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
    plain = ["--optimizer=adamw", "--learning_rate=1e-3", "--max_iters=12"]
    assert lab.start(*plain, "--out_dir=out/due").wait() == 0
    assert lab.start(*plain, fault=f"signal_at_step:{signal.SIGTERM},7").wait() == 143
    assert lab.start(*plain, fault="another_thread").wait() == 0
    n = re.search(r"warning: resumed with changes \(threads (\d+) -> (\d+)\)", said(lab.path))
    assert int(n[2]) == int(n[1]) + 1
    for mine, due in zip(faults.rows(lab.run), faults.rows(lab.path / "out/due"), strict=True):
        assert mine["loss"] == pytest.approx(due["loss"], abs=1e-4)


def test_other_micro_batches_go_on_with_the_same_data(lab):
    """What the error for a full memory advises: half the batch, twice the accumulation, in the middle of a run."""
    plain = ["--dropout=0.0", "--optimizer=adamw", "--max_iters=12"]
    assert lab.start(*plain, "--out_dir=out/due").wait() == 0
    assert lab.start(*plain, fault=f"signal_at_step:{signal.SIGTERM},7").wait() == 143
    assert lab.start(*plain, "--batch_size=2", "--gradient_accumulation_steps=4").wait() == 0
    assert "(batch_size 4 -> 2)" in said(lab.path)
    for mine, due in zip(faults.rows(lab.run), faults.rows(lab.path / "out/due"), strict=True):
        assert mine["loss"] == pytest.approx(due["loss"], abs=1e-4)


def test_out_of_memory_names_what_to_change(lab):
    argv = ["--block_size=512", "--batch_size=900", "--n_embd=256", "--eval_iters=1"]
    assert lab.start(*argv, fault="little_memory:600000000").wait() == 2
    assert "error: out of memory with micro-batches of batch_size=900 windows of block_size=512" in said(lab.path)
    assert "fix: --batch_size=450 --gradient_accumulation_steps=4: the same steps" in said(lab.path)


def test_intervals_do_not_touch_the_weights(lab):
    assert lab.start("--eval_interval=30", "--log_interval=25", "--save_interval=17", "--eval_iters=1").wait() == 0
    assert digest(lab.run / f"ckpt_{STEPS:08d}.pt") == lab.due[0]


# ----------------------------------------------------------------------------------------------------------------------
# As a user does it: a program in a process of its own, killed from outside


class Program:
    """python train.py in a process of its own."""

    def __init__(self, folder, argv):
        with open(folder / "said.0", "a", encoding="utf-8") as file:
            self.process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *argv], cwd=folder,
                                            stdout=file, stderr=file)

    def kill(self):
        self.process.kill()
        return self.process.wait()


def as_a_user(lab, settings, kills):
    os.symlink(ROOT / "config", lab.path / "config")
    started = time.monotonic()
    assert Program(lab.path, [*settings, "--out_dir=out/a"]).process.wait(timeout=600) == 0, said(lab.path)
    took, mine = time.monotonic() - started, lab.path / "out/b"
    again, due = [*settings, "--out_dir=out/b"], outcome(lab.path / "out/a")
    for code in kill_at_random_moments(lambda: Program(lab.path, again), took, kills, seed=1):
        assert code in (0, -9), said(lab.path)[-2000:]
        if code == 0:
            assert outcome(mine) == due
            shutil.rmtree(mine)
    assert Program(lab.path, again).process.wait(timeout=600) == 0 and outcome(mine) == due


RECIPE = ["config/train_small.py", "--eval_iters=2", "--eval_interval=20", "--save_interval=7", "--log_interval=1",
          "--compile=true", f"--max_iters={STEPS}"]


def test_the_command_line_killed_three_times(lab):  # row 2, as a program
    as_a_user(lab, faults.BENCH, 3)


@pytest.mark.slow
def test_the_command_line_killed_twenty_times(lab):  # row 2, as a program
    as_a_user(lab, faults.BENCH, 20)


@pytest.mark.slow
def test_the_recipe_of_the_readme_killed_twenty_times(lab):  # row 2; bfloat16 where there is, compiled, Muon
    os.unlink(lab.path / "data")
    as_a_user(lab, RECIPE, 20)

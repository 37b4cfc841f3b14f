# SPDX-License-Identifier: GPL-3.0-only
"""One run on several processes: the same samples, the same result, and no process left behind."""
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys

import faults
import pytest
import torch
from conftest import ROOT, prepare_words
from faults import STEPS, digest, outcome, rows, said, together, wait_for

from training import checkpoint as ckpt

# Without dropout, whose masks belong to a micro-batch, and with AdamW: then only the order of additions differs.
PLAIN = ["--dropout=0.0", "--optimizer=adamw", "--gradient_accumulation_steps=4", "--learning_rate=1e-3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare_words(folder)
    return folder / "data"


@pytest.fixture
def lab(data, tmp_path):
    os.symlink(data, tmp_path / "data")
    return tmp_path


def torchrun(folder, *argv, n=2, options=(), fault="", wait=True, prefix=()):
    """Start the launcher as a user does; with wait, the exit code and all that it printed."""
    command = [*prefix, sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}",
               *(options or ["--standalone"]), str(ROOT / "tests/faults.py"), *faults.BENCH, *argv]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               stdin=subprocess.DEVNULL, start_new_session=True,
                               env={**os.environ, "FAULT": fault, "OMP_NUM_THREADS": "1"})
    if not wait:
        return process
    return finish(process)


def finish(process):
    """The exit code of a launcher and all that was printed; nothing is left running where it hangs."""
    try:
        out, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("hangs: " + process.communicate()[0][-2000:])
    return process.returncode, out


def weights(run):
    return ckpt.load_checkpoint(str(run / f"ckpt_{STEPS:08d}.pt"))["model"]


def furthest(a, b):
    a, b = weights(a), weights(b)
    return max((a[name] - b[name]).abs().max().item() for name in a)


# ----------------------------------------------------------------------------------------------------------------------
# The same run


def windows(folder, world):
    """{step: positions of all windows that were read for it}, by all processes; then the notes are deleted."""
    read = {}
    for rank in range(world):
        for line in (folder / f"windows.{rank}").read_text().splitlines():
            step, starts = json.loads(line)
            read[step] = sorted(read.get(step, []) + starts)
        os.unlink(folder / f"windows.{rank}")
    return read


def test_1_2_and_4_processes_are_the_same_run(lab):  # row 18
    read = {}
    for world in (1, 2, 4):
        assert together(world, lab, *PLAIN, f"--out_dir=out/{world}", fault="note_windows") == [0] * world, said(lab)
        read[world] = windows(lab, world)
    assert read[1] == read[2] == read[4] and len(read[1]) == STEPS and len(read[1][0]) == 16
    assert furthest(lab / "out/1", lab / "out/2") < 1e-4 and furthest(lab / "out/1", lab / "out/4") < 1e-4
    assert weights(lab / "out/1")["lm_head.weight"].abs().max() > 0.05  # something was learned
    for world in (2, 4):
        for one, several in zip(rows(lab / "out/1"), rows(lab / f"out/{world}"), strict=True):
            assert one.keys() == several.keys()
            for name in one:
                assert several[name] == pytest.approx(one[name], abs=1e-4), name


def test_muon_on_1_and_2_processes(lab):  # row 18; it makes matrices orthogonal in bfloat16, which doubles any rounding
    losses = []
    for world in (1, 2):
        argv = [*PLAIN, "--optimizer=muon", f"--out_dir=out/{world}"]
        assert together(world, lab, *argv) == [0] * world, said(lab)
        losses.append([row["loss"] for row in rows(lab / f"out/{world}")])
    assert losses[0] == pytest.approx(losses[1], abs=1e-2) and losses[0][-1] < losses[0][0] - 1


def test_few_micro_batches_are_cut(lab):
    """One micro-batch of 4 windows for 2 processes: each takes 2 of them. What cannot be shared is an error."""
    argv = [*PLAIN, "--gradient_accumulation_steps=1"]
    for world in (1, 2):
        assert together(world, lab, *argv, f"--out_dir=out/{world}", "--backend=nccl") == [0] * world, said(lab)
    assert furthest(lab / "out/1", lab / "out/2") < 1e-4
    assert "step: 128 tokens = 2 micro-batches of 2 x 32, 1 for each of 2 processes" in said(lab)
    assert together(2, lab, *argv, "--batch_size=3", "--out_dir=out/3") == [2, 2]
    assert "1 micro-batch of batch_size=3 windows cannot be shared by 2 processes" in said(lab)
    assert "fix: --nproc_per_node=1" in said(lab)


def test_a_part_of_the_validation_is_the_same_part(lab):
    """--eval_iters counts batches as they are set, not the pieces into which they are cut for two processes."""
    argv = [*PLAIN, "--gradient_accumulation_steps=1", "--eval_iters=2", "--max_iters=7"]
    for world in (1, 2):
        assert together(world, lab, *argv, f"--out_dir=out/{world}") == [0] * world, said(lab)
    one, several = (rows(lab / f"out/{world}")[-1]["val_loss"] for world in (1, 2))
    assert one == pytest.approx(several, abs=1e-5)


def test_2_to_1_to_2_processes(lab):  # row 18
    """A checkpoint of one world size continues in another."""
    assert together(1, lab, *PLAIN, "--out_dir=out/due") == [0]
    stops = [f"signal_rank:1,{signal.SIGTERM},10", f"signal_at_step:{signal.SIGTERM},20", ""]
    for world, fault, code in zip((2, 1, 2), stops, (143, 143, 0)):
        assert together(world, lab, *PLAIN, fault=fault) == [code] * world, said(lab)
    assert "processes 2 -> 1): the result will not match bit for bit" in said(lab) and "processes 1 -> 2)" in said(lab)
    assert furthest(lab / "out/due", lab / "out/words") < 1e-4
    for mine, due in zip(rows(lab / "out/words"), rows(lab / "out/due"), strict=True):
        assert mine["loss"] == pytest.approx(due["loss"], rel=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Processes that end, hang or disagree


@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    """The outcome of an undisturbed run on two processes, with dropout, accumulation and Muon."""
    folder = tmp_path_factory.mktemp("two")
    os.symlink(data, folder / "data")
    assert together(2, folder) == [0, 0], said(folder)
    return outcome(folder / "out/words")


def test_a_process_that_dies_is_started_again(lab, two):  # row 16
    """It dies in the first two attempts, and the third continues from what the second has found."""
    code, out = torchrun(lab, options=["--standalone", "--max-restarts=2"], fault="die_at_step:1,17,2")
    assert code == 0 and out.count("resumed out/words after 15 of 30") == 2, out
    assert outcome(lab / "out/words") == two


def test_sigterm_to_one_process_stops_all_after_the_same_step(lab, two):  # row 17
    assert together(2, lab, fault=f"signal_rank:1,{signal.SIGTERM},18") == [143, 143], said(lab)
    assert "stopped by SIGTERM after 17 steps" in said(lab)
    assert together(2, lab) == [0, 0] and "resumed out/words after 17 of 30" in said(lab)
    assert outcome(lab / "out/words") == two


@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_a_signal_to_torchrun_stops_all_after_the_same_step(lab, two, send):  # row 17
    """SIGTERM to the launcher. And Ctrl-C: a terminal sends SIGINT to the whole group, and torchrun repeats it; the
    second one must not end the saving."""
    number = {os.kill: signal.SIGTERM, os.killpg: signal.SIGINT}[send]
    process = torchrun(lab, fault="wait_for_a_signal:9", wait=False)
    for rank in range(2):
        wait_for((lab / f"waits.{rank}").exists, f"process {rank} is in step 9", process)
    send(process.pid, number)
    code, out = finish(process)
    assert code == 1 and "saved in out/words. Rerun to resume." in out, out
    assert together(2, lab) == [0, 0] and "resumed out/words after 8 of 30" in said(lab)
    assert outcome(lab / "out/words") == two


def test_a_process_that_hangs_is_given_up(lab):  # row 19
    waits, hangs = faults.ranks(2, lab, "--dist_timeout=4", fault="hang:1,10")  # for 1,000 s
    assert waits.wait() == 2 and hangs.poll() is None
    assert hangs.kill() == -9
    assert "error: process 0 of 2 lost the others" in said(lab) and "--dist_timeout=8" in said(lab)
    assert "Traceback" not in said(lab)


@pytest.mark.slow
def test_torchrun_ends_a_process_that_hangs(lab):  # row 19; half a minute of it is torchrun's own patience
    code, out = torchrun(lab, "--dist_timeout=4", fault="hang:1,10")
    assert code == 1 and 'train.py", line' not in out, out


@pytest.mark.slow
def test_a_process_that_always_dies_is_given_up(lab, two):  # row 16
    options = ["--standalone", "--max-restarts=2"]
    code, out = torchrun(lab, options=options, fault="die_at_step:1,17,9")
    assert code == 1 and out.count("resumed out/words after 15 of 30") == 2, out  # three attempts
    assert together(2, lab) == [0, 0] and outcome(lab / "out/words") == two


def test_a_loss_that_is_no_number_on_one_process(lab, two):  # row 15
    assert together(2, lab, "--save_interval=1", fault="bad_loss:13,nan,1") == [3, 3]
    assert "error: at step 13 the loss is nan" in said(lab)
    assert (lab / "out/words/ckpt_00000012.pt").exists()
    assert together(2, lab) == [0, 0] and outcome(lab / "out/words") == two


def test_the_one_that_runs_out_of_memory_says_so(lab):  # whichever it is
    assert together(2, lab, fault="no_memory:1,10")[1] == 2
    assert "error: out of memory with micro-batches of batch_size=4" in said(lab, 1)


def test_processes_that_disagree(lab):
    assert together(2, lab, fault="other_seed:1") == [2, 2]
    assert "error: process 1 has seed=4, process 0 has 1337" in said(lab) and not (lab / "out").exists()


def test_a_users_mistake_is_told_once(lab):
    code, out = torchrun(lab, "--n_embd=33", n=2)
    assert code == 1 and out.count("error: n_embd=33 is not a multiple of n_head=2") == 1, out
    assert 'train.py", line' not in out


def test_data_that_change_stop_all_processes_and_are_told_once(lab, data):
    os.unlink(lab / "data")
    shutil.copytree(data, lab / "data")
    command = "dd if=/dev/zero of=data/words/train.bin bs=1 count=1 conv=notrunc 2> /dev/null"
    assert together(2, lab, fault=f"shell:12,{command}") == [2, 2]
    assert "was changed while it was being read; the run is saved at step 14\n" in said(lab)
    assert (lab / "out/words/ckpt_00000014.pt").exists() and "error" not in said(lab, 1)


def test_what_torchrun_would_have_set(lab):
    for env, fact in ((dict(WORLD_SIZE="2"), "WORLD_SIZE=2, but RANK is not set"),
                      (dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="abc"), "cannot meet at"),
                      (dict(WORLD_SIZE="2", RANK="0"), "MASTER_ADDR is not set")):
        assert faults.Run(lab, env=env).wait() == 2
        assert fact in said(lab, env.get("RANK", "0"))


# ----------------------------------------------------------------------------------------------------------------------
# float16 and its scaler


HALF = ["--dtype=float16", "--n_embd=16", "--n_layer=1", "--block_size=16", "--max_iters=8",
        "--eval_iters=1"]  # slow on a CPU


def test_an_overflow_in_one_optimizer_holds_back_the_other(lab):
    """float16 on the CPU: infinite gradients of the embedding (AdamW) also hold back the matrices (Muon)."""
    fault = "keep_all;overflow:6,transformer.wte.weight"
    assert faults.Run(lab, *HALF, "--save_interval=1", fault=fault).wait() == 0, said(lab)
    five, six, seven = (ckpt.load_checkpoint(str(lab / f"out/words/ckpt_{step:08d}.pt")) for step in (5, 6, 7))
    assert all(torch.equal(five["model"][name], six["model"][name]) for name in five["model"])
    assert not any(torch.equal(six["model"][name], seven["model"][name]) for name in six["model"])
    assert six["scaler"]["scale"] == five["scaler"]["scale"] / 2 == seven["scaler"]["scale"]
    assert rows(lab / "out/words")[5]["grad_norm"] == -1.0


def test_the_scaler_is_in_the_checkpoint(lab):  # row 33
    assert faults.Run(lab, *HALF, "--out_dir=out/due", fault="overflow:3,wte").wait() == 0, said(lab)
    stop = f"signal_at_step:{signal.SIGTERM},5"
    assert faults.Run(lab, *HALF, fault=f"overflow:3,wte;{stop}").wait() == 143
    assert faults.Run(lab, *HALF).wait() == 0
    due, mine = (digest(str(lab / f"out/{name}/ckpt_00000008.pt")) for name in ("due", "words"))
    assert due == mine
    assert ckpt.load_checkpoint(str(lab / "out/words/ckpt_00000008.pt"))["scaler"]["scale"] == 2.0 ** 15


# ----------------------------------------------------------------------------------------------------------------------
# Two machines


@contextlib.contextmanager
def two_machines():
    """Two network namespaces with an address each, joined by a cable: 10.77.0.1 and 10.77.0.2."""
    names = [f"openllm{os.getpid()}{side}" for side in "ab"]

    def ip(*argv):
        return subprocess.run(["ip", *argv], check=True, capture_output=True, text=True)
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", "oa", "netns", names[0], "type", "veth", "peer", "name", "ob", "netns", names[1])
            for i, (name, device) in enumerate(zip(names, ("oa", "ob"))):
                ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", device)
                ip("-n", name, "link", "set", device, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', None) or error}".strip())
        yield names
    finally:
        for name in names:
            with contextlib.suppress(OSError):
                subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def test_two_machines(lab):
    """One process on each, in namespaces with their own addresses, joined by rendezvous; the disk is shared."""
    with two_machines() as names:
        options = ["--nnodes=2", "--rdzv_backend=c10d", "--rdzv_endpoint=10.77.0.1:29400", "--rdzv_id=7"]
        runs = []
        for i, (name, device) in enumerate(zip(names, ("oa", "ob"))):  # (both namespaces have the same host name)
            here = [f"--local_addr=10.77.0.{i + 1}", f"--rdzv_conf=is_host={int(i == 0)}"]
            runs.append(torchrun(lab, *PLAIN, n=1, options=[*options, *here], wait=False,
                                 prefix=["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={device}"]))
        out = [finish(run) for run in runs]
    assert [code for code, _ in out] == [0, 0], out
    assert "for each of 2 processes" in out[0][1] and out[1][1].count("step") == 0, out  # one of them speaks
    assert together(1, lab, *PLAIN, "--out_dir=out/one") == [0] and furthest(lab / "out/one", lab / "out/words") < 1e-4

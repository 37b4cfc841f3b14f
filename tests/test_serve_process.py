# SPDX-License-Identifier: GPL-3.0-only
"""
The server as a process: what it prints, how it ends, and what it cannot serve.

A letter and a number in the name of a test are explained in servers.py.
"""
import contextlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import time

import pytest
import torch
from conftest import error
from http_client import together, until
from servers import (  # noqa: F401 (some are fixtures)
    COMPLETE, GENERATE, GREEDY, Process, all_logs_fixture, broken_steps, held_steps, log_fixture, no_key_fixture,
    script_fixture, script_server_fixture, slow_load, slow_steps, unread_log, well_afterwards_fixture)

import sample
import serve
import tokenizer as tokenizers


@pytest.fixture
def start(tiny_run, tmp_path):
    """Start `python serve.py out/words ...` in a process of its own."""
    with contextlib.ExitStack() as processes:
        def start(*argv, fault=None, arguments=()):
            said = tmp_path / f"said.{len(list(tmp_path.iterdir()))}"
            process = Process(tiny_run, said, "out/words", *argv, fault=fault, arguments=arguments)
            return processes.enter_context(process)
        yield start


def test_a3_the_process_ends_after_a_fatal_error(start, tmp_path):
    """A model that fails again and again ends the process with exit code 1, so that it can be started anew."""
    marker = tmp_path / "broken"
    process = start(fault=broken_steps, arguments=[str(marker)]).up()
    assert process.client.text("the ", max_tokens=3)
    marker.touch()
    with contextlib.suppress(OSError, AssertionError):  # refused, reset, or accepted in the last moment: no answer
        assert until(lambda: process.client.post(GENERATE, prompt="the ").status != 500), "it goes on failing"
    assert process.wait() == 1 and "a bug in the model" in process.said()


def test_b1_the_same_text_as_sample(tiny_run, start, monkeypatch, capsys):
    """`python serve.py RUN` writes what `python sample.py RUN` writes, and tells how the model was trained, but not
    where it lies."""
    monkeypatch.chdir(tiny_run)
    sample.main(["out/words", "--prompt=the ", "--temperature=0", "--max_new_tokens=20"])
    process = start().up()
    assert "the " + process.client.text("the ", max_tokens=20, **GREEDY) + "\n" == capsys.readouterr().out
    info = process.client.get("/model-info").json
    assert info["step"] == 40 and info["context"] == 32 and str(tiny_run) not in json.dumps(info)
    assert [step for step, _, _ in info["curve"]] == list(range(1, 41))
    assert [step for step, _, val_loss in info["curve"] if val_loss is not None] == [10, 20, 30, 40]


def test_h1_a_signal_lets_all_finish(start, tmp_path):
    """After SIGTERM what runs and waits is finished, new requests are told to come back, and the exit code is 0."""
    marker = tmp_path / "go on"
    process = start("--rows=2", "--drain=1000", fault=held_steps, arguments=[str(marker)]).up()
    client = process.client
    wires = client.fill(3, prompt="my friend", max_tokens=22, ignore_eos=True)
    process.signal()
    assert until(lambda: client.get("/health").json == {"status": "draining"}), process.said()
    refusal = client.post(GENERATE, prompt="the ")
    assert refusal.status == 503 and refusal.headers["retry-after"] == "1"
    marker.touch()
    for wire in wires:
        event = wire.answer().body.split(b"\n\n")[-3]
        assert json.loads(event.removeprefix(b"data: "))["finish_reason"] == "length"
    assert process.wait() == 0
    assert "Traceback" not in process.said() and "friend" not in process.said()


def test_h_nobody_reads_the_log(start):
    """Lines that a full pipe does not take are dropped, and the server goes on answering."""
    process = start(fault=unread_log).up()
    with process.client.wire() as wire:
        for _ in range(600):  # a line of some 15 bytes for each, and the pipe holds 4 KB
            assert wire.send(process.client.request("GET", "/nope")).answer().status == 404
    assert process.client.generate("the ", max_tokens=3)
    process.signal()
    assert process.wait() == 0


def test_h2_a_signal_does_not_wait_for_ever(start):
    """After --drain seconds a stream that goes on is ended, by an error and [DONE]."""
    process = start("--drain=0.2", "--rows=1", fault=slow_steps, arguments=[1]).up()
    wires = process.client.fill(1, prompt="the ", max_tokens=28, ignore_eos=True)
    process.signal()
    *_, failure, done, end = wires[0].answer().body.split(b"\n\n")
    assert "error" in json.loads(failure.removeprefix(b"data: ")) and done == b"data: [DONE]" and end == b""
    assert process.wait() == 0


def test_h3_a_second_signal_ends_at_once(start, tmp_path):
    """A second SIGTERM ends the process at once, with exit code 143."""
    process = start("--rows=1", "--drain=1000", fault=held_steps, arguments=[str(tmp_path / "never")]).up()
    wires = process.client.fill(1, prompt="the ", max_tokens=28, ignore_eos=True)
    process.signal()
    assert until(lambda: process.status() == "draining")
    process.signal()
    assert process.wait() == 143
    assert b"[DONE]" not in wires[0].file.read()
    assert "Traceback" not in process.said()


def test_h4_control_c_while_it_loads(start):
    """Ctrl-C ends a server that is still loading, without a traceback."""
    process = start(fault=slow_load, arguments=[1000]).up("loading")
    process.signal(signal.SIGINT)
    assert process.wait() == 130
    assert "Traceback" not in process.said()


class Runs:
    """A folder with runs that cannot be served: for each, what its error names."""

    def __init__(self, good, folder):
        self.folder = folder
        for name in "truncated", "malicious", "mismatch":
            shutil.copytree(good, folder / name)
            for path in (folder / name).glob("ckpt_*.pt"):
                path.unlink()
        best = (folder / "truncated/best.pt").read_bytes()
        (folder / "truncated/best.pt").write_bytes(best[:len(best) // 2])
        (folder / "malicious/best.pt").unlink()
        torch.save({"model": Evil(folder / "ran")}, folder / "malicious/best.pt")
        shutil.rmtree(folder / "mismatch/tokenizer")
        tokenizers.train("char", ["abc"]).save(folder / "mismatch/tokenizer")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_h5_runs_that_cannot_be_served(tiny_run, tmp_path):
    """A run that is missing, cut off, malicious or has another tokenizer: one error with what to do, exit code 2, and
    nothing in it is run."""
    bad = Runs(tiny_run / "out/words", tmp_path / "runs").folder
    names = "missing", "truncated", "malicious", "mismatch"
    processes = [Process(tmp_path, tmp_path / f"said.{name}", bad / name) for name in names]
    for name, process in zip(names, processes):
        with process:
            assert process.wait() == 2, (name, process.said())
            said = process.said()
            assert "Traceback" not in said and re.search(r"^error: .+\nfix: .+\n\Z", said, re.MULTILINE), said
    assert not (bad / "ran").exists()
    torch.load(bad / "malicious/best.pt", weights_only=False)
    assert (bad / "ran").exists()  # it would have, with another reader


def test_h5_the_port_is_taken(script, monkeypatch, tiny_run):
    """A port that is taken is an error that names it."""
    monkeypatch.chdir(tiny_run)
    fact, _ = error(serve.main, "out/words", f"--port={script.port}")
    assert str(script.port) in fact


@pytest.mark.slow
def test_h6_ten_minutes(start):
    """A random mix, with clients that leave: memory, threads and files stay as they were."""
    process, end = start("--rows=4", "--max_queue=16").up(), time.monotonic() + 600
    client, samples = process.client, []

    def work(seed):
        rng = random.Random(seed)
        while time.monotonic() < end:
            body = {"prompt": "the cat", "max_tokens": rng.randint(1, 24), "stream": rng.random() < 0.5,
                    "temperature": rng.choice([0, 1, 9])}
            with client.wire(client.request("POST", rng.choice([GENERATE, COMPLETE]), body)) as wire:
                if rng.random() < 0.7:
                    assert wire.answer().status in ([400] if body["temperature"] == 9 else [200, 503])
                else:
                    time.sleep(rng.uniform(0, 0.02))

    def watch():
        while time.monotonic() < end:
            time.sleep(5)
            proc = pathlib.Path(f"/proc/{process.process.pid}")
            samples.append((client.metric("openllm_resident_memory_bytes"), len(list((proc / "task").iterdir())),
                            len(list((proc / "fd").iterdir()))))
    together([*(lambda seed=seed: work(seed) for seed in range(6)), watch])
    early, late = samples[len(samples) // 5:len(samples) // 2], samples[len(samples) // 2:]
    memory, threads, files = (max(sample[i] for sample in late) / max(sample[i] for sample in early) for i in range(3))
    assert memory < 1.02 and threads <= 1.2 and files <= 1.2, samples
    assert until(lambda: client.busy() == (0, 0)) and client.get("/health").status == 200

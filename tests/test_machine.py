# SPDX-License-Identifier: GPL-3.0-only
"""The machine: which device and dtype are chosen, how many threads a process takes, how much memory is free."""
import ctypes
import inspect
import io
import math
import os
from types import SimpleNamespace

import pytest
import torch
from conftest import error

from runtime import machine
from runtime.processes import Processes


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert machine.choose_device("auto") == machine.choose_device("cpu") == "cpu"
    fact, fix = error(lambda _: machine.choose_device("cuda:1"))
    assert "--device=cuda:1" in fact and torch.__version__ in fact and "--device=auto" in fix
    assert "mps" in error(lambda _: machine.choose_device("mps"))[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: None)
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
    assert machine.choose_device("auto", Processes()) == "cuda:1" == taken[0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    fact, fix = error(lambda _: machine.choose_device("cuda", Processes()))
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


# ---------- Threads


@pytest.mark.parametrize("world, local_world, omp, cores, due", [
    (2, 2, "1", 8, [4]), (2, 1, "1", 8, [8]),  # one process on each of two machines
    (4, 4, "1", 6, [1]), (8, 8, "1", 4, [1]),
    (2, 2, "3", 8, []),  # somebody has decided it
    (2, 2, None, 8, []), (1, 1, "1", 8, [])])
def test_processes_of_torchrun_share_the_cores(monkeypatch, world, local_world, omp, cores, due):
    """torchrun sets OMP_NUM_THREADS=1, however many cores there are."""
    if omp is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    set_to = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(torch, "set_deterministic_debug_mode", lambda mode: None)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    machine.set_up("cpu", SimpleNamespace(world=world, local_world=local_world))
    assert set_to == due
    set_to.clear()
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 2 * cores)
    machine.set_up("cpu", SimpleNamespace(world=world, local_world=local_world))
    assert set_to == [max(1, 2 * cores // local_world)] * len(due)


# ---------- Memory


MEMINFO = "MemTotal:       16000000 kB\nMemFree:         1000000 kB\nMemAvailable:    9000000 kB\nBuffers: 7 kB\n"
GROUP = {"max": "6000000000\n", "current": "2500000000\n",
         "stat": "anon 1000\nfile 900000000\ninactive_file 400000000\nactive_file 500000000\n"}


@pytest.mark.parametrize("meminfo, group, due", [
    (MEMINFO, {}, 9_216_000_000),  # no container
    (MEMINFO, GROUP, 3_900_000_000),  # 6.0 - 2.5 GB, and 0.4 of files that are merely cached
    (MEMINFO, GROUP | dict(max="max\n"), 9_216_000_000),  # a container without a limit
    (MEMINFO, GROUP | dict(max="64000000000\n"), 9_216_000_000),  # or with more than the machine has
    ("", {}, math.inf), (None, {}, math.inf), (None, GROUP, math.inf)])  # not Linux
def test_the_free_memory_is_that_of_the_container(monkeypatch, meminfo, group, due):
    files = {f"/sys/fs/cgroup/memory.{name}": text for name, text in group.items()} | {"/proc/meminfo": meminfo}

    def opened(path, encoding):
        if files.get(path) is None:
            raise FileNotFoundError(path)
        return io.StringIO(files[path])
    monkeypatch.setattr(machine, "open", opened, raising=False)
    assert machine.free_memory("cpu") == due


def test_the_free_memory_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: dict({"cuda:1": (5, 8)})[device])
    assert machine.free_memory("cuda:1") == 5


def test_the_peak_is_that_of_the_fastest_product(monkeypatch):
    """Of up to eight products of 1,024 x 1,024 matrices, 2 x 1,024^3 operations each; fewer where one takes long."""
    for seconds, products in (([0.2, 0.05, 0.1, *[0.3] * 9], 6), ([0.01] * 20, 8), ([5.0, 5.0], 1)):
        ticks = [second for took in seconds for second in (0.0, took)]
        monkeypatch.setattr(machine, "time", SimpleNamespace(perf_counter=lambda ticks=ticks: ticks.pop(0)))
        due = 2 * 1024**3 / min(seconds[:products])
        assert inspect.unwrap(machine.measure_peak)("cpu", torch.float32) == pytest.approx(due)  # (it is cached here)
        assert len(ticks) == 2 * (len(seconds) - products)

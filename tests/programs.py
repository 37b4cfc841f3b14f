# SPDX-License-Identifier: GPL-3.0-only
"""
A program as a user starts it, in a process that need not import PyTorch first, which takes two seconds.

    done = run("train.py", "--max_iters=3", cwd=folder)         # as `python train.py --max_iters=3`
    done = run("-m", "bench", "doctor", cwd=folder)
    assert done.returncode == 0, done.stderr

The process is forked from one that has imported it: see faults.context. The file runs as `__main__`, its exit code,
output and signals are those of a program.
"""
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time

from faults import context


def free_port():
    """A port that nothing listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(true, what):
    """Wait until true() is so, which may take a minute."""
    for _ in range(6000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError(f"not within a minute: {what}")


def child(argv, cwd, env, out, err, file_size):
    os.chdir(cwd)
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    os.environ.clear()
    os.environ.update(env)
    for descriptor, (path, flags) in enumerate(((os.devnull, os.O_RDONLY), (out, os.O_WRONLY), (err, os.O_WRONLY))):
        opened = os.open(path, flags)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # (pytest may run in the background, where it is ignored)
    if argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")


def run(*argv, cwd=None, env=None, timeout=240, file_size=None):
    """The finished process, as subprocess.run gives it, with its text output.

    file_size: it can write no file with more bytes, as on a disk that is full.
    """
    argv, cwd = list(map(str, argv)), str(cwd or os.getcwd())
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
        env = {**os.environ, **(env or {})}
        process = context().Process(target=child, args=(argv, cwd, env, out.name, err.name, file_size))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(argv, timeout, err.read())
        texts = [file.read().decode("utf-8", "replace") for file in (out, err)]
        return subprocess.CompletedProcess(argv, process.exitcode, *texts)

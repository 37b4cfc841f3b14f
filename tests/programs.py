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
import runpy
import signal
import subprocess
import sys
import tempfile

from faults import context


def child(argv, cwd, env, out, err):
    os.chdir(cwd)
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


def run(*argv, cwd=None, env=None, timeout=240):
    """The finished process, as subprocess.run gives it, with its text output."""
    argv, cwd = list(map(str, argv)), str(cwd or os.getcwd())
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
        process = context().Process(target=child, args=(argv, cwd, {**os.environ, **(env or {})}, out.name, err.name))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(argv, timeout, err.read())
        texts = [file.read().decode("utf-8", "replace") for file in (out, err)]
        return subprocess.CompletedProcess(argv, process.exitcode, *texts)

# SPDX-License-Identifier: GPL-3.0-only
"""
What the tests of the server share: stand-in models, and servers in this process and in others.

    script.model.say("hello")                   # the model whose text is known in advance
    script.text(stop="l") == "he"               # `script` is a Client: see http_client.py

A letter and a number in the name of a test, such as b7, are a row of the list of what the server promises: a, what it
tells of itself; b, generation; c, validation; d, streams; e, many at once; f, raw HTTP; g, access; h, the process. The
docstring says what the row promises.
"""
import contextlib
import fcntl
import importlib.machinery
import os
import pathlib
import signal
import socket
import sys
import threading
import time
import traceback

import pytest
import torch
from conftest import ROOT, random_model
from engines import Clock
from http_client import LIMIT, SECRET, Client, until
from torch.nn import functional as F

from runtime import console
from serving import api, engine, web
import model as model_file
import serve
from text.pretrained import Tokenizer
from tokenizer import END_OF_TEXT

END = 256  # the id of END_OF_TEXT
KEY = "sesame-0123456789"
RUN = {"path": f"{SECRET}/best.pt", "step": 40, "source": ["words", f"{SECRET}/notes.txt?token=secret"],
       "val_loss": 2.5, "tokenizer_sha256": "ab" * 32, "chat": True}
SETTINGS = dict(port=0, rows=4, max_queue=4, max_connections=16, header_timeout=LIMIT, body_timeout=LIMIT,
                write_timeout=LIMIT)

# Requests
GREEDY = dict(temperature=0)
SAID = [{"role": "user", "content": "x"}]
GENERATE, COMPLETE, CHAT = "/generate", "/v1/completions", "/v1/chat/completions"
GOOD = {GENERATE: {"prompt": "x", "max_tokens": 2}, COMPLETE: {"prompt": "x", "max_tokens": 2},
        CHAT: {"messages": SAID, "max_tokens": 2}}

# ----------------------------------------------------------------------------------------------------------------------
# Models


class ByteTokenizer(Tokenizer):
    """One id per byte: every character outside ASCII is spread over several tokens. Then END_OF_TEXT, then `words`."""

    kind, special, settings = "bytes", {END_OF_TEXT: END}, {}

    def __init__(self, words=()):
        self.bytes = [*(bytes([i]) for i in range(256)), b"", *words]
        self.vocab_size = len(self.bytes)

    def encode(self, text):
        return list(text.encode())

    def token_bytes(self, i):
        return self.bytes[i]

    def decode(self, ids):
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def chat(self, messages, answer=True):
        lines = ["{role}: {content}\n".format(**message) for message in messages]
        return self.encode("".join(lines) + "assistant: " * answer)

    def continued(self, messages):
        return self.chat(messages, answer=False)[:-1]  # without the end of the line


class ScriptModel(model_file.GPT):
    """Says what it is told to, whatever it reads; then the end of text, for ever. `before` is called in every step.

    The token at position p of the script is the one that follows position p: a prompt of one token gets the whole.
    """

    def __init__(self, vocab_size=257):
        super().__init__(model_file.GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=4096, vocab_size=vocab_size))
        self.forget()

    def forget(self):
        self.say("")
        self.before = lambda idx: None

    def say(self, text, prompt=1):
        """text: a str, bytes or ids; prompt: the number of tokens of the prompt that it follows."""
        text = text.encode() if isinstance(text, str) else text
        self.ids = torch.tensor([END] * (prompt - 1) + [*text, END])

    def trunk(self, idx, cache=None):
        self.before(idx)
        positions = cache.positions(idx.size(1)) if cache is not None else slice(0, idx.size(1))
        if isinstance(positions, slice):
            positions = torch.arange(positions.start, positions.stop)[None]  # (1, T)
        x = torch.zeros_like(super().trunk(idx, cache))
        x[..., 0] = positions  # all that `logits` needs to know
        return x

    def logits(self, x):
        at = x[..., 0].long().clamp(0, len(self.ids) - 1)
        return F.one_hot(self.ids[at], self.config.vocab_size).float() * 100


def tiny_model():
    return random_model(n_layer=2, n_embd=32, block_size=128, vocab_size=257)


def drawn(**changes):
    """A request whose text depends on its seed alone."""
    return dict(temperature=1, top_k=0, max_tokens=12, **changes)


def texts(answer):
    return [choice["text"] for choice in answer["choices"]]


def fail(idx):
    raise RuntimeError("a bug in the model")


def in_step(n, act):
    """A `before` of ScriptModel that acts in step n."""
    steps = iter(range(1, 10**6))
    return lambda idx: act(idx) if next(steps) == n else None


def slow(client, seconds=0.01):
    """The model says x for ever, and takes its time for each."""
    client.model.say("x" * 4090)
    client.model.before = lambda idx: time.sleep(seconds)


@contextlib.contextmanager
def held(client, ready=lambda: True):
    """The model of a client says x for ever, and stands still from the step on that begins when `ready` is true, until
    the block ends."""
    go_on = threading.Event()
    client.model.say("x" * 4090)
    client.model.before = lambda idx: go_on.wait(LIMIT) if ready() else time.sleep(0.01)
    try:
        yield
    finally:
        client.model.before = lambda idx: None
        go_on.set()


# ----------------------------------------------------------------------------------------------------------------------
# Servers in this process

LIVE = []  # clients of the servers that must be well after every test


def settings(**changes):
    return serve.ServeConfig(**{**SETTINGS, **changes})


@contextlib.contextmanager
def serving(model, tokenizer=None, load=None, key=None, run=RUN, **changes):
    """A server in this process; the client to it. load: instead of giving out the model at once."""
    threads = torch.get_num_threads()

    def at_once():
        torch.set_num_threads(1)  # of the engine's: several would wait for each other, for seconds where cores are busy
        return model, tokenizer or ByteTokenizer(), dict(run)
    server = serve.Server(settings(**changes), load or at_once)
    server.start()
    client = Client(server.port, server, model, key)
    try:
        if load is None:
            until(lambda: server.state != "loading")
            assert server.state == "ok", f"the server is {server.state}"
            torch.set_num_threads(threads)  # of this thread, and of those to come
            LIVE.append(client)
        yield client
    finally:
        if client in LIVE:
            LIVE.remove(client)
        server.stop()


@pytest.fixture(scope="module", name="script_server")
def script_server_fixture():
    with serving(ScriptModel()) as client:
        yield client


@pytest.fixture(name="script")
def script_fixture(script_server):
    """A client to the server of a ScriptModel, which has forgotten all that it was told."""
    yield script_server
    script_server.model.forget()


@pytest.fixture(scope="module", name="tiny")
def tiny_fixture():
    """A client to the server of a small random model with a context of 128."""
    with serving(tiny_model()) as client:
        yield client


@pytest.fixture(scope="module", name="keyed")
def keyed_fixture(tmp_path_factory):
    """A client with a key to a server that asks for one."""
    path = tmp_path_factory.mktemp("key") / "key"
    path.write_text(KEY + "\nanother line\n", encoding="utf-8")
    with serving(ScriptModel(), key=KEY, api_key_file=str(path)) as client:
        yield client


@pytest.fixture(name="clock")
def clock_fixture(monkeypatch):
    """The time of all servers, until the test is over."""
    clock = Clock()
    for module in api, engine, serve, web:
        monkeypatch.setattr(module, "time", clock)
    return clock


class Log:
    """What the servers in this process have written in this test. (pytest's own capture is closed between the phases
    of a test, while threads go on writing.)"""

    def __init__(self):
        self.forget()

    def forget(self):
        self.lines, self.may_fail = [], False  # may_fail: a traceback is what the test is about

    def write(self, text, end="\n"):
        self.lines.append(text)
        print(text, end=end, file=sys.stderr)

    def text(self):
        return "\n".join(self.lines)


@pytest.fixture(scope="module", autouse=True, name="no_key")
def no_key_fixture():
    """Whoever runs the tests may have a key."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OPENLLM_API_KEY", raising=False)
        yield


@pytest.fixture(scope="module", name="all_logs")
def all_logs_fixture(no_key):
    """The Log, for a whole file: its servers write between the tests, too."""
    log = Log()
    with pytest.MonkeyPatch.context() as patch:
        for module in console, engine, serve, web:  # all that is written goes through print_error
            patch.setattr(module, "print_error", log.write)
        patch.setattr(threading, "excepthook", lambda args: log.write("".join(traceback.format_exception(
            args.exc_value))))
        yield log


@pytest.fixture(name="log")
def log_fixture(all_logs):
    all_logs.forget()
    return all_logs


@pytest.fixture(autouse=True, name="well_afterwards")
def well_afterwards_fixture(log):
    """After every test: all servers answer, nothing is left over, and the log holds no traceback, prompt or key."""
    Client.sent.clear()
    yield
    for client in LIVE:
        assert until(client.is_well), f"something is left: {client.metrics()}"
    said = log.text()
    assert log.may_fail or "Traceback" not in said
    assert KEY not in said and not [text for text in Client.sent if text in said]


# ----------------------------------------------------------------------------------------------------------------------
# Servers in other processes


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def slow_load(seconds):
    """Reading a run takes so long."""
    import faults
    from training import checkpoint as ckpt
    faults.calls(ckpt, "load_run", lambda real, *args, **kw: (time.sleep(seconds), real(*args, **kw))[1])


def slow_steps(seconds):
    """Every step of the engine takes so long. Two threads compute: the second must not swallow a signal."""
    import faults
    torch.set_num_threads(2)
    faults.calls(engine.Engine, "step", lambda real, *args: (time.sleep(seconds), real(*args))[1])


def held_steps(marker):
    """A text gets its second token when the file `marker` is there."""
    import faults
    faults.calls(engine.Engine, "decode", lambda real, *args: until(lambda: os.path.exists(marker)) and real(*args))


def broken_steps(marker):
    """No step of the model succeeds while the file `marker` is there."""
    import faults

    def step(real, *args, **kw):
        if os.path.exists(marker):
            raise RuntimeError("a bug in the model")
        return real(*args, **kw)
    faults.calls(model_file.GPT, "trunk", step)


def unread_log():
    """Standard error is a pipe that nobody reads, and that holds 4 KB."""
    _, end = os.pipe()
    fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, 4096)
    os.dup2(end, sys.stderr.fileno())


def child(folder, argv, said, fault, arguments):
    """The body of a Process: `python serve.py ARGV` with something changed."""
    os.environ.pop("OPENLLM_API_KEY", None)
    os.chdir(folder)
    sys.stdout = sys.stderr = open(said, "a", encoding="utf-8", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    torch.set_num_threads(1)
    if fault:
        fault(*arguments)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["serve.py", *argv]
    console.command_line(serve.main)


def asserts_are_on():
    try:
        assert not True
    except AssertionError:
        return True
    return False


def serve_without_asserts(said):
    """The body of a process that serves the tiny model as `python -O` would; writes its port to a file."""
    importlib.machinery.SourceFileLoader.get_code = lambda self, name: compile(
        self.get_data(self.path), self.path, "exec", dont_inherit=True, optimize=1)
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None) or ""
        if path.startswith(str(ROOT)) and "site-packages" not in path:
            del sys.modules[name]
    fresh = importlib.import_module("servers")
    with fresh.serving(fresh.tiny_model()) as client:
        if not fresh.asserts_are_on():
            pathlib.Path(said).write_text(str(client.port), encoding="utf-8")
        signal.pause()  # until it is killed


class Process:
    """`python serve.py ARGV` in a process of its own, forked from one that has imported PyTorch."""

    def __init__(self, folder, said, *argv, fault=None, arguments=()):
        import faults
        self.said_path, port = pathlib.Path(said), free_port()
        argv = [f"--port={port}", *map(str, argv)]
        self.client = Client(port)
        self.process = faults.context().Process(target=child, args=(str(folder), argv, str(said), fault, arguments))
        self.process.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.join()

    def said(self):
        return self.said_path.read_text(encoding="utf-8") if self.said_path.exists() else ""

    def status(self):
        """What /health says; None where nobody listens."""
        try:
            return self.client.get("/health").json["status"]
        except OSError:
            return None

    def up(self, *states):
        assert until(lambda: self.status() in (states or ("ok",))), self.said()
        return self

    def signal(self, number=signal.SIGTERM):
        os.kill(self.process.pid, number)

    def wait(self):
        """The exit code."""
        self.process.join(LIMIT)
        assert self.process.exitcode is not None, "it does not end"
        return self.process.exitcode

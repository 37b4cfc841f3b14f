# SPDX-License-Identifier: GPL-3.0-only
"""
What the tests of the server share: stand-in models, servers in this process and in others, and a client.

    script.model.say("hello")                               # the model whose text is known in advance
    client.post("/generate", prompt="x", stop="l").json     # a whole request; the form of every error is checked
    wire = client.wire(b"GET /health HTTP/1.1\r\n...")      # bytes on a socket, for what no client would send

As a program, `python -O tests/servers.py` serves the tiny model until its standard input ends, and prints its port.
"""
import concurrent.futures
import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import sys
import threading
import time
import traceback

import pytest
import torch
from conftest import random_model
from torch.nn import functional as F

from runtime import console
from serving import engine
import model as model_file
import serve
from serving import web
from tokenizer import END_OF_TEXT

END = 256  # the id of END_OF_TEXT
KEY = "sesame-0123456789"
SECRET = "/secret/place"  # where the run is said to lie: no answer may tell
RUN = {"path": f"{SECRET}/best.pt", "step": 40, "source": ["words", f"{SECRET}/notes.txt?token=secret"],
       "val_loss": 2.5, "tokenizer_sha256": "ab" * 32, "chat": True}
SETTINGS = dict(port=0, rows=4, max_queue=4, max_connections=16, header_timeout=2, body_timeout=2)

os.environ.pop("OPENLLM_API_KEY", None)  # whoever runs the tests may have one

# ----------------------------------------------------------------------------------------------------------------------
# Models


class ByteTokenizer:
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


# ----------------------------------------------------------------------------------------------------------------------
# A client


def until(true, seconds=2.0):
    """Wait for a condition. Returns what it gave last."""
    end = time.monotonic() + seconds
    while not (value := true()) and time.monotonic() < end:
        time.sleep(0.005)
    return value


def together(calls):
    """Call all functions at once, each in a thread of its own; their results."""
    with concurrent.futures.ThreadPoolExecutor(max(len(calls), 1)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def encoded(body):
    return body if isinstance(body, bytes) else body.encode() if isinstance(body, str) else json.dumps(body).encode()


def request(method, path, body=None, version="HTTP/1.1", **headers):
    """The bytes of a request. A header is left out by None; _ in its name stands for -."""
    named = {"Host": "localhost"}
    if body is not None:
        body = encoded(body)
        named |= {"Content-Type": "application/json", "Content-Length": len(body)}
    named |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path} {version}", *(f"{name}: {value}" for name, value in named.items() if value is not None)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


class Answer:
    """A response. One that reports an error must have the form of an error, whatever the test looks for."""

    def __init__(self, status, version, headers, body):
        self.status, self.version, self.headers, self.body = status, version, headers, body
        assert SECRET.encode() not in body, "an answer tells where the run lies"
        if status >= 400 and body and set(self.json) != {"status"}:  # the last is what /health says
            assert set(self.json) == {"error"}, self.json
            error = self.error
            assert set(error) == {"message", "type", "param", "code"}, error
            assert isinstance(error["message"], str) and 0 < len(error["message"]) <= 300, error
            assert isinstance(error["type"], str), error
            assert all(error[name] is None or isinstance(error[name], str) for name in ("param", "code")), error
            assert not re.search(r"0x[0-9a-f]{6}|Traceback|\.py\b", error["message"]), error

    @property
    def json(self):
        assert self.headers["content-type"].startswith("application/json"), self.headers
        assert self.body.isascii()
        return json.loads(self.body, parse_constant=lambda name: pytest.fail(f"{name} in an answer"))

    @property
    def error(self):
        return self.json["error"]

    def __repr__(self):
        return f"<{self.status} {self.body[:300]!r}>"


class Wire:
    """A connection on which any bytes can be sent."""

    def __init__(self, port, data=b"", timeout=10, buffer=None):
        self.socket = socket.socket()
        if buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.socket.settimeout(timeout)
        self.socket.connect(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.socket.makefile("rb")
        self.send(data)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.file.close()
        self.socket.close()

    def send(self, data):
        with contextlib.suppress(ConnectionError):  # the other side may have answered and closed before the end
            self.socket.sendall(data)
        return self

    def end(self):
        """No more comes from us."""
        with contextlib.suppress(OSError):  # the other side has gone
            self.socket.shutdown(socket.SHUT_WR)
        return self

    def head(self):
        """(status, version, {name in small letters: value}) of the next response."""
        line = self.file.readline()
        assert re.fullmatch(rb"HTTP/1\.[01] [0-9]{3} [ -~]*\r\n", line), line
        headers = {}
        while (header := self.file.readline()) != b"\r\n":
            assert re.fullmatch(rb"[A-Za-z-]+: [ -~]*\r\n", header), header
            name, value = header.decode().rstrip("\r\n").split(": ", 1)
            assert name.lower() not in headers, f"two {name}"
            headers[name.lower()] = value
        return int(line.split()[1]), line[:8].decode(), headers

    def answer(self, method="GET"):
        """The next response, whole."""
        status, version, headers = self.head()
        if method == "HEAD" or status in (100, 204):
            body = b""
        elif "chunked" in headers.get("transfer-encoding", ""):
            body = b"".join(self.chunks())
        elif "content-length" in headers:
            body = self.file.read(int(headers["content-length"]))
            assert len(body) == int(headers["content-length"])
        else:
            body = self.file.read()
        return Answer(status, version, headers, body)

    def chunks(self):
        while True:
            size = self.file.readline()
            assert re.fullmatch(rb"[0-9a-fA-F]+\r\n", size), size
            chunk = self.file.read(int(size, 16))
            assert self.file.read(2) == b"\r\n"
            if not chunk:
                return
            yield chunk

    def closed(self, within=1.0):
        """Does the other side close the connection within this time, and send nothing before?"""
        self.socket.settimeout(within)
        try:
            return self.file.read(1) == b""
        except ConnectionError:
            return True
        except TimeoutError:
            return False


class Stream:
    """Server-sent events as they come; the time of each since the request is in `times`."""

    def __init__(self, wire):
        self.wire, self.times, started = wire, [], time.monotonic()
        self.status, self.version, self.headers = wire.head()
        assert self.status == 200 and self.headers["content-type"].startswith("text/event-stream"), self.headers
        self.parts, self.started = wire.chunks(), started

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.wire.close()

    def __iter__(self):
        """The raw text of each event; the last one is [DONE]."""
        buffer = b""
        for part in self.parts:
            buffer += part
            while b"\n\n" in buffer:
                event, buffer = buffer.split(b"\n\n", 1)
                assert event.startswith(b"data: ") and event.isascii() and b"\n" not in event, event
                self.times.append(time.monotonic() - self.started)
                yield event[6:].decode()
        assert buffer == b""

    def first(self, n):
        """The first n events that are parsed, no more is read."""
        events = iter(self)
        return [json.loads(next(events)) for _ in range(n)]

    def all(self):
        """All events, parsed, to the end that every stream must have."""
        *events, done = self
        assert done == "[DONE]"
        return [json.loads(event) for event in events]


def chosen(events, index=0):
    """The text that a stream of /generate or /v1 carried for one choice."""
    text = ""
    for event in events:
        for choice in event.get("choices", [event]):
            if choice.get("index", 0) == index:
                text += choice.get("text") or choice.get("delta", {}).get("content") or ""
    return text


class Client:
    """Sends requests to a server, and remembers their texts: none of them may appear in its log."""

    sent = set()

    def __init__(self, port, server=None, model=None, key=None):
        self.port, self.server, self.model, self.key = port, server, model, key

    def wire(self, data=b"", **settings):
        return Wire(self.port, data, **settings)

    def raw(self, data, **settings):
        """The first answer to these bytes."""
        with self.wire(data, **settings) as wire:
            return wire.answer()

    def request(self, method, path, body=None, **headers):
        """The bytes of a request, with the key where there is one."""
        if isinstance(body, dict):
            self.sent.update(text for text in strings(list(body.values())) if len(text) > 5)
        host = {"Host": f"127.0.0.1:{self.port}"}
        key = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return request(method, path, body, **{**host, **key, **headers})

    def ask(self, method, path, body=None, **headers):
        """The answer to the only request of a connection. When this returns, the server has written its log."""
        with self.wire(self.request(method, path, body, **{"Connection": "close", **headers})) as wire:
            answer = wire.answer(method)
            assert wire.closed(2), "the connection is still open, or there is a second answer"
            return answer

    def get(self, path, **headers):
        return self.ask("GET", path, **headers)

    def post(self, path, body=None, **fields):
        return self.ask("POST", path, fields if body is None else body)

    def ok(self, path, **body):
        """The JSON of an answer that must be 200."""
        answer = self.post(path, body)
        assert answer.status == 200, (body, answer)
        return answer.json

    def generate(self, prompt="x", **body):
        return self.ok("/generate", prompt=prompt, **body)

    def complete(self, prompt="x", **body):
        return self.ok("/v1/completions", prompt=prompt, **body)

    def chat(self, content="x", **body):
        return self.ok("/v1/chat/completions", messages=[{"role": "user", "content": content}], **body)

    def text(self, prompt="x", **body):
        return self.generate(prompt, **body)["generated_text"]

    def stream(self, path="/generate", **body):
        body = {"prompt": "x", **body} if "messages" not in body else body
        return Stream(self.wire(self.request("POST", path, {**body, "stream": True})))

    def events(self, path="/generate", **body):
        with self.stream(path, **body) as stream:
            return stream.all()

    def refused(self, param, path="/generate", **body):
        """The message of the 400 that this request must get for this field."""
        answer = self.post(path, body)
        assert answer.status == 400 and answer.error["param"] == param, (body, answer)
        assert answer.error["type"] == "invalid_request_error"
        return answer.error["message"]

    def metrics(self):
        """{name with its labels: value} of /metrics. (A moment ago there may have been too many connections.)"""
        answer = until(lambda: (answer := self.get("/metrics")).status == 200 and answer)
        lines = answer.body.decode().splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    def metric(self, name):
        return self.metrics()[name]

    def rest(self):
        """(requests that run, requests that wait, connections but the one that asks): zeros when a test is over."""
        metrics = self.metrics()
        running, waiting, connections = (
            int(metrics[f"openllm_{name}"]) for name in ("requests_running", "requests_waiting", "connections"))
        return running, waiting, connections - 1

    def busy(self):
        """(requests that run, requests that wait)"""
        return self.rest()[:2]

    def fill(self, n, **body):
        """n streams of a slow model, one after the other, each running or waiting before the next is sent."""
        body = {"prompt": "x", "max_tokens": 4000, "stream": True, **body}
        wires = []
        for _ in range(n):
            wires.append(self.wire(self.request("POST", "/generate", body)))
            assert until(lambda: sum(self.busy()) == len(wires)), self.busy()
        return wires


def strings(value):
    """All texts in a JSON value, but the keys."""
    if isinstance(value, dict):
        value = list(value.values())
    return [text for item in value for text in strings(item)] if isinstance(value, list) else \
        [value] if isinstance(value, str) else []


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
            until(lambda: server.state == "ok", 10)
            torch.set_num_threads(threads)  # of this thread, and of those to come
            LIVE.append(client)
        yield client
    finally:
        if client in LIVE:
            LIVE.remove(client)
        server.stop()


@pytest.fixture(scope="session", name="script_server")
def script_server_fixture():
    with serving(ScriptModel()) as client:
        yield client


@pytest.fixture(name="script")
def script_fixture(script_server):
    """A client to the server of a ScriptModel, which has forgotten all that it was told."""
    yield script_server
    script_server.model.forget()


@pytest.fixture(scope="session", name="tiny")
def tiny_fixture():
    """A client to the server of a small random model with a context of 128."""
    with serving(tiny_model()) as client:
        yield client


class Log:
    """What the servers in this process have written in this test. (pytest's own capture is closed between the phases
    of a test, while threads go on writing.)"""

    def __init__(self):
        self.forget()

    def forget(self):
        self.lines, self.may_fail = [], False  # may_fail: a traceback is what the test is about

    def write(self, text):
        self.lines.append(text)
        print(text, file=sys.stderr)

    def text(self):
        return "\n".join(self.lines)


@pytest.fixture(scope="session", name="all_logs")
def all_logs_fixture():
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
        health = client.get("/health")
        assert health.status == 200 and health.json == {"status": "ok"}
        assert until(lambda: client.rest() == (0, 0, 0), 1.5), f"something is left: {client.rest()}"
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
    """Every step of the model takes so long. Two threads do it: the second must not swallow a signal."""
    import faults
    torch.set_num_threads(2)
    faults.calls(model_file.GPT, "trunk", lambda real, *args, **kw: (time.sleep(seconds), real(*args, **kw))[1])


def broken_steps(marker):
    """No step of the model succeeds while the file `marker` is there."""
    import faults

    def step(real, *args, **kw):
        if os.path.exists(marker):
            raise RuntimeError("a bug in the model")
        return real(*args, **kw)
    faults.calls(model_file.GPT, "trunk", step)


def unread_log():
    """Standard error is a pipe that nobody reads."""
    _, end = os.pipe()
    os.dup2(end, sys.stderr.fileno())


def child(folder, argv, said, fault, arguments):
    """The body of a Process: `python serve.py ARGV` with something changed."""
    os.chdir(folder)
    sys.stdout = sys.stderr = open(said, "a", encoding="utf-8", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    torch.set_num_threads(1)
    if fault:
        fault(*arguments)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["serve.py", *argv]
    console.command_line(serve.main)


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
        assert until(lambda: self.status() in (states or ("ok",)), 60), self.said()
        return self

    def signal(self, number=signal.SIGTERM):
        os.kill(self.process.pid, number)
        return time.monotonic()

    def wait(self, timeout=60):
        """The exit code."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, "it does not end"
        return self.process.exitcode


if __name__ == "__main__":
    with serving(tiny_model()) as alone:
        print(alone.port, flush=True)
        sys.stdin.read()

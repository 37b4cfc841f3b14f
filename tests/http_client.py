# SPDX-License-Identifier: GPL-3.0-only
"""
A client that looks at every byte: what the tests of the server share.

    client.post("/generate", prompt="x", stop="l").json     # a whole request; the form of every error is checked
    wire = client.wire(b"GET /health HTTP/1.1\r\n...")      # bytes on a socket, for what no client would send
"""
import concurrent.futures
import contextlib
import json
import re
import socket
import time

import pytest
from engines import LIMIT

SECRET = "/secret/place"  # where the run is said to lie: no answer may tell


def until(true, every=0.005):
    """Wait for a condition. Returns what it gave last: something false only where it hangs."""
    end = time.monotonic() + LIMIT
    while not (value := true()) and time.monotonic() < end:
        time.sleep(every)
    return value


def together(calls, at_once=None):
    """Call all functions in threads, all at once or so many; their results."""
    with concurrent.futures.ThreadPoolExecutor(at_once or len(calls)) as pool:
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

    def __init__(self, port, data=b"", buffer=None):
        self.socket = socket.socket()
        if buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.socket.settimeout(LIMIT)
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

    def closed(self):
        """Does the other side close the connection, and send nothing before?"""
        try:
            return self.file.read(1) == b""
        except ConnectionError:
            return True
        except TimeoutError:
            return False


class Stream:
    """Server-sent events as they come."""

    def __init__(self, wire):
        self.wire = wire
        self.status, self.version, self.headers = wire.head()
        assert self.status == 200 and self.headers["content-type"].startswith("text/event-stream"), self.headers
        self.parts = wire.chunks()

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
            assert wire.closed(), "the connection is still open, or there is a second answer"
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
        return numbers(answer.body)

    def metric(self, name):
        return self.metrics()[name]

    def busy(self):
        """(requests that run, requests that wait)"""
        metrics = self.metrics()
        return int(metrics["openllm_requests_running"]), int(metrics["openllm_requests_waiting"])

    def is_well(self):
        """Healthy, with no request and no connection but the one that asks?"""
        last = self.request("GET", "/metrics", Connection="close")
        with self.wire(self.request("GET", "/health") + last) as wire:
            health, answer = wire.answer(), wire.answer()
            assert wire.closed()
        assert health.status == 200 and health.json == {"status": "ok"}, health
        if answer.status == 503:  # a moment ago there were too many connections
            return False
        metrics = numbers(answer.body)
        left = [metrics[f"openllm_{name}"] for name in ("requests_running", "requests_waiting", "connections")]
        return left == [0, 0, 1]

    def fill(self, n, **body):
        """n streams of a slow model, one after the other, each running or waiting before the next is sent."""
        body = {"prompt": "x", "max_tokens": 4000, "stream": True, **body}
        wires = []
        for _ in range(n):
            wires.append(self.wire(self.request("POST", "/generate", body)))
            assert until(lambda: sum(self.busy()) == len(wires)), f"{self.busy()} run and wait, not {len(wires)}"
        return wires


def numbers(metrics):
    """{name with its labels: value} of what /metrics says."""
    lines = [line for line in metrics.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def strings(value):
    """All texts in a JSON value, but the keys."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [text for item in value for text in strings(item)] if isinstance(value, list) else []

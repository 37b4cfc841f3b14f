# SPDX-License-Identifier: GPL-3.0-only
"""
The server as whoever writes bytes into its port sees it: what no client library sends, and accidents by the thousand.

A letter and a number in the name of a test are explained in servers.py.
"""
import json
import random
import re
import select
import socket
import threading
import time

import pytest
from http_client import LIMIT, request, together, until
from servers import (  # noqa: F401 (some are fixtures)
    KEY, ScriptModel, all_logs_fixture, clock_fixture, held, log_fixture, no_key_fixture, script_fixture,
    script_server_fixture, serving, tiny_model, well_afterwards_fixture)

from serving import web

PROMPT = {"prompt": "x", "max_tokens": 2}
BODY = json.dumps(PROMPT).encode()
HEALTH = request("GET", "/health")
MB = 1 << 20


def post(body=BODY, path="/generate", **headers):
    return request("POST", path, body, **headers)


def with_lines(*lines, body=BODY):
    """A POST whose headers are these lines, beside Host and Content-Type."""
    head = [b"POST /generate HTTP/1.1", b"Host: localhost", b"Content-Type: application/json"]
    return b"\r\n".join([*head, *(line.encode("latin-1") for line in lines), b"", body])


def only_answer(client, data):
    """The answer to these bytes, after which the connection must be closed with nothing more on it."""
    with client.wire(data) as wire:
        answer = wire.answer()
        assert answer.headers["connection"] == "close"
        assert wire.closed(), "still open, or a second answer"
        return answer


# ----------------------------------------------------------------------------------------------------------------------
# Bodies


@pytest.mark.parametrize("body", [
    b"{", b"", b'"x"', b"[]", b"42", b"null", b"true", b'{"prompt": "\xff\xfe"}', b'{"prompt": "x"} {}', b"\0" * 100,
    b"{'prompt': 'x'}", b'{"prompt": "x",}', b'{"prompt": "a\nb"}'])
def test_f1_not_an_object(script, body):
    """A body that is no JSON object is a 400."""
    answer = script.raw(post(body))
    assert answer.status == 400 and answer.error["type"] == "invalid_request_error"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_f1_other_encodings(script, encoding):
    """JSON is UTF-8 here. (RFC 8259 allows to read a byte order mark, too.)"""
    assert script.raw(post(json.dumps(PROMPT).encode(encoding))).status == 400


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"a":' * 50_000, b'{"prompt": "x", "seed": ' + b"1" * 10_000 + b"}",
                                  b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"],
                         ids=["lists", "objects", "digits", "balanced"])
def test_f2_deep_and_long(script, body):
    """JSON of endless depth, and a number of endless digits, are a 400 and no more."""
    assert script.raw(post(body)).status == 400


@pytest.mark.parametrize("body", [
    b'{"prompt": ' + b"[" * 300 + b"]" * 300 + b"}",
    b'{"prompt": "x", "max_tokens": ' + b"[" * 300 + b"]" * 300 + b', "max_length": ' + b"[" * 300 + b"]" * 300 + b"}",
    b'{"prompt": [' + b"{}," * 300_000 + b"1]}", b'{"prompt": [' + b"1," * 400_000 + b"1]}"],
    ids=["lists", "two fields", "objects", "numbers"])
def test_f2_many_brackets(script, body):
    """Deep values are refused as values; a body of too many of them is refused as a whole."""
    answer = script.raw(post(body))
    assert answer.status == 400 and ("more than 200,000" in answer.error["message"]) == (len(body) > 10_000)


def test_f2_few_bodies_are_parsed_at_once(script, monkeypatch):
    """What many clients send at once becomes Python objects for a few of them only, until all have been told."""
    now, most, lock, real = [0], [0], threading.Lock(), script.server.served.tokenizer.encode
    all_there = threading.Event()

    def encode(text):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        if not all_there.is_set():
            assert until(lambda: all_there.is_set() or script.server.web.at_work() == 12), "not all have been read"
            all_there.set()
        with lock:
            now[0] -= 1
        return real(text)
    monkeypatch.setattr(script.server.served.tokenizer, "encode", encode)
    answers = together([lambda: script.raw(post()) for _ in range(12)])
    assert {answer.status for answer in answers} <= {200, 503}  # (eight of them may run and wait)
    assert most[0] == web.PARSERS < 12


def test_f3_the_same_key_twice(script):
    """The last one counts. (RFC 8259 leaves that open; to refuse it would be right, too.)"""
    answer = script.raw(post(b'{"prompt": "a", "prompt": "bb", "max_tokens": 1}'))
    assert answer.status == 200 and answer.json["prompt_tokens"] == 2


@pytest.mark.parametrize("kind, status", [
    ("text/plain", 415), (None, 415), ("", 415), ("application/x-www-form-urlencoded", 415),
    ("multipart/form-data; boundary=x", 400), ("application/jsonx", 415), ("text/plain; application/json", 415),
    ("application/json; charset=utf-8", 200), ("Application/JSON", 200)])
def test_f4_content_types(script, kind, status):
    """A body has to be called JSON, which a form of another site cannot do."""
    assert script.raw(post(Content_Type=kind)).status == status


# ----------------------------------------------------------------------------------------------------------------------
# Where a body ends


def test_f5_no_length(script):
    """A POST without Content-Length is a 411, and the connection is closed."""
    assert only_answer(script, post(Content_Length=None)).status == 411


@pytest.mark.parametrize("length", ["-1", "+5", "5_0", "\u0663".encode().decode("latin-1"), "\xb2", "0x5", "5, 5", "",
                                    "1" + "0" * 10, "5\r\n 0", "5 5", "5;", "5.0", "1e1"])
def test_f6_lengths_that_are_none(script, length):
    """A Content-Length that is not one plain number is a 400, and the connection is closed."""
    assert only_answer(script, with_lines(f"Content-Length: {length}")).status == 400


@pytest.mark.parametrize("lines", [
    ["Content-Length: 30", "Content-Length: 30"], ["Content-Length: 30", "Content-Length: 5"],
    ["Content-Length: 5", "content-length: 30"], ["Content-Length : 30"], ["Content-Length: 30", "no colon"],
    ["Content-Length: 30", " folded: yes"], ["Content-Length: 30", ": no name"]], ids=str)
def test_f7_headers_that_can_be_read_in_two_ways(script, lines):
    """Two lengths, a space before the colon, a folded line: a 400, and the connection is closed."""
    assert only_answer(script, with_lines(*lines)).status == 400


SMUGGLED = b"0\r\n\r\n" + HEALTH


@pytest.mark.parametrize("lines, status", [
    (["Transfer-Encoding: xchunked"], 501), (["Transfer-Encoding: identity"], 501), (["Transfer-Encoding: "], 501),
    (["transfer-encoding: gzip, chunked"], 501), (["Transfer-Encoding:\x0bchunked"], 501),
    (["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"], 501),
    # With a length beside it, the sender means to smuggle a request (RFC 9112).
    (["Transfer-Encoding: chunked", "Content-Length: 5"], 400),
    (["Content-Length: 5", "Transfer-Encoding: chunked"], 400),
    (["Transfer-Encoding : chunked", "Content-Length: 5"], 400)], ids=str)
def test_f8_only_chunks_are_taken(script, lines, status):
    """Any Transfer-Encoding but chunked, or one beside a length, is refused, and nothing behind it is taken for a
    request."""
    assert only_answer(script, with_lines(*lines, body=SMUGGLED)).status == status


@pytest.mark.parametrize("path, status", [("/nope", 404), ("/health", 405)])
def test_f9_no_request_in_a_body(script, path, status):
    """A body that was not read is never taken for the next request."""
    body = HEALTH.ljust(60)
    assert only_answer(script, post(body, path)).status == status
    assert only_answer(script, post(body, Content_Type="text/plain")).status == 415
    get = b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(HEALTH)
    assert only_answer(script, get + HEALTH).status == 200  # (400 for a GET with a body would be right, too)


def test_f10_a_body_that_is_only_announced(script):
    """A body of 2 GB is refused when it is announced, and takes no memory."""
    memory = script.metric("openllm_resident_memory_bytes")
    assert only_answer(script, post(b"", Content_Length=2**31)).status == 413  # without any of it
    assert script.metric("openllm_resident_memory_bytes") - memory < 50 * MB


def test_f11_a_body_that_is_too_long(script):
    """A client that sends too much can read the 413, for the connection is not reset."""
    for size in MB + 1, 3 * MB:
        with script.wire() as wire:
            wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)  # the other side has to take it
            wire.socket.sendall(post(BODY.ljust(size)))  # all of it: the connection must not be reset
            assert wire.answer().status == 413 and wire.closed()
    assert script.raw(post(BODY.ljust(MB))).status == 200


@pytest.mark.parametrize("sent", [0, 10])
def test_f12_half_a_body(script, sent):
    """A client that stops in the middle of its body gets a 400."""
    with script.wire(post(b"0123456789"[:sent], Content_Length=100)).end() as wire:
        assert wire.answer().status == 400
        assert wire.closed()


# ----------------------------------------------------------------------------------------------------------------------
# Who is too slow


def test_f12_f13_f14_the_slow_are_cut_off(script, clock, monkeypatch):
    """Time is limited as a whole, not for each byte: of a head, of a body, and of doing nothing."""
    server = script.server.web
    monkeypatch.setattr(server.settings, "header_timeout", 20)
    monkeypatch.setattr(server.settings, "body_timeout", 19)
    looked, look = [], server.service_actions
    monkeypatch.setattr(server, "service_actions", lambda: (look(), looked.append(clock.now)))

    def closed(seconds):
        """Which are closed when so many seconds more have gone by?"""
        clock.go_on(seconds)
        assert until(lambda: looked and looked[-1] == clock.now), "nobody looks at the time"
        return {name for name, wire in wires.items() if select.select([wire.socket], [], [], 0)[0]}
    whole = post(b"0123456789", Content_Length=100)  # of which the last 90 bytes never come
    starts = {"nothing": b"", "half a head": whole[:30], "half a body": whole, "an answered request": HEALTH,
              "a head, byte by byte": b"", "a body, byte by byte": whole}
    wires = {name: script.wire(data) for name, data in starts.items()}
    wires["an answered request"].answer()
    due = [clock.now + 19] * 2 + [clock.now + 20] * 4
    assert until(lambda: sorted(server.deadlines.values()) == due), "their time has not begun"
    for at in range(6):
        wires["a head, byte by byte"].send(whole[at:at + 1])
        wires["a body, byte by byte"].send(b"x")
        assert closed(3) == set()
    assert closed(1.5) == {"half a body", "a body, byte by byte"}
    assert closed(1) == set(wires)
    assert all(wire.closed() for wire in wires.values())  # without an answer


@pytest.mark.parametrize("sent", [0, 9, len(post()) - 5], ids=["nothing", "a head", "a body"])
def test_f14_the_silent_make_room(sent):
    """Whoever has sent nothing, or half of something, gives way to who comes, the oldest of the largest crowd."""
    data, rest = post()[:sent], post()[sent:]
    with serving(ScriptModel(), max_connections=8, body_timeout=10 * LIMIT) as client:
        server, idle = client.server.web, []

        def wait_for_bodies():
            return sum(deadline > time.monotonic() + 5 * LIMIT for deadline in server.deadlines.copy().values())
        for n in range(1, 9):  # each is read as far as it goes before the next one comes
            idle.append(client.wire(data))
            assert until(lambda: len(server.silent) == n and (sent < 10 or wait_for_bodies() == n))
        for _ in range(3):
            assert client.post("/generate", prompt="x").status == 200
        assert idle[0].closed()
        assert idle[-1].send(rest).answer().status == 200
        idle += [client.wire(data) for _ in range(100)]
        assert client.post("/generate", prompt="x").status == 200
        assert until(lambda: len(server.connections) <= 8 + web.SPARE)
        for wire in idle:
            wire.close()


def test_f14_a_crowd_pushes_out_its_own():
    """A crowd of one address leaves alone who came from another, however long that one is silent."""
    with serving(ScriptModel(), max_connections=8) as client:
        with client.wire() as other:
            server = client.server.web
            assert until(lambda: len(server.silent) == 1)
            server.silent.update(dict.fromkeys(server.silent, "192.0.2.1"))
            crowd = [client.wire() for _ in range(40)]
            assert client.raw(HEALTH).status == 200
            assert other.send(HEALTH).answer().status == 200
            for wire in crowd:
                wire.close()


def test_f14_health_is_answered_when_all_are_at_work():
    """Other requests are told to come back, and whoever is at work is not disturbed."""
    with serving(ScriptModel(), max_connections=4) as client:
        with held(client):
            body = json.dumps({"prompt": "x", "max_tokens": 100, "stream": True}).encode()
            streams = [client.wire(post(body)) for _ in range(4)]
            assert [wire.head()[0] for wire in streams] == [200] * 4
            silent = [client.wire() for _ in range(30)]
            for _ in range(3):
                assert client.raw(HEALTH).status == 200
                answer = only_answer(client, post())
                assert answer.status == 503 and answer.headers["retry-after"] == "1"
        assert all(b"".join(wire.chunks()).endswith(b"data: [DONE]\n\n") for wire in streams)
        for wire in streams + silent:
            wire.close()


# ----------------------------------------------------------------------------------------------------------------------
# Heads


@pytest.mark.parametrize("head, status", [
    ("GET /health HTTP/1.1\r\nHost: localhost\r\n" + "".join(f"X-{i}: 1\r\n" for i in range(101)), 431),
    (f"GET /health HTTP/1.1\r\nHost: localhost\r\nX: {'x' * 65536}\r\n", 431),
    ("GET /health HTTP/1.1\r\nHost: localhost\r\n" + f"X: {'x' * 60_000}\r\n" * 3, 431),
    ("GET /health HTTP/1.1\r\nHost: localhost\r\nX: 1\rY: 2\r\n", 400),
    (f"GET /{'x' * 65536} HTTP/1.1\r\nHost: localhost\r\n", 414)], ids=["headers", "header", "all", "CR", "path"])
def test_f15_too_much(script, head, status):
    """A head with too much of anything, or with a bare CR, has the status that says so."""
    answer = only_answer(script, head.encode() + b"\r\n")
    assert answer.status == status and answer.error["message"]


HELLO = bytes.fromhex("16030100c8010000c40303") + bytes(range(190))  # how TLS begins


@pytest.mark.parametrize("data, status", [
    (b"GET /health\r\n\r\n", 400), (b"GET /health HTTP/0.9\r\n\r\n", 400), (b"GET /health HTTP/2.0\r\n\r\n", 505),
    (b"GET /health HTTP/1.1.1\r\n\r\n", 400), (b"GARBAGE\r\n\r\n", 400), (HELLO, 400),
    (b"\0" * MB, 414),  # (a line that is too long, before it is wrong; 400 would be right, too)
    (b"GET /health HTTP/x.y\r\n\r\n", 400), (b"GET /health FTP/1.1\r\n\r\n", 400),
    (b"GET /a b HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),  # (how HTTP/2 begins)
    (b"GET /health HTTP/1.1\r\n\r\n", 400),
    (b"GET \xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n", 404)],  # (no such path; 400 would be right, too)
    ids=lambda value: repr(value)[:30])
def test_f16_not_http(script, data, status):
    """What is no HTTP/1 has a status that says so, and nothing of it is repeated."""
    with script.wire(data).end() as wire:
        answer = wire.answer()
        assert answer.status == status and wire.closed()
    for word in b"GARBAGE", b"FTP", b"1.1.1", b"x.y", b"\xff":
        assert word not in answer.body


def test_f17_many_requests_on_a_connection(script):
    """A connection serves many requests, also such as are sent without waiting, in their order."""
    script.model.say("ok")
    with script.wire() as wire:
        for path, status in ("/health", 200), ("/nope", 404), ("/health", 200):
            assert wire.send(request("GET", path)).answer().status == status
        assert wire.send(post()).answer().json["generated_text"] == "ok"
        wire.send(HEALTH + request("GET", "/info") + post() + request("GET", "/v1/models"))  # without waiting
        assert all(key in wire.answer().json for key in ("status", "name", "generated_text", "data"))
        assert wire.send(post(b"{}")).answer().status == 400
        assert wire.send(HEALTH).answer().status == 200


def test_f18_the_last_request_of_a_connection(script):
    """Connection: close, and HTTP/1.0, end a connection after the answer."""
    script.model.say("ok")
    for last in (dict(Connection="close"), dict(version="HTTP/1.0"), dict(Connection="Close"),
                 dict(version="HTTP/1.0", Connection="close")):
        assert only_answer(script, request("GET", "/health", **last)).status == 200
        assert only_answer(script, post(**last)).json["generated_text"] == "ok"
        assert only_answer(script, post(b'{"prompt": "x", "stream": true}', **last)).body.endswith(b"[DONE]\n\n")


def test_f19_may_i_send(script, tmp_path):
    """`100 Continue` comes where a body is wanted; else the answer does, before the body is sent."""
    def asked(client, **headers):
        return client.wire(client.request("POST", "/generate", BODY, Expect="100-continue", **headers)[:-len(BODY)])
    with asked(script) as wire:
        assert wire.answer().status == 100
        assert wire.send(BODY).answer().status == 200
    with asked(script, Content_Length=3 * 10**9) as wire:
        assert wire.answer().status == 413 and wire.closed()
    with asked(script, Content_Type="text/plain") as wire:
        assert wire.answer().status == 415 and wire.closed()
    path = tmp_path / "key"
    path.write_text(KEY, encoding="utf-8")
    with serving(ScriptModel(), key=KEY, api_key_file=str(path)) as client:
        with asked(client, Authorization=None) as wire:
            assert wire.answer().status == 401 and wire.closed()
        with asked(client) as wire:
            assert wire.answer().status == 100


# ----------------------------------------------------------------------------------------------------------------------
# What is repeated


def test_f20_the_log(script, log):
    """The log has a line for each request, with nothing in it that the client chose."""
    script.get("/x%0d%0aFAKE?question=word")
    script.raw(b"GET /\x1b[31m\x07 HTTP/1.1\r\nHost: localhost\r\nUser-Agent: \x1b[2J\r\n\r\n")
    script.raw(request("GET", "/health", User_Agent="\x1b[31mred\x1b[0m", X_Api_Key="a-secret-key"))
    script.raw(request("GET", "/health", Authorization="Bearer a-secret-key"))
    script.raw(post(b'{"prompt": "a secret prompt", "max_tokens": 1, "stop": "a secret stop"}'))
    script.raw(post(b'{"prompt": "a secret prompt", "a secret field": 1}'))
    script.raw(post(b'{"messages": [{"role": "user", "content": "a secret message"}]}', "/v1/chat/completions"))
    assert until(lambda: "/v1/chat/completions" in log.text())
    said = log.text()
    assert re.fullmatch(r"[\n -~]*", said), ascii(said)
    assert "\nFAKE" not in said and "secret" not in said and "question" not in said
    assert 5 <= len(said.splitlines()) <= 7 and said.count("/generate") == 2


MARK = "<script>alert(1)</script>"


@pytest.mark.parametrize("data", [
    request("GET", "/" + MARK), request(MARK, "/health"), request("GET", "/health", Host=MARK),
    request("OPTIONS", "/generate", Origin=MARK), post(Content_Type=MARK), post(Transfer_Encoding=MARK),
    f"GET /health {MARK}\r\n\r\n".encode(), f"{MARK}\r\n\r\n".encode(), f"{MARK} / HTTP/1.1\r\n\r\n".encode()])
def test_f21_nothing_of_a_head_is_repeated(script, data):
    """No answer is HTML, or repeats a word of the head of a request."""
    answer = script.raw(data)
    assert answer.status >= 400 and answer.headers["content-type"].startswith("application/json")
    assert b"script" not in answer.body and "script" not in str(answer.headers)


@pytest.mark.parametrize("changes", [{MARK: 1}, {"temperature": MARK}, {"stop": [1, MARK]}, {"prompt": [MARK]}])
def test_f21_what_is_repeated_of_a_body_is_no_page(script, changes):
    """What an error repeats of a value is JSON, in which no tag can begin."""
    answer = script.raw(post(json.dumps({**PROMPT, **changes}).encode()))
    assert answer.status == 400 and answer.headers["content-type"].startswith("application/json")


# ----------------------------------------------------------------------------------------------------------------------
# F22: accidents

GOOD = [
    ("POST", "/generate", {"prompt": "ab", "max_tokens": 2, "temperature": 1.5, "top_k": 5, "top_p": 0.9, "seed": 7}),
    ("POST", "/generate", {"prompt": [104, 105], "max_tokens": 3, "stop": ["a", "bc"], "min_p": 0.1}),
    ("POST", "/generate", {"prompt": "\u5abd\U0001f917", "max_tokens": 2, "stream": True, "logprobs": 2}),
    ("POST", "/generate", {"prompt": "a", "max_tokens": 2, "repetition_penalty": 1.2, "logit_bias": {"65": 5}}),
    ("POST", "/generate", {"prompt": "a", "max_length": 2, "presence_penalty": 1, "frequency_penalty": -1}),
    ("POST", "/v1/completions", {"model": "m", "prompt": ["a", "b"], "max_tokens": 2, "n": 2, "user": "me"}),
    ("POST", "/v1/completions", {"prompt": "abc", "max_tokens": 0, "echo": True, "logprobs": 2}),
    ("POST", "/v1/completions", {"prompt": [[1, 2], [3]], "max_tokens": 1, "stream": True,
                                 "stream_options": {"include_usage": True}}),
    ("POST", "/v1/completions", {"prompt": "a", "max_tokens": 2, "best_of": 1, "ignore_eos": True, "top_k": 3}),
    ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}),
    ("POST", "/v1/chat/completions", {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [
        {"type": "text", "text": "hi"}]}], "max_completion_tokens": 1, "logprobs": True, "top_logprobs": 2}),
    ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "h"}], "max_tokens": 1, "stream": True}),
    ("POST", "/tokenize", {"text": "caf\u00e9"}), ("POST", "/detokenize", {"ids": [99, 195, 169]}),
    ("GET", "/health", None), ("GET", "/model-info", None), ("GET", "/v1/models", None), ("HEAD", "/metrics", None),
    ("OPTIONS", "/generate", None), ("GET", "/", None)]
BODIES = [(path, body) for method, path, body in GOOD if body]
PIECES = [b"\r\n", b"\n", b"\0", b":", b" ", b"\xff", b"{", b"}", b"[", b"]", b'"', b"\\", b"\\u0000", b"\\ud800", b",",
          b"-", b"1e999", b"9" * 30, b"NaN", b"null", b"true", b"Content-Length: 3\r\n",
          b"Transfer-Encoding: chunked\r\n", b"Expect: 100-continue\r\n", b"Connection: keep-alive\r\n",
          b"GET / HTTP/1.1\r\n\r\n", b"HTTP/1.0", b"/"]
FIELDS = sorted({field for _, body in BODIES for field in body})
SCALARS = [None, True, False, 0, 1, -1, 2, 255, 256, 257, 128, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e-9, 1e300,
           float("nan"), float("inf"), "", "a", "abc", "\0", "\ud800", "\U0001f917", "x" * 300, "user", "65"]


def value(rng, depth=0):
    """Any JSON value."""
    kind = rng.random()
    if kind < 0.7 or depth > 3:
        return rng.choice(SCALARS)
    n = rng.choice([0, 1, 1, 2, 3, 9])
    if kind < 0.87:
        return [value(rng, depth + 1) for _ in range(n)]
    keys = ["role", "content", "type", "text", "include_usage", "65", "a", *FIELDS]
    return {rng.choice(keys): value(rng, depth + 1) for _ in range(n)}


def mutated(rng, data, most=4):
    """These bytes with a few flipped, inserted, deleted or doubled."""
    data = bytearray(data)
    for _ in range(rng.randint(1, most)):
        at, act = rng.randrange(len(data) + 1), rng.randrange(5)
        if act == 0:
            data[at:at + 1] = bytes([rng.randrange(256)])
        elif act == 1:
            data[at:at] = rng.choice(PIECES)
        elif act == 2:
            del data[at:at + rng.choice([1, 1, 2, 5, 20])]
        elif act == 3:
            data[at:at] = data[at:at + rng.randint(1, 20)]
        elif at < len(data):
            data[at] ^= 1 << rng.randrange(8)
    return bytes(data)


def strange_body(rng):
    """(path, body): a good body in which some fields have any value, are missing or were never heard of."""
    path, body = rng.choice(BODIES)
    body = dict(body)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        field = rng.choice([*body, rng.choice(FIELDS), "nonsense"])
        if rng.random() < 0.1:
            body.pop(field, None)
        else:
            body[field] = value(rng)
    data = json.dumps(body if rng.random() < 0.95 else value(rng)).encode()
    return path, mutated(rng, data) if rng.random() < 0.3 else data


def check(answer, sent):
    assert answer.status < 500 or answer.status in (501, 503, 505), (answer, sent)


ACCIDENTS = pytest.mark.parametrize("n", [1000, pytest.param(5000, marks=pytest.mark.slow)])


@ACCIDENTS
def test_f22_strange_bodies(n):
    """n bodies of the right length, on connections that are kept as long as the server keeps them: taken or refused."""
    rng, seen = random.Random(1), {}
    with serving(tiny_model(), max_connections=4) as client:
        wire = client.wire()
        for _ in range(n):
            path, body = strange_body(rng)
            wire.send(client.request("POST", path, body))
            answer = wire.answer()
            check(answer, (path, body))
            seen[answer.status] = seen.get(answer.status, 0) + 1
            if answer.headers.get("connection") == "close":
                wire.close()
                wire = client.wire()
        wire.close()
    assert set(seen) <= {200, 400} and min(seen.values()) > n / 10, seen


@ACCIDENTS
def test_f22_strange_bytes(n):
    """n whole requests with bytes changed anywhere, each sent to its end: what comes back is HTTP, or nothing."""
    rng, answered = random.Random(2), 0
    with serving(tiny_model()) as client:
        good = [client.request(*one) for one in GOOD]
        for _ in range(n):
            data = mutated(rng, rng.choice(good))
            with client.wire(data) as wire:
                wire.end()
                came = wire.file.read()
            assert came == b"" or re.match(rb"HTTP/1\.[01] [1-5][0-9][0-9] [A-Za-z -]+\r\n", came), (data, came)
            answered += came != b""
            for status in re.findall(rb"^HTTP/1\.[01] ([0-9]+) ", came, re.MULTILINE):
                assert status < b"500" or status in (b"501", b"503", b"505"), (data, came)
            assert b"Traceback" not in came
    assert answered > n / 2, answered

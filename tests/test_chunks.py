# SPDX-License-Identifier: GPL-3.0-only
"""
Bodies in chunks, as .NET and Roo Code send them: row f of the list in servers.py.
"""
import json
import threading

import pytest
from http_client import request
from servers import (  # noqa: F401 (some are fixtures)
    CHAT, SAID, ScriptModel, all_logs_fixture, log_fixture, no_key_fixture, script_fixture, script_server_fixture,
    serving, well_afterwards_fixture)

BODY = json.dumps({"prompt": "x", "max_tokens": 4, "stop": ["\u4f60"]}).encode()
HEALTH = request("GET", "/health")
MB = 1 << 20


def head(*lines, version="1.1", path="/generate"):
    named = ["Host: localhost", "Content-Type: application/json", "Transfer-Encoding: chunked", *lines]
    return "\r\n".join([f"POST {path} HTTP/{version}", *named, "", ""]).encode("latin-1")


def chunked(body, size, more="", trailers=""):
    parts = [body[i:i + size] for i in range(0, len(body), size)]
    return b"".join(f"{len(part):X}{more}\r\n".encode() + part + b"\r\n" for part in parts) + \
        f"0{more}\r\n{trailers}\r\n".encode("latin-1")


def only_answer(client, data):
    """The status for these bytes, after which the connection must be closed with nothing more on it."""
    with client.wire(data) as wire:
        answer = wire.answer()
        assert answer.headers["connection"] == "close" and wire.closed(), "still open, or a second answer"
        return answer.status


@pytest.mark.parametrize("size", [1, 7, len(BODY), 10**6])
def test_f8_a_body_in_chunks(script, size):
    """The same answer as with a length, and the next request on the connection is understood."""
    script.model.say("hello")
    with script.wire(head() + chunked(BODY, size) + HEALTH) as wire:
        assert wire.answer().json["generated_text"] == "hell"
        assert wire.answer().json == {"status": "ok"}


@pytest.mark.parametrize("name", ["transfer-encoding: Chunked", "Transfer-Encoding:  CHUNKED \t"])
def test_f8_spellings(script, name):
    data = head().replace(b"Transfer-Encoding: chunked", name.encode()) + chunked(BODY, 9)
    assert script.raw(data).status == 200


def test_f8_extensions_and_trailers(script):
    """What may stand beside the chunks, and nobody sends, is passed over."""
    with script.wire(head() + chunked(BODY, 9, ' ; a="b";c', "X-Check: 1\r\nExpires: \xe9\r\n") + HEALTH) as wire:
        assert wire.answer().status == 200 and wire.answer().json == {"status": "ok"}


def test_f8_a_stream_and_a_chat(script):
    """For every endpoint, with `Expect: 100-continue`, which .NET sends, and the chunks that come later."""
    script.model.say("hello", prompt=len("user: x\nassistant: "))
    body = chunked(json.dumps({"messages": SAID}).encode(), 10)
    with script.wire(head("Expect: 100-continue", path=CHAT)) as wire:
        assert wire.answer().status == 100
        for i in range(0, len(body), 5):
            wire.send(body[i:i + 5])
        assert wire.answer().json["choices"][0]["message"]["content"] == "hello"


BAD = {
    "no size": b"\r\n", "no hexadecimal": b"g\r\nx\r\n0\r\n\r\n", "0x": b"0x5\r\n", "sign": b"+5\r\n",
    "minus": b"-1\r\n", "space before": b" 5\r\n", "underscore": b"1_0\r\n", "long": b"0" * 9 + b"\r\n",
    "bare \\n": b"5\nhello\n0\n\n",
    "bare \\r": b"5\rhello\r0\r\r", "more than its size": b"1\r\nxy\r\n0\r\n\r\n", "less": b"5\r\nxy\r\n0\r\n\r\n",
    "\\n behind the data": b"1\r\nx\n0\r\n\r\n", "control in an extension": b"1;\0\r\nx\r\n0\r\n\r\n",
    "\\n in an extension": b"1;a\nb\r\nx\r\n0\r\n\r\n", "a long line": b"1;" + b"a" * 5000 + b"\r\nx\r\n0\r\n\r\n",
    "a trailer without a name": b"0\r\n: x\r\n\r\n", "a trailer without a colon": b"0\r\nGET / HTTP/1.1\r\n\r\n",
    "a space before the colon": b"0\r\nX : 1\r\n\r\n", "a folded trailer": b"0\r\nX: 1\r\n y\r\n\r\n",
    "a bare \\r in a trailer": b"0\r\nX: 1\r2\r\n\r\n", "non-ASCII digits": "\u0665\r\n".encode()}


@pytest.mark.parametrize("name", BAD)
def test_f8_bad_chunks(script, name):
    """Whatever can be read in two ways is a 400, and what follows is not taken for a request."""
    assert only_answer(script, head() + BAD[name] + HEALTH) == 400


@pytest.mark.parametrize("data, status", [
    (head("Content-Length: 5") + chunked(BODY, 9) + HEALTH, 400), (head("Content-Length: 0") + HEALTH, 400),
    (head("content-length: 5", "Content-Length: 5") + b"0\r\n\r\n" + HEALTH, 400),
    (head(version="1.0") + chunked(BODY, 9) + HEALTH, 400),
    (head("Transfer-Encoding: identity") + chunked(BODY, 9) + HEALTH, 501),
    (head().replace(b"chunked", b"chunked, chunked") + chunked(BODY, 9) + HEALTH, 501),
    (head().replace(b"application/json", b"text/plain") + chunked(BODY, 9) + HEALTH, 415),
    (head(path="/nope") + chunked(HEALTH, 99), 404), (head(path="/health") + chunked(HEALTH, 99), 405)])
def test_f8_nothing_is_smuggled(script, data, status):
    """A length beside the chunks, another coding, a path that reads no body: one answer, and the end."""
    assert only_answer(script, data) == status


def test_f8_the_body_of_a_get(script):
    """It is not read, so nothing behind it is."""
    get = HEALTH[:-2] + b"Transfer-Encoding: chunked\r\n\r\n"
    assert only_answer(script, get + chunked(HEALTH, 99)) == 200


def test_f10_f11_chunks_are_limited(script):
    """As many bytes as with a length, and as many around them; a size alone takes no memory."""
    full = BODY.ljust(MB)
    assert script.raw(head() + chunked(full, 1 << 16)).status == 200
    assert only_answer(script, head() + chunked(full + b" ", 1 << 16)) == 413
    assert only_answer(script, head() + b"FFFFFFFF\r\n") == 413
    extensions = b"".join(b"1;%s\r\n \r\n" % (b"a" * 1000) for _ in range(1100))
    assert only_answer(script, head() + extensions) == 413
    trailers = "".join(f"X-{i}: {'a' * 1000}\r\n" for i in range(1100))
    assert only_answer(script, head() + chunked(BODY, 99, trailers=trailers)) == 413


@pytest.mark.parametrize("data", [b"", b"5", b"5\r\nhe", b"5\r\nhello", b"0\r\n", b"0\r\nX: 1\r\n"])
def test_f12_half_a_body(script, data):
    """A client that stops in the middle gets a 400; an empty body is no JSON."""
    with script.wire(head() + data).end() as wire:
        assert wire.answer().status == 400 and wire.closed()


def test_f13_slow_chunks():
    """The time of a body is limited as a whole, however often a chunk comes."""
    with serving(ScriptModel(), body_timeout=0.3) as client, client.wire(head()) as wire:
        ended = threading.Event()

        def feed():
            while not ended.wait(0.02):
                wire.send(b"1\r\n \r\n")
        thread = threading.Thread(target=feed)
        thread.start()
        assert wire.closed()
        ended.set()
        thread.join()

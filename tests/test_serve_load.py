# SPDX-License-Identifier: GPL-3.0-only
"""
Many clients at once, that wait, leave and do not read: texts stay the same, and nothing is left over.

A letter and a number in the name of a test are explained in servers.py.
"""
import contextlib
import os
import random
import socket
import threading
import time

import pytest
from http_client import together, until
from servers import (  # noqa: F401 (some are fixtures)
    CHAT, COMPLETE, GENERATE, GOOD, ScriptModel, all_logs_fixture, drawn, held, log_fixture, no_key_fixture,
    script_fixture, script_server_fixture, serving, slow, tiny_fixture, tiny_model, well_afterwards_fixture)


def test_e1_as_many_as_may_run_and_wait(tiny):
    """As many requests at once as there are rows and places to wait: each gets the text that it gets alone."""
    bodies = [drawn(prompt=f"prompt {i}", seed=i) for i in range(8)]
    alone = [tiny.text(**body) for body in bodies]
    for _ in range(3):
        assert together([lambda body=body: tiny.text(**body) for body in bodies]) == alone


def test_e2_the_same_text_among_any_neighbours():
    """Twice in each of 50 rounds among other requests, a request gets what it gets alone: the same text, and the same
    log-probabilities to the last bit (a text alone would hide most differences)."""
    rng, fixed = random.Random(0), dict(prompt="the cat", temperature=1, top_k=0, seed=3, max_tokens=16, logprobs=1)

    def neighbour():
        return dict(prompt=[rng.randrange(256) for _ in range(rng.randint(1, 100))],
                    temperature=rng.uniform(0, 2), top_k=rng.randrange(60), top_p=rng.uniform(0.1, 1),
                    seed=rng.randrange(2**40), max_tokens=rng.randint(1, 24), ignore_eos=True)
    with serving(tiny_model(), rows=8) as client:
        def answer(body):
            answer = client.generate(**body)
            return answer["generated_text"], answer.get("tokens")
        alone, found = answer(fixed), []
        for _ in range(50):
            bodies = [neighbour() for _ in range(6)] + [fixed] * 2
            rng.shuffle(bodies)
            answers = together([lambda body=body: answer(body) for body in bodies])
            found += [one for one, body in zip(answers, bodies) if body is fixed]
        assert len(alone[1]) == 16 and sum(one == alone for one in found) == len(found) == 100


def test_e3_a_full_house(script):
    """One more is told to come back in a second, at once, while /health goes on answering."""
    engine = script.server.engine
    with held(script, ready=lambda: len(engine.running) == 4):  # what is answered now waits for no step of the model
        wires = script.fill(8)
        assert until(lambda: script.busy() == (4, 4))
        for _ in range(5):
            answer = script.post(GENERATE, prompt="x")
            assert answer.status == 503 and answer.headers["retry-after"] == "1"
            assert answer.error["code"] == "overloaded"
        assert script.get("/health").status == 200
        for wire in wires:
            wire.close()


def leaves(client, wire):
    """The client goes away; how many requests were cancelled until its rows are free."""
    before = client.metrics()
    wire.close()
    assert until(lambda: client.busy()[0] == 0), "the row is not free"
    computed = []
    client.model.before = lambda idx: computed.append(idx.tolist())
    client.text("yes", max_tokens=1)
    assert computed == [[[*b"yes"]]], "the model goes on with what nobody waits for"
    return client.metric("openllm_cancelled_total") - before["openllm_cancelled_total"]


def test_e4_a_stream_is_left(script):
    """A client that leaves its stream is cancelled, and its row is free."""
    slow(script)
    stream = script.stream(max_tokens=4000)
    assert all(set(event["text"]) == {"x"} for event in stream.first(2))
    assert leaves(script, stream.wire) == 1


@pytest.mark.parametrize("path", [GENERATE, COMPLETE, CHAT])
def test_e5_an_answer_is_not_waited_for(script, path):
    """The same without a stream, on all three paths."""
    slow(script)
    wire = script.wire(script.request("POST", path, {**GOOD[path], "max_tokens": 4000}))
    assert until(lambda: script.busy() == (1, 0))
    assert leaves(script, wire) == 1


def test_e5_all_choices_end(script):
    """And for all choices of all prompts of a request."""
    slow(script)
    wire = script.wire(script.request("POST", COMPLETE, {"prompt": ["x", "y"], "n": 2, "max_tokens": 4000}))
    assert until(lambda: script.busy() == (4, 0))
    assert leaves(script, wire) == 4


def test_e5_whatever_was_sent_before(script):
    """A client that sends one byte more and leaves has left."""
    slow(script)
    wire = script.wire(script.request("POST", GENERATE, {"prompt": "x", "max_tokens": 4000}))
    assert until(lambda: script.busy() == (1, 0))
    wire.send(b"\r\n")
    assert leaves(script, wire) == 1


def test_e6_left_while_waiting(script):
    """A client that leaves while its request waits: the request never starts."""
    seen = set()
    slow(script)
    script.model.before = lambda idx: (time.sleep(0.01), seen.update(idx.flatten().tolist()))
    wires = script.fill(4)
    waiting = script.wire(script.request("POST", GENERATE, {"prompt": "q", "max_tokens": 9}))
    assert until(lambda: script.busy() == (4, 1))
    waiting.close()
    assert until(lambda: script.busy() == (4, 0)), script.busy()
    for wire in wires:
        wire.close()
    assert until(lambda: script.busy() == (0, 0))
    assert script.text(max_tokens=1) == "x" and ord("x") in seen and ord("q") not in seen


def descriptors():
    return len(os.listdir("/proc/self/fd" if os.path.exists("/proc/self/fd") else "/dev/fd"))


def test_e7_two_hundred_leave():
    """200 clients leave in the middle of their answers: each request is cancelled, no thread and no open file is left,
    and the next request is fine."""
    rng = random.Random(0)
    with serving(ScriptModel(), max_connections=250, max_queue=250) as client:
        slow(client, 0.001)
        threads, files = threading.active_count(), descriptors()

        def leave(delay, stream):
            with client.wire(client.request("POST", GENERATE, {"prompt": "x", "max_tokens": 4000, "stream": stream})):
                time.sleep(delay)
        together([lambda: leave(rng.uniform(0, 0.05), rng.random() < 0.5) for _ in range(200)], at_once=8)
        assert until(lambda: client.metric("openllm_cancelled_total") == 200), client.metrics()
        assert client.text(max_tokens=50) == "x" * 50
        assert until(lambda: threading.active_count() <= threads and descriptors() <= files), (
            threads, threading.active_count(), files, descriptors())


def test_e8_a_client_that_stops_reading():
    """It is cut off after write_timeout, in the middle; meanwhile others get their answers."""
    with serving(ScriptModel(), write_timeout=0.5) as client:
        client.server.web.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # of its connections, too
        body = {"prompt": "x", "max_tokens": 1000, "logprobs": 20, "stream": True}  # some MB: no buffer holds it
        with held(client):
            wire = client.wire(client.request("POST", GENERATE, body), buffer=4096)
            assert until(lambda: client.busy() == (1, 0))  # and stands in its first step
            neighbour = client.wire(client.request("POST", GENERATE, {"prompt": "x", "max_tokens": 20}))
            assert until(lambda: client.busy() == (1, 1))
        with wire, neighbour:
            assert neighbour.answer().json["generated_text"] == "x" * 20
            given_up = 'openllm_requests_total{route="/generate",status="499"}'
            assert until(lambda: client.metrics().get(given_up) == 1), "it is not cut off"
            assert client.text(max_tokens=20) == "x" * 20
            received = b""
            with contextlib.suppress(ConnectionError):
                while part := wire.socket.recv(1 << 20):
                    received += part
            assert received.startswith(b"HTTP/1.1 200") and b"[DONE]" not in received


def test_e9_a_short_one_need_not_wait_for_a_long_one(script):
    """A short request is answered while a long one goes on."""
    slow(script, 0.005)
    with script.stream(max_tokens=4000) as stream:
        stream.first(1)
        assert script.text(max_tokens=5) == "x" * 5
        assert script.busy() == (1, 0)


def test_e10_a_long_prompt_does_not_stall_a_stream(script):
    """Two long prompts are read in parts, and after each part a running stream gets its next token."""
    steps = []
    slow(script)
    script.model.before = lambda idx: (time.sleep(0.001), steps.append(idx.size(1)))
    with script.stream(max_tokens=4000) as stream:
        stream.first(5)
        del steps[:]
        prompts = "p" * 1000, "q" * 1000  # (of two that are the same, one is read)
        assert together([lambda p=p: script.generate(p, max_tokens=1)["prompt_tokens"] for p in prompts]) == [1000] * 2
    chunks = [at for at, size in enumerate(steps) if size > 1]
    assert len(chunks) > 10 and max(steps) <= 128
    assert all(steps[at + 1] == 1 for at in chunks[:-1]), "two chunks in a row"


@pytest.mark.parametrize("most", [16, 64])
def test_e11_idle_connections(most):
    """As many as there may be are kept; one more replaces the oldest."""
    with serving(ScriptModel(), max_connections=most) as client:
        idle = [client.wire() for _ in range(most)]
        assert until(lambda: len(client.server.web.connections) == most)
        assert client.metric("openllm_connections") <= most + 1
        assert idle[0].closed()
        assert idle[1].send(client.request("GET", "/health")).answer().status == 200
        for wire in idle:
            wire.close()
        assert until(lambda: client.metric("openllm_connections") == 1)

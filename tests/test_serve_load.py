# SPDX-License-Identifier: GPL-3.0-only
"""Many clients at once, that wait, leave and do not read: texts stay the same, and nothing is left over."""
import contextlib
import os
import random
import threading
import time

import pytest
from http_client import together, until
from servers import (  # noqa: F401 (some are fixtures)
    CHAT, COMPLETE, GENERATE, GOOD, ScriptModel, all_logs_fixture, drawn, log_fixture, script_fixture,
    script_server_fixture, serving, slow, tiny_fixture, tiny_model, well_afterwards_fixture)


def test_e1_as_many_as_may_run_and_wait(tiny):
    bodies = [drawn(prompt=f"prompt {i}", seed=i) for i in range(8)]
    alone = [tiny.text(**body) for body in bodies]
    for _ in range(3):
        assert together([lambda body=body: tiny.text(**body) for body in bodies]) == alone


def test_e2_the_same_text_among_any_neighbours():
    """And the same log-probabilities to the last bit: a text alone would hide most differences."""
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
        for _ in range(100):
            place, bodies = rng.randrange(8), [neighbour() for _ in range(7)]
            bodies.insert(place, fixed)
            found.append(together([lambda body=body: answer(body) for body in bodies])[place])
        assert len(alone[1]) > 10 and sum(one == alone for one in found) == 100


def test_e3_a_full_house(script):
    slow(script)
    wires = script.fill(8)
    assert until(lambda: script.busy() == (4, 4))
    took = []
    for _ in range(5):
        started = time.monotonic()
        answer = script.post(GENERATE, prompt="x")
        took.append(time.monotonic() - started)
        assert answer.status == 503 and answer.headers["retry-after"] == "1" and answer.error["message"]
    assert min(took) < 0.1  # (a busy machine may hold up one of them)
    assert script.get("/health").status == 200
    for wire in wires:
        wire.close()


def leaves(client, wire):
    """The client goes away; how many requests were cancelled and how many steps were made until its row is free."""
    before = client.metrics()
    wire.close()
    assert until(lambda: client.busy()[0] == 0, 1), "the row is not free"
    steps = client.metric("openllm_steps_total")
    time.sleep(0.1)
    after = client.metrics()
    assert after["openllm_steps_total"] == steps, "the model goes on"
    return after["openllm_cancelled_total"] - before["openllm_cancelled_total"]


def test_e4_a_stream_is_left(script):
    slow(script)
    stream = script.stream(max_tokens=4000)
    assert stream.first(2) == [{"text": "x"}] * 2
    assert leaves(script, stream.wire) == 1


@pytest.mark.parametrize("path", [GENERATE, COMPLETE, CHAT])
def test_e5_an_answer_is_not_waited_for(script, path):
    slow(script)
    wire = script.wire(script.request("POST", path, {**GOOD[path], "max_tokens": 4000}))
    assert until(lambda: script.busy() == (1, 0))
    assert leaves(script, wire) == 1


def test_e5_all_choices_end(script):
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
    seen = set()
    slow(script)
    script.model.before = lambda idx: (time.sleep(0.01), seen.update(idx.flatten().tolist()))
    wires = script.fill(4)
    waiting = script.wire(script.request("POST", GENERATE, {"prompt": "q", "max_tokens": 9}))
    assert until(lambda: script.busy() == (4, 1))
    waiting.close()
    assert until(lambda: script.busy() == (4, 0), 1), script.busy()
    for wire in wires:
        wire.close()
    assert until(lambda: script.busy() == (0, 0))
    assert script.text(max_tokens=1) == "x" and ord("x") in seen and ord("q") not in seen


def descriptors():
    return len(os.listdir("/proc/self/fd" if os.path.exists("/proc/self/fd") else "/dev/fd"))


def test_e7_two_hundred_leave(script):
    rng = random.Random(0)
    slow(script, 0.002)
    until(lambda: script.metric("openllm_connections") == 1, 3)
    threads, files, before = threading.active_count(), descriptors(), script.metrics()
    refused = 'openllm_requests_total{route="/generate",status="503"}'

    def leave(delays):
        for delay, stream in delays:
            with script.wire(script.request("POST", GENERATE, {"prompt": "x", "max_tokens": 4000, "stream": stream})):
                time.sleep(delay)
    together([lambda: leave([(rng.uniform(0.1, 0.3), rng.random() < 0.5) for _ in range(25)])] * 8)
    started = time.monotonic()
    script.model.before = lambda idx: None
    assert until(lambda: script.post(GENERATE, prompt="x", max_tokens=50).status == 200, 5)
    assert time.monotonic() - started < 5
    assert until(lambda: script.busy() == (0, 0))
    after = script.metrics()
    turned_away = after.get(refused, 0) - before.get(refused, 0)
    assert after["openllm_cancelled_total"] - before["openllm_cancelled_total"] >= 190 - turned_away
    assert until(lambda: threading.active_count() <= threads + 1 and descriptors() <= files), (
        threads, threading.active_count(), files, descriptors())


def test_e8_a_client_that_stops_reading():
    with serving(ScriptModel(), write_timeout=0.5) as client:
        client.model.say("x" * 4090)
        body = {"prompt": "x", "max_tokens": 4000, "logprobs": 20, "stream": True}  # some 6 MB: no buffer holds it
        with client.wire(client.request("POST", GENERATE, body), buffer=4096) as wire:
            assert until(lambda: sum(client.busy()) == 1)
            neighbours = 0
            while client.metric("openllm_connections") > 1:
                started = time.monotonic()
                assert client.text(max_tokens=20) == "x" * 20
                assert time.monotonic() - started < 2
                neighbours += 1
                assert neighbours < 1000, "it is not cut off"
            assert neighbours > 0
            assert until(lambda: client.busy() == (0, 0))  # (its row is free at the next step, which may come later)
            received = b""
            with contextlib.suppress(ConnectionError):
                while part := wire.socket.recv(1 << 20):
                    received += part
            assert received.startswith(b"HTTP/1.1 200") and b"[DONE]" not in received


def test_e9_a_short_one_need_not_wait_for_a_long_one(script):
    slow(script, 0.005)
    with script.stream(max_tokens=4000) as stream:
        stream.first(1)
        assert script.text(max_tokens=5) == "x" * 5
        assert script.busy() == (1, 0)


def test_e10_a_long_prompt_does_not_stall_a_stream(script):
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
    with serving(ScriptModel(), max_connections=most, header_timeout=10) as client:
        idle = [client.wire() for _ in range(most)]
        assert until(lambda: len(client.server.web.connections) == most)
        assert client.metric("openllm_connections") <= most + 1
        assert idle[0].closed() and not idle[1].closed(0.1)
        for wire in idle:
            wire.close()
        assert until(lambda: client.metric("openllm_connections") == 1)

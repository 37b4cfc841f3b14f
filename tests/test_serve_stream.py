# SPDX-License-Identifier: GPL-3.0-only
"""Streams of the server: the same text as without one, in whole characters, without a stop string, to a proper end."""
import json
import time

import pytest
from http_client import chosen, together
from servers import (  # noqa: F401 (some are fixtures)
    COMPLETE, GENERATE, ByteTokenizer, ScriptModel, all_logs_fixture, drawn, fail, in_step, log_fixture,
    script_fixture, script_server_fixture, serving, slow, texts, tiny_fixture, well_afterwards_fixture)

from serving import api

MIXED = "a\U0001f917\u5abda\u00e9"  # 1, 4, 3, 1 and 2 bytes


def test_d1_the_form_of_a_stream(script):
    script.model.say("hello")
    with script.wire(script.request("POST", COMPLETE, {"prompt": "x", "max_tokens": 5, "stream": True})) as wire:
        answer = wire.answer()  # checks the chunks, and the empty one at the end
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert "content-length" not in answer.headers
        *events, end = answer.body.split(b"\n\n")
        assert end == b"" and events.pop() == b"data: [DONE]"
        events = [json.loads(event.removeprefix(b"data: ")) for event in events]
        assert len({event["id"] for event in events}) == 1
        assert {event["object"] for event in events} == {"text_completion"}
        reasons = [choice["finish_reason"] for event in events for choice in event["choices"]]
        assert reasons[-1] == "length" and set(reasons[:-1]) == {None}
        wire.send(script.request("GET", "/health"))
        assert wire.answer().status == 200
    assert script.complete()["id"] != script.complete()["id"] != events[0]["id"]


def test_d1_generate(script):
    script.model.say("hello")
    events = script.events(max_tokens=5)
    assert all(set(event) == {"text"} for event in events[:-1])
    whole = script.generate(max_tokens=5)
    del whole["time"], whole["seed"], whole["generated_text"]
    last = events[-1]
    assert last.pop("time") > 0 and isinstance(last.pop("seed"), int)
    assert last == {"text": "", **whole} and chosen(events) == "hello"


def test_d2_a_stream_is_the_same_text(tiny):
    def compare(seed, prompt):
        body = drawn(seed=seed, prompt=prompt)
        return chosen(tiny.events(**body)) == tiny.text(**body)
    cases = [(seed, prompt) for seed in range(50) for prompt in ("a", "the cat", "\u5abd")]
    for at in range(0, len(cases), 4):
        assert together([lambda case=case: compare(*case) for case in cases[at:at + 4]]) == [True] * len(
            cases[at:at + 4])


def test_d3_no_half_characters(script):
    slow(script, 0.02)  # an event for every token
    script.model.say(MIXED)
    events = script.events()
    assert not [event for event in events if "\ufffd" in event["text"]]
    assert chosen(events) == MIXED and len(events) > 5


def test_d4_the_end_in_a_character(script):
    script.model.say("a\U0001f917")
    body = dict(max_tokens=3)
    events = script.events(**body)
    assert [event["text"] for event in events if event["text"]] == ["a", "\ufffd"]
    assert script.text(**body) == "a\ufffd"


@pytest.mark.parametrize("said, stop, due", [
    ("hello STOP world", "STOP", "hello "), ("hello STOP world", ["world", "STOP"], "hello "),
    ("STOP world", "STOP", ""), ("hello STOP", "OPX", "hello STOP"), ("STO STOSTOP", "STOP", "STO STO"),
    ("hello STOP world", ["lo S", "STOP"], "hel"), ("aaab", "aab", "a"), ("hello", "o", "hell"),
    ("a\u00e9b", "\u00e9b", "a"), ("\U0001f917\u5abd!", "\u5abd", "\U0001f917"), ("one\n\ntwo", "\n\n", "one")])
def test_d5_d6_d7_stop_strings(script, said, stop, due):
    script.model.say(said)
    whole, events = script.generate(stop=stop), script.events(stop=stop)
    assert whole["generated_text"] == chosen(events) == due
    assert whole["finish_reason"] == events[-1]["finish_reason"] == "stop"
    assert texts(script.complete(stop=stop)) == [due] == [chosen(script.events(COMPLETE, stop=stop))]


def test_d5_text_is_held_back_no_longer_than_needed(script):
    script.model.say("STO" + "x" * 3000)
    script.model.before = lambda idx: time.sleep(0.002)
    with script.stream(max_tokens=3000, stop="STOP") as stream:
        seen = ""
        for event in stream:
            seen += json.loads(event)["text"]
            if len(seen) > 3:
                break
        assert seen.startswith("STOx")


@pytest.mark.parametrize("tokens", [b"abcd", [257]], ids=["4", "1"])
def test_d6_the_stop_that_is_complete_first(tokens):
    with serving(ScriptModel(vocab_size=258), ByteTokenizer(words=[b"abcd"])) as client:
        client.model.say(tokens)
        assert client.text(stop=["abcd", "bc"]) == chosen(client.events(stop=["abcd", "bc"])) == "a"


@pytest.mark.parametrize("path", [GENERATE, COMPLETE])
def test_d11_an_error_in_the_middle(script, log, path):
    log.may_fail = True
    script.model.say("hello world")
    script.model.before = in_step(5, fail)
    *events, last = script.events(path, max_tokens=11)
    assert chosen(events) == "hell" and set(last) == {"error"} and "bug" not in last["error"]["message"]
    script.model.before = in_step(5, fail)
    answer = script.post(path, prompt="x", max_tokens=11)
    assert answer.status == 500 and "bug" not in answer.error["message"]
    assert script.text(max_tokens=11) == "hello world"


def test_d12_an_old_client(script):
    script.model.say("hello")
    request = script.request("POST", GENERATE, {"prompt": "x", "stream": True}, version="HTTP/1.0")
    answer = script.raw(request)  # the body without chunks, to the end of the connection
    assert "transfer-encoding" not in answer.headers and answer.body.endswith(b"data: [DONE]\n\n")
    assert answer.body.startswith(b"data: {")


def test_d13_line_ends_in_a_text(script):
    text = "a\u2028b\u0085c\n\ndata: d\r\n\r\n\0\x7f"
    script.model.say(text)
    assert chosen(script.events()) == text  # `Stream` sees that every event is one line of ASCII
    assert script.text() == text


def test_d14_a_stream_comes_as_it_is_made(script):
    script.model.say("x" * 20)
    script.model.before = lambda idx: time.sleep(0.03)
    with script.stream(max_tokens=20) as stream:
        stream.all()
        assert stream.times[0] < stream.times[-1] / 2 and stream.times[-1] > 0.55


def test_d11_a_bug_of_ours_in_a_stream(script, log, monkeypatch):
    """What fails when the answer has begun becomes an event, not a second head in the middle."""
    log.may_fail = True
    script.model.say("hello")
    monkeypatch.setattr(api.Generate, "end", None)
    *events, last = script.events(max_tokens=5)
    assert "hello".startswith(chosen(events)) and last["error"]["message"] == "the server made a mistake"

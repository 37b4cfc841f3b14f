# SPDX-License-Identifier: GPL-3.0-only
"""
Streams of the server: the same text as without one, in whole characters, without a stop string, to a proper end.

A letter and a number in the name of a test are explained in servers.py.
"""
import json

import pytest
from http_client import chosen, together
from servers import (  # noqa: F401 (some are fixtures)
    COMPLETE, GENERATE, ByteTokenizer, ScriptModel, all_logs_fixture, clock_fixture, drawn, fail, held, in_step,
    log_fixture, no_key_fixture, script_fixture, script_server_fixture, serving, texts, tiny_fixture,
    well_afterwards_fixture)

from serving import api

MIXED = "a\U0001f917\u5abda\u00e9"  # 1, 4, 3, 1 and 2 bytes


def test_d1_the_form_of_a_stream(script):
    """Server-sent events in chunks: JSON with one id, one finish_reason at the end, [DONE]; the connection can be used
    again."""
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
    """A stream of /generate: texts, and then what a whole answer has beside its text."""
    script.model.say("hello")
    events = script.events(max_tokens=5)
    assert all(set(event) == {"text"} for event in events[:-1])
    whole = script.generate(max_tokens=5)
    del whole["time"], whole["seed"], whole["generated_text"]
    last = events[-1]
    assert last.pop("time") > 0 and isinstance(last.pop("seed"), int)
    assert last == {"text": "", **whole} and chosen(events) == "hello"


def test_d2_a_stream_is_the_same_text(tiny):
    """50 seeds and three prompts: the parts of a stream, joined, are the text of the whole answer."""
    def compare(seed, prompt):
        body = drawn(seed=seed, prompt=prompt)
        return chosen(tiny.events(**body)) == tiny.text(**body)
    cases = [(seed, prompt) for seed in range(50) for prompt in ("a", "the cat", "\u5abd")]
    assert together([lambda case=case: compare(*case) for case in cases], at_once=8) == [True] * 150


def test_d3_no_half_characters(script, clock):
    """A character of several tokens comes when it is whole."""
    script.model.say(MIXED)
    clock.tick = 1  # so that the engine sends an event for every token
    events = script.events()
    assert [event["text"] for event in events] == [*MIXED, ""]


def test_d4_the_end_in_a_character(script):
    """Where max_tokens ends inside a character, the rest is one U+FFFD, in a stream and without."""
    script.model.say("a\U0001f917")
    body = dict(max_tokens=3)
    events = script.events(**body)
    assert [event["text"] for event in events if event["text"]] == ["a", "\ufffd"]
    assert script.text(**body) == "a\ufffd"
    answer = script.generate(stop="\ufffd", **body)  # which only the end of the text completes
    assert (answer["generated_text"], answer["finish_reason"]) == ("a", "stop")


@pytest.mark.parametrize("said, stop, due", [
    ("hello STOP world", "STOP", "hello "), ("hello STOP world", ["world", "STOP"], "hello "),
    ("STOP world", "STOP", ""), ("hello STOP", "OPX", "hello STOP"), ("STO STOSTOP", "STOP", "STO STO"),
    ("hello STOP world", ["lo S", "STOP"], "hel"), ("aaab", "aab", "a"), ("hello", "o", "hell"),
    ("a\u00e9b", "\u00e9b", "a"), ("\U0001f917\u5abd!", "\u5abd", "\U0001f917"), ("one\n\ntwo", "\n\n", "one")])
def test_d5_d6_d7_stop_strings(script, said, stop, due):
    """The text ends before the stop string that is complete first, wherever its tokens and characters begin, and no
    part of it is ever sent."""
    script.model.say(said)
    whole, events = script.generate(stop=stop), script.events(stop=stop)
    assert whole["generated_text"] == chosen(events) == due
    assert whole["finish_reason"] == events[-1]["finish_reason"] == "stop"
    assert texts(script.complete(stop=stop)) == [due] == [chosen(script.events(COMPLETE, stop=stop))]


def test_d5_text_is_held_back_no_longer_than_needed(script, clock):
    """What could become a stop string is held back until it cannot, and no more than that."""
    script.model.say("aSSTOxSTOP")
    clock.tick = 1
    assert [event["text"] for event in script.events(stop="STOP")] == ["a", "S", "STOx", ""]


@pytest.mark.parametrize("tokens", [b"abcd", [257]], ids=["4", "1"])
def test_d6_the_stop_that_is_complete_first(tokens):
    """Which of two stop strings counts does not depend on how the text was cut into tokens."""
    with serving(ScriptModel(vocab_size=258), ByteTokenizer(words=[b"abcd"])) as client:
        client.model.say(tokens)
        assert client.text(stop=["abcd", "bc"]) == chosen(client.events(stop=["abcd", "bc"])) == "a"


@pytest.mark.parametrize("path", [GENERATE, COMPLETE])
def test_d11_an_error_in_the_middle(script, log, path):
    """A step that fails ends a stream by an error and [DONE]; without a stream it is a 500. Nothing of the bug is told,
    and the next request is fine."""
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
    """HTTP/1.0 has no chunks: a stream ends with the connection."""
    script.model.say("hello")
    request = script.request("POST", GENERATE, {"prompt": "x", "stream": True}, version="HTTP/1.0")
    answer = script.raw(request)  # the body without chunks, to the end of the connection
    assert "transfer-encoding" not in answer.headers and answer.body.endswith(b"data: [DONE]\n\n")
    assert answer.body.startswith(b"data: {")


def test_d13_line_ends_in_a_text(script):
    """Line ends of every kind in a text are escaped: each event is one line of ASCII."""
    text = "a\u2028b\u0085c\n\ndata: d\r\n\r\n\0\x7f"
    script.model.say(text)
    assert chosen(script.events()) == text  # `Stream` sees that every event is one line of ASCII
    assert script.text() == text


def test_d14_a_stream_comes_as_it_is_made(script):
    """The first token is sent before the second is computed."""
    engine = script.server.engine
    before = engine.completion_tokens
    with held(script, ready=lambda: engine.completion_tokens > before):
        stream = script.stream(max_tokens=20)
        assert stream.first(1) == [{"text": "x"}]  # while the model stands still in its second step
    with stream:
        assert chosen(stream.all()) == "x" * 19


def test_d11_a_bug_of_ours_in_a_stream(script, log, monkeypatch):
    """What fails when the answer has begun becomes an event, not a second head in the middle."""
    log.may_fail = True
    script.model.say("hello")
    monkeypatch.setattr(api.Generate, "end", None)
    *events, last = script.events(max_tokens=5)
    assert "hello".startswith(chosen(events)) and last["error"]["message"] == "internal server error"

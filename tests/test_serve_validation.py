# SPDX-License-Identifier: GPL-3.0-only
"""
Every field of a request has a range: what is outside is refused by its name, what is inside is taken.

A letter and a number in the name of a test are explained in servers.py.
"""
import json
import re

import faults
import pytest
from conftest import error
from http_client import Client, until
from servers import (  # noqa: F401 (some are fixtures)
    CHAT, COMPLETE, GENERATE, GOOD, SAID, all_logs_fixture, log_fixture, no_key_fixture, script_fixture,
    script_server_fixture, serve_without_asserts, tiny_fixture, well_afterwards_fixture)

import sample

NAN, INF = float("nan"), float("inf")


def each(path, field, *values, says=()):
    return [(path, {field: value}, field, says) for value in values]


# What is refused: the path, what is added to a good request (or the whole body), the field that is named, and what the
# message holds.
REFUSED = [
    # temperature: a number from 0 to 2
    *each(GENERATE, "temperature", -0.1, 2.1, "hot", True, NAN, INF, -INF, [1], {}),
    *each(COMPLETE, "temperature", -0.1, 2.1),
    *each(CHAT, "temperature", -0.1, 2.1),
    (GENERATE, '{"prompt": "x", "temperature": 1e999}', "temperature", ()),
    # top_p above 0, up to 1; top_k whole, 0 for all tokens
    *each(GENERATE, "top_p", 0, -1, 1.01, "1", NAN),
    *each(GENERATE, "top_k", -2, 1.5, "5", True),
    # min_p a share; penalties in OpenAI's range; repetition_penalty above 0
    *each(GENERATE, "min_p", -0.1, 1.1),
    *each(GENERATE, "repetition_penalty", 0, -1, NAN),
    *each(GENERATE, "presence_penalty", -2.1, 2.1),
    *each(COMPLETE, "frequency_penalty", -2.1, 2.1, True),
    # a length: whole, and 0 only where a prompt is scored
    *each(GENERATE, "max_tokens", -2, 0, 1.5, "5", True, 10**9, 10**400),
    *each(COMPLETE, "max_tokens", -2, 0, 10**9),
    *each(CHAT, "max_tokens", -2, 0, 10**9),
    *each(CHAT, "max_completion_tokens", -2, 0, "5"),
    # how many choices and log-probabilities; what OpenAI has and this server has not is named
    *each(COMPLETE, "n", 0, 5, "2"),
    *each(COMPLETE, "logprobs", 6, -1, True),
    *each(GENERATE, "logprobs", 21, -1),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", ()),
    *each(COMPLETE, "best_of", 2, says=["best_of"]),
    *each(COMPLETE, "suffix", "end", says=["suffix"]),
    *each(CHAT, "tools", [{"type": "function", "function": {"name": "f"}}], says=["tools"]),
    *each(CHAT, "functions", [{"name": "f"}], says=["functions"]),
    *each(CHAT, "response_format", {"type": "json_object"}, says=["response_format"]),
    # up to 16 stop strings of 1 to 256 characters
    *each(GENERATE, "stop", "", ["a", ""], list("abcdefghijklmnopq"), [1], "s" * 300, 5, {}),
    *each(COMPLETE, "stop", "", list("abcdefghijklmnopq")),
    # a seed: whole, 63 bits
    *each(GENERATE, "seed", -2, 2**63, 1.5, "7", True),
    # flags are true or false; stream_options belong to a stream
    *each(GENERATE, "stream", "yes", 1),
    *each(COMPLETE, "stream_options", {"include_usage": True}),
    *each(CHAT, "stream_options", {"include_usage": True}),
    *each(GENERATE, "ignore_eos", "yes", 0),
    *each(COMPLETE, "echo", "yes", 1),
    # logit_bias: token ids that exist, with numbers from -100 to 100; the message has the wrong one
    *each(GENERATE, "logit_bias", {"abc": 1}, says=["abc"]),
    *each(GENERATE, "logit_bias", {"65": "x"}, says=["x"]),
    *each(GENERATE, "logit_bias", {"65": 101}, says=["101"]),
    *each(GENERATE, "logit_bias", {"999": 1}, says=["999"]),
    *each(GENERATE, "logit_bias", {str(i): 1 for i in range(400)}, [1], "65"),
    # a field that /generate has not, with the one that was meant
    (GENERATE, {"max_tokns": 5}, "max_tokns", ["did you mean 'max_tokens'"]),
    # messages: a list of roles and texts
    *each(CHAT, "messages", None, "x", [], [1], [{}], [{"role": "boss", "content": "x"}],
          [{"role": "user", "content": 5}], [{"role": "user", "content": None}],
          [{"role": "user"}], [{"content": "x"}],
          [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
]
# What is taken: the ends of the ranges, null for the default, and what OpenAI's clients send without meaning.
ACCEPTED = [
    *((path, dict.fromkeys((
        "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
        "logit_bias", "stop", "seed", "stream", "logprobs", "ignore_eos", "max_tokens"))) for path in GOOD),
    (GENERATE, {"temperature": None}), (GENERATE, {"temperature": 1}), (GENERATE, {"temperature": 2}),
    (GENERATE, {"top_k": 0}), (GENERATE, {"top_k": 10**6}), (GENERATE, {"top_p": 1}),
    (GENERATE, {"min_p": 1, "presence_penalty": -2, "frequency_penalty": 2}),
    (CHAT, {"response_format": {"type": "text"}}), (COMPLETE, {"best_of": 1, "suffix": None}),
    (GENERATE, {"stop": "s" * 256}), (GENERATE, {"stop": None}), (GENERATE, {"stop": list("abcd")}),
    (GENERATE, {"seed": 2**63 - 1}), (GENERATE, {"seed": 0}),
    (GENERATE, {"logit_bias": {}}), (GENERATE, {"logit_bias": {"65": -100, "256": 0.5}}),
    (COMPLETE, {"user": "me", "store": True, "metadata": {}}), (CHAT, {"user": "me", "store": True}),
]


def case_name(case):
    path, body = case[:2]
    return re.sub(r"\s", "", f"{path}-{body if isinstance(body, str) else json.dumps(body)}")[:70]


def send_case(client, path, changes):
    if isinstance(changes, str):
        return client.post(path, changes)
    body = {**GOOD[path], **changes}
    if "max_completion_tokens" in changes:
        del body["max_tokens"]
    return client.post(path, body)


def complaint(client, case):
    """What is wrong with the answer to a request that must be refused; nothing where all is right."""
    path, changes, param, says = case
    answer = send_case(client, path, changes)
    if answer.status != 400:
        return f"status {answer.status}"
    if answer.error["param"] != param or answer.error["type"] != "invalid_request_error":
        return f"{answer.error}"
    missing = [text for text in says if text not in answer.error["message"]]
    return f"{missing} not in {answer.error['message']!r}" if missing else ""


@pytest.mark.parametrize("case", REFUSED, ids=case_name)
def test_c_refused(tiny, case):
    """What is out of range, of another type or unknown is a 400 that names the field."""
    assert complaint(tiny, case) == ""


@pytest.mark.parametrize("case", ACCEPTED, ids=case_name)
def test_c_accepted(tiny, case):
    """The ends of each range, and null for the default, are fine."""
    assert send_case(tiny, *case).status == 200


@pytest.mark.parametrize("name", sample.RANGES)
def test_c_the_terminal_and_the_server_take_the_same(tiny, here, name, monkeypatch):
    """What is out of range for one is out of range for the other."""
    monkeypatch.setattr(sample.ckpt, "SMALL", "nowhere")
    lowest, highest = sample.RANGES[name]
    step = 0.01 if isinstance(getattr(sample.SampleConfig, name), float) else 1
    # (-1 means no value to the server: see test_serve_clients.py)
    for value, fits in (lowest, True), (highest, True), (lowest - 3 * step, False), (highest + step, False):
        fact, _ = error(sample.main, f"--{name}={value}")
        assert ("there is no trained run" in fact) == fits and (f"{name}={value} is out of range" in fact) != fits
        short = {} if name == "max_new_tokens" else {"max_tokens": 1}
        answer = tiny.post(GENERATE, prompt="x", **short, **{name: value})
        assert (answer.status == 400 and f"{name} must be" in answer.error["message"]) != fits


def test_c6_one_stop_or_a_list(script):
    """A stop string alone is the same as a list of one."""
    script.model.say("hello")
    assert script.text(stop="l") == script.text(stop=["l"]) == "he"


def test_c_messages_are_missing(tiny):
    """A chat without messages is refused by that name."""
    tiny.refused("messages", CHAT, max_tokens=1)


def test_c_errors_repeat_little(tiny):
    """An error repeats no more than 40 characters of what was sent."""
    long = "secret" * 50
    for changes in {"temperature": long}, {"logit_bias": {long: 1}}, {long: 1}, {"stop": [long]}:
        answer = send_case(tiny, GENERATE, changes)
        assert answer.status == 400 and long[:50] not in answer.error["message"]


def test_c12_validation_is_no_assert(tmp_path):
    """The same list against a server without its asserts, as `python -O` runs it."""
    said = tmp_path / "port"
    child = faults.context().Process(target=serve_without_asserts, args=(str(said),))
    child.start()
    try:
        assert until(lambda: said.exists() and said.read_text(encoding="utf-8")), "no server comes up"
        client = Client(int(said.read_text(encoding="utf-8")))
        found = {case_name(case): complaint(client, case) for case in REFUSED}
        assert {name: what for name, what in found.items() if what} == {}
        assert [case for case in ACCEPTED if send_case(client, *case).status != 200] == []
    finally:
        child.kill()
        child.join()

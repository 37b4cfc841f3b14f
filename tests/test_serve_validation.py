# SPDX-License-Identifier: GPL-3.0-only
"""Every field of a request has a range: what is outside is refused by its name, what is inside is taken."""
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT, error
from http_client import Client, until
from servers import (  # noqa: F401 (some are fixtures)
    CHAT, COMPLETE, GENERATE, GOOD, SAID, all_logs_fixture, log_fixture, script_fixture, script_server_fixture,
    tiny_fixture, well_afterwards_fixture)

import sample

# Each case: row, path, what is added to a good request, the field that is named, what the message holds

NAN, INF = float("nan"), float("inf")


def each(row, path, field, *values, says=()):
    return [(row, path, {field: value}, field, says) for value in values]


REFUSED = [
    *each("c1", GENERATE, "temperature", -0.1, 2.1, "hot", True, NAN, INF, -INF, [1], {}),
    *each("c1", COMPLETE, "temperature", -0.1, 2.1),
    *each("c1", CHAT, "temperature", -0.1, 2.1),
    ("c1", GENERATE, '{"prompt": "x", "temperature": 1e999}', "temperature", ()),
    *each("c2", GENERATE, "top_p", 0, -1, 1.01, "1", NAN),
    *each("c2", GENERATE, "top_k", -2, 1.5, "5", True),
    *each("c3", GENERATE, "min_p", -0.1, 1.1),
    *each("c3", GENERATE, "repetition_penalty", 0, -1, NAN),
    *each("c3", GENERATE, "presence_penalty", -2.1, 2.1),
    *each("c3", COMPLETE, "frequency_penalty", -2.1, 2.1, True),
    *each("c4", GENERATE, "max_tokens", -1, 0, 1.5, "5", True, 10**9, 10**400),
    *each("c4", COMPLETE, "max_tokens", -1, 0, 10**9),
    *each("c4", CHAT, "max_tokens", -1, 0, 10**9),
    *each("c4", CHAT, "max_completion_tokens", -1, 0, "5"),
    *each("c5", COMPLETE, "n", 0, 5, "2"),
    *each("c5", COMPLETE, "logprobs", 6, -1, True),
    *each("c5", GENERATE, "logprobs", 21, -1),
    ("c5", CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", ()),
    *each("c5", COMPLETE, "best_of", 2, says=["best_of"]),
    *each("c5", COMPLETE, "suffix", "end", says=["suffix"]),
    *each("c5", CHAT, "tools", [{"type": "function", "function": {"name": "f"}}], says=["tools"]),
    *each("c5", CHAT, "functions", [{"name": "f"}], says=["functions"]),
    *each("c5", CHAT, "response_format", {"type": "json_object"}, says=["response_format"]),
    *each("c6", GENERATE, "stop", "", ["a", ""], list("abcde"), [1], "s" * 300, 5, {}),
    *each("c6", COMPLETE, "stop", "", list("abcde")),
    *each("c7", GENERATE, "seed", -1, 2**63, 1.5, "7", True),
    *each("c8", GENERATE, "stream", "yes", 1),
    *each("c8", COMPLETE, "stream_options", {"include_usage": True}),
    *each("c8", CHAT, "stream_options", {"include_usage": True}),
    *each("c8", GENERATE, "ignore_eos", "yes", 0),
    *each("c8", COMPLETE, "echo", "yes", 1),
    *each("c9", GENERATE, "logit_bias", {"abc": 1}, says=["abc"]),
    *each("c9", GENERATE, "logit_bias", {"65": "x"}, says=["x"]),
    *each("c9", GENERATE, "logit_bias", {"65": 101}, says=["101"]),
    *each("c9", GENERATE, "logit_bias", {"999": 1}, says=["999"]),
    *each("c9", GENERATE, "logit_bias", {str(i): 1 for i in range(400)}, [1], "65"),
    ("c10", GENERATE, {"max_tokns": 5}, "max_tokns", ["did you mean 'max_tokens'"]),
    *each("c11", CHAT, "messages", None, "x", [], [1], [{}], [{"role": "boss", "content": "x"}],
          [{"role": "user", "content": 5}], [{"role": "user", "content": None}],
          [*SAID, {"role": "assistant", "content": "x"}], [{"role": "user"}], [{"content": "x"}],
          [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
]
ACCEPTED = [
    *(("c1", path, dict.fromkeys((
        "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
        "logit_bias", "stop", "seed", "stream", "logprobs", "ignore_eos", "max_tokens"))) for path in GOOD),
    ("c1", GENERATE, {"temperature": None}), ("c1", GENERATE, {"temperature": 1}), ("c1", GENERATE, {"temperature": 2}),
    ("c2", GENERATE, {"top_k": 0}), ("c2", GENERATE, {"top_k": 10**6}), ("c2", GENERATE, {"top_p": 1}),
    ("c3", GENERATE, {"min_p": 1, "presence_penalty": -2, "frequency_penalty": 2}),
    ("c5", CHAT, {"response_format": {"type": "text"}}), ("c5", COMPLETE, {"best_of": 1, "suffix": None}),
    ("c6", GENERATE, {"stop": "s" * 256}), ("c6", GENERATE, {"stop": None}), ("c6", GENERATE, {"stop": list("abcd")}),
    ("c7", GENERATE, {"seed": 2**63 - 1}), ("c7", GENERATE, {"seed": 0}),
    ("c9", GENERATE, {"logit_bias": {}}), ("c9", GENERATE, {"logit_bias": {"65": -100, "256": 0.5}}),
    ("c10", COMPLETE, {"user": "me", "store": True, "metadata": {}}), ("c10", CHAT, {"user": "me", "store": True}),
]


def case_name(case):
    row, path, body = case[:3]
    return re.sub(r"\s", "", f"{row}{path}-{body if isinstance(body, str) else json.dumps(body)}")[:70]


def send_case(client, path, changes):
    if isinstance(changes, str):
        return client.post(path, changes)
    body = {**GOOD[path], **changes}
    if "max_completion_tokens" in changes:
        del body["max_tokens"]
    return client.post(path, body)


def complaint(client, case):
    """What is wrong with the answer to a request that must be refused; nothing where all is right."""
    _, path, changes, param, says = case
    answer = send_case(client, path, changes)
    if answer.status != 400:
        return f"status {answer.status}"
    if answer.error["param"] != param or answer.error["type"] != "invalid_request_error":
        return f"{answer.error}"
    missing = [text for text in says if text not in answer.error["message"]]
    return f"{missing} not in {answer.error['message']!r}" if missing else ""


@pytest.mark.parametrize("case", REFUSED, ids=case_name)
def test_c_refused(tiny, case):
    assert complaint(tiny, case) == ""


@pytest.mark.parametrize("case", ACCEPTED, ids=case_name)
def test_c_accepted(tiny, case):
    assert send_case(tiny, *case[1:]).status == 200


@pytest.mark.parametrize("name", sample.RANGES)
def test_c_the_terminal_and_the_server_take_the_same(tiny, here, name, monkeypatch):
    """What is out of range for one is out of range for the other."""
    monkeypatch.setattr(sample.ckpt, "SMALL", "nowhere")
    lowest, highest = sample.RANGES[name]
    step = 0.01 if isinstance(getattr(sample.SampleConfig, name), float) else 1
    for value, fits in (lowest, True), (highest, True), (lowest - step, False), (highest + step, False):
        fact, _ = error(sample.main, f"--{name}={value}")
        assert ("there is no trained run" in fact) == fits and (f"{name}={value} is out of range" in fact) != fits
        short = {} if name == "max_new_tokens" else {"max_tokens": 1}
        answer = tiny.post(GENERATE, prompt="x", **short, **{name: value})
        assert (answer.status == 400 and f"{name} must be" in answer.error["message"]) != fits


def test_c6_one_stop_or_a_list(script):
    script.model.say("hello")
    assert script.text(stop="l") == script.text(stop=["l"]) == "he"


def test_c_messages_are_missing(tiny):
    tiny.refused("messages", CHAT, max_tokens=1)


def test_c_errors_repeat_little(tiny):
    long = "secret" * 50
    for changes in {"temperature": long}, {"logit_bias": {long: 1}}, {long: 1}, {"stop": [long]}:
        answer = send_case(tiny, GENERATE, changes)
        assert answer.status == 400 and long[:50] not in answer.error["message"]


def test_c12_validation_is_no_assert():
    """The same list against a server that `python -O` runs."""
    child = subprocess.Popen([sys.executable, "-O", ROOT / "tests/servers.py"], stdin=subprocess.PIPE, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        client = Client(int(child.stdout.readline()))
        assert until(lambda: client.get("/health").status == 200, 10)
        found = {case_name(case): complaint(client, case) for case in REFUSED}
        assert {name: what for name, what in found.items() if what} == {}
        assert [case for case in ACCEPTED if send_case(client, *case[1:]).status != 200] == []
    finally:
        child.communicate("", timeout=20)
    assert child.returncode == 0

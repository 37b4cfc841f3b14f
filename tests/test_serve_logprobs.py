# SPDX-License-Identifier: GPL-3.0-only
"""
Log-probabilities in the answers of the server, against those of the model.

A letter and a number in the name of a test are explained in servers.py.
"""
import pytest
import torch
from servers import (  # noqa: F401 (some are fixtures)
    CHAT, COMPLETE, END, GREEDY, SAID, all_logs_fixture, drawn, log_fixture, no_key_fixture, script_fixture,
    script_server_fixture, tiny_fixture, well_afterwards_fixture)


def raw_logprobs(model, ids):
    """The log-probability of every token after every position: (T, V)."""
    with torch.inference_mode():
        return model(torch.tensor([ids])).float().log_softmax(-1)[0]


def test_b20_scores_of_a_prompt(tiny):
    """Echo with logprobs scores a prompt: each token by the model's own log-probability, before temperature and
    filters."""
    prompt = "the caf\u00e9"
    answer = tiny.post("/v1/completions", prompt=prompt, echo=True, logprobs=2, max_tokens=0, temperature=0.3)
    ids, scores = list(prompt.encode()), answer.json["choices"][0]["logprobs"]
    due = raw_logprobs(tiny.model, ids)
    assert set(scores) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert len(ids) == answer.json["usage"]["prompt_tokens"] == len(scores["tokens"]) == len(scores["token_logprobs"])
    assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
    for at in range(1, len(ids)):
        assert scores["token_logprobs"][at] == pytest.approx(due[at - 1, ids[at]].item(), abs=1e-4)
        top = sorted(scores["top_logprobs"][at].values(), reverse=True)
        assert top[:2] == pytest.approx(due[at - 1].topk(2).values.tolist(), abs=1e-4)
    assert scores["tokens"] == [*"the caf", "bytes:\\xc3", "bytes:\\xa9"]
    assert scores["text_offset"][:8] == list(range(8)) and scores["text_offset"] == sorted(scores["text_offset"])
    assert b"Infinity" not in answer.body and b"NaN" not in answer.body


def test_b20_scores_of_prompt_and_text(tiny):
    """Prompt and text are scored as one sequence."""
    scores = tiny.complete("ab", echo=True, logprobs=1, max_tokens=3, ignore_eos=True, logit_bias={str(END): -100},
                           **GREEDY)["choices"][0]["logprobs"]
    ids = [97, 98, *(i.item() for i in tiny.model.generate(torch.tensor([[97, 98]]), 3))]
    due = raw_logprobs(tiny.model, ids)
    assert len(scores["tokens"]) == 5 and scores["token_logprobs"][0] is None
    for at in range(1, 5):
        assert scores["token_logprobs"][at] == pytest.approx(due[at - 1, ids[at]].item(), abs=1e-4)


def test_b21_scores_of_a_completion(tiny):
    """Of /v1/completions: the token itself and the likeliest ones, in OpenAI's form."""
    scores = tiny.complete("ab", logprobs=5, max_tokens=8, **GREEDY)["choices"][0]["logprobs"]
    assert 0 < len(scores["tokens"]) <= 8
    for token, score, top in zip(scores["tokens"], scores["token_logprobs"], scores["top_logprobs"], strict=True):
        assert len(top) == 5 and top[token] == score == max(top.values()) <= 0
        assert torch.tensor(list(top.values())).exp().sum() <= 1 + 1e-5


def test_b21_scores_of_a_chat(tiny):
    """Of /v1/chat/completions: each token with its bytes, and the likeliest ones in falling order."""
    answer = tiny.chat("ab", logprobs=True, top_logprobs=3, max_tokens=8, **GREEDY)
    content = answer["choices"][0]["logprobs"]["content"]
    assert 0 < len(content) <= 8
    for token in content:
        assert set(token) == {"token", "bytes", "logprob", "top_logprobs"} and len(token["top_logprobs"]) == 3
        assert set(token["top_logprobs"][0]) == {"token", "bytes", "logprob"}
        best = token["top_logprobs"][0]
        assert (best["token"], best["bytes"], best["logprob"]) == (token["token"], token["bytes"], token["logprob"])
        assert [top["logprob"] for top in token["top_logprobs"]] == sorted(
            (top["logprob"] for top in token["top_logprobs"]), reverse=True)
    said = b"".join(bytes(token["bytes"]) for token in content)
    assert said.decode(errors="replace") == answer["choices"][0]["message"]["content"]
    assert tiny.chat("ab", max_tokens=1)["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("stream", [False, True])
def test_b21_scores_of_generate(tiny, stream):
    """Of /generate: id, text and bytes of each token; the numbers are the model's, whatever the temperature."""
    body = dict(prompt="ab", logprobs=3, max_tokens=8, seed=1, temperature=1.5, top_k=0)
    if stream:
        events = tiny.events(**body)
        tokens = [token for event in events for token in event.get("tokens", [])]
    else:
        tokens = tiny.ok("/generate", **body)["tokens"]
    ids, due = [97, 98], raw_logprobs(tiny.model, [97, 98, *(token["id"] for token in tokens)])
    assert 0 < len(tokens) <= 8
    for token in tokens:
        assert set(token) == {"id", "token", "bytes", "logprob", "top"} and len(token["top"]) == 3
        assert token["bytes"] == [token["id"]]
        scores = due[len(ids) - 1]
        assert token["logprob"] == pytest.approx(scores[token["id"]].item(), abs=1e-4)
        best = scores.topk(3)
        assert [top["id"] for top in token["top"]] == best.indices.tolist()
        assert [top["logprob"] for top in token["top"]] == pytest.approx(best.values.tolist(), abs=1e-4)
        ids.append(token["id"])
    assert all(token["token"] == (chr(token["id"]) if token["id"] < 128 else f"bytes:\\x{token['id']:02x}")
               for token in tokens)


def test_b21_scores_are_numbers(script):
    """A token that is next to impossible still has a finite log-probability."""
    script.model.say("a")
    token = script.generate(logprobs=20, max_tokens=1)["tokens"][0]
    assert token["logprob"] == pytest.approx(0, abs=1e-4)
    assert len(token["top"]) == 20 and token["top"][1]["logprob"] == pytest.approx(-100, abs=1e-3)


def joined(parts):
    """The lists of several logprobs objects, one behind the other."""
    parts = [part for part in parts if part]
    return {name: [item for part in parts for item in part[name]] for name in parts[0]}


@pytest.mark.parametrize("path, body", [
    (COMPLETE, dict(prompt="the caf\u00e9", echo=True, logprobs=2)),
    (COMPLETE, dict(prompt="the caf\u00e9", echo=True)),
    (CHAT, dict(messages=SAID, logprobs=True, top_logprobs=2))])
def test_d_scores_and_prompts_in_a_stream(tiny, path, body):
    """The parts of a stream, joined, are text and log-probabilities of the whole answer."""
    body.update(drawn(seed=4))
    choices = [choice for event in tiny.events(path, **body) for choice in event["choices"]]
    whole = tiny.ok(path, **body)["choices"][0]
    assert "".join(choice["text"] if path == COMPLETE else choice["delta"].get("content", "") for choice in choices) \
        == whole.get("text", whole.get("message", {}).get("content"))
    if whole["logprobs"]:
        assert joined([choice["logprobs"] for choice in choices]) == whole["logprobs"]


def test_b20_scores_that_are_not_finite(script, log):
    """Where the model's numbers are not finite, the request fails by a 500, and no NaN is in JSON."""
    log.may_fail = True
    logits, script.model.logits = script.model.logits, lambda x: logits(x) * float("nan")
    try:
        answer = script.post(COMPLETE, prompt="xy", echo=True, logprobs=1, max_tokens=0)
    finally:
        del script.model.logits
    assert answer.status == 500 and answer.error["message"] == "the model failed on this request"

# SPDX-License-Identifier: GPL-3.0-only
"""
The server as its clients see it: basics (A), generation (B), validation (C), streams (D), many at once (E), access (G)
and the process (H). test_http.py has what lies below: bytes on a socket (F). After every test the server must be well:
see `well_afterwards` in servers.py.
"""
import base64
import contextlib
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT, error, nasty, random_model, words
from conftest import script as run_script
from http_client import Client, chosen, together, until
from servers import (  # noqa: F401 (some are fixtures)
    END, KEY, LIVE, ByteTokenizer, Process, ScriptModel, all_logs_fixture, broken_steps, log_fixture, script_fixture,
    script_server_fixture, serving, slow_load, slow_steps, tiny_fixture, tiny_model, unread_log,
    well_afterwards_fixture)

from serving import api
from text import pretrained
from runtime import machine
import sample
import serve
import tokenizer as tokenizers

GREEDY = dict(temperature=0)
MIXED = "a\U0001f917\u5abda\u00e9"  # 1, 4, 3, 1 and 2 bytes
SAID = [{"role": "user", "content": "x"}]


def drawn(**changes):
    """A request whose text depends on its seed alone."""
    return dict(temperature=1, top_k=0, max_tokens=12, **changes)


def texts(answer):
    return [choice["text"] for choice in answer["choices"]]


# ----------------------------------------------------------------------------------------------------------------------
# A: basics


def test_a1_health(script):
    answer = script.raw(script.request("GET", "/health"))
    assert answer.status == 200 and answer.json == {"status": "ok"}
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["content-length"] == str(len(answer.body))


def test_a2_the_port_is_open_while_the_model_loads():
    loaded = threading.Event()

    def load():
        assert loaded.wait(10)
        return ScriptModel(), ByteTokenizer(), {}
    with serving(None, load=load) as client:
        health, refusal = client.get("/health"), client.post("/generate", prompt="x")
        assert client.server.state == "loading" and client.server.engine is None
        assert health.status == 503 and health.json == {"status": "loading"}
        assert refusal.status == 503 and refusal.headers["retry-after"] == "1"
        loaded.set()
        assert until(lambda: client.get("/health").status == 200)
        assert client.text() == ""


def test_a3_a_fatal_error_is_seen(log):
    log.may_fail = True
    with serving(ScriptModel()) as client:
        client.model.before = fail
        assert client.post("/generate", prompt="x").status == 500
        assert until(lambda: client.post("/generate", prompt="x").status == 503, 5)  # some failures in a row
        health = client.get("/health")
        assert health.status == 503 and health.json == {"status": "dead"} and client.server.state == "dead"
        LIVE.remove(client)


class Panic(BaseException):
    """What Rust code raises in Python when it fails (pyo3's PanicException): no Exception."""


@pytest.mark.parametrize("end", [Panic, SystemExit, MemoryError])
def test_a3_whatever_ends_the_loading_is_seen(log, end):
    log.may_fail = True

    def load():
        raise end("no tokens")
    with serving(None, load=load) as client:
        assert until(lambda: client.get("/health").json == {"status": "dead"}), "it is said to be loading"
        assert client.server.ended.is_set() and f"{end.__name__}('no tokens')" in log.text()


def test_a3_a_server_that_listens_no_more_is_dead(log, monkeypatch):
    log.may_fail = True
    with serving(ScriptModel()) as client:
        monkeypatch.setattr(client.server.web, "service_actions", lambda: fail(None))
        assert client.server.ended.wait(10) and client.server.state == "dead"
        LIVE.remove(client)


def test_a3_a_panic_in_a_request_is_an_answer(script, log, monkeypatch):
    log.may_fail = True

    def panic(text):
        raise Panic("no tokens")
    monkeypatch.setattr(script.server.served.tokenizer, "encode", panic)
    for path, body in (GENERATE, {"prompt": "x"}), ("/tokenize", {"text": "x"}):
        answer = script.post(path, body)
        assert answer.status == 500 and "tokens" not in answer.error["message"]


def fail(idx):
    raise RuntimeError("a bug in the model")


INFO = {"name", "parameters", "step", "val_loss", "val_bpb", "source", "context", "vocab_size", "n_layer", "n_head",
        "n_embd", "family", "dtype", "device", "tokenizer", "chat", "curve", "defaults"}


def test_a4_what_the_model_is(tiny):
    info = tiny.get("/model-info").json
    assert info == tiny.get("/info").json and INFO <= set(info) <= INFO | {"license"}
    assert info["parameters"] == tiny.model.n_params() and info["context"] == 128 and info["vocab_size"] == 257
    assert (info["n_layer"], info["n_head"], info["n_embd"]) == (2, 4, 32)
    assert info["family"] == "learned layernorm gelu" and info["dtype"] == "float32" and info["device"] == "cpu"
    assert (info["step"], info["val_loss"], info["source"]) == (40, 2.5, ["words", "notes.txt"])
    assert info["tokenizer"] == {"kind": "bytes", "sha256": "ab" * 32} and info["chat"] is True
    assert info["curve"] == []
    defaults = dict(max_tokens=128, temperature=0.8, top_k=50, top_p=1, min_p=0, repetition_penalty=1)
    assert defaults.items() <= info["defaults"].items()
    models = tiny.get("/v1/models").json
    assert models["object"] == "list" and len(models["data"]) == 1
    one = models["data"][0]
    assert one["id"] == info["name"] and one["object"] == "model"
    assert isinstance(one["created"], int) and isinstance(one["owned_by"], str)
    assert tiny.get(f"/v1/models/{info['name']}").json == one
    gone = tiny.get("/v1/models/other")
    assert gone.status == 404 and gone.json["error"]["code"] == "model_not_found"
    for answer in (tiny.complete(max_tokens=1, model="gpt-4"), tiny.chat(max_tokens=1, model="gpt-4")):
        assert answer["model"] == info["name"]


def test_a5_page(script):
    page = script.get("/")
    assert page.status == 200 and page.headers["content-type"].startswith("text/html")
    assert page.headers["x-content-type-options"] == "nosniff"
    policy = {part.split()[0]: part.split()[1:] for part in page.headers["content-security-policy"].split(";")}
    assert policy["default-src"] == ["'none'"] and policy["connect-src"] == ["'self'"]
    assert policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == ["'none'"]
    for element, source in ("script", "script-src"), ("style", "style-src"):
        blocks = re.findall(rf"<{element}[^>]*>(.*?)</{element}>", page.body.decode(), re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks]
        assert policy[source] == [f"'sha256-{value}'" for value in hashes] and len(hashes) == 1


def test_a5_head(script):
    answer, whole = script.ask("HEAD", "/health"), script.get("/health")
    assert answer.status == 200 and answer.body == b""
    assert answer.headers["content-length"] == whole.headers["content-length"]
    with script.wire(script.request("HEAD", "/health") + script.request("GET", "/health")) as wire:
        assert wire.answer("HEAD").status == 200 and wire.answer().body == whole.body  # nothing stood between them


def test_a5_metrics(script):
    script.model.say("0123456789")
    before = script.metrics()
    script.generate(max_tokens=10)
    script.post("/generate", prompt="")
    script.get("/not-a-route")
    answer = script.get("/metrics")
    assert b"not-a-route" not in answer.body  # or anyone could make ever more of these lines
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    name = r"openllm_[a-z_]+"
    for line in answer.body.decode().splitlines():
        assert re.fullmatch(rf'# HELP {name} .+|# TYPE {name} (counter|gauge|summary)|'
                            rf'{name}(\{{[a-z]+="[^"\\]*"(,[a-z]+="[^"\\]*")*\}})? [0-9.e+-]+', line), line
    after = script.metrics()
    assert {"openllm_requests_running", "openllm_requests_waiting", "openllm_connections", "openllm_cancelled_total",
            "openllm_steps_total", "openllm_resident_memory_bytes"} <= set(after)

    def more(name):
        return after[name] - before.get(name, 0)
    assert more('openllm_requests_total{route="/generate",status="200"}') == 1
    assert more('openllm_requests_total{route="/generate",status="400"}') == 1
    assert more("openllm_prompt_tokens_total") == 1 and more("openllm_completion_tokens_total") == 10
    assert more("openllm_cancelled_total") == 0 and 10 <= more("openllm_steps_total") <= 11
    assert 1e6 < after["openllm_resident_memory_bytes"] < 1e12
    for name in "openllm_first_token_seconds", "openllm_request_seconds":
        assert after[name + "_count"] > before.get(name + "_count", 0)
        assert after[name + "_sum"] > before.get(name + "_sum", 0)


@pytest.mark.parametrize("path", ["/nope", "/../../etc/passwd", "/%2e%2e/x", "//evil.com/", "http://evil/health"])
def test_a6_no_such_path(script, path):
    answer = script.get(path)
    assert answer.status == 404 and path.encode() not in answer.body and answer.error["message"]


@pytest.mark.parametrize("method, path, status, allowed", [
    ("GET", "/generate", 405, {"POST"}), ("POST", "/health", 405, {"GET", "HEAD"}),
    ("DELETE", "/v1/models", 405, {"GET", "HEAD"}), ("PUT", "/v1/completions", 405, {"POST"}),
    ("FOO", "/health", 501, None)])
def test_a7_methods(script, method, path, status, allowed):
    answer = script.ask(method, path)
    assert answer.status == status and answer.error["message"]
    if allowed:
        assert {"POST", "GET", "HEAD"} & set(answer.headers["allow"].split(", ")) == allowed


# ----------------------------------------------------------------------------------------------------------------------
# B: generation


def by_sample(client, prompt, n, **settings):
    """What sample.py writes with the same model."""
    settings = sample.SampleConfig(max_new_tokens=n, **settings)
    return sample.write(client.model, ByteTokenizer(), list(prompt.encode()), settings, 0)


def test_b1_greedy(tiny):
    found = {tiny.text("ab", max_tokens=20, **GREEDY) for _ in range(5)}
    assert found == {by_sample(tiny, "ab", 20, temperature=0)}
    ids = list(tiny.model.generate(torch.tensor([[97, 98]]), 20))
    assert found == {ByteTokenizer().decode([i.item() for i in ids])}


def test_b2_seeds(tiny):
    assert tiny.text(**drawn(seed=7)) == tiny.text(**drawn(seed=7))
    assert len({tiny.text(**drawn(seed=seed)) for seed in (1, 2, 3, 4)}) >= 3


def test_b3_every_answer_can_be_replayed(tiny):
    for _ in range(3):
        answer = tiny.generate(**drawn())
        assert isinstance(answer["seed"], int)
        assert tiny.text(**drawn(seed=answer["seed"])) == answer["generated_text"]
    assert len({tiny.generate(max_tokens=1)["seed"] for _ in range(3)}) == 3
    for path, body in ("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", {"messages": SAID}):
        one, two = (tiny.ok(path, **body, n=2, **drawn())["choices"] for _ in range(2))
        for choice in one + two:
            again = tiny.ok(path, **body, **drawn(seed=choice["seed"]))["choices"][0]
            assert again["seed"] == choice["seed"]
            assert again.get("text", again.get("message")) == choice.get("text", choice.get("message"))


@pytest.mark.parametrize("only_the_best", [dict(top_k=1), dict(top_p=1e-9), dict(min_p=1), dict(temperature=1e-9)])
def test_b4_as_good_as_greedy(tiny, only_the_best):
    assert tiny.text("ab", max_tokens=20, **{"temperature": 1, "top_k": 0, **only_the_best}) == \
        tiny.text("ab", max_tokens=20, **GREEDY)


def test_b5_one_token(script):
    script.model.say("hello")
    answer = script.generate(max_tokens=1)
    assert set(answer) == {"generated_text", "prompt_tokens", "completion_tokens", "finish_reason", "seed", "time"}
    assert (answer["generated_text"], answer["completion_tokens"], answer["finish_reason"]) == ("h", 1, "length")
    for name in "max_new_tokens", "max_length":
        assert script.text(**{name: 2}) == "he"


def test_b6_end_of_text(script):
    script.model.say("hi")
    answer = script.generate()
    assert (answer["generated_text"], answer["finish_reason"]) == ("hi", "stop")
    answer = script.generate(ignore_eos=True, max_tokens=9)
    assert (answer["generated_text"], answer["finish_reason"], answer["completion_tokens"]) == ("hi", "length", 9)
    assert script.complete(max_tokens=9)["choices"][0]["finish_reason"] == "stop"


def test_b7_empty_prompts(script):
    script.refused("prompt", prompt="")
    script.refused("prompt", prompt=[])
    for empty in "", [], [[]], ["a", ""]:
        script.refused("prompt", "/v1/completions", prompt=empty)
    script.model.say("ok")
    assert script.text([END]) == "ok"


@pytest.mark.parametrize("body", [{}, *({"prompt": value} for value in (None, 5, {}, ["a", 1], True, [["a"]]))])
@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_b8_no_prompt(script, path, body):
    script.refused("prompt", path, **body)


def test_b9_ids_for_text(tiny):
    by_text, by_ids = tiny.complete("hi", **GREEDY), tiny.complete([104, 105], **GREEDY)
    assert texts(by_text) == texts(by_ids) and by_text["usage"] == by_ids["usage"]
    assert tiny.text([104, 105], **GREEDY) == tiny.text("hi", **GREEDY)


@pytest.mark.parametrize("wrong", [257, -1, True, 1.5, 10**30], ids=str)
@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_b10_ids_that_do_not_exist(script, path, wrong):
    message = script.refused("prompt", path, prompt=[104, wrong])
    assert "256" in message and (wrong == 10**30 or json.dumps(wrong) in message)  # the last id, and the wrong one
    script.model.say("ok")
    assert script.text(max_tokens=2) == "ok"


def test_b10_a_model_with_fewer_tokens_than_its_tokenizer():
    """An id that only the tokenizer knows is refused, however it came, and nobody else notices."""
    with serving(random_model(vocab_size=200, block_size=64), ByteTokenizer()) as client:
        slow = client.wire(client.request("POST", GENERATE, {"prompt": "ab", "max_tokens": 60, "ignore_eos": True}))
        for path, field, body in (
                (GENERATE, "prompt", dict(prompt=[97, 200])), (GENERATE, "prompt", dict(prompt="\u00ff\u0100\u0400")),
                (COMPLETE, "prompt", dict(prompt=["a", "\u0400"])), (CHAT, "messages", dict(
                    messages=[dict(SAID[0], content="\u0400")])),
                (GENERATE, "logit_bias", dict(prompt="a", logit_bias={"200": 1}))):
            assert "199" in client.refused(field, path, **body)
        assert slow.answer().json["completion_tokens"] == 60
        slow.close()


def test_b11_many_prompts(tiny):
    answer = tiny.complete(["a", "b"], **drawn(seed=5))
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert texts(answer) == [texts(tiny.complete(p, **drawn(seed=choice["seed"])))[0]
                             for p, choice in zip("ab", answer["choices"])]
    assert answer["usage"]["prompt_tokens"] == 2
    tiny.refused("prompt", "/v1/completions", prompt=["a"] * 9)
    assert len(tiny.complete([[1, 2], [3]], max_tokens=1)["choices"]) == 2


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_b12_context_limits(tiny, path):
    assert tiny.ok(path, prompt="p" * 127, max_tokens=1)
    for more in {}, {"max_tokens": 1}:
        assert "128/128" in tiny.refused("prompt", path, prompt="p" * 128, **more)
    message = tiny.refused("max_tokens", path, prompt="p" * 100, max_tokens=29)
    assert "100" in message and "29" in message and "128" in message


def test_b12_what_is_left(tiny):
    answer = tiny.generate("p" * 100, ignore_eos=True)
    assert (answer["completion_tokens"], answer["finish_reason"]) == (28, "length")
    for new in 0, 1:  # scoring a prompt needs no new position
        usage = tiny.complete("p" * 128, echo=True, logprobs=0, max_tokens=new)["usage"]
        assert usage == {"prompt_tokens": 128, "completion_tokens": new, "total_tokens": 128 + new}
    said = len(ByteTokenizer().chat(SAID))
    assert tiny.chat(ignore_eos=True)["usage"]["completion_tokens"] == 128 - said
    tiny.refused("messages", "/v1/chat/completions", messages=[{"role": "user", "content": "p" * 128}])


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_b13_too_long_for_a_stream(tiny, path):
    answer = tiny.post(path, prompt="p" * 128, stream=True)
    assert answer.status == 400 and answer.error["param"] == "prompt"


def test_b12_a_context_that_is_cut():
    with serving(tiny_model(), block_size=64) as client:
        assert client.get("/model-info").json["context"] == 64
        assert "64/64" in client.refused("prompt", prompt="p" * 64)
        assert client.generate("p" * 60, ignore_eos=True)["completion_tokens"] == 4


def test_b12_a_model_that_does_not_fit_is_an_error(tiny_run, monkeypatch):
    monkeypatch.chdir(tiny_run)
    monkeypatch.setattr(machine, "free_memory", lambda device: 1000)
    assert "no memory for a context of 32 tokens" in error(serve.main, "out/words", "--port=0")[0]


def test_b14_every_character_comes_back(tiny):
    text = "\u5abd\U0001f917\u00e9"
    assert texts(tiny.complete(text, echo=True, max_tokens=0)) == [text]
    assert texts(tiny.complete(text, echo=True, max_tokens=4, **GREEDY)) == \
        [text + tiny.text(text, max_tokens=4, **GREEDY)]


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/tokenize", "/v1/chat/completions"])
def test_b15_half_a_surrogate_pair(script, path):
    body = {"/tokenize": {"text": "\ud800"}, "/v1/chat/completions": {"messages": [dict(SAID[0], content="\ud800")]}}
    answer = script.post(path, **body.get(path, {"prompt": "\ud800"}))
    assert answer.status == 400 and answer.error["param"] in ("prompt", "text", "messages")


@pytest.fixture(params=["bytes", "bpe", "tiktoken"])
def tokenizer(request, monkeypatch):
    if request.param == "tiktoken":
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", request.getfixturevalue("gpt2"))
        return pretrained.from_tiktoken("gpt2")
    return ByteTokenizer() if request.param == "bytes" else tokenizers.train("bpe", [words(20_000)], vocab_size=400)


def test_b16_special_tokens_are_never_typed(tokenizer):
    with serving(random_model(vocab_size=tokenizer.vocab_size, block_size=64), tokenizer) as client:
        ids = tokenizer.encode("<|endoftext|>")
        answer = client.generate("<|endoftext|>", max_tokens=1)
        assert answer["prompt_tokens"] == len(ids) > 1
        assert client.ok("/tokenize", text="<|endoftext|>")["ids"] == ids
        assert not set(ids) & set(tokenizer.special.values())


def test_b17_a_zero_byte(tiny):
    assert tiny.generate("a\0b", max_tokens=1)["prompt_tokens"] == 3


def test_b18_tokenize_and_back(script):
    with script.wire() as wire:
        def ask(path, **body):
            answer = wire.send(script.request("POST", path, body)).answer()
            assert answer.status == 200
            return answer.json
        for text in nasty(200, seed=3):
            found = ask("/tokenize", text=text)
            assert found["ids"] == list(text.encode()) and len(found["tokens"]) == len(found["ids"])
            assert ask("/detokenize", ids=found["ids"]) == {"text": text}
    assert script.ok("/tokenize", text="a\u00e9")["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert "\ufffd" in script.ok("/detokenize", ids=list("\U0001f917".encode()[:2]))["text"]
    for wrong in [257], [-1], [True], ["a"], "a", None:
        script.refused("ids", "/detokenize", ids=wrong)
    for wrong in 5, None, ["a"]:
        script.refused("text", "/tokenize", text=wrong)


def test_b18_a_short_request_has_no_endless_answer(log):
    """What is answered is bounded before it is made: the text of ids, log-probabilities."""
    with serving(ScriptModel(vocab_size=258), ByteTokenizer(words=[b" " * 1000])) as client:
        assert len(client.ok("/detokenize", ids=[257] * 65)["text"]) == 65_000
        assert "66000 bytes" in client.refused("ids", "/detokenize", ids=[257] * 66)
        scored = dict(prompt=["x" * 3000] * 4, echo=True, max_tokens=0)
        assert "144,000 log-probabilities" in client.refused("logprobs", COMPLETE, **scored, n=2, logprobs=5)
        assert "160,000 log-prob" in client.refused("logprobs", CHAT, messages=SAID, max_tokens=2000, n=4,
                                                    logprobs=True, top_logprobs=19)


def test_b19_several_choices(tiny):
    one, two = (tiny.complete(n=3, **drawn(seed=5)) for _ in range(2))
    assert [choice["index"] for choice in one["choices"]] == [0, 1, 2]
    assert texts(one) == texts(two) and len(set(texts(one))) > 1


def raw_logprobs(model, ids):
    """The log-probability of every token after every position: (T, V)."""
    with torch.inference_mode():
        return model(torch.tensor([ids])).float().log_softmax(-1)[0]


def test_b20_scores_of_a_prompt(tiny):
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
    scores = tiny.complete("ab", echo=True, logprobs=1, max_tokens=3, ignore_eos=True, logit_bias={str(END): -100},
                           **GREEDY)["choices"][0]["logprobs"]
    ids = [97, 98, *(i.item() for i in tiny.model.generate(torch.tensor([[97, 98]]), 3))]
    due = raw_logprobs(tiny.model, ids)
    assert len(scores["tokens"]) == 5 and scores["token_logprobs"][0] is None
    for at in range(1, 5):
        assert scores["token_logprobs"][at] == pytest.approx(due[at - 1, ids[at]].item(), abs=1e-4)


def test_b21_scores_of_a_completion(tiny):
    scores = tiny.complete("ab", logprobs=5, max_tokens=8, **GREEDY)["choices"][0]["logprobs"]
    assert 0 < len(scores["tokens"]) <= 8
    for token, score, top in zip(scores["tokens"], scores["token_logprobs"], scores["top_logprobs"], strict=True):
        assert len(top) == 5 and top[token] == score == max(top.values()) <= 0
        assert torch.tensor(list(top.values())).exp().sum() <= 1 + 1e-5


def test_b21_scores_of_a_chat(tiny):
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
    script.model.say("a")
    token = script.generate(logprobs=20, max_tokens=1)["tokens"][0]
    assert token["logprob"] == pytest.approx(0, abs=1e-4)
    assert len(token["top"]) == 20 and token["top"][1]["logprob"] == pytest.approx(-100, abs=1e-3)


def test_b22_usage_is_exact(script):
    script.model.say("0123456789ABCDEF")
    usage = script.complete(max_tokens=10)["usage"]
    assert usage == {"prompt_tokens": 1, "completion_tokens": 10, "total_tokens": 11}
    answer = script.generate(max_tokens=10)
    assert (answer["generated_text"], answer["prompt_tokens"], answer["completion_tokens"]) == ("0123456789", 1, 10)
    usage = script.complete("x", n=2, max_tokens=10)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (1, 20)
    said = len(ByteTokenizer().chat(SAID))
    script.model.say("0123456789ABCDEF", prompt=said)
    answer = script.chat(max_completion_tokens=10)
    assert answer["usage"] == {"prompt_tokens": said, "completion_tokens": 10, "total_tokens": said + 10}
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "0123456789"}


def greedy_by_hand(model, ids, n, change):
    """Greedy choice after change(logits (V,), prompt, new ids)."""
    prompt, new = list(ids), []
    for _ in range(n):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + new]))[0, -1].float()
        new.append(change(logits.clone(), prompt, new).argmax().item())
    return ByteTokenizer().decode(new)


def repetition(logits, prompt, new):
    for i in {*prompt, *new}:
        logits[i] *= 1 / 1.3 if logits[i] > 0 else 1.3
    return logits


def presence(logits, prompt, new):
    for i in set(new):
        logits[i] -= 2
    return logits


def frequency(logits, prompt, new):
    for i in new:
        logits[i] -= 1.5
    return logits


@pytest.mark.parametrize("body, change", [
    (dict(repetition_penalty=1.3), repetition), (dict(presence_penalty=2), presence),
    (dict(frequency_penalty=1.5), frequency)], ids=["repetition", "presence", "frequency"])
def test_b23_penalties(tiny, body, change):
    due = greedy_by_hand(tiny.model, b"ab", 24, change)
    assert tiny.text("ab", max_tokens=24, ignore_eos=True, **GREEDY, **body) == due
    assert due != tiny.text("ab", max_tokens=24, ignore_eos=True, **GREEDY)


def test_b23_bias(tiny):
    assert tiny.text(max_tokens=9, logit_bias={"65": 100}) == "A" * 9
    assert "A" not in tiny.text(max_tokens=60, seed=1, temperature=2, top_k=0, logit_bias={"65": -100})


def test_b_a_request_may_not_take_for_ever(log):
    with serving(ScriptModel(), request_timeout=0.3) as client:
        client.model.say("a" * 3000)
        client.model.before = lambda idx: time.sleep(0.01)
        answer = client.generate(max_tokens=3000)
        assert answer["finish_reason"] == "timeout" and 5 < answer["completion_tokens"] < 50
        assert answer["generated_text"] == "a" * answer["completion_tokens"]
        assert client.events(max_tokens=3000)[-1]["finish_reason"] == "timeout"
        assert "error" in client.events("/v1/completions", max_tokens=3000)[-1]
        client.model.forget()


def test_b_tokenizing_takes_of_the_time_of_a_request(log, monkeypatch):
    with serving(ScriptModel(), request_timeout=0.3) as client:
        client.model.say("a" * 9)
        encode = client.server.served.tokenizer.encode
        monkeypatch.setattr(client.server.served.tokenizer, "encode", lambda text: time.sleep(0.4) or encode(text))
        answer = client.generate(max_tokens=9)
        assert (answer["finish_reason"], answer["completion_tokens"]) == ("timeout", 0)
        client.model.forget()


def test_b_no_chat_format():
    with serving(ScriptModel(), run={}) as client:
        answer = client.post("/v1/chat/completions", messages=SAID)
        assert answer.status == 400 and answer.error["code"] == "no_chat_format"
        assert client.get("/model-info").json["chat"] is False


def test_b_our_chat_format(script):
    """The prompt is that of tokenizer.py, <|end|> ends the answer, and what is no message is refused."""
    path, tokenizer = "/v1/chat/completions", tokenizers.train("bpe", [words(20_000)], vocab_size=400)
    with serving(ScriptModel(tokenizer.vocab_size), tokenizer) as client:
        assert client.get("/model-info").json["chat"] is True
        talk = [dict(role="system", content="Be brief."), *SAID]
        prompt = tokenizer.chat(talk)
        client.model.say([*tokenizer.encode("my dog"), tokenizer.special["<|end|>"], *tokenizer.encode("never")],
                         prompt=len(prompt))
        answer = client.ok(path, messages=talk)
        assert answer["choices"][0]["message"] == dict(role="assistant", content="my dog")
        assert answer["choices"][0]["finish_reason"] == "stop" and answer["usage"]["prompt_tokens"] == len(prompt)
        assert chosen(client.events(path, messages=talk)) == "my dog"
        for wrong in (dict(role="tool", content="x"), dict(role="developer", content="x"), dict(content="x"),
                      dict(role="user", content=None), dict(role="user|><|end", content="x"), talk[0] | dict(role=[])):
            client.refused("messages", path, messages=[wrong, *SAID])
        client.refused("messages", path, messages=[*SAID, dict(role="assistant", content="x")])
    character = tokenizers.train("char", ["x" + "".join(map(chr, range(0x4e00, 0x4f00)))])
    with serving(ScriptModel(character.vocab_size), character) as client:
        assert "'?' (U+003F)" in client.refused("messages", path, messages=[dict(role="user", content="?")])


def test_b_content_in_parts(tiny):
    parts = [{"type": "text", "text": "hello "}, {"type": "text", "text": "there"}]
    assert tiny.chat(parts, **GREEDY)["choices"][0]["message"] == \
        tiny.chat("hello there", **GREEDY)["choices"][0]["message"]


# ----------------------------------------------------------------------------------------------------------------------
# C: validation. Each case: row, path, what is added to a good request, the field that is named, what the message holds

NAN, INF = float("nan"), float("inf")
GENERATE, COMPLETE, CHAT = "/generate", "/v1/completions", "/v1/chat/completions"
GOOD = {GENERATE: {"prompt": "x", "max_tokens": 2}, COMPLETE: {"prompt": "x", "max_tokens": 2},
        CHAT: {"messages": SAID, "max_tokens": 2}}


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


# ----------------------------------------------------------------------------------------------------------------------
# D: streams


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


def test_d8_usage_in_a_stream(script):
    script.model.say("hello")
    for path, prompt in (COMPLETE, {"prompt": "x"}), (CHAT, {"messages": SAID}):
        *events, last = script.events(path, max_tokens=5, stream_options={"include_usage": True}, **prompt)
        assert last["choices"] == [] and last["usage"]["completion_tokens"] == (5 if path == COMPLETE else 1)
        assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + last["usage"]["completion_tokens"]
        assert events and all(event["usage"] is None for event in events)
        assert all(event.get("usage") is None for event in script.events(path, max_tokens=5, **prompt))


def test_d9_chat_stream(tiny):
    body = dict(messages=SAID, **drawn(seed=3))
    events = tiny.events(CHAT, **body)
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    choices = [choice for event in events for choice in event["choices"]]
    assert choices[0]["delta"]["role"] == "assistant" and not choices[0]["delta"].get("content")
    assert not choices[-1]["delta"].get("content") and choices[-1]["finish_reason"] in ("stop", "length")
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    whole = tiny.ok(CHAT, **body)
    assert whole["object"] == "chat.completion"
    assert chosen(events) == whole["choices"][0]["message"]["content"]


def test_d10_several_choices_in_a_stream(tiny):
    body = dict(prompt=["a", "b"], n=2, **drawn(seed=3))
    events = tiny.events(COMPLETE, **body)
    whole = tiny.ok(COMPLETE, **body)
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    assert [chosen(events, index) for index in range(4)] == texts(whole)
    reasons = [(choice["index"], choice["finish_reason"]) for event in events for choice in event["choices"]
               if choice["finish_reason"]]
    assert sorted(reasons) == [(choice["index"], choice["finish_reason"]) for choice in whole["choices"]]


def joined(parts):
    """The lists of several logprobs objects, one behind the other."""
    parts = [part for part in parts if part]
    return {name: [item for part in parts for item in part[name]] for name in parts[0]}


@pytest.mark.parametrize("path, body", [
    (COMPLETE, dict(prompt="the caf\u00e9", echo=True, logprobs=2)),
    (COMPLETE, dict(prompt="the caf\u00e9", echo=True)),
    (CHAT, dict(messages=SAID, logprobs=True, top_logprobs=2))])
def test_d_scores_and_prompts_in_a_stream(tiny, path, body):
    body.update(drawn(seed=4))
    choices = [choice for event in tiny.events(path, **body) for choice in event["choices"]]
    whole = tiny.ok(path, **body)["choices"][0]
    assert "".join(choice["text"] if path == COMPLETE else choice["delta"].get("content", "") for choice in choices) \
        == whole.get("text", whole.get("message", {}).get("content"))
    if whole["logprobs"]:
        assert joined([choice["logprobs"] for choice in choices]) == whole["logprobs"]


def in_step(n, act):
    """A `before` of ScriptModel that acts in step n."""
    steps = iter(range(1, 10**6))
    return lambda idx: act(idx) if next(steps) == n else None


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


def test_d15_the_client_of_openai(tiny):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"http://127.0.0.1:{tiny.port}/v1", api_key="none", max_retries=0) as client:
        use_openai(openai, client)


def use_openai(openai, client):
    body = dict(model="any", max_tokens=9, seed=3, temperature=1)
    done = client.completions.create(prompt="ab", logprobs=2, n=2, **body)
    assert [choice.index for choice in done.choices] == [0, 1] and done.usage.completion_tokens > 0
    assert len(done.choices[0].logprobs.tokens) == len(done.choices[0].logprobs.token_logprobs)
    parts = list(client.completions.create(prompt="ab", stream=True, **body))
    assert "".join(part.choices[0].text for part in parts) == done.choices[0].text
    assert parts[-1].choices[0].finish_reason == done.choices[0].finish_reason

    chat = client.chat.completions.create(messages=SAID, logprobs=True, top_logprobs=2, **body)
    assert chat.choices[0].message.role == "assistant" and chat.object == "chat.completion"
    assert len(chat.choices[0].logprobs.content[0].top_logprobs) == 2
    parts = list(client.chat.completions.create(messages=SAID, stream=True, stream_options={"include_usage": True},
                                                **body))
    assert parts[0].choices[0].delta.role == "assistant" and parts[-1].usage == chat.usage
    assert "".join(part.choices[0].delta.content or "" for part in parts[:-1]) == chat.choices[0].message.content

    name = client.models.list().data[0].id
    assert client.models.retrieve(name).id == name == chat.model
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(prompt="ab", **{**body, "temperature": 3})
    assert caught.value.param == "temperature" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError):
        client.completions.create(prompt="p" * 128, stream=True, **body)


def test_d15_the_client_of_openai_meets_an_error(script, log):
    openai = pytest.importorskip("openai")
    log.may_fail = True
    script.model.say("hello")
    script.model.before = in_step(3, fail)
    with openai.OpenAI(base_url=f"http://127.0.0.1:{script.port}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.APIError):
            list(client.completions.create(model="any", prompt="x", stream=True))


def test_d15_the_client_of_openai_and_a_key(keyed):
    openai = pytest.importorskip("openai")
    url = f"http://127.0.0.1:{keyed.port}/v1"
    with openai.OpenAI(base_url=url, api_key=KEY) as client:
        assert client.models.list().data
    with openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


# ----------------------------------------------------------------------------------------------------------------------
# E: many at once


def slow(client, seconds=0.01):
    """The model says x for ever, and takes its time for each."""
    client.model.say("x" * 4090)
    client.model.before = lambda idx: time.sleep(seconds)


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


def test_b12_a_long_text_is_not_even_encoded(tiny, monkeypatch):
    monkeypatch.setattr(type(tiny.server.served.tokenizer), "encode", None)
    assert "more than 512" in tiny.refused("prompt", prompt="x" * 513)
    assert "more than 512" in tiny.refused("messages", CHAT, messages=[{"role": "user", "content": "x" * 513}])
    assert "65536" in tiny.refused("text", "/tokenize", text="x" * 65537)


def test_d11_a_bug_of_ours_in_a_stream(script, log, monkeypatch):
    """What fails when the answer has begun becomes an event, not a second head in the middle."""
    log.may_fail = True
    script.model.say("hello")
    monkeypatch.setattr(api.Generate, "end", None)
    *events, last = script.events(max_tokens=5)
    assert "hello".startswith(chosen(events)) and last["error"]["message"] == "the server made a mistake"


def test_b20_scores_that_are_not_finite(script, log):
    log.may_fail = True
    logits, script.model.logits = script.model.logits, lambda x: logits(x) * float("nan")
    try:
        answer = script.post(COMPLETE, prompt="xy", echo=True, logprobs=1, max_tokens=0)
    finally:
        del script.model.logits
    assert answer.status == 500 and answer.error["message"] == "the model failed on this request"


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


# ----------------------------------------------------------------------------------------------------------------------
# G: access


@pytest.fixture(scope="module")
def keyed(tmp_path_factory):
    """A client with a key to a server that asks for one."""
    path = tmp_path_factory.mktemp("key") / "key"
    path.write_text(KEY + "\nanother line\n", encoding="utf-8")
    with serving(ScriptModel(), key=KEY, api_key_file=str(path)) as client:
        yield client


WRONG_KEYS = {
    "none": None, "wrong": "Bearer wrong", "lower case": f"Bearer {KEY.upper()}", "prefix": f"Bearer {KEY[:-1]}",
    "longer": f"Bearer {KEY}x", "basic": f"Basic {KEY}", "bare": KEY, "empty": "Bearer ", "nothing": "",
    "not ascii": "Bearer \xe9\xff", "long": "Bearer " + "k" * 60_000, "second line": "Bearer another line"}


def test_g1_wrong_keys(keyed):
    request = {"prompt": "x", "max_tokens": 1}
    answers = {name: keyed.ask("POST", GENERATE, request, Authorization=key) for name, key in WRONG_KEYS.items()}
    answers["x-api-key"] = keyed.ask("POST", GENERATE, request, Authorization=None, X_Api_Key="wrong")
    assert {name: answer.status for name, answer in answers.items()} == dict.fromkeys(answers, 401)
    assert {answer.headers["www-authenticate"] for answer in answers.values()} == {"Bearer"}
    assert len({answer.body for answer in answers.values()}) == 1
    assert answers["none"].error["type"] == "authentication_error"


@pytest.mark.parametrize("headers", [
    dict(Authorization=f"Bearer {KEY}"), dict(Authorization=f"bearer {KEY}"), dict(Authorization=f"BEARER {KEY}"),
    dict(Authorization=None, X_Api_Key=KEY), dict(Authorization=None, x_api_key=KEY)])
def test_g2_the_right_key(keyed, headers):
    assert keyed.ask("POST", GENERATE, {"prompt": "x", "max_tokens": 1}, **headers).status == 200


def test_g3_every_route_asks_for_the_key(keyed):
    public, routes = {"/", "/health"}, keyed.server.web.routes  # {path: {method: ...}} of all that the server answers
    assert set(routes) >= public | {
        "/generate", "/model-info", "/info", "/metrics", "/tokenize", "/detokenize", "/v1/completions",
        "/v1/chat/completions", "/v1/models"}
    for method, path in [(method, path) for path, methods in routes.items() for method in methods]:
        body = {"prompt": "x"} if method == "POST" else None
        status = keyed.ask(method, path, body, Authorization=None).status
        assert status == (200 if path in public else 401), (method, path, status)


@pytest.mark.parametrize("path", ["/generate/", "/GENERATE", "/generate;x", "/generate?x", "/v1/models/", "/V1/models",
                                  "/v1//models", "/./metrics", "/health/../metrics", "/metrics?x=/health", "/%6detrics",
                                  "/metrics%20", "/?/metrics", "/health?metrics"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_g4_no_way_around_the_key(keyed, method, path):
    body = {"prompt": "x", "max_tokens": 1} if method == "POST" else None
    answer = keyed.ask(method, path, body, Authorization=None)
    if path in ("/?/metrics", "/health?metrics"):  # these are / and /health: no secret there
        assert answer.status == (200 if method == "GET" else 405) and b"openllm_steps" not in answer.body
    else:
        assert answer.status in (401, 404, 405) and b"openllm_steps" not in answer.body


def test_g5_hosts(script):
    port = script.port
    for host in "localhost", f"localhost:{port}", "127.0.0.1", f"127.0.0.1:{port}", "[::1]", f"[::1]:{port}":
        assert script.get("/health", Host=host).status == 200, host
    for host in "evil.com", f"evil.com:{port}", "localhost.evil.com", "127.0.0.1.evil.com", "localhost@evil.com":
        assert script.get("/health", Host=host).status == 403, host
        assert script.ask("POST", GENERATE, {"prompt": "x"}, Host=host).status == 403
    assert script.get("/health", Host=None).status == 400
    assert script.raw(script.request("GET", "/health", version="HTTP/1.0", Host=None)).status == 200
    twice = b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.com\r\n\r\n"
    assert script.raw(twice).status in (400, 403)


PREFLIGHT = dict(Access_Control_Request_Method="POST", Access_Control_Request_Headers="content-type")


def allowed(answer):
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control")}


def test_g6_other_origins(script):
    answer = script.ask("POST", GENERATE, {"prompt": "x", "max_tokens": 1}, Origin="https://evil.com")
    assert not allowed(answer)
    answer = script.ask("OPTIONS", GENERATE, Origin="https://evil.com", **PREFLIGHT)
    assert answer.status == 403 and not allowed(answer)


def test_g6_one_origin():
    good = "https://good.example"
    with serving(ScriptModel(), cors_origin=good) as client:
        for origin in good, "https://evil.com", "https://good.example.evil.com", "null", "http://good.example":
            due = good if origin == good else None
            answer = client.ask("POST", GENERATE, {"prompt": "x", "max_tokens": 1}, Origin=origin)
            preflight = client.ask("OPTIONS", GENERATE, Origin=origin, **PREFLIGHT)
            assert answer.headers.get("access-control-allow-origin") == due
            assert preflight.headers.get("access-control-allow-origin") == due
            assert preflight.status in (200, 204) if due else preflight.status == 403
            assert "access-control-allow-credentials" not in {**answer.headers, **preflight.headers}
            if due:
                assert answer.status == 200 and answer.headers["vary"] == preflight.headers["vary"] == "Origin"
                assert "POST" in preflight.headers["access-control-allow-methods"]
                assert "content-type" in preflight.headers["access-control-allow-headers"].lower()
                assert "authorization" in preflight.headers["access-control-allow-headers"].lower()


def test_g2_a_key_in_the_environment(monkeypatch):
    monkeypatch.setenv("OPENLLM_API_KEY", KEY)
    with serving(ScriptModel(), key=KEY) as client:
        assert client.get("/info").status == 200
        assert client.get("/info", Authorization=None).status == 401


def test_g7_no_key_beyond_this_machine(tiny_run):
    done = run_script("serve.py", "out/words", "--host=0.0.0.0", "--port=0", cwd=tiny_run)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    fact, fix = done.stderr.splitlines()[-2:]
    assert fact.startswith("error: ") and fix.startswith("fix: ") and "key" in fact + fix


def test_g7_no_key_is_wanted():
    with serving(ScriptModel(), host="0.0.0.0", no_auth=True) as client:
        assert client.get("/info", Host="example.org").status == 200


def test_g7_a_key_that_is_none(here):
    (here / "empty").write_text("\n", encoding="utf-8")
    assert "empty" in error(serve.main, "--port=0", "--api_key_file=empty")[0]
    assert "missing" in error(serve.main, "--port=0", "--api_key_file=missing")[0]


@pytest.mark.parametrize("key", ["\u043f\u0430\u0440\u043e\u043b\u044c", "two words", " ", "caf\xe9"])
def test_g7_a_key_that_no_header_can_carry(key, monkeypatch):
    monkeypatch.setenv("OPENLLM_API_KEY", key)
    assert "OPENLLM_API_KEY is empty or holds more than ASCII" in error(serve.main, "--port=0")[0]


@pytest.mark.parametrize("raw", [b"sesame\n", b"\xef\xbb\xbfsesame\r\n", b"  sesame  \nmore"])
def test_g2_white_space_is_no_part_of_a_key(raw, here, monkeypatch):
    (here / "key").write_bytes(raw)
    assert serve.read_key(serve.ServeConfig(api_key_file="key")) == "sesame"
    monkeypatch.setenv("OPENLLM_API_KEY", "sesame\n")
    assert serve.read_key(serve.ServeConfig()) == "sesame"


# ----------------------------------------------------------------------------------------------------------------------
# H: the process


@pytest.fixture
def start(tiny_run, tmp_path):
    """Start `python serve.py out/words ...` in a process of its own."""
    with contextlib.ExitStack() as processes:
        def start(*argv, fault=None, arguments=()):
            said = tmp_path / f"said.{len(list(tmp_path.iterdir()))}"
            process = Process(tiny_run, said, "out/words", *argv, fault=fault, arguments=arguments)
            return processes.enter_context(process)
        yield start


def test_a3_the_process_ends_after_a_fatal_error(start, tmp_path):
    marker = tmp_path / "broken"
    process = start(fault=broken_steps, arguments=[str(marker)]).up()
    assert process.client.text("the ", max_tokens=3)
    marker.touch()
    with contextlib.suppress(OSError, AssertionError):  # refused, reset, or accepted in the last moment: no answer
        while process.client.post(GENERATE, prompt="the ").status == 500:
            pass
    assert process.wait(5) not in (0, None) and "a bug in the model" in process.said()


def test_b1_the_same_text_as_sample(tiny_run, start):
    done = run_script("sample.py", "out/words", "--prompt=the ", "--temperature=0", "--max_new_tokens=20", cwd=tiny_run)
    process = start().up()
    assert "the " + process.client.text("the ", max_tokens=20, **GREEDY) == done.stdout.removesuffix("\n")
    info = process.client.get("/model-info").json
    assert info["step"] == 40 and info["context"] == 32 and str(tiny_run) not in json.dumps(info)
    assert len(info["curve"]) >= 40 and info["curve"][-1][0] == 40 and info["curve"][-1][1] > 0
    assert [row[2] for row in info["curve"] if row[2] is not None]


def test_h1_a_signal_lets_all_finish(start):
    process = start("--rows=2", fault=slow_steps, arguments=[0.03]).up()
    client = process.client
    wires = client.fill(3, prompt="my friend", max_tokens=22, ignore_eos=True)
    assert until(lambda: client.busy() == (2, 1))
    sent = process.signal()
    with contextlib.suppress(ConnectionError):
        assert until(lambda: client.get("/health").json == {"status": "draining"}), process.said()
        refusal = client.post(GENERATE, prompt="the ")
        assert refusal.status == 503 and refusal.headers["retry-after"] == "1"
    for wire in wires:
        event = wire.answer().body.split(b"\n\n")[-3]
        assert json.loads(event.removeprefix(b"data: "))["finish_reason"] == "length"
    assert process.wait() == 0 and time.monotonic() - sent < 10
    assert "Traceback" not in process.said() and "friend" not in process.said()


def test_h_nobody_reads_the_log(start):
    """Lines that a full pipe does not take are dropped, and the server goes on answering."""
    process = start(fault=unread_log).up()
    with process.client.wire() as wire:
        for _ in range(6000):  # a line of some 15 bytes for each, and a pipe holds 64 KB or less
            assert wire.send(process.client.request("GET", "/nope")).answer().status == 404
    assert process.client.generate("the ", max_tokens=3)
    process.signal()
    assert process.wait() == 0


def test_h2_a_signal_does_not_wait_for_ever(start):
    process = start("--drain=1", "--rows=1", fault=slow_steps, arguments=[0.2]).up()
    wires = process.client.fill(1, prompt="the ", max_tokens=28, ignore_eos=True)
    sent = process.signal()
    *_, failure, done, end = wires[0].answer().body.split(b"\n\n")
    assert "error" in json.loads(failure.removeprefix(b"data: ")) and done == b"data: [DONE]" and end == b""
    assert process.wait() == 0 and time.monotonic() - sent < 2.5


def test_h3_a_second_signal_ends_at_once(start):
    process = start("--rows=1", fault=slow_steps, arguments=[0.2]).up()
    wires = process.client.fill(1, prompt="the ", max_tokens=28, ignore_eos=True)
    process.signal()
    assert until(lambda: process.status() == "draining")
    sent = process.signal()
    assert process.wait() == 143 and time.monotonic() - sent < 1
    assert b"[DONE]" not in wires[0].file.read()
    assert "Traceback" not in process.said()


def test_h4_control_c_while_it_loads(start):
    process = start(fault=slow_load, arguments=[30]).up("loading")
    sent = process.signal(signal.SIGINT)
    assert process.wait() == 130 and time.monotonic() - sent < 5
    assert "Traceback" not in process.said()


class Runs:
    """A folder with runs that cannot be served: for each, what its error names."""

    def __init__(self, good, folder):
        self.folder = folder
        for name in "truncated", "malicious", "mismatch":
            shutil.copytree(good, folder / name)
            for path in (folder / name).glob("ckpt_*.pt"):
                path.unlink()
        best = (folder / "truncated/best.pt").read_bytes()
        (folder / "truncated/best.pt").write_bytes(best[:len(best) // 2])
        (folder / "malicious/best.pt").unlink()
        torch.save({"model": Evil(folder / "ran")}, folder / "malicious/best.pt")
        shutil.rmtree(folder / "mismatch/tokenizer")
        tokenizers.train("char", ["abc"]).save(folder / "mismatch/tokenizer")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_h5_runs_that_cannot_be_served(tiny_run, tmp_path):
    bad = Runs(tiny_run / "out/words", tmp_path / "runs").folder
    names = "missing", "truncated", "malicious", "mismatch"
    processes = [Process(tmp_path, tmp_path / f"said.{name}", bad / name) for name in names]
    for name, process in zip(names, processes):
        with process:
            assert process.wait(30) == 2, (name, process.said())
            said = process.said()
            assert "Traceback" not in said and re.search(r"^error: .+\nfix: .+\n\Z", said, re.MULTILINE), said
    assert not (bad / "ran").exists()
    torch.load(bad / "malicious/best.pt", weights_only=False)
    assert (bad / "ran").exists()  # it would have, with another reader


def test_h5_the_port_is_taken(script, monkeypatch, tiny_run):
    monkeypatch.chdir(tiny_run)
    fact, _ = error(serve.main, "out/words", f"--port={script.port}")
    assert str(script.port) in fact


@pytest.mark.slow
def test_h6_ten_minutes(start):
    """A random mix, with clients that leave: memory, threads and files stay as they were."""
    process, end = start("--rows=4", "--max_queue=16").up(), time.monotonic() + 600
    client, samples = process.client, []

    def work(seed):
        rng = random.Random(seed)
        while time.monotonic() < end:
            body = {"prompt": "the cat", "max_tokens": rng.randint(1, 24), "stream": rng.random() < 0.5,
                    "temperature": rng.choice([0, 1, 9])}
            with client.wire(client.request("POST", rng.choice([GENERATE, COMPLETE]), body)) as wire:
                if rng.random() < 0.7:
                    assert wire.answer().status in (200, 400, 503)
                else:
                    time.sleep(rng.uniform(0, 0.02))

    def watch():
        while time.monotonic() < end:
            time.sleep(5)
            proc = pathlib.Path(f"/proc/{process.process.pid}")
            samples.append((client.metric("openllm_resident_memory_bytes"), len(list((proc / "task").iterdir())),
                            len(list((proc / "fd").iterdir()))))
    together([*(lambda seed=seed: work(seed) for seed in range(6)), watch])
    early, late = samples[len(samples) // 5:len(samples) // 2], samples[len(samples) // 2:]
    memory, threads, files = (max(sample[i] for sample in late) / max(sample[i] for sample in early) for i in range(3))
    assert memory < 1.02 and threads <= 1.2 and files <= 1.2, samples
    assert until(lambda: client.busy() == (0, 0)) and client.get("/health").status == 200

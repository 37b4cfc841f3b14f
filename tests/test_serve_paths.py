# SPDX-License-Identifier: GPL-3.0-only
"""
What the server tells of itself: its health, model, page and metrics; and which paths and methods it has.

A letter and a number in the name of a test are explained in servers.py.
"""
import base64
import hashlib
import re
import threading

import pytest
from http_client import LIMIT, until
from servers import (  # noqa: F401 (some are fixtures)
    GENERATE, LIVE, ByteTokenizer, ScriptModel, all_logs_fixture, fail, log_fixture, no_key_fixture, script_fixture,
    script_server_fixture, serving, tiny_fixture, well_afterwards_fixture)


def test_a1_health(script):
    """GET /health is 200 and JSON, of the length that is announced."""
    answer = script.raw(script.request("GET", "/health"))
    assert answer.status == 200 and answer.json == {"status": "ok"}
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["content-length"] == str(len(answer.body))


def test_a2_the_port_is_open_while_the_model_loads():
    """Until the model is loaded, /health says loading, and a request is told to come back in a second."""
    loaded = threading.Event()

    def load():
        assert loaded.wait(LIMIT)
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
    """A model that fails again and again is dead: /health is 503, and nobody waits for it."""
    log.may_fail = True
    with serving(ScriptModel()) as client:
        client.model.before = fail
        assert client.post("/generate", prompt="x").status == 500
        assert until(lambda: client.post("/generate", prompt="x").status == 503)  # some failures in a row
        health = client.get("/health")
        assert health.status == 503 and health.json == {"status": "dead"} and client.server.state == "dead"
        LIVE.remove(client)


class Panic(BaseException):
    """What Rust code raises in Python when it fails (pyo3's PanicException): no Exception."""


@pytest.mark.parametrize("end", [Panic, SystemExit, MemoryError])
def test_a3_whatever_ends_the_loading_is_seen(log, end):
    """What ends the thread that loads, an exception or not, is in the log, and /health says dead."""
    log.may_fail = True

    def load():
        raise end("no tokens")
    with serving(None, load=load) as client:
        assert until(lambda: client.get("/health").json == {"status": "dead"}), "it is said to be loading"
        assert client.server.ended.is_set() and f"{end.__name__}('no tokens')" in log.text()


def test_a3_a_server_that_listens_no_more_is_dead(log, monkeypatch):
    """When the thread that accepts connections ends, the process learns of it."""
    log.may_fail = True
    with serving(ScriptModel()) as client:
        monkeypatch.setattr(client.server.web, "service_actions", lambda: fail(None))
        assert client.server.ended.wait(LIMIT) and client.server.state == "dead"
        LIVE.remove(client)


def test_a3_a_panic_in_a_request_is_an_answer(script, log, monkeypatch):
    """What fails without being an Exception is a 500 for this client, with none of its words."""
    log.may_fail = True

    def panic(text):
        raise Panic("no tokens")
    monkeypatch.setattr(script.server.served.tokenizer, "encode", panic)
    for path, body in (GENERATE, {"prompt": "x"}), ("/tokenize", {"text": "x"}):
        answer = script.post(path, body)
        assert answer.status == 500 and answer.error["message"] == "internal server error"


INFO = {"name", "parameters", "step", "val_loss", "val_bpb", "source", "context", "vocab_size", "n_layer", "n_head",
        "n_embd", "family", "dtype", "device", "tokenizer", "chat", "curve", "defaults"}


def test_a4_what_the_model_is(tiny):
    """/model-info and /v1/models tell what is served, and an answer names that model whatever name was asked for."""
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
    for answer in (tiny.complete(max_tokens=1, model="gpt-4"), tiny.chat(max_tokens=1, model="gpt-4")):
        assert answer["model"] == info["name"]


@pytest.mark.parametrize("name", ["other", "%00", "model/", "MODEL", "secret"])
def test_a4_a_model_of_another_name(tiny, name):
    """Only the served model can be asked for by its name; without a name, the path is the list of models."""
    gone = tiny.get(f"/v1/models/{name}")
    assert gone.status == 404
    assert (gone.error["code"], gone.error["param"]) == ("model_not_found", "model")
    assert tiny.get("/v1/models/").json == tiny.get("/v1/models").json


def test_a5_page(script):
    """GET / is the page, and its content security policy allows its own script and style alone."""
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
    """HEAD is GET without a body: the same length, and the next answer on the connection follows at once."""
    answer, whole = script.ask("HEAD", "/health"), script.get("/health")
    assert answer.status == 200 and answer.body == b""
    assert answer.headers["content-length"] == whole.headers["content-length"]
    with script.wire(script.request("HEAD", "/health") + script.request("GET", "/health")) as wire:
        assert wire.answer("HEAD").status == 200 and wire.answer().body == whole.body  # nothing stood between them


def test_a5_metrics(script):
    """/metrics is in the text format of Prometheus, and counts exactly what was asked and answered."""
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
    assert more("openllm_cancelled_total") == 0
    assert 10 <= more("openllm_steps_total") <= 11  # (the last step before this may have been counted late)
    assert 1e6 < after["openllm_resident_memory_bytes"] < 1e12
    for name in "openllm_first_token_seconds", "openllm_request_seconds":
        assert more(name + "_count") == 1 and more(name + "_sum") > 0


@pytest.mark.parametrize("path", ["/nope", "/../../etc/passwd", "/%2e%2e/x", "//evil.com/", "http://evil/health"])
def test_a6_no_such_path(script, path):
    """A path that is not there is a 404 in JSON, which does not repeat it."""
    answer = script.get(path)
    assert answer.status == 404 and path.encode() not in answer.body and answer.error["message"]


@pytest.mark.parametrize("method, path, status, allowed", [
    ("GET", "/generate", 405, {"POST"}), ("POST", "/health", 405, {"GET", "HEAD"}),
    ("DELETE", "/v1/models", 405, {"GET", "HEAD"}), ("PUT", "/v1/completions", 405, {"POST"}),
    ("FOO", "/health", 501, None)])
def test_a7_methods(script, method, path, status, allowed):
    """A method that a path does not take is a 405 that names those that it takes; one that nobody knows, a 501."""
    answer = script.ask(method, path)
    assert answer.status == status and answer.error["message"]
    if allowed:
        assert set(answer.headers["allow"].split(", ")) == allowed

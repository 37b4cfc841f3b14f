# SPDX-License-Identifier: GPL-3.0-only
"""
Who may use the server: keys, hosts, and pages of other origins.

A letter and a number in the name of a test are explained in servers.py.
"""
import pytest
from conftest import error
from servers import (  # noqa: F401 (some are fixtures)
    GENERATE, KEY, ScriptModel, all_logs_fixture, keyed_fixture, log_fixture, no_key_fixture, script_fixture,
    script_server_fixture, serving, well_afterwards_fixture)

import serve

WRONG_KEYS = {
    "none": None, "wrong": "Bearer wrong", "lower case": f"Bearer {KEY.upper()}", "prefix": f"Bearer {KEY[:-1]}",
    "longer": f"Bearer {KEY}x", "basic": f"Basic {KEY}", "bare": KEY, "empty": "Bearer ", "nothing": "",
    "not ascii": "Bearer \xe9\xff", "long": "Bearer " + "k" * 60_000, "second line": "Bearer another line"}


def test_g1_wrong_keys(keyed):
    """Whatever is wrong with a key, the answer is the same 401, to the byte."""
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
    """The key is taken as a Bearer token, however that word is written, or as X-Api-Key."""
    assert keyed.ask("POST", GENERATE, {"prompt": "x", "max_tokens": 1}, **headers).status == 200


def test_g3_every_route_asks_for_the_key(keyed):
    """All that the server has needs the key, but its page and /health; a new path, too."""
    public, routes = {"/", "/health"}, keyed.server.web.routes  # {path: {method: ...}} of all that the server answers
    assert set(routes) >= public | {
        "/generate", "/model-info", "/info", "/metrics", "/tokenize", "/detokenize", "/v1/completions",
        "/v1/chat/completions", "/v1/models"}
    for method, path in [(method, path) for path, methods in routes.items() for method in methods]:
        body = {"prompt": "x"} if method == "POST" else None
        status = keyed.ask(method, path, body, Authorization=None).status
        assert status == (200 if path in public else 401), (method, path, status)


# Paths that look like one that needs the key: the status of GET and of POST without it. (401 for all would be right,
# too: the server first looks whether there is such a path, 404, and whether it takes the method, 405.)
NO_WAY_AROUND = {
    "/generate/": (404, 404), "/GENERATE": (404, 404), "/generate;x": (404, 404), "/generate?x": (405, 401),
    "/v1/models/": (401, 405), "/V1/models": (404, 404), "/v1//models": (401, 405), "/./metrics": (404, 404),
    "/health/../metrics": (404, 404), "/metrics?x=/health": (401, 405), "/%6detrics": (401, 405),
    "/metrics%20": (404, 404),
    "/?/metrics": (200, 405), "/health?metrics": (200, 405)}  # which are / and /health: no secret there


@pytest.mark.parametrize("path", NO_WAY_AROUND)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_g4_no_way_around_the_key(keyed, method, path):
    """No spelling of a path gets past the key."""
    body = {"prompt": "x", "max_tokens": 1} if method == "POST" else None
    answer = keyed.ask(method, path, body, Authorization=None)
    assert answer.status == NO_WAY_AROUND[path][method == "POST"] and b"openllm_steps" not in answer.body


def test_g5_hosts(script):
    """On this machine's own address, only names of this machine are taken as Host: no site can point its name at us."""
    port = script.port
    for host in "localhost", f"localhost:{port}", "127.0.0.1", f"127.0.0.1:{port}", "[::1]", f"[::1]:{port}":
        assert script.get("/health", Host=host).status == 200, host
    for host in "evil.com", f"evil.com:{port}", "localhost.evil.com", "127.0.0.1.evil.com", "localhost@evil.com":
        assert script.get("/health", Host=host).status == 403, host
        assert script.ask("POST", GENERATE, {"prompt": "x"}, Host=host).status == 403
    assert script.get("/health", Host=None).status == 400
    assert script.raw(script.request("GET", "/health", version="HTTP/1.0", Host=None)).status == 200
    twice = b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.com\r\n\r\n"
    assert script.raw(twice).status == 400


PREFLIGHT = dict(Access_Control_Request_Method="POST", Access_Control_Request_Headers="content-type")


def allowed(answer):
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control")}


def test_g6_other_origins(script):
    """A page of another origin may not ask, and no header says that it may."""
    answer = script.ask("POST", GENERATE, {"prompt": "x", "max_tokens": 1}, Origin="https://evil.com")
    assert not allowed(answer)
    answer = script.ask("OPTIONS", GENERATE, Origin="https://evil.com", **PREFLIGHT)
    assert answer.status == 403 and not allowed(answer)


def test_g6_one_origin():
    """With --cors_origin, pages of exactly these origins may; no credentials, and no other origin."""
    good, local = "https://good.example", "http://localhost:3000"
    with serving(ScriptModel(), cors_origin=[f"{good}/", local]) as client:
        for origin in good, local, "https://evil.com", "https://good.example.evil.com", "null", "http://good.example":
            due = origin if origin in (good, local) else None
            answer = client.ask("POST", GENERATE, {"prompt": "x", "max_tokens": 1}, Origin=origin)
            preflight = client.ask("OPTIONS", GENERATE, Origin=origin, **PREFLIGHT)
            assert answer.headers.get("access-control-allow-origin") == due
            assert preflight.headers.get("access-control-allow-origin") == due
            assert preflight.status == (204 if due else 403)  # (any status from 200 to 299 would allow it)
            assert "access-control-allow-credentials" not in {**answer.headers, **preflight.headers}
            if due:
                assert answer.status == 200 and answer.headers["vary"] == preflight.headers["vary"] == "Origin"
                assert "POST" in preflight.headers["access-control-allow-methods"]
                assert "content-type" in preflight.headers["access-control-allow-headers"].lower()
                assert "authorization" in preflight.headers["access-control-allow-headers"].lower()


def test_g2_a_key_in_the_environment(monkeypatch):
    """OPENLLM_API_KEY is the key where no file is named."""
    monkeypatch.setenv("OPENLLM_API_KEY", KEY)
    with serving(ScriptModel(), key=KEY) as client:
        assert client.get("/info").status == 200
        assert client.get("/info", Authorization=None).status == 401


def test_g7_no_key_beyond_this_machine(here):
    """Where others could reach it, the server does not start without a key; the error says how to give one."""
    fact, fix = error(serve.main, "--host=0.0.0.0", "--port=0")
    assert fact == "host=0.0.0.0 admits other machines without a key" and "OPENLLM_API_KEY=" in fix


def test_g7_no_key_is_wanted():
    """--no_auth is how to say that no key is wanted; then any Host is fine."""
    with serving(ScriptModel(), host="0.0.0.0", no_auth=True) as client:
        assert client.get("/info", Host="example.org").status == 200


def test_g7_a_key_that_is_none(here):
    """A key file that is empty or missing is an error, not a server without a key."""
    (here / "empty").write_text("\n", encoding="utf-8")
    assert "empty" in error(serve.main, "--port=0", "--api_key_file=empty")[0]
    assert "missing" in error(serve.main, "--port=0", "--api_key_file=missing")[0]


@pytest.mark.parametrize("key", ["\u043f\u0430\u0440\u043e\u043b\u044c", "two words", " ", "caf\xe9"])
def test_g7_a_key_that_no_header_can_carry(key, monkeypatch):
    """A key that is not ASCII, or has spaces in it, is an error: no client could send it."""
    monkeypatch.setenv("OPENLLM_API_KEY", key)
    assert "OPENLLM_API_KEY is empty or holds spaces or non-ASCII characters" in error(serve.main, "--port=0")[0]


@pytest.mark.parametrize("raw", [b"sesame\n", b"\xef\xbb\xbfsesame\r\n", b"  sesame  \nmore"])
def test_g2_white_space_is_no_part_of_a_key(raw, here, monkeypatch):
    """A key is the first line of its file, without a byte order mark, line ends and spaces around it."""
    (here / "key").write_bytes(raw)
    assert serve.read_key(serve.ServeConfig(api_key_file="key")) == "sesame"
    monkeypatch.setenv("OPENLLM_API_KEY", "sesame\n")
    assert serve.read_key(serve.ServeConfig()) == "sesame"

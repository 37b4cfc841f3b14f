# SPDX-License-Identifier: GPL-3.0-only
"""
Client libraries against the server, each if it is installed: OpenAI's (async; the other is in test_serve_openai.py),
LangChain's and LiteLLM, and the requests of OpenAI's client for JavaScript in a page of another origin.
"""
import asyncio
import contextlib
import http.server
import json
import threading

import pytest
from conftest import package
from http_client import together, until
from servers import (  # noqa: F401 (some are fixtures)
    RUN, ByteTokenizer, all_logs_fixture, log_fixture, no_key_fixture, serving, tiny_fixture, tiny_model,
    well_afterwards_fixture)

TALK = [dict(role="developer", content="Be brief."), dict(role="user", content="x")]
BODY = dict(model="any", seed=3, max_tokens=9, temperature=1)


@contextlib.contextmanager
def lasting_server(**settings):
    """A client to a server whose clients may keep their connections."""
    with serving(None, load=lambda: (tiny_model(), ByteTokenizer(), dict(RUN)), **settings) as client:
        assert until(lambda: client.server.state == "ok")
        yield client


@pytest.fixture(scope="module", name="lasting")
def lasting_fixture():
    with lasting_server() as client:
        yield client


@pytest.fixture(name="due")
def due_fixture(lasting):
    """What the server answers to TALK and BODY."""
    return lasting.ok("/v1/chat/completions", messages=TALK, **BODY)["choices"][0]["message"]["content"]


def test_openai_async(tiny):
    """Eight chats at once, each as alone, whole and as a stream."""
    openai = package("openai")

    async def use():
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{tiny.port}/v1", api_key="none") as client:
            create = client.chat.completions.create
            whole = await asyncio.gather(*[create(messages=TALK, **BODY | dict(seed=seed)) for seed in range(8)])
            stream = await create(messages=TALK, stream=True, **BODY)
            text = "".join([part.choices[0].delta.content or "" async for part in stream])
            names = [model.id async for model in client.models.list()]
        return [answer.choices[0].message.content for answer in whole], text, names
    found, text, names = asyncio.run(use())
    calls = [lambda seed=seed: tiny.ok("/v1/chat/completions", messages=TALK, **BODY | dict(seed=seed))
             for seed in range(8)]
    assert found == [answer["choices"][0]["message"]["content"] for answer in together(calls, 1)]
    assert text == found[3] and names == [tiny.get("/info").json["name"]] and len(set(found)) > 4


def test_langchain(lasting, due):
    """invoke, stream, batch and stop; structured output, which is not supported, is an error."""
    library = pytest.importorskip("langchain_openai", reason="langchain-openai is not here; requirements-dev.txt is without it")
    url = f"http://127.0.0.1:{lasting.port}/v1"
    model = library.ChatOpenAI(base_url=url, api_key="none", **BODY)
    talk = [("system", "Be brief."), ("human", "x")]
    answer = model.invoke(talk)
    assert answer.content == due and answer.usage_metadata["output_tokens"] == 9
    assert "".join(part.content for part in model.stream(talk)) == due
    assert [one.content for one in model.batch([talk, talk])] == [due, due]
    assert model.invoke(talk, stop=[due[2:4], "never"]).content == due[:2]
    text = library.OpenAI(base_url=url, api_key="none", **BODY).invoke("ab")
    assert text == lasting.complete("ab", **BODY)["choices"][0]["text"]
    for method in "json_mode", "json_schema", "function_calling":
        schema = dict(title="a", description="json", type="object", properties={"x": {"type": "string"}})
        with pytest.raises(Exception, match="is not supported here"):
            model.with_structured_output(schema, method=method).invoke("json")


def test_litellm(lasting, due):
    """By the names of three servers that speak as this one does."""
    litellm = pytest.importorskip("litellm", reason="litellm is not here; requirements-dev.txt is without it")
    more = {name: value for name, value in BODY.items() if name != "model"}
    more.update(api_base=f"http://127.0.0.1:{lasting.port}/v1", api_key="none")
    for model in "openai/any", "hosted_vllm/any", "lm_studio/any":
        assert litellm.completion(model, TALK, **more).choices[0].message.content == due
        parts = litellm.completion(model, TALK, stream=True, **more)
        assert "".join(part.choices[0].delta.content or "" for part in parts) == due
    assert asyncio.run(litellm.acompletion("openai/any", TALK, **more)).choices[0].message.content == due
    with pytest.raises(litellm.BadRequestError, match="response_format"):
        litellm.completion("openai/any", TALK, response_format={"type": "json_object"}, **more)


@contextlib.contextmanager
def pages():
    """The address of a server of empty pages."""
    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()

        def log_message(self, *_):
            pass
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


ASK = """
const [url, body, done] = arguments;
const names = ["Lang", "Package-Version", "OS", "Arch", "Runtime", "Runtime-Version", "Retry-Count", "Timeout"];
const headers = {"Authorization": "Bearer none", "Content-Type": "application/json", "Accept": "application/json",
                 "X-Stainless-Helper-Method": "stream", "OpenAI-Organization": "x"};
for (const name of names) headers["X-Stainless-" + name] = "x";
fetch(url, {method: "POST", headers, body}).then((answer) => answer.json())
    .then((answer) => done(answer.choices[0].message.content), (error) => done("" + error));
"""


def test_a_page_of_another_origin(browser, due):
    """A browser lets a page of an allowed origin send what OpenAI's client for JavaScript sends, and no other page."""
    body = json.dumps(dict(messages=TALK, **BODY))
    with pages() as good, pages() as evil:
        with lasting_server(cors_origin=[good]) as client:
            found = []
            for page in good, evil:
                browser.get(page)
                url = f"http://127.0.0.1:{client.port}/v1/chat/completions"
                found.append(browser.execute_async_script(ASK, url, body))
            browser.get("about:blank")  # hang up
    browser.get_log("browser")  # of the page that was refused
    assert found == [due, "TypeError: Failed to fetch"]

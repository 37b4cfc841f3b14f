# SPDX-License-Identifier: GPL-3.0-only
"""
The server as OpenAI's clients use it: chats, streams with several choices, and the official client.

A letter and a number in the name of a test are explained in servers.py.
"""
import pytest
from conftest import words
from http_client import chosen
from servers import (  # noqa: F401 (some are fixtures)
    CHAT, COMPLETE, GREEDY, KEY, SAID, ScriptModel, all_logs_fixture, drawn, fail, in_step, keyed_fixture, log_fixture,
    no_key_fixture, script_fixture, script_server_fixture, serving, texts, tiny_fixture, well_afterwards_fixture)

import tokenizer as tokenizers


def test_b_no_chat_format():
    """A model that has learned no chat format says so, and does not make one up."""
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
        for wrong in (dict(role="tool", content="x"), dict(content="x"),
                      dict(role="user", content=None), dict(role="user|><|end", content="x"), talk[0] | dict(role=[])):
            client.refused("messages", path, messages=[wrong, *SAID])
    character = tokenizers.train("char", ["x" + "".join(map(chr, range(0x4e00, 0x4f00)))])
    with serving(ScriptModel(character.vocab_size), character) as client:
        assert "'?' (U+003F)" in client.refused("messages", path, messages=[dict(role="user", content="?")])


def test_b_content_in_parts(tiny):
    """A message in parts of text is their text."""
    parts = [{"type": "text", "text": "hello "}, {"type": "text", "text": "there"}]
    assert tiny.chat(parts, **GREEDY)["choices"][0]["message"] == \
        tiny.chat("hello there", **GREEDY)["choices"][0]["message"]


def test_d8_usage_in_a_stream(script):
    """With stream_options the last event counts the tokens, and only then; the others say null."""
    script.model.say("hello")
    for path, prompt in (COMPLETE, {"prompt": "x"}), (CHAT, {"messages": SAID}):
        *events, last = script.events(path, max_tokens=5, stream_options={"include_usage": True}, **prompt)
        assert last["choices"] == [] and last["usage"]["completion_tokens"] == (5 if path == COMPLETE else 1)
        assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + last["usage"]["completion_tokens"]
        assert events and all(event["usage"] is None for event in events)
        assert all(event.get("usage") is None for event in script.events(path, max_tokens=5, **prompt))


def test_d9_chat_stream(tiny):
    """A chat stream begins with the role, ends with the reason, and carries the text of the whole answer."""
    body = dict(messages=SAID, **drawn(seed=3))
    events = tiny.events(CHAT, **body)
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    choices = [choice for event in events for choice in event["choices"]]
    assert choices[0]["delta"]["role"] == "assistant" and not choices[0]["delta"].get("content")
    assert not choices[-1]["delta"].get("content") and choices[-1]["finish_reason"] == "length"
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    whole = tiny.ok(CHAT, **body)
    assert whole["object"] == "chat.completion"
    assert chosen(events) == whole["choices"][0]["message"]["content"]


def test_d10_several_choices_in_a_stream(tiny):
    """Two choices for each of two prompts come in one stream, told apart by their index."""
    body = dict(prompt=["a", "b"], n=2, **drawn(seed=3))
    events = tiny.events(COMPLETE, **body)
    whole = tiny.ok(COMPLETE, **body)
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    assert [chosen(events, index) for index in range(4)] == texts(whole)
    reasons = [(choice["index"], choice["finish_reason"]) for event in events for choice in event["choices"]
               if choice["finish_reason"]]
    assert sorted(reasons) == [(choice["index"], choice["finish_reason"]) for choice in whole["choices"]]


def test_d15_the_client_of_openai(tiny):
    """The official client can do with this server what it does with OpenAI's: completions, chats, streams, models,
    errors."""
    openai = pytest.importorskip("openai", reason="openai is not installed: pip install -r requirements-dev.txt")
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
    """A stream that fails in the middle is an APIError to the official client."""
    openai = pytest.importorskip("openai", reason="openai is not installed: pip install -r requirements-dev.txt")
    log.may_fail = True
    script.model.say("hello")
    script.model.before = in_step(3, fail)
    with openai.OpenAI(base_url=f"http://127.0.0.1:{script.port}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.APIError):
            list(client.completions.create(model="any", prompt="x", stream=True))


def test_d15_the_client_of_openai_and_a_key(keyed):
    """The official client sends the key; a wrong one is an AuthenticationError."""
    openai = pytest.importorskip("openai", reason="openai is not installed: pip install -r requirements-dev.txt")
    url = f"http://127.0.0.1:{keyed.port}/v1"
    with openai.OpenAI(base_url=url, api_key=KEY) as client:
        assert client.models.list().data
    with openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()

# SPDX-License-Identifier: GPL-3.0-only
"""
What the server writes: prompts, seeds, lengths, penalties; and what a request may not ask for.

A letter and a number in the name of a test are explained in servers.py.
"""
import json

import pytest
import torch
from conftest import error, nasty, random_model, words
from servers import (  # noqa: F401 (some are fixtures)
    CHAT, COMPLETE, END, GENERATE, GREEDY, SAID, ByteTokenizer, ScriptModel, all_logs_fixture, clock_fixture, drawn,
    log_fixture, no_key_fixture, script_fixture, script_server_fixture, serving, slow, texts, tiny_fixture, tiny_model,
    well_afterwards_fixture)

from text import pretrained
from runtime import machine
import sample
import serve
import tokenizer as tokenizers


def by_sample(client, prompt, n, **settings):
    """What sample.py writes with the same model."""
    settings = sample.SampleConfig(max_new_tokens=n, **settings)
    return sample.write(client.model, ByteTokenizer(), list(prompt.encode()), settings, 0)


def test_b1_greedy(tiny):
    """At temperature 0 the text is that of sample.py and of GPT.generate, always."""
    found = {tiny.text("ab", max_tokens=20, **GREEDY) for _ in range(3)}
    assert found == {by_sample(tiny, "ab", 20, temperature=0)}
    ids = list(tiny.model.generate(torch.tensor([[97, 98]]), 20))
    assert found == {ByteTokenizer().decode([i.item() for i in ids])}


def test_b2_seeds(tiny):
    """The same seed gives the same text, another seed another one."""
    assert tiny.text(**drawn(seed=7)) == tiny.text(**drawn(seed=7))
    assert len({tiny.text(**drawn(seed=seed)) for seed in (1, 2, 3, 4)}) == 4


def test_b3_every_answer_can_be_replayed(tiny):
    """An answer tells its seed, one for each choice, and with that seed it comes again."""
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
    """A filter that leaves the likeliest token alone is the same as temperature 0."""
    assert tiny.text("ab", max_tokens=20, **{"temperature": 1, "top_k": 0, **only_the_best}) == \
        tiny.text("ab", max_tokens=20, **GREEDY)


def test_b5_one_token(script):
    """max_tokens is kept exactly, also by its other names; an answer of /generate has these fields and no others."""
    script.model.say("hello")
    answer = script.generate(max_tokens=1)
    assert set(answer) == {"generated_text", "prompt_tokens", "completion_tokens", "finish_reason", "seed", "time"}
    assert (answer["generated_text"], answer["completion_tokens"], answer["finish_reason"]) == ("h", 1, "length")
    for name in "max_new_tokens", "max_length":
        assert script.text(**{name: 2}) == "he"


def test_b6_end_of_text(script):
    """The end-of-text token ends an answer by `stop`, is not part of it, and is passed over with ignore_eos."""
    script.model.say("hi")
    answer = script.generate()
    assert (answer["generated_text"], answer["finish_reason"], answer["completion_tokens"]) == ("hi", "stop", 3)
    answer = script.generate(ignore_eos=True, max_tokens=9)
    assert (answer["generated_text"], answer["finish_reason"], answer["completion_tokens"]) == ("hi", "length", 9)
    assert script.complete(max_tokens=9)["choices"][0]["finish_reason"] == "stop"


def test_b7_empty_prompts(script):
    """An empty prompt is refused; who wants to start from nothing sends the end-of-text token."""
    script.refused("prompt", prompt="")
    script.refused("prompt", prompt=[])
    for empty in "", [], [[]], ["a", ""]:
        script.refused("prompt", "/v1/completions", prompt=empty)
    script.model.say("ok")
    assert script.text([END]) == "ok"


@pytest.mark.parametrize("body", [{}, *({"prompt": value} for value in (None, 5, {}, ["a", 1], True, [["a"]]))])
@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_b8_no_prompt(script, path, body):
    """A prompt that is missing, or is neither a text nor token ids, is refused by its name."""
    script.refused("prompt", path, **body)


def test_b9_ids_for_text(tiny):
    """A prompt of token ids is the same as its text."""
    by_text, by_ids = tiny.complete("hi", **GREEDY), tiny.complete([104, 105], **GREEDY)
    assert texts(by_text) == texts(by_ids) and by_text["usage"] == by_ids["usage"]
    assert tiny.text([104, 105], **GREEDY) == tiny.text("hi", **GREEDY)


@pytest.mark.parametrize("wrong", [257, -1, True, 1.5, 10**30], ids=str)
@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_b10_ids_that_do_not_exist(script, path, wrong):
    """A token id beyond the vocabulary is refused, with the last that there is; the next request is fine."""
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
    """A list of prompts gives a choice for each, which it gets alone too; at most eight."""
    answer = tiny.complete(["a", "b"], **drawn(seed=5))
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert texts(answer) == [texts(tiny.complete(p, **drawn(seed=choice["seed"])))[0]
                             for p, choice in zip("ab", answer["choices"])]
    assert answer["usage"]["prompt_tokens"] == 2
    tiny.refused("prompt", "/v1/completions", prompt=["a"] * 9)
    assert len(tiny.complete([[1, 2], [3]], max_tokens=1)["choices"]) == 2


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_b12_context_limits(tiny, path):
    """Prompt and answer have to fit into the context; else the error says how long both are."""
    assert tiny.ok(path, prompt="p" * 127, max_tokens=1)
    for more in {}, {"max_tokens": 1}:
        assert "128/128" in tiny.refused("prompt", path, prompt="p" * 128, **more)
    message = tiny.refused("max_tokens", path, prompt="p" * 100, max_tokens=29)
    assert "100" in message and "29" in message and "128" in message


def test_b12_what_is_left(tiny):
    """Without max_tokens an answer may use all that is left, and scoring a prompt may fill the context."""
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
    """What is too long for the context is a plain 400 for a stream, too."""
    answer = tiny.post(path, prompt="p" * 128, stream=True)
    assert answer.status == 400 and answer.error["param"] == "prompt"


def test_b12_a_context_that_is_cut():
    """--block_size cuts the context, for clients as well."""
    with serving(tiny_model(), block_size=64) as client:
        assert client.get("/model-info").json["context"] == 64
        assert "64/64" in client.refused("prompt", prompt="p" * 64)
        assert client.generate("p" * 60, ignore_eos=True)["completion_tokens"] == 4


def test_b12_a_model_that_does_not_fit_is_an_error(tiny_run, monkeypatch):
    """A model for whose context there is no memory is not served; the error has its size."""
    monkeypatch.chdir(tiny_run)
    monkeypatch.setattr(machine, "free_memory", lambda device: 1000)
    assert "too little memory for a context of 32 tokens" in error(serve.main, "out/words", "--port=0")[0]


def test_b14_every_character_comes_back(tiny):
    """Echo repeats the prompt byte for byte, and the answer follows it."""
    text = "\u5abd\U0001f917\u00e9"
    assert texts(tiny.complete(text, echo=True, max_tokens=0)) == [text]
    assert texts(tiny.complete(text, echo=True, max_tokens=4, **GREEDY)) == \
        [text + tiny.text(text, max_tokens=4, **GREEDY)]


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/tokenize", "/v1/chat/completions"])
def test_b15_half_a_surrogate_pair(script, path):
    """JSON can hold half a character of UTF-16, which is no text: refused."""
    body = {"/tokenize": {"text": "\ud800"}, "/v1/chat/completions": {"messages": [dict(SAID[0], content="\ud800")]}}
    answer = script.post(path, **body.get(path, {"prompt": "\ud800"}))
    assert answer.status == 400
    assert answer.error["param"] == {"/tokenize": "text", "/v1/chat/completions": "messages"}.get(path, "prompt")


@pytest.fixture(params=["bytes", "bpe", "tiktoken"])
def tokenizer(request, monkeypatch):
    if request.param == "tiktoken":
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", request.getfixturevalue("gpt2"))
        return pretrained.from_tiktoken("gpt2")
    return ByteTokenizer() if request.param == "bytes" else tokenizers.train("bpe", [words(20_000)], vocab_size=400)


def test_b16_special_tokens_are_never_typed(tokenizer):
    """The characters <|endoftext|> in a text are characters, not the special token, for every kind of tokenizer."""
    with serving(random_model(vocab_size=tokenizer.vocab_size, block_size=64), tokenizer) as client:
        ids = tokenizer.encode("<|endoftext|>")
        answer = client.generate("<|endoftext|>", max_tokens=1)
        assert answer["prompt_tokens"] == len(ids) > 1
        assert client.ok("/tokenize", text="<|endoftext|>")["ids"] == ids
        assert not set(ids) & set(tokenizer.special.values())


def test_b17_a_zero_byte(tiny):
    """A zero byte in a prompt is a character like others."""
    assert tiny.generate("a\0b", max_tokens=1)["prompt_tokens"] == 3


def test_b18_tokenize_and_back(script):
    """/detokenize gives back what /tokenize took apart, for 200 nasty strings; what is no text or no id is refused."""
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
    """n choices differ from each other, and a seed repeats all of them."""
    one, two = (tiny.complete(n=3, **drawn(seed=5)) for _ in range(2))
    assert [choice["index"] for choice in one["choices"]] == [0, 1, 2]
    assert texts(one) == texts(two) and len(set(texts(one))) > 1


def test_b22_usage_is_exact(script):
    """The tokens of prompt and answer are counted exactly, on all three paths."""
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
    """Each penalty is the formula of its definition, applied to the same logits."""
    due = greedy_by_hand(tiny.model, b"ab", 24, change)
    assert tiny.text("ab", max_tokens=24, ignore_eos=True, **GREEDY, **body) == due
    assert due != tiny.text("ab", max_tokens=24, ignore_eos=True, **GREEDY)


def test_b23_bias(tiny):
    """A logit_bias of 100 makes a token certain, one of -100 impossible."""
    assert tiny.text(max_tokens=9, logit_bias={"65": 100}) == "A" * 9
    assert "A" not in tiny.text(max_tokens=60, seed=1, temperature=2, top_k=0, logit_bias={"65": -100})


@pytest.fixture
def minute(script, clock, monkeypatch):
    """A client to the server of `script`, where a request may take a minute, and each step of the model takes seven
    seconds."""
    monkeypatch.setattr(script.server.settings, "request_timeout", 60)
    script.model.say("a" * 300)
    script.model.before = lambda idx: clock.go_on(7)
    return script


def test_b_a_request_may_not_take_for_ever(minute):
    """After request_timeout seconds an answer ends where it is; OpenAI has no reason for that, so there it is an error.
    """
    answer = minute.generate(max_tokens=300)
    assert (answer["finish_reason"], answer["generated_text"]) == ("timeout", "a" * 9)  # the ninth step ends at 63 s
    assert minute.events(max_tokens=300)[-1]["finish_reason"] == "timeout"
    assert minute.events(COMPLETE, max_tokens=300)[-1]["error"]["code"] == "timeout"
    assert minute.generate(max_tokens=9)["finish_reason"] == "length"


def test_b_tokenizing_takes_of_the_time_of_a_request(minute, clock, monkeypatch):
    """The time of a request begins before its prompt is encoded."""
    encode = minute.server.served.tokenizer.encode

    def encode_for_long(text):
        clock.go_on(50)
        return encode(text)
    monkeypatch.setattr(minute.server.served.tokenizer, "encode", encode_for_long)
    answer = minute.generate(max_tokens=300)
    assert (answer["finish_reason"], answer["generated_text"]) == ("timeout", "aa")


def test_b12_a_long_text_is_not_even_encoded(tiny, monkeypatch):
    """A text that cannot fit into the context, whatever its tokens are, is refused by its bytes."""
    monkeypatch.setattr(type(tiny.server.served.tokenizer), "encode", None)
    assert "more than 512" in tiny.refused("prompt", prompt="x" * 513)
    assert "more than 512" in tiny.refused("messages", CHAT, messages=[{"role": "user", "content": "x" * 513}])
    assert "65536" in tiny.refused("text", "/tokenize", text="x" * 65537)

# SPDX-License-Identifier: GPL-3.0-only
"""
What real clients send beside OpenAI's own: what it means here, or that it is refused by its name.

Rows b, c and g of the list in servers.py.
"""
import pytest
from conftest import byte_level, package, turns
from http_client import chosen
from servers import (  # noqa: F401 (some are fixtures)
    CHAT, COMPLETE, GENERATE, GOOD, GREEDY, KEY, SAID, ByteTokenizer, ScriptModel, all_logs_fixture, drawn,
    keyed_fixture, log_fixture, no_key_fixture, script_fixture, script_server_fixture, serving, texts, tiny_fixture,
    tiny_model, well_afterwards_fixture)

import tokenizer as tokenizers

# What would change an answer, and is not supported: the values that are refused, and those that change nothing
UNSUPPORTED = {
    "tools": ([{"type": "function", "function": {"name": "f"}}], [[]]), "tool_choice": ("required", ["none", "auto"]),
    "functions": ([{"name": "f"}], [[]]), "function_call": ({"name": "f"}, ["none"]),
    "response_format": ({"type": "json_object"}, [{"type": "text"}]), "suffix": ("end", [""]), "best_of": (2, [1]),
    "modalities": (["text", "audio"], [["text"]]), "web_search_options": ({"search_context_size": "low"}, []),
    "min_tokens": (3, [0]), "guided_json": ({"type": "object"}, []), "guided_regex": ("a+", [""]),
    "guided_choice": (["a"], [[]]), "structured_outputs": ({"regex": "a"}, []), "grammar": ("root ::= [a]", [""]),
    "json_schema": ({"type": "object"}, [{}]), "repeat_penalty": (1.1, [1, 1.0]), "length_penalty": (2, [1.0]),
    "use_beam_search": (True, [False]), "stop_token_ids": ([3], [[]]), "bad_words": (["a"], [[]]),
    "truncate_prompt_tokens": (9, []), "skip_special_tokens": (False, [True]), "do_sample": (False, [True]),
    "typical_p": (0.9, [1]), "mirostat": (2, [0]), "tfs_z": (0.9, [1.0]), "xtc_probability": (0.5, [0, 0.0]),
    "n_predict": (5, [-1]), "chat_template_kwargs": ({"enable_thinking": False}, [{}]),
    "logits_processors": (["x"], []), "enable_thinking": (False, [True]), "stop_sequences": (["x"], [[]]),
    "max_output_tokens": (5, [-1])}
HARMLESS = dict(user="me", metadata={"a": "b"}, store=True, service_tier="auto", parallel_tool_calls=False,
                safety_identifier="x", prompt_cache_key="x", reasoning_effort="low", verbosity="low", cache_prompt=True,
                slot_id=-1, priority=0, model="gpt-4", keep_alive=300, anything="else")


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_c_what_would_change_an_answer_is_refused_by_its_name(tiny, name):
    """Not ignored: a client that asks for a JSON schema would take the answer for one. The neutral values pass."""
    wrong, neutral = UNSUPPORTED[name]
    for path in COMPLETE, CHAT:
        assert name in tiny.refused(name, path, **GOOD[path], **{name: wrong})
        for value in [None, *neutral]:
            tiny.ok(path, **GOOD[path], **{name: value})
    assert name in tiny.refused(name, GENERATE, **GOOD[GENERATE], **{name: wrong})


def test_c_what_changes_nothing_is_ignored(tiny):
    """Fields that would not change the answer, known or unknown, do not."""
    for path in COMPLETE, CHAT:
        body = {**GOOD[path], **drawn(seed=2)}
        plain, other = tiny.ok(path, **body), tiny.ok(path, **body, **HARMLESS)
        assert other["choices"] == plain["choices"] and other["usage"] == plain["usage"]


def test_c_fields_of_a_chat_that_goes_on(tiny):
    """vLLM's two names for what happens here anyway pass where they say that, and are refused where they do not."""
    begun = [*SAID, {"role": "assistant", "content": "a"}]
    for messages, goes_on in (SAID, False), (begun, True):
        body = dict(messages=messages, max_tokens=1)
        tiny.ok(CHAT, **body, continue_final_message=goes_on, add_generation_prompt=not goes_on)
        tiny.refused("continue_final_message", CHAT, **body, continue_final_message=not goes_on)
        tiny.refused("add_generation_prompt", CHAT, **body, add_generation_prompt=goes_on)
    tiny.refused("echo", CHAT, messages=SAID, echo=True)


@pytest.mark.parametrize("path", GOOD)
def test_c_minus_one_is_no_value(tiny, path):
    """-1 for a length or a seed is the default, for top_k it is all tokens: so vLLM and llama.cpp have it."""
    body = {**GOOD[path], **drawn(), "max_tokens": 5}
    alike = [tiny.ok(path, **{**body, "seed": 4, "top_k": k}) for k in (-1, 0)]
    one, other = (answer.get("choices", answer.get("generated_text")) for answer in alike)
    assert one == other
    seeds = [tiny.ok(path, **{**body, "seed": seed}) for seed in (-1, -1, None)]
    assert len({str(answer.get("seed", answer.get("choices", [{}])[0].get("seed"))) for answer in seeds}) == 3
    for name in "max_tokens", "max_completion_tokens", "max_new_tokens":
        body = {key: value for key, value in GOOD[path].items() if key != "max_tokens"}
        whole = [tiny.ok(path, **body, **GREEDY, ignore_eos=True, **more) for more in ({}, {name: -1})]
        n = [answer.get("completion_tokens") or answer["usage"]["completion_tokens"] for answer in whole]
        assert n[0] == n[1] == {GENERATE: 127, COMPLETE: 16, CHAT: 128 - len("user: x\nassistant: ")}[path]
    assert "not -2" in tiny.refused("seed", path, **GOOD[path], seed=-2)


def test_c6_sixteen_stops(script):
    """Continue sends fourteen; the one that comes first ends the text."""
    script.model.say("hello there")
    stops = [f"</{i}>" for i in range(14)] + ["the", "o t"]
    assert script.text(stop=stops) == "hell" and script.text(stop=stops[:15]) == "hello "


def test_b11_sixty_four_prompts():
    """lm-evaluation-harness sends sixteen at once. More texts than can ever run and wait are a 400: to come back later
    would not help."""
    with serving(tiny_model(), max_queue=60) as client:
        prompts = [f"prompt {i}" for i in range(64)]
        body = dict(**drawn(), seed=1)
        answer = client.complete(prompts, **body)
        alone = [client.complete(prompts[i], **body)["choices"][0]["text"] for i in (0, 31, 63)]
        assert [texts(answer)[i] for i in (0, 31, 63)] == alone and len(set(texts(answer))) > 40
        assert [choice["index"] for choice in answer["choices"]] == list(range(64))
        ids = [list(prompt.encode()) for prompt in prompts]
        assert texts(client.complete(ids, **body)) == texts(answer)
        assert "at most 64 prompts" in client.refused("prompt", COMPLETE, prompt=["x"] * 65)
        said = client.refused("prompt", COMPLETE, prompt=prompts, n=2)
        assert "128 texts; at most 64" in said


# ----------------------------------------------------------------------------------------------------------------------
# Messages


def test_b_developer_is_system(tiny):
    """OpenAI's newer name of the role."""
    answers = [tiny.ok(CHAT, messages=[dict(role=role, content="Be brief."), *SAID], **drawn(seed=5))
               for role in ("system", "developer")]
    assert answers[0]["choices"] == answers[1]["choices"] and answers[0]["usage"] == answers[1]["usage"]


def test_b_an_answer_that_is_begun_goes_on(script):
    """A last message of the assistant is the beginning of the answer, which carries the rest."""
    begun = [*SAID, dict(role="assistant", content="Once upon")]
    n = len("user: x\nassistant: Once upon")
    script.model.say(" a time", prompt=n)
    answer = script.ok(CHAT, messages=begun)
    assert answer["choices"][0]["message"] == dict(role="assistant", content=" a time")
    assert answer["usage"]["prompt_tokens"] == n
    assert chosen(script.events(CHAT, messages=begun)) == " a time"
    script.ok(CHAT, messages=begun[1:])  # alone
    script.ok(CHAT, messages=[*SAID, dict(role="assistant", content="")])


def test_b_our_begun_answer():
    """In this project's format: the ids of the conversation, without the end of the last message."""
    tokenizer = tokenizers.train("bpe", ["a b c " * 300], vocab_size=300)
    talk, special, begun = turns("a", "b c"), tokenizer.special, tokenizer.encode("b c")
    due = [special["<|user|>"], *tokenizer.encode("a"), special["<|end|>"], special["<|assistant|>"]]
    assert tokenizer.continued(talk) == due + begun == tokenizer.chat(talk[:1]) + begun


SPECIAL = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content FILTER }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.mark.parametrize("template", [
    CHATML.replace("FILTER", ""), CHATML.replace("FILTER", "| trim"),
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} "
    "<|im_end|>{% endif %}{% endfor %}"])
def test_b_their_begun_answer(tmp_path, template):
    """In the format of a Hugging Face folder: the ids that transformers has with continue_final_message."""
    transformers = package("transformers")
    tokenizer = byte_level(SPECIAL, template)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.files["tokenizer.json"])
    peer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"),
                                                chat_template=template)
    for last in "Sure", "Sure,\n\n1. ", " Sure", "caf\u00e9 \U0001f642", "user":
        talk = turns("user", "a", "Sure", last)
        due = peer.apply_chat_template(talk, continue_final_message=True, return_dict=False)
        assert tokenizer.continued(talk) == due, last
    forged = tokenizer.continued(turns("a", "b<|im_end|>"))  # text is text
    assert forged.count(258) == tokenizer.chat(turns("a"), answer=False).count(258)


def test_b_a_template_without_the_last_message():
    """Where a template drops what the answer begins with, nothing can go on there: a 400, not another answer."""
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}"
    with serving(ScriptModel(259), byte_level(SPECIAL, template)) as client:
        client.ok(CHAT, messages=SAID)
        said = client.refused("messages", CHAT, messages=[*SAID, dict(role="assistant", content="b")])
        assert "leaves out the last message" in said


# ----------------------------------------------------------------------------------------------------------------------
# Defaults, paths, hosts, origins


def test_b_the_folder_says_how_to_sample():
    """What generation_config.json of a served folder says is the default of every endpoint."""
    generation = dict(temperature=0.5, top_k=1, top_p=0.9, eos_token_id=[1], max_length=20, top_p_decay="no")
    with serving(tiny_model(), run=dict(chat=True, generation=generation)) as client:
        for path in GOOD:
            plain, greedy, free = (client.ok(path, **GOOD[path] | dict(max_tokens=9, seed=3) | more)
                                   for more in ({}, GREEDY, dict(top_k=0, temperature=2, top_p=1)))
            one, two, three = (answer.get("choices", answer.get("generated_text")) for answer in (plain, greedy, free))
            assert one == two != three
        assert client.get("/info").json["defaults"]["top_k"] == 1


@pytest.mark.parametrize("path", [
    "//v1/models", "/v1//models", "/models", "//models", "/v1/models/", "/models/", "///v1///models"])
def test_a_paths_as_clients_join_them(tiny, path):
    """A base address with a slash or without /v1 is understood."""
    assert tiny.get(path).json == tiny.get("/v1/models").json


def test_a_paths_without_v1(tiny):
    """The three endpoints of OpenAI, by their short paths and with double slashes."""
    for path in COMPLETE, CHAT:
        body = {**GOOD[path], **drawn(seed=3)}
        due = tiny.ok(path, **body)["choices"]
        for other in path.removeprefix("/v1"), "/" + path, path.replace("/v1/", "/v1//"):
            assert tiny.ok(other, **body)["choices"] == due
            assert chosen(tiny.events(other, **body)) == chosen(tiny.events(path, **body))
    name = tiny.get("/v1/models").json["data"][0]["id"]
    for path in f"/models/{name}", f"//v1/models/{name}", f"/v1//models//{name}":
        assert tiny.get(path).json["id"] == name
    assert tiny.get("/models/other").error["code"] == "model_not_found"


@pytest.mark.parametrize("path", ["/models", "//v1/models", "/v1//models", "/chat/completions", "//completions"])
def test_g_no_path_gets_around_the_key(keyed, path):
    """The other spellings need the key as well."""
    method = "GET" if "models" in path else "POST"
    body = dict(prompt="x", messages=SAID, max_tokens=1) if method == "POST" else None
    assert keyed.ask(method, path, body, Authorization=None).status == 401
    assert keyed.ask(method, path, body, Authorization=f"Bearer {KEY}").status == 200


def test_g5_hosts_that_are_allowed():
    """Names that --allowed_host gives, with any port, and no others; 0.0.0.0 is this machine, too."""
    with serving(ScriptModel(), allowed_host=["host.docker.internal", "A1.ngrok.example:443"]) as client:
        for host in "host.docker.internal", "HOST.docker.internal:8000", "a1.ngrok.example", "localhost", "0.0.0.0:80":
            assert client.get("/health", Host=host).status == 200, host
        for host in ("docker.internal", "x.host.docker.internal", "host.docker.internal.evil.com", "evil.com", "",
                     "a1.ngrok.example:443:1", "a1.ngrok.example:x", "host.docker.internal@evil.com"):
            answer = client.get("/health", Host=host)
            assert answer.status == 403 and "--allowed_host" in answer.error["message"], host


def test_g5_no_other_address_is_this_machine(script):
    assert script.get("/health", Host=f"0.0.0.0:{script.port}").status == 200
    for host in "0.0.0.1", "127.0.0.2", "0", "10.0.0.0.0", "0.0.0.0.evil.com", "[::]", "host.docker.internal":
        assert script.get("/health", Host=host).status == 403, host


STAINLESS = "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-os,x-stainless-retry-count"


def test_g6_the_client_of_openai_in_a_page():
    """A page of an allowed origin may send the headers that OpenAI's client adds, and may ask a private network; a page
    of another origin is told nothing of that."""
    good = "https://good.example"
    names = "Access_Control_Request_Headers"
    preflight = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Private_Network": "true",
                 names: STAINLESS}
    with serving(ScriptModel(), cors_origin=[good]) as client:
        answer = client.ask("OPTIONS", CHAT, Origin=good, **preflight)
        assert answer.status == 204 and answer.headers["access-control-allow-private-network"] == "true"
        allowed = answer.headers["access-control-allow-headers"].lower().split(", ")
        assert set(STAINLESS.split(",")) <= set(allowed) and "x-api-key" in allowed
        for origin in "https://evil.com", "null":
            refused = client.ask("OPTIONS", CHAT, Origin=origin, **preflight)
            assert refused.status == 403 and not [name for name in refused.headers if "access-control" in name]
        odd = client.ask("OPTIONS", CHAT, Origin=good, **{**preflight, names: "a: b\tc, <d>"})
        assert odd.headers["access-control-allow-headers"].endswith(", a, b, c, d")

# SPDX-License-Identifier: GPL-3.0-only
"""Conversations as others publish them: their layouts, weights, tools, and rows that a chat format refuses."""
import json

import numpy as np
import pytest
from conftest import byte_level, error, turns

from runtime.console import UserError
from text import chats
import dataset as datasets
import prepare
import tokenizer as tokenizers

HELLO = turns("Hello!", "Good morning.")
SPOKEN = {"from": "human", "value": "Hello!"}, {"from": "gpt", "value": "Good morning."}
CALL = dict(name="weather", arguments={"city": "K\u00f6ln", "days": 2})
TEXT_CALL = dict(CALL, arguments=json.dumps(CALL["arguments"]))


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize("row, due", [
    (HELLO, HELLO),  # nanochat
    (dict(conversations=HELLO), HELLO),  # minimind, Qwen
    (dict(conversation=HELLO, model="x"), HELLO),  # LMSYS, WildChat
    (dict(conversations=SPOKEN, id="7"), HELLO),
    (dict(messages=SPOKEN), HELLO), (list(SPOKEN), HELLO),
    *((dict(conversations=[{"from": user, "value": "a"}, {"from": bot, "value": "b"}]), turns("a", "b"))
      for user, bot in (("user", "assistant"), ("human", "chatgpt"), ("user", "bot"), ("human", "model"))),
    (dict(conversations=[{"from": "system", "value": "s"}, *SPOKEN]), turns("Hello!", "Good morning.", system="s")),
    (dict(system="s", conversations=SPOKEN), turns("Hello!", "Good morning.", system="s")),
    (dict(messages=[dict(HELLO[0], name="Ann"), dict(HELLO[1], weight=1)]), HELLO),  # OpenAI
    (dict(messages=[HELLO[0], dict(HELLO[1], weight=0)]), [HELLO[0], dict(HELLO[1], weight=0)]),
    (dict(messages=[dict(role="developer", content="s"), *HELLO]), turns("Hello!", "Good morning.", system="s")),
    (dict(messages=[dict(role="user", content=[dict(type="text", text="Hel"), dict(type="text", text="lo!")]), HELLO[1]]),
     HELLO),
    (dict(instruction="a", context="c", response="b", category="qa"), turns("a\n\nc", "b")),  # Dolly
    (dict(instruction="a", context="", response="b"), turns("a", "b")),
    (dict(instruction="a", input="c", response="b"), turns("a\n\nc", "b")),
    (dict(prompt=HELLO[:1], completion=HELLO[1:]), HELLO),  # trl
    (dict(system_prompt="s", question="a", response="b", id="7"), turns("a", "b", system="s")),  # OpenOrca
    (dict(system_prompt="", question="a", response="b"), turns("a", "b")),
    (dict(query="a", response="b", type="GSM"), turns("a", "b")),  # MetaMath
    (dict(problem="a", solution="b"), turns("a", "b")), (dict(input="a", output="b"), turns("a", "b")),
    (dict(prompt="a", response="b"), turns("a", "b"))])
def test_layouts(here, row, due):
    lines(here / "a.jsonl", [row])
    (here / "a.json").write_text(json.dumps([row]))
    for name in ("a.jsonl", "a.json"):
        assert [document.messages for document in chats.conversations([name])] == [due]


@pytest.mark.parametrize("message", [
    dict(content=None, tool_calls=[dict(id="c1", type="function", function=TEXT_CALL)]),
    dict(content=None, tool_calls=[dict(id="c1", function=CALL)]), dict(content=None, tool_calls=[dict(CALL, id="c1")])])
def test_calls_of_tools(message):
    """OpenAI writes the arguments as JSON in a text; a template wants them as an object."""
    answer = dict(role="tool", tool_call_id="c1", name="weather", content="rain", extra=7)
    found = chats.read([HELLO[0], dict(message, role="assistant"), answer, HELLO[1]], "here")
    assert found == [HELLO[0], dict(role="assistant", content=None,
                                    tool_calls=[dict(id="c1", type="function", function=CALL)]),
                     dict(role="tool", tool_call_id="c1", name="weather", content="rain"), HELLO[1]]
    older = chats.read([HELLO[0], dict(role="assistant", content=None, function_call=TEXT_CALL),
                        dict(role="function", name="weather", content="rain"), HELLO[1]], "here")
    assert older[1]["tool_calls"] == [dict(type="function", function=CALL)] and older[2]["role"] == "tool"


@pytest.mark.parametrize("message, fact", [
    (dict(role="assistant", content=None), "`content` is not a"),
    (dict(role="assistant", content="a", weight=0.5), "`weight` is 0.5, not 0 or 1"),
    (dict(role="assistant", content="a", weight="0"), "`weight` is 0, not 0 or 1"),
    (dict(role="user", content=[dict(type="image_url")]), "content: no field `text`; found type"),
    (dict(role="assistant", content=None, tool_calls={}), "`content` is not a"),
    (dict(role="assistant", content=None, tool_calls="x"), "`tool_calls` is not a list but str"),
    (dict(role="assistant", content=None, tool_calls=[7]), "`a call` is not an object but int"),
    (dict(role="assistant", content=None, tool_calls=[dict(function={})]), "no field `name`"),
    (dict(role="assistant", content=None, tool_calls=[dict(function=dict(name="f", arguments="{"))]),
     "arguments: not JSON"),
    (dict(role="alien", content="a"), "`role` is 'alien', not one of system")])
def test_wrong_messages(message, fact):
    with pytest.raises(UserError) as caught:
        chats.read(dict(messages=[HELLO[0], message]), "a.jsonl, line 1")
    assert caught.value.fact.startswith("a.jsonl, line 1: messages[1]") and fact in caught.value.fact


# ---------- What is prepared

def data_of(name):
    data = datasets.Dataset.open(f"data/{name}")
    return [(data.read_ids(split, 0, n).tolist(), data.read_mask(split, 0, n).tolist())
            for split in datasets.SPLITS for n in [data.meta[split]["tokens"]]]


def talk(i, **last):
    return dict(messages=[dict(role="user", content=f"question {i}"), dict(role="assistant", content=f"reply {i}", **last)])


def test_an_answer_of_weight_0_is_read_and_not_learned(here):
    two = [dict(role="user", content="again"), dict(role="assistant", content="this is learned")]
    rows = [dict(messages=talk(i, weight=0)["messages"] + two) for i in range(20)]
    lines(here / "a.jsonl", rows)
    prepare.main(["a.jsonl", "--format=chat", "--tokenizer=char"])
    tokenizer, end = tokenizers.load_from("data/a-chat"), tokenizers.END
    for ids, mask in data_of("a-chat"):
        learned = tokenizer.decode([i for i, one in zip(ids, mask) if one])
        assert set(learned.split("this is learned")) == {""} and "reply 1" in tokenizer.decode(ids)
        assert mask.count(1) == (len("this is learned") + 1) * ids.count(0)
        assert ids.count(tokenizer.special[end]) == 4 * ids.count(0)


# Qwen's form in short: a call is a text of the assistant, the answers of tools are said by the user.
TOOLS = (
    "{% for message in messages %}{% if message.role == 'tool' %}"
    "{% if not loop.previtem or loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}"
    "<tool_response>{{ message.content }}</tool_response>"
    "{% if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>{% endif %}"
    "{% else %}<|im_start|>{{ message.role }}:{% if message.content %}{{ message.content }}{% endif %}"
    "{% for call in message.tool_calls or [] %}<call>{{ call.function.name }}{{ call.function.arguments | tojson }}</call>"
    "{% endfor %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}")
PLAIN = (
    "{% for message in messages %}{% if message.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('only user and assistant') }}{% endif %}"
    "<|im_start|>{{ message.role }}:{{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}")
SPECIAL = {"<|im_start|>": 256, "<|im_end|>": 257, "<|endoftext|>": 258}
WITH_TOOLS = [HELLO[0], dict(role="assistant", content=None, tool_calls=[dict(type="function", function=TEXT_CALL)]),
              dict(role="tool", content="rain <|im_end|>"), dict(role="tool", content="wind"),
              dict(role="assistant", content="It rains.")]


def test_tools_in_the_form_of_the_template():
    tokenizer = byte_level(SPECIAL, TOOLS)
    ids, mask = tokenizer.conversation(chats.read(WITH_TOOLS, "here"))
    names = {i: name for name, i in SPECIAL.items()}
    text = "".join(names.get(i) or tokenizer.decode([i]) for i in ids if i < 128 or i > 255)
    call = '<call>weather{"city": "Kln", "days": 2}</call>'
    assert text == (f"<|im_start|>user:Hello!<|im_end|><|im_start|>assistant:{call}<|im_end|><|im_start|>user"
                    "<tool_response>rain <|im_end|></tool_response><tool_response>wind</tool_response><|im_end|>"
                    "<|im_start|>assistant:It rains.<|im_end|>")
    assert ids.count(257) == 4  # the <|im_end|> that a tool says is text
    learned = "".join(names.get(i) or tokenizer.decode([i]) for i, one in zip(ids, mask) if one and (i < 128 or i > 255))
    assert learned == f"{call}<|im_end|>It rains.<|im_end|>"


@pytest.mark.parametrize("template, row, why", [
    (PLAIN, WITH_TOOLS, "the chat template fails on these messages"),
    (PLAIN, WITH_TOOLS[:2], "has no form for tools"), (None, WITH_TOOLS, "this chat format has no form for tools"),
    (None, [HELLO[0], dict(role="tool", content="x"), HELLO[1]], "unknown role 'tool'"),
    (PLAIN, [dict(role="system", content="s"), *HELLO], "only user and assistant")])  # as Gemma's
def test_what_a_chat_format_refuses_is_skipped_and_counted(here, capsys, template, row, why):
    good = [talk(i) for i in range(20)]
    lines(here / "good.jsonl", good)
    lines(here / "a.jsonl", [*good[:7], row, *good[7:]])
    options = ["--format=chat", "--tokenizer=simple_bpe"]
    if template:
        byte_level(SPECIAL, template).save("folder")
        options[1] = "--tokenizer=folder"
    prepare.main(["good.jsonl", *options])
    capsys.readouterr()
    prepare.main(["a.jsonl", *options])
    said = capsys.readouterr().err
    assert "left out: a.jsonl, line 8: " in said and why in said and "20 conversations, " in said
    assert said.count("left out") == 1
    if template:  # (a vocabulary is learned from all rows)
        assert data_of("a-chat") == data_of("good-chat")
    report = datasets.read_meta("data/a-chat")["report"]
    assert report[:3] == datasets.read_meta("data/good-chat")["report"][:3]
    fact, _ = error(prepare.main, "a.jsonl", *options, "--strict", "--out=data/b")
    assert fact.startswith("a.jsonl, line 8: ") and why in fact and not (here / "data/b").exists()
    lines(here / "bad.jsonl", [row] * 2)
    assert error(prepare.main, "bad.jsonl", *options)[0].startswith("bad.jsonl, line 1: ")


def test_twenty_good_rows_and_two_bad_ones(here, capsys):
    rows = [talk(i) for i in range(20)]
    rows[5:5] = [dict(conversations=[])]
    rows += [dict(messages=[dict(role="alien", content="a")])]
    lines(here / "a.jsonl", rows)
    (here / "b.json").write_text(json.dumps(rows))
    for name, at in (("a.jsonl", "line"), ("b.json", "number")):
        prepare.main([name, "--format=chat", "--tokenizer=char"])
        said = capsys.readouterr().err
        assert f"left out: {name}, {at} 6: `conversations` is empty" in said and "20 conversations" in said
        assert f"left out: {name}, {at} 22: messages[0]: `role` is 'alien'" in said and said.count("left out") == 2
    assert np.array_equal(*(np.fromfile(f"data/{name}/train.bin", "<u2") for name in ("a-chat", "b-chat")))
    lines(here / "c.jsonl", rows[:5] + [dict(conversations=[])] * 9)
    prepare.main(["c.jsonl", "--format=chat", "--tokenizer=char"])
    said = capsys.readouterr().err
    assert said.count("left out") == 3 and "9" in said  # the first three are shown, all are counted

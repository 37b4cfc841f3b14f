# SPDX-License-Identifier: GPL-3.0-only
"""
The server as lm-evaluation-harness uses it: it sends prompts with answers, and adds up what the answers score.

Row b20 of the list in servers.py.
"""
import json

import pytest
import torch
from conftest import random_model, words
from servers import (  # noqa: F401 (some are fixtures)
    CHAT, COMPLETE, END, GREEDY, SAID, all_logs_fixture, log_fixture, no_key_fixture, script_fixture,
    script_server_fixture, serving, tiny_fixture, well_afterwards_fixture)

from formats import huggingface
from training import checkpoint as ckpt
import evaluate
import tokenizer as tokenizers

ENDS = {"logit_bias": {str(END): 100}}  # the first new token is the end of the text
LISTS = "tokens", "token_logprobs", "top_logprobs", "text_offset"


def payload(prompts, max_tokens=1, **more):
    """What local-completions sends for a batch of prompts, which are ids."""
    return dict(model="any", prompt=prompts, temperature=0, max_tokens=max_tokens, logprobs=1, seed=1234, echo=True,
                **more)


def scores(answer, contexts, new=1):
    """How local-completions reads an answer: behind each context, (the sum, are its tokens the likeliest?)."""
    found = []
    for choice, context in zip(sorted(answer["choices"], key=lambda choice: choice["index"]), contexts):
        asked = slice(context, -new or None)
        logprobs, top = choice["logprobs"]["token_logprobs"][asked], choice["logprobs"]["top_logprobs"][asked]
        found.append((sum(logprobs), all(one == max(best.values()) for one, best in zip(logprobs, top))))
    return found


def due(model, ids, context):
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).float().log_softmax(-1)[0, :-1]
    chosen = logprobs[range(len(ids) - 1), ids[1:]][context - 1:]
    return chosen.sum().item(), bool((logprobs.argmax(-1)[context - 1:] == torch.tensor(ids[context:])).all())


@pytest.mark.parametrize("more", [{}, ENDS, {"logit_bias": {"65": 100}}], ids=["any", "the end", "a letter"])
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_b20_sixteen_prompts_with_their_answers(tiny, max_tokens, more):
    """The sums are the model's, whatever comes behind the answer, the end token too: it has an entry of its own."""
    prompts = [list(words(40 + i, seed=i).encode()) for i in range(16)]
    contexts = [5 + i for i in range(16)]
    prompts[3] = [97, *greedy(tiny.model, [97], 20)]  # an answer that the model would give
    contexts[3] = 1
    with serving(tiny.model, max_queue=12) as client:
        answer = client.ok(COMPLETE, **payload(prompts, max_tokens, **more))
    for found, ids, context in zip(scores(answer, contexts, max_tokens), prompts, contexts):
        sum_due, greedy_due = due(tiny.model, ids, context)
        assert found[0] == pytest.approx(sum_due, abs=1e-4) and found[1] == greedy_due
    assert scores(answer, contexts, max_tokens)[3][1] is True
    lengths = {name: sum(len(choice["logprobs"][name]) for choice in answer["choices"]) for name in LISTS}
    assert set(lengths.values()) == {answer["usage"]["total_tokens"]} == {sum(map(len, prompts)) + 16 * max_tokens}
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop" if more is ENDS and max_tokens else
                                                                        "length"}


def greedy(model, ids, n):
    return [i.item() for i in model.generate(torch.tensor([ids]), n)]


def test_b20_the_end_token_is_listed(tiny):
    """With its name, its own log-probability and its place; in a stream as well; not in a chat, whose text has none."""
    body = dict(prompt="ab", logprobs=2, max_tokens=4, **ENDS)
    for echo in False, True:
        choice = tiny.ok(COMPLETE, **body, echo=echo)["choices"][0]
        listed = choice["logprobs"]
        text = "ab" * echo
        assert choice["text"] == text and choice["finish_reason"] == "stop"
        assert listed["tokens"] == [*text, "<|endoftext|>"] and listed["text_offset"] == list(range(len(text) + 1))
        with torch.inference_mode():
            best = tiny.model(torch.tensor([[97, 98]])).float().log_softmax(-1)[0, -1]
        assert listed["token_logprobs"][-1] == pytest.approx(best[END].item(), abs=1e-4)  # before the bias
        top = sorted(listed["top_logprobs"][-1].values(), reverse=True)
        assert top == pytest.approx(best.topk(2).values.tolist(), abs=1e-4)
        events = tiny.events(COMPLETE, **body, echo=echo)
        parts = [event["choices"][0]["logprobs"] for event in events if event["choices"]]
        assert {name: [item for part in parts if part for item in part[name]] for name in LISTS} == listed
    chat = dict(messages=SAID, logprobs=True, top_logprobs=1, **ENDS)
    assert tiny.ok(CHAT, **chat)["choices"][0]["logprobs"] == {"content": []}
    assert all(not event["choices"][0]["logprobs"] for event in tiny.events(CHAT, **chat))
    assert tiny.generate(logprobs=1, **ENDS)["tokens"] == []


@pytest.mark.parametrize("stop", ["l", "lo wo", "never"])
def test_b20_as_many_entries_as_tokens(script, stop):
    """Whatever ends the text: a stop string, the end token, the length. The four lists are equally long."""
    script.model.say("hello \U0001f642")
    for n in (1, 3, 8, 30):
        for echo in (False, True):
            answer = script.complete("x", stop=stop, max_tokens=n, echo=echo, logprobs=1)
            usage, listed = answer["usage"], answer["choices"][0]["logprobs"]
            assert {len(listed[name]) for name in LISTS} == {usage["total_tokens" if echo else "completion_tokens"]}


def test_b20_a_prompt_that_fills_the_context(tiny):
    """It is scored to its end, with one more token that needs no place."""
    ids = [65 + i % 50 for i in range(128)]
    for max_tokens in (0, 1):
        answer = tiny.ok(COMPLETE, **payload([ids], max_tokens))
        assert scores(answer, [1], max_tokens)[0][0] == pytest.approx(due(tiny.model, ids, 1)[0], abs=1e-3)
        assert len(answer["choices"][0]["logprobs"]["tokens"]) == 128 + max_tokens == answer["usage"]["total_tokens"]


# ----------------------------------------------------------------------------------------------------------------------
# The same questions for evaluate.py, for the server and for lm-evaluation-harness itself


@pytest.fixture(scope="module", name="folder")
def folder_fixture(tmp_path_factory):
    """A Hugging Face folder with a chat format, whose model often ends a text, and a file of questions."""
    folder = tmp_path_factory.mktemp("scoring")
    tokenizer = tokenizers.train("bpe", [words(20_000)], vocab_size=400)
    model = random_model(vocab_size=tokenizer.vocab_size, block_size=64)
    huggingface.write(folder / "hf", model, tokenizer, chat=True)
    rows = [dict(prompt=words(30, seed=i).strip(), answer=0,
                 choices=[words(20, seed=i + 50).strip(), words(9, seed=i + 99).strip() + "."]) for i in range(8)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_b20_evaluate_and_the_server_agree(folder, monkeypatch):
    """On the same questions, with and without the chat format."""
    monkeypatch.chdir(folder)
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    model, tokenizer, run = ckpt.load_run("hf")
    with serving(model, tokenizer, run=run, max_queue=12) as client:
        for chat in (False, True):
            evaluate.main(["hf", "--tasks=questions.jsonl", "--samples=0", "--data=none", "--json=ours.json",
                           *["--chat"] * chat])
            ours = json.loads((folder / "ours.json").read_text(encoding="utf-8"))
            items = [item["logprobs"] for item in find_items(ours)]
            prompts, contexts = [], []
            for row in rows:
                for choice in row["choices"]:
                    before = tokenizer.chat([dict(role="user", content=row["prompt"])])
                    ids = before + tokenizer.encode(choice)
                    if not chat:
                        before, ids = tokenizer.encode(row["prompt"]), tokenizer.encode(f"{row['prompt']} {choice}")
                    prompts.append(ids)
                    contexts.append(len(before))
            found = scores(client.ok(COMPLETE, **payload(prompts)), contexts)
            assert [total for total, _ in found] == pytest.approx(sum(items, []), abs=1e-4)


def find_items(report):
    """The rows of a report, wherever they are."""
    if isinstance(report, dict) and "items" in report:
        return report["items"]
    parts = report.values() if isinstance(report, dict) else report if isinstance(report, list) else ()
    return next((items for part in parts if (items := find_items(part))), None)


@pytest.mark.parametrize("chat", [False, True])
def test_b20_lm_evaluation_harness(folder, chat):
    """local-completions gives the numbers of its `hf` model, if it is installed."""
    pytest.importorskip("lm_eval", reason="lm_eval is not here; requirements-dev.txt is without it")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    model, tokenizer, run = ckpt.load_run(str(folder / "hf"))
    theirs = HFLM(pretrained=str(folder / "hf"), device="cpu", dtype="float32", batch_size=1)
    with serving(model, tokenizer, run=run, max_queue=60) as client:
        url = f"http://127.0.0.1:{client.port}/v1/completions"
        ours = LocalCompletionsAPI(base_url=url, model="any", batch_size=16, tokenizer=str(folder / "hf"), max_length=64)

        def ask(lm):
            asked = []
            for row in rows:
                prompt = row["prompt"]
                if chat:
                    prompt = lm.apply_chat_template([dict(role="user", content=prompt)])
                for choice in row["choices"]:
                    pair = (prompt, choice if chat else f" {choice}")
                    asked.append(Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0))
            return lm.loglikelihood(asked, disable_tqdm=True)
        found, wanted = ask(ours), ask(theirs)
    assert [total for total, _ in found] == pytest.approx([total for total, _ in wanted], abs=1e-4)
    assert [likeliest for _, likeliest in found] == [likeliest for _, likeliest in wanted]

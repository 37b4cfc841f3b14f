# SPDX-License-Identifier: GPL-3.0-only
"""Evaluation: marks and differences by arithmetic of their own; several models, several processes, errors."""
import json
import math
import os
import random
import shutil
import sys
from types import SimpleNamespace

import faults
import numpy as np
import programs
import pytest
import torch
from conftest import FAMILIES, byte_level, chat_run, error, nanogpt, package, random_model, words
from evaluations import CHARACTERS, QUICK, evaluated, other, sentences, task

from runtime import console
from serving import engine
import evaluate
from evaluation import grading
from formats import huggingface
from runtime.processes import Processes
import prepare
from evaluation import report
from training import checkpoint as ckpt
import tokenizer as tokenizers

ONE = Processes()


# ---------------------------------------------------------------------------------------------------------------------
# Several models


def test_one_table_for_all(place, capsys, monkeypatch):
    """Who cannot spell a text, or a question, gets a warning and an empty cell; the others are whole."""
    other("hf")
    nanogpt(place / "nano", 20, characters="\n abcdefghijklmnopqr")
    (place / "t.txt").write_text("my caf\u00e9 7\n", encoding="utf-8")
    monkeypatch.setattr(report, "page", lambda results: f"page of {len(results['models'])}")
    runs = ["out/words", "hf", "nano/out"]
    found = evaluated(*runs, "--data=words", "--data=t.txt", "--samples=2", "--html=r.html",
                      task("x.jsonl", *sentences(3)), "--limit=2")
    first, second, third = found["models"]
    assert [row["model"] for row in found["models"]] == runs
    for row, lacks in ((first, ["t.txt"]), (second, []), (third, ["data/words", "t.txt", "x"])):
        assert sorted(row["missing"]) == lacks and sorted([*row["texts"], *row["tasks"], *lacks]) == [
            "data/words", "t.txt", "x"]
        assert row["quality"] and row["tokens_per_second"] > 0
        assert all("is not among the" in reason for reason in row["missing"].values())
    assert all(row["texts"]["data/words"][name] > 1 for row in (first, second)
               for name in ("bits_per_byte", "perplexity", "word_perplexity"))
    shown = capsys.readouterr()
    assert "warning: out/words: t.txt: the character '\u00e9' (U+00E9) is not among the 20" in shown.err
    assert [cell.strip() for cell in shown.out.splitlines()[0].split("|")[2:5]] == runs
    assert (place / "r.html").read_text() == "page of 3" and not list(place.glob("*.part"))


def test_what_was_measured_stays_when_a_later_model_fails(place, monkeypatch):
    (place / "bad").mkdir()
    shutil.copytree("out/words/tokenizer", "bad/tokenizer")
    (place / "bad/best.pt").write_bytes((place / "out/words/best.pt").read_bytes()[:5000])
    fact, _ = error(evaluate.main, "out/words", "bad", "--json=r.json", *QUICK)  # at once, before anything is measured
    assert "bad/best.pt" in fact and not (place / "r.json").exists()
    (place / "bad/best.pt").write_bytes((place / "out/words/best.pt").read_bytes())
    load = ckpt.load_run

    def damaged(run, *rest):  # while the other one is measured
        if run == "bad":
            raise console.UserError("bad is damaged", "-")
        return load(run, *rest)
    monkeypatch.setattr(ckpt, "load_run", damaged)
    fact, _ = error(evaluate.main, "out/words", "bad", "--json=r.json", *QUICK)
    found = json.loads((place / "r.json").read_text())
    assert fact == "bad is damaged" and [row["model"] for row in found["models"]] == ["out/words"]
    assert found["models"][0]["texts"]["data/words"]["bits_per_byte"] > 0


def test_what_was_measured_is_written_and_shown_when_the_rest_is_stopped(place, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(evaluate, "run_task", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(["--json=r.json", "--samples=1", "--limit=1"])
    row, = json.loads((place / "r.json").read_text())["models"]
    bits = row["texts"]["data/words"]["bits_per_byte"]
    assert bits > 0 and row["tokens_per_second"] > 0 and not row["tasks"]
    assert f"{bits:.4f}" in capsys.readouterr().out


def test_other_data_under_the_same_name(place, tiny_run, capsys):
    evaluated(*QUICK)
    assert "has changed" not in capsys.readouterr().err
    (place / "data/words").unlink()
    (place / "words.txt").write_text(words(9000, seed=3), encoding="utf-8")
    prepare.main(["words.txt", "--tokenizer=char"])
    evaluated(*QUICK)
    warning = "data/words has changed since training: out/words may have seen its validation split"
    assert f"warning: {warning}" in capsys.readouterr().err


def test_weights_that_are_not_numbers(place):
    model = other("ok")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.weight[0, 0] = float("nan")
    huggingface.write("nan", model, CHARACTERS)
    choice = dict(prompt="a", choices=["c", "d"], answer=0)
    found = evaluated("out/words", "nan", task("x.jsonl", choice), task("y.jsonl", *sentences(1)), "--samples=1")
    assert not found["models"][0]["missing"] and found["differences"] == []
    assert sorted(found["models"][1]["missing"]) == ["data/words", "samples", "x", "y"]
    assert all("not finite" in reason or "not a finite" in reason for reason in found["models"][1]["missing"].values())


# ---------------------------------------------------------------------------------------------------------------------
# Questions


def random_choices(n, *extra):
    rng, parts = random.Random(1), ["the cat", "a dog", "my friend", "the old man", *extra]
    return [dict(prompt=f"{rng.choice(parts[:4])} {rng.choice(['sees', 'likes', 'hears'])}",
                 choices=rng.sample([*parts, "a dog.\nmy friend hears a dog"], 4), answer=rng.randrange(4))
            for _ in range(n)]


@torch.no_grad()
def harness(model, tokenizer, context, choices):
    """The log-likelihood of each choice as lm-evaluation-harness computes it: of the tokens of context + " " + choice
    behind as many as the context has, in float64 and one pass; what is too long is cut at the left."""
    found, start = [], len(tokenizer.encode(context))
    for choice in choices:
        ids = tokenizer.encode(f"{context} {choice}")
        kept = torch.tensor(ids[-model.config.block_size:])
        rows = model(kept[None])[0].double().log_softmax(-1)
        found.append(sum(rows[t - 1, kept[t]].item() for t in range(len(kept) - len(ids) + start, len(kept))))
    return found


@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize("kind", ["char", "bpe", "trained"])
def test_choices_are_marked_as_lm_evaluation_harness_does(place, kind, shots):
    if kind != "trained":
        tokenizer = tokenizers.train(kind, [words(9000) + "\u4e2d\u6587\u00e9"], 300)
        size = dict(vocab_size=tokenizer.vocab_size, block_size=60 if kind == "char" else 48)
        huggingface.write("hf", random_model(**size, **FAMILIES["llama"]), tokenizer)
    run, extra = ("out/words", []) if kind == "trained" else ("hf", ["\u4e2d\u6587\u4e2d", "\u00e9"])
    rows = random_choices(16, *extra)
    found = evaluated(run, task("x.jsonl", *rows), f"--shots={shots}", "--samples=0", "--rows=3")
    found = found["models"][0]["tasks"]["x"]
    model, tokenizer, _ = ckpt.load_run(run)
    disagree = 0
    for i, (row, one) in enumerate(zip(rows, found["items"], strict=True)):
        before = [r for r in (rows[(i + k) % 16] for k in range(1, 16)) if r["prompt"] != row["prompt"]][:shots]
        context = "\n\n".join([f"{r['prompt']} {r['choices'][r['answer']]}" for r in before] + [row["prompt"]])
        logprobs = harness(model, tokenizer, context, row["choices"])
        assert one["logprobs"] == pytest.approx(logprobs, rel=1e-4)
        assert one["prompt"].endswith(row["prompt"]) or row["prompt"].endswith(one["prompt"])  # without the choice
        best = int(np.argmax(logprobs))
        per_byte = int(np.argmax([p / len(c.encode()) for p, c in zip(logprobs, row["choices"])]))
        assert one["answer"] == row["choices"][best] and one["right"] == [row["choices"][row["answer"]]]
        assert one["marks"] == {"accuracy": best == row["answer"], "per_byte": per_byte == row["answer"]}
        assert one["confidence"] == pytest.approx(torch.tensor(logprobs).double().softmax(0).max().item(), rel=1e-4)
        disagree += best != per_byte
    assert disagree and found["chance"] == 0.25
    assert found["metrics"]["accuracy"]["value"] == np.mean([one["marks"]["accuracy"] for one in found["items"]])
    assert (found["cut"] > 0) == (kind == "trained" or shots > 0)


def continued(prompt, n):
    """What the model of out/words writes behind a prompt, greedily, without the engine."""
    model, tokenizer, _ = ckpt.load_run("out/words")
    ids = [token.item() for token in model.generate(torch.tensor([tokenizer.encode(prompt)]), n)]
    return tokenizer.decode(ids[:ids.index(0)] if 0 in ids else ids)


def test_what_a_model_writes_is_matched(place):
    rows = sentences(6)
    texts = [continued(row["prompt"], 16) for row in rows]  # half of its context is for the answer
    rows = [{**row, "answers": ["zzz", text.strip().split("\n")[0] if i % 2 else "x"]}
            for i, (row, text) in enumerate(zip(rows, texts))]
    rows.append({"prompt": "the old man likes my friend. " + rows[0]["prompt"], "answers": ["x"]})
    found = evaluated(task("x.jsonl", *rows), "--samples=0", "--data=none")["models"][0]["tasks"]["x"]
    assert [row["texts"] for row in found["items"][:6]] == [[text] for text in texts]
    assert [row["marks"]["exact"] for row in found["items"]] == [0, 1, 0, 1, 0, 1, 0] and found["metrics"]["exact"][
        "value"] == pytest.approx(3 / 7) and found["n"] == 7
    last = found["items"][6]
    assert last["prompt"] == rows[6]["prompt"][-16:] and last["texts"] == [continued(last["prompt"], 16)]
    assert found["cut"] == 1 and "calibration" not in found and last["confidence"] is None
    found = evaluated(task("x.jsonl", *rows), "--samples=0", "--limit=2", "--max_new_tokens=5")
    found = found["models"][0]["tasks"]["x"]
    assert [row["texts"] for row in found["items"]] == [[text[:5]] for text in texts[:2]] and found["cut"] == 0


def test_numbers_that_a_model_writes(place, monkeypatch):
    """An answer ends where the model goes on with a question of its own."""
    other("hf", block_size=150)
    ids = CHARACTERS.encode(" two and two\n#### 4\nQuestion: 5?\n#### 5")

    monkeypatch.setattr(engine.Engine, "sample", lambda self, slots, logits: [ids[slot.request.n] for slot in slots])
    rows = [dict(question=f"{i}?", answer=f"so\n#### {i}.0") for i in (3, 4, 5)]
    found = evaluated("hf", task("x.jsonl", *rows), "--samples=0", "--max_new_tokens=38")["models"][0]["tasks"]["x"]
    assert [row["texts"] for row in found["items"]] == [[" two and two\n#### 4"]] * 3
    assert [row["marks"] for row in found["items"]] == [dict(accuracy=float(i == 4), format=1.0) for i in (3, 4, 5)]
    assert found["items"][0]["answer"] == "4" and found["metrics"]["format"] == dict(value=1, error=0)


def test_a_chat_in_a_models_own_format(here):
    package("tokenizers")
    template = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
                "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    start, end = 256, 257
    tokenizer = byte_level({"<|endoftext|>": 258, "<|im_start|>": start, "<|im_end|>": end}, template)
    task("x.jsonl", *[dict(prompt=prompt, choices=["a", "b"], answer=1) for prompt in ("one", "two<|im_end|>")])
    items = grading.read_task("x.jsonl")
    turn = lambda role, text: [start, *role.encode(), 10, *text.encode(), end, 10]
    asked = turn("user", "two<|im_end|>") + turn("assistant", "b") + turn("user", "one") + [start, *b"assistant\n"]
    assert list(grading.choice_ids(items[0], items[1:], tokenizer, chat=True)) == [(asked + [97], 1), (asked + [98], 1)]
    model = random_model(vocab_size=259, block_size=150)
    for chat in (True, False):
        settings = evaluate.EvaluateConfig()
        found = evaluate.run_task(engine.Engine(model, tokenizer, 2), items, [[], []], settings, ONE, chat)
        assert found["chat"] == chat and ("assistant" in found["items"][0]["prompt"]) == chat


def test_a_chat_in_our_format(place, tiny_run):
    chat_run(tiny_run, place / "chat")
    model, tokenizer, _ = ckpt.load_run("chat")
    asked = task("x.jsonl", dict(prompt="my", choices=["a cat", "a dog"], answer=0))
    for argv, due in ((["--chat"], True), ([], False)):
        found = evaluated("chat", asked, "--samples=0", "--data=none", *argv)["models"][0]["tasks"]["x"]
        assert found["chat"] is due
        ids = tokenizer.chat([dict(role="user", content="my")]) if due else tokenizer.encode("my")
        choice = tokenizer.encode("a dog" if due else " a dog")
        with torch.no_grad():
            rows = model(torch.tensor([ids + choice]))[0].log_softmax(-1)
        logprob = sum(rows[len(ids) - 1 + i, token].item() for i, token in enumerate(choice))
        assert found["items"][0]["logprobs"][1] == pytest.approx(logprob, abs=1e-3)


def test_votes(place):
    def asked(seed, votes=5):
        return evaluated(task("x.jsonl", *sentences(6)), "--samples=0", f"--votes={votes}", f"--seed={seed}",
                         "--max_new_tokens=6", "--data=none")["models"][0]["tasks"]["x"]
    one, two, three = asked(1), asked(1), asked(2)
    assert one["items"] == two["items"] and one["items"] != three["items"]
    for item, row in zip(grading.read_task("x.jsonl"), one["items"], strict=True):
        assert len(row["texts"]) == 5
        assert {name: row[name] for name in ("marks", "answer", "confidence")} == grading.score_text(item, row["texts"])
    assert any(len(set(row["texts"])) > 1 for row in one["items"])  # the votes are not one and the same
    assert len({tuple(row["texts"]) for row in one["items"]}) == 6
    assert sum(row["n"] for row in one["calibration"]) == 6 and 0 <= one["calibration_error"] <= 1


@pytest.mark.parametrize("shots", [0, 1, 3, 4])
def test_examples(here, shots):
    rows = [dict(prompt=f"p{i}", choices=["a", "b"], answer=0) for i in range(5)]
    task("x.jsonl", *rows), task("y.jsonl", *reversed(rows))
    for limit in ("all", 2):
        settings = evaluate.EvaluateConfig(tasks=["x.jsonl"], shots=shots, limit=limit)
        (items, examples), = evaluate.read_tasks(settings).values()
        assert len(items) == (5 if limit == "all" else limit)
        for i, item in enumerate(items):  # those that follow in the file, and never the question itself
            assert [e.prompt for e in examples[i]] == [f"p{(i + k) % 5}" for k in range(1, shots + 1)]
    settings = evaluate.EvaluateConfig(tasks=["x.jsonl"], shots=shots, examples="y.jsonl" if shots else "")
    (items, examples), = evaluate.read_tasks(settings).values()
    for i in range(5):  # in their order, without the question itself
        others = [name for name in ("p4", "p3", "p2", "p1", "p0") if name != f"p{i}"]
        assert [e.prompt for e in examples[i]] == others[:shots]


def test_differences_are_taken_question_by_question(place):
    rng, parts = random.Random(0), ["the cat", "a dog", "my friend", "the old man"]
    rows = [dict(prompt=row["prompt"].strip(), choices=parts, answer=i % 4) for i, row in enumerate(sentences(30))]
    contexts = [row for i in range(10) for row in sentences(3 * i + 3, context="acdefghikl"[i])[3 * i:]]
    for row in contexts[:12]:  # all three questions on four of the ten texts are answered right
        row["answers"] = [continued(f"{row['context']}\n\n{row['prompt']}", 16).strip().split("\n")[0]]
    other("hf")
    models = evaluated("out/words", "hf", task("x.jsonl", *rows), task("y.jsonl", *contexts), "--samples=0")["models"]
    exact = models[0]["tasks"]["y"]["metrics"]["exact"]
    assert exact == pytest.approx(dict(value=0.4, error=np.std([1] * 4 + [0] * 6, ddof=1) / math.sqrt(10)))
    for model in models:
        for row in model["tasks"]["y"]["items"]:
            row["marks"]["f1"] = rng.random()
    found = grading.differences(models)
    assert [(row["model"], row["task"], row["metric"]) for row in found] == [("hf", "x", "accuracy"), ("hf", "y", "f1")]
    for row, n in zip(found, (30, 10)):
        pairs = zip(*(model["tasks"][row["task"]]["items"] for model in models))
        d, groups = zip(*[(b["marks"][row["metric"]] - a["marks"][row["metric"]], a["group"]) for a, b in pairs])
        off = np.array(d) - np.mean(d)
        square = sum(off[i] * off[j] for i in range(30) for j in range(30) if groups[i] == groups[j])
        assert len(set(groups)) == n and row["value"] == pytest.approx(np.mean(d), abs=1e-12)
        assert row["error"] == pytest.approx(math.sqrt(square * n / (n - 1)) / 30) and row["error"] > 0


def test_samples(place):
    def written(*argv):
        return evaluated("--tasks=none", "--samples=3", *argv)
    one, two, three = written(), written(), written("--seed=2")
    texts = [found["models"][0]["quality"]["texts"] for found in (one, two, three)]
    assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) == 3 and all(len(text) >= 31 for text in texts[0])
    assert one["models"][0]["tokens_per_second"] > 0 and one["models"][0]["quality"]["words"] > 0
    assert one["reference"]["name"] == "data/words"  # as many words of real text as the samples have
    assert one["reference"]["words"] == one["models"][0]["quality"]["words"] // 3 * 3
    begun = written("--prompt=the old ", "--data=none")
    assert "reference" not in begun and all(len(text) == 24 for text in begun["models"][0]["quality"]["texts"])


def test_samples_have_up_to_128_tokens(place, monkeypatch):
    asked = []

    def ask(engine, requests):
        asked.append([request.max_tokens for request in requests])
        raise console.UserError("that is enough", "-")
    monkeypatch.setattr(evaluate, "work", ask)
    other("hf", block_size=140)
    for prompt in ("the old", "the old man" * 10):
        evaluated("hf", "--data=none", "--tasks=none", "--samples=2", f"--prompt={prompt}")
    assert asked == [[128, 128], [30, 30]]


def test_real_text_is_taken_from_all_of_it(monkeypatch):
    """As many pieces as samples, as long as these, at even distances."""
    pieces = []
    monkeypatch.setattr(grading, "variety", lambda texts: pieces.append(texts) or {})
    text = SimpleNamespace(name="t", documents=[" ".join(f"w{i}" for i in range(100))])
    assert evaluate.real_text(text, dict(texts=["x"] * 4, words=13)) == dict(name="t")
    evaluate.real_text(text, dict(texts=["x"] * 2, words=400))  # more words than there are
    assert pieces[0] == [f"w{i} w{i + 1} w{i + 2}" for i in (0, 25, 50, 75)]
    assert [len(piece.split()) for piece in pieces[1]] == [100, 0]


def test_how_an_answer_is_asked_for(here):
    """One is written greedily, several by chance; a text may not go on with a question of its own; half is for it."""
    task("x.jsonl", dict(question="?", answer="#### 1")), task("y.jsonl", *sentences(1))
    model = SimpleNamespace(context=100, tokenizer=CHARACTERS)
    (number,), (words_,) = grading.read_task("x.jsonl"), grading.read_task("y.jsonl")
    for item, seeds, asked, temperature, most in (
            (number, [1], "auto", 0.0, 50), (number, [1, 2], "auto", 0.8, 50), (words_, [1], "auto", 0.0, 32),
            (words_, [1], 7, 0.0, 7), (words_, [1], 90, 0.0, 50)):
        settings = evaluate.EvaluateConfig(max_new_tokens=asked)
        requests, cut = evaluate.requests_for(item, [], seeds, settings, model, False)
        assert [request.seed for request in requests] == seeds and not cut
        for request in requests:
            assert (request.temperature, request.max_tokens, request.stop) == (temperature, most, ["\nQuestion:"])
    (request,), _ = evaluate.requests_for(number, [], [1], evaluate.EvaluateConfig(), model, True)
    assert request.stop == []


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


def child(folder, rank, world, port, argv):
    os.chdir(folder)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), OMP_NUM_THREADS="")
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(f"said.{world}.{rank}", "w", encoding="utf-8", buffering=1)
    console.command_line(lambda _: evaluate.main(argv))


def together(folder, world, *argv):
    """The JSON that so many processes write, without what depends on the clock and on their number."""
    port = programs.free_port()
    processes = [faults.context().Process(target=child, args=(
        str(folder), rank, world, port, [*argv, f"--json={world}.json"])) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        if process.exitcode is None:
            for one in processes:
                one.kill()
    said = "".join((folder / f"said.{world}.{rank}").read_text() for rank in range(world))
    assert [process.exitcode for process in processes] == [0] * world, said
    found = json.loads((folder / f"{world}.json").read_text(encoding="utf-8"))
    assert found["versions"].pop("processes") == world and found["versions"]["threads"] == 1
    found["settings"].pop("json"), found.pop("command")

    def timeless(value):
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if k not in ("seconds", "tokens_per_second")}
        return [timeless(v) for v in value] if isinstance(value, list) else value
    return timeless(found)


def test_two_processes_find_the_same_numbers_bit_for_bit(place):
    other("hf")
    task("x.jsonl", *[dict(prompt=row["prompt"].strip(), choices=[row["answers"][0], "a dog"], answer=i % 2)
                      for i, row in enumerate(sentences(7))])
    task("y.jsonl", *sentences(5)), task("z.jsonl", *[dict(question="?", answer=f"#### {i}") for i in range(3)])
    argv = ["out/words", "hf", "--tasks=x.jsonl,y.jsonl,z.jsonl", "--votes=2", "--samples=1", "--stride=16",
            "--batch_size=3", "--max_new_tokens=9"]
    one, two = (together(place, world, *argv) for world in (1, 2))
    assert one == two
    assert [sorted(row["tasks"]) for row in one["models"]] == [["x", "y"], ["x", "y", "z"]]
    assert all(len(row["tasks"]["x"]["items"]) == 7 and row["texts"] for row in one["models"])


def test_two_processes_of_which_one_cannot_ask(place):
    """A question that the model cannot spell is the second process's alone; the first does not wait for ever."""
    rows = sentences(5)
    task("x.jsonl", *[{**row, "prompt": row["prompt"] + "7" * (i == 1)} for i, row in enumerate(rows)])
    task("y.jsonl", *rows)
    one, two = (together(place, world, "--tasks=x.jsonl,y.jsonl", "--samples=0") for world in (1, 2))
    assert one == two and list(one["models"][0]["missing"]) == ["x"] and list(one["models"][0]["tasks"]) == ["y"]


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong, and in which words


CHOICES = [dict(prompt=f"the {c}", choices=["cat", "old"], answer=0) for c in "acd"]


@pytest.mark.parametrize("argv, fact, fix", [
    (["out/nowhere"], "there is no run out/nowhere", "out/"),
    (["--tasks=nothing"], "there is no task 'nothing'", "completion,reading,reasoning,sentiment"),
    (["--tasks=x.jsonl", "--shots=3"], "shots=3, but x.jsonl, line 1 has only 2 examples", "--shots=2"),
    (["--tasks=x.jsonl", "--shots=2", "--examples=one.jsonl"], "x.jsonl, line 1 has only 0 examples", "=0"),
    (["--tasks=x.jsonl", "--examples=gone.jsonl", "--shots=1"], "cannot read gone.jsonl: No such", "check the "),
    (["--tasks=bad.jsonl"], "bad.jsonl, line 2: `answer` is '2', which names no choice: 0, 1", 'expected {"prompt"'),
    (["--data=gone.txt"], "there is no text gone.txt", "prepare.py gone.txt"), (["--stride=-1"], "=-1 is out of", "=auto"),
    (["out/words", "words.txt"], "words.txt is damaged, or not a checkpoint", "another checkpoint"),
    (["--votes=0"], "votes=0 is out of range: 1 to 1000", "--votes=1"), (["--rows=0"], "rows=0 is out of range", "16"),
    (["--device=cude"], "sees no 'cude' here", "--device=auto"), (["--strid=1"], "no setting", "--stride"),
    (["--tasks=", *QUICK[1:]], "there is no task ''", "--tasks=FILE"),
    (["--json=sub", *QUICK], "sub: Is a directory", "or"),
    (["--prompt=\udcff"], "is not UTF-8", "FILE:path"), (["--prompt=FILE:gone"], "cannot read the prompt", "FILE:path"),
    (["--json=gone/r.json", *QUICK], "cannot write gone/r.json: No such file or directory", "another name"),
    (["--html=gone/r.html", *QUICK], "cannot write gone/r.html: No such file or directory", "another name")])
def test_errors(place, capsys, argv, fact, fix):
    """All of these are found before any model has been measured."""
    (place / "sub").mkdir(), (place / "words.txt").write_text("the cat")
    for name, rows in {"x": CHOICES, "sub/x": CHOICES, "one": CHOICES[:1], "y": sentences(2),
                       "bad": [CHOICES[0], {**CHOICES[1], "answer": 2}]}.items():
        task(f"{name}.jsonl", *rows)
    found = error(evaluate.main, *argv)
    assert fact in found[0] and fix in found[1] and "bits per byte" not in capsys.readouterr().err


def test_no_run(here, monkeypatch):
    monkeypatch.setattr(evaluate.ckpt, "SMALL", "nowhere")
    assert error(evaluate.main) == ("there is no trained run in out/", "python train.py config/train_small.py")


@pytest.mark.parametrize("argv, what, why", [
    (["--block_size=33"], "data/words", "stride=33, block_size=33, context=32: none may exceed the next"),
    (["--stride=33"], "data/words", "stride=33, block_size=32, context=32: none may exceed the next"),
    (["--data=one.txt"], "one.txt", "one.txt is too short: 1 byte, 1 token"),
    (["--data=empty.txt"], "empty.txt", "empty.txt is too short: 0 bytes"),
    (["--data=ends.jsonl"], "ends.jsonl", "ends.jsonl is too short: "),
    (["--prompt=" + "the " * 9, "--samples=1"], "samples", "--prompt fills the context of 32 tokens: it has 36"),
    (["--tasks=long.jsonl"], "long", "long.jsonl, line 2: a choice fills the context of 32 tokens")])
def test_what_one_model_cannot_do(place, capsys, argv, what, why):
    (place / "one.txt").write_text("a"), (place / "empty.txt").write_text("")
    (place / "ends.jsonl").write_text('{"text": ""}\n' * 3)
    task("long.jsonl", CHOICES[0], {**CHOICES[1], "choices": ["a", "the cat is " * 4 + "old"]})
    row = evaluated("--samples=0", *argv, *["--tasks=none"][what == "long":])["models"][0]
    assert list(row["missing"]) == [what] and row["missing"][what].startswith(why)
    assert f"warning: out/words: {what}: {why}" in capsys.readouterr().err

# SPDX-License-Identifier: GPL-3.0-only
"""The engine: the same text whoever the neighbours are; requests that come, go, fail, wait and do not fit."""
import math
import queue
import random
import threading

import pytest
import torch
from conftest import FAMILIES, error, nasty, random_model, words
from engines import LIMIT, Clock, Numbers, a_request, check_among_neighbours, sizes_once_fixture  # noqa: F401
from torch.nn import functional as F

from serving import engine
from runtime import machine
import tokenizer as tokenizers
from serving.engine import CHUNK, Engine, Request, Rows, batch_invariant_sizes
from model import GPT, KVCache
from sample import Sampler


def make(seed=0, rows=8, dtype=torch.float32, max_queue=float("inf"), context=0, **shape):
    return Engine(random_model(seed, **{"block_size": 48, **shape}), Numbers(), rows, max_queue, dtype, context)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_does_not_depend_on_its_neighbours(family, dtype):
    """A request gets the same bits alone and among others, for each family of models, in float32 and bfloat16."""
    check_among_neighbours(make(dtype=dtype, **FAMILIES[family]), random.Random(family), 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [32, 256, 512])
def test_the_numbers_of_rows_that_are_used_give_the_same_bits(width, dtype):
    """What `batch_invariant_sizes` found with its own tokens holds for others, with a past."""
    model = random_model(n_layer=1, n_embd=width, vocab_size=512, bias=width != 256)
    rows = Engine(model, Numbers(), 16, dtype=dtype)
    if rows.batch_sizes == [1]:
        pytest.skip("on this machine no two batch sizes give the same bits: the engine computes one row at a time")
    assert rows.batch_sizes[-1] == 16
    torch.manual_seed(1)
    ids, pasts = torch.randint(512, (16, 1)), torch.randint(512, (16, 9))

    def scores(n):
        memory = KVCache(model.config, n, dtype=model.dtype())
        caches = [memory.row(i) for i in range(n)]
        for i, cache in enumerate(caches):
            model.trunk(pasts[i:i + 1, :1 + i % 9], cache)
        return model.logits(model.trunk(ids[:n], Rows(memory, caches)))

    with torch.inference_mode():
        whole = scores(16)
        assert [n for n in rows.batch_sizes if not torch.equal(scores(n), whole[:n])] == []


def test_who_asks_alike_is_served_together_and_gets_its_own():
    """Rows with the same choice are computed in one piece, but for those whose scores are changed; and one that is not
    finite fails alone."""
    rows, texts = make(), []
    alike = dict(max_tokens=18, temperature=1.1, top_k=7, top_p=0.9, min_p=0.02, logprobs=2)
    others = [dict(presence_penalty=1.0), dict(logit_bias={5: 3.0}), dict(top_k=20), dict(top_p=0.4),
              dict(min_p=0.4), dict(temperature=0.5)]
    asked = [alike | more for more in ({}, {}, *others, {})]
    for together in (False, True):
        requests = [Request(ids=[i + 1], seed=i, **settings) for i, settings in enumerate(asked)]
        for part in ([requests] if together else [[request] for request in requests]):
            rows.complete(part)
        texts.append([request.tokens for request in requests])
    assert texts[0] == texts[1] and all(len(tokens) == 18 for tokens in texts[0])

    logits, broken = rows.model.logits, []
    def spoil(x):  # the second of the rows that write
        found = logits(x)
        if found.size(0) > 1:
            found[1, 0, 3] = broken.append(1) or float("nan")
        return found
    rows.model.logits = spoil
    requests = rows.complete([Request(ids=[i + 1], seed=i, **alike) for i in range(2)])
    assert broken and [request.finish_reason for request in requests] == ["length", "error"]
    assert requests[0].tokens == texts[0][0]


def test_a_text_does_not_depend_on_the_number_of_rows():
    """An engine with one row, or with twenty, writes the same texts."""
    texts = []
    for rows in (1, 2, 5, 16, 20):
        requests = [a_request(random.Random(i), logprobs=2) for i in range(6)]
        texts.append([request.tokens for request in make(rows=rows).complete(requests)])
    assert all(text == texts[0] for text in texts)


def test_rows_that_differ_are_filled_up(monkeypatch):
    """Where only some numbers of rows give the same bits, no other is ever computed; nowhere: one row at a time."""
    sizes = []
    for counts in ([3, 6, 8], [8], [1]):
        monkeypatch.setattr(engine, "batch_invariant_sizes", lambda *_: counts)
        rows = make()
        trunk = rows.model.trunk
        rows.model.trunk = lambda idx, cache: sizes.append(idx.size(0)) or trunk(idx, cache)
        requests = rows.complete([a_request(random.Random(i), temperature=0) for i in range(8)])
        assert set(sizes) <= {1, *counts} and set(counts) & set(sizes)
        sizes.clear()
        for request in requests:
            assert request.text == greedy(random_model(block_size=48), request)


def test_the_engine_looks_at_the_bits(monkeypatch):
    """A model whose rows depend on their number, and on their place, is noticed."""
    model, trunk = machine.use_linear(random_model(), torch.float32), GPT.trunk
    number = lambda self, idx, cache: trunk(self, idx, cache) * (1 + 1e-6 * (idx.size(0) == 3))  # noqa: E731
    monkeypatch.setattr(GPT, "trunk", number)
    assert 3 not in batch_invariant_sizes(model, 8) and 8 in batch_invariant_sizes(model, 8)
    place = lambda self, idx, cache: trunk(self, idx, cache) + torch.arange(idx.size(0))[:, None, None]  # noqa: E731
    monkeypatch.setattr(GPT, "trunk", place)
    assert batch_invariant_sizes(model, 8) == [1]


def greedy(model, request):
    """The text by GPT.generate, with the penalties of the request."""
    sampler = Sampler(request, request.ids, request.seed)
    ids = [token.item() for token in model.generate(torch.tensor([request.ids]), request.max_tokens, sampler)]
    return "".join(f"{i} " for i in ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_what_generate_writes(family):
    """Twelve requests at temperature 0, with penalties, get what GPT.generate writes for each alone."""
    requests = [a_request(random.Random(i), temperature=0) for i in range(12)]
    make(**FAMILIES[family]).complete(requests)
    model = random_model(block_size=48, **FAMILIES[family])
    assert [request.text for request in requests] == [greedy(model, request) for request in requests]


def test_log_probabilities_are_the_models_own():
    """Those of prompt and text are the log_softmax of the model's own logits, whatever the temperature and filters."""
    model, rng = random_model(block_size=300), random.Random(0)
    ids = [rng.randrange(100) for _ in range(CHUNK + 40)]  # read in two parts
    request = Request(ids=ids, max_tokens=9, seed=1, temperature=2.0, top_k=3, logprobs=4, prompt_logprobs=0)
    make(block_size=300).complete([request])
    everything = ids + [token.id for token in request.tokens]
    with torch.no_grad():
        wanted = F.log_softmax(model(torch.tensor([everything[:-1]]))[0], dim=-1)
    found = request.prompt_tokens + request.tokens
    assert [token.id for token in found] == everything and found[0].logprob is None
    for token, row in zip(found[1:], wanted):
        assert abs(token.logprob - row[token.id].item()) < 1e-4
        best = row.topk(4)
        assert [i for i, _ in token.top] == best.indices.tolist()
        assert torch.allclose(torch.tensor([p for _, p in token.top]), best.values, atol=1e-4)


def test_a_long_prompt_does_not_hold_up_the_others():
    """A step reads CHUNK tokens of prompts at most, and whoever writes gets a token in each."""
    rows = make(block_size=1000)
    writer = Request(ids=[1], max_tokens=50, ignore_eos=True)
    reader = Request(ids=[2] * (3 * CHUNK + 1), max_tokens=1)
    rows.submit(writer)
    rows.step()
    rows.submit(reader)
    for step in range(1, 5):
        before, read = writer.n, rows.prompt_tokens
        rows.step()
        assert writer.n == before + 1 and rows.prompt_tokens - read <= CHUNK
        assert bool(reader.finish_reason) == (step == 4)
    short = [Request(ids=[3] * 40, max_tokens=1) for _ in range(5)]  # 3 x 40 fit into a step, and 40 more do not
    rows.submit(*short)
    rows.step()
    assert [bool(request.finish_reason) for request in short] == [True] * 3 + [False] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_read_before_is_copied_with_the_same_bits(family, dtype, monkeypatch):
    """Requests that begin alike, one after the other and at once, among others that use up the rows: only what is new
    goes through the model, and each gets the bits that it gets from an engine that knows nothing."""
    CHUNK = engine.CHUNK
    if family != "modern":  # the other families in smaller parts
        CHUNK = 32
        monkeypatch.setattr(engine, "CHUNK", CHUNK)
    rng = random.Random(family)
    rows, other = (make(rows=3, dtype=dtype, block_size=5 * CHUNK, **FAMILIES[family]) for _ in range(2))
    read = []
    trunk = rows.model.trunk
    monkeypatch.setattr(rows.model, "trunk", lambda idx, cache: read.append(idx.size(1)) or trunk(idx, cache))
    shared = [rng.randrange(100) for _ in range(4 * CHUNK + 17)]

    def ask(length, own, after=None):
        ids = shared[:length] + [rng.randrange(100) for _ in range(own)]
        return Request(ids=ids, max_tokens=5, seed=1, temperature=1.0, logprobs=2, prompt_logprobs=after)

    some, all_three = 2 * CHUNK + 20, CHUNK + 9
    for requests, parts in (
            ([ask(some, 9)], [CHUNK, CHUNK, 29]),  # the first reads everything
            ([ask(some, 12)], [32]),  # the second what is new, and the part that is not whole
            ([ask(4 * CHUNK, 0)], [CHUNK] * 2),
            ([ask(4 * CHUNK, 0)], [CHUNK]),  # of what is known, the last part is read again: what comes after it?
            ([ask(4 * CHUNK, 7), ask(4 * CHUNK + 10, 9)], [7, 19]),  # two at once
            # Whose log-probabilities are asked for: that of token i needs the logits of the token before it.
            ([ask(3 * CHUNK, 25, after=2 * CHUNK + 1)], [CHUNK, 25]),
            ([ask(3 * CHUNK, 25, after=2 * CHUNK)], [CHUNK] * 2 + [25]),
            ([ask(3 * CHUNK, 25, after=0)], [CHUNK] * 3 + [25]),
            ([ask(0, all_three) for _ in range(3)], [CHUNK, 9] * 3),  # they take all three rows ...
            ([ask(some, 9)], [CHUNK, CHUNK, 29])):  # ... and so it begins again
        read.clear()
        rows.complete(requests)
        assert sorted(n for n in read if n > 1) == sorted(parts)
        for request in requests:
            fresh = Request(ids=request.ids, max_tokens=5, seed=1, temperature=1.0, logprobs=2,
                            prompt_logprobs=request.prompt_logprobs)
            for slot in other.slots:
                slot.cached = []
            other.complete([fresh])
            assert request.tokens == fresh.tokens and len(fresh.tokens) == 5
            assert request.prompt_tokens == fresh.prompt_tokens


def test_requests_that_come_together_with_one_prompt_read_it_once(monkeypatch):
    """Five requests with one prompt: its whole parts are read once, and then copied."""
    rows, read = make(rows=5, block_size=900), []
    trunk, ids = rows.model.trunk, [random.Random(0).randrange(100) for _ in range(5 * CHUNK + 20)]
    monkeypatch.setattr(rows.model, "trunk", lambda idx, cache: read.append(idx.size(1)) or trunk(idx, cache))
    rows.complete([Request(ids=ids, max_tokens=3, temperature=1.0, seed=i) for i in range(5)])
    assert sum(n for n in read if n > 1) == 5 * CHUNK + 5 * 20
    assert rows.prompt_tokens == 5 * len(ids)  # for /metrics: what was asked, however it was had


def test_the_end_of_the_engine_cancels_what_runs():
    """Whoever still waits for an answer learns that there will be none."""
    rows = make(rows=1)
    requests = [Request(ids=[1], max_tokens=40, ignore_eos=True, streams=True) for _ in range(2)]
    rows.submit(*requests)
    rows.step()
    rows.end()
    rows.run()
    assert [request.finish_reason for request in requests] == ["cancelled"] * 2 and rows.cancelled == 2
    assert len(requests[0].text.split()) == requests[0].n == 1 and requests[1].n == 0


def test_times_and_counts_of_a_request(monkeypatch):
    """When the first token came, and how many there were, with the one that ended the text."""
    monkeypatch.setattr(engine, "time", clock := Clock())
    rows, start = make(), clock.now
    trunk = rows.model.trunk
    monkeypatch.setattr(rows.model, "trunk", lambda idx, cache: clock.go_on(1) or trunk(idx, cache))
    request = Request(ids=[1], max_tokens=9)
    monkeypatch.setattr(rows, "ends", {7})
    monkeypatch.setattr(rows, "sample", lambda slots, logits: [7 if slot.request.n == 4 else 5 for slot in slots])
    rows.complete([request])
    assert (request.submitted, request.first) == (start, start + 1)
    assert (request.text, request.n, request.finish_reason) == ("5 5 5 5 ", 5, "stop")
    assert (rows.steps, rows.prompt_tokens, rows.completion_tokens) == (5, 1, 5)


def test_events_of_all_streams_have_a_rate(monkeypatch):
    """At most EVENTS a second: with more streams, each gets more tokens at once."""
    monkeypatch.setattr(engine, "time", clock := Clock())
    rows = make()
    trunk = rows.model.trunk
    monkeypatch.setattr(rows.model, "trunk", lambda idx, cache: clock.go_on(1.5 / engine.EVENTS) or trunk(idx, cache))

    def events(n):
        requests = [Request(ids=[1 + i, 2], max_tokens=13, ignore_eos=True, streams=True, seed=i) for i in range(n)]
        rows.complete(requests)
        came = requests[0].events
        return [len(came.get().text.split()) for _ in range(came.qsize())]
    assert events(1) == [1] * 13
    assert events(4) == [1, 1, 3, 3, 3, 2]  # after the prompts, a step of 1.5 hundredths of a second for each token


def test_no_more_alternatives_than_there_are_tokens():
    """A small vocabulary has fewer likeliest tokens than may be asked for."""
    rows = make(vocab_size=10)
    request, = rows.complete([Request(ids=[1], max_tokens=2, logprobs=20)])
    assert [len(token.top) for token in request.tokens] == [rows.model.config.vocab_size] * 2
    assert sum(math.exp(p) for _, p in request.tokens[0].top) == pytest.approx(1)


def test_rows_take_half_of_the_free_memory_at_most(monkeypatch, capsys):
    """Where there is too little memory there are fewer rows, one at least, and a note."""
    size = 2 * 2 * 48 * 4 * 8 * 4  # keys and values x layers x positions x heads x width of one x bytes
    for free, due in ((7 * size, 2), (4 * size, 1), (1e9, 8)):
        monkeypatch.setattr(machine, "free_memory", lambda device: free)
        assert make(rows=8).rows == due
        assert (f"{due} rows of 48 tokens instead of 8" in capsys.readouterr().err) == (due < 8)


def test_the_context_is_cut_to_what_fits(monkeypatch, capsys):
    """A model for a longer text than there is memory for is served with a shorter one; below 128 tokens it is refused.
    """
    token = 2 * 2 * 4 * 8 * 4  # keys and values x layers x heads x width of one x bytes
    for free, asked, due in ((1800 * token, 0, 450), (1800 * token, 400, 400), (1e9, 300, 300), (1e9, 2000, 1000)):
        monkeypatch.setattr(machine, "free_memory", lambda device: free)
        rows = make(rows=1, block_size=1000, context=asked)
        assert rows.context == due and rows.memory.k.size(3) == due
        assert ("450 tokens instead of 1 of 1,000" in capsys.readouterr().err) == (due == 450)
        with pytest.raises(ValueError, match=f"do not fit into {due}"):
            rows.submit(Request(ids=[1] * due, max_tokens=2))
        assert rows.complete([Request(ids=[1] * (due - 9), max_tokens=10)])[0].finish_reason == "length"
    monkeypatch.setattr(machine, "free_memory", lambda device: 500 * token)
    assert "too little memory for a context of 128 tokens" in error(lambda _: make(rows=1, block_size=1000))[0]


def test_the_log_probabilities_of_a_prompt_from_a_token_on():
    """Those of the end of a prompt are those of the whole, from wherever they are asked for."""
    rng, rows = random.Random(0), make(block_size=300)
    ids = [rng.randrange(100) for _ in range(CHUNK + 40)]
    whole = rows.complete([Request(ids=ids, max_tokens=0, prompt_logprobs=0)])[0].prompt_tokens
    for start in (1, 2, CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + 39):
        part = rows.complete([Request(ids=ids, max_tokens=0, prompt_logprobs=start)])[0].prompt_tokens
        assert [token.id for token in part] == ids[start:]
        assert all(abs(a.logprob - b.logprob) < 1e-5 for a, b in zip(part, whole[start:]))


def test_a_row_has_no_memory_of_who_had_it_before():
    """A request gets the same text from a row that others have used."""
    rows, rng = make(rows=1), random.Random(3)
    first = rows.complete([a_request(rng, seed=5)])[0]
    for _ in range(5):
        rows.complete([a_request(rng)])
    again = Request(**{name: getattr(first, name) for name in (
        "ids", "max_tokens", "seed", "temperature", "top_k", "top_p", "repetition_penalty", "presence_penalty")})
    assert rows.complete([again])[0].text == first.text


def test_what_does_not_fit_is_refused():
    """Prompt and answer have to fit together; the last token is not read, so a full context has room for one more."""
    rows = make(block_size=16)
    for length, new in ((17, 1), (16, 2), (10, 8), (0, 1)):
        with pytest.raises(ValueError):
            rows.submit(Request(ids=[1] * length, max_tokens=new))
    requests = [Request(ids=[1] * n, max_tokens=m, temperature=0) for n, m in ((16, 1), (16, 0), (1, 16), (15, 2))]
    rows.complete(requests)
    assert [request.n for request in requests] == [1, 0, 16, 2]
    assert {request.finish_reason for request in requests} == {"length"}
    assert requests[2].text == greedy(random_model(block_size=16), requests[2])


@pytest.mark.parametrize("part", ["read", "reuse_prefix"])
def test_who_fails_fails_alone(part, monkeypatch, capsys):
    """Whatever goes wrong with one request, and however often: its neighbours get what they asked for."""
    rows = make(rows=2)
    fine = Request(ids=[1, 2], max_tokens=30, seed=1, temperature=1.0)
    wanted = rows.complete([Request(ids=[1, 2], max_tokens=30, seed=1, temperature=1.0)])[0].text
    real = getattr(rows, part)

    def sometimes(*arguments):
        if 7 in arguments[0].request.ids:
            raise RuntimeError("one bad request")
        return real(*arguments)
    monkeypatch.setattr(rows, part, sometimes)
    bad = [Request(ids=[7], max_tokens=3, logprobs=0) for _ in range(5)]
    rows.submit(fine, *bad)
    worker = threading.Thread(target=rows.run)
    worker.start()
    assert fine.events.get(timeout=LIMIT).finish_reason == "length" and fine.text == wanted
    assert [request.events.get(timeout=LIMIT).finish_reason for request in bad] == ["error"] * 5
    rows.end()
    worker.join(LIMIT)
    assert "one bad request" in capsys.readouterr().err and len(rows.free) == 2


def test_the_queue_takes_all_or_none():
    """Of requests that are submitted together all find a place, or none."""
    rows = make(rows=2, max_queue=2)
    one, *more = (Request(ids=[1], max_tokens=3) for _ in range(6))
    rows.submit(*more[:3])
    with pytest.raises(queue.Full):
        rows.submit(*more[3:])
    assert len(rows.waiting) == 3
    rows.submit(more[3])
    with pytest.raises(queue.Full):
        rows.submit(one)


def test_cancelled_and_late_requests_leave(monkeypatch):
    """Running or waiting, they end in the next step, with what they have; the others go on."""
    rows = make(rows=2)
    running, late, queued, fine = (Request(ids=[1, 2], max_tokens=30, streams=True) for _ in range(4))
    monkeypatch.setattr(engine, "time", clock := Clock())
    late.deadline = clock.now + 10
    rows.submit(running, late, queued, fine)
    clock.go_on(10)
    for _ in range(3):
        rows.step()
    assert not late.finish_reason  # a deadline is the last moment that is in time
    running.cancelled = queued.cancelled = True
    clock.go_on(1)
    rows.step()
    assert running.finish_reason == queued.finish_reason == "cancelled" and late.finish_reason == "timeout"
    assert queued.n == 0 and rows.cancelled == 2
    rows.complete([])
    assert fine.finish_reason == "length" and fine.n == 30 and len(rows.free) == 2
    events = [late.events.get() for _ in range(late.events.qsize())]
    assert "".join(event.text for event in events) == late.text != ""
    assert [event.finish_reason for event in events] == [""] * (len(events) - 1) + ["timeout"]


def test_a_failure_ends_its_own_requests_alone(capsys):
    """A step that fails ends the requests in it; three in a row end the engine, and every request."""
    rows, worker = make(rows=2), None
    trunk, broken = rows.model.trunk, threading.Event()

    def sometimes(idx, cache):
        if broken.is_set():
            raise RuntimeError("a wire is loose")
        return trunk(idx, cache)

    rows.model.trunk = sometimes
    failed = []

    def work():
        try:
            rows.run()
        except RuntimeError as error:
            failed.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    fine = Request(ids=[1], max_tokens=3)
    rows.submit(fine)
    assert fine.events.get(timeout=LIMIT).finish_reason == "length"
    for _ in range(3):  # three, but not in a row
        broken.set()
        rows.submit(doomed := Request(ids=[1], max_tokens=3))
        assert doomed.events.get(timeout=LIMIT).finish_reason == "error"
        broken.clear()
        rows.submit(fine := Request(ids=[1], max_tokens=3))
        assert fine.events.get(timeout=LIMIT).finish_reason == "length" and len(rows.free) == 2
    broken.set()
    six = [Request(ids=[1], max_tokens=3) for _ in range(6)]  # one fails in each step, and with the third all others
    rows.submit(*six)
    worker.join(LIMIT)
    assert failed and capsys.readouterr().err.count("RuntimeError: a wire is loose") == 3 + 3
    assert {request.events.get(timeout=LIMIT).finish_reason for request in six} == {"error"}
    with pytest.raises(queue.Full):
        rows.submit(Request(ids=[1], max_tokens=3))


def test_scores_that_are_not_finite_fail_one_request():
    """Logits that are not finite end the request, and the next one is fine."""
    rows = make()
    logits = rows.model.logits
    rows.model.logits = lambda x: logits(x) * (float("nan") if x.dim() == 2 and broken else 1.0)
    broken = True
    bad = rows.complete([Request(ids=[1], max_tokens=3)])[0]
    broken = False
    good = rows.complete([Request(ids=[1], max_tokens=3)])[0]
    assert bad.finish_reason == "error" and good.finish_reason == "length" and len(rows.free) == 8


# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kinds():
    text = "".join(nasty(1000, seed=1)) + words(20_000) + "\u4e2d\u6587 \U0001f468\u200d\U0001f469 caf\u00e9 " * 50
    return [tokenizers.train("char", [text]), tokenizers.train("bpe", [text], 1000),
            tokenizers.train("unigram", [text], 1000)]


def test_text_is_put_together_right(kinds, monkeypatch):
    """Any ids, any script, any stop string: what is streamed is the whole, without half a character or half a stop."""
    rng = random.Random(0)
    for tokenizer in kinds:
        model = random_model(n_layer=1, n_head=1, n_embd=4, vocab_size=tokenizer.vocab_size, block_size=200)
        rows = Engine(model, tokenizer, 16)
        tails = ["", "\U0001f642 caf\u00e9", "\u4e2d\u6587"]
        texts = ["".join(nasty(3, seed=i)) + rng.choice(tails) for i in range(40)]
        known = [tokenizer.encode("".join(c for c in text if tokenizer.kind != "char" or c in tokenizer.characters))
                 for text in texts]
        chance = [[rng.randrange(6, tokenizer.vocab_size) for _ in range(rng.randint(1, 40))] for _ in range(40)]
        scripts = [ids for ids in known + chance if ids]
        whole = [b"".join(map(tokenizer.token_bytes, ids)).decode(errors="replace") for ids in scripts]
        stops = [[text[a:a + rng.randint(1, 4)] for a in (rng.randrange(len(text)), rng.randrange(len(text)))]
                 if i % 2 and text else [] for i, text in enumerate(whole)]
        monkeypatch.setattr(rows, "sample", lambda slots, logits: [
            script_of[slot.request][slot.request.n] for slot in slots])
        requests = [Request(ids=[1], max_tokens=len(ids), stop=stop, streams=True, logprobs=0)
                    for ids, stop in zip(scripts, stops)]
        script_of = dict(zip(requests, scripts))
        rows.complete(requests)
        for request, ids, text, stop in zip(requests, scripts, whole, stops):
            events = [request.events.get() for _ in range(request.events.qsize())]
            assert "".join(event.text for event in events) == request.text
            ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(s) for s in stop)]
            wanted = text[:ends[0] - max(len(s) for s in stop if text[:ends[0]].endswith(s))] if ends else text
            assert request.text == wanted and request.finish_reason == ("stop" if ends else "length")
            assert [token.id for token in request.tokens] == ids[:request.n]
            if "\ufffd" not in text:
                assert not any("\ufffd" in event.text for event in events)

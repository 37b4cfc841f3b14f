# SPDX-License-Identifier: GPL-3.0-only
"""What the tests of the engine share: a tokenizer, any request, and a clock that goes on when a test says so."""
import time

import pytest

from serving import engine
from serving.engine import Request
from text.pretrained import Tokenizer

LIMIT = 60  # seconds that only what hangs takes


class Numbers(Tokenizer):
    """A tokenizer whose tokens are their numbers."""

    special = settings = {}

    def token_bytes(self, i):
        return b"%d " % i


def a_request(rng, vocab_size=100, **more):
    """Any request: its length, settings and seed by chance."""
    ids = [rng.randrange(vocab_size) for _ in range(rng.randint(1, 30))]
    settings = dict(temperature=rng.choice([0, 0.7, 1, 2]), top_k=rng.choice([0, 5, 50]), top_p=rng.choice([1, 0.8]),
                    repetition_penalty=rng.choice([1, 1.3]), presence_penalty=rng.choice([0, 0.5]))
    return Request(**{**dict(ids=ids, max_tokens=rng.randint(1, 18), seed=rng.randrange(2**40), **settings), **more})


def check_among_neighbours(rows, rng, n):
    """n requests, each alone and then among others that come and go: the same text, and log-probabilities, bit for bit.
    """
    for _ in range(n):
        settings = dict(temperature=1.0, top_k=rng.choice([0, 5]), logprobs=3, prompt_logprobs=0)
        ids, seed = a_request(rng).ids, rng.randrange(2**40)
        alone, among = (Request(ids=ids, max_tokens=18, seed=seed, **settings) for _ in range(2))
        rows.complete([alone])
        others = [a_request(rng) for _ in range(14)]
        rows.submit(*others[:rng.randrange(10)])
        for _ in range(rng.randrange(6)):
            rows.step()
        rows.complete([*others[10:12], among, *others[12:]])
        assert among.tokens == alone.tokens and among.prompt_tokens == alone.prompt_tokens
        assert among.text == alone.text and len(alone.tokens) == 18


class Clock:
    """The module time as the server sees it: `now` moves when a test says so, and by `tick` whenever it is read."""

    sleep = staticmethod(time.sleep)
    time = staticmethod(time.time)

    def __init__(self):
        self.now, self.tick = time.monotonic(), 0

    def monotonic(self):
        self.now += self.tick
        return self.now

    def go_on(self, seconds):
        self.now += seconds


@pytest.fixture(scope="module", autouse=True, name="sizes_once")
def sizes_once_fixture():
    """The batch sizes of a model are looked for once in a file: that takes longer than most tests."""
    found, find = {}, engine.batch_invariant_sizes

    def once(model, rows):
        weights = [(name, tensor.dtype, tensor.double().sum().item()) for name, tensor in model.state_dict().items()]
        key = str((model.config, weights, rows))
        if key not in found:
            found[key] = find(model, rows)
        return found[key]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "batch_invariant_sizes", once)
        yield

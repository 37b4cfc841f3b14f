# SPDX-License-Identifier: GPL-3.0-only
"""From logits to text: filters by brute force, text assembly by random cuts, and the command as it is typed."""
import math
import os
import random
import shutil
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT, chat_run, error, random_model, turns
from engines import LIMIT

from runtime.console import UserError
from training import checkpoint as ckpt
import sample
import tokenizer as tokenizers
from sample import Sampler, Sampling, TextStream, candidates, sample_tokens


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def probabilities(logits, **settings):
    """Of all tokens, for rows of logits (B, V)."""
    cdf, ids = candidates(logits, Sampling(**dict(temperature=1.0, top_k=0) | settings))
    probs = cdf.diff(prepend=torch.zeros(len(cdf), 1), dim=-1) / cdf[:, -1:]
    return torch.zeros(logits.shape, dtype=torch.float64).scatter(-1, ids, probs)


def kept(logits, **settings):
    return set(probabilities(torch.tensor([logits]), **settings)[0].nonzero().flatten().tolist())


def test_filters_by_brute_force():
    """Which tokens top_k, min_p, top_p and the temperature leave, for 300 random logits, against their definitions."""
    rng = random.Random(0)
    for _ in range(300):
        logits = [rng.gauss(0, 3) for _ in range(rng.randint(1, 30))]
        V, order = len(logits), sorted(range(len(logits)), key=lambda i: -logits[i])
        k, p, t = rng.randint(0, V + 2), rng.random() * 0.99 + 0.01, rng.random() * 2 + 0.1
        assert kept(logits, top_k=k) == set(order[:k] if k else order)
        probs = torch.tensor(logits, dtype=torch.float64).softmax(0).tolist()
        assert kept(logits, min_p=p) == {i for i in range(V) if probs[i] >= p * max(probs)}
        nucleus, total = set(), 0.0
        for i in order:
            if total >= p:
                break
            nucleus.add(i)
            total += probs[i]
        assert kept(logits, top_p=p) == nucleus
        warm = probabilities(torch.tensor([logits]), temperature=t)[0].float()
        assert torch.allclose(warm, (torch.tensor(logits) / t).softmax(0), atol=1e-6)
        assert kept(logits, temperature=1e-39) >= {order[0]} and kept(logits, top_p=1e-300) == {order[0]}
        assert order[0] in kept(logits, temperature=t, top_k=k, top_p=1e-9, min_p=1.0)


def test_min_p_keeps_what_has_exactly_this_share():
    """Of two tokens that are equally likely, both stay."""
    assert kept([1.0, 1.0, 0.0], min_p=1.0) == {0, 1}


def test_filters_work_on_rows():
    """Rows of logits are filtered as each is alone."""
    logits = torch.randn(3, 20)
    for settings in (dict(top_k=3), dict(top_p=0.5), dict(min_p=0.2), dict(temperature=2.0)):
        rows = torch.cat([probabilities(row[None], **settings) for row in logits])
        assert torch.equal(probabilities(logits, **settings), rows)


def penalize(logits, prompt, written, repetition=1.0, presence=0.0, frequency=0.0):
    settings = Sampling(repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency)
    sampler = Sampler(settings, prompt, 0)
    sampler.written = written
    return sampler.change(logits)


def test_penalty():
    """The repetition penalty divides logits above 0, multiplies those below, once for each token of prompt and text."""
    logits = torch.tensor([[2.0, -2.0, 4.0, -4.0]])
    assert penalize(logits, [0, 1, 1], [], 2.0).tolist() == [[1.0, -4.0, 4.0, -4.0]]
    assert penalize(logits, [0], [1, 1], 2.0).tolist() == [[1.0, -4.0, 4.0, -4.0]]
    assert torch.equal(penalize(logits, [], [], 2.0), logits) and penalize(logits, [0], [1]) is logits


def test_penalties_by_brute_force():
    """All three penalties at once, for 200 random logits, against their definitions."""
    rng = random.Random(0)
    for _ in range(200):
        V = rng.randint(2, 12)
        scores = [rng.gauss(0, 3) for _ in range(V)]
        prompt, written = ([rng.randrange(V) for _ in range(rng.randrange(8))] for _ in range(2))
        repetition, presence, frequency = rng.uniform(0.5, 2), rng.uniform(-2, 2), rng.uniform(-2, 2)
        wanted = []
        for i, score in enumerate(scores):
            if i in prompt + written:
                score = score / repetition if score > 0 else score * repetition
            wanted.append(score - presence * (i in written) - frequency * written.count(i))
        found = penalize(torch.tensor([scores]), prompt, written, repetition, presence, frequency)
        assert torch.allclose(found, torch.tensor([wanted]), atol=1e-5)


def uniform(monkeypatch, points):
    """torch.rand gives these numbers, one after the other."""
    points = iter(points)
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, next(points), dtype=torch.float64))


SOME = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf, 2.0, -torch.inf]])


def test_tokens_are_sampled_by_their_probability(monkeypatch):
    """Each token has as much of the uniform numbers from 0 to 1 as it is probable; none of probability 0 has any."""
    settings, n = Sampling(temperature=1.0, top_k=0), 3000
    uniform(monkeypatch, [(i + 0.5) / n for i in range(n)])
    share = sample_tokens(SOME.expand(n, -1), settings, [None] * n).bincount(minlength=6) / n
    assert torch.allclose(share, SOME[0].softmax(0), rtol=0, atol=1 / n)
    uniform(monkeypatch, [0.0, 1 - 2**-53])  # the ends of what torch.rand gives
    assert sample_tokens(SOME.expand(2, -1), settings, [None] * 2).tolist() == [4, 1]


def test_each_text_has_a_generator_of_its_own():
    """20,000 tokens of one generator come as often as they are probable, within three standard deviations."""
    n, generator = 20_000, torch.Generator().manual_seed(0)
    tokens = sample_tokens(SOME.expand(n, -1), Sampling(temperature=1.0, top_k=0), [generator] * n)
    assert torch.allclose(tokens.bincount(minlength=6) / n, SOME[0].softmax(0), rtol=0, atol=3 * 0.5 / n**0.5)
    again = torch.Generator().manual_seed(0)
    assert sample_tokens(SOME, Sampling(temperature=1.0, top_k=0), [again]).tolist() == tokens[:1].tolist()


@pytest.mark.parametrize("settings", [
    dict(temperature=1.0, top_k=5), dict(temperature=0.6, top_k=7), dict(temperature=1.7, top_k=11, min_p=0.2),
    dict(temperature=1.2, top_k=6, top_p=0.8), dict(temperature=2.0, top_k=9, min_p=0.15, top_p=0.7)], ids=str)
def test_a_text_is_sampled_from_the_distribution_of_the_filters(settings, monkeypatch):
    """Does each token come as often as the filters, in their order, say, and never what is left out?"""
    logits, n = torch.randn(1, 12), 2000
    order = logits[0].argsort(descending=True)[:settings["top_k"]]
    due = (logits[0, order].double() / settings["temperature"]).softmax(0)
    due = torch.where(due >= settings.get("min_p", 0) * due.max(), due, 0)
    due = due / due.sum()
    before = due.cumsum(0) - due  # a token stays where those before it have not reached top_p
    due = torch.where(before < settings.get("top_p", 1), due, 0)
    uniform(monkeypatch, [(i + 0.5) / n for i in range(n)])
    pick = Sampler(Sampling(**settings), [], seed=1)
    share = torch.tensor([pick(logits).item() for _ in range(n)]).bincount(minlength=12) / n
    assert 2 <= (due > 0).sum() < 12
    assert torch.allclose(share[order].double(), due / due.sum(), rtol=0, atol=1.5 / n)


def test_rare_tokens_are_not_lost_in_the_sum():
    """A thousand tokens of probability 1e-8, behind one that is nearly certain: each keeps its own."""
    found = probabilities(torch.tensor([[0.0] + [-18.0] * 1000]))[0]
    assert torch.allclose(found[1:], found[1:2].expand(1000), rtol=1e-3, atol=0)
    assert found[1] == pytest.approx(math.exp(-18), rel=1e-3)


@pytest.mark.parametrize("settings", [dict(), dict(min_p=0.1), dict(top_p=0.8, temperature=1.5)], ids=str)
def test_a_top_k_of_all_tokens_is_none(settings):
    """A top_k of the vocabulary, or of more than that, is the same as 0."""
    logits, texts = torch.randn(1, 12), []
    for k in (0, 12, 13, 10**9):
        pick = Sampler(Sampling(**{"temperature": 1.0, **settings, "top_k": k}), [], seed=1)
        texts.append([pick(logits).item() for _ in range(200)])
    assert all(text == texts[0] for text in texts)


@pytest.mark.parametrize("settings", [
    dict(temperature=0), dict(top_k=1), dict(top_k=5), dict(top_k=0), dict(top_p=0.7, top_k=0)], ids=str)
def test_rows_are_sampled_as_if_alone(settings):
    """In a batch a row gets the token that it gets alone; one that is not finite is -1, and disturbs no other."""
    logits, settings = torch.randn(6, 50), Sampling(**settings)
    logits[1, 3], logits[4, 7] = torch.nan, torch.inf

    def seeds(*rows):
        return [torch.Generator().manual_seed(row) for row in rows]
    together = sample_tokens(logits, settings, seeds(*range(6))).tolist()
    assert together == [sample_tokens(logits[i:i + 1], settings, seeds(i)).item() for i in range(6)]
    assert [i for i in range(6) if together[i] < 0] == [1, 4]


def test_a_bias_decides():
    """A bias that is large enough decides which token comes."""
    pick = Sampler(Sampling(), [], 0, {3: 100.0})
    assert [pick(torch.randn(1, 9)).item() for _ in range(20)] == [3] * 20


# ----------------------------------------------------------------------------------------------------------------------


class Bytes:
    """A tokenizer whose id is a byte: the worst that can happen to UTF-8."""

    def token_bytes(self, i):
        return bytes([i])


def streamed(raw, stops=()):
    stream, out = TextStream(Bytes(), stops), []
    for byte in raw:
        out.append(stream.push(byte))
        if stream.stopped:
            break
    return out, "".join(out) + stream.finish()


def test_streamed_text_equals_the_whole():
    """Bytes that come one by one give the text of all of them, without half a character before the end."""
    rng = random.Random(0)
    for text in ("plain", "caf\u00e9 \u4e2d\u6587 \U0001f600\U0001f468\u200d\U0001f469", "e\u0301", ""):
        out, whole = streamed(text.encode())
        assert whole == text and "\ufffd" not in whole
    for _ in range(500):
        raw = bytes(rng.choice([rng.randrange(256), 0xE4, 0xB8, 0xAD, 0xF0, 0x41]) for _ in range(rng.randrange(12)))
        assert streamed(raw)[1] == raw.decode(errors="replace")


def test_stop_strings_never_leak():
    """The text ends before the stop string that is complete first, however the text is cut into pieces."""
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choice("ab\u00e9\n") for _ in range(rng.randrange(14)))
        stops = ["".join(rng.choice("ab\u00e9\n") for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        out, whole = streamed(text.encode(), stops)
        ends = []  # the stop that is complete first wins, and of those the one that begins first
        for n in range(len(text) + 1):
            ends = [text[:n].find(stop) for stop in stops if stop in text[:n]]
            if ends:
                break
        assert whole == (text[:min(ends)] if ends else text), (text, stops)
        stream = TextStream(Bytes(), stops)  # and the same when it comes in larger pieces
        pieces = [stream.add(text[i:i + 3]) for i in range(0, len(text), 3)]
        assert "".join(pieces) + stream.finish() == whole, (text, stops)


# ----------------------------------------------------------------------------------------------------------------------


def in_process(tiny_run, monkeypatch, capsys, *argv):
    monkeypatch.chdir(tiny_run)
    sample.main(list(argv))
    return capsys.readouterr()


def test_the_text_alone_goes_to_standard_output(tiny_run, monkeypatch, capsys):
    """What is said about it goes to standard error. The newest run is taken; its name, and nanoGPT's, mean the same."""
    found = in_process(tiny_run, monkeypatch, capsys, "--prompt=the ", "--seed=3", "--max_new_tokens=40")
    assert found.out.startswith("the ") and len(found.out) == 4 + 40 + 1
    assert "out/words/best.pt" in found.err and "40 steps on" in found.err and "per second" in found.err
    same = "--start=the ", "--seed=3", "--max_new_tokens=40"
    assert in_process(tiny_run, monkeypatch, capsys, "out/words", *same, "--out_dir=out/words").out == found.out


def test_settings_reach_the_text(tiny_run, monkeypatch, capsys):
    """Each setting of the command line changes the text as it should."""
    def text(*argv):
        return in_process(tiny_run, monkeypatch, capsys, "--prompt=the cat ", "--max_new_tokens=60", *argv).out
    greedy = text("--temperature=0")
    assert text("--temperature=1", "--top_k=1") == greedy == text("--temperature=1", "--top_p=1e-9")
    assert text("--seed=1") == text("--seed=1") != text("--seed=2")
    assert text("--temperature=0", "--repetition_penalty=5") != greedy
    word = greedy[30:33]
    assert text("--temperature=0", f"--stop={word}") == "the cat " + greedy[8:].split(word)[0] + "\n"
    wild = text("--temperature=2", "--top_k=0", "--seed=1")  # with a line end in it; in a shell it is typed as \\n
    assert text("--temperature=2", "--top_k=0", "--seed=1", "--stop=\\n") == wild.split("\n")[0] + "\n" != wild
    two = text("--num_samples=2", "--seed=5")
    assert two == text("--seed=5") + text("--seed=6")
    assert len(text("--max_new_tokens=100", "--temperature=0")) == 8 + 100 + 1  # far beyond the context of 32


def test_end_of_text_ends_the_text(tiny_run, monkeypatch, capsys):
    """The end-of-text token ends the text, unless --ignore_eos."""
    monkeypatch.chdir(tiny_run)
    monkeypatch.setattr(sample, "Sampler", lambda *_: lambda logits: torch.tensor([0]))  # always <|endoftext|>
    assert in_process(tiny_run, monkeypatch, capsys, "--prompt=the").out == "the\n"
    shown = in_process(tiny_run, monkeypatch, capsys, "--prompt=the", "--ignore_eos", "--max_new_tokens=7")
    assert shown.out == "the\n" and "[7 tokens" in shown.err


def test_prompts(tiny_run, tmp_path, monkeypatch, capsys):
    """A prompt may come from a file, be longer than the context, or be missing."""
    (tmp_path / "p.txt").write_text("my friend ", encoding="utf-8")
    assert in_process(tiny_run, monkeypatch, capsys, f"--prompt=FILE:{tmp_path}/p.txt").out.startswith("my friend ")
    long = "the cat sees a dog. " * 10  # 200 characters, a context of 32
    shown = in_process(tiny_run, monkeypatch, capsys, f"--prompt={long}")
    assert "the prompt has 200 tokens, the context 32: the first 168 are ignored" in shown.err
    assert shown.out.startswith(long)
    assert len(in_process(tiny_run, monkeypatch, capsys, "--seed=1").out) > 2  # none: starts from end-of-text


def test_the_end_of_a_long_prompt_counts(tiny_run, monkeypatch, capsys):
    """The text goes on as it would after the last 32 characters alone."""
    long, settings = "the cat sees a dog. my friend likes the old man.\n", ("--temperature=0", "--max_new_tokens=20")
    shown = [in_process(tiny_run, monkeypatch, capsys, f"--prompt={text}", *settings) for text in (long, long[-32:])]
    assert shown[0].out.removeprefix(long) == shown[1].out.removeprefix(long[-32:]) != shown[0].out


def test_stop_strings_as_they_are_typed(tiny_run, monkeypatch, capsys):
    """\\n and \\t are a line end and a tab, 256 characters are fine, and after a stop string nothing is computed."""
    seen = []
    monkeypatch.setattr(sample, "TextStream", lambda *args: seen.append(args[1]) or TextStream(*args))
    whole = in_process(tiny_run, monkeypatch, capsys, "--prompt=the ", "--temperature=0").out
    shown = in_process(tiny_run, monkeypatch, capsys, "--prompt=the ", "--temperature=0", f"--stop={whole[4:7]}",
                       "--stop=a\\tb\\n", "--stop=" + "x" * 256)
    assert seen == [[], [whole[4:7], "a\tb\n", "x" * 256]]
    assert shown.out == "the \n" and "[3 tokens" in shown.err


def test_a_file_is_read_as_it_is(here):
    """Line ends of a prompt are the model's to see."""
    (here / "p.txt").write_bytes("a\r\nb\rc\n\u00e9".encode())
    assert sample.read_prompt("FILE:p.txt") == "a\r\nb\rc\n\u00e9"


def test_without_a_prompt_a_text_begins_as_a_document_does(monkeypatch):
    """With the end-of-text token, which stands before every document; with token 0 where a vocabulary has none."""
    asked = []
    monkeypatch.setattr(sample, "write", lambda model, tokenizer, ids, settings, seed: asked.append(ids) or "")
    for special in {tokenizers.END_OF_TEXT: 7}, {}:
        tokenizer = types.SimpleNamespace(special=special, prompt=lambda text: [])
        sample.Writer(random_model(), tokenizer, sample.SampleConfig(seed=1)).answer("")
    assert asked == [[7], [0]]


@pytest.mark.parametrize("chat, due", [(False, ["", "  ", "x"]), (True, ["x"])])
def test_an_empty_line_begins_a_text_and_is_no_message(chat, due, monkeypatch):
    """In a terminal, an empty line is an empty prompt; in a conversation it is nothing."""
    answered, typed = [], iter(["", "  ", "x"])

    def type_next(prompt):
        for text in typed:
            return text
        raise EOFError
    monkeypatch.setattr("builtins.input", type_next)
    sample.ask(types.SimpleNamespace(settings=sample.SampleConfig(chat=chat), answer=answered.append))
    assert answered == due


def test_nothing_is_asked_where_the_text_goes_to_a_file(tiny_run, monkeypatch, capsys):
    """`python sample.py > text.txt` writes a text at once, although standard input is a terminal."""
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(isatty=lambda: True))
    shown = in_process(tiny_run, monkeypatch, capsys, "--seed=1", "--max_new_tokens=5")
    assert len(shown.out) > 1 and "[5 tokens" in shown.err and "type a prompt" not in shown.err


def test_the_newest_run_is_taken(tiny_run, monkeypatch, capsys, tmp_path):
    """Without a name it is the newest run under out/; --checkpoint and a file choose another state of it."""
    shutil.copytree(tiny_run / "out/words", tmp_path / "out/deep/other")
    shutil.copytree(tiny_run / "out/words", tmp_path / "out/old")
    for path in (tmp_path / "out/old").glob("*.pt"):
        os.utime(path, (1, 1))
    assert "out/deep/other/best.pt" in in_process(tmp_path, monkeypatch, capsys).err
    assert "ckpt_00000040.pt" in in_process(tmp_path, monkeypatch, capsys, "--checkpoint=last").err
    assert "ckpt_00000040.pt" in in_process(tmp_path, monkeypatch, capsys, "out/old/ckpt_00000040.pt").err


def test_a_config_json_in_a_run_makes_no_hugging_face_folder_of_it(tiny_run):
    """A folder with checkpoints is a run, whatever else is in it."""
    path = tiny_run / "out/words/config.json"
    path.write_text('{"a": 1}')
    try:
        assert sample.ckpt.read_run(str(path.parent))[0]["step"] == 40
    finally:
        path.unlink()


def test_what_people_get_wrong(tiny_run, monkeypatch, here):
    """Each mistake is one line that names it."""
    with monkeypatch.context() as patch:
        patch.setattr(sample.ckpt, "SMALL", "nowhere")
        assert error(sample.main) == ("there is no trained run in out/", "python train.py config/train_small.py")
    assert "there is no run out/nowhere" in error(sample.main, "out/nowhere")[0]
    monkeypatch.chdir(tiny_run)
    assert "temperature=-1.0" in error(sample.main, "--temperature=-1")[0]
    for bad in ("--top_k=-1", "--top_p=0", "--min_p=2", "--num_samples=0", "--max_new_tokens=0",
                "--repetition_penalty=0", "--temperature=2.1", "--presence_penalty=-3.0"):
        assert bad.split("=")[0][2:] + "=" + bad.split("=")[1] in error(sample.main, bad)[0]
    for stops in ["--stop="], ["--stop=" + "x" * 300], ["--stop=x"] * 17:
        assert "--stop: at most 16 texts of 1 to 256 characters" in error(sample.main, *stops)[0]
    fact, fix = error(sample.main, "--prompt=the cat?")
    assert "'?' (U+003F)" in fact and "bpe" in fix
    assert "missing.txt" in error(sample.main, "--prompt=FILE:missing.txt")[0]
    assert error(sample.main, "a", "b") == ("there is no run a", "out/words")
    assert "no trained model in data" in error(sample.main, "data")[0]
    if not torch.cuda.is_available():
        assert "--device=cuda" in error(sample.main, "--device=cuda")[0]
    assert "'quantum'" in error(sample.main, "--device=quantum")[0]
    assert "--dtype" in error(sample.main, "--dtype=int3")[0]
    assert "seed=99999999999999999999" in error(sample.main, "--seed=99999999999999999999")[0]
    assert "is not UTF-8" in error(sample.main, "--prompt=\udcff")[0]
    shutil.copytree("out/words", here / "out/mixed")
    tokenizers.train("char", ["abc"]).save(here / "out/mixed/tokenizer")  # another one than it was trained with
    assert "is not the expected tokenizer" in error(sample.main, here / "out/mixed")[0]
    assert "--checkpoint" in error(sample.main, "--checkpoint=worst")[0]


def test_a_conversation_in_a_terminal(tiny_run):
    """Prompts are asked for until Ctrl-D; one that cannot be read is an error, and the next one is fine."""
    pty = pytest.importorskip("pty", reason="this system has no terminals of its own")
    leader, follower = pty.openpty()
    chat = subprocess.Popen([sys.executable, ROOT / "sample.py", "--max_new_tokens=5", "--seed=1"], cwd=tiny_run,
                            stdin=follower, stdout=follower, stderr=subprocess.PIPE, text=True)
    os.close(follower)
    os.write(leader, b"the \nthe cat?\n\xff\nmy \n\x04")  # a character that the model does not know; no UTF-8; Ctrl-D
    said = chat.communicate(timeout=2 * LIMIT)[1]
    os.close(leader)
    assert chat.returncode == 0 and "type a prompt" in said and "'?' (U+003F)" in said and "is not UTF-8" in said
    assert said.count("[5 tokens") == 2 and "--seed=1]" in said and "--seed=2]" in said


def test_logits_that_are_not_finite_are_refused():
    """A model that returns no numbers is an error, not a random text."""
    with pytest.raises(UserError, match="not finite"):
        Sampler(Sampling(), [], 0)(torch.full((1, 5), float("nan")))


# ----------------------------------------------------------------------------------------------------------------------
# Chats


@pytest.fixture
def chatter(tiny_run, here, monkeypatch, capsys):
    """(tokenizer, asked, talk): a model that answers "my dog", its prompts, and talk(what is typed to it, ...), which
    returns what was said. In prompt number talk.stop_at (from 1), Ctrl-C is typed while it answers."""
    chat_run(tiny_run, here / "chat")
    _, tokenizer, _ = ckpt.load_run("chat")
    asked, stop_at = [], []

    def pick(settings, prompt, seed):
        asked.append(prompt)
        answer = iter([*tokenizer.encode("my dog"), tokenizer.special["<|end|>"], *tokenizer.encode("no more")])

        def next_token(logits):
            if stop_at and len(asked) == stop_at[0]:
                raise KeyboardInterrupt
            return torch.tensor([next(answer)])
        return next_token

    def talk(*says, argv=()):
        says, terminal = iter(says), type("Terminal", (), dict(isatty=lambda self: True))()

        def typed(prompt):
            text = next(says, EOFError)
            if text in (EOFError, KeyboardInterrupt):  # Ctrl-D, Ctrl-C
                raise text
            return text
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", terminal)
            patch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
            patch.setattr("builtins.input", typed)
            sample.main(["chat", "--chat", "--max_new_tokens=8", *argv])
        return capsys.readouterr()
    monkeypatch.setattr(sample, "Sampler", pick)
    talk.stop_at = stop_at
    return tokenizer, asked, talk


def test_a_chat_ends_its_answers_by_itself(chatter):
    """An answer ends at its end token, and each prompt is the conversation so far."""
    tokenizer, asked, talk = chatter
    shown = talk("a dog", "a cat?", "\udcff", "a")  # what the model does not know, and what is no character
    assert shown.out == "my dog\nmy dog\n" and shown.err.count("[7 tokens") == 2
    assert asked == [tokenizer.chat(turns("a dog")), tokenizer.chat(turns("a dog", "my dog", "a"))]
    assert "'?' (U+003F)" in shown.err and "context" not in shown.err


def test_control_c_stops_an_answer_and_not_the_conversation(chatter):
    """A question whose answer was stopped is forgotten; at an empty line, Ctrl-C does nothing but say how to end."""
    tokenizer, asked, talk = chatter
    talk.stop_at.append(2)
    shown = talk("a dog", "a", KeyboardInterrupt, "c")
    assert shown.out == "my dog\nmy dog\n" and shown.err.count("(stopped; Ctrl-D quits)") == 2
    assert asked == [tokenizer.chat(turns("a dog")), tokenizer.chat(turns("a dog", "my dog", "a")),
                     tokenizer.chat(turns("a dog", "my dog", "c"))]


def test_a_chat_forgets_whole_messages(chatter):
    """What outgrows the context goes, with its answer: of 32 tokens here, 8 are for the answer."""
    tokenizer, asked, talk = chatter
    shown = talk(*"acdef", "c" * 50, "d")
    assert asked[:4] == [tokenizer.chat(turns("a")), tokenizer.chat(turns("a", "my dog", "c")),
                         tokenizer.chat(turns("c", "my dog", "d")), tokenizer.chat(turns("d", "my dog", "e"))]
    assert shown.err.count("note: the conversation outgrows the context of 32 tokens") == 1
    assert len(asked[5]) == 32 and "the prompt has 53 tokens" in shown.err  # one message alone is too long
    assert asked[6] == tokenizer.chat(turns("d")) and shown.out == "my dog\n" * 7


@pytest.mark.parametrize("second, kept", [("cc", True), ("ccc", False)])
def test_half_of_the_context_is_for_the_conversation(chatter, second, kept):
    """However long an answer may be: of 32 tokens, a conversation of 16 is kept, one of 17 is not."""
    tokenizer, asked, talk = chatter
    both = tokenizer.chat(turns("a", "my dog", second))
    assert len(both) == (16 if kept else 17)
    talk("a", second, argv=["--max_new_tokens=1000"])
    assert asked == [tokenizer.chat(turns("a")), both if kept else tokenizer.chat(turns(second))]


def test_a_system_message_stays(chatter):
    """When a conversation outgrows the context, the system message and the last question stay."""
    tokenizer, _, _ = chatter
    talk = turns("a", "c", "d", "e", "f", system="my")
    ids = sample.fit(messages := [*talk], tokenizer, 16)
    assert messages == [talk[0], *talk[3:]] and ids == tokenizer.chat(messages) and len(ids) <= 16
    assert sample.fit(messages := [*talk], tokenizer, 1) == tokenizer.chat([talk[0], talk[-1]]) == \
        tokenizer.chat(messages)
    assert sample.fit([*talk], tokenizer, 99) == tokenizer.chat(talk)


def test_a_run_that_cannot_chat(tiny_run, monkeypatch):
    """--chat with a model that has learned no chats is an error with the two commands that teach it."""
    monkeypatch.chdir(tiny_run)
    for run in ("out/words", "out/words/best.pt"):
        fact, fix = error(sample.main, run, "--chat", "--prompt=x")
        assert fact == "out/words/best.pt has no chat format"
        assert fix == ("python prepare.py CHATS.jsonl --format=chat --tokenizer=out/words, then train.py "
                       "--init_from=out/words")

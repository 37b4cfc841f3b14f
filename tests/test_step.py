# SPDX-License-Identifier: GPL-3.0-only
"""One step by hand: its learning rate, its gradient, its optimizers. And how many steps a run has, and how fast."""
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, error, prepare_words

import dataset as datasets
import train
from model import GPT
from runtime import machine
from runtime.processes import Processes
from training import checkpoint as ckpt
from training import resume


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    prepare_words(folder)
    return folder / "data"


@pytest.fixture
def data(prepared, here):
    """A fresh current folder with data/words, which must not be changed."""
    (here / "data").symlink_to(prepared)


def run(*argv):
    return train.main(["--dataset=words", *TINY, *argv])


def rows(out="out/words"):
    with open(f"{out}/log.jsonl", encoding="utf-8") as file:
        _, *found = map(json.loads, file)
    return found


# ---------- The learning rate


def factors(n, max_iters=10, **settings):
    """The share of the peak rate in each of n steps, rounded; the lowest is a tenth."""
    known = dict(learning_rate=1e-2, min_lr=1e-3, warmup_iters=2)
    config = train.TrainConfig(**known | settings)
    return [round(train.learning_rate_factor(step, config, max_iters), 6) for step in range(n)]


def cosine(*progress):
    return [round(0.1 + 0.45 * (1 + math.cos(math.pi * p)), 6) for p in progress]


@pytest.mark.parametrize("settings, due", [
    (dict(), [0.333333, 0.666667, *cosine(0, 1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8), 0.1, 0.1, 0.1]),
    (dict(lr_decay_iters=6), [0.333333, 0.666667, *cosine(0, 1 / 4, 2 / 4, 3 / 4), *[0.1] * 7]),
    (dict(lr_decay_iters=6, min_lr=0.0), [0.333333, 0.666667, 1.0, 0.853553, 0.5, 0.146447, *[0.0] * 7]),
    (dict(warmup_iters=0, lr_decay_iters=2), [*cosine(0, 1 / 2), *[0.1] * 11]),
    (dict(min_lr=1e-2), [0.333333, 0.666667, *[1.0] * 11]),
    (dict(decay_lr=False), [1.0] * 13), (dict(decay_lr=False, lr_decay_iters=6), [1.0] * 13)])
def test_the_rate_rises_falls_and_then_stays(settings, due):
    assert factors(13, **settings) == due


def test_beyond_lr_decay_iters_a_run_stays_at_min_lr(data):
    run("--max_iters=7", "--warmup_iters=1", "--lr_decay_iters=5", "--min_lr=1e-3")
    due = [0.5, *cosine(0, 1 / 4, 2 / 4, 3 / 4), 0.1, 0.1]
    assert [row["lr"] for row in rows()] == pytest.approx([1e-2 * factor for factor in due])


# ---------- The gradient and the optimizers


def by_hand(config, steps):
    """The same steps without train.py: (weights, averages of gradients, norms). test_muon.py is about Muon itself."""
    torch.manual_seed(config.seed)
    model, text = GPT(config).train(), datasets.Dataset.open("data/words")
    named = dict(model.named_parameters())
    muon = [p for name, p in named.items() if ".h." in name and p.dim() == 2 and config.optimizer == "muon"]
    rest = [p for p in named.values() if not any(p is other for other in muon)]
    groups = [dict(params=[p for p in rest if p.dim() == 2], weight_decay=config.weight_decay),
              dict(params=[p for p in rest if p.dim() == 1], weight_decay=0.0)]
    optimizers = [torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2))]
    if muon:
        optimizers.append(train.Muon(muon, config.muon_lr, config.weight_decay, 0.95, torch.float32))
    peaks, norms = (config.learning_rate, config.muon_lr), []
    micros = config.gradient_accumulation_steps
    for step in range(steps):
        model.zero_grad()
        for micro in range(micros):
            batch = text.batch(config.block_size, config.batch_size, config.seed, step, micro, micros)
            (model(*batch) / micros).backward()
        norms.append(math.sqrt(sum(p.grad.double().square().sum().item() for p in named.values())))
        if config.grad_clip != "none" and norms[-1] > config.grad_clip:
            for p in named.values():
                p.grad *= config.grad_clip / norms[-1]
        for optimizer, peak in zip(optimizers, peaks):
            for group in optimizer.param_groups:
                group["lr"] = peak * train.learning_rate_factor(step, config, config.max_iters)
            optimizer.step()
    averages = [state.get("exp_avg", state.get("momentum_buffer")).norm().item()
                for optimizer in optimizers for state in optimizer.state.values()]
    return {name: p.detach() for name, p in named.items()}, averages, norms


@pytest.mark.parametrize("argv", [
    [], ["--seed=5", "--vocab_size=90"], ["--beta1=0.5", "--beta2=0.6"], ["--weight_decay=3", "--bias=true"],
    ["--weight_decay=0"], ["--grad_clip=0.2", "--gradient_accumulation_steps=2"], ["--grad_clip=0"],
    ["--grad_clip=none"], ["--optimizer=muon", "--muon_lr=0.3"],
    ["--optimizer=muon", "--muon_lr=0.001", "--weight_decay=3", "--grad_clip=0.2", "--preset=modern"]])
def test_three_steps_equal_those_by_hand(data, argv, monkeypatch):
    """Every setting of a step, other than its default too: weights, averages and norms are the same."""
    monkeypatch.setattr(machine, "has_bf16", lambda device: False)  # Muon's products are float32 then
    run("--max_iters=3", "--warmup_iters=1", "--learning_rate=3e-3", *argv)
    state = ckpt.load_checkpoint("out/words/ckpt_00000003.pt")
    config = train.TrainConfig(**state["settings"])
    for argument in argv:  # what was asked for stands in the checkpoint
        name, value = argument[2:].split("=")
        assert str(getattr(config, name)) in (value, value + ".0", "none", value.capitalize())
    weights, averages, norms = by_hand(config, 3)
    assert [row["grad_norm"] for row in rows()] == pytest.approx(norms, rel=1e-4)
    assert max(norms) > 1  # so that the default clips it
    assert max((state["model"][name] - p).abs().max().item() for name, p in weights.items()) < 1e-5
    found = [one.get("exp_avg", one.get("momentum_buffer")).norm().item()
             for optimizer in state["optimizer"] for one in optimizer["state"].values()]
    assert found == pytest.approx(averages, rel=1e-4)


def test_optimizers_hold_every_parameter_once():
    for name, kinds in (("adamw", [torch.optim.AdamW]), ("muon", [torch.optim.AdamW, train.Muon])):
        model = GPT(train.GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=64, bias=True, block_size=16))
        optimizers = train.make_optimizers(model, train.TrainConfig(optimizer=name), "cpu")
        assert [type(optimizer) for optimizer, _ in optimizers] == kinds
        held = [(p, group["weight_decay"]) for optimizer, _ in optimizers for group in optimizer.param_groups
                for p in group["params"]]
        assert sorted(id(p) for p, _ in held) == sorted(id(p) for p in model.parameters())
        assert all((decay > 0) == (p.dim() == 2) for p, decay in held)


def test_log_interval_and_validations_make_the_rows(data):
    run("--max_iters=11", "--log_interval=4", "--eval_interval=5")
    assert [(row["step"], "val_loss" in row) for row in rows()] == [
        (4, False), (5, True), (8, False), (10, True), (11, True)]


# ---------- Is it worth compiling?


@pytest.mark.parametrize("steps, peak, world, budget, device, due", [
    (100, 1e9, 1, "", "cpu", False),  # 120 s exactly
    (101, 1e9, 1, "", "cpu", True),
    (100, 0.99e9, 1, "", "cpu", True),  # a slower machine
    (101, 1e9, 2, "", "cpu", False),  # two processes share it
    (201, 1e9, 2, "", "cpu", True),
    (101, 1e9, 1, "", "mps", False),
    (math.inf, 1e9, 1, "2m", "cpu", False), (math.inf, 1e9, 1, "121s", "cpu", True),
    (math.inf, 1e9, 1, "1h", "mps", False), (1, 1e9, 1, "1h", "cuda", True)])
def test_a_run_of_more_than_two_minutes_is_compiled(steps, peak, world, budget, device, due):
    """A step of 1,000 tokens of 540,000 operations takes 1.2 s at 45% of 1 GFLOP/s."""
    guess = SimpleNamespace(max_iters=steps, step_tokens=1000, peak=peak, device=device,
                            model=SimpleNamespace(flops_per_token=lambda: 540_000),
                            ranks=SimpleNamespace(world=world), settings=SimpleNamespace(budget=budget))
    assert train.is_worth_compiling(guess) == due


@pytest.mark.parametrize("asked, worth, due", [("auto", True, True), ("auto", False, False), ("true", False, True),
                                               ("false", True, False)])
def test_what_is_asked_decides_and_else_what_is_worth_it(data, monkeypatch, asked, worth, due):
    compiled = []
    monkeypatch.setattr(train, "is_worth_compiling", lambda run: worth)
    monkeypatch.setattr(machine, "compile_model", lambda model, required, loss: compiled.append(required) or True)
    assert run("--max_iters=1", f"--compile={asked}") == 0
    assert compiled == [asked == "true"] * due  # "auto" does without where it fails
    assert ckpt.load_checkpoint("out/words/best.pt")["chosen"]["compile"] is due


# ---------- The budget


def planned(budget="100s", wall=40.0, times=(0.5,) * 10, step=10, warmup=20, eval_interval=10, val_batches=12,
            micros=2):
    """(what is known of a run, the lines that are written anew) for choose_max_iters."""
    lines = []
    settings = SimpleNamespace(budget=budget, warmup_iters=warmup, eval_interval=eval_interval)
    known = SimpleNamespace(
        settings=settings, facts=dict(chosen=dict(compile=True)), step=step, max_iters=math.inf, times=list(times),
        val_batches=val_batches, micros=micros, ranks=Processes(), wall_seconds=lambda: wall,
        epochs=lambda steps: steps / 100, header=lambda: "header", log=SimpleNamespace(rewrite=lines.append))
    return known, lines


@pytest.mark.parametrize("known, steps", [
    # A validation takes 12 / 2 x 0.5 s / 3 = 1 s, and the sample 3 s.
    (dict(), 93),  # 100 - 40 - 1 - 3 = 56 s, and 0.5 + 1 / 10 s for each step
    (dict(eval_interval=10**9), 111),  # 56 / 0.5, nearly: no validation but the last
    (dict(wall=95.9, eval_interval=10**9), 1),  # 0.1 s is less than a step, and one is made
    (dict(times=[0.5] * 6 + [9.0] * 4), 93),  # the median: others disturbed some of them
    (dict(val_batches=0), 114), (dict(micros=4), 102), (dict(budget="2m"), 126), (dict(wall=0.0), 160)])
def test_the_steps_that_fit_into_a_budget(known, steps, capsys):
    known, lines = planned(**known)
    train.choose_max_iters(known)
    assert known.max_iters == known.facts["chosen"]["max_iters"] == 10 + steps and lines == ["header"]
    assert capsys.readouterr().err == (f"budget: enough for {(10 + steps) / 100:.1f} epochs; to repeat this run without a "
                                       f"budget: --max_iters={10 + steps} --compile=true\n")
    train.choose_max_iters(known)  # once chosen, it stays
    assert known.max_iters == 10 + steps and len(lines) == 1


@pytest.mark.parametrize("step, warmup, chosen", [(9, 20, False), (10, 20, True), (4, 5, False), (5, 5, True),
                                                  (0, 0, False), (1, 0, True)])
def test_the_length_is_chosen_in_the_warm_up(step, warmup, chosen):
    """After ten steps, or fewer where the warm-up is shorter: there the rate does not depend on the length."""
    known, _ = planned(step=step, warmup=warmup)
    train.choose_max_iters(known)
    assert (known.max_iters < math.inf) == chosen


def test_a_budget_that_is_too_short_says_by_how_much():
    known, _ = planned(wall=98.4)
    fact, fix = error(lambda _: train.choose_max_iters(known))
    assert fact == "budget=100s is 2 s too short for one validation and a sample"
    assert fix == "a longer --budget, or a smaller model"
    known, _ = planned(wall=96.1)  # nothing is left
    assert "is 0 s too short" in error(lambda _: train.choose_max_iters(known))[0]


class Clock:
    """In place of the module time: a step takes half a second, a validation two, and importing took ten."""

    def __init__(self, monkeypatch):
        self.now, self.patch = 1000.0, monkeypatch
        self.monotonic = self.perf_counter = lambda: self.now
        monkeypatch.setattr(train, "time", self)
        for owner, name, seconds in ((train, "accumulate_gradient", 0.5), (train.Run, "validate", 2.0)):
            real = getattr(owner, name)
            monkeypatch.setattr(owner, name, lambda run, real=real, seconds=seconds: self.after(seconds, real(run)))
        self.start()

    def after(self, seconds, result):
        self.now += seconds
        return result

    def start(self):
        """Another process begins."""
        self.patch.setattr(train, "PROCESS_START", self.now)
        self.now += 10


BUDGET = ["--warmup_iters=4", "--eval_interval=100000", "--log_interval=1000"]


def test_a_budget_is_kept_and_can_be_repeated_without_the_clock(data, monkeypatch, capsys):
    clock = Clock(monkeypatch)
    assert run(*BUDGET, "--out_dir=a", "--budget=60s") == 0
    # After 4 steps of 0.5 s, 48 s are left. Of these the sample takes 3 s, and a validation of 8 batches 1.33 s.
    [last], said = rows("a"), capsys.readouterr().err
    assert last["step"] == 4 + 87 and last["train_seconds"] == 45.5 and last["wall_seconds"] == 10 + 45.5 + 2
    assert "--max_iters=91 --compile=false" in said and "finished: 91 steps" in said
    assert last["lr"] == pytest.approx(6e-5, rel=0.1)  # the rate has come down to its end
    assert run(*BUDGET, "--out_dir=b", "--max_iters=91") == 0
    a, b = (ckpt.load_checkpoint(f"{x}/best.pt")["model"] for x in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    clock.start()
    assert run(*BUDGET, "--out_dir=a", "--budget=60s") == 0
    assert "a is finished: 91 steps" in capsys.readouterr().err
    assert run(*BUDGET, "--out_dir=a", "--max_iters=94") == 0 and rows("a")[-1]["step"] == 94


def test_a_longer_budget_continues_a_run(data, monkeypatch, capsys):
    clock = Clock(monkeypatch)
    assert run(*BUDGET, "--budget=30s") == 0
    clock.start()
    assert run(*BUDGET, "--budget=60s") == 0
    said = capsys.readouterr().err
    assert "--max_iters=31 --compile=false" in said and "inf" not in said
    assert "resumed out/words after 31 steps\n" in said
    # Step 31 was saved after 25.5 s, and importing took 10 s again: 24.5 s are left, 20.17 for 40 steps.
    assert rows()[-1]["step"] == 71 and "--max_iters=71" in said


def test_settings_stay_as_they_were_given(data, monkeypatch):
    """What is worked out while training is never written into the settings."""
    before = []
    real = train.Run.__post_init__
    monkeypatch.setattr(train.Run, "__post_init__", lambda run: (
        real(run), before.append((run, train.asdict(run.settings)))))
    Clock(monkeypatch)
    run("--max_iters=12", "--budget=30s", *BUDGET)
    [(done, settings)] = before
    assert train.asdict(done.settings) == settings and settings["max_iters"] == 12
    with open("out/words/log.jsonl", encoding="utf-8") as file:
        header = json.loads(file.readline())
    assert header["settings"]["max_iters"] == done.max_iters == rows()[-1]["step"] == 31


def test_the_clock_of_a_budget_starts_with_the_process(data, monkeypatch):
    """Before the imports: a budget of 30 s is used up where they took 60."""
    monkeypatch.setattr(train, "PROCESS_START", train.time.monotonic() - 60)
    fact, _ = error(lambda _: run("--max_iters=12", "--budget=30s", *BUDGET))
    assert re.match(r"budget=30s is 3\d s too short for one validation", fact)
    source = open(train.__file__, encoding="utf-8").read()
    assert source.index("PROCESS_START = ") < source.index("import torch")


@pytest.mark.parametrize("budget, seconds", [("90s", 90), ("5m", 300), ("1.5h", 5400), ("0.5m", 30)])
def test_times_are_seconds_minutes_or_hours(budget, seconds):
    assert resume.seconds_of(budget) == seconds

# SPDX-License-Identifier: GPL-3.0-only
"""What the benches make of their numbers: spread, ratio, table, and what each of them runs with which settings."""
import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import error, words

import train
from bench import ablation, generate, loss, measure, serve, throughput
from model import GPT, PRESETS, resolve
from runtime.console import UserError
from runtime.settings import load

def test_spread_is_the_median_the_lowest_and_the_highest():
    assert measure.spread([3, 1, 2]) == "2.00 (1.00 to 3.00)"
    assert measure.spread([1.0, 9.0, 2.0, 3.0], digits=1) == "2.5 (1.0 to 9.0)"
    assert measure.spread([1, 1, 10], 0) == "1 (1 to 10)"
    assert measure.spread([1234.5678], 0) == "1,235 (1,235 to 1,235)"
    assert measure.spread([0.12345], 3) == "0.123 (0.123 to 0.123)"


def test_a_ratio_is_taken_within_each_round():
    """3, 1 and 2 in the three rounds: the ratio of the medians is 1."""
    assert measure.ratio([3.0, 10.0, 40.0], [1.0, 10.0, 20.0]) == "2.00 (1.00 to 3.00)"


def test_a_table_is_one_of_markdown(capsys):
    measure.table("| a | b |", [["x", 1], ["y", "2.5"]])
    assert capsys.readouterr().out == "| a | b |\n|---|---|\n| x | 1 |\n| y | 2.5 |\n"


def test_contestants_take_turns():
    order = []
    contestants = {name: lambda i, name=name: order.append(name + str(i)) or (name, i) for name in "ab"}
    found = measure.take_turns(contestants, 3)
    assert order == ["a0", "b0", "a1", "b1", "a2", "b2"]
    assert found == {name: [(name, 0), (name, 1), (name, 2)] for name in "ab"}


def test_a_program_is_measured(tmp_path, capsys):
    """Seconds of the process, its peak of memory in bytes, and what it printed; its failure is one of the bench."""
    (tmp_path / "ours.py").write_text("import sys, time\nx = bytearray(200_000_000)\ntime.sleep(0.3)\n"
                                      "print(sys.argv[1], file=sys.stderr)\nprint('done')\n")
    seconds, memory, printed = measure.measure(["ours.py", "hello"], tmp_path)
    # (Linux counts the memory of the process that starts it, too.)
    assert 0.3 < seconds and 200e6 < memory < 20e9 and sorted(printed.split()) == ["done", "hello"]
    (tmp_path / "bad.py").write_text("print('why')\nraise SystemExit(3)\n")
    with pytest.raises(UserError, match="bad.py failed"):
        measure.measure(["bad.py"], tmp_path)
    assert "why" in capsys.readouterr().err


def test_our_training_is_measured_with_the_rows_of_its_log(tmp_path, monkeypatch):
    def ran(command, folder):
        assert command == [measure.ROOT / "train.py", "--max_iters=2", "--device=cpu", "--out_dir=out/x"]
        os.makedirs(Path(folder, "out/x"))
        Path(folder, "out/x/log.jsonl").write_text('{"settings": {}}\n{"step": 1, "loss": 2.5}\n')
        return 1.5, 10, "text"
    monkeypatch.setattr(measure, "measure", ran)
    due = (1.5, 10, "text", [dict(step=1, loss=2.5)])
    assert measure.train_ours(["--max_iters=2"], tmp_path, "out/x") == due


def test_nanogpts_model_gets_our_weights_without_the_padding():
    ours = GPT(train.GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=10))
    theirs = torch.nn.ModuleDict(dict(transformer=torch.nn.ModuleDict(dict(wte=torch.nn.Embedding(10, 8)))))
    measure.start_from(theirs, ours)
    assert torch.equal(theirs.transformer.wte.weight, ours.transformer.wte.weight[:10])


# ---------- throughput


def settings(*argv):
    return load(train.TrainConfig, [str(argument) for argument in argv], presets=PRESETS, files=True)[0]


@pytest.mark.parametrize("name, parameters", [
    ("openllm-small, 4 x 512", 35_823_616 - 512 * 512), ("6 x 6 x 384, 16 x 256", 10_745_088),
    ("openllm-small, 12 x 1024", 35_823_616)])
def test_the_shapes_of_throughput_are_what_their_names_say(name, parameters):
    flags, batch_size, block_size, vocab_size = throughput.SHAPES[name]
    found = settings(*flags.split(), *throughput.COMMON.split(), f"--block_size={block_size}",
                     f"--vocab_size={vocab_size}")
    assert name.endswith(f", {batch_size} x {block_size}")
    with torch.device("meta"):
        assert GPT(found).n_params() == parameters
    small = resolve(train.GPTConfig(**PRESETS["openllm-small"] | dict(block_size=block_size)))
    assert (resolve(found) == small) == name.startswith("openllm-small")
    if not name.startswith("openllm-small"):
        assert name.startswith(f"{found.n_layer} x {found.n_head} x {found.n_embd},")
    assert (found.dropout, found.gradient_accumulation_steps, found.log_interval, found.dataset) == (0, 1, 1, "chars")


def test_throughput_leaves_out_the_first_steps_and_compares_round_by_round(monkeypatch):
    """Two rounds of six steps, of 2 x 16 = 32 tokens; the first five of each are slow, since they compile."""
    seconds, commands = iter([0.25, 1.0]), []

    def theirs(command, folder):
        commands.append(command)
        last = 1000 * next(seconds)
        lines = ["iter %d: loss 4.1, time %.2fms, mfu 1%%" % (i, 9000 if i < 5 else last) for i in range(6)]
        return 1.0, 300e6 + last, "\n".join(lines)

    def ours(argv, folder, out):
        commands.append(argv)
        rate = 256.0 if out == "out0" else 64.0
        lines = ["step | 1 tok/s, 3% of peak"] * 5 + [f"step | 9 tok/s, {40 if out == 'out0' else 50}% of peak"]
        rows = [dict(tokens_per_second=1.0)] * 5 + [dict(tokens_per_second=rate)]
        return 1.0, 200e6, "\n".join(lines), rows

    monkeypatch.setattr(throughput, "prepare_for_both", lambda peer, text, folder, vocab_size: ("peer", None))
    monkeypatch.setattr(throughput, "measure", theirs)
    monkeypatch.setattr(throughput, "train_ours", ours)
    row = throughput.compare("tiny", "--n_layer=1", 2, 16, 100, throughput.Settings(steps=6, repeats=2))
    assert row == ["tiny", "80 (32 to 128)", "160 (64 to 256)", "2.00 (2.00 to 2.00)", "45 (40 to 50)%",
                   "300 MB", "200 MB"]
    assert commands[0][-2:] == ["--compile=False", "--out_dir=out0"] and commands[0][0] == "train.py"
    assert commands[1][-2:] == ["--compile=True", "--vocab_size=100"] and "--max_iters=6" in commands[1]


# ---------- ablation


CHANGES = {
    "the recipe": {}, "learned positions instead of rope": dict(pos="learned"),
    "layernorm instead of rmsnorm": dict(norm="layernorm"), "gelu instead of swiglu": dict(mlp="gelu"),
    "without qk_norm": dict(qk_norm=False), "tied weights": dict(tie_weights=True),
    "adamw instead of muon": dict(optimizer="adamw"),
    "adamw at a rate of its own": dict(optimizer="adamw", learning_rate=0.003),
    "float32 instead of bfloat16": dict(dtype="float32")}


def test_a_switch_of_the_ablation_changes_what_its_name_says():
    recipe = dataclasses.asdict(settings(measure.ROOT / "config/train_small.py"))
    for name, switch in ablation.SWITCHES.items():
        found = dataclasses.asdict(settings(measure.ROOT / "config/train_small.py", *switch))
        changed = {key: value for key, value in found.items() if value != recipe[key]}
        assert changed == CHANGES[name], name
    assert ablation.SWITCHES.keys() == CHANGES.keys()


def test_the_ablation_compares_means_over_the_same_seeds(monkeypatch, capsys):
    asked = []

    def trained(argv, folder, out):
        asked.append(found := settings(*argv))
        bits = 1.5 + found.seed % 1337 / 10 + (found.pos == "learned") / 20
        rows = [dict(val_bpb=9.0, train_seconds=1.0), dict(val_bpb=bits, train_seconds=7.0 + found.seed % 7)]
        return 1.0, 1, "", rows
    monkeypatch.setattr(ablation, "train_ours", trained)
    ablation.main(ablation.Settings(steps=150, repeats=3, tiny=True), [])
    out = capsys.readouterr().out.split("\n")
    assert out[0].startswith("150 steps, 3 seeds, not compiled, ")
    assert out[3:5] == ["| the recipe | 1.6000 | 1.5000 to 1.7000 | +0.0000 | 8 |",
                        "| learned positions instead of rope | 1.6500 | 1.5500 to 1.7500 | +0.0500 | 8 |"]
    assert [found.seed for found in asked] == [1337, 1337, 1338, 1338, 1339, 1339]
    assert {(found.max_iters, found.eval_interval, found.compile) for found in asked} == {(150, 150, False)}


# ---------- loss, generate, serve


def test_loss_compares_whole_processes_round_by_round(monkeypatch, capsys):
    seconds = {"ours": iter([10.0, 20.0]), "theirs": iter([30.0, 40.0]), "compiled": iter([20.0, 20.0])}
    losses = {"out0": 1.8, "out1": 1.9}
    monkeypatch.setattr(loss, "prepare_for_both", lambda *_: ("peer", SimpleNamespace(folder="data")))
    monkeypatch.setattr(loss, "train_ours", lambda *_: (next(seconds["ours"]), 1, "", []))
    monkeypatch.setattr(loss, "measure", lambda argv, folder: (next(seconds[
        "compiled" if "--compile=True" in argv else "theirs"]), 1, ""))
    monkeypatch.setattr(loss.shutil, "copy", lambda *_: None)
    monkeypatch.setattr(loss, "validation_loss", lambda run, data: losses[run.replace("/ckpt.pt", "")[-4:]])
    loss.main(loss.Settings(compiled=True, repeats=2), ["text.txt"])
    assert capsys.readouterr().out.split("\n")[1:6] == [
        "| | seconds | loss | times as fast as nanoGPT |", "|---|---|---|---|",
        "| nanoGPT | 35.0 (30.0 to 40.0) | 1.9000 | 1.00 (1.00 to 1.00) |",
        "| ours | 15.0 (10.0 to 20.0) | 1.9000 | 2.50 (2.00 to 3.00) |",
        "| nanoGPT, --compile=True | 20.0 (20.0 to 20.0) | 1.9000 | 1.75 (1.50 to 2.00) |"]


def test_the_loss_is_that_of_the_whole_validation_split(tiny_run, monkeypatch):
    monkeypatch.chdir(tiny_run)
    data = measure.datasets.Dataset.open("data/words")
    found = loss.validation_loss("out/words", data)
    best = train.ckpt.load_checkpoint("out/words/best.pt")
    assert found == pytest.approx(best["val_loss"], abs=1e-5)


def test_generate_writes_as_many_tokens_as_it_says_and_divides_by_the_seconds(monkeypatch, capsys):
    times = iter([2.0, 4.0, 2.0, 4.0, 1.0, 8.0])  # int8 and float32, three rounds
    monkeypatch.setattr(generate, "find_spec", lambda name: None)
    monkeypatch.setattr(generate, "load_model", lambda path, device: (None, None, {}))
    monkeypatch.setattr(generate, "timeit", lambda write, number: (len(write()), next(times))[1])
    written = []
    real = GPT.generate
    monkeypatch.setattr(GPT, "generate", lambda self, idx, n, pick: written.append(
        (idx.size(1), n, len(found := list(real(self, idx, n, pick))))) or found)
    generate.main(generate.Settings(tiny=True, prompt=4, new_tokens=16), [])
    assert capsys.readouterr().out.split("\n")[1:5] == [
        "| | tokens/s | seconds | int8: times as fast |", "|---|---|---|---|",
        "| int8 | 8 (8 to 16) | 2.00 | 1.00 (1.00 to 1.00) |", "| float32 | 4 (2 to 4) | 4.00 | 2.00 (2.00 to 8.00) |"]
    assert written == [(4, 16, 16)] * 8


def test_clients_of_the_server_share_the_prompts_and_are_timed(monkeypatch):
    """Two clients, six prompts, an answer of 64 tokens for each, the first of them after half a second."""
    clock, asked = iter(range(100)), []

    class Connection:
        def __init__(self, host, port):
            assert (host, port) == ("127.0.0.1", 77)

        def request(self, method, path, body, headers):
            asked.append(body)

        def getresponse(self):
            return SimpleNamespace(readline=lambda: b"data: {}\n", read=lambda: b'"completion_tokens": 64')

        def close(self):
            pass
    monkeypatch.setattr(serve.http.client, "HTTPConnection", Connection)
    monkeypatch.setattr(serve, "time", SimpleNamespace(perf_counter=lambda: next(clock) / 2))
    rate, firsts = serve.ask(77, 1, [[1], [2], [3]])
    assert firsts == [0.5, 0.5, 0.5] and rate == 3 * 64 / 3.5  # eight looks at the clock, half a second apart
    assert len(asked) == 3 and '"prompt": [2]' in asked[1] and '"max_tokens": 64' in asked[1]
    monkeypatch.setattr(Connection, "getresponse", lambda self: SimpleNamespace(
        readline=lambda: b"error", read=lambda: b""))
    with pytest.raises(UserError, match="the server failed: b'error'"):
        serve.ask(77, 1, [[1]])


def test_the_speed_benches_need_what_they_compare_with(here):
    (here / "words.txt").write_text(words(3000), encoding="utf-8")
    for bench in (loss, throughput):
        assert "--peer='nowhere' is not a nanoGPT folder" in error(
            lambda _: bench.main(bench.Settings(peer="nowhere", tiny=True), ["words.txt"]))[0]
    assert "steps=3" in error(lambda _: throughput.main(throughput.Settings(steps=3), []))[0]

# SPDX-License-Identifier: GPL-3.0-only
"""The loop: the same bits after a stop, a log without gaps, and an answer to everything that people type."""
import contextlib
import json
import math
import os
import pathlib
import re
import shutil
import xml.etree.ElementTree

import pytest
import torch
from conftest import ROOT, TINY, error, talks, words, write_talks
from faults import Run, assert_same_run, said

from runtime import machine
import dataset as datasets
import prepare
from training import checkpoint as ckpt
import sample
import train

TIMES = {"train_seconds", "wall_seconds", "tokens_per_second", "memory"}


def log(run):
    header, *rows = [json.loads(line) for line in open(f"{run}/log.jsonl", encoding="utf-8")]
    return header, [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


@pytest.fixture
def data(here):
    """data/words in a fresh current folder."""
    (here / "words.txt").write_text(words(8000), encoding="utf-8")
    prepare.main(["words.txt", "--tokenizer=char"])
    return here


def run(*argv):
    return train.main(["--dataset=words", *TINY, *argv])


HARD = ["--dropout=0.1", "--gradient_accumulation_steps=2", "--optimizer=muon", "--warmup_iters=5",
        "--weight_decay=0.1", "--lr_decay_iters=20", "--save_interval=3", "--eval_interval=4"]


def test_20_steps_equal_10_and_10(data):
    run("--out_dir=a", "--max_iters=20", *HARD)
    run("--out_dir=b", "--max_iters=10", *HARD)
    run("--out_dir=b", "--max_iters=20", *HARD)
    assert_same_run("a", "b", 20)
    assert [row["step"] for row in log("b")[1]] == list(range(1, 21))


@pytest.mark.timeout(900)  # two runs are compiled
def test_the_recipe_of_the_readme_resumes_bit_for_bit(data):
    """bfloat16 (where the processor has it), compiled, Muon: in two processes, the second from what the first had saved."""
    small = [str(ROOT / "config/train_small.py"), "--dataset=words", "--eval_iters=2", "--eval_interval=5",
             "--log_interval=1", "--compile=true", "--n_layer=1", "--n_embd=64", "--block_size=64", "--batch_size=4",
             "--max_iters=10"]
    assert Run(data, *small, "--out_dir=a", settings=[]).wait(timeout=240) == 0, said(data)
    shutil.copytree("a", "b")
    os.unlink("b/ckpt_00000010.pt")
    assert Run(data, *small, "--out_dir=b", settings=[]).wait(timeout=240) == 0, said(data)
    assert "resumed b after 5 of 10 steps" in said(data)
    assert_same_run("a", "b", 10)
    assert log("a")[0]["chosen"]["compile"] is True


def test_a_finished_run_is_left_alone(data, capsys):
    run("--max_iters=10")
    def files():
        return {path: (os.stat(path).st_mtime_ns, path.read_bytes()) for path in pathlib.Path("out/words").rglob("*.*")}
    before = files()
    assert run("--max_iters=10") == 0
    assert "out/words is finished: 10 steps" in capsys.readouterr().err
    assert before == files()


def content(folder):
    return {path: path.read_bytes() for path in pathlib.Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("left", [["best.pt", "log.jsonl", "loss.svg", "tokenizer"], ["best.pt", "tokenizer"]])
def test_a_run_that_lost_its_checkpoints_is_not_begun_anew(data, left):
    """A copied run, the folder that a server reads, an export in 8 bits."""
    run("--max_iters=10")
    for name in set(os.listdir("out/words")) - set(left):
        os.unlink(f"out/words/{name}")
    before = content("out/words")
    for argv in ([], ["--init_from=scratch"], ["--seed=2"]):
        fact, fix = error(lambda _: run("--max_iters=10", *argv))
        assert "out_dir=out/words holds best.pt, but no run to continue" in fact and "--out_dir=" in fix
    assert content("out/words") == before
    assert run("--max_iters=3", "--out_dir=out/more", "--init_from=out/words", "--learning_rate=1e-3") == 0


@pytest.mark.parametrize("files", [["notes.txt"], ["log.jsonl"], ["tokenizer/config.json"], ["draft.part"]])
def test_a_run_is_not_begun_among_the_files_of_others(data, files):
    for name in files:
        path = pathlib.Path("mine", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine\n")
    before = content(".")
    assert f"out_dir=mine holds {files[0].split('/')[0]}" in error(lambda _: run("--out_dir=mine"))[0]
    assert "out_dir=data/words holds meta.json" in error(lambda _: run("--out_dir=data/words"))[0]
    assert content(".") == before


def test_a_run_deletes_nothing_that_it_did_not_write(data):
    os.makedirs("out/words")
    pathlib.Path("out/words/.hidden").write_text("mine")
    run("--max_iters=10")
    mine = {f"out/words/{name}": "mine" for name in (".hidden", "draft.part", "notes.txt", "tokenizer.txt")}
    for name, text in mine.items():
        pathlib.Path(name).write_text(text)
    pathlib.Path("out/words/ckpt_00000020.pt.part").write_text("half a checkpoint, from a kill")
    run("--max_iters=20")
    assert {name: pathlib.Path(name).read_text() for name in mine} == mine
    assert not os.path.exists("out/words/ckpt_00000020.pt.part")


def test_a_run_stopped_before_its_first_checkpoint_begins_again(data):
    os.makedirs("out/words")
    header = dict(settings=train.asdict(train.TrainConfig()))
    pathlib.Path("out/words/log.jsonl").write_text(json.dumps(header) + "\n" + '{"step": 1, "loss": 3.5}\n')
    before = content("out")
    fact, fix = error(lambda _: run("--max_iters=3"))
    assert "n_layer=12" in fact and "n_layer=2" in fact and content("out") == before
    pathlib.Path("out/words/log.jsonl").write_text(json.dumps(header) + "\n")  # no step was made: nothing to lose
    run("--max_iters=3")
    assert log("out/words")[0]["settings"]["n_layer"] == 2


def test_best_pt_never_stands_alone(data):
    """Whatever the intervals are, a kill leaves no best.pt without a checkpoint to continue from."""
    run("--max_iters=10", "--eval_interval=4", "--save_interval=100", "--always_save_checkpoint=false")
    assert os.path.exists("out/words/ckpt_00000004.pt") and not os.path.exists("out/words/ckpt_00000008.pt")


def test_a_run_that_ends_worse_than_guessing_says_so(data, capsys, monkeypatch):
    monkeypatch.setattr(datasets, "validation_sums", lambda *_: (3088.0, 1))
    assert run("--max_iters=2") == 0
    said = capsys.readouterr().err
    assert "the run has diverged, worse than guessing (3.22)" in said  # ln 25
    monkeypatch.setattr(datasets, "validation_sums", lambda *_: (math.inf, 1))
    with pytest.raises(train.UserError, match="the validation loss after 3 steps is inf") as caught:
        run("--max_iters=3")
    assert caught.value.code == 3


def test_links_in_the_folder_of_a_run_lead_nowhere(data):
    run("--max_iters=10")
    pathlib.Path("precious").write_text("mine")
    for name in ("log.jsonl", "loss.svg", "best.pt", "ckpt_00000020.pt"):
        os.symlink("../../precious", f"out/words/{name}.part")
    run("--max_iters=20")
    assert pathlib.Path("precious").read_text() == "mine" and not os.path.islink("out/words/log.jsonl")


def test_what_can_be_pasted_is_quoted(data, capsys):
    out = "my run; touch x"
    run("--max_iters=2", f"--out_dir={out}")
    assert f"next: python sample.py '{out}'\n" in capsys.readouterr().err
    os.unlink(f"{out}/ckpt_00000002.pt")
    assert "holds best.pt" in error(lambda _: run(f"--out_dir={out}"))[0]
    os.unlink(f"{out}/best.pt")
    assert f"--out_dir='{out}'" in error(sample.main, out)[1]


def test_what_kind_of_data_is_read(data, capsys):
    run("--max_iters=1")
    assert "data: data/words, text, 7,599 tokens from words.txt" in capsys.readouterr().err
    write_talks("talk.jsonl", talks(40))
    prepare.main(["talk.jsonl", "--format=chat", "--tokenizer=char", "--out=data/talk"])
    train.main(["--dataset=talk", *TINY, "--max_iters=1"])
    assert re.search(r"data: data/talk, conversations, loss on [\d,]+ of [\d,]+ tokens from talk.jsonl", capsys.readouterr().err)


def test_what_a_run_leaves(data, capsys):
    run("--max_iters=25", "--warmup_iters=2")
    files = sorted(os.listdir("out/words"))
    assert files == ["best.pt", "ckpt_00000020.pt", "ckpt_00000025.pt", "log.jsonl", "loss.svg", "tokenizer"]
    header, rows = log("out/words")
    assert header["settings"]["max_iters"] == 25 and header["versions"]["torch"] == torch.__version__
    assert header["chosen"]["dtype"] == "float32" and header["data"]["vocab_size"] == 25
    assert [row["step"] for row in rows] == list(range(1, 26)) and rows[-1]["tokens"] == 25 * 4 * 32
    validated = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    assert list(validated) == [10, 20, 25] and validated[25] < validated[10] < math.log(25)
    # The validation loss once more, from the file alone.
    best = ckpt.load_checkpoint("out/words/best.pt")
    assert best["val_loss"] == min(validated.values()) == validated[best["step"]]
    model, tokenizer, _ = ckpt.load_run("out/words")
    ids = torch.from_numpy(__import__("numpy").fromfile("data/words/val.bin", "<u2").astype("int64"))
    nats = sum(torch.nn.functional.cross_entropy(model(ids[None, i:i + 32])[0][:len(ids) - 1 - i], ids[i + 1:i + 33],
                                                 reduction="sum").item() for i in range(0, len(ids) - 1, 32))
    assert best["val_loss"] == pytest.approx(nats / (len(ids) - 1), abs=1e-4)
    assert best["val_bpb"] == pytest.approx(nats / math.log(2) / (len(tokenizer.decode(ids.tolist()))), abs=1e-4)
    xml.etree.ElementTree.parse("out/words/loss.svg")
    shown = capsys.readouterr()
    assert "of peak" in shown.err and "next: python sample.py out/words" in shown.err and len(shown.out) > 50


def test_a_missing_built_in_data_set_is_prepared(here, capsys):
    assert train.main([*TINY, "--max_iters=1", "--eval_iters=1"]) == 0
    shown = capsys.readouterr().err
    assert "data/stdlib is missing; preparing it" in shown and "tokens from stdlib of Python 3" in shown


def test_nanogpt_settings_mean_what_they_meant(data):
    """Every name of a nanoGPT config file, in a file without a word of ours."""
    pathlib.Path("theirs.py").write_text("""
out_dir = 'out-words'
eval_interval = 5
log_interval = 1
eval_iters = 2
eval_only = False
always_save_checkpoint = False
init_from = 'scratch'
wandb_log = False
wandb_project = 'p'
wandb_run_name = 'r'
dataset = 'words'
gradient_accumulation_steps = 1 * 2
batch_size = 4
block_size = 32
n_layer = 1
n_head = 2
n_embd = 16
dropout = 0.2
bias = False
learning_rate = 1e-3
max_iters = 6
weight_decay = 1e-1
beta1 = 0.9
beta2 = 0.99
grad_clip = 1.0
decay_lr = True
warmup_iters = 2
lr_decay_iters = 6
min_lr = 1e-4
backend = 'nccl'
device = 'cpu'
dtype = 'float32'
compile = False
""")
    assert train.main(["theirs.py"]) == 0
    rates = [row["lr"] for row in log("out-words")[1]]
    due = [1e-3 / 3, 2e-3 / 3] + [1e-4 + 9e-4 * 0.5 * (1 + math.cos(math.pi * (i - 2) / 4)) for i in range(2, 6)]
    assert rates == pytest.approx(due)


def test_start_from_another_run(data, capsys):
    run("--out_dir=a", "--max_iters=30", "--warmup_iters=2")
    last = log("a")[1][-1]["loss"]
    again = ["--dataset=words", "--init_from=a", "--out_dir=b", "--max_iters=3", "--warmup_iters=0", "--device=cpu",
             "--learning_rate=1e-5", "--batch_size=8", "--dropout=0.1", "--compile=false"]
    assert train.main(again) == 0
    header, rows = log("b")
    assert header["settings"]["n_embd"] == 32 and header["settings"]["block_size"] == 32  # it came with the weights
    assert rows[0]["loss"] < last + 0.3
    assert train.main(again) == 0 and "b is finished: 3 steps" in capsys.readouterr().err
    fact, fix = error(train.main, "--dataset=words", "--init_from=a", "--out_dir=c", "--n_embd=64")
    assert "n_embd=32" in fact and "n_embd=64" in fact
    (data / "other.txt").write_text("quite another alphabet: 0123456789\n" * 100)
    prepare.main(["other.txt", "--tokenizer=char"])
    fact, fix = error(train.main, "--dataset=other", "--init_from=a", "--out_dir=c")
    assert "a and data/other use different tokenizers" in fact and "--tokenizer=a" in fix
    assert not os.path.exists("c")


def test_compile_falls_back_or_says_why(data, monkeypatch, capsys):
    def broken(*args, **kw):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found in ...\n\nSet TORCHDYNAMO_VERBOSE=1")
    stance = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: None)
    monkeypatch.setattr(torch, "compile", broken)
    real = torch.compiler.set_stance
    monkeypatch.setattr(torch.compiler, "set_stance", lambda name: stance.append(name) or real(name))
    with pytest.raises(train.UserError, match="torch.compile needs a C\\+\\+ compiler, such as g\\+\\+"):
        run("--max_iters=2", "--compile=true")
    monkeypatch.setattr(machine, "measure_peak", lambda *_: 1.0)  # such a slow machine that compiling seems worth it
    assert run("--max_iters=2", "--compile=auto") == 0
    said = capsys.readouterr().err
    assert "note: torch.compile needs a C++ compiler, such as g++; continuing without it" in said
    assert stance[0] == "force_eager"


# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("junk", [
    b"junk\n", b'{"step": 3, "loss": NaN}\n', b'{"step": 2, "loss": 1.0}\n', b"\0" * 50 + b"\n", b'{"st'])
def test_a_log_with_junk_in_it_does_not_hold_up_a_run(data, junk):
    run("--max_iters=3")
    with open("out/words/log.jsonl", "ab") as file:
        file.write(junk)
    run("--max_iters=5")
    assert [row["step"] for row in log("out/words")[1]] == [1, 2, 3, 4, 5]


def test_memory_that_may_not_be_enough_is_warned_of(data, monkeypatch, capsys):
    """(The numbers are in test_model.py.)"""
    monkeypatch.setattr(machine, "free_memory", lambda device: 1e5)
    run("--max_iters=1", "--eval_only")
    assert "warning: this may not fit; halve --batch_size and double --gradient_accumulation_steps" in capsys.readouterr().err


def test_a_run_that_learns_by_heart_is_warned(data, capsys):
    run("--max_iters=1500", "--eval_only")
    said = capsys.readouterr().err
    assert "warning: 1,500 steps read this text 25 times" in said and "--max_iters=" in said


@pytest.mark.parametrize("argument, words", [
    ("--learning_rate=inf", "learning_rate=inf"), ("--rope_theta=0", "rope_theta"),
    ("--block_size=100000", "block_size=100000 needs at least 100001"), ("--n_embd=33", "n_embd=33"),
    ("--vocab_size=7", "vocab_size=7"), ("--max_iters=0", "max_iters=0"),
    ("--batch_size=0", "batch_size=0"),
    ("--learning_rate=0", "learning_rate=0.0"), ("--grad_clip=-1", "grad_clip=-1.0"), ("--budget=soon", "'soon'"),
    ("--budget=5", "'5'"), ("--budget=-3m", "'-3m'"),
    ("--dataset=nothing", "data/nothing"), ("--init_from=nowhere", "nowhere"),
    ("--init_from=gpt2-xl", "openai-community/gpt2-xl"), ("--init_from=resume", "holds no checkpoint"), ("--dtype=int8", "'int8'"),
    ("--optimizer=sgd", "'sgd' is not adamw or muon"), ("--eval_interval=0", "eval_interval=0"),
    ("--dropout=1", "dropout=1.0"), ("--beta2=1", "beta2=1.0"), ("--n_inner=-1", "n_inner=-1"),
    ("--device=cpux", "'cpux'"),
    ("--out_dir=words.txt", "out_dir=words.txt"), ("--n_kv_head=3", "n_kv_head=3")])
def test_what_people_get_wrong(data, argument, words):
    fact, fix = error(lambda argv: run(*argv), argument)
    assert words in fact, fact
    assert not os.path.exists("out")


def test_no_cuda_no_traceback(data):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    fact, fix = error(lambda argv: run(*argv), "--device=cuda")
    assert "--device=cuda" in fact and torch.__version__ in fact and "--device=auto" in fix


def test_a_run_is_not_mixed_with_another(data):
    run("--max_iters=10")
    assert "ckpt_00000010.pt" in error(lambda argv: run(*argv), "--init_from=scratch")[0]
    assert "init_from=auto, not init_from=elsewhere" in error(lambda argv: run(*argv), "--init_from=elsewhere")[0]
    for argument, both in (("--n_embd=64", ["n_embd=32", "n_embd=64"]), ("--seed=3", ["seed=1337", "seed=3"]),
                           ("--beta1=0.5", ["beta1=0.9", "beta1=0.5"]),
                           ("--max_iters=5", ["max_iters=5", "10 steps"])):
        fact, fix = error(lambda argv: run(*argv), argument)
        assert all(value in fact for value in both), fact
    (data / "words.txt").write_text(words(8000, seed=1))
    prepare.main(["words.txt", "--tokenizer=char"])
    assert "data=" in error(lambda argv: run(*argv), "--max_iters=20")[0]


def test_a_learning_rate_given_by_hand_may_change(data, capsys):
    run("--max_iters=5", "--decay_lr=false", "--warmup_iters=2")
    capsys.readouterr()
    run("--max_iters=7", "--decay_lr=false", "--warmup_iters=2", "--learning_rate=1e-3")
    assert "note: learning_rate=0.001 from step 5 on; it was 0.01" in capsys.readouterr().err
    assert [row["lr"] for row in log("out/words")[1]][-4:] == [0.01, 0.01, 0.001, 0.001]
    # What stands in a config file is not by hand: it belongs to another run.
    (data / "other.py").write_text("learning_rate = 0.5\n")
    by_file = [argument for argument in TINY if "learning_rate" not in argument]
    fact, _ = error(train.main, "other.py", "--dataset=words", *by_file, "--decay_lr=false", "--warmup_iters=2")
    assert "learning_rate=0.001" in fact and "learning_rate=0.5" in fact


def test_a_disk_too_full_for_the_first_checkpoint_leaves_no_best_pt(data, monkeypatch):
    def full(path, state):
        raise ckpt.UserError(f"cannot write {path}: No space left on device", "free disk space", code=1)

    with monkeypatch.context() as patch:
        patch.setattr(ckpt, "save_checkpoint", full)
        error(lambda _: run("--max_iters=20"))
    assert not os.path.exists("out/words/best.pt")
    assert run("--max_iters=20") == 0


def test_a_text_that_was_learned_by_heart_is_not_called_diverged(data, capsys, monkeypatch):
    monkeypatch.setattr(datasets, "validation_sums", lambda *_: (9.0, 1))
    real = train.Run.record
    monkeypatch.setattr(train.Run, "record", lambda run, loss, *rest: real(run, loss / 10, *rest))
    run("--max_iters=2")
    said = capsys.readouterr().err
    assert "the model memorised the text" in said and "diverged" not in said


def test_where_the_learning_rate_ends_is_said(data, capsys):
    run("--max_iters=5")
    run("--max_iters=9")
    assert "the learning rate now decays until step 9, not 5" in capsys.readouterr().err


def test_float16_that_always_overflows_ends_the_run(data, monkeypatch):
    """Four steps in a row are skipped, which leaves the weights alone. (test_processes.py has real overflows.)"""
    real, norms = torch.nn.utils.clip_grad_norm_, []

    def overflowing(parameters, limit):
        norms.append(real(parameters, limit))
        return torch.tensor(math.inf) if len(norms) >= 4 else norms[-1]
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", overflowing)
    monkeypatch.setattr(machine, "choose_dtype", lambda *_: (torch.float16, "for the test"))
    monkeypatch.setattr(machine, "autocast", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(train, "MAX_SKIPPED", 3)
    with pytest.raises(train.UserError) as caught:
        run("--max_iters=20", "--save_interval=1")
    assert caught.value.code == 3 and "gradient norm inf" in caught.value.fact and "step 7 " in caught.value.fact
    five, six = (ckpt.load_checkpoint(f"out/words/ckpt_{step:08d}.pt") for step in (5, 6))
    assert all(torch.equal(five["model"][name], six["model"][name]) for name in five["model"])
    assert five["row"]["grad_norm"] == -1.0


def test_best_is_never_replaced_by_a_worse_one(data, monkeypatch):
    losses = iter([3.0, 2.0, 2.5])  # at 4, 6 (the end), and at 8 of the longer run
    monkeypatch.setattr(datasets, "validation_sums", lambda *_: (next(losses), 1))
    run("--max_iters=6", "--eval_interval=4", "--lr_decay_iters=8")
    run("--max_iters=8", "--eval_interval=4", "--lr_decay_iters=8")
    best = ckpt.load_checkpoint("out/words/best.pt")
    assert (best["step"], best["val_loss"]) == (6, 2.0)


def test_eval_only(data, capsys):
    run("--max_iters=10")
    capsys.readouterr()
    before = sorted(os.listdir("out/words"))
    assert run("--max_iters=10", "--eval_only") == 0
    due = log("out/words")[1][-1]["val_loss"]
    said = capsys.readouterr().err
    assert "resumed out/words after 10 of 10 steps" in said and f"validation loss {due:.4f}, " in said
    assert sorted(os.listdir("out/words")) == before
    assert run("--out_dir=out/none", "--eval_only") == 0 and not os.path.exists("out/none")

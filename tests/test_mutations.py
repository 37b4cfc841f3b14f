# SPDX-License-Identifier: GPL-3.0-only
"""Damaged and malicious files: whatever is in them, there is a result or one error, soon and in bounded memory.

Each case is a valid file that was changed at random. Its kind and its number are the seed, so it can be repeated.
"""
import faulthandler
import json
import os
import random
import resource
import shutil
import struct
import traceback

import pytest
import torch
from conftest import FAMILIES, GPT2, chdir, package, random_model, talks, turns, words, write_talks
from faults import context

from text import pretrained
from runtime import console
import dataset as datasets
from formats import huggingface
import prepare
import sample
import tokenizer as tokenizers

SECONDS, MEMORY = 10, 1 << 30  # the limits of a case: time, and memory beyond what the process takes anyway
CASES = 100  # of one process


# ---------------------------------------------------------------------------------------------------------------------
# Mutations

VALUES = [None, True, -1, 0, 0.5, 10**7, 2**31, 10**18, 10**400, 1e308, float("nan"), "", "\ud800", "a/../b", [], {},
          "DEEP", "LONG"]


def places(value, path=()):
    """The paths of everything in lists and dicts."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield from places(item, (*path, key))


def change(value, rng):
    """Replace, delete or copy something in lists and dicts."""
    depth = rng.randrange(1, 6)  # (else most places are those of a vocabulary, where there is one)
    *parents, key = rng.choice([path for path in places(value) if 0 < len(path) <= depth] or [(None,)])
    if key is None:
        return rng.choice(VALUES)
    owner = value
    for step in parents:
        owner = owner[step]
    others = list(owner.values()) if isinstance(owner, dict) else owner
    action = rng.choice(["replace"] * 3 + ["delete", "swap", "number"])
    if action == "delete":
        del owner[key]
    elif action == "swap":
        owner[key] = rng.choice(others)
    elif action == "number" and type(owner[key]) in (int, float):
        n = owner[key]
        owner[key] = rng.choice([n + 1, n * 10**6, -n, n / 2, str(n)] if abs(n) < 10**18 else [-n, str(n)])
    else:
        owner[key] = rng.choice(VALUES)
    return value


def dump(value):
    text = json.dumps(value)
    return text.replace('"DEEP"', "[" * 100_000 + "]" * 100_000).replace('"LONG"', json.dumps("x" * 300_000)).encode()


def flip(raw, rng):
    """Change, delete or copy bytes, or cut the end off."""
    raw = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, n = rng.randrange(len(raw) + 1), rng.choice((1, 1, 2, 9, 100))
        action = rng.randrange(4)
        if action == 0:
            raw[at:at + 1] = bytes([rng.randrange(256)])
        elif action == 1:
            del raw[at:at + n]
        elif action == 2:
            raw[at:at] = raw[at:at + n]
        elif rng.random() < 0.3:
            del raw[at:]
    return bytes(raw)


def mutate(path, rng):
    """Change a file at random: as what it is where that is known, else its bytes."""
    raw, structured = path.read_bytes(), rng.random() < 0.7
    times = rng.choice((1, 1, 1, 2, 3))
    if not structured:
        raw = flip(raw, rng)
    elif path.suffix == ".json":
        value = json.loads(raw)
        for _ in range(times):
            value = change(value, rng)
        raw = dump(value)
    elif path.suffix == ".jsonl":
        lines = raw.splitlines()
        for _ in range(times):
            at = rng.randrange(len(lines))
            try:
                lines[at] = dump(change(json.loads(lines[at]), rng)) if rng.random() < 0.7 else flip(lines[at], rng)
            except (ValueError, RecursionError):  # it is no JSON any more
                lines[at] = flip(lines[at], rng)
        raw = b"\n".join(lines)
    elif path.suffix == ".safetensors":
        size, = struct.unpack("<Q", raw[:8])
        header, tensors = raw[8:8 + size], raw[8 + size:]
        header = dump(change(json.loads(header), rng)) if rng.random() < 0.7 else flip(header, rng)
        size = rng.choice([len(header)] * 8 + [0, size + 1, 1 << 40, (1 << 64) - 1])
        raw = struct.pack("<Q", size) + header + tensors
    elif path.suffix == ".pt":
        state = torch.load(path, weights_only=True)
        for _ in range(times):
            state = change(state, rng) if isinstance(state, dict) else state
        torch.save(state, path)
        return
    else:
        raw = flip(raw, rng)
    path.write_bytes(raw)


# ---------------------------------------------------------------------------------------------------------------------
# The files, and who reads them


def hugging_face_tokenizer(folder):
    """A small byte-level tokenizer.json with all that is read of one."""
    alphabet = list(pretrained.byte_alphabet())
    merges = [("t", "h"), ("th", "e"), ("\u0120", "the"), ("a", "t"), ("c", "at")]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges), "unused"])}
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    added = [dict(plain, id=262, content="<|endoftext|>", special=True), dict(plain, id=263, content="<think>",
             special=False), dict(plain, id=264, content="<|im_end|>", special=True)]
    steps = [dict(type="Split", pattern=dict(Regex=r" ?\p{L}+|\s+"), behavior="Isolated", invert=False),
             dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)]
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    spec = dict(added_tokens=added, normalizer=dict(type="NFC"),
                model=dict(type="BPE", vocab=vocabulary, merges=merges),
                pre_tokenizer=dict(type="Sequence", pretokenizers=steps))
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(
        eos_token=dict(content="<|im_end|>"), bos_token="<|endoftext|>", chat_template=template)))


@pytest.fixture(scope="session")
def valid(tiny_run, tmp_path_factory):
    """A folder with one of everything."""
    package("safetensors")
    here = tmp_path_factory.mktemp("valid")
    shutil.copytree(tiny_run / "out/words", here / "run")
    shutil.copytree(tiny_run / "data/words", here / "data/words")
    os.unlink(here / "run/ckpt_00000040.pt")
    for name, shape in (("gpt2", FAMILIES["gpt2"]), ("llama", FAMILIES["llama"])):
        characters = tokenizers.CharTokenizer("abc")
        huggingface.write(str(here / name), random_model(vocab_size=265, **shape), characters)
        shutil.rmtree(here / name / "tokenizer")
        hugging_face_tokenizer(here / name)
    text = [words(3000)]
    for kind in tokenizers.LEARNED:
        tokenizers.train(kind, text, 300).save(here / kind)
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256, b"the": 257}
    (here / "tiktoken").mkdir()
    (here / "tiktoken/config.json").write_text(json.dumps(dict(kind="tiktoken", vocab_size=259, special={})))
    (here / "tiktoken/encoding.json").write_text(json.dumps(dict(
        name="t", pattern=GPT2, special={"<|endoftext|>": 258})))
    (here / "tiktoken/encoding.tiktoken").write_bytes(b"".join(
        pretrained.base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    write_talks(here / "chats.jsonl", talks(12))
    with chdir(here):
        prepare.main(["chats.jsonl", "--format=chat", "--tokenizer=char", "--out=data/chats"])
    return here


def read_model(path):
    sample.main([str(path.parent), "--prompt=the cat", "--max_new_tokens=2", "--device=cpu"])


def read_tokenizer(path):
    tokenizer = tokenizers.load_from(str(path.parent))
    for text in ("the cat", "a <think>\u00e9\n\n  \0\u2581"):
        try:
            ids = tokenizer.encode(text)
        except console.UserError:  # (a vocabulary of characters)
            continue
        tokenizer.decode([*ids, 0, tokenizer.vocab_size - 1])
    tokenizers.ends(tokenizer)
    tokenizer.chat(turns("the cat"))
    tokenizer.conversation(turns("the cat", "a dog"))


def read_data(path):
    folder = str(path.parent)
    data = datasets.Dataset.open(folder)
    data.load_tokenizer()
    data.check(16)
    data.batch(16, 2, 1, 0)
    data.bits_per_byte(float(data.val_batch(0, 16, 2)[1].sum()))
    datasets.inspect(folder)


def read_chats(path):
    prepare.main([str(path), "--format=chat", "--tokenizer=char", "--out=made"])


KINDS = {  # the files of which one is changed, and the reader
    "config": (["gpt2/config.json", "llama/config.json", "llama/generation_config.json"], read_model),
    "tokenizer": (["gpt2/tokenizer.json"] * 3 + ["gpt2/tokenizer_config.json"], read_tokenizer),
    "safetensors": (["gpt2/model.safetensors", "llama/model.safetensors"], read_model),
    "checkpoint": (["run/best.pt"], read_model),
    "meta": (["data/words/meta.json", "data/chats/meta.json"], read_data),
    "chats": (["chats.jsonl"], read_chats),
    "ours": (["char/config.json", "char/vocab.json", "bpe/config.json", "bpe/tokenizer.model",
              "unigram/tokenizer.model", "tiktoken/config.json", "tiktoken/encoding.json",
              "tiktoken/encoding.tiktoken"], read_tokenizer)}


def attempt(kind, number, valid, here):
    """One case. Raises what its reader raises but for UserError."""
    files, read = KINDS[kind]
    rng = random.Random(f"{kind} {number}")
    path = here / rng.choice(files)
    original = valid / path.relative_to(here)
    shutil.copyfile(original, path)
    mutate(path, rng)
    try:
        read(path)
    except console.UserError as problem:
        assert problem.fact and problem.fix
    finally:
        shutil.copyfile(original, path)


def child(kind, numbers, valid, here):
    """Cases one after the other, in a process with limits; what goes wrong is written to the file `report`."""
    torch.set_num_threads(1)
    os.chdir(here)
    report, silence = open("report", "w", encoding="utf-8"), os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    with open("/proc/self/status", encoding="utf-8") as file:
        taken = next(int(line.split()[1]) << 10 for line in file if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (taken + MEMORY, taken + MEMORY))
    for number in numbers:
        with open("current", "w", encoding="utf-8") as file:
            file.write(str(number))
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=report)
        try:
            attempt(kind, number, valid, here)
        except BaseException:  # a panic of Rust, too
            report.write(f"--- {kind} {number}\n{traceback.format_exc()[-3000:]}\n")
        faulthandler.cancel_dump_traceback_later()
        report.flush()
    os._exit(0)


def run(kind, count, valid, tmp_path):
    """What went wrong in so many cases, as a text."""
    wrong, number = "", 0
    shutil.copytree(valid, here := tmp_path / "here")
    while number < count:
        process = context().Process(target=child, args=(kind, range(number, min(number + CASES, count)), valid, here))
        process.start()
        process.join(60 + SECONDS * CASES)
        if process.exitcode is None:
            process.kill()
            process.join()
        wrong += (here / "report").read_text(encoding="utf-8")
        if process.exitcode:  # it hung, or the process came to its end
            last = (here / "current").read_text()
            return f"{wrong}--- {kind} {last}: the process ended with {process.exitcode}\n"
        number += CASES
    return wrong


@pytest.mark.parametrize("kind", KINDS)
def test_some_mutations(valid, tmp_path, kind):
    assert not (wrong := run(kind, 24, valid, tmp_path)), wrong


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_thousand_mutations(valid, tmp_path, kind):
    assert not (wrong := run(kind, 2000, valid, tmp_path)), wrong

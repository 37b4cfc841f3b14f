# SPDX-License-Identifier: GPL-3.0-only
"""Safetensors without the package: the same bytes as it writes, and whatever is wrong with a file is one line."""
import json
import math
import os
import random
import struct

import pytest
import torch
from conftest import error, package

from formats import safetensors
from runtime.console import UserError

theirs = package("safetensors.torch")
SafetensorError = package("safetensors").SafetensorError


def tensors():
    """One of each dtype, with no number, one, and many; names that JSON has to escape."""
    torch.manual_seed(0)
    found = {f"of {name}": torch.arange(n).to(dtype) for n, (name, dtype) in enumerate(safetensors.DTYPES.items())}
    return found | {"b": torch.randn(3, 4), "a": torch.randn(5, 2).bfloat16(), 'é "\\\n🙂': torch.randn(2, 3).half(),
                    "scalar": torch.tensor(3.5), "none": torch.zeros(0, 4), "turned": torch.randn(4, 3).T}


def parts(raw):
    """(header, numbers) of a file's bytes."""
    n = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:8 + n]), raw[8 + n:]


def write(header, numbers, path="x", pad=" "):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + numbers)


def test_the_bytes_are_those_of_the_package(here):
    made = tensors()
    safetensors.write("ours", made)
    theirs.save_file({name: tensor.contiguous() for name, tensor in made.items()}, "theirs", metadata={"format": "pt"})
    assert (here / "ours").read_bytes() == (here / "theirs").read_bytes()
    for found in (safetensors.read("theirs"), theirs.load_file("ours")):
        assert found.keys() == made.keys()
        assert all(found[name].dtype == made[name].dtype and torch.equal(found[name], made[name]) for name in made)


def test_what_is_read_is_mapped_and_not_written_back(here):
    safetensors.write("a", tensors())
    before = (here / "a").read_bytes()
    found = safetensors.read("a")
    found["b"].zero_()
    assert found["b"].abs().max() == 0 and (here / "a").read_bytes() == before
    assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) == 1  # one file, one memory
    (here / "a").unlink()
    assert torch.equal(found["scalar"], torch.tensor(3.5))


@pytest.mark.parametrize("spaces", range(8))
def test_a_header_of_any_length(here, spaces):
    """Not every writer pads it, so that numbers may begin anywhere."""
    made = tensors()
    safetensors.write("a", made)
    header, numbers = parts((here / "a").read_bytes())
    write(json.dumps(header).encode() + b" " * spaces, numbers)
    found = safetensors.read("x")
    assert all(torch.equal(found[name], made[name]) for name in made)


def f32(start, end, *shape):
    return dict(dtype="F32", shape=list(shape), data_offsets=[start, end])


@pytest.mark.parametrize("header, said", [
    (dict(a=f32(0, 8, 2)), "its tensors take 8 bytes, but it has 16"),  # a hole at the end
    (dict(a=f32(0, 8, 2), b=f32(4, 16, 3)), "begins at byte 4, but the one before ends at 8"),  # an overlap
    (dict(a=f32(0, 4, 1), b=f32(8, 16, 2)), "begins at byte 8, but the one before ends at 4"),  # a hole
    (dict(a=f32(0, 16, 2, 2), b=f32(0, 16, 4)), "begins at byte 0, but the one before ends at 16"),  # the same twice
    (dict(a=f32(0, 24, 6)), "its tensors take 24 bytes, but it has 16"), (dict(a=f32(16, 0, 0)), "a cannot be"),
    (dict(a=f32(0, 16, 5)), "a cannot be {'dtype': 'F32', 'shape': [5], 'data_offsets': [0, 16]}"),
    (dict(a=f32(0, 16, -1, -4)), "a cannot be"), (dict(a=f32(0, 16, 4.0)), "a cannot be"),
    (dict(a=f32(0, 16, True, 4)), "a cannot be"), (dict(a=f32(0, 16, 2**62, 2**62, 0)), "a cannot be"),
    (dict(a=f32(0, 16, 4) | dict(shape=4)), "must be an iterable"), (dict(a=f32(0, 16, 4) | dict(dtype=[])), "unhashable"),
    (dict(a=f32(0, 16, 4) | dict(dtype="F8_E4M3")), "must be one of I64, F64"),
    (dict(a=dict(shape=[4], data_offsets=[0, 16])), "dtype"), ([], "damaged"), (dict(a=[]), "damaged"),
    ({"__metadata__": {"n": 1}, "a": f32(0, 16, 4)}, "metadata are not text"), ({"__metadata__": 3}, "damaged"),
    (b'{"a":1,"a":2}', "a name comes twice"), (b'{"a":{"dtype":"F32","dtype":"F32"}}', "a name comes twice"),
    (b"{", "not JSON"), (b"\xff", "utf-8"), (b"[" * 100_000, "unreadable"), (b"", "not JSON")])
def test_headers_that_lie(here, header, said):
    write(header, bytes(16))
    fact, fix = error(lambda _: safetensors.read("x"))
    assert fact.startswith("x is damaged: ") and said in fact and fix == "download the file again"
    with pytest.raises(SafetensorError):  # the package agrees
        theirs.load_file("x")


def test_a_tensor_of_very_many_dimensions(here):
    for n in (64, 65, 1_000_000):  # their product could take minutes
        write(dict(a=f32(0, 16, *[1] * (n - 1), 4)), bytes(16))
        if n == 64:
            assert safetensors.read("x")["a"].shape[-1] == 4
        else:
            assert "a cannot be {'dtype': 'F32', 'shape': [1, 1, " in error(lambda _: safetensors.read("x"))[0]


def test_lengths_that_lie(here):
    for raw, said in ((b"", "0 bytes"), (b"1234567", "7 bytes"), (struct.pack("<Q", 2**63), "cannot have a header of"),
                      (struct.pack("<Q", 3) + b"{}", "10 bytes cannot have a header of 3")):
        (here / "x").write_bytes(raw)
        assert said in error(lambda _: safetensors.read("x"))[0]
    os.mkfifo("pipe")
    assert "a folder, a pipe" in error(lambda _: safetensors.read("pipe"))[0]  # and no waiting
    write({}, b"")
    assert safetensors.read("x") == {}


def test_2000_mutated_headers(here):
    """Each ends in one line, or holds the numbers that its header names; never in anything else."""
    safetensors.write("a", {name: tensor for name, tensor in tensors().items() if tensor.numel()})
    raw = (here / "a").read_bytes()
    length, rng, read = int.from_bytes(raw[:8], "little"), random.Random(0), 0
    words = [b'"F32"', b'"F16"', b'"I8"', b"0", b"-1", b"1e3", b"99999999999999999999", b"null", b"{", b"]", b",", b"[]"]
    for case in range(2000):
        changed = bytearray(raw)
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            at = rng.randrange(8 + length)
            action = rng.randrange(4)
            if action == 0:
                changed[at] ^= 1 << rng.randrange(8)
            elif action == 1:
                changed[at] = rng.choice(b'0123456789[]{}",:')
            elif action == 2:
                del changed[at:at + rng.randrange(1, 9)]
            else:
                changed[at:at] = rng.choice(words)
        if action != 0 and rng.random() < 0.7:  # a length that is right again
            change = len(changed) - len(raw)
            changed[:8] = (length + change).to_bytes(8, "little", signed=False)
        (here / "x").write_bytes(changed)
        try:
            found = safetensors.read("x")
        except UserError as failure:
            assert str(failure).startswith("x is damaged: ") and len(str(failure)) < 1000, case
            continue
        read += 1
        header, numbers = parts(changed)
        header.pop("__metadata__", None)
        assert found.keys() == header.keys()
        for name, about in header.items():
            start, end = about["data_offsets"]
            dtype = safetensors.DTYPES[about["dtype"]]
            assert list(found[name].shape) == about["shape"] and end - start == math.prod(about["shape"]) * dtype.itemsize
            due = torch.frombuffer(bytearray(numbers[start:end]), dtype=torch.uint8)
            assert torch.equal(found[name].contiguous().flatten().view(torch.uint8), due), case
    assert 20 < read < 1000  # names and spaces may change

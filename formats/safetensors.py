# SPDX-License-Identifier: GPL-3.0-only
"""
Safetensors: the weights of Hugging Face folders, in a file that is only data.

    tensors = read("model.safetensors")     # {name: tensor}, in memory that is mapped to the file
    write("model.safetensors", tensors)

A file is the length of its header (8 bytes, little-endian), the header in JSON, and the numbers of all
tensors, without a gap:

    {"lm_head.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
"""
import json
import math
import os

import torch

from runtime.console import UserError
from runtime.files import open_file, parse_json

FIX = "download the file again"
MOST_HEADER = 100_000_000  # bytes, as in the package safetensors
DTYPES = {  # in the order in which tensors are written: the largest first, so that none begins at an odd place
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16,
    "F16": torch.float16, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def read(path):
    """{name: tensor} of a stranger's file. Raises UserError where the header is not exactly as it should be."""
    try:
        with open_file(path) as file:
            size = os.path.getsize(path)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MOST_HEADER):
                raise ValueError(f"{size:,} bytes cannot have a header of {length:,}")
            text = file.read(length).decode()
        header = parse_json(text, "its header", FIX, object_pairs_hook=once)
        places = check_header(header, size - 8 - length)
        data = torch.from_file(path, size=size, dtype=torch.uint8)[8 + length:]
        return {name: tensor_of(data[start:end], dtype, shape) for name, (dtype, shape, start, end) in places.items()}
    except (UserError, OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        raise UserError(f"{path} is damaged: {error}", FIX) from None


def once(pairs):
    """A JSON object as a dict: a name that comes twice could mean one thing here and another elsewhere."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name comes twice")
    return found


def check_header(header, size):
    """{name: (dtype, shape, start, end)} of the tensors, which fill `size` bytes. Raises ValueError and others."""
    if not all(isinstance(value, str) for value in header.pop("__metadata__", {}).values()):
        raise ValueError("its metadata are not text")
    places, last = {}, 0
    for name, about in header.items():
        dtype, shape, (start, end) = DTYPES.get(about["dtype"]), about["shape"], about["data_offsets"]
        whole = all(type(n) is int and 0 <= n < 1 << 48 for n in (*shape, start, end)) and len(shape) <= 64
        if dtype is None or not whole or end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} cannot be {str(about)[:200]}; its dtype must be one of {', '.join(DTYPES)}")
        places[name] = dtype, shape, start, end
    for *_, start, end in sorted(places.values(), key=lambda place: place[2:]):
        if start != last:  # an overlap or a hole
            raise ValueError(f"a tensor begins at byte {start:,}, but the one before ends at {last:,}")
        last = end
    if last != size:
        raise ValueError(f"its tensors take {last:,} bytes, but it has {size:,} for them")
    return places


def tensor_of(raw, dtype, shape):
    if raw.storage_offset() % dtype.itemsize:  # some writers do not pad the header
        raw = raw.clone()
    return raw.view(dtype).view(shape)


def write(path, tensors):
    """Write {name: tensor}. The file is, byte for byte, what the package safetensors would write."""
    names, order = {dtype: name for name, dtype in DTYPES.items()}, list(DTYPES.values())
    header, end = {"__metadata__": {"format": "pt"}}, 0
    ordered = sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0]))
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = dict(dtype=names[tensor.dtype], shape=list(tensor.shape), data_offsets=[start, end])
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())

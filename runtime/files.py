# SPDX-License-Identifier: GPL-3.0-only
"""
Files: opened with care when they are a stranger's, written whole or not at all, by one process at a time.

    with open_file("a.bin", most=1 << 20) as file:          # no pipe, no device, no more than a megabyte
        ...
    meta = read_json("meta.json", "run prepare.py again")   # not too large or too deep
    check_like(meta, dict(format=1, dtype=""), "meta.json") # its parts have the types that they should
    with replace_file("loss.svg", "w") as file:             # a reader sees the old file or the new one, never half of it
        file.write(picture)
    with locked("data/stdlib", wait=True):                  # until another process has written it
        ...
"""
import contextlib
import errno
import gzip
import hashlib
import json
import os
import sys
import zlib

from runtime.console import UserError, note, say

JSON_BYTES = 200 << 20  # a .json file is read whole: no more than this
JSON_VALUES = 10_000_000  # and no more values: `[],` has three characters, but takes 64 bytes in memory


def open_file(path, most=sys.maxsize, mode="rb", **options):
    """Open a stranger's file for reading. Raises OSError where there is none, where it has more than `most` bytes, and
    where it is a pipe or a device, which may have no end."""
    size = os.path.getsize(path)
    if not os.path.isfile(path):
        raise OSError(errno.EINVAL, "it is a folder, a pipe or a device, not a file")
    if size > most:
        raise OSError(errno.EFBIG, f"it has {size:,} bytes, and no more than {most:,} are read")
    return open(path, mode, **options)


def read_json(path, fix, **options):
    """The value in a stranger's .json or .json.gz file. fix: what to do where it is not JSON."""
    try:
        with open_file(path) as raw, gzip.open(raw) if path.lower().endswith(".gz") else raw as file:
            data = file.read(JSON_BYTES + 1)
        text = data[:JSON_BYTES].decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}",
                        "check the file, or leave it out") from None
    if len(data) > JSON_BYTES:
        raise UserError(f"{path} has more than {JSON_BYTES >> 20} MB, and a .json file is read whole",
                        "write it as a .jsonl file, one object per line")
    return parse_json(text, path, fix, **options)


def parse_json(text, where, fix, most=JSON_VALUES, **options):
    """The value of a stranger's JSON text, of at most so many values. where: the file that the error names."""
    if len(text) > most and sum(map(text.count, "[{,:")) > most:
        raise UserError(f"{where}: more than {most:,} brackets, commas and colons, too many values to hold",
                        "split it, or write it as a .jsonl file, one object per line")
    try:
        return json.loads(text, **options)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise UserError(f"{where}: not JSON: {error.msg} at {line}column {error.colno}", fix) from None
    except (RecursionError, ValueError) as error:  # brackets or digits without end
        raise UserError(f"{where}: not to be read: {error}", fix) from None


def new_file(path, mode="xb", **options):
    """Create a file. What bears its name, a link to somewhere else too, is removed first."""
    if os.path.lexists(path):
        os.unlink(path)
    return open(path, mode, **options)


@contextlib.contextmanager
def replace_file(path, mode="wb", **options):
    """Write a file that is whole when it bears its name. Raises OSError, and then nothing has changed."""
    part = path + ".part"
    try:
        with new_file(part, mode.replace("w", "x"), **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the bytes are on the disk ...
        os.replace(part, path)  # ... before they get their name, which is one indivisible step
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise


def foreign(folder, ours):
    """The first file in a folder that `ours`, a function of its path from there, is not true of; "" if there is none.

    What others have written is not replaced, and nothing is written beside it.
    """
    for parent, folders, files in os.walk(folder):
        for name in sorted(folders + files):
            path = os.path.join(parent, name)
            inside = os.path.relpath(path, folder)
            if not ours(inside) and (os.path.islink(path) or not os.path.isdir(path)):
                return inside
    return ""


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(path, wait=False):
    """Keep other processes from writing `path`, also those of another machine that shares the disk.

    wait: until the one that is writing it has ended; otherwise that is an error. The lock is held on a hidden file
    beside the path. Where the system has no such locks (Windows), go on without.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    folder, name = os.path.split(path)
    held = False
    while not held:
        file = open(os.path.join(folder, f".{name}.openllm.lock"), "ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise UserError(f"another process is writing {path}", "wait for it to end, or stop it") from None
            say(f"another process is writing {path}; waiting for it to end")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # not every file system of a network has locks
            note(f"{folder or '.'} cannot be locked ({error.strerror}): do not write into it twice at the same time")
        with contextlib.suppress(OSError):  # the one that held it has removed it: what was locked is no longer there
            held = os.path.samefile(file.name, file.fileno())
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(file.name)  # before it is let go, or it might be the lock of the next one
        file.close()


def check_like(found, like, where, name=""):
    """Raises UserError where what a file holds is not like the value that it is to replace, in type and shape.

    like: of a dict, the keys that there must be; of a list, one item that all must be like.
    """
    if isinstance(like, dict) and isinstance(found, dict):
        for key, value in like.items():
            check_like(found.get(key), value, where, f"{name}.{key}".lstrip("."))
    elif isinstance(like, list) and isinstance(found, list):
        for item in found:
            check_like(item, like[0], where, f"an item of {name}")
    elif kind_of(found) != kind_of(like):
        raise UserError(f"{where}: {name or 'all of it'} is {kind_of(found)}, but should be {kind_of(like)}",
                        "take the file from its source again, or use another one")


def kind_of(value):
    """What two values have to have in common. (The types of tensors with a fraction are converted to each other.)"""
    if value is None:
        return "missing"
    if not hasattr(value, "is_floating_point"):
        return f"of type {type(value).__name__}"
    kind = "float" if value.is_floating_point() else str(value.dtype).removeprefix("torch.")
    return f"a tensor {tuple(value.shape)} of type {kind}"

# SPDX-License-Identifier: GPL-3.0-only
"""
Files: opened with care, written whole or not at all, by one process at a time.

    with replace_file("loss.svg", "w") as file:  # a reader sees the old file or the new one, never half of it
        file.write(picture)
    with locked("data/stdlib", wait=True):       # until another process has written it
        ...
"""
import bz2
import contextlib
import errno
import gzip
import hashlib
import json
import os
import pickle
import sys
import zlib

from runtime.console import UserError, note, say

PACKED = {".gz": gzip.open, ".bz2": bz2.open}  # what unpacks a file, by its ending
JSON_BYTES = 200 << 20  # a .json file that is one object is read whole: no more than this
JSON_VALUES = 10_000_000  # and no more values: `[],` has three characters, but takes 64 bytes in memory


def open_file(path, most=sys.maxsize, mode="rb", **options):
    """Open a stranger's file for reading. Raises OSError where it is too large, or a pipe without end."""
    size = os.path.getsize(path)
    if not os.path.isfile(path):
        raise OSError(errno.EINVAL, "it is a folder, a pipe or a device, not a file")
    if size > most:
        raise OSError(errno.EFBIG, f"it has {size:,} bytes, at most {most:,} are read")
    return open(path, mode, **options)


@contextlib.contextmanager
def open_unpacked(path):
    """Open a stranger's file for reading, unpacked where its ending is in PACKED."""
    unpack = PACKED.get(os.path.splitext(path.lower())[1], contextlib.nullcontext)
    try:
        with open_file(path) as raw, unpack(raw) as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}",
                        "check the file, or leave it out") from None


def read_json(path, fix, **options):
    """The value in a stranger's .json file, packed or not. fix: where it is not JSON."""
    with open_unpacked(path) as file:
        data = file.read(JSON_BYTES + 1)
    if len(data) > JSON_BYTES:
        raise UserError(f"{path} has more than {JSON_BYTES >> 20} MB, and an object is read whole",
                        "write its rows as a .jsonl file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: {error}", "check the file, or leave it out") from None
    return parse_json(text, path, fix, **options)


def parse_json(text, where, fix, most=None, **options):
    """The value of a stranger's JSON text, of a limited number of values. where: the file, for the error."""
    check_size(text, where, most)
    try:
        return json.loads(text, **options)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise UserError(f"{where}: not JSON: {error.msg} at {line}column {error.colno}", fix) from None
    except (RecursionError, ValueError) as error:  # brackets or digits without end
        raise UserError(f"{where}: unreadable: {error}", fix) from None


def check_size(text, where, most=None):
    """Raises UserError where a JSON text has too many values to hold."""
    most = most or JSON_VALUES
    if len(text) > most and sum(map(text.count, "[{,:")) > most:
        raise UserError(f"{where}: too many values: more than {most:,}",
                        "split it, or write it as a .jsonl file, one object per line")


class PlainUnpickler(pickle._Unpickler):
    """Reads plain values only: nothing runs. In Python: nine bytes make the one in C reserve 64 GB."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


@contextlib.contextmanager
def replace_file(path, mode="wb", **options):
    """Write a file that is whole when it bears its name. When it raises, nothing has changed."""
    part = path + ".part"
    if os.path.lexists(part):  # from a kill, or a link that leads elsewhere
        os.unlink(part)
    try:
        with open(part, mode.replace("w", "x"), **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the bytes are on the disk ...
        os.replace(part, path)  # ... before they get their name, which is one indivisible step
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise


def foreign(folder, ours):
    """The first file in a folder, as a path from there, of which `ours` is not true; "" if there is none."""
    for parent, folders, files in os.walk(folder):
        for name in sorted(folders + files):
            path = os.path.join(parent, name)
            inside = os.path.relpath(path, folder)
            if not ours(inside) and (os.path.islink(path) or not os.path.isdir(path)):
                return inside
    return ""


def is_gguf(path):
    return str(path).lower().endswith(".gguf") and os.path.isfile(path)


def file_sha256(path, most=sys.maxsize):
    """The sha256 of a file, or of as many of its bytes."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(min(1 << 18, most)):
            sha256.update(block)
            most -= len(block)
    return sha256.hexdigest()


@contextlib.contextmanager
def locked(path, wait=False):
    """Keep other processes from writing `path`, on this machine or another that shares the disk.

    wait: for the other process to end; else it is a UserError. The lock is a hidden file beside the path, and
    ends with the process. Windows has none.
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
                raise UserError(f"another process is writing {path}", "wait for it, or stop it") from None
            say(f"another process is writing {path}; waiting for it to finish")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # not every network file system has locks
            note(f"{folder or '.'} cannot be locked ({error.strerror}): let only one process write there")
        with contextlib.suppress(OSError):  # the other may have removed the file that is locked now
            held = os.path.samefile(file.name, file.fileno())
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(file.name)  # before it is released, or it might be the lock of the next one
        file.close()


def check_like(found, like, where, name=""):
    """Raises UserError where what a file holds differs from `like` in type or shape.

    like: of a dict, the keys that there must be; of a list, one item for all.
    """
    if isinstance(like, dict) and isinstance(found, dict):
        for key, value in like.items():
            check_like(found.get(key), value, where, f"{name}.{key}".lstrip("."))
    elif isinstance(like, list) and isinstance(found, list):
        for item in found:
            check_like(item, like[0], where, f"an item of {name}")
    elif kind_of(found) != kind_of(like):
        raise UserError(f"{where}: {name or 'all of it'} is {kind_of(found)}, but should be {kind_of(like)}",
                        "download or rebuild the file")


def kind_of(value):
    """What two values have to have in common; float types are converted to each other."""
    if value is None:
        return "missing"
    if not hasattr(value, "is_floating_point"):
        return f"of type {type(value).__name__}"
    kind = "float" if value.is_floating_point() else str(value.dtype).removeprefix("torch.")
    return f"a tensor {tuple(value.shape)} of type {kind}"

# SPDX-License-Identifier: GPL-3.0-only
"""
The console: what a program says while it works, and how it ends.

    raise UserError("block_size=256 needs 257 tokens, train.bin has 92", "--block_size=64, or more text")
    if __name__ == "__main__":
        command_line(main)      # exit code 0, or the code of the UserError and its two lines

Progress, notes and errors go to standard error; results (`show`) to standard output. Whatever comes from a file is
made printable first, so that it cannot command a terminal.
"""
import contextlib
import hashlib
import importlib
import importlib.metadata
import os
import re
import select
import sys
import time
import traceback


class UserError(Exception):
    """Something that the user can mend: `fact` with its numbers, `fix` with what to type. Exit code 2 unless told.

    alone: only this one of several processes knows of it, so that it has to say it itself.
    """

    def __init__(self, fact, fix, code=2, alone=False):
        super().__init__(fact)
        self.fact, self.fix, self.code, self.alone = fact, fix, code, alone


# Older ones do not protect from a stranger's files: a chat template runs any code in jinja2 3.1.5, a tokenizer.model
# ends the process with sentencepiece 0.2.0, and a long word takes minutes with tiktoken 0.12.
OLDEST = {"jinja2": "3.1.6", "sentencepiece": "0.2.2", "tiktoken": "0.13"}


def needs(package, what):
    """Import an optional package. Raises UserError with the command that installs it, where it is missing or too old.
    """
    oldest = OLDEST.get(package, "")
    fix = f"pip install '{package}>={oldest}'" if oldest else f"pip install {package}"
    try:
        module, version = importlib.import_module(package), importlib.metadata.version(package)
    except ImportError:
        raise UserError(f"{what} need the package {package}", fix) from None
    found, due = ([int(number) for number in re.findall(r"\d+", text)] for text in (version, oldest))
    if found < due:
        raise UserError(f"{package} {version} is too old: it does not protect from a stranger's files", fix)
    return module


def say(text=""):
    """Print progress on standard error, once per job: only the first of several processes speaks."""
    if os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1":
        print_error(text)


dropped = 0  # lines that standard error has not taken since the last one that it took


def print_error(text):
    """Write a line to standard error. A line that cannot be written is dropped, and the next one says how many were.

    A reader that has stopped (`| less`, a full pipe, a full disk) must not stop a training run or a server, so nothing
    here waits for long.
    """
    global dropped
    lost = f"\n(lines that could not be written here: {dropped})\n" if dropped else ""
    try:
        write_or_give_up(f"{lost}{printable(text)}\n", seconds=0 if dropped else 1)
        dropped = 0
    except OSError:
        dropped += 1


def write_or_give_up(text, seconds):
    """Write to standard error, waiting no longer than this for its reader. Raises OSError where nobody reads."""
    if sys.stderr is None or sys.stderr.closed:
        raise BrokenPipeError
    try:
        descriptor = sys.stderr.fileno()
    except OSError:  # it is in memory, as in a test
        sys.stderr.write(text)
        return
    data = text.encode(sys.stderr.encoding, "backslashreplace")
    while data:
        if os.name == "posix" and not select.select([], [descriptor], [], seconds)[1]:
            raise BlockingIOError
        data = data[os.write(descriptor, data[:512]):]  # a pipe that is ready takes 512 bytes at once (POSIX)


def printable(text):
    """The text without what a terminal obeys: control characters (a window's title, a pasted command) and characters
    that reverse the order of others are written as escapes such as \\x1b. Line ends and tabs stay."""
    return re.sub("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]",
                  lambda found: found[0].encode("unicode_escape").decode(), str(text))


def public(address):
    """What may be shown and written down of an address: no user, password, query (a signature) or fragment.

    Anything else, such as a path, is returned as it is.
    """
    return re.sub(r"^(https?://)(?:[^/?#]*@)?([^?#]*).*", r"\1\2", address, flags=re.DOTALL)


def origin(source):
    """What is written down of where a text is from: no secrets of an address, no folders of this machine.

    Of an absolute path, that is its last part, and a number that tells one folder from another.
    """
    if not os.path.isabs(source):
        return public(source)
    folder, name = os.path.split(os.path.normpath(source))
    return f"{name} (folder {hashlib.sha256(folder.encode()).hexdigest()[:6]})"


def show(text, end="\n"):
    """Print a text on standard output: to a terminal what is printable, to a file or a pipe exactly the text."""
    if sys.stdout is None:  # it was closed
        return
    try:
        print(printable(text) if sys.stdout.isatty() else text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"cannot write to standard output: {error.strerror}", "make room", code=1) from None


def note(text):
    say(f"note: {text}")  # something was chosen for you


def warn(text):
    say(f"warning: {text}")  # it works, but you may regret it


class Progress:
    """One line every two seconds: how much of how much, how fast, how much longer."""

    def __init__(self, what, total=0, done=0):
        self.what, self.total, self.done, self.before, self.start = what, total, done, done, time.monotonic()
        self.next = self.start + 2

    def add(self, n):
        self.done += n
        if time.monotonic() > self.next:
            self.next = time.monotonic() + 2
            speed = (self.done - self.before) / (time.monotonic() - self.start)
            left = f" of {self.total / 1e6:,.1f}" if self.total else ""
            eta = f", {(self.total - self.done) / speed:.0f} s left" if self.total else ""
            say(f"{self.what}: {self.done / 1e6:,.1f}{left} MB, {speed / 1e6:.1f} MB/s{eta}")


def command_line(main):
    """Run a script's main(argv) and turn what went wrong into the two lines and the exit code of a UserError."""
    code = run(main)
    if os.environ.get("WORLD_SIZE", "1") in ("1", ""):
        sys.exit(code)
    # One of several processes leaves without tidying up: in Python's last moments, the threads through which they
    # talked can wait for the interpreter while the interpreter waits for them.
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def run(main):
    try:
        return main(sys.argv[1:]) or 0
    except UserError as error:
        if error.alone or os.environ.get("LOCAL_RANK", "0") == "0":  # of several processes on a machine, one speaks
            fact, fix = (" ".join(str(line).splitlines()) for line in (error.fact, error.fix))
            print_error(f"error: {fact}\nfix: {fix}")
        return error.code
    except KeyboardInterrupt:
        say("stopped")
        return 130
    except BrokenPipeError:  # `python sample.py | head` closes our standard output: no more to say, and no traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:  # a mistake of ours
        print_error(traceback.format_exc())
        return 1

# SPDX-License-Identifier: GPL-3.0-only
"""
The console: what a program says while it works, and how it ends.

    raise UserError("block_size=256 needs 257 tokens, train.bin has 92", "--block_size=64, or more text")
    if __name__ == "__main__":
        command_line(main)      # exit code 0, or the code of the UserError and its two lines

Progress, notes and errors go to standard error, results (`show`) to standard output. Text may come from a
file and must not control the terminal, so it is made printable first.
"""
import contextlib
import hashlib
import importlib
import os
import re
import select
import sys
import time
import traceback


class UserError(Exception):
    """Something that the user can fix: `fact` with its numbers, `fix` with what to type, and the exit code.

    alone: of several processes, only this one knows of it, so it prints it.
    """

    def __init__(self, fact, fix, code=2, alone=False):
        super().__init__(fact)
        self.fact, self.fix, self.code, self.alone = fact, fix, code, alone


# Older versions are not safe: a chat template can run any code in jinja2 3.1.5, a tokenizer.model can crash
# sentencepiece 0.2.0, and a long word takes minutes in tiktoken 0.12.
OLDEST = {"jinja2": "3.1.6", "sentencepiece": "0.2.2", "tiktoken": "0.13"}


def needs(package, what):
    """Import an optional package. Raises UserError with the pip command."""
    def numbers(version):
        return [int(part) for part in re.findall(r"\d+", version)]

    fix, oldest = f"pip install {package}", OLDEST.get(package, "")
    if oldest:
        fix = f"pip install '{package}>={oldest}'"
    try:
        from importlib import metadata  # (slow to load)
        module = importlib.import_module(package)
        version = metadata.version(package)
    except ImportError:
        raise UserError(f"{what} need the package {package}", fix) from None
    if numbers(version) < numbers(oldest):
        raise UserError(f"{package} {version} is too old to be safe with files from strangers", fix)
    return module


def say(text="", end="\n"):
    """Print progress on standard error; of several processes, only rank 0 does."""
    if os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1":
        print_error(text, end)


dropped = 0  # lines since the last one that was written
moving = False  # does the last line wait to be overwritten?
CLEAR = "\033[K"  # tells a terminal to empty the line


def print_error(text, end="\n"):
    """Write a line to standard error. Where nobody reads (`| less`, a full disk), it waits for a second, and
    then drops and counts lines: a run must go on. end: with a carriage return, the next line overwrites it."""
    global dropped, moving
    text = CLEAR * moving + printable(text) + end
    moving = end == "\r"
    if dropped:
        text = f"\n({counted(dropped, 'line')} could not be written here)\n{text}"
    try:
        descriptor = sys.stderr.fileno()
    except OSError:  # it is in memory, as in a test
        sys.stderr.write(text)
        return
    data, seconds = text.encode(sys.stderr.encoding, "backslashreplace"), 0 if dropped else 1
    try:
        while data:
            if os.name == "posix" and not select.select([], [descriptor], [], seconds)[1]:
                raise BlockingIOError
            data = data[os.write(descriptor, data[:512]):]  # a pipe that is ready takes 512 bytes (POSIX)
        dropped = 0
    except OSError:
        dropped += 1


def printable(text):
    """The text with escapes for what a terminal obeys: control characters other than line ends and tabs, and
    what reverses the order of text."""
    obeyed = "[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
    return re.sub(obeyed, lambda found: ascii(found[0])[1:-1], str(text))


def public(address):
    """An address without user, password, query and fragment, which may be secret. A path stays as it is."""
    return re.sub(r"^(https?://)(?:[^/?#]*@)?([^?#]*).*", r"\1\2", address, flags=re.DOTALL)


def origin(source):
    """Where a text is from, without the folders of this machine: a number tells one from another."""
    if not os.path.isabs(source):
        return public(source)
    folder, name = os.path.split(os.path.normpath(source))
    return f"{name} (folder {hashlib.sha256(folder.encode()).hexdigest()[:6]})"


def show(text, end="\n"):
    """Print a text on standard output: on a terminal made printable, else exactly as it is."""
    if sys.stdout.isatty():
        text = printable(text)
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"cannot write to standard output: {error.strerror}", "free disk space", code=1) from None


def note(text):
    say(f"note: {text}")  # something was chosen for you


def warn(text):
    say(f"warning: {text}")  # it works, but you may regret it


class Progress:
    """A line every two seconds, for work that takes longer: how much is done, how fast, how much longer.

    total: of bytes, or of other units such as "windows"; 0 where it is not known. done: what was done before.
    On a terminal one line moves; a file gets one after two seconds, and then every 20.
    """

    def __init__(self, what, total=0, done=0, unit="bytes"):
        self.what, self.total, self.done, self.before, self.unit = what, total, done, done, unit
        self.start = self.last = time.monotonic()

    def add(self, n):
        self.tell(self.done + n)

    def tell(self, done):
        self.done = done
        now, terminal = time.monotonic(), sys.stderr.isatty()
        seconds = 2 if terminal or self.last == self.start else 20
        if now <= self.last + seconds or done <= self.before:
            return
        self.last = now
        speed = (done - self.before) / (now - self.start)
        line = f"{self.what}: {done:,} of {self.total:,} {self.unit}"
        if self.unit == "bytes":
            of_all = f" of {self.total / 1e6:,.1f}" if self.total else ""
            line = f"{self.what}: {done / 1e6:,.1f}{of_all} MB, {speed / 1e6:.1f} MB/s"
        if self.total:
            line += f", {duration((self.total - done) / speed)} left"
        say(line, end="\r" if terminal else "\n")


def counted(n, noun):
    """A number with its noun: "1 document", "2,000 documents"."""
    return f"{n:,} {noun}" + "s" * (n != 1)


def duration(seconds):
    """Seconds in words, to the precision that an estimate has: 8 s, 2m03s, 3h20m, 12 days."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24:,} days"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds:02}s" if minutes else f"{seconds} s"


REQUIRED = "torch", "numpy", "sentencepiece", "tiktoken", "requests"


def import_failed(kind, error, trace):
    """For sys.excepthook, while a script still imports: a Ctrl-C or a missing package is not a bug."""
    if issubclass(kind, KeyboardInterrupt):
        print_error("stopped")
    elif issubclass(kind, ModuleNotFoundError) and error.name in REQUIRED:
        print_error(f"error: the package {error.name} is not installed in {sys.prefix}\n"
                    "fix: . .venv/bin/activate, or pip install -r requirements.txt")
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = import_failed


def command_line(main):
    """Run a script's main(argv) and exit with its code, or with the two lines and the code of a UserError."""
    code = run(main)
    if os.environ.get("WORLD_SIZE", "1") in ("1", ""):
        sys.exit(code)
    # In Python's clean-up, threads of torch.distributed and the interpreter can wait for each other for ever.
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def run(main):
    try:
        return main(sys.argv[1:]) or 0
    except UserError as error:
        if error.alone or os.environ.get("LOCAL_RANK", "0") == "0":  # one process per machine
            fact = " ".join(str(error.fact).splitlines())
            fix = " ".join(str(error.fix).splitlines())
            print_error(f"error: {fact}\nfix: {fix}")
        return error.code
    except KeyboardInterrupt:
        say("stopped")
        return 130
    except BrokenPipeError:  # `python sample.py | head` has closed our standard output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:  # a bug
        print_error(traceback.format_exc())
        return 1

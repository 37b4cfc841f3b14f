# SPDX-License-Identifier: GPL-3.0-only
"""
Settings: a typed dataclass, files of plain assignments, and --key=value, read from left to right.

    python train.py config/train_small.py --batch_size=32
    python train.py --help

Every script keeps its settings in one dataclass: a field is a name, a type, a default and, after it, a comment with
the meaning. That is the whole description of a setting. `load` fills the dataclass from the command line, `--help`
prints the source of the dataclass as it stands, and a wrong name or a wrong type is one clear error. A config file
is Python whose top-level names are settings, so it can do arithmetic (`gradient_accumulation_steps = 5 * 8`) and
carry comments that explain its numbers.

The rest of this file is how a script ends: `UserError` for what the user can mend, `command_line` to print it.
"""
import ast
import contextlib
import dataclasses
import difflib
import errno
import importlib
import importlib.metadata
import inspect
import os
import re
import select
import sys
import traceback
import types
import typing

FLAG_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


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


def open_file(path, most=sys.maxsize, mode="rb", **options):
    """Open a stranger's file for reading. Raises OSError where there is none, where it has more than `most` bytes, and
    where it is a pipe or a device, which may have no end."""
    size = os.path.getsize(path)
    if not os.path.isfile(path):
        raise OSError(errno.EINVAL, "it is a folder, a pipe or a device, not a file")
    if size > most:
        raise OSError(errno.EFBIG, f"it has {size:,} bytes, and no more than {most:,} are read")
    return open(path, mode, **options)


def new_file(path, mode="xb", **options):
    """Create a file. What bears its name, a link to somewhere else too, is removed first."""
    if os.path.lexists(path):
        os.unlink(path)
    return open(path, mode, **options)


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


def load(cls, argv, presets=None, files=False):
    """Fill the dataclass `cls` from the arguments `argv`; later ones win.

    presets: {name: {setting: value}}, chosen by the setting `preset`; a preset changes the defaults only, so
        whatever files and flags give wins over it, wherever it stands.
    files: bare arguments are config files (train.py); otherwise they are what the script works on, and are returned.
    Returns (settings, the set of names that were given, the bare arguments).
    Prints the settings and exits on --help. Raises UserError for an unknown name or a value of the wrong type.
    """
    kinds = typing.get_type_hints(cls)
    given, bare, argv = {}, [], list(argv)
    while argv:
        argument = argv.pop(0)
        if argument in ("--help", "-h"):
            print(help_text(cls))
            sys.exit(0)
        if not argument.startswith("--"):
            if files:
                given.update(read_config(argument, kinds))
            else:
                bare.append(argument)
            continue
        name, has_value, text = argument[2:].partition("=")
        name = name.replace("-", "_")
        kind = known(name, kinds, f"--{name}")
        if not has_value:  # `--key value`, or `--key` alone for true
            flag = bool in alternatives(kind)
            follows = argv and not argv[0].startswith("--")
            if follows and (not flag or fits(argv[0], kind)):
                text = argv.pop(0)
            elif flag:
                text = "true"
            else:
                raise UserError(f"--{name} has no value", f"--{name}=VALUE, {describe(kind)}")
        value = parse(text, kind, f"--{name}")
        given[name] = given.get(name, []) + value if kind == list[str] and name in given else value
    if presets and given.get("preset"):
        name = given["preset"]
        if name not in presets:
            raise UserError(f"there is no preset {name!r}", f"one of {', '.join(presets)}")
        given = {**presets[name], **given}
    return cls(**given), set(given), bare


def read_config(path, kinds):
    """The settings that a config file assigns, as {name: value}. The file is Python, run in a namespace of its own."""
    try:
        with open_file(path, most=1 << 20) as file:
            source = file.read().decode()
    except OSError as error:
        near = difflib.get_close_matches(path, config_files(), 1)
        raise UserError(f"cannot read the config file {path}: {error.strerror or error}",
                        near[0] if near else "one of " + ", ".join(config_files())) from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file", "a config file holds lines like batch_size = 16") from None
    namespace = {"__name__": "config", "__file__": path}
    try:
        exec(compile(source, path, "exec"), namespace)
    except (Exception, SystemExit) as error:
        trace = error.__traceback__.tb_next  # the line of the file that was running, if it ran at all
        line = getattr(error, "lineno", None) or (trace.tb_lineno if trace else 1)
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {error}",
                        "a config file holds lines like batch_size = 16") from None
    lines = {node.id: node.lineno for node in ast.walk(ast.parse(source))
             if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    found = {}
    for name, value in namespace.items():
        if not name.startswith("_") and not isinstance(value, (types.ModuleType, types.FunctionType, type)):
            where = f"{path}, line {lines.get(name, 1)}"
            kind = known(name, kinds, where)
            found[name] = parse(value, kind, f"{where}: {name}")
    return found


def config_files():
    folder = os.path.join(os.path.dirname(os.path.dirname(__file__)), "config")
    return sorted(f"config/{name}" for name in os.listdir(folder) if name.endswith(".py"))


def known(name, kinds, where):
    """The type of the setting `name`, or the error that names its nearest neighbour."""
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, 1)
        raise UserError(f"{where}: there is no setting {name!r}",
                        f"--{near[0]}" if near else "--help lists every setting with its meaning")
    return kinds[name]


def parse(value, kind, where):
    """`value`, a text from the command line or a value from a file, as the type that the annotation asks for."""
    for option in alternatives(kind):
        try:
            return convert(value, option)
        except (ValueError, TypeError, OverflowError):
            continue
    raise UserError(f"{where}: {value!r} is not {describe(kind)}", f"give {describe(kind)}")


def check_limits(settings, limits):
    """Raises UserError where a number is out of range. limits: {"name name": (smallest, largest)}; None passes."""
    for names, (smallest, largest) in limits.items():
        for name in names.split():
            value = getattr(settings, name)
            if value is not None and not smallest <= value <= largest:
                default = type(settings).__dataclass_fields__[name].default
                raise UserError(f"{name}={value} is out of range: {smallest:g} to {largest:g}",
                                f"--{name}={str(default).lower()}, the default")


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


def fits(value, kind):
    try:
        parse(value, kind, "")
        return True
    except UserError:
        return False


def alternatives(kind):
    """The types of a union such as `int | None`; a type that is none stands alone."""
    return typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)


def convert(value, kind):
    """One type of the few that settings have. Raises ValueError where the value does not fit."""
    if typing.get_origin(kind) is typing.Literal:
        return typing.get_args(kind)[typing.get_args(kind).index(value)]
    if kind == list[str]:
        return [str(item) for item in value] if isinstance(value, list) else [str(value)]
    if kind is str:
        return str(value)
    if kind is type(None):
        if value is not None and str(value).lower() != "none":
            raise ValueError(value)
        return None
    if kind is bool:
        if not isinstance(value, bool) and str(value).lower() not in FLAG_WORDS:
            raise ValueError(value)
        return value if isinstance(value, bool) else FLAG_WORDS[value.lower()]
    if isinstance(value, bool):
        raise ValueError(value)
    number = float(value)
    if kind is int:  # 10000, 10_000 and 1e4 are the same whole number, 0.5 is none
        if number != int(number):
            raise ValueError(value)
        return int(number) if "e" in str(value).lower() or "." in str(value) else int(value)
    if number != number:
        raise ValueError(value)
    return number


def describe(kind):
    """A type in a user's words: 'a whole number', "'learned' or 'rope'"."""
    if len(alternatives(kind)) > 1:
        return " or ".join(describe(option) for option in alternatives(kind))
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(str, typing.get_args(kind)))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", list[str]: "text",
            type(None): "none"}[kind]


def help_text(cls):
    """The fields of a settings class as its source has them: name, type, default, meaning."""
    parts, seen = [(inspect.getmodule(cls).__doc__ or "").strip(), ""], set()
    for owner in filter(dataclasses.is_dataclass, cls.__mro__):
        for line in map(str.strip, inspect.getsource(owner).split("\n")):
            name = line.partition(":")[0]
            if line.startswith("#"):
                parts.append("\n" + line)
            elif name in owner.__annotations__ and name not in seen:  # (a class may override what it inherits)
                parts.append("--" + line.replace("field(default_factory=list)", "[]"))  # repeat the setting for several
                seen.add(name)
    return "\n".join(parts)

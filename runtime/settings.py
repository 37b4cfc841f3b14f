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
"""
import ast
import dataclasses
import difflib
import inspect
import os
import sys
import types
import typing

from runtime.console import UserError
from runtime.files import open_file

FLAG_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


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

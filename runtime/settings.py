# SPDX-License-Identifier: GPL-3.0-only
"""
Settings: a typed dataclass, files of plain assignments, and --key=value, read from left to right.

    python train.py config/train_small.py --batch_size=32
    python train.py --help

A field of the dataclass is a name, a type, a default and a comment with the meaning, which `--help` prints. A config
file is Python, so it can do arithmetic (`gradient_accumulation_steps = 5 * 8`) and have comments.
"""
import ast
import contextlib
import dataclasses
import difflib
import inspect
import os
import re
import sys
import types
import typing

from runtime.console import UserError
from runtime.files import open_file

FLAG_WORDS = {"true": True, "false": False}
# The types of settings, besides Literal["a", "b"] and unions
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list[str]: "text",
         type(None): "none"}


def load(cls, argv, presets=None, files=False):
    """Fill the dataclass `cls` from the arguments `argv`; later ones win. Prints the settings and exits on --help.

    presets: {name: {setting: value}}, other defaults, chosen by the setting `preset`.
    files: bare arguments are config files; otherwise they are returned.
    Returns (settings, the set of names that were given, the bare arguments).
    """
    kinds = typing.get_type_hints(cls)
    given, bare, argv = {}, [], list(argv)
    while argv:
        argument = argv.pop(0)
        if argument in ("--help", "-h"):
            print(help_text(cls))
            sys.exit(0)
        if argument.startswith("--"):
            name, value = read_flag(argument, argv, kinds)
            if kinds[name] == list[str]:
                value = given.get(name, []) + value
            given[name] = value
        elif files:
            given.update(read_config(argument, kinds))
        else:
            bare.append(argument)
    if presets and given.get("preset"):
        name = given["preset"]
        if name not in presets:
            raise UserError(f"there is no preset {name!r}", f"one of {', '.join(presets)}")
        given = {**presets[name], **given}
    return cls(**given), set(given), bare


def read_flag(argument, following, kinds):
    """(name, value) of --name=value, of --name value, or of --name alone, which means true."""
    name, has_value, text = argument[2:].partition("=")
    name = name.replace("-", "_")
    kind = known(name, kinds, f"--{name}")
    if not has_value:
        flag = kind is bool or bool in typing.get_args(kind)
        follows = following and not following[0].startswith("--")
        if follows and (not flag or following[0].lower() in {"auto", *FLAG_WORDS}):  # (`--flag FILE` is true)
            text = following.pop(0)
        elif flag:
            text = "true"
        else:
            raise UserError(f"--{name} has no value", f"--{name}=VALUE, {describe(kind)}")
    return name, parse(text, kind, f"--{name}")


def read_config(path, kinds):
    """The settings that a config file assigns, {name: value}."""
    try:
        with open_file(path, most=1 << 20) as file:
            source = file.read()
    except OSError as error:
        folder = os.path.join(os.path.dirname(os.path.dirname(__file__)), "config")
        recipes = sorted(f"config/{name}" for name in os.listdir(folder) if name.endswith(".py"))
        near = difflib.get_close_matches(path, recipes, 1)
        raise UserError(f"cannot read the config file {path}: {error.strerror or error}",
                        near[0] if near else "one of " + ", ".join(recipes)) from None
    namespace, line = {"__name__": "config"}, 1
    try:
        for node in ast.parse(source).body:
            line = node.lineno
            exec(compile(ast.Module([node], []), path, "exec"), namespace)
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}, line {getattr(error, 'lineno', None) or line}: {type(error).__name__}: {error}",
                        "a config file holds lines like batch_size = 16") from None
    found = {}
    for name, value in namespace.items():
        if not name.startswith("_") and not isinstance(value, (types.ModuleType, types.FunctionType, type)):
            found[name] = parse(value, known(name, kinds, path), f"{path}: {name}")
    return found


def known(name, kinds, where):
    """The type of the setting `name`. Raises UserError with the most similar name."""
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, 1)
        raise UserError(f"{where}: there is no setting {name!r}",
                        f"--{near[0]}" if near else "--help lists every setting with its meaning")
    return kinds[name]


def check_limits(settings, limits):
    """Raises UserError for a number out of range. limits: {"name name": (smallest, largest)}; None passes."""
    for names, (smallest, largest) in limits.items():
        for name in names.split():
            value = getattr(settings, name)
            if value is not None and not smallest <= value <= largest:
                default = type(settings).__dataclass_fields__[name].default
                raise UserError(f"{name}={value} is out of range: {smallest:g} to {largest:g}",
                                f"--{name}={str(default).lower()}, the default")


# ---------------------------------------------------------------------------------------------------------------------
# Types


def parse(value, kind, where):
    """`value`, from the command line or a config file, as the type of the annotation."""
    try:
        return convert(value, kind)
    except (ValueError, TypeError, OverflowError):
        raise UserError(f"{where}: {value!r} is not {describe(kind)}", f"give {describe(kind)}") from None


def convert(value, kind):
    """`value` as the type `kind`. Raises ValueError, TypeError or OverflowError where it does not fit."""
    word = str(value).lower()
    if kind is str:
        return str(value)
    if kind == list[str]:
        return list(map(str, value)) if isinstance(value, list) else [str(value)]
    if kind is bool and word in FLAG_WORDS:
        return FLAG_WORDS[word]
    if kind is type(None) and word == "none":
        return None
    if kind is int and re.fullmatch("[+-]?[0-9_]+", word):  # exactly, however long
        return int(word)
    if kind in (int, float) and not isinstance(value, bool):  # 1e4 is a whole number too, 0.5 is none
        number = float(value)
        if kind(number) == number:  # (NaN is not)
            return kind(number)
    for option in typing.get_args(kind):  # the words of a Literal, or the types of a union
        if option == value:
            return value
        if not isinstance(option, str):
            with contextlib.suppress(ValueError, TypeError, OverflowError):
                return convert(value, option)
    raise ValueError(value)


def describe(kind):
    """A type in a user's words: 'a whole number', 'learned or rope'."""
    if kind in WORDS:
        return WORDS[kind]
    return " or ".join(option if isinstance(option, str) else describe(option) for option in typing.get_args(kind))


def help_text(cls):
    """The fields of a settings class as its source has them."""
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

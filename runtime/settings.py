# SPDX-License-Identifier: GPL-3.0-only
"""
Settings: a typed dataclass, files of plain assignments, and --key=value, read from left to right.

    python train.py config/train_small.py --batch_size=32
    python train.py --help

A field of the dataclass is a name, a type, a default and a comment with the meaning, which `--help` prints.
A config file is Python: it can do arithmetic (`gradient_accumulation_steps = 5 * 8`).
"""
import contextlib
import dataclasses
import difflib
import inspect
import os
import re
import runpy
import sys
import traceback
import types
import typing

from runtime.console import UserError

CONSTANTS = {"true": True, "false": False, "none": None}
# The types of settings, besides Literal["a", "b"] and unions
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list[str]: "text",
         type(None): "none"}


def load(cls, argv, presets=None, files=False):
    """(an instance of the dataclass `cls`, {name: what gave it}, the bare arguments) of a command line.

    What gave a setting is a config file, a preset or `--name`.
    presets: {name: {setting: value}}, other defaults, chosen by the setting `preset`.
    files: bare arguments are config files.
    """
    kinds = typing.get_type_hints(cls)
    given, source, bare, argv = {}, {}, [], list(argv)
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
            source[name] = f"--{name}"
        elif files:
            assigned = read_config(argument, kinds)
            given.update(assigned)
            source.update(dict.fromkeys(assigned, argument))
        else:
            bare.append(argument)
    preset = given.get("preset")
    if presets and preset:
        if preset not in presets:
            raise UserError(f"there is no preset {preset!r}", f"one of {', '.join(presets)}")
        given = presets[preset] | given
        source = dict.fromkeys(presets[preset], preset) | source
    return cls(**given), source, bare


def read_flag(argument, following, kinds):
    """(name, value) of --name=value, of --name value, or of --name alone, which means true."""
    name, has_value, text = argument[2:].partition("=")
    name = name.replace("-", "_")
    kind = known(name, kinds, f"--{name}")
    if not has_value:
        flag = kind is bool or bool in typing.get_args(kind)
        follows = following and not following[0].startswith("--")
        if flag and follows:  # (`--flag FILE` means true)
            follows = following[0].lower() in ("auto", "true", "false")
        if follows:
            text = following.pop(0)
        elif flag:
            text = "true"
        else:
            raise UserError(f"--{name} has no value", f"--{name}=VALUE, {describe(kind)}")
    return name, parse(text, kind, f"--{name}")


def read_config(path, kinds):
    """{name: value} of the settings that a config file assigns."""
    if not os.path.isfile(path):
        folder = os.path.join(os.path.dirname(os.path.dirname(__file__)), "config")
        recipes = sorted(f"config/{name}" for name in os.listdir(folder) if name.endswith(".py"))
        near = difflib.get_close_matches(path, recipes, 1) or recipes
        raise UserError(f"there is no config file {path}", ", ".join(near))
    try:
        assigned = runpy.run_path(path)
    except (Exception, SystemExit) as error:
        # A SyntaxError knows its line. Of others, it is the last one of the file that was running.
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = getattr(error, "lineno", None) or (lines or [1])[-1]
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {error}",
                        "a config file holds lines like batch_size = 16") from None
    found = {}
    for name, value in assigned.items():
        if not name.startswith("_") and not isinstance(value, (types.ModuleType, types.FunctionType, type)):
            found[name] = parse(value, known(name, kinds, path), f"{path}: {name}")
    return found


def known(name, kinds, where):
    """The type of a setting. Raises UserError with the most similar name."""
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, 1)
        fix = f"--{near[0]}" if near else "--help lists every setting"
        raise UserError(f"{where}: there is no setting {name!r}", fix)
    return kinds[name]


def check_limits(settings, limits):
    """Raises UserError for a number out of range. limits: {"name name": (smallest, largest)}; words pass."""
    for names, (smallest, largest) in limits.items():
        for name in names.split():
            value = getattr(settings, name)
            if isinstance(value, (int, float)) and not smallest <= value <= largest:
                default = type(settings).__dataclass_fields__[name].default
                raise UserError(f"{name}={value} is out of range: {smallest:g} to {largest:g}",
                                f"--{name}={default}, the default")


# ---------- Types


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
    if kind in (bool, type(None)) and type(CONSTANTS.get(word, "")) is kind:
        return CONSTANTS[word]
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
                found = convert(value, option)
                return (found == 0 and word_for_zero(kind)) or found
    raise ValueError(value)


def word_for_zero(kind):
    """The word of a type like Literal["auto"] | int, for which nanoGPT writes 0; None of other types."""
    options = typing.get_args(kind)
    if len(options) == 2 and options[1] in (int, float):
        return typing.get_args(options[0])[0]
    return None


def with_words(cls, values):
    """{name: value} of an older version or of nanoGPT, with words in place of zeros."""
    kinds = typing.get_type_hints(cls)
    return {name: (value == 0 and word_for_zero(kinds.get(name))) or value for name, value in values.items()}


def or_else(setting, otherwise):
    """The value of a setting that is a number or a word (auto, all, none); `otherwise` for the word."""
    return otherwise if isinstance(setting, str) else setting


def describe(kind):
    """A type in a user's words: 'a whole number', 'learned or rope'."""
    if isinstance(kind, str):
        return kind
    return WORDS.get(kind) or " or ".join(map(describe, typing.get_args(kind)))


def help_text(cls):
    """The fields of a settings class as its source has them."""
    parts, seen = [(inspect.getmodule(cls).__doc__ or "").strip(), ""], set()
    for owner in filter(dataclasses.is_dataclass, cls.__mro__):
        for line in map(str.strip, inspect.getsource(owner).split("\n")):
            name = line.partition(":")[0]
            if line.startswith("#"):
                parts.append("\n" + line)
            elif name in owner.__annotations__ and name not in seen:  # (a class may override a field)
                parts.append("--" + line.replace("field(default_factory=list)", "[]"))
                seen.add(name)
    return "\n".join(parts)

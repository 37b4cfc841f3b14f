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
import shutil
import sys
import textwrap
import traceback
import types
import typing
from shlex import quote

from runtime.console import UserError

# Names that people know from other programs, and what they are called here: the first that the script has.
ELSEWHERE = {
    "lr": "learning_rate", "wd": "weight_decay", "momentum": "beta1", "warmup": "warmup_iters",
    "warmup_steps": "warmup_iters", "max_grad_norm": "grad_clip", "clip": "grad_clip",
    "epochs": "max_iters", "num_epochs": "max_iters", "num_train_epochs": "max_iters", "iters": "max_iters",
    "steps": "max_iters", "max_steps": "max_iters", "time": "budget",
    "batch": "batch_size", "bs": "batch_size", "per_device_train_batch_size": "batch_size",
    "micro_batch_size": "batch_size", "grad_accum": "gradient_accumulation_steps",
    "save_steps": "save_interval", "eval_steps": "eval_interval",
    "logging_steps": "log_interval", "early_stopping": "patience", "resume": "init_from=resume",
    "data": "dataset", "data_dir": "dataset", "data_path": "dataset", "train_data": "dataset",
    "output": "out json out_dir", "output_dir": "out out_dir", "save_dir": "out_dir out",
    "seq_len": "block_size", "seq_length": "block_size", "max_seq_len": "block_size", "context": "block_size",
    "context_length": "block_size", "ctx": "block_size", "n_ctx": "block_size",
    "max_length": "max_new_tokens block_size",
    "layers": "n_layer", "num_layers": "n_layer", "num_hidden_layers": "n_layer", "heads": "n_head",
    "num_heads": "n_head", "hidden_size": "n_embd", "d_model": "n_embd", "dim": "n_embd", "embed_dim": "n_embd",
    "vocab": "vocab_size", "lora": "lora_rank", "lora_r": "lora_rank", "rank": "lora_rank", "r": "lora_rank",
    "n": "max_new_tokens num_samples", "length": "max_new_tokens", "tokens": "max_new_tokens",
    "max_tokens": "max_new_tokens", "num_tokens": "max_new_tokens", "samples": "num_samples",
    "temp": "temperature", "t": "temperature", "p": "top_p", "k": "top_k", "greedy": "temperature=0",
    "text": "prompt", "input": "prompt", "fp16": "dtype=float16", "half": "dtype=float16", "bf16": "dtype=bfloat16",
    "precision": "dtype", "gpu": "device=cuda", "cuda": "device=cuda", "cpu": "device=cpu",
    "model_size": "preset", "data_file": "dataset", "eval_data": "data", "save_every": "save_interval",
    "eval_every": "eval_interval", "early_stopping_patience": "patience", "model_type": "tokenizer",
    "tokenizer_dir": "tokenizer", "use_quantization": "quantize=int8", "workers": "rows num_proc",
    "num_workers": "rows num_proc", "max_batch_size": "rows",
    "int8": "quantize=int8 format=int8", "load_in_8bit": "quantize=int8", "bits": "quantize=int8",
}
A_MODEL = "model", "model_path", "model_name", "model_name_or_path", "run", "ckpt", "ckpt_path", "checkpoint_path"
CODE_WORDS = {"None": "none", "True": "true", "False": "false", "field(default_factory=list)": ""}  # as one types them
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
        elif re.fullmatch(r"-[A-Za-z]\w+(=.*)?", argument):
            raise UserError(f"{argument} begins with one hyphen", f"-{argument}")
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
            raise UserError(f"--{name} needs a value", f"--{name}=VALUE, {describe(kind)}")
    return name, parse(text, kind, f"--{name}")


def read_config(path, kinds):
    """{name: value} of the settings that a config file assigns."""
    # 1. `train_small` is config/train_small.py of this project, wherever one is; a text is not a recipe.
    folder = os.path.join(os.path.dirname(os.path.dirname(__file__)), "config")
    recipe = os.path.join(folder, path.removeprefix("config/").removesuffix(".py") + ".py")
    if not os.path.exists(path) and os.path.isfile(recipe):
        path = recipe
    if not os.path.isfile(path):
        recipes = sorted(f"config/{name}" for name in os.listdir(folder) if name.endswith(".py"))
        near = difflib.get_close_matches(path, recipes, 1) or recipes
        raise UserError(f"there is no config file {path}", ", ".join(near))
    if not path.endswith(".py"):
        name = os.path.basename(path).partition(".")[0]
        raise UserError(f"{path} is not a config file: those end in .py",
                        f"for a text: python prepare.py {quote(path)}, then --dataset={quote(name)}")
    # 2. Run it, and take what it assigns.
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
        names = {other: ours(other, kinds)[0] for other in ELSEWHERE if ours(other, kinds)}
        names |= {setting: setting for setting in kinds}
        near = ours(name, kinds) or [names[other] for other in difflib.get_close_matches(name, names, 1)]
        fix = "--help lists every setting"
        if name in A_MODEL:
            fix = "--preset=NAME, or --init_from=RUN" if "preset" in kinds else "give the RUN without an option"
        elif near:
            fix = f"--{near[0]}"
        raise UserError(f"{where}: there is no setting {name!r}", fix)
    return kinds[name]


def ours(name, kinds):
    """What a name from elsewhere is called here: the settings of it that a script has."""
    return [words for words in ELSEWHERE.get(name, "").split() if words.partition("=")[0] in kinds]


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
    """What the script does, and its settings in groups: name, default, meaning, and [what it may be]."""
    module, kinds = inspect.getmodule(cls), typing.get_type_hints(cls)
    limits = getattr(module, "RANGES", None) or getattr(module, "LIMITS", {})
    ranges = {name: f"{low:,} to {high:,}" for names, (low, high) in limits.items() for name in names.split()}
    parts, seen = [(module.__doc__ or "").strip(), "", "Settings, with their defaults:"], set()
    for owner in filter(dataclasses.is_dataclass, cls.__mro__):
        for line in map(str.strip, inspect.getsource(owner).split("\n")):
            name = line.partition(":")[0]
            if line.startswith("#"):
                parts += ["", line[2:]]
            elif name in owner.__annotations__ and name not in seen:  # (a class may override a field)
                seen.add(name)
                code, _, meaning = line.partition("  # ")
                parts.append(help_entry(name, code.partition(" = ")[2], meaning, kinds[name], ranges.get(name)))
    return "\n".join(parts)


def help_entry(name, default, meaning, kind, limits):
    """One setting of the help: the meaning beside the name and its default, or below where they are long."""
    values = CODE_WORDS.get(default, default.strip('"'))
    allowed = limits
    if typing.get_args(kind) and kind != list[str]:
        allowed = describe(kind).replace(" or ", ", ")
    if allowed:
        meaning += f" [{allowed}]"
    left = f"  --{name}={values}"
    column, columns = 34, max(60, min(110, shutil.get_terminal_size((100, 24)).columns))
    lines = textwrap.wrap(meaning, columns - column, break_long_words=False, break_on_hyphens=False)
    if len(left) < column - 1:
        first = left.ljust(column) + (lines.pop(0) if lines else "")
    else:
        first = left
    return "\n".join([first, *(" " * column + line for line in lines)])

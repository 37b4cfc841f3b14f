# SPDX-License-Identifier: GPL-3.0-only
"""
Rows: how a line of JSON becomes checked fields.

    for where, row in json_lines("a.jsonl", decoded("a.jsonl"), fix):   # "a.jsonl, line 1", {"text": "..."}
        text = field(row, "text", str, where, fix)

What is wrong is one UserError that names file, line and field. `fix` says what a right row looks like.
"""
from shlex import quote

from runtime.console import UserError
from runtime.files import parse_json, read_json

RECORD_CHARACTERS = 64 << 20  # of a line of JSON, or a story, which is held in memory
KINDS = {str: "a text", int: "a number", list: "a list", dict: "an object"}
SQUAD = ('expected {"data": [{"paragraphs": [{"context": "...", "qas": [{"question": "...", "answers": '
         '[{"text": "..."}]}]}]}]}; other rows go into a .jsonl file, one per line')


class Skipped:
    """Rows and files that cannot be read: how many, and the first errors. strict: the first is raised."""

    SHOWN = 10

    def __init__(self, strict=False):
        self.strict, self.count, self.shown = strict, 0, []

    def add(self, error):
        if self.strict:
            raise error
        self.count += 1
        if self.count <= self.SHOWN:
            self.shown.append(error)


STRICT = Skipped(strict=True)


def field(row, name, kind, where, fix):
    """row[name], which has to be of this kind."""
    if isinstance(row, dict) and name in row:
        return check(row[name], name, kind, where, fix)
    found = ", ".join(row) or "none" if isinstance(row, dict) else kind_of(row)
    raise UserError(f"{where}: no field `{name}`; found {found}", fix)


def check(value, name, kind, where, fix):
    """`value`, if it is of this kind and, as a text, can be written in UTF-8."""
    if not isinstance(value, kind):
        raise UserError(f"{where}: `{name}` is not {KINDS[kind]} but {kind_of(value)}", fix)
    if kind is str:
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a pair, "\ud83d"
            half = ascii(value[error.start])
            raise UserError(f"{where}: `{name}` has half a character, {half}", fix) from None
    return value


def kind_of(value):
    return "null" if value is None else type(value).__name__


def json_lines(path, blocks, fix, skipped=STRICT):
    """(where, row) for every line that is not empty. blocks: the text of a .jsonl file, cut anywhere."""
    for number, line in enumerate(records(path, blocks, "\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                row = parse_json(line, where, fix)
            except UserError as error:
                skipped.add(error)
                continue
            yield where, row


def records(path, blocks, separator):
    """The texts between the separators of a file."""
    rest, number = "", 0
    for block in blocks:
        *ended, rest = (rest + block).split(separator)
        yield from ended
        number += len(ended)
        if len(rest) > RECORD_CHARACTERS:
            fact = f"text {number + 1} between {separator!r} has more than {RECORD_CHARACTERS:,} characters"
            raise UserError(f"{path}: {fact}", "split it, or give it as a .txt file")
    yield rest


def squad(path, questions=True):
    """(where, context, paragraph) for every paragraph of a .json in SQuAD's layout (arXiv 1606.05250).

    questions: False drops them while reading; they are four fifths of the file.
    """
    def drop(fields):
        fields.pop("qas", None)
        return fields

    content = read_json(path, SQUAD, object_hook=None if questions else drop)
    if isinstance(content, list):
        lines = "import json, sys; [print(json.dumps(row)) for row in json.load(open(sys.argv[1]))]"
        raise UserError(f"{path} is a list of rows", f"--format=chat for conversations; otherwise write one row "
                        f'per line: python -c "{lines}" {quote(path)} > rows.jsonl')
    for i, article in enumerate(field(content, "data", list, path, SQUAD)):
        for j, paragraph in enumerate(field(article, "paragraphs", list, f"{path}, data[{i}]", SQUAD)):
            where = f"{path}, data[{i}].paragraphs[{j}]"
            yield where, field(paragraph, "context", str, where, SQUAD).strip(), paragraph

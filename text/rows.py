# SPDX-License-Identifier: GPL-3.0-only
"""
Rows: how a line of JSON becomes checked fields.

    for where, row in json_lines("a.jsonl", decoded("a.jsonl"), fix):   # "a.jsonl, line 1", {"text": "..."}
        text = field(row, "text", str, where, fix)

json_list, csv_rows and parquet_rows read the rows of other files, none of which is held in memory. What is wrong
is one UserError that names file, line and field. `fix` says what a right row looks like.
"""
import csv
import itertools
import json
import re

from runtime.console import UserError, counted, needs
from runtime.files import check_size, open_unpacked, parse_json, read_json

RECORD_CHARACTERS = 64 << 20  # of a line or a row, which is held in memory
KINDS = {str: "a text", int: "a number", list: "a list", dict: "an object"}
SQUAD = ('expected {"data": [{"paragraphs": [{"context": "...", "qas": [{"question": "...", "answers": '
         '[{"text": "..."}]}]}]}]}; other rows go into a .jsonl file, one per line')


class Skipped:
    """Rows and files that cannot be read: how many, and the first errors. strict: the first is raised."""

    SHOWN = 3

    def __init__(self, strict=False):
        self.strict, self.count, self.shown = strict, 0, []

    def add(self, error):
        if self.strict:
            raise error
        self.count += 1
        if self.count <= self.SHOWN:
            self.shown.append(error)

    def file(self, found):
        """What is found in a file. It is skipped if it cannot be read; but not the rest of one that was begun."""
        begun = False
        try:
            for one in found:
                begun = True
                yield one
        except UserError as error:
            if begun:
                raise
            self.add(error)


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
    for number, line in enumerate(lines(path, blocks), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                row = parse_json(line, where, fix)
            except UserError as error:
                skipped.add(error)
                continue
            yield where, row


START, COMMA = re.compile(r"\s*\[\s*(?=[^\]])"), re.compile(r"\s*,\s*")  # what stands before an element


def json_list(path, blocks, fix, skipped=STRICT):
    """(where, row) for every element of a .json file that is a list. (What is not JSON cannot be skipped.)"""
    decode, text, number, wanted = json.JSONDecoder().raw_decode, next(blocks, "").lstrip(), 0, 0
    if not text.startswith("["):
        raise UserError(f"{path} is not a list of rows", fix)
    for block in itertools.chain([""], blocks, [None]):
        # 1. An element is decoded again until all of it is here: each time from twice as much.
        text, ended = text + (block or ""), block is None
        if len(text) < wanted and not ended:
            continue
        at = 0
        check_size(text, f"{path}, number {number + 1}")
        # 2. The elements that are here. A number at the end may go on.
        try:
            while before := (COMMA if number else START).match(text, at):
                row, end = decode(text, before.end())
                if end == len(text) and not ended:
                    break
                number, at = number + 1, end
                yield f"{path}, number {number}", row
        except (RecursionError, ValueError) as error:
            wrong = ended or not isinstance(error, json.JSONDecodeError)
            if wrong or len(text) - at > RECORD_CHARACTERS:
                fact = f"{path}, number {number + 1}: not JSON: {getattr(error, 'msg', error)}"
                raise UserError(fact, fix) from None
        text = text[at:]
        wanted = 2 * len(text)
    if "".join(text.split()) != ("]" if number else "[]"):
        raise UserError(f"{path}: not JSON: the list does not end after number {number}", fix)


def csv_rows(path, blocks, fix, skipped=STRICT):
    """(where, row) for every row of a table. The first line names its columns."""
    csv.field_size_limit(RECORD_CHARACTERS)
    rest = (line + "\n" for line in lines(path, blocks))
    names = next(rest)
    delimiter = max(",;\t|", key=names.count)  # a German Excel writes semicolons
    reader = csv.reader(itertools.chain([names], rest), delimiter=delimiter)
    try:
        columns = next(reader)
        for row in filter(None, reader):
            where = f"{path}, line {reader.line_num}"
            if len(row) == len(columns):
                yield where, dict(zip(columns, row))
            else:
                fact = f"{counted(len(row), 'column')}, but the first line has {len(columns)}"
                skipped.add(UserError(f"{where}: {fact}", f'quote a text that contains "{delimiter}"'))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV: {error}", "save it as CSV again") from None


def parquet_rows(path, blocks, fix, skipped=STRICT):
    """(where, row) for every row of a .parquet file, which is no text: a library reads it, and not `blocks`."""
    pyarrow = needs("pyarrow", ".parquet files")
    from pyarrow import parquet
    number = 0
    try:
        with open_unpacked(path) as file:
            for batch in parquet.ParquetFile(file).iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (ValueError, OverflowError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {path}: {error}", "check the file, or leave it out") from None


def lines(path, blocks):
    """The lines of a file, without their ends."""
    rest, number = "", 0
    for block in blocks:
        *ended, rest = (rest + block).split("\n")
        yield from ended
        number += len(ended)
        if len(rest) > RECORD_CHARACTERS:
            raise UserError(f"{path}, line {number + 1} has more than {RECORD_CHARACTERS:,} characters",
                            "split it, or give it as a .txt file")
    yield rest


def squad(path, questions=True):
    """(where, context, paragraph) for every paragraph of a .json in SQuAD's layout (arXiv 1606.05250).

    questions: False drops them while reading; they are four fifths of the file.
    """
    def drop(fields):
        fields.pop("qas", None)
        return fields

    content = read_json(path, SQUAD, object_hook=None if questions else drop)
    for i, article in enumerate(field(content, "data", list, path, SQUAD)):
        for j, paragraph in enumerate(field(article, "paragraphs", list, f"{path}, data[{i}]", SQUAD)):
            where = f"{path}, data[{i}].paragraphs[{j}]"
            yield where, field(paragraph, "context", str, where, SQUAD).strip(), paragraph

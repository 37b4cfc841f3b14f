# SPDX-License-Identifier: GPL-3.0-only
"""What people's files are encoded in, and which kinds of files there are: read, or the command that converts them."""
import gzip
import json
import shutil
import subprocess

import pytest
from conftest import error

from text import chats, sources
import prepare

GERMAN = "\u00dcber den W\u00e4ldern ging die Sonne auf \u2014 und \u201eGr\u00f6\u00dfe\u201c war sch\u00f6n.\n" * 30
CHINESE = "\u5929\u5730\u7384\u9ec4\uff0c\u5b87\u5b99\u6d2a\u8352\u3002\u65e5\u6708\u76c8\u6603\uff0c\u8fb0\u5bbf\u5217\u5f20\u3002\n" * 30
JAPANESE = ("\u543e\u8f29\u306f\u732b\u3067\u3042\u308b\u3002\u540d\u524d\u306f\u307e\u3060\u7121\u3044\u3002"
            "\u3069\u3053\u3067\u751f\u308c\u305f\u304b\u3068\u3093\u3068\u898b\u5f53\u304c\u3064\u304b\u306c\u3002\n" * 30)
TRADITIONAL = "\u5929\u5730\u7384\u9ec3\uff0c\u5b87\u5b99\u6d2a\u8352\u3002\u65e5\u6708\u76c8\u6603\u3002\n" * 30
ENGLISH = "In English, most lines do not tell the encoding.\n" * 40_000


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("text", [GERMAN, CHINESE])
def test_a_byte_order_mark_says_how_to_read(here, encoding, text, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK_BYTES", 101)  # (cuts characters)
    (here / "a.txt").write_bytes(text.encode(encoding))
    assert "".join(sources.decoded("a.txt")) == text


@pytest.mark.parametrize("text, encoding", [
    (GERMAN, "cp1252"), (GERMAN, "utf-16-le"), (GERMAN, "utf-16-be"), (CHINESE, "gb18030"), (CHINESE, "utf-16-le"),
    (TRADITIONAL, "big5"), (JAPANESE, "shift_jis"), (JAPANESE, "euc_jp"), (GERMAN, "utf-32-le"), (CHINESE, "utf-32-be"),
    (ENGLISH + GERMAN, "cp1252"), (ENGLISH + CHINESE, "gb18030")])
@pytest.mark.parametrize("packed", [False, True])
def test_the_command_that_is_printed_converts(here, text, encoding, packed):
    name = "a b.txt.gz" if packed else "a b.txt"
    raw = text.encode(encoding)
    (here / name).write_bytes(gzip.compress(raw) if packed else raw)
    fact, fix = error(prepare.main, name)
    assert f"{name} is not UTF-8" in fact
    command, _, condition = fix.partition(" (it looks like ")
    assert condition and shutil.which("iconv")
    subprocess.run(command, shell=True, check=True)
    assert (here / "utf8.txt").read_bytes() == text.encode()


@pytest.mark.parametrize("damage, at", [(b"\xe9", "byte 0xe9 at offset"), ("\u00e9".encode()[:1], "byte 0xc3 at offset"),
                                        (bytes(900), "900 of its first")])
@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".csv"])
def test_damaged_utf_8_loses_what_is_damaged(here, damage, at, ending):
    (here / f"a{ending}").write_bytes(GERMAN.encode() + damage)
    fact, fix = error(lambda names: list(sources.decoded(*names)), f"a{ending}")
    command, _, condition = fix.partition(" (it looks like ")
    assert at in fact and condition == "UTF-8)"
    subprocess.run(command, shell=True)
    assert (here / f"utf8{ending}").read_bytes() == GERMAN.encode()


def test_no_encoding_at_all(here):
    (here / "a.txt").write_bytes(bytes(range(1, 256)) * 40)
    assert "does not look like text" in error(prepare.main, "a.txt")[1]


@pytest.mark.parametrize("name, tool", [
    ("ROWS of TEXT.pdf", "pdftotext 'ROWS of TEXT.pdf' 'ROWS of TEXT.txt'"), ("my book.pdf", "pdftotext 'my book.pdf' 'my book.txt'"), ("a.DOCX", "pandoc a.DOCX -t plain -o a.txt"),
    ("a.tar.gz", "tar xf a.tar.gz"), ("a.xz", "unxz a.xz"), ("a b.jsonl.zst", "zstd -d 'a b.jsonl.zst'"), ("a.xlsx", "save it as .csv"),
    ("a.xyz", "rename plain text to .txt")])
def test_other_kinds_of_files_name_the_tool(here, name, tool):
    (here / name).write_text("x")
    fact, fix = error(prepare.main, name)
    assert fact.startswith(f"{name} is not a supported kind of file") and tool in fix


def test_a_text_is_no_conversation(here):
    (here / "a.txt").write_text("x")
    assert error(prepare.main, "a.txt", "--format=chat")[1] == "leave out --format=chat"


def test_a_folder_says_what_it_left_out(here, capsys):
    (here / "in").mkdir()
    for name in ("a.txt", "b.pdf", "c.pdf", "d.docx", "e"):
        (here / "in" / name).write_text("the text is here\n" * 30)
    prepare.main(["in", "--tokenizer=char"])
    assert "in: left out 2 .pdf, 1 .docx, 1 without an extension" in capsys.readouterr().err


# ---------- Rows and files among others that cannot be read

GOOD_ROWS = [dict(messages=[dict(role="user", content=f"question {i}"), dict(role="assistant", content=f"answer {i}")])
             for i in range(20)]


def test_twenty_good_rows_and_two_that_are_not(here, capsys):
    bad = [dict(conversations=[]), dict(messages=[dict(role="alien", content="a")])]
    rows = [*GOOD_ROWS[:9], bad[0], *GOOD_ROWS[9:], bad[1]]
    (here / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare.main(["a.jsonl", "--format=chat", "--tokenizer=char"])
    said = capsys.readouterr().err
    assert "left out: a.jsonl, line 10: `conversations` is empty" in said
    assert "left out: a.jsonl, line 22: messages[0]: `role` is 'alien'" in said
    assert "2 unreadable, 20 read; --strict stops at the first" in said and "20 conversations" in said
    fact, _ = error(prepare.main, "a.jsonl", "--format=chat", "--tokenizer=char", "--strict", "--out=data/b")
    assert fact.startswith("a.jsonl, line 10") and not (here / "data/b").exists()


def test_a_file_of_rows_none_of_which_can_be_read(here):
    (here / "a.jsonl").write_text('{"text": 1}\n{broken\n')
    assert error(prepare.main, "a.jsonl")[0].startswith("a.jsonl, line 1")


def test_the_bad_files_of_a_folder_are_named_and_left_out(here, capsys):
    (here / "in").mkdir()
    for i in range(3):
        (here / f"in/{i}.txt").write_text(f"the {i}. text is here\n" * 30)
    (here / "in/bad.txt").write_bytes(b"caf\xe9\n" * 30)
    (here / "in/worse.txt").write_bytes(bytes(range(128, 256)) * 5)
    prepare.main(["in", "--tokenizer=char"])
    said = capsys.readouterr().err
    assert "left out: in/bad.txt is not UTF-8" in said and "left out: in/worse.txt is not UTF-8" in said
    assert "2 unreadable, 3 read; --strict stops at the first" in said and "3 documents" in said
    assert "in/bad.txt" in error(prepare.main, "in", "--tokenizer=char", "--strict", "--overwrite")[0]


@pytest.mark.parametrize("row, texts", [
    ([dict(role="user", content="a"), dict(role="assistant", content="b")], "ab"),
    (dict(conversations=[dict(role="user", content="a"), dict(role="assistant", content="b")]), "ab"),
    (dict(conversations=[{"from": "human", "value": "a"}, {"from": "chatgpt", "value": "b"}]), "ab"),
    (dict(messages=[dict(role="developer", content="s"), dict(role="user", content="a"),
                    dict(role="assistant", content="b")]), "sab"),
    (dict(instruction="a", context="c", response="b"), ["a\n\nc", "b"]),
    (dict(instruction="a", context="", response="b"), "ab"),
    (dict(prompt=[dict(role="user", content="a")], completion=[dict(role="assistant", content="b")]), "ab")])
def test_layouts_of_others(row, texts):
    assert [message["content"] for message in chats.read(row, "here")] == list(texts)


def test_fields_of_ones_own(here, capsys):
    (here / "a.jsonl").write_text("".join(json.dumps(dict(q=f"what {i}", response=f"that {i}")) + "\n" for i in range(9)))
    assert "no conversation fields; found q, response" in error(prepare.main, "a.jsonl", "--format=chat")[0]
    prepare.main(["a.jsonl", "--format=chat", "--fields=q,response", "--tokenizer=char"])
    assert "9 conversations" in capsys.readouterr().err

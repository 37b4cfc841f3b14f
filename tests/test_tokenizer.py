# SPDX-License-Identifier: GPL-3.0-only
"""Tokenizers: nothing is lost, nothing is forged, and a small text is no trouble."""
import random

import pytest
from conftest import error, words

import tokenizer as tokenizers
from tokenizer import END_OF_TEXT, SPECIAL

NASTY = ["", " ", "  two  spaces ", "\ttab\t\t", "line\r\nline\rline\n\n\n", "a\0b", "\u2581", " \u2581\u2581 x\u2581",
         "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467", "e\u0301", "\ufb01 \u00bd \u2460",
         "\u4e2d\u6587\u3002", "\u0627\u0644", "\u202eright to left", "\ufeffmark", "<unk><s></s><0x41>",
         "".join(SPECIAL), "\U0010ffff\u0080",
         "def f(x):\n    return  x\n", "2026-11-23", "x" * 5000, " " * 300]


@pytest.fixture(scope="module")
def bpe():
    return tokenizers.train("bpe", [words(20_000), "\tx\r\n  y caf\u00e9 \u4e2d\n" * 20], 400)


@pytest.mark.parametrize("text", NASTY)
def test_bpe_loses_nothing(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert b"".join(map(bpe.token_bytes, ids)) == text.encode()
    assert not set(ids) & set(bpe.special.values())  # text never becomes a special token
    assert all(0 < i < bpe.vocab_size for i in ids)  # nor the unknown one


def test_random_text_loses_nothing(bpe):
    rng = random.Random(0)
    for _ in range(1000):
        text = "".join(rng.choice([chr(rng.randrange(32, 127)), chr(rng.randrange(1, 0xD800)), " ", "\n", "\u2581",
                                   chr(rng.randrange(0xE000, 0x10FFFF))]) for _ in range(rng.randrange(30)))
        assert bpe.decode(bpe.encode(text)) == text


def test_block_character_is_three_byte_pieces(bpe):
    ids = bpe.encode("\u2581")
    assert [bpe.token_bytes(i) for i in ids] == [b"\xe2", b"\x96", b"\x81"]


def test_any_ids_can_be_decoded(bpe):
    rng = random.Random(0)
    for _ in range(200):
        bpe.decode([rng.randrange(bpe.vocab_size + 50) for _ in range(20)])  # half characters and padding: never raises


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_specials_exist_and_everything_survives_the_disk(kind, tmp_path, bpe):
    tokenizer = bpe if kind == "bpe" else tokenizers.train("char", ["hello\tworld\r\n \u4e2d\U0001f600"])
    assert list(tokenizer.special) == list(SPECIAL) and len(set(tokenizer.special.values())) == 5
    assert all(tokenizer.token_bytes(i) == b"" for i in tokenizer.special.values())
    tokenizer.save(tmp_path / "t")
    again = tokenizers.load(tmp_path / "t")
    assert (again.kind, again.vocab_size, again.special) == (kind, tokenizer.vocab_size, tokenizer.special)
    text = "hello \r\n\u4e2d"
    assert again.encode(text) == tokenizer.encode(text) and again.decode(again.encode(text)) == text
    assert len(tokenizers.fingerprint(tmp_path / "t")) == 64


def test_char():
    tokenizer = tokenizers.train("char", ["banana\n"])
    assert tokenizer.vocab_size == 5 + 4 and tokenizer.encode("ban\n") == [7, 6, 8, 5]
    assert tokenizer.decode([7, tokenizer.special[END_OF_TEXT], 6]) == "ba"
    fact, _ = error(lambda _: tokenizer.encode("ban?"))
    assert "'?'" in fact and "U+003F" in fact and "the 4 " in fact


def test_smallest_vocabulary_is_named_and_works():
    text = "abcdefgh \n" * 30
    fact, fix = error(lambda _: tokenizers.train("bpe", [text], 100))
    assert "vocab_size=100" in fact
    smallest = int(fix.split("=")[1].split()[0])
    assert smallest == 10 + 256 + 6  # 8 letters, space, line end; bytes; specials and the unknown token
    assert tokenizers.train("bpe", [text], smallest).vocab_size == smallest
    error(lambda _: tokenizers.train("bpe", [text], smallest - 1))
    for other in ("nospaces\n" * 30, "a \u2581\0b\n" * 30):
        smallest = int(error(lambda _: tokenizers.train("bpe", [other], 9))[1].split("=")[1].split()[0])
        assert tokenizers.train("bpe", [other], smallest).vocab_size == smallest


def test_a_small_text_gets_a_smaller_vocabulary(capsys):
    tokenizer = tokenizers.train("bpe", ["to be or not to be\n" * 20], 4096)
    assert tokenizer.vocab_size < 400
    assert f"the vocabulary has {tokenizer.vocab_size:,}" in capsys.readouterr().err
    assert tokenizer.decode(tokenizer.encode("or not\n")) == "or not\n"


@pytest.mark.parametrize("config, vocab", [("{}", "[]"), ("junk", "[]"), ('{"kind": "zzz"}', "[]"),
                                           ('{"kind": "char"}', "[1, 2]"), ('{"kind": "char"}', "{"),
                                           ('{"kind": "bpe"}', "")])
def test_a_damaged_tokenizer_is_named(tmp_path, config, vocab):
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "vocab.json").write_text(vocab)
    assert f"the tokenizer in {tmp_path} is damaged" in error(lambda _: tokenizers.load(tmp_path))[0]


def test_unknown_kind():
    assert "'wordpiece'" in error(lambda _: tokenizers.train("wordpiece", ["x"]))[0]


def test_without_sentencepiece_the_error_says_what_to_install(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert "pip install sentencepiece" in error(lambda _: tokenizers.train("bpe", ["hello " * 100], 300))[1]

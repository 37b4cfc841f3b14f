# SPDX-License-Identifier: GPL-3.0-only
"""Downloads: a server that cuts, stalls, lies, redirects and gives web pages; and every name, with its real layout."""
import contextlib
import gzip
import hashlib
import http.server
import json
import os
import random
import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import requests
from conftest import error, words
from faults import Run
from programs import until

import dataset as datasets
from text import download
from runtime import files
import prepare
from text import sources
import tokenizer as tokenizers


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` {path: bytes} with ranges; `mode` says how it misbehaves, `asked` what it was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.mode, self.asked, self.version = {}, "", [], "1"
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()  # it ends as soon as it is told

    def handle_error(self, request, client_address):  # a client that left
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        server, mode, wanted = self.server, self.server.mode, self.headers.get("Range", "")
        server.asked.append((self.path, wanted))
        if wanted:
            server.if_range = self.headers.get("If-Range")
        name, _, argument = mode.partition(":")
        if name == "status" or self.path not in server.files and not self.path.startswith("/cdn"):
            return self.answer(int(argument or 404), b"no")
        if name == "circle":
            return self.answer(302, b"", Location=self.path)
        if name == "elsewhere" and not self.path.startswith("/cdn"):  # as Hugging Face does for large files
            return self.answer(302, b"", Location="/cdn" + self.path)
        if name == "login":
            return self.answer(200, b"<!DOCTYPE html><html><body>Log in", **{"Content-Type": "text/html"})
        if name == "page":  # one that does not say what it is
            return self.answer(200, b"\n<html><head>", **{"Content-Type": "text/plain"})
        if name == "mute":
            return time.sleep(float(argument))
        body = server.files[self.path.removeprefix("/cdn")]
        start = int(wanted[6:-1]) if wanted and name != "norange" else 0
        if start >= len(body) and wanted:
            return self.answer(416, b"")
        part, head = body[start:], {"ETag": server.version} if name != "anonymous" else {}
        if start:
            head["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        if name == "mixed" and start:  # a part of another version than the one that was begun
            return self.answer(206, bytes(len(part)), **{**head, "Content-Range": f"bytes {start}-9999999/10000000"})
        if name == "chunks":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"1000\r\nhello")
            self.close_connection = True
            return
        if name == "packed":
            head["Content-Encoding"] = "br"
        length = int(argument) if name == "length" else len(part)
        if name == "garbled":
            part = bytes([part[0] ^ 1]) + part[1:]
        self.send_response(206 if start else 200)
        for key, value in head.items():
            self.send_header(key, value)
        if name == "endless":
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(part * 3)
            self.close_connection = True
            return
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if name in ("cut", "stall"):  # so many bytes, and then no more
            self.wfile.write(part[:int(argument)])
            self.wfile.flush()
            time.sleep(2 if name == "stall" else 0)
            self.close_connection = True
        elif name == "slow":
            for i in range(0, len(part), 1 << 14):
                self.wfile.write(part[i:i + (1 << 14)])
                time.sleep(float(argument))
        else:
            self.wfile.write(part)
            self.close_connection = length != len(part)

    def answer(self, status, body, **head):
        self.send_response(status)
        for key, value in head.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server(monkeypatch):
    server = Server()
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, "RETRY_SECONDS", 0)
    yield server
    server.shutdown()
    server.server_close()


TEXT = words(200_000).encode()


def fetch(server, path="/a.txt", **due):
    server.files.setdefault(path, TEXT)
    return download.download(server.url + path, "down/a.txt", **due)


def sha(raw):
    return hashlib.sha256(raw).hexdigest()


def test_a_file_is_fetched_once_and_its_size_is_said(here, server, capsys):
    path = fetch(server, size=len(TEXT), sha256=sha(TEXT))
    assert open(path, "rb").read() == TEXT and os.listdir("down") == ["a.txt"]
    assert f"{server.url}/a.txt: 0.2 MB" in capsys.readouterr().err
    asked = len(server.asked)
    fetch(server, size=len(TEXT), sha256=sha(TEXT))
    assert len(server.asked) == asked and "using down/a.txt for " in capsys.readouterr().err
    (here / "down/a.txt").write_bytes(b"changed")
    assert "rm down/a.txt" in error(lambda _: fetch(server, size=len(TEXT), sha256=sha(TEXT)))[1]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("mode", ["cut:30000", "cut:1", "cut:0", "length:300000"])
def test_what_was_cut_goes_on_behind_the_last_byte(here, server, mode, known):
    due = dict(size=len(TEXT), sha256=sha(TEXT)) if known else {}
    server.mode = mode
    fact, fix = error(lambda _: fetch(server, **due))
    if mode.startswith("length"):
        assert ("the server's file has 300,000 bytes, not 200,000" if known else "416") in fact
    else:
        assert "the connection ended or stalled, 5 times" in fact and "rerun to resume" in fix
    server.mode = ""
    server.asked.clear()
    assert open(fetch(server, **due), "rb").read() == TEXT
    assert os.listdir("down") == ["a.txt"] or mode.startswith("length")
    if mode == "cut:30000":
        assert server.asked[1] == ("/a.txt", "bytes=150000-")


def test_a_stalled_server(here, server, monkeypatch):
    monkeypatch.setattr(download, "STALL_SECONDS", 0.2)
    monkeypatch.setattr(download, "TRIES", 2)
    for mode in ("stall:50000", "mute:1"):
        server.mode = mode
        assert "the connection ended or stalled" in error(lambda _: fetch(server))[0]
    server.mode = ""
    assert open(fetch(server), "rb").read() == TEXT


def test_a_file_that_changed_is_begun_anew(here, server):
    server.mode = "cut:30000"
    error(lambda _: fetch(server))
    server.mode, server.version = "", "2"
    server.files["/a.txt"] = TEXT[::-1]
    assert open(fetch(server), "rb").read() == TEXT[::-1]


def test_a_part_of_another_version_is_not_added(here, server):
    server.mode = "cut:30000"
    error(lambda _: fetch(server))
    server.mode = "mixed"
    assert open(fetch(server), "rb").read() == TEXT


@pytest.mark.parametrize("where, name", [(download, "receive"), (download, "file_sha256"), (os, "replace")])
def test_two_at_once(here, server, monkeypatch, where, name):
    """The second one is told, from the first byte to the moment when the file has its name."""
    function = getattr(where, name)

    def try_and_do(*args):
        monkeypatch.setattr(where, name, function)
        assert "another process is writing down/a.txt" in error(lambda _: fetch(server))[0]
        return function(*args)
    monkeypatch.setattr(where, name, try_and_do)
    assert open(fetch(server, sha256=sha(TEXT)), "rb").read() == TEXT and os.listdir("down") == ["a.txt"]


def test_a_lock_that_was_removed_holds_nobody_off(here):
    """Who waited for a lock holds a file that the one before has removed: it is not the lock of those that follow."""
    inside, most = [], []

    def hold(_):
        with files.locked("a", wait=True):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.001)
            inside.pop()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(hold, range(400)))
    assert max(most) == 1 and len(most) == 400 and not os.listdir()


@pytest.mark.parametrize("hops", [["https"], ["http", "https"], ["https", "http"]])
def test_every_hop_is_encrypted_once_the_first_one_was(here, monkeypatch, hops):
    """A server in between that is asked without encryption may send on to anywhere."""
    answers = [SimpleNamespace(url=f"{scheme}://host/a.txt", status_code=200, reason="OK", headers={}, history=[])
               for scheme in hops]
    answers[-1].history = answers[:-1]
    monkeypatch.setattr(requests, "get", lambda *_, **__: answers[-1])
    if "http" in hops:
        assert "redirects to http://host/a.txt, without" in error(lambda _: download.download("https://host/a.txt", "down/a.txt"))[0]
    else:
        assert download.get("https://host/a.txt") is answers[-1]


def test_a_server_without_ranges_or_names_for_its_versions(here, server):
    for first, then in (("cut:30000", "norange"), ("anonymous", "anonymous")):
        shutil.rmtree("down", ignore_errors=True)
        server.mode = first
        if first.startswith("cut"):
            error(lambda _: fetch(server))
        server.mode = then
        assert open(fetch(server), "rb").read() == TEXT


@pytest.mark.parametrize("mode, due", [
    ("status:404", "404 Not Found"), ("status:403", "403 Forbidden"),
    ("status:500", "500 Internal Server Error, 5 times"), ("status:429", "429 Too Many Requests, 5 times"),
    ("circle", "Exceeded 30 redirects"),
    ("login", "it is a web page, not a text"), ("page", "it is a web page, not a text"),
    ("chunks", "the connection ended or stalled"), ("status:416", "416"),
    ("status:300", "300 Multiple Choices"), ("packed", "sends it compressed (br)"),
    ("garbled", "its sha256 is"), ("length:12", "the server's file has 12 bytes, not 200,000"),
    ("endless", "its sha256 is")])
def test_what_servers_do(here, server, mode, due):
    server.mode = mode
    known = {} if mode == "page" else dict(size=len(TEXT), sha256=sha(TEXT))
    fact, fix = error(lambda _: fetch(server, **known))
    assert due in fact and "down/a.txt" in fix and not os.path.exists("down/a.txt")


def test_other_errors(here, server, monkeypatch):
    fact, _ = error(lambda _: download.download("http://127.0.0.1:9/a.txt", "down/a.txt"))
    assert fact == "http://127.0.0.1:9/a.txt cannot be fetched: [Errno 111] Connection refused"
    assert ": not a valid URL" in error(lambda _: download.download("http://[::1", "down/a.txt"))[0]
    server.files["/empty.txt"] = b""
    assert "the connection ended or stalled" in error(lambda _: fetch(server, "/empty.txt"))[0]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 1000))
        assert "0.2 MB to go, but only 0.0 MB of disk space left" in error(lambda _: fetch(server))[0]
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "requests", None)
        assert "pip install requests" in error(lambda _: fetch(server))[1]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert "No space left on device" in error(lambda _: fetch(server))[0]
    assert open(fetch(server), "rb").read() == TEXT  # and after all of that, it is whole


# ---------------------------------------------------------------------------------------------------------------------
# The sources, end to end

def squad(contexts, version):
    """SQuAD's layout: articles of two paragraphs, each with questions."""
    question = [{"question": "Who?", "id": "1", "answers": [{"text": "the cat", "answer_start": 0}]}]
    paragraphs = [{"context": context, "qas": question} for context in contexts]
    return json.dumps({"version": version, "data": [{"title": f"T{i}", "paragraphs": paragraphs[i:i + 2]}
                                                    for i in range(0, len(paragraphs), 2)]}).encode()


def texts(folder):
    tokenizer, both = tokenizers.load_from(folder), []
    for side in ("train", "val"):
        ids = np.fromfile(f"{folder}/{side}.bin", np.uint16)
        ends = [*np.flatnonzero(ids == tokenizer.special["<|endoftext|>"]), len(ids)]
        both.append([tokenizer.decode(ids[a + 1:b].tolist()) for a, b in zip(ends, ends[1:])])
    return both


@pytest.fixture
def contents(server, monkeypatch):
    """Small files under the real addresses of every name, with their sizes and checksums."""
    paragraphs = [f"paragraph {i}: {words(300, seed=i)}" for i in range(240)]
    stories = [f"Once upon a time {i}. {words(200, seed=i)}" for i in range(300)]
    files = {"input.txt": TEXT, "train-v1.1.json": squad(paragraphs[:200], "1.1"),
             "dev-v1.1.json": squad(paragraphs[200:220], "1.1"),
             "train-v2.0.json": squad([f" {p} " for p in paragraphs[:200]] + paragraphs[220:230], "v2.0"),
             "dev-v2.0.json": squad(paragraphs[200:220] + paragraphs[230:], "v2.0"),
             "TinyStories-train.txt": "".join(story + "\n<|endoftext|>\n" for story in stories[:280]).encode(),
             "TinyStories-valid.txt": "".join(story + "\n<|endoftext|>\n" for story in stories[270:]).encode()}
    for name, remotes in sources.NAMES.items():
        small = []
        for url, _, _ in remotes:
            raw = files[url.rsplit("/", 1)[1]]
            server.files["/" + url.split("/", 3)[3]] = raw
            small.append((url, len(raw), sha(raw)))
        monkeypatch.setitem(sources.NAMES, name, small)
    return paragraphs, stories


def test_shakespeare(here, server, contents):
    prepare.main(["shakespeare", f"--mirror={server.url}", "--tokenizer=char"])
    (train,), (val,) = texts("data/shakespeare")
    assert train + val == TEXT.decode()
    assert server.asked[0][0] == "/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


def test_squad_has_each_context_once(here, server, contents, capsys):
    prepare.main(["squad", f"--mirror={server.url}/", "--vocab_size=400"])
    train, val = texts("data/squad")
    assert sorted(train + val) == sorted(p.strip() for p in contents[0]) and len(val) > 2
    assert "240 documents" in (said := capsys.readouterr().err) and "dropped: 220 exact duplicates" in said
    assert [path for path, _ in server.asked] == [
        f"/SQuAD-explorer/dataset/{side}-{version}.json" for version in ("v1.1", "v2.0") for side in ("train", "dev")]


def test_tinystories_through_a_redirect(here, server, contents, capsys):
    server.mode = "elsewhere"
    prepare.main(["tinystories", f"--mirror={server.url}", "--vocab_size=400"])
    train, val = texts("data/tinystories")
    assert train == [s + "\n" for s in contents[1][:280]] and val == [s + "\n" for s in contents[1][280:]]
    assert "10 exact duplicates" in capsys.readouterr().err  # what is on both sides stays on the training side


def test_a_continued_download_names_its_version(here, server):
    server.mode = "cut:9"
    error(lambda _: fetch(server))
    server.mode = ""
    fetch(server)
    assert server.if_range == server.version


def test_files_that_are_there_already(here, server, contents):
    for i, (path, raw) in enumerate(server.files.items()):
        (here / path.rsplit("/", 1)[1]).write_bytes(raw)
    server.shutdown()
    prepare.main(["train-v1.1.json", "dev-v1.1.json", "--tokenizer=char", "--out=data/squad"])
    assert len(sum(texts("data/squad"), [])) == 220
    prepare.main(["TinyStories-train.txt", "TinyStories-valid.txt", "--tokenizer=char", "--out=data/tinystories"])
    train, val = texts("data/tinystories")
    assert len(train) == 280 and len(val) == 20


@pytest.mark.parametrize("name", ["book.txt", "my%20book.txt?download=1", "rows.jsonl", "book.txt.gz", "rows.jsonl.gz",
                                  "book.gz"])
def test_any_address(here, server, name):
    rows = [words(400, seed=i) for i in range(5)]
    raw = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode() if "rows" in name else TEXT
    server.files["/x/" + name] = gzip.compress(raw) if name.endswith("gz") else raw
    prepare.main([f"{server.url}/x/{name}", "--tokenizer=char", "--out=data/web"])
    train, val = texts("data/web")
    assert [a + b for a, b in zip(train, val)] == (rows if "rows" in name else [TEXT.decode()])
    origin = datasets.Dataset.open("data/web").meta["source"][0]
    assert origin.startswith(server.url) and sha(server.files["/x/" + name]) in origin


def test_the_secrets_of_an_address_are_neither_said_nor_written(here, server, capsys):
    server.files["/a.txt?sig=SECRET"] = TEXT
    address = server.url.replace("//", "//jane:SECRET@") + "/a.txt?sig=SECRET#SECRET"
    argv, said = [address, "--tokenizer=char", "--out=data/web"], []
    for mode in ("status:503", "status:404", "circle", "login", "packed", "cut:9", "", ""):
        server.mode = mode
        said += error(prepare.main, *argv) if mode else [str(prepare.main(argv))]
    for wrong in ("http://jane:SECRET@[x/a.txt", "http://jane:SECRET@h/a.pdf?SECRET", "http://jane:SECRET@h℀/a.txt",
                  "http://jane:SECRET@h:x/a.txt"):
        said += error(prepare.main, wrong)
    tokenizers.main(["--train", f"--input={address}", "--tokenizer=char", "--out=t"])
    meta = (here / "data/web/meta.json").read_text()
    assert f'"{server.url}/a.txt (sha256 {sha(TEXT)})"' in meta
    assert "SECRET" not in (everything := "\n".join([*said, meta, capsys.readouterr().err])), everything
    for old in (address, f"{address} (sha256 0)"):  # written before this was so
        (here / "data/web/meta.json").write_text(json.dumps({**json.loads(meta), "source": [old]}))
        assert datasets.Dataset.open("data/web").meta["source"] == [f"{server.url}/a.txt"]


def test_the_path_of_a_text_is_not_written_down(here):
    def number(folder):  # by which two folders with a file of the same name are told apart
        return hashlib.sha256(str(folder).encode()).hexdigest()[:6]
    (here / "a.txt").write_bytes(TEXT)
    (here / "b").mkdir()
    shutil.copy("a.txt", "b/b.txt")
    assert sources.fetch([str(here / "a.txt"), "b/b.txt", "stdlib", str(here / "b/*.txt")])[1] == [
        f"a.txt (folder {number(here)})", "b/b.txt", sources.with_version("stdlib"), f"*.txt (folder {number(here / 'b')})"]


def test_an_address_of_something_else(here, server):
    for name in ("book.pdf", "page", ""):
        assert "not a supported kind of file" in error(prepare.main, f"{server.url}/{name}")[0]


@pytest.mark.parametrize("times", [8, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_at_random_moments_while_fetching_and_preparing(here, server, times):
    """Then the same command writes what an undisturbed one does, and nothing was fetched twice."""
    server.files["/book.txt"] = words(500_000, seed=2).encode()
    argv = [f"{server.url}/book.txt", "--vocab_size=300"]

    def files():
        paths = [path for path in (here / "data").rglob("*") if path.is_file()]
        return {path.relative_to(here): path.read_bytes() for path in paths if not re.search(r"\.part|\.lock$", str(path))}
    def begun():
        """Is there a part of the download?"""
        with contextlib.suppress(FileNotFoundError):
            return any(path.is_file() and path.stat().st_size for path in (here / "data").rglob("*.part"))
    server.mode = "slow:0.01"
    for _ in range(2):  # the first process starts the one that all others are forked from
        shutil.rmtree(here / "data", ignore_errors=True)
        started = time.monotonic()
        assert Run(here, *argv, script="prepare").wait() == 0
    took, due, rng, killed = time.monotonic() - started, files(), random.Random(4), 0
    for _ in range(4 * times):  # (one that has ended already cannot be killed)
        if killed == times:
            break
        shutil.rmtree(here / ("data" if killed % 2 == 0 else "data/book"), ignore_errors=True)  # or go on fetching
        run = Run(here, *argv, script="prepare")
        if killed % 4 == 0:
            until(begun, "a part of the book has been fetched")
        else:
            time.sleep(rng.uniform(0, took))
        killed += run.kill() == -9
        assert not (here / "data/book").exists() or files() == due
    assert killed == times, f"of {4 * times} runs, only {killed} could be killed before they ended"
    assert Run(here, *argv, script="prepare").wait() == 0 and files() == due
    assert any(wanted for _, wanted in server.asked)

# SPDX-License-Identifier: GPL-3.0-only
"""
Download: fetch a file over a network that stalls and breaks off.

    path = download("https://example.org/book.txt", "data/downloads/book.txt", size=None, sha256=None)

A file under its own name is complete: bytes go to a `*.part` beside it, which is checked and renamed at the end.
A broken download continues after its last byte, in this process or the next. The name of the part has a hash of the
version (the sha256, or else the server's ETag), so bytes of two versions are never mixed.
"""
import errno
import hashlib
import os
import re
import shutil
import time
from shlex import quote

from runtime.console import Progress, UserError, needs, note, public, say
from runtime.files import file_sha256, locked

STALL_SECONDS = 30  # a connection that is silent for so long is given up
TRIES = 5
RETRY_SECONDS = 2  # waits 2, 4, 6, ... seconds before the next attempt
STOPPED = "the connection ended or stalled"
CHECK = "check the network, and the address: it must be that of the file itself"
MIRROR = "--mirror=ANOTHER_HOST"


class Interrupted(Exception):
    """Why an attempt failed, where another one may help."""


def download(address, path, size=0, sha256=""):
    """Fetch the address into `path` unless it is there; returns path. size, sha256: what it must be, where known."""
    url = public(address)
    if os.path.exists(path):
        if sha256 and file_sha256(path) != sha256:
            raise UserError(f"{path} is not what {url} should be: its sha256 is not {sha256[:12]}...",
                            f"rm {quote(path)}, and it is fetched again")
        note(f"{path} is there, from {url}: delete it to fetch it again")
        return path
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with locked(path):
            for attempt in range(1, TRIES + 1):
                try:
                    part = receive(address, path, size, sha256)
                    break
                except Interrupted as stop:
                    why = f"{url}: {stop}, {attempt} times"
                if attempt == TRIES:
                    raise UserError(why, "run the same command again: it continues where it stopped")
                say(f"{why}; trying again")
                time.sleep(RETRY_SECONDS * attempt)
            if sha256 and file_sha256(part) != sha256:
                os.remove(part)
                raise UserError(f"{url} is not the file that it should be: its sha256 is not {sha256[:12]}...", MIRROR)
            os.replace(part, path)
    except UserError as error:
        raise UserError(error.fact, f"{error.fix}; or download the file yourself, to {quote(path)}") from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}", "make room, or work in another folder") from None
    return path


def receive(address, path, size, sha256):
    """One attempt. Returns the path of the complete part."""
    import urllib3  # what requests is built on

    # 1) Which version does the server have, and how much of it is here?
    url, response = public(address), get(address)
    page = UserError(f"{url} gives a web page and not a text: a login, a notice, or a page about the file", CHECK)
    if "text/html" in response.headers.get("Content-Type", ""):
        raise page
    length = response.headers.get("Content-Length", "")
    total = int(length) if re.fullmatch("[0-9]{1,15}", length) else size  # 0: unknown
    if size and total != size:
        raise UserError(f"{url}: the server has a file of {total:,} bytes, but {size:,} are due", MIRROR)
    etag = response.headers.get("ETag", "")
    version = sha256 or etag
    part = f"{path}.{hashlib.sha256(f'{version} {total}'.encode()).hexdigest()[:8]}.part"
    have = os.path.getsize(part) if version and total and os.path.exists(part) else 0
    if have and have == total:
        return part

    # 2) Continue after these bytes. Start again if the server has no ranges, or another file by now.
    if have:
        response.close()
        headers = {"Range": f"bytes={have}-"}
        if not sha256:
            headers["If-Range"] = etag
        response = get(address, headers)
        if response.headers.get("Content-Range") != f"bytes {have}-{total - 1}/{total}":
            response = get(address)
            have = 0
    shown = f"{total / 1e6:,.1f} MB" if total else "of unknown size"
    say(f"{url}: {shown}, {have:,} bytes of it are here")
    folder = os.path.dirname(path)
    free = shutil.disk_usage(folder).free
    if total - have > free:
        raise OSError(errno.ENOSPC, f"{(total - have) / 1e6:,.1f} MB are to come, but {folder} has room for "
                      f"{free / 1e6:,.1f} MB")

    # 3) Receive.
    progress, stopped = Progress("fetching", total, have), False
    with open(part, "ab" if have else "wb") as file:
        try:
            for piece in response.raw.stream(1 << 16, decode_content=False):
                if have == 0 and piece.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
                    raise page
                have += len(piece)
                file.write(piece)
                progress.add(len(piece))
        except urllib3.exceptions.HTTPError:
            stopped = True
        file.flush()
        os.fsync(file.fileno())
    if stopped or have < total:
        raise Interrupted(f"{STOPPED} after {have:,} bytes")
    if not have:
        raise UserError(f"{url}: the server sent nothing", CHECK)
    return part


def get(address, headers={}):
    """The server's answer, checked; its body is not read yet."""
    url, requests = public(address), needs("requests", "downloads")
    headers = {"Accept-Encoding": "identity", **headers}
    try:
        response = requests.get(address, headers=headers, stream=True, timeout=(10, STALL_SECONDS))
    except requests.ReadTimeout:
        raise Interrupted(STOPPED) from None
    except ValueError:  # its text repeats the address, secrets and all
        raise UserError(f"{url} cannot be reached: it is no address", "https://HOST/FILE.txt") from None
    except requests.RequestException as error:
        # The innermost of many errors, "[Errno 111] Connection refused": those around it repeat the address.
        reason = str(error).split("(Caused by ")[-1].split(": ")[-1].strip("()'\"")
        raise UserError(f"{url} cannot be reached: {reason}", CHECK) from None

    status = f"the server answers {response.status_code} {response.reason}"
    if response.status_code >= 500 or response.status_code == 429:
        raise Interrupted(status)
    if response.status_code not in (200, 206):
        raise UserError(f"{url}: {status}", CHECK)
    for hop in [*response.history, response]:
        if url.startswith("https:") and not hop.url.startswith("https:"):
            raise UserError(f"{url} is sent on to {public(hop.url)}, without encryption", CHECK)
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity" and not address.endswith(".gz"):
        raise UserError(f"{url}: the server sends it packed ({encoding}), though asked not to", MIRROR)
    return response

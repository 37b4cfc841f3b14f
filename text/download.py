# SPDX-License-Identifier: GPL-3.0-only
"""
Download: fetch a file over a network that stalls, cuts, repeats and lies.

    path = download("https://example.org/book.txt", "data/downloads/book.txt", size=None, sha256=None)

The rules that make it dependable:

1. What has the name is whole. Bytes go to `*.part` beside it, which gets the name by one rename, at the end.
2. What was received is never asked for twice. The name of a part says which version of the file it belongs to, so that
   any later attempt, of this process or another, goes on behind its last byte, or begins anew if the file changed.
3. Nobody is believed. Where the size and the sha256 are known they are compared; where not, at least a web page (a
   login, a notice) is not taken for a text. The size is shown and the disk looked at before the first byte.
"""
import hashlib
import os
import re
import shutil
import time
from shlex import quote

from runtime.files import file_sha256, locked
from runtime.console import Progress, UserError, needs, note, public, say

STALL_SECONDS = 30  # no byte for so long is a failure
TRIES, RETRY_SECONDS = 5, 2  # so many failures without progress, and it is given up; waits 2, 4, 6, ... seconds
PROGRESS_BYTES = 1 << 20  # what counts as progress


def download(address, path, size=None, sha256=None):
    """Fetch the address into `path` unless it is there; returns path. What exists under that name is always whole.

    The bytes go to a file beside it, `*.part`, whose name says which version of the file they belong to: whatever
    ends this, the next call goes on behind the last byte. size, sha256: what it must be, where that is known.
    Raises UserError, after TRIES failures without progress.
    """
    url = public(address)
    if os.path.exists(path):
        if sha256 and (found := file_sha256(path)) != sha256:
            raise UserError(f"{path} is not what {url} should be: its sha256 is {found[:12]}, not {sha256[:12]}",
                            f"rm {quote(path)}, and it is fetched again")
        note(f"{path} is there, from {url}: delete it to fetch it again")
        return path
    failures, most, part = 0, 0, None
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with locked(path):
            while not part:
                try:
                    part = receive(address, path, size, sha256)
                except Interrupted as stop:
                    failures += 1
                    if stop.have >= most + PROGRESS_BYTES:
                        failures, most = 1, stop.have
                    if failures == TRIES:
                        raise Refused(f"{url}: {stop}, {TRIES} times; {stop.have:,} bytes are there",
                                      "run the same command again: it continues behind them") from None
                    say(f"{url}: {stop}; trying again behind {stop.have:,} bytes")
                    time.sleep(RETRY_SECONDS * failures)
            if sha256 and (found := file_sha256(part)) != sha256:
                os.remove(part)
                raise Refused(f"{url} is not the file that it should be: its sha256 is {found[:12]}, not {sha256[:12]}",
                              "--mirror=ANOTHER_HOST")
            os.replace(part, path)
    except Refused as error:
        raise UserError(str(error), f"{error.fix}; or download the file yourself, to {quote(path)}") from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}", "make room, or work in another folder") from None
    return path


class Refused(Exception):
    """Why a download cannot succeed, and what may help."""

    def __init__(self, why, fix="check the network, and the address: it must be that of the file itself"):
        super().__init__(why)
        self.fix = fix


class Interrupted(Exception):
    """Why a download stopped before its end; it can be continued behind the `have` bytes that are there."""

    def __init__(self, why, have):
        super().__init__(why)
        self.have = have


def receive(address, path, size, sha256):
    """One attempt: returns the path of the whole `*.part`. Raises Interrupted where another attempt may help."""
    import urllib3  # what requests is built on

    url, response = public(address), get(address)
    length = response.headers.get("Content-Length", "")
    total = int(length) if re.fullmatch("[0-9]{1,15}", length) else size
    if size and total != size:
        raise Refused(f"{url}: the server has a file of {total:,} bytes, but {size:,} are due", "--mirror=ANOTHER_HOST")
    version = response.headers.get("ETag") or response.headers.get("Last-Modified", "")
    version = "" if version.startswith("W/") else version  # a weak one does not promise the same bytes
    part = f"{path}.{hashlib.sha256(f'{sha256 or version} {total}'.encode()).hexdigest()[:8]}.part"
    have = os.path.getsize(part) if os.path.exists(part) else 0
    if not (sha256 or version) or total and have > total:
        have = 0  # nobody knows what these bytes belong to
    if have and have == total:
        return part
    if have:
        response.close()
        response = get(address, have, version)
        due = f"bytes {have}-" + (f"{total - 1}/{total}" if total else "")
        if response.status_code != 206 or not response.headers.get("Content-Range", "").startswith(due):
            have = 0  # the server has another file by now, or does not continue: from the start
            response = response if response.status_code == 200 else get(address)
    free = shutil.disk_usage(os.path.dirname(path)).free
    shown = f"{total / 1e6:,.1f} MB" if total else "of unknown size"
    say(f"{url}: {shown}" + f", {have:,} bytes of it are here" * bool(have))
    if total and total - have > free:
        raise UserError(f"{url}: {(total - have) / 1e6:,.1f} MB are to come, but {os.path.dirname(path)} has room for "
                        f"{free / 1e6:,.1f} MB", "make room, or work in a folder on another disk")
    progress = Progress("fetching", total or 0, have)
    broken = False
    with open(part, "ab" if have else "wb") as file:
        try:
            for piece in response.raw.stream(1 << 16, decode_content=False):
                if have == 0:
                    refuse_web_page(url, piece)
                have += len(piece)
                if total and have > total:
                    raise Refused(f"{url}: the server sends more than the {total:,} bytes that are due")
                file.write(piece)
                progress.add(len(piece))
        except urllib3.exceptions.ReadTimeoutError:
            raise Interrupted(f"no byte came for {STALL_SECONDS} seconds", have) from None
        except urllib3.exceptions.HTTPError:
            broken = True
        file.flush()
        os.fsync(file.fileno())
    if broken or total and have < total:
        raise Interrupted(f"the connection ended after {have:,} bytes" + f" of {total or 0:,}" * bool(total), have)
    if not have:
        raise Refused(f"{url}: the server sent nothing")
    return part


def get(address, have=0, version=""):
    """The server's answer to a request for the bytes from `have` on of this version; its body is not read yet."""
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": version} if version else {})
    url, requests = public(address), needs("requests", "downloads")
    try:
        response = requests.get(address, headers=headers, stream=True, timeout=(10, STALL_SECONDS))
    except requests.ReadTimeout:
        raise Interrupted(f"no answer came for {STALL_SECONDS} seconds", have) from None
    except ValueError:  # its text repeats the address, secrets and all
        raise UserError(f"{url} cannot be reached: it is no address", "https://HOST/FILE.txt") from None
    except requests.RequestException as error:
        # The innermost of many errors, "[Errno 111] Connection refused": those around it repeat the address.
        reason = str(error).split("(Caused by ")[-1].split(": ")[-1].strip("()'\"")
        raise Refused(f"{url} cannot be reached: {reason}") from None
    if response.status_code >= 500 or response.status_code == 429:
        raise Interrupted(f"the server answers {response.status_code} {response.reason}", have)
    if response.status_code not in ((200, 206, 416) if have else (200,)):
        raise Refused(f"{url}: the server answers {response.status_code} {response.reason}")
    for hop in [*response.history, response] if url.startswith("https:") else ():
        if not hop.url.startswith("https:"):
            raise Refused(f"{url} is sent on to {public(hop.url)}, without encryption")
    if "text/html" in response.headers.get("Content-Type", ""):
        refuse_web_page(url, b"<html")
    packed = response.headers.get("Content-Encoding", "identity")
    if packed != "identity" and not address.endswith(".gz"):
        raise Refused(f"{url}: the server sends it packed ({packed}), though asked not to")
    return response


def refuse_web_page(url, start):
    if start.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        raise Refused(f"{url} gives a web page and not a text: a login, a notice, or a page about the file")

# SPDX-License-Identifier: GPL-3.0-only
"""
Download: fetch a file over a network that stalls and breaks off.

    path = download("https://example.org/book.txt", "data/downloads/book.txt", size=0, sha256="")

A file under its own name is complete. Until then its bytes are in a `*.part` beside it, where the next attempt
continues. The name of the part has a hash of the version (the sha256, or else the server's ETag), so bytes of two
versions are never mixed.
"""
import hashlib
import os
import shutil
import time
from shlex import quote

from runtime.console import Progress, UserError, needs, note, public, say
from runtime.files import file_sha256, locked

STALL_SECONDS = 30  # a connection that is silent for so long is given up
TRIES = 5
RETRY_SECONDS = 2  # waits 2, 4, 6, ... seconds before the next attempt
STOPPED = "the connection ended or stalled"
PAGE = "it is a web page, not a text"


class Failed(Exception):
    """Why there is no file."""


class Interrupted(Failed):
    """Another attempt may help."""


def download(address, path, size=0, sha256=""):
    """Fetch the address into `path` unless it is there; returns path. size, sha256: what it must be, where known."""
    url = public(address)
    wrong = f"its sha256 is not {sha256[:12]}..."
    if os.path.exists(path):
        if sha256 and file_sha256(path) != sha256:
            raise UserError(f"{path} is not {url}: {wrong}", f"rm {quote(path)} and rerun to fetch it")
        note(f"using {path} for {url}; delete it to fetch it again")
        return path
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with locked(path):
            part = persist(address, path, size, sha256)
            if sha256 and file_sha256(part) != sha256:
                os.remove(part)
                raise Failed(wrong)
            os.replace(part, path)
    except Failed as why:
        raise UserError(f"{url} cannot be fetched: {why}",
                        "check the network and the URL, and rerun to resume; or give --mirror=ANOTHER_HOST, or "
                        f"download the file yourself to {quote(path)}") from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}", "free space, or work in another folder") from None
    return path


def persist(address, path, size, sha256):
    """The path of the complete part, after a few attempts."""
    for attempt in range(TRIES):
        time.sleep(RETRY_SECONDS * attempt)
        try:
            return receive(address, path, size, sha256)
        except Interrupted as stop:
            why = stop
            say(f"{public(address)}: {why}")
    raise Failed(f"{why}, {TRIES} times")


def receive(address, path, size, sha256):
    """One attempt. Returns the path of the complete part."""
    # 1) Which version does the server have, and how much of it is here?
    response = get(address)
    if "text/html" in response.headers.get("Content-Type", ""):
        raise Failed(PAGE)
    total = response.raw.length_remaining or size  # 0: unknown
    if size and total != size:
        raise Failed(f"the server's file has {total:,} bytes, not {size:,}")
    version = sha256 or response.headers.get("ETag", "")
    part = f"{path}.{hashlib.sha256(f'{version} {total}'.encode()).hexdigest()[:8]}.part"
    have = os.path.getsize(part) if version and total and os.path.exists(part) else 0
    if have and have == total:
        return part

    # 2) Continue after these bytes. Start again if the server has no ranges, or another file by now.
    if have:
        response.close()
        # If-Range: bytes of two versions are never mixed; a known checksum finds that out anyway.
        only_if = {} if sha256 else {"If-Range": version}
        response = get(address, Range=f"bytes={have}-", **only_if)
        if response.headers.get("Content-Range") != f"bytes {have}-{total - 1}/{total}":
            response = get(address)
            have = 0
    shown = f"{total / 1e6:,.1f} MB" if total else "of unknown size"
    say(f"{public(address)}: {shown}, {have:,} bytes already here")
    free = shutil.disk_usage(os.path.dirname(path)).free
    if total - have > free:
        raise Failed(f"{(total - have) / 1e6:,.1f} MB to go, but only {free / 1e6:,.1f} MB of disk space left")
    with open(part, "ab" if have else "wb") as file:
        write(response, file, have, total)
    return part


def write(response, file, have, total):
    """Append the body of the response to a file that has `have` bytes of `total`."""
    import urllib3  # what requests is built on

    progress = Progress("fetching", total, have)
    try:
        for piece in response.raw.stream(1 << 16, decode_content=False):
            if have == 0 and piece.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
                raise Failed(PAGE)
            have += len(piece)
            file.write(piece)
            progress.add(len(piece))
    except urllib3.exceptions.HTTPError:
        raise Interrupted(STOPPED) from None
    if have < max(total, 1):
        raise Interrupted(STOPPED)
    file.flush()
    os.fsync(file.fileno())


def get(address, **headers):
    """The server's answer, checked; its body is not read yet."""
    requests = needs("requests", "downloads")
    headers["Accept-Encoding"] = "identity"
    try:
        response = requests.get(address, headers=headers, stream=True, timeout=(10, STALL_SECONDS))
    except requests.ReadTimeout:
        raise Interrupted(STOPPED) from None
    except ValueError:  # its text repeats the address, secrets and all
        raise Failed("not a valid URL") from None
    except requests.RequestException as error:
        # The innermost of many errors, "[Errno 111] Connection refused": those around it repeat the address.
        raise Failed(str(error).split("(Caused by ")[-1].split(": ")[-1].strip("()'\"")) from None

    status = f"the server answers {response.status_code} {response.reason}"
    if response.status_code >= 500 or response.status_code == 429:
        raise Interrupted(status)
    if response.status_code not in (200, 206):
        raise Failed(status)
    for hop in [*response.history, response]:
        if address.startswith("https:") and not hop.url.startswith("https:"):
            raise Failed(f"it redirects to {public(hop.url)}, without encryption")
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise Failed(f"the server sends it compressed ({encoding})")
    return response

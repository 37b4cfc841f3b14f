# SPDX-License-Identifier: GPL-3.0-only
"""
HTTP that trusts nothing: the standard library's server, with a bound on everything.

    web = Web(settings, routes={"/health": {"GET": function}}, public=("/health",), key="", answered=print)
    web.serve_forever()          # function(connection) returns JSON such as {"status": "ok"}

Python's http.server accepts a length of -1, a body that hides a second request, a header that never ends.
Here a request beyond a limit, or one that can be read in two ways, gets one short answer and is the last.

Every connection has a thread. When all are taken, a new connection replaces the one that has waited longest
for its client, so that nobody can keep others out by sending nothing.
"""
import contextlib
import hmac
import io
import json
import re
import select
import socket
import socketserver
import sys
import threading
import time
import traceback
import urllib.parse
from collections import Counter
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from runtime.console import UserError, print_error
from runtime.files import parse_json

JSON = "application/json"
MAX_HEAD = 1 << 17  # bytes of all headers
MAX_VALUES = 200_000  # of the JSON in a body: a megabyte of "{}," would become 30 of Python objects
PARSERS = 4  # bodies that are parsed at once
SPARE = 8  # connections beyond max_connections, for /health; other paths answer 503 there
LOOPBACK = ("127.0.0.1", "localhost", "::1")
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]", "0.0.0.0")  # what browsers call this machine
LONGEST_LINE = 1 << 10  # bytes of a line between the chunks of a body
CHUNK_LINE = re.compile(rb"([0-9a-fA-F]{1,8})[ \t]*(?:;[\t -~]*)?\r\n")  # a size, and extensions that nobody uses
LINE_END = re.compile(rb"\r\n")
TRAILER = re.compile(rb"(?:[!#-'*+.0-9A-Z^-z|~-]+:[\t -~\x80-\xff]*)?\r\n")  # a header behind them, or their end
ERROR_TYPES = {401: "authentication_error", 500: "server_error", 503: "overloaded_error"}


class Refuse(Exception):
    """An answer that is an error, in OpenAI's form."""

    def __init__(self, status, message, param=None, code=None, headers=()):
        self.status, self.headers = status, dict(headers)
        if status == 503:
            self.headers["Retry-After"] = "1"
        kind = ERROR_TYPES.get(status, "invalid_request_error")
        self.body = {"error": {"message": message[:300], "type": kind, "param": param, "code": code}}


def dump(content):
    """JSON in ASCII, without the < that could begin a tag in a browser."""
    return json.dumps(content, allow_nan=False).replace("<", "\\u003c").encode()


def hang_up(connection):
    with contextlib.suppress(OSError):  # the client may have been faster
        connection.shutdown(socket.SHUT_RDWR)


def without_port(host):
    return re.sub(r":[0-9]{1,5}\Z", "", host).lower()


class Web(ThreadingHTTPServer):
    """The listening socket, and the limits on connections.

    routes: {path: {method: function}}; a function that returns None has answered itself. public: paths that
    need no key. answered(connection) is called after every answer. Raises UserError where the port is taken.
    """

    request_queue_size, allow_reuse_address, daemon_threads = 128, True, True

    def __init__(self, settings, routes, public, key, answered):
        self.settings = settings
        self.routes = routes
        self.public = public
        self.key = key
        self.answered = answered
        self.local = settings.host in LOOPBACK
        self.hosts = {without_port(name) for name in [*LOCAL_HOSTS, *settings.allowed_host]}
        self.origins = {origin.rstrip("/") for origin in settings.cors_origin}
        self.places = threading.BoundedSemaphore(settings.max_connections + SPARE)
        self.parsers = threading.BoundedSemaphore(PARSERS)
        self.connections, self.deadlines = set(), {}  # {connection: the time at which it is closed}
        self.silent = {}  # {connection: address} of those that wait for their clients, the longest first
        self.address_family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        try:
            super().__init__((settings.host, settings.port), Connection)
        except OSError as error:
            raise UserError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}",
                            "--port=0 for a free one") from None

    def server_bind(self):  # HTTPServer's own asks DNS for our name, which can take seconds
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def process_request(self, connection, address):
        full = len(self.connections) >= self.settings.max_connections
        closed = full and self.close_silent()
        if not self.places.acquire(timeout=int(closed)):  # a second: the thread of a closed one ends soon
            return self.shutdown_request(connection)
        self.connections.add(connection)
        self.silent[connection] = address[0]
        try:
            super().process_request(connection, address)  # starts the thread
        except RuntimeError:  # the system has no more threads
            self.forget(connection)
            raise

    def close_silent(self):
        """Close the connection that has been silent longest, of the address with the most of them: a crowd
        does not push out the others. False where there is none."""
        silent = self.silent.copy()
        crowds = Counter(silent.values())
        for connection in sorted(silent, key=lambda connection: -crowds[silent[connection]]):
            if self.silent.pop(connection, None):  # else its request has just come
                hang_up(connection)
                return True
        return False

    def process_request_thread(self, connection, address):
        try:
            super().process_request_thread(connection, address)
        finally:
            self.forget(connection)

    def forget(self, connection):
        self.silent.pop(connection, None)
        self.deadlines.pop(connection, None)
        self.connections.discard(connection)
        self.places.release()

    def at_work(self):
        return len(self.connections) - len(self.silent)

    def service_actions(self):
        """Close what is late. (A socket's own timeout starts again with every byte.)"""
        for connection, deadline in self.deadlines.copy().items():
            if time.monotonic() > deadline:
                hang_up(connection)

    def handle_error(self, connection, address):
        if not isinstance(sys.exc_info()[1], OSError):  # a client that hung up is no error
            print_error(traceback.format_exc())

    def wait_until_idle(self, seconds):
        end = time.monotonic() + seconds
        while self.at_work() and time.monotonic() < end:
            time.sleep(0.01)

    def close(self):
        """Stop listening and hang up on everyone; not in the thread of serve_forever."""
        self.shutdown()
        for connection in list(self.connections):
            hang_up(connection)
        self.server_close()


class Connection(BaseHTTPRequestHandler):
    protocol_version, default_request_version = "HTTP/1.1", "HTTP/1.0"
    server_version, sys_version = "openllm", ""
    wbufsize, disable_nagle_algorithm = -1, True  # sent at once, when it is flushed

    def setup(self):
        self.settings = self.server.settings
        self.timeout = self.settings.write_timeout  # of one read or write
        super().setup()

    def limit(self, seconds):
        self.server.deadlines[self.connection] = time.monotonic() + seconds

    def wait_for_client(self):
        self.server.silent[self.connection] = self.client_address[0]

    def begin_work(self):
        """Raises ConnectionError where the place was given away while waiting."""
        if not self.server.silent.pop(self.connection, False):
            raise ConnectionError

    # 1. Reading a request. http.server parses the lines; what it takes wrongly is refused here.

    def handle_one_request(self):
        self.command, self.requestline, self.request_version, self.headers = "-", "", "HTTP/1.1", {}
        self.route, self.status, self.requests = "-", 499, []  # for the log
        self.started = time.monotonic()
        self.body_read = self.streaming = False
        self.limit(self.settings.header_timeout)
        super().handle_one_request()

    def parse_request(self):
        """Sets command, path and headers. False where the request has been refused."""
        self.started = time.monotonic()
        if not re.fullmatch(rb"\S+ \S+ HTTP/[1-9]\S*\r?\n", self.raw_requestline):  # 0.9 has no status
            return self.send_error(400)
        head = io.BytesIO()
        line = b"-"
        while line.strip(b"\r\n"):  # up to an empty line
            line = self.rfile.readline(MAX_HEAD)
            if head.tell() + len(line) > MAX_HEAD:
                return self.send_error(431)
            head.write(line)
        head.seek(0)
        body, self.rfile = self.rfile, head
        parsed = super().parse_request()
        self.rfile = body
        if not parsed:
            return False
        # A \r alone ends a line for some parsers. After a line that is no header, this one drops the rest.
        alone = b"\r" in head.getvalue().replace(b"\r\n", b"")
        if alone or self.headers.defects or len(self.headers.get_all("Host", [])) > 1:
            return self.send_error(400)
        self.body_read = "Content-Length" not in self.headers and "Transfer-Encoding" not in self.headers
        return True

    def handle_expect_100(self):
        return True  # read_body says "continue", when the body is wanted

    def send_error(self, code, message=None, explain=None):
        """An error in the head. The page of http.server would repeat what the client sent."""
        self.close_connection, self.body_read = True, False
        self.respond(code, Refuse(code, HTTPStatus(code).phrase).body)
        self.server.answered(self)

    def handle_request(self):
        try:
            self.begin_work()
            content = self.answer()
            if content is not None:
                self.respond(200, content)
        except OSError:  # the client has gone; 499 is nginx's status for that
            self.close_connection, self.status = True, 499
        except BaseException as error:  # a panic of Rust code is no Exception
            if not isinstance(error, Refuse):  # a bug
                print_error(traceback.format_exc())
                error = Refuse(500, "internal server error")
            self.refuse(error)
        finally:
            self.server.answered(self)
            self.wait_for_client()

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = handle_request

    def refuse(self, error):
        with contextlib.suppress(OSError):
            if self.streaming:
                self.send_events(error.body, end=True)
            else:
                self.respond(error.status, error.body, error.headers)
        self.status = error.status

    def answer(self):
        """What the function of the path returns. Raises Refuse where a check fails."""
        server = self.server
        self.check_host()
        if self.command == "OPTIONS" and "Origin" in self.headers:  # CORS: may a page of that origin ask us?
            if self.headers["Origin"] not in server.origins:
                raise Refuse(403, "pages of this origin are not allowed; the option --cors_origin=ORIGIN allows them")
            return self.respond(204, b"")
        path = self.clean_path()
        above = [route for route in server.routes if route != "/" and route.endswith("/") and path.startswith(route)]
        found = [path] if path in server.routes else above  # a route with a final slash holds what is below it
        if not found:
            raise Refuse(404, "there is no such path")
        self.route = found[0]
        methods = server.routes[self.route]
        if path != "/health" and server.at_work() > self.settings.max_connections:
            self.close_connection = True
            raise Refuse(503, "too many connections")
        method = "GET" if self.command == "HEAD" else self.command
        if method not in methods:
            allow = ", ".join(methods).replace("GET", "GET, HEAD")
            raise Refuse(405, f"{path} allows {allow}", headers={"Allow": allow})
        if server.key and path not in server.public:
            self.check_key()
        return methods[method](self)

    def clean_path(self):
        """Without the second slash of a base address and a path that have been joined: /v1//models."""
        return re.sub("/+", "/", urllib.parse.unquote(self.path.partition("?")[0]))

    def check_host(self):
        host = self.headers.get("Host")
        if host is None and self.request_version != "HTTP/1.0":
            raise Refuse(400, "the Host header is missing")
        # DNS rebinding: a site can point its name at 127.0.0.1, and reach us from its visitor's browser.
        if self.server.local and host is not None and without_port(host) not in self.server.hosts:
            raise Refuse(403, "this server serves only localhost; the option --allowed_host=NAME allows another name")

    def check_key(self):
        scheme, _, given = self.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = self.headers.get("X-Api-Key", "")
        # In constant time; http.server reads headers as latin-1.
        if not hmac.compare_digest(given.strip().encode("latin-1"), self.server.key.encode()):
            raise Refuse(401, "a valid key is needed", headers={"WWW-Authenticate": "Bearer"})

    def body_size(self):
        """The bytes of the body; None where it comes in chunks."""
        lengths, size = self.headers.get_all("Content-Length", []), None
        codings = self.headers.get_all("Transfer-Encoding", [])
        if codings:
            # With a length beside it, a proxy and this server could disagree on where the next request begins.
            if lengths or self.request_version == "HTTP/1.0":
                raise Refuse(400, "a Transfer-Encoding needs HTTP/1.1, and no Content-Length")
            if len(codings) > 1 or codings[0].strip(" \t").lower() != "chunked":
                raise Refuse(501, "the only Transfer-Encoding here is chunked")
        elif not lengths:
            raise Refuse(411, "Content-Length is missing")
        elif len(lengths) > 1 or not re.fullmatch("[0-9]{1,10}", lengths[0]):  # int() would take "+5", "1_0"
            raise Refuse(400, "bad Content-Length")
        else:
            size = int(lengths[0])
            self.check_size(size)
        if self.headers.get_content_type() != JSON:  # which a form of another site cannot send
            raise Refuse(415, f"Content-Type must be {JSON}")
        return size

    def check_size(self, size):
        if size > self.settings.max_body:
            raise Refuse(413, f"the body is larger than {self.settings.max_body} bytes")

    def read_exactly(self, size):
        data = self.rfile.read(size)
        if len(data) < size:
            raise Refuse(400, "the body is shorter than announced")
        return data

    def read_chunks(self):
        """A body in chunks: a line with the size of each in hexadecimal, its bytes, and an empty line; the
        last has size 0, and headers may follow it."""
        data, overhead = bytearray(), 0  # bytes between the chunks, which are limited like those inside

        def read_line(pattern):
            nonlocal overhead
            line = self.rfile.readline(LONGEST_LINE)
            overhead += len(line)
            self.check_size(overhead)
            if not (found := pattern.fullmatch(line)):
                raise Refuse(400, "bad chunk")
            return found

        while size := int(read_line(CHUNK_LINE)[1], 16):
            self.check_size(len(data) + size)
            data += self.read_exactly(size)
            read_line(LINE_END)
        while read_line(TRAILER)[0] != b"\r\n":
            pass
        return bytes(data)

    def read_body(self, use):
        """use(the JSON object that was sent), for PARSERS requests at a time, which bounds the memory."""
        # 1. Wait for it.
        self.body_read = False
        size = self.body_size()
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
            self.wfile.flush()
        self.limit(self.settings.body_timeout)
        self.wait_for_client()
        try:
            data = self.read_chunks() if size is None else self.read_exactly(size)
        finally:
            self.begin_work()
        self.server.deadlines.pop(self.connection, None)  # what follows is our own time
        self.body_read = True
        # 2. Parse it.
        try:
            with self.server.parsers:
                body = parse_json(data.decode(), "the body", "", MAX_VALUES)
                if type(body) is not dict:
                    raise Refuse(400, "the body must be a JSON object")
                return use(body)
        except UnicodeDecodeError:
            raise Refuse(400, "the body is not UTF-8") from None
        except UserError as error:
            raise Refuse(400, error.fact) from None

    def is_gone(self):
        """Has the client hung up? A half-closed connection counts. May raise OSError."""
        if hasattr(select, "POLLRDHUP"):  # Linux, whatever the client sent before
            poll = select.poll()
            poll.register(self.connection, select.POLLRDHUP)
            return poll.poll(0)
        readable, _, _ = select.select([self.connection], [], [], 0)
        return readable and not self.connection.recv(1, socket.MSG_PEEK)

    # 2. Answering

    def respond(self, status, content, headers=()):
        """content: bytes, or what becomes JSON."""
        data = content if type(content) is bytes else dump(content)
        self.limit(self.settings.write_timeout)
        self.send_head(status, {"Content-Type": JSON, "Content-Length": str(len(data)), **dict(headers)})
        if self.command != "HEAD":
            self.wfile.write(data)
        self.wfile.flush()

    def send_head(self, status, headers):
        self.status = status
        headers |= {"X-Content-Type-Options": "nosniff", "Vary": "Origin"}
        if (origin := self.headers.get("Origin")) in self.server.origins:
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Allow-Methods"] = "GET, POST"
            # OpenAI's client for JavaScript adds a dozen: x-stainless-os, x-stainless-retry-count, ...
            asked = re.findall(r"[\w-]+", self.headers.get("Access-Control-Request-Headers", ""), re.A)
            headers["Access-Control-Allow-Headers"] = ", ".join(["Authorization, Content-Type, X-Api-Key", *asked])
            if "Access-Control-Request-Private-Network" in self.headers:  # from a page that is not of this machine
                headers["Access-Control-Allow-Private-Network"] = "true"
        self.close_connection |= not self.body_read  # its rest would be taken for the next request
        if self.close_connection:
            headers["Connection"] = "close"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def start_events(self):
        self.streaming = True
        self.chunked = self.request_version != "HTTP/1.0"  # which ends a stream by closing the connection
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        headers["X-Accel-Buffering"] = "no"
        if self.chunked:
            headers["Transfer-Encoding"] = "chunked"
        else:
            self.close_connection = True
        self.send_head(200, headers)

    def send_events(self, *contents, end=False):
        """Server-sent events (text/event-stream)."""
        events = [b"data: %b\n\n" % dump(content) for content in contents]
        if end:
            events += [b"data: [DONE]\n\n", b""]  # an empty chunk is the last one
        for event in events:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(event), event) if self.chunked else event)
        self.wfile.flush()

    def finish(self):
        """Read on for a second after a refusal: closing with unread input could discard the answer."""
        if not self.body_read:
            with contextlib.suppress(OSError):
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_WR)
                self.limit(1)
                while self.connection.recv(1 << 16):
                    pass
        super().finish()

    def log_message(self, *_):
        """Nothing: http.server's lines repeat what the client sent. Server.answered writes ours."""

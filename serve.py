# SPDX-License-Identifier: GPL-3.0-only
"""
The server: a trained model over HTTP, with nothing but the standard library.

    python serve.py                                 # the newest run under out/, on http://127.0.0.1:8000
    python serve.py out/small --port=9000 --dtype=bfloat16
    OPENLLM_API_KEY=secret python serve.py --host=0.0.0.0           # for other machines, too: needs a key

    curl http://127.0.0.1:8000/generate -H 'Content-Type: application/json' -d '{"prompt": "def "}'

Each connection has a thread (serving/web.py), which checks a request and writes the answer (serving/api.py).
Only one thread uses the model (serving/engine.py): requests reach it through one queue, events come back
through another.
"""
import base64
import contextlib
import hashlib
import math
import os
import re
import signal
import threading
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from queue import Empty, Full

# (First, so that an interrupted or failing import is no traceback.)
from runtime.console import UserError, command_line, print_error, say
from runtime import machine
from runtime.files import is_gguf
from runtime.settings import check_limits, load, or_else
from sample import RANGES, ModelConfig, load_model
from serving import api
from serving.engine import Engine
from serving.web import LOOPBACK, Refuse, Web
from training import checkpoint as ckpt
from training.log import read_rows


@dataclass
class ServeConfig(ModelConfig):
    host: str = "127.0.0.1"  # address to listen on; the default is for this machine only
    port: int = 8000  # 0: any free one
    rows: int = 16  # requests that run at once; each has a cache for a whole context
    max_queue: int = 64  # requests that may wait for a row; more get 503
    max_connections: int = 96  # open connections, a thread each; should exceed rows + max_queue
    max_body: int = 1 << 20  # largest request, in bytes
    header_timeout: float = 10  # seconds for the headers of a request, and between two requests
    body_timeout: float = 30  # seconds for its body
    write_timeout: float = 10  # seconds for a client to read what is sent
    request_timeout: float = 300  # seconds for a whole answer
    drain: float = 10  # seconds for running requests after SIGTERM or Ctrl-C; another signal stops at once
    api_key_file: str = ""  # its first line is the key that clients must send; or $OPENLLM_API_KEY
    no_auth: bool = False  # listen on other addresses without a key
    cors_origin: list[str] = field(default_factory=list)  # allow pages from this origin; may be repeated
    allowed_host: list[str] = field(default_factory=list)  # also answer to this name (a tunnel, host.docker.internal)


LIMITS = {"port": (0, 65535), "rows max_connections": (1, 1000), "max_queue": (0, 100_000),
          "max_body": (100, 2**30), "block_size": (1, 1e9), "drain": (0, 1e6),
          "header_timeout body_timeout write_timeout request_timeout": (0.1, 1e6)}
PAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "serving/page.html")
TOKENIZE_BYTES = 1 << 16  # of a text for /tokenize, or from /detokenize
PROMPT_BYTES = 1 << 21  # of a prompt: more could take a second to tokenize
DIALECTS = {"/generate": api.Generate, "/v1/completions": api.Completions, "/v1/chat/completions": api.Chat}
# Some clients leave out the /v1.
DIALECTS |= {path.removeprefix("/v1"): dialect for path, dialect in DIALECTS.items()}


class Served:
    """A loaded model, its engine, and what requests need to know of it."""

    def __init__(self, settings, model, tokenizer, run):
        device, config = str(model.lm_head.weight.device), model.config
        parameters = model.n_params()  # before the engine gives a tied head a matrix of its own
        dtype, _ = machine.choose_dtype(settings.dtype, device)
        context = or_else(settings.block_size, config.block_size)
        self.engine = Engine(model, tokenizer, settings.rows, settings.max_queue, dtype, context)
        self.tokenizer, self.chat, self.context = tokenizer, run.get("chat", False), self.engine.context
        self.vocab_size = min(tokenizer.vocab_size, config.vocab_size)
        # A text of more bytes does not fit into the context. (4: Unicode's NFC may shorten it.)
        longest = max(len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size))
        self.most_bytes = min(4 * self.context * longest, PROMPT_BYTES)
        # How a Hugging Face folder wants its tokens sampled, where a request does not say.
        self.generation = {name: value for name, value in run.get("generation", {}).items()
                           if name in RANGES and name in api.FIELDS and api.FIELDS[name][1](value)}
        path = run.get("path", "model")
        folder = path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path))
        self.name = os.path.basename(os.path.normpath(folder))
        if is_gguf(path):
            self.name = os.path.basename(path)
        self.info = dict(
            run_facts(run, folder), name=self.name, chat=self.chat, context=self.context,
            parameters=parameters, device=device,
            dtype="int8" if run.get("int8") else str(dtype).removeprefix("torch."),
            vocab_size=config.vocab_size, n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd,
            family=f"{config.pos} {config.norm} {config.mlp}",
            tokenizer=dict(kind=tokenizer.kind, sha256=run.get("tokenizer_sha256")),
            defaults=api.Generate.defaults | self.generation | {"max_tokens": api.Generate.max_tokens})


def run_facts(run, folder):
    """How the model was trained, without the folders of this machine."""
    rows = list(read_rows(os.path.join(folder, "log.jsonl")))
    row = next((row for row in rows if row["step"] == run.get("step") and "val_bpb" in row), {})
    every = math.ceil(len(rows) / 500)  # steps of the curve
    curve = [(row["step"], row["loss"], row.get("val_loss")) for i, row in enumerate(rows)
             if "val_loss" in row or i % every == 0]
    sources = [] if run.get("path") == folder else run.get("source", [])  # a Hugging Face folder has none
    sources = [re.split(r"[/\\]", source.partition("?")[0])[-1] for source in sources]
    return dict(step=run.get("step") or None, val_loss=run.get("val_loss", row.get("val_loss")),
                val_bpb=row.get("val_bpb"), source=sources, curve=curve)


class Server:
    """The web server, and the engine's thread, in which load() -> (model, tokenizer, run) runs first.

    Raises UserError where the port is taken, or where others could get in without a key.
    """

    def __init__(self, settings, load):
        self.settings = settings
        self.load = load
        self.served = None  # a Served, when it is loaded
        self.failure = None  # the error that ended a thread
        self.draining = False
        self.ended = threading.Event()
        self.lock = threading.Lock()  # guards `counts`
        self.counts = Counter(first_token_seconds_sum=0, first_token_seconds_count=0, request_seconds_sum=0,
                              request_seconds_count=0)
        key = read_key(settings)
        if not (settings.host in LOOPBACK or key or settings.no_auth):
            raise UserError(f"host={settings.host} admits other machines without a key",
                            "OPENLLM_API_KEY=..., --api_key_file=FILE, or --no_auth")
        self.page, self.policy = read_page()
        gets = {"/": self.playground, "/health": self.health, "/metrics": self.metrics,
                "/model-info": self.model_info, "/info": self.model_info, "/v1/models": self.models,
                "/v1/models/": self.named_model, "/models": self.models, "/models/": self.named_model}
        posts = dict.fromkeys(DIALECTS, self.generate)
        posts |= {"/tokenize": self.tokenize, "/detokenize": self.detokenize}
        routes = {path: {"GET": function} for path, function in gets.items()}
        routes |= {path: {"POST": function} for path, function in posts.items()}
        self.web = Web(settings, routes, ("/", "/health"), key, self.answered)
        self.port = self.web.server_port
        self.engine_thread = threading.Thread(target=self.guard, args=[self.work], daemon=True)
        self.web_thread = threading.Thread(target=self.guard, args=[self.web.serve_forever, 0.1], daemon=True)

    @property
    def engine(self):
        return self.served and self.served.engine

    @property
    def state(self):
        if self.failure:
            return "dead"
        if self.draining:
            return "draining"
        return "ok" if self.served else "loading"

    # The life of the process

    def start(self):
        self.engine_thread.start()
        self.web_thread.start()

    def work(self):
        """The engine's thread: load the model, then run it."""
        served = Served(self.settings, *self.load())
        self.served = served
        parameters, rows = served.info["parameters"], self.engine.rows
        say(f"serving {served.name}: {parameters:,} parameters, {rows} rows of {served.context} tokens")
        if not self.draining:
            self.engine.run()

    def guard(self, function, *arguments):
        """Run a thread without which the server is dead."""
        try:
            function(*arguments)
        except BaseException as error:  # a panic of Rust code is no Exception
            if not isinstance(error, UserError):
                print_error(f"{traceback.format_exc()}error: a server thread died: {error!r}")
            self.failure = error
        self.ended.set()

    def stop(self, drain=0):
        """Give running requests `drain` seconds, then end them."""
        self.draining = True
        if not self.failure:
            self.web.wait_until_idle(drain)
        if self.engine:
            self.engine.end()
            self.engine_thread.join(10)
            self.web.wait_until_idle(1)  # for their last events
        self.web.close()

    def ready(self):
        """The Served. Raises Refuse while there is none."""
        if self.state != "ok":
            raise Refuse(503, f"the server is {self.state}", code=self.state)
        return self.served

    # The life of a request for tokens

    def generate(self, connection):
        served = self.ready()
        deadline = time.monotonic() + self.settings.request_timeout
        dialect = DIALECTS[connection.route]
        job = connection.read_body(lambda body: dialect(body, served, deadline))
        connection.requests = job.requests
        try:
            served.engine.submit(*job.requests)
        except Full:
            raise Refuse(503, "too many requests are waiting", code="overloaded") from None
        # The engine keeps to the deadline; this is for a client that reads too slowly.
        connection.limit(self.settings.request_timeout + self.settings.write_timeout)
        try:
            if job.stream:
                connection.start_events()
                connection.send_events(*job.first())
            for event in self.wait(connection, job):
                if job.stream:
                    connection.send_events(*job.chunks(event))
                job.check_event(event)
            if job.stream:
                return connection.send_events(*job.last(), end=True)
            return job.answer()
        finally:
            for request in job.requests:
                request.cancelled = True  # its row is free at the next step

    def wait(self, connection, job):
        """The events as they come. Raises ConnectionError when the client has gone."""
        left = len(job.requests)
        while left:
            if connection.is_gone():
                raise ConnectionError
            with contextlib.suppress(Empty):
                event = job.events.get(timeout=0.2)
                left -= bool(event.finish_reason)
                yield event

    # The other paths

    def health(self, connection):
        connection.respond(200 if self.state == "ok" else 503, {"status": self.state})

    def model_info(self, connection):
        return self.ready().info

    def models(self, connection):
        return {"object": "list", "data": [self.model(connection)]}

    def model(self, connection):
        return {"id": self.ready().name, "object": "model", "created": 0, "owned_by": "openllm"}

    def named_model(self, connection):
        name = connection.clean_path().removeprefix(connection.route)
        if name not in ("", self.ready().name):
            raise Refuse(404, "there is no such model", "model", "model_not_found")
        return self.model(connection) if name else self.models(connection)

    def tokenize(self, connection):
        tokenizer = self.ready().tokenizer

        def answer(body):
            text = api.check(body.get("text"), "text", api.TEXT)
            api.check_size("text", len(text.encode()), TOKENIZE_BYTES)
            ids = tokenizer.encode(text)
            return {"ids": ids, "tokens": [api.spell(tokenizer, i) for i in ids]}

        return connection.read_body(answer)

    def detokenize(self, connection):
        tokenizer = self.ready().tokenizer

        def answer(body):
            ids = api.check(body.get("ids"), "ids", api.IDS)
            api.check_ids(ids, "ids", tokenizer.vocab_size)
            api.check_size("ids", sum(len(tokenizer.token_bytes(i)) for i in ids), TOKENIZE_BYTES)
            return {"text": tokenizer.decode(ids)}

        return connection.read_body(answer)

    def playground(self, connection):
        connection.respond(200, self.page, {
            "Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": self.policy,
            "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"})

    # What it tells those who watch

    def answered(self, connection):
        """Count the answer, and log a line: of what the client chose, only a path that does not exist."""
        now, route, status = time.monotonic(), connection.route, connection.status
        with self.lock:
            self.counts[f'requests_total{{route="{route}",status="{status}"}}'] += 1
            for request in connection.requests:
                if request.first:
                    self.counts["first_token_seconds_sum"] += request.first - request.submitted
                    self.counts["first_token_seconds_count"] += 1
                    self.counts["request_seconds_sum"] += now - request.submitted
                    self.counts["request_seconds_count"] += 1
        path = route
        if status == 404:
            path = ascii(getattr(connection, "path", route).partition("?")[0][:60])[1:-1]
        line = f"{path} {status} {1000 * (now - connection.started):.0f} ms"
        if connection.requests:
            read = sum(len(request.ids) for request in connection.requests)
            written = sum(request.n for request in connection.requests)
            line += f", {read}+{written} tokens"
        if route != "/health":  # which is asked every few seconds
            say(line)

    def metrics(self, connection):
        """The text format of Prometheus."""
        engine = self.engine
        with self.lock:
            numbers = dict(sorted(self.counts.items()))
        numbers["connections"] = len(self.web.connections)
        numbers["resident_memory_bytes"] = resident_memory()
        for name in "running", "waiting":
            numbers[f"requests_{name}"] = len(getattr(engine, name, ()))
        for name in "steps", "cancelled", "prompt_tokens", "completion_tokens":
            numbers[f"{name}_total"] = getattr(engine, name, 0)
        lines = [f"openllm_{name} {value}\n" for name, value in numbers.items()]
        connection.respond(200, "".join(lines).encode(), {"Content-Type": "text/plain; version=0.0.4"})


def resident_memory():
    """In bytes; 0 where the system is not Linux."""
    with contextlib.suppress(OSError), open("/proc/self/statm", encoding="utf-8") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def read_key(settings):
    """The key that clients have to send, or ""."""
    key, where = os.environ.get("OPENLLM_API_KEY"), settings.api_key_file or "OPENLLM_API_KEY"
    if settings.api_key_file:
        try:
            with open(where, encoding="utf-8-sig") as file:
                key = file.readline()
        except (OSError, UnicodeDecodeError) as error:
            fix = "--api_key_file=FILE, whose first line is the key"
            raise UserError(f"cannot read the key: {error}", fix) from None
    if key is None:
        return ""
    if not re.fullmatch("[!-~]+", key.strip()):  # what every HTTP client can send
        raise UserError(f"{where} is empty or holds spaces or non-ASCII characters",
                        "a key from `openssl rand -hex 32`, say")
    return key.strip()


def read_page():
    """The page, and a content security policy that allows its own style and script alone."""
    with open(PAGE, "rb") as file:
        page = file.read()
    blocks = re.search(b"<style>(.*?)</style>.*<script>(.*?)</script>", page, re.S).groups()
    style, script = [base64.b64encode(hashlib.sha256(block).digest()).decode() for block in blocks]
    return page, (
        f"default-src 'none'; connect-src 'self'; img-src data:; style-src 'sha256-{style}'; "
        f"script-src 'sha256-{script}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


def main(argv):
    settings, _, runs = load(ServeConfig, argv)
    check_limits(settings, LIMITS)
    run = ckpt.choose_run(runs, settings)
    if not os.path.exists(run):  # before a port is opened for it
        raise ckpt.no_model(run)
    server, signals = Server(settings, lambda: load_model(settings, [run])), []

    def on_signal(number, frame):
        if signals:
            os._exit(128 + number)
        signals.append(number)
        server.ended.set()

    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, on_signal)
    server.start()
    say(f"listening on http://{settings.host}:{server.port}; loading {run}")
    while not server.ended.wait(0.1):  # a signal does not always wake this thread, in which its handler runs
        pass
    if signals and not server.served:
        os._exit(128 + signals[0])  # the thread that loads cannot be ended otherwise
    if signals:
        say(f"stopping: running requests have {settings.drain:g} s; repeat to stop at once")
    server.stop(settings.drain if signals else 0)
    if isinstance(server.failure, UserError):
        raise server.failure
    return int(server.failure is not None)


if __name__ == "__main__":
    command_line(main)

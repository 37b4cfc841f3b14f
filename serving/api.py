# SPDX-License-Identifier: GPL-3.0-only
"""
The contract of the server: from a client's JSON to requests of the engine, and from their tokens back to JSON.

    job = Generate({"prompt": "def ", "max_tokens": 20}, served, deadline)
    job.requests                 # for engine.submit; their events come in job.events
    job.chunks(event)            # what a stream sends for an event: a list of JSON objects
    job.answer()                 # or everything at once, when all are finished

Generate is this project's own dialect; Completions and Chat are OpenAI's. What would change an answer and is not
supported is refused, not ignored. Everything is checked here: a wrong value is a Refuse with status 400 that names the
field. (On a GPU, a token id beyond the vocabulary would end the process.)
"""
import codecs
import difflib
import json
import queue
import re
import secrets
import time

from runtime.console import UserError
from sample import MAX_STOPS, RANGES, STOP_LENGTH, Sampling
from serving.engine import Request
from serving.web import Refuse

MAX_PROMPTS, MAX_CHOICES, MAX_BIASES = 8, 4, 300
MAX_LOGPROBS = 1 << 17  # of one answer, to bound its memory
UNSUPPORTED = {  # OpenAI's fields that would change the answer: {name: the value that changes nothing}
    "tools": [], "functions": [], "suffix": "", "best_of": 1, "response_format": {"type": "text"}}
MAX_TOKENS = "max_tokens", "max_new_tokens", "max_length", "max_completion_tokens"  # names of one field
FAILURES = {  # finish_reason: the Refuse that stands for it
    "cancelled": (503, "the server is shutting down"), "error": (500, "the model failed on this request"),
    "timeout": (503, "the request took too long", None, "timeout")}


def short(value):
    """A value as an error shows it."""
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    return json.dumps(value[:40] if isinstance(value, str) else value)[:40]


# ---------------------------------------------------------------------------------------------------------------------
# The fields of a request: for each, a function (value, name) that returns the value, or raises Refuse


def need(condition, name, message, code=None):
    if not condition:
        raise Refuse(400, message, name, code)


def number(kind, lowest, highest):
    what = f"{'a whole number' if kind is int else 'a number'} from {lowest} to {highest}"

    def check(value, name):
        # type and not isinstance: true is an int to Python. (A NaN fails the comparison.)
        fits = type(value) in (int, kind) and lowest <= value <= highest
        need(fits, name, f"{name} must be {what}, not {short(value)}")
        return kind(value)
    return check


def flag(value, name):
    need(type(value) is bool, name, f"{name} must be true or false, not {short(value)}")
    return value


def text(value, name):
    """A text that is valid Unicode: JSON can hold half a surrogate pair."""
    need(type(value) is str, name, f"{name} must be a text, not {short(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Refuse(400, f"{name} holds half a character (a lone surrogate)", name) from None
    return value


def stops(value, name):
    found = value if type(value) is list else [value]
    fits = len(found) <= MAX_STOPS and all(1 <= len(text(stop, name)) <= STOP_LENGTH for stop in found)
    need(fits, name, f"{name} may be {MAX_STOPS} texts of 1 to {STOP_LENGTH} characters")
    return found


def logit_bias(value, name):
    """{id: bias}"""
    fits = type(value) is dict and len(value) <= MAX_BIASES
    need(fits, name, f"{name} must be an object of at most {MAX_BIASES} ids")
    for key in value:
        need(re.fullmatch("[0-9]{1,9}", key), name, f"{name} has {short(key)}, which is no token id")
    check = number(float, -100, 100)
    return {int(key): check(bias, name) for key, bias in value.items()}


FIELDS = {name: number(type(getattr(Sampling, name)), *RANGES[name]) for name in RANGES if hasattr(Sampling, name)} | {
    "seed": number(int, *RANGES["seed"]), "stop": stops, "ignore_eos": flag, "logit_bias": logit_bias, "stream": flag}


def token_ids(value, name, vocab_size):
    need(type(value) is list, name, f"{name} must be a list of token ids, not {short(value)}")
    for i in value:
        if type(i) is not int or not 0 <= i < vocab_size:
            raise Refuse(400, f"{name} holds {short(i)}, but token ids go from 0 to {vocab_size - 1}", name)
    return value


def check_size(name, size, most_bytes):
    need(size <= most_bytes, name, f"{name} has {size} bytes, more than {most_bytes}", "context_length_exceeded")


def encode(value, name, tokenizer, most_bytes):
    """The ids of a text. One that is too long is not even encoded."""
    check_size(name, len(text(value, name).encode()), most_bytes)
    try:
        return tokenizer.encode(value)
    except UserError as error:  # a character that the vocabulary does not have
        raise Refuse(400, error.fact, name) from None


def prompt_ids(value, served):
    what = f"prompt must be a text or a list of token ids, not {short(value)}"
    need(type(value) in (str, list), "prompt", what)
    ids = encode(value, "prompt", served.tokenizer, served.most_bytes) if type(value) is str else value
    need(ids, "prompt", "prompt is empty; to start from nothing, send the id of the end-of-text token")
    return ids


def check_messages(value, most_bytes):
    """[{"role", "content"}], each content a text."""
    name, found = "messages", []
    need(type(value) is list and value, name, "messages must be a list of messages")
    for message in value:
        fits = type(message) is dict and message.get("role") in ("system", "user", "assistant")
        need(fits, name, "a message must have a role, one of system, user, assistant")
        content = message.get("content")
        if type(content) is list and all(type(part) is dict and part.get("type") == "text" for part in content):
            content = "".join(text(part.get("text"), name) for part in content)
        found.append(dict(role=message["role"], content=text(content, name)))
    check_size(name, sum(len(message["content"].encode()) for message in found), most_bytes)
    need(found[-1]["role"] != "assistant", name, "the last message must not be the assistant's")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The three dialects


def spell(tokenizer, i):
    """A token as a text: its own, the name of a special one, or `bytes:\\xe4` of a part of a character."""
    raw = tokenizer.token_bytes(i)
    if not raw:
        return next((name for name, number in tokenizer.special.items() if number == i), "")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def finite(logprob):
    return max(logprob, -9999.0)  # JSON has no -inf


class Job:
    """What the dialects share."""

    fields = FIELDS
    defaults = {}  # where they differ from those of sample.py
    max_tokens = 128  # by default; None: what is left of the context
    failures = FAILURES
    echo = False

    def __init__(self, body, served, deadline):
        self.served, self.tokenizer, self.body, self.deadline = served, served.tokenizer, body, deadline
        self.requests, self.events = [], queue.SimpleQueue()
        self.started = time.monotonic()
        self.stream = self.get("stream", False)
        self.read()
        self.body = None  # to free its memory
        logprobs = sum((request.max_tokens + len(request.ids) * self.echo) * (1 + request.logprobs)
                       for request in self.requests if request.logprobs is not None)
        what = f"the answer could have {logprobs:,} log-probabilities; at most {MAX_LOGPROBS:,}"
        need(logprobs <= MAX_LOGPROBS, "logprobs", what)

    def get(self, name, default=None):
        """The value of a field; null means the default."""
        value = self.body.get(name)
        return default if value is None else self.fields[name](value, name)

    def request(self, ids, logprobs, name="prompt", lowest=1, **more):
        """A request of the engine. name: the field that the prompt `ids` came in."""
        token_ids(ids, name, self.served.vocab_size)  # the model may have fewer than the tokenizer
        settings = dict(self.defaults)
        for field in vars(Sampling()):
            if self.body.get(field) is not None:
                settings[field] = self.get(field)
        bias = self.get("logit_bias", {})
        token_ids(list(bias), "logit_bias", self.served.vocab_size)
        return Request(ids=ids, max_tokens=self.fit(ids, name, lowest), logprobs=logprobs, logit_bias=bias,
                       seed=self.get("seed", secrets.randbits(32)), deadline=self.deadline, streams=self.stream,
                       events=self.events, **settings, **more)

    def fit(self, ids, name, lowest):
        """How many tokens the answer may have."""
        size = self.served.context
        left = size - len(ids)
        if self.echo and left == 0:
            left = 1  # to score a prompt that fills the context: the next token needs no position
        limit = next((field for field in MAX_TOKENS if self.body.get(field) is not None), None)
        if limit:
            asked = number(int, lowest, RANGES["max_new_tokens"][1])(self.body[limit], limit)
        what = f"{name} takes {len(ids)}/{size} tokens of the context, and leaves none for an answer"
        need(left > 0, name, what, "context_length_exceeded")
        if not limit:
            return min(self.max_tokens or left, left)
        what = f"{name} and {limit} do not fit into the context: {len(ids)}+{asked}>{size} tokens"
        need(asked <= left, limit, what, "context_length_exceeded")
        return asked

    def token(self, i, logprob):
        tokenizer = self.tokenizer
        return {"token": spell(tokenizer, i), "logprob": finite(logprob), "bytes": [*tokenizer.token_bytes(i)]}

    def failure(self, reason):
        return Refuse(*self.failures[reason]) if reason in self.failures else None

    def last(self):
        """The chunks after all requests have ended."""
        return []


class Generate(Job):
    """POST /generate"""

    fields = FIELDS | {"logprobs": number(int, 0, 20)}
    failures = {reason: FAILURES[reason] for reason in ("cancelled", "error")}  # a timeout is an answer, so far

    def read(self):
        known = [*self.fields, "prompt", *MAX_TOKENS]
        for name in self.body:
            if name not in known:
                near = difflib.get_close_matches(name[:40], known, 1)
                hint = f": did you mean {near[0]!r}?" if near else ""
                raise Refuse(400, f"there is no field {short(name)}{hint}", name[:40])
        logprobs = self.get("logprobs") or None
        self.requests = [self.request(prompt_ids(self.body.get("prompt"), self.served), logprobs)]

    def numbers(self, request):
        return {"prompt_tokens": len(request.ids), "completion_tokens": request.n, "seed": request.seed,
                "finish_reason": request.finish_reason, "time": round(time.monotonic() - self.started, 4)}

    def tokens(self, tokens):
        if not self.requests[0].logprobs:
            return {}
        return {"tokens": [{"id": token.id, **self.token(token.id, token.logprob), "top": [
            {"id": i, "token": spell(self.tokenizer, i), "logprob": finite(p)} for i, p in token.top]}
            for token in tokens]}

    def answer(self):
        request, = self.requests
        return {"generated_text": request.text} | self.numbers(request) | self.tokens(request.tokens)

    def chunks(self, event):
        chunks = []
        if event.text or event.tokens:
            chunks.append({"text": event.text} | self.tokens(event.tokens))
        if event.finish_reason and not self.failure(event.finish_reason):
            chunks.append({"text": ""} | self.numbers(event.request))
        return chunks


class Choice:
    """One text of an answer, and the state of its stream."""

    def __init__(self, index):
        self.index = index
        self.prompt = ""  # what is echoed of it
        self.begun = False  # has anything of it been sent?
        self.offset = 0  # in characters, of the next token
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")


class Completions(Job):
    """POST /v1/completions"""

    fields = FIELDS | {"n": number(int, 1, MAX_CHOICES), "echo": flag, "logprobs": number(int, 0, 5)}
    defaults = {"temperature": 1.0, "top_k": 0}
    max_tokens, prefix = 16, "cmpl-"
    kind = chunk_kind = "text_completion"
    opening = []  # what a stream says before the text

    def read(self):
        self.read_common()
        prompts = self.body.get("prompt")
        if type(prompts) is not list or all(type(i) is not list and type(i) is not str for i in prompts):
            prompts = [prompts]
        need(len(prompts) <= MAX_PROMPTS, "prompt", f"prompt may be a list of {MAX_PROMPTS}")
        self.echo, logprobs = self.get("echo", False), self.get("logprobs")
        prompts = [(prompt_ids(prompt, self.served), prompt) for prompt in prompts]
        scored = 0 if self.echo and logprobs is not None else None
        self.ask([ids for ids, _ in prompts], logprobs, lowest=0 if self.echo else 1, prompt_logprobs=scored)
        if self.echo:
            for choice in self.choices.values():
                ids, prompt = prompts[choice.index // self.n]
                choice.prompt = prompt if type(prompt) is str else self.tokenizer.decode(ids)

    def read_common(self):
        """The fields that OpenAI's two endpoints share."""
        for name, harmless in UNSUPPORTED.items():
            value = self.body.get(name)
            fits = value is None or type(value) is type(harmless) and value == harmless
            need(fits, name, f"{name} is not supported here", "unsupported")
        options = self.body.get("stream_options")
        fits = options is None or self.stream and type(options) is dict
        need(fits, "stream_options", "stream_options is an object, and goes with stream=true alone")
        self.usage_wanted = flag((options or {}).get("include_usage") or False, "include_usage")
        self.id, self.created = self.prefix + secrets.token_hex(12), int(time.time())

    def ask(self, prompts, logprobs, **more):
        """n requests for each prompt. Choice j has the seed + j, so that it can be had alone."""
        self.n = self.get("n", 1)
        self.requests = [self.request(ids, logprobs, **more) for ids in prompts for _ in range(self.n)]
        for i, request in enumerate(self.requests):
            if self.body.get("seed") is not None:
                request.seed = (request.seed + i % self.n) % 2**63
        self.choices = {request: Choice(i) for i, request in enumerate(self.requests)}

    def frame(self, kind, choices, **more):
        return {"id": self.id, "object": kind, "created": self.created, "model": self.served.name,
                "choices": choices, **more}

    def usage(self):
        prompts = sum(len(request.ids) for request in self.requests[::self.n])
        new = sum(request.n for request in self.requests)
        return {"prompt_tokens": prompts, "completion_tokens": new, "total_tokens": prompts + new}

    def choice(self, request, content, logprobs, ended=False):
        end = {"finish_reason": request.finish_reason, "seed": request.seed} if ended else {"finish_reason": None}
        return {"index": self.choices[request].index, **content, "logprobs": logprobs, **end}

    def answer(self):
        choices = []
        for request, choice in self.choices.items():
            content = self.content(choice.prompt + request.text)
            logprobs = self.logprobs(request, request.prompt_tokens + request.tokens)
            choices.append(self.choice(request, content, logprobs, ended=True))
        return self.frame(self.kind, choices, usage=self.usage())

    def chunks(self, event):
        request, choice, chunks = event.request, self.choices[event.request], []
        text, tokens = event.text, event.tokens
        if not choice.begun:
            choice.begun = True
            text, tokens = choice.prompt + text, request.prompt_tokens + tokens
            chunks += [self.choice(request, content, None) for content in self.opening]
        if text or tokens:
            chunks.append(self.choice(request, self.delta(text), self.logprobs(request, tokens)))
        if event.finish_reason and not self.failure(event.finish_reason):
            chunks.append(self.choice(request, self.delta(""), None, ended=True))
        usage = {"usage": None} if self.usage_wanted else {}  # in every chunk but the last
        return [self.frame(self.chunk_kind, [chunk], **usage) for chunk in chunks]

    def last(self):
        return [self.frame(self.chunk_kind, [], usage=self.usage())] if self.usage_wanted else []

    def content(self, text):
        return {"text": text}

    delta = content

    def logprobs(self, request, tokens):
        """Four lists. text_offset: where in the text of the choice each token begins."""
        choice = self.choices[request]
        if request.logprobs is None:
            return None
        found = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            unpredicted = token.logprob is None
            found["tokens"].append(spell(self.tokenizer, token.id))
            found["token_logprobs"].append(None if unpredicted else finite(token.logprob))
            top = {spell(self.tokenizer, i): finite(p) for i, p in token.top}
            found["top_logprobs"].append(None if unpredicted else top)
            found["text_offset"].append(choice.offset)
            choice.offset += len(choice.decoder.decode(self.tokenizer.token_bytes(token.id)))
        return found


class Chat(Completions):
    """POST /v1/chat/completions: the model's chat format makes a prompt of messages."""

    fields = Completions.fields | {"logprobs": flag, "top_logprobs": number(int, 0, 20)}
    max_tokens, prefix, kind, chunk_kind = None, "chatcmpl-", "chat.completion", "chat.completion.chunk"
    opening = [{"delta": {"role": "assistant", "content": ""}}]

    def read(self):
        self.read_common()
        messages = check_messages(self.body.get("messages"), self.served.most_bytes)
        top = self.get("top_logprobs", 0) if self.get("logprobs") else None
        need(self.served.chat, "messages", "this checkpoint has no chat format", "no_chat_format")
        try:
            ids = self.tokenizer.chat(messages)
        except UserError as error:
            raise Refuse(400, error.fact, "messages") from None
        self.ask([ids], top, name="messages")

    def content(self, text):
        return {"message": {"role": "assistant", "content": text}}

    def delta(self, text):
        return {"delta": {"content": text} if text else {}}

    def logprobs(self, request, tokens):
        if request.logprobs is None:
            return None
        return {"content": [self.token(token.id, token.logprob) | {
            "top_logprobs": [self.token(i, p) for i, p in token.top]} for token in tokens]}

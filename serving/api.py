# SPDX-License-Identifier: GPL-3.0-only
"""
The contract of the server: from the JSON of a client to requests for the engine, and from their tokens back to JSON.

    job = Generate({"prompt": "def ", "max_tokens": 20}, served)
    job.requests                 # for engine.submit; their events come in job.events
    job.chunks(event)            # what a streaming client gets for an event: a list of JSON objects
    job.answer()                 # or everything at once, when all are finished

Three dialects: Generate is this project's own; Completions and Chat speak OpenAI's, so that programs that were written
for it work here (as far as they go: whatever would change an answer and is not supported is refused, not ignored).

Everything that comes in is checked here, before it gets near the model: a wrong value is a Refuse with status 400 that
names the field. A token id beyond the vocabulary would end a process with a GPU for good.
"""
import codecs
import dataclasses
import difflib
import json
import queue
import secrets
import time

from runtime.console import UserError
from serving.web import Refuse

MAX_PROMPTS, MAX_CHOICES, MAX_STOPS, MAX_MESSAGES = 8, 4, 4, 2048
MAX_LOGPROBS, ECHO_BYTES = 1 << 17, 1 << 20  # in one answer: a short request must not fill the memory
RANGES = {  # name: (lowest, highest), inclusive
    "temperature": (0, 2), "top_k": (0, 10**6), "top_p": (1e-9, 1), "min_p": (0, 1), "repetition_penalty": (0.01, 100),
    "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2), "max_tokens": (0, 10**6), "seed": (0, 2**63 - 1)}
UNSUPPORTED = {  # OpenAI's fields that would change the answer: name: the values that change nothing
    "tools": ([],), "functions": ([],), "suffix": ("",), "best_of": (1,), "response_format": ({"type": "text"},)}
MAX_TOKENS = ("max_tokens", "max_new_tokens", "max_length", "max_completion_tokens")  # one field; the answer alone


def short(value):
    """A value as an error may show it: a scalar, and not much of it."""
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    if isinstance(value, int) and abs(value) > 10**20:
        return "a number of very many digits"  # (Python refuses to print more than some 4,000 of them)
    return json.dumps(value)[:40]


# ---------------------------------------------------------------------------------------------------------------------
# Reading fields. None, JSON's null, always means the default.


def number(body, name, default, kind=float, low=None, high=None):
    low, high = RANGES[name] if low is None else (low, high)
    value = body.get(name)
    if value is None:
        return default
    # (type and not isinstance: true is an int to Python. A NaN is not between anything.)
    if type(value) not in (int, kind) or not low <= value <= high:
        what = "a whole number" if kind is int else "a number"
        raise Refuse(400, f"{name} must be {what} from {low} to {high}, not {short(value)}", name)
    return kind(value)


def flag(body, name):
    value = body.get(name)
    if value is not None and type(value) is not bool:
        raise Refuse(400, f"{name} must be true or false, not {short(value)}", name)
    return bool(value)


def text(value, name):
    """A text that can be written as UTF-8: JSON can say half a surrogate pair, which is no character."""
    if type(value) is not str:
        raise Refuse(400, f"{name} must be a text, not {short(value)}", name)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Refuse(400, f"{name} holds half a character (a lone surrogate)", name) from None
    return value


def stops(body):
    value = body.get("stop")
    found = [] if value is None else value if type(value) is list else [value]
    if len(found) > MAX_STOPS:
        raise Refuse(400, f"stop may be {MAX_STOPS} texts, not {len(found)}", "stop")
    for stop in found:
        if not 1 <= len(text(stop, "stop")) <= 256:
            raise Refuse(400, f"a stop text has 1 to 256 characters, not {len(stop)}", "stop")
    return found


def token_ids(value, name, vocab_size):
    if type(value) is not list:
        raise Refuse(400, f"{name} must be a list of token ids, not {short(value)}", name)
    for i in value:
        if type(i) is not int or not 0 <= i < vocab_size:
            raise Refuse(400, f"{name} holds {short(i)}, but token ids go from 0 to {vocab_size - 1}", name)
    return value


def logit_bias(body, vocab_size):
    value, found = body.get("logit_bias"), {}
    if value is None:
        return found
    if type(value) is not dict or len(value) > 300:
        raise Refuse(400, "logit_bias must be an object of at most 300 token ids", "logit_bias")
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size):
            raise Refuse(400, f"logit_bias has {short(key)}, but token ids go from 0 to {vocab_size - 1}", "logit_bias")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise Refuse(400, f"logit_bias of {key} must be a number from -100 to 100, not {short(bias)}", "logit_bias")
        found[int(key)] = float(bias)
    return found


def check_size(what, size, most_bytes, name):
    if size > most_bytes:
        raise Refuse(400, f"{what} has {size} bytes; more than {most_bytes} are too many", name,
                     "context_length_exceeded")


def encode(value, name, tokenizer, most_bytes):
    """The ids of a text, which is not looked at if it is too long: the time of the processor belongs to all."""
    check_size(name, len(text(value, name).encode()), most_bytes, name)
    try:
        return tokenizer.encode(value)
    except UserError as error:  # a character that a vocabulary of characters does not have
        raise Refuse(400, error.fact, name) from None


def prompt_ids(value, served):
    """A prompt, a text or a list of token ids, as ids."""
    if type(value) not in (str, list):
        raise Refuse(400, f"prompt must be a text or a list of token ids, not {short(value)}", "prompt")
    ids = encode(value, "prompt", served.tokenizer, served.most_bytes) if type(value) is str else value
    if not ids:
        raise Refuse(400, "prompt is empty; to start from nothing, give the id of the end-of-text token", "prompt")
    return ids


def check_messages(value, most_bytes):
    """OpenAI's messages as [{"role", "content"}], the content a text."""
    if type(value) is not list or not 1 <= len(value) <= MAX_MESSAGES:
        raise Refuse(400, f"messages must be a list of 1 to {MAX_MESSAGES} messages", "messages")
    found = []
    for message in value:
        if type(message) is not dict or message.get("role") not in ("system", "user", "assistant"):
            raise Refuse(400, "a message must have a role, one of system, user, assistant", "messages")
        content = message.get("content")
        if type(content) is list:  # of parts; only texts are understood here
            parts = [part.get("text") for part in content if type(part) is dict and part.get("type") == "text"]
            content = "".join(text(part, "messages") for part in parts) if len(parts) == len(content) else None
        found.append(dict(role=message["role"], content=text(content, "messages")))
    check_size("messages", sum(len(message["content"].encode()) for message in found), most_bytes, "messages")
    if found[-1]["role"] == "assistant":
        raise Refuse(400, "the last message must not be the assistant's", "messages")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The three dialects


def spell(tokenizer, i):
    """A token as a text: its own, the name of a special one, or `bytes:\\xe4` where it is not whole characters."""
    raw = tokenizer.token_bytes(i)
    if not raw:
        return next((name for name, number in tokenizer.special.items() if number == i), "")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def finite(logprob):
    return max(logprob, -9999.0)  # JSON has no -inf


def generate_defaults():
    """What /generate takes where a request says nothing: the settings of sample.py."""
    from sample import Sampling
    return {"max_tokens": Job.max_tokens} | {field.name: field.default for field in dataclasses.fields(Sampling)
                                             if field.name in RANGES}


class Job:
    """What the dialects share: the fields of sampling, the check that it fits, and the queue of events."""

    defaults = {}  # where they differ from those of sample.py
    max_tokens = 128  # by default; None: what is left of the context
    echo = False

    def __init__(self, body, served, deadline):
        self.served, self.tokenizer, self.body, self.deadline = served, served.tokenizer, body, deadline
        self.requests, self.events = [], queue.SimpleQueue()
        self.stream, self.created, self.started = flag(body, "stream"), time.time(), time.monotonic()
        self.read()
        self.body = None  # it takes memory, and all of it has been read
        logprobs = sum((request.max_tokens + len(request.ids) * self.echo) * (1 + request.logprobs)
                       for request in self.requests if request.logprobs is not None)
        if logprobs > MAX_LOGPROBS:
            raise Refuse(400, f"the answer could have {logprobs:,} log-probabilities; more than {MAX_LOGPROBS:,} are "
                         "too many: give a lower max_tokens, or ask for fewer alternatives", "logprobs")

    def request(self, ids, logprobs, lowest=1, **more):
        """A request of the engine with the prompt `ids` and the settings of the body."""
        from serving.engine import Request  # here, since torch takes seconds to import, and the port opens before that
        body, values = self.body, {"stop": stops(self.body), "ignore_eos": flag(self.body, "ignore_eos")}
        for field in dataclasses.fields(Request):
            if field.name in RANGES and field.name not in ("max_tokens", "seed"):
                default = self.defaults.get(field.name, field.default)
                values[field.name] = number(body, field.name, default, type(field.default))
        seed = number(body, "seed", secrets.randbits(32), int)
        size, name = self.served.context, "messages" if "messages" in body else "prompt"
        token_ids(ids, name, self.served.vocab_size)  # (the model may have fewer than the tokenizer)
        limit, *others = [field for field in MAX_TOKENS if body.get(field) is not None] or ["max_tokens"]
        for other in others:
            if body[other] != body[limit]:
                raise Refuse(400, f"{limit} and {other} are the same field, and have two values", other)
        asked = number(body, limit, None, int, lowest, RANGES["max_tokens"][1])
        # (A prompt that fills the context can still be scored, and its one next token needs no position of its own.)
        left = size - len(ids) if not (self.echo and len(ids) == size) else 1
        if left < 1:
            raise Refuse(400, f"{name} takes {len(ids)}/{size} tokens of the context, and leaves no room for an answer",
                         name, "context_length_exceeded")
        if asked is not None and asked > left:
            raise Refuse(400, f"{name} and {limit} do not fit into the context: {len(ids)}+{asked}>{size} tokens; "
                         f"{limit}={left} would fit", limit, "context_length_exceeded")
        new = asked if asked is not None else min(self.max_tokens or left, left)
        return Request(ids=ids, max_tokens=new, logprobs=logprobs, streams=self.stream, events=self.events,
                       logit_bias=logit_bias(body, self.served.vocab_size), deadline=self.deadline,
                       **{**values, "seed": seed, **more})

    def token(self, token, chat=False):
        """A token and its alternatives as JSON."""
        raw = {"token": spell(self.tokenizer, token.id), "logprob": finite(token.logprob),
               "bytes": [*self.tokenizer.token_bytes(token.id)]}
        top = [{"id": i, "token": spell(self.tokenizer, i), "logprob": finite(p)} for i, p in token.top]
        if chat:
            return raw | {"top_logprobs": [
                {"token": t["token"], "logprob": t["logprob"], "bytes": [*self.tokenizer.token_bytes(t["id"])]}
                for t in top]}
        return {"id": token.id, **raw, "top": top}

    def failure(self, reason):
        """The Refuse that stands for a finish_reason that is no answer, or None."""
        if reason == "cancelled":
            return Refuse(503, "the server is shutting down")
        if reason == "timeout":
            return Refuse(503, "the request took too long", code="timeout")
        return Refuse(500, "the model failed on this request") if reason == "error" else None

    def last(self):
        """Chunks after all requests have ended."""
        return []


class Generate(Job):
    """POST /generate"""

    fields = {"prompt", "stream", "stop", "ignore_eos", "logprobs", "logit_bias", *MAX_TOKENS, *RANGES}

    def read(self):
        for name in self.body:
            if name not in self.fields:
                near = difflib.get_close_matches(name[:40], sorted(self.fields), 1)
                hint = f": did you mean {near[0]!r}?" if near else ""
                raise Refuse(400, f"there is no field {short(name)}{hint}", name[:40])
        top = number(self.body, "logprobs", 0, int, 0, 20)
        self.requests = [self.request(prompt_ids(self.body.get("prompt"), self.served), top or None)]

    def failure(self, reason):
        return None if reason == "timeout" else super().failure(reason)  # here it is an answer, as far as it goes

    def numbers(self, request):
        return {"prompt_tokens": len(request.ids), "completion_tokens": request.n, "seed": request.seed,
                "finish_reason": request.finish_reason, "time": round(time.monotonic() - self.started, 4)}

    def tokens(self, tokens):
        return {"tokens": [self.token(token) for token in tokens]} if self.requests[0].logprobs else {}

    def answer(self):
        request, = self.requests
        return {"generated_text": request.text} | self.numbers(request) | self.tokens(request.tokens)

    def chunks(self, event):
        chunks = [{"text": event.text} | self.tokens(event.tokens)] if event.text or event.tokens else []
        return chunks + ([{"text": ""} | self.numbers(event.request)] if event.finish_reason else [])


class Choice:
    """What an answer with several texts has to remember of one, from a chunk of a stream to the next."""

    def __init__(self, index, prompt):
        self.index, self.prompt = index, prompt  # prompt: what is repeated of it
        self.begun = False  # has anything of it been sent?
        self.offset, self.decoder = 0, codecs.getincrementaldecoder("utf-8")("replace")  # characters so far


class Completions(Job):
    """POST /v1/completions: several prompts, several choices each, the prompt's own log-probabilities."""

    defaults = {"temperature": 1.0, "top_k": 0}
    max_tokens, prefix = 16, "cmpl-"
    kind = chunk_kind = "text_completion"

    def read(self):
        self.common()
        prompts = self.body.get("prompt")
        if type(prompts) is not list or all(type(i) is not list and type(i) is not str for i in prompts):
            prompts = [prompts]
        if len(prompts) > MAX_PROMPTS:
            raise Refuse(400, f"prompt may be a list of {MAX_PROMPTS}, not of {len(prompts)}", "prompt")
        self.echo = flag(self.body, "echo")
        top = number(self.body, "logprobs", None, int, 0, 5)
        self.texts = [text(p, "prompt") if type(p) is str else None for p in prompts]
        self.choices([prompt_ids(p, self.served) for p in prompts], top, lowest=0 if self.echo else 1,
                     prompt_logprobs=0 if self.echo and top is not None else None)

    def common(self):
        """The fields that OpenAI's two endpoints share."""
        for name, harmless in UNSUPPORTED.items():
            value = self.body.get(name)
            if value is not None and not any(type(value) is type(h) and value == h for h in harmless):
                raise Refuse(400, f"{name} is not supported here", name, "unsupported")
        options = self.body.get("stream_options")
        if options is not None and (not self.stream or type(options) is not dict):
            raise Refuse(400, "stream_options is an object, and goes with stream=true alone", "stream_options")
        self.usage_wanted = flag(options or {}, "include_usage")
        self.no_usage = {"usage": None} if self.usage_wanted else {}  # in every chunk but the last
        self.id = self.prefix + secrets.token_hex(12)

    def choices(self, prompts, top, **more):
        """n requests for each prompt. Choice j has the seed + j, for every prompt: each is what it would be alone."""
        self.n = number(self.body, "n", 1, int, 1, MAX_CHOICES)
        self.requests = [self.request(ids, top, **more) for ids in prompts for _ in range(self.n)]
        if self.echo:
            echoed = self.n * sum(len(self.tokenizer.token_bytes(i)) for ids in prompts for i in ids)
            check_size("the echo", echoed, ECHO_BYTES, "prompt")
        for i, request in enumerate(self.requests):
            if self.body.get("seed") is not None:
                request.seed = (request.seed + i % self.n) % 2**63
        self.choice_of = {request: Choice(i, self.repeated(i // self.n, request))
                          for i, request in enumerate(self.requests)}

    def frame(self, kind, choices, **more):
        return {"id": self.id, "object": kind, "created": int(self.created), "model": self.served.name,
                "choices": choices, **more}

    def usage(self):
        prompts = sum(len(request.ids) for request in self.requests[::self.n])
        new = sum(request.n for request in self.requests)
        return {"prompt_tokens": prompts, "completion_tokens": new, "total_tokens": prompts + new}

    def choice(self, request, ended, **more):
        end = {"finish_reason": request.finish_reason, "seed": request.seed} if ended else {"finish_reason": None}
        return {"index": self.choice_of[request].index, **more, **end}

    def content(self, request):
        return {"text": self.choice_of[request].prompt + request.text}

    def answer(self):
        choices = [self.choice(request, True, **self.content(request),
                               logprobs=self.logprobs(request, request.tokens)) for request in self.requests]
        return self.frame(self.kind, choices, usage=self.usage())

    def repeated(self, i, request):
        """What the answer repeats of prompt i, with echo."""
        if not self.echo:
            return ""
        return self.texts[i] if self.texts[i] is not None else self.tokenizer.decode(request.ids)

    def logprobs(self, request, tokens):
        """The older form: four lists. text_offset: where in the text of the choice a token begins."""
        choice = self.choice_of[request]
        if request.logprobs is None:
            return None
        if self.echo and not choice.begun:
            tokens = request.prompt_tokens + tokens
        offsets = []
        for token in tokens:
            offsets.append(choice.offset)
            choice.offset += len(choice.decoder.decode(self.tokenizer.token_bytes(token.id)))
        return {"tokens": [spell(self.tokenizer, token.id) for token in tokens],
                "token_logprobs": [None if token.logprob is None else finite(token.logprob) for token in tokens],
                "top_logprobs": [None if token.logprob is None else
                                 {spell(self.tokenizer, i): finite(p) for i, p in token.top} for token in tokens],
                "text_offset": offsets}

    def chunks(self, event):
        request, choice, chunks = event.request, self.choice_of[event.request], []
        before = "" if choice.begun else choice.prompt
        if before or event.text or event.tokens:
            chunks.append(self.choice(request, False, text=before + event.text,
                                      logprobs=self.logprobs(request, event.tokens)))
        choice.begun = True
        if event.finish_reason:
            chunks.append(self.choice(request, True, text="", logprobs=None))
        return [self.frame(self.chunk_kind, [chunk], **self.no_usage) for chunk in chunks]

    def last(self):
        return [self.frame(self.chunk_kind, [], usage=self.usage())] if self.usage_wanted else []


class Chat(Completions):
    """POST /v1/chat/completions: messages, which the model's own chat format makes a prompt of."""

    max_tokens, prefix, kind, chunk_kind = None, "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def read(self):
        self.common()
        messages = check_messages(self.body.get("messages"), self.served.most_bytes)
        wanted = flag(self.body, "logprobs")
        top = number(self.body, "top_logprobs", 0, int, 0, 20)
        if top and not wanted:
            raise Refuse(400, "top_logprobs goes with logprobs=true alone", "top_logprobs")
        if not self.served.chat:
            raise Refuse(400, "this checkpoint has no chat format", "messages", "no_chat_format")
        try:
            ids = self.tokenizer.chat(messages)
        except UserError as error:
            raise Refuse(400, error.fact, "messages") from None
        self.choices([ids], top if wanted else None)

    def logprobs(self, request, tokens):
        return None if request.logprobs is None else {"content": [self.token(token, chat=True) for token in tokens]}

    def content(self, request):
        return {"message": {"role": "assistant", "content": request.text}}

    def chunks(self, event):
        request, choice, chunks = event.request, self.choice_of[event.request], []
        if not choice.begun:
            choice.begun = True
            chunks.append(self.choice(request, False, delta={"role": "assistant", "content": ""}, logprobs=None))
        if event.text or event.tokens:
            chunks.append(self.choice(request, False, delta={"content": event.text},
                                      logprobs=self.logprobs(request, event.tokens)))
        if event.finish_reason:
            chunks.append(self.choice(request, True, delta={}, logprobs=None))
        return [self.frame(self.chunk_kind, [chunk], **self.no_usage) for chunk in chunks]

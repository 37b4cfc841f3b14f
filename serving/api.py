# SPDX-License-Identifier: GPL-3.0-only
"""
The contract of the server: from a client's JSON to requests of the engine, and from their tokens to JSON.

    job = Generate({"prompt": "def ", "max_tokens": 20}, served, deadline)
    job.requests                 # for engine.submit; their events come in job.events
    job.chunks(event)            # what a stream sends for an event: a list of JSON objects
    job.answer()                 # or everything at once, when all are finished

Generate is this project's own dialect; Completions and Chat are OpenAI's. What would change an answer and is
not supported is refused, not ignored. A wrong value is a Refuse with status 400 that names the field. (On a
GPU, a token id beyond the vocabulary would end the process.)
"""
import difflib
import json
import queue
import re
import reprlib
import secrets
import time

from runtime.console import UserError
from sample import MAX_STOPS, RANGES, STOP_LENGTH, Sampling, TextStream
from serving.engine import Request
from serving.web import Refuse

MAX_PROMPTS, MAX_CHOICES, MAX_BIASES = 64, 4, 300
MAX_LOGPROBS = 1 << 17  # of one answer, to bound its memory
MAX_TOKENS = "max_tokens", "max_new_tokens", "max_length", "max_completion_tokens"  # names of one field
UNSET = "seed", *MAX_TOKENS  # where other servers write -1 for no value
ROLES = "system", "developer", "user", "assistant"  # developer: OpenAI's newer word for system
# What OpenAI, vLLM, llama.cpp and text-generation-webui take, would change an answer, and is not supported:
# {names: values that change nothing, as null does}
UNSUPPORTED = {
    "tools functions stop_sequences stop_token_ids bad_words allowed_token_ids samplers sampler_priority "
    "documents": ([],),
    "tool_choice function_call": ("none", "auto"),  # auto: of no tools
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "suffix grammar grammar_string guided_grammar guided_regex negative_prompt custom_token_bans": ("",),
    "guided_json guided_choice structured_outputs json_schema chat_template chat_template_kwargs "
    "logits_processors audio web_search_options": ("", [], {}),
    "prompt_logprobs truncate_prompt_tokens": (),
    "n_predict num_predict max_output_tokens top_n_sigma": (-1,),
    "min_tokens min_new_tokens min_length no_repeat_ngram_size penalty_alpha top_a mirostat mirostat_mode "
    "dynatemp_range smoothing_factor epsilon_cutoff eta_cutoff dry_multiplier xtc_probability n_probs": (0,),
    "best_of num_beams typical_p tfs tfs_z length_penalty guidance_scale repeat_penalty "
    "encoder_repetition_penalty": (1,),
    "use_beam_search include_stop_str_in_output return_token_ids return_tokens_as_token_ids dynamic_temperature "
    "temperature_last ban_eos_token": (False,),
    "do_sample skip_special_tokens enable_thinking": (True,)}
FAILURES = {  # finish_reason: the Refuse that stands for it
    "cancelled": (503, "the server is shutting down"), "error": (500, "the model failed on this request")}


# ---------- The fields of a request. Each is a pair: what it must be, and a function that tells whether a value is that


def need(condition, name, fact, code=None):
    if not condition:
        raise Refuse(400, f"{name} {fact}", name, code)


def short(value):
    """A value as an error shows it."""
    shown = reprlib.repr(value) if type(value) in (list, dict) else json.dumps(value)
    return shown[:40]


def check(value, name, field):
    """The value of a field."""
    what, fits = field
    if not fits(value):
        raise Refuse(400, f"{name} must be {what}, not {short(value)}", name)
    return value


def number(kind, lowest, highest):
    def fits(value):  # type and not isinstance: true is an int to Python. (A NaN fails the comparison.)
        return type(value) in (int, kind) and lowest <= value <= highest

    words = {int: "a whole number", float: "a number"}
    return f"{words[kind]} from {lowest} to {highest}", fits


def is_text(value):
    """JSON can hold half a surrogate pair; UTF-8 cannot."""
    return type(value) is str and not re.search("[\ud800-\udfff]", value)


def are_stops(value):
    found = value if type(value) is list else [value]
    return len(found) <= MAX_STOPS and all(is_text(stop) and 1 <= len(stop) <= STOP_LENGTH for stop in found)


def is_bias(value):
    """{id: what to add to its logit}"""
    _, fits = number(float, -100, 100)
    return type(value) is dict and len(value) <= MAX_BIASES and all(
        re.fullmatch("[0-9]{1,9}", key) and fits(bias) for key, bias in value.items())


def content_of(message):
    """The text of a message, which may come in parts."""
    content = message.get("content")
    if type(content) is list and all(type(part) is dict and part.get("type") == "text" for part in content):
        parts = [part.get("text") for part in content]
        return all(map(is_text, parts)) and "".join(parts)
    return content


def are_messages(value):
    def fits(message):
        return type(message) is dict and message.get("role") in ROLES and is_text(content_of(message))

    return type(value) is list and value and all(map(fits, value))


FLAG = "true or false", lambda value: type(value) is bool
TEXT = "a string of valid Unicode", is_text
IDS = "a list of token ids", lambda value: type(value) is list
PROMPT = "a text or a list of token ids", lambda value: type(value) is list or is_text(value)
MESSAGES = f"a list of messages with role ({', '.join(ROLES)}) and content", are_messages
FIELDS = {
    **{name: number(type(default), *RANGES[name])
       for name, default in vars(Sampling()).items() if name in RANGES},
    **dict.fromkeys(MAX_TOKENS, number(int, 0, RANGES["max_new_tokens"][1])),
    "seed": number(int, *RANGES["seed"]), "ignore_eos": FLAG, "stream": FLAG,
    "stop": (f"up to {MAX_STOPS} texts of 1 to {STOP_LENGTH} characters", are_stops),
    "logit_bias": (f"up to {MAX_BIASES} token ids, each with a number from -100 to 100", is_bias)}


def check_ids(ids, name, vocab_size):
    for i in ids:
        if type(i) is not int or not 0 <= i < vocab_size:
            raise Refuse(400, f"{name} holds {short(i)}, but token ids go from 0 to {vocab_size - 1}", name)


def check_size(name, size, most_bytes):
    need(size <= most_bytes, name, f"has {size} bytes, more than {most_bytes}", "context_length_exceeded")


# ---------- The three dialects


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
    """What the dialects share. Each has `read`, which asks the engine, and `part`, `end` and `answer`."""

    fields = FIELDS
    defaults = vars(Sampling())
    max_tokens = 128  # by default; None: what is left of the context
    prompt_field = "prompt"
    failures = FAILURES
    n, echo = 1, False

    def __init__(self, body, served, deadline):
        self.body = {name: None if value == -1 and name in UNSET else value for name, value in body.items()}
        self.served = served
        self.tokenizer = served.tokenizer
        self.deadline = deadline
        self.requests = []
        self.events = queue.SimpleQueue()
        self.stream = self.get("stream", False)
        try:
            self.read()
        except UserError as error:  # such as a character that the vocabulary does not have
            raise Refuse(400, error.fact, self.prompt_field) from None
        del self.body  # to free its memory
        n, most = len(self.requests), served.engine.capacity
        need(n <= most, self.prompt_field, f"asks for {n} texts; at most {most} can run and wait here")
        logprobs = sum((request.max_tokens + len(request.ids) * self.echo) * (1 + request.logprobs)
                       for request in self.requests if request.logprobs is not None)
        fact = f"would be {logprobs:,} log-probabilities; at most {MAX_LOGPROBS:,}"
        need(logprobs <= MAX_LOGPROBS, "logprobs", fact)

    def get(self, name, default=None):
        """The value of a field; null means the default."""
        value = self.body.get(name)
        if value is None:
            return default
        if name == "top_k" and value in ("all", -1):  # sample.py's word, and vLLM's number
            return 0
        return check(value, name, self.fields[name])

    def ask(self, prompt, top):
        """Ask for n texts after a prompt. top: how many of the likeliest tokens to tell, or None."""
        # 1. The prompt. (A text that is too long is not even encoded.)
        name = self.prompt_field
        ids = check(prompt, name, PROMPT)
        if type(prompt) is str:
            check_size(name, len(prompt.encode()), self.served.most_bytes)
            ids = self.tokenizer.prompt(prompt)
        need(ids, name, "is empty; to start from nothing, send the id of the end-of-text token")
        check_ids(ids, name, self.served.vocab_size)  # the model may have fewer than the tokenizer

        # 2. How to go on
        generation = {name: value for name, value in self.served.generation.items() if name in self.defaults}
        defaults = self.defaults | generation
        settings = {field: self.get(field, default) for field, default in defaults.items()}
        if type(settings["stop"]) is str:
            settings["stop"] = [settings["stop"]]
        bias = {int(i): amount for i, amount in self.get("logit_bias", {}).items()}
        check_ids(bias, "logit_bias", self.served.vocab_size)
        if self.echo and top is not None:
            settings["prompt_logprobs"] = 0
        if self.echo:
            settings["text"] = prompt if type(prompt) is str else self.tokenizer.decode(ids)

        # 3. The requests. Text i has the seed + i, so that it can be had alone.
        seed = self.get("seed", secrets.randbits(32))
        settings |= dict(max_tokens=self.capacity(ids), logit_bias=bias, logprobs=top)
        settings |= dict(deadline=self.deadline, streams=self.stream, events=self.events)
        for i in range(self.n):
            self.requests.append(Request(ids=ids, seed=(seed + i) % 2**63, **settings))

    def capacity(self, ids):
        """How many tokens the answer may have."""
        name, n, size = self.prompt_field, len(ids), self.served.context
        left = size - n
        if self.echo and left == 0:
            left = 1  # to score a prompt that fills the context: the next token needs no position
        need(left > 0, name, f"fills the context: {n}/{size} tokens", "context_length_exceeded")
        limit = next((field for field in MAX_TOKENS if self.body.get(field) is not None), None)
        if not limit:
            return min(self.max_tokens or left, left)
        asked = self.get(limit)
        need(asked or self.echo, limit, "must be at least 1")
        what = f"does not fit in the context with {name}: {n}+{asked}>{size} tokens"
        need(asked <= left, limit, what, "context_length_exceeded")
        return asked

    def token(self, i, logprob):
        raw = self.tokenizer.token_bytes(i)
        return {"token": spell(self.tokenizer, i), "logprob": finite(logprob), "bytes": [*raw]}

    def scored(self, tokens, top):
        """Each token with its log-probability and, as `top`, those of the likeliest ones."""
        return [self.token(token.id, token.logprob) | {top: [self.token(*best) for best in token.top]}
                for token in tokens]

    def chunks(self, event):
        """What a stream sends for an event."""
        chunks = []
        if event.text or event.tokens:
            chunks.append(self.part(event.request, event.text, event.tokens))
        if event.finish_reason and event.finish_reason not in self.failures:
            chunks.append(self.end(event.request))
        return chunks

    def check_event(self, event):
        """Raises a Refuse where the event is the end of a failed request."""
        if event.finish_reason in self.failures:
            raise Refuse(*self.failures[event.finish_reason])

    def first(self):
        """The chunks before all events."""
        return []

    last = first  # and after them


class Generate(Job):
    """POST /generate"""

    fields = FIELDS | {"logprobs": number(int, 0, 20)}  # of this many of the likeliest tokens

    def read(self):
        known = [*self.fields, "prompt"]
        for name in self.body:
            if name not in known:
                near = difflib.get_close_matches(name[:40], known, 1)
                hint = "".join(f": did you mean {field!r}?" for field in near)
                raise Refuse(400, f"there is no field {short(name)}{hint}", name[:40])
        self.ask(self.body.get("prompt"), self.get("logprobs") or None)

    def part(self, request, text, tokens):
        found = {"text": text}
        if request.logprobs:
            found["tokens"] = self.scored(tokens, "top")
        return found

    def token(self, i, logprob):
        return {"id": i} | super().token(i, logprob)

    def end(self, request):
        seconds = time.monotonic() - request.submitted
        return {"text": "", "prompt_tokens": len(request.ids), "completion_tokens": request.n,
                "seed": request.seed, "finish_reason": request.finish_reason, "time": round(seconds, 4)}

    def answer(self):
        request, = self.requests
        answer = self.end(request) | self.part(request, request.text, request.tokens)
        return {"generated_text": answer.pop("text"), **answer}


class Completions(Job):
    """POST /v1/completions"""

    fields = FIELDS | {"n": number(int, 1, MAX_CHOICES), "echo": FLAG, "logprobs": number(int, 0, 5)}
    defaults = Job.defaults | {"temperature": 1.0, "top_k": 0}
    failures = FAILURES | {"timeout": (503, "the request took too long", None, "timeout")}
    max_tokens, prefix = 16, "cmpl-"
    kinds = "text_completion", "text_completion"  # of an answer, and of a chunk
    lists_end = True  # with the log-probability of the end-of-text token, which makes one for each token of usage

    def read(self):
        self.read_common(add_special_tokens=True)
        prompts = self.body.get("prompt")
        if type(prompts) is not list or not any(type(prompt) in (list, str) for prompt in prompts):
            prompts = [prompts]
        need(len(prompts) <= MAX_PROMPTS, "prompt", f"may hold at most {MAX_PROMPTS} prompts")
        self.echo = self.get("echo", False)
        for prompt in prompts:
            self.ask(prompt, self.get("logprobs"))
        self.streams = {request: TextStream(self.tokenizer) for request in self.requests}
        self.offsets = dict.fromkeys(self.requests, 0)

    def read_common(self, **harmless):
        """The fields that OpenAI's two endpoints share. harmless: {name: value} that changes nothing here."""
        unsupported = UNSUPPORTED | {name: (value,) for name, value in harmless.items()}
        for names, values in unsupported.items():
            for name in names.split():
                value = self.body.get(name)
                need(value is None or value in values, name, "is not supported here", "unsupported")
        options = self.body.get("stream_options")
        fits = options is None or self.stream and type(options) is dict
        need(fits, "stream_options", "must be an object, and needs stream=true")
        self.usage_wanted = check((options or {}).get("include_usage") or False, "include_usage", FLAG)
        self.n = self.get("n", 1)
        self.id, self.created = self.prefix + secrets.token_hex(12), int(time.time())

    def frame(self, choices, usage=None):
        return {"id": self.id, "object": self.kinds[self.stream], "created": self.created,
                "model": self.served.name, "choices": choices, "usage": usage}

    def choice(self, request, text="", tokens=None, reason=None):
        found = {"index": self.requests.index(request), **self.content(text), "seed": request.seed,
                 "logprobs": None, "finish_reason": reason}
        if tokens is not None and request.logprobs is not None:
            found["logprobs"] = self.logprobs(request, tokens)
        return found

    def usage(self):
        prompts = sum(len(request.ids) for request in self.requests[::self.n])
        new = sum(request.n for request in self.requests)
        return {"prompt_tokens": prompts, "completion_tokens": new, "total_tokens": prompts + new}

    def answer(self):
        choices = []
        for request in self.requests:
            tokens = request.prompt_tokens + request.tokens + request.end * self.lists_end
            choices.append(self.choice(request, request.text, tokens, request.finish_reason))
        return self.frame(choices, self.usage())

    def part(self, request, text, tokens):
        return self.frame([self.choice(request, text, tokens)])

    def end(self, request):
        tokens = request.end * self.lists_end
        return self.frame([self.choice(request, "", tokens or None, request.finish_reason)])

    def last(self):
        return [self.frame([], self.usage())] if self.usage_wanted else []

    def content(self, text):
        return {"text": text}

    def logprobs(self, request, tokens):
        """Four lists. text_offset: where in the text of the choice each token begins."""
        found = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            logprob = top = None  # the first token of a text is not predicted
            if token.logprob is not None:
                logprob = finite(token.logprob)
                top = {spell(self.tokenizer, i): finite(p) for i, p in token.top}
            found["tokens"].append(spell(self.tokenizer, token.id))
            found["token_logprobs"].append(logprob)
            found["top_logprobs"].append(top)
            found["text_offset"].append(self.offsets[request])
            self.offsets[request] += len(self.streams[request].push(token.id))
        return found


class Chat(Completions):
    """POST /v1/chat/completions: the model's chat format makes a prompt of messages."""

    fields = Completions.fields | {"logprobs": FLAG, "top_logprobs": number(int, 0, 20)}
    max_tokens, prefix, prompt_field = None, "chatcmpl-", "messages"
    kinds, lists_end = ("chat.completion", "chat.completion.chunk"), False

    def read(self):
        # 1. The messages. An answer that comes last is begun, and goes on.
        messages = check(self.body.get("messages"), "messages", MESSAGES)
        messages = [dict(role=message["role"].replace("developer", "system"), content=content_of(message))
                    for message in messages]
        begun = messages[-1]["role"] == "assistant"
        # 2. The other fields.
        self.read_common(echo=False, add_special_tokens=False, add_generation_prompt=not begun,
                         continue_final_message=begun)
        size = sum(len(message["content"].encode()) for message in messages)
        check_size("messages", size, self.served.most_bytes)
        need(self.served.chat, "messages", "need a model with a chat format", "no_chat_format")
        top = self.get("top_logprobs", 0) if self.get("logprobs") else None
        chat = self.tokenizer.continued if begun else self.tokenizer.chat
        self.ask(chat(messages), top)

    def first(self):
        role = {"delta": {"role": "assistant", "content": ""}}
        return [self.frame([self.choice(request) | role]) for request in self.requests]

    def content(self, text):
        if self.stream:
            return {"delta": {"content": text} if text else {}}
        return {"message": {"role": "assistant", "content": text}}

    def logprobs(self, request, tokens):
        return {"content": self.scored(tokens, "top_logprobs")}

# SPDX-License-Identifier: GPL-3.0-only
"""
Many prompts from a file, through the engine: `python sample.py RUN --prompts=FILE`.

    a line of a .txt        a prompt; with --chat, the question of a conversation of its own
    a line of a .jsonl      {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}
    a line of the output    {"line": 1, "prompt": "...", "text": "...", "seed": 1234, "tokens": 128}

The answers come in the order of the prompts. Each is what its prompt gets alone, with its seed.
"""
import json

from runtime.console import Progress, UserError, note, show, warn
from sample import Sampling, capacity, check_chat, continuation, fit, ids_of, read_prompt
from serving.engine import Engine, Request
from text.pretrained import check_messages
from text.rows import Skipped, field, json_lines

ROWS = 16  # texts at once
FIX = '{"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]} on each line'


def read_rows(path, skipped):
    """("FILE, line 1", row) for each line that is not empty."""
    text = read_prompt(f"FILE:{path}")
    if path.endswith(".jsonl"):
        return json_lines(path, [text], FIX, skipped)
    return [(f"{path}, line {number}", {"prompt": line.removesuffix("\r")})
            for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def prompt_of(row, where, model, tokenizer, run, settings):
    """(what a row asks, its ids). Raises UserError where the model cannot read it."""
    if not (isinstance(row, dict) and "messages" in row):
        asked = {"prompt": field(row, "prompt", str, where, FIX)}
        if not settings.chat:
            return asked, ids_of(asked["prompt"], tokenizer)
        messages = [dict(role="user", content=asked["prompt"])]
    else:
        messages = field(row, "messages", list, where, FIX)
        asked = {"messages": messages}
        check_messages(messages)
        if not messages:
            raise UserError("`messages` is empty", FIX)
        check_chat(run, tokenizer)
    if messages[-1]["role"] == "assistant":
        return asked, tokenizer.continued(messages)
    return asked, fit([*messages], tokenizer, capacity(settings, model.config.block_size))


def requests_for(rows, model, tokenizer, run, settings, skipped):
    """[(where, what is asked, request)]: num_samples for each row, each with the next seed."""
    found, size = [], model.config.block_size
    how = {name: getattr(settings, name) for name in vars(Sampling())}
    for where, row in rows:
        try:
            asked, ids = prompt_of(row, where, model, tokenizer, run, settings)
        except UserError as error:
            fact = error.fact if error.fact.startswith(where) else f"{where}: {error.fact}"
            skipped.add(UserError(fact, error.fix))
            continue
        if len(ids) > size:
            note(f"{where} has {len(ids):,} tokens, the context {size}: the first {len(ids) - size:,} are ignored")
        for _ in range(settings.num_samples):
            seed = settings.seed + len(found)
            request = Request(ids=ids[-size:], max_tokens=settings.max_new_tokens, seed=seed, **how)
            found.append((where, asked, request))
    return found


def answer_all(model, tokenizer, run, settings):
    # 1. The requests.
    skipped = Skipped(settings.strict)
    found = requests_for(read_rows(settings.prompts, skipped), model, tokenizer, run, settings, skipped)
    if not found:
        raise [*skipped.shown, UserError(f"{settings.prompts} has no prompts", FIX)][0]
    for error in skipped.shown[:3]:
        warn(f"skipped: {error.fact}")
    if skipped.count:
        warn(f"rows skipped: {skipped.count:,}; --strict stops at the first")

    # 2. The engine gets those that fit into the context with their answers.
    longest = max(len(request.ids) + request.max_tokens for _, _, request in found)
    engine = Engine(model, tokenizer, min(ROWS, len(found)), dtype=model.dtype(), context=longest)
    fitting = {request for _, _, request in found if len(request.ids) + request.max_tokens - 1 <= engine.context}
    engine.submit(*[request for _, _, request in found if request in fitting])

    # 3. The answers, in their order.
    progress = Progress("writing", len(found), unit="texts")
    for done, (where, asked, request) in enumerate(found, start=1):
        while request in fitting and not request.finish_reason:
            engine.step()
        if request not in fitting:  # alone, with a context that moves on
            for n, text in continuation(model, tokenizer, request.ids, settings, request.seed):
                request.text += text
                request.n = n
        if request.finish_reason == "error":
            raise UserError("the model returned logits that are not finite", "--device=cpu --dtype=float32")
        line = int(where.rpartition(" ")[2])
        show(json.dumps(dict(line=line, **asked, text=request.text, seed=request.seed, tokens=request.n)))
        progress.tell(done)

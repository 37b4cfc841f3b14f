# SPDX-License-Identifier: GPL-3.0-only
"""
Many prompts from a file, through the engine: what `python sample.py RUN --prompts=FILE` does.

    a line of a .txt        a prompt; with --chat, the question of a conversation of its own
    a line of a .jsonl      {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}
    a line of the output    {"line": 1, "prompt": "...", "text": "...", "seed": 1234, "tokens": 128}

The answers come in the order of the prompts, and each is the one that its prompt gets alone with its seed.
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
    """(number of the line, row) for each that is not empty: {"prompt": text} or {"messages": list}."""
    text = read_prompt(f"FILE:{path}")
    if not path.endswith(".jsonl"):
        lines = enumerate(text.split("\n"), start=1)
        return [(f"{path}, line {number}", {"prompt": line.removesuffix("\r")})
                for number, line in lines if line.strip()]
    rows = []
    for where, row in json_lines(path, [text], FIX, skipped):
        try:
            name, kind = ("messages", list) if isinstance(row, dict) and "messages" in row else ("prompt", str)
            rows.append((where, {name: field(row, name, kind, where, FIX)}))
        except UserError as error:
            skipped.add(error)
    return rows


def prompt_of(row, tokenizer, settings, size):
    """The ids of a row. Raises UserError where the model cannot read it."""
    messages = row.get("messages")
    if messages is None and settings.chat:
        messages = [dict(role="user", content=row["prompt"])]
    if messages is None:
        return ids_of(row["prompt"], tokenizer)
    check_messages(messages)
    if not messages:
        raise UserError("`messages` is empty", FIX)
    if messages[-1]["role"] == "assistant":
        return tokenizer.continued(messages)
    return fit([*messages], tokenizer, capacity(settings, size))


def requests_for(rows, model, tokenizer, settings, skipped):
    """[(where, row, request)], num_samples for each row, each with the next seed."""
    found, cut, seed, size = [], 0, settings.seed, model.config.block_size
    how = {name: getattr(settings, name) for name in vars(Sampling())}
    for where, row in rows:
        try:
            ids = prompt_of(row, tokenizer, settings, size)
        except UserError as error:
            skipped.add(UserError(f"{where}: {error.fact}", error.fix))
            continue
        cut += len(ids) > size
        for _ in range(settings.num_samples):
            request = Request(ids=ids[-size:], max_tokens=settings.max_new_tokens, seed=seed, **how)
            found.append((where, row, request))
            seed += 1
    if cut:
        note(f"prompts longer than the context of {size:,} tokens: {cut:,}; their beginnings are ignored")
    return found


def answer_all(model, tokenizer, run, settings):
    # 1. The requests.
    skipped = Skipped(settings.strict)
    rows = read_rows(settings.prompts, skipped)
    if settings.chat or any("messages" in row for _, row in rows):
        check_chat(run, tokenizer)
    asked = requests_for(rows, model, tokenizer, settings, skipped)
    for error in skipped.shown[:3]:
        warn(f"skipped: {error.fact}")
    if skipped.count:
        warn(f"rows skipped: {skipped.count:,}; --strict stops at the first")
    if not asked:
        raise UserError(f"{settings.prompts} has no prompts", FIX)

    # 2. The engine gets those that fit into the context with their answers.
    longest = max(len(request.ids) + request.max_tokens for _, _, request in asked)
    engine = Engine(model, tokenizer, min(ROWS, len(asked)), dtype=model.dtype(), context=longest)
    fitting = {request for _, _, request in asked if len(request.ids) + request.max_tokens - 1 <= engine.context}
    engine.submit(*[request for _, _, request in asked if request in fitting])

    # 3. The answers, in their order.
    progress = Progress("writing", len(asked), unit="texts")
    for done, (where, row, request) in enumerate(asked, start=1):
        while request in fitting and not request.finish_reason:
            engine.step()
        if request not in fitting:  # alone, where the context moves on
            for n, text in continuation(model, tokenizer, request.ids, settings, request.seed):
                request.text += text
                request.n = n
        if request.finish_reason == "error":
            raise UserError("the model returned logits that are not finite", "--device=cpu --dtype=float32")
        line = int(where.rpartition(" ")[2])
        show(json.dumps(dict(line=line, **row, text=request.text, seed=request.seed, tokens=request.n)))
        progress.tell(done)

# SPDX-License-Identifier: GPL-3.0-only
"""
Many prompts from a file, through the engine: `python sample.py RUN --prompts=FILE`.

    a line of a .txt        a prompt; with --chat, the question of a conversation of its own
    a row of a .jsonl       {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}
    a line of the output    {"line": 1, "prompt": "...", "text": "...", "seed": 1234, "tokens": 128}

The answers come in the order of the prompts. Each is what its prompt gets alone, with its seed.
"""
import json
from pathlib import Path

from runtime.console import Progress, UserError, show, warn
from sample import Sampling, check_chat, continuation, prompt_ids, read_prompt
from serving.engine import Engine, Request
from text import sources
from text.pretrained import check_messages
from text.rows import Skipped, field, lines

ROWS = 16  # texts at once
FIX = '{"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]} on each line'


def read_rows(path, skipped):
    """("FILE, line 1", row) for each row that is not empty."""
    if sources.kind(path) in sources.ROWS:
        return sources.file_rows(path, FIX, skipped)
    # (A pipe is /dev/stdin, or a shell's <(command).)
    blocks = [read_prompt(f"FILE:{path}")] if Path(path).is_fifo() else sources.decoded(path)
    numbered = enumerate(lines(path, blocks), start=1)
    return ((f"{path}, line {n}", {"prompt": line.removesuffix("\r")}) for n, line in numbered if line.strip())


def asked_in(row, where, chat):
    """({"prompt"} or {"messages"}: what a row asks, the same as a text or as messages)."""
    if isinstance(row, dict) and "messages" in row:
        messages = field(row, "messages", list, where, FIX)
        check_messages(messages)
        if not messages:
            raise UserError("`messages` is empty", FIX)
        return {"messages": messages}, [*messages]
    prompt = field(row, "prompt", str, where, FIX)
    return {"prompt": prompt}, [dict(role="user", content=prompt)] if chat else prompt


def requests_for(rows, model, tokenizer, run, settings, skipped):
    """[(line, what is asked, request)]: num_samples for each row, each with the next seed."""
    found, size = [], model.config.block_size
    how = {name: getattr(settings, name) for name in vars(Sampling())}
    for where, row in rows:
        try:
            asked, prompt = asked_in(row, where, settings.chat)
            if isinstance(prompt, list):
                check_chat(run, tokenizer)
            ids = prompt_ids(prompt, tokenizer, settings, size, where)
        except UserError as error:
            fact = error.fact if error.fact.startswith(where) else f"{where}: {error.fact}"
            skipped.add(UserError(fact, error.fix))
            continue
        line = int(where.rpartition(" ")[2])
        for _ in range(settings.num_samples):
            seed = settings.seed + len(found)
            found.append((line, asked, Request(ids=ids, max_tokens=settings.max_new_tokens, seed=seed, **how)))
    return found


def answer_all(model, tokenizer, run, settings):
    # 1. The requests.
    skipped = Skipped(settings.strict)
    found = requests_for(read_rows(settings.prompts, skipped), model, tokenizer, run, settings, skipped)
    if not found:
        raise [*skipped.shown, UserError(f"{settings.prompts} has no prompts", FIX)][0]
    for error in skipped.shown:
        warn(f"skipped: {error.fact}")
    if skipped.count:
        warn(f"rows skipped: {skipped.count:,}; --strict stops at the first")

    # 2. The engine gets those that fit into the context with their answers.
    requests = [request for _, _, request in found]
    longest = max(len(request.ids) + request.max_tokens for request in requests)
    engine = Engine(model, tokenizer, min(ROWS, len(requests)), dtype=model.dtype(), context=longest)
    engine.submit(*[request for request in requests if len(request.ids) + request.max_tokens - 1 <= engine.context])

    # 3. The answers, in their order.
    progress = Progress("writing", len(requests), unit="texts")
    for done, (line, asked, request) in enumerate(found, start=1):
        if not request.submitted:  # alone, with a context that moves on
            for n, text in continuation(model, tokenizer, request.ids, settings, request.seed):
                request.n = n
                request.text += text
        while request.submitted and not request.finish_reason:
            engine.step()
        if request.finish_reason == "error":
            raise UserError("the model returned logits that are not finite", "--device=cpu --dtype=float32")
        show(json.dumps(dict(line=line, **asked, text=request.text, seed=request.seed, tokens=request.n)))
        progress.tell(done)

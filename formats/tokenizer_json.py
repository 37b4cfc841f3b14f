# SPDX-License-Identifier: GPL-3.0-only
"""
Our tokenizers as a tokenizer.json, from which the library `tokenizers` (and so transformers) makes the same ids.

    files = tokenizer_files(tokenizer, context=1024)    # {"tokenizer.json": bytes, "tokenizer_config.json": bytes}

Such a file says how the text is cut into words, by which model a word becomes tokens, and how tokens become text again.
Each kind of ours has a function here that says it in these terms. text/pretrained.py reads the files of others.
"""
import json
import re

from text import pretrained
import tokenizer as tokenizers
from runtime.console import UserError

ENCODINGS = ("gpt2", "r50k_base", "p50k_base", "p50k_edit", "cl100k_base", "o200k_base", "o200k_harmony")
FUSE = dict(type="Fuse")
BYTES_AND_TEXT = dict(type="Sequence", decoders=[dict(type="ByteFallback"), FUSE])
GRAPHS = "--format=onnx, pt2 or torchscript"


def tokenizer_files(tokenizer, context, chat=False):
    """{name: bytes}: tokenizer.json and tokenizer_config.json. Raises UserError for what they cannot hold.

    chat: has the model learned our chat format? Then chat_template.jinja describes it. The class is always
    PreTrainedTokenizerFast: those that are named after a model replace the pre-tokenizer of tokenizer.json.
    """
    if tokenizer.kind == "hugging_face":
        files = {name: content for name, content in tokenizer.files.items() if name in pretrained.PARTS}
        settings = {name: value for name, value in json.loads(files.get("tokenizer_config.json", b"{}")).items()
                    if not name.endswith(("_file", "_or_path"))}  # paths of somebody's machine
    else:
        make = {"char": char_json, "bpe": bpe_json, "unigram": unigram_json, "tiktoken": byte_json}[tokenizer.kind]
        files = {"tokenizer.json": json.dumps(make(tokenizer), ensure_ascii=False).encode()}
        settings = dict(model_max_length=context, clean_up_tokenization_spaces=False)
        end = tokenizers.END_OF_TEXT
        if end in tokenizer.special:
            settings.update(bos_token=end, eos_token=end, pad_token=end, unk_token=end)
        if chat:
            files["chat_template.jinja"] = tokenizers.CHAT_TEMPLATE.encode()
    settings = {**settings, "tokenizer_class": "PreTrainedTokenizerFast"}
    return {**files, "tokenizer_config.json": json.dumps(settings, indent=1).encode()}


def spec(model, special, pre_tokenizer=None, decoder=None):
    """A whole tokenizer.json: nothing is normalized or added."""
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    added = [dict(plain, id=i, content=text) for text, i in sorted(special.items(), key=lambda item: item[1])]
    return dict(version="1.0", added_tokens=added, normalizer=None, pre_tokenizer=pre_tokenizer, post_processor=None,
                decoder=decoder, model=model)


def split(regex, behavior="Isolated"):
    return dict(type="Split", pattern=dict(Regex=regex), behavior=behavior, invert=False)


def char_json(tokenizer):
    """Every character is a word. One without an id is an error there too."""
    vocabulary = {c: i for i, c in enumerate(tokenizer.characters, len(tokenizer.special))} | tokenizer.special
    return spec(dict(type="WordLevel", vocab=vocabulary, unk_token="<no such character>"), tokenizer.special,
                split(r"[\s\S]"), FUSE)


def bpe_json(tokenizer):
    """SentencePiece's BPE: the whole text is one word, and a space is a character like others."""
    pieces, scores = pieces_and_scores(tokenizer)
    normal = [i for i, text in enumerate(tokenizer.bytes) if text and not tokenizer.processor.is_byte(i)]
    order = [pieces[i] for i in sorted(normal, key=lambda i: -scores[i])]  # the highest score is merged first
    merges, unreachable = merges_of(order)
    if unreachable:
        raise UserError(f"tokenizer.json cannot describe how the piece {unreachable[0]!r} is made", GRAPHS)
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    return spec(dict(type="BPE", vocab=vocabulary, merges=merges, byte_fallback=True), tokenizer.special,
                decoder=BYTES_AND_TEXT)


def unigram_json(tokenizer):
    """SentencePiece's unigram model: the same scores, and the likeliest way to cut the text."""
    pieces, scores = pieces_and_scores(tokenizer)
    if any(score * tokenizers.SCORE_STEPS % 1 for score in scores):
        raise UserError("an older version has learned this unigram tokenizer: its scores cannot be added exactly",
                        f"learn it anew; or {GRAPHS}")
    # Text that spells the name of a byte must not find it in the vocabulary.
    return spec(dict(type="Unigram", unk_id=0, byte_fallback=True, vocab=list(zip(pieces, scores))),
                tokenizer.special, split("<(?=0x[0-9A-F]{2}>)", "MergedWithPrevious"), BYTES_AND_TEXT)


def pieces_and_scores(tokenizer):
    """SentencePiece's pieces with spaces for its U+2581; a real one is spelled in bytes."""
    processor, ids = tokenizer.processor, range(tokenizer.vocab_size)
    pieces = [processor.id_to_piece(i).replace(tokenizers.SPACE_MARK, " ") for i in ids]
    pieces[0] = "<unk\uffff>"  # "<unk>" in a text is text
    return pieces, [processor.get_score(i) for i in ids]


def byte_json(tokenizer):
    """tiktoken's encodings: bytes are written as visible characters."""
    if tokenizer.name not in ENCODINGS:
        raise UserError(f"the encoding {tokenizer.name} is none of {', '.join(ENCODINGS)}", GRAPHS)
    visible = {byte: character for character, byte in pretrained.byte_alphabet().items()}

    def shown(token):
        return "".join(visible[byte] for byte in token)

    merges, unreachable = merges_of(sorted(tokenizer.ranks, key=tokenizer.ranks.get))
    vocabulary = {shown(token): rank for token, rank in tokenizer.ranks.items()} | tokenizer.special
    model = dict(type="BPE", vocab=vocabulary, merges=[(shown(a), shown(b)) for a, b in merges],
                 ignore_merges=bool(unreachable))  # a word that is a token as a whole needs no merges
    # In the library's dialect, {1,3}+ would repeat, and $ is the end of every line. The possessive "+" only saves time.
    regex = re.sub(r"([+*?}])\+", r"\1", tokenizer.pattern).replace("$", r"\z")
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    steps = dict(type="Sequence", pretokenizers=[split(regex), byte_level])
    return spec(model, tokenizer.special, steps, byte_level)


def merges_of(order):
    """The merges [(left, right)] of BPE from its tokens, text or bytes, in the order of their ranks.

    A token is made by joining what the merges before it make of its symbols. Returns the tokens that are not, too.
    """
    rank, merges, unreachable = {token: i for i, token in enumerate(order)}, [], []
    for limit, token in enumerate(order):
        symbols = [token[i:i + 1] for i in range(len(token))]
        while len(symbols) > 2:
            ranks = [rank.get(a + b, limit) for a, b in zip(symbols, symbols[1:])]
            best = min(ranks)
            if best >= limit:
                break
            at = ranks.index(best)
            symbols[at:at + 2] = [symbols[at] + symbols[at + 1]]
        if len(symbols) == 2:
            merges.append(tuple(symbols))
        elif len(symbols) > 2:
            unreachable.append(token)
    return merges, unreachable

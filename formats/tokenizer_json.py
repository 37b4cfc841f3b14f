# SPDX-License-Identifier: GPL-3.0-only
"""
Our tokenizers as a tokenizer.json, from which the package tokenizers, and so transformers, makes the same ids.

    files = tokenizer_files(tokenizer, context=1024)    # {"tokenizer.json": bytes, ...}

Such a file says how a text is cut into words, by which model a word becomes tokens, and how tokens become
text again. Each kind of ours has a function here that says it in these terms.
"""
import json
import re

import tokenizer as tokenizers
from runtime.console import UserError
from text.pretrained import byte_alphabet

# tiktoken's encodings whose expressions mean the same here:
ENCODINGS = ("gpt2", "r50k_base", "p50k_base", "p50k_edit", "cl100k_base", "o200k_base", "o200k_harmony")
GRAPHS = "--format=onnx, pt2 or torchscript"
FUSE = dict(type="Fuse")
BYTE_LEVEL = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
BYTES_AND_TEXT = dict(type="Sequence", decoders=[dict(type="ByteFallback"), FUSE])


def tokenizer_files(tokenizer, context, chat=False):
    """{name: bytes} of the files. Raises UserError for a tokenizer that they cannot hold.

    context: the longest text in tokens. chat: has the model learned our chat format?
    """
    if tokenizer.kind == "hugging_face":
        files = dict(tokenizer.files)
        settings = json.loads(files.get("tokenizer_config.json", b"{}"))
        for name in [name for name in settings if name.endswith(("_file", "_or_path"))]:
            del settings[name]  # a path of somebody's machine
    else:
        kinds = {"char": char_model, "bpe": bpe_model, "unigram": unigram_model, "simple_bpe": simple_bpe_model,
                 "tiktoken": byte_model, "gpt2": byte_model}
        about = dict(version="1.0", added_tokens=added_tokens(tokenizer), **kinds[tokenizer.kind](tokenizer))
        files = {"tokenizer.json": json.dumps(about, ensure_ascii=False).encode()}
        settings = dict(model_max_length=context, clean_up_tokenization_spaces=False)
        end = tokenizers.END_OF_TEXT
        if end in tokenizer.special:
            settings |= dict(bos_token=end, eos_token=end, pad_token=end, unk_token=end)
        if chat:
            files["chat_template.jinja"] = tokenizers.CHAT_TEMPLATE.encode()
            settings["eos_token"] = tokenizers.END
    if tokenizer.kind == "bpe":  # llama.cpp's converter reads SentencePiece's own file, and puts no space before a text
        files["tokenizer.model"] = tokenizer.model
        settings["add_prefix_space"] = False
    # Without these, transformers 4 makes token types, which no GPT has, and pads behind a prompt.
    settings.setdefault("model_input_names", ["input_ids", "attention_mask"])
    settings.setdefault("padding_side", "left")
    # The classes that are named after a model would replace the pre-tokenizer of tokenizer.json.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    files["tokenizer_config.json"] = json.dumps(settings, indent=1).encode()
    return files


def added_tokens(tokenizer):
    """The special tokens, in the order of their ids."""
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    by_id = sorted((i, text) for text, i in tokenizer.special.items())
    return [dict(plain, id=i, content=text) for i, text in by_id]


def split(regex, behavior="Isolated"):
    """A pre-tokenizer: where the expression is found, the text is cut."""
    return dict(type="Split", pattern=dict(Regex=regex), behavior=behavior, invert=False)


def char_model(tokenizer):
    """Every character is a word. One without an id is an error there too."""
    ids = enumerate(tokenizer.characters, len(tokenizer.special))
    vocabulary = {character: i for i, character in ids} | tokenizer.special
    model = dict(type="WordLevel", vocab=vocabulary, unk_token="<no such character>")
    return dict(model=model, pre_tokenizer=split(r"[\s\S]"), decoder=FUSE)


def bpe_model(tokenizer):
    """SentencePiece's BPE: the whole text is one word, and a space is a character like others."""
    pieces, scores = pieces_and_scores(tokenizer)
    made = [i for i, text in enumerate(tokenizer.bytes) if text and not tokenizer.processor.is_byte(i)]
    made.sort(key=lambda i: -scores[i])  # the highest score is merged first
    merges = merges_of([pieces[i] for i in made])
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    model = dict(type="BPE", vocab=vocabulary, merges=merges, byte_fallback=True)
    return dict(model=model, decoder=BYTES_AND_TEXT)


def simple_bpe_model(tokenizer):
    """Our own byte-pair encoding: bytes are written as visible characters, as in byte_model."""
    visible = {byte: character for character, byte in byte_alphabet().items()}
    shown = ["".join(visible[byte] for byte in token) for token in tokenizer.bytes[len(tokenizer.special):]]
    vocabulary = {token: i for i, token in enumerate(shown, len(tokenizer.special))} | tokenizer.special
    merges = [(shown[left], shown[right]) for left, right in tokenizer.merges]
    words = dict(type="Sequence", pretokenizers=[split(tokenizers.WORDS.pattern), BYTE_LEVEL])
    return dict(model=dict(type="BPE", vocab=vocabulary, merges=merges), pre_tokenizer=words, decoder=BYTE_LEVEL)


def unigram_model(tokenizer):
    """SentencePiece's unigram model: the same scores, and the likeliest way to cut the text."""
    pieces, scores = pieces_and_scores(tokenizer)
    if any(score * tokenizers.SCORE_STEPS % 1 for score in scores):
        raise UserError("the scores of this old unigram tokenizer cannot be added exactly",
                        f"learn it again; or {GRAPHS}")
    model = dict(type="Unigram", unk_id=0, byte_fallback=True, vocab=list(zip(pieces, scores)))
    # The name of a byte in a text, "<0x41>", is cut, so that it is not found in the vocabulary.
    names = split("<(?=0x[0-9A-F]{2}>)", "MergedWithPrevious")
    return dict(model=model, pre_tokenizer=names, decoder=BYTES_AND_TEXT)


def pieces_and_scores(tokenizer):
    """SentencePiece's pieces with spaces for its U+2581; a real one is spelled in bytes."""
    processor = tokenizer.processor
    ids = range(tokenizer.vocab_size)
    pieces = [processor.id_to_piece(i).replace(tokenizers.SPACE_MARK, " ") for i in ids]
    pieces[0] = "<unk\uffff>"  # "<unk>" in a text is text
    return pieces, [processor.get_score(i) for i in ids]


def byte_model(tokenizer):
    """tiktoken's encodings: bytes are written as visible characters."""
    if tokenizer.name not in ENCODINGS:
        raise UserError(f"the encoding {tokenizer.name} is not one of {', '.join(ENCODINGS)}", GRAPHS)
    visible = {byte: character for character, byte in byte_alphabet().items()}
    shown = {token: "".join(visible[byte] for byte in token) for token in tokenizer.ranks}

    # 1) the words: in the library's dialect, {1,3}+ would repeat, and $ is the end of every line
    regex = re.sub(r"([+*?}])\+", r"\1", tokenizer.pattern)  # (a possessive "+" only saves time)
    regex = regex.replace("$", r"\z")
    words = dict(type="Sequence", pretokenizers=[split(regex), BYTE_LEVEL])

    # 2) the tokens: a word that is a token as a whole needs no merges
    order = sorted(tokenizer.ranks, key=tokenizer.ranks.get)
    merges = [(shown[left], shown[right]) for left, right in merges_of(order)]
    vocabulary = {shown[token]: rank for token, rank in tokenizer.ranks.items()} | tokenizer.special
    model = dict(type="BPE", vocab=vocabulary, merges=merges, ignore_merges=True)
    return dict(model=model, pre_tokenizer=words, decoder=BYTE_LEVEL)


def merges_of(order):
    """The merges [(left, right)] of BPE from its tokens, text or bytes, in the order of their ranks.

    The last merge of a token joins the two symbols that the merges before it make of its characters.
    """
    rank = {token: i for i, token in enumerate(order)}
    merges = []
    for limit, token in enumerate(order):
        symbols = [token[i:i + 1] for i in range(len(token))]
        while len(symbols) > 2:
            ranks = [rank.get(left + right, limit) for left, right in zip(symbols, symbols[1:])]
            at = ranks.index(min(ranks))
            if ranks[at] >= limit:
                break  # only a word that is this token becomes it
            symbols[at:at + 2] = [symbols[at] + symbols[at + 1]]
        if len(symbols) == 2:
            merges.append(tuple(symbols))
    return merges

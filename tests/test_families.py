# SPDX-License-Identifier: GPL-3.0-only
"""Folders of the families that people have, with vocabularies of their shape: the ids and the texts of transformers."""
import functools
import json

import pytest
import torch
from conftest import nasty, package, turns, words

import sample
import serve
import tokenizer as tokenizers
from text import pretrained
from training import checkpoint as ckpt

transformers, library = package("transformers"), package("tokenizers")

LLAMA3_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_CHAT = """{{- bos_token }}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if documents is not none %}{{- raise_exception("no documents here") }}{%- endif %}
{%- if tools is not none %}{{- tools | tojson(indent=4) }}{%- endif %}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%Y") %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nYear: " + date_string + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
LLAMA2_CHAT = ("{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
               "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}")
TINY_CHAT = ("{% for m in messages %}\n{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}\n"
             "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}")
QWEN_CHAT = """{%- if tools %}{{- 'tools' }}{%- endif %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"""


def texts():
    return [words(20_000), "It's 1984: 12345 números, ¿qué? 天地玄黄 " * 20]


def template(bos, i, byte_level):
    step = library.processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, i)])
    if not byte_level:
        return step
    return library.processors.Sequence([library.processors.ByteLevel(trim_offsets=True), step])


@functools.cache
def of_bytes(words_by, normalizer, special, plain=()):
    """A byte-level vocabulary, as a tokenizers.Tokenizer; its special tokens come last, as in Llama 3 and Qwen."""
    made = library.Tokenizer(library.models.BPE(ignore_merges=words_by == LLAMA3_WORDS))
    if normalizer:
        made.normalizer = library.normalizers.NFC()
    made.pre_tokenizer = library.pre_tokenizers.Sequence([
        library.pre_tokenizers.Split(library.Regex(words_by), "isolated"),
        library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = library.decoders.ByteLevel()
    made.post_processor = library.processors.ByteLevel(trim_offsets=False)
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(texts(), library.trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False))
    made.add_special_tokens(list(special))
    made.add_tokens([library.AddedToken(text, normalized=False) for text in plain])
    if special[0] == "<|begin_of_text|>":
        made.post_processor = template(special[0], made.token_to_id(special[0]), True)
    return made


@functools.cache
def of_characters(metaspace):
    """Llama 2's vocabulary: characters, merges, 256 bytes for the rest."""
    start = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made = library.Tokenizer(library.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces = library.normalizers.Replace(" ", "\u2581")
    made.normalizer = library.normalizers.Sequence([library.normalizers.Prepend("\u2581"), spaces])
    made.pre_tokenizer = library.pre_tokenizers.Split(library.Regex(r"(?<=\S)(?=\u2581)"), "isolated")  # to learn by
    made.train_from_iterator(texts(), library.trainers.BpeTrainer(vocab_size=600, special_tokens=start, show_progress=False))
    spec = json.loads(made.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]  # the bytes are tokens like others
    spec["pre_tokenizer"] = None
    if metaspace:  # Mistral 7B v0.3
        spec.update(normalizer=None, pre_tokenizer=dict(type="Metaspace", replacement="\u2581", prepend_scheme="first", split=False))
    made = library.Tokenizer.from_str(json.dumps(spec))
    decoders = library.decoders
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 1, 0)])
    made.post_processor = template("<s>", 1, False)
    return made


LLAMA3_SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>")
QWEN_SPECIAL = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPM = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True, add_eos_token=False,
           tokenizer_class="LlamaTokenizer", legacy=False, clean_up_tokenization_spaces=False)
LLAMA3 = dict(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", tokenizer_class="PreTrainedTokenizerFast")
QWEN = dict(bos_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>", add_bos_token=False, add_prefix_space=False,
            tokenizer_class="Qwen2Tokenizer", unk_token=None, errors="replace")
ROPE3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
FAMILIES = {  # model_type, config.json, the vocabulary, tokenizer_config.json, the tokens that end a text
    "Llama 2": ("llama", {}, lambda: of_characters(False), dict(SPM, chat_template=LLAMA2_CHAT), ["</s>"]),
    "TinyLlama": ("llama", dict(num_key_value_heads=1), lambda: of_characters(False), dict(SPM, chat_template=TINY_CHAT), ["</s>"]),
    "Mistral": ("mistral", dict(sliding_window=None), lambda: of_characters(True), dict(SPM, chat_template=LLAMA2_CHAT), ["</s>"]),
    "Llama 3.1": ("llama", dict(rope_parameters=dict(ROPE3, rope_theta=5e5)),
                  lambda: of_bytes(LLAMA3_WORDS, False, LLAMA3_SPECIAL), dict(LLAMA3, chat_template=LLAMA3_CHAT),
                  ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]),
    "Llama 3.2": ("llama", dict(rope_parameters=dict(ROPE3, factor=32.0, rope_theta=5e5), tie_word_embeddings=True, head_dim=8),
                  lambda: of_bytes(LLAMA3_WORDS, False, LLAMA3_SPECIAL),
                  dict(LLAMA3, eos_token="<|end_of_text|>"), ["<|end_of_text|>"]),
    "Qwen2.5": ("qwen2", dict(tie_word_embeddings=True), lambda: of_bytes(LLAMA3_WORDS.replace("{1,3}", ""), True, QWEN_SPECIAL),
                dict(QWEN, chat_template=QWEN_CHAT), ["<|im_end|>", "<|endoftext|>"]),
    "Qwen3": ("qwen3", dict(head_dim=16), lambda: of_bytes(LLAMA3_WORDS.replace("{1,3}", ""), True, QWEN_SPECIAL, ("<think>", "</think>")),
              dict(QWEN, chat_template=QWEN_CHAT), ["<|im_end|>", "<|endoftext|>"]),
}


def folder_of(name, path="a"):
    """A folder as the hub has it. Returns transformers' model."""
    kind, change, vocabulary, settings, ends = FAMILIES[name]
    vocabulary = vocabulary()
    torch.manual_seed(0)
    stops = [vocabulary.token_to_id(end) for end in ends]
    config = transformers.AutoConfig.for_model(
        kind, **dict(vocab_size=vocabulary.get_vocab_size() + 5, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, eos_token_id=stops[0],
                     bos_token_id=1) | json.loads(json.dumps(change)))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    model.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
    model.save_pretrained(path)
    vocabulary.save(f"{path}/tokenizer.json")
    with open(f"{path}/tokenizer_config.json", "w") as file:
        json.dump(settings, file)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_logits_and_texts(here, name):
    theirs = folder_of(name)
    model, tokenizer, run = ckpt.load_run("a")
    peer = transformers.AutoTokenizer.from_pretrained("a")
    fast = transformers.PreTrainedTokenizerFast.from_pretrained("a")  # the file as it is
    names = list(tokenizer.special)
    # 1. A text, with what transformers puts before it, and without.
    for text in [words(400), "It's 12345, ¿qué? 天地 🙂", *nasty(300)]:
        if text and not any(special in text for special in names):
            assert tokenizer.prompt(text) == fast(text)["input_ids"], repr(text)
            assert tokenizer.encode(text) == fast(text, add_special_tokens=False)["input_ids"], repr(text)
            if not text.startswith((" ", "\u2581")):  # (of those, its own class for Llama makes others)
                assert tokenizer.prompt(text) == peer(text)["input_ids"], repr(text)
    begins = {"<s>", "<|begin_of_text|>"} & set(names)
    assert tokenizer.prompt("the")[:1] == ([tokenizer.special[begins.pop()]] if begins else tokenizer.encode("the")[:1])
    # 2. A chat: the template alone says where it begins.
    if tokenizer.template:
        for talk in (turns("the cat"), turns("a", "b", "  c\n"), turns("It's 12")):
            due = fast.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
            assert tokenizer.chat(talk) == due
            # transformers 5 has a Llama class of its own, which puts no space behind a special token, as this file
            # (and llama.cpp, and Llama 2 itself) does.
            if name not in ("Llama 2", "TinyLlama"):
                assert due == peer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    # 3. Logits, and a greedy text.
    ids = tokenizer.prompt("the old man sees")
    idx = torch.tensor([ids])
    with torch.no_grad():
        assert (model(idx) - theirs(idx).logits).abs().max() < 1e-4
        theirs.generation_config.eos_token_id = None
        due = theirs.generate(idx, max_new_tokens=20, do_sample=False)[0, len(ids):].tolist()
    assert torch.cat(list(model.generate(idx, 20)), dim=1)[0].tolist() == due


def answer_with(folder, i):
    """Let the model of a folder say nothing but token i."""
    from safetensors.torch import load_file, save_file
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors["model.norm.weight"].zero_()
    model_config = json.loads((folder / "config.json").read_text())
    assert not model_config["tie_word_embeddings"]
    for layer in range(2):  # a stream of ones, but for the embedding
        tensors[f"model.layers.{layer}.self_attn.o_proj.weight"].zero_()
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"].zero_()
    tensors["model.norm.weight"].fill_(1.0)
    tensors["model.embed_tokens.weight"].fill_(1.0)
    tensors["lm_head.weight"].zero_()[i] = 1.0
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("end", ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"])
def test_each_eos_token_id_of_the_list_ends_a_chat(here, capsys, end):
    """Llama-3-Instruct: generation_config.json names three, tokenizer_config.json one of them."""
    folder_of("Llama 3.1")
    _, tokenizer, _ = ckpt.load_run("a")
    answer_with(here / "a", tokenizer.special[end])
    sample.main(["a", "--chat", "--prompt=the", "--temperature=0", "--max_new_tokens=9"])
    found = capsys.readouterr()
    assert found.out == "\n" and "[1 token," in found.err
    settings = serve.ServeConfig(device="cpu")
    served = serve.Served(settings, *sample.load_model(settings, ["a"]))
    assert tokenizer.special[end] in served.engine.ends
    # What a fine-tune learns to say is the eos_token of the template: its run, without that file, ends there too.
    again = pretrained.from_hugging_face("a")
    assert tokenizers.ends(again) == {again.special["<|eot_id|>"], again.special["<|end_of_text|>"]}


@pytest.mark.parametrize("generation, config, due", [
    (dict(eos_token_id=7), {}, [7]), (dict(eos_token_id=[7, 8]), {}, [7, 8]), (None, dict(eos_token_id=[7, 9]), [7, 9]),
    ({}, dict(eos_token_id=9), [9]), (dict(eos_token_id=None), dict(eos_token_id=None), []),
    (dict(eos_token_id=["7", True, 8.0, None, [8], 3]), {}, [3])])
def test_where_the_end_stands(here, generation, config, due):
    folder_of("Qwen3")
    path = here / "a/generation_config.json"
    path.unlink()
    if generation is not None:
        path.write_text(json.dumps(generation))
    both = json.loads((here / "a/config.json").read_text())
    (here / "a/config.json").write_text(json.dumps({**both, **config}))
    assert sorted(ckpt.load_run("a")[1].stops) == due


def test_gpt2s_own_tokenizer_json(here):
    """On the hub, its model has no type, and the folder has no name of an end."""
    spec = json.loads(of_bytes(LLAMA3_WORDS, False, QWEN_SPECIAL).to_str())
    merges = [" ".join(pair) for pair in spec["model"]["merges"]]
    model = dict(dropout=None, unk_token=None, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False,
                 vocab=spec["model"]["vocab"], merges=merges)
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True)
    spec.update(model=model, pre_tokenizer=byte_level, decoder=dict(byte_level, add_prefix_space=True),
                post_processor=dict(byte_level, add_prefix_space=True, trim_offsets=False),
                added_tokens=[token for token in spec["added_tokens"] if token["content"] == "<|endoftext|>"])
    (here / "a").mkdir()
    (here / "a/tokenizer.json").write_text(json.dumps(spec))
    (here / "a/tokenizer_config.json").write_text('{"model_max_length": 1024}')
    tokenizer, reference = pretrained.from_hugging_face("a"), library.Tokenizer.from_file("a/tokenizer.json")
    for text in [words(300), *nasty(200)]:
        if "<|endoftext|>" not in text:
            assert tokenizer.encode(text) == tokenizer.prompt(text) == reference.encode(text).ids
            assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(words(300))) < 250 and list(tokenizer.special) == ["<|endoftext|>"]


@pytest.mark.parametrize("kind, model", [
    ("WordLevel", dict(vocab={"the": 0, "cat": 1, "?": 2, "</s>": 3}, unk_token="?")),
    ("Unigram", dict(unk_id=0, vocab=[["?", 0.0], ["the", -1.0], ["cat", -2.0], ["</s>", 0.0]]))])
def test_other_models_without_a_type(here, kind, model):
    """The library finds out what they are; so do we, who take them as it does."""
    token = dict(id=3, content="</s>", special=True, single_word=False, lstrip=False, rstrip=False, normalized=False)
    spec = dict(version="1.0", added_tokens=[token], pre_tokenizer=dict(type="Whitespace"), model=model)
    (here / "tokenizer.json").write_text(json.dumps(spec))
    (here / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tokenizer = pretrained.from_hugging_face(".")
    assert type(tokenizer.library.model).__name__ == kind
    due = library.Tokenizer.from_file("tokenizer.json").encode("the cat").ids
    assert tokenizer.encode("the cat") == due and len(due) == 2


def test_what_a_template_gets(here):
    """tools and documents are there, and none; dates; tojson with the options that transformers has."""
    folder_of("Qwen2.5")
    peer = transformers.AutoTokenizer.from_pretrained("a")
    tokenizer = pretrained.from_hugging_face("a")
    for part in ("{{ tools is defined and tools is none }}", "{{ documents is defined and documents is none }}",
                 "{% if tools is not none %}wrong{% endif %}", "{{ strftime_now('%Y') }}", "{{ bos_token is defined }}",
                 "{{ messages | tojson }}", "{{ {'b': 1, 'a': 'é<'} | tojson(indent=2) }}",
                 "{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':'), sort_keys=True) }}",
                 "{{ 'é' | tojson(ensure_ascii=True) }}", "{{ pad_token }}{{ eos_token }}"):
        peer.chat_template = tokenizer.template = part
        talk = turns("a")
        assert tokenizer.fill(talk, True) == peer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True), part
    tokenizer.template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(Exception, match="roles must alternate"):
        tokenizer.chat(turns("a"))


def test_a_text_that_begins_with_a_token_of_its_own(here, capsys):
    """sample.py and the server's texts; an empty prompt is that token alone, as in transformers."""
    theirs = folder_of("Llama 3.1")
    model, tokenizer, _ = ckpt.load_run("a")
    peer = transformers.AutoTokenizer.from_pretrained("a")
    theirs.generation_config.eos_token_id = None
    for prompt in ("the cat", ""):
        ids = peer(prompt)["input_ids"] or tokenizer.start
        due = theirs.generate(torch.tensor([ids]), max_new_tokens=9, do_sample=False)[0, len(ids):].tolist()
        sample.main(["a", f"--prompt={prompt}", "--temperature=0", "--max_new_tokens=9", "--ignore_eos"])
        assert capsys.readouterr().out == prompt + tokenizer.decode(due) + "\n"

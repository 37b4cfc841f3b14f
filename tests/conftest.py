# SPDX-License-Identifier: GPL-3.0-only
"""What several test files share: a place to work in, a small text, a trained tiny run, and how an error is provoked."""
import base64
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import pickle
import random
import re
import shutil
import subprocess
import sys
import tempfile

import pytest

# Models as small as those of the tests are slower with several threads, and two test processes share the machine: one
# thread, here and in what tests start. Tests of threads set the number themselves.
os.environ["OMP_NUM_THREADS"] = "1"
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Asserts in these show their values, as those of the tests do.
pytest.register_assert_rewrite("engines", "evaluations", "faults", "http_client", "pages", "programs", "servers")

from runtime import console, machine
from text import pretrained
import model as model_file  # noqa: E402
import prepare  # noqa: E402
import torch  # noqa: E402
import train  # noqa: E402

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # its expression for words
TINY = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--batch_size=4", "--learning_rate=1e-2",
        "--eval_interval=10", "--log_interval=1", "--compile=false", "--dtype=float32", "--device=cpu"]


# The files that take longest, by how their names begin: they are started first, so that none is left to one process.
LONGEST = ("test_readme", "test_reliability", "test_export", "test_processes", "test_serve", "test_train",
           "test_huggingface", "test_download", "test_pretrained", "test_engine", "test_evaluate", "test_page")


def pytest_collection_modifyitems(items):
    """The longest files first; the order within a file stays. Slow tests may take an hour each."""
    def place(item):
        return next((i for i, name in enumerate(LONGEST) if item.path.name.startswith(name)), len(LONGEST))
    items.sort(key=place)
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(3600))


# CI has every package of requirements-dev.txt, so that a skip for want of one is a mistake there, and the run fails.
# What a machine may lack (a browser, network namespaces, the data that a variable names, a GPU) is only named.
MUST_BE_THERE = re.compile("is not installed|pip install|could not import")


def pytest_sessionfinish(session):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") != "true" or reporter is None or hasattr(session.config, "workerinput"):
        return
    for report in reporter.stats.get("skipped", []):
        _, _, reason = report.longrepr
        if MUST_BE_THERE.search(reason):
            reporter.write_line(f"\nmust not be skipped in CI: {report.nodeid}: {reason}", red=True)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def script(name, *args, cwd=None, env=None, timeout=240, fresh=False, **limits):
    """Run a script of the project as a user would; returns the finished process with its text output.

    fresh: by a new Python, and not by one that has imported PyTorch already. limits: see programs.run.
    """
    if not fresh and not env:
        import programs
        return programs.run(ROOT / name, *args, cwd=cwd, timeout=timeout, **limits)
    return subprocess.run([sys.executable, str(ROOT / name), *map(str, args)], cwd=cwd, timeout=timeout, text=True,
                          capture_output=True, stdin=subprocess.DEVNULL, env={**os.environ, **(env or {})})


def package(name):
    """An optional package; without it, the test or the whole file is skipped."""
    return pytest.importorskip(name, reason=f"{name} is not installed: pip install -r requirements-dev.txt")


def data_file(name):
    """The path of a file or folder of texts that are not part of the repository; without it, the test is skipped."""
    folder = os.environ.get("OPENLLM_TEST_DATA") or ROOT.parent / "shared/data"
    path = pathlib.Path(folder) / name
    if not path.exists():
        pytest.skip(f"{name} is not here: OPENLLM_TEST_DATA names no folder that has it")
    return path


def error(main, *argv):
    """What main(argv) complains about: (fact, fix) of the UserError that it must raise."""
    with pytest.raises(console.UserError) as caught:
        main(list(map(str, argv)))
    assert caught.value.fact and caught.value.fix
    return caught.value.fact, caught.value.fix


def random_model(seed=0, **shape):
    """A small model in which every weight is random: a fresh one has blocks that do nothing yet."""
    small = dict(n_layer=2, n_head=4, n_embd=32, block_size=24, vocab_size=100)
    torch.manual_seed(seed)
    model = model_file.GPT(model_file.GPTConfig(**{**small, **shape})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


def whole(step=1, **state):
    """A checkpoint of a small random model with all that a run goes on from, but for the averages of its optimizers."""
    model = random_model()
    numbers = dict.fromkeys("loss lr grad_norm tokens_per_second train_seconds wall_seconds".split(), 1.0)
    return dict(format=1, step=step, model=model.state_dict(), settings=dict(dataclasses.asdict(model.config), dataset=""), source=[],
                tokenizer_sha256="", optimizer=[], scaler={}, chosen=dict(dtype="float32", why="", compile=False), versions={},
                data_sha256=[], row=dict(numbers, step=step, memory=0)) | state


def nanogpt(folder, vocab_size=65, data="shakespeare_char", rows=None, characters=None):
    """A ckpt.pt as nanoGPT writes it, and its characters in data/. Returns our model with the same weights."""
    model = random_model(vocab_size=vocab_size, mlp="gelu_exact")
    rows = rows or vocab_size
    weights = {"_orig_mod." + name: tensor for name, tensor in model.state_dict().items()}
    for name in ("_orig_mod.transformer.wte.weight", "_orig_mod.lm_head.weight"):
        weights[name] = weights[name][:rows].clone()
    weights["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 24, 24)
    c = model.config
    args = dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, block_size=c.block_size, bias=False,
                vocab_size=rows, dropout=0.0)
    os.makedirs(folder / "out")
    torch.save(dict(model=weights, optimizer={}, model_args=args, iter_num=7, best_val_loss=torch.tensor(1.5),
                    config=dict(dataset=data, learning_rate=1e-3)), folder / "out/ckpt.pt")
    if characters:
        os.makedirs(folder / "data" / data)
        with open(folder / "data" / data / "meta.pkl", "wb") as file:
            pickle.dump(dict(vocab_size=len(characters), itos=dict(enumerate(characters)),
                             stoi={c: i for i, c in enumerate(characters)}), file)
    return model


FAMILIES = {
    "gpt2": dict(bias=True),
    "nanogpt": dict(mlp="gelu_exact"),
    "untied": dict(tie_weights=False, n_inner=48, norm="rmsnorm"),
    "modern": model_file.PRESETS["modern"],
    "grouped": dict(**model_file.PRESETS["modern"], n_kv_head=2, head_dim=16),
    "llama": dict(pos="rope", norm="rmsnorm", mlp="swiglu", n_kv_head=1, rope_theta=500.0),
}


def words(n, seed=0):
    """n characters of text with something to learn in it: short sentences over a few words."""
    rng, out = torch.Generator().manual_seed(seed), []
    subjects, verbs = ["the cat", "a dog", "my friend", "the old man"], ["sees", "likes", "hears", "finds"]
    while sum(map(len, out)) < n:
        a, b, c = torch.randint(4, (3,), generator=rng).tolist()
        out.append(f"{subjects[a]} {verbs[b]} {subjects[c]}.\n")
    return "".join(out)[:n]


def nasty(n, seed=0):
    """n short strings that are meant to break a tokenizer: all kinds of white space, digits, scripts, characters."""
    rng = random.Random(seed)
    bits = """. / ... !\n/ 's 'LL don't 123 1234567 a Z\u00df \u00e9 e\u0301 \u4e2d\u6587 \ud55c\uae00 \u0939\u093f
        \u00bd \u2167 \u0663 \u017f \u212a \u0130 \ufb01 _ __init__ <|endoftext|> <|im_end| <unk> <0x41>
        \u2581 \U0001f642 \U0001f468\u200d\U0001f469\u200d\U0001f467""".split()
    bits += [" ", "  ", "   x", " 1", "  1", "\n", "\r\n", "\n\n\n", "\t", "!\n/", "def f(x):\n    ", "\0", "\x7f"]
    bits += [*"\u00a0\u0085\x1c\u2028\u3000\ufeff\ufdd0\ue000\U0010ffff\u200b\u202e"]
    for _ in range(n):
        others = [chr(rng.randrange(a, b)) for a, b in ((0, 32), (32, 127), (128, 0xD800), (0xE000, 0x110000))]
        yield "".join(rng.choice(bits if rng.random() < 0.8 else others) for _ in range(rng.randrange(14)))


def turns(*texts, system=None):
    """Messages of a user and an assistant in turn."""
    first = [] if system is None else [dict(role="system", content=system)]
    return first + [dict(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(texts)]


def talks(n, seed=0):
    """n different conversations of `words`, with answers of very uneven length; some have two answers."""
    rng, found = random.Random(seed), {}
    subjects, verbs = ["the cat", "a dog", "my friend", "the old man"], ["sees", "likes", "hears", "finds"]
    while len(found) < n:
        texts = []
        for _ in range(rng.choice((1, 1, 2))):
            asked = [f"{rng.choice(subjects)} {rng.choice(verbs)}" for _ in range(rng.choice((1, 1, 3)))]
            texts += [" ".join(asked), " ".join(rng.choices(subjects, k=rng.choice((1, 1, 2, 6))))]
        found[tuple(texts)] = turns(*texts)
    return list(found.values())


def write_talks(path, talks):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(dict(messages=messages)) + "\n" for messages in talks)


def byte_encoding(special={"<|endoftext|>": 256}):
    """A vocabulary of the 256 bytes, as a tiktoken encoding."""
    about = dict(name="t", pattern=GPT2, special=special)
    lines = [base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256)]
    return pretrained.TiktokenTokenizer({"encoding.json": json.dumps(about).encode(),
                                         "encoding.tiktoken": b"".join(lines)})


def byte_level(special, template):
    """The same vocabulary as a tokenizer.json, with a chat format."""
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    special = sorted(special.items(), key=lambda item: item[1])
    spec = dict(version="1.0", added_tokens=[dict(plain, id=i, content=text) for text, i in special],
                pre_tokenizer=dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True),
                model=dict(type="BPE", vocab=pretrained.byte_alphabet(), merges=[]))
    files = {"tokenizer.json": json.dumps(spec).encode(), "chat_template.jinja": template.encode(),
             "tokenizer_config.json": b'{"eos_token": "<|im_end|>"}'}
    return pretrained.HuggingFaceTokenizer("t", files)


def check_conversation(tokenizer, messages, end):
    """Is what `conversation` gives right? In front of every answer is the prompt that asks for it; learned are the
    answers with the end token behind them, and nothing else. Returns the ids of each."""
    ids, mask = tokenizer.conversation(messages)
    assert len(ids) == len(mask) and set(mask) <= {0, 1} and all(type(i) is int for i in ids)
    learned, answers = 0, []
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and message["content"]:
            prompt = tokenizer.chat(messages[:i])
            assert ids[:len(prompt)] == prompt and mask[:len(prompt)].count(1) == learned
            n = ids.index(end, len(prompt)) + 1 - len(prompt)
            assert mask[len(prompt):len(prompt) + n] == [1] * n
            answers.append(ids[len(prompt):len(prompt) + n])
            learned += n
    assert mask.count(1) == learned
    return answers


@contextlib.contextmanager
def chdir(folder):
    """contextlib.chdir, which Python 3.10 does not have."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def prepare_words(folder):
    """data/words in a folder: 20,000 characters of `words`, with a token for each."""
    with chdir(folder):
        (folder / "words.txt").write_text(words(20_000), encoding="utf-8")
        prepare.main(["words.txt", "--tokenizer=char"])


@pytest.fixture(scope="session", autouse=True)
def one_peak():
    """How fast this machine is, is measured once, and not again by each of some hundred tiny runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "measure_peak", functools.cache(machine.measure_peak))
        yield


@pytest.fixture(autouse=True)
def torch_as_it_was():
    """What a run in this process changes of PyTorch is changed back: threads, deterministic mode, compiling."""
    threads, mode = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.set_num_threads(threads)
    torch.set_deterministic_debug_mode(mode)
    torch.utils.deterministic.fill_uninitialized_memory = fills
    if "torch._dynamo" in sys.modules:  # (importing it takes a second)
        torch.compiler.set_stance("default")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in, as the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def browser():
    """Chromium without a window, for the tests of pages. What its console says is kept."""
    webdriver = package("selenium.webdriver")
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("there is no browser here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture(scope="session")
def gpt2():
    """A folder with GPT-2's vocabulary: TIKTOKEN_CACHE_DIR, or the one to which tiktoken fetches it once."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.path.join(tempfile.gettempdir(), "data-gym-cache")
    fetch = [sys.executable, "-c", "import tiktoken; tiktoken.get_encoding('gpt2')"]
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run(fetch, env={**os.environ, "TIKTOKEN_CACHE_DIR": folder}, capture_output=True, timeout=60)
        if done.returncode == 0:
            return folder
    pytest.skip("GPT-2's vocabulary can't be fetched: TIKTOKEN_CACHE_DIR names no folder that has it")


def chat_run(tiny_run, path):
    """tiny_run's model as a run that is said to know the chat format (it has not learned it)."""
    from training import checkpoint as ckpt
    shutil.copytree(tiny_run / "out/words", path)
    for file in path.glob("*.pt"):
        ckpt.save_checkpoint(str(file), {**ckpt.load_checkpoint(str(file)), "chat": True})


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A folder with data/words and a finished run in out/words: 40 updates of a tiny model."""
    folder = tmp_path_factory.mktemp("tiny")
    prepare_words(folder)
    with chdir(folder):
        assert train.main(["--dataset=words", "--max_iters=40", "--warmup_iters=5", *TINY]) == 0
    return folder


@pytest.fixture
def place(tiny_run, here):
    """An empty folder to work in, with data/words and out/words of tiny_run."""
    for name in ("data", "out"):
        (here / name).mkdir()
        (here / name / "words").symlink_to(tiny_run / name / "words")
    return here

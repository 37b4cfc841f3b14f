# SPDX-License-Identifier: GPL-3.0-only
"""
The page of the server in a real browser, used as people use it. Needs Chromium, chromedriver and the package selenium.

After every test the browser's console must be empty: no error, and nothing that the content security policy refused.
"""
import contextlib
import json
import re
import shutil
import subprocess
import threading
import time
import types

import pytest
from engines import LIMIT
from http_client import until
from servers import (  # noqa: F401 (some are fixtures)
    KEY, RUN, ByteTokenizer, ScriptModel, no_key_fixture, serving)
from torch.nn import functional as F

pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install -r requirements-dev.txt")
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.actions.action_builder import ActionBuilder  # noqa: E402
from selenium.webdriver.common.actions.pointer_input import PointerInput  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

# Characters of 1 to 4 bytes, each of which is a token; the last but 4 is put together from three characters.
MIXED = "Gr\u00fc\u00dfe, \u4f60\u597d \U0001f642\n  \U0001f469\u200d\U0001f52c end"
QUOTES = """it's "$HOME" `ls` $(id) \\n \\\\ !! %d #\n\t\u00e9\u4f60\U0001f642\u2028\x7f\u200d '''"""
CONTROL_ENTER = Keys.CONTROL + Keys.ENTER + Keys.NULL


class Torn(ScriptModel):
    """Likes to say what it is told to (50%), but would as well say the byte after that (18%)."""

    def logits(self, x):
        at = x[..., 0].long().clamp(0, len(self.ids) - 1)
        one, two = (F.one_hot(ids, self.config.vocab_size).float() for ids in (self.ids[at], (self.ids[at] + 1) % 256))
        return one * 6 + two * 5


@contextlib.contextmanager
def serve_torn(run=RUN, wait=None, **settings):
    """A server of a Torn model. wait: what happens before it is loaded."""
    model = Torn()
    with serving(model, load=lambda: (wait and wait(), model, ByteTokenizer(), dict(run))[1:],
                 **settings) as client:
        assert wait or until(lambda: client.server.state == "ok")
        yield client


class Page:
    """The page of the server at `port`. refused: the test has the server refuse something, which the console tells."""

    def __init__(self, browser, port, new=False):
        self.browser, self.refused = browser, False
        browser.get(f"http://127.0.0.1:{port}/")
        if not new:  # as one who has been there, and has chosen Text
            self.js("modes[0].checked = true; setMode()")

    def js(self, code, *arguments):
        return self.browser.execute_script(code, *arguments)

    def get(self, expression, *arguments):
        return self.js(f"return {expression}", *arguments)

    def until(self, expression):
        assert until(lambda: self.get(expression), every=0.05), (expression, self.state(), self.get("text.value"))

    def state(self):
        return self.get("$('state').textContent")

    def says(self, begin):
        assert until(lambda: self.state().startswith(begin), every=0.05), (begin, self.state())
        return self.state()

    def element(self, name):
        return self.browser.find_element(By.ID, name)

    def type(self, name, *keys):
        self.element(name).send_keys(*keys)

    def click(self, name):
        self.element(name).click()

    def tokens(self, where="#page"):
        return self.browser.find_elements(By.CSS_SELECTOR, f"{where} .token")

    def texts(self, where="#page"):
        return self.get("[...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", f"{where} .token")

    def popup(self):
        return " ".join(self.get("pop.hidden ? '' : pop.innerText").split())


@pytest.fixture(scope="module")
def torn_server():
    with serve_torn() as client:
        yield client


@pytest.fixture
def visit(browser):
    """visit(port) opens the page of the server at this port; new=True: as one who has never been there."""
    pages = []

    def visit(port, new=False):
        pages.append(Page(browser, port, new))
        return pages[-1]

    yield visit
    said = browser.get_log("browser")
    pages[-1].js("localStorage.clear(); sessionStorage.clear()")
    browser.get("about:blank")  # hang up
    assert not [line for line in said if not (pages[-1].refused and line["source"] == "network")]


@pytest.fixture
def model(torn_server):
    yield torn_server.model
    torn_server.model.forget()


@pytest.fixture
def page(visit, torn_server, model):
    """The page of a server that says what `model` is told to say."""
    page = visit(torn_server.port)
    page.says("Ready")
    page.type("temperature", "0")
    return page


# ----------------------------------------------------------------------------------------------------------------------


def test_a_text_is_continued_in_place(page, model):
    """The text goes on where it ends, token by token in whole characters, and what is typed belongs to it."""
    model.say(MIXED)
    page.type("text", "x", CONTROL_ENTER)
    page.says("Done")
    assert page.get("text.value") == page.get("$('page').textContent") == "x" + MIXED  # the one lies over the other
    assert page.texts() == list(MIXED)  # every character is whole, at its last token
    n = len(MIXED.encode()) + 1
    assert re.fullmatch(rf"{n} tokens \u00b7 [\d.]+ per second \u00b7 finish: stop \u00b7 seed \d+",
                        page.get("$('result').textContent"))
    page.until(f"$('count').textContent === '{n} of 4096 tokens'")
    # What is typed belongs to the text; tokens before it stay what they were, and the model goes on from it.
    page.type("text", Keys.BACKSPACE, "?")
    assert page.texts() == list(MIXED[:-1]) and page.get("$('page').textContent") == "x" + MIXED[:-1] + "?"
    assert not page.element("again").is_displayed()
    model.say("!", prompt=n)
    page.type("text", CONTROL_ENTER)
    page.until("text.value.endsWith('?!') && !running")
    assert page.texts() == [*MIXED[:-1], "!"]


def test_alternatives(page, model, browser):
    """Each token tells its probability and the likeliest others, by mouse, keyboard or finger; the text goes on from
    another one."""
    model.say("abcdef")
    page.type("text", "x", CONTROL_ENTER)
    page.says("Done")
    ActionChains(browser).move_to_element(page.tokens()[2]).perform()
    assert re.fullmatch(r"c 50% \u00b7 log-probability -0.69 c 50% d 18%( \S+ 0.1%){6} all others 31%", page.popup())
    ActionChains(browser).move_to_element(page.element("go")).perform()
    page.until("pop.hidden")
    page.type("text", Keys.END, Keys.ARROW_LEFT, Keys.ARROW_LEFT)  # by keyboard: the token at the caret
    assert page.popup().startswith("e 5")
    page.type("text", Keys.ESCAPE)
    assert page.popup() == ""
    finger = ActionBuilder(browser, mouse=PointerInput("touch", "finger"))
    finger.pointer_action.move_to(page.tokens()[1]).pointer_down().pointer_up()
    finger.perform()
    assert page.popup().startswith("b 5")
    # With another one, the text goes on from there; it can be taken back.
    browser.find_element(By.CSS_SELECTOR, "button.row").click()
    page.until("!running && text.value === 'xaccdef'")  # (the script goes by the position)
    assert page.texts() == ["a", *"cdef"]
    page.click("undo")
    assert page.get("text.value") == "xabcdef" and page.texts() == list("abcdef")
    colour = page.tokens()[0].value_of_css_property("background-color")
    page.js("$('colours').click()")
    assert colour != page.tokens()[0].value_of_css_property("background-color") == "rgba(0, 0, 0, 0)"


def test_stop(page, model, torn_server):
    """Escape, and the button, stop a text; what was written stays, and the server goes on no longer."""
    model.say("abcdefghij" * 100)
    model.before = lambda idx: time.sleep(0.02)
    page.type("text", "x", CONTROL_ENTER)
    page.until("text.value.length > 5")
    assert page.state() == "Writing" and page.element("go").text == "Stop" and page.get("text.readOnly")
    page.type("text", Keys.ESCAPE)
    page.says("Stopped")
    written = page.get("text.value")
    assert 5 < len(written) < 1001 and "finish: stopped" in page.get("$('result').textContent")
    page.click("again")
    page.until("running && text.value.length > 5")
    page.click("go")  # which is the button to stop, now
    page.says("Stopped")
    assert page.element("go").text == "Write" and not page.get("text.readOnly")
    assert until(lambda: torn_server.busy() == (0, 0))


def test_the_text_ends_before_a_stop_string_and_a_seed_repeats_it(page, model):
    """Stop strings work, and the seed that is shown gives the same text again."""
    model.say("hello world")
    page.type("stop", "low", Keys.ENTER, "o\\n", Keys.ENTER, "o w")
    page.type("text", "x", CONTROL_ENTER)
    page.says("Done")
    page.until("!running && last")
    assert page.get("text.value") == "xhell" and page.texts() == list("hell")
    page.js("for (const field of fields) field.value = ''")
    page.type("temperature", "2")
    page.click("again")
    page.until("!running && last")
    one = page.get("text.value")
    page.click("same")
    page.until("!running && last")
    assert page.get("text.value") == one != "xhello world"


def test_settings_and_text_survive_but_in_the_tab_alone(page, browser):
    """After a reload settings and text are there; the text is kept in this tab alone."""
    page.type("max_tokens", "7")
    page.js("$('colours').click()")
    page.type("text", "some\ntext")
    browser.refresh()
    page.says("Ready")
    assert page.get("[$('temperature').value, $('max_tokens').value, text.value, $('page').textContent]") == [
        "0", "7", "some\ntext", "some\ntext"]
    assert page.get("document.body.className") == "plain"
    assert "some" not in page.get("JSON.stringify(localStorage)")
    page.click("defaults")
    assert page.get("[$('max_tokens').value, $('max_tokens').placeholder]") == ["", "128"]


def test_the_request_as_code(page, browser, torn_server):
    """The request can be copied as a curl command and as Python, whatever quotes are in it."""
    clipboard = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    browser.execute_cdp_cmd("Browser.grantPermissions", clipboard)
    page.js("text.value = arguments[0]; text.dispatchEvent(new Event('input'))", QUOTES)
    page.type("max_tokens", "5")
    page.type("stop", "it's\\n", Keys.ENTER, "\u4f60")
    body = {"prompt": QUOTES, "temperature": 0, "max_tokens": 5, "stop": ["it's\n", "\u4f60"]}
    page.click("curl")
    page.says("Copied")
    curl = page.get("navigator.clipboard.readText()")
    assert curl.startswith(f"curl http://127.0.0.1:{torn_server.port}/generate ")
    shell = subprocess.run(["bash", "-c", "curl() { printf '%s\\0' \"$@\"; }; " + curl], capture_output=True, text=True)
    *_, flag, data, end = shell.stdout.split("\0")
    assert (flag, json.loads(data), end) == ("-d", body, "")
    if shutil.which("curl"):
        assert "generated_text" in subprocess.run(["bash", "-c", curl], capture_output=True, text=True).stdout
    page.js("$('state').textContent = ''")
    page.click("python")
    page.says("Copied")
    sent = []
    answer = types.SimpleNamespace(raise_for_status=lambda: None, json=lambda: {"generated_text": ""})
    requests = types.SimpleNamespace(post=lambda *args, **kw: sent.append((args, kw)) or answer)
    code = page.get("navigator.clipboard.readText()").replace("import requests\n", "")
    exec(code, {"requests": requests, "print": lambda text: None})
    assert sent == [((f"http://127.0.0.1:{torn_server.port}/generate",), {"json": body, "timeout": 300})]


def test_the_request_of_the_answer_that_is_shown(page, model, browser):
    """It is copied with its seed, until a setting changes; and a request that is refused does not take it away."""
    browser.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite"]})

    def copied():
        page.js("$('state').textContent = ''")
        page.click("curl")
        page.says("Copied")
        return json.loads(re.search(r"-d '(.*)'", page.get("navigator.clipboard.readText()"), re.S)[1])

    page.click("curl")
    page.says("Nothing to copy yet")
    model.say("hello")
    page.type("text", "x", CONTROL_ENTER)
    page.says("Done")
    body = copied()
    assert body["prompt"] == "x" and type(body["seed"]) is int
    page.refused = True
    page.type("temperature", "7")
    assert copied() == {"prompt": page.get("text.value"), "temperature": 7}
    page.type("text", CONTROL_ENTER)
    page.says("Temperature must be")
    assert page.element("undo").is_displayed()
    page.click("undo")
    assert page.get("text.value") == "x"


def test_chat(page, model, browser):
    """A conversation: Enter sends, the answer has its tokens, and the last question can be taken back."""
    messages = [{"role": "user", "content": "hi\nyou"}]
    model.say("Hello \U0001f642", prompt=len(ByteTokenizer().chat(messages)))
    browser.find_element(By.CSS_SELECTOR, "[value=chat]").send_keys(Keys.SPACE)
    assert not page.element("text").is_displayed() and page.element("message").is_displayed()
    page.type("message", "hi", Keys.SHIFT, Keys.ENTER, Keys.NULL, "you", Keys.ENTER)
    page.says("Done")
    assert page.texts("#log") == list("Hello \U0001f642") and page.get("message.value") == ""
    assert re.search(r"11 tokens .* finish: stop \u00b7 seed \d+", page.get("$('log').innerText"))
    assert page.get("said") == [*messages, {"role": "assistant", "content": "Hello \U0001f642"}]
    answer = browser.find_element(By.CSS_SELECTOR, "#log [tabindex]")
    answer.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert page.popup().startswith("e 5")
    answer.send_keys(Keys.ARROW_LEFT)
    assert page.popup().startswith("H 5")
    assert page.get("request()")["body"] == {
        "messages": messages, "temperature": 0, "top_k": 50, "top_p": 1, "min_p": 0, "repetition_penalty": 1}
    page.click("undo")
    assert page.get("[said.length, message.value, $('log').children.length]") == [0, "hi\nyou", 0]


@pytest.fixture
def window(browser):
    """window(width, height) sets the size of the page, as the browser of a laptop or a phone has it."""
    def size(width, height):
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", dict(
            width=width, height=height, deviceScaleFactor=1, mobile=width < 500))

    yield size
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("width, height", [(1366, 625), (1280, 720), (390, 844)])
def test_a_chat_model_opens_with_its_box_in_sight(torn_server, model, visit, window, width, height):
    """Who comes for the first time can type at once: nothing lies over the box, which has the focus."""
    model.say("Hello", prompt=len(ByteTokenizer().chat([{"role": "user", "content": "hi"}])))
    window(width, height)
    page = visit(torn_server.port, new=True)
    page.says("Ready")
    page.js("$('temperature').value = 0")
    on_top = """const box = message.getBoundingClientRect();
        return [[.1, .1], [.5, .5], [.9, .9]].map(([x, y]) => document.elementFromPoint(
            box.x + x * box.width, box.y + y * box.height).id)"""
    assert page.js(on_top) == ["message"] * 3 and page.get("document.activeElement.id") == "message"
    page.type("message", "hi", Keys.ENTER)
    page.says("Done")
    assert page.js(on_top) == ["message"] * 3 and "Hello" in page.get("$('log').innerText")
    last = "$('log').lastElementChild.getBoundingClientRect().bottom"
    assert page.get(last) <= page.get("bar.getBoundingClientRect().top") + 1
    assert page.get("document.title") == f"{page.get('info.name')} \u00b7 OpenLLM"


@pytest.mark.parametrize("width, height", [(1366, 625), (1280, 720), (390, 844)])
@pytest.mark.parametrize("mode", ["text", "chat"])
def test_the_bar_has_its_layout_in_both_modes(torn_server, model, visit, window, mode, width, height):
    """The button keeps its width; beside it is the state, below that the result; the links are last."""
    model.say("Hello", prompt=1 if mode == "text" else len(ByteTokenizer().chat([{"role": "user", "content": "h"}])))
    window(width, height)
    page = visit(torn_server.port, new=True)
    page.says("Ready")
    page.js("$('temperature').value = 0")
    if mode == "text":
        page.js("document.querySelector('[value=text]').click()")
        page.type("text", "h")
        page.js("$('go').click()")
    else:
        page.type("message", "h", Keys.ENTER)
    page.says("Done")
    box = page.js("""return Object.fromEntries(["go", "state", "result", "actions"].map(
        (name) => [name, $(name).getBoundingClientRect().toJSON()]))""")
    assert 90 < box["go"]["width"] < 140 and box["go"]["bottom"] <= height
    assert box["state"]["left"] >= box["go"]["right"] and abs(box["state"]["top"] - box["go"]["top"]) < 4
    assert box["actions"]["top"] >= box["state"]["bottom"]
    if mode == "text":
        assert box["result"]["left"] == box["state"]["left"] and box["result"]["top"] >= box["state"]["bottom"]
        assert page.get("$('result').textContent")


def test_a_reload_keeps_the_chat_and_the_draft(torn_server, model, visit, browser):
    messages = [{"role": "user", "content": "hi"}]
    model.say("Hello", prompt=len(ByteTokenizer().chat(messages)))
    page = visit(torn_server.port, new=True)
    page.says("Ready")
    page.js("$('temperature').value = 0")
    page.type("message", "hi", Keys.ENTER)
    page.says("Done")
    page.type("message", "a draft")
    browser.refresh()
    page.says("Ready")
    assert page.get("said") == [*messages, {"role": "assistant", "content": "Hello"}]
    assert page.get("message.value") == "a draft" and "Hello" in page.get("$('log').innerText")
    page.click("fresh")
    browser.refresh()
    page.says("Ready")
    assert page.get("[said.length, $('log').children.length]") == [0, 0]


def test_examples_to_click_on(torn_server, model, visit, browser):
    model.say("Hi!", prompt=len(ByteTokenizer().chat([{"role": "user", "content": "Hello!"}])))
    page = visit(torn_server.port, new=True)
    page.says("Ready")
    page.js("$('temperature').value = 0")
    assert page.get("$('examples').innerText").split("\n") == ["Try", "Hello!", "What can you do?"]
    browser.find_element(By.CSS_SELECTOR, "#examples button").click()
    page.says("Done")
    assert page.get("said.map((one) => one.content)") == ["Hello!", "Hi!"] and not page.element("examples").is_displayed()


def test_a_full_chat_drops_its_oldest_turns_and_says_so(torn_server, model, visit):
    """The server refuses what does not fit; the page asks again without the oldest question and answer."""
    page = visit(torn_server.port, new=True)
    page.says("Ready")
    page.js("$('temperature').value = 0")
    long = "x" * 1500  # of a context of 4,096 bytes
    page.js("said.push(...[0, 1, 2].flatMap(() => [{role: 'user', content: arguments[0]},"
            " {role: 'assistant', content: 'y'}]))", long)
    model.say("Yes", prompt=len(ByteTokenizer().chat([
        {"role": "user", "content": long}, {"role": "assistant", "content": "y"},
        {"role": "user", "content": long}, {"role": "assistant", "content": "y"},
        {"role": "user", "content": "and?"}])))
    page.refused = True
    page.type("message", "and?", Keys.ENTER)
    page.says("Done")
    assert "the model no longer sees the first 2 messages" in page.get("$('log').innerText")
    assert page.get("said.length") == 8 and page.get("said.at(-1).content") == "Yes"


def test_no_chat_without_a_format(visit, browser):
    """A model without a chat format has no tab for chats."""
    with serve_torn(RUN | {"chat": False}) as client:
        page = visit(client.port)
        page.says("Ready")
        assert not page.element("tabs").is_displayed() and page.element("text").is_displayed()


def test_the_model(visit, tmp_path):
    """The card and the loss curve."""
    rows = [dict(step=max(i, 1), loss=5 - i / 100) for i in range(0, 50, 10)]
    rows[-1] |= dict(val_loss=4.5, val_bpb=1.5)
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serve_torn(RUN | {"path": str(tmp_path / "best.pt")}) as client:
        page = visit(client.port)
        page.says("Ready")
        card = page.element("card").text.replace("\n", " ")
        for part in ("parameters ", "layers 1, n_embd 4", "context 4,096 tokens", "vocabulary 257", "steps 40",
                     "validation loss 2.500", "bits per byte 1.500", "trained on words", "runs on cpu, float32"):
            assert part in card, card
        assert page.get("document.querySelector('.train').getAttribute('d').split('L').length") == len(rows)
        assert page.get("document.querySelector('svg').ariaLabel") == "Loss from 5.00 to 4.50 in 40 steps"


# ----------------------------------------------------------------------------------------------------------------------
# What can go wrong


def test_what_the_server_refuses_is_said_and_nothing_is_lost(page, model, browser):
    """The server's reason is shown, and the text stays in its field."""
    page.refused = True
    page.type("max_tokens", "5000")
    page.type("text", "x", CONTROL_ENTER)
    assert "1+5000>4096" in page.says("Max_tokens does not fit in the context")
    assert page.get("text.value") == "x" and page.element("go").text == "Write"
    browser.find_element(By.CSS_SELECTOR, "[value=chat]").send_keys(Keys.SPACE)
    page.type("message", "hi", Keys.ENTER)
    page.says("Max_tokens does not fit in the context with messages")
    assert page.get("message.value") == "hi" and page.get("said") == []


def test_while_the_model_loads(visit):
    """The page can be used before the model is loaded, and says when it is."""
    loaded = threading.Event()
    with serve_torn(wait=lambda: loaded.wait(LIMIT)) as client:
        page = visit(client.port)
        page.refused = True
        page.says("The model is loading")
        page.type("text", "x")
        loaded.set()
        page.says("Ready")
        assert page.get("text.value") == "x"


def test_a_server_that_goes_and_comes_back(visit):
    """A server that ends in the middle of a text is noticed, and so is its return."""
    with serve_torn() as client:
        client.model.say("abcdefghij" * 100)
        client.model.before = lambda idx: time.sleep(0.02)
        page = visit(client.port)
        page.refused = True
        page.says("Ready")
        page.type("temperature", "0")
        page.type("text", "x", CONTROL_ENTER)
        page.until("text.value.length > 5")
    page.says("The server does not respond")
    assert page.get("text.value").startswith("xabcde") and not page.get("running")
    assert "finish: cut off" in page.get("$('result').textContent")
    with serve_torn(port=client.port):
        page.says("Ready")
        page.type("text", CONTROL_ENTER)
        page.says("Done")


def test_full(visit):
    """A full server is named as the reason."""
    with serve_torn(rows=1, max_queue=0) as client:
        client.model.say("a" * 4000)
        client.model.before = lambda idx: time.sleep(0.01)
        page = visit(client.port)
        page.refused = True
        page.says("Ready")
        wires = client.fill(1)
        page.type("text", "x", CONTROL_ENTER)
        page.says("Too many requests")
        assert page.get("text.value") == "x" and page.element("go").text == "Write"
        for wire in wires:
            wire.close()


def test_key(visit, monkeypatch, browser):
    """A server with a key asks for it, keeps it for this tab alone, and code that is copied does not hold it."""
    monkeypatch.setenv("OPENLLM_API_KEY", KEY)
    with serve_torn(key=KEY) as client:
        client.model.say("yes")
        page = visit(client.port)
        page.refused = True
        page.until("!$('keyform').hidden")
        page.type("key", "wrong", Keys.ENTER)
        page.until("!$('keyform').hidden && $('key').value === ''")
        page.type("key", KEY, Keys.ENTER)
        page.says("Ready")
        page.type("temperature", "0")
        page.type("text", "x", CONTROL_ENTER)
        page.says("Done")
        assert page.get("text.value") == "xyes" and not page.element("keyform").is_displayed()
        assert KEY not in page.get("JSON.stringify(localStorage) + asCurl(request())")
        assert '-H "Authorization: Bearer $OPENLLM_API_KEY"' in page.get("asCurl(request())")
        compile(page.get("asPython(request())"), "", "exec")
        browser.refresh()  # the same tab need not ask again
        page.says("Ready")
        assert not page.element("keyform").is_displayed()


def test_a_phone_in_the_dark(page, model, browser):
    """On a small screen nothing is cut off, in dark colours, and without movement for those who want none."""
    size = dict(width=360, height=740, deviceScaleFactor=1, mobile=True)
    dark = [{"name": "prefers-color-scheme", "value": "dark"}, {"name": "prefers-reduced-motion", "value": "reduce"}]
    light = page.element("go").value_of_css_property("background-color")
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": dark})
    try:
        browser.refresh()
        page.says("Ready")
        model.say("one two three four five " * 15)
        page.js("$('max_tokens').value = 360")
        page.type("text", "x", CONTROL_ENTER)
        page.says("Done")
        assert page.get("document.documentElement.scrollWidth") == 360
        assert page.element("go").value_of_css_property("background-color") != light
        assert page.get("text.scrollHeight <= text.clientHeight")  # the page scrolls, not what is in it
        box = page.get("$('page').lastElementChild.getBoundingClientRect().bottom")
        assert 0 < box <= page.get("bar.getBoundingClientRect().top")  # the end is in sight
        page.type("text", Keys.ARROW_LEFT)
        left, right = page.get("(({left, right}) => [left, right])(pop.getBoundingClientRect())")
        assert 0 <= left < right <= 360
        assert page.get("getComputedStyle($('page'), '::after').animationName") == "none"
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})

"""The playground: its routes, and the page in a real Chromium with a real server behind it."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import threading
import time

import httpx
import pytest
import torch
import uvicorn
from architectures import markov_dynamo
from browser import Browser, program
from commandline import byte_tokenizer

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.decoding.joint_heatmap import heatmap
from dynamo_lm.serving.app import create_app
from dynamo_lm.serving.playground import policy, render
from dynamo_lm.serving.settings import ServerSettings

KEY = "secret"
LETTERS = "abcdefghijklmnop"


def teller(context: int = 256):
    """A model that says sixteen letters over and over, with its tokenizer; head 2 is right behind two in each four."""
    tokenizer = byte_tokenizer(258)
    letters = [tokenizer.convert_tokens_to_ids(mark) for mark in LETTERS]
    one, two = torch.full((258, 258), 1e-6), torch.full((258, 258), 1e-6)
    one[:, letters[0]], two[:, letters[1]] = 1, 1
    for place, token in enumerate(letters):
        one[token, letters[0]], two[token, letters] = 1e-6, 1e-12
        one[token, letters[(place + 1) % 16]] = 1
        two[token, letters[(place + (2 if place % 4 < 2 else 5)) % 16]] = 1
    return markov_dynamo(one / one.sum(1, keepdim=True), two / two.sum(1, keepdim=True), context=context), tokenizer


@contextlib.contextmanager
def served(model, tokenizer, key: str | None = None):
    """The address of a server of this model."""
    app = create_app(model, tokenizer, ServerSettings(name="teller", key=key))
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app.state.middleware, log_config=None, ws="none", lifespan="on"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{bound.getsockname()[1]}/"
    server.should_exit = True
    thread.join()
    bound.close()


@pytest.fixture(scope="module")
def address():
    with served(*teller()) as address:
        yield address


# --- the routes -----------------------------------------------------------------


def test_the_page_may_load_nothing_but_itself(address):
    answer = httpx.get(address)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    rules = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
    assert rules["default-src"] == "'none'" and rules["connect-src"] == "'self'"
    for kind in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", rules[kind])
    assert not re.search(r"""(src|href)=["'](?!data:,["'])|https?://|@import|url\(""", answer.text)
    assert policy(answer.text) == answer.headers["content-security-policy"]
    assert policy(answer.text.replace("use strict", "use nothing")) != policy(answer.text)


def test_what_the_page_is_told_cannot_break_out_of_it():
    assert "</script><b>" not in render({"eps_b": "</script><b>"})


def test_the_joint_is_the_heat_map_of_the_report(address):
    model, tokenizer = teller()
    answer = httpx.post(address + "dynamo/joint", json={"prompt": "abc", "eps_b": 0.2})
    expected = heatmap(model, tokenizer, "abc", eps_b=0.2)
    assert answer.json() == {name: getattr(expected, name) for name in answer.json()}
    assert answer.json().keys() >= {"plain", "masked", "thresholded", "rows", "columns", "emits"}
    assert answer.json()["eps_b"] == 0.2
    assert httpx.post(address + "dynamo/joint", json={"prompt": "abc"}).json()["eps_b"] == 0.5


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": "a" * 300}, "300 tokens and the model's context is 256"),
        ({"prompt": "a" * 100_000}, "100000 characters"),
        ({"prompt": "a", "eps_b": 2}, "eps_b"),
    ],
)
def test_a_joint_that_cannot_be_had_is_refused(address, body, sentence):
    answer = httpx.post(address + "dynamo/joint", json=body)
    assert answer.status_code == 400 and sentence in answer.json()["error"]["message"]


def test_characters_that_are_no_text_are_refused(address):
    body, json = rb'{"prompt": "a\ud800"}', {"content-type": "application/json"}
    assert httpx.post(address + "dynamo/joint", content=body, headers=json).status_code == 400


def test_a_model_of_one_head_has_a_page_and_no_joint():
    model, tokenizer = teller()
    alone = DynaMoForCausalLM.from_base(model.base, num_heads=1).eval()
    with served(alone, tokenizer) as address:
        assert '"heads": 1' in httpx.get(address).text
        answer = httpx.post(address + "dynamo/joint", json={"prompt": "a"})
        assert answer.status_code == 400 and "one head" in answer.json()["error"]["message"]


# --- the page -------------------------------------------------------------------

STEPS = "[...document.querySelectorAll('#{} .step')].map(e => e.textContent)"
DONE = "!document.querySelector('#go').disabled"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if program() is None:
        pytest.skip("there is no Chromium here")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def opened(browser: Browser, address: str) -> Browser:
    browser.events.clear()
    browser.size(1200, 900)
    browser.media()
    browser.open(address)
    browser.wait_for("document.querySelector('#about').textContent.includes('teller: up to 2 tokens per step')")
    return browser


@pytest.fixture
def page(browser, address):
    return opened(browser, address)


@pytest.fixture
def first_page(browser):
    """Of a model that has written nothing yet: how many tokens it drafts depends on how its steps went so far."""
    with served(*teller()) as address:
        yield opened(browser, address)


def turn(page: Browser, **options: object) -> None:
    for name, value in options.items():
        page.run(f"document.getElementById('{name}').value = '{value}'")


def choose(page: Browser, mode: str) -> None:
    page.run(f"document.querySelector('[value={mode}]').click()")


def raced(page: Browser) -> None:
    page.run("document.querySelector('#go').click()")
    page.wait_for(f"{DONE} && document.querySelector('#speed:not(:empty), #error:not(:empty)')?.id")
    assert text(page, "#error") == ""


def text(page: Browser, selector: str) -> str:
    return page.run(f"document.querySelector('{selector}').textContent")


def names(page: Browser, role: str) -> list[str]:
    """What a screen reader calls the elements of this role."""
    nodes = page("Accessibility.getFullAXTree")["nodes"]
    return [node["name"]["value"] for node in nodes if not node["ignored"] and node["role"]["value"] == role]


def test_a_race_shows_both_texts_by_step_and_what_it_gained(first_page):
    page = first_page
    turn(page, prompt="say: ", max_tokens=24, rounds=2)
    raced(page)
    expected = (LETTERS * 2)[:24]
    one, many = page.run(STEPS.format("one")), page.run(STEPS.format("many"))
    assert one == list(expected) and "".join(many) == expected
    # The first step has no draft. What head 2 says behind a, b, e, f, i, j, m, n is right: the next step but one keeps it
    assert many == ["a", "bc", "de", "f", "gh", "i", "j", "kl", "m", "n", "op", "a", "b", "cd", "e", "f", "gh"]
    colours = page.run("[...document.querySelectorAll('#many .step')].map(e => e.className)")
    assert colours[:5] == ["step c0", "step c1", "step c2", "step c3", "step c0"]
    bars = page.run("[...document.querySelectorAll('#many .strip i')].map(e => e.style.height)")
    assert bars == [f"{50 * len(step)}%" for step in many]
    shown = page.run("document.querySelector('#many dl').innerText")
    assert f"{24 / len(many):.2f} of 2" in shown and "log-likelihood" in shown
    said = text(page, "[role=status]")
    assert "times as fast, the median of 2 rounds" in said and f"It took {len(many)} forward passes for 24 tokens" in said
    assert "Identical text" in text(page, "#quality")
    assert re.fullmatch(r"\d+\.\d\d\N{MULTIPLICATION SIGN}", text(page, "#speed"))


def test_the_options_change_the_race(page):
    turn(page, prompt="say: ", max_tokens=12, rounds=1)
    choose(page, "off")
    assert page.run("document.querySelector('#temperature').value") == "0.7"
    turn(page, eps_b=0)
    page.run("document.querySelector('#eps_b').dispatchEvent(new Event('input', {bubbles: true}))")
    assert text(page, "#eps_b_value") == "0.00"
    raced(page)
    assert [len(step) for step in page.run(STEPS.format("many"))] == [2] * 6  # eps_b 0: always both heads
    assert "Nothing is verified" in text(page, "#quality")
    choose(page, "budget")
    turn(page, budget=20)
    raced(page)
    assert len(page.run(STEPS.format("many"))) < 12
    assert "At most 20 nats per token may be lost" in text(page, "#quality")
    assert page.run("[...document.querySelectorAll('[data-mode]')].map(e => e.hidden)") == [False, True]


def test_pointing_at_a_step_shows_the_joint_before_it(page, address):
    turn(page, prompt="say: ", max_tokens=12, rounds=1)
    raced(page)
    page.point_at("#many .step:nth-of-type(3)")
    page.wait_for("document.querySelectorAll('.map').length === 3")
    steps = page.run(STEPS.format("many"))
    expected = httpx.post(address + "dynamo/joint", json={"prompt": "say: " + steps[0]}).json()
    strengths = "[...map.querySelectorAll('i')].map(cell => +cell.style.getPropertyValue('--p'))"
    cells = page.run(f"[...document.querySelectorAll('.map')].map(map => {strengths})")
    for drawn, grid in zip(cells, (expected["plain"], expected["masked"], expected["thresholded"]), strict=True):
        largest = max(map(max, grid))
        assert drawn == pytest.approx([(value / largest) ** 0.5 for line in grid for value in line], abs=1e-4)
    assert "Step 2 gave" in text(page, "#joint-text")
    assert [name.partition(",")[0] for name in names(page, "image")] == ["Plain", "Masked", "Thresholded"]


def test_everything_can_be_done_with_a_keyboard(page):
    page.run("document.querySelector('#prompt').focus()")
    turn(page, prompt="say: ", max_tokens=10, rounds=1)
    page.press("Enter", modifiers=2)
    page.wait_for(f"{DONE} && document.querySelector('#speed').textContent")
    focused = "document.activeElement.closest('.pane')?.id + ' ' + document.activeElement.getAttribute('aria-description')"
    seen = []
    for _ in range(20):
        page.press("Tab")
        seen.append(page.run(focused))
        if seen[-1].startswith("one"):
            break
    assert seen[-1] == "one step 1, 1 token"
    page.press("ArrowRight")
    page.press("ArrowRight")
    assert page.run(focused) == "one step 3, 1 token"
    page.wait_for("document.querySelector('#joint-text').textContent.startsWith('Step 3 gave 1 token')")
    page.press("End")
    assert page.run(focused) == "one step 10, 1 token"
    page.press("Tab")
    assert page.run(focused) == "many step 1, 1 token"  # one stop of Tab for each text


def test_a_screen_reader_finds_names_for_everything(page):
    for role, expected in {
        "textbox": ["Prompt"],
        "radio": ["strict:", "budget:", "off:"],
        "spinbutton": ["Temperature", "Tokens", "Seed", "Rounds"],
        "button": ["Race", "Stop", "Replay"],
        "heading": ["dynamo-lm playground", "One token per step", "DynaMo", "Result", "The next two tokens"],
    }.items():
        found = names(page, role)
        assert [name[: len(start)] for name, start in zip(found, expected, strict=True)] == expected
    turn(page, max_tokens=5, rounds=1, prompt="say: ")
    raced(page)
    assert names(page, "button")[-5:] == [*page.run(STEPS.format("one")), *page.run(STEPS.format("many"))][-5:]


def test_a_race_can_be_stopped_and_replayed(page, address):
    turn(page, prompt="say: ", max_tokens=8, rounds=1)
    raced(page)
    before = [page.run(STEPS.format(name)) for name in ("one", "many")]
    page.run("document.querySelector('#replay').click()")
    page.wait_for(DONE)
    assert [page.run(STEPS.format(name)) for name in ("one", "many")] == before
    turn(page, max_tokens=240)
    page.run("document.querySelector('#go').click()")
    page.wait_for("document.querySelectorAll('#one .step').length > 3")
    page.run("document.querySelector('#stop').click()")
    page.wait_for(DONE)
    assert text(page, "[role=status]") == "Stopped."
    assert len(page.run(STEPS.format("one"))) < 240


def test_what_the_server_refuses_is_said(page):
    turn(page, prompt="say: ", max_tokens=9999)
    page.run("document.querySelector('#go').click()")
    page.wait_for(f"{DONE} && document.querySelector('[role=alert]').textContent")
    assert "256" in text(page, "[role=alert]")


def test_a_key_is_asked_for_where_the_server_wants_one(browser):
    with served(*teller(), key=KEY) as address:
        browser.open(address)
        browser.wait_for("document.querySelector('#about').textContent.includes('API key')")
        assert browser.run("document.querySelector('#access').open")
        turn(browser, key=KEY, prompt="say: ", max_tokens=5, rounds=1)
        raced(browser)


def test_it_is_dark_where_dark_is_asked_for_and_still_where_motion_is_not(page):
    turn(page, max_tokens=3, rounds=1, prompt="say: ")
    raced(page)
    background = "getComputedStyle(document.body).backgroundColor"
    animation = "getComputedStyle(document.querySelector('.step')).animationName"
    assert (page.run(background), page.run(animation)) == ("rgb(246, 247, 249)", "appear")
    page.media(prefers_color_scheme="dark", prefers_reduced_motion="reduce")
    assert (page.run(background), page.run(animation)) == ("rgb(17, 20, 24)", "none")


@pytest.mark.parametrize("width", [360, 768, 1200])
def test_nothing_sticks_out_at_any_width(page, width):
    page.size(width, 740, mobile=width == 360)
    turn(page, prompt="say: ", max_tokens=20, rounds=1)
    raced(page)
    page.point_at("#many .step:nth-of-type(4)")
    page.wait_for("document.querySelectorAll('.map').length === 3")
    assert page.run("document.documentElement.scrollWidth") == width
    boxes = (
        "[...document.querySelectorAll('button, input, .map, .strip, textarea')].map(e => e.getBoundingClientRect().right)"
    )
    assert max(page.run(boxes)) <= width


def test_the_page_asks_nobody_but_its_server_and_breaks_no_rule(page, address):
    turn(page, prompt="say: ", max_tokens=4, rounds=1)
    raced(page)
    asked = [event["request"]["url"] for method, event in page.events if method == "Network.requestWillBeSent"]
    assert len(asked) > 4 and all(url.startswith((address, "data:")) for url in asked)
    wrong = [
        event
        for method, event in page.events
        if method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    ]
    assert wrong == []

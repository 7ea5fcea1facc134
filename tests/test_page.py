"""The page in a real browser: type, stream, look at a tree, switch drafting off. Run by ``make test-browser``."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from beagle.serving.engine import Limits
from serving import serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        running = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def served():
    with serving(Limits(answer=60), endless=True) as running:
        yield running


@pytest.fixture
def page(browser, served):
    """The page, failing on any console error and any request that leaves the server."""
    opened = browser.new_page(viewport={"width": 1360, "height": 860}, color_scheme="light")
    problems: list[str] = []
    opened.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("request", lambda r: problems.append(r.url) if not r.url.startswith((served.url, "data:")) else None)
    opened.set_default_timeout(30_000)
    opened.goto(served.url)
    opened.get_by_text("tiny", exact=True).wait_for()
    opened.evaluate("document.getElementById('limit').value = 40")
    opened.problems = problems
    yield opened
    opened.close()


def shot(page, name):
    """A screenshot for whoever wants to look (``BEAGLE_SHOTS`` names the folder)."""
    if folder := os.environ.get("BEAGLE_SHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=f"{folder}/{name}.png")


def ask(page, question="w5 w9 w33"):
    page.fill("#question", question)
    page.keyboard.press("Enter")
    finished(page)


def finished(page):
    page.locator("#send", has_text="Send").wait_for()
    page.locator(".answer.busy").first.wait_for(state="detached")


def test_an_answer_streams_in_and_is_the_librarys(page, served):
    expected = served.model.generate([{"role": "user", "content": "w5 w9 w33"}], max_new_tokens=40)
    ask(page)
    assert page.locator(".answer .text").inner_text().strip() == expected.text.strip()
    foot = page.locator(".foot").inner_text()
    assert "40 tokens" in foot
    assert f"τ {expected.stats.tau:.2f}" in foot
    assert page.locator("#tau").inner_text() == f"{expected.stats.tau:.2f}"
    drafted = page.locator(".token.d1, .token.d2, .token.d3, .token.d4").count()
    accepted = sum(depth * n for depth, n in expected.stats.accepted_at.items())
    assert 0 < drafted <= accepted
    assert page.locator("#status").inner_text().startswith("Answer complete")
    assert page.problems == []
    shot(page, "answer")


def test_the_tree_of_a_step_by_mouse_and_by_keyboard(page):
    ask(page)
    steps = page.locator(".step")
    steps.nth(2).hover()
    page.locator("#drawing svg").wait_for()
    assert "checked in one pass" in page.locator("#caption").inner_text()
    steps.nth(2).click()
    assert steps.nth(2).get_attribute("aria-pressed") == "true"
    before = page.locator("#caption").inner_text()
    steps.nth(5).hover()
    assert page.locator("#caption").inner_text() == before  # pinned
    page.keyboard.press("Escape")
    assert page.locator(".step.pinned").count() == 0
    steps.nth(0).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert steps.nth(2).get_attribute("aria-pressed") == "true"
    assert page.locator("#drawing svg").get_attribute("aria-label").startswith("Draft tree")
    assert page.problems == []
    shot(page, "tree")


def test_the_switch_and_the_comparison(page):
    ask(page)
    page.get_by_role("button", name="Answer again without drafts").click()
    page.locator(".verdict").wait_for()
    finished(page)
    texts = page.locator(".answer .text").all_inner_texts()
    assert texts[0] == texts[1]
    assert "The same text" in page.locator(".verdict").inner_text()
    assert page.locator(".answer").nth(1).locator(".d1, .d2, .d3, .d4").count() == 0
    assert "×" in page.locator("#gain").inner_text()
    switch = page.get_by_role("switch", name="Drafting")
    assert switch.get_attribute("aria-checked") == "true"
    switch.focus()
    page.keyboard.press("Space")
    assert switch.get_attribute("aria-checked") == "false"
    ask(page, "w7")
    last = page.locator(".turn").nth(1)
    assert last.locator(".d1").count() == 0
    assert "40 passes" in last.locator(".foot").inner_text()
    shot(page, "comparison")


def test_stopping_and_a_new_chat(page, served, monkeypatch):
    verify = served.model.target.verify
    monkeypatch.setattr(served.model.target, "verify", lambda *a: time.sleep(0.1) or verify(*a))
    page.fill("#question", "w5")
    page.keyboard.press("Enter")
    page.locator(".step").nth(1).wait_for()
    page.locator("#send", has_text="Stop").click()
    page.get_by_text("stopped").wait_for()
    served.idle()
    page.get_by_role("button", name="New chat").click()
    assert page.locator(".turn").count() == 0
    assert page.locator("#welcome").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phones_width(browser, served, scheme):
    page = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True)
    page.goto(served.url)
    page.get_by_text("tiny", exact=True).wait_for()
    ask(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.locator(".step").nth(2).tap()
    page.get_by_role("button", name="Close the tree").wait_for()
    shot(page, f"phone-{scheme}")
    page.get_by_role("button", name="Close the tree").click()
    assert not page.locator("#tree").is_visible()
    dark = page.evaluate("getComputedStyle(document.documentElement).colorScheme")
    assert dark == scheme
    page.get_by_role("button", name="Switch between light and dark").click()
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") != scheme
    page.close()


def test_errors_are_told(page, served):
    page.evaluate("document.getElementById('limit').value = 100000")
    ask(page)
    assert "the context is 512 tokens" in page.locator(".problem").inner_text()


def test_a_key_is_asked_for(browser):
    with serving(api_key="k") as running:
        page = browser.new_page()
        page.goto(running.url)
        page.locator("dialog[open]").wait_for()
        page.fill("#key", "k")
        page.keyboard.press("Enter")
        page.get_by_text("tiny", exact=True).wait_for()
        page.close()

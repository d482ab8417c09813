"""The explorer's page in a real browser: every figure against `Evidence`, by mouse, by keyboard alone, on a phone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

from knnlm.inference.continuing import Continuing
from knnlm.knn.evidence import Evidence
from knnlm.knn.mixing import Gate, Mix
from knnlm.knn.trust import Trust
from tests import explorer_server
from tests.explorer_server import FITTED, GATE, MARKUP, SOURCE, Running, running
from tests.report import test_report_browser as report_browser

explainer, server = explorer_server.explainer, explorer_server.server
page_width = report_browser.page_width
TEXT = "the nurse counts a pulse and each patient borrows one reference before Holmes ends it"
SETTING = Mix(64, 4.0, 0.625, Gate(**GATE), by_text=True)
TOLERANCE = {"atol": 1e-6, "rtol": 1e-5}


PROBABILITIES = """
return [...document.querySelectorAll('#tokens [role=option]')].slice(1)
  .map((one) => [one.dataset.lm, one.dataset.mixed].map(Number))
"""
ANSWERED = """
return performance.getEntriesByType('resource').filter((one) => one.name.endsWith(arguments[0])).length
"""
NAMELESS = """
return [...document.querySelectorAll('button, select, input, textarea, [role=listbox]')].filter((one) =>
  one.checkVisibility() && !(one.ariaLabel || one.labels?.length || one.textContent.trim()))
"""


class Page:
    """The explorer in a browser's window."""

    def __init__(self, driver, server: Running, *, width: int = 1280, scheme: str = "light") -> None:
        self.driver, self.server = driver, server
        driver.get("about:blank")
        driver.get_log("browser")  # what other tests left
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        # What is scrolled to is there at once, so that it can be clicked.
        wishes = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
        media = {"features": [{"name": name, "value": value} for name, value in wishes.items()]}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        driver.get(server.url)

    def find(self, selector: str):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def wait(self, condition: Callable[[], object], what: str = "") -> None:
        WebDriverWait(self.driver, 30, poll_frequency=0.05).until(lambda _: condition(), what)

    def ready(self) -> Page:
        self.wait(lambda: self.find("#store").text, "the datastore was not told")
        return self

    def explain(self, text: str = TEXT, *, paste: bool = False) -> None:
        self.ready()
        if paste:  # what has no key
            self.driver.execute_script("arguments[0].value = arguments[1]", self.find("#text"), text)
        else:
            self.find("#text").send_keys(text)
        self.find("#explain").click()
        self.wait(lambda: self.find("#tokens").is_displayed(), "no tokens")
        self.settle()

    def settle(self) -> None:
        """Until nothing is under way, and the neighbours of what is open are there."""
        self.wait(lambda: self.find("#continue").is_displayed())
        self.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
        self.wait(lambda: not self.all("#neighbors[aria-busy=true]"), "no neighbours")

    def tokens(self) -> list:
        return self.all("#tokens [role=option]")

    def open(self, at: int) -> None:
        self.tokens()[at].click()
        self.settle()

    def value(self, selector: str) -> float:
        return float(self.find(f"{selector} data").get_attribute("value"))

    def values(self, selector: str) -> np.ndarray:
        script = "return [...document.querySelectorAll(arguments[0])].map((one) => Number(one.getAttribute('value')))"
        return np.array(self.driver.execute_script(script, selector))

    def setting(self) -> Mix:
        box = self.find("#gate")
        gate = Gate(**GATE) if box.is_displayed() and box.is_selected() else None
        k, temperature, lam = (self.value(f"#{name}-value") for name in ("k", "temperature", "lambda"))
        return Mix(int(k), temperature, lam, gate, by_text=gate is not None)

    def probabilities(self) -> np.ndarray:
        """p_LM and p_mixed of each token but the first, as the page has them: [tokens, 2]."""
        return np.array(self.driver.execute_script(PROBABILITIES))

    def searches(self) -> int:
        return self.server.calls.count("/explorer/explain")


@pytest.fixture
def page(browser, server) -> Iterator[Page]:
    found = Page(browser, server)
    yield found
    assert browser.get_log("browser") == []
    assert browser.execute_script("return window.broken") is None


def visible(text: str) -> str:
    return text.replace(" ", "␣").replace("\n", "↵")


def trusts(found: list[Evidence], tokens: list[int], setting: Mix) -> list[float]:
    """What λ of each token is multiplied by."""
    trust, told = Trust(setting), []
    for one, token in zip(found, tokens[1:], strict=True):
        told.append(trust.factor)
        trust.add(one.gain(one.under(setting), token))
    return told


def check_text(page: Page, found: list[Evidence], tokens: list[int], setting: Mix) -> None:
    """Every token's figures on the page are those of Python's under the setting."""
    under = [one.under(setting, trust) for one, trust in zip(found, trusts(found, tokens, setting), strict=True)]
    places = [one.place(token) for one, token in zip(found, tokens[1:], strict=True)]
    expected = [(one.lm_M[at], one.mixed_M[at]) for one, at in zip(under, places, strict=True)]
    np.testing.assert_allclose(page.probabilities(), expected, **TOLERANCE)
    for element, (lm, mixed) in zip(page.tokens()[1:], expected, strict=True):
        bits = np.log2(mixed / lm)
        kind = "same" if abs(bits) < 0.19 else "helped" if bits > 0.21 else "hurt" if bits < -0.21 else ""
        assert kind in element.get_attribute("class")
    perplexities = [np.exp(-np.mean(np.log(column))) for column in zip(*expected, strict=True)]
    np.testing.assert_allclose(page.values("#status data"), perplexities, rtol=1e-5)


def check_token(page: Page, found: list[Evidence], tokens: list[int], at: int, setting: Mix) -> None:
    """The three distributions and the neighbours of the open token, the one with this number."""
    evidence, token, trust = found[at - 1], tokens[at], trusts(found, tokens, setting)[at - 1]
    under, at = evidence.under(setting, trust), evidence.place(token)
    if setting.by_text:
        assert page.value("#mixed-how") == pytest.approx(trust, rel=1e-5)
    for name, values_M in (("lm", under.lm_M), ("knn", under.knn_M), ("mixed", under.mixed_M)):
        assert page.value(f"#{name}-share") == pytest.approx(values_M[at], rel=1e-5, abs=1e-9)
        order = [place for place in np.argsort(-values_M, kind="stable")[:10] if values_M[place] > 0]
        shown = page.values(f"#{name} data")
        expected = values_M[order] if at in order else [*values_M[order], values_M[at]]
        np.testing.assert_allclose(shown, expected, **TOLERANCE)
        assert page.find(f"#{name} .came data").get_attribute("value")
    count = min(20, setting.k)
    np.testing.assert_allclose(page.values("#neighbors span:nth-child(1) data"), under.weights_K[:count], **TOLERANCE)
    distances = page.values("#neighbors span:nth-child(2) data")
    np.testing.assert_array_equal(distances.astype(np.float32), evidence.found.distances_K[:count])


def check_sources(page: Page, evidence: Evidence, token: int) -> None:
    rows = evidence.found.rows_K[: len(page.all("#neighbors li"))]
    for element, row in zip(page.all("#neighbors li"), rows, strict=True):
        source = page.server.explainer.source(int(row))
        paragraph = element.find_element(By.TAG_NAME, "p").get_attribute("textContent")
        flat = [part.replace("\n", "↵ ") for part in (source.before.lstrip(), source.after)]
        assert paragraph == f"…{flat[0]}{visible(source.token)}{flat[1]}"
        assert element.text.endswith(f"{SOURCE}, no. {source.number}")
        agrees = page.server.explainer.store.values[row] == token
        assert ("agrees" in element.get_attribute("class")) == agrees


# Looking


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_page_fits_and_says_what_it_explains(width, scheme, browser, server) -> None:
    page = Page(browser, server, width=width, scheme=scheme).ready()
    assert page.find("#store").text.startswith("tiny.knn: ") and "where/tiny" in page.find("#store").text
    assert page_width(browser) <= width
    page.find("#text").send_keys("x" * 200)
    assert page_width(browser) <= width
    page.find("#text").clear()
    page.explain("the nurse counts " + "pulse" * 10)
    page.open(3)
    assert page_width(browser) <= width
    assert browser.get_log("browser") == []


def test_text_is_explained_and_what_was_helped_most_is_open(page, explainer) -> None:
    page.explain()
    tokens = explainer.encode(TEXT)
    found = explainer.evidence(tokens)
    shown = page.driver.execute_script("return document.getElementById('tokens').textContent")
    assert shown == TEXT and len(page.tokens()) == len(tokens)
    assert page.setting() == SETTING
    check_text(page, found, tokens, SETTING)
    gains = page.probabilities()[:, 1] - page.probabilities()[:, 0]
    (chosen,) = page.all("#tokens [aria-selected=true]")
    assert page.tokens().index(chosen) == 1 + int(gains.argmax())


def test_a_click_opens_a_token(page, explainer) -> None:
    page.explain()
    tokens = explainer.encode(TEXT)
    found = explainer.evidence(tokens)
    for at in (5, 17):
        page.open(at)
        check_token(page, found, tokens, at, SETTING)
        check_sources(page, found[at - 1], tokens[at])
        lm, mixed = page.probabilities()[at - 1]
        assert ("less likely" if mixed < lm else "likelier") in page.find("#detail-title").text
        assert page.find("#context mark").text == visible(explainer.lm.decode([tokens[at]]))


def test_first_token_has_nothing_to_show(page) -> None:
    page.explain()
    page.tokens()[0].click()
    assert page.find("#detail-title").text == "The first token: nothing predicts it"
    assert not page.find(".three").is_displayed() and not page.find("#neighbors").is_displayed()


def test_a_token_of_a_distribution_shows_who_votes_for_it(page, explainer) -> None:
    page.explain()
    tokens = explainer.encode(TEXT)
    found = explainer.evidence(tokens)
    evidence = found[8]
    page.open(9)
    order = np.argsort(-evidence.under(SETTING).knn_M, kind="stable")
    wanted = evidence.tokens_M[order[1]]
    page.all("#knn button")[1].click()
    page.settle()
    voters = np.flatnonzero(evidence.found.values_K[:64] == wanted)
    assert f"{len(voters)} of the 64 nearest contexts vote for" in page.find("#neighbors-note").text
    np.testing.assert_array_equal(
        page.values("#neighbors span:nth-child(2) data").astype(np.float32), evidence.found.distances_K[voters][:20]
    )
    assert {one.text.rstrip(" ✓") for one in page.all("#neighbors .vote")} == {
        visible(explainer.token_text(int(wanted)))
    }
    assert page.all("#knn button")[1].get_attribute("aria-pressed") == "true"
    page.find("#all").click()
    page.settle()
    check_token(page, found, tokens, 9, SETTING)


def test_neighbours_that_come_late_do_not_replace_those_of_another_token(browser, explainer) -> None:
    with running(explainer) as own:
        page = Page(browser, own)
        page.explain()
        page.open(5)
        shown = page.find("#neighbors").text
        with own.held():
            for at in (9, 5):
                page.driver.execute_script("arguments[0].click()", page.tokens()[at])
            page.wait(lambda: own.calls.count("/explorer/sources") == 3)
            assert page.find("#neighbors").text == shown
        page.wait(lambda: page.driver.execute_script(ANSWERED, "/explorer/sources") == 3)
        page.settle()
        assert page.find("#neighbors").text == shown


# The setting


def move(page: Page, dial: str, key: str, times: int) -> None:
    page.find(f"#{dial}").send_keys(key * times)
    page.settle()


def test_sliders_change_everything_without_a_search(page, explainer) -> None:
    page.explain()
    tokens = explainer.encode(TEXT)
    found = explainer.evidence(tokens)
    page.open(7)
    searches = page.searches()
    seen = {page.setting()}
    for dial, key, times in (
        *(("lambda", Keys.ARROW_LEFT, 30), ("k", Keys.ARROW_LEFT, 3), ("temperature", Keys.ARROW_RIGHT, 5)),
        *(("k", Keys.HOME, 1), ("temperature", Keys.HOME, 1), ("k", Keys.END, 1), ("temperature", Keys.END, 1)),
        *(("lambda", Keys.HOME, 1), ("lambda", Keys.ARROW_RIGHT, 99)),
    ):
        move(page, dial, key, times)
        assert page.setting() not in seen
        seen.add(page.setting())
        check_text(page, found, tokens, page.setting())
        check_token(page, found, tokens, 7, page.setting())
    assert {one.k for one in seen} >= {1, 1024} and {one.lam for one in seen} >= {0.0, 0.98}
    page.find("#reset").click()
    page.settle()
    assert page.setting() == SETTING
    check_text(page, found, tokens, page.setting())
    assert page.searches() == searches


def test_lambda_moves_with_the_token_or_not(page, explainer) -> None:
    page.explain()
    tokens = explainer.encode(TEXT)
    found = explainer.evidence(tokens)
    page.open(7)
    gated = found[6].under(SETTING, trusts(found, tokens, SETTING)[6]).lam
    assert abs(gated - 0.625) > 0.02 and page.find("#mixed-how").text.startswith(f"{100 * gated:.0f} % memory")
    page.find("#gate").click()
    page.settle()
    assert page.setting() == Mix(64, 4.0, 0.625) and page.find("#mixed-how").text == "63 % memory, 38 % model"
    check_text(page, found, tokens, page.setting())
    check_token(page, found, tokens, 7, page.setting())
    page.find("#continue").click()
    page.settle()
    page.find("#reset").click()
    page.settle()
    assert page.setting() == SETTING
    Select(page.find("#layer")).select_by_value("1.ffn_input")
    page.settle()
    assert not page.find("#gate").is_displayed()


def test_memory_alone_may_make_a_token_impossible(page) -> None:
    page.explain("zzz the nurse")
    page.find("#gate").click()  # a gate keeps a little of the model
    move(page, "lambda", Keys.END, 1)
    assert page.find("#status").text.endswith("∞ with its memory.")
    at = 1 + int((page.probabilities()[:, 1] == 0).argmax())
    page.open(at)
    assert page.find("#detail-title").text == "The memory made this token impossible"


def test_another_layer_is_searched_once(page, explainer) -> None:
    page.explain()
    tokens = explainer.encode(TEXT)
    page.open(7)
    searches = page.searches()
    other = FITTED["1.ffn_input"]
    setting = Mix(other["k"], other["temperature"], other["lambda"])
    Select(page.find("#layer")).select_by_value("1.ffn_input")
    page.settle()
    found = explainer.evidence(tokens, "1.ffn_input")
    assert page.setting() == setting and page.searches() == searches + 1
    check_text(page, found, tokens, setting)
    check_token(page, found, tokens, 7, setting)
    Select(page.find("#layer")).select_by_value("2.ffn_input")
    page.settle()
    check_token(page, explainer.evidence(tokens), tokens, 7, SETTING)
    assert page.searches() == searches + 1


# Going on


def test_continuation_is_explained_as_it_comes(page, explainer) -> None:
    page.explain()
    Select(page.find("#how")).select_by_value("likeliest")
    Select(page.find("#count")).select_by_visible_text("10")
    page.find("#continue").click()
    page.settle()
    tokens, setting = explainer.encode(TEXT), SETTING
    going = explainer.go_on(tokens, setting)
    steps = [going.step() for _ in range(10)]
    whole = [*tokens, *(step.token for step in steps)]
    assert len(page.tokens()) == len(whole)
    found = [*explainer.evidence(tokens), *(step.evidence for step in steps)]
    check_text(page, found, whole, setting)
    page.open(len(tokens) + 2)
    check_token(page, found, whole, len(tokens) + 2, setting)
    page.find("#edit").click()
    assert page.find("#text").get_attribute("value") == explainer.lm.decode(whole)


def test_tokens_appear_one_by_one_and_can_be_stopped(browser, explainer) -> None:
    with running(explainer) as own:
        page = Page(browser, own)
        page.explain("the nurse")
        first = len(page.tokens())
        with own.held() as turns:
            page.find("#continue").click()
            for count in (1, 2):
                turns.release()
                page.wait(lambda count=count: len(page.tokens()) == first + count)
            assert page.find("#stop").is_displayed() and not page.find("#continue").is_displayed()
            assert not page.find("#layer").is_enabled()
            page.find("#stop").click()
        page.settle()
        assert len(page.tokens()) == first + 2
        with own.held() as turns:
            page.find("#continue").click()
            turns.release()
            page.wait(lambda: len(page.tokens()) == first + 3)
            page.find("#stop").click()
        page.settle()
        assert len(page.all("#tokens .cut")) == 2
        assert page.find("#error").get_attribute("hidden") and browser.get_log("browser") == []


def test_a_text_can_be_continued_at_once_and_searched_at_another_layer(page, explainer) -> None:
    page.ready()
    page.find("#text").send_keys("each patient")
    Select(page.find("#count")).select_by_visible_text("10")
    page.find("#continue").click()
    first = len(explainer.encode("each patient"))
    page.wait(lambda: len(page.tokens()) == first + 10)
    page.settle()
    Select(page.find("#layer")).select_by_value("1.ffn_input")
    page.settle()
    assert len(page.tokens()) == first + 10 and len(page.all("#tokens .cut")) == 1


# By keyboard


def test_everything_works_by_keyboard_alone(page, explainer) -> None:
    page.ready()

    def focused() -> str:
        return page.driver.execute_script("return document.activeElement.id")

    def press(*keys: str) -> None:
        ActionChains(page.driver).send_keys(*keys).perform()

    press(Keys.TAB)
    assert focused() == "text"
    press(TEXT)
    ActionChains(page.driver).key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(Keys.CONTROL).perform()
    page.wait(lambda: page.find("#tokens").is_displayed())
    page.settle()

    def at() -> int:
        (one,) = page.all("#tokens [aria-selected=true]")
        assert page.driver.execute_script("return document.activeElement === arguments[0]", one)
        outline = page.driver.execute_script("return getComputedStyle(arguments[0]).outlineStyle", one)
        assert outline == "solid"
        return page.tokens().index(one)

    press(Keys.HOME)
    assert at() == 0
    press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT, Keys.ENTER)
    page.settle()
    assert at() == 2
    tokens = explainer.encode(TEXT)
    check_token(page, explainer.evidence(tokens), tokens, 2, SETTING)
    top = page.tokens()[2].rect
    press(Keys.ARROW_DOWN)
    below = page.tokens()[at()].rect
    assert below["y"] > top["y"] + 10 and abs(below["x"] - top["x"]) < 60
    press(Keys.ARROW_UP)
    assert abs(page.tokens()[at()].rect["y"] - top["y"]) < 5
    press(Keys.END)
    assert at() == len(tokens) - 1
    press(Keys.HOME, Keys.ARROW_RIGHT)
    reached = []
    for _ in range(40):  # the documents' buttons have no ids
        press(Keys.TAB)
        reached.append(focused())
    assert [one for one in reached if one][:10] == [
        *("edit", "continue", "count", "how", "reset", "layer"),
        *("lambda", "k", "temperature", "gate"),
    ]
    assert page.all("#token button")[0].is_displayed()


def test_a_vote_that_was_pressed_by_keyboard_keeps_the_focus(page) -> None:
    page.explain()
    page.open(9)
    button = page.all("#knn button")[0]
    button.send_keys(Keys.ENTER)
    page.settle()
    pressed = page.driver.execute_script("return document.activeElement.getAttribute('aria-pressed')")
    assert pressed == "true"


def test_what_is_for_ears_is_there(page) -> None:
    page.explain()
    assert page.driver.execute_script(NAMELESS) == []
    assert re.fullmatch(r".+: [\d.]+ % by the model, [\d.]+ % with the memory", page.tokens()[3].get_attribute("title"))
    assert page.find("#k").get_attribute("aria-valuetext") == "64"
    assert page.find("#status").get_attribute("role") == "status"


# In the dark, and for eyes that see fewer colours

LUMINANCE = """
const shade = (color) => { const canvas = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
  canvas.fillStyle = getComputedStyle(document.querySelector('.card')).backgroundColor; canvas.fillRect(0, 0, 1, 1);
  canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3); };
const style = getComputedStyle(arguments[0]);
return [shade(style.color), shade(style.backgroundColor)];
"""


def contrast(page: Page, element) -> float:
    """Of text and ground, as WCAG 2.2 defines it."""

    def luminance(color: list[int]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in color)]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    dark, light = sorted(luminance(color) for color in page.driver.execute_script(LUMINANCE, element))
    return (light + 0.05) / (dark + 0.05)


def explain_in_full_colour(page: Page) -> None:
    """With λ = 1: no neighbour has what stands in no document."""
    page.explain("zzz the nurse counts a pulse")
    page.find("#gate").click()
    move(page, "lambda", Keys.END, 1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_coloured_tokens_can_be_read(scheme, browser, server) -> None:
    page = Page(browser, server, scheme=scheme)
    explain_in_full_colour(page)
    assert {"helped", "hurt"} <= {one.get_attribute("class") for one in page.tokens()}
    samples = page.all("#legend .sample")
    assert len(samples) == 2
    for element in (*page.tokens(), *samples):
        assert contrast(page, element) >= 4.5, element.text


def test_direction_shows_without_colour(page) -> None:
    explain_in_full_colour(page)
    edge = "return getComputedStyle(arguments[0]).backgroundPosition"
    kinds = {one.get_attribute("class"): page.driver.execute_script(edge, one) for one in page.tokens()}
    assert kinds["helped"].split(",")[0].endswith("0%") and kinds["hurt"].split(",")[0].endswith("100%")


def test_dark_follows_the_system(browser, server) -> None:
    grounds = set()
    for scheme in ("light", "dark"):
        page = Page(browser, server, scheme=scheme).ready()
        grounds.add(page.driver.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2


def test_on_a_phone_an_opened_token_comes_into_view(browser, server) -> None:
    page = Page(browser, server, width=390)
    page.explain()
    page.tokens()[5].click()
    top = "return document.getElementById('detail').getBoundingClientRect().top"
    page.wait(lambda: abs(page.driver.execute_script(top)) < 60, "the details stayed below")
    assert page_width(browser) <= 390


# What must not get in


def test_markup_of_a_corpus_stays_text(page, explainer) -> None:
    page.explain(MARKUP)
    for at in range(4, len(page.tokens()), 9):
        page.open(at)
    shown = page.find("#neighbors").text
    assert "<script>" in shown or "onerror" in shown, "the document of markup is no neighbour"
    assert page.all("main script, main img, main b b, main i i, #neighbors i") == []
    assert page.find("#tokens").text.startswith("<script>window.broken = 1</script>")
    page.find("#edit").click()
    assert page.find("#text").get_attribute("value") == MARKUP


def test_line_breaks_and_strange_characters_are_shown(page) -> None:
    page.explain("the nurse\nand\tthe \u202e\x07 é€ 🦀 patient", paste=True)
    shown = page.driver.execute_script("return document.getElementById('tokens').textContent")
    assert "nurse↵\nand⇥ the" in shown and "\ufffd\ufffd" in shown and "\u202e" not in shown
    assert "é" in shown and "€" in shown and "🦀" in shown


# What goes wrong


def test_what_the_server_refuses_is_told(browser, server) -> None:
    page = Page(browser, server).ready()
    page.find("#explain").click()
    page.wait(lambda: page.find("#error").text == "Sorry: there is no text yet.")
    page.find("#text").send_keys("x" * 200)
    page.find("#explain").click()
    page.wait(lambda: "the text has 200 tokens, but" in page.find("#error").text)
    assert page.find("#text").is_displayed() and not page.find("#tokens").is_displayed()


def test_a_step_that_fails_is_told_after_those_that_came(browser, server, monkeypatch) -> None:
    page, due, step = Page(browser, server), [None, None], Continuing.step
    page.explain("the nurse")
    first = len(page.tokens())
    monkeypatch.setattr(Continuing, "step", lambda self: (due.pop(), step(self))[1])
    page.find("#continue").click()
    page.wait(lambda: page.find("#error").text == "Sorry: the server made a mistake; its log tells which.")
    page.settle()
    assert len(page.tokens()) == first + 2


def test_a_server_that_is_gone_is_told(browser, explainer) -> None:
    with running(explainer) as server:
        page = Page(browser, server).ready()
    page.find("#text").send_keys(TEXT)
    page.find("#explain").click()
    page.wait(lambda: page.find("#error").text == "The server cannot be reached.")


def give_key(page: Page, key: str) -> None:
    page.wait(lambda: page.find("#ask").get_attribute("open"), "it did not ask")
    page.find("#key").send_keys(key, Keys.ENTER)


def test_key_is_asked_for_once(browser, explainer) -> None:
    with running(explainer, api_key="sesame") as server:
        page = Page(browser, server)
        give_key(page, "wrong")
        page.wait(lambda: server.calls.count("/explorer/store") == 2)
        give_key(page, "sesame")
        page.explain()
        page.open(5)
        assert not page.find("#ask").get_attribute("open")
        browser.refresh()
        page.ready()
        assert not page.find("#ask").get_attribute("open")


def test_without_its_key_nothing_is_told(browser, explainer) -> None:
    with running(explainer, api_key="sesame") as server:
        page = Page(browser, server)
        page.wait(lambda: page.find("#ask").get_attribute("open"), "it did not ask")
        page.find("#key").send_keys(Keys.ESCAPE)
        page.wait(lambda: "without its key" in page.find("#error").text)
        page.find("#text").send_keys(TEXT)
        page.find("#explain").click()
        give_key(page, "sesame")
        page.wait(lambda: page.find("#tokens").is_displayed())

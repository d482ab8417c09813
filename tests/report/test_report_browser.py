"""report.html in a real browser: it opens from a file, draws its charts, fits the window, and works by keyboard."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from knnlm.report.html import write_report
from tests.sample_results import sample_result

if os.environ.get("KNNLM_NO_BROWSER") == "1":
    pytest.skip("KNNLM_NO_BROWSER=1 asks for no browser", allow_module_level=True)

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

CHARTS = ("dispersion", "perplexity", "pilot", "scatter", "lambda")
DRAWN = "return [...document.querySelectorAll('.plot')].every((box) => box.querySelector('.scatterlayer .trace path'))"


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(sample_result(), path)
    return path


def open_report(browser: webdriver.Chrome, report: Path, *, width: int = 1280, scheme: str = "light") -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(report.as_uri())
    WebDriverWait(browser, 30).until(lambda driver: driver.execute_script(DRAWN), "the charts were not drawn")


def page_width(browser: webdriver.Chrome) -> int:
    """In CSS pixels. To be compared with the width asked for: a phone's `innerWidth` grows with what overflows."""
    return browser.execute_script("return Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_report_opens_and_fits(browser, report, width, scheme):
    open_report(browser, report, width=width, scheme=scheme)
    assert browser.get_log("browser") == []
    for chart in CHARTS:
        box = browser.find_element(By.ID, f"chart-{chart}")
        assert box.find_elements(By.CSS_SELECTOR, "svg.main-svg path"), chart
        assert box.size["height"] > 200 and box.size["width"] > 250, chart
    assert page_width(browser) <= width
    assert browser.execute_script("return window.broken") is None


def test_wide_table_scrolls_in_its_own_box(browser, report):
    open_report(browser, report, width=390)
    box = browser.find_element(By.CSS_SELECTOR, ".table-box")
    assert browser.execute_script("return arguments[0].scrollWidth > arguments[0].clientWidth", box)
    assert browser.execute_script("return arguments[0].scrollHeight > arguments[0].clientHeight", box)


def ink(browser: webdriver.Chrome) -> tuple[str, str]:
    """The colours of the page's ground and of a line in a chart."""
    ground = "return getComputedStyle(document.body).backgroundColor"
    line = "return getComputedStyle(document.querySelector('#chart-dispersion .scatterlayer path.js-line')).stroke"
    return browser.execute_script(ground), browser.execute_script(line)


def test_charts_follow_a_change_of_colour_scheme(browser, report):
    open_report(browser, report)
    light = ink(browser)
    media = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    WebDriverWait(browser, 10).until(lambda driver: ink(driver)[1] != light[1])
    assert ink(browser)[0] != light[0]


def first_layers(browser: webdriver.Chrome) -> list[str]:
    return [cell.text for cell in browser.find_elements(By.CSS_SELECTOR, "#layers tbody tr:not([hidden]) th code")][:3]


def test_table_sorts_by_keyboard(browser, report):
    open_report(browser, report)
    assert first_layers(browser)[1] == "7.ffn_input"
    head = browser.find_element(By.CSS_SELECTOR, "#layers thead th")
    head.find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    assert first_layers(browser) == ["0.attn_input", "0.attn_output", "0.ffn_input"]
    head.find_element(By.TAG_NAME, "button").send_keys(Keys.SPACE)
    assert first_layers(browser)[:2] == ["final_norm", "7.block_output"]
    assert head.get_attribute("aria-sort") == "descending"


def test_a_part_can_be_hidden_in_table_and_charts(browser, report):
    open_report(browser, report)
    lines = "#chart-dispersion .scatterlayer path.js-line"
    before = len(browser.find_elements(By.CSS_SELECTOR, lines))
    browser.find_elements(By.CSS_SELECTOR, "button[data-part=attn_output]")[1].send_keys(Keys.ENTER)
    assert len(browser.find_elements(By.CSS_SELECTOR, lines)) == before - 1
    shown = browser.find_elements(By.CSS_SELECTOR, "#layers tbody tr:not([hidden])")
    assert len(shown) == 41 - 8
    pressed = browser.find_elements(By.CSS_SELECTOR, "button[data-part=attn_output][aria-pressed=false]")
    assert len(pressed) == 2, "both tool bars say the same"


def test_more_columns_on_demand(browser, report):
    open_report(browser, report)
    shown = "#layers thead th.extra"
    assert not browser.find_element(By.CSS_SELECTOR, shown).is_displayed()
    browser.find_element(By.CSS_SELECTOR, ".extra-toggle").send_keys(Keys.ENTER)
    assert browser.find_element(By.CSS_SELECTOR, shown).is_displayed()
    assert page_width(browser) <= 1280


def test_report_reads_without_scripts(browser, report):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(report.as_uri())
        assert len(browser.find_elements(By.CSS_SELECTOR, "#layers tbody tr")) == 41
        assert "need JavaScript" in browser.find_element(By.TAG_NAME, "noscript").text
        assert not browser.find_element(By.CSS_SELECTOR, ".toolbar").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})

"""train.html in a real browser: it opens from a file, draws every chart and fits a phone."""

from __future__ import annotations

import pytest
from selenium.webdriver.common.by import By

from knnlm.studies.train.config import PushAway, TrainConfig
from knnlm.studies.train.page import write_train
from knnlm.studies.train.train import train, train_document
from tests.report import test_report_browser as report_browser


@pytest.fixture(scope="module")
def page(gpt2_folder, text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    push_away = PushAway(weight=0.1, regularizer="uniformity")
    config = TrainConfig(steps=4, batch_size=4, context=32, push_away=push_away)
    return write_train(train_document(train(gpt2_folder, [text_file], folder / "out", config=config)), folder)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_page_opens_and_fits(browser, page, width, scheme):
    report_browser.open_report(browser, page, width=width, scheme=scheme)
    assert browser.get_log("browser") == []
    for chart in ("perplexity", "dispersion", "spread"):
        box = browser.find_element(By.ID, f"chart-{chart}")
        assert box.find_elements(By.CSS_SELECTOR, "svg.main-svg path"), chart
        assert box.size["height"] > 200 and box.size["width"] > 250, chart
    assert report_browser.page_width(browser) <= width

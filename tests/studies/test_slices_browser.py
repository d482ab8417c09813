"""slices.html in a real browser: it opens from a file, draws every chart and fits a phone."""

from __future__ import annotations

import pytest
from selenium.webdriver.common.by import By

from knnlm.studies.slices.document import slices_document
from knnlm.studies.slices.measure import SliceConfig, measure_slices
from knnlm.studies.slices.page import write_slices
from tests.report import test_report_browser as report_browser
from tests.studies import test_slices

lm, question_file, text = test_slices.lm, test_slices.question_file, test_slices.text
CHARTS = ("slices-questions-jsonl", "auc", "ranking")


@pytest.fixture(scope="module")
def page(lm, question_file, text, tmp_path_factory):
    config = SliceConfig(layers="1.ffn_input,final_norm", slice_size=20, context=24)
    result = measure_slices(lm, [question_file], cloze=[text], config=config)
    document = slices_document(result, model="tiny", settings={"seeds": 10}, versions={})
    return write_slices(document, tmp_path_factory.mktemp("page"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_page_opens_and_fits(browser, page, width, scheme):
    report_browser.open_report(browser, page, width=width, scheme=scheme)
    assert browser.get_log("browser") == []
    for chart in CHARTS:
        box = browser.find_element(By.ID, f"chart-{chart}")
        assert box.find_elements(By.CSS_SELECTOR, "svg.main-svg path"), chart
        assert box.size["height"] > 200 and box.size["width"] > 250, chart
    assert report_browser.page_width(browser) <= width

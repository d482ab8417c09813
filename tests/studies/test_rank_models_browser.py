"""rank-models.html in a real browser: it opens from a file, draws both charts and fits a phone."""

from __future__ import annotations

import pytest
from selenium.webdriver.common.by import By

from knnlm.studies.rank_models.document import ranking_document
from knnlm.studies.rank_models.page import write_rank_models
from knnlm.studies.rank_models.ranking import rank_models
from knnlm.studies.rank_models.token_sets import TokenSource
from tests.report import test_report_browser as report_browser
from tests.tiny_models import save_tiny


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    models = [save_tiny(kind, folder / kind) for kind in ("gpt2", "llama", "gpt-neox")]
    scores = {"gpt2": 30.0, "llama": 900.0, "gpt-neox": 64.0}
    ranking = rank_models(models, TokenSource(domain="mathematics"), scores=scores)
    return write_rank_models(ranking_document(ranking, settings={"domain": "mathematics"}, versions={}), folder)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_page_opens_and_fits(browser, page, width, scheme):
    report_browser.open_report(browser, page, width=width, scheme=scheme)
    assert browser.get_log("browser") == []
    for chart in ("gap", "measured"):
        box = browser.find_element(By.ID, f"chart-{chart}")
        assert box.find_elements(By.CSS_SELECTOR, "svg.main-svg path"), chart
        assert box.size["height"] > 200 and box.size["width"] > 250, chart
    assert report_browser.page_width(browser) <= width

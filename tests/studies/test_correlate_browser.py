"""correlate.html in a real browser: it opens from a file, draws every chart and fits a phone."""

from __future__ import annotations

import pytest
from selenium.webdriver.common.by import By

from knnlm.model.lm import LanguageModel
from knnlm.studies.correlate.document import correlate_document
from knnlm.studies.correlate.page import write_correlate
from knnlm.studies.correlate.study import CorrelateConfig, study_correlation
from tests.evaluation.test_evaluate_oracle import texts, write_jsonl
from tests.report import test_report_browser as report_browser
from tests.tiny_models import tiny_model, tiny_tokenizer

CHARTS = ("scatter", "ungrouped", "grouped", "models", "contexts", "clusters-ngram", "clusters-kmeans")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    config = CorrelateConfig(
        context=24, contexts=(16,), group_size=5, clusters=("ngram", "kmeans"), ngram=2, cluster_size=6
    )
    corpus = write_jsonl(folder / "text.jsonl", texts(1, 16))
    studies = []
    for kind in ("gpt2", "llama", "gpt-neox"):
        lm = LanguageModel.from_model(tiny_model(kind), tiny_tokenizer(), name=f"some-folder/{kind}")
        studies += study_correlation(lm, [corpus], config=config)
    return write_correlate(correlate_document(studies, settings={"context": 24}, versions={}), folder)


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

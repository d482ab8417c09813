"""The explorer's list of documents in a real browser: its figures against `KNNLM.cite`, and the text without one."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from knnlm import KNNLM
from knnlm.model.lm import LanguageModel
from knnlm.pipeline import build
from tests import explorer_server
from tests.evaluation.test_evaluate_oracle import texts, write_jsonl
from tests.explorer_server import MARKUP, running
from tests.server.test_explorer_browser import PROBABILITIES, TEXT, Page, page_width, trusts

explainer, server = explorer_server.explainer, explorer_server.server
ROWS = """
return [...document.querySelectorAll('#documents li')].map((one) => ({
  name: one.querySelector('.name').textContent,
  figures: [...one.querySelectorAll('data')].map((each) => `${Number(each.value)}`),
  verbatim: one.querySelector('.where').lastChild.textContent,
  places: (one.onmouseenter(), [...document.querySelectorAll('#tokens [role=option]')]
    .flatMap((each, at) => each.classList.contains('supported') ? [at] : [])),
}))
"""


@pytest.fixture
def page(browser, server) -> Page:
    page = Page(browser, server)
    page.explain()
    page.wait(lambda: page.all("#documents li"), "no documents")
    return page


def names(citation) -> list[str]:
    return [f"{one.document}, no. {one.number}" for one in citation.documents]


def test_documents_are_those_of_cite(page, explainer) -> None:
    cited = explainer.model().cite(TEXT)
    page.wait(lambda: not page.find("#status").text.startswith("Asking"))
    rows = page.driver.execute_script(ROWS)
    assert [row["name"] for row in rows] == names(cited.whole)[:12]
    for row, one in zip(rows, cited.whole.documents, strict=False):
        due = [one.share, one.gain / math.log(2)]
        np.testing.assert_allclose([float(each) for each in row["figures"]], due, atol=1e-5, rtol=1e-4)
        assert row["verbatim"] == f"verbatim {one.overlap} token{'s' * (one.overlap != 1)}"
        due = [
            place + 1
            for place, token in enumerate(cited.tokens)
            for document in token.documents
            if (document.number, document.document) == (one.number, one.document) and document.gain / math.log(2) >= 0.2
        ]
        assert row["places"] == due
    assert any(row["places"] for row in rows)


@pytest.mark.parametrize("place", [0, 1])
def test_without_a_document_the_text_is_that_of_a_store_without_it(place, page, explainer, tmp_path) -> None:
    """Switched off by mouse or by keyboard; another datastore is built to compare with. The trust stays as it is."""
    before = page.driver.execute_script(PROBABILITIES)
    name, button = page.all("#documents .name")[place].text, page.all("#documents button")[place]
    if place:
        button.send_keys(Keys.ENTER)
    else:
        button.click()
    page.settle()
    found = page.driver.execute_script(PROBABILITIES)
    number = int(name.rsplit(" ", 1)[1])
    kept = [text for at, text in enumerate([*texts(0, 6), MARKUP], 1) if at != number]
    lm: LanguageModel = explainer.lm
    text = write_jsonl(tmp_path / "kept.jsonl", kept)
    store = build(lm, [text], tmp_path / "kept.knn", eval_text=[text], settings=explorer_server.SETTINGS)
    setting = explainer.retrieval().setting
    model = KNNLM.from_store(store, "2.ffn_input", setting.k, setting.temperature, setting.lam, lm=lm)
    model.retrieval = replace(model.retrieval, setting=replace(setting, by_text=False))
    tokens = torch.tensor([lm.encode(TEXT).tolist()])
    gone = model(tokens[:, :-1]).logits[0].gather(1, tokens[0, 1:, None])[:, 0].double().exp().numpy()
    trust = np.array(trusts(explainer.evidence(tokens[0].tolist()), tokens[0].tolist(), setting))
    due = trust * gone + (1 - trust) * [plain for plain, _ in found]
    np.testing.assert_allclose([mixed for _, mixed in found], due, atol=1e-5, rtol=1e-4)
    assert [lm for lm, _ in found] == [lm for lm, _ in before] and found != before
    assert name in page.find("#status").text and page.find("#documents .off .name").text == name
    page.find("#with-all").click()
    page.settle()
    assert page.driver.execute_script(PROBABILITIES) == before


def test_where_a_token_is_impossible_worth_is_told_in_words(page, explainer) -> None:
    """λ is 1: without a document a token may become impossible, or possible."""
    page.find("#gate").click()
    page.find("#k").send_keys(Keys.HOME)
    page.find("#lambda").send_keys(Keys.END)
    page.settle()
    page.wait(lambda: "∞" in page.find("#documents").text, "nothing is infinite")
    model = explainer.model()
    cited = model.citer.text(TEXT, "", replace(model.retrieval, setting=replace(page.setting(), gate=None))).whole
    rows = page.driver.execute_script(ROWS)
    gains = {f"{one.document}, no. {one.number}": one.gain / math.log(2) for one in cited.documents}
    worths = [float(row["figures"][1]) for row in rows]  # JSON has no infinity
    assert worths == sorted(worths, reverse=True) and math.inf in map(abs, worths)
    assert worths == pytest.approx([gains[row["name"]] for row in rows], rel=1e-4, abs=1e-4)
    assert "NaN" not in page.find("#documents").text and "Infinity" not in page.find("#documents").text


def test_a_stopped_text_and_a_new_one_have_a_list_of_their_own(browser, explainer) -> None:
    with running(explainer) as own:
        page = Page(browser, own)
        page.explain("the nurse")
        Select(page.find("#how")).select_by_value("likeliest")
        with own.held() as turns:
            page.find("#continue").click()
            turns.release(2)
            page.wait(lambda: len(page.all("#tokens .new")) == 2, "no tokens came")
            assert "verbatim …" in page.find("#documents").text
            page.find("#stop").click()
        page.settle()
        shown, going = explainer.encode("the nurse"), explainer.go_on(explainer.encode("the nurse"), page.setting())
        shown += [going.step().token for _ in range(len(page.tokens()) - len(shown))]
        cited = explainer.model().citer.tokens(shown, 1, explainer.retrieval()).whole
        page.wait(lambda: [one["name"] for one in page.driver.execute_script(ROWS)] == names(cited)[:12], "an old list")
        for row, one in zip(page.driver.execute_script(ROWS), cited.documents, strict=False):
            assert row["verbatim"] == f"verbatim {one.overlap} token{'s' * (one.overlap != 1)}"
        page.find("#edit").click()
        page.find("#text").clear()
        page.find("#text").send_keys("zzz qqq")
        with own.held() as turns:
            page.find("#explain").click()
            turns.release()
            page.wait(lambda: "verbatim …" in page.find("#documents").text, "the list is not the new text's")
        page.settle()
        cited = explainer.model().cite("zzz qqq").whole
        assert [one["verbatim"].split()[1] for one in page.driver.execute_script(ROWS)] == [
            f"{one.overlap}" for one in cited.documents[:12]
        ]


def test_pointing_marks_and_leaving_unmarks(page) -> None:
    assert not page.all("#tokens .supported")
    ActionChains(page.driver).move_to_element(page.all("#documents li")[0]).perform()
    page.wait(lambda: page.all("#tokens .supported"), "nothing is marked")
    ActionChains(page.driver).move_to_element(page.find("#mixing-title")).perform()
    page.wait(lambda: not page.all("#tokens .supported"), "marks stay")


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "dark")])
def test_it_fits(width, scheme, browser, server, tmp_path) -> None:
    page = Page(browser, server, width=width, scheme=scheme)
    page.explain()
    page.wait(lambda: page.all("#documents li"), "no documents")
    assert page_width(browser) <= width
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]

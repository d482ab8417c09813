"""`knnlm serve` while its datastore is replaced by `build --overwrite`: it answers from the one that it opened."""

from __future__ import annotations

import shutil

from knnlm import KNNLM
from knnlm.config import LayerConfig, Settings
from knnlm.pipeline import build
from knnlm.store.datastore import Datastore
from tests.evaluation.test_evaluate_oracle import texts, write_jsonl
from tests.server_process import LAMBDA, LAYER, NAME, TEMPERATURE, K, make_service, running

PROMPTS = ("the nurse counts a pulse", "each patient", "The")


def answers(model, lm) -> list[str]:
    """What the kNN-LM writes after each prompt, where nothing is left to chance."""
    encoded = [lm.tokenizer(prompt, return_tensors="pt") for prompt in PROMPTS]
    found = [model.generate(**one, max_new_tokens=12, do_sample=False)[0].tolist() for one in encoded]
    return [lm.decode(ids).removeprefix(prompt) for ids, prompt in zip(found, PROMPTS, strict=True)]


def test_a_server_answers_from_the_datastore_that_it_opened(store_folder, tmp_path):
    place = tmp_path / "served.knn"
    shutil.copytree(store_folder, place)
    service = make_service(place)
    lm = service.lm
    expected = answers(KNNLM.from_store(store_folder, LAYER, K, TEMPERATURE, LAMBDA, lm=lm), lm)
    with running(service) as server, server.client() as client:

        def served() -> list[str]:
            asked = [client.completions.create(model=NAME, prompt=one, max_tokens=12, temperature=0) for one in PROMPTS]
            return [one.choices[0].text for one in asked]

        assert served()[:1] == expected[:1]
        text = write_jsonl(tmp_path / "other.jsonl", texts(60, 12))
        build(lm, [text], place, settings=Settings(layers=LayerConfig(layers=LAYER)), overwrite=True)
        replaced = Datastore.open(place)
        assert replaced.manifest != Datastore.open(store_folder).manifest
        assert answers(KNNLM.from_store(replaced, LAYER, K, TEMPERATURE, LAMBDA, lm=lm), lm) != expected
        assert served() == expected
        shutil.rmtree(place)
        assert served() == expected

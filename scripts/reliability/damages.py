"""Use of a damaged store: is it refused in one line, does `verify` find the damage, does it change results?"""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from forks import Ended
from tally import Tally
from workshop import Workshop


@dataclass(frozen=True)
class Damage:
    """A part of a store, and a context manager that damages it."""

    part: str
    done: AbstractContextManager[None]


def try_all(shop: Workshop, damages: Iterable[Damage]) -> None:
    """Use the store under each damage; a line of JSON for each says what happened."""
    from knnlm.model.loading import load_model

    lm = load_model(shop.model)
    whole = _used(lm, shop)
    for damage in damages:
        with damage.done:
            print(json.dumps({"part": damage.part, "outcome": _outcome(lm, shop, whole)}), flush=True)


def _outcome(lm: Any, shop: Workshop, whole: Any) -> list[str]:  # noqa: ANN401
    """What happened, and the message."""
    from index.errors import VectorIndexError
    from knnlm.errors import KNNLMError
    from knnlm.knn.indexing import verify_store
    from knnlm.progress import Silent

    try:
        used = _used(lm, shop)
    except (KNNLMError, VectorIndexError) as error:
        return ["refused", str(error)] if "\n" not in str(error) else ["traceback", f"several lines: {error}"]
    except Exception:
        return ["traceback", traceback.format_exc()]
    try:
        found = verify_store(shop.store, Silent())
    except (KNNLMError, VectorIndexError) as error:
        found = (str(error),)
    except Exception:
        return ["traceback", traceback.format_exc()]
    if found:
        return ["found by verify", found[0]]
    return ["no change", ""] if used == whole else ["silent change", f"{used} for {whole}"]


def _used(lm: Any, shop: Workshop) -> Any:  # noqa: ANN401
    """Results of reading the store: its description, and perplexity with and without its index."""
    from knnlm import evaluate
    from knnlm.config import EvalConfig, KNNConfig, Settings
    from knnlm.store.datastore import Datastore

    store = Datastore.open(shop.store)
    described = json.dumps(store.describe(), default=str)
    found = []
    for kind in ("auto", "exact"):
        settings = Settings(knn=KNNConfig(index=kind, k=8), evaluation=EvalConfig(eval_tokens=200, examples=2))
        result = evaluate(lm, store, [shop.text("evaluation")], settings=settings)
        found += [(one.layer, one.perplexity) for one in result.layers]
        found += [(one.token, [near.source for near in one.neighbors]) for one in (*result.helped, *result.hurt)]
    return [described, found]


def report(ended: Ended, title: str, tried: Sequence[str], tally: Tally, *, sealed: bool = False) -> None:
    """Count the outcomes that one fork's `try_all` reported.

    :param tried: what each damage was, in order, for the one that ended the fork.
    :param sealed: the checksum was rewritten too, so a changed result is not a fault.
    """
    lines = [json.loads(line) for line in ended.output.splitlines() if line.startswith('{"part"')]
    for line in lines:
        (kind, told), part = line["outcome"], title.format(line["part"])
        kind = "other, but usable" if sealed and kind == "silent change" else kind
        tally.count(part, kind)
        if kind in ("traceback", "silent change"):
            tally.fault(part, f"{kind}s", told)
    if len(lines) < len(tried):
        kind = "hangs" if ended.hung else "crashes"
        tally.fault(title.format("a file"), kind, f"{tried[len(lines)]}: {ended.output[-2000:]}")

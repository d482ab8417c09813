"""The card of a datastore on the hub: README.md, with what a reader wants to know before fetching it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from knnlm.documents import from_document
from knnlm.errors import InputError
from knnlm.places import HUB_PREFIX, REPORTS, read_object
from knnlm.results import EvalResult
from knnlm.shown import UNKNOWN, figure
from knnlm.store.datastore import Datastore

MOST_SOURCES = 10


def datastore_card(store: Datastore, repo: str, license: str, size: int) -> str:
    """Return the card of a datastore, with YAML of the hub in front.

    :param repo: USER/NAME on the hub.
    :param license: of the text, as the hub names it.
    :param size: bytes of the files.
    """
    title = repo.partition("/")[2]
    front = (f"license: {license}", f'pretty_name: "{title}"', "tags: [knn-lm, knnlm]", "viewer: false")
    about, result = store.describe(), _evaluation(store.folder)
    parts = (
        "\n".join(("---", *front, "---")),
        f"# {title}",
        "A datastore of a kNN language model ([arXiv 1911.00172](https://arxiv.org/abs/1911.00172)): vectors of a "
        "model over a text, and the token that followed each. `knnlm` makes and reads it.",
        _table(("", ""), _facts(store, about, license, size, result)),
        _table(_HEADS, (_layer(about, layer, result) for layer in store.layers)),
        f"**The text** has the licence `{license}` and can be read back from the datastore, which holds every token in "
        f"order. Sources: {_sources(store.sources)}.",
        "\n".join(("```python", *_use(store, f"{HUB_PREFIX}{repo}"), "```")),
        "The model's fingerprint, SHA-256, which a model is compared with before it is used:",
        _table(("", ""), ((name, _code(one)) for name, one in store.manifest.fingerprint.items() if name != "model")),
    )
    return "\n\n".join(parts) + "\n"


def model_folder(store: Datastore) -> str | None:
    """Return the path of the store's model if it was loaded from a folder or file, which others do not have."""
    return store.model if Path(store.model).is_absolute() else None


_HEADS = ("layer", "dimension", "type", "index", "recall", "k", "λ", "T", "perplexity")


def _facts(
    store: Datastore, about: Mapping[str, Any], license: str, size: int, result: EvalResult | None
) -> Iterator[tuple[str, str]]:
    yield "model", _code(_model(store))
    yield "layer", about["choice"]["layer"] if about["choice"] else ", ".join(store.layers)
    yield "keys of each layer", f"{store.count:,}"
    yield "documents", f"{about['documents']:,}"
    yield "windows", f"{about['context']:,} tokens, of which {about['stride']:,} are new"
    yield "size", f"{size / 1e6:,.1f} MB"
    yield "licence of the text", license
    if result is not None:
        yield "perplexity of the model alone", f"{figure(result.lm.perplexity, '.3f')} on {result.lm.tokens:,} tokens"


def _layer(about: Mapping[str, Any], layer: str, result: EvalResult | None) -> Iterator[str]:
    keys, index, fitted = about["layers"][layer], about["indexes"].get(layer), (about["fitted"] or {}).get(layer)
    measured = {one.layer: one.perplexity for one in result.layers} if result else {}
    yield layer
    yield str(keys["dim"])
    yield keys["dtype"]
    yield f"{index['spec']} ({index['metric']})" if index else UNKNOWN
    yield f"{index['recall']:.4f} @{index['k']}" if index else UNKNOWN
    yield f"{fitted['k']}" if fitted else UNKNOWN
    yield f"{fitted['lambda']:.3f}" if fitted else UNKNOWN
    yield figure(fitted["temperature"]) if fitted else UNKNOWN
    yield figure(measured.get(layer), ".3f")


def _use(store: Datastore, name: str) -> Iterator[str]:
    model = f", lm=knnlm.load_model({_model(store)!r})" if model_folder(store) else ""
    yield "import knnlm"
    yield f'model = knnlm.KNNLM.from_store("{name}"{model})'


def _model(store: Datastore) -> str:
    """The name of the model; of a folder, only its last part."""
    return Path(store.model).name if model_folder(store) else store.model


def _sources(names: Sequence[str]) -> str:
    more = len(names) - MOST_SOURCES
    return ", ".join(map(_code, names[:MOST_SOURCES])) + (f" and {more:,} more" if more > 0 else "")


def _table(heads: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _code(text: str) -> str:
    """A name from elsewhere, which may hold anything."""
    return f"`{''.join(one if one.isprintable() and one != '`' else '?' for one in text)}`"


def _evaluation(folder: Path) -> EvalResult | None:
    """What `run` measured, if it did."""
    document: Mapping[str, Any] | None = read_object(folder / REPORTS[0])
    try:
        return None if document is None else from_document(document)
    except InputError:
        return None

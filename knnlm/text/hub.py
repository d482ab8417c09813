"""Data sets of the Hugging Face hub, as a stream of rows. The only module that imports `datasets`.

A hub set is named `hf:REPO[/CONFIG][:SPLIT]`, for instance

    hf:stas/openwebtext-10k
    hf:wikitext/wikitext-103-raw-v1:train
    hf:Salesforce/wikitext/wikitext-103-raw-v1:test

Three parts are organisation, name and configuration. Two parts are organisation and name, or, if the hub has no such
set, name and configuration. Without a split, `train` is used, or the only split.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from knnlm.errors import InputError, first_line
from knnlm.text import textfiles

HUB_SET = re.compile(r"hf:(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:/(?P<config>[^/:]+))?(?::(?P<split>[\w.-]+))?", re.ASCII)


@dataclass(frozen=True)
class HubSet:
    """The parts of a hub set's name."""

    name: str
    repo: str
    config: str | None
    split: str | None


def parse_hub_set(name: str) -> HubSet:
    """Return the parts of `hf:REPO[/CONFIG][:SPLIT]`. Raises InputError for another form."""
    match = HUB_SET.fullmatch(name)
    if match is None:
        raise InputError(f"{name!r} is not a hub set; write hf:REPO, hf:REPO/CONFIG or hf:REPO/CONFIG:SPLIT")
    return HubSet(name, match["repo"], match["config"], match["split"])


def hub_rows(hub_set: HubSet, text_field: str | None) -> Iterator[Mapping[str, object]]:
    """Yield the split's rows.

    :param text_field: the only field to read; None: all.
    :raises InputError: for any error of the library, the network or a remote file.
    """
    try:
        dataset = _split(_load(hub_set), hub_set)
        if text_field is None or not dataset.column_names:
            yield from dataset
            return
        if text_field not in dataset.column_names:
            raise textfiles.no_field(text_field, dataset.column_names, hub_set.name)
        # Other columns (images, audio) are not fetched if the format can skip them.
        yield from dataset.select_columns([text_field])
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"cannot read {hub_set.name}: {first_line(error)}") from error


def _load(hub_set: HubSet) -> Mapping[str, Any]:
    """All splits as streams; a two-part name that is no repository is tried as name and configuration."""
    import datasets  # here, because it takes a second or two and most corpora are files

    not_found = datasets.exceptions.DatasetNotFoundError
    try:
        return datasets.load_dataset(hub_set.repo, hub_set.config, streaming=True)  # type: ignore[no-any-return]
    except not_found as error:
        name, slash, config = hub_set.repo.partition("/")
        if hub_set.config is not None or not slash:
            raise
        with contextlib.suppress(not_found):
            return datasets.load_dataset(name, config, streaming=True)  # type: ignore[no-any-return]
        raise error  # not the second, which does not say that a set is gated


def _split(splits: Mapping[str, Any], hub_set: HubSet) -> Any:  # noqa: ANN401 - datasets has no types here
    wanted = hub_set.split or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
    if wanted not in splits:
        raise InputError(f"{hub_set.name} has no split {wanted!r}, only {', '.join(splits)}; name one after a colon")
    return splits[wanted]

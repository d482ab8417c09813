"""Specs: what is read from a string, what `auto` takes, and what training needs."""

from __future__ import annotations

import math

import pytest

from index.build import check_spec
from index.errors import TooFewKeys, UnknownSpec
from index.metric import Metric
from index.spec import EXACT_KEYS, POINTS, TRAINING_BYTES, IndexSpec, choose_lists, choose_spec, parse_spec

GB = 1 << 30
MILLION = 1_000_000


@pytest.mark.parametrize("text", ["auto", " exact ", "EXACT", "IVF16,Flat", "OPQ16_64,IVF1024(IVF32,Flat),PQ16x4fs"])
def test_text_is_kept(text):
    assert parse_spec(text).text in (text.strip(), text.strip().lower())


@pytest.mark.parametrize("text", ["", "  ", "IVF16, Flat", "IVF16\nFlat", "ivf\x00", "größe"])
def test_what_is_no_spec(text):
    with pytest.raises(UnknownSpec, match="must be auto, exact, or a FAISS factory string"):
        parse_spec(text)


@pytest.mark.parametrize("text", ["IVF0,Flat", "PQ8x0", "HNSW0", "IVF16_HNSW0,Flat", "RQ4x00"])
def test_size_of_zero(text):
    """FAISS takes these, and crashes or fails later."""
    with pytest.raises(UnknownSpec, match=f"'{text}', but no size in it may be 0"):
        parse_spec(text)


@pytest.mark.parametrize(
    ("text", "lists", "least"),
    [
        ("exact", 0, 1),
        ("HNSW32,Flat", 0, 1),
        ("IVF100,Flat", 100, 100),
        ("PCA64,IVF4k_HNSW32,PQ16", 4096, 4096),
        ("IVF16,PQ8", 16, 256),
        ("IVF16,PQ8x4fs", 16, 16),
        ("PQ4x12", 0, 4096),
        ("IMI2x9,PQ8", 0, 512),
    ],
)
def test_lists_and_least_training(text, lists, least):
    spec = parse_spec(text)
    assert (spec.lists, spec.min_training) == (lists, least)


def test_training_is_a_bounded_sample():
    assert IndexSpec("IVF1024,Flat").training_points(10 * MILLION, 64) == 64 * 1024
    assert IndexSpec("IVF1024,Flat").training_points(5000, 64) == 5000
    assert IndexSpec("IVF65536,Flat").training_points(100 * MILLION, 4096) == TRAINING_BYTES // (4 * 4096)


def test_too_few_keys_to_train_is_one_clear_line():
    with pytest.raises(
        TooFewKeys, match=r"'IVF4096,Flat' needs at least 4096 keys.*there are 1000; take auto"
    ) as caught:
        IndexSpec("IVF4096,Flat").training_points(1000, 64)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("count", "dim"), [(1, 1), (1000, 768), (EXACT_KEYS, 4096), (130_000, 64)])
def test_auto_is_exact_while_that_is_cheap(count, dim):
    assert choose_spec(count, dim, 1 * GB) == "exact"


@pytest.mark.parametrize(
    ("count", "dim", "memory", "spec"),
    [
        (MILLION, 256, 8 * GB, "IVF4096,PQ128x4fs"),
        (MILLION, 768, 8 * GB, "IVF4096,PQ192x4fs"),
        (MILLION, 4096, 8 * GB, "IVF1024,PQ256x4fs"),
        (10 * MILLION, 768, 1 * GB, "IVF1024,PQ192x4fs"),
        (10 * MILLION, 768, GB // 2, "IVF512,PQ48x4fs"),
        (10 * MILLION, 768, GB // 64, "IVF16,PQ12x4fs"),
        (120 * MILLION, 128, 8 * GB, "IVF32768_HNSW32,PQ64x4fs"),
        (MILLION, 301, GB // 4, "Pad302,IVF512,PQ151x4fs"),
    ],
)
def test_auto_takes_the_finest_codes_that_fit(count, dim, memory, spec):
    assert choose_spec(count, dim, memory) == spec


@pytest.mark.parametrize("count", [300_000, 3 * MILLION, 30 * MILLION, 300 * MILLION])
@pytest.mark.parametrize("dim", [64, 192, 768, 1000, 1023, 4096])
@pytest.mark.parametrize("memory", [1 * GB, 30 * GB])
def test_auto_is_understood_by_faiss_and_can_be_trained(count, dim, memory):
    spec = choose_spec(count, dim, memory)
    if spec != "exact":
        check_spec(spec, dim)
        parsed = parse_spec(spec)
        assert parsed.lists <= 8 * math.sqrt(count)
        assert parsed.training_points(count, dim) >= POINTS * parsed.lists


def test_lists_grow_with_the_root_of_the_keys():
    lists = [choose_lists(count, 64, 64 * GB) for count in (300_000, 1_200_000, 4_800_000)]
    assert lists == [4096, 8192, 16384]
    assert choose_lists(1, 64, 64 * GB) == 1


@pytest.mark.parametrize(
    ("text", "metric", "said"),
    [
        ("foo", Metric.L2, "could not parse index string foo"),
        ("IVF16,PQ5", Metric.L2, "should be a multiple of the number of subquantizers"),
        ("IVF16,Nonsense", Metric.L2, "could not parse"),
        ("LSH", Metric.IP, "METRIC_L2"),
        ("HNSW16,PQ4", Metric.IP, "does not search by metric ip"),
        ("PCA24,Flat", Metric.L2, "a projection from 16 to 24"),
        ("Pad32,PCAWR33,IVF4,Flat", Metric.L2, "a projection from 32 to 33"),
        ("IDMap,PCA24,Flat", Metric.L2, "a projection from 16 to 24"),
        ("ITQ24,LSH", Metric.L2, "a projection from 16 to 24"),
        ("OPQ7,PQ8", Metric.L2, "an OPQ of 7 parts, which do not divide 16"),
    ],
)
def test_what_faiss_does_not_understand(text, metric, said):
    with pytest.raises(UnknownSpec, match=said) as caught:
        check_spec(text, 16, metric)
    assert "\n" not in str(caught.value) and ".cpp" not in str(caught.value)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["PCA16,Flat", "OPQ8_24,PQ8", "Pad32,PCA24,Flat", "RR24,Flat", "IDMap,PCA8,Flat"])
def test_projections_that_can_be(text):
    check_spec(text, 16)


def test_check_spec_accepts_what_needs_no_faiss():
    check_spec("auto", 16)
    check_spec("exact", 16)

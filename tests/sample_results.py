"""A made-up but realistic evaluation, with text that tries to break a page: markup, script ends, control characters."""

from __future__ import annotations

import math
import random

from knnlm.layer_names import FINAL, PARTS
from knnlm.results import (
    ByQuery,
    Choice,
    Correlation,
    EvalResult,
    IndexReport,
    Interval,
    LayerResult,
    LayerScore,
    NeighborText,
    Perplexity,
    Regret,
    ScoreResult,
    TokenExample,
)

LM_PERPLEXITY = 77.70
NASTY = (
    "</script><script>window.broken = true</script><!-- "
    "<img src=x onerror=\"window.broken = true\"> {{ 7 * 7 }} & 'quoted'"
)
SETTINGS = {
    "model": "./llama-8m",
    "text": ["nursing.txt"],
    "context": 512,
    "stride": 256,
    "metric": "l2",
    "candidates": ["4.ffn_input", "5.ffn_input", "6.ffn_input", "7.ffn_input"],
    "k": None,
    "seed": 0,
    "join": False,
    "learning_rate": 0.5,
    "nasty": NASTY,
}
VERSIONS = {"knnlm": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0", "faiss": "1.15.1", "python": "3.12.8"}
# Base of dispersion, its slope over depth, and how far below the LM's perplexity the part gets in the last block.
SHAPE = {
    "attn_input": (0.97, -0.28, 0.40),
    "attn_output": (0.86, -0.05, 0.20),
    "ffn_input": (0.62, 0.18, 0.53),
    "ffn_output": (0.78, -0.10, 0.28),
    "block_output": (0.55, 0.15, 0.46),
    FINAL: (0.66, 0.0, 0.51),
}


def sample_names(num_blocks: int) -> tuple[str, ...]:
    """Names of all layers in network order."""
    return (*(f"{block}.{part}" for block in range(num_blocks) for part in PARTS), FINAL)


def sample_score(name: str, depth: float, rng: random.Random) -> LayerScore:
    """Scores of a layer at a depth of 0 to 1."""
    base, slope, gain = SHAPE[name.rpartition(".")[2]]
    dispersion = base + slope * depth + rng.uniform(-0.015, 0.015)
    width = rng.uniform(0.003, 0.012)
    probe = 0.06 + gain * (0.2 + 0.8 * depth) * 0.7
    return LayerScore(
        layer=name,
        dispersion=dispersion,
        interval=Interval(dispersion - width, dispersion + width),
        dispersion_within=dispersion * 0.94,
        dispersion_segments=dispersion * 1.02,
        dispersion_standardized=0.5 + dispersion * 0.4,
        effective_rank=40 + 300 * depth * gain,
        probe=probe,
        probe_interval=Interval(probe - 0.012, probe + 0.012),
        pilot=LM_PERPLEXITY * (1.1 - gain * depth),
        participation_ratio=20 + 90 * depth * gain,
        intrinsic_dimension=9 + 8 * depth,
    )


def sample_layer(name: str, depth: float, rng: random.Random) -> LayerResult:
    """One layer's kNN-LM; `versus_best` is filled in later."""
    gain = SHAPE[name.rpartition(".")[2]][2] * (0.25 + 0.75 * depth) + rng.uniform(-0.02, 0.02)
    perplexity, lam = LM_PERPLEXITY * (1 - gain), 0.15 + 0.6 * gain
    return LayerResult(
        layer=name,
        perplexity=perplexity,
        interval=Interval(-gain - 0.021, -gain + 0.019),
        change=-gain,
        versus_best=0.0,
        versus_best_interval=Interval(0.0, 0.0),
        k=512,
        lam=lam,
        temperature=10 ** rng.uniform(-1, 4),
        bits_per_byte=math.log2(perplexity) / 3.9,
        word_perplexity=perplexity**1.32,
        lambda_curve=sample_curve(perplexity, lam),
        score=sample_score(name, depth, rng),
        by_query=ByQuery(perplexity * 0.962, -0.038, Interval(-0.048, -0.0274), 3.82, -0.301, -1.152),
    )


def sample_curve(perplexity: float, lam: float) -> tuple[tuple[float, float], ...]:
    """A convex curve in log-perplexity from the LM through the minimum, infinite at λ = 1."""
    depth = math.log(LM_PERPLEXITY / perplexity)

    def at(weight: float) -> float:
        side = (weight - lam) / (lam if weight < lam else 1 - lam)
        stretch = 1 if weight < lam else 1.0001 - abs(side)
        return math.inf if weight == 1 else perplexity * math.exp(depth * side**2 / stretch)

    return tuple((step / 40, at(step / 40)) for step in range(41))


def sample_layers(num_blocks: int, seed: int) -> tuple[LayerResult, ...]:
    """All layers, with `versus_best` set."""
    rng = random.Random(seed)
    names = sample_names(num_blocks)
    layers = [
        sample_layer(name, index // len(PARTS) / max(num_blocks - 1, 1), rng) for index, name in enumerate(names[:-1])
    ]
    layers.append(sample_layer(FINAL, 1.0, rng))
    best = min(layer.perplexity for layer in layers)
    return tuple(versus(layer, layer.perplexity / best - 1) for layer in layers)


def versus(layer: LayerResult, excess: float) -> LayerResult:
    """The layer with its distance to the best."""
    spread = Interval(excess - 0.008, excess + 0.009) if excess else Interval(0.0, 0.0)
    fields = {**layer.__dict__, "versus_best": excess, "versus_best_interval": spread}
    return LayerResult(**fields)


def sample_examples(kind: str) -> tuple[TokenExample, ...]:
    """Tokens that retrieval helped or hurt; one is made of nasty text."""
    helped = kind == "helped"
    nursing = TokenExample(
        before="A patient who takes warfarin is told to keep the intake of leafy vegetables steady: they are rich in",
        token=" vitamin",
        after=" K, which works against the drug.\nThe nurse checks the INR",
        lm_probability=0.0041 if helped else 0.62,
        knn_probability=0.93 if helped else 0.0000004,
        mixed_probability=0.431 if helped else 0.331,
        neighbors=tuple(
            NeighborText(
                before=f"clotting factors II, VII, IX and X depend on the presence of enough{' ' * (index % 2)}",
                token=(" vitamin" if helped else " folate") if index < 5 else " calcium",
                source=f"nursing.txt:{1200 + 37 * index}",
                distance=31.2 + 4.4 * index**1.5,
                weight=0.52 * 0.5**index,
            )
            for index in range(8)
        ),
    )
    chances = (0.08, 0.71, 0.39) if helped else (0.71, 0.08, 0.42)
    line_break = TokenExample(
        "let mut guess = String::new();", "\n\n", "    io::stdin()", *chances, nursing.neighbors[:1]
    )
    nasty = TokenExample(
        before=f"{NASTY} \u202ereversed\u202c \x00\x1b[31m {'unbroken' * 40}",
        token=" </script>",
        after=f"{NASTY}\t𝔘𝔫𝔦𝔠𝔬𝔡𝔢 日本語 \ud800",
        lm_probability=1e-12,
        knn_probability=0.0,
        mixed_probability=math.nan,
        neighbors=(NeighborText(NASTY, " <b>", f"folder/{NASTY}.txt:3", 0.0, 1.0),),
    )
    return (nursing, line_break, nasty)


def sample_result(num_blocks: int = 8, *, seed: int = 3) -> EvalResult:
    """An evaluation of every block and part: 41 layers for 8 blocks."""
    layers = sample_layers(num_blocks, seed)
    candidates = tuple(f"{block}.ffn_input" for block in range(num_blocks // 2, num_blocks))
    best = min(layers, key=lambda layer: layer.perplexity).layer
    selected = candidates[-1] if candidates else best
    return EvalResult(
        lm=Perplexity(LM_PERPLEXITY, math.log2(LM_PERPLEXITY) / 3.9, LM_PERPLEXITY**1.32, 24_310, Interval(73.1, 82.6)),
        layers=layers,
        best=best,
        selected=selected,
        choice=Choice(
            layer=selected,
            select="dispersion",
            candidates=candidates,
            reason=f"{selected} is the most dispersed of {len(candidates)} candidates (ffn_input of the upper half).",
            disagreement=None,
        ),
        examined=tuple(layer.score for layer in layers if layer.score),
        regret=Regret(0.0042, Interval(-0.003, 0.011), 0.0061),
        correlations=(
            Correlation("dispersion", 0.31, len(layers)),
            Correlation("dispersion_within", 0.28, len(layers)),
            Correlation("probe", -0.97, len(layers)),
            Correlation("dispersion", -1.0, len(candidates), "candidates"),
            Correlation("probe", math.nan, len(candidates), "candidates"),
        ),
        helped=sample_examples("helped"),
        hurt=sample_examples("hurt"),
        index=IndexReport(selected, "IVF1024,Flat", 0.973, 10, 412_000_000, 36.62),
        keys=412_345,
        tuning_tokens=24_050,
        warnings=("3.1 % of the evaluation text’s 32-token runs also stand in the datastore.", NASTY),
        settings=SETTINGS,
        versions=VERSIONS,
        seconds={"collect": 78.4, "search": 412.9, "fit": 0.731},
    )


def sample_scores(num_blocks: int = 4) -> ScoreResult:
    """What `score` finds."""
    layers = tuple(layer.score for layer in sample_layers(num_blocks, 1) if layer.score)
    result = sample_result(num_blocks)
    assert result.choice is not None
    return ScoreResult(layers, result.choice, 50_000, 97, 31, True, SETTINGS, VERSIONS)


def sample_short_result(num_blocks: int = 8, *, most: int = 8) -> EvalResult:
    """An evaluation of a few layers, all of which were scored."""
    result = sample_result(num_blocks)
    kept = {one.layer for one in sorted(result.layers, key=lambda one: one.perplexity)[:most]} | {result.selected}
    fields = {**result.__dict__, "layers": tuple(one for one in result.layers if one.layer in kept)}
    return EvalResult(**fields)

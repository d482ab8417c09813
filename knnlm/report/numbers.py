"""Display format of numbers: `MISSING` for NaN, a true minus sign, narrow spaces before units."""

from __future__ import annotations

import math

from knnlm.results import Interval

MISSING = "–"
MINUS = "\N{MINUS SIGN}"
SPACE = "\N{NARROW NO-BREAK SPACE}"
TIE = "\N{NO-BREAK SPACE}"


def decimal(value: float, places: int = 2, *, signed: bool = False) -> str:
    """A number with fixed decimals and thousands separators: `1,234.50`."""
    if math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    text = f"{value:{'+' if signed else ''},.{places}f}"
    if float(text.replace(",", "")) == 0:  # neither -0.0 nor +0.0
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def perplexity(value: float) -> str:
    """About four digits: `36.41`, `458.7`, `12,345`; `3.75e+26` for the word perplexity of text without spaces."""
    if 1e9 <= value < math.inf:
        return significant(value)
    return decimal(value, 2 if abs(value) < 100 else 1 if abs(value) < 1000 else 0)


def significant(value: float, digits: int = 3) -> str:
    """A number of unknown magnitude, without an exponent if that is short: `0.0532`, `12,400`; else `1.2e-09`."""
    if not math.isfinite(value) or value == 0:
        return decimal(value, 0)
    exponent = math.floor(math.log10(abs(value)))
    if not -5 <= exponent <= 8:
        return f"{value:.{digits - 1}e}".replace("-", MINUS)
    places = digits - 1 - exponent
    return decimal(round(value, places), max(places, 0))


def percent(fraction: float, *, signed: bool = False) -> str:
    """A fraction in percent, with more decimals if it is small: `+53.1 %`, `0.04 %`."""
    if not math.isfinite(fraction):
        return decimal(fraction)
    return f"{decimal(100 * fraction, _percent_places(fraction), signed=signed)}{SPACE}%"


def _percent_places(fraction: float) -> int:
    return 1 if abs(fraction) >= 0.01 else 2


def percent_interval(interval: Interval) -> str:
    """Both ends of an interval of fractions: `−55.0 to −51.2 %`; empty for an unknown interval."""
    if math.isnan(interval.low) or math.isnan(interval.high):
        return ""
    places = _percent_places(max(interval.low, interval.high, key=abs))
    low, high = (decimal(100 * end, places, signed=True) for end in (interval.low, interval.high))
    return f"{low}{TIE}to{TIE}{high}{SPACE}%"


def probability(value: float) -> str:
    """A probability in percent with two digits: `43 %`, `0.0061 %`."""
    if not math.isfinite(value):
        return MISSING
    if 0 < value < 1e-7:
        return f"<{SPACE}0.00001{SPACE}%"
    places = 0 if value >= 0.1 or value == 0 else 1 - math.floor(math.log10(100 * value))
    return f"{100 * value:.{places}f}{SPACE}%"


def half_width(interval: Interval) -> float:
    """Half of an interval's length; NaN if an end is unknown."""
    return (interval.high - interval.low) / 2


def size(count: int) -> str:
    """A number of bytes in decimal units: `1.4 GB`."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g}{SPACE}{unit}"
        value /= 1000
    return f"{value:,.1f}{SPACE}TB"


def duration(seconds: float) -> str:
    """Seconds as `0.42 s`, `12.3 s`, `4 min 05 s`, `2 h 10 min`."""
    if not math.isfinite(seconds):
        return MISSING
    if seconds < 60:
        return f"{significant(seconds)}{SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{SPACE}min {rest:02d}{SPACE}s"
    return f"{minutes // 60}{SPACE}h {minutes % 60:02d}{SPACE}min"

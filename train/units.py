"""Values as text: settings, times, durations, sizes, counts."""

import json
import math
from datetime import UTC, datetime


def number(value: object) -> float | None:
    """``value`` if it is a finite number below 1e100, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e100:
        return None
    return value if math.isfinite(value) else None


def format_value(value: object) -> str:
    """A setting's value."""
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list):
        return ", ".join(format_value(v) for v in value) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return value if isinstance(value, str) else json.dumps(value)


def format_time(seconds: float | None) -> str:
    """A moment, in seconds since 1970, as date and time; empty for None."""
    try:
        return "" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
    except (OverflowError, OSError, ValueError):  # a number, but no date
        return ""


def format_duration(seconds: float | None) -> str:
    """Seconds, in the unit that fits."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{max(0.0, seconds):.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, days = minutes // 60, minutes // 1440
    return f"{minutes} min" if minutes < 60 else f"{hours} h {minutes % 60} min" if hours < 48 else f"{days} d {hours % 24} h"


def format_bytes(count: object) -> str:
    """Bytes, in the unit that fits; empty for what is not a number."""
    count = number(count)
    if count is None:
        return ""
    unit, size = ("GiB", 2**30) if count >= 2**30 else ("MiB", 2**20) if count >= 2**20 else ("KiB", 2**10)
    return f"{count / size:.3g} {unit}"


def format_count(count: int, noun: str) -> str:
    """A count and its noun."""
    return f"{count:,} {noun if count == 1 else f'{noun}s'}"

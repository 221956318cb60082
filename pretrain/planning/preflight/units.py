"""Numbers as people read them. Torch-free."""

from __future__ import annotations

GIB = 2**30


def size(num_bytes: float) -> str:
    """Bytes with a binary prefix."""
    return _scaled(num_bytes, 1024, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def amount(number: float) -> str:
    """1,234,567 as '1.23 M'."""
    return _scaled(number, 1000, ("", " K", " M", " B", " T"))


def percent(part: float, whole: float) -> str:
    """A share; of nothing it is 0%."""
    return f"{part / whole:.0%}" if whole else "0%"


def duration(seconds: float) -> str:
    """Seconds as days, hours, minutes, the largest two of them that count."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    days, rest = divmod(round(seconds), 86400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    parts = [f"{number} {unit}" for number, unit in ((days, "d"), (hours, "h"), (minutes, "min"), (rest, "s"))]
    first = next(i for i, number in enumerate((days, hours, minutes, rest)) if number)
    return " ".join(part for part in parts[first : first + 2] if not part.startswith("0 "))


def _scaled(number: float, step: int, units: tuple[str, ...]) -> str:
    power = 0
    while abs(number) >= step and power < len(units) - 1:
        number /= step
        power += 1
    digits = 0 if power == 0 or number >= 100 else 1 if number >= 10 else 2
    return f"{number:,.{digits}f}{units[power]}"

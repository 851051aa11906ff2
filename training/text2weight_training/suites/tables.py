"""Markdown of measured values with their intervals, and of settings that were chosen among several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (headings, rule, *rows)) + "\n"


def percent(entry: dict[str, Any]) -> str:
    """A share with its interval in percent: "71.95 (70.96 to 73.00)"."""
    low, high = entry["interval"]
    return f"{100 * entry['value']:.2f} ({100 * low:.2f} to {100 * high:.2f})"


def points(entry: dict[str, Any]) -> str:
    """A difference of shares with its interval in signed percentage points."""
    low, high = entry["interval"]
    return f"{100 * entry['value']:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"


def number(entry: dict[str, Any], digits: int = 3) -> str:
    """A value with its interval."""
    low, high = entry["interval"]
    return f"{entry['value']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def at_edge(value: float, tried: Iterable[float]) -> bool:
    """Whether a value chosen among several is the least or the greatest of them: a better one may lie beyond."""
    values = set(tried)
    return len(values) > 1 and value in (min(values), max(values))


def mark_edge(value: float, tried: Iterable[float]) -> str:
    """A value chosen among several, starred where it lies at their edge: "0.003 *"."""
    return f"{value:g}{' *' if at_edge(value, tried) else ''}"


def name_edges(chosen: Mapping[str, Any], tried: Mapping[str, Iterable[float]]) -> str:
    """A sentence that names the settings chosen at the edge of what was tried, after a space; empty without any."""
    names = [name.replace("_", " ") for name, values in tried.items() if at_edge(chosen[name], values)]
    return f" At the edge of what was tried: {', '.join(names)}." if names else ""

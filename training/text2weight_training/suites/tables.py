"""Markdown tables of measured values with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
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

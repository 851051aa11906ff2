"""Tells calls into the model that hang from those that work."""

from __future__ import annotations

import threading
import time


class CallWatch:
    """How long calls into the model have been under way; `with watch:` goes around each, on any thread."""

    def __init__(self) -> None:
        """Begin with no call under way."""
        self._began_at: dict[int, float] = {}  # by thread, each with one call at a time

    def __enter__(self) -> None:
        self._began_at[threading.get_ident()] = time.monotonic()

    def __exit__(self, *_: object) -> None:
        del self._began_at[threading.get_ident()]

    @property
    def call_s(self) -> float:
        """Seconds since the oldest call under way began; 0 where none is."""
        began_at = list(self._began_at.values())
        return time.monotonic() - min(began_at) if began_at else 0.0

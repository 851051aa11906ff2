"""Tells calls into the model that hang from those that work."""

from __future__ import annotations

import time


class CallWatch:
    """How long a thread's call into the model has been under way; `with watch:` goes around each call.

    One thread enters and leaves, any thread may ask.
    """

    def __init__(self) -> None:
        """Begin with no call under way."""
        self._began_at: float | None = None

    def __enter__(self) -> None:
        self._began_at = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._began_at = None

    @property
    def call_s(self) -> float:
        """Seconds since the call under way began; 0 where none is."""
        began_at = self._began_at
        return 0.0 if began_at is None else time.monotonic() - began_at

"""Files that appear whole or not at all, and the error every training command reports."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class TrainingDataError(ValueError):
    """Input that a training command cannot use; the message says which value and what to do."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` that replaces it on success and is removed on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_kept(path: Path) -> dict[str, Any]:
    """A JSON file's content; empty where it is not there or damaged, for what can be made again."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_kept(path: Path, content: dict[str, Any]) -> None:
    """Write what `read_kept` reads, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n")


def claim(path: Path, description: dict[str, Any], what: str) -> None:
    """Note what a folder's files are made of, or check that those there already are made of the same.

    Args:
        path: the note, a JSON file in the folder.
        description: what JSON can hold.
        what: what the folder holds, for the errors.

    Raises:
        TrainingDataError: the note is damaged or says something else.
    """
    if not path.exists():
        write_kept(path, description)
        return
    try:
        there = json.loads(path.read_text())
    except ValueError as error:
        raise TrainingDataError(f"{path} is damaged ({error}): remove it to go on with this {what}") from error
    differing = [key for key, value in description.items() if there.get(key) != json.loads(json.dumps(value))]
    if differing:
        raise TrainingDataError(
            f"{path.parent} holds a {what} with another {', '.join(differing)}: choose another --out"
        )

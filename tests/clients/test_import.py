"""Importing the client must be cheap and must not drag in what its user may not have."""

from __future__ import annotations

import subprocess
import sys

import pytest

FOREIGN = {"torch", "fastapi", "pydantic", "redis", "open_clip", "text2weight", "text2weight_service"}
FOREIGN |= {"text2weight_training", "sklearn", "matplotlib", "PIL", "uvicorn"}
HEAVY = {"numpy", "httpx", "httpx_sse", "tenacity", "safetensors", "rich", "typer"}


def imported_by(statement: str) -> tuple[set[str], float]:
    """Top-level modules that a statement loads into a fresh interpreter, and the milliseconds it takes."""
    program = (
        "import sys, time\nstart = time.perf_counter()\n"
        f"{statement}\n"
        "print((time.perf_counter() - start) * 1000)\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    duration_ms, names = result.stdout.splitlines()
    print(f"{statement!r}: {float(duration_ms):.1f} ms")
    return set(names.split()), float(duration_ms)


def test_bare_import_loads_no_library_at_all() -> None:
    modules, _ = imported_by("import text2weight_client")
    assert not modules & (FOREIGN | HEAVY)


def test_importing_the_client_class_loads_no_library_at_all() -> None:
    modules, _ = imported_by("from text2weight_client import AsyncClient, Client, GenerateOptions")
    assert not modules & (FOREIGN | HEAVY)


@pytest.mark.parametrize(
    "statement",
    [
        "from text2weight_client import Client, GeneratedHead; Client()",
        "from text2weight_client import cli, commands",
    ],
)
def test_using_the_client_loads_nothing_of_the_other_rooms(statement: str) -> None:
    modules, _ = imported_by(statement)
    assert not modules & FOREIGN


def test_every_public_name_is_there() -> None:
    import text2weight_client

    for name in text2weight_client.__all__:
        assert getattr(text2weight_client, name).__name__ == name
        assert name in dir(text2weight_client)
    with pytest.raises(AttributeError, match="no attribute 'Klient'"):
        text2weight_client.Klient  # noqa: B018

"""`t2w info`: what a service runs and allows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from text2weight_client.client import DEFAULT_BASE_URL, DEFAULT_TIMEOUT_S
from text2weight_client.command_options import EXIT_CODES, KeyOption, TimeoutOption, UrlOption, asking

info_app = typer.Typer(add_completion=False)

SHOWN_ITEMS = 12


@info_app.command("info", epilog=EXIT_CODES)
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as the service sent it.")] = False,
    url: UrlOption = DEFAULT_BASE_URL,
    api_key: KeyOption = None,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Show what a running service has loaded, what it can do, and its limits.

    Example: t2w info --url http://127.0.0.1:8000
    """
    with asking(url, api_key, timeout, "asking for information") as client:
        raw = client.info().raw
    if as_json:
        typer.echo(json.dumps(raw, indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("field", "value", title=Text(url), title_justify="left")
    for name, value in _rows(raw):
        table.add_row(name, Text(value, overflow="fold"))
    Console().print(table)


def _rows(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and values of nested objects; long lists are cut."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _rows(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            shown = ", ".join(map(str, value[:SHOWN_ITEMS]))
            more = f", ... ({len(value)} in all: --json)" if len(value) > SHOWN_ITEMS else ""
            yield prefix + name, shown + more
        else:
            yield prefix + name, "not set" if value is None else str(value)

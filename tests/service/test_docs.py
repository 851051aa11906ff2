"""docs/api.md and docs/operations.md list exactly what the service has."""

import re
from pathlib import Path

import typer.main

from tests.service.registry import registered_metrics
from text2weight_service.cli import serve_app
from text2weight_service.problems import Kind
from text2weight_service.settings import Settings, variable_name

DOCS = Path(__file__).resolve().parents[2] / "docs"


def rows(page: str, heading: str) -> list[list[str]]:
    """Cells of the first table after a heading, without its head."""
    text = (DOCS / page).read_text(encoding="utf-8").split(f"## {heading}\n")[1]
    lines = re.search(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    assert lines is not None
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[0].splitlines()[2:]]


def test_settings_table() -> None:
    documented = {row[0]: row[2] for row in rows("operations.md", "Settings")}
    real = {
        variable_name(name): "unset" if field.default is None else str(field.default)
        for name, field in Settings.model_fields.items()
    }
    assert documented == real


def test_flags() -> None:
    documented = {row[1] for row in rows("operations.md", "Settings")} - {""}
    options = {option for parameter in typer.main.get_command(serve_app).params for option in parameter.opts}
    assert documented == {option for option in options if option.startswith("--")} - {"--help"}


def test_metrics_table() -> None:
    documented = {
        row[0]: (row[1], {label.strip(" `") for label in row[2].split(",")} - {""})
        for row in rows("operations.md", "Metrics")
    }
    assert {name: row for name, row in documented.items() if name.startswith("t2w_")} == registered_metrics()


def test_units_of_metrics() -> None:
    """Names end in their unit, as Prometheus asks."""
    for name, (kind, _) in registered_metrics().items():
        assert (kind == "counter") == name.endswith("_total"), name
        assert not re.search(r"_(ms|us|milliseconds|kb|mb)(_|$)", name), name


def test_error_table() -> None:
    documented = {(int(row[0]), row[1]) for row in rows("api.md", "Errors")}
    assert documented == {(kind.status, kind.value[0]) for kind in Kind}

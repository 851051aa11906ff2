"""SECURITY.md names a test for every threat, and every test it names is there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def threats() -> list[list[str]]:
    table = PAGE.split("## Threats, and what stops them\n")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_every_threat_has_a_test() -> None:
    assert len(threats()) > 10
    for row in threats():
        assert len(row) == 3, row
        named = re.findall(r"`(tests/[^`]+\.py)::(\w+)`", row[2])
        assert named, row
        for path, name in named:
            tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
            assert name in functions, f"{path}::{name}"


def test_there_is_a_way_to_report() -> None:
    assert "Report a vulnerability" in PAGE
    assert not re.search(r"example\.|TODO|@\w+\.", PAGE)

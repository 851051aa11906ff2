"""The results page: made of the suites' JSON files and figures alone."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.training.conftest import ToySuites
from text2weight_training.files import TrainingDataError
from text2weight_training.model_cli import results_app
from text2weight_training.suites import SUITES
from text2weight_training.suites.page import MARK, read_results, write_page
from text2weight_training.suites.tables import mark_edge, markdown_table, name_edges, number, percent, points

ENTRY = {"value": 0.5, "interval": [0.25, 0.75]}


def results(folder: Path, out: Path) -> Result:
    return CliRunner().invoke(results_app, ["--from", str(folder), "--out", str(out)])


@pytest.fixture
def folder(toy_suites: ToySuites, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_suites.out, tmp_path / "suites"))


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_tables_and_values() -> None:
    assert markdown_table(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |\n"
    assert percent(ENTRY) == "50.00 (25.00 to 75.00)"
    assert points(ENTRY) == "+50.00 (+25.00 to +75.00)"
    assert number(ENTRY, 1) == "0.5 (0.2 to 0.8)"


def test_what_was_chosen_at_the_edge_is_marked() -> None:
    assert [mark_edge(rate, (0.1, 0.001, 0.01)) for rate in (0.001, 0.01, 0.1)] == ["0.001 *", "0.01", "0.1 *"]
    # With nothing beside it, or where it is not known what was tried, a value has no edge.
    assert mark_edge(0.1, [0.1, 0.1]) == mark_edge(0.1, []) == "0.1"
    chosen = {"weight_decay": 0.3, "steps": 200, "width": 5}
    tried = {"weight_decay": [0.01, 0.3], "steps": [100, 200, 300], "width": [5, 7]}
    assert name_edges(chosen, tried) == " At the edge of what was tried: weight decay, width."
    assert name_edges(chosen, {"steps": tried["steps"]}) == name_edges(chosen, {}) == ""


def test_a_page_has_every_section_and_its_figures(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "docs" / "suites.md"
    done = results(folder, page)
    assert done.exit_code == 0, done.output
    text = page.read_text()
    assert text.startswith(MARK)
    assert re.findall(r"^## (\w+)$", text, re.MULTILINE) == list(SUITES)
    links = re.findall(r"\]\(([^)]+)\)", text)
    figures = {path.name for kind in ("png", "svg") for path in folder.glob(f"*.{kind}")}
    assert sorted(links) == sorted(f"suites/{figure}" for figure in figures)
    drawn = set(SUITES) - {"gradcam"}  # which measures nothing without pictures
    assert {f"{name}.{kind}" for name in drawn for kind in ("png", "svg")} <= figures
    assert all((page.parent / link).is_file() for link in links)
    for line in text.splitlines():
        assert str(tmp_path) not in line


def test_values_come_from_the_json_alone(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    path = folder / "fuse.json"
    result = json.loads(path.read_text())["result"]
    result["methods"]["universal"]["joint"] = {"value": 0.12345, "interval": [0.1, 0.2]}
    change(path, result=result)
    write_page(folder, page)
    assert "| universal | 12.35 (10.00 to 20.00) |" in page.read_text()


def test_a_page_can_be_written_again_but_not_over_another(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    write_page(folder, page)
    first = page.read_text()
    write_page(folder, page)
    assert page.read_text() == first
    # Results of one suite take the place of its section alone.
    change(folder / "fuse.json", checkpoint="f" * 64)
    for path in folder.glob("*.json"):
        if path.name != "fuse.json":
            path.unlink()
    assert results(folder, page).output == f"fuse in {page}\n"
    assert "Checkpoint `ffffffffffff`" in page.read_text()
    before, after = ((text.partition("## fuse\n")[::2]) for text in (first, page.read_text()))
    assert before[0] == after[0]
    assert before[1].partition("## init\n")[2] == after[1].partition("## init\n")[2]
    page.write_text("# By hand\n")
    done = results(folder, page)
    assert done.exit_code == 2
    assert "was not written by `t2w results`: choose another --out" in done.stderr
    assert page.read_text() == "# By hand\n"


def test_a_page_can_be_written_anew_from_its_own_folder(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "docs" / "page.md"
    write_page(folder, page)
    first = page.read_text()
    page.unlink()
    write_page(page.with_suffix(""), page)
    assert page.read_text() == first


@pytest.mark.parametrize("name", ["suites", "suites-heldout"])
def test_the_pages_of_this_repository_come_from_their_results(name: str, tmp_path: Path) -> None:
    kept = Path("docs") / name
    write_page(kept, tmp_path / f"{name}.md")
    assert (tmp_path / f"{name}.md").read_text() == kept.with_suffix(".md").read_text()


def test_other_files_are_passed_over_and_missing_suites_left_out(folder: Path, tmp_path: Path) -> None:
    (folder / "evaluation.json").write_text('{"format": "text2weight.evaluation/1"}')
    for name in set(SUITES) - {"fuse"}:
        (folder / f"{name}.json").unlink()
    assert write_page(folder, tmp_path / "page.md") == ["fuse"]


def test_bad_results_are_refused(folder: Path, tmp_path: Path) -> None:
    def refused(message: str, source: Path = folder, out: str = "page.md") -> None:
        done = results(source, tmp_path / out)
        assert done.exit_code == 2
        assert re.search(message, done.stderr), done.stderr
        assert not (tmp_path / out).exists()

    refused("holds no suite results: run `t2w evaluate --suite NAME", tmp_path / "absent")
    refused("must end in .md", out="page.txt")
    shutil.copyfile(folder / "fuse.json", folder / "fuse-old.json")
    refused("fuse-old.json is of suite fuse: its name must be fuse.json")
    (folder / "fuse-old.json").unlink()
    change(folder / "fuse.json", result={"pairs": 3})
    refused("result of suite fuse .* lacks a part")
    change(folder / "fuse.json", suite="speed")
    refused("fuse.json is of suite 'speed': known are accuracy, headline, reading")
    (folder / "fuse.json").write_text("{")
    refused("fuse.json is damaged")


def test_results_are_read_in_the_registrys_order(folder: Path) -> None:
    assert list(read_results(folder)) == list(SUITES)
    (folder / "reading.json").write_text("[]")  # JSON, but of no suite
    assert "reading" not in read_results(folder)
    (folder / "x.json").write_bytes(b"\xff")
    with pytest.raises(TrainingDataError, match="damaged"):
        read_results(folder)

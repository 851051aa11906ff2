"""One Markdown page from the results of suites: every number comes from their JSON files.

A page may be of several runs: sections of suites that a folder has no result of stay as they are.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from text2weight_training.files import TrainingDataError, atomic_path
from text2weight_training.suites import SUITES, load_suite
from text2weight_training.suites.runner import FORMAT

# The first line of a page that may be written again.
MARK = "<!-- Written by `t2w results`; changes made by hand are lost. -->"
INTRODUCTION = (
    "# Evaluation suites\n\n"
    "Values are means over tasks with 95 % bootstrap intervals over tasks in brackets, paired: every method is judged "
    "on the same resampled tasks. What each suite measures is told at the top of its file in "
    "`training/text2weight_training/suites/`.\n"
)


def write_page(folder: Path, out: Path) -> list[str]:
    """Collect the suite results of a folder into one page, in place of that page's sections of the same suites.

    Figures and JSON files are copied into a folder beside the page that has its name, so that the two can be moved
    together and the page can be written anew from it.

    Args:
        folder: where `t2w evaluate --suite` wrote to.
        out: the page, ending in .md.

    Returns:
        names of the suites found.

    Raises:
        TrainingDataError: no result, a damaged one, or `out` is a page that was written by hand.
    """
    if out.suffix != ".md":
        raise TrainingDataError(f"--out is {out}: the page's name must end in .md")
    there = out.read_text(encoding="utf-8") if out.exists() else MARK
    if not there.startswith(MARK):
        raise TrainingDataError(f"{out} was not written by `t2w results`: choose another --out")
    results = read_results(folder)
    made = {name: _section(name, written, folder, out) for name, written in results.items()}
    sections = _read_sections(there) | made
    ordered = [sections[name] for name in SUITES if name in sections]
    with atomic_path(out) as temporary:
        temporary.write_text("\n".join([MARK, "", INTRODUCTION, *ordered]), encoding="utf-8")
    return list(results)


def _read_sections(page: str) -> dict[str, str]:
    """Sections of a page by the name of their suite."""
    _, *parts = re.split(r"^(?=## \w+$)", page, flags=re.MULTILINE)
    return {part.split()[1]: part.rstrip("\n") + "\n" for part in parts}


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the suite results of a folder, in the registry's order; JSON files of other formats are passed over.

    Raises:
        TrainingDataError: there is none, one is damaged, is of a suite that does not exist, or has not its name.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, ValueError) as error:
            raise TrainingDataError(f"{path} is damaged ({error}): run the suite again") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            continue
        name = content.get("suite")
        if name not in SUITES:
            raise TrainingDataError(f"{path} is of suite {name!r}: known are {', '.join(SUITES)}")
        if path.stem != name:
            raise TrainingDataError(f"{path} is of suite {name}: its name must be {name}.json")
        found[name] = content
    if not found:
        raise TrainingDataError(f"{folder} holds no suite results: run `t2w evaluate --suite NAME --out {folder}`")
    return {name: found[name] for name in SUITES if name in found}


def _section(name: str, written: dict[str, Any], folder: Path, out: Path) -> str:
    try:
        text = load_suite(name).report(written["result"])
        origin = (
            f"Checkpoint `{written['checkpoint'][:12]}`, backbone {written['backbone']}, seed {written['seed']}, "
            f"{written['seconds']:.0f} s, {written['created_by']}."
        )
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise TrainingDataError(
            f"the result of suite {name} in {folder} lacks a part ({error!r}): run it again"
        ) from error
    place = out.parent / out.stem
    place.mkdir(parents=True, exist_ok=True)
    _copy(folder / f"{name}.json", place)
    figures = [_copy_figure(path, place) for path in sorted(folder.glob(f"{name}*.png"))]
    return "\n".join([f"## {name}\n", f"{origin}\n", text, *figures])


def _copy_figure(path: Path, place: Path) -> str:
    """Copy a figure's files beside the page, and link the picture to its vector form."""
    link = f"![{path.stem}]({place.name}/{path.name})"
    _copy(path, place)
    vector = path.with_suffix(".svg")
    if vector.exists():
        _copy(vector, place)
        link = f"[{link}]({place.name}/{vector.name})"
    return f"{link}\n"


def _copy(path: Path, place: Path) -> None:
    if path.parent.resolve() != place.resolve():
        shutil.copyfile(path, place / path.name)

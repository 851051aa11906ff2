"""Run suites on one checkpoint: one JSON file and its figures for each."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from text2weight.artifact import created_by
from text2weight_training.evaluate import load_generator
from text2weight_training.files import atomic_path, read_kept
from text2weight_training.presets import Preset
from text2weight_training.suites import choose_suites, load_suite
from text2weight_training.suites.base import SuiteRun
from text2weight_training.suites.settings import SuitesSettings
from text2weight_training.tasks import TaskData
from text2weight_training.zoo import Zoo, check_zoo_fits

FORMAT = "text2weight.suite/1"


def run_suites(
    names: Sequence[str], data: TaskData, zoo: Zoo, checkpoint: Path, preset: Preset, out: Path
) -> Iterator[dict[str, Any]]:
    """Run suites one after the other, each written to `out`/NAME.json when it is done.

    A result that is there already, of the same checkpoint, data, zoo, preset, settings and other files read, is kept.

    Args:
        names: suites, or "all".
        data: features and embeddings, the zoo's own.
        zoo: the zoo that the checkpoint was trained on.
        checkpoint: folder of the checkpoint to measure.
        preset: its `suites` section holds the settings.
        out: folder for the results.

    Yields:
        what was written: `format`, `suite`, `checkpoint` (its sha256), `settings`, `seed`, `backbone`, `created_by`,
        `origin` (hash of all that decides the result), `seconds` (wall time), and the suite's own `result`; of a
        result that was there, also `kept`.

    Raises:
        TrainingDataError: an unknown suite, a zoo or checkpoint that does not fit, or too little data for a suite.
    """
    chosen = choose_suites(names)
    check_zoo_fits(zoo, data, preset)
    run = SuiteRun(data, zoo, load_generator(checkpoint, data, zoo, preset), preset, out)
    out.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        origin = _origin(run, name)
        there = read_kept(out / f"{name}.json")
        if there.get("origin") == origin:
            yield there | {"kept": True}
            continue
        started = time.perf_counter()
        result = load_suite(name).run(run)
        written = {
            "format": FORMAT,
            "suite": name,
            "checkpoint": run.generator.checkpoint_hash,
            "settings": preset.suites.model_dump(mode="json")[name],
            "seed": preset.seed,
            "backbone": data.backbone["name"],
            "created_by": created_by(),
            "origin": origin,
            "seconds": round(time.perf_counter() - started, 1),
            "result": result,
        }
        with atomic_path(out / f"{name}.json") as temporary:
            temporary.write_text(json.dumps(written, indent=2, allow_nan=False) + "\n")
        yield written


def _origin(run: SuiteRun, name: str) -> str:
    """Hash of all that a suite's result is made of."""
    suites = run.preset.suites
    made_of = {
        "suite": name,
        "created_by": created_by(),
        "checkpoint": run.generator.checkpoint_hash,
        "data": [run.data.fingerprint, run.data.condition_fingerprint],
        "zoo": run.zoo.manifest,
        "preset": run.preset.run_description(),
        # As they are in memory: results show two tables or folders of one name alike.
        "settings": repr(getattr(suites, name)),
        # Several suites train heads with them.
        "regularisers": [suites.accuracy.label_smoothing, suites.accuracy.feature_dropout],
    }
    if files := _files_read(suites, name):
        made_of["files"] = files
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def _files_read(suites: SuitesSettings, name: str) -> list[tuple[str, int, int]]:
    """Path, size and time of change of the files that a suite reads beside data, zoo and checkpoint."""
    places: list[str | Path | None] = []
    if name == "reading":
        places += [table.partition("#")[0] for table in suites.reading.paraphrases]
    if name == "gradcam":
        places += [suites.gradcam.images, (suites.gradcam.backbone or "").removeprefix("dir:")]
    roots = [Path(place) for place in places if place]
    files = [file for root in roots for file in (root, *sorted(root.rglob("*"))) if file.is_file()]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def with_pictures(preset: Preset, images: Path | None, backbone: str | None, side: int | None = None) -> Preset:
    """The preset with a picture folder, a backbone and its pictures' side for `gradcam`, where they are given."""
    given = {"images": images, "backbone": backbone, "side": side}
    update = {name: value for name, value in given.items() if value is not None}
    changed = preset.suites.gradcam.model_copy(update=update)
    return preset.model_copy(update={"suites": preset.suites.model_copy(update={"gradcam": changed})})


def with_paraphrases(preset: Preset, tables: Sequence[str]) -> Preset:
    """The preset with more paraphrase tables (FILE#TABLE) for the suite `reading`."""
    reading = preset.suites.reading
    changed = reading.model_copy(update={"paraphrases": (*reading.paraphrases, *tables)})
    return preset.model_copy(update={"suites": preset.suites.model_copy(update={"reading": changed})})

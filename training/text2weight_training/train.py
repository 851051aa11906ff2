"""Zoo, fit and evaluation in one go; every stage goes on where an interrupted run stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from text2weight.checkpoint import read_config, record_evaluation
from text2weight_training.evaluate import evaluate, print_table
from text2weight_training.files import TrainingDataError, claim, read_kept, write_kept
from text2weight_training.fit import Fit
from text2weight_training.presets import Preset, resume_obstacles
from text2weight_training.tasks import TaskData
from text2weight_training.zoo import build_zoo


def train(
    data: TaskData,
    preset: Preset,
    out: Path,
    minutes: float | None = None,
    device: str = "cpu",
    backbone: Path | None = None,
) -> dict[str, Any]:
    """Build the zoo, fit the denoiser, measure it: `out`/zoo, `out`/checkpoint, `out`/evaluation.json.

    Args:
        data: features and embeddings.
        preset: all settings.
        out: run directory; a finished stage in it is kept, an unfinished one continued.
        minutes: time limit of the fit, in place of the preset's steps.
        device: torch device.
        backbone: folder of the backbone the features were made with, to put into the checkpoint.

    Returns:
        the evaluation; its summary is also in the checkpoint's config.

    Raises:
        TrainingDataError: `out` belongs to a run with other data or settings, or a training diverges.
    """
    _claim(out, data, preset, minutes, backbone)
    zoo = build_zoo(data, preset, out / "zoo", device)
    checkpoint = out / "checkpoint"
    if not (checkpoint / "config.json").exists():
        fit = Fit(data, zoo, preset, out / "fit-state.pt", device)
        fit.resume()
        fit.run(minutes)
        fit.write_checkpoint(checkpoint, backbone)
    result = _recorded_evaluation(checkpoint, out / "evaluation.json")
    if result is not None:
        print_table(result)
        return result
    result = evaluate(data, zoo, checkpoint, preset, out / "evaluation.json")
    record_evaluation(checkpoint, evaluation_summary(result))
    return result


def evaluation_summary(result: dict[str, Any]) -> dict[str, Any]:
    """The part of an evaluation that a checkpoint carries in its config."""
    keys = ("backbone", "classes", "tasks", "task_size", "headline", "gap_closed", "results", "sample_diversity")
    return {key: result[key] for key in keys}


def _recorded_evaluation(checkpoint: Path, path: Path) -> dict[str, Any] | None:
    """The evaluation at `path`, if it is the one that the checkpoint's config carries: a run's last act."""
    recorded = read_config(checkpoint).evaluation
    if not recorded or not path.exists():
        return None
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        return result if evaluation_summary(result) == recorded else None
    except (ValueError, KeyError):
        return None


def _claim(out: Path, data: TaskData, preset: Preset, minutes: float | None, backbone: Path | None) -> None:
    """Note what this run is made of, or check that an earlier start of it was the same."""
    description: dict[str, Any] = {
        "data": data.fingerprint,
        "preset": preset.run_description(),
        "minutes": minutes,
        "backbone": None if backbone is None else str(backbone.resolve()),
        "condition_text": data.condition_fingerprint or None,
    }
    note = out / "run.json"
    fitted, before = (out / "checkpoint").exists(), read_kept(note).get("preset")
    if fitted and not note.exists():
        raise TrainingDataError(f"{out} holds a checkpoint of another origin: choose another --out")
    if fitted or not isinstance(before, dict) or resume_obstacles(before, description["preset"]):
        claim(note, description, "run")
    else:  # what differs, if anything, may change while the fit is unfinished
        claim(note, description | {"preset": before}, "run")
        write_kept(note, description)

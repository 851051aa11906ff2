"""The main job, end to end: start the service, ask for heads over HTTP, classify real photographs.

    python demo/run_demo.py [--images DIR] [--classes "apple, bus, lizard"]

Writes the heads and a self-contained report.html to out/demo.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from pictures import Picture, PictureError, bundled_pictures, pictures_in
from report import Result, curl_line, python_lines, rank, score, terminal_table, write_report
from rich.console import Console
from service_process import ServiceError, running_service

from text2weight_client import Client, Text2WeightClientError

# Names of CIFAR-100's and Tiny-ImageNet's classes, put together as no data set puts them.
CLASS_LISTS: dict[str, tuple[str, ...]] = {
    "pets": ("tabby", "golden retriever", "goldfish"),
    "household": ("clock", "cup", "lamp", "chair", "telephone", "television", "keyboard", "bottle"),
    "vehicles": ("motorcycle", "rocket", "bicycle", "bus", "train", "tank", "tractor", "pickup truck", "lawn mower"),
    "clothes": ("military uniform", "kimono", "fur coat", "cardigan", "poncho", "bow tie", "sombrero", "sandal"),
    "album": (
        *("cup", "clock", "motorcycle", "rocket", "tabby", "woman", "man"),
        *("apple", "bridge", "mushroom", "dolphin", "tractor"),
    ),
}
FOLDER_LIST = "album"
SEED = 0


class BackboneError(Exception):
    """The checkpoint brings no backbone that can be used."""


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    options = _parse(arguments)
    console = Console(highlight=False)
    signal.signal(signal.SIGTERM, _stop)  # so that the service is stopped too
    _reach_loopback_directly()
    try:
        _run(options, console)
    except (PictureError, ServiceError, BackboneError, Text2WeightClientError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2 if isinstance(error, PictureError) else 1
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Class names in, classified photographs out.")
    parser.add_argument("--images", type=Path, metavar="DIR", help="classify the pictures of this folder too")
    parser.add_argument(
        "--classes",
        action="append",
        default=[],
        metavar='"A, B, ..."',
        help="a class list of your own; may be repeated",
    )
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="instead of the bundled model")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), metavar="DIR", help="default: out/demo")
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace, console: Console) -> None:
    started = time.perf_counter()
    own_pictures, notes = pictures_in(options.images) if options.images else ([], [])
    for note in notes:
        console.print(f"note: {note}", markup=False)
    options.out.mkdir(parents=True, exist_ok=True)
    log_path = options.out / "service.log"
    with running_service(options.checkpoint, log_path) as service, Client(service.url) as client:
        console.print(f"started `t2w serve` at {service.url}, its log is {log_path}", markup=False, soft_wrap=True)
        # The service starts in a process of its own; the pictures are prepared meanwhile.
        pictures = [*bundled_pictures(), *own_pictures]
        features = _features(options.checkpoint, pictures)
        service.wait_until_ready(client)
        console.print(f"ready after {time.perf_counter() - started:.1f} s\n")
        results = [_classify(client, task, options.out) for task in _tasks(options.classes, pictures, features)]
        info = client.info().raw
    console.print(terminal_table(results))
    right, judged = score(results)
    console.print(f"{right} of {judged} predictions are right (✓ right, ✗ wrong, · nobody has said what is true)")
    report = options.out / "report.html"
    write_report(report, results, info)
    console.print(f"heads and report are in {options.out}: open {report}", markup=False, soft_wrap=True)
    console.print(f"done in {time.perf_counter() - started:.1f} s\n")
    _show_next_steps(console, results)


def _features(checkpoint: Path | None, pictures: list[Picture]) -> NDArray[np.float32]:
    """Features (N, 512) of the pictures, from the backbone that comes with the checkpoint."""
    # torch is imported here, while the service is already starting.
    from text2weight.backbone import load_backbone
    from text2weight.checkpoint import bundled_checkpoint
    from text2weight.errors import Text2WeightError

    try:
        backbone = load_backbone((checkpoint or bundled_checkpoint()) / "backbone")
    except Text2WeightError as error:
        raise BackboneError(str(error)) from error
    features: NDArray[np.float32] = backbone.features([picture.image for picture in pictures]).numpy()
    return features


@dataclass(frozen=True)
class Task:
    """A class list and the pictures to try it on; features are (N, 512)."""

    title: str
    classes: tuple[str, ...]
    pictures: list[Picture]
    features: NDArray[np.float32]


def _tasks(own_lists: list[str], pictures: list[Picture], features: NDArray[np.float32]) -> list[Task]:
    """Every class list with the pictures that fit: those whose true class is in it, and the user's own."""
    own = {f"yours {i}": tuple(text.strip() for text in line.split(",")) for i, line in enumerate(own_lists, 1)}
    tasks = []
    for title, classes in {**CLASS_LISTS, **own}.items():
        takes_folder = title in own if own else title == FOLDER_LIST
        fits = [picture.truth_in(classes) is not None or (takes_folder and not picture.truths) for picture in pictures]
        # A list of the user's own that fits no picture is tried on all of them.
        mask = np.array(fits) | (title in own and not any(fits))
        tasks.append(Task(title, classes, [p for p, keep in zip(pictures, mask, strict=True) if keep], features[mask]))
    return tasks


def _classify(client: Client, task: Task, out: Path) -> Result:
    asked = time.perf_counter()
    head = client.generate(task.classes, seed=SEED)
    latency_ms = (time.perf_counter() - asked) * 1000
    file = out / f"{task.title.replace(' ', '-')}.safetensors"
    head.save(file)
    probabilities = head.predict(task.features)  # (N, K)
    predictions = tuple(rank(head, *pair) for pair in zip(task.pictures, probabilities, strict=True))
    return Result(task.title, head, latency_ms, file, predictions)


def _show_next_steps(console: Console, results: list[Result]) -> None:
    classes = min((result.head.classes for result in results), key=len)
    console.print("The same by hand: run `t2w serve` (it is in .venv/bin), and in another terminal\n", markup=False)
    for line in (curl_line(classes), "", "or in Python", "", *python_lines(classes)):
        console.print(line, markup=False, soft_wrap=True)


def _reach_loopback_directly() -> None:
    """Keep requests to this machine away from a proxy that the environment may name."""
    excluded = [*filter(None, os.environ.get("NO_PROXY", "").split(",")), "127.0.0.1"]
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(excluded)


def _stop(signal_number: int, frame: Any) -> NoReturn:
    sys.exit(128 + signal_number)


if __name__ == "__main__":
    sys.exit(main())

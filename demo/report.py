"""What the demo shows: results as a terminal table and as one self-contained HTML page."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from pictures import Picture
from PIL import Image
from rich.table import Table
from rich.text import Text

from text2weight_client import GeneratedHead

THUMBNAIL_SIDE = 480
SHOWN_CLASSES = 5


@dataclass(frozen=True)
class Bar:
    """One class of one prediction."""

    name: str
    probability: float
    is_truth: bool


@dataclass(frozen=True)
class Prediction:
    """What a head says about a picture."""

    picture: Picture
    truth: str | None
    ranking: tuple[Bar, ...]

    @property
    def best(self) -> Bar:
        """The most probable class."""
        return self.ranking[0]

    @property
    def is_right(self) -> bool | None:
        """Whether the most probable class is the true one; None if nobody has said what is true."""
        return None if self.truth is None else self.best.is_truth

    @property
    def bars(self) -> tuple[Bar, ...]:
        """The most probable classes, and the true one wherever it stands."""
        return self.ranking[:SHOWN_CLASSES] + tuple(bar for bar in self.ranking[SHOWN_CLASSES:] if bar.is_truth)


@dataclass(frozen=True)
class Result:
    """A class list, the head generated for it, and its predictions."""

    title: str
    head: GeneratedHead
    latency_ms: float
    file: Path
    predictions: tuple[Prediction, ...]

    @property
    def size_kb(self) -> float:
        """Size of the head file in kB (1000 bytes)."""
        return self.file.stat().st_size / 1000


def rank(head: GeneratedHead, picture: Picture, probabilities: NDArray[np.float32]) -> Prediction:
    """Sort one picture's probabilities (K,)."""
    truth = picture.truth_in(head.classes)
    order = np.argsort(-probabilities, kind="stable")
    bars = (Bar(head.classes[i], float(probabilities[i]), head.classes[i] == truth) for i in order)
    return Prediction(picture, truth, tuple(bars))


def score(results: list[Result]) -> tuple[int, int]:
    """Right answers, and answers that can be judged, over all lists."""
    judged = [p.is_right for result in results for p in result.predictions if p.is_right is not None]
    return sum(judged), len(judged)


def terminal_table(results: list[Result]) -> Table:
    """One row for each class list."""
    table = Table(show_lines=True)
    table.add_column("class list", ratio=3)
    table.add_column("latency", justify="right", no_wrap=True)
    table.add_column("head", justify="right", no_wrap=True)
    table.add_column("picture: most probable class", ratio=4)
    for result in results:
        classes = Text.assemble(
            (result.title, "bold"), f" ({len(result.head.classes)})\n", ", ".join(result.head.classes)
        )
        lines = Text("\n").join(_prediction_line(prediction) for prediction in result.predictions)
        table.add_row(classes, f"{result.latency_ms:.0f} ms", f"{result.size_kb:.0f} kB", lines)
    return table


def _prediction_line(prediction: Prediction) -> Text:
    mark, style = {True: ("✓", "green"), False: ("✗", "red"), None: ("·", "")}[prediction.is_right]
    line = Text.assemble((f"{mark} ", style), f"{prediction.picture.name}: ")
    line.append(f"{prediction.best.name} {prediction.best.probability:.0%}", style="bold")
    if prediction.is_right is False:
        true = next(bar for bar in prediction.ranking if bar.is_truth)
        line.append(f" (true: {true.name} {true.probability:.0%})")
    return line


def write_report(path: Path, results: list[Result], info: dict[str, Any]) -> None:
    """Write the page; pictures are inside it as data URIs and nothing is loaded from anywhere.

    Args:
        path: where to.
        results: in the order in which they are shown.
        info: the service's GET /info.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = data_uri
    environment.filters["percent"] = percent
    environment.filters["thousands"] = "{:,}".format
    shortest = min(results, key=lambda result: len(result.head.classes))
    right, judged = score(results)
    page = environment.get_template("report.html.j2").render(
        results=results,
        right=right,
        judged=judged,
        median_ms=median(result.latency_ms for result in results),
        info=json.dumps(info, indent=2, ensure_ascii=False),
        sources=dict.fromkeys(p.picture.source for result in results for p in result.predictions),
        metadata=results[0].head.metadata,
        curl=curl_line(shortest.head.classes),
        python="\n".join(python_lines(shortest.head.classes)),
    )
    path.write_text(page, encoding="utf-8")


def percent(probability: float) -> str:
    """A probability as people read it; what is not nothing is not shown as 0 %."""
    return "< 1 %" if 0 < probability < 0.01 else f"{probability:.0%}".replace("%", " %")


def data_uri(image: Image.Image) -> str:
    """A thumbnail as a data URI."""
    thumbnail = image.copy()
    thumbnail.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    stream = io.BytesIO()
    thumbnail.save(stream, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def curl_line(classes: tuple[str, ...]) -> str:
    """The request as a shell command."""
    body = json.dumps({"classes": list(classes), "seed": 0}).replace("'", "'\\''")
    return (
        f"curl -sSf http://127.0.0.1:8000/generate -H 'Content-Type: application/json' -d '{body}' -o head.safetensors"
    )


def python_lines(classes: tuple[str, ...]) -> list[str]:
    """The same with the client."""
    return [
        "from text2weight_client import Client",
        f"head = Client().generate({json.dumps(list(classes), ensure_ascii=False)}, seed=0)",
        "probabilities = head.predict(features)  # (N, 512) backbone features -> (N, classes)",
    ]

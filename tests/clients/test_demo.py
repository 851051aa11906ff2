"""The demo: its parts, and the whole of it as a process with a small random model."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.patience import PATIENCE_S, PROCESS_S
from text2weight.backbone import ARCHITECTURE, BACKBONE_FORMAT, IMAGENET_MEAN, IMAGENET_STD, small_image_resnet18
from text2weight.checkpoint import CheckpointConfig, TextEncoderConfig, save_checkpoint
from text2weight.denoiser import Denoiser, DenoiserConfig
from text2weight.text_encoder import EmbeddingTable, write_embedding_tables
from text2weight.weight_space import WeightSpace
from text2weight_client import Client, GeneratedHead

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "demo"

# Two processes that each import torch: seconds on an idle machine, minutes on a crowded one.


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The demo's modules, importable as they are when the script runs."""
    monkeypatch.syspath_prepend(str(DEMO))
    import run_demo

    return run_demo


def class_names() -> list[str]:
    source = (DEMO / "run_demo.py").read_text()
    listing = source[source.index("CLASS_LISTS") : source.index("FOLDER_LIST =")]
    return sorted({*re.findall(r'"([^"]+)"', listing), "apple", "bus", "lizard"})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random checkpoint that knows the demo's class names."""
    folder = tmp_path_factory.mktemp("model")
    generator = torch.Generator().manual_seed(0)
    names = tuple(class_names())
    vectors = torch.nn.functional.normalize(torch.randn(len(names), 512, generator=generator), dim=1)
    write_embedding_tables(folder / "names.safetensors", {"names": EmbeddingTable("a {}", names, vectors)})
    backbone = folder / "backbone"
    backbone.mkdir()
    save_file(small_image_resnet18(0).state_dict(), backbone / "model.safetensors")
    preprocess = {"side": 32, "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
    description = {"format": BACKBONE_FORMAT, "architecture": ARCHITECTURE, "preprocess": preprocess}
    (backbone / "config.json").write_text(json.dumps(description))
    encoder = TextEncoderConfig(source=f"table:{folder / 'names.safetensors'}#names", name="names")
    network = DenoiserConfig(width=32, depth=2, heads=2)
    config = CheckpointConfig(created_by="test", text_encoder=encoder, denoiser=network)
    size = config.head.num_parameters
    space = WeightSpace.fit(
        config.head, torch.randn(size, generator=generator), torch.randn(4, size, generator=generator)
    )
    denoiser = Denoiser(config.head, network, space.anchor, torch.zeros(512))
    save_checkpoint(folder / "checkpoint", config, denoiser, space, {"backbone": backbone})
    return folder / "checkpoint"


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DEMO / "run_demo.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PROCESS_S, cwd=ROOT, check=False)


def processes_at_port(port: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:
            continue
        if f"--port\0{port}\0".encode() in command:
            found.append(path.parent.name)
    return found


class References(HTMLParser):
    """Collects what a page would load or link to, and pictures without a description."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.pictures = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        assert tag not in {"script", "iframe", "object"}
        if tag == "a":
            self.links.append(values["href"] or "")
        elif tag in {"img", "link"}:
            self.loaded.append(values.get("src") or values.get("href") or "")
        if tag == "img":
            self.pictures += 1
            assert values["alt"]


def test_whole_demo(checkpoint: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (50, 40), "red").save(images / "<b>red.png")
    (images / "broken.jpg").write_text("not a picture")
    out = tmp_path / "out"
    arguments = ["--checkpoint", str(checkpoint), "--out", str(out), "--images", str(images)]
    result = run_demo(*arguments, "--classes", "apple, bus ,lizard")
    assert result.returncode == 0, result.stderr
    port = re.search(r"http://127\.0\.0\.1:(\d+)", result.stdout)
    assert port
    assert processes_at_port(port[1]) == []
    assert "broken.jpg is left out" in re.sub(r"\s+", " ", result.stdout)
    assert re.search(r"\d+ of 14 predictions are right", result.stdout)
    assert "curl -sSf http://127.0.0.1:8000/generate" in result.stdout
    assert 'head = Client().generate(["tabby", "golden retriever", "goldfish"], seed=0)' in result.stdout

    heads = {path.name: GeneratedHead.load(path) for path in out.glob("*.safetensors")}
    assert heads["yours-1.safetensors"].classes == ("apple", "bus", "lizard")
    assert heads["vehicles.safetensors"].metadata["seed"] == "0"
    assert len(heads) == 6

    page = (out / "report.html").read_text()
    references = References()
    references.feed(page)
    assert references.loaded
    assert all(address.startswith("data:") for address in references.loaded)
    assert {*references.links} == {*heads}
    assert references.pictures == 15
    assert "url(" not in page
    assert "&lt;b&gt;red.png" in page
    assert "<b>" not in page
    assert "prefers-color-scheme: dark" in page


def test_service_is_stopped_when_the_demo_is(checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(DEMO / "run_demo.py"), "--checkpoint", str(checkpoint), "--out", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout
        port = re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())
        assert port
        assert processes_at_port(port[1])
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 128 + signal.SIGTERM
    assert processes_at_port(port[1]) == []


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (None, "there is no such folder"),
        ({}, "it holds no picture"),
        ({"notes.txt": "text"}, "it holds no picture"),
        ({"cat.jpg": "text"}, "none of its 1 pictures can be read"),
    ],
)
def test_unusable_image_folder(
    demo: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    prepare: dict[str, str] | None,
    message: str,
) -> None:
    monkeypatch.setattr(demo.signal, "signal", lambda *_: None)
    folder = tmp_path / "images"
    if prepare is not None:
        folder.mkdir()
        for name, text in prepare.items():
            (folder / name).write_text(text)
    assert demo.main(["--images", str(folder), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"demo: --images {folder}: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_service_that_does_not_start_shows_its_log(demo: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "service.log"
    with (
        pytest.raises(demo.ServiceError, match=r"ended with code [12] before it was ready") as caught,
        demo.running_service(tmp_path / "absent", log) as service,
        Client(service.url) as client,
    ):
        service.wait_until_ready(client)
    assert str(tmp_path / "absent") in str(caught.value).split("the end of", 1)[1]


def test_checkpoint_without_backbone(demo: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(demo.BackboneError, match="backbone"):
        demo._features(tmp_path, demo.bundled_pictures())


def test_every_list_has_a_bundled_picture_and_every_picture_a_list(demo: ModuleType) -> None:
    pictures = demo.bundled_pictures()
    tasks = demo._tasks([], pictures, np.zeros((len(pictures), 512), np.float32))
    assert all(task.pictures for task in tasks)
    assert {picture.name for task in tasks for picture in task.pictures} == {picture.name for picture in pictures}
    for task in tasks:
        assert len(set(task.classes)) == len(task.classes)
        for picture in task.pictures:
            assert len(picture.truths & set(task.classes)) == 1
            assert picture.image.mode == "RGB"


def test_own_list_that_fits_no_picture_is_tried_on_all(demo: ModuleType) -> None:
    pictures = demo.bundled_pictures()
    features = np.arange(len(pictures) * 512, dtype=np.float32).reshape(-1, 512)
    task = demo._tasks(["pear,plum"], pictures, features)[-1]
    assert (task.title, task.classes, len(task.pictures)) == ("yours 1", ("pear", "plum"), len(pictures))
    np.testing.assert_array_equal(task.features, features)


def test_right_and_wrong_are_counted_honestly(demo: ModuleType, make_head: Any, tmp_path: Path) -> None:
    import report

    head = GeneratedHead.from_bytes(make_head(("cup", "clock", "tabby")))
    pictures = {picture.name: picture for picture in demo.bundled_pictures()}
    unknown = report.Picture("mine.jpg", Image.new("RGB", (8, 8)), "Mine", "mine.jpg")
    coffee, cat, motorcycle = pictures["coffee"], pictures["cat"], pictures["motorcycle"]
    rows = np.array([0.7, 0.2, 0.1], np.float32)
    predictions = tuple(report.rank(head, picture, rows) for picture in (coffee, cat, motorcycle, unknown))
    assert [prediction.is_right for prediction in predictions] == [True, False, None, None]
    assert predictions[1].truth == "tabby"
    head.save(tmp_path / "h.safetensors")
    result = report.Result("t", head, 1.0, tmp_path / "h.safetensors", predictions)
    assert report.score([result]) == (1, 2)


def test_true_class_is_shown_however_low_it_ranks(demo: ModuleType, make_head: Any) -> None:
    import report

    names = ("a", "b", "c", "d", "e", "f", "g", "tabby")
    head = GeneratedHead.from_bytes(make_head(names))
    cat = next(picture for picture in demo.bundled_pictures() if picture.name == "cat")
    prediction = report.rank(head, cat, np.linspace(0.2, 0.05, 8).astype(np.float32))
    assert [bar.name for bar in prediction.bars] == ["a", "b", "c", "d", "e", "tabby"]


@pytest.mark.parametrize(("value", "text"), [(0.0, "0 %"), (0.004, "< 1 %"), (0.126, "13 %"), (1.0, "100 %")])
def test_percent(demo: ModuleType, value: float, text: str) -> None:
    import report

    assert report.percent(value) == text


def test_curl_line_survives_quotes(demo: ModuleType) -> None:
    line = demo.curl_line(("potter's wheel", 'the "best"'))
    result = subprocess.run(
        ["bash", "-c", line.replace("curl", "printf '%s\\n'", 1)], capture_output=True, text=True, check=True
    )
    body = next(word for word in result.stdout.splitlines() if word.startswith("{"))
    assert json.loads(body) == {"classes": ["potter's wheel", 'the "best"'], "seed": 0}

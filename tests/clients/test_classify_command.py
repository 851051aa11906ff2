"""t2w classify against a server that plays a script, and with the bundled model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.clients.scripted import INFO
from tests.service.backbones import encoded, picture
from text2weight_client import Client
from text2weight_client.cli import app

runner = CliRunner()
BEST = [("cup", 0.85), ("bus", 0.1), ("apple", 0.03), ("clock", 0.02)]


@pytest.fixture(autouse=True)
def of_this_service(monkeypatch: pytest.MonkeyPatch, local_service: Any) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("T2W_API_KEY", raising=False)
    monkeypatch.setenv("T2W_URL", local_service.url)


@pytest.fixture
def head(make_head: Any, tmp_path: Path) -> Path:
    path = tmp_path / "head.safetensors"
    path.write_bytes(make_head(tuple(name for name, _ in BEST)))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five files, of which four are pictures by their names, each of 100 kB."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for name in ("a.jpg", "b.PNG", "more/c.webp", "d.jpeg", "notes.txt"):
        (folder / name).write_bytes(b"\xff\xd8\xff".ljust(100_000, b"x"))
    return folder


def run(*arguments: str | Path, code: int = 0) -> Any:
    result = runner.invoke(app, ["classify", *map(str, arguments)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def info(**limits: Any) -> bytes:
    return json.dumps(INFO | {"limits": INFO["limits"] | limits}).encode()


def answer(count: int) -> bytes:
    classes = [{"name": name, "probability": probability} for name, probability in BEST]
    return json.dumps({"images": [{"filename": f"{i}", "classes": classes} for i in range(count)]}).encode()


def sent(service: Any) -> list[int]:
    """How many pictures each call carried."""
    assert service.requests[0]["path"] == "/info"
    calls = service.requests[1:]
    assert {request["path"] for request in calls} == {"/classify"}
    assert all(request["raw"].count(b'name="head"') == 1 for request in calls)
    return [request["raw"].count(b'name="image"') for request in calls]


def test_a_line_for_each_picture(local_service: Any, reply: Any, head: Path, folder: Path) -> None:
    local_service.play(reply(body=info()), reply(body=answer(5)))
    output = run(head, folder / "notes.txt", folder).stdout
    files = [folder / name for name in ("notes.txt", "a.jpg", "b.PNG", "d.jpeg", "more/c.webp")]
    assert output == "".join(f"{file}\tcup\t0.85\tbus\t0.10\tapple\t0.03\n" for file in files)
    assert sent(local_service) == [5]


@pytest.mark.parametrize(
    ("limits", "calls"),
    [
        ({"max_pictures": 3}, [3, 1]),
        ({"max_pictures": 4}, [4]),
        ({"max_upload_bytes": 320_000}, [2, 2]),
        ({"max_upload_bytes": 1000}, [1, 1, 1, 1]),
    ],
)
def test_several_calls_where_the_service_takes_no_more(
    local_service: Any, reply: Any, head: Path, folder: Path, limits: dict[str, int], calls: list[int]
) -> None:
    local_service.play(reply(body=info(**limits)), *(reply(body=answer(count)) for count in calls))
    assert len(run(head, folder).stdout.splitlines()) == 4
    assert sent(local_service) == calls


def test_as_json(local_service: Any, reply: Any, head: Path, folder: Path) -> None:
    local_service.play(reply(body=info(max_pictures=1)), reply(body=answer(1)))
    images = json.loads(run(head, folder / "a.jpg", folder / "d.jpeg", "--json").stdout)["images"]
    assert [image["filename"] for image in images] == [str(folder / "a.jpg"), str(folder / "d.jpeg")]
    assert [(one["name"], one["probability"]) for one in images[1]["classes"]] == BEST


def test_a_refused_picture_is_called_by_its_name(local_service: Any, reply: Any, head: Path, folder: Path) -> None:
    fault = {"title": "No", "detail": "image[1]: bad", "errors": [{"field": "image[1]", "message": "not a whole JPEG"}]}
    refusal = reply(status=422, body=json.dumps(fault).encode())
    local_service.play(reply(body=info(max_pictures=2)), reply(body=answer(2)), refusal)
    result = run(head, folder, code=2)
    assert result.stderr == f"error: {folder / 'more/c.webp'}: not a whole JPEG\n"
    assert len(result.stdout.splitlines()) == 2


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        (["absent.jpg"], 1, "error: absent.jpg: No such file"),
        (["."], 2, "error: .: no picture in this folder: it needs files .jpg, .jpeg, .png, .webp"),
        ([], 2, "Missing argument 'PICTURES...'"),
    ],
)
def test_input_to_correct(
    local_service: Any,
    reply: Any,
    head: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(head.parent)
    local_service.play(reply(body=info()))
    assert message in run(head, *given, code=code).stderr


def test_service_without_backbone(local_service: Any, reply: Any, head: Path, folder: Path) -> None:
    unable = b'{"type": "urn:text2weight:problem:no-backbone", "title": "No backbone"}'
    local_service.play(reply(body=info()), reply(status=501, body=unable))
    assert run(head, folder, code=1).stderr == "error: 501 No backbone\n"


def test_with_the_bundled_model(live_url: str, tmp_path: Path) -> None:
    with Client(live_url) as client:
        head = client.generate(["apple", "bus", "lizard"], seed=7)
        limit = client.info().limits.max_pictures
        head.save(tmp_path / "head.safetensors")
        for number in range(limit + 1):
            (tmp_path / f"{number:02}.png").write_bytes(encoded(picture(number)))
        expected = client.classify(head, [tmp_path / "00.png"])[0].best
    lines = run(tmp_path / "head.safetensors", tmp_path, "--url", live_url).stdout.splitlines()
    assert [line.split("\t")[0] for line in lines] == [str(tmp_path / f"{n:02}.png") for n in range(limit + 1)]
    assert lines[0].split("\t")[1:3] == [expected.name, f"{expected.probability:.2f}"]

"""t2w fuse, enhance, info, inspect, and the options of t2w generate, against a server that plays a script."""

from __future__ import annotations

import json
import time
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.clients.scripted import INFO
from tests.clients.test_heads import in_precision, stacked
from tests.patience import HELD_S, PATIENCE_S
from text2weight_client import GeneratedHead, GeneratedHeads, command_options
from text2weight_client.cli import app

runner = CliRunner()


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch, local_service: Any) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("T2W_API_KEY", raising=False)
    monkeypatch.setenv("T2W_URL", local_service.url)


def run(*arguments: str | Path, code: int = 0) -> Any:
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def test_generate_passes_every_option(
    local_service: Any, reply: Any, make_head: Any, sleeps: list[float], tmp_path: Path
) -> None:
    local_service.play(reply(body=make_head(("apple", "bus"))))
    descriptions = tmp_path / "d.json"
    descriptions.write_text('{"apple": "a round fruit", "bus": ["a long car"]}')
    options = ["--template", "the {}", "--guidance-scale", "1.5", "--precision", "bf16"]
    options += ["--descriptions", str(descriptions), "--describe-classifier", "--seed", "2", "--timeout", "3"]
    run("generate", "apple", "bus", "-o", tmp_path / "h", *options)
    assert local_service.bodies == [
        {
            "classes": ["apple", "bus"],
            "seed": 2,
            "precision": "bf16",
            "guidance_scale": 1.5,
            "prompt_template": "the {}",
            "descriptions": {"apple": "a round fruit", "bus": ["a long car"]},
            "describe_classifier": True,
            "deadline_ms": 3000,
        }
    ]


def test_generate_of_several_heads(local_service: Any, reply: Any, make_head: Any, tmp_path: Path) -> None:
    local_service.play(reply(body=stacked(make_head, (4, 5, 6))))
    path = tmp_path / "heads.safetensors"
    result = run("generate", "apple", "bus", "lizard", "-o", path, "--samples", "3", "--seed", "4")
    assert local_service.bodies[0]["samples"] == 3
    assert GeneratedHeads.load(path).seeds == (4, 5, 6)
    assert "3 heads for 3 classes, sampler mean, steps 1, seeds 4, 5, 6" in result.output


def test_generate_shows_the_services_warnings(local_service: Any, reply: Any, make_head: Any, tmp_path: Path) -> None:
    warnings = ["class 'qwerty' is not among the 100 names", "template too"]
    local_service.play(reply(body=make_head(metadata={"warnings": json.dumps(warnings)})))
    result = run("generate", "qwerty", "bus", "-o", tmp_path / "h")
    assert result.stderr == "warning: class 'qwerty' is not among the 100 names\nwarning: template too\n"


def events(make_head: Any) -> bytes:
    done = json.dumps({"seed": 3, "head": b64encode(make_head(seed=3)).decode()})
    progress = "".join(
        f'event: progress\ndata: {{"step": {step}, "steps": 2, "timestep": {900 // step}}}\n\n' for step in (1, 2)
    )
    return f"{progress}event: done\ndata: {done}\n\n".encode()


def test_generate_can_be_watched(
    local_service: Any, reply: Any, make_head: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local_service.play(reply(body=events(make_head), headers={"Content-Type": "text/event-stream"}))
    path = tmp_path / "head.safetensors"
    result = run("generate", "apple", "bus", "-o", path, "--watch", "--seed", "3")
    assert local_service.requests[0]["path"] == "/generate/stream"
    assert GeneratedHead.load(path).metadata["seed"] == "3"
    assert "denoising, timestep 450" in result.stderr
    assert "seed 3" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "a", "b", "--watch", "--samples", "2"], "error: --watch shows one head: leave out --samples"),
        (["generate", "a", "b", "--describe-classifier"], "error: --describe-classifier needs --descriptions"),
        (["generate", "a", "b", "--descriptions", "list.json"], "error: list.json: it must hold an object"),
        (["generate", "a", "b", "--descriptions", "notes.txt"], "error: notes.txt: not JSON"),
        (["generate", "a", "b", "--precision", "fp8"], "'fp8' is not one of"),
        (["fuse", "a, b", "c, d", "--weight", "1"], "error: --weight is given 1 times for 2 tasks"),
        (["fuse", "a, b", "head.safetensors"], "error: 1 of 2 tasks have a head"),
        (["fuse", "a, b", "c, d", "--method", "mean"], "'mean' is not one of"),
        (["enhance", "head.safetensors"], "Missing option '--strength'"),
        (["enhance", "head.safetensors", "--strength", "1.5"], "--strength"),
        (["enhance", "head.safetensors", "--strength", "0.5", "--method", "ties"], "--method"),
    ],
)
def test_input_to_correct_is_code_2(
    make_head: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text("[1]")
    Path("notes.txt").write_text("{")
    Path("head.safetensors").write_bytes(make_head())
    assert message in run(*arguments, code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fuse", "absent.safetensors", "absent.safetensors"], "absent.safetensors: No such file"),
        (["enhance", "absent.safetensors", "--strength", "1"], "absent.safetensors: No such file"),
        (["info"], "error: 401 Bad key (request id r-9)"),
        (["fuse", "a, b", "c, d"], "error: 401 Bad key"),
    ],
)
def test_failures_are_code_1(local_service: Any, reply: Any, arguments: list[str], message: str) -> None:
    local_service.play(reply(status=401, body=b'{"title": "Bad key", "request_id": "r-9"}'))
    assert message in run(*arguments, code=1).stderr


def test_fuse_of_class_lists(local_service: Any, reply: Any, make_head: Any, tmp_path: Path) -> None:
    path = tmp_path / "fused.safetensors"
    local_service.play(reply(body=make_head(("apple", "pickup truck", "cup"))))
    run("fuse", "apple, pickup truck", "cup,apple", "--weight", "2", "--weight", "1", "--seed", "1", "-o", path)
    tasks = [{"classes": ["apple", "pickup truck"], "weight": 2.0}, {"classes": ["cup", "apple"], "weight": 1.0}]
    assert local_service.bodies == [{"tasks": tasks, "seed": 1}]
    assert GeneratedHead.load(path).classes == ("apple", "pickup truck", "cup")


def test_fuse_of_head_files(local_service: Any, reply: Any, make_head: Any, tmp_path: Path) -> None:
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    files[0].write_bytes(make_head(("apple", "bus")))
    files[1].write_bytes(make_head(("cup", "bus")))
    merged = make_head(metadata={"seed": "1"})
    local_service.play(reply(body=merged))
    run("fuse", *files, "--method", "git-rebasin", "-o", tmp_path / "fused.safetensors")
    raw = local_service.requests[0]["raw"]
    assert b'"tasks": [{"classes": ["apple", "bus"]}, {"classes": ["cup", "bus"]}]' in raw
    assert b'"method": "git-rebasin"' in raw
    assert raw.count(b'name="head"') == 2


def test_enhance(local_service: Any, reply: Any, make_head: Any, tmp_path: Path) -> None:
    given, path = tmp_path / "head.safetensors", tmp_path / "better.safetensors"
    given.write_bytes(make_head(seed=1))
    local_service.play(reply(body=make_head(seed=2, metadata={"strength": "0.3"})))
    result = run("enhance", given, "--strength", "0.3", "--class", "cup", "--class", "bus", "-o", path)
    raw = local_service.requests[0]["raw"]
    assert b'"strength": 0.3' in raw
    assert b'"classes": ["cup", "bus"]' in raw
    assert GeneratedHead.load(given).to_bytes() in raw
    assert GeneratedHead.load(path).metadata["seed"] == "2"
    assert "strength 0.3, seed 2" in result.output
    assert b"method" not in raw
    local_service.play(reply(body=make_head()))
    run("enhance", given, "--strength", "0.3", "--method", "noise", "-o", path)
    assert b'"method": "noise"' in local_service.requests[1]["raw"]


def test_info_as_a_table(local_service: Any, reply: Any) -> None:
    names = [f"name {number}" for number in range(40)]
    local_service.play(reply(body=json.dumps(INFO | {"known_classes": names, "[b]": None}).encode()))
    output = run("info").output
    for expected in ("model.backbone.name", "resnet18", "limits.exact_steps.mean", "features.guidance", "fuse_methods"):
        assert expected in output
    assert "name 11, ... (40 in all: --json)" in output
    assert "name 12" not in output
    assert "not set" in output


def test_info_as_json(local_service: Any, reply: Any) -> None:
    local_service.play(reply(body=json.dumps(INFO).encode()))
    assert json.loads(run("info", "--json").stdout) == INFO


def test_inspect_of_several_heads(make_head: Any, tmp_path: Path) -> None:
    path = tmp_path / "heads.safetensors"
    path.write_bytes(in_precision(stacked(make_head, (7, 8), {"condition_text": "descriptions sha256:ab"}), "fp16"))
    output = run("inspect", path).output
    assert "2 of 512 -> 16 -> 512" in output
    assert "16,912 numbers in fp16" in output
    assert "descriptions sha256:ab" in output
    assert "7, 8" in output
    rows = [line.split("│")[1:-1] for line in output.splitlines() if line.startswith("│")]
    by_seed = {row[0].strip(): float(row[-1]) for row in rows if row[0].strip() in {"7", "8"}}
    assert by_seed["7"] == 0
    assert by_seed["8"] == pytest.approx(0.2 * 2**0.5, rel=0.05)  # two draws of deviation 0.2


def test_inspect_of_a_merged_head_without_seed(make_head: Any, tmp_path: Path) -> None:
    head = GeneratedHead.from_bytes(make_head(metadata={"strength": "0.25"}))
    del head.metadata["seed"]
    head.save(tmp_path / "h")
    output = run("inspect", tmp_path / "h").output
    assert "strength" in output
    assert "0.25" in output


@pytest.mark.parametrize(("after_s", "shown"), [(HELD_S, False), (0.05, True)])
def test_waiting_is_shown_on_a_terminal_once_it_is_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], after_s: float, shown: bool
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(command_options, "PROGRESS_AFTER_S", after_s)
    assert Console(stderr=True).is_terminal
    printed, end = "", time.monotonic() + PATIENCE_S
    with command_options.waiting("fusing"):
        while shown and "fusing" not in printed:
            assert time.monotonic() < end
            time.sleep(0.02)
            printed += capsys.readouterr().err
    assert ("fusing" in printed + capsys.readouterr().err) is shown


def test_waiting_prints_nothing_into_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr(command_options, "PROGRESS_AFTER_S", 0.0)
    with command_options.waiting("fusing"):
        time.sleep(0.02)
    assert capsys.readouterr().err == ""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from text2weight_client.cli import app
from text2weight_client.head import GeneratedHead

runner = CliRunner()


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    for name in ("T2W_API_KEY", "T2W_URL"):
        monkeypatch.delenv(name, raising=False)


def test_generate_writes_the_head(local_service: Any, reply: Any, make_head: Any, tmp_path: Path) -> None:
    local_service.play(reply(body=make_head(("apple", "pickup truck"))))
    path = tmp_path / "head.safetensors"
    arguments = ["generate", "apple", "pickup truck", "-o", str(path), "--url", local_service.url]
    arguments += ["--seed", "7", "--steps", "4", "--sampler", "ddim", "--api-key", "k"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert local_service.bodies == [{"classes": ["apple", "pickup truck"], "seed": 7, "steps": 4, "sampler": "ddim"}]
    assert local_service.requests[0]["headers"]["Authorization"] == "Bearer k"
    assert GeneratedHead.load(path).classes == ("apple", "pickup truck")
    assert f"wrote {path}" in result.output
    assert "2 classes" in result.output


def test_api_key_from_the_environment(local_service: Any, reply: Any, make_head: Any, tmp_path: Path) -> None:
    local_service.play(reply(body=make_head()))
    arguments = ["generate", "a", "b", "-o", str(tmp_path / "h"), "--url", local_service.url]
    assert runner.invoke(app, arguments, env={"T2W_API_KEY": "from-env"}).exit_code == 0
    assert local_service.requests[0]["headers"]["Authorization"] == "Bearer from-env"


def test_url_from_the_environment(local_service: Any, reply: Any, make_head: Any, tmp_path: Path) -> None:
    local_service.play(reply(body=make_head()))
    arguments = ["generate", "a", "b", "-o", str(tmp_path / "h")]
    assert runner.invoke(app, arguments, env={"T2W_URL": local_service.url}).exit_code == 0
    assert len(local_service.requests) == 1


def test_refused_request_is_one_line_and_code_2(local_service: Any, reply: Any, tmp_path: Path) -> None:
    local_service.play(reply(status=422, body=b'{"title": "Invalid input", "detail": "classes[1] repeats classes[0]"}'))
    path = tmp_path / "head.safetensors"
    result = runner.invoke(app, ["generate", "apple", "apple", "-o", str(path), "--url", local_service.url])
    assert result.exit_code == 2
    assert result.stderr == "error: 422 Invalid input: classes[1] repeats classes[0]\n"
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["generate", "a", "b", "--url", "localhost"], 2, "base_url is 'localhost'"),
        (["generate"], 2, "Missing argument"),
        (["generate", "a", "b", "--seed", "-1"], 2, "--seed"),
        (["generate", "a", "b", "--steps", "0"], 2, "--steps"),
        (["inspect", "absent.safetensors"], 1, "absent.safetensors: No such file"),
        (["inspekt"], 2, "Did you mean 'inspect'?"),
    ],
)
def test_bad_command_lines(arguments: list[str], code: int, message: str) -> None:
    result = runner.invoke(app, arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_unwritable_output_is_code_1(local_service: Any, reply: Any, make_head: Any, tmp_path: Path) -> None:
    local_service.play(reply(body=make_head()))
    missing = tmp_path / "no" / "such" / "folder" / "h.safetensors"
    result = runner.invoke(app, ["generate", "a", "b", "-o", str(missing), "--url", local_service.url])
    assert result.exit_code == 1
    assert "No such file or directory" in result.stderr


def test_inspect_shows_classes_metadata_and_tensors(make_head: Any, tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    path.write_bytes(make_head(("apple", "bus", "[red]lizard"), seed=11))
    result = runner.invoke(app, ["inspect", str(path)])
    assert result.exit_code == 0, result.output
    for expected in ("3: apple, bus, [red]lizard", "512 -> 16 -> 512", "16,912 numbers", "resnet18", "(16, 512)", "11"):
        assert expected in result.output


def test_inspect_of_something_else_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a head")
    result = runner.invoke(app, ["inspect", str(path)])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "notes.txt: not a readable safetensors file" in result.stderr


def test_help_has_examples() -> None:
    for command in ("generate", "fuse", "enhance", "classify", "info", "inspect"):
        output = runner.invoke(app, [command, "--help"]).output
        assert f"Example: t2w {command} " in output
        assert "Exit codes: 0 done; 1 failed" in output


def test_version() -> None:
    assert runner.invoke(app, ["--version"]).output.startswith("text2weight ")


class Plugins:
    """A folder of command modules that a subprocess of `t2w` finds through entry points."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = ["[text2weight.commands]"]

    def add(self, name: str, package: str, source: str) -> None:
        (self.folder / package).mkdir()
        (self.folder / package / "__init__.py").write_text(textwrap.dedent(source))
        self.lines.append(f"{name} = {package}:app")

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        info = self.folder / "plugins-1.0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugins\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("\n".join(self.lines) + "\n")
        # The extras are known by package name, so the stand-ins are registered under names of their own.
        program = (
            "import sys\nfrom text2weight_client import cli\n"
            "cli.EXTRAS.update(fake_service='service', fake_training='training')\n"
            "sys.argv = ['t2w', *sys.argv[1:]]\ncli.main()\n"
        )
        environment = {**os.environ, "PYTHONPATH": str(self.folder)}
        return subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=environment, check=False
        )


COMMAND = '''
import typer
{top}
app = typer.Typer(add_completion=False)

@app.command()
def command(size: int = 1) -> None:
    """{help}"""
    {body}
    print("ran with", size)
'''


@pytest.fixture
def plugins(tmp_path: Path) -> Plugins:
    return Plugins(tmp_path)


def test_commands_of_other_packages_are_found_and_run(plugins: Plugins) -> None:
    plugins.add("grow", "fake_training", COMMAND.format(top="", help="Grow a model.", body=""))
    assert plugins.run("grow", "--size", "3").stdout == "ran with 3\n"
    listing = plugins.run("--help").stdout
    assert "Grow a model." in listing
    assert "Ask a running service for a classifier head." in listing


def test_running_one_command_imports_no_other(plugins: Plugins) -> None:
    plugins.add("loud", "fake_service", COMMAND.format(top="print('loud is imported')", help="Loud.", body=""))
    plugins.add("grow", "fake_training", COMMAND.format(top="", help="Grow a model.", body=""))
    assert plugins.run("grow").stdout == "ran with 1\n"


@pytest.mark.parametrize("where", ["top", "body"])
def test_missing_extra_is_explained(plugins: Plugins, where: str) -> None:
    parts = {"top": "", "body": "", where: "import a_library_nobody_has"}
    plugins.add("grow", "fake_training", COMMAND.format(help="Grow a model.", **parts))
    result = plugins.run("grow", "--size", "3")
    assert result.returncode == 1
    assert result.stderr == (
        "error: `t2w grow` needs 'a_library_nobody_has', which is not installed.\n"
        "Install it with: pip install 'text2weight[training]'\n"
    )
    listing = plugins.run("--help")
    assert listing.returncode == 0
    assert "grow" in listing.stdout
    line = next(line for line in listing.stdout.splitlines() if " grow " in line)
    assert ("Needs the extra 'training'" if where == "top" else "Grow a model.") in line


def test_missing_module_of_a_package_without_extra_is_a_fault(plugins: Plugins) -> None:
    plugins.add("grow", "other_package", COMMAND.format(top="", help="Grow.", body="import a_library_nobody_has"))
    result = plugins.run("grow")
    assert result.returncode == 1
    assert "ModuleNotFoundError" in result.stderr

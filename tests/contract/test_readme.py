"""The documentation keeps its word.

The rules, for README, CONTRIBUTING, CHANGELOG, docs/ and models/:
every `make X` and `t2w X` named exists, with every option shown; shell, Python and JSON blocks parse;
Python blocks name only things our packages have; relative links and their anchors resolve.
A shell or Python block right after a line `<!-- run -->` is also executed, in page order, in one
folder per page, against a service with the bundled model: 127.0.0.1:8000 becomes its real address,
and the variable T2W_URL gives it to the commands.
"""

import ast
import importlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import httpx
import pytest
import typer.main

from tests.contract.markdown import PAGES, ROOT, SHELL, Block, anchors, blocks, commands, links
from tests.patience import PATIENCE_S, PROCESS_S

OUR_PACKAGES = ("text2weight", "text2weight_service", "text2weight_training", "text2weight_client")
DOCUMENTED_PORT = re.compile(r"\b(127\.0\.0\.1|localhost):8000\b")
BIN = Path(sys.executable).parent
ALL_BLOCKS = [block for page in PAGES for block in blocks(page)]
RUN_PAGES = sorted({block.page for block in ALL_BLOCKS if block.run})

each_page = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


@cache
def command_options() -> dict[str, set[str]]:
    """Options of every `t2w` subcommand, from the declared entry points."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["text2weight.commands"]
    options = {}
    for name, target in declared.items():
        module, _, attribute = target.partition(":")
        command = typer.main.get_command(getattr(importlib.import_module(module), attribute))
        named = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        options[name] = {option for option in named if option.startswith("-")} | {"--help"}
    return options


def split_commands(line: str) -> list[list[str]]:
    """Words of each simple command of a shell line; `a | b && c` gives three."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    lexer.commenters = ""  # FILE#TABLE is one word
    found: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("|&;()<>"):
            found.append([])
        else:
            found[-1].append(word)
    return [words for words in found if words]


def without_prefix(words: list[str]) -> list[str]:
    """Drop leading `NAME=value` settings and the path of the program."""
    while words and re.fullmatch(r"\w+=.*", words[0], flags=re.DOTALL):
        words = words[1:]
    return [Path(words[0]).name, *words[1:]] if words else []


def commands_of(page: Path, program: str) -> list[list[str]]:
    """Arguments of every call of a program that the page shows."""
    calls = []
    for line in commands(page):
        if program not in line:
            continue
        try:
            split = split_commands(line)
        except ValueError:  # inline code that is not a shell command, with an odd quote
            continue
        calls += [words[1:] for words in map(without_prefix, split) if words[:1] == [program]]
    return calls


def test_rules_see_commands_as_a_reader_does() -> None:
    line = "T2W_DEVICE=cpu .venv/bin/t2w train 'two words' --text a.safetensors#table && make test | tee log"
    assert [without_prefix(words) for words in split_commands(line)] == [
        ["t2w", "train", "two words", "--text", "a.safetensors#table"],
        ["make", "test"],
        ["tee", "log"],
    ]


@each_page
def test_make_targets_exist(page: Path) -> None:
    for arguments in commands_of(page, "make"):
        targets = [word for word in arguments if not word.startswith("-") and "=" not in word and word != "..."]
        assert set(targets) <= make_targets(), f"make {' '.join(arguments)}"


@each_page
def test_t2w_subcommands_and_options_exist(page: Path) -> None:
    for arguments in commands_of(page, "t2w"):
        shown = f"t2w {' '.join(arguments)}"
        if not arguments or arguments[0].startswith("-"):
            assert set(arguments) <= {"--help", "--version"}, shown
            continue
        assert arguments[0] in command_options(), shown
        named = {word.partition("=")[0] for word in arguments[1:] if re.match(r"--?[A-Za-z]", word)}
        assert named <= command_options()[arguments[0]], shown


@each_page
def test_relative_links_resolve(page: Path) -> None:
    for link in links(page):
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


@each_page
def test_code_blocks_parse(page: Path) -> None:
    for block in blocks(page):
        if block.language in SHELL:
            done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
            assert done.returncode == 0, f"{block}: {done.stderr}"
        elif block.language == "python":
            check_python(block)
        elif block.language == "json":
            json.loads(block.text)


def check_python(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text, filename=str(block))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in OUR_PACKAGES:
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                assert hasattr(module, alias.name), f"{block}: {node.module} has no {alias.name}"


def test_readme_has_blocks_that_are_run() -> None:
    assert ROOT / "README.md" in RUN_PAGES, "mark the README's first commands with a line <!-- run -->"


@pytest.fixture(scope="module")
def service_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A real service with the bundled model and embedded defaults."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    log_path = tmp_path_factory.mktemp("service") / "log"
    with log_path.open("w") as log:
        command = [BIN / "t2w", "serve", "--port", str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_until_ready(process, port, log_path)
            yield port
        finally:
            process.terminate()
            process.wait(timeout=PATIENCE_S)


def wait_until_ready(process: "subprocess.Popen[bytes]", port: int, log_path: Path) -> None:
    deadline = time.monotonic() + PROCESS_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log_path.read_text()
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health/ready", timeout=PATIENCE_S).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    pytest.fail(f"the service was not ready within {PROCESS_S:g} s:\n{log_path.read_text()}")


@pytest.mark.parametrize("page", RUN_PAGES, ids=[str(page.relative_to(ROOT)) for page in RUN_PAGES])
def test_marked_blocks_run(page: Path, service_port: int, tmp_path: Path) -> None:
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    environment["T2W_URL"] = f"http://127.0.0.1:{service_port}"
    for block in blocks(page):
        if not block.run:
            continue
        text = DOCUMENTED_PORT.sub(rf"\1:{service_port}", block.text)
        assert block.language in SHELL | {"python"}, f"{block}: only shell and Python blocks can be run"
        if block.language in SHELL:
            program = ["bash", "-euo", "pipefail"]
        else:
            program = [sys.executable, "-"]
        done = subprocess.run(
            program, input=text, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PROCESS_S
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"

"""Imports run one way: training -> core <- service, and the client stands alone."""

import ast
import importlib.metadata
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.patience import PROCESS_S

ROOT = Path(__file__).resolve().parents[2]

ROOMS = {
    "text2weight": ROOT / "core/text2weight",
    "text2weight_service": ROOT / "service/text2weight_service",
    "text2weight_training": ROOT / "training/text2weight_training",
    "text2weight_client": ROOT / "clients/text2weight_client",
}
MAY_IMPORT_ROOM = {
    "text2weight": {"text2weight"},
    "text2weight_service": {"text2weight_service", "text2weight"},
    "text2weight_training": {"text2weight_training", "text2weight"},
    "text2weight_client": {"text2weight_client"},
}
# Installed with every room, because the client needs them, but no business of the model library.
NOT_FOR_CORE = {"httpx", "httpx-sse", "rich", "tenacity", "typer"}
MODULES = [(room, path) for room, folder in ROOMS.items() for path in sorted(folder.rglob("*.py"))]


@dataclass(frozen=True)
class Import:
    """One imported module name, where it stands, and whether it runs when the file is imported."""

    module: str
    line: int
    at_import_time: bool


def imports_of(source: str) -> Iterator[Import]:
    """Absolute imports of a file; `from a import b` counts as `a.b`, which may be a module."""
    yield from _walk(ast.parse(source), at_import_time=True)


def _walk(node: ast.AST, *, at_import_time: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, node.lineno, at_import_time)
    elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        for alias in node.names:
            yield Import(f"{node.module}.{alias.name}", node.lineno, at_import_time)
    elif isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
        for child in node.body:
            yield from _walk(child, at_import_time=False)
        for child in node.orelse:
            yield from _walk(child, at_import_time=at_import_time)
    else:
        in_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from _walk(child, at_import_time=at_import_time and not in_function)


def declared_distributions(*extras: str) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for extra in extras for line in project["optional-dependencies"][extra]]
    return {canonicalize_name(Requirement(line).name) for line in lines}


def allowed_distributions(room: str) -> set[str]:
    """What a room may import: the base install and its own extra. The core lives in both extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    service, training = declared_distributions("service"), declared_distributions("training")
    distributed = declared_distributions("distributed")
    return {
        "text2weight": (base | (service & training)) - NOT_FOR_CORE,
        "text2weight_service": base | service | declared_distributions("ray", "tracing"),
        "text2weight_training": base | training | distributed,
        "text2weight_client": base | {"torch"},  # torch: inside functions only, tested below
    }[room]


def distributions_by_module() -> dict[str, set[str]]:
    mapping = importlib.metadata.packages_distributions()
    return {module: {canonicalize_name(name) for name in names} for module, names in mapping.items()}


def loaded_modules(statement: str) -> set[str]:
    """Top-level names in sys.modules after running a statement in a fresh interpreter."""
    code = f"{statement}\nimport sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PROCESS_S)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_import_scanner_sees_every_kind_of_import() -> None:
    source = """
import a.b
from c import d
if TYPE_CHECKING:
    import e
def f():
    import g
class H:
    import i
try:
    import j
except ImportError:
    pass
from . import own
"""
    found = {(item.module, item.at_import_time) for item in imports_of(source)}
    assert found == {("a.b", True), ("c.d", True), ("e", False), ("g", False), ("i", True), ("j", True)}


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_code(room: str) -> None:
    assert (ROOMS[room] / "__init__.py").is_file()


@pytest.mark.parametrize(("room", "path"), MODULES, ids=[str(path.relative_to(ROOT)) for _, path in MODULES])
def test_module_imports_only_what_its_room_may(room: str, path: Path) -> None:
    allowed, by_module = allowed_distributions(room), distributions_by_module()
    for item in imports_of(path.read_text(encoding="utf-8")):
        top = item.module.partition(".")[0]
        where = f"{path.relative_to(ROOT)}:{item.line} imports {item.module}"
        if top in ROOMS:
            assert top in MAY_IMPORT_ROOM[room], f"{where}; {room} may import only {sorted(MAY_IMPORT_ROOM[room])}"
        elif top not in sys.stdlib_module_names:
            provided_by = by_module.get(top, set())
            assert provided_by & allowed, f"{where}; {room} may import only {sorted(allowed)}"
        if room == "text2weight":
            assert not item.module.startswith("torchvision.datasets"), f"{where}; data sets belong to training"
        if room == "text2weight_client" and top == "torch":
            assert not item.at_import_time, f"{where}; the client imports torch inside functions only"


def test_importing_the_client_loads_nothing_heavy() -> None:
    loaded = loaded_modules("import text2weight_client")
    assert "text2weight_client" in loaded
    assert not loaded & {"torch", "torchvision", "open_clip", "fastapi", "scipy", "text2weight"}


def test_command_modules_load_no_torch() -> None:
    """`t2w --help` imports every command module; none may cost seconds."""
    commands = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["text2weight.commands"]
    modules = sorted({target.partition(":")[0] for target in commands.values()})
    loaded = loaded_modules("import " + ", ".join(modules))
    assert not loaded & {"torch", "torchvision", "open_clip", "fastapi", "sklearn", "matplotlib"}


def test_importing_the_service_loads_no_training_code() -> None:
    loaded = loaded_modules("import text2weight_service.cli, text2weight_service.openapi")
    assert "text2weight_service" in loaded
    assert not loaded & {"text2weight_training", "text2weight_client", "accelerate", "sklearn", "matplotlib"}

"""Nothing that this project reads can run code: no pickle, and no library's way around that."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    path
    for folder in ("core", "service", "training", "clients", "bench", "demo", "examples", "deploy")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
# Modules that read or write pickles or code objects.
FORBIDDEN_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
# Functions that run what they are given.
FORBIDDEN_CALLS = {"eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
# The rooms that meet files of strangers do not even use torch's restricted unpickler.
STRICT = {ROOT / "core", ROOT / "service", ROOT / "clients"}


def problems(source: str, *, strict: bool) -> list[str]:
    """What is wrong with a file, in words."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found += [f"line {node.lineno} imports {name}" for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            restricted = arguments.get("weights_only") == "True" and not strict
            if called in FORBIDDEN_CALLS or (called.endswith("torch.load") and not restricted):
                found.append(f"line {node.lineno} calls {called}")
            if (
                arguments.get("allow_pickle", "False") != "False"
                or arguments.get("trust_remote_code", "False") != "False"
            ):
                found.append(f"line {node.lineno} lets {called} run code")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickle(path: Path) -> None:
    strict = any(path.is_relative_to(room) for room in STRICT)
    assert problems(path.read_text(encoding="utf-8"), strict=strict) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "import joblib.memory",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "eval('1')",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_test_finds_it(source: str) -> None:
    assert problems(source, strict=False)


def test_every_room_is_looked_at() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} >= {"core", "service", "training", "clients"}
    assert problems("model.eval()\ntorch.load(path, weights_only=True)", strict=False) == []
    assert problems("torch.load(path, weights_only=True)", strict=True) != []

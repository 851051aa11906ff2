"""Properties of the checkout as a whole: sizes, versions, pins, and what must not be in it."""

import ast
import os
import re
import subprocess
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NOT_SOURCE = {".git", ".venv", "out", "runs", "dist", "__pycache__"}
PACKAGES = ("core/text2weight", "service/text2weight_service", "training/text2weight_training")
PACKAGES += ("clients/text2weight_client",)

MAX_FILE_BYTES = 30 * 2**20
MAX_REFERENCE_BYTES = 80 * 2**20
MAX_PYTHON_LINES = 500


def repository_files() -> list[Path]:
    """Every file git tracks or would track; without git, every file outside build and output folders."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
        paths = [ROOT / os.fsdecode(name) for name in listed.split(b"\0") if name]
    else:
        paths = [path for path in ROOT.rglob("*") if not NOT_SOURCE & set(path.relative_to(ROOT).parts)]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def text_files() -> dict[Path, str]:
    texts = {}
    for path in repository_files():
        content = path.read_bytes()
        if b"\0" not in content[:8192] and path.suffix != ".safetensors":
            texts[path] = content.decode("utf-8")
    return texts


def constraint_pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines)


def test_no_file_is_too_large() -> None:
    sizes = {str(path.relative_to(ROOT)): path.stat().st_size for path in repository_files()}
    assert "pyproject.toml" in sizes
    assert {name: size for name, size in sizes.items() if size > MAX_FILE_BYTES} == {}


def test_reference_model_is_small_enough_to_clone() -> None:
    total = sum(path.stat().st_size for path in (ROOT / "models/reference").rglob("*") if path.is_file())
    assert total <= MAX_REFERENCE_BYTES


def test_no_python_file_is_too_long() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(text.splitlines())
        for path, text in text_files().items()
        if path.suffix == ".py"
    }
    assert lengths
    assert {name: lines for name, lines in lengths.items() if lines > MAX_PYTHON_LINES} == {}


def test_no_file_names_a_package_registry() -> None:
    """Where packages come from is the machine's business; a pinned host breaks mirrors and air-gapped use."""
    # Put together from halves, so that this file does not find itself.
    hosts = ["pypi" + ".org", "python" + "hosted.org", "download.pytorch" + ".org/whl", "--extra-" + "index-url"]
    hosts += ["--index" + "-url", "--find" + "-links"]
    found = [
        (str(path.relative_to(ROOT)), host) for path, text in text_files().items() for host in hosts if host in text
    ]
    assert found == []


def test_no_file_names_this_checkout() -> None:
    if len(ROOT.parts) <= 2:
        return  # a root such as /app is a likely word in any Dockerfile
    assert [str(path.relative_to(ROOT)) for path, text in text_files().items() if f"{ROOT}/" in text] == []


def test_versions_agree() -> None:
    version = PYPROJECT["project"]["version"]
    for package in PACKAGES:
        tree = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))
        for node in tree.body:
            names = [ast.unparse(target) for target in node.targets] if isinstance(node, ast.Assign) else []
            if "__version__" in names and isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                assert node.value.value == version, f"{package} says {node.value.value}, pyproject.toml says {version}"
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_installed_commands_are_the_declared_ones() -> None:
    """A stale editable install hides new commands; `make install` brings it up to date."""
    declared = PYPROJECT["project"]["entry-points"]["text2weight.commands"]
    installed = {point.name: point.value for point in entry_points(group="text2weight.commands")}
    assert installed == declared


def test_constraints_pin_every_direct_dependency() -> None:
    project = PYPROJECT["project"]
    lines = [*project["dependencies"], *PYPROJECT["dependency-groups"]["dev"], *PYPROJECT["build-system"]["requires"]]
    for extra in project["optional-dependencies"].values():
        lines += extra
    pins = constraint_pins()
    for line in lines:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        assert name in pins, f"constraints.txt does not pin {name}"
        assert requirement.specifier.contains(pins[name]), (
            f"constraints.txt pins {name}=={pins[name]}, not {requirement}"
        )


def test_constraints_are_plain_pins() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line)] == []
    names = [line.partition("==")[0] for line in lines]
    assert names == sorted(set(names))


def test_continuous_integration_runs_the_developers_targets() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert "make lint" in lines
    assert "make test" in lines

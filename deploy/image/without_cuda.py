"""Let torch's CUDA build load on a machine without NVIDIA's libraries: 3 GB less in an image for CPUs.

The build of torch on the public package index is linked against NVIDIA's libraries and does not load without
them. A worker on a CPU never calls them, so stand-ins of a few kB satisfy the loader: each of their functions
answers 100, which is `cudaErrorNoDevice`, and torch reports that there is no CUDA device. Only functions that
torch's own files ask for are made. A build of torch for CPUs asks for none, and is left as it is.

Needs gcc, nm and readelf. Usage: without_cuda.py SITE_PACKAGES
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

_NVIDIA_LIBRARY = re.compile(r"lib(cu|nv|nccl)")
_NVIDIA_FUNCTION = re.compile(r"(__)?(cu|nccl|nv)")
_DRIVER = "libcuda.so.1"  # torch opens it by itself, and copes without it
_NO_DEVICE = 100


def output(*command: str | Path) -> str:
    """Run a command and return what it prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def missing_functions(files: list[Path], present: set[str]) -> dict[str, dict[str, set[str]]]:
    """Functions that the files take from absent libraries: library -> symbol version -> names.

    Version "" holds names whose library the files do not tell; the loader takes them from any.
    """
    functions: dict[str, dict[str, set[str]]] = {}
    for file in files:
        for name in re.findall(r"\(NEEDED\).*\[(.+)\]", output("readelf", "-dW", file)):
            if _NVIDIA_LIBRARY.match(name) and name != _DRIVER and name not in present:
                functions.setdefault(name, defaultdict(set))
    if not functions:
        return {}
    defined = {line.split()[-1].partition("@")[0] for line in _symbols(files, "--defined-only")}
    libraries = {version: name for file in files for version, name in _versions(file) if name in functions}
    for line in _symbols(files, "--undefined-only"):
        kind, symbol = line.split()[-2:]
        name, _, version = symbol.partition("@")
        if kind != "U" or name in defined:
            continue
        if version in libraries:
            functions[libraries[version]][version].add(name)
        elif not version and _NVIDIA_FUNCTION.match(name):
            functions[min(functions)][""].add(name)
    return functions


def _symbols(files: list[Path], which: str) -> list[str]:
    return [line for file in files for line in output("nm", "-D", which, file).splitlines()]


def _versions(file: Path) -> list[tuple[str, str]]:
    """Pairs of symbol version and library that a file needs."""
    pairs, library = [], ""
    for line in output("readelf", "-VW", file).splitlines():
        if found := re.search(r"File: (\S+)", line):
            library = found[1]
        elif found := re.search(r"Name: (\S+)\s+Flags", line):
            pairs.append((found[1], library))
    return pairs


def build_stand_in(target: Path, versions: dict[str, set[str]]) -> None:
    """Compile one library in which every function returns "no device"."""
    names = sorted(set().union(*versions.values()))
    with tempfile.TemporaryDirectory() as folder:
        source, script = Path(folder) / "source.c", Path(folder) / "script.map"
        source.write_text("".join(f"int {name}(void) {{ return {_NO_DEVICE}; }}\n" for name in names))
        nodes = {version: "; ".join(sorted(own)) for version, own in versions.items() if version}
        script.write_text("".join(f"{version} {{ {own}; }};\n" for version, own in sorted(nodes.items())))
        options = [f"-Wl,-soname,{target.name}", "-Wl,--build-id=none", "-Wl,-s"]
        options += [f"-Wl,--version-script={script}"] if nodes else []
        output("gcc", "-shared", "-fPIC", "-fno-builtin", "-w", *options, "-o", target, source)


def main(site_packages: Path) -> None:
    """Put the stand-ins beside torch's own libraries, where it looks first."""
    libraries = site_packages / "torch" / "lib"
    files = [*libraries.glob("*.so*"), *(site_packages / "torch").glob("*.so"), *site_packages.glob("torchvision/*.so")]
    present = {file.name for file in [*files, *site_packages.glob("torchvision.libs/*.so*")]}
    functions = missing_functions(sorted(files), present)
    for name, versions in sorted(functions.items()):
        build_stand_in(libraries / name, versions)
        print(f"{name}: stand-in with {sum(map(len, versions.values()))} functions")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

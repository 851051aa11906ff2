"""Class names to an embedding table with any text encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from text2weight.condition import normalise_class_names
from text2weight.descriptions import embed_descriptions as embed_texts
from text2weight.descriptions import match_descriptions, read_descriptions
from text2weight.text_encoder import (
    EmbeddingTable,
    TextEncoder,
    read_embedding_table,
    write_embedding_tables,
)
from text2weight_training.files import TrainingDataError, atomic_path


def collect_names(values: Sequence[str]) -> tuple[str, ...]:
    """Class names from arguments, each a name or a text file with one name per line.

    Blank lines are skipped; a name that comes twice (letter case aside) is kept once.

    Raises:
        TrainingDataError: no name, or a file that is not UTF-8 text.
        InvalidInputError: a name that cannot be a class name.
    """
    names: dict[str, str] = {}
    for value in values:
        for name in _lines(Path(value)) if Path(value).is_file() else [value]:
            names.setdefault(" ".join(name.replace("_", " ").split()).casefold(), name)
    if not names:
        raise TrainingDataError(
            "no class name to embed: give --names, with names or a file with one per line, or --descriptions"
        )
    return normalise_class_names(list(names.values()), minimum=1, maximum=len(names))


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise TrainingDataError(f"{path} is not UTF-8 text with one class name per line: {error}") from error


def embed(names: Sequence[str], template: str, encoder: TextEncoder) -> EmbeddingTable:
    """Embed every name under the template.

    Args:
        names: n class names.
        template: prompt with exactly one `{}`, e.g. "a {}".
        encoder: the text encoder.

    Raises:
        TrainingDataError: the template has no `{}` or more than one.
    """
    if template.count("{}") != 1 or template.replace("{}", "").count("{") or template.replace("{}", "").count("}"):
        raise TrainingDataError(f"template {template!r} must hold exactly one {{}} for the class name, like 'a {{}}'")
    vectors = encoder.encode([template.format(name) for name in names])  # (n, D)
    return EmbeddingTable(template, tuple(names), vectors, encoder=encoder.name)


def collect_descriptions(path: Path, names: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
    """The descriptions of n classes from a JSON file, see `read_descriptions`.

    Args:
        path: the file.
        names: classes that it must describe, these and no others; empty for all that it describes.

    Raises:
        InvalidInputError: the file cannot be used, lacks a class or describes others.
    """
    described = read_descriptions(path)
    if not names:
        return described
    return dict(zip(names, match_descriptions(described, names), strict=True))


def embed_descriptions(described: Mapping[str, tuple[str, ...]], encoder: TextEncoder) -> EmbeddingTable:
    """Embed descriptions of n classes, those of one class averaged.

    Returns:
        a table that says so: its template is "{}", and it holds the descriptions.
    """
    texts = tuple(described.values())
    vectors = embed_texts(texts, encoder)  # (n, D)
    return EmbeddingTable("{}", tuple(described), vectors, descriptions=texts, encoder=encoder.name)


def save_table(path: Path, table_name: str, table: EmbeddingTable) -> None:
    """Add or replace one table of a file; the others stay, and the file changes in one step.

    Raises:
        TrainingDataError: the file exists and is not an embedding table file.
    """
    tables = {name: read_embedding_table(f"{path}#{name}") for name in _table_names(path)}
    tables[table_name] = table
    with atomic_path(path) as temporary:
        write_embedding_tables(temporary, tables)


def _table_names(path: Path) -> list[str]:
    if not path.exists():
        return []
    try:
        with safe_open(path, "pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise TrainingDataError(
            f"{path} exists and is no embedding table file ({error}): choose another name"
        ) from error

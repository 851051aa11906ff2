"""Texts to L2-normalised embeddings: open_clip text towers, and tables of precomputed vectors.

Letters: n texts, D embedding size.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from text2weight.condition import plain_name
from text2weight.errors import CheckpointError, InvalidInputError

ENCODE_BATCH = 256
VOCABULARY = "vocabulary.json"
TEMPLATE_PATTERN = r"^[^{}]*\{\}[^{}]*$"


@dataclass(frozen=True)
class Vocabulary:
    """What a text encoder of limited reach knows: names, each under any of the templates.

    Attributes:
        templates: prompts with one `{}` for the name.
        names: class names; of several synonyms the first alone is known, too.
    """

    templates: tuple[str, ...]
    names: tuple[str, ...]

    @cached_property
    def _keys(self) -> frozenset[str]:
        return frozenset(plain_name(form).casefold() for name in self.names for form in (name, name.split(",")[0]))

    def __contains__(self, name: str) -> bool:
        """Whether a class name is known; letter case does not count."""
        return plain_name(name).casefold() in self._keys


@runtime_checkable
class TextEncoder(Protocol):
    """Anything that turns texts into embeddings.

    Attributes:
        name: what a person calls it, for metadata.
        fingerprint: identifies the exact weights, for caches and checks.
        embedding_dim: D.
        vocabulary: what it was trained on or holds, where that is a list of names; None for a model of any text.
    """

    name: str
    fingerprint: str
    embedding_dim: int
    vocabulary: Vocabulary | None

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Embed n texts: (n, D) fp32 on the CPU, each row of length 1."""
        ...


class OpenClipTextEncoder:
    """The text tower of an open_clip model; its image tower is dropped after loading."""

    def __init__(
        self, model: nn.Module, tokenizer: object, name: str, device: str, vocabulary: Vocabulary | None = None
    ) -> None:
        model.visual = nn.Identity()
        self._model = model.to(device).eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._device = device
        self.name = name
        self.vocabulary = vocabulary
        self.fingerprint = _fingerprint(model)
        self.embedding_dim = int(self.encode(["a"]).shape[1])

    @classmethod
    def from_pretrained(cls, architecture: str, tag: str, device: str = "cpu") -> OpenClipTextEncoder:
        """Load by open_clip's names, e.g. ("ViT-B-32", "openai"); downloads on first use.

        Raises:
            CheckpointError: unknown architecture or tag, or the weights cannot be had.
        """
        return cls._load(architecture, tag, f"open_clip:{architecture}/{tag}", device)

    @classmethod
    def from_directory(cls, path: str | Path, device: str = "cpu") -> OpenClipTextEncoder:
        """Load a folder with open_clip_config.json and open_clip_model.safetensors, and perhaps vocabulary.json.

        Raises:
            CheckpointError: the folder is missing, damaged or not such a folder.
        """
        # Weights in any other file would be unpickled; without any, open_clip goes on with random ones.
        for name in ("open_clip_config.json", "open_clip_model.safetensors"):
            if not (Path(path) / name).is_file():
                raise CheckpointError(f"text encoder folder {path} has no {name}")
        vocabulary = read_vocabulary(Path(path) / VOCABULARY)
        return cls._load(f"local-dir:{path}", None, f"open_clip:{Path(path).name}", device, vocabulary)

    @classmethod
    def _load(
        cls, architecture: str, tag: str | None, name: str, device: str, vocabulary: Vocabulary | None = None
    ) -> OpenClipTextEncoder:
        import open_clip

        try:
            model = create_open_clip(architecture, tag)
            tokenizer = open_clip.get_tokenizer(architecture)
        except Exception as error:  # open_clip raises many kinds, from its own to the hub's
            raise CheckpointError(f"text encoder {name} cannot be loaded: {error}") from error
        return cls(model, tokenizer, name, device, vocabulary)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Embed n texts: (n, D) fp32 on the CPU, each row of length 1."""
        rows = []
        with torch.inference_mode():
            for start in range(0, len(texts), ENCODE_BATCH):
                tokens = self._tokenizer(list(texts[start : start + ENCODE_BATCH]))  # type: ignore[operator]
                rows.append(self._model.encode_text(tokens.to(self._device)).float().cpu())  # type: ignore[operator]
        return F.normalize(torch.cat(rows), dim=-1)


def create_open_clip(architecture: str, tag: str | None) -> nn.Module:
    """Load a whole open_clip model, both towers, on the CPU; its weights are downloaded on first use.

    Args:
        architecture: open_clip's name, such as "ViT-B-32", or "local-dir:PATH".
        tag: which weights, such as "openai"; None for a local folder.

    Raises:
        Exception: it cannot be loaded; open_clip raises many kinds, from its own to the hub's.
    """
    import open_clip

    weights = {} if tag is None else open_clip.get_pretrained_cfg(architecture, tag)
    model: nn.Module = open_clip.create_model(
        architecture,
        pretrained=tag,
        device="cpu",
        require_pretrained=True,
        # OpenAI's weights among others were trained with another activation than the architecture of the name has.
        force_quick_gelu=bool(weights.get("quick_gelu")),
    )
    return model


def read_vocabulary(path: Path) -> Vocabulary | None:
    """Read what `t2w distill-text` wrote beside a text tower; None where there is no such file.

    Raises:
        CheckpointError: it is damaged.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        lists = [content[key] for key in ("templates", "names")]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(f"vocabulary {path} cannot be read: {error!r}") from error
    if not all(isinstance(value, list) and all(isinstance(text, str) for text in value) for value in lists):
        raise CheckpointError(f"vocabulary {path}: templates and names must be lists of texts")
    templates, names = map(tuple, lists)
    return Vocabulary(templates, names)


def _fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(_bytes_of(tensor))
    # The same weights give other embeddings with another activation.
    if any(type(module).__name__ == "QuickGELU" for module in model.modules()):
        digest.update(b"QuickGELU")
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


@dataclass(frozen=True)
class EmbeddingTable:
    """Precomputed embeddings of names under one template.

    Attributes:
        template: prompt with one `{}` for the name, e.g. "a {}".
        names: class names, in row order.
        embeddings: (n, D) fp32, L2-normalised.
        fingerprint: of the table as it lies in its file, since the last bits of normalised values differ
            between machines; "" for one that was not read from a file.
        descriptions: of every name, where the embeddings are those of descriptions and the template is "{}".
        encoder: name of the text encoder that made the embeddings; "" where that is not recorded.
    """

    template: str
    names: tuple[str, ...]
    embeddings: Tensor
    fingerprint: str = ""
    descriptions: tuple[tuple[str, ...], ...] = ()
    encoder: str = ""

    @property
    def rows(self) -> dict[str, int]:
        """Row of every name, by its `plain_name` without case and by that of its first synonym (before a comma)."""
        index: dict[str, int] = {}
        for row, name in enumerate(self.names):
            index.setdefault(plain_name(name).casefold(), row)
        for row, name in enumerate(self.names):
            index.setdefault(plain_name(name.split(",")[0]).casefold(), row)
        return index


def read_embedding_table(source: str) -> EmbeddingTable:
    """Read "FILE#TABLE"; the table's name may be left out where the file holds only one.

    Raises:
        CheckpointError: no such file or table, or its contents do not fit together.
    """
    path, _, table = source.partition("#")
    try:
        with safe_open(path, "pt") as file:
            tables = sorted(file.keys())
            if not table and len(tables) == 1:
                table = tables[0]
            if table not in tables:
                raise CheckpointError(f"{path} has no table {table!r}: it holds {', '.join(tables)}")
            description = json.loads((file.metadata() or {}).get(table, "{}"))
            stored: Tensor = file.get_tensor(table)  # (n, D)
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(f"embedding table {source} cannot be read: {error}") from error
    names, template = _check_description(source, description)
    described = _check_descriptions(source, description.get("descriptions", []), len(names))
    encoder = description.get("encoder", "")
    if not isinstance(encoder, str):
        raise CheckpointError(f"embedding table {source} has encoder {encoder!r}: the text encoder's name is a text")
    embeddings = stored.float()  # (n, D)
    if embeddings.ndim != 2 or len(names) != len(embeddings):
        raise CheckpointError(f"embedding table {source} has {len(names)} names for a {tuple(embeddings.shape)} tensor")
    if not bool((torch.isfinite(embeddings).all(1) & embeddings.any(1)).all()):
        raise CheckpointError(f"embedding table {source} has rows that are zero or not finite")
    fingerprint = _table_fingerprint(template, names, stored, described)
    return EmbeddingTable(template, names, F.normalize(embeddings, dim=-1), fingerprint, described, encoder)


def _check_description(source: str, description: object) -> tuple[tuple[str, ...], str]:
    names = description.get("names") if isinstance(description, dict) else None
    template = description.get("template") if isinstance(description, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"embedding table {source} lacks its list of names in the file's metadata")
    if not isinstance(template, str) or not re.fullmatch(TEMPLATE_PATTERN, template):
        raise CheckpointError(f"embedding table {source} has template {template!r}: one {{}} must stand for the name")
    return tuple(names), template


def _check_descriptions(source: str, value: object, count: int) -> tuple[tuple[str, ...], ...]:
    rows: list[Any] = value if isinstance(value, list) else [value]
    if rows and len(rows) != count:
        raise CheckpointError(f"embedding table {source} has {len(rows)} descriptions for {count} names")
    if not all(isinstance(row, list) and row and all(isinstance(text, str) for text in row) for row in rows):
        raise CheckpointError(f"embedding table {source}: its descriptions must be a list of texts for each name")
    return tuple(tuple(row) for row in rows)


def _table_fingerprint(
    template: str, names: Sequence[str], embeddings: Tensor, descriptions: Sequence[Sequence[str]] = ()
) -> str:
    described = [descriptions] if descriptions else []
    digest = hashlib.sha256(json.dumps([template, names, *described]).encode())
    digest.update(_bytes_of(embeddings))
    return digest.hexdigest()


def write_embedding_tables(path: str | Path, tables: Mapping[str, EmbeddingTable]) -> None:
    """Write tables to one safetensors file: a tensor each; names, template and the like as JSON metadata."""
    tensors = {name: table.embeddings.contiguous() for name, table in tables.items()}
    metadata = {
        name: json.dumps(
            {"template": table.template, "names": list(table.names)}
            | ({"descriptions": table.descriptions} if table.descriptions else {})
            | ({"encoder": table.encoder} if table.encoder else {})
        )
        for name, table in tables.items()
    }
    temporary = Path(f"{path}.tmp")
    save_file(tensors, temporary, metadata=metadata)
    temporary.replace(path)


def copy_embedding_table(source: str, path: Path) -> str:
    """Copy one table, as it is stored, into a file of its own.

    Args:
        source: "FILE#TABLE", as for `read_embedding_table`.
        path: file to write.

    Returns:
        the table's name; an encoder of the copy has the same fingerprint as one of the original.

    Raises:
        CheckpointError: see `read_embedding_table`.
    """
    read_embedding_table(source)
    file_name, _, table = source.partition("#")
    with safe_open(file_name, "pt") as file:
        table = table or next(iter(file.keys()))
        save_file({table: file.get_tensor(table)}, path, metadata={table: (file.metadata() or {})[table]})
    return table


class TableTextEncoder:
    """Embeddings looked up in a table, for use without any text model."""

    def __init__(self, table: EmbeddingTable, name: str) -> None:
        self._table = table
        self._rows = {table.template.format(key): row for key, row in table.rows.items()}
        self.name = name
        self.vocabulary: Vocabulary | None = Vocabulary((table.template,), table.names)
        self.embedding_dim = int(table.embeddings.shape[1])
        self.fingerprint = table.fingerprint or _table_fingerprint(
            table.template, table.names, table.embeddings, table.descriptions
        )

    @classmethod
    def from_file(cls, path: str | Path, table: str) -> TableTextEncoder:
        """Read one table of a file.

        Raises:
            CheckpointError: see `read_embedding_table`.
        """
        return cls(read_embedding_table(f"{path}#{table}"), f"table:{table}")

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Look n prompts up: (n, D) fp32, each row of length 1.

        Raises:
            InvalidInputError: field "classes"; a prompt is not in the table.
        """
        missing = [text for text in texts if self._key(text) not in self._rows]
        if missing:
            raise InvalidInputError("classes", f"no embedding for {missing[:5]}: choose among the names of {self.name}")
        return self._table.embeddings[[self._rows[self._key(text)] for text in texts]]

    def _key(self, text: str) -> str:
        prefix, _, suffix = self._table.template.partition("{}")
        middle = text.removeprefix(prefix).removesuffix(suffix)
        return self._table.template.format(plain_name(middle).casefold())


def load_text_encoder(source: str, device: str = "cpu") -> TextEncoder:
    """Load "open_clip:ARCH/TAG", "dir:PATH" or "table:FILE#TABLE".

    Raises:
        CheckpointError: another form, or it cannot be loaded.
    """
    kind, _, rest = source.partition(":")
    if kind == "open_clip" and "/" in rest:
        architecture, _, tag = rest.rpartition("/")
        return OpenClipTextEncoder.from_pretrained(architecture, tag, device)
    if kind == "dir":
        return OpenClipTextEncoder.from_directory(rest, device)
    if kind == "table":
        path, _, table = rest.partition("#")
        return TableTextEncoder.from_file(path, table)
    raise CheckpointError(f"text encoder {source!r}: give open_clip:ARCH/TAG, dir:PATH or table:FILE#TABLE")

"""Descriptions of classes in natural language (T2W-NL, arXiv 2508.13633): reading, matching and embedding them.

They are what the denoiser reads in place of the embeddings of the class names. Letters: K classes, D embedding size.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from text2weight.condition import normalise_class_names
from text2weight.errors import InvalidInputError
from text2weight.text_encoder import TextEncoder

MAX_DESCRIPTION_LENGTH = 2000  # characters; CLIP's text towers read about the first 300
NAMES_SHOWN = 5
Descriptions = Mapping[str, str | Sequence[str]]


@dataclass(frozen=True)
class ConditionText:
    """What the denoiser reads in place of a request's class embeddings.

    Attributes:
        embeddings: (K, D) L2-normalised, in the order of the request's classes.
        source: what they were made from, for the head's metadata.
        in_classifier: whether the request's class embeddings were made from the same, likewise.
    """

    embeddings: Tensor
    source: str
    in_classifier: bool = False


def read_descriptions(path: Path) -> dict[str, tuple[str, ...]]:
    """Read a JSON file {"class name": "description" or ["description", ...], ...}.

    Returns:
        the descriptions of each class, by its plain name.

    Raises:
        InvalidInputError: field "descriptions" or "classes"; the file cannot be read, is not such JSON, names a class
            twice, or a description is no text or empty.
    """
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_Pairs)
    except OSError as error:
        raise InvalidInputError("descriptions", f"descriptions {path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(
            "descriptions", f'descriptions {path} are not JSON, like {{"bus": "a long vehicle"}}: {error}'
        ) from error
    if not isinstance(pairs, _Pairs):
        raise InvalidInputError(
            "descriptions",
            f"descriptions {path} must be one JSON object of class names and texts, not a {_kind(pairs)}",
        )
    return _check([name for name, _ in pairs], [texts for _, texts in pairs])


class _Pairs(list[tuple[str, object]]):
    """A JSON object with every member it has: a dict would keep the last of two equal names and hide the first."""


def match_descriptions(descriptions: Descriptions, classes: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The descriptions of each of K classes, in their order; letter case does not count.

    Raises:
        InvalidInputError: field "descriptions" or "classes"; a class has none, or one belongs to none of the classes.
    """
    if not isinstance(descriptions, Mapping):
        raise InvalidInputError(
            "descriptions", f"descriptions must be a dict of class names and texts, not a {_kind(descriptions)}"
        )
    checked = _check(list(descriptions), list(descriptions.values()))
    texts = {name.casefold(): own for name, own in checked.items()}
    missing = [name for name in classes if name.casefold() not in texts]
    if missing:
        raise InvalidInputError("descriptions", f"no description of {_shown(missing)}: describe every class")
    wanted = {name.casefold() for name in classes}
    unknown = [name for name in checked if name.casefold() not in wanted]
    if unknown:
        raise InvalidInputError(
            "descriptions", f"descriptions of {_shown(unknown)}, which are not among the classes: leave them out"
        )
    return tuple(texts[name.casefold()] for name in classes)


def embed_descriptions(texts: Sequence[Sequence[str]], encoder: TextEncoder) -> Tensor:
    """Embed each class's descriptions: (K, D), L2-normalised.

    Of several descriptions the embeddings are averaged and brought back to length 1, as CLIP does with an
    ensemble of prompts (arXiv 2103.00020).

    Raises:
        InvalidInputError: field "descriptions"; the encoder is a table, which has no embedding of free text.
    """
    try:
        rows = encoder.encode([text for own in texts for text in own])  # (n, D)
    except InvalidInputError as error:
        raise InvalidInputError(
            "descriptions",
            f"text encoder {encoder.name} cannot embed descriptions: it is a table of names; load one that embeds any "
            "text",
        ) from error
    parts = rows.split([len(own) for own in texts])  # K of (m, D)
    # The embedding of a single description is kept to the last bit.
    return torch.stack([part[0] if len(part) == 1 else F.normalize(part.mean(0), dim=-1) for part in parts])


def describe_classes(
    descriptions: Descriptions, classes: Sequence[str], encoder: TextEncoder, in_classifier: bool
) -> ConditionText:
    """Match and embed the descriptions of K classes.

    Raises:
        InvalidInputError: see `match_descriptions` and `embed_descriptions`.
    """
    texts = match_descriptions(descriptions, classes)
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    return ConditionText(embed_descriptions(texts, encoder), f"descriptions sha256:{digest}", in_classifier)


def _check(names: list[str], values: Sequence[object]) -> dict[str, tuple[str, ...]]:
    if not names:
        raise InvalidInputError("descriptions", "no class is described: give at least one name and its description")
    plain = normalise_class_names(names, minimum=1, maximum=len(names))
    return {name: _check_texts(name, value) for name, value in zip(plain, values, strict=True)}


def _check_texts(name: str, value: object) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, _Pairs) or not isinstance(texts, list | tuple) or not texts:
        raise InvalidInputError(
            "descriptions", f"the description of {name!r} must be a text or a list of at least one, not {_kind(value)}"
        )
    return tuple(_check_text(name, text) for text in texts)


def _check_text(name: str, text: object) -> str:
    if not isinstance(text, str) or not text.strip():
        raise InvalidInputError(
            "descriptions", f"a description of {name!r} is {'empty' if text == '' else repr(text)[:40]}: write a text"
        )
    if len(text) > MAX_DESCRIPTION_LENGTH:
        raise InvalidInputError(
            "descriptions",
            f"a description of {name!r} has {len(text)} characters: at most {MAX_DESCRIPTION_LENGTH} are allowed",
        )
    if any(unicodedata.category(char) in {"Cc", "Cs"} and not char.isspace() for char in text):
        raise InvalidInputError("descriptions", f"a description of {name!r} holds control characters: remove them")
    return " ".join(text.split())


def _kind(value: object) -> str:
    if isinstance(value, _Pairs):
        return "object"
    return "empty list" if value == [] else type(value).__name__


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(repr(name) for name in names[:NAMES_SHOWN]) + more

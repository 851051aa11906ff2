"""From class names to what the denoiser is conditioned on.

Letters: B requests, K classes (padded to the largest request), D embedding size, P numbers in one head.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from text2weight.errors import InvalidInputError

MIN_CLASSES = 2
MAX_CLASSES = 256
MAX_NAME_LENGTH = 200
MAX_WEIGHT = 1000.0  # of a task among others
CLASS_MULTIPLE = 8  # tasks are padded to a multiple of so many classes


@lru_cache(maxsize=4096)
def plain_name(name: str) -> str:
    """Compose a name (NFC), turn underscores into spaces and runs of white space into one space."""
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").split())


def normalise_class_names(
    names: Sequence[str], *, minimum: int = MIN_CLASSES, maximum: int = MAX_CLASSES, field: str = "classes"
) -> tuple[str, ...]:
    """Bring class names into the one form that prompts, caches and tables use.

    Unicode is composed (NFC), underscores become spaces, runs of white space become one space.

    Args:
        names: as their user wrote them.
        minimum: fewest that are allowed.
        maximum: most.
        field: of the request that holds them, for errors.

    Raises:
        InvalidInputError: `field`; too few or too many names. `field[i]`; a name that is not text, is
            empty, too long, holds control characters, or repeats another one (ignoring case).
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise InvalidInputError(field, f"{field} must be a list of names")
    if not minimum <= len(names) <= maximum:
        raise InvalidInputError(field, f"{len(names)} class names given: allowed are {minimum} to {maximum}")
    normalised = tuple(_normalise_name(f"{field}[{i}]", name) for i, name in enumerate(names))
    first_seen: dict[str, int] = {}
    for i, name in enumerate(normalised):
        earlier = first_seen.setdefault(name.casefold(), i)
        if earlier != i:
            message = f"{field}[{i}] {name!r} repeats {field}[{earlier}]: name each class once"
            raise InvalidInputError(f"{field}[{i}]", message)
    return normalised


def normalise_tasks(tasks: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """`normalise_class_names` for each of several tasks, which may have one class alone.

    Raises:
        InvalidInputError: field "tasks[i].classes" or "tasks[i].classes[j]".
    """
    return [normalise_class_names(task, minimum=1, field=f"tasks[{i}].classes") for i, task in enumerate(tasks)]


def _normalise_name(field: str, name: str) -> str:
    if not isinstance(name, str):
        raise InvalidInputError(field, f"{field} is a {type(name).__name__}: names must be strings")
    if len(name) > MAX_NAME_LENGTH:
        raise InvalidInputError(field, f"{field} has {len(name)} characters: at most {MAX_NAME_LENGTH} are allowed")
    # Tabs and line ends count as white space below; surrogates cannot be encoded and are refused too.
    if not name.isprintable() and any(unicodedata.category(c) in {"Cc", "Cs"} and not c.isspace() for c in name):
        raise InvalidInputError(field, f"{field} holds control characters: remove them")
    words = plain_name(name)
    # Format characters (zero-width space, direction marks) are part of many names, but no name by themselves.
    if not (words and words.isprintable()) and all(char == " " or unicodedata.category(char) == "Cf" for char in words):
        raise InvalidInputError(field, f"{field} is empty: give it a name")
    return words


def union_of_tasks(tasks: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Class names of several tasks, each once, in order of first appearance (ignoring case)."""
    merged: dict[str, str] = {}
    for task in tasks:
        for name in task:
            merged.setdefault(name.casefold(), name)
    return tuple(merged.values())


def emphasis_of_tasks(tasks: Sequence[Sequence[str]], weights: Sequence[float]) -> Tensor:
    """Add up each class's weights over the tasks that hold it: (K,), in the order of `union_of_tasks`.

    Raises:
        InvalidInputError: field "tasks"; a weight for every task, positive and finite, is what is allowed.
    """
    if len(weights) != len(tasks):
        raise InvalidInputError("tasks", f"{len(weights)} weights for {len(tasks)} tasks: give each task one")
    totals: dict[str, float] = {}
    for i, (task, weight) in enumerate(zip(tasks, weights, strict=True)):
        if not 0 < weight <= MAX_WEIGHT:
            raise InvalidInputError("tasks", f"tasks[{i}] weighs {weight}: allowed is above 0 to {MAX_WEIGHT:g}")
        for name in dict.fromkeys(name.casefold() for name in task):
            totals[name] = totals.get(name, 0.0) + weight
    return torch.tensor(list(totals.values()))


def prior_attention(embeddings: Tensor, shares: Tensor | None = None) -> Tensor:
    """Pool class embeddings by their closeness to their own mean (T2W's prior attention).

    mu = mean of the embeddings, w = softmax(cos(e_i, mu)), pooled = sum w_i e_i.

    Args:
        embeddings: (B, K, D), L2-normalised.
        shares: (B, K) factors of the classes' shares in mu and w, which still add up to 1: positive numbers, or 0 for
            padding; a mask is that, too. None for equal ones.

    Returns:
        (B, D).
    """
    if shares is None:
        mean = embeddings.mean(1)  # (B, D)
    else:
        shares = shares.to(embeddings.dtype)  # (B, K)
        mean = (embeddings * shares.unsqueeze(-1)).sum(1) / shares.sum(1, keepdim=True)  # (B, D)
    similarity = F.cosine_similarity(embeddings, mean.unsqueeze(1), dim=-1)  # (B, K)
    if shares is not None:
        similarity = similarity + shares.log()  # (B, K) minus infinity for padding
    return (similarity.softmax(-1).unsqueeze(1) @ embeddings).squeeze(1)  # (B, D)


@dataclass(frozen=True)
class GivenHeads:
    """Heads to improve, one for each of B items, or none for some.

    Attributes:
        weights: (B, P) in the sampler's space; not read where there is none.
        present: (B,) bool.
    """

    weights: Tensor
    present: Tensor

    def to(self, device: torch.device | str) -> GivenHeads:
        """Copy to a device."""
        return GivenHeads(self.weights.to(device), self.present.to(device))

    def select(self, index: Tensor) -> GivenHeads:
        """The items at `index` (b,)."""
        return GivenHeads(self.weights[index], self.present[index])


@dataclass(frozen=True)
class Condition:
    """A padded batch of conditions: a pooled vector, a set of tokens, and how many tokens there are.

    An item without any class is the null condition: its text says nothing about the head.

    Attributes:
        pooled: (B, D).
        tokens: (B, K, D), one per class.
        mask: (B, K) bool, False marks padding.
        given: heads to improve, for a denoiser that reads them, or None.
    """

    pooled: Tensor
    tokens: Tensor
    mask: Tensor
    given: GivenHeads | None = None

    @property
    def count(self) -> Tensor:
        """(B,) number of classes of each item."""
        return self.mask.sum(1)

    def to(self, device: torch.device | str) -> Condition:
        """Copy to a device."""
        given = self.given and self.given.to(device)
        return Condition(self.pooled.to(device), self.tokens.to(device), self.mask.to(device), given)

    def select(self, index: Tensor) -> Condition:
        """The items at `index` (b,)."""
        given = self.given and self.given.select(index)
        return Condition(self.pooled[index], self.tokens[index], self.mask[index], given)

    def drop(self, dropped: Tensor) -> Condition:
        """Put the null condition in place of the items where `dropped` (B,) bool is True; given heads stay."""
        kept = ~dropped.unsqueeze(-1)  # (B, 1)
        return Condition(self.pooled * kept, self.tokens * kept.unsqueeze(-1), self.mask & kept, self.given)


def condition_on_classes(embeddings: Tensor, mask: Tensor) -> Condition:
    """Build the condition from padded class embeddings (B, K, D) and their mask (B, K)."""
    return Condition(prior_attention(embeddings, mask), embeddings * mask.unsqueeze(-1), mask)


def padded_count(classes: int) -> int:
    """How many class tokens a task with so many classes has: few different numbers, so that equal ones are common."""
    return -(-classes // CLASS_MULTIPLE) * CLASS_MULTIPLE


def condition_of_task(embeddings: Tensor, emphasis: Tensor | None = None) -> Condition:
    """Build the condition of one task, with padding, from class embeddings (K, D) and positive shares (K,)."""
    count, capacity = len(embeddings), padded_count(len(embeddings))
    rows = embeddings.unsqueeze(0)  # (1, K, D)
    pooled = prior_attention(rows, None if emphasis is None else emphasis.unsqueeze(0))  # (1, D)
    tokens = F.pad(rows, (0, 0, 0, capacity - count)) if capacity > count else rows  # (1, capacity, D)
    return Condition(pooled, tokens, _first(count, capacity))


@lru_cache(maxsize=1024)
def _first(count: int, capacity: int) -> Tensor:
    """(1, capacity) bool, True for the first `count`. Not to be written to: others have it, too."""
    return torch.arange(capacity).unsqueeze(0) < count


def stack_conditions(conditions: Sequence[Condition]) -> Condition:
    """Put the items of several conditions into one, padded to the largest K; all have given heads or none has."""
    longest = max(condition.mask.shape[1] for condition in conditions)
    lacking = [longest - condition.mask.shape[1] for condition in conditions]
    given = [condition.given for condition in conditions if condition.given is not None]
    return Condition(
        torch.cat([condition.pooled for condition in conditions]),
        torch.cat([F.pad(c.tokens, (0, 0, 0, n)) if n else c.tokens for c, n in zip(conditions, lacking, strict=True)]),
        torch.cat([F.pad(c.mask, (0, n)) if n else c.mask for c, n in zip(conditions, lacking, strict=True)]),
        GivenHeads(torch.cat([g.weights for g in given]), torch.cat([g.present for g in given])) if given else None,
    )

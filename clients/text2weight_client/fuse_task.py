"""`FuseTask`: one of the tasks that `fuse` joins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from text2weight_client.head import GeneratedHead


@dataclass(frozen=True)
class FuseTask:
    """Classes of one task.

    Attributes:
        classes: one name or more.
        weight: share in the pooled condition beside the other tasks', above 0; 1 if None. Of method "text" only.
        head: trained or generated for these classes; every method but "text" merges such heads.
    """

    classes: Sequence[str]
    weight: float | None = None
    head: GeneratedHead | None = None

    @classmethod
    def of(cls, task: FuseTask | GeneratedHead | Sequence[str]) -> FuseTask:
        """A task as it is, one from a head, or one from a list of class names."""
        if isinstance(task, FuseTask):
            return task
        if isinstance(task, GeneratedHead):
            return cls(task.classes, head=task)
        return cls(task)

    def to_json(self) -> dict[str, Any]:
        """The task in the body of POST /fuse."""
        body: dict[str, Any] = {"classes": self.classes if isinstance(self.classes, str) else list(self.classes)}
        return body if self.weight is None else body | {"weight": self.weight}

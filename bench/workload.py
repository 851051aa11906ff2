"""What the service benchmarks ask for, and the service they ask."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from demo.service_process import running_service
from text2weight.checkpoint import CheckpointConfig
from text2weight.condition import MIN_CLASSES, plain_name, union_of_tasks
from text2weight.errors import CheckpointError
from text2weight_client import Client

CLASSES_PER_REQUEST = 10
MAX_NAMES = 200


def known_names(config: CheckpointConfig) -> tuple[str, ...]:
    """Up to 200 different names among those the checkpoint was trained on.

    Raises:
        CheckpointError: it states fewer than two.
    """
    names = union_of_tasks([[plain_name(name) for name in config.classes]])[:MAX_NAMES]
    if len(names) < MIN_CLASSES:
        raise CheckpointError("the checkpoint's config.json names no classes to ask for: choose another --checkpoint")
    return names


def draw_classes(names: Sequence[str], source: random.Random) -> tuple[str, ...]:
    """A random class list of the usual length."""
    return tuple(source.sample(list(names), min(CLASSES_PER_REQUEST, len(names))))


@contextmanager
def warm_service(checkpoint: Path, names: Sequence[str]) -> Iterator[str]:
    """`t2w serve` as a process of its own, ready and with the embeddings of `names` in its cache; yields its URL.

    Both processes take torch's default thread count from the same environment, so they have equally many.

    Raises:
        ServiceError: it did not come up.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        running_service(checkpoint, Path(folder) / "service.log") as service,
        Client(service.url) as client,
    ):
        service.wait_until_ready(client)
        client.generate(names, seed=0)
        yield service.url

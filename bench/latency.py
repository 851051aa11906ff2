"""How much a request costs beyond the sampler: `/generate` through the client over the bare sampler.

One request at a time, to a real `t2w serve`. The bare sampler is `Generator.generate_batch` in this
process on the same classes, seed and thread count, with the class embeddings at hand; the service has
them in its cache. `request_new_names` is the same request for names that the service has never seen,
so it also pays for the text encoder; it is left out where the encoder is a table of known names.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.timing import interleave, significant, summary_ms
from bench.workload import draw_classes, known_names, warm_service
from text2weight.generator import GenerationRequest, Generator
from text2weight_client import Client

# A thread pool that has just finished spins for a moment; left running, it would take the cores from
# whichever process is measured next.
PAUSE_S = 0.02


@dataclass(frozen=True)
class Sizes:
    """Rounds per sampler; a round is one request and one call of the bare sampler."""

    repeats: int
    warmup: int


FULL = Sizes(repeats=100, warmup=10)
QUICK = Sizes(repeats=5, warmup=1)


def run(checkpoint: Path, sizes: Sizes) -> dict[str, object]:
    """Measure the default sampler, whose ratio is the headline, and DDIM with 20 steps."""
    generator = Generator.load(checkpoint)
    config = generator.config
    names = known_names(config)
    default = (config.sampler, config.steps)
    cases: dict[str, dict[str, object]] = {}
    with warm_service(checkpoint, names) as url, Client(url, max_retries=0) as client:
        for sampler, steps in dict.fromkeys([default, ("ddim", 20)]):
            requests = _requests(generator, names, sampler, steps, sizes.warmup + sizes.repeats)
            cases[f"{sampler}/{steps}"] = _compare(client, generator, requests, sizes)
    headline = f"{default[0]}/{default[1]}"
    return {
        "checkpoint": generator.checkpoint_hash[:12],
        "repeats": sizes.repeats,
        "classes_per_request": len(requests[0].classes),
        "sampler": headline,
        "ratio": cases[headline]["ratio"],
        "cases": cases,
    }


def _requests(
    generator: Generator, names: tuple[str, ...], sampler: str, steps: int, count: int
) -> list[GenerationRequest]:
    source = random.Random(0)
    lists = [draw_classes(names, source) for _ in range(count)]
    encode = generator.text_encoder.encode
    return [
        GenerationRequest(classes, encode(generator.prompts(classes)), seed, steps, sampler)
        for seed, classes in enumerate(lists)
    ]


def _compare(
    client: Client, generator: Generator, requests: list[GenerationRequest], sizes: Sizes
) -> dict[str, object]:
    def ask(classes: tuple[str, ...], request: GenerationRequest) -> None:
        client.generate(classes, seed=request.seed, steps=request.steps, sampler=request.sampler)

    actions: dict[str, Callable[[int], object]] = {
        "request": lambda turn: ask(requests[turn].classes, requests[turn]),
        "sampler": lambda turn: generator.generate_batch([requests[turn]]),
    }
    if not generator.config.text_encoder.source.startswith("table:"):
        actions["request_new_names"] = lambda turn: ask(_new_names(requests[turn], turn), requests[turn])
    times = interleave(actions, repeats=sizes.repeats, warmup=sizes.warmup, pause_s=PAUSE_S)
    figures = {name: summary_ms(seconds) for name, seconds in times.items()}
    ratio = significant(figures["request"]["median"] / figures["sampler"]["median"])
    return {"ratio": ratio, **{f"{name}_ms": figure for name, figure in figures.items()}}


def _new_names(request: GenerationRequest, turn: int) -> tuple[str, ...]:
    """Names that no other request holds."""
    return tuple(f"{name} of {request.sampler} {turn}" for name in request.classes)

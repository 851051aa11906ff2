"""What one head costs: the checkpoint's default sampler over 1,000-step DDPM with the paper's denoiser.

The paper's denoiser (arXiv 2508.13633) is 1024 wide and 6 layers deep over chunks of 576 numbers; here it
has random weights, which take as long as trained ones. The default sampler is timed on the checkpoint's own
denoiser (`ratio`) and on the paper's (`ratio_same_denoiser`), half of the times before DDPM and half after.
A DDPM run is a thousand equal denoiser calls, so one run is an average already.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch

from bench.timing import interleave, significant, summary_ms
from bench.workload import draw_classes, known_names
from text2weight.checkpoint import Checkpoint, load_checkpoint
from text2weight.denoiser import Denoiser, DenoiserConfig
from text2weight.generator import GenerationRequest, Generator

PAPER_STEPS = 1000
PAPER_DENOISER = DenoiserConfig(tokens="chunk", chunk_size=576, width=1024, depth=6, heads=8)


@dataclass(frozen=True)
class Sizes:
    """DDPM steps really taken, timings of the default sampler on each side of them, and the denoiser."""

    ddpm_steps: int
    repeats: int
    warmup: int
    denoiser: DenoiserConfig = PAPER_DENOISER


FULL = Sizes(ddpm_steps=PAPER_STEPS, repeats=25, warmup=3)
QUICK = Sizes(ddpm_steps=5, repeats=2, warmup=1)


def run(checkpoint: Path, sizes: Sizes) -> dict[str, object]:
    """Measure; where fewer than 1,000 steps are taken, their time is scaled up and the result says so."""
    ours = Generator.load(checkpoint)
    paper = _paper_generator(ours, load_checkpoint(checkpoint), sizes.denoiser)
    classes = draw_classes(known_names(ours.config), random.Random(0))
    embeddings = ours.text_encoder.encode(ours.prompts(classes))  # (K, D)
    sampler, steps = ours.config.sampler, ours.config.steps
    request = GenerationRequest(classes, embeddings, seed=0, steps=steps, sampler=sampler)
    actions = {
        "default": lambda turn: ours.generate_batch([request]),
        "default_same_denoiser": lambda turn: paper.generate_batch([request]),
    }
    before = interleave(actions, repeats=sizes.repeats, warmup=sizes.warmup)
    calls = _ddpm_call_times(paper, replace(request, sampler="ddpm", steps=sizes.ddpm_steps))
    after = interleave(actions, repeats=sizes.repeats, warmup=sizes.warmup)
    figures = {name: summary_ms(before[name] + after[name]) for name in actions}
    ddpm_s = sum(calls) * PAPER_STEPS / len(calls)
    default_s, same_s = (figures[name]["median"] / 1000 for name in actions)
    return {
        "checkpoint": ours.checkpoint_hash[:12],
        "sampler": f"{sampler}/{steps}",
        "repeats": 2 * sizes.repeats,
        "default_ms": figures["default"],
        "default_same_denoiser_ms": figures["default_same_denoiser"],
        "ddpm_s": significant(ddpm_s),
        "ddpm_call_ms": summary_ms(calls),
        "ddpm_steps_timed": len(calls),
        "ddpm_s_is_extrapolated": len(calls) < PAPER_STEPS,
        "ratio": significant(default_s / ddpm_s),
        "ratio_same_denoiser": significant(same_s / ddpm_s),
        "times_faster": significant(ddpm_s / default_s),
        "times_faster_same_denoiser": significant(ddpm_s / same_s),
        "denoiser": _describe(ours),
        "paper_denoiser": _describe(paper),
    }


def _paper_generator(ours: Generator, loaded: Checkpoint, denoiser: DenoiserConfig) -> Generator:
    """A generator with the paper's denoiser and schedule length, all else as in the checkpoint."""
    denoiser = denoiser.model_copy(update={"embedding_dim": ours.config.denoiser.embedding_dim})
    schedule = ours.config.schedule.model_copy(update={"num_timesteps": PAPER_STEPS})
    config = ours.config.model_copy(update={"denoiser": denoiser, "schedule": schedule})
    center = torch.zeros(denoiser.embedding_dim)  # (D,)
    network = Denoiser(config.head, denoiser, loaded.space.anchor, center).eval()
    return Generator(Checkpoint(loaded.path, config, network, loaded.space), ours.text_encoder)


def _ddpm_call_times(generator: Generator, request: GenerationRequest) -> list[float]:
    """Seconds of each denoiser call with its step, of one run."""
    sample = generator.begin(request)
    marks = [time.perf_counter()]
    while not sample.done:
        generator.advance([sample])
        marks.append(time.perf_counter())
    return [after - before for before, after in pairwise(marks)]


def _describe(generator: Generator) -> dict[str, object]:
    config = generator.config.denoiser
    return {"tokens": config.tokens, "width": config.width, "depth": config.depth, "heads": config.heads}

"""A result never depends on its neighbours: the engine around real networks."""

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.service.engines import job, running
from tests.tiny import TINY_DIM, TINY_SPEC, save_tiny_checkpoint, tiny_space
from tests.torch_threads import torch_threads
from text2weight import GenerationRequest, Generator
from text2weight.artifact import HeadArtifact, read_head
from text2weight.checkpoint import bundled_checkpoint, read_config
from text2weight.denoiser import DenoiserConfig
from text2weight.enhancement import EnhanceMethod
from text2weight.weight_tokens import permute_units
from text2weight_service.engine import Engine
from text2weight_service.job import Job
from text2weight_service.text_stage import encode_texts

NAMES = ("apple", "bus", "lizard", "rocket", "maple tree", "clock", "coffee cup", "bear", "sea", "cat, house cat")
ROWS = 4
ONE_SIZE, ANY_SIZE = [ROWS], [1, 2, ROWS]
WORK = [("mean", 1), ("ddim", 2), ("ddpm", 3), ("dpmpp_2m", 4), ("ddim", 7)]

ASKED = st.tuples(
    st.integers(0, 5),  # denoiser calls of the others before it comes, roughly
    st.sampled_from(WORK),
    st.integers(0, 2**63 - 1),
    st.lists(st.sampled_from(NAMES), min_size=2, max_size=10, unique=True),
    st.sampled_from([1.0, 1.0, 0.0, 2.5]),  # guidance scale
    st.sampled_from([None, None, 0.0, 0.4, 1.0]),  # strength; None gives no head to enhance
    st.sampled_from([None, "interpolate", "noise"]),  # how it is enhanced
)
Asked = tuple[int, tuple[str, int], int, list[str], float, float | None, EnhanceMethod | None]
# What a client might have trained: near the checkpoint's anchor, its hidden units in another order.
GIVEN = permute_units(TINY_SPEC, tiny_space().anchor + 0.1, torch.tensor([2, 0, 1]))


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    """So that two calls are made at once."""
    with torch_threads(2):
        yield


@contextmanager
def engine_around(generator: Generator) -> Iterator[tuple[asyncio.Runner, Engine]]:
    """An engine that many examples ask, and the event loop it belongs to."""
    with asyncio.Runner() as runner:
        context = running(lambda _: generator, max_batch_size=ROWS, head_cache_mb=0)
        engine = runner.run(context.__aenter__())
        assert engine._loaded is not None
        assert engine._loaded.runner.lanes == 2
        yield runner, engine
        runner.run(context.__aexit__(None, None, None))


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    """A checkpoint that takes guidance, and whose network reads the head that it is given."""
    sizes = {"width": 16, "depth": 2, "heads": 2, "embedding_dim": TINY_DIM, "chunk_size": 16, "class_path": 8}
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    save_tiny_checkpoint(folder, denoiser=DenoiserConfig(**sizes, null_condition=True, reads_given=True))
    return Generator.load(folder)


@pytest.fixture(scope="module")
def served(generator: Generator) -> Iterator[tuple[asyncio.Runner, Engine]]:
    with engine_around(generator) as served:
        yield served


def alone(generator: Generator, asked: Job, rows: int) -> HeadArtifact:
    """The head without any engine, in calls of a fixed size, each on as many threads as an engine's."""
    embeddings = encode_texts(generator.text_encoder, generator.prompts(asked.classes))
    sampler, steps = generator.resolve_sampling(asked.sampler, asked.steps)
    request = GenerationRequest(
        asked.classes,
        torch.stack(list(embeddings.values())),
        asked.seed,
        steps,
        sampler,
        asked.guidance_scale,
        asked.given,
        asked.strength,
        asked.method,
    )
    sample = generator.begin(request)
    with torch_threads(torch.get_num_threads() // generator.calls_at_once):
        while not sample.done:
            generator.advance([sample], rows)
    return generator.finish(sample)


def ask_all(served: tuple[asyncio.Runner, Engine], jobs: list[tuple[int, Job]], rungs: list[int]) -> list[bytes]:
    """Heads of jobs that come to an engine at different times, from calls of the given sizes."""
    runner, engine = served
    assert engine._loaded is not None
    engine._loaded.runner.ladder.rungs = rungs

    async def ask(after: int, asked: Job) -> bytes:
        await asyncio.sleep(0.001 * after)
        return (await engine.generate(asked)).data

    async def gather() -> list[bytes]:
        return await asyncio.gather(*(ask(after, asked) for after, asked in jobs))

    return runner.run(gather())


def jobs_of(asked: list[Asked]) -> list[tuple[int, Job]]:
    jobs = []
    for after, (sampler, steps), seed, classes, scale, strength, method in asked:
        given = {} if strength is None else {"given": GIVEN, "strength": strength, "method": method}
        jobs.append((after, job(*classes, seed=seed, steps=steps, sampler=sampler, guidance_scale=scale, **given)))
    return jobs


def assert_close(one: HeadArtifact, other: HeadArtifact, **tolerance: float) -> None:
    assert one.metadata == other.metadata
    assert one.class_embeddings.equal(other.class_embeddings)
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(tensor, other.tensors[name], **tolerance)


@settings(max_examples=8)
@given(asked=st.lists(ASKED, min_size=1, max_size=9))
def test_in_calls_of_one_size_no_bit_depends_on_the_neighbours(
    generator: Generator, served: tuple[asyncio.Runner, Engine], asked: list[Asked]
) -> None:
    jobs = jobs_of(asked)
    for (_, one), head in zip(jobs, ask_all(served, jobs, ONE_SIZE), strict=True):
        assert head == alone(generator, one, ROWS).to_bytes()


@settings(max_examples=8)
@given(asked=st.lists(ASKED, min_size=1, max_size=9))
def test_in_calls_of_any_size_only_the_last_bits_do(
    generator: Generator, served: tuple[asyncio.Runner, Engine], asked: list[Asked]
) -> None:
    jobs = jobs_of(asked)
    for (_, one), head in zip(jobs, ask_all(served, jobs, ANY_SIZE), strict=True):
        # A guided step weighs two estimates by up to 2.5 and -1.5, and with them their last bits.
        last_bits = 1e-5 if one.guidance_scale == 1 else 5e-5
        assert_close(read_head(head), alone(generator, one, 1), atol=last_bits, rtol=1e-5)


def test_the_bundled_model_keeps_to_it() -> None:
    generator = Generator.load(bundled_checkpoint())
    names = read_config(bundled_checkpoint()).classes
    source = random.Random(0)
    asked: list[Asked] = [
        (
            i % 3,
            source.choice([("mean", 1), ("ddim", 2), ("dpmpp_2m", 3)]),
            i,
            source.sample(names, 2 + 5 * i),
            1.0,
            None,
            None,
        )
        for i in range(4)
    ]
    jobs = jobs_of(asked)
    with engine_around(generator) as served:
        for (_, one), head in zip(jobs, ask_all(served, jobs, ONE_SIZE), strict=True):
            assert head == alone(generator, one, ROWS).to_bytes()
        for (_, one), head in zip(jobs, ask_all(served, jobs, ANY_SIZE), strict=True):
            # Heads differ from one another by about 0.01: this is a ten-thousandth of that.
            assert_close(read_head(head), alone(generator, one, 1), atol=1e-6, rtol=0)

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import TINY_DIM, TINY_NAMES, TINY_SPEC, pad_embeddings, save_tiny_checkpoint, tiny_table
from text2weight import GenerationRequest, Generator, HeadArtifact, read_head
from text2weight.checkpoint import TextEncoderConfig, load_checkpoint, save_checkpoint
from text2weight.condition import condition_on_classes
from text2weight.errors import CheckpointError, InvalidInputError
from text2weight.generator import MAX_SEED, DenoiserCall
from text2weight.samplers import SAMPLERS, make_plan, take_steps
from text2weight.text_encoder import EmbeddingTable, TableTextEncoder

CLASSES = ("apple", "bus", "lizard", "maple tree")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def generator(tiny_checkpoint: Path) -> Generator:
    return Generator.load(tiny_checkpoint)


def flat(artifact: HeadArtifact) -> torch.Tensor:
    return TINY_SPEC.flatten(artifact.tensors)


def request_for(
    generator: Generator, classes: tuple[str, ...] = CLASSES, *, seed: int = 0, steps: int = 1, sampler: str = "mean"
) -> GenerationRequest:
    return GenerationRequest(classes, generator.text_encoder.encode(generator.prompts(classes)), seed, steps, sampler)


def test_a_head_comes_with_all_that_is_needed_to_use_it(generator: Generator) -> None:
    artifact = generator.generate([" Apple", "bus", "maple_tree"], seed=5, steps=3, sampler="ddim")
    assert artifact.spec == TINY_SPEC
    assert {name: tuple(tensor.shape) for name, tensor in artifact.tensors.items()} == TINY_SPEC.shapes
    torch.testing.assert_close(artifact.class_embeddings, tiny_table().embeddings[[0, 1, 5]])
    assert artifact.metadata.pop("created_by").startswith("text2weight")
    assert artifact.metadata == {
        "format": "text2weight.head/1",
        "classes": '["Apple", "bus", "maple tree"]',
        "template": "a {}",
        "logit_scale": "30.0",
        "activation": "gelu",
        "seed": "5",
        "steps": "3",
        "sampler": "ddim",
        "checkpoint": generator.config.sha256,
        "text_encoder": "table:tiny",
        "backbone": "tiny backbone",
    }
    assert generator.checkpoint_hash == generator.config.sha256


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_equal_requests_give_equal_bytes(generator: Generator, tiny_checkpoint: Path, sampler: str) -> None:
    steps = 1 if sampler == "mean" else 5
    first = generator.generate(CLASSES, seed=3, steps=steps, sampler=sampler).to_bytes()
    torch.manual_seed(99)
    assert generator.generate(CLASSES, seed=3, steps=steps, sampler=sampler).to_bytes() == first
    assert Generator.load(tiny_checkpoint).generate(CLASSES, seed=3, steps=steps, sampler=sampler).to_bytes() == first
    assert read_head(first).to_bytes() == first


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_head_is_that_of_the_stages_called_one_by_one(generator: Generator, sampler: str) -> None:
    steps = 1 if sampler == "mean" else 5
    checkpoint = load_checkpoint(generator.path)
    condition = condition_on_classes(*pad_embeddings([request_for(generator).embeddings]))
    source = torch.Generator().manual_seed(3)
    size = (1, TINY_SPEC.num_parameters)
    noisy, previous = torch.randn(size, generator=source), torch.zeros(size)
    for step in make_plan(sampler, steps, checkpoint.config.schedule):
        with torch.no_grad():
            timesteps = torch.tensor([step.timestep])
            shown = checkpoint.config.schedule.alphas_bar[timesteps].sqrt().float() * noisy
            clean = checkpoint.denoiser(shown, timesteps, condition)
        noise = torch.randn(size, generator=source) if step.noise else torch.zeros(size)
        noisy, previous = take_steps([step], noisy, clean, previous, noise), clean
    artifact = generator.generate(CLASSES, seed=3, steps=steps, sampler=sampler)
    torch.testing.assert_close(flat(artifact), checkpoint.space.restore(noisy)[0], **CLOSE)


def test_seed_classes_and_steps_change_the_head(generator: Generator) -> None:
    base = flat(generator.generate(CLASSES, seed=0, steps=5, sampler="ddim"))
    for other in (
        generator.generate(CLASSES, seed=1, steps=5, sampler="ddim"),
        generator.generate(CLASSES[:3], seed=0, steps=5, sampler="ddim"),
        generator.generate(CLASSES, seed=0, steps=6, sampler="ddim"),
        generator.generate(CLASSES, seed=0, steps=5, sampler="ddpm"),
    ):
        assert float((flat(other) - base).abs().max()) > 1e-3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_order_of_classes_orders_the_embeddings_only(generator: Generator, sampler: str) -> None:
    steps = 1 if sampler == "mean" else 5
    order = [2, 0, 3, 1]
    first = generator.generate(CLASSES, steps=steps, sampler=sampler)
    second = generator.generate([CLASSES[i] for i in order], steps=steps, sampler=sampler)
    torch.testing.assert_close(flat(second), flat(first), **CLOSE)
    assert torch.equal(second.class_embeddings, first.class_embeddings[order])
    assert second.classes == tuple(CLASSES[i] for i in order)


REQUESTS = st.builds(
    lambda classes, seed, sampler, steps: (tuple(classes), seed, sampler, 1 if sampler == "mean" else steps),
    st.lists(st.sampled_from(TINY_NAMES), min_size=2, max_size=8, unique=True),
    st.integers(0, MAX_SEED),
    st.sampled_from(SAMPLERS),
    st.integers(1, 9),
)


@given(mix=st.lists(REQUESTS, min_size=1, max_size=5))
def test_no_request_changes_anothers_result(generator: Generator, mix: list[tuple]) -> None:
    requests = [
        request_for(generator, classes, seed=seed, steps=steps, sampler=sampler)
        for classes, seed, sampler, steps in mix
    ]
    for request, together in zip(requests, generator.generate_batch(requests), strict=True):
        (alone,) = generator.generate_batch([request])
        torch.testing.assert_close(flat(together), flat(alone), **CLOSE)
        assert torch.equal(together.class_embeddings, alone.class_embeddings)
        assert together.metadata == alone.metadata


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
def test_a_watcher_sees_every_call_and_changes_nothing(generator: Generator, sampler: str) -> None:
    requests = [request_for(generator, seed=seed, steps=steps, sampler=sampler) for seed, steps in ((1, 2), (7, 4))]
    calls: list[DenoiserCall] = []
    watched = generator.generate_batch(requests, on_call=calls.append)
    for artifact, alone in zip(watched, generator.generate_batch(requests), strict=True):
        assert artifact.to_bytes() == alone.to_bytes()
    assert [call.items for call in calls] == [(0, 1), (0, 1), (1,), (1,)]
    schedule = generator.config.schedule
    plan = [step.timestep for step in make_plan(sampler, 4, schedule)]
    assert [int(call.timesteps[-1]) for call in calls] == plan
    # The first sample is the request's noise, the last estimate the head.
    space = load_checkpoint(generator.path).space
    noise = torch.randn(TINY_SPEC.num_parameters, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(calls[0].samples[1], space.restore(noise), **CLOSE)
    torch.testing.assert_close(calls[1].estimates[0], flat(watched[0]), **CLOSE)
    torch.testing.assert_close(calls[3].estimates[0], flat(watched[1]), **CLOSE)
    # Each sample is what the step before made of its sample and estimates.
    if sampler == "ddim":
        step = make_plan(sampler, 4, schedule)[0]
        before, estimate = (space.standardise(x[1:]) for x in (calls[0].samples, calls[0].estimates))
        moved = take_steps([step], before, estimate, torch.zeros_like(before), torch.zeros_like(before))
        torch.testing.assert_close(calls[1].samples[1:], space.restore(moved), **CLOSE)


def test_threads_can_share_a_generator(generator: Generator) -> None:
    expected = [generator.generate(CLASSES, seed=seed, steps=4, sampler="ddpm").to_bytes() for seed in range(8)]
    barrier = threading.Barrier(4)

    def work(start: int) -> list[bytes]:
        barrier.wait()
        seeds = [(start * 2 + i) % 8 for i in range(8)]
        return [
            data
            for _, data in sorted(
                (seed, generator.generate(CLASSES, seed=seed, steps=4, sampler="ddpm").to_bytes()) for seed in seeds
            )
        ]

    with ThreadPoolExecutor(4) as pool:
        assert all(result == expected for result in pool.map(work, range(4)))


def test_a_result_can_be_changed_without_touching_the_request_or_the_next_result(generator: Generator) -> None:
    request = request_for(generator)
    before = request.embeddings.clone()
    (first,) = generator.generate_batch([request])
    expected = first.to_bytes()
    first.class_embeddings.zero_()
    first.tensors["linear1.weight"].requires_grad_().square().sum().backward()
    first.tensors["linear1.bias"].zero_()
    assert torch.equal(request.embeddings, before)
    assert generator.generate_batch([request])[0].to_bytes() == expected


@pytest.mark.parametrize("prediction", ["x0", "epsilon", "v"])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_every_prediction_and_schedule_gives_a_valid_head(tmp_path: Path, prediction: str, kind: str) -> None:
    save_tiny_checkpoint(tmp_path / "checkpoint", prediction=prediction, schedule={"kind": kind, "num_timesteps": 40})
    generator = Generator.load(tmp_path / "checkpoint")
    for sampler in SAMPLERS:
        artifact = generator.generate(CLASSES, steps=1 if sampler == "mean" else 10, sampler=sampler)
        assert read_head(artifact.to_bytes()).classes == CLASSES


def test_a_head_without_biases_is_generated_too(tmp_path: Path) -> None:
    spec = TINY_SPEC.model_copy(update={"bias": False, "activation": "none"})
    save_tiny_checkpoint(tmp_path / "checkpoint", head=spec)
    artifact = Generator.load(tmp_path / "checkpoint").generate(CLASSES)
    assert read_head(artifact.to_bytes()).spec == spec


def test_an_untrained_denoiser_generates_the_mean_head(tmp_path: Path, generator: Generator) -> None:
    checkpoint = load_checkpoint(generator.path)
    for parameter in checkpoint.denoiser.parameters():
        torch.nn.init.zeros_(parameter)
    save_checkpoint(tmp_path / "zero", checkpoint.config, checkpoint.denoiser, checkpoint.space)
    artifact = Generator.load(tmp_path / "zero").generate(CLASSES, seed=4)
    torch.testing.assert_close(flat(artifact), checkpoint.space.anchor + checkpoint.space.offset)


class TestDefaults:
    @pytest.mark.parametrize(
        ("default", "asked", "expected"),
        [
            (("mean", 1), (None, None), ("mean", 1)),
            (("mean", 1), (None, 1), ("mean", 1)),
            (("mean", 1), (None, 7), ("ddim", 7)),
            (("mean", 1), ("ddpm", None), ("ddpm", 20)),
            (("mean", 1), ("ddpm", 3), ("ddpm", 3)),
            (("dpmpp_2m", 6), (None, None), ("dpmpp_2m", 6)),
            (("dpmpp_2m", 6), (None, 4), ("dpmpp_2m", 4)),
            (("dpmpp_2m", 6), ("mean", None), ("mean", 1)),
            (("dpmpp_2m", 6), ("dpmpp_2m", None), ("dpmpp_2m", 6)),
        ],
    )
    def test_what_a_caller_leaves_out_is_filled_in(
        self, tmp_path: Path, default: tuple[str, int], asked: tuple, expected: tuple[str, int]
    ) -> None:
        save_tiny_checkpoint(tmp_path / "checkpoint", sampler=default[0], steps=default[1])
        generator = Generator.load(tmp_path / "checkpoint")
        assert generator.resolve_sampling(*asked) == expected
        metadata = generator.generate(CLASSES, sampler=asked[0], steps=asked[1]).metadata
        assert (metadata["sampler"], metadata["steps"]) == (expected[0], str(expected[1]))

    def test_the_default_step_count_fits_a_short_schedule(self, tmp_path: Path) -> None:
        save_tiny_checkpoint(tmp_path / "checkpoint", schedule={"num_timesteps": 12})
        assert Generator.load(tmp_path / "checkpoint").resolve_sampling("ddim", None) == ("ddim", 12)


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "field"),
        [
            ({"seed": -1}, "seed"),
            ({"seed": MAX_SEED + 1}, "seed"),
            ({"seed": 10**40}, "seed"),
            ({"steps": 0}, "steps"),
            ({"steps": 41}, "steps"),
            ({"steps": 10**6}, "steps"),
            ({"steps": 2, "sampler": "mean"}, "steps"),
            ({"sampler": "euler"}, "sampler"),
            ({"sampler": ""}, "sampler"),
            ({"classes": ["apple"]}, "classes"),
            ({"classes": ["apple", "no such thing"]}, "classes"),
            ({"classes": ["apple", "Apple"]}, "classes[1]"),
        ],
    )
    def test_what_cannot_be_computed_is_refused(
        self, generator: Generator, arguments: dict[str, object], field: str
    ) -> None:
        with pytest.raises(InvalidInputError) as caught:
            generator.generate(**{"classes": CLASSES, **arguments})
        assert caught.value.field == field
        assert str(caught.value)

    def test_the_bounds_themselves_are_allowed(self, generator: Generator) -> None:
        generator.generate(CLASSES, seed=MAX_SEED, steps=40, sampler="ddpm")
        generator.generate(CLASSES, seed=0, steps=1, sampler="ddim")

    @pytest.mark.parametrize("shape", [(3, TINY_DIM), (4, TINY_DIM + 1), (4,), (1, 4, TINY_DIM)])
    def test_embeddings_must_fit_the_classes(self, generator: Generator, shape: tuple[int, ...]) -> None:
        good = request_for(generator)
        with pytest.raises(InvalidInputError, match=r"expected \(4, 8\)"):
            generator.generate_batch([good, replace(good, embeddings=torch.zeros(shape))])


class TestTextEncoders:
    def test_another_encoder_is_refused(self, tiny_checkpoint: Path) -> None:
        other = TableTextEncoder(tiny_table(seed=8), "table:other")
        with pytest.raises(CheckpointError, match=r"table:other is not the table:tiny that .* was trained with"):
            Generator.load(tiny_checkpoint, text_encoder=other)

    def test_one_with_the_same_weights_is_accepted(self, tiny_checkpoint: Path, generator: Generator) -> None:
        encoder = TableTextEncoder.from_file(tiny_checkpoint.parent / "table.safetensors", "tiny")
        artifact = Generator.load(tiny_checkpoint, text_encoder=encoder).generate(CLASSES)
        assert artifact.to_bytes() == generator.generate(CLASSES).to_bytes()

    def test_without_a_fingerprint_the_size_must_fit_at_least(self, tmp_path: Path) -> None:
        config = TextEncoderConfig(source="table:absent#t", name="any")
        save_tiny_checkpoint(tmp_path / "checkpoint", text_encoder=config)
        encoder = TableTextEncoder(EmbeddingTable("a {}", ("apple", "bus"), torch.eye(2)), "table:small")
        with pytest.raises(CheckpointError, match="gives 2 numbers per text, the checkpoint takes 8"):
            Generator.load(tmp_path / "checkpoint", text_encoder=encoder)

    def test_a_missing_table_is_reported(self, tmp_path: Path) -> None:
        save_tiny_checkpoint(tmp_path / "checkpoint")
        (tmp_path / "table.safetensors").unlink()
        with pytest.raises(CheckpointError, match="embedding table"):
            Generator.load(tmp_path / "checkpoint")

    def test_a_tower_inside_the_checkpoint_moves_with_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[str] = []

        def load(source: str, _: str) -> TableTextEncoder:
            asked.append(source)
            return TableTextEncoder(tiny_table(), "tower")

        monkeypatch.setattr("text2weight.generator.load_text_encoder", load)
        config = TextEncoderConfig(source="dir:text_encoder", name="tower")
        save_tiny_checkpoint(tmp_path / "checkpoint", text_encoder=config)
        shutil.move(tmp_path / "checkpoint", tmp_path / "moved")
        Generator.load(tmp_path / "moved")
        assert asked == [f"dir:{tmp_path / 'moved' / 'text_encoder'}"]

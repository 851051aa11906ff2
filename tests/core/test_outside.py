"""Names that training never saw: the denoiser reads known ones in their place, and its head is followed only so far."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tests.tiny import TINY_SPEC, save_tiny_checkpoint, tiny_space
from text2weight import GenerationRequest, Generator, HeadArtifact
from text2weight.checkpoint import TextEncoderConfig, load_checkpoint, record_outside
from text2weight.descriptions import ConditionText
from text2weight.enhancement import interpolate
from text2weight.errors import CheckpointError
from text2weight.generator import DenoiserCall
from text2weight.outside import OutsideSettings, mix_known
from text2weight.weight_space import WeightSpace

KNOWN = ("apple", "Maple_Tree", "cat, house cat")
INSIDE, MIXED, OUTSIDE = ("apple", "maple tree", "cat"), ("apple", "bus", "cat", "lizard"), ("bus", "lizard", "rocket")
REACH, TEMPERATURE = 0.4, 0.5
SETTINGS = {"reach": REACH, "temperature": TEMPERATURE}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def make(folder: Path, outside: dict[str, float] | None) -> Generator:
    save_tiny_checkpoint(folder / "checkpoint", classes=KNOWN, outside=outside)
    return Generator.load(folder / "checkpoint")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    """Treats all names alike."""
    return make(tmp_path_factory.mktemp("plain"), None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    """Goes all the way."""
    return make(tmp_path_factory.mktemp("whole"), SETTINGS | {"reach": 1.0})


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    return make(tmp_path_factory.mktemp("scaled"), SETTINGS)


def test_a_mixture_by_hand() -> None:
    # From their mean, the zero vector, a name at 60 degrees has cosines 0.5 and -0.5 with the known two.
    known = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    name = torch.tensor([[0.5, 3**0.5 / 2]])
    torch.testing.assert_close(mix_known(known, name, 0.5), known[:1])  # on one line, any mixture has length 1
    # Three known ones at right angles; their mean (1, 1, 1) / 3 taken off, a name along the first one has cosines 1,
    # -0.5 and -0.5 with them, so weights 1, exp(-1.5) and exp(-1.5) at temperature 1.
    weights = torch.tensor([[1.0, math.exp(-1.5), math.exp(-1.5)]])
    torch.testing.assert_close(mix_known(torch.eye(3), torch.eye(3)[:1], 1.0), weights / weights.norm(), **CLOSE)
    # Cold, the closest name alone is read; a name that points nowhere is an even mixture.
    torch.testing.assert_close(mix_known(torch.eye(3), torch.tensor([[0.1, 0.7, 0.3]]), 1e-3), torch.eye(3)[1:2])
    even = torch.full((1, 3), 3**-0.5)
    torch.testing.assert_close(mix_known(torch.eye(3), torch.full((1, 3), 1 / 3), 0.1), even)


def test_outside_names_alone_are_read_as_mixtures(plain: Generator, whole: Generator) -> None:
    encode = plain.text_encoder.encode
    known, rows = encode(plain.prompts(KNOWN)), encode(plain.prompts(MIXED))  # (3, D), (4, D)
    rows[[1, 3]] = mix_known(known, rows[[1, 3]], TEMPERATURE)
    request = replace(request_for(plain, MIXED, seed=3), condition_text=ConditionText(rows, "by hand"))
    expected, answer = plain.generate_batch([request])[0], whole.generate(MIXED, seed=3)
    torch.testing.assert_close(flat(answer), flat(expected), **CLOSE)
    assert float((flat(answer) - flat(plain.generate(MIXED, seed=3))).abs().max()) > 1e-3
    # The classifier compares with the names' own embeddings.
    assert torch.equal(answer.class_embeddings, encode(plain.prompts(MIXED)))
    assert answer.metadata["outside"] == '["bus", "lizard"]'
    assert "reach" not in answer.metadata


def flat(artifact: HeadArtifact) -> Tensor:
    return TINY_SPEC.flatten(artifact.tensors)


def request_for(generator: Generator, classes: tuple[str, ...], **fields: Any) -> GenerationRequest:
    return GenerationRequest(classes, generator.text_encoder.encode(generator.prompts(classes)), **fields)


@pytest.mark.parametrize("classes", [MIXED, OUTSIDE])
@pytest.mark.parametrize(("sampler", "steps"), [("mean", 1), ("ddpm", 5)])
def test_the_share_of_outside_names_says_how_far(
    whole: Generator, scaled: Generator, classes: tuple[str, ...], sampler: str, steps: int
) -> None:
    # Two of four names are outside: 1 - 0.5 * 0.6 = 0.7. All three: 0.4.
    reach = 0.7 if classes == MIXED else 0.4
    sampled = flat(whole.generate(classes, seed=3, sampler=sampler, steps=steps))
    answer = scaled.generate(classes, seed=3, sampler=sampler, steps=steps)
    torch.testing.assert_close(flat(answer), (1 - reach) * scaled.anchor + reach * sampled, **CLOSE)
    assert float(answer.metadata["reach"]) == pytest.approx(reach)


def test_names_of_training_are_answered_bit_for_bit_as_without(plain: Generator, scaled: Generator) -> None:
    """Whatever their letter case, underscores and synonyms."""
    for classes in (INSIDE, ("APPLE", "maple_tree", "Cat, house cat")):
        one, other = (generator.generate(classes, seed=3) for generator in (plain, scaled))
        assert not {"reach", "outside"} & set(other.metadata)
        assert one.with_metadata(checkpoint="").to_bytes() == other.with_metadata(checkpoint="").to_bytes()


@pytest.mark.parametrize("scaling", ["standardise", "min_max"])
def test_the_line_to_the_anchor_by_hand(scaling: Any) -> None:
    anchor = torch.full((TINY_SPEC.num_parameters,), 5.0)
    zoo = anchor + torch.tensor([[1.0], [3.0]])
    space = WeightSpace.fit(TINY_SPEC, anchor, zoo, scaling)
    # Heads of sevens and eights lie between and at the ends of the zoo's sixes and eights.
    for value, middle in ((7.0, 6.0), (8.0, 6.5)):
        numbers = space.standardise(torch.full((1, TINY_SPEC.num_parameters), value))
        torch.testing.assert_close(space.restore(numbers, 0.5), torch.full_like(numbers, middle))
        assert torch.equal(space.restore(numbers, 0.0), anchor[None])
        assert torch.equal(space.restore(numbers, 1.0), space.restore(numbers))


def test_reach_0_answers_outside_names_with_the_anchor(tmp_path: Path) -> None:
    generator = make(tmp_path, SETTINGS | {"reach": 0.0})
    answer = generator.generate(OUTSIDE)
    assert torch.equal(flat(answer), tiny_space().anchor)
    assert answer.metadata["reach"] == "0.0"


def test_neighbours_in_a_batch_keep_their_own(scaled: Generator) -> None:
    requests = [request_for(scaled, classes, seed=7) for classes in (INSIDE, MIXED, OUTSIDE)]
    for together, request in zip(scaled.generate_batch(requests), requests, strict=True):
        alone = scaled.generate_batch([request])[0]
        torch.testing.assert_close(flat(together), flat(alone), atol=1e-5, rtol=1e-5)
        assert together.metadata == alone.metadata


def test_fusing_counts_the_union(scaled: Generator) -> None:
    fused = scaled.fuse([["apple", "bus"], ["bus", "cat"]])  # one of three
    assert float(fused.metadata["reach"]) == pytest.approx(1 - (1 - REACH) / 3)
    assert fused.to_bytes() == scaled.generate(["apple", "bus", "cat"]).to_bytes()


def test_descriptions_make_no_name_known(whole: Generator, scaled: Generator) -> None:
    """A class is outside by its name: training saw no image of it, whatever describes it."""
    text = ConditionText(whole.text_encoder.encode(whole.prompts(INSIDE)), "d")
    one, other = (
        generator.generate_batch([replace(request_for(generator, OUTSIDE), condition_text=text)])[0]
        for generator in (whole, scaled)
    )
    assert other.metadata["reach"] == repr(REACH)
    torch.testing.assert_close(flat(other), scaled.anchor + REACH * (flat(one) - scaled.anchor), **CLOSE)


def test_a_noised_head_is_the_other_end(whole: Generator, scaled: Generator) -> None:
    """Names are read as ever; only at strength 1, where nothing of it is left, does the anchor come in."""
    head = whole.generate(OUTSIDE, seed=1)
    for strength in (0.0, 0.5):
        one, other = (
            g.enhance(head, OUTSIDE, strength=strength, method="noise", sampler="ddim", steps=3)
            for g in (whole, scaled)
        )
        assert torch.equal(flat(one), flat(other))
        assert "reach" not in other.metadata
        assert other.metadata["outside"] == '["bus", "lizard", "rocket"]'
    full = scaled.enhance(head, OUTSIDE, strength=1.0, method="noise")
    assert torch.equal(flat(full), flat(scaled.generate(OUTSIDE)))
    assert full.metadata["reach"] == repr(REACH)


def test_interpolation_is_with_the_head_that_plain_generation_draws_back(scaled: Generator) -> None:
    head, plain = scaled.generate(OUTSIDE, seed=1), scaled.generate(OUTSIDE)
    enhanced = scaled.enhance(head, OUTSIDE, strength=0.25)
    assert enhanced.metadata["reach"] == repr(REACH)
    expected = interpolate(scaled.config.head, flat(head), flat(plain), 0.25)
    assert torch.equal(flat(enhanced), expected)
    assert "reach" not in scaled.enhance(head, OUTSIDE, strength=0.0).metadata


def test_previews_and_watched_estimates_lead_to_the_head(whole: Generator, scaled: Generator) -> None:
    calls: dict[float, list[DenoiserCall]] = {1.0: [], REACH: []}
    for generator, scale in ((whole, 1.0), (scaled, REACH)):
        request = request_for(generator, OUTSIDE, steps=3, sampler="ddim")
        answer = generator.generate_batch([request], on_call=calls[scale].append)[0]
        assert torch.equal(calls[scale][-1].estimates[0], flat(answer))
        sample = generator.begin(request)
        for call in calls[scale]:
            generator.advance([sample])
            torch.testing.assert_close(flat(generator.preview(sample)), call.estimates[0])
    for one, other in zip(calls[1.0], calls[REACH], strict=True):
        assert torch.equal(one.samples, other.samples)  # the diffusion itself is untouched
        expected = scaled.anchor + REACH * (one.estimates - scaled.anchor)
        torch.testing.assert_close(other.estimates, expected, **CLOSE)


def test_the_treatment_is_part_of_a_checkpoint_and_absent_where_there_is_none(tmp_path: Path) -> None:
    source = TextEncoderConfig(source="dir:text_encoder", name="n")
    without, half = (
        save_tiny_checkpoint(tmp_path / name, text_encoder=source, classes=KNOWN, outside=outside)
        for name, outside in (("without", None), ("half", SETTINGS))
    )
    assert '"outside"' not in (tmp_path / "without" / "config.json").read_text()
    assert without.sha256 != half.sha256
    assert load_checkpoint(tmp_path / "half").config.outside == OutsideSettings(**SETTINGS)


def test_a_finished_checkpoint_takes_other_settings_and_gives_them_back(tmp_path: Path, scaled: Generator) -> None:
    folder = tmp_path / "checkpoint"
    before = save_tiny_checkpoint(folder, classes=KNOWN)
    record_outside(folder, OutsideSettings(**SETTINGS))
    one, other = Generator.load(folder).generate(MIXED), scaled.generate(MIXED)
    assert torch.equal(flat(one), flat(other))
    assert one.metadata["reach"] == other.metadata["reach"]
    assert record_outside(folder, None).sha256 == before.sha256 == load_checkpoint(folder).config.sha256


def test_one_that_names_no_classes_takes_none(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="names no classes of training"):
        record_outside(tmp_path / "checkpoint", OutsideSettings(**SETTINGS))
    load_checkpoint(tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("key", "value"),
    [("reach", -0.1), ("reach", 1.5), ("reach", float("nan")), ("reach", "much"), ("temperature", 0), ("more", 1)],
)
def test_values_that_are_not_allowed_are_named(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=rf"outside\.{key}"):
        save_tiny_checkpoint(tmp_path / "checkpoint", classes=KNOWN, outside=SETTINGS | {key: value})


def test_a_checkpoint_that_names_no_classes_cannot_tell_which_are_outside(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="outside is given without classes: name those that training saw"):
        save_tiny_checkpoint(tmp_path / "checkpoint", outside=SETTINGS)


def test_names_that_the_text_encoder_lacks_are_an_error_at_load(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path / "checkpoint", classes=("apple", "quokka"), outside=SETTINGS)
    with pytest.raises(CheckpointError, match=r"trained on names that its text encoder lacks:.*quokka"):
        Generator.load(tmp_path / "checkpoint")

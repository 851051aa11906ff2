"""Switches of a fit: each changes what it says, survives a resume, and costs nothing when it is off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.conftest import Toy
from tests.training.test_fit import assert_same_weights, make_fit
from text2weight.checkpoint import read_config
from text2weight.condition import Condition
from text2weight.generator import Generator
from text2weight.samplers import make_plan
from text2weight.weight_tokens import permute_units
from text2weight_training.fit import Fit, StepDraws
from text2weight_training.loss_watch import DivergedError
from text2weight_training.symmetry import equivariance_error

DROPOUT = {"fit__condition_dropout": 0.25, "denoiser__null_condition": True}
IMPLICIT = {"fit__permute_units": True, "scaling": "min_max", "denoiser__tokens": "chunk"}
PAPER = {
    "scaling": "min_max",
    "prediction": "epsilon",
    "denoiser__tokens": "chunk",
    "denoiser__class_tokens": False,
    "fit__fresh_batch": 0,
    "fit__task_weight": 0.0,
    "fit__symmetry_weight": 0.1,
    "fit__adversarial_weight": 0.01,
}
READS = {"fit__given_share": 0.5, "denoiser__reads_given": True}
EVERYTHING = {**DROPOUT, **IMPLICIT, "fit__symmetry_weight": 0.1, "fit__adversarial_weight": 0.01}
VARIANTS = [
    pytest.param({"fit__symmetry_weight": 0.1}, {"symmetry"}, id="symmetry"),
    pytest.param({"fit__label_smoothing": 0.1, "fit__feature_dropout": 0.1}, set(), id="regularised"),
    pytest.param(IMPLICIT, set(), id="permuted units"),
    pytest.param({"fit__adversarial_weight": 0.01}, {"adversarial", "discriminator"}, id="adversarial"),
    pytest.param(DROPOUT, set(), id="dropout"),
    pytest.param(READS, set(), id="given heads"),
    pytest.param({"fit__diffusion_weight": 0.0}, set(), id="task loss alone"),
    pytest.param({"denoiser__pooled": False}, set(), id="class tokens only"),
    pytest.param({"denoiser__class_tokens": False}, set(), id="pooled only"),
    pytest.param({"scaling": "min_max"}, set(), id="min-max"),
    pytest.param(EVERYTHING, {"symmetry", "adversarial", "discriminator"}, id="everything"),
]
USUAL = {"diffusion", "first call", "later calls", "gradient norm"}


def draw(fit: Fit, seed: int = 11) -> StepDraws:
    return fit._draw(torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("changes", "names"), VARIANTS)
def test_each_switch_trains_and_its_checkpoint_generates(
    toy: Toy, tmp_path: Path, changes: dict[str, Any], names: set[str]
) -> None:
    fit = make_fit(toy, tmp_path / "s.pt", fit__learning_rate=1e-2, **changes)
    first = fit._step(0.5)
    assert set(first) == USUAL | names
    fit.run()
    fit.write_checkpoint(tmp_path / "checkpoint")
    head = Generator.load(tmp_path / "checkpoint").generate(["apple", "bus"], seed=1)
    assert bool(torch.isfinite(fit.preset.head.flatten(head.tensors)).all())


def test_the_papers_losses_need_no_fresh_items(toy: Toy, tmp_path: Path) -> None:
    fit = make_fit(toy, tmp_path / "s.pt", fit__steps=60, fit__learning_rate=1e-2, **PAPER)
    draws = draw(fit)
    assert len(draws.noise) == len(draws.clean) == 8
    assert draws.batch.features.shape[1] == 0  # no task loss, so no images' features are gathered
    with torch.no_grad():
        before = fit._compute_losses(torch.Generator().manual_seed(1))
    fit.run()
    with torch.no_grad():
        after = fit._compute_losses(torch.Generator().manual_seed(1))
    assert set(after) == {"diffusion", "symmetry", "adversarial"}
    fit.write_checkpoint(tmp_path / "checkpoint")
    assert read_config(tmp_path / "checkpoint").task_size == (3, 6)  # the zoo's: no others were seen
    assert float(after["diffusion"]) < 0.98 * float(before["diffusion"])


def test_fresh_items_without_a_loss_are_not_drawn(toy: Toy, tmp_path: Path) -> None:
    for changes, expected in (
        ({}, 16),
        ({"fit__task_weight": 0.0}, 8),
        ({"fit__task_weight": 0.0, "fit__adversarial_weight": 0.1}, 16),
        ({"fit__fresh_batch": 0}, 8),
    ):
        assert len(draw(make_fit(toy, tmp_path / "s.pt", **changes)).noise) == expected


@pytest.mark.parametrize("changes", [EVERYTHING, PAPER, READS], ids=["everything", "paper", "given heads"])
def test_resumed_equals_undisturbed(toy: Toy, tmp_path: Path, changes: dict[str, Any]) -> None:
    undisturbed = make_fit(toy, tmp_path / "undisturbed.pt", **changes)
    undisturbed.run()
    broken = make_fit(toy, tmp_path / "state.pt", **changes)
    step = broken._step

    def stop(done: float) -> dict[str, Tensor]:
        if broken.state.step == 7:
            raise KeyboardInterrupt
        return step(done)

    broken._step = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    resumed = make_fit(toy, tmp_path / "state.pt", **changes)
    assert resumed.resume()
    assert resumed.state.step == 6
    resumed.run()
    assert_same_weights(resumed.denoiser, undisturbed.denoiser)
    assert_same_weights(resumed.average, undisturbed.average)
    if changes is READS:
        return
    assert resumed.adversary is not None
    assert undisturbed.adversary is not None
    assert_same_weights(resumed.adversary.discriminator, undisturbed.adversary.discriminator)


def test_what_is_off_is_not_built(toy: Toy, tmp_path: Path) -> None:
    fit = make_fit(toy, tmp_path / "s.pt")
    assert fit.adversary is None
    assert draw(fit).orders is None
    assert draw(fit).given is None
    assert bool((draw(fit).batch.condition.count > 0).all())
    fit.run()
    assert "adversary" not in torch.load(tmp_path / "s.pt", weights_only=True)


def test_a_switch_leaves_the_other_draws_as_they_are(toy: Toy, tmp_path: Path) -> None:
    """So that ablations differ by the switch alone."""
    plain = draw(make_fit(toy, tmp_path / "s.pt", scaling="min_max", denoiser__tokens="chunk"))
    switched = draw(make_fit(toy, tmp_path / "s.pt", **EVERYTHING))
    assert torch.equal(plain.timesteps, switched.timesteps)
    assert torch.equal(plain.start, switched.start)
    assert torch.equal(plain.noise[8:], switched.noise[8:])
    assert torch.equal(plain.batch.targets, switched.batch.targets)


class TestPermutedUnits:
    def test_item_and_noise_move_together(self, toy: Toy, tmp_path: Path) -> None:
        """x_n and target of an augmented item are g x_n and g epsilon of the plain one, for one g."""
        changes = {key: value for key, value in IMPLICIT.items() if key != "fit__permute_units"}
        fit = make_fit(toy, tmp_path / "s.pt", **IMPLICIT)
        plain, moved = draw(make_fit(toy, tmp_path / "s.pt", **changes)), draw(fit)
        spec, schedule = toy.preset.head, toy.preset.schedule
        found = []
        for i, head in enumerate(plain.clean):
            first = spec.unflatten(head)["linear1.weight"]
            first_moved = spec.unflatten(moved.clean[i])["linear1.weight"]
            order = torch.tensor([int((first - row).abs().sum(1).argmin()) for row in first_moved])
            assert sorted(order.tolist()) == [0, 1, 2, 3]
            assert torch.equal(moved.clean[i], permute_units(spec, head, order))
            assert torch.equal(moved.noise[i], permute_units(spec, plain.noise[i], order))
            found.append(tuple(order.tolist()))
        assert len(set(found)) > 1
        noisy, noisy_moved = (
            schedule.add_noise(draws.clean, draws.timesteps[:8], draws.noise[:8]) for draws in (plain, moved)
        )
        for i, order in enumerate(found):
            torch.testing.assert_close(noisy_moved[i], permute_units(spec, noisy[i], torch.tensor(order)))

    def test_the_permuted_head_computes_the_same(self, toy: Toy, tmp_path: Path) -> None:
        """The task loss of an augmented zoo item is that of the item: the space has no order of its own."""
        changes = {key: value for key, value in IMPLICIT.items() if key != "fit__permute_units"}
        plain = make_fit(toy, tmp_path / "s.pt", **changes)
        moved = make_fit(toy, tmp_path / "s.pt", **IMPLICIT)
        items = torch.arange(8)
        losses = [fit._losses.task(draw(fit).clean, draw(fit).batch.select(items)) for fit in (plain, moved)]
        torch.testing.assert_close(losses[0], losses[1], atol=1e-3, rtol=1e-3)


def fitted_error(toy: Toy, folder: Path, changes: dict[str, Any]) -> float:
    """Equivariance error of a short fit's network, in a space without an order of its own."""
    common = {"scaling": "min_max", "fit__learning_rate": 1e-2, "denoiser__class_path": 0}
    fit = make_fit(toy, folder / "s.pt", **common, **changes)
    fit.run()
    draws, preset = draw(fit), fit.preset
    timesteps = draws.timesteps[:8]
    noisy = preset.schedule.add_noise(draws.clean, timesteps, draws.noise[:8])
    condition = draws.batch.condition.select(torch.arange(8))
    source = torch.Generator().manual_seed(4)
    return equivariance_error(
        fit.average, preset.head, preset.schedule, preset.prediction, noisy, timesteps, condition, source
    )


def test_the_explicit_way_lowers_the_equivariance_error_and_the_exact_one_removes_it(toy: Toy, tmp_path: Path) -> None:
    chunk = {"denoiser__tokens": "chunk", "fit__steps": 80}
    plain = fitted_error(toy, tmp_path, chunk)
    assert plain > 0.5
    assert fitted_error(toy, tmp_path, {**chunk, "fit__symmetry_weight": 100.0}) < 0.7 * plain
    assert fitted_error(toy, tmp_path, {"denoiser__unit_identity": False}) < 1e-5


def test_the_implicit_way_lowers_the_equivariance_error(toy: Toy, tmp_path: Path) -> None:
    """Given time, and without a task loss: fresh items have no permuted heads."""
    chunk = {"denoiser__tokens": "chunk", "fit__task_weight": 0.0, "fit__steps": 300}
    plain = fitted_error(toy, tmp_path, chunk)
    assert fitted_error(toy, tmp_path, {**chunk, "fit__permute_units": True}) < 0.6 * plain


def test_a_dropped_condition_hides_the_text_but_not_from_the_losses(toy: Toy, tmp_path: Path) -> None:
    changes = {"fit__condition_dropout": 1.0, "denoiser__null_condition": True, "fit__learning_rate": 1e-2}
    fit = make_fit(toy, tmp_path / "s.pt", **changes)
    fit.run()
    draws = draw(fit)
    assert draws.batch.condition.count.tolist() == [0] * 16
    assert bool((draws.batch.mask.sum(1) >= 2).all())
    # The text was never seen: what is answered to any of them does not depend on it.
    noisy, timesteps = draws.noise[:8], draws.timesteps[:8]
    other = make_fit(toy, tmp_path / "s.pt", **changes)
    outputs = [
        fit.average(noisy, timesteps, draw(other, seed).batch.condition.select(torch.arange(8))) for seed in (1, 2)
    ]
    assert torch.equal(outputs[0], outputs[1])
    assert float(outputs[0].detach().abs().max()) > 0


def test_the_share_of_dropped_conditions(toy: Toy, tmp_path: Path) -> None:
    fit = make_fit(toy, tmp_path / "s.pt", **DROPOUT)
    counts = torch.cat([draw(fit, seed).batch.condition.count for seed in range(40)])
    assert 0.18 < float((counts == 0).float().mean()) < 0.32


def test_a_fit_with_dropout_makes_a_checkpoint_that_can_be_guided(toy: Toy, tmp_path: Path) -> None:
    fit = make_fit(toy, tmp_path / "s.pt", fit__learning_rate=1e-2, **DROPOUT)
    fit.run()
    fit.write_checkpoint(tmp_path / "checkpoint")
    generator = Generator.load(tmp_path / "checkpoint")
    heads = [generator.generate(["apple", "bus"], guidance_scale=scale) for scale in (0.0, 1.0, 3.0)]
    flat = torch.stack([generator.config.head.flatten(head.tensors) for head in heads])
    space = fit.space
    null, cond, strong = space.standardise(flat)  # one call each: three points of one line
    torch.testing.assert_close(strong, null + 3 * (cond - null), atol=1e-2, rtol=1e-2)
    assert not torch.allclose(cond, null, atol=1e-4)


def test_the_adversary_alternates_with_the_denoiser(toy: Toy, tmp_path: Path) -> None:
    fit = make_fit(toy, tmp_path / "s.pt", fit__adversarial_weight=0.5)
    assert fit.adversary is not None
    seen: list[tuple[int, int, int]] = []
    loss = fit.adversary.loss

    def watch(real: Tensor, fakes: Tensor, samples: Tensor) -> Tensor:
        seen.append((len(real), len(fakes), len(samples)))
        assert fakes.requires_grad
        assert not samples.requires_grad
        return loss(real, fakes, samples)

    fit.adversary.loss = watch  # type: ignore[method-assign]
    before = [parameter.clone() for parameter in fit.adversary.discriminator.parameters()]
    fit._step(0.5)
    # 8 zoo heads against 8 one-shot estimates of them, 8 of pure noise and 8 of those renoised; 4 samples.
    assert seen == [(8, 24, 4)]
    after = list(fit.adversary.discriminator.parameters())
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize(("default", "calls"), [(("mean", 1), 1), (("ddim", 3), 3), (("ddpm", 20), 4)])
def test_the_discriminator_meets_the_presets_own_sampler(
    toy: Toy, tmp_path: Path, default: tuple[str, int], calls: int
) -> None:
    sampler, steps = default
    fit = make_fit(
        toy,
        tmp_path / "s.pt",
        sampler=sampler,
        steps=steps,
        evaluation__samplers=[default],
        fit__adversarial_weight=0.5,
        fit__zoo_batch=2,  # fewer than samples: conditions are used twice
    )
    assert fit._plan == make_plan(sampler, calls, fit.preset.schedule)
    noise = draw(fit).sampler
    assert noise is not None
    assert noise.shape == (calls, 4, toy.preset.head.num_parameters)
    assert fit.adversary is not None
    fit._step(0.5)
    assert fit.adversary._round is not None
    assert len(fit.adversary._round[1]) == 2 + 8 + 8 + 4


def test_a_winning_discriminator_does_not_stop_the_fit(toy: Toy, tmp_path: Path) -> None:
    fit = make_fit(
        toy, tmp_path / "s.pt", fit__adversarial_weight=1.0, fit__discriminator_learning_rate=1.0, fit__steps=30
    )
    fit.run()
    assert fit.state.step == 30
    assert all(bool(torch.isfinite(tensor).all()) for tensor in fit.average.state_dict().values())


def test_the_condition_reaches_the_denoiser_as_drawn(toy: Toy, tmp_path: Path) -> None:
    """Both calls of a step see the same items without text."""
    fit = make_fit(toy, tmp_path / "s.pt", **DROPOUT)
    counts: list[list[int]] = []
    forward = fit.denoiser.forward

    def watch(noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        counts.append(condition.count.tolist())
        return forward(noisy, timesteps, condition)

    fit.denoiser.forward = watch  # type: ignore[method-assign]
    fit._compute_losses(torch.Generator().manual_seed(5))
    assert counts[0] == counts[1][8:]
    assert 0 in counts[1]


@pytest.mark.parametrize(("broken", "found"), [("discriminator", 3), ("adversarial", 4)])
def test_a_broken_discriminator_asks_for_a_lower_rate_of_its_own(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, found: int
) -> None:
    """In step 3 its own loss breaks, or its weights do, which the denoiser's loss meets in the next."""
    fit = make_fit(toy, tmp_path / "state.pt", fit__save_every=2, fit__adversarial_weight=0.01)
    assert fit.adversary is not None
    turn, weights = fit.adversary.step, next(fit.adversary.discriminator.parameters())

    def breaking(factor: float, gradient_clip: float) -> Tensor:
        loss = turn(factor, gradient_clip)
        if fit.state.step == 2:
            (loss if broken == "discriminator" else weights.detach()).fill_(torch.nan)
        return loss

    monkeypatch.setattr(fit.adversary, "step", breaking)
    message = rf"^{broken} is not finite at step {found}: lower fit.discriminator_learning_rate; the state of step 2 "
    with pytest.raises(DivergedError, match=message):
        fit.run()

"""Training a denoiser to read the head that it is to improve."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.training.conftest import Toy
from tests.training.test_fit import make_fit
from tests.training.toy import toy_preset, write_preset
from text2weight.checkpoint import read_config
from text2weight.generator import Generator
from text2weight_training.evaluate import generate_from_requests, task_requests
from text2weight_training.files import TrainingDataError
from text2weight_training.given import GivenDraws, draw_given, partly_trained
from text2weight_training.presets import load_preset

READS = {"fit__given_share": 0.5, "denoiser__reads_given": True}


def test_partly_trained_heads_by_hand() -> None:
    draws = GivenDraws(
        present=torch.tensor([True, False]),
        start=torch.tensor([1, 0]),
        progress=torch.tensor([[0.25], [1.0]]),
        noise=torch.tensor([[0.0, 0.5], [0.0, 0.0]]),
    )
    starts, clean = torch.tensor([[9.0, 9.0], [0.0, 4.0]]), torch.tensor([[8.0, 0.0], [3.0, 5.0]])
    given = partly_trained(draws, starts, clean, 1)
    # A quarter of the way from (0, 4) to (8, 0), and the noise; then all of the way; a fresh item has none.
    assert given.weights.tolist() == [[2.0, 3.5], [3.0, 5.0], [0.0, 0.0]]
    assert given.present.tolist() == [True, False, False]


def test_draws_have_the_share_and_the_spread_they_are_asked_for() -> None:
    draws = draw_given(4000, 10, 2, 0.3, torch.Generator().manual_seed(0))
    assert float(draws.present.float().mean()) == pytest.approx(0.3, abs=0.03)
    assert draws.start.bincount().tolist() == pytest.approx([2000, 2000], rel=0.1)
    assert float(draws.progress.mean()) == pytest.approx(0.5, abs=0.02)
    # Uniform levels: the mean of their squares is a third.
    assert float(draws.noise.square().mean()) == pytest.approx(1 / 3, rel=0.05)
    assert bool(draw_given(50, 10, 2, 1.0, torch.Generator()).present.all())


def test_a_fit_gives_heads_on_the_way_to_the_items_own(toy: Toy, tmp_path: Path) -> None:
    fit = make_fit(toy, tmp_path / "s.pt", **READS)
    draws = fit._draw(torch.Generator().manual_seed(11))
    plain = make_fit(toy, tmp_path / "s.pt")._draw(torch.Generator().manual_seed(11))
    assert draws.given is not None
    assert plain.given is None
    assert draws.given.noise.shape == draws.clean.shape
    # The switch draws last: heads, tasks and noise are those of a fit without it.
    assert torch.equal(draws.clean, plain.clean)
    assert torch.equal(draws.noise, plain.noise)
    starts = fit.space.restore(fit._starts)
    torch.testing.assert_close(starts, torch.stack([toy.zoo.universal, toy.zoo.base]), atol=1e-5, rtol=1e-5)


def test_a_short_fit_learns_to_improve_a_noisy_head(toy: Toy, tmp_path: Path) -> None:
    """Trained heads that the text says nothing about: all that is known of them is the given head.

    With clean of unit variance and given = a clean + s e, the best share to keep is
    E(a) / (E(a^2) + E(s^2)) = 3/4. A head that is off by 0.8 is then off by sqrt(0.25^2 + 0.6^2) = 0.65.
    """
    settings = {"fit__steps": 200, "fit__learning_rate": 1e-2, "fit__ema_decay": 0.98, "fit__task_weight": 0.0}
    fit = make_fit(toy, tmp_path / "s.pt", **settings, **READS)
    fit._zoo_clean = torch.randn(2048, fit.space.anchor.numel(), generator=torch.Generator().manual_seed(7))
    fit._zoo_tasks = fit._zoo_tasks[torch.arange(2048) % len(fit._zoo_tasks)]
    fit._starts = torch.zeros_like(fit._starts)
    fit.run()
    fit.write_checkpoint(tmp_path / "checkpoint")
    assert read_config(tmp_path / "checkpoint").denoiser.reads_given
    generator, tasks, space = Generator.load(tmp_path / "checkpoint"), list(toy.zoo.split.unseen), fit.space
    clean, noise = torch.randn(2, len(tasks), space.anchor.numel(), generator=torch.Generator().manual_seed(8))
    enhanced, generated = (
        space.standardise(heads_of(generator, toy, tasks, given))
        for given in (space.restore(clean + 0.8 * noise), None)
    )

    def error(heads: Tensor) -> float:
        return float((heads - clean).square().mean().sqrt())

    assert error(enhanced) < 0.72
    assert error(generated) > 0.9


def heads_of(generator: Generator, toy: Toy, tasks: list[tuple[int, ...]], given: Tensor | None) -> Tensor:
    """Heads of one call at nearly full strength, where next to nothing of the head is left in the noised sample."""
    requests = task_requests(toy.data, tasks, "mean", 1)
    if given is not None:
        requests = [
            replace(request, given=head, strength=0.95, method="noise")
            for request, head in zip(requests, given, strict=True)
        ]
    return generate_from_requests(generator, requests)


def test_presets_that_contradict_themselves_are_refused(tmp_path: Path) -> None:
    def refused(message: str, **changes: object) -> None:
        with pytest.raises(TrainingDataError, match=message):
            load_preset(str(write_preset(tmp_path / "p.yaml", **changes)))

    refused("fit.given_share 0.5 trains .* is false: set both or neither", fit__given_share=0.5)
    refused("fit.given_share 0.0 trains .* is true: set both or neither", denoiser__reads_given=True)
    refused("goes with neither fit.permute_units nor fit.symmetry_weight", **READS, fit__symmetry_weight=0.1)
    refused("read unit by unit", **READS, denoiser__tokens="chunk")
    refused("fit.given_share: Input should be less than or equal to 1", fit__given_share=1.5)


def test_runs_without_the_switch_are_what_they_were() -> None:
    assert "given_share" not in toy_preset().run_description()["fit"]
    assert toy_preset(**READS).run_description()["fit"]["given_share"] == 0.5

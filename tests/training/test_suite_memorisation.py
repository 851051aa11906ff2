"""The suite `memorisation`: what generated heads have in common with the zoo's."""

from __future__ import annotations

import math

import pytest
import torch

from tests.training.conftest import Toy, ToySuites
from text2weight.weight_tokens import permute_units
from text2weight_training.bootstrap import PairedBootstrap
from text2weight_training.stacked import heads_accuracy
from text2weight_training.suites import memorisation
from text2weight_training.suites.base import SuiteRun
from text2weight_training.suites.memorisation import TRAINED, ZOO, shared_mistakes

ORDER = torch.tensor([1, 3, 0, 2])


def test_every_method_is_measured(toy_suites: ToySuites) -> None:
    result = toy_suites.result("memorisation")
    baselines = {"zoo head of the closest text", "the same, noise 0.3", "the same, noise 1"}
    baselines |= {"average of the 2 closest", "average of the 3 closest", ZOO}
    assert set(result["unseen"]) == {"mean/1", "ddpm/4", TRAINED} | baselines
    assert set(result["seen"]) == set(result["diversity"]) == {"mean/1", "ddpm/4", TRAINED}
    assert (result["tasks"], result["zoo_heads"], result["seeds"]) == (6, 36, 2)


def test_zoo_heads_are_recognised_as_such_and_noise_at_its_level(toy_suites: ToySuites) -> None:
    unseen = toy_suites.result("memorisation")["unseen"]
    recalled = unseen["zoo head of the closest text"]
    assert recalled["distance"]["value"] == pytest.approx(0, abs=1e-4)
    assert recalled["shared_mistakes"]["value"] == 1
    assert unseen["the same, noise 0.3"]["distance"]["value"] == pytest.approx(0.3, rel=0.1)
    assert unseen["the same, noise 0.3"]["shared_mistakes"]["value"] < 1
    assert unseen[ZOO]["distance"]["value"] > 0.5
    assert unseen["mean/1"]["distance"]["value"] > 0.3


def test_one_call_gives_one_head_and_a_sampler_many(toy_suites: ToySuites) -> None:
    diversity = toy_suites.result("memorisation")["diversity"]
    assert diversity["mean/1"]["spread"]["value"] < 0.05 < diversity["ddpm/4"]["spread"]["value"]
    assert diversity[TRAINED]["spread"]["value"] > 0.05


def test_a_generator_that_recalls_the_zoo_is_found_out(
    toy: Toy, suite_run: SuiteRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zoo heads in another order of hidden units: other numbers, the same heads."""
    recalled = permute_units(toy.preset.head, toy.zoo.weights[:6], ORDER)
    monkeypatch.setattr(memorisation, "_generate", lambda *arguments: recalled)
    result = memorisation.run(suite_run)
    for entry in (result["unseen"]["mean/1"], result["seen"]["ddpm/4"]):
        assert entry["distance"]["value"] == pytest.approx(0, abs=1e-4)
        assert entry["shared_mistakes"]["value"] == pytest.approx(1, abs=0.05)
    assert result["diversity"]["ddpm/4"]["spread"]["value"] == 0
    assert result["seen"][TRAINED]["distance"]["value"] > 0.1


def test_training_again_is_another_head_of_the_same_task(toy: Toy, suite_run: SuiteRun) -> None:
    tasks = list(toy.zoo.split.seen[:6])
    first, second = (memorisation._train(suite_run, tasks, repeat) for repeat in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first, memorisation._train(suite_run, tasks, 0))
    for head, task, own in zip(first, tasks, toy.zoo.accuracy[:6], strict=True):
        accuracy = heads_accuracy(toy.preset.head, head[None], task, toy.data.test, toy.data.embeddings)
        assert float(accuracy) == pytest.approx(float(own), abs=0.15)


def test_shared_mistakes_by_hand(suite_run: SuiteRun, monkeypatch: pytest.MonkeyPatch) -> None:
    hits = torch.tensor([[True, False, False, True], [True, False, True, False]])
    monkeypatch.setattr(memorisation, "task_hits", lambda *arguments: (hits, torch.zeros(4)))
    # Wrong are 1, 2 and 1, 3: one of three in common.
    assert shared_mistakes(suite_run, (0, 1), torch.zeros(3), torch.zeros(3)) == pytest.approx(1 / 3)
    monkeypatch.setattr(memorisation, "task_hits", lambda *arguments: (torch.ones_like(hits), torch.zeros(4)))
    assert shared_mistakes(suite_run, (0, 1), torch.zeros(3), torch.zeros(3)) == 1


def test_diversity_by_hand(toy: Toy, suite_run: SuiteRun) -> None:
    head, task = toy.zoo.universal, toy.zoo.split.unseen[0]
    samples = torch.stack([head - 0.1, head + 0.1])[:, None]  # (S, M, P)
    # Two values 0.2 apart have the standard deviation 0.2 / sqrt(2).
    measured = memorisation._diversity(suite_run, [task], samples, 0.5, PairedBootstrap(1, 10, 0))
    assert measured["spread"]["value"] == pytest.approx(0.2 / math.sqrt(2) / 0.5, rel=1e-4)


def test_averages_are_of_the_heads_with_the_closest_texts(toy: Toy, suite_run: SuiteRun) -> None:
    tasks = list(toy.zoo.split.seen[:3])
    heads = memorisation.zoo_baselines(suite_run, tasks)
    assert torch.equal(heads["zoo head of the closest text"], toy.zoo.weights[:3])
    pair = heads["average of the 2 closest"] * 2 - toy.zoo.weights[:3]  # what the head was averaged with
    distances = (pair[:, None] - toy.zoo.weights).abs().amax(-1)  # (3, n)
    assert float(distances.min(1).values.max()) < 1e-5
    assert all(int(index) != i for i, index in enumerate(distances.argmin(1)))


def test_the_report_has_its_three_tables(toy_suites: ToySuites) -> None:
    text = memorisation.report(toy_suites.result("memorisation"))
    assert text.count("| --- |") == 3
    assert text.count("\n| ddpm/4 |") == 3

"""The suite `denoising`: accuracy along the sampler's steps."""

from __future__ import annotations

import pytest

from tests.training.conftest import Toy, ToySuites
from text2weight.samplers import make_plan
from text2weight_training.baselines import accuracies
from text2weight_training.evaluate import generate_heads
from text2weight_training.suites import denoising
from text2weight_training.suites.base import SuiteRun


def test_curves_follow_the_samplers_plans(toy: Toy, toy_suites: ToySuites) -> None:
    result = toy_suites.result("denoising")
    assert set(result["curves"]) == {"ddpm/4", "dpmpp_2m/3"}
    for name, calls in result["curves"].items():
        sampler, steps = name.split("/")
        plan = make_plan(sampler, int(steps), toy.preset.schedule)
        assert [call["timestep"] for call in calls] == [step.timestep for step in plan]


def test_the_last_estimate_is_the_generated_head(toy: Toy, toy_suites: ToySuites, suite_run: SuiteRun) -> None:
    result, tasks = toy_suites.result("denoising"), list(toy.zoo.split.unseen[:6])
    heads = generate_heads(suite_run.generator, toy.data, tasks, "ddpm", 4, suite_run.preset.seed)
    scores = accuracies(toy.data, toy.preset.head, tasks, {"made": heads, "universal": toy.zoo.universal})
    calls = result["curves"]["ddpm/4"]
    assert calls[-1]["estimate"]["value"] == pytest.approx(scores["made"].mean(), abs=1e-6)
    assert result["universal"]["value"] == pytest.approx(scores["universal"].mean(), abs=1e-6)
    expected = calls[-1]["estimate"]["value"] - calls[0]["estimate"]["value"]
    assert result["gain"]["ddpm/4"]["value"] == pytest.approx(expected, abs=1e-6)


def test_samples_get_better_and_stay_behind_the_estimates(toy_suites: ToySuites) -> None:
    for calls in toy_suites.result("denoising")["curves"].values():
        samples = [call["sample"]["value"] for call in calls]
        assert samples[0] < samples[-1]
        assert all(call["sample"]["value"] < call["estimate"]["value"] for call in calls)


def test_tasks_of_several_batches_are_joined(
    suite_run: SuiteRun, toy_suites: ToySuites, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(denoising, "HEADS_HELD", 8)
    again = denoising.run(suite_run)
    for name, calls in toy_suites.result("denoising")["curves"].items():
        for call, other in zip(calls, again["curves"][name], strict=True):
            assert call["estimate"]["value"] == pytest.approx(other["estimate"]["value"], abs=0.01)


def test_the_report_has_a_row_per_sampler(toy_suites: ToySuites) -> None:
    text = denoising.report(toy_suites.result("denoising"))
    assert text.count("\n| ddpm/4 |") == text.count("\n| dpmpp_2m/3 |") == 1
    assert "6 unseen tasks" in text

"""The suite `enhance`: what improves heads whose training was stopped early."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.training.conftest import Toy, ToySuites
from tests.training.toy import toy_preset
from text2weight.enhancement import scale_last_layer
from text2weight.head import apply_heads, class_logits
from text2weight.weight_tokens import permute_units
from text2weight_training.files import TrainingDataError
from text2weight_training.stacked import Moments, cosine_decay, initial_head, sampled_loss, train_stack
from text2weight_training.suites import enhance
from text2weight_training.suites.base import SuiteRun
from text2weight_training.tasks import pad_tasks, task_embeddings

ORDER = torch.tensor([1, 3, 0, 2])


def parts(toy_suites: ToySuites) -> list[tuple[dict, dict, dict]]:
    """(result of a start, of a stopping point, of a sampler) of all of them."""
    return [
        (start, stopped, part)
        for start in toy_suites.result("enhance")["starts"].values()
        for stopped in start["stopped"].values()
        for part in stopped["samplers"].values()
    ]


def test_every_method_is_measured(toy_suites: ToySuites) -> None:
    result = toy_suites.result("enhance")
    assert set(result["generated"]) == {"mean/1", "ddim/3"}
    assert set(result["starts"]) == {"universal", "base", "default"}
    assert (result["tasks"], result["steps"]) == (6, 80)
    for start in result["starts"].values():
        assert {share: stopped["steps"] for share, stopped in start["stopped"].items()} == {"0.1": 8, "0.5": 40}
    for _, stopped, part in parts(toy_suites):
        assert set(stopped["samplers"]) == {"mean/1", "ddim/3"}
        assert list(part["interpolated"]) == list(part["noised"]) == ["0", "0.4", "0.8", "1"]
        assert set(part["gain"]) == {"input", "generated", "noised", "continued"}


def test_the_ends_of_both_sweeps_are_the_input_and_plain_generation(toy_suites: ToySuites) -> None:
    result = toy_suites.result("enhance")
    for start in result["starts"].values():
        for stopped in start["stopped"].values():
            for sampler, part in stopped["samplers"].items():
                for way in ("interpolated", "noised"):
                    assert part[way]["0"] == stopped["input"]
                    assert part[way]["1"] == result["generated"][sampler]


def test_longer_training_is_better_and_gains_are_differences(toy_suites: ToySuites) -> None:
    for start in toy_suites.result("enhance")["starts"].values():
        early, late = (start["stopped"][share]["input"]["value"] for share in ("0.1", "0.5"))
        assert early < late < start["trained"]["value"] + 0.05
    for _, stopped, part in parts(toy_suites):
        chosen = part["chosen"]["interpolated"]["value"]
        assert part["gain"]["input"]["value"] == pytest.approx(chosen - stopped["input"]["value"], abs=1e-9)
        assert part["gain"]["continued"]["value"] == pytest.approx(chosen - part["continued"]["value"], abs=1e-9)


def test_a_barely_trained_head_is_improved(toy_suites: ToySuites) -> None:
    """The generator of the toy run knows the tasks' texts: it must help a head that has seen next to nothing."""
    stopped = toy_suites.result("enhance")["starts"]["base"]["stopped"]["0.1"]
    for part in stopped["samplers"].values():
        for way in ("interpolated", "noised"):
            assert part[way]["0.8"]["value"] > stopped["input"]["value"] + 0.05


def test_training_goes_on_for_as_long_as_enhancing_took(toy_suites: ToySuites) -> None:
    for start, _, part in parts(toy_suites):
        assert part["seconds"] > 0
        assert part["continued_steps"] == round(part["seconds"] / start["step_seconds"])


def test_stopped_heads_are_those_of_one_whole_training(toy: Toy, suite_run: SuiteRun) -> None:
    tasks = list(toy.zoo.split.unseen[:3])
    preset, recipe = suite_run.preset, suite_run.preset.evaluation.oracle
    start = enhance.starting_heads(suite_run, "base", 3)
    stopped = enhance.train_and_stop(suite_run, start, tasks, {1, 40, recipe.steps})
    assert list(stopped.heads) == [1, 40, recipe.steps]
    whole = train_stack(
        preset.head, toy.zoo.base, tasks, toy.data.train, toy.data.embeddings, preset.logit_scale, recipe, preset.seed
    )
    assert torch.equal(stopped.heads[recipe.steps], whole)
    # AdamW's first step moves every number by the learning rate, and nothing by more.
    moved = (stopped.heads[1] - start).abs()
    assert float(moved.max()) == pytest.approx(recipe.learning_rate, rel=1e-3)
    assert not torch.equal(stopped.heads[40], whole)


def test_several_stacks_give_the_heads_in_the_tasks_order(toy: Toy, suite_run: SuiteRun) -> None:
    tasks = list(toy.zoo.split.unseen[:5])
    small = suite_run.preset.model_copy(update={"zoo": suite_run.preset.zoo.model_copy(update={"stack": 2})})
    in_parts = SuiteRun(suite_run.data, suite_run.zoo, suite_run.generator, small, suite_run.out)
    start = enhance.starting_heads(suite_run, "default", 5)
    stopped = enhance.train_and_stop(in_parts, start, tasks, {1})
    assert stopped.heads[1].shape == start.shape
    assert float((stopped.heads[1] - start).abs().max()) < 1.01 * small.evaluation.oracle.learning_rate
    assert stopped.moments[1].mean.shape == stopped.moments[1].square.shape == start.shape
    assert stopped.moments[1].steps == 1


@pytest.mark.parametrize("stack", [2, 12])
def test_training_goes_on_as_if_it_had_not_stopped(toy: Toy, suite_run: SuiteRun, stack: int) -> None:
    """One AdamW throughout for each stack, its rate on the first training's cosine and then on one from there to 0."""
    tasks, stop, steps = list(toy.zoo.split.unseen[:5]), 20, 15
    preset = suite_run.preset.model_copy(update={"zoo": suite_run.preset.zoo.model_copy(update={"stack": stack})})
    run, recipe = replace(suite_run, preset=preset), preset.evaluation.oracle
    starts = enhance.starting_heads(run, "default", 5)
    there = recipe.learning_rate * cosine_decay(stop / recipe.steps)
    expected = []
    for first in range(0, 5, stack):
        part = tasks[first : first + stack]
        flat = starts[first : first + stack].clone().requires_grad_()
        optimizer = torch.optim.AdamW([flat], weight_decay=recipe.weight_decay, fused=True)
        labels = pad_tasks(part)
        text = task_embeddings(toy.data.embeddings, labels)
        for seed, rate, done, length in (
            (preset.seed, recipe.learning_rate, stop, recipe.steps),
            (preset.seed + 1_000_003, there, steps, steps),
        ):
            source = torch.Generator().manual_seed(seed + first)
            for step in range(done):
                optimizer.param_groups[0]["lr"] = rate * cosine_decay(step / length)
                optimizer.zero_grad()
                loss = sampled_loss(preset.head, flat, labels, text, toy.data.train, preset.logit_scale, recipe, source)
                (len(part) * loss).backward()
                optimizer.step()
        expected.append(flat.detach())
    stopped = enhance.train_and_stop(run, starts, tasks, {stop})
    # Twice: what was kept is not used up.
    for _ in range(2):
        continued = enhance.train_on(run, tasks, stopped, stop, steps)
        torch.testing.assert_close(continued, torch.cat(expected), atol=1e-5, rtol=1e-4)


def test_default_starts_are_each_their_own_and_not_the_zoos(toy: Toy, suite_run: SuiteRun) -> None:
    starts = enhance.starting_heads(suite_run, "default", 3)
    zoos = initial_head(toy.preset.head, toy.preset.seed)
    assert all(not torch.equal(one, other) for one, other in ((starts[0], starts[1]), (starts[0], zoos)))
    assert torch.equal(enhance.starting_heads(suite_run, "base", 2)[1], toy.zoo.base)
    assert torch.equal(enhance.starting_heads(suite_run, "universal", 2)[1], toy.zoo.universal)


def test_training_on_starts_at_the_rate_the_schedule_had_come_to(toy: Toy, suite_run: SuiteRun) -> None:
    tasks, given = list(toy.zoo.split.unseen[:2]), toy.zoo.weights[:2]
    recipe = suite_run.preset.evaluation.oracle
    stop, none = recipe.steps // 4, torch.zeros_like(given)
    stopped = enhance.Stopped({stop: given}, {stop: Moments(none, none, 0)}, 1.0)
    assert enhance.train_on(suite_run, tasks, stopped, stop, 0) is given
    moved = (enhance.train_on(suite_run, tasks, stopped, stop, 1) - given).abs()
    expected = recipe.learning_rate * 0.5 * (1 + math.cos(math.pi / 4))
    assert float(moved.max()) == pytest.approx(expected, rel=1e-3)


def test_a_rewritten_head_interpolates_as_the_head_itself(toy: Toy, suite_run: SuiteRun) -> None:
    """Another order of units and another length of the output: the same classifier, and no way back to it by lerp."""
    spec, head = toy.preset.head, toy.zoo.weights[0]
    rewritten = scale_last_layer(spec, permute_units(spec, head, ORDER), 3.0)
    between = enhance.interpolate_all(suite_run, rewritten[None], head[None], 0.4)
    torch.testing.assert_close(between[0], rewritten, atol=1e-5, rtol=1e-4)
    # Towards another head: the ends are the two classifiers.
    task, made = toy.zoo.split.unseen[0], toy.zoo.weights[1]
    features, _ = toy.data.test.of_task(task)
    texts = toy.data.embeddings[list(task)]
    ends = [enhance.interpolate_all(suite_run, rewritten[None], made[None], share)[0] for share in (0.0, 1.0)]
    for end, expected in zip(ends, (head, made), strict=True):
        logits = [class_logits(apply_heads(spec, x[None], features), texts, 1.0) for x in (end, expected)]
        torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_no_task_is_judged_by_a_choice_made_on_it() -> None:
    # On even places the first variant is best, on odd ones the second.
    first, second = np.array([0.9, 0.1, 0.8, 0.2]), np.array([0.3, 0.7, 0.4, 0.6])
    assert enhance.cross([first, second]).tolist() == [0.3, 0.1, 0.4, 0.2]
    assert enhance.cross([first]).tolist() == first.tolist()


def test_a_training_that_diverges_is_an_error(toy: Toy, suite_run: SuiteRun) -> None:
    start = torch.full((2, toy.preset.head.num_parameters), math.nan)
    with pytest.raises(TrainingDataError, match=r"diverged .*lower the learning rate"):
        enhance.train_and_stop(suite_run, start, list(toy.zoo.split.unseen[:2]), {1})


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("strengths", [0, 1], "0 returns the head and 1 ignores it"),
        ("strengths", [], "give one between"),
        ("strengths", [0.5, 1.1], "less than or equal to 1"),
        ("shares", [1.0], "less than 1"),
        ("shares", [0], "greater than 0"),
        ("tasks", 1, "greater than or equal to 2"),
        ("starts", ["zoo"], "'base', 'universal' or 'default'"),
        ("samplers", [["ddim", 41]], "allowed are 1 to 40"),
    ],
)
def test_settings_that_mean_nothing_are_refused(setting: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        toy_preset(**{f"suites__enhance__{setting}": value})


def test_the_report_has_three_tables_for_each_start(toy_suites: ToySuites) -> None:
    text = enhance.report(toy_suites.result("enhance"))
    assert text.count("| --- |") == 9
    assert text.count("\n| 10 % | mean/1 |") == text.count("\n| 50 % | ddim/3 |") == 9
    assert "| stopped at | sampler | 0 | 0.4 | 0.8 | 1 |" in text
    assert "6 unseen tasks" in text

"""The suite `landscape`: the loss around trained heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.training.conftest import Toy, ToySuites
from text2weight.head import HeadSpec
from text2weight.weight_tokens import permute_units
from text2weight_training.bootstrap import PairedBootstrap
from text2weight_training.suites import landscape
from text2weight_training.suites.base import SuiteRun, task_loss, training_sample
from text2weight_training.suites.directions import between, equally_long, filter_normalised

TASKS = [(0, 3, 5), (7, 1, 2, 4)]


def test_each_filter_of_a_direction_is_as_long_as_the_heads() -> None:
    spec = HeadSpec(input_dim=3, hidden_dim=2, output_dim=2)
    tensors = {
        "linear1.weight": torch.tensor([[3.0, 0.0, 4.0], [0.0, 0.0, 2.0]]),
        "linear1.bias": torch.tensor([1.0, 1.0]),
        "linear2.weight": torch.tensor([[6.0, 8.0], [0.0, 0.0]]),
        "linear2.bias": torch.tensor([1.0, 1.0]),
    }
    directions = filter_normalised(spec, spec.flatten(tensors), 4, torch.Generator().manual_seed(0))
    blocks = spec.unflatten(directions)
    torch.testing.assert_close(blocks["linear1.weight"].norm(dim=-1), torch.tensor([5.0, 2.0]).expand(4, -1))
    torch.testing.assert_close(blocks["linear2.weight"].norm(dim=-1), torch.tensor([10.0, 0.0]).expand(4, -1))
    assert not blocks["linear1.bias"].any()
    assert not blocks["linear2.bias"].any()
    assert float((directions[0] - directions[1]).norm()) > 1


def test_directions_do_not_see_the_scale_of_the_last_layer(toy: Toy, suite_run: SuiteRun) -> None:
    """Cosine logits are blind to it, so must the sharpness be: what filter normalisation is for."""
    spec, head = toy.preset.head, toy.zoo.universal
    blocks = {name: block.clone() for name, block in spec.unflatten(head).items()}
    for name in ("linear2.weight", "linear2.bias"):
        blocks[name] *= 100
    heads = torch.stack([head, spec.flatten(blocks)])
    alone = [landscape.loss_rises(suite_run, TASKS[:1], row[None]) for row in heads]
    np.testing.assert_allclose(alone[0], alone[1], rtol=1e-3, atol=1e-5)
    assert alone[0][0, 0, -1] > alone[0][0, 0, 0] > 0  # farther is higher, and a trained head lies low


def test_rises_are_means_over_directions(toy: Toy, suite_run: SuiteRun) -> None:
    head, task = toy.zoo.weights[0], TASKS[0]
    directions = filter_normalised(toy.preset.head, head, 3, torch.Generator().manual_seed(suite_run.preset.seed))
    features, targets = training_sample(suite_run, task, 64)

    def loss(weights: torch.Tensor) -> float:
        return float(task_loss(suite_run, weights[None], task, features, targets))

    rises = landscape.loss_rises(suite_run, [task], head[None])
    assert rises.shape == (2, 1, 2)
    for i, radius in enumerate((0.1, 0.5)):
        expected = np.mean([loss(head + radius * direction) for direction in directions]) - loss(head)
        assert rises[0, 0, i] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_a_barrier_is_what_lies_above_the_straight_line() -> None:
    places = np.array([0.0, 0.25, 0.5, 1.0])
    losses = np.array([[1.0, 2.0, 4.0, 3.0], [0.0, 0.1, 0.2, 0.8]])
    np.testing.assert_allclose(landscape.barrier(losses, places), [2.0, 0.0])


def test_lines_and_equal_lengths() -> None:
    first, second = torch.tensor([0.0, 2.0]), torch.tensor([4.0, 2.0])
    line = between(first, second, torch.tensor([0.0, 0.25, 1.0]))
    assert line.tolist() == [[0.0, 2.0], [1.0, 2.0], [4.0, 2.0]]
    torch.testing.assert_close(
        equally_long(torch.tensor([3.0, 4.0]), torch.tensor([0.0, -2.0])), torch.tensor([0.0, -5.0])
    )


def test_aligning_takes_the_barrier_out_of_a_permutation(toy: Toy, suite_run: SuiteRun) -> None:
    heads = toy.zoo.weights[:2]
    moved = permute_units(toy.preset.head, heads, torch.tensor([2, 3, 1, 0]))
    line = landscape._lines(suite_run, TASKS, heads, moved, PairedBootstrap(2, 20, 0))
    assert line["places"] == [0, 0.25, 0.5, 0.75, 1]
    assert line["as trained"]["barrier"]["train"]["value"] > 0.1
    assert line["units aligned"]["barrier"]["train"]["value"] == pytest.approx(0, abs=1e-5)
    ends = [line["as trained"]["loss"]["test"][i]["value"] for i in (0, -1)]
    assert ends[0] == pytest.approx(ends[1], abs=1e-5)


def test_both_starts_end_lower_than_chance(toy_suites: ToySuites) -> None:
    result = toy_suites.result("landscape")
    assert set(result["starts"]) == {"generated (mean/1)", "Xavier uniform"} == {result["generated"], result["xavier"]}
    for entry in result["starts"].values():
        assert entry["after"]["value"] > entry["before"]["value"]
        assert entry["loss"]["train"]["value"] < np.log(3)
        assert entry["rise"]["train"][1]["value"] > entry["rise"]["train"][0]["value"]
    before = {name: entry["before"]["value"] for name, entry in result["starts"].items()}
    assert before[result["generated"]] > before[result["xavier"]]


def test_differences_are_between_the_two(toy_suites: ToySuites) -> None:
    result = toy_suites.result("landscape")
    for data in ("train", "test"):
        for i, entry in enumerate(result["rise_difference"][data]):
            one, other = (result["starts"][result[name]]["rise"][data][i]["value"] for name in ("xavier", "generated"))
            assert entry["value"] == pytest.approx(one - other, abs=1e-9)


def test_surfaces_pass_through_what_they_are_drawn_around(toy: Toy, suite_run: SuiteRun) -> None:
    tasks = list(toy.zoo.split.unseen[:2])
    starts = {"one": toy.zoo.weights[:2], "other": toy.zoo.weights[2:4]}
    trained = {name: landscape._train(suite_run, tasks, heads) for name, heads in starts.items()}
    # Places -1, -0.5, 0, 0.5, 1: the trained head is one of them.
    settings = suite_run.preset.suites.landscape.model_copy(update={"task_extent": 1.0})
    suites = suite_run.preset.suites.model_copy(update={"landscape": settings})
    narrow = SuiteRun(
        toy.data, toy.zoo, suite_run.generator, suite_run.preset.model_copy(update={"suites": suites}), suite_run.out
    )
    surfaces = landscape._surfaces(narrow, tasks, starts, trained)
    features, targets = training_sample(narrow, tasks[0], 64)
    for name in starts:
        both = torch.stack([starts[name][0], trained[name][0]])
        start, end = task_loss(narrow, both, tasks[0], features, targets).tolist()
        around, plane = (np.array(surfaces[kind][name]["loss"]) for kind in ("random", "tasks"))
        assert around.shape == plane.shape == (5, 5)
        assert around[2, 2] == pytest.approx(end, abs=1e-5)
        assert plane[2, 2] == pytest.approx(start, abs=1e-5)
        assert plane[2, 4] == pytest.approx(end, abs=1e-4)


def test_the_report_names_starts_lines_and_radii(toy_suites: ToySuites) -> None:
    text = landscape.report(toy_suites.result("landscape"))
    for row in ("generated (mean/1)", "Xavier uniform", "as trained", "units aligned"):
        assert text.count(f"\n| {row} |") == 1
    assert text.count("\n| 0.1 | train |") == text.count("\n| 0.5 | test |") == 1


def test_every_figure_is_drawn(toy_suites: ToySuites) -> None:
    drawn = {path.name for path in toy_suites.out.glob("landscape*.png")}
    assert drawn == {"landscape.png", "landscape-random.png", "landscape-tasks.png"}

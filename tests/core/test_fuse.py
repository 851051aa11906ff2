from pathlib import Path

import pytest

from text2weight import Generator
from text2weight.condition import emphasis_of_tasks, union_of_tasks
from text2weight.errors import InvalidInputError


@pytest.fixture(scope="module")
def generator(tiny_checkpoint: Path) -> Generator:
    return Generator.load(tiny_checkpoint)


def test_a_fused_head_is_the_head_of_the_union(generator: Generator) -> None:
    fused = generator.fuse([["apple", "bus"], ["Bus", "lizard"], ["maple_tree"]], seed=4)
    assert fused.classes == ("apple", "bus", "lizard", "maple tree")
    assert fused.to_bytes() == generator.generate(fused.classes, seed=4).to_bytes()


def test_weights_change_the_head_only_in_proportion(generator: Generator) -> None:
    tasks = [["apple", "bus"], ["bus", "lizard"]]
    plain = generator.fuse(tasks, weights=[1, 1])
    assert plain.to_bytes() == generator.fuse(tasks, weights=[1, 1]).to_bytes()
    assert plain.to_bytes() != generator.fuse(tasks, weights=[1, 9]).to_bytes()


def test_a_class_of_two_tasks_has_the_weight_of_both() -> None:
    tasks = [["apple", "bus"], ["BUS", "lizard"]]
    assert union_of_tasks(tasks) == ("apple", "bus", "lizard")
    assert emphasis_of_tasks(tasks, [1.0, 2.5]).tolist() == [1.0, 3.5, 2.5]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "1 weights for 2 tasks"),
        ([1.0, 0.0], r"tasks\[1\] weighs 0.0: allowed is above 0 to 1000"),
        ([-1.0, 1.0], r"tasks\[0\] weighs -1.0"),
        ([1.0, float("nan")], r"tasks\[1\] weighs nan"),
        ([1.0, float("inf")], r"tasks\[1\] weighs inf"),
    ],
)
def test_weights_that_mean_nothing_are_refused(generator: Generator, weights: list[float], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as caught:
        generator.fuse([["apple", "bus"], ["lizard"]], weights=weights)
    assert caught.value.field == "tasks"


@pytest.mark.parametrize("template", ["", "a photo", "{} and {}", "a {name}", "a {0}", "{{}}", "a {}" + "x" * 200])
def test_a_template_needs_one_place_for_the_name(generator: Generator, template: str) -> None:
    with pytest.raises(InvalidInputError, match=r"one \{\} must stand for the name") as caught:
        generator.prompts(["apple"], template)
    assert caught.value.field == "prompt_template"
    assert generator.prompts(["apple"], "one {} here") == ["one apple here"]

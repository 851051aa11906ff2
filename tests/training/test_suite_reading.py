"""The suite `reading`: right and wrong texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.training.conftest import Toy, ToySuites
from tests.training.toy import toy_table
from text2weight.descriptions import ConditionText
from text2weight.errors import CheckpointError
from text2weight.generator import GenerationRequest
from text2weight.text_encoder import EmbeddingTable, write_embedding_tables
from text2weight_training.evaluate import task_requests
from text2weight_training.files import TrainingDataError
from text2weight_training.suites import reading
from text2weight_training.suites.base import SuiteRun
from text2weight_training.suites.runner import with_paraphrases


def write_table(folder: Path, *, noise: float = 0.0, count: int = 12, dim: int = 8, template: str = "the {}") -> str:
    """The toy's texts under another prompt: a little different, or fewer."""
    table = toy_table(dim)
    drawn = torch.randn(table.embeddings.shape, generator=torch.Generator().manual_seed(0))
    rows = F.normalize(table.embeddings + noise * drawn, dim=-1)[:count]
    write_embedding_tables(folder / "other.safetensors", {"the": EmbeddingTable(template, table.names[:count], rows)})
    return f"{folder / 'other.safetensors'}#the"


def with_tables(run: SuiteRun, *tables: str, **changes: Any) -> SuiteRun:
    preset = with_paraphrases(run.preset, tables)
    suites = preset.suites
    settings = suites.reading.model_copy(update={"samplers": (("mean", 1),), **changes})
    return replace(run, preset=preset.model_copy(update={"suites": suites.model_copy(update={"reading": settings})}))


def test_wrong_texts_of_two_tasks() -> None:
    tasks = [(0, 1, 2), (5, 4)]
    texts = reading.wrong_texts(tasks, 8, seed=0)
    assert set(texts) == {reading.REORDERED, reading.OTHER_TASK, reading.OTHER_NAMES}
    assert [sorted(named) for named in texts[reading.REORDERED]] == [[0, 1, 2], [4, 5]]
    assert texts[reading.OTHER_TASK] == [(5, 4), (0, 1, 2)]
    for task, named in zip(tasks, texts[reading.OTHER_NAMES], strict=True):
        assert len(set(named)) == len(task)
        assert not set(named) & set(task)
    # Only two classes are left over for a task of three: it keeps one of its own.
    (named,) = reading.wrong_texts([(0, 1, 2)], 5, seed=0)[reading.OTHER_NAMES]
    assert len({*named} & {0, 1, 2}) == 1
    assert {3, 4} < {*named}


def test_the_order_of_names_does_not_matter_and_other_names_do(toy_suites: ToySuites) -> None:
    for measured in toy_suites.result("reading")["samplers"].values():
        texts = measured["texts"]
        assert texts[reading.REORDERED]["difference"]["value"] == pytest.approx(0, abs=0.005)
        assert texts[reading.OTHER_NAMES]["difference"]["interval"][1] < -0.05
        right, other = (texts[name]["accuracy"]["value"] for name in (reading.RIGHT, reading.OTHER_TASK))
        assert right > other
        assert texts[reading.OTHER_TASK]["difference"]["value"] == pytest.approx(other - right)


def test_a_class_left_out_of_the_text_is_recognised_less(toy_suites: ToySuites) -> None:
    for measured in toy_suites.result("reading")["samplers"].values():
        dropped = measured["dropped"]
        assert dropped["tasks"] == 8
        assert dropped["class"]["difference"]["value"] < -0.05
        assert dropped["class"]["difference"]["value"] < dropped["other_classes"]["difference"]["value"]


def test_shared_classes_are_counted(toy_suites: ToySuites) -> None:
    shared = toy_suites.result("reading")["shared_classes"]
    assert shared[reading.OTHER_NAMES] == 0
    assert 0 < shared[reading.OTHER_TASK] < 1


def test_a_generator_that_ignores_its_text_shows_no_difference(
    toy: Toy, suite_run: SuiteRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Sequence[GenerationRequest]] = []

    def deaf(generator: object, requests: Sequence[GenerationRequest]) -> torch.Tensor:
        asked.append(requests)
        return toy.zoo.universal.expand(len(requests), -1)

    monkeypatch.setattr(reading, "generate_from_requests", deaf)
    result = reading.run(with_tables(suite_run))
    measured = result["samplers"]["mean/1"]
    for entry in [*list(measured["texts"].values())[1:], measured["dropped"]["class"]]:
        assert entry["difference"] == {"value": 0.0, "interval": [0.0, 0.0]}
    assert measured["texts"][reading.RIGHT]["accuracy"] == result["universal"]
    # The last requests are those with a class left out: its name and its embedding, and no other.
    for whole, fewer in zip(asked[0], asked[-1], strict=True):
        missing = set(whole.classes) - set(fewer.classes)
        assert len(fewer.classes) == len(fewer.embeddings) == len(whole.classes) - 1
        assert len(missing) == 1
        place = whole.classes.index(missing.pop())
        rest = [i for i in range(len(whole.classes)) if i != place]
        assert torch.equal(fewer.embeddings, whole.embeddings[rest])


def test_a_class_left_out_is_left_out_of_the_conditions_own_texts_too(toy: Toy) -> None:
    (request,) = task_requests(toy.data, [(0, 4, 2)], "mean", 1)
    rows = toy.data.embeddings[[5, 6, 7]]
    fewer = reading._without(replace(request, condition_text=ConditionText(rows, "others")), 1)
    assert fewer.condition_text is not None
    assert torch.equal(fewer.condition_text.embeddings, rows[[0, 2]])
    assert torch.equal(fewer.embeddings, toy.data.embeddings[[0, 2]])


def test_without_a_task_of_three_classes_none_is_dropped(toy: Toy, suite_run: SuiteRun) -> None:
    zoo = replace(toy.zoo, split=replace(toy.zoo.split, unseen=((0, 1), (3, 2), (7, 4))))
    result = reading.run(with_tables(replace(suite_run, zoo=zoo), tasks=3))
    assert result["samplers"]["mean/1"]["dropped"] is None
    assert "left out of the text" not in reading.report(result)


def test_paraphrases_near_and_far(suite_run: SuiteRun, tmp_path: Path) -> None:
    for folder in ("near", "far"):
        (tmp_path / folder).mkdir()
    near, far = write_table(tmp_path / "near"), write_table(tmp_path / "far", noise=5.0)
    (same,) = reading.run(with_tables(suite_run, near))["samplers"]["mean/1"]["paraphrases"].values()
    assert same["tasks"] == 8
    assert same["difference"] == {"value": 0.0, "interval": [0.0, 0.0]}
    result = reading.run(with_tables(suite_run, far))
    assert result["samplers"]["mean/1"]["paraphrases"]["other.safetensors#the"]["difference"]["value"] < -0.03
    assert "| other.safetensors#the (12 classes, 8 tasks) | mean/1 |" in reading.report(result)


def test_classes_that_a_table_lacks_are_left_out_of_the_tasks(suite_run: SuiteRun, tmp_path: Path) -> None:
    source = write_table(tmp_path, count=9)
    assert any(label > 8 for task in suite_run.zoo.split.unseen[:8] for label in task)
    (measured,) = reading.run(with_tables(suite_run, source))["samplers"]["mean/1"]["paraphrases"].values()
    assert measured["classes"] == 9
    # The texts are the same: so are the heads, and the tasks that they are scored on.
    assert measured["difference"] == {"value": 0.0, "interval": [0.0, 0.0]}
    assert measured["accuracy"] == measured["right"]


def test_without_paraphrases_the_report_says_so(toy_suites: ToySuites) -> None:
    assert "No paraphrases were measured" in reading.report(toy_suites.result("reading"))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"dim": 6}, "has 6 numbers per text, the checkpoint takes 8"),
        ({"template": "a {}"}, "has the template 'a {}' that the data already has"),
        ({"count": 1}, "has two names of none of the 8 tasks"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(
    suite_run: SuiteRun, tmp_path: Path, table: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainingDataError, match=message):
        reading.run(with_tables(suite_run, write_table(tmp_path, **table)))


def test_unusable_tables_are_refused(suite_run: SuiteRun, tmp_path: Path) -> None:
    names = EmbeddingTable("the {}", ("yak", "zebra"), F.normalize(torch.ones(2, 8), dim=-1))
    write_embedding_tables(tmp_path / "zoo.safetensors", {"the": names})
    with pytest.raises(TrainingDataError, match="has none of the 12 class names"):
        reading.run(with_tables(suite_run, f"{tmp_path / 'zoo.safetensors'}#the"))
    with pytest.raises(CheckpointError, match="cannot be read"):
        reading.run(with_tables(suite_run, str(tmp_path / "absent.safetensors")))
    twice = write_table(tmp_path)
    with pytest.raises(TrainingDataError, match="named twice"):
        reading.run(with_tables(suite_run, twice, twice))

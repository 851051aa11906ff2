"""The teacher: learns, keeps to the training classes, is trained once, and its share of the task loss is right."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.training.conftest import Toy
from tests.training.toy import toy_preset
from text2weight.weight_space import WeightSpace
from text2weight_training import teacher as teacher_module
from text2weight_training.files import TrainingDataError
from text2weight_training.fit import Fit
from text2weight_training.losses import DenoisingLosses, distillation, make_task_batch
from text2weight_training.tasks import ClassFeatures, HeldOut, TaskSplit
from text2weight_training.teacher import TeacherSettings, teacher_answers, train_teacher

SETTINGS = TeacherSettings(width=32, dropout=0.2, feature_dropout=0.1, epochs=12, batch_size=64, learning_rate=1e-2)
PLAIN = TaskSplit(((0, 1),), ((1, 2),))


def test_a_teacher_knows_the_classes_of_the_features(toy: Toy) -> None:
    answers = train_teacher(toy.data, PLAIN, SETTINGS, 0)
    starts = toy.data.train.starts
    labels = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())
    assert answers.shape == (len(labels), len(toy.data.classes))
    assert float((answers.argmax(1) == labels).float().mean()) > 0.8
    assert torch.equal(answers, train_teacher(toy.data, PLAIN, SETTINGS, 0))
    assert not torch.equal(answers, train_teacher(toy.data, PLAIN, SETTINGS, 1))


def test_a_teacher_never_looks_at_held_out_classes(toy: Toy) -> None:
    split = replace(PLAIN, held_out=HeldOut(classes=(3, 5)))
    poisoned = toy.data.train.features.clone()
    kept = torch.ones(len(poisoned), dtype=torch.bool)
    for label in (3, 5):
        span = slice(int(toy.data.train.starts[label]), int(toy.data.train.starts[label + 1]))
        poisoned[span], kept[span] = math.nan, False
    data = replace(toy.data, train=ClassFeatures(poisoned, toy.data.train.starts))
    answers = train_teacher(data, split, SETTINGS, 0)[kept]
    assert bool((answers[:, [3, 5]] == -math.inf).all())
    others = [label for label in range(len(toy.data.classes)) if label not in (3, 5)]
    assert bool(torch.isfinite(answers[:, others]).all())


def test_a_teacher_is_trained_once_for_the_same_data_and_settings(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "teacher.safetensors"
    runs = []
    real = train_teacher
    monkeypatch.setattr(teacher_module, "train_teacher", lambda *args: runs.append(1) or real(*args))
    first = teacher_answers(toy.data, PLAIN, SETTINGS, 0, file)
    assert torch.equal(teacher_answers(toy.data, PLAIN, SETTINGS, 0, file), first)
    # How much it is believed is not its own affair.
    assert torch.equal(teacher_answers(toy.data, PLAIN, SETTINGS.model_copy(update={"share": 0.5}), 0, file), first)
    assert len(runs) == 1
    other = SETTINGS.model_copy(update={"width": 16})
    assert not torch.equal(teacher_answers(toy.data, PLAIN, other, 0, file), first)
    file.write_bytes(b"damaged")
    assert torch.equal(teacher_answers(toy.data, PLAIN, SETTINGS, 0, file), first)
    assert len(runs) == 3


def test_a_diverging_teacher_is_named(toy: Toy) -> None:
    broken = replace(toy.data.train, features=torch.full_like(toy.data.train.features, math.nan))
    with pytest.raises(
        TrainingDataError, match=r"^the teacher diverged at step 1 .* lower fit\.teacher\.learning_rate$"
    ):
        train_teacher(replace(toy.data, train=broken), PLAIN, SETTINGS, 0)


def test_a_teacher_whose_loss_explodes_is_stopped_though_all_is_finite(toy: Toy) -> None:
    wild = SETTINGS.model_copy(update={"learning_rate": 1e3, "epochs": 40})
    with pytest.raises(
        TrainingDataError, match=r"^the teacher diverged at step \d+ \(the loss exploded from a median of"
    ):
        train_teacher(toy.data, PLAIN, wild, 0)


def test_distillation_by_hand() -> None:
    # Two samples of a task of two classes, padded to three.
    logits = torch.tensor([[[0.0, math.log(3.0), -math.inf], [0.0, 0.0, -math.inf]]])
    answers = torch.tensor([[[math.log(4.0), 0.0, -math.inf], [0.0, -100.0, -math.inf]]])
    mask = torch.tensor([[True, True, False]])
    first = -(0.8 * math.log(1 / 4) + 0.2 * math.log(3 / 4))
    assert float(distillation(logits, answers, mask)) == pytest.approx((first + math.log(2.0)) / 2, rel=1e-5)


def test_the_task_loss_believes_the_teacher_by_its_share(toy: Toy) -> None:
    preset = toy_preset()
    train, texts = toy.data.train, toy.data.embeddings
    answers = torch.randn(len(train.features), len(texts), generator=torch.Generator().manual_seed(1))
    tasks = torch.tensor([[0, 4, 7], [2, 9, -1]])
    batch = make_task_batch(tasks, texts, texts, train, 6, torch.Generator().manual_seed(2), 0.0, answers)
    assert batch.answers is not None
    assert bool((batch.answers[1, :, 2] == -math.inf).all())
    # The answers belong to the very samples that were drawn.
    for i, task in enumerate(tasks.tolist()):
        for feature, own in zip(batch.features[i], batch.answers[i], strict=True):
            row = int((train.features == feature).all(1).nonzero()[0])
            present = [label for label in task if label >= 0]
            assert torch.equal(own[: len(present)], answers[row, present])

    space = WeightSpace.fit(preset.head, toy.zoo.universal, toy.zoo.weights, preset.scaling)

    def loss(share: float, smoothing: float = 0.0) -> float:
        losses = DenoisingLosses(preset.head, space, preset.schedule, "x0", preset.logit_scale, smoothing, share)
        return float(losses.task(torch.zeros(2, preset.head.num_parameters), batch))

    assert loss(0.25) == pytest.approx(0.75 * loss(0.0) + 0.25 * loss(1.0), rel=1e-5)
    assert loss(1.0) == loss(1.0, smoothing=0.5)
    assert loss(0.0) != pytest.approx(loss(1.0), rel=1e-2)


def test_a_fit_with_a_teacher_goes_on_where_it_stopped(toy: Toy, tmp_path: Path) -> None:
    changes = {"fit__teacher": SETTINGS.model_dump(mode="json"), "fit__steps": 4}
    whole = Fit(toy.data, toy.zoo, toy_preset(**changes), tmp_path / "whole" / "state.pt", "cpu")
    whole.run()
    assert (tmp_path / "whole" / "teacher.safetensors").exists()
    first = Fit(toy.data, toy.zoo, toy_preset(**changes), tmp_path / "parts" / "state.pt", "cpu")
    first._step(0.0)
    first.state.step += 1
    first.save()
    second = Fit(toy.data, toy.zoo, toy_preset(**changes), tmp_path / "parts" / "state.pt", "cpu")
    assert second.resume()
    second.run()
    for one, two in zip(whole.average.parameters(), second.average.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_teacher_without_a_task_loss_is_refused() -> None:
    with pytest.raises(ValueError, match=r"fit\.teacher without fit\.task_weight"):
        toy_preset(fit__teacher={}, fit__task_weight=0.0)

"""Mixed classes: between two that exist, never a held-out one, and only where no trained head contradicts."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.training.conftest import Toy
from tests.training.toy import toy_preset
from text2weight_training import fit as fit_module
from text2weight_training.class_mixing import ClassMixing, draw_class_mixing
from text2weight_training.fit import Fit
from text2weight_training.losses import TaskBatch, make_task_batch
from text2weight_training.tasks import ClassFeatures, HeldOut

TASKS = torch.tensor([[0, 4, 7], [2, 9, -1], [1, 5, 8], [3, 6, 10]])
FRESH = torch.tensor([False, True, True, True])


def draw(share: float, held_out: HeldOut | None = None, seed: int = 0) -> ClassMixing:
    generator = torch.Generator().manual_seed(seed)
    return draw_class_mixing(TASKS, FRESH, 12, held_out or HeldOut(), share, generator)


def test_only_fresh_tasks_are_mixed_and_by_their_share() -> None:
    mixings = [draw(0.5, seed=seed) for seed in range(400)]
    mixed = torch.stack([mixing.mixed_tasks for mixing in mixings]).float().mean(0)  # (B,)
    assert mixed[0] == 0
    # A task of 3 has no mixed class in one case of eight, one of 2 in one of four.
    assert mixed[1:].tolist() == pytest.approx([0.5 * 3 / 4, 0.5 * 7 / 8, 0.5 * 7 / 8], abs=0.08)
    shares = torch.stack([mixing.shares for mixing in mixings])
    assert float(shares.min()) >= 0.5
    assert bool((shares[:, TASKS == -1] == 1).all())
    assert not bool(draw(0.0).mixed_tasks.any())


def test_no_partner_is_held_out_or_completes_a_held_out_pair() -> None:
    held_out = HeldOut(classes=(11,), pairs=((4, 0), (9, 3), (1, 6)))
    barred = {frozenset(pair) for pair in held_out.pairs}
    mixed = 0
    for seed in range(300):
        mixing = draw(1.0, held_out, seed)
        assert 11 not in mixing.partners
        for task, partners, shares in zip(TASKS, mixing.partners, mixing.shares, strict=True):
            met = {int(label) for label in task if label >= 0} | {int(p) for p in partners[shares < 1]}
            mixed += int((shares < 1).sum())
            if not barred & {frozenset(pair) for pair in combinations((int(label) for label in task), 2)}:
                assert not barred & {frozenset(pair) for pair in combinations(sorted(met), 2)}
    assert mixed > 300


def test_text_and_features_are_mixed_by_the_same_share(toy: Toy) -> None:
    texts = toy.data.embeddings
    # One feature per class tells what a sample was mixed of.
    features = ClassFeatures(10 * torch.eye(12), torch.arange(13))
    mixing = draw(1.0)
    batch = make_task_batch(TASKS, texts, texts, features, 50, torch.Generator().manual_seed(1), mixing=mixing)
    for i, task in enumerate(TASKS.tolist()):
        for j, label in enumerate(task):
            if label < 0:
                assert not bool(batch.text[i, j].any())
                continue
            share, partner = float(mixing.shares[i, j]), int(mixing.partners[i, j])
            wanted = F.normalize(share * texts[label] + (1 - share) * texts[partner], dim=0)
            torch.testing.assert_close(batch.text[i, j], wanted if share < 1 else texts[label])
            torch.testing.assert_close(batch.condition.tokens[i, j], batch.text[i, j])
            own = torch.zeros(12)
            own[label] += 10 * share
            own[partner] += 10 * (1 - share)
            samples = batch.features[i][batch.targets[i] == j]
            assert len(samples)
            torch.testing.assert_close(samples, own.expand(len(samples), -1))


def test_a_teacher_is_not_asked_about_classes_that_do_not_exist(toy: Toy) -> None:
    texts, train = toy.data.embeddings, toy.data.train
    mixing = replace(draw(0.0), shares=torch.tensor([[1, 1, 1], [0.7, 1, 1], [1, 1, 1], [1, 1, 0.5]]))
    batch = make_task_batch(
        TASKS,
        texts,
        texts,
        train,
        4,
        torch.Generator().manual_seed(1),
        answers=torch.zeros(len(train.features), 12),
        mixing=mixing,
    )
    assert batch.taught is not None
    assert batch.taught.tolist() == [True, False, True, False]


def test_the_fit_mixes_its_fresh_items(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ClassMixing] = []
    make_batch = fit_module.make_task_batch

    def watch(*args: object) -> TaskBatch:
        assert isinstance(args[-1], ClassMixing)
        seen.append(args[-1])
        return make_batch(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(fit_module, "make_task_batch", watch)
    preset = toy_preset(fit__class_mixing=0.75, fit__steps=3)
    Fit(toy.data, toy.zoo, preset, tmp_path / "state.pt", "cpu").run()
    assert len(seen) == 4  # three steps, and the look at what the last one made
    mixed = torch.stack([mixing.mixed_tasks for mixing in seen])  # (4, B)
    assert not bool(mixed[:, : preset.fit.zoo_batch].any())
    assert bool(mixed[:, preset.fit.zoo_batch :].any())

"""Tasks: class names find their embeddings, draws are distinct and fixed, bad files are refused with the reason."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.training.toy import NAMES, toy_features, toy_table, write_toy_files
from text2weight.errors import CheckpointError
from text2weight.text_encoder import EmbeddingTable, write_embedding_tables
from text2weight_training.feature_file import write_feature_file
from text2weight_training.files import TrainingDataError
from text2weight_training.tasks import (
    PADDING,
    ClassFeatures,
    TaskSplit,
    draw_tasks,
    load_task_data,
    pad_tasks,
    task_embeddings,
)


def load_with_table(folder: Path, names: tuple[str, ...], template: str = "a {}") -> object:
    features, _ = write_toy_files(folder)
    table = replace(toy_table(), names=names)
    write_embedding_tables(folder / "other.safetensors", {"t": table})
    return load_task_data([features], f"{folder / 'other.safetensors'}#t", template)


def test_names_match_whatever_their_case_underscores_and_synonyms(tmp_path: Path) -> None:
    features, _ = write_toy_files(tmp_path)
    shuffled = list(range(len(NAMES)))[::-1]
    table = toy_table()
    spelled = [table.names[i].upper() for i in shuffled]
    spelled[shuffled.index(3)] = "Lizard, saurian"
    other = EmbeddingTable("a {}", tuple(spelled), table.embeddings[shuffled])
    write_embedding_tables(tmp_path / "other.safetensors", {"t": other})
    data = load_task_data([features], f"{tmp_path / 'other.safetensors'}#t")
    assert data.classes == tuple(name.replace("_", " ") for name in NAMES)
    torch.testing.assert_close(data.embeddings, table.embeddings)


def test_classes_without_an_embedding_are_left_out_with_a_warning(tmp_path: Path) -> None:
    names = toy_table().names
    renamed = ("pear", *names[1:3], "newt", *names[4:])
    with pytest.warns(UserWarning, match="2 classes have no embedding and are left out: apple, lizard"):
        data = load_with_table(tmp_path, renamed)
    assert "apple" not in data.classes  # type: ignore[attr-defined]
    assert len(data.classes) == len(NAMES) - 2  # type: ignore[attr-defined]
    # What is left keeps its own features: class 0 is now the maple tree, label 1 of the file.
    original = toy_features()
    maple = original.train_features[original.train_labels == 1]
    kept, targets = data.train.of_task([0])  # type: ignore[attr-defined]
    assert torch.equal(kept, maple.float())
    assert not targets.any()


def test_a_class_without_a_description_is_refused(tmp_path: Path) -> None:
    features, _ = write_toy_files(tmp_path)
    table = toy_table()
    texts = tuple((f"what is a {name}",) for name in table.names)
    described = replace(table, template="{}", descriptions=texts)
    names = ("pear", *table.names[1:3], "newt", *table.names[4:])
    lacking = replace(described, names=names, embeddings=table.embeddings.clone())
    write_embedding_tables(tmp_path / "nl.safetensors", {"all": described, "some": lacking})
    assert len(load_task_data([features], f"{tmp_path}/nl.safetensors#all").classes) == len(NAMES)
    message = r"nl.safetensors#some .* none of 2 of 12 classes: apple, lizard; describe them and run `t2w embed"
    with pytest.raises(TrainingDataError, match=message):
        load_task_data([features], f"{tmp_path}/nl.safetensors#some")


def test_fewer_than_two_matching_names_is_an_error(tmp_path: Path) -> None:
    strangers = tuple(f"stranger {i}" for i in range(11))
    with pytest.raises(TrainingDataError, match="only 1 of 12 class names have an embedding"):
        load_with_table(tmp_path, ("apple", *strangers))


def test_one_name_in_two_spellings_is_refused(tmp_path: Path) -> None:
    write_feature_file(tmp_path / "f.safetensors", toy_features(names=("maple_tree", "Maple tree", *NAMES[2:])))
    _, text = write_toy_files(tmp_path)
    with pytest.raises(TrainingDataError, match="'Maple tree' in two ways"):
        load_task_data([tmp_path / "f.safetensors"], text)


def test_classes_with_equal_embeddings_are_pointed_out(tmp_path: Path) -> None:
    features, _ = write_toy_files(tmp_path)
    table = toy_table()
    table.embeddings[2] = table.embeddings[0]
    write_embedding_tables(tmp_path / "twins.safetensors", {"t": table})
    with pytest.warns(UserWarning, match="'apple' and 'Bus' have the same embedding"):
        load_task_data([features], f"{tmp_path / 'twins.safetensors'}#t")


def test_a_table_brings_its_own_template(tmp_path: Path) -> None:
    one = load_with_table(tmp_path, toy_table().names)
    two = load_with_table(tmp_path, toy_table().names, template="a photo of a {}")
    assert one.template == two.template == "a {}"  # type: ignore[attr-defined]
    assert one.fingerprint == two.fingerprint  # type: ignore[attr-defined]


def test_a_template_without_a_place_for_the_name_is_refused(tmp_path: Path) -> None:
    features, _ = write_toy_files(tmp_path)
    with pytest.raises(TrainingDataError, match=r"'a photo': one \{\} must stand for the class name"):
        load_task_data([features], "dir:/nowhere", "a photo")


def test_fingerprint_follows_features_and_embeddings(tmp_path: Path) -> None:
    features, text = write_toy_files(tmp_path)
    first = load_task_data([features], text)
    assert load_task_data([features], text).fingerprint == first.fingerprint
    content = toy_features()
    content.test_features[0, 0] += 1
    write_feature_file(features, content)
    assert load_task_data([features], text).fingerprint != first.fingerprint


@pytest.mark.parametrize("content", [b"", b"not safetensors", None])
def test_missing_or_truncated_files(tmp_path: Path, content: bytes | None) -> None:
    features, text = write_toy_files(tmp_path)
    whole = features.read_bytes() if content is None else content
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TrainingDataError, match=r"broken.safetensors is damaged"):
        load_task_data([broken], text)
    with pytest.raises(TrainingDataError, match="there is no feature file"):
        load_task_data([tmp_path / "absent.safetensors"], text)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_task_data([features], f"{broken}#toy")
    with pytest.raises(CheckpointError, match="has no table 'other'"):
        load_task_data([features], text.replace("#toy", "#other"))


def test_nan_features_are_refused(tmp_path: Path) -> None:
    features, text = write_toy_files(tmp_path)
    tensors = load_file(features)
    tensors["train.features"][7, 3] = float("nan")
    metadata = {"classes": json.dumps(NAMES), "backbone": "b", "preprocess": "p"}
    save_file(tensors, features, metadata=metadata)
    with pytest.raises(TrainingDataError, match=r"1 rows of train.features hold NaN or infinity, the first is row 7"):
        load_task_data([features], text)


def test_a_class_without_test_features_is_refused(tmp_path: Path) -> None:
    features, text = write_toy_files(tmp_path)
    content = toy_features()
    present = content.test_labels != 4
    write_feature_file(
        features,
        replace(content, test_features=content.test_features[present], test_labels=content.test_labels[present]),
    )
    with pytest.raises(TrainingDataError, match=r"labels \[4\] have no features in one split"):
        load_task_data([features], text)


def test_samples_come_from_the_tasks_classes_every_class_equally_often() -> None:
    labels = torch.arange(6).repeat_interleave(torch.tensor([1, 50, 2, 3, 4, 5]))
    # A feature that says its own label and its place within the class.
    features = torch.stack([labels.float(), torch.arange(len(labels)).float()], dim=1)
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    data = ClassFeatures.from_labels(features[shuffled], labels[shuffled], 6)
    tasks = pad_tasks([(0, 1), (5, 2, 3, 1)])
    drawn, targets = data.sample(tasks, 4000, torch.Generator().manual_seed(1))
    assert drawn.shape == (2, 4000, 2)
    assert torch.equal(drawn[..., 0].long(), tasks.gather(1, targets))
    for row, size in enumerate((2, 4)):
        counts = torch.bincount(targets[row], minlength=size)
        assert len(counts) == size
        assert bool((counts - 4000 / size).abs().max() < 200)
    # All fifty points of class 1 turn up, also the last.
    assert len(drawn[0][targets[0] == 1][:, 1].unique()) == 50


def test_of_task_gives_every_feature_once_with_positions_as_targets() -> None:
    labels = torch.tensor([2, 0, 1, 2, 0])
    data = ClassFeatures.from_labels(torch.arange(5.0)[:, None], labels, 3)
    features, targets = data.of_task([2, 0])
    assert features.flatten().tolist() == [0, 3, 1, 4]
    assert targets.tolist() == [0, 0, 1, 1]


def test_drawn_tasks_are_distinct_in_range_and_split_as_sets() -> None:
    split = draw_tasks(12, 300, (3, 6), 0.2, seed=1)
    assert (len(split.seen), len(split.unseen)) == (240, 60)
    everything = [*split.seen, *split.unseen]
    assert len({frozenset(task) for task in everything}) == 300
    assert all(len(set(task)) == len(task) and 3 <= len(task) <= 6 for task in everything)
    assert {len(task) for task in everything} == {3, 4, 5, 6}
    assert {label for task in everything for label in task} == set(range(12))
    assert not {frozenset(task) for task in split.seen} & {frozenset(task) for task in split.unseen}


def test_the_split_is_fixed_by_its_seed() -> None:
    assert draw_tasks(12, 50, (3, 6), 0.2, 1) == draw_tasks(12, 50, (3, 6), 0.2, 1)
    assert draw_tasks(12, 50, (3, 6), 0.2, 1) != draw_tasks(12, 50, (3, 6), 0.2, 2)


@pytest.mark.parametrize("sizes", [(1, 3), (4, 3), (3, 13)])
def test_impossible_task_sizes_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(TrainingDataError, match="2 <= least <= greatest <= 12"):
        draw_tasks(12, 5, sizes, 0.2, 0)


def test_more_tasks_than_combinations_are_refused() -> None:
    assert len(draw_tasks(4, 6, (2, 2), 0.5, 0).seen) == 3
    with pytest.raises(TrainingDataError, match="7 distinct tasks of 2 to 2 classes do not exist"):
        draw_tasks(4, 7, (2, 2), 0.5, 0)


def test_unseen_combinations_are_refused_in_any_order() -> None:
    split = TaskSplit(seen=((0, 1),), unseen=((2, 0, 1),))
    assert split.allows((1, 0))
    assert not split.allows((0, 1, 2))
    assert split.allows((0, 1, 2, 3))


def test_padding_and_gathered_embeddings() -> None:
    tasks = pad_tasks([(2, 0), (1, 0, 2)])
    assert tasks.tolist() == [[2, 0, PADDING], [1, 0, 2]]
    embeddings = torch.eye(3) + 1
    gathered, mask = task_embeddings(embeddings, tasks)
    assert mask.tolist() == [[True, True, False], [True, True, True]]
    assert torch.equal(gathered[0], torch.stack([embeddings[2], embeddings[0], torch.zeros(3)]))

"""The zoo directory: reproducible, resumable after anything, and never mixed up with another."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tests.patience import PROCESS_S
from tests.training.conftest import Toy
from tests.training.toy import toy_data, toy_features, toy_preset, toy_table, write_preset
from text2weight.text_encoder import write_embedding_tables
from text2weight_training import zoo as zoo_module
from text2weight_training.feature_file import write_feature_file
from text2weight_training.files import TrainingDataError
from text2weight_training.stacked import heads_accuracy
from text2weight_training.tasks import PADDING, load_task_data
from text2weight_training.zoo import ZooSpeed, build_zoo, check_zoo_fits, load_speed, load_zoo

SHARDS = ("heads-00000.safetensors", "heads-00001.safetensors", "heads-00002.safetensors")
FILES = ("manifest.json", "shared.safetensors", *SHARDS)

# Builds a zoo, and hangs when half of its second shard's bytes are written.
HANG_IN_SECOND_SHARD = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from text2weight_training import zoo
from text2weight_training.presets import load_preset
from text2weight_training.tasks import load_task_data
features, text, preset, out = sys.argv[1:]
save_file = zoo.save_file
def save(tensors, path, metadata):
    save_file(tensors, path, metadata)
    if "heads-00001" in str(path):
        content = Path(path).read_bytes()
        Path(path).write_bytes(content[: len(content) // 2])
        Path(out, "half").touch()
        time.sleep(600)
zoo.save_file = save
zoo.build_zoo(load_task_data([Path(features)], text), load_preset(preset), Path(out))
"""


def kill_when_half_written(script: str, arguments: list[str], sign: Path) -> None:
    """Start a Python process and end it with SIGKILL as soon as `sign` exists."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + PROCESS_S
        while not sign.exists():
            assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
            assert time.monotonic() < deadline, f"{sign} did not appear"
            time.sleep(0.05)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL


def assert_same_files(folder: Path, expected: Path) -> None:
    for name in FILES:
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name


def test_layout(toy: Toy) -> None:
    assert sorted(path.name for path in toy.zoo_folder.iterdir()) == sorted([*FILES, "speed.json"])
    manifest = json.loads((toy.zoo_folder / "manifest.json").read_text())
    assert manifest["format"] == "text2weight.zoo/1"
    assert (len(manifest["seen"]), len(manifest["unseen"])) == (36, 12)
    shard = load_file(toy.zoo_folder / SHARDS[1])
    assert shard["weights"].shape == (12, toy.preset.head.num_parameters)
    assert shard["classes"].dtype == torch.int16
    for row, task in zip(shard["classes"].tolist(), manifest["seen"][12:24], strict=True):
        assert row == task + [PADDING] * (6 - len(task))


def test_heads_are_good_at_their_tasks_and_their_accuracy_is_recorded(toy: Toy) -> None:
    zoo, data = toy.zoo, toy.data
    assert float(zoo.accuracy.mean()) > 0.85
    for i in (0, 20, 35):
        candidates = torch.stack([zoo.weights[i], zoo.universal, zoo.base])
        scores = heads_accuracy(toy.preset.head, candidates, zoo.split.seen[i], data.test, data.embeddings)
        assert scores[0] == zoo.accuracy[i]
        assert scores[0] >= scores[1] - 0.02
        assert scores[1] > scores[2]


def test_a_second_call_trains_nothing(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo_module, "train_stack", lambda *_: pytest.fail("trained again"))
    assert torch.equal(build_zoo(toy.data, toy.preset, toy.zoo_folder).weights, toy.zoo.weights)


def test_kill_9_then_resume_gives_the_same_bytes(toy: Toy, tmp_path: Path) -> None:
    out = tmp_path / "zoo"
    preset = write_preset(tmp_path / "toy.yaml")
    kill_when_half_written(HANG_IN_SECOND_SHARD, [str(toy.features), toy.text, str(preset), str(out)], out / "half")
    assert (out / SHARDS[0]).exists()
    assert not (out / SHARDS[1]).exists()
    with pytest.raises(TrainingDataError, match="12 of 36 heads: run `t2w zoo` again"):
        load_zoo(out)
    before = (out / SHARDS[0]).stat().st_mtime_ns
    build_zoo(toy.data, toy.preset, out)
    assert_same_files(out, toy.zoo_folder)
    assert (out / SHARDS[0]).stat().st_mtime_ns == before


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def drop_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, path)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def other_tasks(path: Path) -> None:
    shutil.copy(path.with_name(SHARDS[2]), path)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (SHARDS[1], truncate),
        (SHARDS[1], empty),
        (SHARDS[1], drop_a_tensor),
        (SHARDS[1], flip_a_bit),
        (SHARDS[1], other_tasks),
        (SHARDS[2], Path.unlink),
        ("shared.safetensors", truncate),
        ("shared.safetensors", drop_a_tensor),
        ("shared.safetensors", flip_a_bit),
    ],
)
def test_a_damaged_file_is_made_again(toy: Toy, tmp_path: Path, name: str, damage: Any) -> None:
    out = tmp_path / "zoo"
    shutil.copytree(toy.zoo_folder, out)
    damage(out / name)
    if damage is not other_tasks:
        with pytest.raises(TrainingDataError, match=r"run `t2w zoo`"):
            load_zoo(out)
    build_zoo(toy.data, toy.preset, out)
    assert_same_files(out, toy.zoo_folder)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
def test_a_damaged_shard_is_named(toy: Toy, tmp_path: Path, damage: Any) -> None:
    out = tmp_path / "zoo"
    shutil.copytree(toy.zoo_folder, out)
    damage(out / SHARDS[1])
    with pytest.raises(TrainingDataError, match=r"heads-00001.safetensors is .*damaged.* run `t2w zoo` on the folder"):
        load_zoo(out)


def test_a_zoo_without_checksums_still_loads(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "zoo"
    shutil.copytree(toy.zoo_folder, out)
    for name in ("shared.safetensors", *SHARDS):
        save_file(load_file(toy.zoo_folder / name), out / name)
    (out / "speed.json").unlink()
    assert torch.equal(load_zoo(out).weights, toy.zoo.weights)
    monkeypatch.setattr(zoo_module, "train_stack", lambda *_: pytest.fail("trained again"))
    build_zoo(toy.data, toy.preset, out)
    assert load_speed(out) is None


def test_the_speed_of_the_last_run_is_kept_and_gives_the_cost_of_more(toy: Toy, tmp_path: Path) -> None:
    out = tmp_path / "zoo"
    shutil.copytree(toy.zoo_folder, out)
    whole = load_speed(out)
    assert whole is not None
    assert (whole.heads, whole.workers, whole.device) == (24, 1, "cpu")  # all but the first shard
    assert 0 < whole.seconds < PROCESS_S
    (out / SHARDS[1]).unlink()
    build_zoo(toy.data, toy.preset, out)
    resumed = load_speed(out)
    assert resumed is not None
    assert resumed.heads == 12
    speed = ZooSpeed(heads=100, seconds=50.0, workers=2, device="cpu")
    assert speed.heads_per_second == 2
    assert speed.cost(1_000_000, 16_912) == "1,000,000 heads would take 138.9 hours and 67.6 GB"


def test_full_disk_leaves_nothing_half_written(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "zoo"

    def no_space(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        save_file(tensors, path, metadata)
        if "heads-00001" in str(path):
            truncate(path)
            raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(zoo_module, "save_file", no_space)
        with pytest.raises(OSError, match=r"heads-00001.* cannot be written: .*No space left on device"):
            build_zoo(toy.data, toy.preset, out)
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES[:3])
    build_zoo(toy.data, toy.preset, out)
    assert_same_files(out, toy.zoo_folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for four pages."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs rights that this user lacks")
    yield folder
    # Lazily: a loaded zoo keeps its files mapped.
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="this system has no mount command")
def test_a_disk_that_is_really_full(toy: Toy, small_disk: Path) -> None:
    out = small_disk / "zoo"
    with pytest.raises(OSError, match="No space left on device") as caught:
        build_zoo(toy.data, toy.preset, out)
    assert caught.value.errno in (None, errno.ENOSPC)
    assert not list(out.glob(".*"))
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    build_zoo(toy.data, toy.preset, out)
    assert_same_files(out, toy.zoo_folder)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 4}, "seed, seen, unseen"),
        ({"logit_scale": 11.0}, "logit_scale"),
        ({"zoo__heads__steps": 61}, "settings"),
        ({"head__hidden_dim": 5}, "head"),
    ],
)
def test_a_zoo_of_other_settings_is_left_alone(toy: Toy, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(TrainingDataError, match=f"holds a zoo with another {named}: choose another --out"):
        build_zoo(toy.data, toy_preset(**changes), toy.zoo_folder)
    assert torch.equal(load_zoo(toy.zoo_folder).weights, toy.zoo.weights)


def test_a_zoo_of_other_data_is_left_alone(toy: Toy, tmp_path: Path) -> None:
    write_feature_file(tmp_path / "f.safetensors", toy_features(seed=1))
    other = load_task_data([tmp_path / "f.safetensors"], toy.text)
    with pytest.raises(TrainingDataError, match="another data_sha256"):
        build_zoo(other, toy.preset, toy.zoo_folder)
    with pytest.raises(TrainingDataError, match="built for another data_sha256"):
        check_zoo_fits(toy.zoo, other, toy.preset)
    with pytest.raises(TrainingDataError, match="built for another head"):
        check_zoo_fits(toy.zoo, toy.data, toy_preset(head__hidden_dim=5))
    check_zoo_fits(toy.zoo, toy.data, toy.preset)


def test_feature_size_must_be_the_heads(toy: Toy, tmp_path: Path) -> None:
    write_feature_file(tmp_path / "f.safetensors", toy_features(dim=20))
    other = load_task_data([tmp_path / "f.safetensors"], toy.text)
    with pytest.raises(TrainingDataError, match=r"features have 20 numbers each, but .*head.input_dim is 16: set it"):
        build_zoo(other, toy.preset, tmp_path / "zoo")
    assert not (tmp_path / "zoo").exists()


def test_embedding_size_must_be_the_heads(toy: Toy, tmp_path: Path) -> None:
    write_embedding_tables(tmp_path / "t.safetensors", {"t": toy_table(dim=6)})
    other = load_task_data([toy.features], f"{tmp_path / 't.safetensors'}#t")
    with pytest.raises(TrainingDataError, match=r"class embeddings have 6 numbers each, but .*head.output_dim is 8"):
        build_zoo(other, toy.preset, tmp_path / "zoo")


def test_diverging_heads_leave_no_shard(tmp_path: Path) -> None:
    preset = toy_preset(
        zoo__heads={"steps": 2, "learning_rate": 1e38}, zoo__universal={"steps": 2}, zoo__base={"steps": 2}
    )
    with pytest.raises(
        TrainingDataError, match=r"heads-00000.safetensors: .*diverged at step 2 .*lower the learning rate"
    ):
        build_zoo(toy_data(tmp_path), preset, tmp_path / "zoo")
    assert sorted(path.name for path in (tmp_path / "zoo").iterdir()) == ["manifest.json", "shared.safetensors"]


def test_a_diverging_universal_head_is_named(tmp_path: Path) -> None:
    preset = toy_preset(zoo__universal={"steps": 3, "learning_rate": 1e38}, zoo__base={"steps": 2})
    message = r"^universal head: .*diverged at step 2 .*lower the learning rate \(zoo.universal.learning_rate\)$"
    with pytest.raises(TrainingDataError, match=message):
        build_zoo(toy_data(tmp_path), preset, tmp_path / "zoo")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is not a zoo"), ("{", "is not a zoo"), ("{}", "has format None"),
     ('{"format": "text2weight.zoo/1"}', "unfinished or damaged")],
)  # fmt: skip
def test_folders_that_are_no_zoo(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(TrainingDataError, match=message):
        load_zoo(tmp_path)


def test_data_of_a_zoo_is_checked_by_what_it_holds(toy: Toy) -> None:
    with pytest.raises(TrainingDataError, match="another template"):
        check_zoo_fits(toy.zoo, replace(toy.data, template="the {}"), toy.preset)
    other = toy.data.backbone | {"name": "another net"}
    with pytest.raises(TrainingDataError, match=r"another backbone \(.*'toy backbone'.* instead of .*'another net'"):
        check_zoo_fits(toy.zoo, replace(toy.data, backbone=other), toy.preset)
    with pytest.raises(TrainingDataError, match=r"another logit_scale .*: give the features, text and preset"):
        check_zoo_fits(toy.zoo, toy.data, toy_preset(logit_scale=11.0))

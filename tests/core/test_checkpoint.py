from __future__ import annotations

import contextlib
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

import text2weight.checkpoint
from tests.tiny import TINY_DIM, TINY_SPEC, save_tiny_checkpoint, tiny_condition, tiny_denoiser, tiny_space
from text2weight.checkpoint import (
    WEIGHTS,
    CheckpointConfig,
    TextEncoderConfig,
    bundled_checkpoint,
    file_sha256,
    load_checkpoint,
    read_config,
    record_evaluation,
    save_checkpoint,
)
from text2weight.denoiser import DenoiserConfig
from text2weight.errors import CheckpointError


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    return folder


def rewrite(folder: Path, **changes: object) -> None:
    """Change a config and sign it again, as a program that means harm would."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changes
    del content["sha256"]
    with contextlib.suppress(ValidationError):
        content["sha256"] = CheckpointConfig.model_validate(content).sha256
    (folder / "config.json").write_text(json.dumps({"sha256": "", **content}), encoding="utf-8")


def replace_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / WEIGHTS)
    rewrite(folder, files={WEIGHTS: file_sha256(folder / WEIGHTS)})


@pytest.mark.parametrize("tokens", ["unit", "chunk"])
def test_round_trip(tmp_path: Path, tokens: str) -> None:
    sizes = {"width": 16, "depth": 2, "heads": 2, "embedding_dim": TINY_DIM, "chunk_size": 16, "class_path": 8}
    denoiser = {**sizes, "tokens": tokens}
    written = save_tiny_checkpoint(
        tmp_path / "new" / "checkpoint",
        classes=("\N{LIZARD}", "s\u00e9a"),
        denoiser=DenoiserConfig(**denoiser),
        evaluation={"results": {"unseen": {"generated/mean/1": {"accuracy": 0.1 + 0.2}}}},
    )
    loaded = load_checkpoint(tmp_path / "new" / "checkpoint")
    assert loaded.config == written
    assert loaded.config.sha256 == written.sha256
    assert set(written.files) == {WEIGHTS}
    assert not loaded.denoiser.training
    for name, tensor in tiny_space().tensors().items():
        assert torch.equal(loaded.space.tensors()[name], tensor)
    noisy, timesteps = torch.randn(3, TINY_SPEC.num_parameters), torch.tensor([1, 20, 40])
    original = tiny_denoiser(**denoiser)
    torch.testing.assert_close(
        loaded.denoiser(noisy, timesteps, tiny_condition()),
        original(noisy, timesteps, tiny_condition()),
        atol=2e-2,  # weights are stored as fp16
        rtol=2e-2,
    )


def test_where_the_output_starts_is_written_only_where_that_is_not_zero(tmp_path: Path, checkpoint: Path) -> None:
    """A checkpoint without it, as the bundled one, answers as its network alone does."""
    for folder in (checkpoint, bundled_checkpoint()):
        assert load_checkpoint(folder).denoiser.start is None
        assert "output.start" not in load_file(folder / WEIGHTS)
    start = torch.randn(TINY_SPEC.num_parameters)
    config = read_config(checkpoint)
    denoiser = tiny_denoiser(start=start, **config.denoiser.model_dump())
    save_checkpoint(tmp_path / "starting", config, denoiser, tiny_space())
    loaded = load_checkpoint(tmp_path / "starting").denoiser
    assert loaded.start is not None
    assert torch.equal(loaded.start, start)
    noisy, timesteps = torch.randn(3, TINY_SPEC.num_parameters), torch.tensor([1, 20, 40])
    plain = load_checkpoint(checkpoint).denoiser(noisy, timesteps, tiny_condition())
    torch.testing.assert_close(loaded(noisy, timesteps, tiny_condition()), plain + start)


def test_an_output_start_of_another_size_is_refused(checkpoint: Path) -> None:
    replace_weights(checkpoint, load_file(checkpoint / WEIGHTS) | {"output.start": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"tensor output.start has shape \(3,\), expected"):
        load_checkpoint(checkpoint)


def test_equal_checkpoints_have_equal_hashes(tmp_path: Path) -> None:
    source = TextEncoderConfig(source="dir:text_encoder", name="n")
    hashes = [save_tiny_checkpoint(tmp_path / name, text_encoder=source).sha256 for name in ("a", "b")]
    assert hashes[0] == hashes[1]
    assert save_tiny_checkpoint(tmp_path / "c", text_encoder=source, seed=9).sha256 != hashes[0]
    assert save_tiny_checkpoint(tmp_path / "d", text_encoder=source, steps=2, sampler="ddim").sha256 != hashes[0]


def test_parts_are_copied_and_covered_by_hashes(tmp_path: Path) -> None:
    part = tmp_path / "tower"
    (part / "deep").mkdir(parents=True)
    (part / "deep" / "vocabulary.txt").write_text("words")
    folder = tmp_path / "checkpoint"
    written = save_tiny_checkpoint(folder, parts={"text_encoder": part})
    assert set(written.files) == {WEIGHTS, "text_encoder/deep/vocabulary.txt"}
    (folder / "text_encoder" / "deep" / "vocabulary.txt").write_text("wordz")
    with pytest.raises(CheckpointError, match=r"vocabulary.txt is damaged.*copy it again"):
        load_checkpoint(folder)


def test_recording_an_evaluation_changes_nothing_else(checkpoint: Path) -> None:
    before = read_config(checkpoint)
    (checkpoint / ".config.json.tmp").write_text("left by a run that was killed")
    written = record_evaluation(checkpoint, {"gap_closed": {"unseen": 0.77}})
    after = load_checkpoint(checkpoint).config
    assert after == written
    assert after == before.model_copy(update={"evaluation": {"gap_closed": {"unseen": 0.77}}})
    assert after.sha256 != before.sha256


def test_every_flipped_byte_is_noticed(checkpoint: Path) -> None:
    config = read_config(checkpoint)
    draw = random.Random(0)
    for name, count in (("config.json", 300), (WEIGHTS, 60)):
        file = checkpoint / name
        data = file.read_bytes()
        positions = {0, 1, 7, 8, len(data) - 1, *(draw.randrange(len(data)) for _ in range(count))}
        for position in sorted(positions):
            flipped = bytearray(data)
            flipped[position] ^= 1 << draw.randrange(8)
            file.write_bytes(flipped)
            try:
                read = read_config(checkpoint)
            except CheckpointError:
                continue
            # Only what JSON does not read, such as white space, may differ unnoticed.
            assert name == "config.json", f"byte {position} of {name}"
            assert read == config, f"byte {position} of {name}"
        file.write_bytes(data)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_files_are_refused(checkpoint: Path, name: str, share: float) -> None:
    data = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_missing_files_are_named(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(checkpoint)


def test_what_is_no_folder_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    for path in (tmp_path / "absent", tmp_path, checkpoint / WEIGHTS):
        with pytest.raises(CheckpointError, match="is not a checkpoint"):
            load_checkpoint(path)


@pytest.mark.parametrize(
    "content", ["", "[]", "3", '"text"', "null", "{}", '{"sha256": ""}', "[" * 100_000, "\ufeff{}"]
)
def test_other_json_is_refused(checkpoint: Path, content: str) -> None:
    (checkpoint / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match="does not describe a checkpoint"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surprise": 1}, "surprise"),
        ({"format": "text2weight.checkpoint/2"}, "format"),
        ({"sampler": "euler"}, "sampler"),
        ({"steps": 0}, "steps"),
        ({"steps": 4}, "exactly 1"),
        ({"sampler": "ddim", "steps": 41}, "allowed are 1 to 40"),
        ({"template": "a photo"}, "template"),
        ({"template": "a {} {x}"}, "template"),
        ({"logit_scale": -1}, "logit_scale"),
        ({"denoiser": {"width": 16, "heads": 3, "embedding_dim": 8}}, "not a multiple"),
        ({"denoiser": {"width": 16, "heads": 2, "embedding_dim": 9}}, "output_dim 8 and denoiser embedding_dim 9"),
        ({"files": {}}, f"states no hash for {WEIGHTS}"),
    ],
)
def test_configs_that_cannot_work_are_refused(checkpoint: Path, changes: dict[str, object], message: str) -> None:
    rewrite(checkpoint, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["../table.safetensors", "a/../../table.safetensors", "ABSOLUTE", "absent.bin", "."])
def test_files_must_lie_inside(checkpoint: Path, name: str) -> None:
    outside = checkpoint.parent / "table.safetensors"
    outside.write_bytes(b"secret")
    (checkpoint / "a").mkdir()
    name = str(outside) if name == "ABSOLUTE" else name
    rewrite(checkpoint, files={**read_config(checkpoint).files, name: file_sha256(outside)})
    with pytest.raises(CheckpointError, match=r"must lie inside the checkpoint|lacks the file"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "name", ["weight_space.anchor", "weight_space.offset", "weight_space.scale", "condition.center"]
)
def test_vectors_must_have_their_size(checkpoint: Path, name: str) -> None:
    tensors = load_file(checkpoint / WEIGHTS)
    # One number would broadcast to any size without a complaint.
    for wrong in (tensors[name][:1], tensors[name][:-1], tensors[name][None]):
        replace_weights(checkpoint, {**tensors, name: wrong.clone()})
        with pytest.raises(CheckpointError, match=r"does not fit its config\.json"):
            load_checkpoint(checkpoint)


def test_tensors_must_be_those_of_the_denoiser(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / WEIGHTS)
    some = next(name for name in tensors if name.startswith("denoiser."))
    for changed in (
        {name: tensor for name, tensor in tensors.items() if name != some},
        {name: tensor for name, tensor in tensors.items() if name != "condition.center"},
        {**tensors, "extra": torch.zeros(1)},
        {**tensors, some: torch.zeros(1, 1, 1)},
    ):
        replace_weights(checkpoint, changed)
        with pytest.raises(CheckpointError, match=r"does not fit its config\.json"):
            load_checkpoint(checkpoint)


def test_the_hub_delivers_a_folder_of_links(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot, asked = tmp_path / "snapshot", []
    snapshot.mkdir()
    for file in checkpoint.iterdir():
        (snapshot / file.name).symlink_to(file)

    def snapshot_download(name: str, *, revision: str | None) -> str:
        asked.append((name, revision))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load_checkpoint("hf:owner/name@v1").config == read_config(checkpoint)
    assert load_checkpoint("hf:owner/name").path == snapshot
    assert asked == [("owner/name", "v1"), ("owner/name", None)]


def test_a_hub_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: object, **__: object) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match="hf:owner/name@v1 cannot be downloaded: no route"):
        load_checkpoint("hf:owner/name@v1")


@pytest.mark.parametrize("moment", ["save_file", "_write_config", "_replace_folder"])
def test_an_interrupted_save_leaves_the_old_checkpoint(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    before = load_checkpoint(checkpoint).config

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(text2weight.checkpoint, moment, fail)
        with pytest.raises(OSError, match="No space left"):
            save_tiny_checkpoint(checkpoint, seed=5)
    assert load_checkpoint(checkpoint).config == before
    assert {path.name for path in checkpoint.parent.iterdir()} == {"checkpoint", "table.safetensors"}


def test_a_failed_swap_puts_the_old_checkpoint_back(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_checkpoint(checkpoint).config
    rename = Path.rename

    def fail_for_the_new_one(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError("gone")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail_for_the_new_one)
        with pytest.raises(OSError, match="gone"):
            save_tiny_checkpoint(checkpoint, seed=5)
    assert load_checkpoint(checkpoint).config == before


def test_saving_again_replaces_all_files(checkpoint: Path) -> None:
    (checkpoint / "stray.txt").write_text("x")
    written = save_tiny_checkpoint(checkpoint, seed=5)
    assert load_checkpoint(checkpoint).config == written
    assert {path.name for path in checkpoint.iterdir()} == {"config.json", WEIGHTS}
    assert {path.name for path in checkpoint.parent.iterdir()} == {"checkpoint", "table.safetensors"}


def test_the_bundled_checkpoint_is_found_or_its_absence_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text2weight.checkpoint, "__file__", str(tmp_path / "core" / "text2weight" / "checkpoint.py"))
    with pytest.raises(CheckpointError, match="name a checkpoint folder"):
        bundled_checkpoint()
    save_tiny_checkpoint(tmp_path / "models" / "reference")
    assert bundled_checkpoint() == tmp_path / "models" / "reference"
    save_tiny_checkpoint(tmp_path / "core" / "text2weight" / "reference_model")
    assert bundled_checkpoint() == tmp_path / "core" / "text2weight" / "reference_model"

"""The checkpoint directory that a fit ends with: the denoiser, and all that a request needs beside it."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from text2weight.artifact import created_by
from text2weight.checkpoint import CheckpointConfig, TextEncoderConfig, save_checkpoint
from text2weight.denoiser import Denoiser
from text2weight.generator import BUNDLED_CONDITION_TEXT, BUNDLED_TEXT_ENCODER
from text2weight.text_encoder import copy_embedding_table, load_text_encoder
from text2weight.weight_space import WeightSpace
from text2weight_training.presets import Preset
from text2weight_training.splits import fresh_task_sizes, training_class_names
from text2weight_training.tasks import ConditionTexts, TaskData, TaskSplit


def write_fitted_checkpoint(
    out: Path,
    preset: Preset,
    data: TaskData,
    split: TaskSplit,
    denoiser: Denoiser,
    space: WeightSpace,
    backbone: Path | None = None,
) -> None:
    """Write a fitted denoiser as a checkpoint directory.

    A local text encoder, condition texts and a backbone folder are copied in, so the checkpoint needs nothing else.

    Args:
        out: the checkpoint directory.
        preset: it was fitted with.
        data: likewise.
        split: likewise.
        denoiser: the network.
        space: of its samples.
        backbone: folder of the backbone the features were made with.
    """
    with TemporaryDirectory() as scratch:
        source, parts = _text_encoder_part(data.text_source, Path(scratch) / "text")
        condition, texts = _condition_text_part(data.condition_texts, Path(scratch) / "condition")
        parts |= texts
        if backbone is not None:
            parts["backbone"] = backbone
        config = _checkpoint_config(preset, data, split, source, condition)
        save_checkpoint(out, config, denoiser, space, parts)


def _checkpoint_config(
    preset: Preset, data: TaskData, split: TaskSplit, text_source: str, condition: TextEncoderConfig | None
) -> CheckpointConfig:
    encoder = load_text_encoder(data.text_source)
    fresh = fresh_task_sizes(split, len(data.classes), preset.fit.fresh_task_size)
    return CheckpointConfig(
        created_by=created_by(),
        head=preset.head,
        logit_scale=preset.logit_scale,
        template=data.template,
        classes=training_class_names(data, split),
        task_size=fresh if preset.fit.fresh_items else preset.zoo.task_size,
        task_split_sha256=split.fingerprint,
        text_encoder=TextEncoderConfig(source=text_source, name=encoder.name, fingerprint=encoder.fingerprint),
        condition_text=condition,
        backbone=dict(data.backbone),
        denoiser=preset.denoiser,
        schedule=preset.schedule,
        prediction=preset.prediction,
        sampler=preset.sampler,
        steps=preset.steps,
        outside=preset.outside,
    )


def _text_encoder_part(source: str, scratch: Path) -> tuple[str, dict[str, Path]]:
    """Make a text encoder's source relative to the checkpoint, and name the folder to copy into it.

    An encoder that is known by name and downloaded, "open_clip:ARCH/TAG", stays what it is.
    """
    kind, _, place = source.partition(":")
    if kind == "dir":
        return f"dir:{BUNDLED_TEXT_ENCODER}", {BUNDLED_TEXT_ENCODER: Path(place)}
    if kind == "table":
        return _bundle_table(place, BUNDLED_TEXT_ENCODER, scratch)
    return source, {}


def _condition_text_part(
    texts: ConditionTexts | None, scratch: Path
) -> tuple[TextEncoderConfig | None, dict[str, Path]]:
    """What a checkpoint says of its condition texts, and the folder to copy into it; nothing where it has none."""
    if texts is None:
        return None, {}
    source, parts = _bundle_table(texts.source, BUNDLED_CONDITION_TEXT, scratch)
    return TextEncoderConfig(source=source, name=texts.name, fingerprint=texts.fingerprint), parts


def _bundle_table(place: str, part: str, scratch: Path) -> tuple[str, dict[str, Path]]:
    scratch.mkdir()
    table = copy_embedding_table(place, scratch / "table.safetensors")
    return f"table:{part}/table.safetensors#{table}", {part: scratch}

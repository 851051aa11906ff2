"""Checkpoint directories: `config.json` that explains itself, `model.safetensors`, optional parts.

Nothing is ever unpickled. Every file is covered by a hash in the config, and the config by its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from text2weight.denoiser import Denoiser, DenoiserConfig
from text2weight.diffusion import NoiseSchedule, Prediction
from text2weight.errors import CheckpointError
from text2weight.head import HeadSpec
from text2weight.outside import OutsideSettings
from text2weight.samplers import SamplerName, check_sampler
from text2weight.text_encoder import TEMPLATE_PATTERN
from text2weight.weight_space import WeightSpace

FORMAT: Final = "text2weight.checkpoint/1"
WEIGHTS = "model.safetensors"
START = "output.start"


class TextEncoderConfig(BaseModel):
    """Which text encoder a checkpoint was trained with.

    Attributes:
        source: for `load_text_encoder`; a path that starts with text_encoder is relative to the checkpoint.
        name: what a person calls it.
        fingerprint: of the weights it was trained with; "" where any is accepted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    name: str
    fingerprint: str = ""


class CheckpointConfig(BaseModel):
    """Everything about a checkpoint but its numbers; `config.json` holds exactly these fields and `sha256`.

    Attributes:
        format: version of this layout.
        created_by: program and version.
        head: specification of the generated heads.
        logit_scale: s of the cosine logits.
        template: prompt with one `{}` for a class name.
        classes: names the checkpoint was trained on.
        task_size: least and greatest number of classes it was trained on.
        task_split_sha256: of the zoo's split, which says what combinations of classes training left out.
        text_encoder: where class embeddings come from.
        condition_text: where the denoiser's condition comes from by class name, if not from class embeddings.
        backbone: name, preprocessing and feature size of the images' side.
        denoiser: size and variant of the network.
        schedule: noise schedule.
        prediction: what the network outputs.
        sampler: used where a request names none.
        steps: likewise.
        outside: how names that are not among `classes` are treated; None for as any other.
        evaluation: measured results, as `t2w evaluate` wrote them.
        files: sha256 of every other file, by path relative to the checkpoint.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["text2weight.checkpoint/1"] = FORMAT
    created_by: str
    head: HeadSpec = HeadSpec()
    logit_scale: PositiveFloat = 30.0
    template: str = Field(default="a {}", pattern=TEMPLATE_PATTERN)
    classes: tuple[str, ...] = ()
    task_size: tuple[int, int] = (8, 32)
    # This, `condition_text` and `outside` are left out where they are not used: the hash of checkpoints that are older
    # than they are stays what it was.
    task_split_sha256: str | None = Field(default=None, exclude_if=lambda digest: digest is None)
    text_encoder: TextEncoderConfig
    condition_text: TextEncoderConfig | None = Field(default=None, exclude_if=lambda source: source is None)
    backbone: dict[str, Any] = {}
    denoiser: DenoiserConfig = DenoiserConfig()
    schedule: NoiseSchedule = NoiseSchedule()
    prediction: Prediction = "x0"
    sampler: SamplerName = "mean"
    steps: PositiveInt = 1
    outside: OutsideSettings | None = Field(default=None, exclude_if=lambda settings: settings is None)
    evaluation: dict[str, Any] = {}
    files: dict[str, str] = {}

    @model_validator(mode="after")
    def _parts_fit_together(self) -> CheckpointConfig:
        check_sampler(self.sampler, self.steps, self.schedule.num_timesteps)
        if self.head.logits == "cosine" and self.head.output_dim != self.denoiser.embedding_dim:
            raise ValueError(
                f"head output_dim {self.head.output_dim} and denoiser embedding_dim {self.denoiser.embedding_dim} "
                "differ: cosine logits compare head outputs with class embeddings"
            )
        if self.outside is not None and not self.classes:
            raise ValueError("outside is given without classes: name those that training saw, or leave it out")
        return self

    @property
    def sha256(self) -> str:
        """Hash of the config's canonical JSON and so, through `files`, of the whole checkpoint."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint, on the CPU.

    Attributes:
        path: its folder.
        config: its description.
        denoiser: the network, in eval mode.
        space: the weight space.
    """

    path: Path
    config: CheckpointConfig
    denoiser: Denoiser
    space: WeightSpace


def file_sha256(path: Path) -> str:
    """Hash one file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def bundled_checkpoint() -> Path:
    """Return the reference checkpoint's folder: inside an installed package, or in the repository.

    Raises:
        CheckpointError: it was not shipped.
    """
    here = Path(__file__).resolve()
    for folder in (here.parent / "reference_model", here.parents[2] / "models" / "reference"):
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError("the bundled reference model is not installed: name a checkpoint folder")


def locate(source: str | Path) -> Path:
    """Return the local folder of a checkpoint, downloading "hf:owner/name@revision" when needed.

    Raises:
        CheckpointError: the hub does not deliver it.
    """
    text = str(source)
    if not text.startswith("hf:"):
        return Path(text)
    from huggingface_hub import snapshot_download

    name, _, revision = text.removeprefix("hf:").partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None))
    except Exception as error:  # the hub's client raises many kinds, network errors among them
        raise CheckpointError(f"checkpoint {text} cannot be downloaded: {error}") from error


def read_config(folder: Path) -> CheckpointConfig:
    """Read and verify `config.json` and the hash of every file it lists.

    Raises:
        CheckpointError: a file is missing, changed, or of a format this version does not read.
    """
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        stated = content.pop("sha256")
        config = CheckpointConfig.model_validate(content)
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder} is not a checkpoint: {error}") from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder}/config.json does not describe a checkpoint: {error}") from error
    if config.sha256 != stated:
        raise CheckpointError(f"{folder}/config.json was changed after it was written: its hash differs")
    for name, expected in config.files.items():
        path = folder / name
        # The name itself is checked, not where a link leads: the hub's cache is made of links.
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CheckpointError(f"{folder}/config.json names {name}: files must lie inside the checkpoint")
        if not path.is_file():
            raise CheckpointError(f"{folder} lacks the file {name}")
        if file_sha256(path) != expected:
            raise CheckpointError(f"{path} is damaged: its hash differs from config.json's; copy it again")
    return config


def load_checkpoint(source: str | Path) -> Checkpoint:
    """Load and verify a checkpoint directory or "hf:owner/name@revision".

    Raises:
        CheckpointError: it is missing, damaged, or its tensors do not fit its config.
    """
    folder = locate(source)
    config = read_config(folder)
    if WEIGHTS not in config.files:
        raise CheckpointError(f"{folder}/config.json states no hash for {WEIGHTS}")
    try:
        tensors = {name: tensor.float() for name, tensor in load_file(folder / WEIGHTS).items()}
        space = WeightSpace(*(tensors.pop(f"weight_space.{name}") for name in ("anchor", "offset", "scale")))
        center = tensors.pop("condition.center")
        start = tensors.pop(START, None)  # only where a network starts elsewhere than at zero
        _check_shapes(config, space, center, start)
        denoiser = Denoiser(config.head, config.denoiser, space.anchor, center, start)
        denoiser.load_state_dict({name.removeprefix("denoiser."): tensor for name, tensor in tensors.items()})
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder}/{WEIGHTS} does not fit its config.json: {error}") from error
    return Checkpoint(folder, config, denoiser.eval(), space)


def _check_shapes(config: CheckpointConfig, space: WeightSpace, center: Tensor, start: Tensor | None) -> None:
    weights = space.tensors() if start is None else {**space.tensors(), START: start}
    expected = dict.fromkeys(weights, config.head.num_parameters) | {"center": config.denoiser.embedding_dim}
    for name, tensor in {**weights, "center": center}.items():
        if tensor.shape != (expected[name],):
            raise ValueError(f"tensor {name} has shape {tuple(tensor.shape)}, expected ({expected[name]},)")


def save_checkpoint(
    folder: Path,
    config: CheckpointConfig,
    denoiser: Denoiser,
    space: WeightSpace,
    parts: dict[str, Path] | None = None,
) -> CheckpointConfig:
    """Write a checkpoint directory; the old one, if any, stays until the new one is whole.

    Args:
        folder: where to.
        config: its description; `files` is filled in here.
        denoiser: the network; written as fp16, whose rounding is far below training noise.
        space: the weight space; written as fp32.
        parts: folders to copy in, by name ("text_encoder", "backbone").

    Returns:
        The config as written.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file(_tensors_to_save(denoiser, space), temporary / WEIGHTS)
        for name, source in (parts or {}).items():
            shutil.copytree(source, temporary / name)
        config = _write_config(temporary, config)
        _replace_folder(folder, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return config


def _tensors_to_save(denoiser: Denoiser, space: WeightSpace) -> dict[str, Tensor]:
    center = denoiser.embedding_center
    assert isinstance(center, Tensor)
    tensors = {f"denoiser.{name}": tensor.half() for name, tensor in denoiser.state_dict().items()}
    tensors |= {f"weight_space.{name}": tensor.float() for name, tensor in space.tensors().items()}
    tensors["condition.center"] = center.float()
    if denoiser.start is not None:
        tensors[START] = denoiser.start.float()
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _replace_folder(folder: Path, replacement: Path) -> None:
    if not folder.exists():
        replacement.rename(folder)
        return
    retired = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    shutil.rmtree(retired, ignore_errors=True)
    folder.rename(retired)
    try:
        replacement.rename(folder)
    except BaseException:
        retired.rename(folder)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def _write_config(folder: Path, config: CheckpointConfig) -> CheckpointConfig:
    temporary = folder / ".config.json.tmp"
    files = {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path not in (folder / "config.json", temporary)
    }
    config = config.model_copy(update={"files": files})
    content = {**config.model_dump(mode="json"), "sha256": config.sha256}
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(folder / "config.json")
    return config


def record_evaluation(folder: Path, evaluation: dict[str, Any]) -> CheckpointConfig:
    """Put measured results into a checkpoint's config.

    Raises:
        CheckpointError: see `read_config`.
    """
    return _write_config(folder, read_config(folder).model_copy(update={"evaluation": evaluation}))


def record_outside(folder: Path, outside: OutsideSettings | None) -> CheckpointConfig:
    """Put how names outside of training are treated into a checkpoint's config: nothing is trained by it.

    Raises:
        CheckpointError: see `read_config`; the checkpoint does not name the classes of its training.
    """
    config = read_config(folder)
    if outside is not None and not config.classes:
        raise CheckpointError(f"{folder}/config.json names no classes of training: none can be told to lie outside")
    return _write_config(folder, config.model_copy(update={"outside": outside}))

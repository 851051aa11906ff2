"""A teacher: a wide classifier over all training classes whose answers are the task loss's targets.

Knowledge distillation (arXiv 1503.02531). A head has room for what tells a few classes apart, and learns a task's
features by heart before it has used them up; the teacher, too large to serve, has seen every class and says of each
training feature which of a task's classes it resembles and how much.
Letters: N features, C classes, c of them trained on, d feature size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from text2weight_training.files import atomic_path
from text2weight_training.loss_watch import StepWatch
from text2weight_training.stacked import RegularisingShare, cosine_decay
from text2weight_training.tasks import TaskData, TaskSplit

ANSWER_ROWS = 4096  # features that the finished teacher looks at together


class TeacherSettings(BaseModel):
    """The teacher, and how much of it the task loss believes.

    Attributes:
        share: of its answers in the task loss's targets; the rest are the labels.
        width: of its one hidden layer.
        dropout: share of hidden numbers that are dropped.
        feature_dropout: share of each feature's numbers that are dropped.
        label_smoothing: of its own targets.
        epochs: passes over the training features.
        batch_size: features per step.
        learning_rate: AdamW's peak; warm-up over a twentieth, then a cosine to zero.
        weight_decay: AdamW's decoupled decay.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    share: float = Field(default=1.0, gt=0, le=1)
    width: PositiveInt = 2048
    dropout: RegularisingShare = 0.7
    feature_dropout: RegularisingShare = 0.3
    label_smoothing: RegularisingShare = 0.1
    epochs: PositiveInt = 15
    batch_size: PositiveInt = 512
    learning_rate: PositiveFloat = 2e-3
    weight_decay: NonNegativeFloat = 0.05


class Teacher(nn.Module):
    """Standardised features (N, d) -> logits of the c training classes (N, c)."""

    def __init__(self, mean: Tensor, spread: Tensor, classes: int, settings: TeacherSettings) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("spread", spread)
        self.drop = nn.Dropout(settings.feature_dropout)
        self.layers = nn.Sequential(
            nn.Linear(len(mean), settings.width),
            nn.BatchNorm1d(settings.width),
            nn.GELU(),
            nn.Dropout(settings.dropout),
            nn.Linear(settings.width, classes),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, d) -> (N, c)."""
        assert isinstance(self.mean, Tensor)
        assert isinstance(self.spread, Tensor)
        logits: Tensor = self.layers(self.drop((features - self.mean) / self.spread))
        return logits


def teacher_answers(
    data: TaskData,
    split: TaskSplit,
    settings: TeacherSettings,
    seed: int,
    file: Path,
    on_step: Callable[[float], None] | None = None,
) -> Tensor:
    """Logits of a teacher for every training feature (N, C) fp16, -inf for classes that are held out.

    A teacher that was trained before, from the same data and settings, is read from `file`; a new one is kept there.

    Args:
        data: features and embeddings.
        split: what is kept from training.
        settings: the teacher's.
        seed: of its weights and batches.
        file: where its answers are kept.
        on_step: called after every step of its training with the share that is done.

    Raises:
        DivergedError: its loss or its weights are not finite, or the loss exploded.
    """
    settings_json = settings.model_dump_json(exclude={"share"})
    origin = json.dumps([data.fingerprint, split.held_out.classes, settings_json, seed])
    kept = _read_answers(file, origin)
    if kept is not None:
        return kept
    answers = train_teacher(data, split, settings, seed, on_step)
    with atomic_path(file) as temporary:
        save_file({"answers": answers.cpu()}, temporary, metadata={"origin": origin})
    return answers


def _read_answers(file: Path, origin: str) -> Tensor | None:
    """The answers in a file, if they are there, whole, and of this origin."""
    try:
        with safe_open(file, "pt") as opened:
            return opened.get_tensor("answers") if (opened.metadata() or {}).get("origin") == origin else None
    except (OSError, SafetensorError):
        return None


def train_teacher(
    data: TaskData,
    split: TaskSplit,
    settings: TeacherSettings,
    seed: int,
    on_step: Callable[[float], None] | None = None,
) -> Tensor:
    """Train a teacher on the features of the training classes; see `teacher_answers` for what it returns."""
    total = len(data.classes)
    trained = torch.tensor(split.held_out.training_classes(total))  # (c,)
    features, labels = data.train.of_task(trained.tolist())  # (n, d), (n,) positions among the trained classes
    device = features.device
    spread, mean = torch.std_mean(features, dim=0)  # (d,)
    steps = settings.epochs * math.ceil(len(features) / settings.batch_size)
    generator = torch.Generator().manual_seed(seed)
    watch = StepWatch("the teacher", "lower fit.teacher.learning_rate", guess=math.log(len(trained)))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        teacher = Teacher(mean, spread.clamp(min=1e-6), len(trained), settings).to(device)
        optimizer = torch.optim.AdamW(
            teacher.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        step = 0
        for _ in range(settings.epochs):
            for rows in torch.randperm(len(features), generator=generator).split(settings.batch_size):
                rate = min(20 * (step + 1) / steps, cosine_decay(step / steps))
                optimizer.param_groups[0]["lr"] = settings.learning_rate * rate
                # Normalisation over a batch needs two rows at least.
                batch = rows if len(rows) > 1 else rows.repeat(2)
                logits = teacher(features[batch])  # (b, c)
                loss = F.cross_entropy(logits, labels[batch].to(device), label_smoothing=settings.label_smoothing)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                watch.add(loss)
                step += 1
                if on_step is not None:
                    on_step(step / steps)
    watch.check_weights(torch.cat([parameter.detach().flatten() for parameter in teacher.parameters()]))
    teacher.eval()
    with torch.no_grad():
        rows = [teacher(part.float()) for part in data.train.features.split(ANSWER_ROWS)]
    answers = torch.full((len(data.train.features), total), -math.inf, device=device)
    answers[:, trained.to(device)] = torch.cat(rows)  # (N, C)
    return answers.half()

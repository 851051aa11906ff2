"""Classifiers that are no heads: two made in closed form from a task's own features, and CLIP's zero-shot one.

Each is a predictor: (task's labels, features (N, d)) -> scores (N, K), the highest of which is the answer.
Letters: N features, d feature size, K classes of a task, D embedding size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from text2weight_training.image_encoders import OPEN_CLIP
from text2weight_training.tasks import TaskData

# Shares of the features' mean variance that are added to every direction of it.
RIDGE_SHARES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
CHOICE_STRIDE = 10  # every tenth training feature chooses the ridge's strength


def prototype_scores(data: TaskData, task: tuple[int, ...], features: Tensor) -> Tensor:
    """Nearest class mean: cosine of features (N, d) to the mean training feature of each class, (N, K)."""
    means = [data.train.of_task([label])[0].mean(0) for label in task]
    return F.normalize(features, dim=-1) @ F.normalize(torch.stack(means), dim=-1).T


def ridge_scores(data: TaskData, task: tuple[int, ...], features: Tensor) -> Tensor:
    """Ridge regression from training features to the classes' indicators, in closed form: (N, K).

    The strength is the one with the best accuracy on every tenth training feature; with it, all are fitted.
    """
    known, targets = data.train.of_task(task)  # (N', d), (N',)
    # Features come class by class, so a stride takes the same share of each.
    chosen = torch.arange(len(known)) % CHOICE_STRIDE == 0
    candidates = _ridge_fits(known[~chosen], targets[~chosen], len(task), RIDGE_SHARES)
    hits = [float(((known[chosen] @ w + b).argmax(-1) == targets[chosen]).float().mean()) for w, b in candidates]
    best = RIDGE_SHARES[max(range(len(hits)), key=hits.__getitem__)]
    weight, bias = _ridge_fits(known, targets, len(task), (best,))[0]  # (d, K), (K,)
    return features @ weight + bias


def _ridge_fits(
    features: Tensor, targets: Tensor, num_classes: int, shares: tuple[float, ...]
) -> list[tuple[Tensor, Tensor]]:
    """Weight (d, K) and bias (K,) for each strength; one eigendecomposition serves all."""
    indicators = F.one_hot(targets, num_classes).float()  # (N, K)
    center, level = features.mean(0), indicators.mean(0)  # (d,), (K,)
    centred = features - center  # (N, d)
    eigenvalues, vectors = torch.linalg.eigh((centred.T @ centred).double())  # (d,), (d, d)
    projected = vectors.T @ (centred.T @ (indicators - level)).double()  # (d, K)
    fits = []
    for share in shares:
        strength = (share * eigenvalues.mean()).clamp(min=1e-12)
        weight = (vectors @ (projected / (eigenvalues.clamp(min=0) + strength)[:, None])).float()  # (d, K)
        fits.append((weight, level - center @ weight))
    return fits


def zero_shot_scores(data: TaskData, task: tuple[int, ...], features: Tensor) -> Tensor:
    """CLIP's zero-shot classifier: cosine of image features (N, D) to the classes' text embeddings, (N, K)."""
    return F.normalize(features, dim=-1) @ data.embeddings[list(task)].T


def zero_shot_obstacle(data: TaskData) -> str | None:
    """Why CLIP zero-shot does not apply to these features; None where it does."""
    backbone = data.backbone["name"]
    if not backbone.startswith(OPEN_CLIP):
        return f"the features are of {backbone}, not of CLIP's image tower"
    if data.text_model == backbone:
        return None
    made_by = data.text_model or "a text model that their table does not name"
    return f"the features are of {backbone}, the text embeddings of {made_by}; give --text {backbone}"

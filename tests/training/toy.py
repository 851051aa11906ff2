"""A toy classification problem: twelve classes of Gaussian blobs whose texts say where the blobs lie."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml

from text2weight.text_encoder import EmbeddingTable, write_embedding_tables
from text2weight_training.feature_file import FeatureFile, write_feature_file
from text2weight_training.presets import Preset
from text2weight_training.tasks import TaskData, load_task_data

NAMES = (
    "apple", "maple_tree", "Bus", "lizard", "rocket", "clock", "coffee cup", "bear", "sea", "plate", "mushroom", "fog",
)  # fmt: skip
FEATURE_DIM = 16
TEXT_DIM = 8

PRESET: dict[str, Any] = {
    "seed": 3,
    "head": {"input_dim": FEATURE_DIM, "hidden_dim": 4, "output_dim": TEXT_DIM},
    "logit_scale": 10.0,
    "zoo": {
        "tasks": 48,
        "task_size": [3, 6],
        "unseen_fraction": 0.25,
        "stack": 12,
        "base": {"steps": 3, "batch_size": 64, "learning_rate": 1e-2, "weight_decay": 0.0},
        "universal": {"steps": 150, "batch_size": 64, "learning_rate": 3e-2, "weight_decay": 0.0},
        "heads": {"steps": 60, "batch_size": 32, "learning_rate": 3e-2, "weight_decay": 0.0},
    },
    "denoiser": {"width": 32, "depth": 1, "heads": 2, "embedding_dim": TEXT_DIM, "chunk_size": 32},
    "schedule": {"num_timesteps": 40},
    "fit": {
        "steps": 12,
        "zoo_batch": 8,
        "fresh_batch": 8,
        "fresh_task_size": [2, 6],
        "samples": 32,
        "learning_rate": 3e-3,
        "save_every": 3,
    },
    "evaluation": {
        "tasks": 8,
        "samplers": [["mean", 1], ["ddim", 3]],
        "oracle": {"steps": 80, "batch_size": 32, "learning_rate": 3e-2, "weight_decay": 0.0},
        "bootstrap": 200,
    },
    "suites": {
        "accuracy": {
            "tasks": 5,
            "oracle_seeds": 2,
            "restricted_universal": {"steps": 60, "batch_size": 32, "learning_rate": 1e-2, "weight_decay": 0.0},
            "restricted_tasks": 8,
            "hypernetwork": {"steps": 20, "batch_size": 16, "learning_rates": [1e-2], "weight_decays": [0.0, 0.1]},
            "bootstrap": 100,
        },
        "headline": {
            "tasks": 6,
            "generation_seeds": 2,
            "samplers": [["ddim", 3]],
            "tuning_tasks": 3,
            "learning_rates": [1e-2, 3e-2],
            "weight_decays": [0.0, 0.1],
            "steps": [40, 80],
            "oracle_seeds": 2,
            "bootstrap": 100,
        },
        "denoising": {"tasks": 6, "samplers": [["ddpm", 4], ["dpmpp_2m", 3]], "bootstrap": 100},
        "reading": {"tasks": 8, "samplers": [["mean", 1], ["ddim", 3]], "bootstrap": 100},
        "fuse": {"pairs": 5, "task_size": 3, "samplers": [["mean", 1], ["ddim", 3]], "bootstrap": 100},
        "init": {
            "tasks": 4,
            "seeds": 2,
            "learning_rates": [3e-3, 3e-2],
            "tuning_tasks": 2,
            "steps": [0, 1, 4, 16, 40],
            "few": 4,
            "loss_samples": 64,
            "bootstrap": 100,
        },
        "landscape": {
            "tasks": 4,
            "samples": 64,
            "line_points": 5,
            "radii": [0.1, 0.5],
            "directions": 3,
            "surface_points": 5,
            "bootstrap": 100,
        },
        "enhance": {
            "tasks": 6,
            "shares": [0.1, 0.5],
            "strengths": [0, 0.4, 0.8, 1],
            "samplers": [["mean", 1], ["ddim", 3]],
            "bootstrap": 100,
        },
        "memorisation": {
            "tasks": 6,
            "samplers": [["mean", 1], ["ddpm", 4]],
            "seeds": 2,
            "neighbours": [2, 3],
            "bootstrap": 100,
        },
        "ablation": {
            "minutes": 0.005,
            "seeds": 1,
            "tasks": 5,
            "samplers": [["mean", 1], ["ddim", 3]],
            "variants": ["full", "task_loss"],
            "bootstrap": 100,
        },
        "gradcam": {"tasks": 4, "pictures": 4, "sampler": ["ddim", 5], "rows": 2, "bootstrap": 100},
    },
}


def preset_dict(**changes: Any) -> dict[str, Any]:
    """The toy preset with some values replaced; `fit__steps=5` stands for fit.steps."""
    content = copy.deepcopy(PRESET)
    for name, value in changes.items():
        *folders, key = name.split("__")
        place = content
        for folder in folders:
            place = place.setdefault(folder, {})
        place[key] = value
    return content


def toy_preset(**changes: Any) -> Preset:
    return Preset.model_validate(preset_dict(**changes))


def hard_preset(**changes: Any) -> Preset:
    """A small zoo with held-out classes and pairs, of the toy problem."""
    settings = {
        "zoo__tasks": 32,
        "zoo__task_size": [2, 4],
        "zoo__held_out_classes": 0.25,
        "zoo__held_out_pairs": 4,
        "fit__fresh_task_size": [2, 5],
    }
    return toy_preset(**settings | changes)


def write_preset(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(preset_dict(**changes)))
    return path


def toy_features(dim: int = FEATURE_DIM, names: tuple[str, ...] = NAMES, seed: int = 0) -> FeatureFile:
    """Overlapping blobs, 40 training and 20 test points for each class."""
    source = torch.Generator().manual_seed(seed)
    centres = class_centres(dim, len(names))
    train_labels, test_labels = (torch.arange(len(names)).repeat(count) for count in (40, 20))
    train, test = (
        centres[labels] + 0.9 * torch.randn(len(labels), dim, generator=source)
        for labels in (train_labels, test_labels)
    )
    return FeatureFile(train.half(), train_labels, test.half(), test_labels, names, "toy backbone", "none")


def class_centres(dim: int, count: int) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(100))  # (C, d)


def toy_table(dim: int = TEXT_DIM, names: tuple[str, ...] = NAMES, feature_dim: int = FEATURE_DIM) -> EmbeddingTable:
    """Embeddings that are a linear picture of the blobs' centres, around a common direction as CLIP's are."""
    source = torch.Generator().manual_seed(5)
    centres = class_centres(feature_dim, len(names))
    projection = torch.randn(centres.shape[1], dim, generator=source) / 4
    spelled = tuple(name.lower().replace("_", " ") for name in names)
    return EmbeddingTable("a {}", spelled, F.normalize(centres @ projection + 0.5, dim=-1))


def write_toy_files(folder: Path) -> tuple[Path, str]:
    """Write features and table: (feature file, "FILE#TABLE")."""
    features, table = folder / "toy.safetensors", folder / "text.safetensors"
    write_feature_file(features, toy_features())
    write_embedding_tables(table, {"toy": toy_table()})
    return features, f"{table}#toy"


def toy_data(folder: Path) -> TaskData:
    features, text = write_toy_files(folder)
    return load_task_data([features], text)

"""Distilled text towers: they reproduce their table and load like any open_clip folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F

from text2weight.text_encoder import EmbeddingTable, OpenClipTextEncoder
from text2weight_training import distill_text
from text2weight_training.distill_text import (
    DistillConfig,
    batches_by_length,
    collect_prompts,
    cosine_loss,
    distill,
    encode_prompts,
    measure_agreement,
    one_cycle,
    write_vocabulary,
)
from text2weight_training.files import TrainingDataError

NAMES = (
    "apple", "bus", "lizard", "wardrobe", "maple tree", "rocket", "cat", "coffee mug", "clock", "sea lion",
    "lamp", "bear", "polar bear", "sports car", "school bus", "castle", "rose", "orchid", "train", "alarm clock, timer",
)  # fmt: skip
TINY = DistillConfig(width=32, layers=1, heads=2, context_length=12, epochs=250, batch_size=20)


def table(names: tuple[str, ...] = NAMES, template: str = "a {}", seed: int = 0, dim: int = 24) -> EmbeddingTable:
    """Vectors that share a large common part, as CLIP's do."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(dim, generator=generator)
    rows = common + 0.6 * torch.randn(len(names), dim, generator=generator)
    return EmbeddingTable(template, names, F.normalize(rows, dim=-1))


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tower")
    distill(collect_prompts([table()], 12), TINY, folder)
    write_vocabulary([table()], folder)
    return folder


def test_reproduces_twenty_names_within_seconds(tower: Path) -> None:
    agreement = measure_agreement(tower, table())
    assert agreement.mean_cosine > 0.95
    assert agreement.min_cosine > 0.9
    assert agreement.mean_centred > 0.9
    assert agreement.same_neighbour > 0.5


def test_agreement_is_low_for_a_table_it_never_saw(tower: Path) -> None:
    assert measure_agreement(tower, table(seed=5)).mean_centred < 0.4


def test_loads_through_open_clip_and_our_encoder(tower: Path) -> None:
    model = open_clip.create_model(f"local-dir:{tower}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{tower}")(["a apple", "a polar bear"])
    assert tokens.shape == (2, 12)
    with torch.no_grad():
        direct = model.encode_text(tokens, normalize=True)
    torch.testing.assert_close(OpenClipTextEncoder.from_directory(tower).encode(["a apple", "a polar bear"]), direct)
    torch.testing.assert_close(direct, encode_prompts(model, tokens))
    assert (direct * table().embeddings[[0, 12]]).sum(1).min() > 0.9
    names = {entry.name for entry in tower.iterdir()}
    assert names == {"open_clip_config.json", "open_clip_model.safetensors", "vocabulary.json"}


def test_unknown_words_give_finite_vectors(tower: Path) -> None:
    vectors = OpenClipTextEncoder.from_directory(tower).encode(["a quokka", "a 猫 🐈", "", "a " + "very long " * 50])
    assert torch.isfinite(vectors).all()


def test_file_is_as_small_as_its_token_table(tower: Path) -> None:
    token_table = 49_408 * TINY.width
    assert (tower / "open_clip_model.safetensors").stat().st_size < token_table + 100_000


def test_vocabulary_lists_what_it_was_trained_on(tower: Path) -> None:
    content = json.loads((tower / "vocabulary.json").read_text())
    assert content["templates"] == ["a {}"]
    assert content["names"] == sorted([*NAMES[:-1], "alarm clock"])


def test_shared_prompts_are_kept_once_and_counted() -> None:
    prompts = collect_prompts([table(), table(("apple", "zebra"), seed=1), table(("apple",), "a photo of a {}")], 12)
    assert len(prompts.texts) == len(NAMES) + 2
    assert prompts.counts[prompts.texts.index("a apple")] == 2
    assert prompts.texts[NAMES.index("alarm clock, timer")] == "a alarm clock"
    # The first table's vector counts.
    assert torch.equal(prompts.targets[0], table().embeddings[0])
    tokens = open_clip.get_tokenizer("ViT-B-32")(list(prompts.texts))
    assert torch.equal(tokens[:, :12], prompts.tokens)


def test_an_epoch_has_every_prompt_as_often_as_it_counts() -> None:
    prompts = collect_prompts([table(), table(("apple", "zebra"), seed=1)], 12)
    batches = list(batches_by_length(prompts.tokens, prompts.counts, 4, torch.Generator().manual_seed(0)))
    assert torch.equal(torch.cat(batches).bincount(), prompts.counts)


def test_loss_is_zero_at_the_target_and_counts_both_cosines() -> None:
    target, mean = table().embeddings, table().embeddings.mean(0)
    assert cosine_loss(target, target, mean).abs().max() < 1e-5
    assert torch.allclose(cosine_loss(-target, target, torch.zeros(24)), torch.full((20,), 4.0))


def test_learning_rate_rises_then_falls_to_zero() -> None:
    values = [one_cycle(step / 100) for step in range(101)]
    assert values.index(max(values)) == 5
    assert values[5] == pytest.approx(1)
    assert values[100] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("tables", "length", "message"),
    [
        ([], 12, "at least one"),
        ([table(), table(dim=8)], 12, r"different sizes \[8, 24\]"),
        ([table(("a b c d e f g h", "x"))], 8, "has 11 tokens, more than the tower's context length 8"),
    ],
)
def test_unusable_tables_are_refused(tables: list[EmbeddingTable], length: int, message: str) -> None:
    with pytest.raises(TrainingDataError, match=message):
        collect_prompts(tables, length)


def test_width_that_heads_do_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingDataError, match="3 heads do not divide width 32"):
        distill(collect_prompts([table()], 12), replace(TINY, heads=3), tmp_path)


def test_a_killed_run_ends_with_the_same_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, config = collect_prompts([table()], 12), replace(TINY, epochs=6, batch_size=8)
    whole = distill(prompts, config, tmp_path / "whole")
    killed = tmp_path / "killed"
    real_step, steps = distill_text._step, 0

    def dying_step(*arguments: object) -> float:
        nonlocal steps
        steps += 1
        if steps == 11:  # in the middle of the fourth epoch
            raise KeyboardInterrupt
        return real_step(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(distill_text, "SAVE_INTERVAL_S", 0.0)
        patch.setattr(distill_text, "_step", dying_step)
        with pytest.raises(KeyboardInterrupt):
            distill(prompts, config, killed)
    assert torch.load(killed / "training-state.pt", weights_only=True)["epoch"] == 3
    with pytest.raises(TrainingDataError, match="other settings: remove it"):
        distill(prompts, replace(config, width=16), killed)
    distill(prompts, config, killed)
    names = ("open_clip_config.json", "open_clip_model.safetensors")
    assert {entry.name for entry in killed.iterdir()} == set(names)
    assert all((killed / name).read_bytes() == (whole / name).read_bytes() for name in names)


def test_minutes_end_a_run_before_its_epochs(tmp_path: Path) -> None:
    prompts = collect_prompts([table()], 12)
    distill(prompts, replace(TINY, epochs=10**6, minutes=0.005), tmp_path)
    assert (tmp_path / "open_clip_model.safetensors").is_file()

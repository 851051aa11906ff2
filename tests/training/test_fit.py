"""The fit: learns, survives a kill, and stops when its numbers break."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.conftest import Toy
from tests.training.test_zoo import kill_when_half_written
from tests.training.toy import toy_preset, write_preset
from text2weight.checkpoint import read_config
from text2weight.generator import Generator
from text2weight.outside import OutsideSettings
from text2weight_training import fit as fit_module
from text2weight_training.files import TrainingDataError
from text2weight_training.fit import Fit, learning_rate_factor
from text2weight_training.loss_watch import DivergedError
from text2weight_training.presets import RESUMABLE, FitSettings
from text2weight_training.splits import draw_fresh_tasks
from text2weight_training.tasks import PADDING, HeldOut, TaskSplit
from text2weight_training.zoo import build_zoo

# Fits, and hangs when half of its second saved state is written.
HANG_IN_SECOND_SAVE = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from text2weight_training.fit import Fit
from text2weight_training.presets import load_preset
from text2weight_training.tasks import load_task_data
from text2weight_training.zoo import load_zoo
features, text, preset, zoo, state = sys.argv[1:]
torch_save, saved = torch.save, []
def save(content, path):
    torch_save(content, path)
    saved.append(path)
    if len(saved) == 2:
        whole = Path(path).read_bytes()
        Path(path).write_bytes(whole[: len(whole) // 2])
        Path(state + ".half").touch()
        time.sleep(600)
torch.save = save
Fit(load_task_data([Path(features)], text), load_zoo(Path(zoo)), load_preset(preset), Path(state), "cpu").run()
"""


def make_fit(toy: Toy, state: Path, **changes: Any) -> Fit:
    return Fit(toy.data, toy.zoo, toy_preset(**changes), state, "cpu")


def assert_same_weights(one: torch.nn.Module, two: torch.nn.Module) -> None:
    expected = two.state_dict()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_kill_9_then_resume_gives_the_same_weights(toy: Toy, tmp_path: Path) -> None:
    undisturbed = make_fit(toy, tmp_path / "undisturbed.pt")
    undisturbed.run()
    state = tmp_path / "state.pt"
    preset = write_preset(tmp_path / "toy.yaml")
    kill_when_half_written(
        HANG_IN_SECOND_SAVE,
        [str(toy.features), toy.text, str(preset), str(toy.zoo_folder), str(state)],
        tmp_path / "state.pt.half",
    )
    resumed = make_fit(toy, state)
    assert resumed.resume()
    assert resumed.state.step == 3
    resumed.run()
    assert resumed.state.step == undisturbed.state.step == 12
    assert_same_weights(resumed.denoiser, undisturbed.denoiser)
    assert_same_weights(resumed.average, undisturbed.average)


def test_nothing_to_resume(toy: Toy, tmp_path: Path) -> None:
    assert not make_fit(toy, tmp_path / "state.pt").resume()


def total_loss(fit: Fit) -> float:
    """Mean of all losses over fixed draws."""
    with torch.no_grad():
        losses = [fit._compute_losses(torch.Generator().manual_seed(seed)) for seed in range(1000, 1004)]
    return sum(float(value) for each in losses for value in each.values()) / len(losses)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prediction": "v"},
        {"prediction": "epsilon"},
        {"denoiser__tokens": "chunk"},
        {"head__bias": False, "head__activation": "none"},
    ],
    ids=["x0", "v", "epsilon", "chunk tokens", "linear head"],
)
def test_losses_fall_and_the_checkpoint_generates(toy: Toy, tmp_path: Path, changes: dict[str, Any]) -> None:
    changes = {"fit__steps": 60, "fit__save_every": 60, "fit__learning_rate": 1e-2, **changes}
    fit = linear_fit(toy, tmp_path, changes) if "head__bias" in changes else make_fit(toy, tmp_path / "s.pt", **changes)
    before = total_loss(fit)
    fit.run()
    assert total_loss(fit) < 0.95 * before
    fit.write_checkpoint(tmp_path / "checkpoint")
    generator = Generator.load(tmp_path / "checkpoint")
    assert generator.config.prediction == fit.preset.prediction
    heads = [generator.generate(classes, seed=1) for classes in (["apple", "bus"], ["sea", "bear", "maple tree"])]
    flat = torch.stack([generator.config.head.flatten(head.tensors) for head in heads])
    assert bool(torch.isfinite(flat).all())
    assert not torch.equal(flat[0], flat[1])


def linear_fit(toy: Toy, folder: Path, changes: dict[str, Any]) -> Fit:
    short = {"steps": 20, "learning_rate": 1e-2}
    preset = toy_preset(zoo__heads=short, zoo__universal=short, **changes)
    return Fit(toy.data, build_zoo(toy.data, preset, folder / "zoo"), preset, folder / "s.pt", "cpu")


def test_checkpoint_says_what_it_was_made_of(toy: Toy, tmp_path: Path) -> None:
    fit = make_fit(toy, tmp_path / "s.pt")
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "config.json").write_text("{}")
    fit.write_checkpoint(tmp_path / "checkpoint", tmp_path / "net")
    config = read_config(tmp_path / "checkpoint")
    assert config.classes == toy.data.classes
    assert config.template == "a {}"
    assert config.backbone == {"name": "toy backbone", "preprocess": "none", "feature_dim": "16"}
    assert config.text_encoder.fingerprint
    assert set(config.files) == {"model.safetensors", "backbone/config.json", "text_encoder/table.safetensors"}


def test_checkpoint_treats_outside_names_as_the_preset_says(toy: Toy, tmp_path: Path) -> None:
    assert "outside" not in toy.preset.run_description()
    preset = toy.preset.model_copy(update={"outside": OutsideSettings(reach=0.5, temperature=0.1)})
    Fit(toy.data, toy.zoo, preset, tmp_path / "s.pt", "cpu").write_checkpoint(tmp_path / "checkpoint")
    assert read_config(tmp_path / "checkpoint").outside == preset.outside


def test_checkpoint_moves_with_its_text_table(toy: Toy, tmp_path: Path) -> None:
    make_fit(toy, tmp_path / "s.pt").write_checkpoint(tmp_path / "checkpoint")
    moved = (tmp_path / "checkpoint").rename(tmp_path / "elsewhere")
    assert read_config(moved).text_encoder.source.startswith("table:text_encoder/table.safetensors#")
    assert Generator.load(moved).text_encoder.encode(["a apple"]).shape == (1, toy.data.embeddings.shape[1])


@pytest.mark.parametrize("tokens", ["unit", "chunk"])
@pytest.mark.parametrize("scaling", ["standardise", "min_max"])
def test_an_untrained_denoiser_generates_the_mean_head(toy: Toy, tmp_path: Path, scaling: str, tokens: str) -> None:
    fit = make_fit(toy, tmp_path / "s.pt", scaling=scaling, denoiser__tokens=tokens)
    fit.write_checkpoint(tmp_path / "checkpoint")
    generator = Generator.load(tmp_path / "checkpoint")
    for sampler, steps in (("mean", 1), ("ddim", 3)):
        head = generator.generate(["apple", "bus"], sampler=sampler, steps=steps)
        torch.testing.assert_close(toy.preset.head.flatten(head.tensors), toy.zoo.weights.mean(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"denoiser__unit_identity": False},
        {"denoiser__tokens": "chunk", "fit__permute_units": True},
        {"denoiser__tokens": "chunk", "fit__symmetry_weight": 0.1},
    ],
    ids=["exact", "implicit", "explicit"],
)
def test_a_network_without_an_order_of_units_starts_without_one(
    toy: Toy, tmp_path: Path, changes: dict[str, Any]
) -> None:
    fit = make_fit(toy, tmp_path / "s.pt", scaling="min_max", **changes)
    assert fit.denoiser.start is not None
    spec = toy.preset.head
    restored, mean = (spec.unflatten(flat) for flat in (fit.space.restore(fit.denoiser.start), toy.zoo.weights.mean(0)))
    for name, dim in (("linear1.weight", 0), ("linear1.bias", 0), ("linear2.weight", 1)):
        over_units = mean[name].mean(dim, keepdim=True).expand_as(mean[name])
        torch.testing.assert_close(restored[name], over_units, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(restored["linear2.bias"], mean["linear2.bias"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"scaling": "min_max", "prediction": "v"}], ids=["standardised", "v"])
def test_nothing_is_added_where_the_outputs_mean_is_zero(toy: Toy, tmp_path: Path, changes: dict[str, Any]) -> None:
    assert make_fit(toy, tmp_path / "s.pt", **changes).denoiser.start is None


def test_a_state_goes_on_from_where_its_network_started(toy: Toy, tmp_path: Path) -> None:
    fit = make_fit(toy, tmp_path / "state.pt", scaling="min_max")
    fit.save()
    again = make_fit(toy, tmp_path / "state.pt", scaling="min_max")
    assert again.resume()
    assert again.denoiser.start is not None
    # A network that has learnt from zero goes on from there.
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    del state["starts"]
    torch.save(state, tmp_path / "state.pt")
    old = make_fit(toy, tmp_path / "state.pt", scaling="min_max")
    assert old.resume()
    assert old.denoiser.start is None
    assert old.average.start is None


def test_broken_numbers_stop_the_fit_before_they_are_saved(toy: Toy, tmp_path: Path) -> None:
    """The first step's losses are sound, what it makes of the weights is not."""
    changes = {"fit__save_every": 1, "fit__steps": 40, "fit__learning_rate": 1e18, "fit__warmup": 0.0}
    fit = make_fit(toy, tmp_path / "state.pt", **changes)
    with pytest.raises(
        TrainingDataError, match=r"is not finite at step 1: lower fit.learning_rate; no state was saved$"
    ):
        fit.run()
    assert not (tmp_path / "state.pt").exists()


def test_a_broken_gradient_stops_the_fit(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of the step is sound, its gradient is not."""
    fit = make_fit(toy, tmp_path / "state.pt", fit__save_every=1)
    compute = fit._compute_losses

    def breaking(generator: torch.Generator) -> dict[str, torch.Tensor]:
        losses = compute(generator)
        if fit.state.step == 2:
            zero = next(fit.denoiser.parameters()).sum() * 0
            losses["diffusion"] = losses["diffusion"] + zero.sqrt()  # the root's slope at 0 is infinite
        return losses

    monkeypatch.setattr(fit, "_compute_losses", breaking)
    with pytest.raises(
        TrainingDataError, match=r"^gradient norm is not finite at step 3: .*; the state of step 2 is kept in"
    ):
        fit.run()
    again = make_fit(toy, tmp_path / "state.pt", fit__save_every=1)
    assert again.resume()
    assert again.state.step == 2


def explode_after(fit: Fit, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a step leave weights that are finite and far off."""
    make_step = fit._step

    def exploding(done: float) -> dict[str, torch.Tensor]:
        losses = make_step(done)
        if fit.state.step + 1 == step:
            with torch.no_grad():
                fit.denoiser.get_parameter("weights.unit_out.bias").add_(30.0)
        return losses

    monkeypatch.setattr(fit, "_step", exploding)


@pytest.mark.parametrize(
    ("save_every", "found", "kept"),
    [
        (1, 6, "the state of step 5 is kept in .*state.pt"),
        (4, 7, "the state of step 4 is kept"),
        (9, 7, "no state was"),
    ],
    ids=["before it is saved", "between saves", "before the first save"],
)
def test_exploding_losses_stop_the_fit_and_keep_the_last_good_state(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_every: int, found: int, kept: str
) -> None:
    """Step 6 leaves weights that explode: its own losses are sound."""
    fit = make_fit(toy, tmp_path / "state.pt", fit__save_every=save_every)
    explode_after(fit, 6, monkeypatch)
    message = rf"^the loss exploded from a median of \S+ to \S+ at step {found}: lower fit.learning_rate; {kept}"
    with pytest.raises(TrainingDataError, match=message):
        fit.run()
    if save_every == 9:
        assert not (tmp_path / "state.pt").exists()
        return
    again = make_fit(toy, tmp_path / "state.pt", fit__save_every=save_every)
    assert again.resume()
    assert again.state.step == (5 if save_every == 1 else 4)
    again.run()
    assert again.state.step == 12


def test_a_resumed_fit_remembers_the_losses_before(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_fit(toy, tmp_path / "state.pt").run(minutes=1e-6)
    fit = make_fit(toy, tmp_path / "state.pt")
    assert fit.resume()
    explode_after(fit, fit.state.step + 1, monkeypatch)
    with pytest.raises(TrainingDataError, match=r"exploded .* the state of step 1 is kept"):
        fit.run()
    # A state from before losses were kept in it.
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    del state["losses"]
    torch.save(state, tmp_path / "state.pt")
    old = make_fit(toy, tmp_path / "state.pt")
    assert old.resume()
    old.run()


def test_a_learning_rate_that_is_far_too_high_stops_the_fit(toy: Toy, tmp_path: Path) -> None:
    """The numbers stay finite: without the watch it would run to its end."""
    fit = make_fit(toy, tmp_path / "state.pt", fit__learning_rate=3.0, fit__steps=60)
    with pytest.raises(TrainingDataError, match="the loss exploded"):
        fit.run()


def test_a_diverged_fit_goes_on_from_its_kept_state_with_a_lower_rate(toy: Toy, tmp_path: Path) -> None:
    high = {"fit__learning_rate": 3.0, "fit__steps": 60, "fit__save_every": 1, "fit__warmup": 0.5}
    diverging = make_fit(toy, tmp_path / "state.pt", **high)
    with pytest.raises(
        DivergedError, match=r"lower fit.learning_rate; the state of step \d+ is kept in .* to go on from"
    ):
        diverging.run()
    lower = high | {"fit__learning_rate": 1e-4, "fit__steps": 40, "fit__gradient_clip": 0.5}
    fit = make_fit(toy, tmp_path / "state.pt", **lower)
    assert fit.resume()
    assert 0 < fit.state.step == diverging._saved_step
    fit.run()
    assert fit.state.step == 40
    assert max(group["lr"] for group in fit._optimizer.param_groups) < 1e-4
    # From now on the state is that of a fit with the lower rate; the higher one may still be gone back to.
    assert torch.load(tmp_path / "state.pt", weights_only=True)["preset"] == fit.preset.run_description()
    assert make_fit(toy, tmp_path / "state.pt", **high).resume()


def test_a_state_of_another_fit_is_refused(toy: Toy, tmp_path: Path) -> None:
    make_fit(toy, tmp_path / "state.pt").save()
    for changes, named in (
        ({"fit__samples": 31}, "fit.samples"),
        (
            {"fit__weight_decay": 0.5, "fit__class_mixing": 0.5, "fit__learning_rate": 1.0},
            "fit.weight_decay, fit.class_mixing",
        ),
        ({"outside": {"reach": 0.5, "temperature": 0.1}, "seed": 4}, "seed, outside"),
    ):
        message = (
            f"belongs to a fit with other {named}: .* remove it .* only fit.steps, fit.learning_rate, .* may change"
        )
        with pytest.raises(TrainingDataError, match=message):
            make_fit(toy, tmp_path / "state.pt", **changes).resume()
    other = make_fit(toy, tmp_path / "state.pt")
    other._data = replace(toy.data, fingerprint="0")
    with pytest.raises(TrainingDataError, match="belongs to a fit with other data: "):
        other.resume()


def test_what_may_change_on_the_way_are_settings_of_the_fit() -> None:
    assert {name.removeprefix("fit.") for name in RESUMABLE} <= set(FitSettings.model_fields)


@pytest.mark.parametrize("damage", ["truncated", "empty", "another file"])
def test_a_damaged_state_is_refused(toy: Toy, tmp_path: Path, damage: str) -> None:
    state = tmp_path / "state.pt"
    make_fit(toy, state).save()
    if damage == "another file":
        torch.save({"weights": torch.zeros(2)}, state)
    else:
        state.write_bytes(state.read_bytes()[: 0 if damage == "empty" else 5000])
    with pytest.raises(TrainingDataError, match=r"is damaged .* remove it to start anew"):
        make_fit(toy, state).resume()


def test_a_full_disk_keeps_the_last_state(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = make_fit(toy, tmp_path / "state.pt")
    fit.save()
    before = (tmp_path / "state.pt").read_bytes()

    def no_space(_: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534")

    monkeypatch.setattr(fit_module.torch, "save", no_space)
    with pytest.raises(OSError, match=r"state.pt cannot be written, the disk may be full"):
        fit.run()
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
    assert (tmp_path / "state.pt").read_bytes() == before


def test_a_time_limit_replaces_the_step_count(toy: Toy, tmp_path: Path) -> None:
    fit = make_fit(toy, tmp_path / "state.pt", fit__steps=10**9)
    fit.run(minutes=0.01)
    assert fit.state.seconds >= 0.6
    assert 1 <= fit.state.step < 10**4
    # The limit counts all runs together: nothing is left for a second one.
    again = make_fit(toy, tmp_path / "state.pt", fit__steps=10**9)
    assert again.resume()
    again.run(minutes=0.01)
    assert again.state.step == fit.state.step


def test_a_zoo_of_another_head_is_refused(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(TrainingDataError, match="built for another head"):
        make_fit(toy, tmp_path / "s.pt", head__hidden_dim=5)


def test_fresh_tasks_are_never_unseen_ones() -> None:
    pairs = [(a, b) for a in range(5) for b in range(a)]
    split = TaskSplit(seen=(), unseen=tuple(pairs[:7]))
    drawn = draw_fresh_tasks(split, 5, 300, (2, 2), torch.Generator().manual_seed(0))
    found = {frozenset(task) for task in drawn.tolist()}
    assert found == {frozenset(pair) for pair in pairs[7:]}


def test_fresh_tasks_have_the_sizes_asked_for() -> None:
    split = TaskSplit(seen=(), unseen=((0, 1),))
    drawn = draw_fresh_tasks(split, 4, 200, (2, 32), torch.Generator().manual_seed(0))
    sizes = (drawn != PADDING).sum(1)
    assert sorted(set(sizes.tolist())) == [2, 3, 4]
    assert all(len(set(row) - {PADDING}) == size for row, size in zip(drawn.tolist(), sizes.tolist(), strict=True))


@pytest.mark.parametrize(("held_out", "greatest"), [((), 12), ((1, 5, 8), 9)])
def test_a_checkpoint_records_the_sizes_that_were_drawn(
    toy: Toy, tmp_path: Path, held_out: tuple[int, ...], greatest: int
) -> None:
    zoo = replace(toy.zoo, split=replace(toy.zoo.split, held_out=HeldOut(held_out)))
    fit = Fit(toy.data, zoo, toy_preset(fit__fresh_task_size=[2, 32]), tmp_path / "s.pt", "cpu")
    fit.write_checkpoint(tmp_path / "checkpoint")
    assert read_config(tmp_path / "checkpoint").task_size == (2, greatest)
    fresh = draw_fresh_tasks(zoo.split, 12, 200, fit.preset.fit.fresh_task_size, torch.Generator().manual_seed(0))
    assert int((fresh != PADDING).sum(1).max()) == greatest


def test_fresh_tasks_that_cannot_be_drawn_are_an_error() -> None:
    split = TaskSplit(seen=((0, 1),), unseen=((0, 1, 2),))
    with pytest.raises(TrainingDataError, match=r"widen fit.fresh_task_size"):
        draw_fresh_tasks(split, 3, 4, (3, 3), torch.Generator().manual_seed(0))


def test_the_fit_never_trains_on_an_unseen_task(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unseen = {frozenset(task) for task in toy.zoo.split.unseen}
    met: list[frozenset[int]] = []
    make_batch = fit_module.make_task_batch

    def watch(tasks: torch.Tensor, *rest: Any) -> Any:
        met.extend(frozenset(task) - {PADDING} for task in tasks.tolist())
        return make_batch(tasks, *rest)

    monkeypatch.setattr(fit_module, "make_task_batch", watch)
    make_fit(toy, tmp_path / "s.pt").run()
    assert len(met) == (12 + 4) * 16  # the steps, and what is looked at before each saved state
    assert not unseen & set(met)


def test_the_average_by_hand(toy: Toy, tmp_path: Path) -> None:
    """After s steps the decay is (1 + s) / (10 + s), until that passes the preset's."""
    fit = make_fit(toy, tmp_path / "s.pt", fit__ema_decay=0.9)
    kept, live = (dict(network.named_parameters()) for network in (fit.average, fit.denoiser))
    expected = 0.0
    with torch.no_grad():
        for parameter in kept.values():
            parameter.zero_()
        for step, value, decay in ((2, 1.0, 3 / 12), (8, -2.0, 9 / 18), (1000, 5.0, 0.9)):
            for parameter in live.values():
                parameter.fill_(value)
            fit.state.step = step
            fit._update_average()
            expected = decay * expected + (1 - decay) * value
            for name, parameter in kept.items():
                torch.testing.assert_close(parameter, torch.full_like(parameter, expected), msg=name)
    assert expected == pytest.approx(0.9 * (0.5 * 0.75 - 1) + 0.5)


def test_without_averaging_the_last_weights_are_kept(toy: Toy, tmp_path: Path) -> None:
    fit = make_fit(toy, tmp_path / "s.pt", fit__ema_decay=0.0)
    fit.run()
    assert_same_weights(fit.average, fit.denoiser)
    averaged = make_fit(toy, tmp_path / "t.pt")
    averaged.run()
    assert not torch.equal(averaged.average.count_in.weight, averaged.denoiser.count_in.weight)


def test_learning_rate_rises_then_falls_to_zero() -> None:
    factors = [learning_rate_factor(i / 100, 0.1) for i in range(101)]
    peak = factors.index(max(factors))
    assert peak == 10
    assert factors[:11] == sorted(factors[:11])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0 < factors[0] < 0.02
    assert factors[10] == pytest.approx(1)
    assert factors[-1] == pytest.approx(0)

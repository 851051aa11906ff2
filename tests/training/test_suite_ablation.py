"""The suite `ablation`: legal variants, each fitted once for the same time and measured on the same tasks."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from tests.training.conftest import Toy, ToySuites
from tests.training.toy import toy_preset
from text2weight.generator import Generator
from text2weight_training import fit as fit_module
from text2weight_training.baselines import accuracies
from text2weight_training.evaluate import generate_heads
from text2weight_training.files import TrainingDataError
from text2weight_training.fit import Fit
from text2weight_training.loss_watch import DivergedError
from text2weight_training.presets import Preset, load_preset
from text2weight_training.suites import ablation
from text2weight_training.suites.base import SuiteRun
from text2weight_training.suites.settings import AblationSettings, VariantName
from text2weight_training.suites.variants import TABLE, make_variant


def changed(name: VariantName, preset: Preset) -> dict[str, Any]:
    """The settings of a variant that differ from the preset's, flat."""
    made, before = make_variant(name, preset, preset.seed).preset.run_description(), preset.run_description()
    found = {}
    for part, value in made.items():
        if isinstance(value, dict):
            found |= {f"{part}.{key}": each for key, each in value.items() if before[part].get(key) != each}
        elif before[part] != value:
            found[part] = value
    return found


def test_every_named_variant_has_its_line_and_is_run_by_default() -> None:
    assert tuple(TABLE) == get_args(VariantName) == AblationSettings().variants


@pytest.mark.parametrize("preset", ["small", "reference"])
def test_every_variant_is_legal_for_the_bundled_presets(preset: str) -> None:
    """`make_variant` validates what it makes; a variant that changes nothing would be a row for nothing."""
    settings = load_preset(preset)
    for name in get_args(VariantName):
        assert bool(changed(name, settings)) == (name != "full"), name
        assert make_variant(name, settings, 5).preset.seed == 5
        assert make_variant(name, settings, 5).preset.zoo == settings.zoo


def test_variants_change_what_they_say() -> None:
    preset = toy_preset()
    assert changed("symmetry_loss", preset) == {"fit.symmetry_weight": 0.1}
    assert changed("adversarial_loss", preset) == {"fit.adversarial_weight": 0.01}
    assert changed("class_tokens", preset) == {"denoiser.class_tokens": False}
    assert changed("class_path", preset) == {"denoiser.class_path": 0}
    assert changed("tokens", preset) == {"denoiser.tokens": "chunk"}
    assert changed("unit_identity", preset) == {"denoiser.unit_identity": False}
    assert changed("scaling", preset) == {"scaling": "min_max"}
    legal = {"fit.permute_units": True, "scaling": "min_max", "denoiser.tokens": "chunk"}
    assert changed("permuted_units", preset) == legal


def test_places_of_fresh_items_that_nothing_would_use_go_to_zoo_heads() -> None:
    assert changed("task_loss", toy_preset()) == {"fit.task_weight": 0.0, "fit.zoo_batch": 16}
    assert changed("fresh_items", toy_preset()) == {"fit.fresh_batch": 0, "fit.zoo_batch": 16}
    assert load_preset("reference").fit.teacher is not None
    assert make_variant("task_loss", load_preset("reference"), 0).preset.fit.teacher is None
    adversary = toy_preset(fit__adversarial_weight=0.01)
    assert changed("task_loss", adversary) == {"fit.task_weight": 0.0}
    assert make_variant("task_loss", toy_preset(), 0).title == "without L_task"
    only = toy_preset(fit__diffusion_weight=0)
    assert changed("task_loss", only)["fit.diffusion_weight"] == 1.0  # or nothing would be left to learn from


@pytest.mark.parametrize("own", [toy_preset(), load_preset("heldout")], ids=["toy", "heldout"])
def test_the_paper_variant_is_the_papers_preset_on_this_zoo(own: Preset) -> None:
    paper, size = load_preset("paper"), own.denoiser.embedding_dim
    made = make_variant("paper", own, own.seed).preset
    assert (made.fit, made.schedule, made.prediction, made.scaling) == (
        paper.fit, paper.schedule, paper.prediction, paper.scaling,
    )  # fmt: skip
    assert made.denoiser == paper.denoiser.model_copy(update={"embedding_dim": size})
    assert (made.sampler, made.steps, made.outside) == (paper.sampler, paper.steps, None)
    assert (made.head, made.zoo, made.logit_scale) == (own.head, own.zoo, own.logit_scale)


def test_the_paper_variant_has_also_what_dumps_leave_out() -> None:
    plain = toy_preset(denoiser__pooled=False)  # a field that dumps leave out at its usual value
    assert make_variant("paper", plain, 0).preset.denoiser.pooled


def test_parts_that_a_preset_leaves_out_are_turned_on() -> None:
    paper = load_preset("paper")
    assert make_variant("symmetry_loss", paper, 0).title == "without L_sym"
    assert changed("symmetry_loss", paper) == {"fit.symmetry_weight": 0.0}
    assert changed("class_tokens", paper) == {"denoiser.class_tokens": True}
    assert changed("tokens", paper) == {"denoiser.tokens": "unit"}
    assert changed("scaling", paper) == {"scaling": "standardise"}
    assert changed("task_loss", paper)["fit.task_weight"] == 1.0
    for name in ("unit_identity", "class_path"):
        with pytest.raises(TrainingDataError, match="nothing that it could change"):
            make_variant(name, paper, 0)
    permuted = toy_preset(fit__permute_units=True, scaling="min_max", denoiser__unit_identity=False)
    assert changed("scaling", permuted) == {"scaling": "standardise", "fit.permute_units": False}
    assert changed("unit_identity", permuted) == {"denoiser.unit_identity": True, "fit.permute_units": False}


def test_settings_need_the_full_preset_and_known_names() -> None:
    with pytest.raises(ValueError, match="must hold full, which all others are compared with"):
        AblationSettings(variants=("scaling",))
    with pytest.raises(ValueError, match="each name once"):
        AblationSettings(variants=("full", "full"))
    with pytest.raises(ValueError, match=r"'full', 'symmetry_loss', .* or 'paper'"):
        AblationSettings(variants=("full", "sym"))  # type: ignore[arg-type]


@pytest.fixture
def copy(suite_run: SuiteRun, toy_suites: ToySuites, tmp_path: Path) -> SuiteRun:
    """The finished measurement, in a folder that may be changed."""
    shutil.copytree(toy_suites.out / "ablation", tmp_path / "ablation")
    return replace(suite_run, out=tmp_path)


@pytest.fixture(autouse=True)
def steady_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step of a fit takes 1/32 s, however busy this machine is."""
    ticks = itertools.count()
    monkeypatch.setattr(fit_module, "time", SimpleNamespace(monotonic=lambda: next(ticks) / 32))


def with_settings(run: SuiteRun, **changes: Any) -> SuiteRun:
    suites = run.preset.suites
    settings = suites.ablation.model_copy(update=changes)
    return replace(
        run, preset=run.preset.model_copy(update={"suites": suites.model_copy(update={"ablation": settings})})
    )


def forbid_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fit, "run", lambda *_: pytest.fail("fitted again"))


@pytest.mark.parametrize("split", ["seen", "unseen"])
def test_scores_are_those_of_the_fitted_checkpoints(toy: Toy, toy_suites: ToySuites, split: str) -> None:
    result, tasks = toy_suites.result("ablation"), list(getattr(toy.zoo.split, split)[:5])
    seed = toy.preset.seed
    means = {}
    for name in ("full", "task_loss"):
        generator = Generator.load(toy_suites.out / "ablation" / f"{name}-{seed}" / "checkpoint")
        heads = {"ddim/3": generate_heads(generator, toy.data, tasks, "ddim", 3, seed)}
        means[name] = accuracies(toy.data, toy.preset.head, tasks, heads)["ddim/3"].mean()
        cell = result["splits"][split]["variants"][name]["ddim/3"]
        assert cell["accuracy"]["value"] == pytest.approx(means[name], abs=1e-6)
        assert cell["accuracy_of_seeds"] == [pytest.approx(means[name], abs=1e-6)]
        assert cell["change"]["value"] == pytest.approx(means[name] - means["full"], abs=1e-6)
    assert result["variants"]["task_loss"]["title"] == "without L_task"
    assert all(about["steps"][0] > 0 for about in result["variants"].values())


def test_the_equivariance_error_tells_the_ways_to_the_symmetry_apart(suite_run: SuiteRun, tmp_path: Path) -> None:
    def error(name: VariantName = "full", **changes: Any) -> float:
        own = toy_preset(scaling="min_max", denoiser__class_path=0, fit__learning_rate=1e-2, **changes)
        preset = make_variant(name, own, own.seed).preset
        fit = Fit(suite_run.data, suite_run.zoo, preset, tmp_path / "s.pt", "cpu")
        fit.run()
        fit.write_checkpoint(tmp_path / "checkpoint")
        return ablation.measure_equivariance(suite_run, tmp_path / "checkpoint")

    chunks = error(denoiser__tokens="chunk")
    assert chunks > 1e-2
    assert 1e-4 < error("permuted_units") < chunks  # learnt, not by construction
    assert 0 < error(denoiser__unit_identity=False) < 1e-5


def test_finished_fits_are_only_read(copy: SuiteRun, toy_suites: ToySuites, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_fits(monkeypatch)
    monkeypatch.setattr(ablation, "generate_heads", lambda *_: pytest.fail("scored again"))
    assert json.dumps(ablation.run(copy)) == json.dumps(toy_suites.result("ablation"))
    assert not list(copy.out.rglob("state.pt"))


def test_more_tasks_or_samplers_are_measured_without_fitting_anew(
    copy: SuiteRun, toy_suites: ToySuites, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_fits(monkeypatch)
    again = ablation.run(with_settings(copy, tasks=6, samplers=(("ddpm", 4),)))
    unseen = again["splits"]["unseen"]
    assert (unseen["tasks"], again["methods"]) == (6, ["ddpm/4"])
    assert set(unseen["variants"]["full"]) == {"ddpm/4", "mean/1"}  # its own default is always measured
    assert again["variants"] == toy_suites.result("ablation")["variants"]
    assert "with its own sampler mean/1:" in ablation.report(again)


def test_fits_of_another_time_are_not_mixed_in(copy: SuiteRun) -> None:
    with pytest.raises(TrainingDataError, match="holds a fit with another minutes: choose another --out"):
        ablation.run(with_settings(copy, minutes=0.006))


def test_an_interrupted_fit_goes_on(suite_run: SuiteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = with_settings(replace(suite_run, out=tmp_path), variants=("full",), minutes=0.008)
    whole, made = Fit.run, []

    def interrupted(fit: Fit, minutes: float | None = None) -> None:
        whole(fit, 0.004)
        made.append(fit.state.step)
        raise KeyboardInterrupt

    monkeypatch.setattr(Fit, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ablation.run(run)
    monkeypatch.setattr(Fit, "run", whole)
    step, later = Fit._step, []
    monkeypatch.setattr(Fit, "_step", lambda fit, done: later.append(done) or step(fit, done))
    result = ablation.run(run)
    assert made == [8]
    assert later[0] >= 0.5  # half of the time was spent before
    assert result["variants"]["full"]["steps"] == [made[0] + len(later)] == [16]
    finished = json.loads(next(tmp_path.rglob("finished.json")).read_text())
    assert finished["seconds"] == pytest.approx(0.5)


def test_seeds_are_averaged_task_by_task(suite_run: SuiteRun, tmp_path: Path) -> None:
    run = with_settings(replace(suite_run, out=tmp_path), variants=("full",), seeds=2, samplers=(("mean", 1),))
    result = ablation.run(run)
    cell = result["splits"]["unseen"]["variants"]["full"]["mean/1"]
    assert len(result["variants"]["full"]["steps"]) == 2
    scores = [json.loads(path.read_text())["scores"]["unseen"]["mean/1"] for path in tmp_path.rglob("scores.json")]
    assert scores[0] != scores[1]
    assert cell["accuracy"]["value"] == pytest.approx(sum(map(sum, scores)) / 10, abs=1e-6)
    low, high = sorted(100 * sum(each) / 5 for each in scores)
    assert f"| {low:.2f} to {high:.2f} |" in ablation.report(result)
    least, greatest = sorted(result["variants"]["full"]["equivariance_error"])
    assert 0 < least < greatest
    assert f"| {least:.2g} to {greatest:.2g} |" in ablation.report(result)


def test_harder_splits_are_measured_where_the_zoo_has_them(suite_run: SuiteRun, hard_toy: Toy, tmp_path: Path) -> None:
    preset = hard_toy.preset.model_copy(update={"suites": suite_run.preset.suites})
    run = with_settings(
        replace(suite_run, zoo=hard_toy.zoo, preset=preset, out=tmp_path), variants=("full", "fresh_items")
    )
    result = ablation.run(run)
    assert list(result["splits"]) == ["seen", "unseen", "held_out_pairs", "mixed_classes", "held_out_classes"]
    text = ablation.report(result)
    assert "### Held-out classes" in text
    assert text.count("| without fresh items |") == 5


def test_variants_that_do_not_apply_are_named(suite_run: SuiteRun, tmp_path: Path) -> None:
    bare = suite_run.preset.model_copy(
        update={"denoiser": suite_run.preset.denoiser.model_copy(update={"class_tokens": False})}
    )
    run = with_settings(replace(suite_run, preset=bare, out=tmp_path), variants=("full", "class_path"))
    result = ablation.run(run)
    assert set(result["variants"]) == {"full"}
    assert "`class_path` is left out: the preset has nothing that it could change." in ablation.report(result)


def test_a_variant_that_diverges_leaves_the_others(
    suite_run: SuiteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverging = "symmetry_loss"
    finish = ablation._finish

    def diverge(run: SuiteRun, name: VariantName, *rest: Any) -> ablation.FinishedFit:
        if name == diverging:
            raise DivergedError("the loss exploded at step 3")
        return finish(run, name, *rest)

    monkeypatch.setattr(ablation, "_finish", diverge)
    run = with_settings(replace(suite_run, out=tmp_path), variants=("full", "symmetry_loss"))
    result = ablation.run(run)
    assert set(result["variants"]) == {"full"}
    assert "`symmetry_loss` is left out: the loss exploded at step 3." in ablation.report(result)
    diverging = "full"
    with pytest.raises(DivergedError):
        ablation.run(run)


def test_the_report_has_a_row_per_variant_and_split(toy_suites: ToySuites) -> None:
    result = toy_suites.result("ablation")
    text = ablation.report(result)
    assert text.count("\n| the preset as it is |") == text.count("\n| without L_task |") == 2
    assert text.index("### Seen combinations") < text.index("### Unseen combinations")
    without = ablation.report(result | {"splits": {"unseen": result["splits"]["unseen"]}})  # as older results are
    assert "### Seen combinations" not in without
    assert without.count("\n| without L_task |") == 1
    assert "5 tasks" in text
    assert "0.005 minutes" in text

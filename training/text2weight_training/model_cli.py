"""The commands on the model side: `t2w zoo`, `fit`, `evaluate`, `results` and `train`.

Only typer and the standard library are imported here, so that `t2w --help` stays fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from text2weight_training.cli_errors import check_device, one_line_errors

if TYPE_CHECKING:
    from text2weight_training.presets import Preset
    from text2weight_training.tasks import TaskData

zoo_app = typer.Typer(add_completion=False)
fit_app = typer.Typer(add_completion=False)
evaluate_app = typer.Typer(add_completion=False)
results_app = typer.Typer(add_completion=False)
train_app = typer.Typer(add_completion=False)

Features = Annotated[list[Path], typer.Option(help="feature file; repeat it for several datasets of one backbone")]
Text = Annotated[str, typer.Option(help="class embeddings: FILE#TABLE, or a text encoder dir:PATH, open_clip:ARCH/TAG")]
Template = Annotated[str, typer.Option(help="prompt for a text encoder, {} for the name; a table brings its own")]
ConditionText = Annotated[
    str | None,
    typer.Option(
        help="FILE#TABLE of what the denoiser reads in place of --text, such as descriptions; heads keep --text"
    ),
]
PresetName = Annotated[str, typer.Option("--preset", help="preset name or path of a .yaml file")]
Device = Annotated[str, typer.Option(help="torch device: cpu or cuda")]
Minutes = Annotated[float | None, typer.Option(min=0.01, help="time limit of the fit, instead of the preset's steps")]
BackboneFolder = Annotated[Path | None, typer.Option(help="backbone folder to put into the checkpoint")]


@zoo_app.command("zoo")
@one_line_errors
def zoo_command(
    features: Features,
    text: Text,
    out: Annotated[Path, typer.Option(help="zoo directory; an unfinished one is continued")],
    preset: PresetName = "small",
    template: Template = "a {}",
    device: Device = "cpu",
    workers: Annotated[
        int,
        typer.Option(
            min=1, help="processes, by Ray (extra: distributed); on the machines of RAY_ADDRESS, if it is set"
        ),
    ] = 1,
) -> None:
    """Train the zoo: a universal head and thousands of task heads, in stacks.

    Example: t2w zoo --features cifar100.safetensors --text text.safetensors#cifar100.a --out runs/a/zoo
    """
    from text2weight_training.zoo import build_zoo, load_speed

    device = check_device(device)
    data, settings = _load(features, text, template, preset)
    zoo = build_zoo(data, settings, out, device, workers)
    typer.echo(f"{len(zoo.weights)} heads in {out}, mean test accuracy {float(zoo.accuracy.mean()):.3f}")
    if (speed := load_speed(out)) is not None:
        cost = speed.cost(1_000_000, settings.head.num_parameters)
        typer.echo(f"{speed.heads_per_second:.3g} heads per second with {speed.workers} worker(s); at this rate {cost}")


@fit_app.command("fit")
@one_line_errors
def fit_command(
    zoo: Annotated[Path, typer.Option(help="zoo directory")],
    features: Features,
    text: Text,
    out: Annotated[Path, typer.Option(help="checkpoint directory to write")],
    preset: PresetName = "small",
    minutes: Minutes = None,
    condition_text: ConditionText = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="go on from the last saved state of this --out, also with a lower learning rate",
        ),
    ] = False,
    template: Template = "a {}",
    backbone: BackboneFolder = None,
    device: Device = "cpu",
) -> None:
    """Train the denoiser on a zoo. On N devices: torchrun --nproc_per_node N -m text2weight_client.cli fit ...

    Example: t2w fit --zoo runs/a/zoo --features cifar100.safetensors --text text.safetensors#cifar100.a
    --out runs/a/checkpoint --minutes 20

    With --resume the preset may differ from the state's in fit.steps, learning_rate, discriminator_learning_rate,
    warmup, gradient_clip and save_every.
    """
    from text2weight_training.files import TrainingDataError
    from text2weight_training.fit import Fit
    from text2weight_training.zoo import load_zoo

    device = check_device(device)
    state = out.with_name(f"{out.name}-state.pt")
    if state.exists() and not resume:
        raise TrainingDataError(f"{state} holds a fit: add --resume to go on from it, or remove it to start anew")
    _check_backbone(backbone)
    data, settings = _load(features, text, template, preset, condition_text)
    fit = Fit(data, load_zoo(zoo), settings, state, device)
    if resume and not fit.resume():
        typer.echo(f"no saved state for {out}: starting anew")
    fit.run(minutes)
    fit.write_checkpoint(out, backbone)
    typer.echo(f"checkpoint in {out} after {fit.state.step} steps")


@evaluate_app.command("evaluate")
@one_line_errors
def evaluate_command(
    checkpoint: Annotated[Path, typer.Option(help="checkpoint directory")],
    zoo: Annotated[Path, typer.Option(help="the zoo it was trained on")],
    features: Features,
    text: Text,
    out: Annotated[Path, typer.Option(help="evaluation.json to write; with --suite a folder. Plots go beside it")],
    preset: PresetName = "small",
    template: Template = "a {}",
    condition_text: ConditionText = None,
    record: Annotated[bool, typer.Option("--record", help="also put the results into the checkpoint's config")] = False,
    suite: Annotated[
        list[str] | None, typer.Option(help="measure this suite instead, into OUT/NAME.json; repeatable; or all")
    ] = None,
    paraphrase: Annotated[
        list[str] | None, typer.Option(help="suite reading: FILE#TABLE of the names under another prompt; repeatable")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="suite gradcam: picture folder with test/CLASS/*.png")] = None,
    backbone: Annotated[
        str | None, typer.Option(help="suite gradcam: as in `t2w features`; default: the one in the checkpoint")
    ] = None,
    side: Annotated[
        int | None, typer.Option(min=8, max=1024, help="suite gradcam: as in `t2w features`, with --backbone")
    ] = None,
) -> None:
    """Measure a checkpoint on unseen tasks against baselines and heads trained on the tasks' own data.

    Example: t2w evaluate --checkpoint runs/a/checkpoint --zoo runs/a/zoo --features cifar100.safetensors
    --text text.safetensors#cifar100.a --out runs/a/evaluation.json

    Suites: t2w evaluate ... --suite fuse --suite reading --out runs/a/suites
    """
    from text2weight.checkpoint import record_evaluation
    from text2weight_training.evaluate import evaluate
    from text2weight_training.suites import choose_suites
    from text2weight_training.suites.runner import with_paraphrases, with_pictures
    from text2weight_training.train import evaluation_summary
    from text2weight_training.zoo import load_zoo

    chosen = choose_suites(suite or [])
    if chosen and record:
        raise typer.BadParameter("--record keeps the evaluation without --suite: give one of the two")
    if paraphrase and "reading" not in chosen:
        raise typer.BadParameter("--paraphrase belongs to --suite reading")
    if (images or backbone) and "gradcam" not in chosen:
        raise typer.BadParameter("--images and --backbone belong to --suite gradcam")
    if side and not backbone:
        raise typer.BadParameter("--side belongs to --backbone, which the features were made with")
    data, settings = _load(features, text, template, preset, condition_text)
    if chosen:
        settings = with_pictures(with_paraphrases(settings, paraphrase or []), images, backbone, side)
        _evaluate_suites(chosen, data, zoo, checkpoint, settings, out)
        return
    result = evaluate(data, load_zoo(zoo), checkpoint, settings, out)
    if record:
        record_evaluation(checkpoint, evaluation_summary(result))


def _evaluate_suites(names: list[str], data: TaskData, zoo: Path, checkpoint: Path, preset: Preset, out: Path) -> None:
    from text2weight_training.suites import load_suite
    from text2weight_training.suites.runner import run_suites
    from text2weight_training.zoo import load_zoo

    for written in run_suites(names, data, load_zoo(zoo), checkpoint, preset, out):
        name = written["suite"]
        typer.echo(load_suite(name).report(written["result"]))
        done = f"{written['seconds']} s, written to {out / name}.json"
        if written.get("kept"):
            done = f"kept from an earlier run of the same checkpoint and settings, {out / name}.json"
        typer.echo(f"{name}: {done}\n")


@results_app.command("results")
@one_line_errors
def results_command(
    folder: Annotated[Path, typer.Option("--from", help="folder that `t2w evaluate --suite` wrote to")],
    out: Annotated[Path, typer.Option(help="Markdown page to write; figures and JSON go into a folder of its name")],
) -> None:
    """Collect the results of suites into one page with tables and figures; it keeps its sections of other suites.

    Example: t2w results --from runs/a/suites --out docs/suites.md
    """
    from text2weight_training.suites.page import write_page

    names = write_page(folder, out)
    typer.echo(f"{', '.join(names)} in {out}")


@train_app.command("train")
@one_line_errors
def train_command(
    features: Features,
    text: Text,
    out: Annotated[Path, typer.Option(help="run directory; an interrupted run in it is continued")],
    preset: PresetName = "small",
    minutes: Minutes = None,
    template: Template = "a {}",
    condition_text: ConditionText = None,
    backbone: BackboneFolder = None,
    device: Device = "cpu",
) -> None:
    """Zoo, fit and evaluation in one go: OUT/zoo, OUT/checkpoint, OUT/evaluation.json.

    Example: t2w train --features cifar100.safetensors --text text.safetensors#cifar100.a --preset small
    --out runs/a --minutes 20
    """
    from text2weight_training.train import train

    device = check_device(device)
    _check_backbone(backbone)
    data, settings = _load(features, text, template, preset, condition_text)
    train(data, settings, out, minutes, device, backbone)
    typer.echo(f"checkpoint in {out / 'checkpoint'}, results in {out / 'evaluation.json'}")


def _check_backbone(folder: Path | None) -> None:
    """Refuse before the fit what its checkpoint could not hold."""
    from text2weight.backbone import load_backbone

    if folder is not None:
        load_backbone(folder)


def _load(
    features: list[Path], text: str, template: str, preset: str, condition_text: str | None = None
) -> tuple[TaskData, Preset]:
    from text2weight_training.presets import load_preset
    from text2weight_training.tasks import load_task_data

    settings = load_preset(preset)
    return load_task_data(features, text, template, condition_text), settings

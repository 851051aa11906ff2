"""The command `t2w reproduce`.

Only typer and the standard library are imported here, so that `t2w --help` stays fast.
"""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from text2weight_training.cli_errors import check_device, one_line_errors

reproduce_app = typer.Typer(add_completion=False)


class Reproduced(StrEnum):
    """Data sets that can be had with one command."""

    CIFAR100 = "cifar100"
    TINY_IMAGENET = "tiny-imagenet"
    CALTECH256 = "caltech256"


class BackboneChoice(StrEnum):
    """Backbones with published weights."""

    RESNET18 = "torchvision:resnet18"
    CLIP = "open_clip:ViT-B-32/openai"


@reproduce_app.command("reproduce")
@one_line_errors
def reproduce_command(
    dataset: Annotated[Reproduced, typer.Argument(help="data set to download and train on")],
    out: Annotated[Path, typer.Option(help="run directory; an interrupted run in it is continued")],
    backbone: Annotated[
        BackboneChoice, typer.Option(help="what turns pictures into features, with published weights")
    ] = BackboneChoice.RESNET18,
    preset: Annotated[str, typer.Option(help="preset name or path of a .yaml file")] = "large",
    minutes: Annotated[float, typer.Option(min=0.01, help="time limit of the fit")] = 60,
    plan: Annotated[bool, typer.Option("--plan", help="print the plan and stop")] = False,
    device: Annotated[str, typer.Option(help="torch device: cpu or cuda")] = "cpu",
) -> None:
    """From the download to OUT/evaluation.json: published weights of the backbone and of CLIP, zoo, fit, evaluation.

    Example: t2w reproduce cifar100 --out runs/cifar100
    """
    from text2weight_training.presets import load_preset
    from text2weight_training.reproduce import BACKBONES, REPRODUCTIONS, make_plan, print_plan, reproduce

    what, settings = replace(REPRODUCTIONS[dataset.value], backbone=BACKBONES[backbone.value]), load_preset(preset)
    device = check_device(device)
    print_plan(make_plan(what, settings, out, minutes), out)
    if not plan:
        reproduce(what, settings, out, minutes, device)
        typer.echo(f"checkpoint in {out / 'checkpoint'}, results in {out / 'evaluation.json'}")

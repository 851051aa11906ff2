"""The client's subcommands that ask a service for a head: `t2w generate`, `t2w fuse`, `t2w enhance`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from text2weight_client.client import DEFAULT_BASE_URL, DEFAULT_TIMEOUT_S, Client
from text2weight_client.command_options import (
    EXIT_CODES,
    GuidanceOption,
    KeyOption,
    OutputOption,
    PrecisionOption,
    SamplerOption,
    SeedOption,
    StepsOption,
    TemplateOption,
    TimeoutOption,
    UrlOption,
    asking,
    one_line_errors,
    say_written,
    waiting,
)
from text2weight_client.options import EnhanceMethod, FuseMethod, GenerateOptions

if TYPE_CHECKING:
    from text2weight_client.fuse_task import FuseTask
    from text2weight_client.head import GeneratedHead
    from text2weight_client.heads import GeneratedHeads

generate_app = typer.Typer(add_completion=False)
fuse_app = typer.Typer(add_completion=False)
enhance_app = typer.Typer(add_completion=False)

HEAD_SUFFIX = ".safetensors"


@generate_app.command("generate", epilog=EXIT_CODES)
def generate(
    classes: Annotated[list[str], typer.Argument(help="Two or more class names; quote names of several words.")],
    output: OutputOption = Path("head.safetensors"),
    seed: SeedOption = None,
    steps: StepsOption = None,
    sampler: SamplerOption = None,
    samples: Annotated[int, typer.Option(min=1, help="So many heads, of successive seeds, in one file.")] = 1,
    precision: PrecisionOption = None,
    guidance_scale: GuidanceOption = None,
    template: TemplateOption = None,
    descriptions: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="JSON file: an object with a text, or a list of texts, for every class."),
    ] = None,
    describe_classifier: Annotated[
        bool, typer.Option("--describe-classifier", help="Make the class embeddings from the descriptions too.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show each denoiser call as it is made.")] = False,
    url: UrlOption = DEFAULT_BASE_URL,
    api_key: KeyOption = None,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Ask a running service for a classifier head.

    Example: t2w generate apple bus "pickup truck" -o head.safetensors --seed 7
    """
    with one_line_errors(), Client(url, api_key=api_key, timeout_s=timeout) as client:
        if watch and samples > 1:
            raise ValueError("--watch shows one head: leave out --samples")
        if describe_classifier and descriptions is None:
            raise ValueError("--describe-classifier needs --descriptions")
        options: GenerateOptions = {
            "seed": seed,
            "steps": steps,
            "sampler": sampler,
            "precision": precision,
            "guidance_scale": guidance_scale,
            "prompt_template": template,
            "descriptions": _read_descriptions(descriptions) if descriptions else None,
            "describe_classifier": describe_classifier or None,
        }
        result = _watched(client, classes, options) if watch else _asked(client, classes, samples, options)
        result.save(output)
    say_written(output, result)


@fuse_app.command("fuse", epilog=EXIT_CODES)
def fuse(
    tasks: Annotated[
        list[str],
        typer.Argument(help=f"2 to 16 tasks: class names between commas, or head files (*{HEAD_SUFFIX}) to merge."),
    ],
    output: OutputOption = Path("fused.safetensors"),
    method: Annotated[
        FuseMethod | None,
        typer.Option(help="text, the default, generates for all classes; the others merge head files."),
    ] = None,
    weight: Annotated[
        list[float] | None, typer.Option(help="A task's share; once for each task, in order. Equal if not given.")
    ] = None,
    seed: SeedOption = None,
    steps: StepsOption = None,
    sampler: SamplerOption = None,
    precision: PrecisionOption = None,
    guidance_scale: GuidanceOption = None,
    template: TemplateOption = None,
    url: UrlOption = DEFAULT_BASE_URL,
    api_key: KeyOption = None,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Ask a running service for one head for the classes of several tasks.

    Example: t2w fuse "apple, bus" "lizard, clock, bus" -o fused.safetensors

    Example: t2w fuse fruit.safetensors vehicles.safetensors --method ties
    """
    with asking(url, api_key, timeout, "fusing") as client:
        head = client.fuse(
            _read_tasks(tasks, weight),
            method=method,
            seed=seed,
            steps=steps,
            sampler=sampler,
            precision=precision,
            guidance_scale=guidance_scale,
            prompt_template=template,
        )
        head.save(output)
    say_written(output, head)


@enhance_app.command("enhance", epilog=EXIT_CODES)
def enhance(
    path: Annotated[Path, typer.Argument(metavar="HEAD", help="The head file to start from.", dir_okay=False)],
    strength: Annotated[float, typer.Option(min=0.0, max=1.0, help="0 gives the head back, 1 is a new generation.")],
    output: OutputOption = Path("enhanced.safetensors"),
    classes: Annotated[
        list[str] | None, typer.Option("--class", help="A class name; once for each. Those of the head if not given.")
    ] = None,
    method: Annotated[
        EnhanceMethod | None,
        typer.Option(
            help="interpolate with a generated head, or noise the head and denoise it. What suits it if not given."
        ),
    ] = None,
    seed: SeedOption = None,
    steps: StepsOption = None,
    sampler: SamplerOption = None,
    precision: PrecisionOption = None,
    guidance_scale: GuidanceOption = None,
    url: UrlOption = DEFAULT_BASE_URL,
    api_key: KeyOption = None,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Ask a running service to improve a head by what it generates for the text.

    Example: t2w enhance head.safetensors --strength 0.3 -o better.safetensors
    """
    from text2weight_client.head import GeneratedHead

    with asking(url, api_key, timeout, "enhancing") as client:
        head = client.enhance(
            GeneratedHead.load(path),
            strength,
            classes=classes,
            method=method,
            seed=seed,
            steps=steps,
            sampler=sampler,
            precision=precision,
            guidance_scale=guidance_scale,
        )
        head.save(output)
    say_written(output, head)


def _asked(
    client: Client, classes: Sequence[str], samples: int, options: GenerateOptions
) -> GeneratedHead | GeneratedHeads:
    with waiting("generating"):
        if samples > 1:
            return client.generate(classes, samples=samples, **options)
        return client.generate(classes, **options)


def _watched(client: Client, classes: Sequence[str], options: GenerateOptions) -> GeneratedHead:
    """Generate with a progress bar, one tick for each denoiser call."""
    from rich.console import Console
    from rich.progress import Progress

    from text2weight_client.results import DoneEvent, ProgressEvent

    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("denoising", total=None)
        for event in client.stream(classes, **options):
            match event:
                case ProgressEvent(step, steps, timestep):
                    progress.update(bar, completed=step, total=steps, description=f"denoising, timestep {timestep}")
                case DoneEvent(head=head):
                    return head
    raise AssertionError("a stream ends with its DoneEvent, or raises")


def _read_descriptions(path: Path) -> dict[str, str | list[str]]:
    try:
        descriptions = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(descriptions, dict):
        raise ValueError(f"{path}: it must hold an object with a text, or a list of texts, for every class")
    return descriptions


def _read_tasks(tasks: Sequence[str], weights: Sequence[float] | None) -> list[FuseTask]:
    from text2weight_client.fuse_task import FuseTask
    from text2weight_client.head import GeneratedHead

    if weights and len(weights) != len(tasks):
        raise ValueError(f"--weight is given {len(weights)} times for {len(tasks)} tasks: give it once for each")
    read = []
    for number, task in enumerate(tasks):
        weight = weights[number] if weights else None
        if task.endswith(HEAD_SUFFIX):
            head = GeneratedHead.load(task)
            read.append(FuseTask(head.classes, weight, head))
        else:
            read.append(FuseTask([name.strip() for name in task.split(",")], weight))
    return read

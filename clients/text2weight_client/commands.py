"""The client's subcommands, `t2w generate` and `t2w inspect`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from text2weight_client.client import DEFAULT_BASE_URL, DEFAULT_TIMEOUT_S
from text2weight_client.errors import InvalidRequestError, Text2WeightClientError

if TYPE_CHECKING:
    from rich.table import Table

    from text2weight_client.head import GeneratedHead

generate_app = typer.Typer(add_completion=False)
inspect_app = typer.Typer(add_completion=False)


@generate_app.command("generate")
def generate(
    classes: Annotated[list[str], typer.Argument(help="Two or more class names; quote names of several words.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the head.")] = Path("head.safetensors"),
    url: Annotated[str, typer.Option(help="Where the service listens.")] = DEFAULT_BASE_URL,
    seed: Annotated[int | None, typer.Option(min=0, help="Equal seeds give equal heads; random if not given.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoiser calls; the service's default if not given.")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="The service's default if not given.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="T2W_API_KEY", show_envvar=True, help="If the service wants one.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.")] = DEFAULT_TIMEOUT_S,
) -> None:
    """Ask a running service for a classifier head.

    Example: t2w generate apple bus "pickup truck" -o head.safetensors --seed 7
    """
    from text2weight_client.client import Client

    with _one_line_errors(), Client(url, api_key=api_key, timeout_s=timeout) as client:
        head = client.generate(classes, seed=seed, steps=steps, sampler=sampler)
        head.save(output)
    metadata = head.metadata
    typer.echo(
        f"wrote {output} ({output.stat().st_size / 1000:.0f} kB): {len(head.classes)} classes, "
        f"sampler {metadata.get('sampler')}, steps {metadata.get('steps')}, seed {metadata.get('seed')}"
    )


@inspect_app.command("inspect")
def inspect(path: Annotated[Path, typer.Argument(help="A head file.", dir_okay=False)]) -> None:
    """Show what is in a head file: classes, where it comes from, tensors.

    Example: t2w inspect head.safetensors
    """
    from rich.console import Console

    from text2weight_client.head import GeneratedHead

    with _one_line_errors():
        head = GeneratedHead.load(path)
    console = Console()
    console.print(_metadata_table(head, path))
    console.print(_tensor_table(head))


def _metadata_table(head: GeneratedHead, path: Path) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(str(path)), title_justify="left")
    table.add_column("field", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_row("classes", Text(f"{len(head.classes)}: {', '.join(head.classes)}"))
    bias = "with biases" if "linear1.bias" in head.tensors else "without biases"
    hidden, outputs = len(head.tensors["linear1.weight"]), len(head.tensors["linear2.weight"])
    shape = f"{head.input_dim} -> {hidden} -> {outputs}, activation {head.activation}, {bias}"
    table.add_row("head", f"{shape}, {head.num_parameters:,} numbers")
    for key in sorted(head.metadata.keys() - {"classes", "activation"}):
        table.add_row(key, Text(head.metadata[key]))
    return table


def _tensor_table(head: GeneratedHead) -> Table:
    import numpy as np
    from rich.table import Table

    table = Table("tensor", "shape", "norm", "mean", "standard deviation")
    for name, tensor in sorted({**head.tensors, "class_embeddings": head.class_embeddings}.items()):
        numbers = [f"{value:.4g}" for value in (np.linalg.norm(tensor), tensor.mean(), tensor.std())]
        table.add_row(name, str(tuple(tensor.shape)), *numbers)
    return table


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Report an expected failure in one line: exit code 2 for input to correct, 1 for the rest."""
    try:
        yield
    except (Text2WeightClientError, OSError, ValueError) as error:
        where = getattr(error, "filename", None)
        reason = f"{where}: {error.strerror}" if isinstance(error, OSError) and where else error
        typer.echo(f"error: {reason}", err=True)
        refused = isinstance(error, InvalidRequestError) or not isinstance(error, (Text2WeightClientError, OSError))
        raise typer.Exit(2 if refused else 1) from error

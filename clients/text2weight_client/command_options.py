"""What the commands that speak to a service share: options, waiting, and errors in one line.

Exit codes of all of them: 0 done; 1 failed (service, network, file); 2 input to correct.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from text2weight_client.client import Client
from text2weight_client.errors import InvalidRequestError, Text2WeightClientError
from text2weight_client.options import Precision

if TYPE_CHECKING:
    from text2weight_client.head import GeneratedHead
    from text2weight_client.heads import GeneratedHeads

EXIT_CODES = "Exit codes: 0 done; 1 failed, by service, network or file; 2 input to correct."
PROGRESS_AFTER_S = 2.0

OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Where to write the head.")]
UrlOption = Annotated[str, typer.Option(envvar="T2W_URL", show_envvar=True, help="Where the service listens.")]
KeyOption = Annotated[
    str | None,
    typer.Option(
        envvar="T2W_API_KEY",
        show_envvar=True,
        help="If the service wants one. Better in the variable: other users can read a command line.",
    ),
]
TimeoutOption = Annotated[float, typer.Option(help="Seconds that asking may take, retries included.")]
SeedOption = Annotated[int | None, typer.Option(min=0, help="Equal seeds give equal heads; random if not given.")]
StepsOption = Annotated[int | None, typer.Option(min=1, help="Denoiser calls; the service's default if not given.")]
SamplerOption = Annotated[str | None, typer.Option(help="The service's default if not given.")]
GuidanceOption = Annotated[
    float | None, typer.Option("--guidance-scale", help="How far to go towards the text; `t2w info` says if it can.")
]
PrecisionOption = Annotated[Precision | None, typer.Option(help="Type of the numbers in the file; fp32 if not given.")]
TemplateOption = Annotated[
    str | None, typer.Option(help="Prompt with one {} for the class name; the checkpoint's if not given.")
]


@contextmanager
def asking(url: str, api_key: str | None, timeout_s: float, what: str) -> Iterator[Client]:
    """A client; what is waited for is shown after two seconds, and errors end the program in one line."""
    with one_line_errors(), Client(url, api_key=api_key, timeout_s=timeout_s) as client, waiting(what):
        yield client


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Report an expected failure in one line: exit code 2 for input to correct, 1 for the rest."""
    try:
        yield
    except (Text2WeightClientError, OSError, ValueError) as error:
        where = getattr(error, "filename", None)
        reason = f"{where}: {error.strerror}" if isinstance(error, OSError) and where else error
        typer.echo(f"error: {reason}", err=True)
        refused = isinstance(error, InvalidRequestError) or not isinstance(error, (Text2WeightClientError, OSError))
        raise typer.Exit(2 if refused else 1) from error


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Turn a spinner on a terminal if the block takes more than two seconds."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    status = console.status(what)
    timer = threading.Timer(PROGRESS_AFTER_S, status.start)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        status.stop()


def say_written(path: Path, result: GeneratedHead | GeneratedHeads) -> None:
    """One line about the file that was written, and the service's warnings about its content."""
    from text2weight_client.heads import GeneratedHeads

    heads = result.heads if isinstance(result, GeneratedHeads) else (result,)
    metadata = heads[0].metadata
    count = f"{len(heads)} heads for " if len(heads) > 1 else ""
    facts = [f"{count}{len(result.classes)} classes"]
    facts += [f"{key} {metadata[key]}" for key in ("sampler", "steps", "method", "strength") if key in metadata]
    seeds = [head.metadata["seed"] for head in heads if "seed" in head.metadata]
    facts += [f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}"] if seeds else []
    typer.echo(f"wrote {path} ({path.stat().st_size / 1000:.0f} kB): {', '.join(facts)}")
    for warning in heads[0].warnings:
        typer.echo(f"warning: {warning}", err=True)

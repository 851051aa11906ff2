"""`t2w inspect`: what is in a file of one head or several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from text2weight_client.command_options import EXIT_CODES, one_line_errors

if TYPE_CHECKING:
    from rich.table import Table

    from text2weight_client.head import GeneratedHead

inspect_app = typer.Typer(add_completion=False)


@inspect_app.command("inspect", epilog=EXIT_CODES)
def inspect(path: Annotated[Path, typer.Argument(help="A head file.", dir_okay=False)]) -> None:
    """Show what is in a head file: classes, where it comes from, tensors.

    Example: t2w inspect head.safetensors
    """
    from rich.console import Console

    from text2weight_client.heads import GeneratedHeads

    with one_line_errors():
        heads = GeneratedHeads.load(path).heads
    console = Console()
    console.print(_metadata_table(heads, path))
    console.print(_tensor_table(heads[0]) if len(heads) == 1 else _heads_table(heads))


def _metadata_table(heads: Sequence[GeneratedHead], path: Path) -> Table:
    from rich.table import Table
    from rich.text import Text

    head = heads[0]
    table = Table(title=Text(str(path)), title_justify="left")
    table.add_column("field", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_row("classes", Text(f"{len(head.classes)}: {', '.join(head.classes)}"))
    bias = "with biases" if "linear1.bias" in head.tensors else "without biases"
    hidden, outputs = len(head.tensors["linear1.weight"]), len(head.tensors["linear2.weight"])
    shape = f"{head.input_dim} -> {hidden} -> {outputs}, activation {head.activation}, {bias}"
    count = "" if len(heads) == 1 else f"{len(heads)} of "
    table.add_row("head", f"{count}{shape}, {head.num_parameters:,} numbers in {head.precision}")
    for key in sorted(head.metadata.keys() - {"classes", "activation", "format"}):
        values = [one.metadata[key] for one in heads]  # of several heads, only the seeds differ
        table.add_row(key, Text(", ".join(dict.fromkeys(values))))
    return table


def _tensor_table(head: GeneratedHead) -> Table:
    import numpy as np
    from rich.table import Table

    table = Table("tensor", "shape", "norm", "mean", "standard deviation")
    for name, tensor in sorted({**head.tensors, "class_embeddings": head.class_embeddings}.items()):
        numbers = [f"{value:.4g}" for value in (np.linalg.norm(tensor), tensor.mean(), tensor.std())]
        table.add_row(name, str(tuple(tensor.shape)), *numbers)
    return table


def _heads_table(heads: Sequence[GeneratedHead]) -> Table:
    """One row for each head: how large its weights are and how far from the first head's."""
    import numpy as np
    from rich.table import Table

    flat = np.stack([np.concatenate([tensor.ravel() for tensor in head.tensors.values()]) for head in heads])
    table = Table("seed", "norm", "mean", "standard deviation", "RMS difference to the first")
    for head, row in zip(heads, flat, strict=True):
        numbers = (np.linalg.norm(row), row.mean(), row.std(), np.sqrt(np.mean((row - flat[0]) ** 2)))
        table.add_row(head.metadata["seed"], *(f"{value:.4g}" for value in numbers))
    return table

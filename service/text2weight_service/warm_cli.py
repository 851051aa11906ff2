"""`t2w warm`. Heavy imports stay inside the command, so that `t2w --help` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from text2weight_service.cli import describe_settings_error, give_up

warm_app = typer.Typer(add_completion=False)


@warm_app.command("warm")
def warm_command(
    names: Annotated[Path | None, typer.Option(help="Text file with one class name per line, to be encoded.")] = None,
    table: Annotated[
        str | None, typer.Option(help="FILE#TABLE of embeddings that the checkpoint's own text encoder made.")
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="Checkpoint directory or hf:owner/name@revision. Default: T2W_CHECKPOINT, else bundled."),
    ] = None,
) -> None:
    """Fill Redis with the text embeddings of class names, so that workers need not compute them.

    Redis is the one of T2W_REDIS_URL; embeddings live there for T2W_EMBEDDING_TTL_S, as those of workers do.

    Example: T2W_REDIS_URL=redis://localhost:6379/0 t2w warm --names names.txt
    """
    import asyncio

    from pydantic import ValidationError
    from rich.console import Console
    from rich.progress import Progress

    from text2weight.errors import Text2WeightError
    from text2weight_service.model import load_model
    from text2weight_service.settings import Settings
    from text2weight_service.warm import WarmError, names_source, table_source, warm

    try:
        settings = Settings() if checkpoint is None else Settings(checkpoint=checkpoint)
        if (names is None) == (table is None):
            raise WarmError("give either --names or --table")
        if settings.redis_url is None:
            raise WarmError("no Redis is set: give its address in T2W_REDIS_URL")
        url = settings.redis_url.get_secret_value()
        model = load_model(settings)
        source = names_source(model, names) if names is not None else table_source(model, str(table))
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("embeddings", total=len(source.prompts))
            done = asyncio.run(
                warm(url, settings.embedding_ttl_s, model, source, lambda count: bar.advance(task, count))
            )
    except ValidationError as error:
        give_up("warm", describe_settings_error(error))
    except (WarmError, Text2WeightError) as error:
        give_up("warm", str(error))
    typer.echo(f"{done.there} of {len(source.prompts)} embeddings were in Redis already, {done.added} added")

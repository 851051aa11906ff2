"""`t2w key`."""

from __future__ import annotations

from typing import Annotated

import typer

key_app = typer.Typer(add_completion=False)


@key_app.command("key")
def key(
    name: Annotated[
        str, typer.Argument(help="Whose key it is, for logs and metrics: 1 to 32 characters of A-Z a-z 0-9 . _ -")
    ],
) -> None:
    """Make a new API key: the key goes to standard error, its entry for the key file to standard output.

    The service keeps only the entry, which holds a hash of the key; the key itself is shown this once.

    Example: t2w key alice >> keys.txt
    """
    from text2weight_service.auth import KeysError, create_key

    try:
        secret, entry = create_key(name)
    except KeysError as error:
        typer.echo(f"t2w key: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"key for the client, shown only now: {secret}", err=True)
    typer.echo(entry)

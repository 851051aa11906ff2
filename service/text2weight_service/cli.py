"""`t2w serve`, and how the service's commands fail.

Heavy imports stay inside the command, so that `t2w --help` is quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from pydantic import ValidationError

    from text2weight_service.settings import Settings

serve_app = typer.Typer(add_completion=False)

_EXIT_UNUSABLE = 2


@serve_app.command("serve")
def serve(
    checkpoint: Annotated[
        str | None,
        typer.Option(help="Checkpoint directory or hf:owner/name@revision. Default: T2W_CHECKPOINT, else bundled."),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on. Default: T2W_HTTP_HOST, else 127.0.0.1.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on, 0 for a free one. Default: T2W_HTTP_PORT, else 8000.")
    ] = None,
) -> None:
    """Serve heads over HTTP until SIGTERM or Ctrl-C, then finish accepted requests and exit.

    Every other setting is an environment variable T2W_*, see docs/operations.md.

    Example: T2W_QUEUE_SIZE=64 t2w serve --checkpoint runs/mine/checkpoint --port 9000
    """
    from pydantic import ValidationError

    from text2weight_service.settings import Settings

    flags = {"checkpoint": checkpoint, "http_host": host, "http_port": port}
    try:
        settings = Settings(**{name: value for name, value in flags.items() if value is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        give_up("serve", describe_settings_error(error))
    _serve(settings)


def _serve(settings: Settings) -> None:
    from text2weight_service.auth import KeysError
    from text2weight_service.server import run_server

    try:
        failure = run_server(settings)
    except KeysError as error:
        give_up("serve", str(error))
    except OSError as error:
        give_up("serve", f"cannot listen on {settings.http_host}:{settings.http_port}: {error}")
    if failure is not None:
        give_up("serve", f"cannot use checkpoint {settings.checkpoint or '(bundled)'}: {failure}")


def describe_settings_error(error: ValidationError) -> str:
    """What is wrong with which variables, in one line."""
    from text2weight_service.settings import variable_name

    return "; ".join(
        f"{variable_name(str(entry['loc'][0]))}: {entry['msg'].removeprefix('Value error, ')}"
        for entry in error.errors()
    )


def give_up(command: str, message: str) -> NoReturn:
    """End a subcommand with one line and exit code 2."""
    typer.echo(f"t2w {command}: {' '.join(message.split())}", err=True)
    raise typer.Exit(_EXIT_UNUSABLE)

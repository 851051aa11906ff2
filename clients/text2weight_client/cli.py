"""The `t2w` command: a group whose subcommands are looked up only when they are needed.

Subcommands come from the entry points in group "text2weight.commands", so that the client can list
and run the service's and the training's commands without importing either.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points, version
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from typer._click.core import Command, Context

COMMAND_GROUP = "text2weight.commands"
# What to install for the commands of each package; the client's own need nothing more.
EXTRAS = {"text2weight_service": "service", "text2weight_training": "training"}


class EntryPointGroup(TyperGroup):
    """A command group that imports a subcommand when it is run or listed."""

    def list_commands(self, ctx: Context) -> list[str]:
        """Names of the installed subcommands."""
        return list(_entry_points())

    def get_command(self, ctx: Context, cmd_name: str) -> Command | None:
        """Import one subcommand; None if there is none of that name."""
        known = _entry_points()
        if cmd_name not in known:
            self.commands.update({name: _load(point) for name, point in known.items()})  # for "did you mean"
            return None
        return _load(known[cmd_name])

    def invoke(self, ctx: Context) -> Any:
        """Run; a library that is not installed is reported with the extra that brings it."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            point = _entry_points().get(ctx.invoked_subcommand or "")
            if point is None or _extra(point) is None:
                raise
            typer.echo(_missing(point, error), err=True)
            raise typer.Exit(1) from error


def _entry_points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=COMMAND_GROUP)}


def _extra(point: EntryPoint) -> str | None:
    return EXTRAS.get(point.module.partition(".")[0])


def _missing(point: EntryPoint, error: ModuleNotFoundError) -> str:
    return (
        f"error: `t2w {point.name}` needs {error.name!r}, which is not installed.\n"
        f"Install it with: pip install 'text2weight[{_extra(point)}]'"
    )


def _load(point: EntryPoint) -> Command:
    try:
        app: typer.Typer = point.load()
    except ModuleNotFoundError as error:
        if _extra(point) is None:
            raise
        app = _unavailable(point, _missing(point, error))
    command = typer.main.get_command(app)
    command.name = point.name  # the listing shows this one, and usage lines the name that was typed
    return command


def _unavailable(point: EntryPoint, message: str) -> typer.Typer:
    """A stand-in that keeps the command in the list and says what to install when it is run."""
    app = typer.Typer(add_completion=False)

    @app.command(
        point.name,
        help=f"Needs the extra '{_extra(point)}', which is not installed.",
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )
    def stand_in() -> None:
        typer.echo(message, err=True)
        raise typer.Exit(1)

    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"text2weight {version('text2weight')}")
        raise typer.Exit


app = typer.Typer(cls=EntryPointGroup, no_args_is_help=True, pretty_exceptions_show_locals=False)


@app.callback()
def t2w(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """From class names to the weights of a small classifier head.

    Start a service with `t2w serve`, then: t2w generate apple bus lizard -o head.safetensors
    """


def main() -> None:
    """Entry point of the `t2w` script."""
    app(prog_name="t2w")


if __name__ == "__main__":
    main()

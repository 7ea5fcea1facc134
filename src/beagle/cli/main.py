"""The ``beagle`` command."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from beagle.cli import (
    chat,
    compile,
    demo,
    eval,
    export,
    generate,
    profile,
    push,
    report,
    research,
    serve,
    train,
    view,
)
from beagle.errors import BeagleError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Lossless speculative decoding with cross-attention draft heads.",
)
for module in (generate, chat, serve, demo, eval, profile, compile, report, view, train, push, export):
    app.command()(getattr(module, module.__name__.rsplit(".", 1)[-1]))
app.add_typer(research.app, name="research")


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of every command."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count != "1" and "RANK" in os.environ and context.invoked_subcommand not in ("train", "generate", "eval"):
        raise BeagleError(
            f"beagle {context.invoked_subcommand} is one process, and a launcher has started {count}; start it without"
        )


def run() -> None:
    """Entry point: one line for an error, exit code 2 for bad input, 1 for failures of ours."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # a full disk shows here, not when the interpreter ends
    except KeyboardInterrupt:
        Console(stderr=True).print("[yellow]stopped[/yellow]")
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, BeagleError):
            stop("error", str(error), error.exit_code)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            drop_stdout()
            where = f"'{error.filename}'" if error.filename else "the output"
            stop("error", f"cannot write {where}: {error.strerror}; free space or choose another file", 2)
        message = f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"
        stop("failure of ours", f"{message}; run with --debug for the traceback", 1)


def stop(what: str, message: str, code: int) -> NoReturn:
    Console(stderr=True).print(f"[red]{what}:[/red] {escape(message)}", soft_wrap=True, highlight=False)
    sys.exit(code)


def drop_stdout() -> None:
    """Let the interpreter's last flush succeed: what it still holds can't be written."""
    with contextlib.suppress(OSError):  # not a file: a test's
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

"""``beagle chat``: a conversation in the terminal, drafted tokens in colour."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from beagle.cli import options as o
from beagle.cli.generate import show_stats
from beagle.decoding.stats import Stats
from beagle.errors import BeagleError

if TYPE_CHECKING:
    from beagle.model import Model, Piece

KEPT_TOKENS = 8192  # of the conversation, so that only what is new of a turn is run


@o.with_setup
def chat(
    *,
    setup: o.Setup,
    system: Annotated[str, typer.Option(help="System message.")] = "",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1)] = 512,
    temperature: o.Temperature = 0.0,
    seed: o.Seed = 0,
) -> None:
    """Talk to the model; accepted draft tokens are green. /reset forgets, /exit (or Ctrl-D) ends.

    Example: [bold]beagle chat --target smollm2-135m[/bold]
    """
    model = setup.load_model(prefix_cache=KEPT_TOKENS)
    exact = setup.exact_of(model.target)
    console = Console()
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    while True:
        try:
            question = console.input("[bold]you>[/bold] ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if question in ("/exit", "/quit"):
            return
        if question == "/reset":
            messages = list(start)
            continue
        if not question:
            continue
        stats = Stats()
        text = ""
        asked = [*messages, {"role": "user", "content": question}]
        try:
            for piece in model.stream(
                asked, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, exact=exact, stats=stats
            ):
                text += piece.text
                console.print(coloured_piece(model, piece), end="", soft_wrap=True, highlight=False)
        except KeyboardInterrupt:
            console.print(" [yellow](stopped)[/yellow]", end="")
        except BeagleError as error:  # too long, say: the conversation goes on without this message
            console.print(f"[red]error:[/red] {error}", highlight=False)
            continue
        console.print()
        show_stats(stats, console)
        messages = [*asked, {"role": "assistant", "content": text}]


def coloured_piece(model: Model, piece: Piece) -> Text:
    """A piece with its drafted part in green."""
    drafted = model.target.tokenizer.decode(piece.token_ids[: piece.drafted], skip_special_tokens=True)
    border = min(len(drafted), len(piece.text))
    return Text.assemble((piece.text[:border], "green"), piece.text[border:])

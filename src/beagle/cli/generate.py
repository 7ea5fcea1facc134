"""``beagle generate``: answer one prompt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from beagle.cli import options as o
from beagle.decoding.stats import Stats
from beagle.errors import BeagleError

if TYPE_CHECKING:
    from beagle.ranks import Ranks


@o.with_setup
@o.with_ranks
def generate(
    ranks: Ranks,
    *,
    prompt: Annotated[str, typer.Argument(help="The question; '-' reads standard input.")],
    setup: o.Setup,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1)] = 256,
    temperature: o.Temperature = 0.0,
    top_k: Annotated[int, typer.Option(min=0)] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    min_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Leave out tokens below this share of the likeliest one's chance.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Divides logits of tokens in prompt and answer; 1 is off.")
    ] = 1.0,
    presence_penalty: Annotated[
        float, typer.Option(min=-2.0, max=2.0, help="Taken off the logits of tokens in the answer.")
    ] = 0.0,
    frequency_penalty: Annotated[
        float, typer.Option(min=-2.0, max=2.0, help="The same, for each time that a token is there.")
    ] = 0.0,
    min_new_tokens: Annotated[int, typer.Option(min=0, help="No end of the answer before so many tokens.")] = 0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end of the answer.")] = False,
    seed: o.Seed = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text (repeatable).")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template.")] = False,
    tensor_parallel: o.TensorParallel = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No figures after the answer.")] = False,
) -> None:
    """Answer one prompt, streaming; the figures follow on standard error.

    Examples: [bold]beagle generate "Why is the sky blue?" -n 128[/bold]

    [bold]beagle generate - --draft lookup < article.txt[/bold]  (drafts repeat what the text itself says)
    """
    if prompt == "-":
        try:
            prompt = ranks.agree_on(sys.stdin.read() if ranks.leads else None)
        except UnicodeDecodeError as error:
            raise BeagleError(f"standard input is no UTF-8 text ({error}); convert it first") from error
    elif len(prompt) < 200 and prompt.endswith(".txt") and Path(prompt).is_file():
        raise BeagleError(f"'{prompt}' is a file; pipe it in: beagle generate - < {prompt}")
    model = setup.load_model(tensor_parallel=o.target_ranks(ranks, tensor_parallel))
    stats = Stats()
    pieces = model.stream(
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        min_new_tokens=min_new_tokens,
        ignore_eos=ignore_eos,
        seed=seed,
        stop=stop or (),
        raw=raw,
        exact=setup.exact_of(model.target),
        stats=stats,
    )
    try:
        for piece in pieces:
            print(piece.text, end="", flush=True)
    finally:
        if stats.tokens:
            print(flush=True)
        if not quiet:
            show_stats(stats, o.console)


def show_stats(stats: Stats, console: Console) -> None:
    """One line: tokens, speed, τ, where the time went."""
    if not stats.passes:
        return
    alphas = " ".join(f"{a:.2f}" for a in stats.step_alpha[:5])
    line = f"{stats.tokens} tokens, {stats.tokens_per_second:.1f} token/s, τ {stats.tau:.2f}"
    if alphas:
        line += f", step-α {alphas}"
        share = 100 / stats.decode_seconds
        line += f", draft {stats.draft_seconds * share:.0f}% verify {stats.verify_seconds * share:.0f}%"
    console.print(f"[dim]{line}[/dim]", highlight=False)

"""``beagle serve``: an OpenAI-compatible server, with a page to watch it."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated

import typer

from beagle.cli import options as o
from beagle.cli import serve_vllm
from beagle.errors import BeagleError
from beagle.threads import ModelThread


@o.with_setup
def serve(
    *,
    ctx: typer.Context,
    setup: o.Setup,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str, typer.Option(envvar="BEAGLE_API_KEY", help="Ask clients for this key.", show_default=False)
    ] = "",
    name: Annotated[
        str, typer.Option("--name", help="The model's name for clients; by default the adapter's or the target's.")
    ] = "",
    live: Annotated[int, typer.Option(min=1, help="Requests that are answered at once.")] = 8,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; more get status 429.")] = 32,
    seconds: Annotated[float, typer.Option(min=0.1, help="A request's time; then its answer is cut.")] = 300.0,
    context: Annotated[int, typer.Option(min=0, help="Tokens of prompt and answer; 0 is the target's limit.")] = 0,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Of a chat answer whose request gives no number.")
    ] = 1024,
    grace: Annotated[float, typer.Option(min=0.0, help="Seconds to finish answers in at shutdown.")] = 10.0,
    prefix_cache: Annotated[
        int, typer.Option(min=0, help="Tokens of ended answers kept for prompts that begin alike; 0 keeps none.")
    ] = 8192,
    engine: Annotated[
        str, typer.Option(help="beagle, or vllm (its own server and batching, with the head; needs vLLM installed).")
    ] = "beagle",
) -> None:
    """Serve the model to any OpenAI client; open the address in a browser to watch it draft.

    Examples: [bold]beagle serve --port 8000[/bold]

    [bold]beagle serve --engine vllm[/bold]  (see docs/vllm.md)
    """
    from beagle.model import Model

    if engine not in ("beagle", "vllm"):
        raise BeagleError(f"engine '{engine}' is unknown; use beagle or vllm")
    if not api_key.isascii():
        raise BeagleError("the API key must be ASCII, as HTTP headers are; choose another --api-key")
    if engine == "vllm":
        serve_vllm.serve(ctx)
        return
    try:
        from beagle.serving.app import create_app
        from beagle.serving.engine import Engine, Limits
        from beagle.serving.server import bind, run
    except ImportError as error:
        if (error.name or "").startswith("beagle"):
            raise
        raise BeagleError(
            f"`beagle serve` needs the package '{error.name}': pip install 'beagle-decoding[serve]'"
        ) from error
    listener = bind(host, port)
    with listener:

        def load() -> tuple[Model, bool]:
            model = setup.load_model()
            exact = setup.exact_of(model.target)
            with o.console.status("warming up"):
                model.decoder(live, exact=exact)  # measures this machine's costs, once
                model.generate("Hello", max_new_tokens=8, exact=exact)
            return model, exact

        owner = ModelThread("beagle-engine")
        model, exact = owner.submit(load).result()
        limits = Limits(live, queue, seconds, context or None, max_new_tokens, grace=grace, prefix_cache=prefix_cache)
        running = Engine(model, limits, exact=exact, owner=owner)
        own = setup.adapter or setup.target
        served = name or (Path(own).resolve().name if Path(own).exists() else own)
        app = create_app(running, name=served, api_key=api_key or None)
        address = listener.getsockname()
        where = f"[{address[0]}]" if ":" in address[0] else address[0]
        o.console.print(
            f"serving {served} on http://{where}:{address[1]} (OpenAI's API under /v1)", highlight=False, markup=False
        )
        if not api_key and not ipaddress.ip_address(address[0]).is_loopback:
            o.console.print("[yellow]anyone who reaches this address can use it: no --api-key is set[/yellow]")
        running.start()
        run(app, running, listener)
        o.console.print("stopped", highlight=False)

"""``beagle push``: a trained head to the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from beagle.cli import options as o
from beagle.errors import BeagleError


def push(
    run: Annotated[Path, typer.Argument(help="Folder of a run of `beagle train`, with its head and result.json.")],
    repository: Annotated[str, typer.Argument(help="ORG/NAME on the hub; made if it isn't there.")],
    licence: Annotated[
        str | None, typer.Option("--license", help="Of the head, as the hub names them, such as apache-2.0.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    card: Annotated[
        Path | None, typer.Option(help="Write the model card there and upload nothing; or - to print it.")
    ] = None,
) -> None:
    """Upload a trained head to the hub, with a model card made from result.json.

    Log in with `hf auth login` or HF_TOKEN before. Anyone can then draft with --draft ORG/NAME.

    Example: [bold]beagle push runs/mine my-org/my-head --license apache-2.0[/bold]
    """
    from beagle.drafters.checkpoint import head_settings
    from beagle.drafters.hub import is_hub_name, upload_head
    from beagle.files import read_json, write_text
    from beagle.meta import redact_paths
    from beagle.training.card import model_card

    if not is_hub_name(repository) or "@" in repository:
        raise BeagleError(
            f"repository '{repository}' is no ORG/NAME; give your user or organisation, a slash and a name"
        )
    result = read_json(run / "result.json", "train the head again")
    if result is None:
        raise BeagleError(f"'{run}' holds no result.json; give the folder of a run that `beagle train` has finished")
    head = run / "head"
    head_settings(head)
    text = model_card(result, repository, licence)
    if card is not None:
        if str(card) == "-":
            print(text, end="")
        else:
            o.check_writable(card)
            write_text(card, text)
        return
    config = json.loads((head / "config.json").read_text(encoding="utf-8"))
    config["target"] = redact_paths(str(config.get("target")))
    files: dict[str, Path | bytes] = {
        "README.md": text.encode(),
        "config.json": (json.dumps(config, indent=1, ensure_ascii=False) + "\n").encode(),
        "result.json": run / "result.json",
        "model.safetensors": head / "model.safetensors",
    }
    with o.console.status(f"uploading to {repository}"):
        url = upload_head(repository, files, private=private)
    o.console.print(f"uploaded to {url}; draft with it: --draft {repository}", highlight=False)

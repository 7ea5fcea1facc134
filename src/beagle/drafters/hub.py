"""Draft heads of the Hugging Face hub, downloaded once."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from beagle.errors import BeagleError, first_line

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?", re.ASCII)


def is_hub_name(name: str) -> bool:
    """Whether it has the form ``ORG/NAME`` or ``ORG/NAME@revision``."""
    return _NAME.fullmatch(name) is not None


@cache
def download_head(name: str, check: Callable[[Path, str], None]) -> Path:
    """The folder of a head on the hub: config and weights (safetensors) of one revision, from the cache where it is there.

    Args:
        name: ``ORG/NAME[@revision]``; the revision is a branch, a tag or a commit.
        check: refuses a config, given its folder and ``name``, before the weights are downloaded.
    Raises:
        BeagleError: the hub can't be reached, or has no such head.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub import errors as hub

    repository, _, revision = name.partition("@")
    try:
        config = Path(hf_hub_download(repository, "config.json", revision=revision or None))
        check(config.parent, name)
        weights = hf_hub_download(repository, "model.safetensors", revision=config.parent.name)  # of the same commit
    except hub.GatedRepoError as error:
        raise BeagleError(f"draft '{name}' needs its owner's consent; ask on its page, then `hf auth login`") from error
    except hub.RevisionNotFoundError as error:
        raise BeagleError(
            f"draft '{name}': {repository} has no revision '{revision}'; give a branch, tag or commit of it"
        ) from error
    except (hub.RepositoryNotFoundError, hub.HFValidationError) as error:
        raise BeagleError(
            f"draft '{name}': no such folder, and no such head at {constants.ENDPOINT}; correct the name, or "
            "`hf auth login` for a private one"
        ) from error
    except hub.LocalEntryNotFoundError as error:
        raise BeagleError(
            f"draft '{name}': no such folder, and {constants.ENDPOINT} can't be asked for it; give a folder, "
            "or go online"
        ) from error
    except hub.EntryNotFoundError as error:
        raise BeagleError(
            f"draft '{name}' has no config.json and model.safetensors; give a head that `beagle push` uploaded"
        ) from error
    except (transport_error(), OSError) as error:
        raise BeagleError(f"draft '{name}' can't be downloaded ({first_line(error)}); try again later") from error
    return Path(weights).parent


def transport_error() -> type[Exception]:
    """What the hub's client raises where the other side can't be reached: of httpx, or of httpx2 in newer versions."""
    from huggingface_hub.errors import HfHubHTTPError

    base: type[Exception] = HfHubHTTPError.__bases__[0]
    return base


def upload_head(repository: str, files: Mapping[str, Path | bytes], *, private: bool) -> str:
    """Add files to a repository of the hub in one commit.

    Args:
        repository: ``ORG/NAME``; made if it isn't there.
    Returns:
        The repository's address.
    Raises:
        BeagleError: the hub can't be reached, or refuses it; then it has none of the files.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub import errors as hub

    api = HfApi()
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        adds = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in files.items()
        ]
        api.create_commit(repository, adds, commit_message="Upload a draft head")
    except hub.LocalTokenNotFoundError as error:
        raise BeagleError(f"'{repository}': {LOG_IN}") from error
    except hub.HfHubHTTPError as error:
        status = error.response.status_code
        remedy = LOG_IN if status in (401, 403) else "see the message, then run the same command again"
        raise BeagleError(f"'{repository}': the hub refuses the upload ({first_line(error)}); {remedy}") from error
    except (transport_error(), OSError, RuntimeError, ValueError) as error:
        raise BeagleError(
            f"'{repository}' can't be uploaded ({first_line(error)}); run the same command again once {api.endpoint} can "
            "be reached"
        ) from error
    return str(made)


LOG_IN = "log in as somebody who may write there: `hf auth login`, or set HF_TOKEN"

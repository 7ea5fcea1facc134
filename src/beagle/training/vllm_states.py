"""Hidden states of a target that vLLM serves, for training.

vLLM's own connector writes the states of each request to a file (``extract_hidden_states``). A request is a whole sample,
so that its file holds what the target's own pass over it would give. Files are read and deleted at once, and samples are
asked for only as far as their files fit into a limit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Condition
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from beagle.errors import BeagleError, first_line
from beagle.targets.target import Target
from beagle.training.answers import Sample, refuse_not_finite
from beagle.training.server import Endpoint, Server, one_line
from beagle.training.state_files import discard, fcntl, wait_for_file, written_file
from beagle.vllm.export import top_norm
from beagle.vllm.launch import states_arguments

AT_ONCE = 32  # requests
TRIED = 3  # samples that are asked for before all others, twice each
MOST_DIFFERENCE = 0.1  # of the trial's states: a median over tokens, relative. bf16 gives 0.02, the next layer 0.2
HEADER = 4096  # bytes of a file beside the states and the token ids
AGAIN = "run the same command again; nothing is lost"


class StatesLost(BeagleError):
    """The server gives no more states; a training saves what it has."""


@dataclass(frozen=True)
class StatesServer:
    """A vLLM server that writes hidden states.

    Attributes:
        folder: where its files are seen from here (its ``shared_storage_path``).
        limit: most bytes of files at once.
        patience: seconds without an answer after which it is given up.
    """

    url: str
    folder: Path
    limit: int = 1_000_000_000
    patience: float = 300.0


class VllmStates(AbstractContextManager["VllmStates"]):
    """States of samples, from a server; see ``StatesServer``.

    Attributes:
        most: bytes of files that were asked for at once.
    """

    def __init__(self, server: StatesServer, target: Target, share: int = 1) -> None:
        """
        Args:
            target: that the states are of; loaded with the layers that are wanted beside the top one.
            share: processes that ask the server; each takes its part of the limit.
        Raises:
            BeagleError: the server can't be reached, or the folder isn't there; or a package is missing, or the target's
                final norm isn't known.
        """
        if fcntl is None:
            raise BeagleError("states from vLLM need file locks, which Windows lacks; use Linux")
        if not server.folder.is_dir():
            raise BeagleError(
                f"'{server.folder}' is no folder; give the one that vLLM writes to (shared_storage_path), as it is "
                "called on this machine"
            )
        self.server, self.target = server, target
        self.limit = server.limit // share
        self.layers = [*target.state_layers, target.layer_count]
        self.norm, _ = top_norm(target)
        self.api = Server(Endpoint(server.url, "", server.patience), target)
        key = os.environ.get("OPENAI_API_KEY") or "none"
        self.client: Any = self.api.openai.OpenAI(
            base_url=self.api.endpoint.base, api_key=key, timeout=server.patience, max_retries=0
        )
        self.width = 4  # bytes of a number, until a file shows it
        self.free, self.most, self.room = self.limit, 0, Condition()
        self.model = self._served_model()
        self.pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="states")
        self.asked: dict[str, Future[Tensor]] = {}
        self.closed = False

    def __exit__(self, *_: object) -> None:
        """Wait for what is under way, so that no file stays."""
        with self.room:
            self.closed = True
            self.room.notify_all()
        self.pool.shutdown(cancel_futures=True)
        self.client.close()

    def __call__(self, group: Sequence[Sample], /) -> list[Sample]:
        """The group with states ``[n, state_size]``; samples that have some keep them.

        Raises:
            StatesLost: the server gives none.
            BeagleError: they are not of these samples.
        """
        self._ask(group)
        return [
            replace(sample, states=self.asked.pop(sample.id).result()) if sample.states is None else sample
            for sample in group
        ]

    def ahead(self, groups: Iterable[list[Sample]], share: Callable[[int], slice] = slice) -> Iterator[list[Sample]]:
        """The groups, each given when the next one's states are asked for already.

        Args:
            share: takes the number of samples of a group, and gives those that this process will want; by default all.
        """
        source = iter(groups)
        group = next(source, None)
        while group is not None:
            self._ask(group[share(len(group))])
            following = next(source, None)
            if following is not None:
                self._ask(following[share(len(following))])
            yield group
            group = following

    def trial(self, samples: Sequence[Sample]) -> None:
        """Compare states of a few samples with those that the target gives itself.

        Raises:
            BeagleError: they are of another model or of other layers, or the server gives none.
        """
        few = sorted(samples, key=lambda sample: len(sample.tokens))[:TRIED]
        for sample in (
            replace(s, states=None) for s in [*few, *few]
        ):  # the second time from vLLM's cache of prefixes, where it has one
            (found,) = self([sample])
            ids = sample.tokens[None].to(self.target.device)
            own = self.target.prefill(ids, self.target.new_cache(1, ids.shape[1]))[0]
            theirs = found.states
            assert theirs is not None
            self._compare(theirs.float(), own.float().to(theirs.device))

    def _compare(self, theirs: Tensor, own: Tensor) -> None:
        shape = (len(own), len(self.layers), self.target.hidden_size)
        theirs, own = theirs.view(shape), own.view(shape)
        gaps = ((theirs - own).norm(dim=-1) / own.norm(dim=-1).clamp(min=1e-9)).median(0).values
        for layer, gap in zip(self.layers, gaps.tolist(), strict=True):
            if not gap <= MOST_DIFFERENCE:
                raise BeagleError(
                    f"'{self.server.url}' gives other states of layer {layer} than {self.target.name} has (they differ by "
                    f"{gap:.0%}); serve the target itself with its layers {self.layers}: {self._how()}"
                )

    def _how(self) -> str:
        return states_arguments(self.layers, self.server.folder)

    def _served_model(self) -> str:
        try:
            return str(self.client.with_options(timeout=10.0).models.list().data[0].id)
        except self.api.openai.APIError as error:
            raise self.api.failure(error) from error
        except (IndexError, AttributeError, TypeError) as error:
            raise BeagleError(
                f"'{self.server.url}' lists no model; give the address of a vLLM server (http://host:8000/v1)"
            ) from error

    def _ask(self, group: Sequence[Sample]) -> None:
        """Ask for the states of these samples, as many at once as may be."""
        for sample in group:
            if sample.states is None and sample.id not in self.asked:
                self.asked[sample.id] = self.pool.submit(self._states, sample)

    def _states(self, sample: Sample) -> Tensor:
        """States of one sample, whose file is there for a moment."""
        tokens = len(sample.tokens)
        size = tokens * (len(self.layers) * self.target.hidden_size * self.width + 8) + HEADER
        if size > self.limit:
            raise BeagleError(
                f"the states of a sample of {tokens} tokens take {size / 1e6:.0f} MB, and this process may have "
                f"{self.limit / 1e6:.0f} MB of files at once; raise the limit, or train on shorter samples"
            )
        with self.room:
            self.room.wait_for(lambda: self.closed or self.free >= size)
            if self.closed:
                raise StatesLost(f"no more states are asked of '{self.server.url}'; {AGAIN}")
            self.free -= size
            self.most = max(self.most, self.limit - self.free)
        try:
            content = self._read(self._request(sample))
        finally:
            with self.room:
                self.free += size
                self.room.notify_all()
        return self._checked(content, sample)

    def _request(self, sample: Sample) -> Path:
        """The file that the server writes."""
        try:
            reply = self.client.completions.create(
                model=self.model, prompt=sample.tokens.tolist(), max_tokens=1, temperature=0.0
            )
        except self.api.openai.BadRequestError as error:
            raise BeagleError(
                f"'{self.server.url}' refuses a sample of {len(sample.tokens)} tokens ({one_line(error)}); serve with a "
                "larger max_model_len, or lower answers.max_prompt_tokens or max_new_tokens"
            ) from error
        except self.api.openai.APIError as error:
            raise StatesLost(str(self.api.failure(error))) from error
        file = written_file(reply.model_dump(warnings=False), self.server.folder)
        if file is None:
            raise BeagleError(
                f"'{self.server.url}' hands over no hidden states; start vLLM 0.32 or later with {self._how()}"
            )
        return file

    def _read(self, file: Path) -> dict[str, Tensor]:
        try:
            wait_for_file(file, self.server.patience)
            return load_file(file)
        except TimeoutError as error:
            raise StatesLost(f"'{file}' was not written in {self.server.patience:g} seconds; {AGAIN}") from error
        except FileNotFoundError as error:
            raise StatesLost(
                f"'{file}' isn't there; give the folder that the server writes to, as it is called on this machine, and see "
                f"the server's log: its disk may be full; then {AGAIN}"
            ) from error
        except (OSError, SafetensorError) as error:
            raise StatesLost(
                f"'{file}' was not written whole ({first_line(error)}): the disk may be full; free space, then {AGAIN}"
            ) from error
        finally:
            discard(file)

    def _checked(self, content: dict[str, Tensor], sample: Sample) -> Tensor:
        """The states as ours are: the top one normed, all of them side by side."""
        states, tokens = content.get("hidden_states"), content.get("token_ids")
        if states is None or tokens is None or not torch.equal(tokens.long(), sample.tokens.long()):
            raise BeagleError(
                f"the server's states are of other tokens than were asked for; let nobody else write to "
                f"'{self.server.folder}', then {AGAIN}"
            )
        wanted = (len(sample.tokens), len(self.layers), self.target.hidden_size)
        if states.shape != wanted:
            raise BeagleError(
                f"'{self.server.url}' gives states of {states.shape[1]} layers of width {states.shape[-1]}, and "
                f"layers {self.layers} of width {self.target.hidden_size} are wanted of {self.target.name}; serve it with "
                f"{self._how()}"
            )
        self.width = states.element_size()
        refuse_not_finite(states, self.target, f"the answer to prompt {sample.id}")
        weight = next(self.norm.parameters())
        with torch.no_grad():
            top = self.norm(states[:, -1].to(weight.device, weight.dtype)).to(states.device, states.dtype)
        return torch.cat([*states[:, :-1].unbind(1), top], dim=-1)

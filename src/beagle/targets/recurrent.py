"""Layers with a recurrent state (Mamba, gated delta nets and others), computed by transformers' own modules.

Such a module asks a cache for its states and hands it new ones. Ours answers by ``targets.chains``: tokens that
were accepted since the state that is kept run again in front of the new ones, and their outputs are dropped.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beagle.limits import MAX_TREE_TOKENS
from beagle.targets.attention import current_plan
from beagle.targets.chains import Chains, State
from beagle.targets.plan_cache import PlanCache, is_open

Outputs = tuple[Tensor | None, ...]  # of a module
MOST_AGAIN = 16  # tokens that a layer runs again in front of new ones; of more it keeps a new state first


class LayerStates:
    """In the place of transformers' cache for one call of one module; states have one sequence for each of the call."""

    def __init__(self, states: State) -> None:
        """
        Args:
            states: before the call, ``[batch, ...]`` each, which modules may write into; empty: nothing has run.
        """
        self.states = states
        self._known = bool(states)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self._known

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.states.get(("convolution", state_idx)) if self._known else None

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.states.get(("recurrent", state_idx)) if self._known else None

    def update_conv_state(
        self,
        conv_states: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Keep the last inputs of a convolution; returns those kept before and the new ones, ``[batch, channels, n]``."""
        before = self.get_conv_state(layer_idx, state_idx)
        if before is not None:
            size = before.shape[-1]
            whole = torch.cat([before, conv_states], dim=-1)
        else:
            size = conv_kernel_size or conv_states.shape[-1]
            whole = F.pad(conv_states, (max(0, size - conv_states.shape[-1]), 0))
        self.states["convolution", state_idx] = whole[..., -size:].clone()  # not all of a prompt's
        return whole

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        self.states["recurrent", state_idx] = recurrent_states
        return recurrent_states


class Scan:
    """A module's ``forward``, with the settings that Mamba 2 scans an answer's tokens with as single steps compute them.

    On a CPU chunks are as short as a pass of few tokens is: transformers fills the last one up to its whole size, of some
    hundred tokens, which takes longer than all else in such a pass. What it computes is the same with chunks of any size.
    Single steps of transformers' leave out the limits of time steps that its scans have (Zamba 2, Nemotron-H).
    """

    def __init__(self, module: nn.Module, own: Callable[..., Any]) -> None:
        """
        Args:
            module: has the settings as attributes, ``chunk_size`` and ``time_step_limit``, or none of them.
            own: its ``forward``.
        """
        self.own, self._module = own, module

    def __call__(self, inputs: Tensor, steps: bool, *arguments: Any, **options: Any) -> Any:
        """The module's outputs.

        Args:
            inputs: ``[batch, tokens, hidden]``, which are among the arguments.
            steps: whether the tokens are an answer's, which plain decoding runs one at a time.
            *arguments: of the call.
            **options: of the call, by name.
        """
        tokens, own = inputs.shape[1], vars(self._module)
        settings: dict[str, Any] = {}
        if inputs.device.type == "cpu" and 1 < tokens < int(own.get("chunk_size") or 0):
            settings["chunk_size"] = tokens
        if steps and "time_step_limit" in own:
            settings["time_step_limit"] = (0.0, math.inf)
        before = {name: own[name] for name in settings}
        own.update(settings)
        try:
            return self.own(*arguments, **options)
        finally:
            own.update(before)


class _Call:
    """A module's call, to be made with other tokens and states.

    Attributes:
        hidden: the tokens' inputs that the module was given, ``[batch, tokens, hidden]``.
        gives_tuple: whether the module returns several things.
    """

    def __init__(self, scan: Scan, prompt: bool, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """
        Args:
            scan: of the module.
            prompt: whether the tokens are a prompt's.
            arguments: of the call; the first tensor among them is what the module computes from.
            options: of the call, by name.
        """
        self._scan, self._prompt, self._positional = scan, prompt, len(arguments)
        named: dict[Any, Any] = dict(enumerate(arguments)) | options
        self._first, self.hidden = next((name, value) for name, value in named.items() if isinstance(value, Tensor))
        # no mask: no sequence is padded
        self._given = {name: None if is_open(value) else value for name, value in named.items()}
        self.gives_tuple = False

    def __call__(self, inputs: Tensor, states: LayerStates) -> Outputs:
        """The call with other ``inputs [batch, tokens, hidden]``, and states in the cache's place."""
        given = {name: states if isinstance(value, PlanCache) else value for name, value in self._given.items()}
        given[self._first] = inputs
        arguments = [given.pop(i) for i in range(self._positional)]
        steps = bool(states.states) and not self._prompt
        found = self._scan(inputs, steps, *arguments, **given)
        self.gives_tuple = isinstance(found, tuple)
        return found if self.gives_tuple else (found,)


class RecurrentForward:
    """In the place of a module's ``forward``."""

    def __init__(self, scan: Scan, number: int, one_by_one: bool) -> None:
        """
        Args:
            scan: of the module.
            number: of the layer among recurrent ones.
            one_by_one: behind a state, the module takes one token at a time.
        """
        self.scan = scan
        self._number, self._one_by_one = number, one_by_one

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        plan = current_plan.get(None)
        if plan is None or plan.chains is None:
            return self.scan.own(*arguments, **options)
        call = _Call(self.scan, plan.kind == "prompt", arguments, options)
        flat = plan.sequences is not None
        pieces = call.hidden[0].split(plan.chains.counts) if flat else call.hidden.unbind(0)
        found = [
            None if parts[0] is None else torch.cat(parts)[None] if flat else torch.stack(parts)
            for parts in zip(*self._run(call, list(pieces), plan.chains), strict=True)
        ]
        return tuple(found) if call.gives_tuple else found[0]

    def _run(self, call: _Call, pieces: list[Tensor], chains: Chains) -> list[Outputs]:
        """Outputs ``[tokens, ...]`` of each sequence's new tokens; those of one length share a call."""
        tracks = [own[self._number] for own in chains.tracks]
        alike: dict[tuple[bool, int], list[tuple[int, int]]] = defaultdict(list)
        passes = zip(tracks, chains.starts, chains.committed, pieces, strict=True)
        for i, (track, start, committed, piece) in enumerate(passes):
            seen = track.cut(start, committed)
            if start - seen > MOST_AGAIN:
                _, states = self._call(call, [track.states[seen]], track.since(seen)[None])
                track.states[start] = states[0][-1]
                seen = start
            track.append(piece)
            alike[seen == 0, start + len(piece) - seen].append((i, seen))
        outputs: list[Outputs] = [()] * len(pieces)
        for (_, length), group in alike.items():
            before = [tracks[i].states[seen] for i, seen in group]
            inputs = torch.stack([tracks[i].since(seen) for i, seen in group])
            found, states = self._call(call, before, inputs)
            for j, (i, seen) in enumerate(group):
                new, end = len(pieces[i]), seen + length
                tracks[i].states |= {end - k: own for k, own in enumerate(reversed(states[j]))}
                if new > MAX_TREE_TOKENS:  # a prompt, none of which is rejected
                    tracks[i].restart(end, tracks[i].states[end])
                outputs[i] = tuple(None if part is None else part[j, -new:] for part in found)
        return outputs

    def _call(self, call: _Call, before: list[State], inputs: Tensor) -> tuple[Outputs, list[list[State]]]:
        """Outputs ``[sequences, tokens, ...]``, and of each sequence its last states in the order of its tokens."""
        steps = inputs.split(1, dim=1) if self._one_by_one and before[0] else [inputs]
        outputs: list[Outputs] = []
        made: list[list[State]] = [[] for _ in before]
        for step in steps:
            # copies, for modules write into them
            held = LayerStates({key: torch.cat([own[key] for own in before]).clone() for key in before[0]})
            outputs.append(call(step, held))
            before = [{key: value[i : i + 1] for key, value in held.states.items()} for i in range(len(before))]
            for own, state in zip(made, before, strict=True):
                own.append(state)
        whole = [None if parts[0] is None else torch.cat(parts, dim=1) for parts in zip(*outputs, strict=True)]
        return tuple(whole), made


def wrap(module: nn.Module, number: int, one_by_one: bool) -> None:
    """Let a module with a recurrent state run the chains of a plan.

    Args:
        module: asks a cache for its states.
        number: of the layer among recurrent ones.
        one_by_one: as of ``RecurrentForward``.
    """
    own = module.forward
    scan = own.scan if isinstance(own, RecurrentForward) else Scan(module, own)
    module.forward = RecurrentForward(scan, number, one_by_one)

"""Layers with a recurrent state (Mamba, gated delta nets and others), computed by transformers' own modules.

Such a module asks a cache for its states and hands it new ones. Ours answers by ``targets.recurrent_cache``: tokens that
were accepted since the state that is kept run again in front of the new ones, and their outputs are dropped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beagle.targets.attention import current_plan
from beagle.targets.plan_cache import PlanCache, is_open
from beagle.targets.recurrent_cache import Chains, State, is_prompt

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


class RecurrentForward:
    """In the place of a module's ``forward``."""

    def __init__(self, own: Callable[..., Any], number: int, one_by_one: bool) -> None:
        """
        Args:
            own: the module's ``forward``.
            number: of the layer among recurrent ones.
            one_by_one: behind a state, the module takes one token at a time.
        """
        self.own = own
        self._number, self._one_by_one = number, one_by_one

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        plan = current_plan.get(None)
        if plan is None or plan.chains is None:
            return self.own(*arguments, **options)
        named = dict(enumerate(arguments)) | options
        first, hidden = next((name, value) for name, value in named.items() if isinstance(value, Tensor))

        def call(inputs: Tensor, states: LayerStates) -> Any:
            """The module, with states in the cache's place, and no mask: no sequence is padded."""
            given = {
                name: states if isinstance(value, PlanCache) else None if is_open(value) else value
                for name, value in named.items()
            } | {first: inputs}
            return self.own(*(given.pop(i) for i in range(len(arguments))), **given)

        pieces = hidden[0].split(plan.chains.counts) if plan.sequences is not None else hidden.unbind(0)
        parts = self._run(call, list(pieces), plan.chains)
        return torch.cat(parts)[None] if plan.sequences is not None else torch.stack(parts)

    def _run(self, call: Callable[..., Any], pieces: list[Tensor], chains: Chains) -> list[Tensor]:
        """Outputs ``[tokens, hidden]`` of each sequence's new tokens; those of one length share a call."""
        before: list[State] = []
        inputs: list[Tensor] = []
        tracks = [own[self._number] for own in chains.tracks]
        known: list[int] = []  # tokens that each state has seen
        for track, start, piece in zip(tracks, chains.starts, pieces, strict=True):
            state, again = track.at(start)
            if again is not None and len(again) > MOST_AGAIN:
                _, made = self._call(call, [state], again[None])
                state, again = made[0][-1], None
            before.append(state)
            known.append(start - (len(again) if again is not None else 0))
            inputs.append(torch.cat([again, piece]) if again is not None else piece)
        alike: dict[tuple[bool, int], list[int]] = defaultdict(list)
        for i, (state, given) in enumerate(zip(before, inputs, strict=True)):
            alike[bool(state), len(given)].append(i)
        outputs: list[Tensor] = [pieces[0]] * len(pieces)
        for group in alike.values():
            together = torch.stack([inputs[i] for i in group])
            found, states = self._call(call, [before[i] for i in group], together)
            for j, i in enumerate(group):
                end = known[i] + len(inputs[i])
                made = {end - k: own for k, own in enumerate(reversed(states[j]))}
                if is_prompt(len(pieces[i])):
                    tracks[i].keep({end: made[end]}, None)
                else:
                    tracks[i].keep({known[i]: before[i], **made}, inputs[i])
                outputs[i] = found[j, -len(pieces[i]) :]
        return outputs

    def _call(self, call: Callable[..., Any], before: list[State], inputs: Tensor) -> tuple[Tensor, list[list[State]]]:
        """Outputs ``[sequences, tokens, hidden]``, and of each sequence its last states in the order of its tokens."""
        steps = inputs.split(1, dim=1) if self._one_by_one and before[0] else [inputs]
        outputs: list[Tensor] = []
        made: list[list[State]] = [[] for _ in before]
        for step in steps:
            # copies, for modules write into them
            held = LayerStates({key: torch.cat([own[key] for own in before]).clone() for key in before[0]})
            found = call(step, held)
            outputs.append(found[0] if isinstance(found, tuple) else found)
            before = [{key: value[i : i + 1] for key, value in held.states.items()} for i in range(len(before))]
            for own, state in zip(made, before, strict=True):
                own.append(state)
        return torch.cat(outputs, dim=1), made


def wrap(module: nn.Module, number: int, one_by_one: bool) -> None:
    """Let a module with a recurrent state run the chains of a plan.

    Args:
        module: asks a cache for its states.
        number: of the layer among recurrent ones.
        one_by_one: as of ``RecurrentForward``.
    """
    own = module.forward
    module.forward = RecurrentForward(own.own if isinstance(own, RecurrentForward) else own, number, one_by_one)

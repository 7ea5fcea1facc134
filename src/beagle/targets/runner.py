"""Who computes a pass: the eager runner, or a faster one that has shown to agree with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from beagle.errors import BeagleError
from beagle.targets.attention import current_plan
from beagle.targets.cache import KVCache
from beagle.targets.own_attention import OWN, OwnCache
from beagle.targets.plan import EXACT_BLOCK, Kind, Plan, Windows, of_exact_tree, of_tree, of_trees
from beagle.targets.plan_cache import ASKED, PlanCache
from beagle.targets.shape import TreeShape


class Runner(Protocol):
    """Computes the hidden states of a plan."""

    def takes(self, plan: Plan) -> bool:
        """Whether it can run this plan."""

    def __call__(self, tokens: Tensor, plan: Plan) -> Tensor:
        """``[batch, tokens]`` ids to hidden states ``[batch, tokens, state_size]``; writes fresh keys and values."""


class FastRunner(Runner, Protocol):
    """Does what the eager runner does, faster.

    Attributes:
        name: for records of what was run.
        remedy: what to do where it goes wrong.
        exact: a token of a tree gets the bits that it would get alone, so that exact mode needs no passes of its own.
    """

    name: str
    remedy: str
    exact: bool

    @property
    def kinds(self) -> frozenset[Kind]:
        """Of plans that it computes."""

    def new_cache(self, capacity: int) -> KVCache | None:
        """A cache of one sequence for it; None: any will do, or there is none left."""


_outputs: ContextVar[list[Tensor]] = ContextVar("outputs")  # of tapped layers, in the pass under way


def tap(base: nn.Module, layers: Sequence[int], count: int, name: str) -> None:
    """Let ``run_layers`` give the outputs of some layers, too.

    Args:
        layers: their numbers, from 1 on, ascending.
    Raises:
        BeagleError: there are no such layers.
    """
    if not layers:
        return
    lists = [module for module in base.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if not lists or not 1 <= layers[0] <= layers[-1] < count:
        raise BeagleError(
            f"{name}: no outputs of layers {', '.join(map(str, layers))}; it has {count} layers, of which "
            f"1 to {count - 1} can be read beside the top state"
        )
    for layer in layers:
        lists[0][layer - 1].register_forward_hook(_keep_output)


def _keep_output(module: nn.Module, inputs: Any, output: Any) -> None:
    found = _outputs.get(None)
    if found is not None:
        found.append(output[0] if isinstance(output, tuple) else output)


def run_layers(base: nn.Module, plan: Plan, **inputs: Any) -> Tensor:
    """The model without its LM head under a plan; inputs are ``input_ids`` or ``inputs_embeds``.

    Returns:
        Hidden states: outputs of the tapped layers, then the top state, ``[batch, tokens, state_size]``.
    """
    if (windows := base.__dict__.get(OWN)) is not None:
        inputs |= OwnCache(plan, windows).inputs(base.__dict__[ASKED])
    elif name := base.__dict__.get(ASKED):
        inputs |= PlanCache(plan).inputs(name)
    token, outputs = current_plan.set(plan), _outputs.set([])
    try:
        top: Tensor = base(position_ids=plan.positions, use_cache=False, **inputs)[0]
        found = _outputs.get()
        return torch.cat([*found, top], dim=-1) if found else top
    finally:
        _outputs.reset(outputs)
        current_plan.reset(token)


class Eager:
    """transformers' own modules, any plan. Implements ``Runner``."""

    def __init__(self, base: nn.Module) -> None:
        self._base = base

    def takes(self, plan: Plan) -> bool:
        return True

    def __call__(self, tokens: Tensor, plan: Plan) -> Tensor:
        return run_layers(self._base, plan, input_ids=tokens)


class Graph(nn.Module):
    """Passes of one kind as a function of tensors, to be compiled or captured."""

    def __init__(self, base: nn.Module, kind: Kind, windows: Windows) -> None:
        """
        Args:
            base: the model without its LM head, with our attention.
            windows: of their masks, in their order.
        """
        super().__init__()
        self.base = base
        self.kind = kind
        self.windows = windows

    def forward(self, embeddings: Tensor, tensors: list[Tensor]) -> Tensor:
        """
        Args:
            embeddings: ``[1, tokens, hidden]``.
        Returns:
            Hidden states ``[1, tokens, state_size]``.
        """
        plan = Plan.of_tensors(self.kind, self.windows, tensors)
        return run_layers(self.base, plan, inputs_embeds=embeddings)


class Checked:
    """A faster runner, compared with the eager one on an example of each kind of plan before it is first used."""

    def __init__(
        self, runner: FastRunner, eager: Runner, example: Callable[[Kind], tuple[Tensor, Plan]], name: str, hidden: int
    ) -> None:
        self.runner = runner
        self._eager, self._example, self._name, self._hidden = eager, example, name, hidden
        self._agreed: set[Kind] = set()

    def takes(self, plan: Plan) -> bool:
        return self.runner.takes(plan)

    def __call__(self, tokens: Tensor, plan: Plan) -> Tensor:
        if plan.kind not in self._agreed:
            self.check(plan.kind)
        return self.runner(tokens, plan)

    def check(self, kind: Kind) -> None:
        """Refuse a runner that gives other states than the eager one, beyond rounding."""
        tokens, plan = self._example(kind)
        if not self.runner.takes(plan):
            return
        states, expected = self.runner(tokens, plan), self._eager(tokens, plan)
        same = states.shape == expected.shape
        for own, of in zip(*(part.split(self._hidden, dim=-1) for part in (states, expected)), strict=same):
            same = same and bool((own - of).abs().max() / of.abs().max() < 0.1)  # NaN is not
        if not same:
            raise BeagleError(
                f"{self._name}: the {self.runner.name} pass computes something else; {self.runner.remedy}"
            )
        self._agreed.add(kind)


@torch.no_grad()
def example(
    kind: Kind, new_cache: Callable[[int, int], KVCache], windows: Windows, vocab_size: int, eager: Runner | None
) -> tuple[Tensor, Plan]:
    """A small plan of a kind, with its ids ``[1, tokens]``: trees behind a context, or contexts of unequal length.

    Args:
        eager: runs the contexts; None: they stay empty.
    """
    contexts = [3, 6, 5] if kind == "trees" else [6]
    tree = TreeShape([-1, 0, 0, 1])
    trees = [TreeShape.chain(2), tree, TreeShape([-1])] if kind == "trees" else [tree]
    # more slots than a plan sees: a graph that is made of it must not take the two for one number
    cache = new_cache(4 if kind == "trees" else 1, 2 * EXACT_BLOCK)
    before, n = sum(contexts), sum(len(tree.parents) for tree in trees)
    # drawn, not counted: the first ids of a vocabulary are special, and rounding among them is ten times as large
    ids = torch.randint(vocab_size, (1, before + n), generator=torch.Generator().manual_seed(0)).to(cache.device)
    if eager is not None:
        eager(ids[:, :before], of_trees(cache, [TreeShape.chain(length) for length in contexts], windows))
    cache.lengths[: len(contexts)] = contexts
    if kind == "trees":
        plan = of_trees(cache, trees, windows)
    elif kind == "exact":
        plan = of_exact_tree(cache, tree, EXACT_BLOCK, n, windows)
    else:
        plan = of_tree(cache, tree, windows)
    return ids[:, before:], plan

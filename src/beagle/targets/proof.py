"""Whether a target's passes give the hidden states that the model itself gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from beagle.errors import BeagleError
from beagle.targets.passes import Passes
from beagle.targets.shape import TreeShape

CACHE_NAMES = ("cache", "past_key_values")  # under which a model without its LM head takes a cache; 5.17: the second
# by which states may differ from the model's own, as a share of their size (see ``difference``): rounding only
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.05}


class Different(BeagleError):
    """A pass gives other hidden states than the model itself."""


def prove(target: Passes, ids: Tensor, expected: Tensor) -> None:
    """
    Args:
        target: runs the ids as a prompt, single tokens and a tree.
        ids: ``[n]``.
        expected: the model's own states of them ``[n, hidden]``.
    Raises:
        BeagleError: some kind of pass gives others, beyond rounding; or they are no numbers.
    """
    if not expected.isfinite().all():
        raise BeagleError(
            f"{target.name}: its states are no finite numbers; load it with dtype float32, or check its weights"
        )
    n = len(ids)
    tree, shape, path = ids.new_zeros(6), TreeShape([-1, 0, 0, 2, 2, 3]), [0, 2, 3, 5]
    if target.chains_only:
        shape, path = TreeShape.chain(6), [0, 1, 2, 3]
    begin = prompt_of(n)
    if begin < 2:
        return  # a context of a few tokens: nothing to draft in
    steps = n - begin - 5
    cache = target.new_cache(1, n + len(tree))
    prompt = target.prefill(ids[None, :begin], cache)[0]
    singles = []
    for at in range(begin, begin + steps):
        singles.append(target.verify(cache, ids[at : at + 1], TreeShape([-1])))
        cache.compact([0])
    at = begin + steps
    tree[path] = ids[at : at + 4]
    tree[[i for i in range(6) if i not in path]] = (ids[at + 1 : at + 3] + 1) % target.vocab_size
    drafted = target.verify(cache, tree, shape)[path]
    cache.compact(path)
    singles.append(target.verify(cache, ids[n - 1 :], TreeShape([-1])))
    refuse_difference(prompt, expected[:begin], "a prompt", target.name)
    refuse_difference(
        torch.cat(singles), torch.cat([expected[begin:at], expected[n - 1 :]]), "single tokens", target.name
    )
    refuse_difference(drafted, expected[at : at + 4], "a tree", target.name)


def prompt_of(n: int) -> int:
    """How many of ``n`` ids ``prove`` runs as a prompt; single tokens and a tree follow."""
    return n - min(4, n - 7) - 5


def by_steps(model: nn.Module, ids: Tensor) -> Tensor:
    """Hidden states ``[n, hidden]`` as transformers' own decoding has them: a prompt, then a token at a time.

    Args:
        model: the causal LM without its LM head, with its own attention.
        ids: ``[n]``, of which ``prompt_of`` are the prompt.
    """
    begin = prompt_of(len(ids))
    name = next(name for name in CACHE_NAMES if name in inspect.signature(model.forward).parameters)
    out = model(input_ids=ids[None, :begin], use_cache=True)
    states = [out[0][0]]
    for at in range(begin, len(ids)):
        out = model(input_ids=ids[None, at : at + 1], use_cache=True, **{name: getattr(out, name)})
        states.append(out[0][0])
    return torch.cat(states)


def first_equal(run: Callable[[int], tuple[Tensor, ...]], least: int, most: int) -> int:
    """The least number of tokens from which on each token's results have the same bits, up to ``most`` tokens.

    Args:
        run: results of the first so many tokens, ``[tokens, ...]`` each.
        least: where to stop.
        most: tokens of the results that the others are compared with.
    """
    whole = run(most)
    for n in range(most - 1, least - 1, -1):
        if not all(torch.equal(some, all_of[:n]) for some, all_of in zip(run(n), whole, strict=True)):
            return n + 1
    return least


def difference(states: Tensor, expected: Tensor) -> float:
    """How far hidden states ``[n, hidden]`` are from others, as a share of their size.

    In fp32 that of the worst token. In half precision the median token's: rounding may send a single token to
    another expert, while a wrong mask, position or scale moves most of them.
    """
    gaps = (states.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
    if gaps.isnan().any():
        return float("nan")
    return float(gaps.max() if expected.dtype == torch.float32 else gaps.median())


def refuse_difference(states: Tensor, expected: Tensor, what: str, name: str) -> None:
    """
    Args:
        states: ``[n, hidden]`` of one kind of pass.
        expected: the model's own.
        what: names the kind.
        name: of the target.
    Raises:
        Different: by more than rounding.
    """
    gap = difference(states, expected)
    if not gap < TOLERANCE[expected.dtype]:  # also catches NaN
        raise Different(
            f"{name}: {what} gives other hidden states here than in the model itself (by {gap:.2g} of their "
            "size), so this family computes something that can't be served; choose a model with plain "
            "attention in every layer"
        )


def given_positions(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """What transformers' ``generate`` tells a causal LM of a text's positions: ids ``[n]`` to ``[1, n]``, or nothing."""
    # 5.17 and 5.24: generation/utils.py: _prepare_position_ids_for_generation
    takes = "position_ids" in inspect.signature(model.forward).parameters
    return {"position_ids": torch.arange(len(ids), device=ids.device)[None]} if takes else {}


def at_positions(model: nn.Module, whole: nn.Module, ids: Tensor, expected: Tensor) -> Tensor | None:
    """States ``[n, hidden]`` at positions from 0 on, of a model that numbers its tokens otherwise where it isn't told.

    transformers' ``generate`` gives it positions from 0 on, if its ``forward`` takes any (RoBERTa).

    Args:
        model: a causal LM with its own attention.
        whole: it without its LM head.
        ids: ``[n]``.
        expected: its states of them without positions ``[n, hidden]``.
    Returns:
        None: it takes no positions, so that those of a tree can't be given theirs. Where it numbers tokens from 0 on
        anyway, the states are ``expected``, up to rounding.
    """
    if not (given := given_positions(model, ids)):
        return None

    def states_at(positions: Tensor) -> Tensor:
        states: Tensor = whole(input_ids=ids[None], position_ids=positions, use_cache=False)[0][0]
        return states.to(expected.dtype)

    try:
        states = states_at(given["position_ids"])
        same = difference(states_at(given["position_ids"] // 2), states) < TOLERANCE[expected.dtype]
        return None if same else states
    except (TypeError, LookupError, RuntimeError):
        return None

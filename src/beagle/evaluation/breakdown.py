"""Where a compiled pass spends its time, by sort of operation.

A compiled library can't be timed inside. So its products and its attention are run again by themselves, at the same
shapes and with as many weights, and the rest is what they leave of the pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import groupby
from statistics import median
from typing import Any

import torch
from torch import Tensor

from beagle.memory import collapse, huge_pages_wanted
from beagle.targets.attention import attend_plan
from beagle.targets.cache import KVCache
from beagle.targets.linears import tiled
from beagle.targets.linears.packed import packed
from beagle.targets.linears.quantized import VectorQuantizer, quantized
from beagle.targets.plan import Plan, of_tree
from beagle.targets.shape import TreeShape
from beagle.targets.target import Target

TOKENS = (1, 8, 12, 16)
ENOUGH = 2**30  # bytes of weights that are multiplied again: more than caches hold; the time of others is inferred
REPEATS = 15
CALLS = 100
Shape = tuple[int, int]  # inputs and outputs of a product
Product = tuple[int, Callable[[Tensor], Tensor]]  # with a weight, after its number of inputs


@torch.no_grad()
def breakdown(target: Target, context: int) -> list[dict[str, float]]:
    """Milliseconds of passes and of their parts, an entry for each of ``TOKENS``; empty if passes aren't compiled on a CPU.

    An entry has ``rows`` (tokens of the pass), ``ms`` of the whole pass with its LM head, and its parts ``products_ms``,
    ``attention_ms``, ``lm_head_ms``, ``python_ms`` (making masks) and ``rest_ms`` (norms, element-wise operations,
    copies, calling the library). ``meetings_ms`` is a share of the first two: what starting and joining the threads of
    their ``products`` and attentions takes.

    Args:
        target: a model with ``layers`` that run as one library.
    """
    if target.compiled is None or target.device.type != "cpu":
        return []
    cache = target.new_cache(1, context + TOKENS[-1])
    target.prefill(torch.ones(1, context, dtype=torch.long), cache)
    shapes = product_shapes(target)
    products, share = _products(target, shapes)
    out: list[dict[str, float]] = []
    for n in TOKENS:
        times = _medians(_works(target, cache, products, n))
        times["products_ms"] *= share
        meeting = max(0.0, times.pop("together") - times.pop("alone")) / CALLS
        parts = sum(times[f"{part}_ms"] for part in ("products", "attention", "lm_head", "python"))
        times["rest_ms"] = max(0.0, times["ms"] - parts)
        times["meetings_ms"] = meeting * (len(shapes) + len(target.layers.shapes))
        out.append({"rows": n, **{name: round(ms, 4) for name, ms in times.items()}, "products": len(shapes)})
    return out


def _works(target: Target, cache: KVCache, products: list[Product], n: int) -> dict[str, Callable[[], object]]:
    """What is timed of a pass of ``n`` tokens, by the name of its time."""
    tokens, shape, windows = (
        torch.ones(n, dtype=torch.long),
        TreeShape([-1] + [0] * (n - 1)),
        target.layers.distinct_windows,
    )
    plan = of_tree(cache, shape, windows)
    states = target.run(tokens[None], plan)[0]
    inputs = {size: torch.randn(n, size).to(target.dtype) for size, _ in products}
    return {
        "ms": lambda: target.logits(target.verify(cache, tokens, shape)).argmax(-1).tolist(),
        "products_ms": lambda: [product(inputs[size]) for size, product in products],
        "attention_ms": _attention(target, plan, n),
        "lm_head_ms": lambda: target.logits(states),
        "python_ms": lambda: of_tree(cache, shape, windows).tensors(),
        "alone": _small_products(1),
        "together": _small_products(torch.get_num_threads()),
    }


def product_shapes(target: Target) -> list[Shape]:
    """Inputs and outputs of each product of a pass; layers that read the same tensor one after the other are one."""
    calls: list[tuple[Tensor, int, int]] = []  # holds the inputs, so that no two have the same id

    def note(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        calls.append((inputs[0], layer.in_features, layer.out_features))

    layers = [m for m in target.base.modules() if hasattr(m, "in_features") and hasattr(m, "out_features")]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        cache = target.new_cache(1, 2)
        shape = TreeShape([-1])
        target.eager(torch.ones(1, 1, dtype=torch.long), of_tree(cache, shape, target.layers.distinct_windows))
    finally:
        for hook in hooks:
            hook.remove()
    out = []
    for _, group in groupby(calls, key=lambda call: id(call[0])):
        members = list(group)
        out.append((members[0][1], sum(outputs for _, _, outputs in members)))
    return out


def _products(target: Target, shapes: list[Shape]) -> tuple[list[Product], float]:
    """Products with weights of these shapes, and by what their time is multiplied.

    The weights are random ones, in the dtype and quantisation of the target.
    """
    made: list[Product] = []
    quantizer, entries = VectorQuantizer(), 0
    for inputs, outputs in shapes:
        if entries * target.dtype.itemsize > ENOUGH:
            break
        weight = torch.randn(outputs, inputs).to(target.dtype)
        apply = quantized(weight, None, target.quantize, quantizer) if target.quantize else None
        made.append((inputs, apply or packed(weight)))
        entries += inputs * outputs
    if huge_pages_wanted():
        collapse()  # as the weights of the pass lie
    return made, sum(inputs * outputs for inputs, outputs in shapes) / entries


def _attention(target: Target, plan: Plan, tokens: int) -> Callable[[], None]:
    """Attention of all layers of a pass."""
    about = target.layers
    calls: list[tuple[Any, ...]] = []
    for i, shape in enumerate(about.shapes):
        if not about.heads[i]:
            continue  # a convolution
        query = torch.randn(1, about.heads[i], tokens, shape.key_dim).to(target.dtype)
        keys, values = (tensor[:, :, : plan.keys] for tensor in plan.layers[2 * i : 2 * i + 2])
        calls.append((plan, query, keys, values, shape.key_dim**-0.5, about.windows[i], about.softcaps[i], None))

    def run() -> None:
        for call in calls:
            attend_plan(*call)

    return run


def _small_products(threads: int) -> Callable[[], None]:
    """The least that so many threads can be asked for by the CPU kernel, ``CALLS`` times; nothing without it."""
    x, weight = torch.ones(1, 32, dtype=torch.bfloat16), torch.ones(32 * threads, 32, dtype=torch.bfloat16)

    def run() -> None:
        for _ in range(CALLS if tiled.loaded() else 0):
            torch.ops.beagle.tiled_linear(x, weight, None)

    return run


def _medians(works: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds of each, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(REPEATS + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if turn:  # the first warms up
                times[name].append(1000 * (time.perf_counter() - began))
    return {name: median(each) for name, each in times.items()}

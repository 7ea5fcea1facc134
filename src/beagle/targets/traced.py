"""Reads off a module's own arithmetic which attention it computes, with tensors that have a shape and no numbers.

A module whose attention doesn't go through transformers' attention interface still hands its keys and values to a cache,
and computes with what the cache returns. ``Traced`` stands there in their place: it takes the module's query where the
module multiplies it with the keys, follows the scores through scales, biases and masks, and gives the attention of the
query where the module multiplies weights with values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

Role = Literal["keys", "values", "scores", "weights"]
PRODUCTS = {"matmul", "bmm", "rmatmul"}
SCALES = {"mul", "imul", "rmul", "multiply", "div", "idiv", "truediv", "itruediv", "divide", "true_divide"}
SUMS = {"add", "iadd", "radd", "sub", "isub"}
# that change the form of a tensor, or ask for it
FORMS = {
    "view", "reshape", "transpose", "permute", "contiguous", "to", "float", "half", "bfloat16", "type", "type_as", "get",
    "size", "dim", "numel", "len", "getitem", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "expand_as",
    "broadcast_to", "repeat_interleave", "detach", "clone", "is_floating_point", "view_as", "swapaxes", "t", "is_complex",
}  # fmt: skip


class NotAttention(Exception):
    """A module computes something else with its keys, scores or values than attention."""


@dataclass(frozen=True)
class Attention:
    """What a module computes up to now.

    Attributes:
        role: what the tensor that goes with it stands for.
        finish: takes this when the module multiplies weights with values, and gives the product
            ``[batch, heads, queries, value_dim]``.
        query: ``[batch, heads, queries, head_dim]``, or batch and heads in one.
        scale: of the product of query and keys.
        added: to the scores, each with a factor.
        hidden: scores that are taken out, bool, where true.
        causal: whether a query sees no later key.
    """

    role: Role
    finish: Callable[[Attention], Tensor]
    query: Tensor | None = None
    scale: float = 1.0
    added: tuple[tuple[Tensor, float], ...] = ()
    hidden: tuple[Tensor, ...] = ()
    causal: bool = False


class Traced(Tensor):
    """In the place of keys, values, scores or weights of a module's attention.

    Attributes:
        of: what the module computes up to now.
        stands_on: the device of what it stands for.
    """

    of: Attention
    stands_on: torch.device

    @classmethod
    def like(cls, shape: Tensor, of: Attention, stands_on: torch.device) -> Traced:
        made = torch.empty(shape.shape, dtype=shape.dtype, device="meta").as_subclass(cls)
        made.of, made.stands_on = of, stands_on
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """PyTorch's hook for its functions of such tensors."""
        with torch._C.DisableTorchFunctionSubclass():
            return _call(func, tuple(args), dict(kwargs or {}))


def _call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function of PyTorch of which some argument is ``Traced``."""
    if func == Tensor.device.__get__:
        return args[0].stands_on
    name = func.__name__.strip("_")
    inputs = [*args, *kwargs.values()]
    traced = {value.of.role: value for value in inputs if isinstance(value, Traced)}
    others = [value for value in inputs if isinstance(value, Tensor) and not isinstance(value, Traced)]
    if name == "scaled_dot_product_attention" and {"keys", "values"} <= set(traced):
        return _fused(args, kwargs)
    form = func(*map(_formal, args), **{key: _formal(value) for key, value in kwargs.items()})
    if not isinstance(form, Tensor):
        return form
    if {"weights", "values"} <= set(traced) and name in PRODUCTS:
        done = traced["weights"].of
        return done.finish(done).reshape(form.shape)
    if name in FORMS and isinstance(args[0], Traced):
        traced = {args[0].of.role: args[0]}
    if len(traced) > 1:
        raise NotAttention(f"it calls {func.__name__} on {' and '.join(traced)}")
    ((role, value),) = traced.items()
    of = value.of
    if role == "keys" and name in PRODUCTS and len(others) == 1:
        of = replace(of, role="scores", query=others[0])
    elif role == "keys" and name == "baddbmm":
        bias, query = args[0], kwargs["batch1"] if "batch1" in kwargs else args[1]
        beta, alpha = float(kwargs.get("beta", 1)), float(kwargs.get("alpha", 1))
        of = replace(of, role="scores", query=query, scale=of.scale * alpha, added=((bias, beta),))
    elif role in ("keys", "scores") and name in SCALES and (factor := _factor(name, args)) is not None:
        added = tuple((bias, share * factor) for bias, share in of.added)
        of = replace(of, scale=of.scale * factor, added=added)
    elif role == "scores" and name in SUMS and len(others) == 1 and args[0] is value:
        of = replace(of, added=(*of.added, (others[0], -1.0 if "sub" in name else 1.0)))
    elif role == "scores" and name.startswith("masked_fill"):
        of = replace(of, hidden=(*of.hidden, args[1]))
    elif role == "scores" and name == "where" and args[1] is value:
        of = replace(of, hidden=(*of.hidden, ~args[0]))
    elif role == "scores" and name == "softmax":
        of = replace(of, role="weights")
    elif not (
        name in FORMS
        or (role == "weights" and name == "dropout")
        or (role == "scores" and name in ("max", "maximum") and _is_lowest(others))
    ):
        raise NotAttention(f"it calls {func.__name__} on {role}")
    return Traced.like(form, of, value.stands_on)


def _fused(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """PyTorch's fused attention of traced keys and values."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
    given = dict(zip(names, args, strict=False)) | kwargs
    query, mask, of = given["query"], given.get("attn_mask"), given["key"].of
    scale = given.get("scale")
    of = replace(of, role="weights", query=query, causal=bool(given.get("is_causal")))
    of = replace(of, scale=of.scale * (query.shape[-1] ** -0.5 if scale is None else float(scale)))
    if mask is not None:
        of = replace(of, hidden=(~mask,)) if mask.dtype == torch.bool else replace(of, added=((mask, 1.0),))
    return of.finish(of)


def _formal(value: Any) -> Any:
    """A tensor's shape without its numbers; lists of them, too."""
    if isinstance(value, Traced):
        return value.as_subclass(Tensor)
    if isinstance(value, Tensor):
        return torch.empty_like(value, device="meta")
    if isinstance(value, torch.device):
        return torch.device("meta")
    return type(value)(map(_formal, value)) if type(value) in (list, tuple) else value


def _factor(name: str, args: tuple[Any, ...]) -> float | None:
    """By which number keys or scores are multiplied; None: by no number, or they are what divides."""
    numbers = [float(value) for value in args if not isinstance(value, Tensor) or _is_number(value)]
    if len(numbers) != 1 or ("div" in name and not isinstance(args[0], Traced)):
        return None
    return 1 / numbers[0] if "div" in name else numbers[0]


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, Traced) and not value.dim() and not value.is_meta


def _is_lowest(others: list[Tensor]) -> bool:
    """Whether what scores are bounded by is the least number of a dtype, which hides nothing more."""
    return len(others) == 1 and not others[0].dim()

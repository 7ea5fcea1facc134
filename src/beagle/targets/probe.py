"""What a model's layers cache and see, found out at load by running them: nothing is guessed from names in its config.

Which keys a query sees stands in the masks that a model makes for its own attention. Here an attention function and
a mask function of ours stand in once: the mask function reads the sliding window off the rule that transformers
would build the mask by, and the attention function notes which layer is given which mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beagle.errors import BeagleError
from beagle.hf import AttentionInterface, AttentionMaskInterface, can_set_attention, own_attention
from beagle.targets.attention import NAME
from beagle.targets.cache import LayerShape
from beagle.targets.devices import device_of
from beagle.targets.family import base_of, context_limit
from beagle.targets.layers import Layers
from beagle.targets.mask_rules import chunk_of, window_of
from beagle.targets.own_attention import PROBED, Learning
from beagle.targets.plan import Plan, Window
from beagle.targets.plan_cache import PlanCache
from beagle.targets.proof import CACHE_NAMES
from beagle.targets.traced import NotAttention

PROBE = "beagle_probe"
TOKENS = 48  # of the pass that is probed
MOST_WINDOW = 1024  # sliding windows up to here are compared in numbers, larger ones by the rule of their mask alone
MOST_KEYS = 2**17  # how far the rule of a mask is read


class _Notes:
    """What one pass through the layers shows."""

    def __init__(self, name: str, keys: int) -> None:
        self.name, self.keys = name, keys
        self.made: list[tuple[Tensor, Window]] = []  # our masks, kept so that no other has their address
        self.calls: dict[int, int] = {}
        self.modules: dict[int, nn.Module | None] = {}
        self.shapes: dict[int, LayerShape] = {}
        self.heads: dict[int, int] = {}
        self.windows: dict[int, Window] = {}
        self.softcaps: dict[int, float | None] = {}
        self.sinks: dict[int, bool] = {}
        self.running: list[nn.Module] = []  # the innermost last
        self.recurrent: dict[nn.Module, int] = {}
        self.indices: dict[nn.Module | None, int] = {}
        self.named_layer: int | None = None  # as of ``Plan``

    def note(
        self,
        layer: int,
        shape: LayerShape,
        *,
        heads: int,
        window: Window,
        module: nn.Module | None = None,
        softcap: float | None = None,
        sinks: bool = False,
    ) -> None:
        """One call of a layer; without a ``module`` of a convolution."""
        self.calls[layer] = self.calls.get(layer, 0) + 1
        self.modules[layer], self.shapes[layer], self.heads[layer] = module, shape, heads
        self.windows[layer], self.softcaps[layer], self.sinks[layer] = window, softcap, sinks

    def window(self, mask: Tensor | None, hint: int | None) -> Window:
        """The window behind the mask that a layer was given; ``hint`` is what it says of itself."""
        if not isinstance(mask, Tensor):
            return hint
        for ours, window in self.made:
            if mask.data_ptr() == ours.data_ptr() and mask.dtype == ours.dtype:
                if window == 0:
                    raise self._refuse("tokens see later ones, for one")
                return window
        visible = mask if mask.dtype == torch.bool else mask == 0
        hidden = ~mask if mask.dtype == torch.bool else mask < -1e4
        n = mask.shape[-1]
        at = torch.arange(n, device=mask.device)
        age = at[:, None] - at
        if mask.shape[-2] == n and bool((visible | hidden).all()):
            found = int(visible.expand(1, 1, n, n)[0, 0, -1].sum()) if mask.shape[:2].numel() == 1 else 0
            if found and torch.equal(visible[0, 0], (age >= 0) & (age < found)):
                return found if found < n else hint
        raise self._refuse("it depends on the text")

    def refuse_unknown(self, given: dict[str, Any], window: Window) -> None:
        """
        Args:
            given: to a layer's attention, besides what ours knows.
            window: of the layer.
        Raises:
            BeagleError: it would be left out.
        """
        known = {"position_ids"} | ({"indices"} if self.indices and window is None else set())
        if others := sorted(name for name, value in given.items() if isinstance(value, Tensor) and name not in known):
            raise BeagleError(
                f"{self.name}: its attention also depends on {', '.join(others)}, which can't be served; choose a model with "
                "plain attention"
            )

    def _refuse(self, what: str) -> BeagleError:
        return BeagleError(
            f"{self.name}: its mask is neither causal nor a sliding window nor chunks ({what}), and none else can be "
            "served; choose a model with plain attention"
        )


class _Asked(PlanCache):
    """Takes notes of what a cache is asked; and answers what only masks of transformers' own ask."""

    def __init__(self, tokens: int, device: Any, notes: _Notes) -> None:
        super().__init__(Plan("prompt", torch.arange(tokens, device=device)[None], slice(0, tokens), [], tokens, {}))
        self._notes = notes
        self.asked = False

    def inputs(self, name: str) -> dict[str, Any]:
        positions = self._plan.positions
        return {name: self, "attention_mask": torch.ones_like(positions), "position_ids": positions}

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._notes.named_layer = layer_idx
        return key, value

    def get_seq_length(self, layer_idx: int | None = 0) -> Tensor:
        self.asked = True
        return super().get_seq_length(layer_idx)

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, *, conv_kernel_size: int = 0, state_idx: int = 0
    ) -> Tensor:
        self.asked = True
        module = self._notes.running[-1] if self._notes.running else None
        if module not in self._notes.recurrent:
            shape = LayerShape(1, conv_states.shape[1], 0)
            self._notes.note(layer_idx, shape, heads=0, window=conv_kernel_size)
        return conv_states

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        self.asked = True
        if self._notes.running:
            self._notes.recurrent[self._notes.running[-1]] = layer_idx

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        self.get_recurrent_state(layer_idx, state_idx)
        return recurrent_states

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        self.asked = True
        module = self._notes.running[-1] if self._notes.running else None
        self._notes.indices[module] = indexer_key_states.shape[2]
        return indexer_key_states

    def get_query_offset(self, layer_idx: int | None = 0) -> int:
        return 0

    def get_mask_sizes(self, q_length: int, layer_idx: int | None = 0) -> tuple[int, int]:
        return q_length, 0


_notes: list[_Notes] = []  # of the probe at work


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Takes notes; what it returns has the right shape and means nothing."""
    notes = _notes[-1]
    layer = notes.named_layer if notes.named_layer is not None else getattr(module, "layer_idx", None)
    notes.named_layer = None
    if not isinstance(layer, int):
        raise BeagleError(
            f"{notes.name}: its attention layers have no number (layer_idx), so their keys can't be told apart; choose a model with plain attention"
        )
    window = notes.window(attention_mask, sliding_window)
    notes.refuse_unknown(kwargs, window)
    notes.note(
        layer,
        LayerShape(key.shape[1], key.shape[3], value.shape[3]),
        heads=query.shape[1],
        window=window,
        module=module,
        softcap=softcap,
        sinks=s_aux is not None,
    )
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


def _mask(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    device: Any,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' mask interface: bool ``[1, 1, queries, keys]``."""
    notes = _notes[-1]
    keys = notes.keys
    try:
        window: Window = window_of(mask_function, keys, device)
    except IndexError:  # it looks at the tokens of this very pass, so it can't be asked about others
        keys = kv_length - 1
        window = window_of(mask_function, keys, device)
    if window == 0:
        window = chunk_of(mask_function, keys, device) or 0
    if window is None and local_size is not None and local_size > keys:  # too large to be read off
        window = local_size
    mask = torch.ones(1, 1, q_length, kv_length, dtype=torch.bool, device=device).tril()
    notes.made.append((mask, window))
    return mask


AttentionInterface.register(PROBE, _attention)
AttentionMaskInterface.register(PROBE, _mask)


@contextmanager
def tokens_alone(name: str) -> Iterator[None]:
    """Turn whatever a model stumbles over when it is given token ids and nothing else into one line.

    Raises:
        BeagleError: it stumbles.
    """
    try:
        yield
    except (AttributeError, TypeError, ValueError, RuntimeError, LookupError) as error:
        why = (str(error).strip().split("\n") or [""])[0]
        raise BeagleError(
            f"{name}: its layers don't run here on tokens alone ({type(error).__name__}: {why}), so they can't be served; "
            "choose a causal LM of text, or correct its config"
        ) from error


@torch.no_grad()
def learn(model: Any, name: str, expected: int | None = None) -> Layers:
    """Run a model's layers once and take notes; from then on it has our attention function.

    Args:
        model: a causal LM of transformers.
        name: of the target, for errors.
        expected: attention layers there must be.
    Raises:
        BeagleError: a layer computes its attention elsewhere, or what it sees is no sliding window.
    """
    base = base_of(model)
    device = device_of(model)
    text = model.config.get_text_config(decoder=True)
    limit, _ = context_limit(text)
    if not can_set_attention(model):
        if (layers := _own_attention(model, base, name, limit)) is not None:
            return layers
        raise BeagleError(f"{name}: {_strange(base, {}, expected or 0)}; choose a model with plain attention")
    notes = _Notes(name, max(TOKENS, min(limit, MOST_KEYS)))
    model.set_attn_implementation(PROBE)
    cache = _cache_name(base, device)
    _notes.append(notes)
    try:
        n = min(TOKENS, limit)
        with tokens_alone(name):
            asked = _Asked(n, device, notes).inputs(cache) if cache else {}
            with _running(base, notes.running) if cache else nullcontext():
                base(input_ids=torch.ones(1, n, dtype=torch.long, device=device), use_cache=False, **asked)
    finally:
        _notes.pop()
        model.set_attn_implementation(NAME)
    if (
        "indexed_attention" in (getattr(text, "layer_types", None) or ()) and not notes.indices
    ):  # may show in long texts alone
        raise BeagleError(
            f"{name}: its layers (indexed_attention) choose the keys that a token sees in a way that can't be followed; choose "
            "a model with plain attention in every layer"
        )
    if notes.recurrent:
        for i in {*range(expected or 0), *notes.recurrent.values()} - set(notes.calls):
            notes.note(i, LayerShape(1, 0, 0), heads=0, window=None)  # no keys
    order = sorted(notes.calls)
    if not order and (own := _own_attention(model, base, name, limit)) is not None:
        return own
    if expected is not None and (order != list(range(expected)) or set(notes.calls.values()) != {1}):
        raise BeagleError(f"{name}: {_strange(base, notes.calls, expected)}; choose a model with plain attention")
    names: dict[nn.Module | None, str] = {None: "", **{module: name for name, module in base.named_modules()}}
    layers = Layers(
        [names[notes.modules[i]] for i in order],
        [notes.shapes[i] for i in order],
        [notes.heads[i] for i in order],
        [notes.windows[i] for i in order],
        [notes.softcaps[i] for i in order],
        [notes.sinks[i] for i in order],
        cache,
        recurrent=[names[module] for module in notes.recurrent],
        indices={names[module]: width for module, width in notes.indices.items()},
    )
    layers.mark(base)
    return layers


@contextmanager
def _running(base: nn.Module, running: list[nn.Module]) -> Iterator[None]:
    """Keep a list of the modules that are at work, the innermost last."""

    def enter(module: nn.Module, inputs: Any) -> None:
        running.append(module)

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        running.pop()

    with ExitStack() as hooks:
        for module in base.modules():
            hooks.enter_context(module.register_forward_pre_hook(enter))
            hooks.enter_context(module.register_forward_hook(leave))
        yield


def _own_attention(model: Any, base: nn.Module, name: str, limit: int) -> Layers | None:
    """Layers of a model whose modules compute their attention themselves; None: it isn't seen what they compute.

    Raises:
        BeagleError: they compute something that can't be served.
    """
    if can_set_attention(model):
        model.set_attn_implementation(own_attention(model, NAME))
    settings = model.config.get_text_config(decoder=True).to_dict()
    spans = [size for key, size in settings.items() if "window" in key and isinstance(size, int)]
    n = min(max(PROBED, *(size + 1 for size in spans)) if spans else PROBED, limit)  # so that a window shows its end
    ids = torch.ones(1, n, dtype=torch.long, device=next(base.parameters()).device)
    for cache in CACHE_NAMES:
        parameters = inspect.signature(base.forward).parameters
        if cache not in parameters and not any(of.kind is of.VAR_KEYWORD for of in parameters.values()):
            continue
        notes = Learning()
        try:
            base(input_ids=ids, use_cache=False, **notes.inputs(cache))
        except NotAttention as error:
            raise BeagleError(
                f"{name}: its layers compute their attention themselves, in a way that can't be served ({error}); choose a "
                "model with plain attention"
            ) from error
        except (AttributeError, TypeError, ValueError, RuntimeError, LookupError):
            continue
        order = sorted(notes.calls)
        if order != list(range(len(order))) or set(notes.calls.values()) != {1} or set(order) != set(notes.windows):
            continue
        shapes, heads = [notes.shapes[i] for i in order], [notes.heads[i] for i in order]
        windows = [notes.windows[i] for i in order]
        none: list[float | None] = [None] * len(order)
        layers = Layers([""] * len(order), shapes, heads, windows, none, [False] * len(order), cache, own=True)
        layers.mark(base)
        return layers
    return None


def _strange(base: nn.Module, calls: dict[int, int], expected: int) -> str:
    """How the attention layers of a model that can't be served differ from one call for each of its layers."""
    if len(calls) > expected or max(calls.values(), default=0) > 1:
        return "its attention runs more than once in a layer, each time with other keys and values"
    own = sorted({type(module).__name__ for module in base.modules() if "Attention" in type(module).__name__})
    missing = f"{expected - len(calls)} of its {expected} layers" if calls else "its layers"
    return (
        f"{missing} compute attention ({', '.join(own) or 'none'}) outside transformers' attention interface, or keep a "
        "recurrent state outside its cache"
    )


def _cache_name(base: nn.Module, device: Any) -> str:
    """``Layers.cache``, by a pass of two tokens with a cache that notes whether it is asked."""
    names = [name for name in CACHE_NAMES if name in inspect.signature(base.forward).parameters]
    for name in names or CACHE_NAMES:  # a wrapper's signature may name none
        notes = _Notes("", TOKENS)
        cache = _Asked(2, device, notes)
        _notes.append(notes)
        try:
            base(input_ids=torch.ones(1, 2, dtype=torch.long, device=device), use_cache=False, **cache.inputs(name))
        except (BeagleError, AttributeError, TypeError, ValueError, RuntimeError, LookupError):
            continue  # it takes transformers' own caches alone
        finally:
            _notes.pop()
        if cache.asked:
            return name
    return ""

"""The library's front: load a target with its draft head, generate, stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from beagle.decoding.costs import Costs, cached_costs
from beagle.decoding.loop import Emitted, decode
from beagle.decoding.sampling import Sampler
from beagle.decoding.stats import Stats
from beagle.drafters.base import Drafter, TreePlan
from beagle.drafters.beagle import BeagleDrafter
from beagle.drafters.checkpoint import find_head, load_head
from beagle.drafters.eagle import EagleDrafter
from beagle.drafters.lookup import LookupDrafter
from beagle.drafters.small import PREFIX, load_small
from beagle.drafters.tree import TreeDrafter
from beagle.errors import BeagleError
from beagle.targets.chat import Message, encode
from beagle.targets.loading import EMBEDDED, load_target
from beagle.targets.target import Target

DRAFTERS: dict[str, type[TreeDrafter]] = {"beagle": BeagleDrafter, "eagle": EagleDrafter}


@dataclass(frozen=True)
class Answer:
    """A finished answer: text without special tokens, its token ids, and what it cost."""

    text: str
    token_ids: list[int]
    stats: Stats


@dataclass(frozen=True)
class Piece:
    """A piece of a streamed answer.

    Attributes:
        text: what this step adds to the text.
        token_ids: the step's tokens. drafted: how many of them, from the first on, were drafted.
    """

    text: str
    token_ids: list[int] = field(default_factory=list)
    drafted: int = 0


class Model:
    """A target, and the drafter that speeds it up (``None``: plain decoding)."""

    def __init__(self, target: Target, drafter: Drafter | None = None, plan: TreePlan | None = None) -> None:
        self.target = target
        self.drafter = drafter
        self.plan = plan or TreePlan()
        self._costs: dict[bool, Costs] = {}

    def costs(self, exact: bool = False) -> Costs:
        """Measured costs of this machine; the first call takes some seconds, later ones are cached."""
        assert self.drafter is not None
        if exact not in self._costs:
            self._costs[exact] = cached_costs(self.target, self.drafter, self.plan, exact)
        return self._costs[exact]

    def generate(self, prompt: str | Sequence[Message], **options: Any) -> Answer:
        """Answer a question or a dialogue; options as for ``stream``.

        Returns:
            The whole answer. With the same options it is the same with and without drafts (in half
            precision: bit for bit with ``exact=True``, else up to near-ties).
        """
        stats = Stats()
        pieces = list(self.stream(prompt, stats=stats, **options))
        ids = [token for piece in pieces for token in piece.token_ids]
        return Answer("".join(piece.text for piece in pieces), ids, stats)

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        raw: bool = False,
        exact: bool = False,
        draft: bool = True,
        stats: Stats | None = None,
    ) -> Iterator[Piece]:
        """Answer piece by piece, as passes of the target end.

        Args:
            prompt: a question, or messages ``{"role", "content"}``.
            max_new_tokens: never overshot. temperature: 0 is greedy.
            stop: the answer ends before the first of these.
            raw: no chat template. exact: shape-stable passes (see ``decoding.loop``).
            draft: False decodes plainly. stats: filled while the answer grows.
        """
        stops = [stop] if isinstance(stop, str) else list(stop)
        if any(not s for s in stops):
            raise BeagleError("a stop string is empty; leave it out")
        if max_new_tokens < 1:
            raise BeagleError("max_new_tokens must be at least 1")
        ids = encode(self.target, prompt, raw=raw)
        drafter = self.drafter if draft else None
        open_size = self.plan.nodes is None and self.plan.kind == "dynamic"
        sampler = Sampler(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, length=max_new_tokens)
        stats = stats if stats is not None else Stats()
        steps = decode(
            self.target,
            ids,
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            stats=stats,
            drafter=drafter,
            plan=self.plan,
            costs=self.costs(exact) if drafter is not None and open_size else None,
            exact=exact,
        )
        yield from self._texts(steps, stops, stats)

    def _texts(self, steps: Iterator[Emitted], stops: list[str], stats: Stats) -> Iterator[Piece]:
        """Decode incrementally; hold back half characters and what may become a stop string."""
        tokens: list[int] = []
        shown = 0
        hold = max((len(s) for s in stops), default=1) - 1
        waiting: list[int] = []
        drafted = 0
        for step in steps:
            before = len(tokens)
            tokens += step.tokens
            waiting += step.tokens
            drafted += step.drafted
            if stopped := self._stopped(tokens, before, stops):
                text, surplus = stopped
                stats.tokens -= surplus
                stats.passed_tokens -= surplus
                kept = waiting[: len(waiting) - surplus]
                yield Piece(text[shown:], kept, min(drafted, len(kept)))
                return
            text = self._decode(tokens)
            safe = len(text.rstrip("\ufffd")) - hold  # the rest of an unfinished character is still to come
            if safe > shown:
                yield Piece(text[shown:safe], waiting, drafted)
                shown, waiting, drafted = safe, [], 0
        text = self._decode(tokens)
        if waiting or len(text) > shown:
            yield Piece(text[shown:], waiting, drafted)

    def _stopped(self, tokens: list[int], before: int, stops: list[str]) -> tuple[str, int] | None:
        """The text before the stop string that is complete first, and how many tokens come after it."""
        if not stops:
            return None
        for n in range(before + 1, len(tokens) + 1):
            text = self._decode(tokens[:n])
            found = [at for s in stops if (at := text.find(s)) >= 0]
            if found:
                return text[: min(found)], len(tokens) - n
        return None

    def _decode(self, tokens: list[int]) -> str:
        return str(self.target.tokenizer.decode(tokens, skip_special_tokens=True))


def load(
    target: str = EMBEDDED,
    *,
    draft: str | None = "auto",
    dtype: str = "auto",
    device: str = "auto",
    plan: TreePlan | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """Load a target and its drafter.

    Args:
        target: ``smollm2-135m``, a hub id, a folder, or a ``.gguf`` file.
        draft: ``auto`` (the head shipped for this target, else plain decoding), a folder that
            ``beagle train`` wrote, ``lookup`` (what followed the same words before),
            ``model:NAME`` (a smaller model with the same tokenizer, named as a target is), or None
            for plain decoding.
        dtype, device: see ``targets.loading.load_target``.
        plan: shape of the draft tree; by default its size follows from this machine's costs.
    Raises:
        BeagleError: see the message; nothing is left half loaded.
    """
    draft = "none" if draft is None else draft
    if names_head(draft):
        find_head(draft, target)  # a wrong folder is found out before the target is loaded
    options: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    loaded = load_target(target, **options)
    return Model(loaded, load_drafter(draft, loaded, **options), plan)


def names_head(draft: str) -> bool:
    """Whether a ``draft`` is ``auto`` or a folder."""
    return draft not in ("none", "lookup") and not draft.startswith(PREFIX)


def load_drafter(draft: str, target: Target, **options: Any) -> Drafter | None:
    """The drafter that ``draft`` names (see ``load``, ``none`` is plain decoding) on a loaded target.

    Args:
        options: how a small model is loaded, as of ``targets.loading.load_target``.
    Raises:
        BeagleError: it can't be loaded or doesn't fit the target.
    """
    if draft == "lookup":
        return LookupDrafter()
    if draft.startswith(PREFIX):
        return load_small(draft.removeprefix(PREFIX), target, **options)
    folder = find_head(draft, target.name) if names_head(draft) else None
    if folder is None:
        return None
    head = load_head(folder, target)
    return DRAFTERS[head.architecture](target, head)

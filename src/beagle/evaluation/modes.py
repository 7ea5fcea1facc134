"""What stands side by side: plain decoding, drafters on our engine, and transformers' own ``generate``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from beagle.decoding.costs import Costs
from beagle.decoding.sampling_params import SamplingParams
from beagle.decoding.stats import Stats
from beagle.drafters.base import TreePlan
from beagle.drafters.head_drafter import HeadDrafter
from beagle.drafters.load import DraftSpec, load_drafter, state_layers
from beagle.drafters.small import refuse_other_vocabulary
from beagle.errors import BeagleError
from beagle.evaluation.hf_generate import HF_MODES, HFGenerate
from beagle.evaluation.peak_memory import reset_peak_memory
from beagle.model import Model
from beagle.targets.chat import Message, encode
from beagle.targets.generation import neutral
from beagle.targets.loading import load_model
from beagle.targets.target import Target

T = TypeVar("T")
OUR_MODES = ("plain", "beagle", "chain", "head", "eagle", "lookup", "small")
MODES = (*OUR_MODES, *HF_MODES)
NEEDS = {"eagle": "an EAGLE head; name its folder (eagle)"} | dict.fromkeys(
    ("small", "assisted"), "a small model; name it (small_model)"
)


@dataclass(frozen=True)
class Options:
    """What every mode is asked to do."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    exact: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Drafts:
    """What the modes draft with, named as ``beagle.load`` takes them.

    Attributes:
        beagle: of mode ``beagle``, whatever kind of draft it is; mode ``chain`` drafts with the same, one
            candidate a level; mode ``head`` takes the head alone from it, or the shipped one where it has none.
        eagle: folder of an EAGLE head.
    """

    beagle: str = "auto"
    eagle: str | None = None
    small: str | None = None

    def of(self, mode: str, target_name: str) -> DraftSpec:
        beagle = DraftSpec.parse(self.beagle, target_name)
        return {
            "beagle": beagle,
            "chain": beagle,
            "head": DraftSpec(head=beagle.head or "head"),
            "eagle": DraftSpec(head=self.eagle),
            "lookup": DraftSpec(lookup=True),
            "small": DraftSpec(model=self.small),
        }.get(mode, DraftSpec())

    def state_layers(self, modes: Sequence[str], target_name: str) -> tuple[int, ...]:
        """The layers that any of the modes' heads reads beside the top state: load the target with them."""
        specs = (self.of(mode, target_name) for mode in modes)
        return tuple(sorted({layer for spec in specs for layer in state_layers(spec, target_name)}))


@dataclass(frozen=True)
class System:
    """One mode, ready to answer.

    Attributes:
        model: the target, with the mode's drafter where it has one.
        hf: what transformers' own modes run on.
        weights_mb: memory that loading the mode took besides the target.
    """

    mode: str
    model: Model
    hf: HFGenerate | None = None
    weights_mb: float = 0.0

    def answer(self, prompt: str | Sequence[Message], options: Options, seed: int) -> tuple[list[int], Stats]:
        sampling = SamplingParams(options.max_new_tokens, options.temperature, seed=seed)
        if self.hf is not None:
            return self.hf.answer(self.mode, encode(self.model.target, prompt), sampling)
        result = self.model.generate(prompt, sampling, exact=options.exact)
        return result.token_ids, result.stats

    def costs(self, exact: bool) -> Costs | None:
        """Measured costs of a pass and of a draft; None where nothing is drafted by us."""
        return None if self.model.drafter is None else self.model.costs(exact)


def available(drafts: Drafts, draft: DraftSpec, *, quick: bool = False) -> list[str]:
    """Every mode that can run with what was named, and says something of its own."""
    missing = {"beagle": draft == DraftSpec(), "eagle": not drafts.eagle, "small": not drafts.small}
    missing["chain"] = True  # the same draft again: only where it is asked for
    missing["head"] = draft.head is None or not draft.lookup
    missing["prompt-lookup"] = quick
    return [mode for mode in MODES if not missing.get("small" if mode == "assisted" else mode)]


def not_of(target: Target, modes: Sequence[str]) -> list[str]:
    """Those of the modes that there are not for a target: transformers rolls no recurrent state back."""
    stateful = getattr(target.model, "_is_stateful", False)  # 5.17 and 5.24: PreTrainedModel
    return [mode for mode in modes if stateful and mode in ("prompt-lookup", "assisted")]


def check_modes(modes: Sequence[str], drafts: Drafts) -> None:
    """Refuse modes that are none, unknown, named twice, or lack what they draft with."""
    if not modes:
        raise BeagleError(f"modes is empty; use some of {', '.join(MODES)}")
    for mode in modes:
        if mode not in MODES:
            raise BeagleError(f"mode '{mode}' is unknown; use {', '.join(MODES)}")
        if modes.count(mode) > 1:
            raise BeagleError(f"mode '{mode}' stands twice in modes; name it once")
        if mode in NEEDS and not (drafts.eagle if mode == "eagle" else drafts.small):
            raise BeagleError(f"mode '{mode}' drafts with {NEEDS[mode]}")


def load_systems(
    target: Target,
    modes: Sequence[str],
    drafts: Drafts,
    plan: TreePlan | None = None,
    adapter: str | None = None,
    **options: Any,
) -> list[System]:
    """Load what each mode needs besides the target; options as of ``targets.loading.load_model``.

    All of our modes share the one target; transformers' modes share a second copy of the model, as
    transformers loads it, but for its generation config, of which they too take the tokens that end an answer alone.

    Raises:
        BeagleError: a mode can't run, or something can't be loaded or doesn't fit the target.
    """
    check_modes(modes, drafts)
    systems = [
        _ours(target, mode, drafts.of(mode, target.name), plan, options) for mode in modes if mode not in HF_MODES
    ]  # before the copy is loaded, whose memory is no part of theirs
    transformers_modes: dict[str, System] = {}
    if wanted := [mode for mode in modes if mode in HF_MODES]:
        copy = load_model(target.name, adapter=adapter, **options)[0]
        copy.generation_config = neutral(copy.generation_config, target.eos_ids)  # as our modes decode
        for mode in wanted:
            assistant, weights = None, 0.0
            if mode == "assisted":
                (assistant, tokenizer), weights = weighed(lambda: load_model(str(drafts.small), **options))
                refuse_other_vocabulary(target, tokenizer, str(drafts.small))
                assistant.generation_config = neutral(assistant.generation_config, target.eos_ids)
            transformers_modes[mode] = System(mode, Model(target), HFGenerate(copy, assistant), weights)
    ours = {system.mode: system for system in systems}
    return [(ours | transformers_modes)[mode] for mode in modes]


def _ours(target: Target, mode: str, draft: DraftSpec, plan: TreePlan | None, options: Mapping[str, Any]) -> System:
    drafter, weights = weighed(lambda: load_drafter(draft, target, **options))
    if mode in ("beagle", "chain") and drafter is None:
        raise BeagleError(f"no draft head for {target.name}; pass a folder as draft or leave '{mode}' out of modes")
    if mode == "chain":
        plan = replace(plan or TreePlan(), kind="chain")
    if mode == "eagle" and not (isinstance(drafter, HeadDrafter) and drafter.head.architecture in ("eagle", "eagle3")):
        raise BeagleError(f"eagle '{draft}' holds no EAGLE head; pass it as draft, or choose another folder")
    return System(mode, Model(target, drafter, plan), weights_mb=weights)


def weighed(load: Callable[[], T]) -> tuple[T, float]:
    """What ``load`` loads, and the megabytes that it keeps."""
    before = reset_peak_memory()
    loaded = load()
    return loaded, max(0.0, reset_peak_memory() - before)

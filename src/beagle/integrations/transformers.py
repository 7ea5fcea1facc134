"""``beagle.speculate(model)``: a transformers model whose ``generate`` drafts.

transformers lets a callable do the decoding (``custom_generate``) after it has prepared everything else:
lengths, logits processors, stopping criteria. It doesn't hand that callable the streamer and the tokenizer,
so ``generate`` is replaced on the model itself, which also spares the script from touching every call.

The caller's model is left as it is: ours is a twin, modules and config of its own around the same weights.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, cast

import torch
from torch import LongTensor, Tensor, nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import GenerateDecoderOnlyOutput

from beagle.decoding.decoder import decode
from beagle.decoding.sequence import Sequence, room
from beagle.decoding.stats import Stats
from beagle.drafters.base import TreePlan
from beagle.drafters.checkpoint import shipped_head
from beagle.drafters.load import DraftSpec, load_drafter, state_layers
from beagle.errors import BeagleError
from beagle.integrations.checks import refuse_arguments, refuse_batch, refuse_model, refuse_request, unpadded
from beagle.integrations.generate_sampler import GenerateSampler, processors_of
from beagle.integrations.hooks import has_adapters_of_one_call
from beagle.integrations.twin import Parts, own_logits, refuse_otherwise, twin
from beagle.model import Model
from beagle.targets.target import Target

_GENERATE = inspect.signature(GenerationMixin.generate)


def speculate(
    model: Any,
    draft: str = "auto",
    *,
    name: str | None = None,
    tokenizer: Any = None,
    plan: TreePlan | None = None,
) -> Speculation:
    """Let ``model.generate`` draft from here on; its answers stay what they were.

    Args:
        model: a causal LM of transformers, or peft's model around one; it is not changed but for ``generate``.
        draft: as of ``beagle.load``, except that ``auto`` is prompt lookup alone where no head is shipped.
        name: the target that a shipped head is looked up for (by default what the model was loaded from).
        tokenizer: the model's own, needed for a small model's drafts alone.
        plan: shape of the draft tree; by default its size follows from this machine's costs.

    Returns:
        What it has done and cost, and ``remove()``.

    Raises:
        BeagleError: the draft can't be loaded, or the model's family can't be served.
    """
    if hasattr(model, "get_base_model"):  # a PeftModel, which asks the model that its adapters are in
        model = model.get_base_model()
    if not isinstance(model, nn.Module) or not isinstance(model, GenerationMixin):
        raise BeagleError(f"a {type(model).__name__} has no generate of transformers; pass a causal LM")
    speculation = Speculation(model, draft, name=name, tokenizer=tokenizer, plan=plan)
    generate = partial(speculation.generate, model)
    generate.speculates = True  # type: ignore[attr-defined]
    model.__dict__["generate"] = generate  # as transformers installs its own
    return speculation


class Speculation:
    """Stands behind a model's ``generate``.

    Attributes:
        stats: what the last call has cost, all its answers together.
    """

    def __init__(self, model: Any, draft: str, *, name: str | None, tokenizer: Any, plan: TreePlan | None) -> None:
        self.stats = Stats()
        self._name = name or str(getattr(model.config, "name_or_path", "")) or type(model).__name__
        if draft == "auto" and not shipped_head(self._name):
            draft = "lookup"
        spec = DraftSpec.parse(draft, self._name)
        if spec == DraftSpec():
            raise BeagleError("draft 'none' drafts nothing; leave speculate out")
        if spec.model is not None and tokenizer is None:
            raise BeagleError(f"draft '{draft}' needs the model's tokenizer; pass tokenizer=")
        self._draft, self._tokenizer, self._plan = spec, tokenizer, plan
        self._model = model
        self._wrapped: tuple[Parts | None, Model | None] = (None, None)
        refuse_model(model)
        self._wrap(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> Speculation:
        return self  # a copied model is wrapped when it is first asked

    def remove(self) -> None:
        """Give the model its own ``generate`` back."""
        self._model.__dict__.pop("generate", None)
        self._wrapped = None, None

    def generate(self, model: Any, /, *args: Any, **kwargs: Any) -> Any:
        """``model.generate``: the same arguments, the same result.

        Args:
            model: the one that speculates.
            *args: as of transformers' ``generate``.
            **kwargs: as of transformers' ``generate``.

        Returns:
            What transformers' ``generate`` returns.

        Raises:
            BeagleError: something is asked for that drafting would answer otherwise; it is named.
        """
        if has_adapters_of_one_call(model):  # without drafts: peft would leave its hooks behind if this call failed
            self.stats = Stats()
            return type(model).generate(model, *args, **kwargs)
        given = _GENERATE.bind(model, *args, **kwargs).arguments
        options: dict[str, Any] = given.pop("kwargs", {})
        del given["self"]
        configs = (given.get("generation_config"), model.generation_config)

        def setting(name: str) -> Any:  # transformers' order
            return options.get(name) or next((value for c in configs if (value := getattr(c, name, None))), None)

        settings = {name: setting(name) for name in ("cache_implementation", "token_healing")}
        refuse_arguments({**given, **options, **settings})
        refuse_model(model)
        streamer = given.pop("streamer", None)
        tokenizer = options.pop("tokenizer", None) or self._tokenizer
        if strings := setting("stop_strings"):
            if tokenizer is None:
                raise BeagleError("stop_strings need the model's tokenizer; pass tokenizer= to generate")
            options["stop_strings"] = None
            stops = StopStringCriteria(tokenizer=tokenizer, stop_strings=strings)
            given["stopping_criteria"] = StoppingCriteriaList([*(given.get("stopping_criteria") or ()), stops])
        how = partial(self._decode, streamer=streamer)
        return type(model).generate(model, custom_generate=how, **given, **options)

    def _decode(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """What transformers calls with everything prepared; ``input_ids`` is ``[batch, n]``."""
        refuse_request(generation_config, model_kwargs)
        prompts = unpadded(input_ids, model_kwargs.get("attention_mask"), model_kwargs.get("position_ids"))
        if len(prompts) > 1:
            refuse_batch(generation_config, logits_processor, stopping_criteria, streamer)
        ours = self._wrap(model)
        new = int(generation_config.max_length) - input_ids.shape[1]
        longest, limit = max(map(len, prompts)), ours.target.context_limit
        if longest + new > limit:
            raise BeagleError(
                f"max_new_tokens={new} after a prompt of {longest} tokens goes beyond the model's context of {limit}; "
                f"ask for at most {limit - longest}"
            )
        self.stats = Stats()
        if streamer is not None:
            streamer.put(input_ids.cpu())
        samplers = [
            GenerateSampler(
                ids, generation_config, processors_of(logits_processor, i), stopping_criteria, streamer, self._name
            )
            for i, ids in enumerate(input_ids)
        ]
        for sampler, prompt in zip(samplers, prompts, strict=True):
            answer = Sequence(prompt, room(ours.target, prompt, new), sampler)
            for _ in decode(ours.decoder(1), answer):
                pass
            self.stats.add(answer.stats)
        if streamer is not None:
            streamer.end()
        pad = generation_config._pad_token_tensor
        longest = max(len(sampler.ids) for sampler in samplers)
        sequences = input_ids.new_full((len(samplers), longest), 0 if pad is None else int(pad))
        for i, sampler in enumerate(samplers):
            sequences[i, : len(sampler.ids)] = sampler.ids
        if not generation_config.return_dict_in_generate:
            return sequences
        kept: dict[str, Any] = {"scores": samplers[0].scores, "logits": samplers[0].logits}
        return GenerateDecoderOnlyOutput(sequences=cast(LongTensor, sequences), **kept)

    def _wrap(self, model: Any) -> Model:
        """Our model around the caller's weights, made anew where the caller's is made otherwise than it was."""
        parts = Parts(model)
        wrapped, ours = self._wrapped
        if ours is not None and parts == wrapped:
            return ours
        expected = own_logits(model)  # adapters that were merged and then disabled take themselves out here
        parts = Parts(model)
        with torch.random.fork_rng(devices=[]):  # a fresh head draws weights; the caller's seed is not ours
            layers = state_layers(self._draft, self._name)
            target = Target(twin(model, parts), self._tokenizer, self._name, pack=False, state_layers=layers)
            refuse_otherwise(target, expected)
            where = {"dtype": str(target.dtype).removeprefix("torch."), "device": str(target.device)}
            ours = Model(target, load_drafter(self._draft, target, **where), self._plan)
        self._wrapped = parts, ours
        return ours

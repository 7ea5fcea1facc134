"""The library's front: load a target with its draft head, generate, stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from beagle.decoding.costs import Costs, cached_costs
from beagle.decoding.decoder import Decoder, decode
from beagle.decoding.live_costs import LiveCosts
from beagle.decoding.pieces import Answer, Piece, Pieces, Stream
from beagle.decoding.prefixes import PrefixCache
from beagle.decoding.sampling import Sampler
from beagle.decoding.sampling_params import BatchOptions, SamplingOptions, SamplingParams, whole
from beagle.decoding.sequence import Sequence as Job
from beagle.decoding.sequence import Step, room
from beagle.decoding.stats import Stats
from beagle.decoding.text import StopText
from beagle.drafters.base import Drafter, TreePlan
from beagle.drafters.load import load_drafter, resolve_draft, state_layers
from beagle.errors import BeagleError
from beagle.ranks import ALONE, Ranks
from beagle.targets.chat import Message, encode
from beagle.targets.devices import DeviceMap
from beagle.targets.loading import DEFAULT_TARGET, load_target
from beagle.targets.target import Target


class Model:
    """A target, and the drafter that speeds it up. ``load`` makes one.

    Attributes:
        target: the model whose answers are wanted.
        drafter: what proposes tokens; None is plain decoding.
        plan: shape of the draft tree; a chain where the target has a recurrent state.
        prefixes: keys and values of earlier answers, where some are kept.
    """

    def __init__(
        self, target: Target, drafter: Drafter | None = None, plan: TreePlan | None = None, *, prefix_cache: int = 0
    ) -> None:
        self.prefixes = PrefixCache(whole("prefix_cache", prefix_cache, 0)) if prefix_cache else None
        self.target = target
        self.drafter = drafter
        plan = plan or TreePlan()
        self.plan = plan.as_chain() if target.chains_only else plan
        self._costs: dict[tuple[bool, bool], Costs] = {}
        self._live: dict[bool, LiveCosts] = {}  # by exact mode

    def costs(self, exact: bool = False, fresh: bool = False, batch: bool = False) -> Costs:
        """Measured costs of this machine. The first call takes some seconds, later ones are cached.

        Args:
            exact: passes of exact mode.
            fresh: measure again.
            batch: passes that several answers share.

        Returns:
            Seconds of passes by size, and of drafts.
        """
        assert self.drafter is not None
        if fresh or (exact, batch) not in self._costs:
            self._costs[exact, batch] = cached_costs(self.target, self.drafter, self.plan, exact, fresh, batch)
        return self._costs[exact, batch]

    def generate(
        self,
        prompt: str | Sequence[Message] | Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        raw: bool = False,
        continue_final_message: bool = False,
        exact: bool = False,
        draft: bool = True,
        **options: Unpack[SamplingOptions],
    ) -> Answer:
        """Answer a question or a dialogue.

        Args:
            prompt: a question, messages ``{"role", "content"}``, or token ids (see ``targets.chat.encode``).
            sampling: how tokens are chosen and where the answer ends; by default ``SamplingParams()``.
            raw: no chat template.
            continue_final_message: continue the dialogue's last message, an assistant's, instead of answering it; the
                text is what follows. Token ids end inside that message then.
            exact: shape-stable passes (see ``decoding.decoder``).
            draft: False decodes plainly.
            **options: fields of ``SamplingParams``, in place of those of ``sampling``.

        Returns:
            The whole answer. With the same options it is the same with and without drafts (in half
            precision: bit for bit with ``exact=True``, else up to near-ties).

        Raises:
            BeagleError: the prompt or an option can't be served; it is named.
        """
        stats = Stats()
        stream = self.stream(
            prompt,
            sampling=sampling,
            raw=raw,
            continue_final_message=continue_final_message,
            exact=exact,
            draft=draft,
            stats=stats,
            **options,
        )
        return Answer.of(list(stream), stats)

    def stream(
        self,
        prompt: str | Sequence[Message] | Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        raw: bool = False,
        continue_final_message: bool = False,
        exact: bool = False,
        draft: bool = True,
        stats: Stats | None = None,
        watch: Callable[[Step], None] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Stream:
        """Answer piece by piece, one for each pass of the target; the last has a ``finish_reason``.

        Args:
            prompt: a question, messages ``{"role", "content"}``, or token ids (see ``targets.chat.encode``).
            sampling: how tokens are chosen and where the answer ends; by default ``SamplingParams()``.
            raw: no chat template.
            continue_final_message: continue the dialogue's last message, an assistant's, instead of answering it; the
                text is what follows. Token ids end inside that message then.
            exact: shape-stable passes (see ``decoding.decoder``).
            draft: False decodes plainly.
            stats: filled while the answer grows.
            watch: called with each iteration before its tokens are yielded.
            **options: fields of ``SamplingParams``, in place of those of ``sampling``.

        Raises:
            BeagleError: the prompt or an option can't be served; it is named.
        """
        sampling = replace(sampling or SamplingParams(), **options)
        sampling.check_vocabulary(self.target.vocab_size)
        ids = encode(self.target, prompt, raw=raw, continue_final_message=continue_final_message)
        job, pieces = self._job(ids, sampling, continue_final_message, stats=stats, watch=watch)
        decoder = self.decoder(1, draft=draft, exact=exact, prefixes=self.prefixes)
        return Stream(decode(decoder, job), pieces)

    def generate_batch(
        self,
        prompts: Sequence[str | Sequence[Message] | Sequence[int]],
        sampling: SamplingParams | None = None,
        *,
        rows: int = 8,
        seed: int | Sequence[int] | None = None,
        raw: bool = False,
        continue_final_message: bool = False,
        draft: bool = True,
        **options: Unpack[BatchOptions],
    ) -> list[Answer]:
        """``generate`` for each of some prompts, ``rows`` of them at a time (the size of the batch) in shared passes.

        In float32 the answers are those of ``generate`` with the same options, in half precision up to near-ties.

        Args:
            prompts: each as of ``generate``.
            sampling: of all prompts; by default ``SamplingParams()``.
            rows: live answers, that is the size of the batch; where one ends, the next prompt takes its place.
            seed: one for all prompts, or one for each; by default that of ``sampling``.
            raw: no chat template.
            continue_final_message: continue the dialogue's last message, an assistant's, instead of answering it; the
                text is what follows. Token ids end inside that message then.
            draft: False decodes plainly.
            **options: fields of ``SamplingParams``, in place of those of ``sampling``.

        Returns:
            Answers in the order of the prompts. Their times are shares of the passes that they were in,
            so that the sum over all answers is the run's.

        Raises:
            BeagleError: a prompt or an option can't be served; it is named.
        """
        sampling = replace(sampling or SamplingParams(), **options)
        sampling.check_vocabulary(self.target.vocab_size)
        rows = whole("rows", rows, 1)
        if seed is None or not isinstance(seed, Sequence):
            seeds = [sampling.seed if seed is None else seed] * len(prompts)
        else:
            seeds = list(seed)
        if len(seeds) != len(prompts):
            raise BeagleError(f"{len(seeds)} seeds for {len(prompts)} prompts; give one seed, or one for each prompt")
        jobs: dict[Job, Pieces] = {}
        for number, (prompt, own_seed) in enumerate(zip(prompts, seeds, strict=True), 1):
            ids = encode(self.target, prompt, raw=raw, continue_final_message=continue_final_message)
            own = replace(sampling, seed=own_seed)
            job, maker = self._job(ids, own, continue_final_message, f"prompt {number} of {len(prompts)}")
            jobs[job] = maker
        if not jobs:
            return []
        decoder = self.decoder(min(rows, len(jobs)), draft=draft)
        pieces: dict[Job, list[Piece]] = {job: [] for job in jobs}
        for job, emitted in decoder.run(deque(jobs)):
            if job.error is not None:
                raise job.error
            piece = jobs[job].take(emitted)
            pieces[job].append(piece)
            if piece.finish_reason is not None:
                decoder.leave(job)
        return [Answer.of(pieces[job], job.stats) for job in jobs]

    def _job(
        self,
        ids: list[int],
        sampling: SamplingParams,
        continues: bool,
        name: str = "the prompt",
        stats: Stats | None = None,
        watch: Callable[[Step], None] | None = None,
    ) -> tuple[Job, Pieces]:
        """What is decoded, and what makes pieces of it."""
        most = room(self.target, ids, sampling.max_new_tokens, name)
        sampler = Sampler(sampling, prompt=ids, eos_ids=self.target.eos_ids, name=self.target.name)
        job = Job(ids, most, sampler, watch=watch, stats=Stats() if stats is None else stats)
        text = StopText(self.target.tokenizer, sampling.stop, ids if continues else ())
        return job, Pieces(text, job.stats)

    def decoder(
        self,
        size: int,
        *,
        draft: bool = True,
        exact: bool = False,
        prefixes: PrefixCache | None = None,
        piece: int | None = None,
    ) -> Decoder:
        """What decodes several answers at once.

        Args:
            size: most live answers.
            draft: False decodes plainly.
            exact: as of ``decoding.decoder.Decoder``.
            prefixes: as of ``decoding.decoder.Decoder``.
            piece: as of ``decoding.decoder.Decoder``.
        """
        drafter = self.drafter if draft else None
        return Decoder(
            self.target,
            size=size,
            drafter=drafter,
            plan=self.plan,
            costs=self._costs_of_sizes(drafter, exact),
            shared_costs=self._costs_of_sizes(drafter, batch=True) if size > 1 and not exact else None,
            exact=exact,
            prefixes=prefixes,
            piece=piece,
        )

    def _costs_of_sizes(self, drafter: Drafter | None, exact: bool = False, batch: bool = False) -> Costs | None:
        """Costs, where they choose the tree's size. They follow the machine where another size changes no answer."""
        if drafter is None or not self.plan.sized_by_costs:
            return None
        costs = self.costs(exact, batch=batch)
        if batch or not self.target.drafts_change_no_bit:
            return costs
        if exact not in self._live or self._live[exact].start is not costs:
            self._live[exact] = LiveCosts.of(costs)
        return self._live[exact]


def load(
    target: str = DEFAULT_TARGET,
    *,
    draft: str | bool | None = "auto",
    dtype: str = "auto",
    device: str = "auto",
    plan: TreePlan | None = None,
    trust_remote_code: bool = False,
    adapter: str | Path | None = None,
    quantize: str | None = None,
    prefix_cache: int = 0,
    device_map: DeviceMap | None = None,
    tensor_parallel: Ranks = ALONE,
) -> Model:
    """Load a target and its drafter.

    Args:
        target: ``smollm2-135m``, a hub id, a folder, or a ``.gguf`` file.
        draft: ``head`` (the one shipped for this target), a folder that ``beagle train`` wrote, or
            ``ORG/NAME[@revision]`` of a head on the hub;
            ``lookup`` (what followed the same words before); ``head+lookup`` or ``FOLDER+lookup``
            (both in one tree); ``model:NAME`` (a smaller model with the same tokenizer, named as a
            target is); ``auto`` (``head+lookup`` where a head is shipped, else plain decoding);
            None or False for plain decoding.
        dtype: ``auto`` (bfloat16 where the hardware multiplies it), ``bfloat16``, ``float16`` or ``float32``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        plan: shape of the draft tree; by default its size follows from this machine's costs.
        trust_remote_code: run code that comes with the model.
        adapter: folder of a LoRA adapter of the target, which is merged into its weights.
        quantize: ``int8`` or ``int4``: the target and its draft head (not a smaller model) run quantised.
        prefix_cache: most tokens whose keys and values are kept when answers end, for prompts of ``generate`` and
            ``stream`` that begin with the same tokens, as a dialogue's next turn does: only what is new is run. In
            half precision a near-tie may fall otherwise than without. Exact mode doesn't use it. 0 keeps none.
        device_map: ``auto``, or a map as transformers takes it: what one device has no room for is kept in the CPU's memory
            or on disk.
        tensor_parallel: processes among which the target's layers are divided, see ``beagle.ranks.joined``. All of them
            make the same calls.

    Returns:
        The target with its drafter.

    Raises:
        BeagleError: see the message; nothing is left half loaded.
    """
    spec = resolve_draft(draft, target)
    options: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    loaded = load_target(
        target, adapter=adapter, quantize=quantize, state_layers=state_layers(spec, target), device_map=device_map,
        tensor_parallel=tensor_parallel, **options,
    )  # fmt: skip
    return Model(loaded, load_drafter(spec, loaded, **options), plan, prefix_cache=prefix_cache)

"""Targets with a recurrent state: chains, decoded as transformers decodes them, token by token."""

from __future__ import annotations

from collections import deque

import pytest
import torch

from beagle.decoding.costs import measure
from beagle.decoding.decoder import Decoder
from beagle.decoding.prefixes import PrefixCache
from beagle.decoding.sampling import Sampler, SamplingParams
from beagle.decoding.sequence import Sequence
from beagle.drafters.base import Draft, TreePlan, best_chain
from beagle.drafters.combined import CombinedDrafter
from beagle.drafters.lookup import LookupDrafter
from beagle.drafters.small import SmallModelDrafter
from beagle.errors import BeagleError
from beagle.model import Model
from beagle.targets import compiled, loading, proof, recurrent
from beagle.targets.chains import Track
from beagle.targets.recurrent_cache import RecurrentCache
from beagle.targets.shape import TreeShape
from beagle.targets.target import Target
from conftest import Oracle, tiny_drafter, tiny_model, tiny_target, tiny_tokenizer

LINEAR, FULL = "linear_attention", "full_attention"
DELTA = {
    "layer_types": [LINEAR, FULL, LINEAR],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 16,
}
RECURRENT = {
    "bamba": {"attn_layer_indices": [1], **MAMBA2},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 16,
        **MAMBA2,
    },
    "falcon_h1": {"mamba_d_ssm": 64, **MAMBA2},
    "qwen3_next": {"shared_expert_intermediate_size": 16, **EXPERTS, **DELTA},
    "qwen3_5_text": DELTA,
    "olmo_hybrid": DELTA,
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 16},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "mamba"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": [LINEAR, "hybrid", LINEAR, "hybrid"],
        "num_key_value_heads": 4,
        "mamba_d_state": 8,
        "mamba_ngroups": 2,
        "n_mamba_heads": 4,
        "chunk_size": 16,
    },
    "kimi_linear": {
        "layer_types": [LINEAR, FULL, LINEAR],
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        **EXPERTS,
    },
    "zaya": {"router_hidden_size": 16, "layer_types": ["hybrid"] * 3, **EXPERTS, "num_experts_per_tok": 1},
    "mamba": {"state_size": 4, "num_hidden_layers": 2},
    "falcon_mamba": {"state_size": 4, "num_hidden_layers": 2},
    "jamba": {
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
}
ONE_BY_ONE = {"mamba", "falcon_mamba", "jamba"}  # transformers' scan begins anew with several tokens
PROMPT = [5, 9, 33, 7, 5, 9, 33, 8, 21]
PLAN = TreePlan("dynamic", depth=4, top_k=4, nodes=8)
_targets: dict[str, Target] = {}
_answers: dict[tuple[str, int], list[int]] = {}


def target_of(family: str) -> Target:
    """One that never ends an answer by itself."""
    if family not in _targets:
        _targets[family] = tiny_target(family, **RECURRENT[family])
        _targets[family].eos_ids = frozenset()
    return _targets[family]


def own_answer(family: str, new: int = 16) -> list[int]:
    """By transformers' ``generate``, with transformers' cache."""
    if (family, new) not in _answers:
        model = tiny_model(family, **RECURRENT[family])
        made = model.generate(
            torch.tensor([PROMPT]), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        _answers[family, new] = made[0, len(PROMPT) :].tolist()
    return _answers[family, new]


def sometimes_wrong(answer: list[int], every: int = 3) -> Oracle:
    """Knows the answer but for each so many tokens, which it drafts wrong: most drafts are accepted in part."""
    return Oracle([(token + 1) % 64 if i % every == 2 else token for i, token in enumerate(answer)])


@pytest.mark.parametrize("family", RECURRENT)
def test_greedy_answers_are_those_of_transformers_generate(family):
    target, answer = target_of(family), own_answer(family)
    assert target.layers.recurrent
    assert target.layers.one_by_one == (family in ONE_BY_ONE)
    drafted = Model(target, sometimes_wrong(answer), PLAN).generate(PROMPT, max_new_tokens=16)
    assert drafted.token_ids == answer
    assert drafted.stats.passes < 12  # plain decoding takes 15
    assert Model(target).generate(PROMPT, max_new_tokens=16).token_ids == answer


def drafters_of(target: Target):
    head = tiny_drafter(target, scale=15.0)
    return {
        "head": head,
        "lookup": LookupDrafter(),
        "head+lookup": CombinedDrafter(head, LookupDrafter()),
        "small": SmallModelDrafter(target, target),  # recurrent, too
    }


@pytest.mark.parametrize("kind", ["dynamic", "static", "chain"])
def test_every_drafter_drafts_chains(kind):
    target = target_of("bamba")
    shapes = []
    for name, drafter in drafters_of(target).items():
        model = Model(target, drafter, TreePlan(kind, depth=3, top_k=4, nodes=8))
        stream = model.stream(PROMPT, max_new_tokens=16, watch=lambda step: shapes.append(step.shape))
        assert [token for piece in stream for token in piece.token_ids] == own_answer("bamba"), name
    assert all(shape.is_chain for shape in shapes)
    assert max(len(shape.parents) for shape in shapes) == 4


def test_sampled_answers_are_those_of_plain_decoding():
    target = target_of("bamba")
    options = {"max_new_tokens": 16, "temperature": 1.0, "top_k": 20, "seed": 3}
    plain = Model(target).generate(PROMPT, **options).token_ids
    assert plain != own_answer("bamba")
    for drafter in (*drafters_of(target).values(), sometimes_wrong(plain)):
        assert Model(target, drafter, PLAN).generate(PROMPT, **options).token_ids == plain


def test_many_tokens_that_were_accepted_since_the_last_state_become_a_state_first(monkeypatch):
    target, answer = target_of("bamba"), own_answer("bamba")
    lengths = []
    own = recurrent.RecurrentForward._call

    def counted(self, call, before, inputs):
        lengths.append(inputs.shape[1])
        return own(self, call, before, inputs)

    monkeypatch.setattr(recurrent.RecurrentForward, "_call", counted)
    longest = {}
    for most in (2, 100):
        monkeypatch.setattr(recurrent, "MOST_AGAIN", most)
        lengths.clear()
        model = Model(target, sometimes_wrong(answer), PLAN)
        assert model.generate(PROMPT, max_new_tokens=16).token_ids == answer
        longest[most] = max(n for n in lengths if n != len(PROMPT))
    assert longest[2] < longest[100]


@pytest.mark.parametrize("family", ["bamba", "mamba"])
def test_prompts_in_pieces_and_states_of_rejected_chains(family):
    target = target_of(family)
    ids = torch.arange(3, 60).repeat(2)[:100]
    whole = target.prefill(ids[None], target.new_cache(1, 100))[0]
    cache = target.new_cache(1, 120)
    assert isinstance(cache, RecurrentCache)
    found = [target.prefill(ids[None, first:last], cache)[0] for first, last in ((0, 70), (70, 78))]
    for begin in (78, 80, 84):  # of six drafted tokens two, four, and all of those left are right
        right = {78: 2, 80: 4, 84: 6}[begin]
        tokens = ids[begin : begin + 6].clone()
        tokens[right:] = 3
        found.append(target.verify(cache, tokens, TreeShape.chain(6))[:right])
        cache.compact(list(range(right)))
    found.append(target.prefill(ids[None, 90:], cache)[0])
    assert torch.allclose(torch.cat(found), whole, rtol=1e-3, atol=1e-4)


def test_branches_are_refused():
    target = target_of("bamba")
    with pytest.raises(ValueError, match="tiny-bamba keeps a recurrent state, which runs chains"):
        target.verify(target.new_cache(1, 8), torch.tensor([3, 4, 5]), TreeShape([-1, 0, 0]))


@pytest.mark.parametrize(("start", "committed", "seen", "kept"), [(8, 8, 8, 8), (7, 7, 5, 5), (8, 6, 8, 5)])
def test_a_state_is_kept_as_long_as_a_pass_may_go_back_to_it(start, committed, seen, kept):
    track = Track({5: {}, 8: {}}, 5, torch.arange(5, 8)[:, None])
    assert track.cut(start, committed) == seen
    assert track.since(seen).flatten().tolist() == list(range(seen, start))
    track.append(torch.arange(start, 10)[:, None])
    assert track.since(seen).flatten().tolist() == list(range(seen, 10))
    assert min(track.states) == kept


def test_a_state_that_was_not_kept_is_missed():
    for start in (4, 9):
        track = Track({5: {}, 8: {}}, 5, torch.zeros(3, 1))
        with pytest.raises(RuntimeError, match=f"no state of {start} tokens"):
            track.cut(start, start)


def test_the_chain_of_a_tree_is_its_likeliest_path():
    #       0 (0.9) - 1 (0.5), 2 (0.4) - 3 (0.39)
    tree = Draft([10, 11, 12, 13], [-1, 0, 0, 2], [-0.1, -0.69, -0.92, -0.94])
    assert best_chain(tree) == Draft([10, 12, 13], [-1, 0, 1], [-0.1, -0.92, -0.94])
    assert best_chain(Draft([], [], [])) == Draft([], [], [])


PROMPTS = [PROMPT, [12, 40, 3], [9, 8, 7, 6, 5], [30, 31, 32, 33, 34, 35, 36]]


@pytest.mark.parametrize("family", ["bamba", "mamba"])
def test_batches_are_what_single_answers_are(family):
    target = target_of(family)
    lengths = [14, 4, 9, 12]

    def job(i: int) -> Sequence:
        sampler = Sampler(SamplingParams(seed=i, temperature=0.8 * (i % 2)), prompt=PROMPTS[i], eos_ids=frozenset())
        return Sequence(PROMPTS[i], lengths[i], sampler)

    def answers(size: int, drafter) -> list[list[int]]:
        jobs = [job(i) for i in range(4)]
        for one, _ in Decoder(target, size=size, drafter=drafter, plan=PLAN).run(deque(jobs)):
            assert one.error is None
        return [one.tokens for one in jobs]

    alone = answers(1, None)
    assert [len(tokens) for tokens in alone] == lengths
    assert answers(3, None) == alone
    assert answers(3, tiny_drafter(target, scale=15.0)) == alone
    assert answers(2, LookupDrafter()) == alone


def test_a_next_turn_runs_what_is_new_and_a_shorter_prompt_runs_whole():
    target = target_of("bamba")
    fresh, kept = Model(target), Model(target, sometimes_wrong(own_answer("bamba")), PLAN, prefix_cache=200)
    answer = kept.generate(PROMPT, max_new_tokens=16).token_ids
    assert kept.prefixes is not None
    assert kept.prefixes.find(PROMPT) is None  # the state there is gone
    turn = [*PROMPT, *answer, 7, 11]
    found = kept.prefixes.find(turn)
    assert found is not None
    assert found.length == len(PROMPT) + 15
    assert kept.generate(turn, max_new_tokens=8).token_ids == fresh.generate(turn, max_new_tokens=8).token_ids
    assert (
        kept.generate(PROMPT[:5], max_new_tokens=4).token_ids == fresh.generate(PROMPT[:5], max_new_tokens=4).token_ids
    )


def test_a_cache_without_room_for_the_answer_keeps_nothing_of_it():
    target, prefixes = target_of("bamba"), PrefixCache(4)
    cache = target.new_cache(1, 16)
    states = target.prefill(torch.tensor([PROMPT]), cache)[0]
    target.verify(cache, torch.tensor([3]), TreeShape([-1]))
    cache.compact([0])
    target.verify(cache, torch.tensor([4]), TreeShape([-1]))  # so that no state but the prompt's and later ones is kept
    prefixes.keep([*PROMPT, 3], cache, 0, [states])
    assert prefixes.tokens == 0


def test_exact_mode_is_refused_with_a_remedy():
    model = Model(target_of("bamba"))
    for ask in (
        lambda: list(model.stream(PROMPT, max_new_tokens=2, exact=True)),
        lambda: model.decoder(2, exact=True),
        lambda: model.target.min_exact_tokens,
    ):
        with pytest.raises(
            BeagleError, match=r"^there is no exact mode for tiny-bamba: it keeps a recurrent state.* leave exact out"
        ):
            ask()


def test_compiling_is_refused(tmp_path):
    with pytest.raises(BeagleError, match=r"^tiny keeps a recurrent state.*can't be compiled"):
        compiled.build(tmp_path, tiny_model("bamba", **RECURRENT["bamba"]), "tiny")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("batch", [False, True])
def test_costs_are_those_of_chains_behind_a_rejected_draft(batch, monkeypatch):
    target = target_of("bamba")
    again = []
    own = Track.cut

    def noted(self, start, committed):
        seen = own(self, start, committed)
        again.append(start - seen)
        return seen

    monkeypatch.setattr(Track, "cut", noted)
    costs = measure(target, LookupDrafter(), PLAN, batch=batch, context=12, repeats=1)
    assert len(costs.verify) == 65
    assert max(again) == 4
    assert costs.verify[1] > 0


def test_a_folder_is_loaded_and_remembered_with_a_line(tmp_path, capsys):
    tiny_model("mamba", **RECURRENT["mamba"]).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    for _ in range(2):  # the second time from what was found out the first time
        target = loading.load_target(str(tmp_path), dtype="float32", device="cpu")
        assert target.layers.recurrent == ["layers.0.mixer", "layers.1.mixer"]
        assert target.layers.one_by_one
        assert "keeps a recurrent state, so drafts are chains" in " ".join(capsys.readouterr().err.split())
        target.eos_ids = frozenset()
        model = Model(target, sometimes_wrong(own_answer("mamba")), PLAN)
        assert model.generate(PROMPT, max_new_tokens=16).token_ids == own_answer("mamba")


@pytest.mark.parametrize("family", ["bamba", "mamba", "mamba2"])
def test_half_precision_and_quantised_weights(family):
    for options in ({"dtype": torch.bfloat16}, {"quantize": "int8"}):
        model = tiny_model(family, **RECURRENT[family]).to(options.pop("dtype", torch.float32))
        target = Target(model, tiny_tokenizer(), "tiny", **options)
        states = target.prefill(torch.tensor([PROMPT]), target.new_cache(1, 16))
        assert states.dtype == target.logits(states).dtype == target.dtype  # Mamba 2 gives fp32 by itself
        assert len(Model(target, LookupDrafter(), PLAN).generate(PROMPT, max_new_tokens=8).token_ids) > 0


def test_short_passes_scan_short_chunks(monkeypatch):
    """Mamba 2 fills chunks up; a pass of few tokens has no longer ones than itself, and a prompt has the model's own."""
    target, answer = target_of("bamba"), own_answer("bamba")
    chunks = []
    own = recurrent.Scan.__call__

    def noted(self, inputs, steps, *arguments, **options):
        forward = self.own

        def counted(*given, **named):
            chunks.append((inputs.shape[1], self._module.chunk_size))
            return forward(*given, **named)

        self.own = counted
        try:
            return own(self, inputs, steps, *arguments, **options)
        finally:
            self.own = forward

    monkeypatch.setattr(recurrent.Scan, "__call__", noted)
    prompt = PROMPT * 3
    drafted = Model(target, sometimes_wrong(answer), PLAN).generate(prompt, max_new_tokens=8)
    assert drafted.token_ids == Model(target).generate(prompt, max_new_tokens=8).token_ids
    own_size = MAMBA2["mamba_chunk_size"]
    assert (len(prompt), own_size) in chunks
    assert {tokens for tokens, _ in chunks} > {1, len(prompt)}
    assert all(chunk == (tokens if 1 < tokens < own_size else own_size) for tokens, chunk in chunks)


def test_where_single_steps_are_others_than_a_scan_transformers_decoding_counts():
    """Mamba 2's scan has a least time step, which transformers' single steps leave out."""
    options = {**RECURRENT["bamba"], "time_step_limit": (2.0, float("inf"))}
    model = tiny_model("bamba", **options)
    made = model.generate(torch.tensor([PROMPT]), max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
    answer = made[0, len(PROMPT) :].tolist()
    ids = torch.tensor(PROMPT * 2)
    with torch.no_grad():
        whole = model.model(input_ids=ids[None], use_cache=False)[0][0]
        assert proof.difference(proof.by_steps(model.model, ids), whole) > 0.01
    target = tiny_target("bamba", **options)
    target.eos_ids = frozenset()
    assert not target.layers.one_by_one
    assert Model(target).generate(PROMPT, max_new_tokens=16).token_ids == answer
    drafted = Model(target, sometimes_wrong(answer), PLAN).generate(PROMPT, max_new_tokens=16)
    assert drafted.token_ids == answer
    assert drafted.stats.passes < 12

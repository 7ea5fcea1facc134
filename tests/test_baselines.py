"""Beagle's baselines in the side-by-side run: who drafts, how passes are counted, what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from beagle.drafters.base import Draft, DraftContext, TreePlan
from beagle.drafters.checkpoint import save_head
from beagle.drafters.load import DraftSpec
from beagle.evaluation import modes as m
from beagle.evaluation.hf_generate import HFGenerate
from beagle.meta import redact_paths
from conftest import tiny_head, tiny_model, tiny_target, tiny_tokenizer

BASELINES = ["plain", "beagle", "lookup", "small", "transformers", "prompt-lookup", "assisted"]


def test_all_baselines_in_one_run(first_turns, folders):
    ended, result = first_turns("--modes", ",".join(BASELINES), "--small-model", folders.target, "-n", 16)
    assert ended.code == 0
    assert list(result["modes"]) == BASELINES
    tokens = result["modes"]["plain"]["tokens"]
    for figures in result["modes"].values():
        assert (figures["questions"], figures["tokens"], figures["identical"]) == (4, tokens, 1.0)
        assert all(figures[name] > 0 for name in ("seconds", "prefill_seconds", "tokens_per_second"))
        assert figures["tau"] >= 1
    assert list(result["ratios"]) == [
        "beagle/plain", "plain/transformers", "beagle/transformers", "lookup/plain", "small/plain",
        "prompt-lookup/plain", "assisted/plain",
    ]  # fmt: skip
    assert result["meta"]["arguments"]["small_model"] == folders.target.name
    assert result["modes"]["assisted"]["tau"] > 1  # the target itself assists
    assert "lookup/plain" in ended.out


@pytest.mark.parametrize("mode", ["lookup", "small", "prompt-lookup", "assisted"])
def test_each_baseline_alone_and_sampling(first_turns, folders, mode):
    small = ["--small-model", folders.target] if mode in ("small", "assisted") else []
    options = ["--temperature", 1.2, "--limit", 2, "--tree", "chain"]
    ended, result = first_turns("--modes", f"plain,{mode}", *small, *options)
    assert ended.code == 0
    assert list(result["ratios"]) == [f"{mode}/plain"]
    assert result["modes"][mode]["questions"] == 2
    if mode in m.OUR_MODES:
        assert result["modes"][mode]["identical"] == 1.0


def test_the_draft_named_may_be_any(first_turns, folders):
    _, result = first_turns("--modes", "plain,beagle", "--draft", "lookup", "--tree", "chain", "-n", 40)
    assert result["modes"]["beagle"]["identical"] == 1.0
    assert result["meta"]["arguments"]["draft"] == "lookup"


def test_small_models_that_are_missing_or_foreign(first_turns, folders, tmp_path):
    for mode in ("small", "assisted"):
        ended, result = first_turns("--modes", f"plain,{mode}")
        ended.refusal(f"mode '{mode}'", "small_model")
        assert "loading" not in ended.err  # found out before the work
        assert result is None
    foreign = tiny_tokenizer()
    foreign.add_tokens(["w64"])
    tiny_model(vocab_size=65).save_pretrained(tmp_path / "foreign")
    foreign.save_pretrained(tmp_path / "foreign")
    for mode in ("small", "assisted"):
        ended, _ = first_turns("--modes", f"plain,{mode}", "--small-model", tmp_path / "foreign")
        ended.refusal(tmp_path / "foreign", folders.target, "vocabulary")


def test_commands_are_kept_without_the_folders_of_this_machine(monkeypatch):
    monkeypatch.setenv("BEAGLE_DATA", "/some/data")
    words = ["/some/data/a.jsonl", "/home/me/target", "model:/home/me/small", "model:owner/name", "lookup", "-n"]
    words += ["now=/home/me/src", "data=/some/data/b.jsonl", "before=../src"]
    kept = ["$BEAGLE_DATA/a.jsonl", "target", "model:small", "model:owner/name", "lookup", "-n"]
    kept += ["now=src", "data=$BEAGLE_DATA/b.jsonl", "before=../src"]
    assert [redact_paths(word) for word in words] == kept


def test_our_baselines_share_one_target(model):
    plan = TreePlan("chain")
    plain, lookup = m.load_systems(model.target, ["plain", "lookup"], m.Drafts(), plan)
    assert plain.hf is None
    assert plain.model.drafter is None
    assert lookup.hf is None
    assert lookup.model.target is model.target
    assert lookup.model.plan is plan


@pytest.mark.parametrize("mode", m.OUR_MODES)
def test_each_mode_drafts_with_its_own_drafter(mode, monkeypatch):
    target = tiny_target()
    used = []

    class Nothing(DraftContext):
        def extend(self, tokens, states):
            pass

    class Named(m.HeadDrafter):
        def __init__(self, name):
            self.name = name
            self.head = SimpleNamespace(architecture="eagle")

        def context(self):
            used.append(self.name)
            return Nothing()

        def draft(self, contexts, roots, plan, min_expected_tokens=0.0):
            return [Draft([5], [-1], [-1.0])]

    monkeypatch.setattr(m, "load_drafter", lambda draft, *a, **o: None if str(draft) == "none" else Named(str(draft)))
    drafts = m.Drafts("mine+lookup", "baseline", "tiny")
    system = {c.mode: c for c in m.load_systems(target, m.OUR_MODES, drafts, TreePlan("chain"))}[mode]
    _, stats = system.answer("w3 w4", m.Options(8), 0)
    names = {
        "beagle": "mine+lookup",
        "chain": "mine+lookup",
        "head": "mine",
        "eagle": "baseline",
        "lookup": "lookup",
        "small": "model:tiny",
    }
    assert used == ([names[mode]] if mode in names else [])
    assert (stats.drafted > 0) == (mode != "plain")


def test_chain_drafts_with_the_same_heads_one_candidate_a_level(first_turns, folders):
    _, result = first_turns(
        "--draft", f"{folders.head}+lookup", "--modes", "plain,beagle,chain", "--limit", 2, "--nodes", 12
    )
    assert all(figures["identical"] == 1.0 for figures in result["modes"].values())
    tree, chain = (result["modes"][mode]["candidates_per_pass"] for mode in ("beagle", "chain"))
    assert chain <= 5 < tree


def test_passes_of_the_librarys_drafting_are_counted(model):
    """Prefill's pass apart: its tokens, the others' and their passes add up; a perfect assistant needs few."""
    hf = HFGenerate(tiny_model(), tiny_model())
    calls = []
    hf.model.register_forward_hook(lambda *a: calls.append(1))
    for mode in ("transformers", "prompt-lookup", "assisted"):
        calls.clear()
        ids, stats = m.System(mode, model, hf).answer("w3 w4", m.Options(24), 0)
        assert stats.passes == len(calls) - 1 == len(stats.accepted)
        assert sum((n + 1) * times for n, times in stats.accepted_at.items()) == stats.passed_tokens < len(ids)
        assert stats.tokens == len(ids)
        assert (stats.tau == 1) == (mode == "transformers")


def test_the_head_alone_is_a_mode_where_it_is_not_the_only_drafter(first_turns, folders):
    _, result = first_turns("--draft", f"{folders.head}+lookup", "--modes", "plain,beagle,head", "--limit", 2)
    assert list(result["ratios"]) == ["beagle/plain", "head/plain"]
    assert all(figures["identical"] == 1.0 for figures in result["modes"].values())
    assert [str(m.Drafts(draft).of("head", "tiny")) for draft in ("auto", "lookup", "none", "mine", "mine+lookup")] == [
        *["head"] * 3,
        *["mine"] * 2,
    ]
    assert m.available(m.Drafts(), DraftSpec("head", lookup=True))[:4] == ["plain", "beagle", "head", "lookup"]
    for draft in (DraftSpec("mine"), DraftSpec(model="tiny", lookup=True)):
        assert m.available(m.Drafts(), draft)[:3] == ["plain", "beagle", "lookup"]
    assert m.available(m.Drafts(), DraftSpec())[:2] == ["plain", "lookup"]


def test_eagle_heads_and_others_are_told_apart(first_turns, folders, tmp_path):
    target = tiny_target()
    save_head(tiny_head(target, architecture="eagle"), tmp_path / "eagle", target="tiny", dtype=torch.float32, meta={})
    ended, result = first_turns("--modes", "plain,beagle,eagle", "--eagle", tmp_path / "eagle", "--limit", 2)
    assert ended.code == 0
    assert list(result["ratios"]) == ["beagle/plain", "eagle/plain"]
    assert result["modes"]["eagle"]["identical"] == 1.0
    assert result["meta"]["arguments"]["eagle"] == "eagle"
    first_turns("--modes", "eagle", "--eagle", folders.head)[0].refusal(folders.head, "as draft")
    first_turns("--modes", "eagle")[0].refusal("mode 'eagle'", "name its folder")

"""The EAGLE-3 head: its training against inference one position at a time, in plain Python; what it reads, and answers."""

from __future__ import annotations

import math

import pytest
import torch
import yaml
from safetensors import safe_open

from beagle.drafters.checkpoint import load_head, save_head
from beagle.drafters.eagle3_head import Eagle3Config, Eagle3Head
from beagle.errors import BeagleError
from beagle.evaluation.modes import Drafts, load_systems
from beagle.research.compare import run_variants
from beagle.research.compare.variants import parse
from beagle.training.answers import AnswerGenerator
from beagle.training.config import TrainConfig
from beagle.training.data import samples
from beagle.training.prompts import Prompt
from beagle.training.recipe import AnswerConfig, Recipe, read_recipe
from beagle.training.stages import STAGES, step_alpha
from beagle.training.states import Fingerprint, StateStore
from beagle.training.trainer import Trainer
from beagle.training.windows import Batch
from conftest import tiny_head, tiny_target
from test_unrolled import collected, gradients, turned

D = 16
HEADS = [{}, {"num_kv_heads": 2}, {"num_kv_heads": 1, "hidden_act": "gelu", "norm_layers": False, "kv_layers": (2,)}]


def make_head(**overrides) -> Eagle3Head:
    torch.manual_seed(1)
    config = {"hidden_size": D, "num_heads": 4, "num_kv_heads": 4, "head_dim": 4, "intermediate_size": 24}
    config |= {"target_vocab_size": 32, "kv_layers": (1, 2, 4)}
    head = Eagle3Head(Eagle3Config(**{**config, **overrides})).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return head


def make_batch(head: Eagle3Head) -> Batch:
    random = torch.Generator().manual_seed(0)
    embeddings = torch.randn(2, 12, D, generator=random, dtype=torch.float64)
    states = 3 * torch.randn(2, 12, head.config.state_size, generator=random, dtype=torch.float64)
    return Batch(embeddings, states, torch.tensor([0, 3]), torch.tensor([8, 10]))


def normed(head: Eagle3Head, norm: torch.nn.RMSNorm, x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean() + head.config.norm_eps).sqrt() * norm.weight


def fused(head: Eagle3Head, state: torch.Tensor) -> torch.Tensor:
    """g of the layers' outputs; the top state stands behind them, unread."""
    parts = [state[i * D : (i + 1) * D] for i in range(len(head.config.kv_layers))]
    if head.config.norm_layers:
        parts = [normed(head, head.layer_norms[i], part) for i, part in enumerate(parts)]
    return sum(head.layer_proj.weight[:, i * D : (i + 1) * D] @ part for i, part in enumerate(parts))


def layer(head: Eagle3Head, slots: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """ĥ of the next slot, from embedding and g of the slots 0, 1, …"""
    c, g = head.config, slots[-1][1]
    xs = [torch.cat([normed(head, head.embedding_norm, e), normed(head, head.state_norm, s)]) for e, s in slots]
    size, out = c.head_dim, []
    for h in range(c.num_heads):
        own = slice(h * size, (h + 1) * size)
        shared = h // (c.num_heads // c.num_kv_heads)
        of_kv = slice(shared * size, (shared + 1) * size)
        q = turned(head.q_proj.weight[own] @ xs[-1], len(xs) - 1, c.rope_theta)
        keys = [turned(head.k_proj.weight[of_kv] @ x, i, c.rope_theta) for i, x in enumerate(xs)]
        weights = torch.stack([q @ key for key in keys]).div(math.sqrt(size)).exp()
        values = [head.v_proj.weight[of_kv] @ x for x in xs]
        out.append(sum(w * v for w, v in zip(weights / weights.sum(), values, strict=True)))
    y = head.o_proj.weight @ torch.cat(out) + g
    inner = normed(head, head.mlp_norm, y)
    a = y + head.down_proj.weight @ (head.activation(head.gate_proj.weight @ inner) * (head.up_proj.weight @ inner))
    return normed(head, head.final_norm, a)


def simulated(head: Eagle3Head, batch: Batch, steps: int) -> dict[tuple[int, int, int], torch.Tensor]:
    """``{(step, sample, slot): predicted state}``: from each base, draft step by step as inference does."""
    found = {}
    for row in range(len(batch.first)):
        first, last = int(batch.first[row]), int(batch.last[row])
        for base in range(first, last + 1):
            slots = [(batch.embeddings[row, i + 1], fused(head, batch.states[row, i])) for i in range(base + 1)]
            for step in range(1, steps + 1):
                slot = base + step - 1
                if slot > last:
                    break
                found[step, row, slot] = layer(head, slots)
                if slot < last:
                    slots.append((batch.embeddings[row, slot + 2], found[step, row, slot]))
    return found


@pytest.mark.parametrize("overrides", HEADS, ids=str)
@pytest.mark.parametrize("steps", [1, 4])
def test_training_is_inference_from_every_slot(overrides, steps):
    head = make_head(**overrides)
    batch = make_batch(head)
    expected = simulated(head, batch, steps)
    found = collected(STAGES[Eagle3Head].late(head, batch, batch.states, 3, 1, steps))
    assert found.keys() == expected.keys()
    assert len(expected) > 4 * steps
    for key, state in expected.items():
        torch.testing.assert_close(found[key], state, atol=1e-5, rtol=1e-5)
    weights = torch.randn(2, 12, D, dtype=torch.float64)
    ours, literal = gradients(head, found, weights), gradients(head, expected, weights)
    for name, gradient in literal.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(ours[name], gradient, atol=1e-4, rtol=1e-4)


def test_the_top_state_is_not_read():
    head = make_head()
    batch = make_batch(head)
    outputs = []
    for changed in (0.0, 1.0):
        states = batch.states.clone()
        states[..., -D:] += changed
        outputs.append(STAGES[Eagle3Head].late(head, batch, states, 1, 0, 3))
    for (a, *_), (b, *_) in zip(*outputs, strict=True):
        assert torch.equal(a, b)


def test_predicted_states_keep_their_size_however_deep():
    """Fed back behind the final norm, unlike EAGLE's first head, whose states grow."""
    head = make_head()
    batch = make_batch(head)
    for states, _, real in STAGES[Eagle3Head].late(head, batch, batch.states, 1, 0, 8):
        scaled = states[real] / head.final_norm.weight
        torch.testing.assert_close(scaled.square().mean(-1), torch.ones_like(scaled[:, 0]), atol=1e-3, rtol=1e-3)


def test_autocast_keeps_the_residual_precise():
    head = make_head().float()
    batch = make_batch(head)
    batch = Batch(batch.embeddings.float(), batch.states.float(), batch.first, batch.last)
    plain = STAGES[Eagle3Head].late(head, batch, batch.states, 1, 0, 3)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = STAGES[Eagle3Head].late(head, batch, batch.states, 1, 0, 3)
    for (a, _, real), (b, _, _) in zip(plain, rounded, strict=True):
        assert b.dtype == torch.float32
        assert (a - b)[real].abs().max() < 0.1 * a[real].abs().max()


@pytest.mark.parametrize(
    ("count", "layers"), [(30, (2, 15, 27)), (24, (2, 12, 21)), (7, (2, 3, 4)), (6, (2, 3)), (3, (1, 2)), (2, (1,))]
)
def test_layers_are_the_published_ones_where_none_are_named(count, layers):
    assert Eagle3Config.default_kv_layers(count) == layers


def test_a_target_has_its_default_layers():
    target = tiny_target(state_layers=(1, 2))
    assert tiny_head(target, architecture="eagle3").config.kv_layers == (1, 2)
    assert tiny_head(target, architecture="eagle3", kv_layers=(2,)).config.kv_layers == (2,)


def test_a_head_of_no_layers_is_refused():
    with pytest.raises(ValueError, match="at least one layer"):
        make_head(kv_layers=())


@pytest.mark.parametrize("overrides", [{}, {"norm_layers": False, "kv_layers": (2,)}], ids=str)
def test_checkpoint_roundtrip(tmp_path, overrides):
    target = tiny_target(state_layers=(1, 2))
    head = tiny_head(target, architecture="eagle3", draft_vocab_size=10, **overrides)
    save_head(head, tmp_path, target="tiny", dtype=torch.float32, meta={})
    loaded = load_head(tmp_path, target)
    assert (type(loaded), loaded.config) == (Eagle3Head, head.config)
    for name, tensor in head.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_step_weights_fall_as_published():
    config = TrainConfig(steps=3, window=3, step_decay=0.8)
    assert config.step_weights == pytest.approx([1 / 2.44, 0.8 / 2.44, 0.64 / 2.44])
    assert TrainConfig(steps=2, window=3).step_weights == pytest.approx([3 / 5, 2 / 5])
    assert TrainConfig(steps=2, window=3, beta_decay=False).step_weights == [0.5, 0.5]


def test_the_recipe_has_the_budget_of_ours(request):
    configs = request.config.rootpath / "configs"
    ours, theirs = (read_recipe(configs / f"smollm2-135m{end}.yaml") for end in ("", "-eagle3"))
    assert theirs.answers == ours.answers
    assert theirs.train.late_epochs == ours.train.early_epochs + ours.train.late_epochs
    shared = ("batch_tokens", "draft_vocab_size", "learning_rate", "schedule", "dropout", "autocast", "seed")
    assert all(getattr(theirs.train, name) == getattr(ours.train, name) for name in shared)
    assert theirs.train.early_epochs == theirs.train.regression == theirs.train.noise == 0
    assert theirs.state_layers(30) == (2, 15, 27)


def test_variants_are_trained_as_published():
    recipe = Recipe(train=TrainConfig(window=3, steps=3), head={"kv_layers": (10, 20), "num_kv_heads": 3, "blocks": 2})
    train, head = parse("eagle3").settings(recipe, 0)
    assert (train.early_epochs, train.late_epochs, train.steps) == (0, 1, 3)
    assert (train.regression, train.noise, train.step_decay) == (0, 0, 0.8)
    assert head == {"architecture": "eagle3", "num_kv_heads": 3}  # the layers are its own
    assert parse("eagle3-u7").settings(recipe, 0)[0].steps == 7
    assert parse("eagle3-u3").plain_name(recipe) == "eagle3"
    assert parse("eagle3-lk").settings(recipe, 0)[0].loss == "lk"
    with pytest.raises(BeagleError, match=r"'late' is unknown; eagle3 takes uN"):
        parse("eagle3-late")


def test_it_learns(tmp_path):
    target = tiny_target(state_layers=(1, 2))
    target.eos_ids = frozenset()
    prompts = [Prompt(str(i), (" ".join(f"w{3 + (5 * i + j * j) % 60}" for j in range(1 + i % 5)),)) for i in range(12)]
    store = StateStore(tmp_path / "data", Fingerprint.of(target, 20, 24))
    store.write(
        AnswerGenerator(target, AnswerConfig(rows=4, max_prompt_tokens=20, max_new_tokens=24, sampled_share=0)).run(
            prompts
        )
    )
    config = TrainConfig(
        early_epochs=0, late_epochs=16, window=3, steps=3, step_decay=0.8, batch_tokens=120, learning_rate=1e-2,
        warmup_steps=4, schedule="cosine", noise=0, regression=0, validate_every=99,
    )  # fmt: skip
    trainer = Trainer(target, store, tmp_path / "run", config, {"architecture": "eagle3"})
    group = samples(store.shards(), validation=False)
    before = step_alpha(trainer.head.eval(), target, [group], 3)[0]
    trainer.train()
    after = step_alpha(trainer.head, target, [group], 3)[0]
    assert sum(after) > sum(before) + 0.5


def test_it_stands_for_eagle_in_an_evaluation(tmp_path):
    target = tiny_target(state_layers=(1, 2))
    save_head(tiny_head(target, architecture="eagle3"), tmp_path, target="tiny", dtype=torch.float32, meta={})
    drafts = Drafts(eagle=str(tmp_path))
    assert drafts.state_layers(["eagle"], "tiny") == (1, 2)
    (system,) = load_systems(target, ["eagle"], drafts)
    assert system.model.drafter.head.architecture == "eagle3"


@pytest.fixture
def with_recipe(beagle, folders, tmp_path, monkeypatch):
    """Runs `beagle train` on a few prompts, or `beagle research compare` on what it stored."""
    monkeypatch.setattr(run_variants, "in_fresh_process", lambda work, *arguments: work(*arguments))
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "w{i} w{i + 5} w9"}}\n' for i in range(3, 15)))
    section = {"window": 3, "steps": 2, "batch_tokens": 120, "warmup_steps": 2, "validate_every": 9, "late_epochs": 1}

    def call(*arguments, answers=None, head=None):
        recipe = {"train": {**section, "early_epochs": 1}, "answers": {"max_new_tokens": 24, **(answers or {})}}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "head": head or {}}))
        options = ["--config", tmp_path / "recipe.yaml", "--target", folders.target, "--device", "cpu"]
        return beagle(*arguments, *options)

    return call


def test_train_loads_the_target_with_the_heads_layers(with_recipe, folders, beagle, tmp_path):
    options = ["--prompts", tmp_path / "prompts.jsonl", "--out", tmp_path / "run"]
    ended = with_recipe("train", *options, head={"architecture": "eagle3"})
    assert ended.code == 0, ended.err
    with safe_open(tmp_path / "run" / "head" / "model.safetensors", "pt") as file:
        assert file.get_slice("layer_proj.weight").get_shape() == [32, 64]  # layers 1 and 2 of 3
    engine = ["--target", folders.target, "--dtype", "float32", "--device", "cpu", "-n", 12]
    drafted, plain = (
        beagle("generate", "w3 w8 w9", "--draft", draft, *engine) for draft in (tmp_path / "run" / "head", "none")
    )
    assert drafted.code == 0, drafted.err
    assert drafted.out == plain.out != ""


def test_heads_share_one_store(with_recipe, tmp_path):
    """Each picks its layers of what is stored once."""
    options = ["--prompts", tmp_path / "prompts.jsonl", "--out", tmp_path / "run"]
    ended = with_recipe("train", *options, answers={"state_layers": [1, 2]}, head={"kv_layers": [2]})
    assert ended.code == 0, ended.err
    data = tmp_path / "run" / "data"
    assert [*StateStore.existing(data).fingerprint.state_layers] == [1, 2]
    command = ["research", "compare", "--data", data, "--out", tmp_path / "out", "--variants", "beagle,eagle,eagle3"]
    questions = ["--questions", tmp_path / "prompts.jsonl", "--limit", 2, "-n", 6, "--nodes", 4]
    ended = with_recipe(*command, "--tokens", 300, *questions, head={"kv_layers": [2]})
    assert ended.code == 0, ended.err
    read = {}
    for name in ("beagle", "eagle", "eagle3"):
        with safe_open(tmp_path / "out" / "runs" / name / "seed0" / "head" / "model.safetensors", "pt") as file:
            read[name] = file.get_slice("layer_proj.weight").get_shape()[1] // 32
    assert read == {"beagle": 1, "eagle": 1, "eagle3": 2}


def test_a_store_without_the_layers_is_refused_before_any_training(with_recipe, tmp_path):
    options = ["--prompts", tmp_path / "prompts.jsonl", "--out", tmp_path / "run"]
    assert with_recipe("train", *options).code == 0
    command = ["research", "compare", "--data", tmp_path / "run" / "data", "--out", tmp_path / "out"]
    ended = with_recipe(*command, "--tokens", 300, "--variants", "beagle,eagle3")
    ended.refusal("'eagle3' reads layers 1, 2", "answers.state_layers: [1, 2]")
    assert not (tmp_path / "out" / "runs").exists()

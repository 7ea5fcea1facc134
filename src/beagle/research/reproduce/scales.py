"""How large the paper's experiments are run: budgets of answers, training and decoding."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from beagle.drafters.base import TreePlan
from beagle.errors import BeagleError
from beagle.training.config import TrainConfig
from beagle.training.recipe import AnswerConfig, Recipe

PAPER = (
    "the paper's setting: 60 thousand ShareGPT dialogues (give them as prompts), context 2048, 10 early and 10 late "
    "epochs for each head, k = 5, s = 4, trees of 60 candidates; targets Vicuna 7B, Llama-2 7B and Llama-3 8B, greedy, "
    "bf16, one A6000 Ada for decoding"
)


@dataclass(frozen=True)
class Scale:
    """One size of all experiments.

    Attributes:
        about: what it takes, in words.
        recipe: of answers, training (windows and steps are the paper's: k = 5, s = 4)
            and heads.
        prompts: how many are answered; None: all there are.
        tokens: of training for each head; None: the epochs of
            the recipe.
        memory_tokens: the same for runs that measure memory alone.
        questions: of each set; None: all.
        max_new_tokens: of each answer.
        tree: of all decoding alike, so that speeds tell heads apart and not tree sizes.
    """

    about: str
    recipe: Recipe
    prompts: int | None
    tokens: int | None
    memory_tokens: int
    questions: int | None
    max_new_tokens: int
    tree: TreePlan

    def budgets(self) -> dict[str, Any]:
        """All but the words, which may change."""
        return {name: value for name, value in asdict(self).items() if name != "about"}


LAPTOP_TREE = TreePlan("dynamic", 5, 8, 16)  # a CPU's pass of 60 rows takes several times that of one
SCALES = {
    "tiny": Scale(
        about="half an hour on 2 cores for SmolLM2-135M: shapes, not figures; small differences are noise",
        recipe=Recipe(
            AnswerConfig(rows=64, max_prompt_tokens=192, max_new_tokens=120, max_turns=1),
            TrainConfig(
                early_epochs=1, late_epochs=1, batch_tokens=1024, learning_rate=2e-3, warmup_steps=20,
                schedule="cosine", regression=10, autocast=True, draft_vocab_size=8192, validate_every=40, checkpoint_every=60,
                validation_samples=48,
            ),
            {"newest_state": "scale"},
        ),
        prompts=400,
        tokens=80_000,
        memory_tokens=4_000,
        questions=3,
        max_new_tokens=40,
        tree=LAPTOP_TREE,
    ),
    "small": Scale(
        about="some hours on 2 cores for SmolLM2-135M",
        recipe=Recipe(
            AnswerConfig(rows=128, max_tokens=1_000_000),
            TrainConfig(
                early_epochs=1, late_epochs=1, batch_tokens=1024, learning_rate=2e-3, warmup_steps=100,
                schedule="cosine", regression=10, autocast=True, draft_vocab_size=8192, dropout=0.15, validate_every=500,
                checkpoint_every=500,
            ),
            {"newest_state": "scale"},
        ),
        prompts=None,
        tokens=2_000_000,
        memory_tokens=20_000,
        questions=20,
        max_new_tokens=128,
        tree=LAPTOP_TREE,
    ),
    "full": Scale(
        about=PAPER,
        recipe=Recipe(  # configs/paper.yaml
            AnswerConfig(rows=64, max_prompt_tokens=1024, max_new_tokens=1024, max_turns=4, sampled_share=0.0),
            TrainConfig(),
            {"newest_state": "none", "token_in_mlp": False},
        ),
        prompts=None,
        tokens=None,
        memory_tokens=200_000,
        questions=None,
        max_new_tokens=1024,
        tree=TreePlan("dynamic", 5, 10, 60),
    ),
}  # fmt: skip


def find_scale(name: str) -> Scale:
    """
    Raises:
        BeagleError: there is none of this name.
    """
    if name not in SCALES:
        raise BeagleError(f"scale '{name}' is unknown; use {', '.join(SCALES)}")
    return SCALES[name]

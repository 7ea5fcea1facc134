"""The draft trees of the live sequences: how deep they are, and how many candidates are verified."""

from __future__ import annotations

from dataclasses import dataclass, replace

from beagle.decoding.costs import Costs
from beagle.decoding.sequence import Sequence, SequenceError
from beagle.drafters.base import Draft, Drafter, TreePlan, best_chain, prune
from beagle.limits import MAX_NODES
from beagle.targets.plan import EXACT_TOKENS

NOTHING = Draft([], [], [])


@dataclass(frozen=True)
class Drafts:
    """Asks a drafter, and keeps of its candidates what is worth verifying.

    Attributes:
        drafter: None drafts nothing.
        costs: of passes over one sequence; None leaves sizes to the plan.
        shared_costs: of passes over several.
        exact: each sequence is verified in a pass of its own.
    """

    drafter: Drafter | None
    plan: TreePlan
    costs: Costs | None
    shared_costs: Costs | None
    exact: bool
    chains_only: bool

    def of(self, sequences: list[Sequence]) -> list[Draft]:
        """Each sequence's candidates; none where the limit leaves no room for one.

        Raises:
            SequenceError: one sequence can't be drafted for.
        """
        drafts = [NOTHING] * len(sequences)
        drafting = [i for i, one in enumerate(sequences) if one.left > 1 and one.context is not None]
        if self.drafter is None or not drafting:
            return drafts
        alone = self.exact or len(sequences) == 1
        costs = self.costs if alone else self.shared_costs
        reach = [min(self.plan.depth, sequences[i].left - 1) for i in drafting]  # never past the limit or the context
        nodes = self.plan.nodes if len(sequences) == 1 else None
        plan = replace(self.plan, depth=max(reach), nodes=nodes)
        min_gain = costs.min_expected_tokens(1 if alone else len(sequences)) if costs else 0.0
        made = self._together(self.drafter, [sequences[i] for i in drafting], plan, min_gain)
        most = EXACT_TOKENS - 1 if self.exact else MAX_NODES
        if self.plan.kind != "static" and self.plan.nodes is not None:
            most = min(most, self.plan.nodes)
        if self.chains_only:
            made = [best_chain(draft) for draft in made]
        made = [prune(draft, depth, most) for draft, depth in zip(made, reach, strict=True)]
        if costs is not None and self.plan.sized_by_costs:
            if alone:
                made = [draft.first(costs.best_tree_size(draft.scores)) for draft in made]
            else:
                made = costs.share(made, len(sequences))
        for i, draft in zip(drafting, made, strict=True):
            drafts[i] = draft
        return drafts

    @staticmethod
    def _together(drafter: Drafter, sequences: list[Sequence], plan: TreePlan, min_gain: float) -> list[Draft]:
        """The drafter's candidates; where it fails, the sequence is named whose draft fails alone, too."""
        contexts = [context for one in sequences if (context := one.context) is not None]
        for one, context in zip(sequences, contexts, strict=True):
            context.noise = one.sampler.noise(len(one.tokens))
        roots = [one.tokens[-1] for one in sequences]
        try:
            return drafter.draft(contexts, roots, plan, min_gain)
        except Exception:
            for one, context, root in zip(sequences, contexts, roots, strict=True):
                try:
                    drafter.draft([context], [root], plan, min_gain)
                except Exception as error:
                    raise SequenceError(one, error) from error
            raise

"""The losses of paper §4.2 and losses shaped like acceptance; the logits of all slots never exist at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ROUND = 64  # of slots: products of few shapes, as oneDNN keeps what it made for each
CHUNK = 256  # slots whose logits exist at a time: fewer are slower products, more are slower memory
GPU_CHUNK = 4096  # the same where a product takes less time than its start
LK_DECAY = 3.0  # η of the LK losses: how fast cross-entropy gives way to total variation as acceptance grows
DPACE_SMOOTHING = 0.5  # α of D-PACE: a step that is never accepted still passes on this share of its weight

Loss = Literal["cross_entropy", "total_variation", "lk", "log_acceptance"]


class _SlotLosses(torch.autograd.Function):
    """Weighted loss and acceptance of each slot; the LM head is frozen, so its input's gradient is made at once."""

    @staticmethod
    def forward(
        ctx: Any,
        predicted: Tensor,
        true: Tensor,
        head: Tensor,
        weights: Tensor,
        bias: Tensor | None,
        loss: Loss,
        share: float,
        measure: bool,
    ) -> tuple[Tensor, Tensor]:
        values, acceptance = torch.empty_like(weights), torch.empty_like(weights)
        gradient = torch.empty_like(predicted)
        size = CHUNK if predicted.device.type == "cpu" else GPU_CHUNK
        for at in range(0, len(predicted), size):
            chunk = slice(at, at + size)
            values[chunk], gradient[chunk], acceptance[chunk] = _losses_of(
                predicted[chunk], true[chunk], head, weights[chunk], bias, loss, share, measure
            )
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(acceptance)
        return values, acceptance

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0][:, None], None, None, None, None, None, None, None


def _losses_of(
    predicted: Tensor,
    true: Tensor,
    head: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    loss: Loss,
    share: float,
    measure: bool,
) -> tuple[Tensor, Tensor, Tensor | float]:
    """One chunk: weighted losses, gradients of the predicted states, acceptance. What it made besides is freed."""
    log_q = F.log_softmax(F.linear(predicted, head, bias).float(), dim=-1)
    p = F.softmax(F.linear(true, head, bias).float(), dim=-1)
    value = -torch.linalg.vecdot(p, log_q)
    q = log_q.exp_()
    acceptance: Tensor | float = 0.0
    if loss != "cross_entropy":
        value, error, acceptance = _acceptance_shaped(value, p, q, weights, loss, share)
    else:
        if measure:
            acceptance = torch.minimum(p, q).sum(-1)
        error = q.sub_(p).mul_(weights[:, None])
    return weights * value, error.to(head.dtype) @ head, acceptance


def _acceptance_shaped(
    cross_entropy: Tensor, p: Tensor, q: Tensor, weights: Tensor, loss: Loss, share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses that know acceptance α = Σ min(p, q), of one chunk.

    The gradient of α for logit v is q_v (1[q_v < p_v] - Σ_u q_u 1[q_u < p_u]).

    Args:
        cross_entropy: ``[slots]``.
        p: the target's distribution ``[slots, draft_vocab]``.
        q: the draft's, likewise; overwritten.
        weights: ``[slots]``, applied to the gradient alone.

    Returns:
        The loss ``[slots]``, its weighted gradient for the draft's logits ``[slots, draft_vocab]``, α ``[slots]``.
    """
    overlap = torch.minimum(p, q)
    accepted = overlap.sum(-1)
    if loss == "lk":
        decay = torch.exp(-LK_DECAY * accepted)
        of_entropy, of_acceptance = share + (1 - share) * decay, (1 - share) * (1 - decay)
        value = of_entropy * cross_entropy + of_acceptance * (1 - accepted)
    elif loss == "log_acceptance":
        positive = accepted.clamp(min=torch.finfo(accepted.dtype).tiny)
        of_entropy, of_acceptance = torch.full_like(accepted, share), (1 - share) / positive
        value = share * cross_entropy - (1 - share) * positive.log()
    else:
        of_entropy, of_acceptance = torch.full_like(accepted, share), torch.full_like(accepted, 1 - share)
        value = share * cross_entropy + (1 - share) * (1 - accepted)
    of_entropy, of_acceptance = weights * of_entropy, weights * of_acceptance
    missing = overlap.mul_(q < p)  # q, where more of it would be accepted
    error = q.mul_((of_entropy + of_acceptance * missing.sum(-1))[:, None])
    error.addcmul_(missing, of_acceptance[:, None], value=-1).addcmul_(p, of_entropy[:, None], value=-1)
    return value, error, accepted


def slot_losses(
    predicted: Tensor,
    true: Tensor,
    head: Tensor,
    weights: Tensor,
    bias: Tensor | None = None,
    *,
    loss: Loss = "cross_entropy",
    cross_entropy_share: float = 0.0,
    measure: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """How far the draft's distribution q lies from the target's p, slot by slot.

    ``cross_entropy`` is -Σ p log q; ``total_variation`` ½ Σ |p - q| = 1 - α, where α = Σ min(p, q) is the acceptance
    of a sampled draft; ``log_acceptance`` -log α; ``lk`` λ · cross-entropy + (1 - λ) · total variation with
    λ = exp(-3 α) of each slot, taken as a constant (arXiv 2602.23881, there of the batch's mean α and with the
    KL divergence, whose gradient is that of the cross-entropy).

    Both distributions are normalised over the draft vocabulary. With c the target's mass inside it, the true
    acceptance lies between c · α and the smaller of c and α, and q = p reaches the best there is, c. The true p
    would need the product with the whole LM head at every slot, many times the cost of the rest, and would leave
    1 - c of q without a place to go.

    Args:
        predicted: states ``[slots, hidden]``.
        true: the target's, ``[slots, hidden]``.
        head: rows of the LM head, ``[draft_vocab, hidden]``.
        weights: of the slots, ``[slots]``, in fp32.
        bias: ``[draft_vocab]`` of the LM head, where it has one.
        cross_entropy_share: from 0 to 1, of cross-entropy mixed into the loss; the loss has the rest.

    Returns:
        Weighted losses ``[slots]``, and α ``[slots]`` without a gradient, or None.
    """
    real = len(predicted)
    predicted, true = (F.pad(x, (0, 0, 0, -real % ROUND)) for x in (predicted, true))
    weights = F.pad(weights, (0, -real % ROUND))
    values, acceptance = _SlotLosses.apply(
        predicted, true, head, weights, bias, loss, float(cross_entropy_share), measure
    )
    return values[:real], acceptance[:real] if measure else None


def total(values: Tensor) -> Tensor:
    """Sum of slot losses, chunk by chunk, a scalar."""
    if values.device.type != "cpu":
        return values.sum()
    padded = F.pad(values, (0, -len(values) % ROUND))
    return sum((part.sum() for part in padded.split(CHUNK)), start=values.new_zeros(()))


@torch.no_grad()
def dpace_weights(acceptance: Tensor, real: Sequence[Tensor], normalise: bool = True) -> Tensor:
    """Weights of drafted steps by what each is worth for the accepted length (D-PACE, arXiv 2605.18810).

    Step j of a chain weighs Σ_{m ≥ j} Π_{i ≤ m} ã_i, with ã_i = (1 - 0.5) α_i + 0.5 of that chain's own steps:
    a step that later ones depend on, or that earlier ones often lead to, counts more.

    Args:
        acceptance: α of the real slots, step after step, ``[slots]``.
        real: per step, which of its slots bear a loss, bool ``[batch, chains]``; column c is the same chain at
            every step.
        normalise: let the weights sum to 1.

    Returns:
        ``[slots]``, without a gradient.
    """
    mask = torch.stack(list(real))
    smoothed = acceptance.new_zeros(mask.shape)
    smoothed[mask] = (1 - DPACE_SMOOTHING) * acceptance + DPACE_SMOOTHING
    reached = smoothed.cumprod(0)
    weights = reached.flip(0).cumsum(0).flip(0)[mask]
    return weights / weights.sum() if normalise else weights


def regression(predicted: Tensor, true: Tensor, weights: Tensor) -> Tensor:
    """Smooth-L1 between states (EAGLE's "vloss"), mean over channels, weighted sum over slots."""
    per_slot = F.smooth_l1_loss(predicted.float(), true.float(), reduction="none").mean(-1)
    return (weights * per_slot).sum()

"""Preference losses: pure functions from log-probabilities to one loss per pair.

The notation follows the papers: y_w is the chosen response and y_l is the rejected one. A response's log-probability
is the sum over its tokens, in nats. A classifier's response is one class. The log-ratios are

    ρ_w = log π(y_w|x) − log π_ref(y_w|x)        ρ_l = log π(y_l|x) − log π_ref(y_l|x)

The implicit rewards are r̂_w = β ρ_w and r̂_l = β ρ_l (Eq. 5 of DPO without its constant), and the margin is
r̂_w − r̂_l. Every loss below is a function of the log-probabilities, with one entry per pair.

    DPO    Rafailov et al. 2023, "Direct Preference Optimization", https://arxiv.org/abs/2305.18290
    f-DPO  Wang et al. 2023, "Beyond Reverse KL", https://arxiv.org/abs/2309.16240

To add a loss, write a function `(pairs, options) -> (B,)` and add it to `LOSSES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


def dpo_loss(
    pi_logps: Tensor, ref_logps: Tensor, yw_idxs: Tensor, yl_idxs: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """The DPO loss with the signature of the paper's listing (Appendix B).

    Args:
        pi_logps: (B,) log-probabilities under the policy.
        ref_logps: (B,) log-probabilities under the reference.
        yw_idxs: (T,) indices into [0, B) of the chosen responses.
        yl_idxs: (T,) indices into [0, B) of the rejected responses.
        beta: strength of the KL penalty, above 0.

    Returns:
        losses: (T,), −log σ(β[(log π(y_w) − log π(y_l)) − (log π_ref(y_w) − log π_ref(y_l))]), Eq. 7.
        rewards: (B,), β(log π − log π_ref), without gradient.

    For a classifier, flatten the (B, K) log-probabilities: class k of image i has the index i·K + k.
    """
    pairs = LogProbs(pi_logps[yw_idxs], pi_logps[yl_idxs], ref_logps[yw_idxs], ref_logps[yl_idxs])
    losses = PreferenceLoss(beta=beta)(pairs)
    rewards = beta * (pi_logps - ref_logps).detach()
    return losses, rewards


@dataclass
class LogProbs:
    """Log-probabilities of pairs in nats. All have the same shape: (B,), or another one whose first axis is the batch.

    `chosen_tokens` and `rejected_tokens` count the tokens of each response. The losses that average over tokens need
    them (`ipo`, `sigmoid_norm`, `sft`). The default is 1, as for a classifier.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor | int = 1
    rejected_tokens: Tensor | int = 1

    @property
    def chosen_logratios(self) -> Tensor:
        return self.chosen - self.ref_chosen

    @property
    def rejected_logratios(self) -> Tensor:
        return self.rejected - self.ref_rejected


def classifier_pairs(logps: Tensor, ref_logps: Tensor, labels: Tensor, rejected: Tensor) -> LogProbs:
    """The pairs of B images, all (B, T): the true class is chosen, and each of T other classes is rejected.

    Args:
        logps: (B, K) log-probabilities under the policy.
        ref_logps: (B, K) under the reference.
        labels: (B,) true classes.
        rejected: (B, T) rejected classes.
    """
    chosen = labels[:, None].expand_as(rejected)
    return LogProbs(
        logps.gather(1, chosen), logps.gather(1, rejected), ref_logps.gather(1, chosen), ref_logps.gather(1, rejected)
    )


def wrong_classes(labels: Tensor, classes: int) -> Tensor:
    """(B, K−1): every class except the true one of (B,) labels, in ascending order."""
    others = torch.arange(classes - 1, device=labels.device).expand(len(labels), -1)
    return others + (others >= labels[:, None])


@dataclass(frozen=True)
class PreferenceLoss:
    """A weighted sum of preference losses. Calling it maps `LogProbs` to one loss per pair.

    Args:
        loss_types: names from `LOSSES`.
        loss_weights: one weight per name. The default is 1 for all.
        beta: strength of the KL penalty (τ in the IPO paper), above 0.
        label_smoothing: the probability ε that a preference is flipped (`sigmoid`, `robust`, `aot`, `aot_unpaired`), or
            the smoothing of the target (`exo_pair`). It must be 0 if `loss_types` names none of these.
        f_divergence_type: `reverse_kl`, `forward_kl`, `js_divergence` or `alpha_divergence`.
        f_alpha_divergence_coef: α of the α-divergence.
        discopop_tau: temperature of `discopop`'s blend, above 0.

    Raises:
        ValueError: an option is invalid, or options contradict each other. The message names the option.
    """

    loss_types: Sequence[str] = ("sigmoid",)
    loss_weights: Sequence[float] | None = None
    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05

    def __post_init__(self) -> None:
        unknown = [name for name in self.loss_types if name not in LOSSES]
        if unknown or not self.loss_types:
            raise ValueError(f"loss_type must be among {', '.join(sorted(LOSSES))}; got {', '.join(unknown) or 'none'}")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_types):
            raise ValueError(
                f"loss_weights needs one weight per loss type: got {len(self.loss_weights)} for {len(self.loss_types)}"
            )
        for name in ("beta", "discopop_tau"):
            if not 0 < getattr(self, name) < math.inf:  # also false for nan
                raise ValueError(f"{name} must be a finite number above 0; got {getattr(self, name)}")
        if not all(map(math.isfinite, self.loss_weights or ())):
            raise ValueError(f"loss_weights must be finite; got {', '.join(map(str, self.loss_weights or ()))}")
        if not math.isfinite(self.f_alpha_divergence_coef):
            raise ValueError(f"f_alpha_divergence_coef must be finite; got {self.f_alpha_divergence_coef}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5); got {self.label_smoothing}")
        if self.label_smoothing > 0 and not SMOOTHED_LOSSES.intersection(self.loss_types):
            raise ValueError(
                f"label_smoothing {self.label_smoothing} applies to the loss types "
                f"{', '.join(sorted(SMOOTHED_LOSSES))}, not to {', '.join(self.loss_types)}: omit it"
            )
        if "exo_pair" in self.loss_types and self.label_smoothing == 0:
            raise ValueError("loss_type exo_pair needs label_smoothing above 0 (its paper recommends 1e-3)")
        if self.f_divergence_type not in F_DIVERGENCES:
            raise ValueError(
                f"f_divergence_type must be among {', '.join(F_DIVERGENCES)}; got {self.f_divergence_type}"
            )
        if self.f_divergence_type != "reverse_kl":
            # β·log Z(x) cancels only in the difference of the two scores
            wrong = [name for name in self.loss_types if name not in DIFFERENCE_LOSSES]
            if wrong:
                raise ValueError(
                    f"f_divergence_type {self.f_divergence_type} is defined for the loss types that depend on the "
                    f"difference of rewards ({', '.join(sorted(DIFFERENCE_LOSSES))}), not for {', '.join(wrong)}"
                )

    def __call__(self, pairs: LogProbs) -> Tensor:
        """Return (B,) losses. Training minimizes their mean."""
        weights = self.loss_weights or [1.0] * len(self.loss_types)
        terms = [w * LOSSES[name](pairs, self) for name, w in zip(self.loss_types, weights, strict=True)]
        return torch.stack(terms).sum(0)

    def rewards(self, pairs: LogProbs) -> tuple[Tensor, Tensor]:
        """The implicit rewards β ρ_w and β ρ_l, each (B,), detached."""
        return self.beta * pairs.chosen_logratios.detach(), self.beta * pairs.rejected_logratios.detach()

    def gradient_weights(self, pairs: LogProbs) -> tuple[Tensor, Tensor]:
        """The weights of both responses in the gradient: −∂ℓ/∂r̂_w and ∂ℓ/∂r̂_l, each (B,), detached.

        For the sigmoid loss both are σ(r̂_l − r̂_w), the weight in the paper's gradient (the equation after Eq. 7).
        """
        detached = {name: value.detach() for name, value in vars(pairs).items() if isinstance(value, Tensor)}
        with torch.enable_grad():
            both = detached["chosen"].requires_grad_(), detached["rejected"].requires_grad_()
            losses = self(replace(pairs, **detached))
            of_chosen, of_rejected = torch.autograd.grad(losses.sum(), both, allow_unused=True, materialize_grads=True)
        return -of_chosen / self.beta, of_rejected / self.beta

    def scores(self, pairs: LogProbs) -> tuple[Tensor, Tensor]:
        """f'(π/π_ref) of both responses (f-DPO, Theorem 1). For the reverse KL these are the log-ratios."""
        divergence = F_DIVERGENCES[self.f_divergence_type]
        alpha = self.f_alpha_divergence_coef
        return divergence(pairs.chosen_logratios, alpha), divergence(pairs.rejected_logratios, alpha)

    def logits(self, pairs: LogProbs) -> Tensor:
        """β times the difference of the scores. For the reverse KL this is the margin r̂_w − r̂_l."""
        chosen, rejected = self.scores(pairs)
        return self.beta * (chosen - rejected)

    def normalized_delta(self, pairs: LogProbs) -> Tensor:
        """The difference of the scores, each divided by the number of tokens of its response."""
        chosen, rejected = self.scores(pairs)
        tokens = (torch.as_tensor(each).clamp(min=1) for each in (pairs.chosen_tokens, pairs.rejected_tokens))
        return chosen / next(tokens) - rejected / next(tokens)


def _alpha_divergence(log_u: Tensor, alpha: float) -> Tensor:
    if abs(alpha - 1) < 1e-6:  # the limit of (u^(α−1) − 1) / (α − 1)
        return log_u
    exponent = ((alpha - 1) * log_u).clamp(max=80.0)  # exp(80) still fits float32 and bfloat16
    return torch.expm1(exponent) / (alpha - 1)


# f-DPO: f'(u) as a function of log u and α
F_DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda log_u, alpha: log_u,
    "forward_kl": lambda log_u, alpha: -torch.expm1(-log_u),  # 1 − 1/u
    "js_divergence": lambda log_u, alpha: math.log(2) + F.logsigmoid(log_u),  # log(2u / (1 + u))
    "alpha_divergence": _alpha_divergence,
}


def _smoothed(logits: Tensor, epsilon: float) -> Tensor:
    """−(1−ε) log σ(z) − ε log σ(−z)."""
    return -(1 - epsilon) * F.logsigmoid(logits) - epsilon * F.logsigmoid(-logits)


def sigmoid(pairs: LogProbs, options: PreferenceLoss) -> Tensor:
    """DPO, Eq. 7. With label smoothing it is conservative DPO (Mitchell 2023, https://ericmitchell.ai/cdpo.pdf)."""
    return _smoothed(options.logits(pairs), options.label_smoothing)


def robust(pairs: LogProbs, options: PreferenceLoss) -> Tensor:
    """Robust DPO (https://arxiv.org/abs/2403.00409), unbiased if labels are flipped with probability ε."""
    logits, epsilon = options.logits(pairs), options.label_smoothing
    return (-(1 - epsilon) * F.logsigmoid(logits) + epsilon * F.logsigmoid(-logits)) / (1 - 2 * epsilon)


def hinge(pairs: LogProbs, options: PreferenceLoss) -> Tensor:
    """The hinge loss of SLiC on the margin (https://arxiv.org/abs/2309.06657)."""
    return torch.relu(1 - options.logits(pairs))


def ipo(pairs: LogProbs, options: PreferenceLoss) -> Tensor:
    """IPO (https://arxiv.org/abs/2310.12036, Eq. 17) with τ = β, on scores per token as its authors ran it."""
    return (options.normalized_delta(pairs) - 1 / (2 * options.beta)) ** 2


def exo_pair(pairs: LogProbs, options: PreferenceLoss) -> Tensor:
    """EXO on pairs (https://arxiv.org/abs/2402.00856, Eq. 16): the reverse KL to the smoothed preference."""
    logits, epsilon = options.logits(pairs), options.label_smoothing
    chosen = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-epsilon))
    rejected = torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(epsilon))
    return chosen + rejected


def nca_pair(pairs: LogProbs, options: PreferenceLoss) -> Tensor:
    """NCA on pairs (https://arxiv.org/abs/2402.05369), K = 2."""
    chosen, rejected = options.beta * pairs.chosen_logratios, options.beta * pairs.rejected_logratios
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair(pairs: LogProbs, options: PreferenceLoss) -> Tensor:
    """BCO without its reward shift (https://arxiv.org/abs/2404.04656), as in TRL's `bco_pair`."""
    chosen, rejected = options.beta * pairs.chosen_logratios, options.beta * pairs.rejected_logratios
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def sppo_hard(pairs: LogProbs, options: PreferenceLoss) -> Tensor:
    """SPPO with hard win probabilities 1 and 0 (https://arxiv.org/abs/2405.00675, Eq. 4.7)."""
    target = 0.5 / options.beta
    return (pairs.chosen_logratios - target) ** 2 + (pairs.rejected_logratios + target) ** 2


def aot(pairs: LogProbs, options: PreferenceLoss) -> Tensor:
    """AOT, paired (https://arxiv.org/abs/2406.05882): sorted policy margins against sorted reference margins.

    Sorting mixes the pairs of a batch, so an entry of the loss belongs to a rank instead of a pair.
    """
    policy = (pairs.chosen - pairs.rejected).sort(dim=0).values
    reference = (pairs.ref_chosen - pairs.ref_rejected).sort(dim=0).values
    return _smoothed(options.beta * (policy - reference), options.label_smoothing)


def aot_unpaired(pairs: LogProbs, options: PreferenceLoss) -> Tensor:
    """AOT, unpaired (https://arxiv.org/abs/2406.05882): sorted chosen against sorted rejected log-ratios."""
    chosen = pairs.chosen_logratios.sort(dim=0).values
    rejected = pairs.rejected_logratios.sort(dim=0).values
    return _smoothed(options.beta * (chosen - rejected), options.label_smoothing)


def apo_zero(pairs: LogProbs, options: PreferenceLoss) -> Tensor:
    """APO-zero (https://arxiv.org/abs/2408.06266, Eq. 7) raises the chosen and lowers the rejected log-ratio."""
    chosen, rejected = options.beta * pairs.chosen_logratios, options.beta * pairs.rejected_logratios
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down(pairs: LogProbs, options: PreferenceLoss) -> Tensor:
    """APO-down (https://arxiv.org/abs/2408.06266, Eq. 8) lowers both log-ratios, and the rejected one more."""
    chosen = options.beta * pairs.chosen_logratios
    margin = options.beta * (pairs.chosen_logratios - pairs.rejected_logratios)
    return torch.sigmoid(chosen) + torch.sigmoid(-margin)


def discopop(pairs: LogProbs, options: PreferenceLoss) -> Tensor:
    """The log-ratio modulated loss of DiscoPOP (https://arxiv.org/abs/2406.08414, Eq. 5)."""
    logits = options.logits(pairs)
    modulation = torch.sigmoid(logits / options.discopop_tau)
    return -F.logsigmoid(logits) * (1 - modulation) + torch.exp(-logits) * modulation


def sigmoid_norm(pairs: LogProbs, options: PreferenceLoss) -> Tensor:
    """The sigmoid loss on scores per token (length-normalized DPO, https://arxiv.org/abs/2411.15124)."""
    return -F.logsigmoid(options.beta * options.normalized_delta(pairs))


def s_dpo(pairs: LogProbs, options: PreferenceLoss) -> Tensor:
    """S-DPO: one chosen response against all T rejected ones (https://arxiv.org/abs/2406.09215, Eq. 9).

        −log σ(−log Σ_l exp(β (ρ_l − ρ_w)))

    For pairs of shape (B, T), every entry is the loss of its row, so that means over pairs are means over rows. For
    shape (B,) it is the sigmoid loss. The rejected response with the smallest margin gets most of a row's weight.
    """
    logits = options.logits(pairs)
    rows = logits if logits.ndim > 1 else logits[:, None]
    return F.softplus(torch.logsumexp(-rows, dim=1, keepdim=True)).expand_as(rows).reshape(logits.shape)


def sft(pairs: LogProbs, options: PreferenceLoss) -> Tensor:
    """The mean cross-entropy of the batch's chosen tokens, an additional term as in RPO and MPO."""
    tokens = torch.as_tensor(pairs.chosen_tokens, device=pairs.chosen.device).expand_as(pairs.chosen)
    return (-pairs.chosen.sum() / tokens.sum()).expand_as(pairs.chosen)


LOSSES: dict[str, Callable[[LogProbs, PreferenceLoss], Tensor]] = {
    function.__name__: function
    for function in (
        sigmoid, robust, hinge, ipo, exo_pair, nca_pair, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero, apo_down,
        discopop, sigmoid_norm, s_dpo, sft,
    )
}  # fmt: skip
SMOOTHED_LOSSES = frozenset({"sigmoid", "robust", "exo_pair", "aot", "aot_unpaired"})  # losses with label smoothing
# losses that depend on the rewards only through their difference (`sft` does not depend on them)
DIFFERENCE_LOSSES = frozenset(
    {"sigmoid", "robust", "hinge", "ipo", "exo_pair", "discopop", "sigmoid_norm", "s_dpo", "sft"}
)

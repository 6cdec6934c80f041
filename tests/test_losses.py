import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from resdpo_trl.losses import F_DIVERGENCES, LOSSES, SMOOTHED_LOSSES, LogProbs, PreferenceLoss, dpo_loss
from tests.conftest import tiny_model


def papers_listing(pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    """The listing of the DPO paper's Appendix B."""
    pi_yw_logps, pi_yl_logps = pi_logps[yw_idxs], pi_logps[yl_idxs]
    ref_yw_logps, ref_yl_logps = ref_logps[yw_idxs], ref_logps[yl_idxs]
    pi_logratios = pi_yw_logps - pi_yl_logps
    ref_logratios = ref_yw_logps - ref_yl_logps
    losses = -F.logsigmoid(beta * (pi_logratios - ref_logratios))
    rewards = beta * (pi_logps - ref_logps).detach()
    return losses, rewards


def random_logps(batch=7, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected, ref_chosen, ref_rejected = -40 * torch.rand(4, batch, generator=generator, dtype=dtype)
    tokens = torch.randint(1, 30, (2, batch), generator=generator)
    return LogProbs(chosen, rejected, ref_chosen, ref_rejected, *tokens)


def test_dpo_loss_is_the_papers_listing():
    generator = torch.Generator().manual_seed(0)
    pi, ref = -30 * torch.rand(2, 12, generator=generator, dtype=torch.float64)
    yw, yl = torch.randperm(12, generator=generator).split(6)
    for beta in (0.01, 0.1, 1.0):
        for ours, papers in zip(dpo_loss(pi, ref, yw, yl, beta), papers_listing(pi, ref, yw, yl, beta), strict=True):
            torch.testing.assert_close(ours, papers, rtol=0, atol=1e-12)


def test_a_response_may_stand_in_several_pairs():
    pi, ref = torch.randn(2, 3, dtype=torch.float64)
    losses, rewards = dpo_loss(pi, ref, torch.tensor([0, 0]), torch.tensor([1, 2]), 0.5)
    assert losses.shape == (2,)
    assert rewards.shape == (3,)


def test_gradient_is_the_papers_closed_form():
    """∇ℓ = −β σ(r̂_l − r̂_w) [∇log π(y_w) − ∇log π(y_l)], the equation after Eq. 7, in float64."""
    beta = 0.3
    pairs = random_logps()
    pairs.chosen.requires_grad_()
    pairs.rejected.requires_grad_()
    loss = PreferenceLoss(beta=beta)
    loss(pairs).sum().backward()
    r_w, r_l = loss.rewards(pairs)
    weight = 1 / (1 + torch.exp(r_w - r_l))
    torch.testing.assert_close(pairs.chosen.grad, -beta * weight, rtol=0, atol=1e-10)
    torch.testing.assert_close(pairs.rejected.grad, beta * weight, rtol=0, atol=1e-10)
    for logged in loss.gradient_weights(pairs):
        torch.testing.assert_close(logged, weight, rtol=0, atol=1e-10)


@pytest.mark.parametrize("loss_type", sorted(set(LOSSES) - {"aot", "aot_unpaired"}))
def test_gradients_of_every_loss_in_float64(loss_type):
    pairs = random_logps(4)
    pairs.chosen.mul_(0.2)
    pairs.ref_chosen.mul_(0.2)
    smoothing = 0.1 if loss_type in SMOOTHED_LOSSES else 0.0
    loss = PreferenceLoss((loss_type,), beta=0.2, label_smoothing=smoothing, discopop_tau=1.0)

    def function(chosen, rejected):
        return loss(LogProbs(chosen, rejected, pairs.ref_chosen, pairs.ref_rejected, 5, 7))

    assert torch.autograd.gradcheck(function, (pairs.chosen.requires_grad_(), pairs.rejected.requires_grad_()))


def test_losses_start_where_policy_equals_reference():
    logps = torch.tensor([-3.0, -8.0])
    pairs = LogProbs(logps, logps - 1, logps, logps - 1)
    torch.testing.assert_close(PreferenceLoss()(pairs), torch.full((2,), math.log(2)))
    torch.testing.assert_close(PreferenceLoss(("hinge",))(pairs), torch.ones(2))
    torch.testing.assert_close(PreferenceLoss(("ipo",), beta=0.1)(pairs), torch.full((2,), 25.0))


@pytest.mark.parametrize("divergence", F_DIVERGENCES)
def test_scores_are_derivatives_of_the_f_divergences(divergence):
    """f-DPO's scores are f'(u) at u = π/π_ref: compare with autograd through f itself."""
    alpha = 0.3
    f = {
        "reverse_kl": lambda u: u * u.log(),
        "forward_kl": lambda u: -u.log(),
        "js_divergence": lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
        "alpha_divergence": lambda u: (u**alpha - alpha * u - (1 - alpha)) / (alpha * (alpha - 1)),
    }[divergence]
    u = torch.linspace(0.2, 4, 9, dtype=torch.float64).requires_grad_()
    derivative = torch.autograd.grad(f(u).sum(), u)[0]
    scores = F_DIVERGENCES[divergence](u.detach().log(), alpha)
    # they may differ by a constant, which cancels between the two responses
    difference = scores - derivative
    torch.testing.assert_close(difference, difference[:1].expand_as(difference), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"loss_types": ("sigmod",)}, "sigmod"),
        ({"loss_types": ()}, "loss_type"),
        ({"beta": 0.0}, "beta"),
        ({"beta": math.nan}, "beta"),
        ({"beta": math.inf}, "beta must be a finite number above 0; got inf"),
        ({"loss_weights": (math.nan,)}, "loss_weights must be finite; got nan"),
        (
            {"loss_types": ("sigmoid", "sft"), "loss_weights": (1.0, math.inf)},
            "loss_weights must be finite; got 1.0, inf",
        ),
        ({"discopop_tau": 0.0}, "discopop_tau must be a finite number above 0; got 0.0"),
        ({"discopop_tau": math.nan}, "discopop_tau"),
        ({"f_alpha_divergence_coef": math.nan}, "f_alpha_divergence_coef must be finite; got nan"),
        ({"loss_types": ("s_dpo",), "label_smoothing": 0.1}, r"label_smoothing 0\.1 .* not to s_dpo: omit it"),
        ({"loss_types": ("hinge", "sft"), "label_smoothing": 0.1}, "not to hinge, sft"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"loss_types": ("exo_pair",)}, "exo_pair"),
        ({"loss_types": ("sigmoid", "sft"), "loss_weights": (1.0,)}, "loss_weights"),
        ({"f_divergence_type": "total_variation"}, "total_variation"),
        ({"loss_types": ("nca_pair",), "f_divergence_type": "forward_kl"}, "nca_pair"),
    ],
)
def test_senseless_options_are_refused_by_name(options, named):
    with pytest.raises(ValueError, match=named):
        PreferenceLoss(**options)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_label_smoothing_is_taken_by_the_losses_that_use_it(loss_type):
    pairs, options = random_logps(), PreferenceLoss(label_smoothing=0.1)
    first, second = (
        LOSSES[loss_type](pairs, dataclasses.replace(options, label_smoothing=smoothing)) for smoothing in (0.1, 0.2)
    )
    assert torch.equal(first, second) == (loss_type not in SMOOTHED_LOSSES)
    if loss_type in SMOOTHED_LOSSES:  # beside others too
        PreferenceLoss((loss_type, "sft"), label_smoothing=0.1)


# --- against TRL's own trainer -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory, tokenizer):
    """TRL's DPOTrainer on a policy that has moved away from its reference."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    policy, reference = tiny_model("gpt2", seed=1), tiny_model("gpt2", seed=2)
    rows = [
        {"prompt": f"\n\nHuman: {n}?\n\nAssistant:", "chosen": " yes" * (n + 1), "rejected": " no" * (7 - n)}
        for n in range(6)
    ]
    args = DPOConfig(str(tmp_path_factory.mktemp("trl")), bf16=False, use_cpu=True, report_to="none", max_length=None)
    return DPOTrainer(policy, reference, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


@pytest.fixture(scope="module")
def batch(trl_trainer):
    return trl_trainer.data_collator([trl_trainer.train_dataset[index] for index in range(6)])


@pytest.fixture(scope="module")
def pairs(trl_trainer, batch):
    """The same pairs' log-probabilities from plain forwards, independent of TRL's fused head."""

    def logps(model):
        model.eval()
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        tokens = logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
        return (tokens * batch["completion_mask"][:, 1:]).sum(1).chunk(2)

    lengths = batch["completion_mask"].sum(1).chunk(2)
    return LogProbs(*logps(trl_trainer.model), *logps(trl_trainer.ref_model), *lengths)


def trl_loss(trainer, batch, **options):
    defaults = {
        "loss_types": ("sigmoid",),
        "loss_weights": None,
        "beta": 0.1,
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
    } | options
    defaults["loss_weights"] = defaults["loss_weights"] or [1.0] * len(defaults["loss_types"])
    for name, value in defaults.items():
        assert hasattr(trainer, name), f"TRL's DPOTrainer no longer has {name}"
        setattr(trainer, name, value)
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, batch)


CASES = [
    {"loss_types": (name,), "beta": beta, "label_smoothing": 0.1 if name in SMOOTHED_LOSSES - {"sigmoid"} else 0.0}
    for name in LOSSES
    if name != "s_dpo"  # TRL has none
    for beta in (0.1, 0.5)
]
CASES += [
    {"loss_types": (name,), "f_divergence_type": divergence, "label_smoothing": 0.1 if name == "robust" else 0.0}
    for name in ("sigmoid", "hinge", "ipo", "robust", "discopop", "sigmoid_norm")
    for divergence in ("forward_kl", "js_divergence", "alpha_divergence")
]
CASES += [
    {"loss_types": ("sigmoid", "sft"), "loss_weights": (1.0, 0.3)},
    {"loss_types": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.0)},
]


@pytest.mark.parametrize("options", CASES, ids=lambda options: "-".join(map(str, options.values())))
def test_every_loss_type_against_trls_trainer(options, trl_trainer, batch, pairs):
    ours = PreferenceLoss(**options)(pairs).mean()
    torch.testing.assert_close(ours, trl_loss(trl_trainer, batch, **options), rtol=2e-5, atol=2e-5)


def test_s_dpo_is_a_softmax_over_the_responses_and_for_one_rejected_the_sigmoid_loss():
    """With every other response rejected it is cross-entropy on β·log-ratios."""
    generator = torch.Generator().manual_seed(0)
    logps, ref = (torch.randn(7, 5, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 2])
    others = torch.stack([torch.tensor([k for k in range(5) if k != label]) for label in labels.tolist()])
    chosen = labels[:, None].expand(7, 4)
    pairs = LogProbs(logps.gather(1, chosen), logps.gather(1, others), ref.gather(1, chosen), ref.gather(1, others))
    losses = PreferenceLoss(("s_dpo",), beta=0.4)(pairs)
    expected = torch.nn.functional.cross_entropy(0.4 * (logps - ref), labels, reduction="none")
    torch.testing.assert_close(losses, expected[:, None].expand(7, 4))
    one = LogProbs(logps[:, 0], logps[:, 1], ref[:, 0], ref[:, 1])
    torch.testing.assert_close(PreferenceLoss(("s_dpo",))(one), PreferenceLoss(("sigmoid",))(one))


def test_trl_knows_no_loss_type_that_this_project_lacks():
    from trl import DPOConfig

    text = DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    named = {part.strip("`'., ") for part in text.replace("`", " ").split() if part.startswith("'")}
    assert named
    assert named <= set(LOSSES)


def test_parity_would_notice_a_wrong_loss(trl_trainer, batch, pairs):
    ours = PreferenceLoss(beta=0.1)(pairs).mean()
    assert (ours - trl_loss(trl_trainer, batch, beta=0.12)).abs() > 1e-3

"""The trainers on drawn images: what theory says of DPO for classifiers, and what must stand still or move."""

import copy
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.distributions import Categorical, kl_divergence
from transformers import TrainerCallback

from resdpo_trl.errors import UserError
from resdpo_trl.image.config import (
    SAMPLING,
    ImageCrossEntropyConfig,
    ImageDPOConfig,
)
from resdpo_trl.image.data import Augmentation, AugmentConfig
from resdpo_trl.image.model import ImageClassifierConfig, build_classifier, image_processor
from resdpo_trl.image.trainer import ImageCrossEntropyTrainer, ImageDPOTrainer, RejectedClasses
from resdpo_trl.losses import LOSSES, PreferenceLoss, classifier_pairs, dpo_loss, wrong_classes
from resdpo_trl.metrics import classifier_metrics
from tests.image.conftest import draw

PROCESSOR = image_processor(16, [0.4] * 3, [0.25] * 3)
OPTIONS = {
    "per_device_train_batch_size": 16,
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "eval_strategy": "no",
    "select": "last",
    "logging_steps": 1,
    "learning_rate": 0.05,
    "optim": "sgd",
    "disable_tqdm": True,
}


def network(seed=0, **options):
    config = ImageClassifierConfig(**{"arch": "fast", "widths": [24, 24], "image_size": 16, "num_labels": 4} | options)
    return build_classifier(config, seed, torch.randn(20, 3, 16, 16, generator=torch.Generator().manual_seed(0)))


def trainer(path, model=None, ref_model=None, augment=None, **options):
    model = model or network()
    return ImageDPOTrainer(
        model=model,
        ref_model=ref_model or copy.deepcopy(model).eval(),
        args=ImageDPOConfig(output_dir=str(path), **OPTIONS | options),
        train=draw(64),
        validation=draw(30, seed=1),
        processor=PROCESSOR,
        augment=augment or AugmentConfig(crop_padding=1, flip=True),
    )


def logged(job, name="loss"):
    job.train()
    return [entry[name] for entry in job.state.log_history if name in entry]


# --- what theory says ----------------------------------------------------------------------------------------------


@pytest.fixture
def tables():
    """(B, K) log-probabilities of a policy and a reference, and labels."""
    generator = torch.Generator().manual_seed(0)
    logits, reference = (torch.randn(6, 5, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    return logits, reference.log_softmax(1), torch.tensor([0, 1, 2, 3, 4, 2])


def test_the_papers_index_form_is_the_same_loss(tables):
    logits, ref, labels = tables
    logps = logits.log_softmax(1)
    wrong = wrong_classes(labels, 5)
    ours = PreferenceLoss(beta=0.3)(classifier_pairs(logps, ref, labels, wrong))
    image = torch.arange(6)[:, None].expand_as(wrong)
    chosen, rejected = (image * 5 + labels[:, None]).flatten(), (image * 5 + wrong).flatten()
    theirs, rewards = dpo_loss(logps.flatten(), ref.flatten(), chosen, rejected, 0.3)
    torch.testing.assert_close(ours.flatten(), theirs)
    torch.testing.assert_close(rewards.reshape(6, 5), 0.3 * (logps - ref))


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "apo_zero"])
def test_the_gradient_with_all_is_the_mean_of_sampled_gradients(tables, loss_type):
    logits, ref, labels = tables
    loss = PreferenceLoss((loss_type,), beta=0.7)

    def gradient(rejected):
        leaf = logits.clone().requires_grad_()
        pairs = classifier_pairs(leaf.log_softmax(1), ref, labels, rejected)
        loss(pairs).mean(1).sum().backward()
        return leaf.grad

    exact = gradient(wrong_classes(labels, 5))
    draws, count = [], 4000
    for start in range(0, count, 500):  # 500 draws of every image at once, as epochs of the sampler
        for epoch in range(start, start + 500):
            sampler = RejectedClasses("uniform", labels, 5, seed=0)
            sampler.set_epoch(epoch)
            draws.append(sampler(torch.arange(6), ref))
    # the gradient depends on the drawn class alone: count the draws instead of 4,000 backward passes
    by_class = torch.stack([gradient(wrong_classes(labels, 5)[:, k : k + 1]) for k in range(4)])  # (4, B, K)
    places = (torch.stack(draws)[:, :, 0, None] == wrong_classes(labels, 5)).double().argmax(2)  # (draws, B)
    sampled = by_class[places, torch.arange(6)]  # (draws, B, K)
    error = sampled.std(0) / count**0.5
    assert ((sampled.mean(0) - exact).abs() <= 4.5 * error + 1e-12).all()
    assert (error > 1e-5).any()


def test_the_implied_reward_recovers_a_planted_bradley_terry_reward():
    """Preferences drawn by σ(r_i − r_j) in their exact shares: at the optimum β log(π/π_ref) is r, up to a constant."""
    reward = torch.tensor([1.0, -0.5, 0.3, 2.0], dtype=torch.float64)
    ref = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()[None]
    logits = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    loss, beta = PreferenceLoss(beta=0.5), 0.5
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for winner in range(4):
            label = torch.tensor([winner])
            wrong = wrong_classes(label, 4)
            share = torch.sigmoid(reward[winner] - reward[wrong])
            total = total + (share * loss(classifier_pairs(logits.log_softmax(1), ref, label, wrong))).sum()
        total.backward()
        return total

    optimizer.step(closure)
    implied = beta * (logits.detach().log_softmax(1) - ref)[0]
    torch.testing.assert_close(implied - implied.mean(), reward - reward.mean(), atol=1e-5, rtol=0)


def test_the_kl_is_torchs(tables):
    logits, ref, labels = tables
    figures = classifier_metrics(logits.log_softmax(1), ref, labels, PreferenceLoss())
    expected = kl_divergence(Categorical(logits=logits), Categorical(logits=ref))
    torch.testing.assert_close(torch.from_numpy(figures["kl"]), expected)
    assert figures["accuracy"].tolist() == (logits.argmax(1) == labels).double().tolist()


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("update", ["frozen", "polyak", "copy"])
def test_every_mode_learns(tmp_path, sampling, update):
    job = trainer(
        tmp_path,
        rejected_sampling=sampling,
        reference_update=update,
        num_train_epochs=6,
        beta=1.0,
        learning_rate=0.1,
        per_device_train_batch_size=8,
    )
    before = job.evaluate()["eval_accuracy"]
    job.train()
    after = job.evaluate()
    assert after["eval_accuracy"] > before + 0.15
    assert math.isfinite(after["eval_kl"])


def test_it_starts_at_ln_2_and_a_quiet_reference_stays_as_it_is(tmp_path):
    job = trainer(tmp_path, num_train_epochs=2, rejected_sampling="all")
    reference = copy.deepcopy(job.ref_model.state_dict())
    metrics = job.evaluate()
    assert metrics["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["eval_kl"] == pytest.approx(0, abs=1e-6)
    job.train()
    for name, value in job.ref_model.state_dict().items():
        assert torch.equal(value, reference[name]), name  # the batch norms' statistics too
    assert job.evaluate()["eval_kl"] > 0.01


def test_the_first_steps_gradient_is_the_hand_written_one(tmp_path):
    """One step of SGD against a plain loop on the same augmented batch."""
    job = trainer(tmp_path, max_steps=1, rejected_sampling="all", beta=0.5, lr_scheduler_type="constant")
    plain, reference = copy.deepcopy(job.model).train(), copy.deepcopy(job.model).eval()
    job.train()
    job._sampler.set_epoch(0)
    index = torch.tensor(list(job._sampler)[:16])
    images, labels = job.batch({"index": index})
    ratios = plain(images).logits.log_softmax(1) - reference(images).logits.log_softmax(1).detach()
    losses = []
    for row, label in enumerate(labels.tolist()):
        margins = [ratios[row, label] - ratios[row, k] for k in range(4) if k != label]
        losses.append(torch.stack([-torch.nn.functional.logsigmoid(0.5 * m) for m in margins]).mean())
    torch.stack(losses).mean().backward()
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
    for (name, ours), theirs in zip(job.model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4, msg=name)


def test_polyak_in_closed_form(tmp_path):
    """After k steps the reference is (1−τ)^k θ_0 + Σ_i τ (1−τ)^(k−i) θ_i, parameters and statistics alike."""
    tau, job = 0.2, trainer(tmp_path, reference_update="polyak", polyak_tau=0.2, max_steps=5)
    expected = {name: value.double() for name, value in job.model.state_dict().items()}
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append({name: value.clone().double() for name, value in job.model.state_dict().items()})

    job.add_callback(Watch())
    job.train()
    first, k = expected, len(seen)
    assert k == 5
    moved = 0
    for name, value in job.ref_model.state_dict().items():
        if "num_batches_tracked" in name:
            assert value == seen[-1][name]
            continue
        closed = (1 - tau) ** k * first[name] + sum(tau * (1 - tau) ** (k - 1 - i) * seen[i][name] for i in range(k))
        torch.testing.assert_close(value.double(), closed, atol=1e-6, rtol=1e-5, msg=name)
        moved += not torch.equal(value.double(), first[name])
    assert moved > 5
    assert not job.ref_model.training


def test_copy_happens_between_epochs(tmp_path):
    job = trainer(tmp_path, reference_update="copy", num_train_epochs=3)
    start = copy.deepcopy(job.model.state_dict())
    seen = []

    class Watch(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            seen.append((copy.deepcopy(job.model.state_dict()), copy.deepcopy(job.ref_model.state_dict())))

    job.add_callback(Watch())
    job.train()
    for epoch, (_, reference) in enumerate(seen):
        expected = start if epoch == 0 else seen[epoch - 1][0]
        assert all(torch.equal(reference[name], expected[name]) for name in expected), epoch


def test_pairs_without_signal_are_masked_and_counted(tmp_path):
    job = trainer(tmp_path, rejected_sampling="random", max_steps=4, num_train_epochs=4)
    masked = logged(job, "masked_pairs")
    assert 0 < sum(masked) / len(masked) < 0.6
    job._sampler.set_epoch(0)
    first = torch.tensor(list(job._sampler)[:16])
    rejected = job.rejected(first, torch.zeros(16, 4))[:, 0]
    assert masked[0] == pytest.approx((rejected == job.train_images.labels[first]).float().mean().item())
    # the first step's loss is that of the pairs with a signal alone: ln 2, not less
    assert job.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=0.05)


def test_figures_of_pairs_are_over_the_pairs_with_a_signal(tmp_path, tables):
    job = trainer(tmp_path, rejected_sampling="random")
    logits, ref, labels = tables
    logps = logits.log_softmax(1)
    rejected = torch.tensor([[0], [2], [2], [1], [4], [2]])  # images 0, 2, 4 and 5 drew their own class
    signal = rejected != labels[:, None]
    for rows in (slice(0, 4), slice(4, 6)):  # two steps, the second without any signal
        pairs = classifier_pairs(logps[rows], ref[rows], labels[rows], rejected[rows])
        job._note(pairs, logps[rows], ref[rows], labels[rows], signal[rows])
    means = job.step_figures()
    pairs = classifier_pairs(logps, ref, labels, rejected)
    chosen, lost = job.preference_loss.rewards(pairs)
    weights, _ = job.preference_loss.gradient_weights(pairs)
    assert means["masked_pairs"] == pytest.approx(4 / 6)
    assert means["rewards/margins"] == pytest.approx((chosen - lost)[signal].mean().item(), rel=1e-5)
    assert means["rewards/accuracies"] == pytest.approx((chosen > lost)[signal].float().mean().item())
    assert means["logps/rejected"] == pytest.approx(pairs.rejected[signal].mean().item(), rel=1e-5)
    assert means["gradient_weights/chosen"] == pytest.approx(weights[signal].mean().item(), rel=1e-5)
    assert means["accuracy"] == pytest.approx((logps.argmax(1) == labels).float().mean().item())
    job._note(pairs, logps, ref, labels, torch.zeros_like(signal))
    assert set(job.step_figures()) == {"accuracy", "kl", "masked_pairs"}


def test_what_is_drawn_once_an_epoch_follows_the_epoch(tmp_path):
    job = trainer(tmp_path, rejected_sampling="uniform", num_train_epochs=3)
    augmentation = Augmentation(job.augmentation.config, 64, job.args.seed)
    rejected = RejectedClasses("uniform", job.train_images.labels, 4, job.args.seed)
    orders = []

    class Watch(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            epoch = len(orders)
            orders.append(list(job._sampler))
            for each in (augmentation, rejected):
                each.set_epoch(epoch)
            assert torch.equal(job.augmentation._shift, augmentation._shift)
            assert torch.equal(job.rejected._uniform, rejected._uniform)

    job.add_callback(Watch())
    job.train()
    assert len(orders) == 3 and orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("loss_type", sorted(LOSSES))
@pytest.mark.parametrize("sampling", ["random", "all"])
def test_every_loss_type_runs(tmp_path, loss_type, sampling):
    smoothing = 0.01 if loss_type == "exo_pair" else 0.0
    job = trainer(tmp_path, loss_type=[loss_type], rejected_sampling=sampling, label_smoothing=smoothing, max_steps=2)
    assert all(math.isfinite(value) for value in logged(job))


def test_dropout_is_off_in_both_unless_asked(tmp_path):
    model = network(head="dropout", dropout=0.5)
    job = trainer(tmp_path, model=model)
    assert {m.p for m in job.model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    assert {m.p for m in job.ref_model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    asked = trainer(tmp_path, model=network(head="dropout", dropout=0.5), disable_dropout=False)
    assert {m.p for m in asked.model.modules() if isinstance(m, torch.nn.Dropout)} == {0.5}


@pytest.mark.parametrize("update", ["frozen", "polyak", "copy"])
@pytest.mark.parametrize("stop", [4, 6], ids=["at an epoch's end", "within an epoch"])
@pytest.mark.parametrize("muon", [0.0, 0.05], ids=["sgd", "muon"])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, update, stop, muon):
    options = {
        "muon_learning_rate": muon,
        "reference_update": update,
        "polyak_tau": 0.1,
        "num_train_epochs": 3,
        "rejected_sampling": "hard",
        "optim_args": "momentum=0.9,nesterov=true",
        "save_strategy": "steps",
        "save_steps": stop,
    }
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = trainer(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    for name, value in whole.ref_model.state_dict().items():
        assert torch.equal(value, resumed.ref_model.state_dict()[name]), name


def test_scores_are_in_the_images_order(tmp_path):
    job = trainer(tmp_path, per_device_eval_batch_size=7)
    images = draw(30, seed=1)
    logps, ref_logps = job.score(images)
    expected = job.model.eval()(job.normalize(images.pixels)).logits.log_softmax(1)
    torch.testing.assert_close(logps, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ref_logps, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("muon", [0.0, 0.1], ids=["sgd", "muon"])
def test_cross_entropy_learns_and_biases_and_filters_have_their_own_rates(tmp_path, muon):
    job = ImageCrossEntropyTrainer(
        model=network(),
        args=ImageCrossEntropyConfig(
            output_dir=str(tmp_path),
            **OPTIONS
            | {
                "num_train_epochs": 6,
                "bias_learning_rate_scale": 4.0,
                "weight_decay": 0.01,
                "label_smoothing_factor": 0.1,
                "muon_learning_rate": muon,
            },
        ),
        train=draw(64),
        validation=draw(30, seed=1),
        processor=PROCESSOR,
        augment=AugmentConfig(crop_padding=1),
    )
    job.create_optimizer()
    decayed, free, *filters = job.optimizer.param_groups
    assert {p.ndim for p in decayed["params"]} == ({2} if muon else {2, 4}) and decayed["weight_decay"] == 0.01
    assert [group["lr"] for group in filters] == ([muon] if muon else [])
    assert {p.ndim for p in free["params"]} == {1} and free["weight_decay"] == 0.0
    assert free["lr"] == pytest.approx(4 * decayed["lr"])
    job.optimizer = None
    before = job.evaluate()["eval_accuracy"]
    job.train()
    assert job.evaluate()["eval_accuracy"] > before + 0.2


@pytest.mark.parametrize(
    ("metric", "better"),
    [("rewards/margins", True), ("eval_kl", False), ("eval_logps/rejected", False), ("accuracy", True)],
)
def test_the_best_epoch_is_chosen_by_the_figure_that_is_named(tmp_path, metric, better):
    options = {"metric_for_best_model": metric, "eval_strategy": "epoch", "save_strategy": "epoch", "select": "best"}
    job = trainer(tmp_path, num_train_epochs=2, **options)
    assert job.args.greater_is_better is better
    found = logged(job, f"eval_{metric.removeprefix('eval_')}")
    assert job.state.best_metric == (max(found) if better else min(found))


def test_the_figures_to_choose_by_are_those_of_an_evaluation(tmp_path):
    job = trainer(tmp_path)
    assert set(job.evaluate()) - {"epoch"} == {f"eval_{name}" for name in ImageDPOConfig.figures}
    own = ImageCrossEntropyTrainer.figures(job, job.eval_dataset, "Evaluating")
    assert set(own) == set(ImageCrossEntropyConfig.figures)


def test_images_that_make_no_batch_or_are_smaller_than_the_crop(tmp_path):
    message = "--per_device_train_batch_size 65: 64 training images do not fill a batch: lower it, or pass"
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, per_device_train_batch_size=65)
    trainer(tmp_path, per_device_train_batch_size=65, dataloader_drop_last=False, max_steps=1).train()
    with pytest.raises(UserError, match=r"--crop_padding 16: must be below the images' size of 16×16 pixels"):
        trainer(tmp_path, augment=AugmentConfig(crop_padding=16))
    trainer(tmp_path, augment=AugmentConfig(crop_padding=15), max_steps=1).train()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"metric_for_best_model": "eval_accurcy"}, "--metric_for_best_model eval_accurcy: must be one of eval_loss,"),
        (
            {"train_sampling_strategy": "group_by_length"},
            "--train_sampling_strategy is not supported here: --seed sets the order",
        ),
        ({"bf16_full_eval": True}, "--bf16_full_eval is not supported here: evaluation uses"),
        ({"include_for_metrics": ["loss"]}, "--include_for_metrics is not supported"),
        ({"neftune_noise_alpha": 5.0}, "--neftune_noise_alpha is not supported"),
        ({"polyak_tau": 0.0}, "--polyak_tau 0.0: must be in"),
        ({"muon_learning_rate": -0.1}, "--muon_learning_rate -0.1: must be at least 0"),
        ({"polyak_tau": 1.1}, "--polyak_tau 1.1: must be in"),
        ({"beta": 0.0}, "--beta 0.0: must be above 0"),
        ({"loss_type": ["sigmoidd"]}, "loss_type must be among"),
        ({"compare_modes": ["all/frosen"]}, "--compare_modes all/frosen"),
        ({"label_smoothing_factor": 0.1}, "pass --label_smoothing"),
    ],
)
def test_senseless_options_name_the_flag(tmp_path, options, named):
    with pytest.raises(UserError, match=named):
        ImageDPOConfig(output_dir=str(tmp_path), **OPTIONS | options)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler, and here is no g++")
def test_compiled_in_bfloat16_it_trains_and_saves_under_the_same_names(tmp_path):
    job = trainer(tmp_path, torch_compile=True, bf16=True, max_steps=3, muon_learning_rate=0.01)
    assert all(math.isfinite(loss) for loss in logged(job))
    assert all(weight.isfinite().all() for weight in job.model.parameters())
    job.save_model(str(tmp_path / "saved"))
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == network().state_dict().keys()

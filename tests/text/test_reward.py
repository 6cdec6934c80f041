"""The reward model: TRL's loss is this project's, figures are exact, and text is read as in training."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from resdpo_trl.errors import UserError
from resdpo_trl.losses import PreferenceLoss
from resdpo_trl.text.config import TextModelConfig, TextRewardConfig
from resdpo_trl.text.data import TextDataConfig, load_preferences
from resdpo_trl.text.reward import (
    RewardModel,
    TextRewardTrainer,
    bradley_terry,
    reward_figures,
    reward_rows,
    untrained_reward_model,
)
from resdpo_trl.text.tokens import tokenize
from tests.conftest import random_pairs, tiny_model

MODEL = TextModelConfig()


def tiny_reward_model(num_labels=1, vocab_size=400, pad_token_id=0, seed=0):
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=256, n_embd=32, n_layer=2, n_head=4, num_labels=num_labels,
        pad_token_id=pad_token_id, eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = GPT2ForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def rows_of(count, seed=0):
    return reward_rows(Dataset.from_list(random_pairs(count, seed)))


def trainer(path, tokenizer, model=None, train=None, evaluation=None, **options):
    defaults = {
        "max_length": 128, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "use_cpu": True,
        "bf16": False, "save_strategy": "no", "eval_strategy": "no", "select": "last", "logging_steps": 1,
        "disable_tqdm": True,
    }  # fmt: skip
    return TextRewardTrainer(
        model=model or tiny_reward_model(),
        args=TextRewardConfig(output_dir=str(path), **defaults | options),
        train_dataset=train or rows_of(24),
        eval_dataset=evaluation or rows_of(9, seed=1),
        processing_class=tokenizer,
    )


def by_hand(model, ids):
    """The reward of one sequence alone: its last token that is not padding, through the head."""
    with torch.no_grad():
        hidden = model.transformer(torch.tensor([ids])).last_hidden_state[0]
        last = max(at for at, token in enumerate(ids) if token != model.config.pad_token_id)
        return model.score(hidden[last]).item()


@pytest.mark.parametrize("coefficient", [None, 0.3])
def test_the_trainers_loss_is_bradley_terry_as_losses_has_it(tmp_path, tokenizer, coefficient):
    job = trainer(tmp_path, tokenizer, center_rewards_coefficient=coefficient)
    batch = job.data_collator(list(rows_of(8, seed=3)))
    job.model.eval()
    loss = job.compute_loss(job.model, dict(batch))
    rows = rows_of(8, seed=3)
    chosen, rejected = (
        torch.tensor([by_hand(job.model, ids) for ids in rows[f"{s}_ids"]]) for s in ("chosen", "rejected")
    )
    expected = PreferenceLoss(loss_types=("sigmoid",), beta=1.0)(bradley_terry(chosen, rejected)).mean()
    by_formula = (
        sum(math.log1p(math.exp(-(c - r))) for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)) / 8
    )
    if coefficient is not None:  # Eq. 2 of https://arxiv.org/abs/2312.09244
        expected = expected + coefficient * ((chosen + rejected) ** 2).mean()
        by_formula += coefficient * ((chosen + rejected) ** 2).mean().item()
    assert chosen.std() > 0.1
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert loss.item() == pytest.approx(by_formula, abs=1e-5)


def test_rows_that_only_fill_up_a_batch_do_not_count(tmp_path, tokenizer):
    """On several processes accelerate repeats rows in an epoch's last batch; `RunTrainer` notes how many are real."""
    job = trainer(tmp_path, tokenizer, center_rewards_coefficient=0.3)
    rows = list(rows_of(8, seed=3))
    own, filled = job.data_collator(rows[:3]), job.data_collator([*rows[:3], *rows[3:]])
    job.model.train()  # without dropout
    losses = [job.compute_loss(job.model, own).item()]
    figures = job.step_figures()
    for everywhere in (3, 6):  # six: three more are another process's
        losses.append(job.compute_loss(job.model, {**filled, "own_rows": 3, "all_rows": everywhere}).item())
        again = job.step_figures()
        tokens = again.pop("num_tokens") - figures["num_tokens"]
        assert tokens == (len(losses) - 1) * sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows[:3])
        assert again == pytest.approx(
            {name: value for name, value in figures.items() if name != "num_tokens"}, abs=1e-5
        )
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[2] == pytest.approx(losses[0] / 2, abs=1e-5)


def test_evaluation_is_the_mean_over_pairs_not_over_batches(tmp_path, tokenizer):
    """Nine pairs in batches of four: TRL's mean of batch means would count the last pair four times."""
    job = trainer(tmp_path, tokenizer, center_rewards_coefficient=0.1)
    rows = job.eval_dataset
    chosen, rejected = (
        torch.tensor([by_hand(job.model, ids) for ids in rows[f"{s}_ids"]]) for s in ("chosen", "rejected")
    )
    figures = job.pair_figures(rows)
    assert figures["rewards/chosen"] == pytest.approx(chosen.numpy(), abs=1e-5)
    metrics = job.evaluate()
    assert metrics["eval_rewards/accuracies"] == pytest.approx((chosen > rejected).double().mean().item())
    expected = reward_figures(chosen, rejected)["loss"].mean() + 0.1 * ((chosen + rejected) ** 2).mean().item()
    assert metrics["eval_loss"] == pytest.approx(expected, abs=1e-5)


def test_training_learns_and_logs_the_names_that_pairs_have(tmp_path, tokenizer):
    train = rows_of(16)
    job = trainer(tmp_path, tokenizer, train=train, num_train_epochs=5, learning_rate=1e-2)
    before = job.pair_figures(train)["loss"].mean()
    job.train()
    assert job.pair_figures(train)["loss"].mean() < before / 2
    logs = [entry for entry in job.state.log_history if "loss" in entry]
    assert {"rewards/accuracies", "rewards/margins", "mean_reward"} <= set(logs[0])
    assert not {"accuracy", "margin"} & set(logs[0])


def test_it_starts_from_the_language_models_weights(tmp_path, tokenizer):
    language = tiny_model("llama")
    language.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    made = untrained_reward_model(str(tmp_path / "m"), MODEL, False, "reference", seed=3)
    again = untrained_reward_model(str(tmp_path / "m"), MODEL, False, "reference", seed=3)
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(
        dict(made.model.named_parameters()), dict(language.model.named_parameters()), rtol=0, atol=0
    )
    # its fused layers round otherwise
    torch.testing.assert_close(made.model(ids).last_hidden_state, language.model(ids).last_hidden_state)
    assert made.config.num_labels == 1 and torch.equal(made.score.weight, again.score.weight)


def test_text_is_read_as_in_training(tmp_path, tokenizer, dialogues):
    model = tiny_reward_model()
    model.save_pretrained(tmp_path / "r")
    tokenizer.save_pretrained(tmp_path / "r")
    reward = RewardModel(str(tmp_path / "r"), MODEL)
    Dataset.from_list(dialogues[:40]).to_json(tmp_path / "pairs.jsonl")
    texts = load_preferences(TextDataConfig(dataset_name=str(tmp_path / "pairs.jsonl")))["train"]
    chosen, rejected = reward.pair_rewards(texts, 48, None, False, batch_size=5)
    rows = reward_rows(tokenize(texts, tokenizer, 48))
    assert chosen.tolist() == pytest.approx([by_hand(model, ids) for ids in rows["chosen_ids"]], abs=1e-5)
    assert rejected.tolist() == pytest.approx([by_hand(model, ids) for ids in rows["rejected_ids"]], abs=1e-5)
    # an answer's reward is that of the same text as a response
    same = reward.answer_rewards(texts, texts["chosen"], [True] * len(texts), 256)
    assert same.tolist() == pytest.approx(reward.pair_rewards(texts, 256, None, False)[0].tolist(), abs=1e-5)


def test_an_answer_that_was_cut_short_has_no_end(tmp_path, tokenizer):
    """Seen where the padding is another token than the end of text."""
    model = tiny_reward_model(pad_token_id=1)
    model.save_pretrained(tmp_path / "r")
    tokenizer.pad_token_id, before = 1, tokenizer.pad_token_id
    try:
        tokenizer.save_pretrained(tmp_path / "r")
    finally:
        tokenizer.pad_token_id = before
    reward = RewardModel(str(tmp_path / "r"), MODEL)
    prompts = Dataset.from_list([{"prompt": "\n\nHuman: hi\n\nAssistant:", "turn_starts": [0], "header_end": 0}] * 2)
    found = reward.answer_rewards(prompts, [" No idea.", " No idea."], [True, False], 64)
    ids = tokenizer("\n\nHuman: hi\n\nAssistant:")["input_ids"] + tokenizer(" No idea.")["input_ids"]
    assert found.tolist() == pytest.approx([by_hand(model, [*ids, 0]), by_hand(model, ids)], abs=1e-5)
    assert abs(found[0] - found[1]) > 1e-3


@pytest.mark.parametrize("padding", [7, None])
def test_batches_are_padded_with_the_token_that_the_model_looks_for(tmp_path, tokenizer, padding):
    """A configuration that names another padding than the tokenizer would otherwise be read at a padded place."""
    model = tiny_reward_model(pad_token_id=padding)
    model.save_pretrained(tmp_path / "r")
    tokenizer.save_pretrained(tmp_path / "r")
    sequences = [[5, 6, 8], [9, 10, 11, 12, 13, 14, 15], [16, 17]]
    found = RewardModel(str(tmp_path / "r"), MODEL).score(sequences, batch_size=3)
    assert found.tolist() == pytest.approx([by_hand(model, ids) for ids in sequences], abs=1e-5)


def test_an_answer_ends_as_its_chat_template_ended_it_in_training(tmp_path, tokenizer):
    turn = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{{ '\\n' }}{% endfor %}"
    model, tokenizer = tiny_reward_model(pad_token_id=1), copy.deepcopy(tokenizer)
    tokenizer.chat_template = turn + "{% if add_generation_prompt %}<assistant>{% endif %}"
    tokenizer.pad_token_id = 1
    model.save_pretrained(tmp_path / "r")
    tokenizer.save_pretrained(tmp_path / "r")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Question {n}"}],
            **{side: [{"role": "assistant", "content": f"{side} {n}."}] for side in ("chosen", "rejected")},
        }
        for n in range(30)
    ]
    Dataset.from_list(rows).to_json(tmp_path / "pairs.jsonl")
    reward = RewardModel(str(tmp_path / "r"), MODEL)
    pairs = load_preferences(TextDataConfig(dataset_name=str(tmp_path / "pairs.jsonl")), reward.tokenizer)
    texts = pairs["train"]
    said = [text.removesuffix("<end>\n") for text in texts["chosen"]]
    assert said[0].endswith(".")
    trained = reward.pair_rewards(texts, 64, None, pairs.ends_turns)[0]
    ended = reward.answer_rewards(texts, said, [True] * len(said), 64, ends_turns=pairs.ends_turns)
    assert ended.tolist() == pytest.approx(trained.tolist(), abs=1e-5)
    cut = reward.answer_rewards(texts, said, [False] * len(said), 64, ends_turns=pairs.ends_turns)
    assert (cut - ended).abs().min() > 1e-4


def test_what_is_no_reward_model_is_refused(tmp_path, tokenizer):
    tiny_model("gpt2").save_pretrained(tmp_path / "language")
    tiny_reward_model(num_labels=3).save_pretrained(tmp_path / "three")
    for name in ("language", "three"):
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "empty").mkdir()
    for name, said in (
        ("language", "not a reward model .GPT2LMHeadModel.; resdpo-trl reward trains"),
        ("three", "has 3 labels, but a reward model has one"),
        ("empty", "not a model folder"),
        ("nowhere", "no such folder"),
    ):
        with pytest.raises(UserError, match=f"--reward_model .*{said}"):
            RewardModel(str(tmp_path / name), MODEL)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"center_rewards_coefficient": -1.0}, "--center_rewards_coefficient"),
        ({"chat_template_path": "x"}, "--chat_template_path"),
        ({"dataset_num_proc": 4}, "--dataset_num_proc"),
        ({"max_length": 8}, "--max_length"),
    ],
)
def test_options_that_make_no_sense_or_are_not_honoured_are_named(tmp_path, options, named):
    with pytest.raises(UserError, match=named):
        TextRewardConfig(output_dir=str(tmp_path), **options)


def test_the_saved_folder_loads_as_any_sequence_classifier(tmp_path, tokenizer):
    job = trainer(tmp_path / "t", tokenizer)
    job.save_model(str(tmp_path / "r"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "r")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded(ids).logits, job.model.eval()(ids).logits)

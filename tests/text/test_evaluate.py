import json

import numpy as np
import pytest
import torch

from resdpo_trl.errors import UserError
from resdpo_trl.losses import LogProbs, PreferenceLoss
from resdpo_trl.metrics import paired_difference
from resdpo_trl.text.config import TextModelConfig
from resdpo_trl.text.data import TextDataConfig
from resdpo_trl.text.evaluate import (
    EvaluateConfig,
    answer_figures,
    answer_logps,
    distinct_ngrams,
    evaluate,
    length_controlled,
    pair_figures,
)
from resdpo_trl.text.generate import answer
from tests.conftest import END_OF_TEXT, TURN_END, tiny_model, write_pairs


def scores(chosen_tokens, rejected_tokens):
    zeros = torch.zeros(len(chosen_tokens))
    return LogProbs(zeros, zeros, zeros, zeros, torch.tensor(chosen_tokens), torch.tensor(rejected_tokens))


def test_length_baselines_by_hand():
    figures = pair_figures(scores([5, 3, 4, 9], [3, 5, 4, 1]), PreferenceLoss())
    assert figures["baselines/longer_wins"].tolist() == [1, 0, 0.5, 1]
    assert figures["baselines/shorter_wins"].tolist() == [0, 1, 0.5, 0]


def test_a_rule_of_length_alone_scores_a_half_when_length_is_controlled():
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 50, (300, 2))
    lengths[:200].sort(axis=1)  # the chosen response is mostly the shorter one
    pairs = scores(lengths[:, 0].tolist(), lengths[:, 1].tolist())
    shorter = (lengths[:, 0] < lengths[:, 1]).astype(float)
    assert shorter.mean() > 0.75
    found = length_controlled(shorter, pairs)
    assert found["accuracy"] == 0.5
    coin = length_controlled(np.where(shorter > 0, 0.7, 0.3), pairs)
    assert coin["accuracy"] == pytest.approx(0.5)
    assert length_controlled(np.ones(3), scores([1, 2, 3], [4, 5, 6]))["accuracy"] is None


def test_paired_differences():
    generator = np.random.default_rng(1)
    common = generator.normal(size=200) * 10
    better = common + 0.2 + 0.5 * generator.normal(size=200)
    found = paired_difference(better, common, resamples=2000)
    assert found["difference"] == pytest.approx((better - common).mean())
    assert found["p_value"] < 0.01  # seen although the pairs differ among themselves far more than the models do
    assert found["interval_95"][0] > 0
    same = paired_difference(common, common.copy(), resamples=200)
    assert same["p_value"] == 1.0


def test_the_test_of_no_difference_is_right_as_often_as_it_says():
    generator = np.random.default_rng(2)
    found = [
        paired_difference(generator.normal(size=40), generator.normal(size=40), 200, seed)["p_value"]
        for seed in range(200)
    ]
    assert np.mean(np.array(found) <= 0.2) == pytest.approx(0.2, abs=0.09)


def test_distinct_ngrams():
    assert distinct_ngrams([[1, 2, 1, 2], [1, 2]], 1) == 2 / 6
    assert distinct_ngrams([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4
    assert distinct_ngrams([[1]], 2) is None


def test_the_kl_of_samples_is_the_exact_one(tokenizer):
    """For answers of one token the KL is a sum over the vocabulary."""
    policy, reference = tiny_model("gpt2").eval(), tiny_model("gpt2", seed=1).eval()
    prompt = [5, 9, 17, 3]
    config = EvaluateConfig(model="a", reference="b", max_new_tokens=1, batch_size=500)
    count = 4000
    answers = answer(policy, tokenizer, [prompt] * count, 1, sampled=True, seed=0, batch_size=1000)
    exact = [model(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1) for model in (policy, reference)]
    ratios = answer_logps(policy, [prompt] * count, answers, tokenizer, config)
    ratios = ratios - answer_logps(reference, [prompt] * count, answers, tokenizer, config)
    expected = (exact[0].exp() * (exact[0] - exact[1])).sum().item()
    figures = answer_figures(answers, ratios, tokenizer)
    assert expected > 0.05
    assert figures["kl"] == pytest.approx(expected, abs=4.5 * ratios.std().item() / count**0.5)
    assert figures["length_tokens"] == 1


def test_an_answer_that_ends_at_its_last_token_is_not_cut(tokenizer):
    end = tokenizer.eos_token_id
    figures = answer_figures([[5, 6, end], [5, 6, 7], [5, end], [end]], torch.zeros(4), tokenizer)
    assert figures["cut"] == 1 / 4


def test_an_answer_that_ends_its_turn_is_not_cut(chat_tokenizer):
    end, end_of_turn = chat_tokenizer.convert_tokens_to_ids([END_OF_TEXT, TURN_END])
    figures = answer_figures([[5, end_of_turn], [5, 6, 7], [5, end], [end_of_turn]], torch.zeros(4), chat_tokenizer)
    assert figures["cut"] == 1 / 4


def test_answers_to_prompts_as_long_as_the_model_has_positions(tmp_path, tokenizer):
    """The cap of the pairs may be all of them: the prompt of an answer loses what the answer needs."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in write_pairs(60)))
    for seed, name in enumerate(("policy", "reference")):
        tiny_model("gpt2", n_positions=48, seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    options = {"model": str(tmp_path / "policy"), "reference": str(tmp_path / "reference"), "max_length": 48}
    data = TextDataConfig(dataset_name=str(tmp_path / "pairs.jsonl"))
    figures = evaluate(EvaluateConfig(**options, num_samples=4, max_new_tokens=30), data, TextModelConfig())
    assert figures["answers"]["n"] == 4 and figures["answers"]["length_tokens"] > 20
    with pytest.raises(UserError, match="--max_new_tokens 48: must leave 8"):
        evaluate(EvaluateConfig(**options, num_samples=4, max_new_tokens=48), data, TextModelConfig())


def test_answers_end_with_the_end_of_text(tokenizer):
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 3
    answers = answer(model, tokenizer, [[3, 4], [5, 6, 7]] * 20, 12, sampled=True, seed=0)
    ends = [tokenizer.eos_token_id in row for row in answers]
    assert any(ends)
    for row, ended in zip(answers, ends, strict=True):
        assert row.count(tokenizer.eos_token_id) == int(ended)
        assert row[-1] == tokenizer.eos_token_id if ended else len(row) == 12


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"model": None}, "--model"),
        ({"reference": None}, "--reference"),
        ({"batch_size": 0}, "--batch_size"),
    ],
)
def test_senseless_options_name_the_flag(options, named):
    with pytest.raises(UserError, match=named):
        EvaluateConfig(**{"model": "a", "reference": "b"} | options)

"""Answers in batches: the same as one at a time, in the order asked for; where they end."""

import copy
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AddedToken, GenerationConfig

from resdpo_trl.text.generate import answer, answerable, stop_tokens
from resdpo_trl.text.model import base_model
from tests.conftest import tiny_model


def test_a_batch_answers_as_each_prompt_alone(tokenizer):
    generator = random.Random(0)
    prompts = [[generator.randrange(1, 400) for _ in range(generator.choice((1, 3, 17, 40)))] for _ in range(13)]
    for kind in ("gpt2", "llama"):
        model = tiny_model(kind).double().eval()
        alone = [answer(model, tokenizer, [prompt], 9, batch_size=1)[0] for prompt in prompts]
        assert answer(model, tokenizer, prompts, 9, batch_size=4) == alone
        with torch.no_grad():  # and each token is the likeliest one after what stands before it
            ids = torch.tensor([prompts[5] + alone[5]])
            expected = model(ids).logits[0, len(prompts[5]) - 1 : -1].argmax(-1).tolist()
        assert alone[5] == expected


def test_sampling_follows_the_seed_and_the_temperature(tokenizer):
    model, prompts = tiny_model("gpt2"), [[3, 4, 5]] * 60
    options = {"sampled": True, "batch_size": 32}
    first = answer(model, tokenizer, prompts, 4, seed=1, **options)
    assert first == answer(model, tokenizer, prompts, 4, seed=1, **options)
    assert first != answer(model, tokenizer, prompts, 4, seed=2, **options)
    greedy = answer(model, tokenizer, prompts[:1], 4)
    assert answer(model, tokenizer, prompts, 4, temperature=1e-7, **options) == greedy * 60
    assert answer(model, tokenizer, prompts, 4, top_p=1e-9, **options) == greedy * 60
    assert answer(model, tokenizer, [], 4) == []


@pytest.mark.parametrize("adapted", [False, True])
def test_what_the_models_own_generation_config_asks_for_is_not_followed(tokenizer, adapted):
    """The answers are of the distribution whose log-probabilities are computed."""
    model, prompts = tiny_model("llama"), [[3, 4, 5]] * 20
    if adapted:
        model = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM"))
    plain = [answer(model, tokenizer, prompts, 8, sampled=sampled) for sampled in (False, True)]
    asked = base_model(model).generation_config = GenerationConfig(
        repetition_penalty=50.0, no_repeat_ngram_size=1, min_p=0.9, do_sample=True
    )
    assert [answer(model, tokenizer, prompts, 8, sampled=sampled) for sampled in (False, True)] == plain
    assert base_model(model).generation_config is asked
    ids = torch.tensor(prompts)
    followed = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
    assert followed[0, 3:].tolist() != plain[0][0]  # it would have changed them


def test_a_prompt_leaves_room_for_its_answer_in_the_models_positions(tokenizer):
    model = tiny_model("gpt2", n_positions=32)
    prompts = [list(range(1, 31)), [5, 6]]
    with pytest.raises(IndexError):
        answer(model, tokenizer, prompts, 12)
    fitting = answerable(model, prompts, 12)
    assert fitting == [prompts[0][-20:], [5, 6]]
    assert [len(row) for row in answer(model, tokenizer, fitting, 12)] == [12, 12]


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("<|im_end|>\n", ["<|endoftext|>", "<|im_end|>"]),
        ("<|endoftext|>", ["<|endoftext|>"]),
        ("</s>\n", ["<|endoftext|>"]),  # text, not a token
        ("\n<|im_end|>", ["<|endoftext|>"]),  # a blank comes first, which any answer may have
        ("", ["<|endoftext|>"]),
    ],
)
def test_an_answer_ends_at_the_end_of_text_and_at_the_templates_end_of_turn(tokenizer, end, expected):
    assert stop_tokens(tokenizer) == [tokenizer.eos_token_id]
    chatty = copy.deepcopy(tokenizer)
    chatty.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    chatty.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}" + end + "{% endfor %}"
    assert chatty.convert_ids_to_tokens(stop_tokens(chatty)) == expected


def test_answers_of_a_batch_end_at_their_own_end_of_turn(tokenizer):
    """Each is the answer without a template up to the first token that ends it."""
    model, prompts = tiny_model("gpt2").double().eval(), [[3, 4, 5], [7, 8, 9, 10], [11]]
    plain = [answer(model, tokenizer, [prompt], 12)[0] for prompt in prompts]
    token = plain[0][2]
    chatty = copy.deepcopy(tokenizer)
    chatty.add_tokens(AddedToken(tokenizer.convert_ids_to_tokens(token), special=True))
    end = tokenizer.decode([token])
    chatty.chat_template = "{% for m in messages %}{{ m.content }}" + end + "{% endfor %}"
    assert stop_tokens(chatty) == [tokenizer.eos_token_id, token]
    cut = [row[: row.index(token) + 1] if token in row else row for row in plain]
    assert cut != plain and answer(model, chatty, prompts, 12) == cut

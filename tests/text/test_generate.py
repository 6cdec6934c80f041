"""Answers in batches: the same as one at a time, in the order asked for."""

import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from resdpo_trl.text.generate import answer, answerable, stop_tokens
from resdpo_trl.text.model import base_model
from tests.conftest import CHATML, END_OF_TEXT, TURN_END, tiny_model


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


def test_what_ends_an_answer(tokenizer, chat_tokenizer):
    end, end_of_turn = chat_tokenizer.convert_tokens_to_ids([END_OF_TEXT, TURN_END])
    assert stop_tokens(tokenizer) == [tokenizer.eos_token_id]
    assert stop_tokens(chat_tokenizer) == [end, end_of_turn] and end != end_of_turn
    chat_tokenizer.eos_token = TURN_END
    assert stop_tokens(chat_tokenizer) == [end_of_turn]
    chat_tokenizer.eos_token = END_OF_TEXT
    # the end of turn is the first special token after the answer, not the next turn's beginning after it
    chat_tokenizer.chat_template = CHATML.replace("'<|im_end|>' + '\\n'", "'\\n<|im_end|>\\n<|im_start|>'")
    assert stop_tokens(chat_tokenizer) == [end, end_of_turn]
    chat_tokenizer.chat_template = CHATML.replace("<|im_end|>", "</turn>")  # which is no special token
    assert stop_tokens(chat_tokenizer) == [end]
    chat_tokenizer.chat_template = None
    assert stop_tokens(chat_tokenizer) == [end]


def chain(*tokens):
    """A model that says each of the tokens after the one before it, and the first after the last."""
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:  # they add nothing to the embedding
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1)
        model.lm_head.weight.zero_()
        for place, (token, following) in enumerate(zip(tokens, [*tokens[1:], tokens[0]], strict=True)):
            model.model.embed_tokens.weight[token] = torch.eye(32)[place]
            model.lm_head.weight[following] = torch.eye(32)[place]
    return model


@pytest.mark.parametrize("sampled", [False, True])
def test_an_answer_ends_with_the_templates_end_of_turn(chat_tokenizer, sampled):
    end_of_turn = chat_tokenizer.convert_tokens_to_ids(TURN_END)
    model = chain(50, 60, 70, end_of_turn, 80)
    prompts = [[9, 9, 9, 50], [70], [80]]
    options = {"sampled": sampled, "temperature": 0.01} if sampled else {}
    ended = [[60, 70, end_of_turn], [end_of_turn], [50, 60, 70, end_of_turn]]
    assert answer(model, chat_tokenizer, prompts, 9, **options) == ended
    assert answer(model, chat_tokenizer, prompts, 3, **options) == [*ended[:2], ended[2][:3]]
    chat_tokenizer.chat_template = None  # without the template it is a token like others
    assert [len(row) for row in answer(model, chat_tokenizer, prompts, 9, **options)] == [9, 9, 9]
    model = chain(50, 60, chat_tokenizer.eos_token_id, 70)
    chat_tokenizer.chat_template = CHATML  # and with it the end of text ends an answer still
    assert answer(model, chat_tokenizer, [[50]], 9, **options) == [[60, chat_tokenizer.eos_token_id]]

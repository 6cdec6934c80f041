"""Answers in batches: the same as one at a time, in the order asked for."""

import random

import torch

from resdpo_trl.text.generate import answer
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

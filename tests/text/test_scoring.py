import copy
import math

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from resdpo_trl.errors import UserError
from resdpo_trl.text import scoring
from resdpo_trl.text.attention import ATTENTION, FLEX
from resdpo_trl.text.scoring import _LogProbs, add_response_head, pair_logps
from resdpo_trl.text.tokens import PairCollator
from tests.conftest import random_pairs, tiny_model

KINDS = ("gpt2", "llama", "qwen3")
SIDES = ("chosen", "rejected")


def plain_logps(model, pair, side):
    """One unpadded forward over prompt and response: the definition."""
    ids = torch.tensor([pair["prompt_ids"] + pair[f"{side}_ids"]])
    logits = type(model).forward(model, input_ids=ids).logits[0, :-1].log_softmax(-1)
    return logits.gather(1, ids[0, 1:, None])[len(pair["prompt_ids"]) - 1 :].sum()


def loss_of(chosen, rejected):
    return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()


class Casts(torch.nn.Module):
    """A wrapper that casts what its model gives, as accelerate's policy for FSDP2 does."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return self.model(**inputs).bfloat16()


def test_a_wrapper_that_casts_log_probabilities_ends_the_run():
    model = tiny_model("gpt2")
    add_response_head(model)
    with pytest.raises(UserError, match=r"casts its log-probabilities to torch\.bfloat16"):
        pair_logps(Casts(model), PairCollator(0, True)(random_pairs(2)))


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_gradients_equal_separate_forwards(kind, attention, sharing):
    model = tiny_model(kind).double().eval()
    model.set_attn_implementation(attention)
    pairs = random_pairs(8)
    chosen = torch.stack([plain_logps(model, pair, "chosen") for pair in pairs])
    rejected = torch.stack([plain_logps(model, pair, "rejected") for pair in pairs])
    loss_of(chosen, rejected).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    add_response_head(model)
    scores = pair_logps(model, PairCollator(0, sharing)(pairs))
    # transformers computes Llama's norms and every eager softmax in float32 whatever the model's type
    exact = kind == "gpt2" and attention == "sdpa"
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if exact else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(torch.stack(scores), torch.stack([chosen, rejected]), **tolerance)
    loss_of(*scores).backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, **tolerance)


@pytest.mark.parametrize("kind", [*KINDS, "mistral"])
def test_flex_attention_with_a_mask_in_blocks_scores_as_sdpa(kind):
    model = tiny_model(kind).eval()
    if kind == "mistral":  # whose window the rows fit into
        model = tiny_model(kind, sliding_window=128).eval()
    pairs = random_pairs(6)
    scores = []
    for attention in (ATTENTION, FLEX):
        model.set_attn_implementation(attention)
        add_response_head(model)
        with torch.no_grad():
            scores.append(torch.stack(pair_logps(model, PairCollator(0, block_mask=attention == FLEX)(pairs))))
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-5, atol=1e-5)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no backward pass on the CPU"):
            add_response_head(model, longest_row=64)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_stays_within_one_in_ten_thousand(kind):
    model = tiny_model(kind).eval()
    pairs = random_pairs(8)
    expected = torch.stack([plain_logps(model, pair, "chosen") for pair in pairs])
    add_response_head(model)
    chosen, _ = pair_logps(model, PairCollator(0)(pairs))
    torch.testing.assert_close(chosen, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_log_probabilities_and_their_gradient_are_cross_entropys(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (10 * torch.randn(300, 50, generator=generator)).to(dtype).requires_grad_()
    tokens, weights = torch.randint(50, (300,), generator=generator), torch.randn(300, generator=generator)
    exact = logits.detach().double().requires_grad_()
    expected = -torch.nn.functional.cross_entropy(exact, tokens, reduction="none")
    expected.backward(weights.double())
    found = scoring._LogProbs.apply(logits, tokens)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    found.backward(weights.to(found.dtype))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    # the gradient is rounded to the logits' own type
    rounding = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-3}[dtype]
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=rounding, atol=rounding / 10)


def test_chunks_of_the_vocabulary_change_nothing(monkeypatch):
    model = tiny_model("gpt2").double().eval()
    add_response_head(model)
    batch = PairCollator(0)(random_pairs(6))
    results = []
    for size in (4096, 7):
        monkeypatch.setattr(scoring, "CHUNK_TOKENS", size)
        model.zero_grad()
        scores = pair_logps(model, batch)
        loss_of(*scores).backward()
        results.append([*scores, *(parameter.grad.clone() for parameter in model.parameters())])
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(whole, chunked, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_chunks_under_autocast_give_a_gradient_no_coarser_than_the_whole(monkeypatch, bias):
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 90, bias=bias)
    exact = copy.deepcopy(head).double()
    head.__class__, head.softcap, head.scale = scoring._ResponseHead, None, 1.0
    rows, tokens, weights = torch.randn(40, 16), torch.randint(90, (40,)), torch.randn(40)
    expected = exact(rows.double()).log_softmax(1)[torch.arange(40), tokens]
    (expected * weights.double()).sum().backward()
    for size, fused_on in ((4096, ()), (7, ()), (7, ("cpu",))):  # the last is what CUDA gets
        monkeypatch.setattr(scoring, "CHUNK_TOKENS", size)
        monkeypatch.setattr(scoring, "FUSED_ON", fused_on)
        head.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            found = head(rows, tokens)
        (found * weights).sum().backward()
        torch.testing.assert_close(found.double(), expected, rtol=0.01, atol=0.02)
        for own, true in zip(head.parameters(), exact.parameters(), strict=True):
            assert own.grad.dtype == torch.float32
            torch.testing.assert_close(own.grad.double(), true.grad, rtol=0.02, atol=0.02)


def test_lora_scores_the_same_both_ways():
    from peft import LoraConfig, get_peft_model

    model = tiny_model("llama").double()
    add_response_head(model)
    model = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM"))
    model.eval()
    pairs = random_pairs(6)
    shared, separate = (torch.stack(pair_logps(model, PairCollator(0, way)(pairs))) for way in (True, False))
    torch.testing.assert_close(shared, separate, rtol=1e-10, atol=1e-10)
    with model.disable_adapter():
        assert (torch.stack(pair_logps(model, PairCollator(0)(pairs))) - shared).abs().max() > 1e-3


def test_generation_is_untouched():
    model = tiny_model("gpt2").eval()
    ids = torch.tensor([[5, 6, 7]])
    before = model.generate(ids, max_new_tokens=8, do_sample=False)
    add_response_head(model)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), before)


SIZES = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip
LOCAL = {  # models for which what stands between the prompt and the rejected response matters
    "gpt_neo": {
        "vocab_size": 400, "hidden_size": 32, "num_layers": 4, "num_heads": 4, "window_size": 24,
        "attention_types": [[["global", "local"], 2]],
    },
    "mpt": {"vocab_size": 400, "d_model": 32, "n_layers": 2, "n_heads": 4},
    "bloom": {"vocab_size": 400, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mamba": {"vocab_size": 400, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "mistral": SIZES | {"sliding_window": 24},
    "gemma3_text": SIZES | {"sliding_window": 24, "query_pre_attn_scalar": 8},
    "llama4_text": SIZES | {"attention_chunk_size": 24, "intermediate_size_mlp": 48, "num_local_experts": 2},
    "lfm2": SIZES | {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "olmo_hybrid": SIZES,
    "qwen3_next": SIZES
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    | {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
}  # fmt: skip


def new_model(kind, **changes):
    """A float64 model as `from_config` makes it, whose weights are so small that little shows in its numbers."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**LOCAL.get(kind, {}) | changes)
    config._experts_implementation = "eager"  # grouped products take no float64
    return AutoModelForCausalLM.from_config(config).double().eval()


def with_large_weights(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / max(parameter.shape[-1], 16) ** 0.5)
    return model


@pytest.mark.parametrize("kind", LOCAL)
def test_a_model_in_which_a_shared_row_differs_is_refused_and_right_without(kind):
    model = new_model(kind)
    with pytest.raises(UserError, match=r"^\w+ (has other log-prob|rejects the mask).*: pass --prefix_sharing false$"):
        add_response_head(model, longest_row=70)
    with_large_weights(model)
    pairs = random_pairs(6)
    with torch.no_grad():
        found = torch.stack(pair_logps(model, PairCollator(0, False)(pairs)))
        own = torch.stack([torch.stack([plain_logps(model, pair, side) for pair in pairs]) for side in SIDES])
    torch.testing.assert_close(found.double(), own.double(), rtol=1e-4, atol=1e-4)  # Mamba gives float32


def test_a_window_matters_from_the_row_that_is_longer():
    """GPT-Neo's local layers count keys, not positions: −943.83 instead of −943.03 in a row of 390 tokens."""
    model = with_large_weights(
        new_model("gpt_neo", window_size=256, max_position_embeddings=1024, initializer_range=0.1)
    )
    add_response_head(model, longest_row=256, max_length=171)
    pair = random_pair_of(130, 130, 130)
    shared, separate = (torch.stack(pair_logps(model, PairCollator(0, way)([pair]))) for way in (True, False))
    assert (shared - separate).abs().max() > 0.01
    with pytest.raises(UserError, match=r"in a row of 390; typical causes are local attention.*--prefix_sharing false"):
        add_response_head(model, longest_row=390, max_length=260)
    short = random_pair_of(86, 85, 85)
    shared, separate = (torch.stack(pair_logps(model, PairCollator(0, way)([short]))) for way in (True, False))
    torch.testing.assert_close(shared, separate, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("prompt", "response"), [(58, 4), (22, 22)])
def test_a_window_between_a_pairs_two_sequences_and_its_shared_row(prompt, response):
    """Mistral's mask is replaced by the shared row's: right while prompt and response are within the window."""
    model = with_large_weights(new_model("mistral", sliding_window=50))
    pair = random_pair_of(prompt, response, response)
    add_response_head(model)
    shared, separate = (torch.stack(pair_logps(model, PairCollator(0, way)([pair]))) for way in (True, False))
    if prompt + response > 50:
        assert (shared - separate).abs().max() > 0.01
        with pytest.raises(UserError, match="--prefix_sharing false"):
            add_response_head(model, longest_row=66, max_length=62)
    else:
        torch.testing.assert_close(shared, separate, rtol=1e-6, atol=1e-6)
        add_response_head(model, longest_row=66, max_length=44)


def random_pair_of(*lengths):
    generator = torch.Generator().manual_seed(1)
    parts = zip(("prompt_ids", "chosen_ids", "rejected_ids"), lengths, strict=True)
    return {part: torch.randint(5, 390, (length,), generator=generator).tolist() for part, length in parts}


def test_the_check_has_layers_of_every_kind_and_few_of_them():
    types = [["global"] * 3, ["global"] * 4, ["global", "local"]]
    model = new_model("gpt_neo", num_layers=9, attention_types=[[each, 1] for each in types])
    trial = scoring._trial_model(model)
    assert [each.attn.attention_type for each in trial.transformer.h] == ["global"] * 8 + ["local"]
    with pytest.raises(UserError, match="--prefix_sharing false"):
        add_response_head(model, longest_row=70)
    llama = tiny_model("llama", num_hidden_layers=12)
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    state = torch.random.get_rng_state()
    trial = scoring._trial_model(llama)
    assert len(trial.model.layers) == trial.config.num_hidden_layers == 2 and len(llama.model.layers) == 12
    assert llama.config.num_hidden_layers == 12 and trial.dtype == torch.float64
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)


AFTER_THE_HEAD = {
    "cohere": SIZES | {"logit_scale": 0.0625},
    "granite": SIZES | {"logits_scaling": 8.0},
    "gemma2": SIZES | {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "granitemoe": SIZES | {"logits_scaling": 8.0, "num_local_experts": 4, "num_experts_per_tok": 2},
    "bert": SIZES | {"is_decoder": True},  # transforms before it
}


@pytest.mark.parametrize("kind", AFTER_THE_HEAD)
def test_what_a_model_does_about_its_head_is_kept(kind):
    model = with_large_weights(new_model(kind, **AFTER_THE_HEAD[kind]))
    pairs = random_pairs(6)
    own = torch.stack([torch.stack([plain_logps(model, pair, side) for pair in pairs]) for side in SIDES])
    loss_of(*own).backward()
    gradients = [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()]
    for sharing in (True, False):
        model.zero_grad()
        add_response_head(model, longest_row=70 if sharing else None)
        assert model._response_head == ("own" if kind == "bert" else "linear")
        found = pair_logps(model, PairCollator(0, sharing)(pairs))
        torch.testing.assert_close(torch.stack(found), own, rtol=1e-5, atol=1e-5)
        loss_of(*found).backward()
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_a_model_that_sees_what_it_should_predict_is_refused():
    """BERT without `is_decoder`: its own forward gives numbers, which are no log-probabilities of a text."""
    with pytest.raises(UserError, match=r"^BertLMHeadModel sees the tokens that it should predict"):
        add_response_head(new_model("bert", **SIZES))


def test_a_model_that_can_not_be_scored_is_refused_by_name():
    model = new_model("xlnet", vocab_size=400, d_model=32, n_layer=2, n_head=4, d_inner=48)
    with pytest.raises(UserError, match=r"^XLNetLMHeadModel can't be scored \(.+\): use another model$"):
        add_response_head(model)


def test_the_batch_of_a_pair_by_hand():
    pair = {
        "prompt_ids": [1, 2],
        "chosen_ids": [3],
        "rejected_ids": [4, 5],
        "ref_chosen_logps": -1.0,
        "ref_rejected_logps": -2.0,
    }
    batch = PairCollator(9)([pair, {**pair, "rejected_ids": [4]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [1, 2, 3, 4, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 2, 3], [0, 1, 2, 2, 0]]
    assert batch["attention_mask"][0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]
    assert batch["predicted_at"].tolist() == [[0, 0, 0, 1, 1], [-4, -4, -2, -4, -4]]
    assert batch["copies"].tolist() == [[2, 2, 1, 1, 1], [2, 2, 1, 1, 0]]
    assert batch["predicted"].tolist() == [3, 4, 5, 3, 4]
    assert batch["response"].tolist() == [0, 1, 1, 2, 3]
    assert batch["ref_rejected_logps"].tolist() == [-2.0, -2.0]
    assert math.isclose(batch["chosen_tokens"].float().mean(), 1.0)


def test_a_second_backward_pass_through_the_head_is_an_error():
    """The gradient takes the logits' place; going back twice must not give a wrong one."""
    logits = torch.randn(5, 7, requires_grad=True)
    found = _LogProbs.apply(logits * 1, torch.arange(5)).sum()
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.backward()


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_copy_of_a_model_runs_its_own_weights(kind):
    model = with_large_weights(new_model(kind, **AFTER_THE_HEAD.get(kind, SIZES)))
    pair = random_pair_of(5, 6, 7)
    add_response_head(model)
    copied = copy.deepcopy(model)

    def numbers():
        logits = copied(input_ids=torch.tensor([pair["prompt_ids"]])).logits
        return logits.detach(), *(each.detach() for each in pair_logps(copied, PairCollator(0)([pair])))

    before = numbers()
    with_large_weights(model)
    torch.testing.assert_close(numbers(), before, rtol=0, atol=0)

"""Every PEFT method that the installed PEFT has: its numbers are right, or it is refused by name before training."""

import pytest
import torch
from peft import AdamssConfig, LoraConfig, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from resdpo_trl.errors import UserError
from resdpo_trl.text.config import TextRewardConfig
from resdpo_trl.text.reward import TextRewardTrainer
from resdpo_trl.text.scoring import BEFORE_THE_ROW, PER_TOKEN, add_response_head, check_adapters, pair_logps
from resdpo_trl.text.tokens import PairCollator
from resdpo_trl.text.trainer import TextDPOTrainer
from tests.conftest import random_pairs, tiny_model
from tests.text.test_trainer import config, tokenized, train_losses, trl_losses

ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
OPTIONS = {  # of the methods whose defaults do not fit a tiny Llama
    "BOFT": ATTENTION | {"boft_block_size": 4},
    "C3A": ATTENTION | {"block_size": 4},
    "FOURIERFT": ATTENTION | {"n_frequency": 10},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MISS": ATTENTION | {"r": 8},
    "OFT": ATTENTION | {"oft_block_size": 4},
    "BEFT": {},
    "PSOFT": ATTENTION | {"r": 8},
    "SHIRA": ATTENTION | {"r": 2},
    "ROAD": ATTENTION | {"group_size": 8},
    "SHADOW": {},
    "TRAINABLE_TOKENS": {"token_indices": [3, 5, 9]},
    "VBLORA": ATTENTION | {"num_vectors": 4, "vector_length": 4, "topk": 2},
    "WAVEFT": ATTENTION | {"n_frequency": 10},
    **{method: {"num_virtual_tokens": 5} for method in BEFORE_THE_ROW},
}


def config_of(method, **changes):
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)](
        task_type="CAUSAL_LM", **OPTIONS.get(method, ATTENTION) | changes
    )


def with_adapter(method, **changes):
    """A float64 Llama without a response head, and the same in PEFT's wrapper with an adapter that changes much."""
    torch.manual_seed(0)
    base = tiny_model("llama")
    if method != "PSOFT":  # whose decomposition takes no float64
        base.double()
    model = get_peft_model(base, config_of(method, **changes)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return base, model


@torch.no_grad()
def own_logps(model, pairs):
    """(2, B): one forward of PEFT's own for each response."""
    sums = []
    for side in ("chosen_ids", "rejected_ids"):
        for pair in pairs:
            row = torch.tensor([pair["prompt_ids"] + pair[side]])
            logps = model(input_ids=row).logits[0, -row.shape[1] : -1].log_softmax(-1)
            sums.append(logps.gather(1, row[0, 1:, None])[len(pair["prompt_ids"]) - 1 :].sum())
    return torch.stack(sums).view(2, -1)


@pytest.mark.parametrize("method", sorted(PER_TOKEN | BEFORE_THE_ROW))
def test_a_method_that_is_taken_scores_as_pefts_own_forward(method):
    base, model = with_adapter(method)
    pairs = random_pairs(5)
    expected, plain = own_logps(model, pairs), own_logps(tiny_model("llama").double(), pairs)
    assert (expected - plain).abs().max() > 0.01  # the adapter does something
    add_response_head(base, longest_row=64)
    for sharing in (False, True) if method in PER_TOKEN else (False,):
        check_adapters(model, None, sharing)
        with torch.no_grad():
            found = torch.stack(pair_logps(model, PairCollator(0, sharing)(pairs)))
            with model.disable_adapter():  # the reference
                reference = torch.stack(pair_logps(model, PairCollator(0, sharing)(pairs)))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(reference, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", sorted({each.value for each in PEFT_TYPE_TO_CONFIG_MAPPING} - PER_TOKEN))
def test_a_method_that_would_be_wrong_is_refused_by_name(method):
    asked = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)].__new__(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)])
    asked.peft_type = PeftType(method)
    fix = "--prefix_sharing false" if method in BEFORE_THE_ROW else "use LoRA"
    with pytest.raises(UserError, match=f"^the PEFT method {method} .*{fix}"):
        check_adapters(None, asked, prefix_sharing=True)
    if method not in BEFORE_THE_ROW:
        with pytest.raises(UserError, match=f"^the PEFT method {method} .*{fix}"):
            check_adapters(None, asked, prefix_sharing=False)


@pytest.mark.parametrize(
    "asked", [LoraConfig(alora_invocation_tokens=[3, 4]), AdamssConfig(use_asa=True)], ids=["alora", "asa"]
)
def test_options_that_would_be_wrong_are_refused_by_name(asked):
    with pytest.raises(
        UserError, match=f"{asked.peft_type.value} is not supported with (alora_invocation_tokens|use_asa)"
    ):
        check_adapters(None, asked, prefix_sharing=False)


def test_a_reward_model_takes_no_virtual_tokens(tmp_path):
    with pytest.raises(UserError, match=r"^the PEFT method PROMPT_TUNING puts virtual tokens .*: use LoRA"):
        TextRewardTrainer(tiny_model("llama"), TextRewardConfig(str(tmp_path)), config_of("PROMPT_TUNING"))


@pytest.mark.parametrize("continued", [False, True])
@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "mica", "pissa", "pissa_niter_4", "OLoRA"])
def test_the_reference_of_an_adapter_is_its_base_as_it_was(tmp_path, tokenizer, start, continued):
    """However an adapter begins; of one that goes on, the reference is that adapter."""
    asked = config_of("LORA", init_lora_weights=start, r=4)
    data = tokenized(5)

    def trainer():
        model = get_peft_model(tiny_model("llama"), asked) if continued else tiny_model("llama")
        return TextDPOTrainer(
            model=model,
            args=config(tmp_path),
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=None if continued else asked,
        )

    if str(start).lower().startswith(("pissa", "olora")):
        with pytest.raises(UserError, match=f"init_lora_weights {start} changes the weights of the base model"):
            trainer()
        return
    job = trainer()
    found, plain = job.score(data), tiny_model("llama")
    add_response_head(plain, longest_row=max(data["length"]))
    with torch.no_grad():
        expected = pair_logps(plain, PairCollator(0, True)(list(data)))[0]
    if continued:
        expected = found.chosen
    torch.testing.assert_close(found.ref_chosen, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_training_follows_trls(tmp_path, tokenizer, method):
    data, shared = tokenized(8), {"train_sampling_strategy": "sequential", "num_train_epochs": 2}

    def trainer(prefix_sharing):
        torch.manual_seed(0)  # draws the adapter
        return TextDPOTrainer(
            model=tiny_model("llama"),
            args=config(tmp_path, prefix_sharing=prefix_sharing, **shared),
            train_dataset=data,
            eval_dataset=data,
            processing_class=tokenizer,
            peft_config=config_of(method),
        )

    with pytest.raises(UserError, match="--prefix_sharing false"):
        trainer(prefix_sharing=True)
    ours = train_losses(trainer(prefix_sharing=False))
    torch.manual_seed(0)
    theirs = trl_losses(tmp_path / "trl", tokenizer, lambda: tiny_model("llama"), data, config_of(method), **shared)
    assert ours == pytest.approx(theirs, abs=1e-4)

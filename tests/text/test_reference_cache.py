"""The reference's log-probabilities on disk: read where nothing has changed, computed where anything has."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from resdpo_trl.text import reference_cache
from resdpo_trl.text.reference_cache import (
    cache_folder,
    forward_config,
    read_reference,
    weights_digest,
    write_reference,
)
from tests.conftest import tiny_model
from tests.text.test_trainer import tokenized, trainer

COLUMNS = ["ref_chosen_logps", "ref_rejected_logps"]


def reference_of(job):
    return torch.tensor([job.train_dataset[name][:] for name in COLUMNS])


@pytest.fixture
def first(tmp_path, tokenizer):
    job = trainer(tmp_path / "first", tokenizer, reference_cache_dir=str(tmp_path / "cache"))
    assert job.reference_pairs_read == 0
    return job


def again(tmp_path, tokenizer, **options):
    return trainer(tmp_path / "again", tokenizer, reference_cache_dir=str(tmp_path / "cache"), **options)


def test_a_second_run_reads_what_the_first_computed(tmp_path, tokenizer, first):
    second = again(tmp_path, tokenizer)
    assert second.reference_pairs_read == len(first.train_dataset) + len(first.eval_dataset)
    assert torch.equal(reference_of(second), reference_of(first))
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_changed_weight_is_another_key(tmp_path, tokenizer, first):
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[3, 5] += 1e-4
    assert again(tmp_path, tokenizer, model=model).reference_pairs_read == 0


def test_a_changed_pair_is_another_key(tmp_path, tokenizer, first):
    rows = tokenized().to_list()
    rows[7]["rejected_ids"][-1] += 1
    changed = type(first.train_dataset).from_list(rows)
    second = again(tmp_path, tokenizer, train=changed)
    assert second.reference_pairs_read == len(second.eval_dataset)  # the validation pairs are the same


def test_another_cap_is_another_key(tmp_path, tokenizer, first):
    assert again(tmp_path, tokenizer, max_length=96).reference_pairs_read == 0


def test_another_forward_is_another_key(tmp_path, tokenizer, first):
    assert again(tmp_path, tokenizer, prefix_sharing=False).reference_pairs_read == 0
    model = tiny_model("gpt2")
    model.set_attn_implementation("eager")
    assert again(tmp_path, tokenizer, model=model).reference_pairs_read == 0


def test_another_precision_is_another_key(tmp_path, tokenizer, first):
    assert again(tmp_path, tokenizer, bf16=True).reference_pairs_read == 0
    assert again(tmp_path, tokenizer, bf16=False).reference_pairs_read > 0


def test_other_code_is_another_key(tmp_path, tokenizer, first, monkeypatch):
    monkeypatch.setattr(reference_cache, "code_version", lambda: "another")
    assert again(tmp_path, tokenizer).reference_pairs_read == 0


def test_another_configuration_of_the_same_weights_is_another_key(tmp_path, tokenizer, first):
    """RoPE's base, an epsilon: no weight shows them."""
    assert again(tmp_path, tokenizer, model=tiny_model("gpt2", layer_norm_epsilon=1e-3)).reference_pairs_read == 0
    moved = tiny_model("gpt2")
    moved.config._name_or_path = "elsewhere"
    assert again(tmp_path, tokenizer, model=moved).reference_pairs_read > 0


def test_a_continued_adapters_scale_is_part_of_its_key():
    said = []
    for alpha in (8, 8, 16):
        model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, task_type="CAUSAL_LM", lora_alpha=alpha))
        new = forward_config(model)
        model.add_adapter("ref", LoraConfig(r=4, task_type="CAUSAL_LM", lora_alpha=alpha))
        said.append((new, forward_config(model)))
    assert said[0] == said[1]
    assert said[0][0] == said[2][0]  # a new adapter is no part of the reference
    assert said[0][1] != said[2][1]


@pytest.mark.parametrize("harm", ["torn", "empty", "text"])
def test_a_damaged_file_is_noticed_and_rebuilt(tmp_path, tokenizer, first, harm, monkeypatch):
    said = []
    monkeypatch.setattr(reference_cache.logger, "warning", said.append)
    for path in (tmp_path / "cache").iterdir():
        raw = path.read_bytes()
        path.write_bytes({"torn": raw[:-40], "empty": b"", "text": b"hello" * 99}[harm])
    second = again(tmp_path, tokenizer)
    assert torch.equal(reference_of(second), reference_of(first))
    assert second.reference_pairs_read == 0
    assert said and "damaged" in said[0]
    assert again(tmp_path, tokenizer).reference_pairs_read == len(first.train_dataset) + len(first.eval_dataset)


def test_not_used_where_the_reference_moves(tmp_path, tokenizer):
    job = again(tmp_path, tokenizer, ref_model=tiny_model("gpt2"), reference_update="polyak")
    assert "ref_chosen_logps" not in job.train_dataset.column_names
    assert not (tmp_path / "cache").exists()


def test_none_keeps_nothing(tmp_path, tokenizer):
    assert cache_folder("none") is None
    job = trainer(tmp_path, tokenizer, reference_cache_dir="none")
    assert job.reference_pairs_read == 0
    assert cache_folder("auto").parts[-2:] == ("resdpo_trl", "reference_logps")


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(reference_cache.logger, "warning", said.append)
    (tmp_path / "file").write_text("")
    write_reference(tmp_path / "file", "key", torch.zeros(3), torch.zeros(3))
    assert len(said) == 1 and "can't be written" in said[0]
    assert read_reference(tmp_path / "nothing", "key") is None


def test_the_digest_is_of_the_content():
    model = tiny_model("llama")
    assert weights_digest(model) == weights_digest(copy.deepcopy(model))
    assert weights_digest(model) != weights_digest(tiny_model("llama", seed=1))
    assert weights_digest(model.to(torch.bfloat16)) != weights_digest(tiny_model("llama"))


def test_an_adapters_reference_is_its_base(tmp_path, tokenizer):
    """Two new adapters with other random weights share the reference, which is the model without them."""
    from resdpo_trl.text.trainer import TextDPOTrainer
    from tests.text.test_trainer import config

    jobs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        jobs.append(
            TextDPOTrainer(
                model=tiny_model("llama"),
                args=config(tmp_path / str(seed), seed=seed, reference_cache_dir=str(tmp_path / "cache")),
                train_dataset=tokenized(),
                eval_dataset=tokenized(5, seed=1),
                processing_class=tokenizer,
                peft_config=LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights="gaussian"),
            )
        )
    assert [job.reference_pairs_read for job in jobs] == [0, 29]


def test_another_reference_configuration_is_another_key(tmp_path, tokenizer):
    """Its weights are the same, and its numbers are not."""
    options = {"reference_cache_dir": str(tmp_path / "cache"), "precompute_ref_log_probs": True}
    first = trainer(tmp_path / "1", tokenizer, tiny_model("llama"), tiny_model("llama"), **options)
    other = tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 10.0})
    second = trainer(tmp_path / "2", tokenizer, tiny_model("llama"), other, **options)
    assert second.reference_pairs_read == 0 and not torch.equal(reference_of(first), reference_of(second))

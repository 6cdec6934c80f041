import copy
import inspect
import json
import math
import weakref

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import disable_dropout_in_model

from resdpo_trl.errors import UserError
from resdpo_trl.job import free
from resdpo_trl.losses import PreferenceLoss
from resdpo_trl.metrics import preference_metrics
from resdpo_trl.text.config import TextDPOConfig, TextSFTConfig
from resdpo_trl.text.data import SPLITS, TextDataConfig, load_preferences
from resdpo_trl.text.model import with_faster_parts
from resdpo_trl.text.tokens import sft_rows, tokenize
from resdpo_trl.text.trainer import LengthSampler, TextDPOTrainer, TextSFTTrainer
from resdpo_trl.training.arguments import has_bfloat16
from tests.conftest import random_pairs, tiny_model
from tests.text.test_scoring import AFTER_THE_HEAD, SIZES, new_model, random_pair_of, with_large_weights


def tokenized(count=24, seed=0):
    rows = random_pairs(count, seed)
    for row in rows:
        row["length"] = sum(map(len, row.values()))
    return Dataset.from_list(rows)


def config(path, **options):
    defaults = {
        "max_length": 128,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "select": "last",
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "disable_tqdm": True,
        "reference_cache_dir": "none",
    }
    return TextDPOConfig(output_dir=str(path), **defaults | options)


def trainer(path, tokenizer, model=None, ref_model=None, train=None, evaluation=None, **options):
    return TextDPOTrainer(
        model=model or tiny_model("gpt2"),
        ref_model=ref_model,
        args=config(path, **options),
        train_dataset=train or tokenized(),
        eval_dataset=evaluation or tokenized(9, seed=1),
        processing_class=tokenizer,
    )


def train_losses(trained):
    trained.train()
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def test_a_stage_that_has_ended_leaves_nothing_in_memory(tmp_path, tokenizer):
    """Weights and AdamW's moments go while the trainer's name is still there."""
    job = trainer(tmp_path, tokenizer, eval_strategy="epoch")
    job.train()
    moments = [each["exp_avg"] for each in job.optimizer.optimizer.state.values()]
    held = [weakref.ref(each) for each in (job.model, *job.model.parameters(), *moments)]
    del moments
    free(job)
    assert len(held) > 20 and [each() for each in held] == [None] * len(held)


def test_everything_starts_at_zero_margin(tmp_path, tokenizer):
    """Before the first step the policy is the reference, pair by pair, whatever order they were scored in."""
    job = trainer(tmp_path, tokenizer)
    scores = job.score(job.eval_dataset)
    torch.testing.assert_close(scores.chosen, scores.ref_chosen, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.rejected, scores.ref_rejected, rtol=1e-5, atol=1e-5)
    assert len(set(scores.chosen.tolist())) == 9
    assert math.isclose(job.evaluate()["eval_loss"], math.log(2), rel_tol=1e-5)


def test_scores_stand_in_the_data_sets_order(tmp_path, tokenizer):
    job = trainer(tmp_path, tokenizer, per_device_eval_batch_size=2)
    data = tokenized(9, seed=1)
    scores = job.score(job.add_reference(data))
    assert scores.chosen_tokens.tolist() == [len(row["chosen_ids"]) for row in data]
    one_by_one = [job.score(job.eval_dataset.select([index])).rejected.item() for index in range(9)]
    torch.testing.assert_close(scores.rejected, torch.tensor(one_by_one), rtol=1e-4, atol=1e-4)


class AlreadyTokenized(DPOTrainer):
    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


def trl_losses(path, tokenizer, new_model, data, peft_config=None, **options):
    """The losses that TRL's own trainer logs."""
    args = DPOConfig(
        str(path), per_device_train_batch_size=4, use_cpu=True, bf16=False, save_strategy="no", logging_steps=1,
        learning_rate=1e-3, disable_tqdm=True, report_to="none", max_length=None, gradient_checkpointing=False,
        **options,
    )  # fmt: skip
    theirs = AlreadyTokenized(
        new_model(),
        None if peft_config else new_model(),
        args,
        train_dataset=data.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    return train_losses(theirs)


@pytest.mark.parametrize(("sharing", "precompute"), [(True, True), (True, False), (False, True)])
def test_twenty_steps_follow_trls_trainer(tmp_path, tokenizer, sharing, precompute):
    """The same batches in the same order: the loss of every step within 1e-4."""
    data = tokenized(20)
    shared = {"train_sampling_strategy": "sequential", "num_train_epochs": 4, "precompute_ref_log_probs": precompute}
    reference = None if precompute else tiny_model("gpt2")
    ours = train_losses(
        trainer(tmp_path / "ours", tokenizer, ref_model=reference, train=data, prefix_sharing=sharing, **shared)
    )

    theirs = trl_losses(tmp_path / "trl", tokenizer, lambda: tiny_model("gpt2"), data, **shared)
    assert len(ours) == len(theirs) == 20
    assert abs(ours[0] - ours[-1]) > 0.05  # it does learn
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "sharing"),
    [("cohere", False), ("granite", True), ("gemma2", True), ("gemma2", False), ("granitemoe", True)],
)
def test_models_that_scale_or_cap_their_logits_follow_trls_trainer(tmp_path, tokenizer, kind, sharing):
    def new():
        return with_large_weights(new_model(kind, **AFTER_THE_HEAD[kind])).float()

    data, options = tokenized(8), {"train_sampling_strategy": "sequential", "num_train_epochs": 2}
    if kind == "granitemoe":
        options["router_aux_loss_coef"] = 0.0  # TRL looks for config.num_experts, which it does not have
    ours = train_losses(trainer(tmp_path / "ours", tokenizer, new(), train=data, prefix_sharing=sharing, **options))
    theirs = trl_losses(tmp_path / "trl", tokenizer, new, data, **options)
    assert abs(ours[0] - ours[-1]) > 1e-3
    assert ours == pytest.approx(theirs, abs=1e-4)


def new_mixture(**changes):
    mixture = SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.05}
    return with_large_weights(new_model("mixtral", **mixture | changes)).float()


@pytest.mark.parametrize(("coefficient", "sharing"), [(None, True), (0.3, False), (0.0, True)])
def test_the_router_loss_of_a_mixture_of_experts_is_trls(tmp_path, tokenizer, sharing, coefficient):
    data = tokenized(8)
    shared = {"train_sampling_strategy": "sequential", "num_train_epochs": 2, "router_aux_loss_coef": coefficient}
    job = trainer(tmp_path / "ours", tokenizer, new_mixture(), train=data, prefix_sharing=sharing, **shared)
    ours = train_losses(job)
    theirs = trl_losses(tmp_path / "trl", tokenizer, new_mixture, data, **shared)
    assert ours == pytest.approx(theirs, abs=1e-4)
    router = [entry["aux_loss"] for entry in job.state.log_history if "aux_loss" in entry]
    used = 0.05 if coefficient is None else coefficient
    assert ours[0] == pytest.approx(math.log(2) + used * (router[0] if used else 0), abs=1e-4)
    assert len(router) == (4 if used else 0)


@pytest.mark.parametrize("steps", [1, 2])
def test_the_router_loss_of_sft_is_trls(tmp_path, tokenizer, steps):
    rows = sft_rows(tokenized(8), True)
    shared = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": steps, "use_cpu": True, "bf16": False,
        "save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-3, "disable_tqdm": True, "max_length": 128,
        "report_to": "none", "num_train_epochs": 1,
    }  # fmt: skip
    args = TextSFTConfig(
        output_dir=str(tmp_path), train_sampling_strategy="random", select="last", eval_strategy="no", **shared
    )
    ours = TextSFTTrainer(
        model=new_mixture(), args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
    )
    theirs = SFTTrainer(
        model=new_mixture(),
        args=SFTConfig(output_dir=str(tmp_path / "trl"), gradient_checkpointing=False, **shared),
        train_dataset=rows.remove_columns("length"),
        processing_class=tokenizer,
    )
    assert train_losses(ours) == pytest.approx(train_losses(theirs), rel=1e-4)
    router = [[entry["aux_loss"] for entry in job.state.log_history if "aux_loss" in entry] for job in (ours, theirs)]
    assert router[0] == pytest.approx(router[1], rel=1e-4) and len(router[0]) == 4 // steps


def test_a_router_loss_that_can_not_be_is_refused(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"^--router_aux_loss_coef 0\.1: GPT2LMHeadModel has no router logits"):
        trainer(tmp_path, tokenizer, router_aux_loss_coef=0.1)


def test_a_test_row_that_is_longer_than_those_of_training_is_checked_too(tmp_path, tokenizer):
    """A window may be between the two."""

    def pairs(length):
        return Dataset.from_list([{**random_pair_of(length, length, length), "length": 3 * length}] * 4)

    model = new_model("mistral", sliding_window=50).float()
    job = trainer(tmp_path, tokenizer, model, train=pairs(12), evaluation=pairs(12))
    for score in (job.score, job.add_reference):
        with pytest.raises(UserError, match=r"in a row of 60.*--prefix_sharing false"):
            score(pairs(20))
    job.score(pairs(16))


def test_the_metrics_of_a_step_by_hand(tmp_path, tokenizer):
    job = trainer(tmp_path, tokenizer, max_steps=2, train=tokenized(4), per_device_train_batch_size=4, beta=0.3)
    job.train()
    first, second = (entry for entry in job.state.log_history if "loss" in entry)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert first["gradient_weights/chosen"] == pytest.approx(0.5, abs=1e-5)
    assert second["rewards/margins"] == pytest.approx(second["rewards/chosen"] - second["rewards/rejected"], abs=1e-5)
    assert second["gradient_weights/chosen"] < 0.5
    real = sum(tokenized(4)["length"])
    longest = max(tokenized(4)["length"])
    assert first["padding"] == pytest.approx(1 - real / (4 * longest))
    assert second["num_tokens"] == 2 * real


def test_evaluation_is_over_pairs_not_over_batches(tmp_path, tokenizer):
    job = trainer(tmp_path, tokenizer, max_steps=4, per_device_eval_batch_size=4)
    job.train()
    pairs = job.score(job.eval_dataset)
    figures = preference_metrics(pairs, PreferenceLoss())
    metrics = job.evaluate()
    for name, values in figures.items():
        assert metrics[f"eval_{name}"] == pytest.approx(float(values.mean()), rel=1e-6)
    assert len(figures["loss"]) == 9  # 4 + 4 + 1


def test_figures_of_new_rows_after_training_need_the_reference(tmp_path, tokenizer):
    """Never the trained policy as its own reference, at a loss of ln 2: the reference that is kept, or none."""
    new = tokenized(9, seed=2)
    gone = trainer(tmp_path / "gone", tokenizer)
    kept = trainer(tmp_path / "kept", tokenizer, precompute_ref_log_probs=False)  # TRL's: a model of its own
    stored = gone.add_reference(new)
    for job in (gone, kept):
        job.train()
    for call in (gone.evaluate, gone.score, gone.add_reference):
        with pytest.raises(UserError, match="training has changed the model: call add_reference before"):
            call(new)
    expected = gone.evaluate(stored)["eval_loss"]
    assert kept.evaluate(new)["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert abs(expected - math.log(2)) > 0.001


def test_several_evaluation_sets_have_figures_each(tmp_path, tokenizer):
    held_out = {"short": tokenized(5, seed=1), "long": tokenized(8, seed=2)}
    job = trainer(
        tmp_path, tokenizer, evaluation=held_out, eval_strategy="epoch", metric_for_best_model="eval_long_loss"
    )
    job.train()
    (logged,) = [row for row in job.state.log_history if "eval_short_loss" in row]
    assert logged["step"] == job.state.global_step
    every = job.evaluate()
    for name in held_out:
        for figure, value in job.evaluate(name).items():
            assert every[figure.replace("eval_", f"eval_{name}_")] == value
    assert every["eval_short_loss"] != every["eval_long_loss"]


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("kind", ["all", "non_padding"])
def test_tokens_seen_are_counted_and_no_cells_of_the_mask(tmp_path, tokenizer, sharing, kind):
    data = tokenized(8)
    job = trainer(
        tmp_path, tokenizer, train=data, prefix_sharing=sharing, include_num_input_tokens_seen=kind, num_train_epochs=1
    )
    job.train()
    tokens = sum(data["length"]) + (0 if sharing else sum(map(len, data["prompt_ids"])))
    seen = job.state.num_input_tokens_seen
    assert seen == tokens if kind == "non_padding" else tokens < seen < 4 * tokens


def test_lora_trains_against_its_base(tmp_path, tokenizer):
    job = TextDPOTrainer(
        model=tiny_model("llama"),
        args=config(tmp_path, max_steps=3, learning_rate=1e-2),
        train_dataset=tokenized(),
        eval_dataset=tokenized(5, seed=1),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, task_type="CAUSAL_LM"),
    )
    losses = train_losses(job)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[-1] != pytest.approx(math.log(2), abs=1e-3)


def test_a_moving_reference_is_scored_as_it_moves(tmp_path, tokenizer):
    options = {"reference_update": "polyak", "polyak_tau": 1.0}
    job = trainer(tmp_path, tokenizer, ref_model=tiny_model("gpt2"), max_steps=3, **options)
    job.train()
    scores = job.score(job.eval_dataset)  # τ = 1: the reference is the policy after every step
    torch.testing.assert_close(scores.chosen, scores.ref_chosen, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("update", ["polyak", "copy"])
def test_a_moving_reference_travels_with_the_checkpoint(tmp_path, tokenizer, update):
    """GPT-2's head is tied to its embedding, which safetensors writes once."""
    options = {"reference_update": update, "polyak_tau": 0.2, "num_train_epochs": 2, "save_strategy": "steps"}
    options |= {"save_steps": 6, "max_steps": 12}
    whole = trainer(tmp_path / "whole", tokenizer, ref_model=tiny_model("gpt2"), **options)
    whole.train()
    resumed = trainer(tmp_path / "resumed", tokenizer, ref_model=tiny_model("gpt2"), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    for name, value in whole.ref_model.state_dict().items():
        assert torch.equal(value, resumed.ref_model.state_dict()[name]), name
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert not torch.equal(whole.ref_model.lm_head.weight, tiny_model("gpt2").lm_head.weight)


def test_gradient_checkpointing_changes_nothing(tmp_path, tokenizer):
    plain, saving = (
        train_losses(trainer(tmp_path / str(on), tokenizer, max_steps=4, gradient_checkpointing=on or None))
        for on in (False, True)
    )
    assert plain == pytest.approx(saving, abs=1e-5)


def test_batches_of_like_length_are_seeded_by_epoch():
    lengths = [(37 * n) % 101 for n in range(512)]
    sampler = LengthSampler(16, lengths, seed=3)
    first = list(sampler)
    assert first == list(sampler)
    assert sorted(first) == list(range(512))
    sampler.set_epoch(1)
    assert list(sampler) != first

    def padded(order):
        return sum(max(lengths[i] for i in order[k : k + 16]) * 16 for k in range(0, 512, 16)) - sum(lengths)

    assert padded(first) < 0.05 * sum(lengths) < 0.2 * padded(list(range(512)))
    assert lengths[first[0]] == max(lengths)  # a batch too large for the memory fails at once
    longest = [max(lengths[i] for i in first[k : k + 16]) for k in range(0, 512, 16)]
    assert longest != sorted(longest, reverse=True)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 805])
def test_every_row_comes_once_an_epoch(rows):
    assert sorted(LengthSampler(8, [(37 * n) % 101 for n in range(rows)], seed=0)) == list(range(rows))


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"beta": 0.0}, "--beta"),
        ({"max_length": 15}, "--max_length"),
        ({"learning_rate": 0.0}, "--learning_rate"),
        ({"polyak_tau": 0.0}, "--polyak_tau"),
        ({"polyak_tau": 1.5}, "--polyak_tau"),
        ({"select": "best", "eval_strategy": "epoch"}, "--save_strategy"),
    ],
)
def test_senseless_options_name_the_flag(tmp_path, options, named):
    with pytest.raises(UserError, match=named):
        config(tmp_path, **options)


def test_bfloat16_is_chosen_where_the_hardware_has_it(tmp_path):
    assert TextDPOConfig(output_dir=str(tmp_path), use_cpu=True).bf16 == has_bfloat16(use_cpu=True)
    assert TextDPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False).bf16 is False


@pytest.mark.parametrize("completion_only_loss", [True, False])
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 3}, {"loss_type": "dft"}])
def test_sft_follows_trls_trainer(tmp_path, tokenizer, completion_only_loss, options):
    """The response head's loss is TRL's, step by step; a loss of another kind is left to TRL."""
    rows = sft_rows(tokenized(), completion_only_loss)
    shared = {
        "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False, "save_strategy": "no", "logging_steps": 1,
        "learning_rate": 1e-3, "disable_tqdm": True, "report_to": "none", "num_train_epochs": 3, "max_length": 128,
    } | options  # fmt: skip
    models = [tiny_model("gpt2") for _ in range(2)]
    for model in models:
        disable_dropout_in_model(model)  # which the two draw in another order
    ours = TextSFTTrainer(
        model=models[0],
        args=TextSFTConfig(
            output_dir=str(tmp_path / "ours"), train_sampling_strategy="random", select="last", **shared,
            eval_strategy="no",
        ),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )  # fmt: skip
    theirs = SFTTrainer(
        model=models[1],
        args=SFTConfig(output_dir=str(tmp_path / "theirs"), gradient_checkpointing=False, **shared),
        train_dataset=rows.remove_columns("length"),
        processing_class=tokenizer,
    )
    assert train_losses(ours) == pytest.approx(train_losses(theirs), rel=1e-4)
    for own, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4)
    tokens = [[entry["num_tokens"] for entry in job.state.log_history if "loss" in entry] for job in (ours, theirs)]
    assert tokens[0] == tokens[1]


def test_a_dropped_last_batch_is_of_training_alone(tmp_path, tokenizer):
    rows = sft_rows(tokenized(10), True)
    args = TextSFTConfig(
        str(tmp_path), per_device_train_batch_size=4, per_device_eval_batch_size=4, use_cpu=True, bf16=False,
        disable_tqdm=True, dataloader_drop_last=True, eval_strategy="no", select="last", save_strategy="no",
    )  # fmt: skip
    job = TextSFTTrainer(tiny_model("gpt2"), args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    assert len(job.get_train_dataloader()) == 2
    assert len(job._over_rows(rows, job._row_losses, "")[0]) == 10


def test_the_references_batch_is_the_references_alone(tmp_path, tokenizer):
    job = trainer(tmp_path, tokenizer, precompute_ref_batch_size=2, per_device_eval_batch_size=5)
    sizes, collate = [], job.data_collator
    job.data_collator = lambda rows: sizes.append(len(rows)) or collate(rows)
    job.add_reference(tokenized(6))
    assert sizes == [2, 2, 2]
    job.score(job.eval_dataset)
    assert sizes[3:] == [5, 4]


def test_raw_pairs_are_tokenized_as_the_recipes_do(tmp_path, chat_model_folder, chat_tokenizer, dialogues):
    """By the trainer itself, with TRL's arguments in TRL's order; a model by its folder brings its tokenizer."""
    ours, trls = (list(inspect.signature(kind.__init__).parameters) for kind in (TextDPOTrainer, DPOTrainer))
    assert ours == trls
    rows = Dataset.from_list(dialogues[:12])
    args = TextDPOConfig(output_dir=str(tmp_path), max_length=64, report_to="none", reference_cache_dir="none")
    job = TextDPOTrainer(str(chat_model_folder), None, args, None, rows, rows.select(range(4)))
    rows.to_json(tmp_path / "pairs.jsonl")
    read = load_preferences(TextDataConfig(dataset_name=str(tmp_path / "pairs.jsonl")), chat_tokenizer)
    expected = [tokenize(read[split], chat_tokenizer, 64, None, True, "x") for split in SPLITS]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    found = {json.dumps([row[name] for name in names]) for row in job.train_dataset}
    assert found == {json.dumps([row[name] for name in names]) for part in expected for row in part}
    assert len(job.eval_dataset) == 4 and 0 < job.evaluate()["eval_loss"] < 1
    with pytest.raises(UserError, match="compute_metrics is not supported"):
        TextDPOTrainer(str(chat_model_folder), None, args, None, rows, compute_metrics=print)
    with pytest.raises(UserError, match=r"no column rejected"):
        TextDPOTrainer(str(chat_model_folder), None, args, None, rows.remove_columns("rejected"))


@pytest.mark.parametrize("kind, bf16", [("gpt2", False), ("llama", True)])
def test_compiled_blocks_share_at_most_four_graphs_for_every_shape(tmp_path, tokenizer, kind, bf16):
    """In an epoch with training, evaluation and the reference pass, whose batches differ in rows and widths.

    The graphs run as they were traced (aot_eager): the numbers are those of the blocks without compilation.
    """
    torch._dynamo.reset()
    logged = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        torch._dynamo.utils.counters.clear()
        torch.manual_seed(0)
        model = (
            tiny_model("gpt2", resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0)
            if kind == "gpt2"
            else tiny_model("llama")
        )
        job = TextDPOTrainer(
            model=with_faster_parts(model),
            args=config(tmp_path, bf16=bf16, num_train_epochs=1, eval_strategy="steps", eval_steps=3, **options),
            train_dataset=tokenized(),
            eval_dataset=tokenized(9, seed=1),
            processing_class=tokenizer,
        )
        job.train()
        logged.append([entry.get("loss", entry.get("eval_loss")) for entry in job.state.log_history[:-1]])
    assert len(logged[0]) == 8
    assert logged[1] == pytest.approx(logged[0], abs=1e-2 if bf16 else 1e-5)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    assert not torch._dynamo.utils.counters["recompile_limit"]


def test_a_tokenizer_without_padding_pads_with_the_end_of_text(tmp_path, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    job = trainer(tmp_path, bare)
    job.train()
    assert bare.pad_token == bare.eos_token


def test_a_model_with_fewer_positions_than_a_pair_is_refused(tmp_path, tokenizer):
    rows = tokenized()
    longest = max(len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows)
    model = tiny_model("gpt2", n_positions=longest - 1)
    with pytest.raises(UserError, match=f"must be at most {longest - 1}, the number of the model's positions"):
        trainer(tmp_path, tokenizer, model, train=rows)
    trainer(tmp_path, tokenizer, tiny_model("gpt2", n_positions=longest), train=rows, evaluation=rows)

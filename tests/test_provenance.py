"""What a model's folder says of its training, and how an evaluation follows it."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from resdpo_trl.errors import UserError
from resdpo_trl.image.data import ImageDataConfig, load_images
from resdpo_trl.run.provenance import FILE, as_trained, loss_of, read_facts, training_facts, unseen, write_facts
from resdpo_trl.text.config import TextModelConfig
from resdpo_trl.text.data import TextDataConfig, load_preferences
from resdpo_trl.text.evaluate import EvaluateConfig, describe, evaluate
from tests.conftest import save_model, write_pairs
from tests.image.conftest import draw, write_parquet

TRAINING = SimpleNamespace(
    beta=0.03, loss_type=["ipo"], loss_weights=None, label_smoothing=0.0, f_divergence_type="reverse_kl",
    f_alpha_divergence_coef=0.5, discopop_tau=0.05, bf16=False, fp16=False,
)  # fmt: skip


def write_jsonl(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_flag_goes_over_the_folder_and_the_folder_over_the_defaults(tmp_path):
    write_facts(tmp_path, training_facts(TRAINING, ["b", "a"], ["c"], max_length=64))
    facts = read_facts(str(tmp_path), None, "--model")
    assert facts["trained_on"] == "a b" and facts["validated_on"] == "c"
    found = as_trained(facts, {"max_length": 32}, {"max_length": 256, "max_response_length": None})
    assert found["beta"] == (0.03, "model") and found["max_length"] == (32, "flag")
    assert found["max_response_length"] == (None, "default") and found["precision"] == ("float32", "model")
    assert loss_of(found).loss_types == ("ipo",)
    # a loss type that is asked for does not get the weights and the smoothing of the trained one
    facts |= {"loss_type": ["sigmoid"], "label_smoothing": 0.1}
    assert loss_of(as_trained(facts, {"loss_type": ["hinge"]}, {})).label_smoothing == 0
    assert loss_of(as_trained(facts, {}, {})).label_smoothing == 0.1
    assert loss_of(as_trained({}, {}, {})).beta == 0.1


@pytest.mark.parametrize("content", ["[]", "{"])
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(UserError, match=FILE):
        read_facts(str(tmp_path), None, "--model")


def test_unseen_rows():
    facts = [{"trained_on": "b", "validated_on": "d"}, {"trained_on": "d", "validated_on": "e b"}, {}]
    kept, left_out = unseen(["a", "b", "c", "d", "e"], facts, "x")
    assert kept.tolist() == [0, 2] and left_out == {"trained_on": 2, "validated_on": 1}
    with pytest.raises(UserError, match="has used all 2 rows"):
        unseen(["b", "e"], facts, "x")


def test_a_copied_policy_is_judged_as_it_was_trained(tmp_path, tokenizer):
    """A folder with a test set alone; β, loss, cap and precision of the folder; the rows of the training left out."""
    models = {name: save_model(tmp_path / name, tokenizer, "gpt2", seed=seed) for seed, name in enumerate("pr")}
    trained, fresh = write_pairs(12), write_pairs(30, seed=1)
    write_jsonl(tmp_path / "train.jsonl", trained)
    seen = load_preferences(TextDataConfig(dataset_name=str(tmp_path / "train.jsonl")))
    # of a run's three splits the limits of 3, 2 and 1 pairs took some
    taken = {name: rows["pair"][:count] for (name, rows), count in zip(seen.splits.items(), (3, 2, 1), strict=True)}
    write_facts(models["p"], training_facts(TRAINING, taken["train"], taken["validation"], max_length=48))
    # swapped, with a space at its end: the same two responses
    swapped = [{"chosen": row["rejected"], "rejected": row["chosen"] + " "} for row in trained]
    write_jsonl(tmp_path / "heldout" / "test.jsonl", swapped + fresh)
    options = {"model": str(models["p"]), "reference": str(models["r"]), "num_samples": 0}
    data = TextDataConfig(dataset_name=str(tmp_path / "heldout"))

    def figures(**changes):
        return evaluate(dataclasses.replace(EvaluateConfig(**options), **changes), data, TextModelConfig())

    found, same = figures(), figures(beta=0.03, loss_type=["ipo"], max_length=48, bf16=False)
    assert found["left_out"] == {"trained_on": 3, "validated_on": 2} and found["pairs"]["n"] == 12 + 30 - 5
    said = "left out: 3 rows that these models were trained on, 2 of their validation sets"
    assert said in describe(found)
    assert found["pairs"] == same["pairs"]
    assert {each["from"] for each in same["settings"].values()} == {"flag", "model", "default"}
    other = figures(beta=0.1, loss_type=["sigmoid"])
    assert other["pairs"]["rewards/margins"] == pytest.approx(found["pairs"]["rewards/margins"] / 0.3)
    assert other["pairs"]["loss"] < 10 < found["pairs"]["loss"]  # (Δ − 1/(2β))² is about 278


def test_rows_without_splits_are_all_held_out(tmp_path):
    name = write_jsonl(tmp_path / "pairs.jsonl", write_pairs(30))
    assert len(load_preferences(TextDataConfig(dataset_name=name), held_out=True)["test"]) == 30
    assert len(load_preferences(TextDataConfig(dataset_name=name, max_test_samples=7), held_out=True)["test"]) == 7
    (tmp_path / "images").mkdir()
    write_parquet(tmp_path / "images" / "test.parquet", draw(20))
    assert len(load_images(ImageDataConfig(dataset_name=str(tmp_path / "images")), held_out=True)["test"]) == 20

"""Reward and KL of a sweep's checkpoints, on tiny models without a sweep."""

import json

import pytest

from resdpo_trl.study.frontier import Frontier
from resdpo_trl.study.sweep import FRONTIER_COLUMNS, Point, read_rows
from resdpo_trl.text.config import TextModelConfig
from resdpo_trl.text.data import TextDataConfig
from resdpo_trl.text.evaluate import EvaluateConfig
from tests.conftest import tiny_model, write_pairs
from tests.text.test_reward import tiny_reward_model


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_every_checkpoint_is_measured_once_and_what_is_wrong_is_marked(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in write_pairs(60)))
    save(tiny_model("gpt2"), tokenizer, tmp_path / "reference")
    save(tiny_reward_model(), tokenizer, tmp_path / "reward")
    points = [Point(beta, 1e-4, 0, 1.0, tmp_path / f"b{beta}", tmp_path / "reference") for beta in (0.1, 0.5, 2.0)]
    for point in points[:2]:
        for step in (5, 10):
            folder = point.folder / "checkpoints" / "dpo" / f"checkpoint-{step}"
            save(tiny_model("gpt2", seed=step + int(10 * point.beta)), tokenizer, folder)
            (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "epoch": step / 5}))
    torn = points[1].folder / "checkpoints" / "dpo" / "checkpoint-10" / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:200])
    config = EvaluateConfig(
        model="-", reference="-", reward_model=str(tmp_path / "reward"), max_length=64, num_samples=6,
        max_new_tokens=8, bf16=False,
    )  # fmt: skip
    frontier = Frontier(config, TextDataConfig(dataset_name=str(tmp_path / "pairs.jsonl")), TextModelConfig())
    path = tmp_path / "frontier.csv"
    frontier.measure(points, {points[2].name: "status 1, no memory"}, path)
    rows = read_rows(path, FRONTIER_COLUMNS)
    assert [(row["point"], row["step"]) for row in rows] == [
        ("reference", 0), ("b0.1", 5), ("b0.1", 10), ("b0.5", 5), ("b0.5", 10), ("b2.0", ""),
    ]  # fmt: skip
    assert [row["status"].partition(":")[0] for row in rows] == ["done"] * 4 + ["failed"] * 2
    assert "can't be loaded" in rows[4]["status"] and "no memory" in rows[5]["status"]
    assert rows[0]["kl"] == rows[0]["kl_high"] == 0
    assert all(row["kl"] > 0 for row in rows[1:4])  # other models than the reference
    assert all(row["reward_low"] <= row["reward"] <= row["reward_high"] and row["n"] == 6 for row in rows[:4])
    assert len({row["reward"] for row in rows[:4]}) == 4

    # again: what holds is kept, the new model of one checkpoint alone answers
    save(tiny_model("gpt2", seed=99), tokenizer, torn.parent)
    answered = []
    module = "resdpo_trl.study.frontier.answer"
    from resdpo_trl.text.generate import answer

    monkeypatch.setattr(module, lambda *args, **kwargs: answered.append(1) or answer(*args, **kwargs))
    frontier.measure(points, {points[2].name: "status 1, no memory"}, path)
    again = read_rows(path, FRONTIER_COLUMNS)
    assert len(answered) == 1
    assert again[:4] == rows[:4]
    assert again[4]["status"] == "done" and again[4]["reward"] != pytest.approx(rows[3]["reward"])

"""compare_hh.py from the command line: a whole comparison with an endpoint as its judge, and what is refused."""

import json

import pytest

from resdpo_trl.metrics import percent
from resdpo_trl.study.comparison_page import write_comparison_page
from tests.conftest import TURNS, tiny_model
from tests.recipes.conftest import rows_of
from tests.study.test_judges import SECRET, endpoint, longer, reply


@pytest.fixture(scope="module")
def models(tokenizer, tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("good", "bad")):
        tiny_model("gpt2", seed=seed).save_pretrained(base / name)
        tokenizer.save_pretrained(base / name)
    (base / "questions.txt").write_text("".join(f"{turn}\n\n" for turn in TURNS[:4]))
    return base


def test_a_comparison_with_a_judge_behind_an_address(recipe, models, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", SECRET)
    folder = tmp_path / "compared"
    arguments = [
        "--models", f"good={models / 'good'}", f"bad={models / 'bad'}", "--reference", models / "bad",
        "--prompts", models / "questions.txt", "--max_new_tokens", "6", "--output_dir", folder, "--judge_model", "m",
    ]  # fmt: skip

    def behave(number, content):
        return (500, {}, SECRET) if number == 1 else (200, {}, reply(longer(content)))

    with endpoint(behave) as (url, seen):
        status, said, wrong = recipe("compare_hh.py", *arguments, "--judge_url", url)
        assert status == 0, wrong
        asked = len(seen)
        status, again, wrong_again = recipe("compare_hh.py", *arguments, "--judge_url", url)
        assert status == 2 and "already holds a run" in wrong_again
        status, again, wrong_again = recipe("compare_hh.py", *arguments, "--judge_url", url, "--resume_from_checkpoint")
        assert status == 0, wrong_again
        assert len(seen) == asked  # nothing is asked twice
    assert "4 prompts" in said and "4 empty lines" in said
    rows = rows_of(folder / "samples.jsonl")
    assert [row["prompt"][0]["content"] for row in rows] == TURNS[:4]
    verdicts = rows_of(folder / "verdicts.jsonl")
    (rate,) = json.loads((folder / "summary.json").read_text())["win_rates"]
    different = [row for row in rows if len({answer["greedy"].strip() for answer in row["answers"].values()}) == 2]
    assert len(verdicts) == 2 * len(different) == asked - 1
    assert rate["n"] == 4 and rate["no_verdict"] == 0
    won = percent(max(rate["win_rate"], 1 - rate["win_rate"]), 4)
    assert f"wins {won} of 4 prompts against" in said and "judged by m (95% interval" in said
    assert "under good" in said
    for request in seen:
        assert request["headers"]["Authorization"] == f"Bearer {SECRET}"
    for text in (said, wrong, again, wrong_again):
        assert SECRET not in text
    for path in folder.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
    page = (folder / "report.html").read_text()
    assert write_comparison_page(folder).read_text() == page  # recipes/report.py makes the same page again
    assert 'id="win-rates"' in page and 'id="answers"' in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "good"], "--models good: needs NAME=PATH"),
        (["--models", "good=./nowhere"], "--models good ./nowhere: no such folder"),
        (["--models", "good=HERE"], "not a model folder (no config.json in it)"),
        (["--models", "good=GOOD", "--prompts", "missing.txt"], "--prompts missing.txt: no such file"),
        (["--models", "good=GOOD", "--prompts", "HERE/torn.jsonl"], "torn.jsonl, line 2: not JSON"),
        (["--models", "good=GOOD", "--reward_model", "GOOD"], "not a reward model"),
        (["--models", "good=GOOD", "--judge_url", "http://127.0.0.1:9/v1", "--judge_model", "m"], "unreachable"),
        (
            ["--models", "good=GOOD", "--judge_url", "http://h/v1", "--judge_model", "m", "--judge_options", "{"],
            "--judge_options: needs a JSON object",
        ),
        (["--model", "good=GOOD"], "unknown flag --model; did you mean models?"),
    ],
)
def test_bad_input(recipe, models, tmp_path, arguments, message):
    (tmp_path / "torn.jsonl").write_text('{"prompt": "a"}\n{"prompt\n')
    words = [word.replace("GOOD", str(models / "good")).replace("HERE", str(tmp_path)) for word in arguments]
    status, _, said = recipe("compare_hh.py", *words, "--output_dir", tmp_path / "out")
    assert status == 2
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()

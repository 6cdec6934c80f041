"""A comparison on tiny models: its rewards against another computation, its best of n, its resuming, its page."""

import copy
import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from resdpo_trl.errors import UserError
from resdpo_trl.run.provenance import FILE
from resdpo_trl.study import compare
from resdpo_trl.study.compare import Comparison
from resdpo_trl.study.comparison_page import compared_words, write_comparison_page
from resdpo_trl.study.config import CompareConfig
from resdpo_trl.study.judges import Verdict
from resdpo_trl.text.config import TextModelConfig
from resdpo_trl.training.arguments import RunConfig
from tests.conftest import ANSWERS, TURN_END, TURNS, tiny_model, train_tokenizer
from tests.test_report import HOSTILE
from tests.text.test_generate import chain

PROMPTS = [f"\n\nHuman: {turn}\n\nAssistant:" for turn in TURNS]


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """reference, good and bad of one tokenizer; other, of its own; reward, a sequence classifier."""
    base = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("reference", "good", "bad")):
        tiny_model("gpt2", seed=seed).save_pretrained(base / name)
        tokenizer.save_pretrained(base / name)
    tiny_model("llama", vocab_size=300, seed=5).save_pretrained(base / "other")
    train_tokenizer([*TURNS, *ANSWERS], 300).save_pretrained(base / "other")
    config = tiny_model("gpt2").config
    config.num_labels = 1
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(base / "reward")
    tokenizer.save_pretrained(base / "reward")
    prompts = base / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return base


def compared(folders, output, names=("reference", "good", "bad"), steps=5, **changes):
    options = {"reference": "reference", "max_new_tokens": 8, "max_length": 64, "batch_size": 4, "bf16": False}
    options["prompts"] = str(folders / "prompts.jsonl")
    config = CompareConfig(
        models=[f"{name}={folders / name}" for name in names],
        output_dir=str(output),
        **options | changes,
    )
    job = Comparison(config, TextModelConfig(), RunConfig(overwrite_output_dir=config.resume_from_checkpoint is None))
    for step in (job.say_what_runs, job.answer, job.score, job.judge, job.finish)[:steps]:
        step()
    return job


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rewards_are_log_ratios_of_the_answers(folders, tmp_path, tokenizer):
    compared(folders, tmp_path, beta=0.5, do_sample=True)
    models = {
        name: AutoModelForCausalLM.from_pretrained(folders / name).eval() for name in ("reference", "good", "bad")
    }
    rows = rows_of(tmp_path / "samples.jsonl")
    assert [row["prompt"] for row in rows] == PROMPTS
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        for author, ids in row["answer_ids"].items():
            assert row["answers"][author]["sampled"] == tokenizer.decode(ids, skip_special_tokens=True)
            logps = {}
            for name, model in models.items():
                with torch.no_grad():
                    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
                logps[name] = logits.double().log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum().item()
            for policy in ("good", "bad"):
                expected = 0.5 * (logps[policy] - logps["reference"])
                assert row["rewards"][author][policy] == pytest.approx(expected, abs=1e-4)
            assert set(row["rewards"][author]) == {"good", "bad"}
    means = json.loads((tmp_path / "summary.json").read_text())["comparison"]["rewards"]
    mine = [row["rewards"]["bad"]["good"] for row in rows]
    assert means["good"]["bad"]["mean"] == pytest.approx(sum(mine) / len(mine))


def test_what_a_flag_holds_does_not_reach_the_terminal_as_it_is(folders, tmp_path, capsys):
    (tmp_path / "a\x1b[2Jb.txt").write_text("why?\n")
    compared(folders, tmp_path / "out", steps=1, prompts=str(tmp_path / "a\x1b[2Jb.txt"))
    said = capsys.readouterr().out
    assert "a�[2Jb.txt" in said and "\x1b" not in said and said.count("\n") == 2


def test_a_reward_model_reads_an_answer_as_its_chat_template_ends_it(folders, tmp_path, tokenizer):
    shutil.copytree(folders / "reward", tmp_path / "reward")
    chat = copy.deepcopy(tokenizer)
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    chat.chat_template = turns + "{% if add_generation_prompt %}<assistant>{% endif %}"
    chat.save_pretrained(tmp_path / "reward")
    prompts = tmp_path / "p.txt"
    prompts.write_text("why?\nhow?\n")
    job = compared(folders, tmp_path / "out", names=("good",), reference=None, prompts=str(prompts), steps=2)
    said = [compare.Answer([], " yes", ended, "good") for ended in (True, False)]
    reward = compare.RewardModel(str(tmp_path / "reward"), TextModelConfig())
    expected = [
        chat(f"<user>{text}<end><assistant>yes{end}")["input_ids"] for text, end in (("why?", "<end>"), ("how?", ""))
    ]
    assert job._scores(reward, job.prompts, said) == pytest.approx(reward.score(expected).tolist(), abs=1e-5)


def test_answers_end_with_their_turn(folders, tmp_path, chat_tokenizer):
    end_of_turn = chat_tokenizer.convert_tokens_to_ids(TURN_END)
    newline = chat_tokenizer("\n", add_special_tokens=False)["input_ids"][0]  # of "assistant\n", the prompt's end
    chain(newline, 50, 60, end_of_turn).save_pretrained(folders / "chat")
    chat_tokenizer.save_pretrained(folders / "chat")
    options = {"names": ("chat",), "reference": None, "max_length": 200}
    job = compared(folders, tmp_path, steps=2, **options)
    assert [one.ids for one in job.answers["chat"]] == [[50, 60, end_of_turn]] * len(PROMPTS)
    assert all(one.ended for one in job.answers["chat"])


def test_models_of_other_tokenizers_answer_too(folders, tmp_path):
    job = compared(folders, tmp_path, names=("good", "other"), reference=str(folders / "reference"))
    other = AutoTokenizer.from_pretrained(folders / "other")
    for row in rows_of(tmp_path / "samples.jsonl"):
        assert row["answers"]["other"]["greedy"] == other.decode(row["answer_ids"]["other"], skip_special_tokens=True)
        assert set(row["rewards"]["other"]) == {"good"}  # 'other' has no log-ratio to a reference of other tokens
    assert list(job.rewards) == ["good"]
    assert "another tokenizer than the reference have no rewards: other" in (tmp_path / "report.html").read_text()


def test_the_best_of_n_is_the_one_that_the_reward_model_scores_highest(folders, tmp_path, monkeypatch):
    scored = []
    score = compare.RewardModel.score
    monkeypatch.setattr(
        compare.RewardModel,
        "score",
        lambda self, rows, size: scored.append((rows, score(self, rows, size))) or scored[-1][1],
    )
    drawn, real = [], compare.answer
    monkeypatch.setattr(
        compare, "answer", lambda *of, **options: [drawn.append(sum(map(len, found := real(*of, **options)))), found][1]
    )
    reward_model = str(folders / "reward")
    job = compared(folders, tmp_path, reward_model=reward_model, best_of_n=5, reference=None)
    candidates = scored[0][1].reshape(len(PROMPTS), 5)
    assert len({tuple(row) for row in scored[0][0]}) > len(PROMPTS)
    best = [answer.score for answer in job.answers["reference, best of 5"]]
    assert best == pytest.approx(candidates.max(1).values.tolist())
    # the score is the classifier's own of prompt and answer
    model = AutoModelForSequenceClassification.from_pretrained(folders / "reward").eval()
    tokenizer = AutoTokenizer.from_pretrained(folders / "reward")
    for prompt, answer in zip(PROMPTS, job.answers["bad"], strict=True):
        ids = tokenizer(prompt)["input_ids"] + tokenizer(answer.text)["input_ids"]
        ids += [tokenizer.eos_token_id] if answer.ended else []
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits.item()
        assert answer.score == pytest.approx(expected, abs=1e-4)
    summary = json.loads((tmp_path / "summary.json").read_text())
    speed, rates = summary["throughput"], summary["win_rates"]
    said = sum(len(answer.ids) for name in ("reference", "good", "bad") for answer in job.answers[name])
    said += drawn[-1]  # all of the samples, whichever was the best
    assert speed["answer_tokens_per_second"] * speed["answer_seconds"] == pytest.approx(said)
    assert len(rates) == 6 and {rate["judge"] for rate in rates} == {"reward model"}
    assert all(rate["wins"] + rate["ties"] + rate["losses"] == len(PROMPTS) for rate in rates)


class Counting:
    """Prefers the longer answer; fails for good after `until` verdicts."""

    model = "counting"

    def __init__(self, until=10**9):
        self.until, self.asked = until, []

    def verdicts(self, questions):
        for place, question in enumerate(questions):
            if len(self.asked) == self.until:
                raise KeyboardInterrupt
            self.asked.append(question)
            first, second = len(question.first), len(question.second)
            yield place, Verdict("tie" if first == second else "first" if first > second else "second")


def test_an_interrupted_comparison_goes_on_and_asks_nothing_twice(folders, tmp_path, monkeypatch):
    broken, whole = Counting(until=7), Counting()
    monkeypatch.setattr(Comparison, "_judge", lambda self: broken)
    with pytest.raises(KeyboardInterrupt):
        compared(folders, tmp_path)
    assert len(rows_of(tmp_path / "verdicts.jsonl")) == 7
    with open(tmp_path / "verdicts.jsonl", "a") as file:
        file.write('{"judge": "cou')  # and torn
    first = rows_of(tmp_path / "samples.jsonl")

    monkeypatch.setattr(Comparison, "_judge", lambda self: whole)
    job = compared(folders, tmp_path, resume_from_checkpoint="last")
    assert not set(broken.asked) & set(whole.asked)
    rows = rows_of(tmp_path / "verdicts.jsonl")
    assert len(rows) == len({row["key"] for row in rows}) == 7 + len(whole.asked)
    assert [row["answer_ids"] for row in rows_of(tmp_path / "samples.jsonl")] == [row["answer_ids"] for row in first]
    again = Counting(until=0)
    monkeypatch.setattr(Comparison, "_judge", lambda self: again)
    assert compared(folders, tmp_path, resume_from_checkpoint="last").outcomes == job.outcomes
    for place, row in enumerate(rows_of(tmp_path / "samples.jsonl")):  # by hand: the longer answer wins
        lengths = {name: len(answer["greedy"].strip()) for name, answer in row["answers"].items()}
        for one in row["outcomes"]:
            mine, other = lengths[one["model"]], lengths[one["against"]]
            assert one["outcome"] == (0.5 if mine == other else float(mine > other)), place


@settings(max_examples=150, deadline=None)
@given(*(st.lists(st.sampled_from(["a", "b", "cc", "d,", "e\n\n"]), max_size=14).map(" ".join) for _ in range(2)))
def test_marked_words_make_both_texts_again(old, new):
    pieces = compared_words(old, new)
    assert "".join(text for kind, text in pieces if kind != "removed").split() == new.split()
    if any(kind != "same" for kind, _ in pieces):
        assert " ".join(text for kind, text in pieces if kind != "added").split() == old.split()


def test_words_are_compared_as_words():
    assert compared_words("I keep basil on a sill", "I keep mint on a sunny sill") == [
        ("same", "I keep "), ("removed", "basil"), ("same", " "), ("added", "mint"), ("same", " "), ("same", "on a "),
        ("added", "sunny"), ("same", " "), ("same", "sill"),
    ]  # fmt: skip
    assert compared_words("one two three four", "quite another thing said") == [("same", "quite another thing said")]


def make_comparison(folder, text, prompts=3):
    names = ["base", text[:60], "good"]
    figures = {"length_tokens": 8.0, "cut": 0.1, "distinct_1": 0.5, "distinct_2": 0.6, "reward_model": 1.0, "n": 3}
    figures["interval_95"] = {name: [0.0, 1.0] for name in ("length_tokens", "cut", "reward_model")}
    reward = {"mean": 0.1, "interval_95": [0.0, 0.2], "n": 3}
    rate = {"judge": text, "model": "good", "against": text[:60], "wins": 2, "ties": 1, "losses": 0, "no_verdict": 1,
            "n": 3, "win_rate": 0.83, "interval_95": [0.4, 0.97]}  # fmt: skip
    summary = {
        "data": {"source": text, "used": prompts},
        "comparison": {"models": dict.fromkeys(names, text), "reference": "base", "beta": 0.1, "reward_model": text,
                       "answers": dict.fromkeys(names, figures),
                       "rewards": {"good": dict.fromkeys(names, reward)}},
        "win_rates": [rate],
        "judges": {text: {"asked": 6, "verdicts": {"first": 3, "second": 2}, "no_verdict_because": {text: 1}}},
        "throughput": {"total_seconds": 1.0},
    }  # fmt: skip
    sample = {
        "prompt": [{"role": "user", "content": text}, {"role": "assistant", "content": text}],
        "answers": {name: {"greedy": f"the same words {text if name == 'base' else name}"} for name in names},
        "rewards": {name: {"good": 0.1} for name in names},
        "reward_model": dict.fromkeys(names, 0.5),
        "outcomes": [{"judge": text, "model": "good", "against": "base", "outcome": None}],
    }
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "run.json").write_text(
        json.dumps({"command": [text], "started": "s", "ended": "e", "config": {"x": text}})
    )
    (folder / "samples.jsonl").write_text((json.dumps(sample) + "\n") * prompts)
    return folder


def test_the_page_escapes_everything_and_stays_small(tmp_path):
    page = write_comparison_page(make_comparison(tmp_path / "a", HOSTILE)).read_text()
    assert "<script" not in page and "<img src=x" not in page and "<svg onload" not in page
    assert "&lt;script&gt;" in page and "\x1b" not in page and "\u202e" not in page
    assert "default-src 'none'" in page
    for name in ("win-rates", "rewards", "figures", "answers", "run"):
        assert f'id="{name}"' in page
    page = write_comparison_page(make_comparison(tmp_path / "b", "long & <b> " * 900, prompts=900)).read_text()
    assert len(page.encode()) < 5_000_000
    assert "of 900 prompts" in page


@pytest.mark.skipif(
    shutil.which("chromium") is None, reason="no chromium on this machine (Debian: apt-get install chromium)"
)
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_browser_shows_the_page_without_errors(tmp_path, width, scheme):
    from playwright.sync_api import sync_playwright

    path = write_comparison_page(make_comparison(tmp_path / "a", HOSTILE))
    said = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if request.url != path.as_uri() else None)
        page.goto(path.as_uri())
        assert page.title().startswith("Answers of ")
        for name in ("win-rates", "rewards", "figures", "answers", "run"):
            assert page.locator(f"#{name} h2").is_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert "<script>" in page.locator("#answers pre").first.inner_text()
        # marks are read without colour, and go away at a key press
        added, removed = page.locator("#answers ins").first, page.locator("#answers del").first
        style = "node => getComputedStyle(node).textDecorationLine"
        assert (added.evaluate(style), removed.evaluate(style)) == ("underline", "line-through")
        page.locator(".marks input").focus()
        page.keyboard.press("Space")
        assert added.evaluate(style) == "none" and not removed.is_visible()
        browser.close()
    assert said == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": []}, "--models: name at least one"),
        ({"models": ["good"]}, "--models good: needs NAME=PATH"),
        ({"models": ["good="]}, "--models good=: needs NAME=PATH"),
        ({"models": ["a=x", "b=y", "a=z"]}, "the name a is given twice"),
        ({"best_of_n": 4}, "--best_of_n needs a reward model"),
        ({"best_of_n": 0, "reward_model": "r"}, "--best_of_n 0: must be at least 1"),
        ({"judge_url": "http://h/v1"}, "--judge_url and --judge_model belong together"),
        ({"beta": 0.0}, "--beta 0.0"),
        ({"max_prompts": 0}, "--max_prompts 0"),
        ({"max_length": 64, "max_new_tokens": 60}, "--max_length 64: must leave 8 tokens"),
        ({"temperature": 0.0}, "--temperature must be above 0"),
    ],
)
def test_senseless_options_name_the_flag(changes, message):
    with pytest.raises(UserError, match=message):
        CompareConfig(**{"models": ["a=x"]} | changes)


def test_beta_is_that_of_the_models(folders, tmp_path):
    for name in ("good", "bad"):
        shutil.copytree(folders / name, tmp_path / name)
        (tmp_path / name / FILE).write_text('{"beta": 0.3}')
    shutil.copytree(folders / "reference", tmp_path / "reference")
    shutil.copy(folders / "prompts.jsonl", tmp_path)
    assert compared(tmp_path, tmp_path / "a", steps=1).beta == 0.3
    assert compared(tmp_path, tmp_path / "b", steps=1, beta=0.2).beta == 0.2
    (tmp_path / "bad" / FILE).write_text('{"beta": 0.5}')
    with pytest.raises(UserError, match=r"trained with β 0\.3, 0\.5: pass one --beta for all"):
        compared(tmp_path, tmp_path / "c", steps=1)

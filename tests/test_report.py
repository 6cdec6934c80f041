"""The report: what it shows, what it survives, and that nothing in it runs."""

import json
import runpy
import shutil

import numpy as np
import pytest

from resdpo_trl.errors import UserError
from resdpo_trl.metrics import digits_of, flaw
from resdpo_trl.run.report import bin_edges, load_run, write_report
from resdpo_trl.study.sweep import COLUMNS
from resdpo_trl.study.sweep_page import Sweep, write_sweep_page

HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    "</pre></style><svg onload=alert(1)>{{ 7*7 }}\x1b[31m\u202e&amp;\"'"
)


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def make_run(folder, name="a run", text="plain text", losses=(0.68, 0.66, 0.67)):
    path = folder / name
    path.mkdir(parents=True)
    interval = {"loss": [0.6, 0.7], "rewards/accuracies": [0.5, 0.6], "rewards/margins": [0.1, 0.2]}
    test = {"loss": 0.66, "rewards/accuracies": 0.58, "rewards/margins": 0.15, "n": 40, "interval_95": interval}
    split = {"prompts_shortened": 1, "turns_dropped": 2, "chosen_cut": 0, "rejected_cut": 1, "pairs_lost": 0}
    summary = {
        "data": {"source": text, "train": 9, "validation": 3, "test": 40, "cap": {"train": split}, "max_length": 128,
                 "dropped": {"identical": 1}},
        "dpo": {"test": test, "beta": 0.1, "loss_type": ["sigmoid"], "kept_epoch": 2.0},
        "throughput": {"dpo_seconds": 3.0},
    }  # fmt: skip
    (path / "summary.json").write_text(json.dumps(summary))
    run = {
        "command": ["dpo_hh.py", "--dataset_name", text],
        "started": "s",
        "ended": "e",
        "seed": 1,
        "config": {"x": text},
    }
    (path / "run.json").write_text(json.dumps(run))
    metrics = []
    for epoch, loss in enumerate(losses, 1):
        row = {"stage": "dpo", "step": 10 * epoch, "loss": loss, "rewards/margins": 0.1 * epoch}
        metrics += [row | {"split": "train", "epoch": epoch - 0.5}, row | {"split": "train", "epoch": epoch}]
        metrics.append(row | {"split": "validation", "epoch": float(epoch)})
    (path / "metrics.jsonl").write_text(lines(metrics))
    answers = {"policy": {"greedy": text, "sampled": text}}
    (path / "samples.jsonl").write_text(lines([{"prompt": text, "chosen": text, "rejected": text, "answers": answers}]))
    scores = [{"pair": k, "margin": (k - 15) / 10} for k in range(40)]
    scores[0] |= {"prompt": text, "chosen": text, "rejected": text}
    scores[39] |= {"prompt": text, "chosen": text, "rejected": text}
    (path / "scores.jsonl").write_text(lines(scores))
    return path


def test_one_page_with_everything_in_it(tmp_path):
    page = write_report([make_run(tmp_path)]).read_text()
    for section in ("results", "curves", "margins", "extremes", "cuts", "answers", "run"):
        assert f'id="{section}"' in page, section
    assert "ranks 58% of 40 unseen pairs right" in page and "0.66" in page and "0.60 to 0.70" in page
    assert "epoch kept</text>" in page
    assert "Content-Security-Policy" in page and "default-src 'none'" in page
    for outside in ("http://", "https://", "<script", "<link", "@import"):
        places = [at for at in range(len(page)) if page.startswith(outside, at)]
        # the namespaces of SVG are names, not addresses that are loaded
        assert all("xmlns" in page[at - 40 : at] or "w3.org" in page[at : at + 30] for at in places), outside
    assert len(page) < 5_000_000
    assert {path.name for path in (tmp_path / "a run" / "plots").iterdir()} == {
        "loss.png", "rewards_margins.png", "test_margins.png"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("least", "most"), [(-1.5, 2.4), (2.0, 2.3), (-9.0, -8.5), (0.0, 1.0), (0.3, 0.3), (1e9, 1e9 + 1)]
)
def test_every_margin_is_drawn_whatever_its_sign(least, most):
    for seed in range(20):
        margins = np.random.default_rng(seed).uniform(least, most, 200).tolist()
        edges = bin_edges(margins)
        counts, _ = np.histogram(margins, edges)
        assert counts.sum() == 200
        assert least == most or (np.count_nonzero(counts) > 30 and len(edges) <= 43)
        assert min(margins) >= 0 or max(margins) <= 0 or 0.0 in edges  # no bin has both signs


def test_hostile_text_stays_text(tmp_path):
    page = write_report([make_run(tmp_path, text=HOSTILE)]).read_text()
    assert "<script" not in page and "<img src=x" not in page and "<svg onload" not in page
    assert "&lt;script&gt;" in page
    assert "{{ 7*7 }}" in page
    assert "\x1b" not in page and "\u202e" not in page


def test_a_hostile_name_stays_text_in_the_plots(tmp_path):
    runs = [make_run(tmp_path, name) for name in ("a<b>&$x^2$", "second")]
    page = write_report(runs, tmp_path / "both.html").read_text()
    assert "<b>&" not in page
    assert "a&lt;b&gt;&amp;$x^2$" in page


def test_the_page_opens_with_before_and_after_and_what_is_next(tmp_path):
    path = make_run(tmp_path)
    summary = json.loads((path / "summary.json").read_text())
    test = summary["dpo"]["test"]
    test["logps/ref_accuracies"], test["interval_95"]["logps/ref_accuracies"] = 0.5, [0.35, 0.65]
    summary["sft"] = {"validation": {"loss_before": 3.0, "loss_after": 2.5, "n": 3}}
    (path / "summary.json").write_text(json.dumps(summary))
    run = json.loads((path / "run.json").read_text())
    model = {"model_name_or_path": "someone/tiny-model"}
    command = ["recipes/dpo_hh.py", "--beta", "0.1", "--max_length", "64", "--output_dir", "x"]
    (path / "run.json").write_text(json.dumps(run | {"config": {"model": model}, "command": command}))
    answers = {"reference": {"greedy": "Fine."}, "policy": {"greedy": "no no no no no no no"}}
    row = {"prompt": "How?", "chosen": "People say so.", "rejected": "-", "answers": answers}
    (path / "samples.jsonl").write_text(lines([row, row | {"answers": {"policy": {"greedy": " "}}}]))
    with open(path / "metrics.jsonl", "a") as file:
        file.write(lines([{"stage": "sft", "split": "validation", "step": 3, "epoch": 1.0, "loss": 2.5}]))
    page = write_report([path]).read_text()
    first = page[: page.index("<section")]
    for words in (
        "<title>DPO of tiny-model on plain text</title>",
        "ranks 58% of 40 unseen pairs right (95% interval 50% to 60%), which is not distinguishable from chance",
        "; the reference&#39;s log-likelihood 50%.",
        'left: 50.00%; width: 10.00%"', "95% interval 35% to 65%",
        "policy — repeats itself", "chosen answer", "People say so.",
        "resdpo-trl chat", "resdpo-trl sweep --betas 0.033 0.1 0.3 --max_length 64<", "resdpo-trl publish",
    ):  # fmt: skip
        assert words in first, words
    assert (path / "plots" / "sft_loss.png").exists() and "SFT loss" in page
    answers = page[page.index('id="answers"') :]
    assert "repeats itself</th>" in answers and "policy, greedy — ends at once" in answers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "ends at once"),
        (" \n", "ends at once"),
        ("I love it. I love it. I love it.", "repeats itself"),
        ("no no no no no no", "repeats itself"),
        ("a b c d a b c d a b c d e", "repeats itself"),
        ("It is red. Yes. It is red. No. It is red.", "repeats itself"),
        ("very very good", None),
        ("No, no, no.", None),
        ("I like to hike. I like to read. I like to swim.", None),
        ("one two three one two three four", None),
    ],
)
def test_answers_that_a_reader_would_skip(text, expected):
    assert flaw(text) == expected


@pytest.mark.parametrize(
    ("low", "high", "digits"),
    [
        (0.691, 0.801, 2),  # half is 0.055
        (0.835, 0.856, 3),  # half is 0.0105: two digits of it
        (1.0, 1.4, 2),  # 0.2
        (1.0, 2.2, 1),  # 0.6
        (-60, -40, 0),  # 10
        (0.5, 0.5, 3),
        (None, None, 3),
    ],
)
def test_digits_that_an_interval_deserves(low, high, digits):
    assert digits_of(low, high) == digits


def sweep_of(folder):
    """Three points: one is best, one failed; the frontier of the two, a checkpoint of which can't be read."""
    paths = [make_run(folder / "points", name) for name in ("beta0.1_x", "beta0.5_x")]
    rows, frontier = [], []
    for number, (point, beta) in enumerate((("beta0.1_x", 0.1), ("beta0.5_x", 0.5), ("beta2_x", 2.0))):
        row = dict.fromkeys(COLUMNS, "") | {"point": point, "beta": beta, "learning_rate": 1e-4, "seed": 0}
        row |= {"sft_epochs": 1.0}
        done = {"status": "done", "loss": 0.66, "accuracy": 0.6, "accuracy_low": 0.5, "accuracy_high": 0.7}
        done |= {"margin": 0.1, "reward_chosen": 0.2, "reward_rejected": 0.1, "n": 40, "best_epoch": 2.0}
        done |= {"kept_epoch": 2.0, "best": "best" if number == 0 else ""}
        rows.append(row | (done if number < 2 else {"status": f"failed: status 1, {HOSTILE}"}))
        for epoch in (1.0, 2.0) if number < 2 else ():
            found = {"kl": epoch + number, "reward": epoch / 10, "n": 8.0, "status": "done", "step": 10 * epoch}
            found |= {"kl_low": epoch, "kl_high": epoch + 2, "reward_low": 0.0, "reward_high": 0.5}
            frontier.append(row | found | {"epoch": epoch})
    zero = {"kl": 0.0, "kl_low": 0.0, "kl_high": 0.0, "reward": 0.1, "reward_low": 0.0, "reward_high": 0.2}
    frontier.insert(0, frontier[0] | zero | {"point": "reference", "epoch": 0.0, "step": 0.0})
    frontier.append(frontier[-1] | {"status": "failed: torn weights", "step": 30.0})
    frontier.append(rows[2] | {"step": "", "epoch": ""})
    return paths, Sweep(rows, frontier)


def test_a_sweeps_page_marks_the_best_and_names_what_failed(tmp_path):
    paths, sweep = sweep_of(tmp_path)
    page = write_sweep_page(paths, sweep, tmp_path / "report.html").read_text()
    for section in ("points", "frontier", "curves", "run"):
        assert f'id="{section}"' in page, section
    assert "β 0.1 — best" in page and "β 0.1 (best)" in page and "(best)" not in page.replace("β 0.1 (best)", "")
    assert "beta0.5_x, step 30 is missing from the frontier: failed: torn weights" in page
    assert "beta2_x is missing from the frontier: it did not end" in page
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "No point beats the reference" in page[: page.index("<section")]  # no interval is above 50%
    assert 'id="against-beta"' in page and (tmp_path / "plots" / "against_beta.png").exists()
    assert f"chat.py {paths[0]}<" in page and f'<a href="{paths[0] / "report.html"}">' in page  # the winner's
    assert (tmp_path / "plots" / "frontier.png").stat().st_size > 5000


@pytest.mark.filterwarnings("ignore:'resdpo_trl.study.sweep' found in sys.modules")
def test_a_new_figure_is_one_row(tmp_path, monkeypatch):
    """With the value that a function of metrics.py returns, it is in tables, curves, the card's words and table.csv."""
    from resdpo_trl import metrics

    row = metrics.Figure("rewards/sure", "pairs ranked right with odds of 3", 4, "higher", "sure")
    monkeypatch.setitem(metrics.FIGURES, row.name, row)
    path = make_run(tmp_path)
    summary = json.loads((path / "summary.json").read_text())
    summary["dpo"]["test"][row.name] = 0.25
    summary["dpo"]["test"]["interval_95"][row.name] = [0.14, 0.40]
    (path / "summary.json").write_text(json.dumps(summary))
    rows = [json.loads(line) | {row.name: 0.2} for line in (path / "metrics.jsonl").read_text().splitlines()]
    (path / "metrics.jsonl").write_text(lines(rows))
    page = write_report([path]).read_text()
    assert "pairs ranked right with odds of 3 ↑" in page[page.index('id="results"') :] and "0.14 to 0.40" in page
    assert (path / "plots" / "rewards_sure.png").exists()
    assert ["pairs ranked right with odds of 3", "0.2500", "0.1400 to 0.4000"] in metrics.figure_rows(
        summary["dpo"]["test"]
    )
    assert "sure" in runpy.run_module("resdpo_trl.study.sweep")["COLUMNS"]


def test_torn_and_missing_files_leave_a_note(tmp_path):
    path = make_run(tmp_path)
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "dpo", "split": "tr')
    page = write_report([path]).read_text()
    assert "1 damaged line(s) of metrics.jsonl are skipped" in page
    assert 'id="curves"' in page
    (path / "metrics.jsonl").unlink()
    (path / "scores.jsonl").unlink()
    page = write_report([path]).read_text()
    assert 'id="curves"' not in page and 'id="results"' in page
    (path / "run.json").write_text('{"torn')
    assert "run.json can&#39;t be read" in write_report([path]).read_text()


def test_an_unfinished_run_has_a_report(tmp_path):
    path = make_run(tmp_path)
    run = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(run | {"ended": None}))
    (path / "summary.json").write_text("{}")
    page = write_report([path]).read_text()
    assert "has not ended" in page and 'id="curves"' in page and 'id="results"' not in page
    assert "epoch kept</text>" not in page


def test_several_runs_share_a_page(tmp_path):
    runs = [make_run(tmp_path, f"beta{k}") for k in range(3)]
    page = write_report(runs, tmp_path / "out" / "page.html").read_text()
    assert page.count("beta1") > 3
    with pytest.raises(UserError, match="--output: needed for the page"):
        write_report(runs)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_run(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a run's folder"):
        load_run(tmp_path / "empty")


@pytest.mark.skipif(
    shutil.which("chromium") is None, reason="no chromium on this machine (Debian: apt-get install chromium)"
)
@pytest.mark.parametrize(
    ("page_of", "width", "scheme"),
    [("run", 1200, "light"), ("run", 390, "dark"), ("sweep", 390, "dark")],
)
def test_a_browser_shows_it_without_errors(tmp_path, page_of, width, scheme):
    from playwright.sync_api import sync_playwright

    if page_of == "run":
        path, title = write_report([make_run(tmp_path, text=HOSTILE)]), "a run"
        sections = ("results", "curves", "margins", "extremes", "answers", "run")
    else:
        paths, sweep = sweep_of(tmp_path / "s")
        path, title = write_sweep_page(paths, sweep, tmp_path / "s" / "report.html"), "Sweep of 3 points: s"
        sections = ("points", "frontier", "curves", "run")
    said = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if request.url != path.as_uri() else None)
        page.goto(path.as_uri())
        assert page.title() == title
        for section in sections:
            assert page.locator(f"#{section} h2").is_visible()
        assert page.locator("figure svg").first.is_visible()
        # nothing is wider than the screen: tables scroll by themselves
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        if page_of == "run":
            assert "<script>" in page.locator("#answers pre").first.inner_text()
        browser.close()
    assert said == []

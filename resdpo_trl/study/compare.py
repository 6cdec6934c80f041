"""The same prompts answered by several models: answers, rewards under each policy, win rates, one page.

The recipe calls the steps in order. One model is in memory at a time. Each model's answers (answers/DIGEST.json) and
each verdict (verdicts.jsonl) are written at once: `--resume_from_checkpoint` draws and asks only what is missing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from resdpo_trl.errors import UserError, printable
from resdpo_trl.metrics import number, table, with_intervals
from resdpo_trl.run.files import read_jsonl, write_whole
from resdpo_trl.run.folder import RunFolder, to_json, use_the_cores
from resdpo_trl.run.provenance import as_trained, loss_of, read_facts
from resdpo_trl.run.verdict import of_comparison
from resdpo_trl.study.comparison_page import write_comparison_page
from resdpo_trl.study.config import CompareConfig
from resdpo_trl.study.judges import (
    KEY_VARIABLE,
    EndpointJudge,
    Judge,
    PythonJudge,
    Question,
    Verdict,
    both_orders,
    win_rate,
)
from resdpo_trl.study.prompts import load_prompts
from resdpo_trl.text.config import TextModelConfig, named_models
from resdpo_trl.text.data import dialogue, end_of_turn
from resdpo_trl.text.evaluate import distinct_ngrams, score_pairs
from resdpo_trl.text.generate import Prompt, answer, answer_ids, prompt_ids, stop_tokens
from resdpo_trl.text.model import check_fits, load_model, load_tokenizer, local_model
from resdpo_trl.text.reward import RewardModel
from resdpo_trl.training.arguments import RunConfig


@dataclasses.dataclass
class Answer:
    """What a model said to one prompt."""

    ids: list[int]  # with the end-of-text token where it ended by itself
    text: str
    ended: bool
    tokenizer: str  # the NAME whose tokenizer `ids` belong to
    score: float | None = None  # by the reward model


class Comparison:
    """One comparison in one folder."""

    def __init__(self, config: CompareConfig, model: TextModelConfig, options: RunConfig, preset: Path | None = None):
        self.config, self.model = config, model
        self.models = named_models(config.models)
        self.started = time.perf_counter()
        use_the_cores()
        self.state = PartialState()
        self.judges = self._judges()
        self.prompts, self.counts = load_prompts(config.prompts, config.max_prompts)
        self.tokenizers = {
            name: load_tokenizer(path, model, config.trust_remote_code, f"--models {name}")
            for name, path in self.models.items()
        }
        if config.reward_model is not None:  # what is wrong with it is said before anything is answered
            RewardModel(config.reward_model, model, config.trust_remote_code)
        # the reference may stand among the models or outside them
        self.reference = config.reference
        if self.reference is not None and self.reference not in self.models:
            self.tokenizers[self.reference] = load_tokenizer(
                self.reference, model, config.trust_remote_code, "--reference"
            )
        self.beta = config.beta or 0.1
        if config.beta is None:
            flags = [(path, f"--models {name}") for name, path in self.models.items()]
            known = [read_facts(local_model(path, flag), model.model_revision, flag) for path, flag in flags]
            betas = sorted({loss_of(as_trained(facts, {}, {})).beta for facts in known if "beta" in facts})
            if len(betas) > 1 and config.reference is not None:
                raise UserError(f"--models: trained with β {', '.join(map(str, betas))}: pass one --beta for all")
            self.beta = next(iter(betas), self.beta)
        resume = config.resume_from_checkpoint is not None
        self.run = RunFolder(config.output_dir, main_process=self.state.is_main_process)
        self.run.open(overwrite=options.overwrite_output_dir, resume=resume)
        self.run.check_inputs(dataclasses.asdict(config))
        self.run.start(
            {
                "preset": str(preset) if preset else None,
                "comparison": dataclasses.asdict(config),
                "model": dataclasses.asdict(model),
                "run": dataclasses.asdict(options),
            },
            config.seed,
        )
        self.answers: dict[str, list[Answer]] = {}
        self.rewards: dict[str, dict[str, list[float]]] = {}  # policy -> whose answers -> (N,) β·log(π/π_ref)
        # (judge, model, against) -> (N,) 1.0 won, 0.5 tie, 0.0 lost, None no verdict
        self.outcomes: dict[tuple[str, str, str], list[float | None]] = {}
        self.answer_seconds, self.answer_tokens = 0.0, 0  # of all that was drawn, chosen among or not

    def _judges(self) -> dict[str, Judge]:
        """The judges of pairs; an endpoint that does not answer is said before any model is loaded."""
        config = self.config
        found: dict[str, Judge] = {}
        try:
            options = json.loads(config.judge_options)
        except json.JSONDecodeError as error:
            raise UserError(f"--judge_options: not JSON ({error.msg})") from None
        if not isinstance(options, dict):
            raise UserError('--judge_options: must be a JSON object, e.g. {"temperature": 0}')
        if config.judge is not None:
            found[config.judge] = PythonJudge(config.judge)
        if config.judge_url is not None and config.judge_model is not None:
            endpoint = EndpointJudge(
                config.judge_url,
                config.judge_model,
                key=os.environ.get(KEY_VARIABLE),
                options=options,
                workers=config.judge_workers,
                timeout_seconds=config.judge_timeout_seconds,
            )
            if self.state.is_main_process:
                endpoint.check()
            found[config.judge_model] = endpoint
        return found

    def say(self, text: str) -> None:
        """Print on the main process, without what a terminal would obey."""
        if self.state.is_main_process:
            print(printable(text, kept="\n"), flush=True)

    def say_what_runs(self) -> None:
        device = self.state.device.type
        threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
        counts = self.counts
        skipped = ("empty_lines", "repeated")
        left_out = "".join(f", {counts[name]} {name.replace('_', ' ')}" for name in skipped if counts[name])
        self.say(
            f"{len(self.models)} models on {counts['used']} prompts ({counts['source']}{left_out}): "
            f"{', '.join(self.models)}\n{device}{threads}, {self.state.num_processes} process(es); "
            f"files go to {self.run.path}"
        )

    # --- answers -------------------------------------------------------------------------------------------------

    def answer(self) -> None:
        """Every model's answers; samples.jsonl is written again after each model."""
        shortened = {}
        for name, path in self.models.items():
            prompts, lost = prompt_ids(self.prompts, self.tokenizers[name], self._prompt_tokens)
            shortened[name] = sum(tokens > 0 for tokens in lost)
            draw = partial(self._drawn, name, prompts, self.config.do_sample, name)
            self._keep(name, name, self._digest(path), draw)
        self.run.summarize(data=self.counts | {"prompts_shortened": shortened})

    def add_best_of_n(self, reward_model: RewardModel) -> None:
        """One more model: of n sampled answers to a prompt, the one that the reward model scores highest,

            y* = argmax_{i ≤ n} r(x, y_i),   y_1 … y_n ~ π(·|x)

        (Stiennon et al. 2020, "Learning to summarize from human feedback", https://arxiv.org/abs/2009.01325, whose
        footnote bounds its KL from π: log n − (n−1)/n).
        """
        count = self.config.best_of_n
        if count is None:
            return
        source = self.config.best_of_n_model or next(iter(self.models))
        name = f"{source}, best of {count}"

        def best() -> list[list[int]]:
            repeated = [prompt for prompt in self.prompts for _ in range(count)]
            prompts, _ = prompt_ids(repeated, self.tokenizers[source], self._prompt_tokens)
            drawn = self._drawn(source, prompts, True, name)
            scores = self._scores(reward_model, repeated, self._read(source, drawn))
            return [drawn[max(range(at, at + count), key=scores.__getitem__)] for at in range(0, len(drawn), count)]

        self._keep(name, source, self._digest(self.models[source], name, _files(self.config.reward_model or "")), best)

    def _keep(self, name: str, source: str, digest: str, draw: Callable[[], list[list[int]]]) -> None:
        """Set the answers of a name: those on disk if they would come out the same, or else what `draw` returns."""
        path = self.run.path / "answers" / f"{digest}.json"
        if path.exists():
            ids = json.loads(path.read_text(encoding="utf-8"))
        else:
            ids = draw()
            if self.state.is_main_process:
                path.parent.mkdir(exist_ok=True)
                write_whole(path, json.dumps(ids))
        self.answers[name] = self._read(source, ids)
        self._write_samples()

    def _read(self, name: str, ids: list[list[int]]) -> list[Answer]:
        tokenizer = self.tokenizers[name]
        texts, stops = tokenizer.batch_decode(ids, skip_special_tokens=True), stop_tokens(tokenizer)
        return [Answer(tokens, text, tokens[-1] in stops, name) for tokens, text in zip(ids, texts, strict=True)]

    @property
    def _prompt_tokens(self) -> int:
        """Tokens of a prompt, at most."""
        return self.config.max_length - self.config.max_new_tokens

    def _drawn(self, name: str, prompts: list[list[int]], sampled: bool, description: str) -> list[list[int]]:
        """Token ids of an answer per prompt; every process answers its share of the prompts."""
        model = self._load(name)
        started = time.perf_counter()
        with self.state.split_between_processes(prompts) as mine:
            ids = answer(
                model, self.tokenizers[name], mine, self.config.max_new_tokens, sampled=sampled,
                seed=self.config.seed + self.state.process_index, batch_size=self.config.batch_size,
                description=f"Answers, {description}", temperature=self.config.temperature, top_p=self.config.top_p,
            )  # fmt: skip
        found: list[list[int]] = gather_object(ids)
        self.answer_seconds += time.perf_counter() - started
        self.answer_tokens += sum(map(len, found))
        return found

    # --- rewards -------------------------------------------------------------------------------------------------

    def score(self) -> None:
        """The reward model's score of every answer, best-of-n with it, and the implicit rewards."""
        if self.config.reward_model is not None:
            reward_model = RewardModel(self.config.reward_model, self.model, self.config.trust_remote_code)
            self.add_best_of_n(reward_model)
            for answers in self.answers.values():
                for one, score in zip(answers, self._scores(reward_model, self.prompts, answers), strict=True):
                    one.score = score
            del reward_model
        if self.reference is not None:
            self._implicit_rewards(self.reference)
        self._write_samples()

    def _scores(self, reward_model: RewardModel, prompts: list[Prompt], answers: list[Answer]) -> list[float]:
        tokenizer = reward_model.tokenizer
        before, _ = prompt_ids(prompts, tokenizer, self._prompt_tokens)
        if tokenizer.chat_template is None:
            texts, end = [one.text for one in answers], [tokenizer.eos_token_id]
        else:  # as a template writes an answer
            ending = end_of_turn(tokenizer)
            texts, end = [one.text.strip() + ending * one.ended for one in answers], []
        after, merged = answer_ids(prompts, texts, tokenizer)
        # another tokenizer may need more tokens for the same text
        rows = [
            (tokens[: len(tokens) - replaced] + ids + end * one.ended)[-self.config.max_length :]
            for tokens, replaced, ids, one in zip(before, merged, after, answers, strict=True)
        ]
        return reward_model.score(rows, self.config.batch_size).tolist()

    def _implicit_rewards(self, reference: str) -> None:
        """β·(log π(y|x) − log π_ref(y|x)) of every answer y under every policy π (Eq. 5 of DPO, arXiv 2305.18290, up to
        the term of the prompt alone); under policies with the reference's tokenizer, others have no such ratio.
        """
        tokenizer = self.tokenizers[reference]
        prompts, _ = prompt_ids(self.prompts, tokenizer, self._prompt_tokens)
        same = {
            name: other.get_vocab() == tokenizer.get_vocab() and other.eos_token_id == tokenizer.eos_token_id
            for name, other in self.tokenizers.items()
        }
        policies = [name for name in self.models if same[name] and name != reference]
        # an answer is scored as the tokens that were drawn; one of another tokenizer by its text
        answers = {
            name: [
                one.ids if same[one.tokenizer] else _ended(ids, one, tokenizer)[: self.config.max_new_tokens]
                for one, ids in zip(
                    found, answer_ids(self.prompts, [one.text for one in found], tokenizer)[0], strict=True
                )
            ]
            for name, found in self.answers.items()
        }
        names = list(answers)
        pairs = [*zip(names[0::2], names[1::2], strict=False), *([(names[-1], names[-1])] if len(names) % 2 else [])]
        rows = [
            {"prompt_ids": prompt, "chosen_ids": answers[first][place], "rejected_ids": answers[second][place]}
            for first, second in pairs
            for place, prompt in enumerate(prompts)
        ]
        scored = Dataset.from_list([row | {"length": sum(map(len, row.values()))} for row in rows])
        logps: dict[str, dict[str, np.ndarray]] = {}
        for name in [reference, *policies]:
            how = (self.config.batch_size, f"Rewards, {name}", self.config.prefix_sharing, self.config.bf16)
            found = score_pairs(self._load(name), scored, tokenizer, *how)
            logps[name] = {}
            for place, (first, second) in enumerate(pairs):
                part = slice(place * len(prompts), (place + 1) * len(prompts))
                logps[name][first] = found.chosen[part].double().numpy()
                logps[name][second] = found.rejected[part].double().numpy()
        self.rewards = {
            policy: {name: (self.beta * (logps[policy][name] - logps[reference][name])).tolist() for name in names}
            for policy in policies
        }

    # --- verdicts ------------------------------------------------------------------------------------------------

    def judge(self) -> None:
        """Every pair of models, judged in both orders; each verdict is in verdicts.jsonl as soon as it is there."""
        if not self.state.is_main_process:
            return
        if self.config.reward_model is not None:
            scores = {name: np.array([one.score for one in found]) for name, found in self.answers.items()}
            for first, second in self._pairs():
                better = np.sign(scores[first] - scores[second])
                self.outcomes["reward model", first, second] = ((1 + better) / 2).tolist()
        earlier = {(row["judge"], row["key"]): row for row in self._kept_verdicts()} if self.judges else {}
        judges = {}
        for name, judge in self.judges.items():
            found = self._ask(name, judge, earlier)
            judges[name] = {
                "asked": len(found),
                "verdicts": dict(Counter(str(verdict.choice) for verdict in found.values())),
                "no_verdict_because": dict(Counter(verdict.reason for verdict in found.values() if verdict.reason)),
            }
            for first, second in self._pairs():
                self.outcomes[name, first, second] = [
                    0.5
                    if self._text(first, place) == self._text(second, place)
                    else both_orders(
                        found[self._question(place, first, second)].choice,
                        found[self._question(place, second, first)].choice,
                    )
                    for place in range(len(self.prompts))
                ]
        self._write_samples()
        rates = [
            {"judge": judge, "model": first, "against": second, **win_rate(found)}
            for (judge, first, second), found in self.outcomes.items()
        ]
        self.run.summarize(win_rates=rates, judges=judges)

    def _ask(self, name: str, judge: Judge, earlier: dict[Any, dict[str, Any]]) -> dict[Question, Verdict]:
        """The verdict on every question for this judge, from an earlier run's file or from the judge."""
        asked: dict[Question, dict[str, Any]] = {}
        found: dict[Question, Verdict] = {}
        for pair in self._pairs():
            for place in range(len(self.prompts)):
                if self._text(pair[0], place) == self._text(pair[1], place):
                    continue  # a tie that nobody needs to judge
                for one, other in (pair, pair[::-1]):
                    question = self._question(place, one, other)
                    key = question.digest()
                    asked.setdefault(
                        question, {"judge": name, "prompt": place, "first": one, "second": other, "key": key}
                    )
                    kept = earlier.get((name, key))
                    if kept is not None and (verdict := Verdict(kept["verdict"], kept["reason"])).final:
                        found[question] = verdict
        missing = [question for question in asked if question not in found]
        with open(self.run.path / "verdicts.jsonl", "a", encoding="utf-8") as file:
            answers = judge.verdicts(missing)
            for place, verdict in tqdm(answers, total=len(missing), desc=f"Judging, {name}", leave=False):
                found[missing[place]] = verdict
                row = asked[missing[place]] | {"verdict": verdict.choice, "reason": verdict.reason}
                file.write(to_json(row) + "\n")
                file.flush()
        return found

    def _pairs(self) -> list[tuple[str, str]]:
        """The pairs of models that are judged."""
        baseline = self.config.baseline
        if baseline is None:
            return list(itertools.combinations(self.answers, 2))
        return [(name, baseline) for name in self.answers if name != baseline]

    def _question(self, place: int, first: str, second: str) -> Question:
        prompt = self.prompts[place]
        text = (prompt if isinstance(prompt, str) else dialogue(prompt)).strip().removesuffix("Assistant:").strip()
        return Question(text, self._text(first, place), self._text(second, place))

    def _text(self, name: str, place: int) -> str:
        return self.answers[name][place].text.strip()

    # --- files ---------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """summary.json, the page, the table."""
        if self.state.is_main_process:  # the others may be done by now: judging is not theirs to wait for
            seconds, speed = self.answer_seconds, {}
            if seconds:  # none where every answer was there already
                speed = {"answer_seconds": seconds, "answer_tokens_per_second": self.answer_tokens / seconds}
            self.run.summarize(
                comparison={
                    "models": dict(self.models),
                    "reference": self.reference,
                    "beta": self.beta,
                    "reward_model": self.config.reward_model,
                    "baseline": self.config.baseline or next(iter(self.models)),
                    "answers": {name: self._answer_figures(found) for name, found in self.answers.items()},
                    "rewards": {
                        policy: {name: _mean(values) for name, values in found.items()}
                        for policy, found in self.rewards.items()
                    },
                },
                throughput=speed | {"total_seconds": time.perf_counter() - self.started},
            )
            self.run.end()
            write_comparison_page(self.run.path)
            self.say(describe(self.run.summary, self.run.path))

    def _answer_figures(self, found: list[Answer]) -> dict[str, Any]:
        figures = {
            "length_tokens": np.array([len(one.ids) for one in found], dtype=float),
            "cut": np.array([not one.ended for one in found], dtype=float),
        }
        if self.config.reward_model is not None:
            figures["reward_model"] = np.array([one.score for one in found], dtype=float)
        return with_intervals(figures) | {
            f"distinct_{n}": distinct_ngrams([one.ids for one in found], n) for n in (1, 2)
        }

    def _write_samples(self) -> None:
        kind = "sampled" if self.config.do_sample else "greedy"
        rows = []
        for place, prompt in enumerate(self.prompts):
            found = {name: answers[place] for name, answers in self.answers.items()}
            rows.append(
                {
                    "prompt": prompt,
                    "answers": {
                        name: {kind if name in self.models else "best_of_n": one.text} for name, one in found.items()
                    },
                    "answer_ids": {name: one.ids for name, one in found.items()},
                    "rewards": {
                        name: {policy: values[name][place] for policy, values in self.rewards.items()} for name in found
                    },
                    "reward_model": {name: one.score for name, one in found.items() if one.score is not None},
                    "outcomes": [
                        {"judge": judge, "model": first, "against": second, "outcome": outcomes[place]}
                        for (judge, first, second), outcomes in self.outcomes.items()
                    ],
                }
            )  # fmt: skip
        self.run.write_rows("samples.jsonl", rows)

    def _digest(self, path: str, *more: Any) -> str:
        """A digest of what answers depend on: the model's files, the prompts, and how they are drawn."""
        config = {
            name: getattr(self.config, name)
            for name in ("max_new_tokens", "max_length", "do_sample", "temperature", "top_p", "seed", "batch_size")
        }
        processes = self.state.num_processes
        parts = [path, _files(path), self.prompts, config, dataclasses.asdict(self.model), processes, *more]
        return hashlib.sha256(json.dumps(parts, default=str, sort_keys=True).encode()).hexdigest()[:32]

    def _kept_verdicts(self) -> list[dict[str, Any]]:
        path = self.run.path / "verdicts.jsonl"
        rows = (
            [row for _, row in read_jsonl(path, torn_lines=[])] if path.exists() else []
        )  # a torn line is asked again
        self.run.write_rows("verdicts.jsonl", rows)  # without a torn end that the next line would run into
        return rows

    def _load(self, name: str) -> Any:
        flag = f"--models {name}" if name in self.models else "--reference"
        model: Any = load_model(self.models.get(name, name), self.model, self.config.trust_remote_code, flag)
        check_fits(model, self.tokenizers[name], self.config.max_length)
        if not getattr(model, "is_quantized", False):
            model.to(self.state.device)
        return model


def describe(summary: dict[str, Any], path: Path) -> str:
    """The verdict, and the win rates and rewards as tables, for the terminal."""
    comparison = summary["comparison"]
    answers, rewards = comparison["answers"], comparison["rewards"]
    columns = {"tokens": ("length_tokens", 1), "cut": ("cut", 2), "distinct-2": ("distinct_2", 3)}
    if comparison["reward_model"]:
        columns["reward model"] = ("reward_model", 3)
    rows = [
        [name, *(number(found[key], digits) for key, digits in columns.values())] for name, found in answers.items()
    ]
    lines = ["", *of_comparison(summary), "", table(rows, ("", *columns))]
    if rewards:
        rows = [[name, *(number(found[name]["mean"]) for found in rewards.values())] for name in answers]
        lines += ["", f"  mean β·log(π/π_ref), β = {comparison['beta']:g}; rows: whose answers"]
        lines.append(table(rows, ("", *(f"under {policy}" for policy in rewards))))
    if summary.get("win_rates"):
        lines += ["", "  win rates: (wins + ties / 2) / n, 95% Wilson intervals"]
    for row in summary.get("win_rates", []):
        said = f"  {row['model']} against {row['against']}, by {row['judge']}: "
        if row["n"]:
            low, high = row["interval_95"]
            said += f"{row['win_rate']:.3f} ({low:.3f} to {high:.3f}), n = {row['n']}; "
        lines.append(
            said + f"{row['wins']} wins, {row['ties']} ties, {row['losses']} losses, {row['no_verdict']} no verdict"
        )
    for name, found in summary.get("judges", {}).items():
        for reason, count in found["no_verdict_because"].items():
            lines.append(f"  no verdict by {name}, {count} times: {reason}")
    return "\n".join([*lines, "", f"open {path / 'report.html'}"])


def _files(path: str) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a model's files; none for a Hub id."""
    return [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(Path(path).glob("*"))
        if file.is_file() and file.suffix != ".md"
    ]


def _mean(values: list[float]) -> dict[str, Any]:
    found = with_intervals({"mean": np.array(values)})
    return {"mean": found["mean"], "interval_95": found["interval_95"]["mean"], "n": found["n"]}


def _ended(ids: list[int], one: Answer, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [*ids, stop_tokens(tokenizer)[-1]] if one.ended or not ids else ids

"""The same prompts answered by several models: answers, rewards under each policy, win rates, one page.

The steps in order; the recipe calls them. One model is in memory at a time, and each model's answers and each verdict
are on disk as soon as they are there: `--resume_from_checkpoint` makes and asks only what is missing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from resdpo_trl.arguments import RunConfig
from resdpo_trl.errors import UserError, printable
from resdpo_trl.metrics import with_intervals
from resdpo_trl.provenance import as_trained, loss_of, read_facts
from resdpo_trl.run import RunFolder, to_json, use_the_cores
from resdpo_trl.text.comparison_page import write_comparison_page
from resdpo_trl.text.config import CompareConfig, TextModelConfig, named_models
from resdpo_trl.text.data import dialogue, end_of_turn
from resdpo_trl.text.evaluate import distinct_ngrams, score_pairs
from resdpo_trl.text.generate import answer, stop_tokens
from resdpo_trl.text.judges import (
    KEY_VARIABLE,
    EndpointJudge,
    Judge,
    PythonJudge,
    Question,
    Verdict,
    both_orders,
    win_rate,
)
from resdpo_trl.text.model import check_fits, load_model, load_tokenizer, local_model
from resdpo_trl.text.prompts import Prompt, answer_ids, load_prompts, prompt_ids
from resdpo_trl.text.reward import RewardModel
from resdpo_trl.verdict import of_comparison


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
        self.made_from: dict[str, str] = {}  # what the answers of each name depend on, as a digest
        self.rewards: dict[str, dict[str, list[float]]] = {}  # policy -> whose answers -> (N,) β·log(π/π_ref)
        # (judge, model, against) -> (N,) 1.0 won, 0.5 tie, 0.0 lost, None no verdict
        self.outcomes: dict[tuple[str, str, str], list[float | None]] = {}
        self.verdicts: list[dict[str, Any]] = []  # the lines of verdicts.jsonl
        self.answer_seconds, self.answer_tokens = 0.0, 0  # of all that was drawn, chosen among or not
        if resume:
            self._restore()

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
        """Every model's answers, in batches; samples.jsonl is written anew after each model."""
        shortened = {}
        for name, path in self.models.items():
            prompts, lost = prompt_ids(self.prompts, self.tokenizers[name], self._prompt_tokens)
            shortened[name] = sum(tokens > 0 for tokens in lost)
            if name not in self.answers:
                drawn = self._drawn(name, self._load(name), prompts, self.config.do_sample, 1, name)
                self.answers[name] = [first for (first,) in drawn]
                self._save(name, self._key(path))
        self.answers = {name: self.answers[name] for name in [*self.models, *self.answers]}  # in the order asked for
        self.run.summarize(data=self.counts | {"prompts_shortened": shortened})

    def add_best_of_n(self, reward_model: RewardModel) -> None:
        """One more model: of n sampled answers to a prompt the one that the reward model scores highest,

            y* = argmax_{i ≤ n} r(x, y_i),   y_1 … y_n ~ π(·|x)

        (Stiennon et al. 2020, "Learning to summarize from human feedback", https://arxiv.org/abs/2009.01325, whose
        footnote bounds its KL from π: log n − (n−1)/n).
        """
        count = self.config.best_of_n
        if count is None or self._best_name in self.answers:
            return
        source = self._best_source
        prompts, _ = prompt_ids(self.prompts, self.tokenizers[source], self._prompt_tokens)
        drawn = self._drawn(source, self._load(source), prompts, True, count, self._best_name)
        repeated = [prompt for prompt in self.prompts for _ in range(count)]
        flat = [candidate for candidates in drawn for candidate in candidates]
        scores = self._scores(reward_model, repeated, flat)
        best = [max(range(at, at + count), key=scores.__getitem__) for at in range(0, len(flat), count)]
        self.answers[self._best_name] = [dataclasses.replace(flat[at], score=scores[at]) for at in best]
        self._save(self._best_name, self._best_key())

    @property
    def _best_source(self) -> str:
        return self.config.best_of_n_model or next(iter(self.models))

    @property
    def _best_name(self) -> str:
        return f"{self._best_source}, best of {self.config.best_of_n}"

    def _best_key(self) -> str:
        return self._key(self.models[self._best_source], self._best_name, _files(self.config.reward_model or ""))

    @property
    def _prompt_tokens(self) -> int:
        """Tokens of a prompt, at most."""
        return self.config.max_length - self.config.max_new_tokens

    def _drawn(
        self, name: str, model: Any, prompts: list[list[int]], sampled: bool, count: int, description: str
    ) -> list[list[Answer]]:
        """`count` answers to each prompt; every process answers its share of the prompts."""
        started = time.perf_counter()
        tokenizer = self.tokenizers[name]
        with self.state.split_between_processes(list(range(len(prompts)))) as mine:
            rows = [prompts[place] for place in mine for _ in range(count)]
            ids = answer(
                model, tokenizer, rows, self.config.max_new_tokens, sampled=sampled,
                seed=self.config.seed + self.state.process_index, batch_size=self.config.batch_size,
                description=f"Answers, {description}", temperature=self.config.temperature, top_p=self.config.top_p,
            )  # fmt: skip
        found = gather_object(ids)
        self.answer_seconds += time.perf_counter() - started
        self.answer_tokens += sum(map(len, found))
        texts, stops = tokenizer.batch_decode(found, skip_special_tokens=True), stop_tokens(tokenizer)
        answers = [Answer(tokens, text, tokens[-1] in stops, name) for tokens, text in zip(found, texts, strict=True)]
        return [answers[start : start + count] for start in range(0, len(answers), count)]

    # --- rewards -------------------------------------------------------------------------------------------------

    def score(self) -> None:
        """The reward model's score of every answer, best-of-n with it, and the implicit rewards."""
        if self.config.reward_model is not None:
            reward_model = RewardModel(self.config.reward_model, self.model, self.config.trust_remote_code)
            self.add_best_of_n(reward_model)
            for answers in self.answers.values():
                missing = [place for place, one in enumerate(answers) if one.score is None]
                scores = self._scores(
                    reward_model, [self.prompts[place] for place in missing], [answers[place] for place in missing]
                )
                for place, score in zip(missing, scores, strict=True):
                    answers[place].score = score
            del reward_model
        if self.reference is not None:
            self._implicit_rewards(self.reference)
        self._write_samples()

    def _scores(self, reward_model: RewardModel, prompts: list[Prompt], answers: list[Answer]) -> list[float]:
        tokenizer = reward_model.tokenizer
        if not answers:
            return []
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
        with self.state.split_between_processes(list(range(len(rows)))) as mine:
            found = reward_model.score([rows[place] for place in mine], self.config.batch_size).tolist()
        return gather_object(found)

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
            both = []
            with self.state.split_between_processes(list(range(len(rows)))) as mine:
                if mine:
                    found = score_pairs(
                        self._load(name), scored.select(mine), tokenizer, self.config, f"Rewards, {name}"
                    )
                    both = [*zip(found.chosen.tolist(), found.rejected.tolist(), strict=True)]
            both = gather_object(both)
            logps[name] = {}
            for number, (first, second) in enumerate(pairs):
                part = both[number * len(prompts) : (number + 1) * len(prompts)]
                logps[name][first] = np.array([chosen for chosen, _ in part])
                logps[name][second] = np.array([rejected for _, rejected in part])
        self.rewards = {
            policy: {name: (self.beta * (logps[policy][name] - logps[reference][name])).tolist() for name in names}
            for policy in policies
        }

    # --- verdicts ------------------------------------------------------------------------------------------------

    def judge(self) -> None:
        """Every pair of models, judged in both orders; each verdict is in verdicts.jsonl as soon as it is there."""
        if not self.state.is_main_process:
            return
        outcomes = self.outcomes
        if self.config.reward_model is not None:
            for first, second in self._pairs():
                scores = zip(self.answers[first], self.answers[second], strict=True)
                outcomes["reward model", first, second] = [_better(one.score, other.score) for one, other in scores]
        earlier = {(row["judge"], row["key"]): row for row in self._kept_verdicts()} if self.judges else {}
        first_places: dict[str, Counter[str]] = {}
        for name, judge in self.judges.items():
            found = self._ask(name, judge, earlier)
            first_places[name] = Counter(str(verdict.choice) for verdict in found.values())
            for first, second in self._pairs():
                outcomes[name, first, second] = [
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
            for (judge, first, second), found in outcomes.items()
        ]
        reasons = {
            name: dict(Counter(row["reason"] for row in self.verdicts if row["judge"] == name and row["reason"]))
            for name in self.judges
        }
        self.run.summarize(
            win_rates=rates,
            judges={
                name: {"asked": sum(counts.values()), "verdicts": dict(counts), "no_verdict_because": reasons[name]}
                for name, counts in first_places.items()
            },
        )

    def _ask(self, name: str, judge: Judge, earlier: dict[Any, dict[str, Any]]) -> dict[Question, Verdict]:
        """The verdict on every question of this judge, from an earlier run's file or from the judge."""
        asked: dict[Question, dict[str, Any]] = {}
        for first, second in self._pairs():
            for place in range(len(self.prompts)):
                if self._text(first, place) == self._text(second, place):
                    continue  # a tie that nobody needs to judge
                for one, other in ((first, second), (second, first)):
                    question = self._question(place, one, other)
                    asked.setdefault(question, {"judge": name, "prompt": place, "first": one, "second": other})
        found: dict[Question, Verdict] = {}
        for question in asked:
            kept = earlier.get((name, question.digest()))
            if kept is not None and Verdict(kept["verdict"], kept["reason"]).final:
                found[question] = Verdict(kept["verdict"], kept["reason"])
                self.verdicts.append(kept)
        missing = [question for question in asked if question not in found]
        path = self.run.path / "verdicts.jsonl"
        with open(path, "a", encoding="utf-8") as file:
            progress = tqdm(judge.verdicts(missing), total=len(missing), desc=f"Judging, {name}", leave=False)
            for place, verdict in progress:
                question = missing[place]
                found[question] = verdict
                row = asked[question] | {
                    "verdict": verdict.choice, "reason": verdict.reason, "key": question.digest()
                }  # fmt: skip
                self.verdicts.append(row)
                file.write(to_json(row) + "\n")
                file.flush()
        return found

    def _pairs(self) -> list[tuple[str, str]]:
        """The pairs of models that are judged."""
        pairs = itertools.combinations(self.answers, 2)
        baseline = self.config.baseline
        if baseline is None:
            return list(pairs)
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

    def _save(self, name: str, key: str) -> None:
        """What is there so far, and what it was made from."""
        self.made_from[name] = key
        self._write_samples()
        self.run.summarize(made_from=self.made_from)

    def _key(self, path: str, *more: Any) -> str:
        """A digest of what answers depend on: the model's files, the prompts, and how they are drawn."""
        config = {
            name: getattr(self.config, name)
            for name in ("max_new_tokens", "max_length", "do_sample", "temperature", "top_p", "seed", "batch_size")
        }
        parts = [
            path,
            _files(path),
            self.prompts,
            config,
            dataclasses.asdict(self.model),
            self.state.num_processes,
            *more,
        ]
        return hashlib.sha256(json.dumps(parts, default=str, sort_keys=True).encode()).hexdigest()[:32]

    def _restore(self) -> None:
        """The answers that an interrupted comparison left and that would come out the same."""
        path = self.run.path / "samples.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
        keys = {name: self._key(path) for name, path in self.models.items()}
        if self.config.best_of_n is not None:
            keys[self._best_name] = self._best_key()
        for name, key in keys.items():
            if len(rows) != len(self.prompts) or self.run.summary.get("made_from", {}).get(name) != key:
                continue
            source = name if name in self.models else self._best_source
            stops = stop_tokens(self.tokenizers[source])
            self.answers[name] = []
            for row in rows:
                ids, (text,) = row["answer_ids"][name], row["answers"][name].values()
                self.answers[name].append(Answer(ids, text, ids[-1] in stops, source))
            self.made_from[name] = key

    def _kept_verdicts(self) -> list[dict[str, Any]]:
        path = self.run.path / "verdicts.jsonl"
        rows: list[dict[str, Any]] = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:  # torn by a crash: it is asked again
                continue
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
    comparison, lines = summary["comparison"], ["", *of_comparison(summary), ""]
    answers = comparison["answers"]
    width = max(map(len, answers))
    lines.append(
        f"  {'':<{width}}  tokens    cut  distinct-2" + ("  reward model" if comparison["reward_model"] else "")
    )
    for name, found in answers.items():
        cells = f"{found['length_tokens']:>8.1f}{found['cut']:>7.2f}{found['distinct_2'] or 0:>12.3f}"
        score = f"{found['reward_model']:>14.3f}" if comparison["reward_model"] else ""
        lines.append(f"  {name:<{width}}{cells}{score}")
    if comparison["rewards"]:
        lines += ["", f"  mean β·log(π/π_ref), β = {comparison['beta']:g}; rows: whose answers"]
        lines.append(f"  {'':<{width}}" + "".join(f"  {'under ' + policy:>14}" for policy in comparison["rewards"]))
        for name in answers:
            means = [
                f"{found[name]['mean']:>{max(14, len(policy) + 6) + 2}.3f}"
                for policy, found in comparison["rewards"].items()
            ]
            lines.append(f"  {name:<{width}}{''.join(means)}")
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


def _better(first: float | None, second: float | None) -> float | None:
    """The outcome of two scores, which do not depend on an order."""
    if first is None or second is None:
        return None
    return 0.5 if first == second else float(first > second)


def _mean(values: list[float]) -> dict[str, Any]:
    found = with_intervals({"mean": np.array(values)})
    return {"mean": found["mean"], "interval_95": found["interval_95"]["mean"], "n": found["n"]}


def _ended(ids: list[int], one: Answer, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [*ids, stop_tokens(tokenizer)[-1]] if one.ended or not ids else ids

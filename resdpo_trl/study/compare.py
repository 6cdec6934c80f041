"""Compare several models on the same prompts: answers, rewards under each policy, win rates, and one page.

The recipe calls the steps in order. One model is in memory at a time. Each verdict is written to verdicts.jsonl as it
arrives. `--resume_from_checkpoint` generates the same answers again and asks only questions without a verdict.
"""

from __future__ import annotations

import dataclasses
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

from resdpo_trl.errors import UserError, printable
from resdpo_trl.metrics import with_intervals
from resdpo_trl.run.files import read_jsonl
from resdpo_trl.run.folder import RunFolder, to_json, use_the_cores
from resdpo_trl.run.provenance import as_trained, loss_of, read_facts
from resdpo_trl.study.comparison_page import describe, write_comparison_page
from resdpo_trl.study.config import CompareConfig
from resdpo_trl.study.judges import KEY_VARIABLE, EndpointJudge, Question, Verdict, both_orders, win_rate
from resdpo_trl.study.prompts import load_prompts
from resdpo_trl.text.config import TextModelConfig, named_models
from resdpo_trl.text.data import dialogue
from resdpo_trl.text.evaluate import distinct_ngrams, score_pairs, texts_of
from resdpo_trl.text.generate import Prompt, answer, answer_ids, prompt_ids, stop_tokens, write_prompt
from resdpo_trl.text.model import check_fits, load_model, load_tokenizer, local_model
from resdpo_trl.text.reward import RewardModel, check_reward_model
from resdpo_trl.training.arguments import RunConfig


@dataclasses.dataclass
class Answer:
    """A model's answer to one prompt."""

    ids: list[int]  # with the end-of-text token if the answer ended on its own
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
        self.endpoint = self._judge()
        self.prompts, self.counts = load_prompts(config.prompts, config.max_prompts)
        # name -> (path, flag) of every model that is loaded; the reference may be one of --models, or another one
        self.places = {name: (path, f"--models {name}") for name, path in self.models.items()}
        if config.reference is not None:
            self.places.setdefault(config.reference, (config.reference, "--reference"))
        self.tokenizers = {
            name: load_tokenizer(path, model, config.trust_remote_code, flag)
            for name, (path, flag) in self.places.items()
        }
        if config.reward_model is not None:  # before any answer is generated
            check_reward_model(config.reward_model, config.trust_remote_code)
        self.beta = self._beta()
        self.run = RunFolder(config.output_dir, main_process=self.state.is_main_process)
        self.run.open(options.overwrite_output_dir, resume=config.resume_from_checkpoint is not None)
        self.run.check_inputs(dataclasses.asdict(config))
        how = {
            "preset": str(preset) if preset else None,
            "comparison": dataclasses.asdict(config),
            "model": dataclasses.asdict(model),
            "run": dataclasses.asdict(options),
        }
        if self.run.earlier:
            if "comparison" not in self.run.earlier.get("config", {}):
                raise UserError(f"--output_dir {self.run.path} holds a training run: name another folder")
            self.run.check_config(how)
        self.run.start(how, config.seed)
        self.answers: dict[str, list[Answer]] = {}
        self.rewards: dict[str, dict[str, list[float]]] = {}  # policy -> whose answers -> (N,) β·log(π/π_ref)
        # (judge, model, against) -> (N,) 1.0 won, 0.5 tie, 0.0 lost, None no verdict
        self.outcomes: dict[tuple[str, str, str], list[float | None]] = {}
        self.answer_seconds, self.answer_tokens = 0.0, 0  # of all generated answers

    def _beta(self) -> float:
        """--beta, or that of the models' training, or 0.1."""
        if self.config.beta is not None:
            return self.config.beta
        named = [self.places[name] for name in self.models]
        known = [read_facts(local_model(path, flag), self.model.model_revision, flag) for path, flag in named]
        betas = sorted({loss_of(as_trained(facts, {}, {})).beta for facts in known if "beta" in facts})
        if len(betas) > 1 and self.config.reference is not None:
            raise UserError(f"--models: trained with β {', '.join(map(str, betas))}: pass one --beta for all")
        return next(iter(betas), 0.1)

    def _judge(self) -> EndpointJudge | None:
        """The judge of pairs, if any. An endpoint that does not answer is an error before any model is loaded."""
        config = self.config
        if config.judge_url is None or config.judge_model is None:
            return None
        try:
            options = dict(json.loads(config.judge_options))
        except (ValueError, TypeError):
            raise UserError('--judge_options: needs a JSON object, e.g. {"temperature": 0}') from None
        key = os.environ.get(KEY_VARIABLE)
        judge = EndpointJudge(config.judge_url, config.judge_model, key, options, config.judge_workers)
        if self.state.is_main_process:
            judge.check()
        return judge

    def say(self, text: str) -> None:
        """Print on the main process, without terminal control characters."""
        if self.state.is_main_process:
            print(printable(text, kept="\n"), flush=True)

    def say_what_runs(self) -> None:
        device = self.state.device.type
        threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
        counts = self.counts
        self.say(
            f"{len(self.models)} models on {counts['used']} prompts ({counts['source']}; {counts['empty_lines']} empty "
            f"lines and {counts['repeated']} repeated prompts skipped): "
            f"{', '.join(self.models)}\n{device}{threads}, {self.state.num_processes} process(es); "
            f"files go to {self.run.path}"
        )

    # --- answers -------------------------------------------------------------------------------------------------

    def answer(self) -> None:
        """Generate every model's answers. samples.jsonl is rewritten after each model."""
        shortened = {}
        for name in self.models:
            prompts, lost = self._prompt_ids(self.prompts, self.tokenizers[name])
            shortened[name] = sum(tokens > 0 for tokens in lost)
            self.answers[name] = self._drawn(name, prompts, self.config.do_sample, name)
            self._write_samples()
        self.run.summarize(data=self.counts | {"prompts_shortened": shortened})

    def add_best_of_n(self, reward_model: RewardModel) -> None:
        """Add a model whose answer is that with the highest score among n sampled answers to a prompt,

            y* = argmax_{i ≤ n} r(x, y_i),   y_1 … y_n ~ π(·|x)

        (Stiennon et al. 2020, "Learning to summarize from human feedback", https://arxiv.org/abs/2009.01325, whose
        footnote bounds its KL from π: log n − (n−1)/n).
        """
        count, source = self.config.best_of_n or 1, next(iter(self.models))
        name = f"{source}, best of {count}"
        repeated = [prompt for prompt in self.prompts for _ in range(count)]
        prompts, _ = self._prompt_ids(repeated, self.tokenizers[source])
        drawn = self._drawn(source, prompts, True, name)
        scores = self._scores(reward_model, repeated, drawn)
        best = (max(range(at, at + count), key=scores.__getitem__) for at in range(0, len(drawn), count))
        self.answers[name] = [drawn[at] for at in best]

    def _prompt_ids(self, prompts: list[Prompt], tokenizer: Any) -> tuple[list[list[int]], list[int]]:
        """Token ids of the prompts, truncated to leave room for an answer, and how many tokens each lost."""
        return prompt_ids(prompts, tokenizer, self.config.max_length - self.config.max_new_tokens)

    def _drawn(self, name: str, prompts: list[list[int]], sampled: bool, description: str) -> list[Answer]:
        """One answer per prompt. Every process answers its share of the prompts."""
        model, tokenizer = self._load(name), self.tokenizers[name]
        started = time.perf_counter()
        with self.state.split_between_processes(prompts) as mine:
            ids = answer(
                model, tokenizer, mine, self.config.max_new_tokens, sampled=sampled,
                seed=self.config.seed + self.state.process_index, batch_size=self.config.batch_size,
                description=f"Answers, {description}", temperature=self.config.temperature, top_p=self.config.top_p,
            )  # fmt: skip
        found: list[list[int]] = gather_object(ids)
        self.answer_seconds += time.perf_counter() - started
        self.answer_tokens += sum(map(len, found))
        texts, ended = texts_of(found, tokenizer)
        return [Answer(*each, name) for each in zip(found, texts, ended, strict=True)]

    # --- rewards -------------------------------------------------------------------------------------------------

    def score(self) -> None:
        """Score every answer with the reward model, add best-of-n, and compute the implicit rewards."""
        if self.config.reward_model is not None:
            reward_model = RewardModel(self.config.reward_model, self.model, self.config.trust_remote_code)
            if self.config.best_of_n:
                self.add_best_of_n(reward_model)
            for answers in self.answers.values():
                for one, score in zip(answers, self._scores(reward_model, self.prompts, answers), strict=True):
                    one.score = score
            del reward_model
        if self.config.reference is not None:
            self._implicit_rewards(self.config.reference)
        self._write_samples()

    def _scores(self, reward_model: RewardModel, prompts: list[Prompt], answers: list[Answer]) -> list[float]:
        tokenizer = reward_model.tokenizer
        texts, starts, headers = zip(*(write_prompt(prompt, tokenizer) for prompt in prompts), strict=True)
        rows = Dataset.from_dict({"prompt": texts, "turn_starts": starts, "header_end": headers})
        said = [one.text for one in answers], [one.ended for one in answers]
        rendered = tokenizer.chat_template is not None
        scores = reward_model.answer_rewards(
            rows, *said, self.config.max_length, ends_turns=rendered, batch_size=self.config.batch_size
        )
        return [float(score) for score in scores]

    def _implicit_rewards(self, reference: str) -> None:
        """β·(log π(y|x) − log π_ref(y|x)) of every answer y under every policy π with the reference's tokenizer (Eq. 5
        of DPO, arXiv 2305.18290, without the term that depends only on the prompt).
        """
        tokenizer = self.tokenizers[reference]
        prompts, _ = self._prompt_ids(self.prompts, tokenizer)
        same = {
            name: other.get_vocab() == tokenizer.get_vocab() and other.eos_token_id == tokenizer.eos_token_id
            for name, other in self.tokenizers.items()
        }
        policies = [name for name in self.models if same[name] and name != reference]
        ids = {
            name: [one.ids for one in found] if same[found[0].tokenizer] else self._retokenized(found, tokenizer)
            for name, found in self.answers.items()
        }
        names = list(ids)
        # two models' answers to a prompt are scored as a pair; an odd last model is paired with itself
        pairs = [(names[at], names[min(at + 1, len(names) - 1)]) for at in range(0, len(names), 2)]
        rows = [
            {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
            for first, second in pairs
            for prompt, chosen, rejected in zip(prompts, ids[first], ids[second], strict=True)
        ]
        scored = Dataset.from_list([row | {"length": sum(map(len, row.values()))} for row in rows])
        logps: dict[str, dict[str, np.ndarray]] = {}  # policy -> whose answers -> (N,)
        for policy in [reference, *policies]:
            how = (self.config.batch_size, f"Rewards, {policy}", self.config.prefix_sharing, self.config.bf16)
            found = score_pairs(self._load(policy), scored, tokenizer, *how)
            sides = [side.double().numpy().reshape(len(pairs), -1) for side in (found.chosen, found.rejected)]
            logps[policy] = {
                name: side[at] for at, pair in enumerate(pairs) for name, side in zip(pair, sides, strict=True)
            }
        self.rewards = {
            policy: {name: (self.beta * (logps[policy][name] - logps[reference][name])).tolist() for name in names}
            for policy in policies
        }

    def _retokenized(self, answers: list[Answer], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """The token ids of answers under another tokenizer."""
        found, _ = answer_ids(self.prompts, [one.text for one in answers], tokenizer)
        end = stop_tokens(tokenizer)[-1:]
        return [
            [*ids, *(end if one.ended or not ids else [])][: self.config.max_new_tokens]
            for one, ids in zip(answers, found, strict=True)
        ]

    # --- verdicts ------------------------------------------------------------------------------------------------

    def judge(self) -> None:
        """Judge every pair of models in both orders. Each verdict is written to verdicts.jsonl as it arrives."""
        if not self.state.is_main_process:
            return
        pairs, judges = list(itertools.combinations(self.answers, 2)), {}
        if self.config.reward_model is not None:
            scores = {name: np.array([one.score for one in found]) for name, found in self.answers.items()}
            for first, second in pairs:
                better = np.sign(scores[first] - scores[second])
                self.outcomes["reward model", first, second] = ((1 + better) / 2).tolist()
        if self.endpoint is not None:
            name = self.endpoint.model
            found = self._ask(name, self.endpoint, pairs)
            judges[name] = {
                "asked": len(found),
                "verdicts": dict(Counter(str(verdict.choice) for verdict in found.values())),
                "no_verdict_because": dict(Counter(verdict.reason for verdict in found.values() if verdict.reason)),
            }
            for first, second in pairs:
                both = zip(self._questions(first, second), self._questions(second, first), strict=True)
                self.outcomes[name, first, second] = [
                    0.5 if given.first == given.second else both_orders(found[given].choice, found[swapped].choice)
                    for given, swapped in both
                ]
        self._write_samples()
        rates = [
            {"judge": judge, "model": first, "against": second, **win_rate(found)}
            for (judge, first, second), found in self.outcomes.items()
        ]
        self.run.summarize(win_rates=rates, judges=judges)

    def _ask(self, name: str, judge: EndpointJudge, pairs: list[tuple[str, str]]) -> dict[Question, Verdict]:
        """The verdict on every question: a final one of an earlier run, or a new one."""
        path = self.run.path / "verdicts.jsonl"
        rows = [row for _, row in read_jsonl(path, torn_lines=[])] if path.exists() else []
        self.run.write_rows(path.name, rows)  # without a damaged last line
        kept = {row["key"]: Verdict(row["verdict"], row["reason"]) for row in rows if row["judge"] == name}
        asked: dict[Question, dict[str, Any]] = {}
        for pair in pairs:
            for first, second in (pair, pair[::-1]):
                for place, question in enumerate(self._questions(first, second)):
                    if question.first != question.second:  # equal answers are a tie without a judge
                        row = {"judge": name, "prompt": place, "first": first, "second": second}
                        asked.setdefault(question, row | {"key": question.digest()})
        found = {question: kept[row["key"]] for question, row in asked.items() if row["key"] in kept}
        found = {question: verdict for question, verdict in found.items() if verdict.final}
        missing = [question for question in asked if question not in found]
        with open(path, "a", encoding="utf-8") as file:
            answers = judge.verdicts(missing)
            for place, verdict in tqdm(answers, total=len(missing), desc=f"Judging, {name}", leave=False):
                found[missing[place]] = verdict
                row = asked[missing[place]] | {"verdict": verdict.choice, "reason": verdict.reason}
                file.write(to_json(row) + "\n")
                file.flush()
        return found

    def _questions(self, first: str, second: str) -> list[Question]:
        """For every prompt, the question of which of two models' answers is better."""
        texts = [prompt if isinstance(prompt, str) else dialogue(prompt) for prompt in self.prompts]
        return [
            Question(text.strip().removesuffix("Assistant:").strip(), one.text.strip(), other.text.strip())
            for text, one, other in zip(texts, self.answers[first], self.answers[second], strict=True)
        ]

    # --- files ---------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Write summary.json and the page, and print the tables."""
        if self.state.is_main_process:  # the other processes do not wait for the judge
            seconds, speed = self.answer_seconds, {}
            if seconds:
                speed = {"answer_seconds": seconds, "answer_tokens_per_second": self.answer_tokens / seconds}
            self.run.summarize(
                comparison={
                    "models": dict(self.models),
                    "reference": self.config.reference,
                    "beta": self.beta,
                    "reward_model": self.config.reward_model,
                    "answers": {name: self._answer_figures(found) for name, found in self.answers.items()},
                    "rewards": {
                        policy: {name: with_intervals({"mean": np.array(values)}) for name, values in found.items()}
                        for policy, found in self.rewards.items()
                    },
                },
                throughput=speed | {"total_seconds": time.perf_counter() - self.started},
            )
            self.run.end()
            page = write_comparison_page(self.run.path)
            self.say(f"{describe(self.run.path)}\n\nopen {page}")

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
        drawn = "sampled" if self.config.do_sample else "greedy"
        kinds = {name: drawn if name in self.models else "best_of_n" for name in self.answers}
        rows = []
        for place, prompt in enumerate(self.prompts):
            found = {name: answers[place] for name, answers in self.answers.items()}
            of_policies = {
                name: {policy: values[name][place] for policy, values in self.rewards.items()} for name in found
            }
            outcomes = [
                {"judge": judge, "model": first, "against": second, "outcome": outcomes[place]}
                for (judge, first, second), outcomes in self.outcomes.items()
            ]
            row = {
                "prompt": prompt,
                "answers": {name: {kinds[name]: one.text} for name, one in found.items()},
                "answer_ids": {name: one.ids for name, one in found.items()},
                "rewards": of_policies,
                "reward_model": {name: one.score for name, one in found.items() if one.score is not None},
                "outcomes": outcomes,
            }
            rows.append(row)
        self.run.write_rows("samples.jsonl", rows)

    def _load(self, name: str) -> Any:
        path, flag = self.places[name]
        model: Any = load_model(path, self.model, self.config.trust_remote_code, flag)
        check_fits(model, self.tokenizers[name], self.config.max_length)
        if not getattr(model, "is_quantized", False):
            model.to(self.state.device)
        return model

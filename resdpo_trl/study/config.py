"""The options of `compare_hh.py`."""

from __future__ import annotations

from dataclasses import dataclass

from resdpo_trl.errors import UserError
from resdpo_trl.text.config import named_models
from resdpo_trl.text.tokens import SHORTEST
from resdpo_trl.training.arguments import has_bfloat16, option


@dataclass
class CompareConfig:
    """Which models answer which prompts, and who judges."""

    _argument_group_name = "comparison"

    models: list[str] = option([], "NAME=PATH of every model. PATH is a folder (also of a LoRA adapter) or a Hub id.")
    prompts: str | None = option(
        None,
        "A .jsonl or .jsonl.gz file (rows with prompt, or HH's pairs) or a .txt file with one question "
        "per line; by default held-out prompts of the quickstart.",
    )
    max_prompts: int | None = option(
        None, "Maximum number of prompts; by default all of a file, or 32 of the quickstart."
    )
    output_dir: str = option("runs/compare_hh", "The comparison's folder.")
    reference: str | None = option(None, "A NAME of --models, a folder or a Hub id: adds β·log(π/π_ref) of answers.")
    beta: float | None = option(None, "β of these rewards, above 0; by default as in the models' training, or 0.1.")
    max_new_tokens: int = option(64, "Maximum tokens of an answer.")
    max_length: int = option(256, "Maximum tokens of a prompt with its answer; longer prompts lose their oldest turns.")
    do_sample: bool = option(False, "Sample the answers instead of greedy decoding.")
    temperature: float = option(1.0, "Temperature of --do_sample and --best_of_n.")
    top_p: float = option(1.0, "Nucleus of --do_sample and --best_of_n.")
    batch_size: int = option(32, "Prompts per batch of answers, and pairs per batch of scores.")
    prefix_sharing: bool = option(True, "Score two answers of a prompt as one row.")
    bf16: bool | None = option(None, "Score in bfloat16, as the training did; by default if the hardware has it.")
    reward_model: str | None = option(None, "A reward model (resdpo-trl reward) that scores every answer and judges.")
    best_of_n: int | None = option(
        None, "Add a model: the best of this many samples of the first of --models, by --reward_model."
    )
    judge_url: str | None = option(None, "An OpenAI-compatible endpoint that judges, with its key in JUDGE_API_KEY.")
    judge_model: str | None = option(None, "The model's name at --judge_url.")
    judge_options: str = option('{"temperature": 0}', "Further fields of the request to --judge_url, as JSON.")
    judge_workers: int = option(8, "Concurrent requests to --judge_url.")
    seed: int = option(42, "Seed of the sampled answers.")
    trust_remote_code: bool = option(False, "Run code from a model's repository.")
    resume_from_checkpoint: str | None = option(
        None, "Continue in --output_dir and keep the verdicts there.", nargs="?", const="last"
    )

    def __post_init__(self) -> None:
        named_models(self.models)  # raises
        if self.best_of_n is not None and self.reward_model is None:
            raise UserError("--best_of_n needs a reward model to choose by: pass --reward_model (resdpo-trl reward)")
        if (self.judge_url is None) != (self.judge_model is None):
            raise UserError("--judge_url and --judge_model belong together: pass both")
        if self.beta is not None and not self.beta > 0:
            raise UserError(f"--beta {self.beta}: must be above 0 (0.1 to 0.5 are usual)")
        for flag in ("max_new_tokens", "batch_size", "judge_workers", "max_prompts", "best_of_n"):
            value = getattr(self, flag)
            if value is not None and value < 1:
                raise UserError(f"--{flag} {value}: must be at least 1")
        if self.max_length < self.max_new_tokens + SHORTEST // 2:
            raise UserError(
                f"--max_length {self.max_length}: must leave {SHORTEST // 2} tokens for the prompt in addition to "
                f"--max_new_tokens {self.max_new_tokens}"
            )
        if not self.temperature > 0 or not 0 < self.top_p <= 1:
            raise UserError("--temperature must be above 0 and --top_p in (0, 1]")
        if self.bf16 is None:
            self.bf16 = has_bfloat16()

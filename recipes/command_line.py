"""What the recipes share at the command line: fields as flags over a preset, clear refusals, exit statuses.

0 done   2 something the user can fix   1 anything else   130 Ctrl-C   143 SIGTERM
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
GO_ON = "what was written stays: a run goes on with the same command and --resume_from_checkpoint"
PRESETS = Path(__file__).resolve().parent / "configs"
# fields of a preset that are about its own data set
OF_ITS_DATA = ("dataset_data_dir", "dataset_revision", "max_train_samples", "max_eval_samples", "max_test_samples")
RATES = ("learning_rate", "sft_learning_rate")
LORA_RATE = 10  # times the rate of all weights; on chit-chat it reaches the same loss (docs/results/text.md)
LARGEST_PRESET = 64 * 2**10  # bytes
DEEPEST_PRESET = 20  # PyYAML's time grows with the square of the depth, or worse
# what PyYAML's constructors raise for "!!timestamp x", "!!bool x", "!!int ''" and 2001-99-99
TAG_ERRORS = (AttributeError, KeyError, IndexError, ValueError)

# what other tools call a field, or versions of transformers and TRL before these: the field here, and what differs
ELSEWHERE = {
    "adam8bit": ("optim", "adamw_bnb_8bit"),
    "batch_size": ("per_device_train_batch_size", ""),
    "cutoff_len": ("max_length", ""),
    "data_path": ("dataset_name", ""),
    "dataset": ("dataset_name", ""),
    "dataset_path": ("dataset_name", ""),
    "epochs": ("num_train_epochs", ""),
    "eval_dataset": ("eval_dataset_name", ""),
    "eval_file": ("eval_dataset_name", ""),
    "evaluation_strategy": ("eval_strategy", ""),
    "finetuning_type": ("use_peft", ""),
    "grad_accum": ("gradient_accumulation_steps", ""),
    "lora_rank": ("lora_r", ""),
    "lr": ("learning_rate", ""),
    "max_completion_length": ("max_response_length", ""),
    "max_prompt_length": ("max_length", "which counts the prompt with one response"),
    "max_seq_length": ("max_length", ""),
    "model": ("model_name_or_path", ""),
    "model_name": ("model_name_or_path", ""),
    "no_cuda": ("use_cpu", ""),
    "pref_beta": ("beta", ""),
    "pref_loss": ("loss_type", ""),
    "reference_model": ("reference", ""),
    "sft_checkpoint": ("reference", ""),
    "test_file": ("eval_dataset_name", ""),
    "torch_dtype": ("dtype", ""),
    "train_file": ("dataset_name", ""),
    "val_size": ("validation_fraction", ""),
    "validation_split": ("validation_fraction", ""),
    "warmup_ratio": ("warmup_steps", "of which a number below 1 is a share of the steps"),
}

# what --help shows of the options that a recipe has, the most important first; --help_all shows every one
SHOWN = (
    "run", "runs", "models", "model", "reference", "dataset_name", "eval_dataset_name", "columns", "prompts", "prompt",
    "model_name_or_path", "arch", "pretrained_weights", "output_dir", "output", "betas", "learning_rates", "seeds",
    "beta", "learning_rate", "num_train_epochs", "per_device_train_batch_size", "max_length", "image_size",
    "sft_epochs", "sft_learning_rate", "reference_epochs", "reference_learning_rate",
    "reward_model", "loss_type", "reference_update", "rejected_sampling", "compare_modes",
    "compare_cross_entropy", "prefer", "use_peft", "merge_adapter", "dialogue_format", "max_train_samples",
    "max_eval_samples", "max_test_samples", "select", "gradient_checkpointing", "num_samples", "max_new_tokens",
    "do_sample", "temperature", "judge_url", "best_of_n", "test_time_views", "jobs", "seed", "report_to",
    "resume_from_checkpoint", "overwrite_output_dir", "push_to_hub", "hub_model_id",
    "verbose", "help_all",
)  # fmt: skip

# loggers of libraries whose warnings are advice that a run needs not follow
ADVICE = (
    "bitsandbytes.backends.cpu.ops",  # a kernel for 4-bit inference is not installed; it is not used here
    "torch.distributed.elastic.multiprocessing.redirects",  # macOS and Windows do not redirect output
    "transformers.generation.configuration_utils",  # fields of a generation_config.json that answers do not follow
    "transformers.tokenization_utils_base",  # a text is longer than the model's positions, before the cap shortens it
    "transformers.trainer_utils",  # the model's special tokens became the tokenizer's
)
VERBOSE = "--verbose" in sys.argv  # not in a preset: most of what it shows is said before a preset is read

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # no worker is forked from a process that tokenizes
if not VERBOSE:
    # tqdm's own settings for every library, read at its import: a bar waits two seconds and leaves no line behind
    os.environ.setdefault("TQDM_DELAY", "2")
    os.environ.setdefault("TQDM_LEAVE", "")  # false: tqdm takes any other text for true
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # a bar would fill a log file
    for name in ADVICE:
        logging.getLogger(name).setLevel(logging.ERROR)
    # what will change in a later version of a library is not the user's concern; this package's warnings are
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(?!resdpo_trl\b)")

from transformers.utils.logging import disable_progress_bar  # noqa: E402  (the environment first)
from trl import TrlParser  # noqa: E402

from resdpo_trl.cli import INSTALLED, as_commands  # noqa: E402
from resdpo_trl.errors import NothingToDo, UserError, printable  # noqa: E402
from resdpo_trl.run.files import disk_trouble  # noqa: E402
from resdpo_trl.run.folder import untrained  # noqa: E402
from resdpo_trl.sources import first_line  # noqa: E402
from resdpo_trl.training.signals import Interrupted, stop_at_once  # noqa: E402

if not VERBOSE:
    disable_progress_bar()  # of "Loading weights" and "Writing model shards"


class RecipeHelp(argparse.RawDescriptionHelpFormatter):
    """Every option once, with the value that it has where it is not given, under the recipe's docstring as it is."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        metavar = "" if action.nargs == 0 else self._format_args(action, "X")
        return f"{action.option_strings[0]} {metavar}".rstrip()

    def format_help(self) -> str:
        text = super().format_help()
        return as_commands(text) if INSTALLED else text

    def _get_help_string(self, action: argparse.Action) -> str:
        value = action.default
        if value in (None, [], argparse.SUPPRESS) or action.dest in ("help", "help_all"):
            return action.help or ""
        shown = " ".join(map(str, value)) if isinstance(value, list) else getattr(value, "value", value)
        return f"{action.help or ''} [{str(shown).replace('%', '%%')}]"


class RecipeParser(TrlParser):
    """TRL's parser with one-line refusals, the nearest name for an unknown field, and a default preset."""

    def __init__(self, dataclass_types: Sequence[Any], description: str | None = None):
        # a shortened flag is a guess: it would mean another field when one is added
        super().__init__(
            dataclass_types,
            # two hundred fields are listed in groups, not a second time before the recipe's own words
            usage="%(prog)s [--config FILE.yaml] [--field value ...]" if dataclass_types else None,
            description=description,
            allow_abbrev=False,
            formatter_class=RecipeHelp,
        )
        self.add_argument(
            "--verbose", action="store_true", help="show the libraries' progress bars, advice and warnings too"
        )
        if dataclass_types:
            self.add_argument("--help_all", action="store_true", help="show every option")

    def _show_help(self, words: list[str], preset: Path | None, everything: bool) -> None:
        """Print the options with the values that a run of these words would use; `preset` gave some of them."""
        values: dict[str, Any] = {}
        with contextlib.suppress(UserError):  # what the recipe cannot do without is not given
            values |= vars(self.parse_known_args(words)[0])
        for kind in self.dataclass_types:  # some values follow from others, or from the hardware
            of_it = {each.name: values[each.name] for each in fields(kind) if each.init and each.name in values}
            with contextlib.suppress(UserError):
                values |= vars(kind(**of_it))
        for action in self._actions:
            action.default = values.get(action.dest, action.default)
        rank = {name: place for place, name in enumerate(SHOWN)}
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        if everything:
            groups = [(group.title, group.description, group._group_actions) for group in self._action_groups]
        else:
            of_a_sweep = ("beta", "learning_rate", "seed") if "betas" in values else ()  # each point's own
            shown = [action for action in self._actions if action.dest in rank and action.dest not in of_a_sweep]
            origin = f", some from {preset.parent.name}/{preset.name}" if preset else ""
            groups = [(f"options [default{origin}]", None, shown)]
        for title, text, actions in groups:
            # HfArgumentParser adds --no_x for a switch x that is on
            once = [action for action in actions if not (action.option_strings or [""])[0].startswith("--no_")]
            formatter.start_section(title)
            formatter.add_text(text)
            formatter.add_arguments(sorted(once, key=lambda action: rank.get(action.dest, len(rank))))
            formatter.end_section()
        print(formatter.format_help(), end="")

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse(
        self,
        default_preset: str | None = None,
        given: Sequence[str] | None = None,
        not_from_presets: Sequence[str] = (),
        renamed_in_presets: Mapping[str, str] | None = None,
    ) -> tuple[list[Any], Path | None]:
        """The dataclasses, and the preset that stood under them.

        Args:
            default_preset: preset (below recipes/configs) to use where neither --config nor --model_name_or_path is.
            given: the command line; `sys.argv` by default.
            not_from_presets: fields of recipes/configs that are another recipe's; in any other file they count.
            renamed_in_presets: fields of recipes/configs that are this recipe's by another name, as a stage's; what
                has that name there is the other stage's.
        """
        flags = list(sys.argv[1:] if given is None else given)
        helps = [word for word in flags if word in ("-h", "--help", "--help_all")]
        flags, preset = _take_config([word for word in flags if word not in helps])
        named = {flag.partition("=")[0].replace("-", "_") for flag in flags}
        if preset is None and default_preset is not None and "__model_name_or_path" not in named:
            preset = PRESETS / default_preset
        ours = preset is not None and PRESETS in preset.resolve().parents
        without, renamed = (list(not_from_presets), renamed_in_presets or {}) if ours else ([], {})
        if ours and "__dataset_name" in named:
            without += OF_ITS_DATA
        defaults = self._flags_of(preset, without, renamed) if preset is not None else []
        if helps:
            with contextlib.suppress(UserError):  # help is for those whose flags are not right yet
                defaults += self._lora_rates(defaults, flags)
            self._show_help(defaults + flags, preset, everything="--help_all" in helps)
            raise SystemExit(0)
        self._check(defaults, f"{preset}: ")
        self._check(flags, "")
        defaults += self._lora_rates(defaults, flags)
        try:
            parsed = self.parse_args_into_dataclasses(defaults + flags, look_for_args_file=False)
        except (ValueError, TypeError, ImportError, OSError) as error:
            # a dataclass refused a value, a combination or a file: transformers and TRL say why in their first line
            raise UserError(first_line(error)) from None
        self.given = {flag.partition("=")[0].lstrip("-").replace("-", "_") for flag in flags if flag.startswith("--")}
        count = len(self.dataclass_types)
        self.added: argparse.Namespace = parsed[count]  # --verbose and what a recipe added
        return list(parsed[:count]), preset

    def _lora_rates(self, defaults: list[str], flags: list[str]) -> list[str]:
        """Learning rates as words, where no flag gives one and the preset's, or the default, is of the other training:
        of all weights for LoRA, or of LoRA for all weights.
        """
        preset, asked = (self.parse_known_args(words)[0] for words in (defaults, defaults + flags))
        known, given = (
            {word.partition("=")[0].lstrip("-").replace("-", "_") for word in words} for words in (defaults, flags)
        )
        words: list[str] = []
        for name in RATES:
            if not hasattr(asked, "use_peft") or not hasattr(asked, name) or name in given:
                continue
            of_lora = preset.use_peft and name in known
            if asked.use_peft != of_lora:
                factor = LORA_RATE if asked.use_peft else 1 / LORA_RATE
                words += [f"--{name}", f"{factor * getattr(preset, name):g}"]
        return words

    def _check(self, flags: list[str], place: str) -> None:
        try:
            _, unknown = self.parse_known_args(list(flags))
        except UserError as error:
            raise UserError(f"{place}{error}") from None
        for word in unknown:
            if not word.startswith("--"):
                raise UserError(f"{place}unexpected argument {word!r}")
            name = word.partition("=")[0].lstrip("-").replace("-", "_")
            known = [
                option.lstrip("-") for option in self._option_string_actions if "_" in option or "-" not in option[2:]
            ]
            near = difflib.get_close_matches(name, known, 1)
            here, what = ELSEWHERE.get(name, ("", ""))
            if here in known and not difflib.get_close_matches(name, known, 1, 0.9):
                hint = f"; here it is --{here} {what}".rstrip()
            else:
                hint = f"; did you mean {near[0]}?" if near else "; --help_all lists them"
            raise UserError(f"{place}unknown field {name}{hint}" if place else f"unknown flag --{name}{hint}")

    def _flags_of(self, preset: Path, without: Sequence[str], renamed: Mapping[str, str]) -> list[str]:
        """A preset's fields as command-line words, so that they are checked like any flag."""
        import yaml

        try:
            if preset.stat().st_size > LARGEST_PRESET:
                raise UserError(f"--config {preset}: larger than {LARGEST_PRESET // 2**10} KiB; name a preset")
            text, depth = preset.read_text(encoding="utf-8"), 0
            for event in yaml.parse(text, yaml.SafeLoader):
                depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
                if isinstance(event, yaml.AliasEvent) or depth > DEEPEST_PRESET:
                    raise UserError(
                        f"--config {preset}: aliases (*name) and deep nesting are not read; write it out plainly"
                    )
            content = yaml.safe_load(text)
        except OSError as error:
            known = ", ".join(sorted(str(path.relative_to(PRESETS)) for path in PRESETS.rglob("*.yaml")))
            raise UserError(f"--config {preset}: {error.strerror}; presets: {known}") from None
        except (yaml.YAMLError, *TAG_ERRORS) as error:
            mark = getattr(error, "problem_mark", None)
            line = f", line {mark.line + 1}" if mark else ""
            raise UserError(f"--config {preset}{line}: not YAML ({getattr(error, 'problem', None) or error})") from None
        if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
            raise UserError(f"--config {preset}: must be a mapping of fields to values")
        replaced = {renamed[name] for name in content if name in renamed}
        words: list[str] = []
        for name, value in content.items():
            if name in without or name in replaced:
                continue
            if name in ("help", "help_all", "verbose"):  # flags, but no fields
                raise UserError(f"--config {preset}: unknown field {name}")
            if value is None:
                raise UserError(f"--config {preset}: field {name} has no value; leave the field out")
            if isinstance(value, dict):
                import json

                value = json.dumps(value, default=str)
            values = value if isinstance(value, list) else [value]
            words += [
                f"--{renamed.get(name, name)}",
                *(str(item).lower() if isinstance(item, bool) else str(item) for item in values),
            ]
        return words


def _take_config(flags: list[str]) -> tuple[list[str], Path | None]:
    """The flags without --config, and its file."""
    preset = None
    rest: list[str] = []
    words = iter(flags)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--config":
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        if not value or value.startswith("--"):
            raise UserError("--config needs a YAML file")
        preset = Path(value)
        if not preset.exists() and (PRESETS / value).exists():
            preset = PRESETS / value  # hh/gpt2.yaml means recipes/configs/hh/gpt2.yaml
    return rest, preset


def on_one_process() -> None:
    """For recipes that are one process's work: of several that a launcher started, the first goes on alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if os.environ.get("RANK", "0") != "0":
        sys.exit(0)
    print("warning: this recipe runs in one process; the others have ended", file=sys.stderr)
    for name in list(os.environ):  # what would make it wait for the others
        if name in LAUNCHED or name.startswith(("ACCELERATE_USE_", "FSDP_", "TORCHELASTIC_")):
            del os.environ[name]


def run(main: Callable[[], None]) -> NoReturn:
    """Run a recipe's `main` and exit with the documented status."""
    os.umask(os.umask(0o077) | 0o002)  # other users of the machine never write into a run
    sys.stdout.reconfigure(line_buffering=True)  # a log file has each line when it is said
    signal.signal(signal.SIGTERM, stop_at_once)
    _end_with_the_launcher()
    if hasattr(os, "register_at_fork"):  # workers are ended by SIGTERM
        os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    try:
        main()
    except NothingToDo as reason:
        _say(str(reason))
    except UserError as error:
        discard_untrained()
        _say(f"error: {error}")
        sys.exit(2)
    except Interrupted as stopped:
        _say(str(stopped) or GO_ON)
        sys.exit(stopped.status)
    except KeyboardInterrupt:
        _say(GO_ON)
        sys.exit(130)
    except Exception as error:
        discard_untrained()
        reason = disk_trouble(error)
        if reason is None:
            from resdpo_trl.run.folder import redacted

            # its message may hold a row of the data, or quote a request with its token
            print("\n".join(map(printable, redacted(traceback.format_exc()).splitlines())), file=sys.stderr)
            sys.exit(1)
        _say(f"error: {getattr(error, 'filename', None) or 'a file'} can't be written or read ({reason}); {GO_ON}")
        sys.exit(2)
    sys.exit(0)


def discard_untrained() -> None:
    """Delete the run that ends before its first step, so that the next try finds an empty folder."""
    for folder in list(untrained):
        untrained.discard(folder)
        folder.discard()


def _end_with_the_launcher() -> None:
    """Get SIGTERM when `accelerate launch` dies: it passes none on, and would leave this process running (Linux)."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ and sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _say(message: str) -> None:
    """One line on stderr; every process stops, one says why."""
    if os.environ.get("RANK", "0") == "0":
        print(printable(" ".join(message.split())), file=sys.stderr)

"""The command line of the recipes: fields as flags on top of a preset, one-line errors, exit codes.

0 success   2 an error that the user can fix   1 any other error   130 Ctrl-C   143 SIGTERM
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import difflib
import json
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
GO_ON = "the files are kept: continue a run with the same command and --resume_from_checkpoint"
PRESETS = Path(__file__).resolve().parent / "configs"
SECTIONS = ("data", "sft", "reference", "dpo", "reward")  # of a preset
LORA_RATE = 10  # factor on the rate of full training; on chit-chat it reaches the same loss (docs/results/text.md)

# names of fields in other tools and in earlier versions of transformers and TRL -> name here, and what differs
ELSEWHERE = {
    "adam8bit": "optim adamw_bnb_8bit", "batch_size": "per_device_train_batch_size", "cutoff_len": "max_length",
    "data_path": "dataset_name", "dataset": "dataset_name", "dataset_path": "dataset_name",
    "do_copy": "reference_update copy", "do_polyak": "reference_update polyak",
    "epochs": "num_train_epochs", "eval_dataset": "eval_dataset_name", "eval_file": "eval_dataset_name",
    "evaluation_strategy": "eval_strategy", "finetuning_type": "use_peft",
    "grad_accum": "gradient_accumulation_steps", "lora_rank": "lora_r", "lr": "learning_rate",
    "max_completion_length": "max_response_length",
    "max_prompt_length": "max_length which counts the prompt with one response", "max_seq_length": "max_length",
    "model": "model_name_or_path", "model_name": "model_name_or_path", "no_cuda": "use_cpu", "pref_beta": "beta",
    "pref_loss": "loss_type", "reference_label_smoothing": "reference.label_smoothing_factor",
    "reference_model": "reference", "sft_checkpoint": "reference", "test_file": "eval_dataset_name",
    "torch_dtype": "dtype", "train_file": "dataset_name", "val_size": "validation_fraction",
    "validation_split": "validation_fraction",
    "warmup_ratio": "warmup_steps of which a number below 1 is a share of the steps",
}  # fmt: skip

# the options that --help shows, the most important first; --help_all shows every option
SHOWN = (
    "run", "runs", "models", "model", "reference", "dataset_name", "eval_dataset_name", "columns", "prompts", "prompt",
    "model_name_or_path", "arch", "pretrained_weights", "output_dir", "output", "betas", "learning_rates", "seeds",
    "beta", "learning_rate", "num_train_epochs", "per_device_train_batch_size", "max_length", "image_size",
    "sft.num_train_epochs", "sft.learning_rate", "reference.num_train_epochs", "reference.learning_rate",
    "reward_model", "loss_type", "reference_update", "rejected_sampling", "compare_modes",
    "compare_cross_entropy", "prefer", "use_peft", "merge_adapter", "dialogue_format", "max_train_samples",
    "max_eval_samples", "max_test_samples", "select", "gradient_checkpointing", "num_samples", "max_new_tokens",
    "do_sample", "temperature", "judge_url", "best_of_n", "test_time_views", "jobs", "seed", "report_to",
    "resume_from_checkpoint", "overwrite_output_dir", "push_to_hub", "hub_model_id",
    "verbose", "help_all",
)  # fmt: skip

# loggers of libraries whose warnings are advice that a run can ignore
ADVICE = (
    "bitsandbytes.backends.cpu.ops",  # a kernel for 4-bit inference is not installed; it is not used here
    "torch.distributed.elastic.multiprocessing.redirects",  # macOS and Windows do not redirect output
    "transformers.generation.configuration_utils",  # fields of a generation_config.json that answers do not follow
    "transformers.tokenization_utils_base",  # a text is longer than the model's positions, before it is truncated
    "transformers.trainer_utils",  # the model's special tokens became the tokenizer's
)
VERBOSE = "--verbose" in sys.argv  # not in a preset: most messages come before a preset is read

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # no worker is forked from a process that tokenizes
if not VERBOSE:
    # tqdm's settings for every library, read at import: a bar appears after two seconds and is removed at its end
    os.environ.setdefault("TQDM_DELAY", "2")
    os.environ.setdefault("TQDM_LEAVE", "")  # false: tqdm takes any other text as true
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # a bar would fill a log file
    for name in ADVICE:
        logging.getLogger(name).setLevel(logging.ERROR)
    # hide warnings about later versions of libraries, but not those of this package
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
    """Shows every option once, with its default, under the unchanged docstring of the recipe."""

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


class OptionParser(TrlParser):
    """TRL's parser with one-line errors and the nearest name for an unknown field."""

    prefix = ""  # of the flags as the user writes them

    def error(self, message: str) -> NoReturn:
        raise UserError(message.replace("--", f"--{self.prefix}", 1))

    def build(self, words: list[str]) -> list[Any]:
        """Parse these words into the dataclasses."""
        try:
            return list(self.parse_args_into_dataclasses(words, look_for_args_file=False))
        except UserError as error:
            self.error(str(error))
        except (ValueError, TypeError, ImportError, OSError) as error:
            # a dataclass rejected a value, a combination or a file: the first line of the error says why
            self.error(first_line(error))

    def names(self) -> list[str]:
        """The names of the fields, without the variants with hyphens."""
        options = self._option_string_actions
        return [option.lstrip("-") for option in options if "_" in option or "-" not in option[2:]]

    def check(self, words: list[str], known: Mapping[str, str], in_a_file: bool) -> None:
        """Raise a UserError for words that are not options. `known` has the names for hints."""
        for word in self.parse_known_args(words)[1]:
            if not word.startswith("--"):
                raise UserError(f"unexpected argument {word!r}")
            name = f"{self.prefix}{name_of(word)}"
            stage, _, rest = name.partition("_")
            here, _, what = ELSEWHERE.get(name, f"{stage}.{ELSEWHERE.get(rest, rest)}").partition(" ")
            near = difflib.get_close_matches(name, known.values(), 1)
            hint = f"did you mean {near[0]}?" if near else "--help_all lists them"
            if here in known and not difflib.get_close_matches(name, known.values(), 1, 0.9):
                hint = f"here it is --{known[here]} {what}".rstrip()
            raise UserError(f"unknown {'field ' if in_a_file else 'flag --'}{name}; {hint}")


class RecipeParser(OptionParser):
    """A recipe's parser, with presets under the flags, and with a stage that runs before the recipe's own training.

    The fields at the top of a preset apply to every stage, those in a section to one stage. The section `data` belongs
    to the preset's own data set and is ignored if --dataset_name is given.
    """

    def __init__(
        self,
        dataclass_types: Sequence[Any],
        description: str | None = None,
        section: str = "",
        before: tuple[str, Any] | None = None,
    ):
        """
        Args:
            dataclass_types: the configurations whose fields are flags.
            description: the recipe's docstring.
            section: the section of presets for this recipe's own training.
            before: section and configuration class of the stage before it. Its flags are --SECTION.field. It also
                takes the values of shared fields from the other flags, except those in `of_one_stage`.
        """
        # no abbreviations: a new field could change their meaning
        super().__init__(
            dataclass_types,
            # two hundred fields are listed in groups, so the usage does not list them again
            usage="%(prog)s [--config FILE.yaml] [--field value ...]" if dataclass_types else None,
            description=description,
            allow_abbrev=False,
            formatter_class=RecipeHelp,
        )
        self.add_argument(
            "--verbose", action="store_true", help="also show the libraries' progress bars, advice and warnings"
        )
        if dataclass_types:
            self.add_argument("--help_all", action="store_true", help="show every option")
        self.section, (self.before, kind) = section, before or ("", None)
        self.stage = OptionParser((kind,) if kind else (), allow_abbrev=False, add_help=False)
        self.stage.prefix = f"{self.before}."
        self.of_the_run: frozenset[str] = kind.of_the_run if kind else frozenset()
        self.shared = {each.name for each in fields(kind)} - kind.of_one_stage if kind else set()

    def parse(
        self, default_preset: str | None = None, given: Sequence[str] | None = None
    ) -> tuple[list[Any], Path | None]:
        """The dataclasses, with that of the stage before as the last one, and the preset.

        Args:
            default_preset: preset in recipes/configs to use if neither --config nor --model_name_or_path is given.
            given: the command line; `sys.argv` by default.
        """
        flags = list(sys.argv[1:] if given is None else given)
        helps = [word for word in flags if word in ("-h", "--help", "--help_all")]
        of_config = OptionParser((), allow_abbrev=False, add_help=False)
        of_config.add_argument("--config", type=Path)
        found, flags = of_config.parse_known_args([word for word in flags if word not in helps])
        self.given = {name for name, _ in options_of(flags)}
        preset: Path | None = found.config
        if preset is None and default_preset is not None and "model_name_or_path" not in self.given:
            preset = PRESETS / default_preset
        elif preset is not None and not preset.exists() and (PRESETS / preset).exists():
            preset = PRESETS / preset  # hh/gpt2.yaml means recipes/configs/hh/gpt2.yaml
        defaults = self._words_of(preset) if preset is not None else []
        if helps:
            with contextlib.suppress(UserError):  # help works with invalid flags too
                defaults += self._lora_rates(defaults, flags)
            self._show_help(defaults + flags, preset, everything="--help_all" in helps)
            raise SystemExit(0)
        names = [*self.names(), *(f"{self.before}.{name}" for name in self.stage.names())]
        known = {f"{self.section}.{name}": name for name in names} | {name: name for name in names}
        for words, place in ((defaults, f"{preset}: "), (flags, "")):
            try:
                own, of_stage = self._parted(words)
                self.check(own, known, in_a_file=bool(place))
                self.stage.check(of_stage, known, in_a_file=bool(place))
            except UserError as error:
                raise UserError(f"{place}{error}") from None
        own, of_stage = self._parted(defaults + self._lora_rates(defaults, flags) + flags)
        parsed, count = self.build(own), len(self.dataclass_types)
        self.added: argparse.Namespace = parsed[count]  # --verbose and what a recipe added
        return [*parsed[:count], *self.stage.build(of_stage)], preset

    def _parted(self, words: Sequence[str]) -> tuple[list[str], list[str]]:
        """The words of the recipe's options, and those of the stage before it: shared options, then its own."""
        rest, shared, own = list[str](), dict[str, list[str]](), list[str]()
        for name, option in options_of(words):
            stage, dot, field = name.partition(".")
            if not dot or stage != self.before:
                rest += option
                if name.removeprefix("no_") in self.shared:
                    shared[name.removeprefix("no_")] = option
            elif field in self.of_the_run:
                raise UserError(f"--{name} applies to the whole run: pass --{field}")
            else:
                own += [option[0].replace(f"{stage}.", "", 1), *option[1:]]
        if any(name_of(word) == "optim" for word in own):
            shared.pop("optim_args", None)  # they belong to the other optimizer
        return rest, [word for option in shared.values() for word in option] + own

    def _values(self, words: list[str]) -> dict[str, Any]:
        """Every option's value by the name of its flag, from these words or by default."""
        own, of_stage = self._parted(words)
        found = vars(self.stage.parse_known_args(of_stage)[0])
        return vars(self.parse_known_args(own)[0]) | {f"{self.before}.{name}": value for name, value in found.items()}

    def _lora_rates(self, defaults: list[str], flags: list[str]) -> list[str]:
        """Learning rates as words, if no flag gives one, and that of the preset or the default is for the other kind of
        training: full training instead of LoRA, or LoRA instead of full training.
        """
        preset, asked = self._values(defaults), self._values(defaults + flags)
        known = {name for name, _ in options_of(defaults)}
        words: list[str] = []
        for name in asked:
            if "use_peft" not in asked or name.rpartition(".")[2] != "learning_rate" or name in self.given:
                continue
            of_lora = preset["use_peft"] and name in known
            if asked["use_peft"] != of_lora:
                factor = LORA_RATE if asked["use_peft"] else 1 / LORA_RATE
                words += [f"--{name}", f"{factor * preset[name]:g}"]
        return words

    def _show_help(self, words: list[str], preset: Path | None, everything: bool) -> None:
        """Print the options with the values that a run with these words would use. Some are from `preset`."""
        values: dict[str, Any] = {}
        with contextlib.suppress(UserError):  # a required option is not given
            values |= self._values(words)
        for kind in self.dataclass_types:  # some values depend on others, or on the hardware
            of_it = {each.name: values[each.name] for each in fields(kind) if each.init and each.name in values}
            with contextlib.suppress(UserError):
                values |= vars(kind(**of_it))
        rank = {name: place for place, name in enumerate(SHOWN)}
        groups = [(group.title, group.description, group._group_actions) for group in self._action_groups]
        if self.before:
            of_stage = [copy.copy(action) for action in self.stage._actions if action.dest not in self.shared]
            for action in of_stage:
                action.dest = f"{self.before}.{action.dest}"
                action.option_strings = [f"--{self.before}.{option.lstrip('-')}" for option in action.option_strings]
            text = f"Other training options apply to both stages. --{self.before}.field sets one for this stage only."
            of_stage = [action for action in of_stage if action.dest.partition(".")[2] not in self.of_the_run]
            groups.insert(-1, (f"the stage before: {self.before}", text, of_stage))
        if not everything:
            of_a_sweep = ("beta", "learning_rate", "seed") if "betas" in values else ()  # set per point
            shown = [
                each for *_, group in groups for each in group if each.dest in rank and each.dest not in of_a_sweep
            ]
            origin = f", some from {preset.parent.name}/{preset.name}" if preset else ""
            groups = [(f"options [default{origin}]", None, shown)]
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        for title, text, actions in groups:
            for action in actions:
                action.default = values.get(action.dest, action.default)
            # HfArgumentParser adds --no_x for a switch x that is on
            once = [action for action in actions if ".no_" not in f".{(action.option_strings or [''])[0].lstrip('-')}"]
            formatter.start_section(title)
            formatter.add_text(text)
            formatter.add_arguments(sorted(once, key=lambda action: rank.get(action.dest, len(rank))))
            formatter.end_section()
        print(formatter.format_help(), end="")

    def _words_of(self, preset: Path) -> list[str]:
        """A preset's fields as command-line words, so that they are checked like any flag."""
        import yaml

        try:
            content = yaml.safe_load(preset.read_text(encoding="utf-8"))
        except OSError as error:
            known = ", ".join(sorted(str(path.relative_to(PRESETS)) for path in PRESETS.rglob("*.yaml")))
            raise UserError(f"--config {preset}: {error.strerror}; presets: {known}") from None
        except (yaml.YAMLError, ValueError) as error:  # ValueError: text that is not UTF-8, or an invalid date
            mark = getattr(error, "problem_mark", None)
            line = f", line {mark.line + 1}" if mark else ""
            raise UserError(f"--config {preset}{line}: not YAML ({getattr(error, 'problem', None) or error})") from None
        if not isinstance(content, dict):
            raise UserError(f"--config {preset}: must be a mapping of fields to values")
        sections = {name: content.pop(name) for name in SECTIONS if isinstance(content.get(name), dict)}
        if "dataset_name" not in self.given:
            content |= sections.get("data", {})
        content |= sections.get(self.section, {})
        if self.before:
            content |= {f"{self.before}.{name}": value for name, value in sections.get(self.before, {}).items()}
        words: list[str] = []
        for name, value in content.items():
            if name in ("help", "help_all", "verbose"):  # flags, not fields
                raise UserError(f"--config {preset}: unknown field {name}")
            if value is None:
                raise UserError(f"--config {preset}: field {name} has no value; omit the field")
            if isinstance(value, dict):
                value = json.dumps(value, default=str)
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(str(item).lower() if isinstance(item, bool) else str(item) for item in values)]
        return words


def name_of(flag: str) -> str:
    return flag.partition("=")[0].lstrip("-").replace("-", "_")


def options_of(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(name, words) of every option: its flag and its values; the name is empty for words before the first flag."""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--") or not found:
            found.append((name_of(word) if word.startswith("--") else "", []))
        found[-1][1].append(word)
    return found


def on_one_process() -> None:
    """For recipes that use one process: if a launcher started several, only the first continues."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if os.environ.get("RANK", "0") != "0":
        sys.exit(0)
    print("warning: this recipe runs in one process; the others have ended", file=sys.stderr)
    for name in list(os.environ):  # these would make it wait for the others
        if name in LAUNCHED or name.startswith(("ACCELERATE_USE_", "FSDP_", "TORCHELASTIC_")):
            del os.environ[name]


def run(main: Callable[[], None]) -> NoReturn:
    """Run a recipe's `main` and exit with the documented status."""
    os.umask(os.umask(0o077) | 0o002)  # other users of the machine cannot write to a run
    sys.stdout.reconfigure(line_buffering=True)  # a log file gets each line immediately
    signal.signal(signal.SIGTERM, stop_at_once)
    _end_with_the_launcher()
    if hasattr(os, "register_at_fork"):  # SIGTERM ends workers
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

            # its message may contain a row of the data or a token
            print("\n".join(map(printable, redacted(traceback.format_exc()).splitlines())), file=sys.stderr)
            sys.exit(1)
        _say(f"error: {getattr(error, 'filename', None) or 'a file'} can't be written or read ({reason}); {GO_ON}")
        sys.exit(2)
    sys.exit(0)


def discard_untrained() -> None:
    """Delete a run that ends before its first step, so that the next attempt finds an empty folder."""
    for folder in list(untrained):
        untrained.discard(folder)
        folder.discard()


def _end_with_the_launcher() -> None:
    """Receive SIGTERM when `accelerate launch` dies. Otherwise, this process would keep running (Linux)."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ and sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _say(message: str) -> None:
    """Print one line to stderr, on the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(printable(" ".join(message.split())), file=sys.stderr)

"""Chat with one or several models. They answer the same messages, and each keeps its own conversation history."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from resdpo_trl.errors import UserError, printable
from resdpo_trl.run.folder import use_the_cores
from resdpo_trl.text.config import ChatConfig, ChatModelConfig, named_models
from resdpo_trl.text.generate import answer, prompt_ids, stop_tokens
from resdpo_trl.text.model import check_fits, load_model, load_tokenizer, positions_of
from resdpo_trl.training.signals import Interrupted

NEXT_TURN = "\n\nHuman:"  # the text with which a model without a chat template starts the user's next message
HELP = """/reset  clear the conversation
/help   show this list
/quit   end the chat (also Ctrl-D, or Ctrl-C at the prompt)
Ctrl-C stops an answer. The conversation keeps the part that was written. A
model that had not started to answer does not keep the message.
To send a message that begins with /, type a space before it.
"""


class AnswerStreamer(BaseStreamer):
    """Write an answer's text as its tokens arrive, without surrounding whitespace.

    It holds back trailing whitespace, incomplete characters and a prefix of `NEXT_TURN` until the next token.
    `NEXT_TURN` ends the answer of a model without a chat template, and is not part of it.

    Args:
        tokenizer: decodes the answer.
        write: receives each new piece of text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]):
        self.tokenizer, self.ends, self.write = tokenizer, stop_tokens(tokenizer), write
        self.stop = NEXT_TURN if tokenizer.chat_template is None else None
        self.ids: list[int] = []
        self.text = ""  # the answer so far
        self.ended = False  # whether the model ended the answer
        self.written = 0  # number of characters
        self.interrupted = False

    def interrupt(self, signum: int, frame: Any) -> None:
        """Handle Ctrl-C: raise KeyboardInterrupt at the next token, and from a second Ctrl-C at once.

        Raised anywhere else, it can be lost, because C code clears exceptions of the Python functions that it calls.
        """
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def put(self, value: torch.Tensor) -> None:
        """Receive the prompt (1, T), which `generate` passes first, or the next token (1,)."""
        if self.interrupted:
            raise KeyboardInterrupt
        if value.dim() > 1:
            return
        self.ids += value.tolist()
        kept = [token for token in self.ids if token not in self.ends]
        text = str(self.tokenizer.decode(kept, skip_special_tokens=True))
        self.ended = self.ids[-1] in self.ends or (self.stop is not None and self.stop in text)
        self.text = text.partition(self.stop)[0].strip() if self.stop else text.strip()
        ready = self.text.rstrip("\ufffd")
        begun = [size for size in range(1, len(self.stop or "")) if ready.endswith(NEXT_TURN[:size])]
        self._write(ready[: len(ready) - max(begun, default=0)])

    def end(self) -> None:
        """Write the text that was held back."""
        self._write(self.text)

    def _write(self, text: str) -> None:
        self.write(text[self.written :])
        self.written = max(self.written, len(text))


class Speaker:
    """A model and its conversation.

    Attributes:
        history: the messages so far, each with this model's answer.
        room: maximum tokens of a prompt, so that the longest answer fits into the model's positions.
    """

    def __init__(self, name: str, path: str, flag: str, config: ChatConfig, model: ChatModelConfig):
        self.name, self.path, self.flag, self.config, self.options = name, path, flag, config, model
        self.tokenizer = load_tokenizer(path, model, config.trust_remote_code, flag)
        self.history = [("Hi.", "Hello.")]
        self.room = sys.maxsize
        if config.system is not None and self.tokenizer.chat_template is None:
            raise UserError(f"--system: {name} has no chat template for a system message; remove the flag")
        try:
            self.prompt("Hi.")  # checks the template before any model is loaded
        except UserError as error:
            raise UserError(f"{flag} {path}: {error}") from None
        self.history.clear()

    def load(self) -> None:
        """Load the model."""
        self.model: Any = load_model(self.path, self.options, self.config.trust_remote_code, self.flag)
        check_fits(self.model, self.tokenizer, max_length=0, max_new_tokens=self.config.max_new_tokens)
        if not getattr(self.model, "is_quantized", False):
            self.model.to(PartialState().device)
        self.room = (positions_of(self.model) or sys.maxsize) - self.config.max_new_tokens

    def prompt(self, message: str) -> tuple[list[int], int]:
        """Token ids of the conversation with a new message, and the number of oldest tokens that were truncated."""
        said = [("system", self.config.system)] if self.config.system is not None else []
        for asked, answered in self.history:
            said += [("user", asked), ("assistant", answered)]
        messages = [{"role": role, "content": text} for role, text in [*said, ("user", message)]]
        (ids,), (lost,) = prompt_ids([messages], self.tokenizer, self.room)
        return ids, lost

    def answer(self, ids: list[int], message: str, seed: int, write: Callable[[str], None]) -> bool:
        """Answer the prompt `ids`, whose last message is `message`, and add both to the history.

        If Ctrl-C stops an answer, the history keeps its text so far. Return whether --max_new_tokens truncated it.
        """
        config, streamer = self.config, AnswerStreamer(self.tokenizer, write)
        handler = signal.signal(signal.SIGINT, streamer.interrupt)
        try:
            answer(
                self.model, self.tokenizer, [ids], config.max_new_tokens, sampled=config.do_sample, seed=seed,
                temperature=config.temperature, top_p=config.top_p, stop_string=streamer.stop, streamer=streamer,
            )  # fmt: skip
            if streamer.interrupted:  # at its last token
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            streamer.end()
            raise
        finally:
            signal.signal(signal.SIGINT, handler)
            if streamer.ids:
                self.history.append((message, streamer.text))
        return not streamer.ended


class Chat:
    """A chat with models that are in memory together. Answers go to stdout, and remarks to stderr."""

    def __init__(self, config: ChatConfig, model: ChatModelConfig, run: str | None = None):
        if (run is None) == (config.models is None):
            raise UserError("pass either the folder of a run, e.g. runs/quickstart, or --models NAME=PATH")
        use_the_cores()
        self.config, self.asked = config, 0
        named = named_models(config.models or []) if run is None else models_of(run)
        flags = {name: f"--models {name}" if run is None else "RUN" for name in named}
        self.speakers = [Speaker(name, path, flags[name], config, model) for name, path in named.items()]
        for speaker in self.speakers:
            speaker.load()

    def ask(self, message: str) -> None:
        """Write every model's answer, below the model's name if there are several.

        Raises:
            UserError: a model can't read the message. No model answers then.
        """
        try:
            message.encode()
        except UnicodeEncodeError:
            raise UserError("the message is not UTF-8; convert it") from None
        prompts = [speaker.prompt(message) for speaker in self.speakers]
        seed = self.config.seed + self.asked
        self.asked += 1
        for number, (speaker, (ids, lost)) in enumerate(zip(self.speakers, prompts, strict=True)):
            if len(self.speakers) > 1:
                say(("\n" if number else "") + f"{speaker.name}:\n")
            if lost:
                remark(f"{speaker.name} does not see the oldest {lost} tokens of the conversation; /reset clears it")
            try:
                cut = speaker.answer(ids, message, seed, say)
            finally:
                say("\n")
            if cut:
                remark(f"{speaker.name}'s answer was truncated at --max_new_tokens {self.config.max_new_tokens}")

    def talk(self) -> None:
        """Read messages and commands from the terminal until one of them ends the chat."""
        with suppress(ImportError):
            import readline  # noqa: F401  (arrow keys and earlier lines, for `input`)
        say(self.describe())
        while True:
            line = None
            try:
                line = input("\nyou> ")
                if line.startswith("/"):
                    if not self.obey(line.strip()):
                        return
                elif line.strip():
                    self.ask(line.strip())
            except Interrupted:  # SIGTERM
                raise
            except (EOFError, KeyboardInterrupt):
                if line is None:  # at the prompt
                    say("\n")
                    return
                remark("stopped")
            except UnicodeDecodeError:
                remark("the message is not UTF-8 and was not sent")
            except UserError as error:
                remark(str(error))

    def obey(self, command: str) -> bool:
        """Run a command. Return False if it ends the chat. Raise a UserError for an unknown command."""
        if command == "/reset":
            for speaker in self.speakers:
                speaker.history.clear()
            remark("the conversation is cleared")
        elif command == "/help":
            say(HELP)
        elif command != "/quit":
            raise UserError(f"unknown command {command}; /help lists them")
        return command != "/quit"

    def describe(self) -> str:
        """A line per model, and the generation options."""
        config, width = self.config, max(len(speaker.name) for speaker in self.speakers)
        text = ""
        for speaker in self.speakers:
            form = "" if speaker.tokenizer.chat_template else ", no chat template: \\n\\nHuman: … \\n\\nAssistant:"
            precision = str(speaker.model.dtype).removeprefix("torch.")
            text += f"{speaker.name:<{width}}  {speaker.path} ({precision}, {speaker.model.device}{form})\n"
        drawn = f"sampled with temperature {config.temperature:g}, top_p {config.top_p:g} and seed {config.seed}"
        how = drawn if config.do_sample else "greedy"
        return f"{text}Answers are {how}, with at most {config.max_new_tokens} tokens. /help lists commands.\n"


def models_of(run: str) -> dict[str, str]:
    """The language models in a run's folder, by name: reference and policy."""
    folder = Path(run)
    found = {name: str(folder / name) for name in ("reference", "policy") if (folder / name).is_dir()}
    if not found:
        reason = "it has neither reference/ nor policy/" if folder.is_dir() else "no such folder"
        raise UserError(f"{run}: {reason}; pass a run of dpo_hh.py or sft_hh.py, or --models NAME=PATH")
    return found


def say(text: str) -> None:
    """Write to stdout immediately, without control characters."""
    print(printable(text, kept="\n\t"), end="", flush=True)


def remark(text: str) -> None:
    """Write a line in parentheses to stderr."""
    print(f"({printable(text)})", file=sys.stderr, flush=True)

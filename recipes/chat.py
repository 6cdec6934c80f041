"""Chat with the models of a run, or with any other models. Several models answer the same messages in turn.

# the quickstart's reference and policy
python recipes/chat.py runs/quickstart

# any models: folders (LoRA adapters too) or Hub ids
python recipes/chat.py --models good=runs/good/policy bad=runs/bad/policy --do_sample --temperature 0.7

# one message; the answers go to stdout, under the models' names if there are several
python recipes/chat.py runs/quickstart --prompt "How do I keep basil alive in winter?"
echo "How do I keep basil alive in winter?" | python recipes/chat.py --models policy=runs/quickstart/policy --prompt -
"""

import os
import sys

from command_line import RecipeParser, on_one_process, run

from resdpo_trl.errors import UserError
from resdpo_trl.text.config import ChatConfig, ChatModelConfig


def main() -> None:
    on_one_process()
    parser = RecipeParser((ChatConfig, ChatModelConfig), description=__doc__)
    parser.usage = "%(prog)s [RUN] [--models NAME=PATH ...] [--field value ...]"
    parser.add_argument("run", nargs="?", metavar="RUN", help="the --output_dir of a run of dpo_hh.py or sft_hh.py")
    (config, model), _ = parser.parse()
    message = message_of_stdin() if config.prompt == "-" else config.prompt

    from resdpo_trl.text.chat import Chat

    chat = Chat(config, model, parser.added.run)
    try:
        if message is None:
            chat.talk()
        else:
            chat.ask(message)
    except BrokenPipeError:  # the reader has closed the pipe, as `| head` does; Python would flush stdout again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def message_of_stdin() -> str:
    """The message from stdin. Raises a UserError if there is none."""
    try:
        message = sys.stdin.read().strip()
    except UnicodeDecodeError:
        raise UserError("--prompt -: stdin is not UTF-8; convert it") from None
    if not message:
        raise UserError("--prompt -: stdin is empty; write the message to it")
    return message


if __name__ == "__main__":
    run(main)

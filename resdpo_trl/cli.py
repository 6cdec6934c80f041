"""The `resdpo-trl` command, which runs a recipe by name.

resdpo-trl NAME [flags]                   same as `python recipes/NAME.py [flags]` in a clone
resdpo-trl launch [options] NAME [flags]  same as `accelerate launch [options] recipes/NAME.py [flags]`

A wheel contains recipes/ and accelerate_configs/ inside the package. In a clone they are next to it.
"""

import ast
import difflib
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NoReturn

PACKAGE = Path(__file__).resolve().parent
INSTALLED = (PACKAGE / "recipes").is_dir()
ROOT = PACKAGE if INSTALLED else PACKAGE.parent
RECIPE_IN_TEXT = re.compile(r"(?:(?:accelerate launch|python) )?(?:recipes/)?\b([a-z]+(?:_[a-z]+)?)\.py\b")


def recipes() -> dict[str, Path]:
    """Map each command name to its file. A command name omits the suffix `_hh`."""
    files = sorted((ROOT / "recipes").glob("*.py"))
    return {file.stem.removesuffix("_hh").replace("_", "-"): file for file in files if file.name != "command_line.py"}


def recipe_of(name: str) -> Path:
    """Return the file of a command. Exit with status 2 if the command is unknown."""
    found = recipes()
    if name not in found:
        near = difflib.get_close_matches(name, found, 1)
        refuse(f"unknown command {name}; {f'did you mean {near[0]}?' if near else 'resdpo-trl --help lists them'}")
    return found[name]


def refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def as_commands(text: str) -> str:
    """Rewrite a recipe's help for the command: `accelerate launch recipes/dpo_hh.py` becomes `resdpo-trl dpo`."""
    names = {file.stem: name for name, file in recipes().items()}
    text = RECIPE_IN_TEXT.sub(lambda found: f"resdpo-trl {names[found[1]]}" if found[1] in names else found[0], text)
    return text.replace("recipes/configs/", "")


def overview() -> str:
    """List the commands, the first line of each recipe's docstring, and the presets."""
    presets = sorted(f"{path.parent.name}/{path.name}" for path in ROOT.glob("recipes/configs/*/*.yaml"))
    about = {"launch": "Run COMMAND in several processes with accelerate: launch --config_file multi_gpu.yaml dpo"}
    for name, file in recipes().items():
        docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        about[name] = as_commands(docstring.splitlines()[0])
    width = min(shutil.get_terminal_size().columns, 120)
    return "\n".join(
        [
            "usage: resdpo-trl COMMAND [--config FILE.yaml] [--field value ...]",
            "       resdpo-trl launch [options of accelerate launch] COMMAND [--field value ...]",
            "",
            *(textwrap.fill(f"  {name:<16}{about[name]}", width, subsequent_indent=18 * " ") for name in sorted(about)),
            "",
            "resdpo-trl COMMAND --help shows the options and examples of a command.",
            textwrap.fill(f"Presets for --config: {', '.join(presets)}", width),
        ]
    )


def launch(words: list[str]) -> NoReturn:
    """Run a recipe with `accelerate launch`, whose parser separates its own options from the recipe's name."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    parser = launch_command_parser()
    parser.prog = "resdpo-trl launch"
    parser.usage = "%(prog)s [options of accelerate launch] COMMAND [--field value ...]"
    arguments = parser.parse_args(words)
    arguments.training_script = str(recipe_of(arguments.training_script))
    if arguments.config_file is not None and not Path(arguments.config_file).is_file():
        ours = {file.name: file for file in sorted((ROOT / "accelerate_configs").glob("*.yaml"))}
        if arguments.config_file not in ours:
            refuse(f"--config_file {arguments.config_file}: no such file, and not one of {', '.join(ours)}")
        arguments.config_file = str(ours[arguments.config_file])
    try:
        launch_command(arguments)
    except subprocess.CalledProcessError as ended:  # the recipe has printed the reason
        sys.exit(ended.returncode)
    sys.exit(0)


def main() -> None:
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
    elif name == "launch":
        launch(words)
    else:
        file = recipe_of(name)
        sys.argv = [str(file), *words]
        sys.path.insert(0, str(file.parent))  # as Python does for a script
        runpy.run_path(str(file), run_name="__main__")

"""Push a finished run's model and card to the Hub: policy/, reward_model/, or reference/ after SFT alone.

# any run, of text or images; the token is HF_TOKEN or that of `hf auth login`
python recipes/publish.py runs/quickstart --hub_model_id you/quickstart

# a LoRA adapter, merged into a full model that anybody can load
python recipes/publish.py runs/lora --hub_model_id you/lora --merge_adapter

# to a private repository
python recipes/publish.py runs/digits --hub_model_id you/digits --hub_private_repo
"""

from pathlib import Path

from command_line import RecipeParser, run


def main() -> None:
    parser = RecipeParser((), description=__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="the --output_dir of a finished run")
    parser.add_argument("--hub_model_id", required=True, help="name or owner/name of the repository")
    parser.add_argument("--hub_private_repo", action="store_true", default=None, help="create a private repository")
    parser.add_argument(
        "--merge_adapter", action="store_true", help="first merge a LoRA adapter into a full model, in the run's folder"
    )
    parser.add_argument("--hub_revision", help="branch to push to; main by default")
    parser.add_argument("--hub_token", help="prefer HF_TOKEN: other users of the machine can read a command line")
    options = parser.parse_args()

    from resdpo_trl.run.hub import Hub, publish
    from resdpo_trl.text.pipeline import merge_run

    hub = Hub(options.run, options.hub_model_id, options.hub_private_repo, options.hub_token, options.hub_revision)
    print(f"pushed to {publish(hub, merge_run if options.merge_adapter else None)}")


if __name__ == "__main__":
    run(main)

"""`finetune chat`: talk to an experiment's base model, champion and challenger."""

import warnings

import click

from finetune_assets.cli.terminal import EXPERIMENT, progress_shown
from finetune_assets.resources.project import Project


@click.command()
@click.argument("experiment", type=EXPERIMENT)
@click.option("--max-new-tokens", default=256, show_default=True, help="Longest answer, in tokens.")
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy decoding.")
@click.option(
    "--retrieval/--no-retrieval", default=True, help="Give models passages, where they were trained with them."
)
def chat(experiment: str, max_new_tokens: int, temperature: float, retrieval: bool) -> None:
    """Talk to the models of EXPERIMENT in the terminal.

    Base model, champion and challenger, each with its own history; /help lists the commands. With data.retrieval, each
    question comes with passages of the experiment's documents, whose sources are shown below the answer.
    """
    warnings.simplefilter("ignore", FutureWarning)  # addressed to libraries, in the middle of an answer
    from finetune_assets.cli.conversation import Conversation, contenders, run, typed_lines

    lineage = Project().lineage(experiment)
    with progress_shown():
        available = contenders(lineage)
        index = lineage.index() if retrieval else None
        folder = lineage.store.fetch(index) if index else None
    talk = Conversation(available, max_new_tokens, temperature, folder)
    print(f"{experiment}: {', '.join(talk.names)} available; {talk.active} answers. /help lists the commands.")
    run(talk, typed_lines())

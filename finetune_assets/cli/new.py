"""`finetune new`: a new experiment or sweep, copied from an example."""

from pathlib import Path

import click
from click.shell_completion import CompletionItem

from finetune_assets.cli.terminal import out, styled
from finetune_assets.config.examples import copy_example, load_examples
from finetune_assets.resources import deployment


class ExampleName(click.ParamType):  # type: ignore[type-arg]
    """The name of an example, which the shell completes; whether it exists is checked where it is read."""

    name = "example"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in load_examples(deployment.configs()) if name.startswith(incomplete)]


@click.command()
@click.argument("name", required=False)
@click.option("--from", "example", type=ExampleName(), help="Example to copy, a file in configs/examples/.")
@click.option("--list", "lists", is_flag=True, help="List the examples and what each needs.")
def new(name: str | None, example: str | None, lists: bool) -> None:
    """Add experiment or sweep NAME, copied from an example.

    The copy is a file in configs/experiments/ or configs/sweeps/, to be edited. Reload the definitions in the UI to
    see it there.

    \b
    Examples:
      finetune new --list
      finetune new mine --from smollm2-135m-dolly
    """
    if lists:
        if name or example:
            raise click.UsageError("--list takes no other argument.")
        list_examples()
    elif not name or not example:
        raise click.UsageError("Give a NAME and --from EXAMPLE; `finetune new --list` lists the examples.")
    else:
        path = copy_example(deployment.configs(), example, name)
        command = "run" if path.parent.name == "experiments" else "sweep run"
        shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        out.print(f"Created {shown}. Edit it, then: finetune {command} {name}")


def list_examples() -> None:
    for example in load_examples(deployment.configs()).values():
        out.print(styled(example.name, "bold"), f"({example.kind})")
        out.print(f"  {example.description}\n  Needs: {example.needs}")

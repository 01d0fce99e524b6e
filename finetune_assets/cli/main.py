"""`finetune`: the one command of this project. A subcommand's module is imported when it is named, and not before."""

from importlib import import_module

import click

from finetune_assets.cli.foreground import INTERRUPTED
from finetune_assets.config.errors import suggest
from finetune_assets.display import message
from finetune_assets.errors import UserError

COMMANDS = {
    "run": "finetune_assets.cli.run:run",
    "init": "finetune_assets.cli.init:init",
    "new": "finetune_assets.cli.new:new",
    "plan": "finetune_assets.cli.plan:plan",
    "report": "finetune_assets.cli.report:report",
    "compare": "finetune_assets.cli.report:compare",
    "sweep": "finetune_assets.cli.sweep:sweep",
    "chat": "finetune_assets.cli.chat:chat",
    "adapter": "finetune_assets.cli.adapter:adapter",
    "store": "finetune_assets.cli.store:store",
    "demo": "finetune_assets.cli.demo:demo",
    "ui": "finetune_assets.cli.ui:ui",
}
"""Where each subcommand is defined, in the order of `--help`."""


class LazyGroup(click.Group):
    """A group of the subcommands in COMMANDS, which ends with a message, not a traceback, where the user can help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(import_module(module), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"No such command '{args[0]}'; {suggest(args[0], list(COMMANDS))}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # `| head` has read enough; Click ends quietly
        except (UserError, OSError) as e:
            raise click.ClickException(message(e, lines=True)) from e
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="finetune_assets")
@click.option("--demo", is_flag=True, help="Use the demo's rows, artifacts and Dagster home instead of yours.")
def finetune(demo: bool) -> None:
    """Fine-tune, evaluate, promote and serve LoRA adapters, one per experiment in configs/experiments/.

    Store, namespace and cache are set by environment variables: FINETUNE_STORE, FINETUNE_NAMESPACE, FINETUNE_CACHE.

    \b
    Exit codes:
      0    success
      1    failure, or the answer is no (does not fit, damaged, not verified)
      2    wrong usage
      130  interrupted

    \b
    Shell completion:
      eval "$(_FINETUNE_COMPLETE=bash_source finetune)"    # zsh_source, fish_source
    """
    if demo:
        from finetune_assets.resources import deployment  # takes as long to import as all else here

        deployment.use_demo()

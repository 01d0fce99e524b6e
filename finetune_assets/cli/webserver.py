"""Dagster's webserver behind `RequestGuard`: `python -m finetune_assets.cli.webserver [--allow-host NAME] ...`.

Other options are those of `dagster-webserver`, whose own command is run: this process differs from it by one more
middleware. The middleware is added through `DagsterWebserver.build_middleware`, the method that Dagster's webserver
calls for its middleware, so this needs none of Dagster's private modules. The ways that were not taken:

- `create_app_from_workspace_process_context`, which returns the application, and `host_dagster_ui_with_...`: both
  require a `WorkspaceProcessContext`, which only `dagster._core` can create.
- A reverse proxy before an unchanged `dagster-webserver`: that can listen on TCP ports only, so a page could send its
  requests to the port behind the proxy.

The version of dagster-webserver is pinned, and `tests/cli/test_webserver.py` starts it: with a version that calls the
method no more, these tests fail.
"""

import click
from dagster_webserver.cli import cli as dagster_webserver
from dagster_webserver.webserver import DagsterWebserver
from starlette.middleware import Middleware

from finetune_assets.cli.request_guard import Names, RequestGuard, parse_names
from finetune_assets.cli.ui import allow_host
from finetune_assets.config.hosts import is_loopback

EXPOSED = """\
Warning: the UI listens on {host}, and Dagster has no login: everyone who reaches this address can start runs,
change schedules and read logs. Put a reverse proxy with a login before it, or close its port to others."""


@click.command(context_settings={"ignore_unknown_options": True, "help_option_names": ["--help"]})
@click.option("--host", "-h", default="127.0.0.1", show_default=True, help="Address to listen on.")
@allow_host
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def webserver(host: str, allowed: tuple[str, ...], arguments: tuple[str, ...]) -> None:
    """Run `dagster-webserver` with ARGUMENTS, and refuse requests of other sites' pages."""
    if not is_loopback(host):
        click.echo(EXPOSED.format(host=host), err=True)
    guard_webserver(Names(host.lower(), parse_names(allowed)))
    dagster_webserver.main(
        ["--host", host, *arguments], prog_name="dagster-webserver", auto_envvar_prefix="DAGSTER_WEBSERVER"
    )


def guard_webserver(server: Names) -> None:
    """Put the guard before everything else in each application that `DagsterWebserver` creates in this process."""
    build_middleware = DagsterWebserver.build_middleware

    def build_guarded(self: DagsterWebserver) -> list[Middleware]:  # type: ignore[type-arg]
        return [Middleware(RequestGuard, server=server), *build_middleware(self)]

    DagsterWebserver.build_middleware = build_guarded  # type: ignore[method-assign]


if __name__ == "__main__":
    webserver()

"""Compares what servers list and answer with what should serve."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from finetune_assets.artifacts.champions import Record
from finetune_assets.serving.errors import ServerError
from finetune_assets.serving.servers import Servers
from finetune_assets.serving.state import Served
from finetune_assets.serving.verify import answers_as_probed
from finetune_assets.serving.vllm import VllmServer

NOT_SERVED, LOST, WRONG, FOREIGN, UNREACHABLE = "not served", "lost", "wrong answers", "no champion", "unreachable"
REPAIRABLE = (NOT_SERVED, LOST, WRONG)
"""What a run of `served_adapter` repairs, or diagnoses."""


@dataclass(frozen=True)
class Finding:
    """A difference between what a server does and what it should do.

    Attributes:
        kind: `not served`, `lost`, `wrong answers`, `no champion` or `unreachable`.
        text: What was found, with experiment, server and adapter.
    """

    kind: str
    text: str


def compare(experiment: str, champion: Record, served: Served | None, servers: Servers) -> Iterator[Finding]:
    """Yield the differences of one experiment.

    Args:
        experiment: Name of the experiment.
        champion: Its champion.
        served: What serves, by the records.
        servers: Its servers.
    """
    if served is None or served.adapter != champion.adapter:
        serves = served.name if served else "nothing"
        yield Finding(
            NOT_SERVED,
            f"{experiment}: champion {champion.number} ({champion.adapter[:12]}) is not served, but {serves}",
        )
    if served is None:
        return
    for server in servers.every:
        try:
            names = server.names()
            for name in (served.name, served.previous):
                if name and name not in names:
                    yield Finding(LOST, f"{experiment}: {server.shown} does not have {name}")
            if isinstance(server, VllmServer) and served.name in names and not _answers_as_verified(server, served):
                answers = f"answers to {served.name} otherwise than when it was verified"
                yield Finding(WRONG, f"{experiment}: {server.shown} {answers}")
        except ServerError as e:
            yield Finding(UNREACHABLE, f"{experiment}: {e}")


def _answers_as_verified(server: VllmServer, served: Served) -> bool:
    return not served.probe or answers_as_probed(server, served.name, served.probe)


def strangers(servers: Servers, known: Collection[str]) -> Iterator[Finding]:
    """Yield adapters on servers that no experiment serves or keeps for a rollback.

    Args:
        servers: The servers of an experiment.
        known: Names that serve, and those before them, of all experiments.
    """
    for server in servers.every:
        try:
            names = server.names()
        except ServerError:
            continue  # reported as unreachable
        for name in names:
            if name not in known:
                yield Finding(FOREIGN, f"{server.shown} has {name}, which is no champion")

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
    kept = [name for name in (served.name, served.previous) if name]
    for folder in servers.folders:
        for name in sorted({*kept} - {*folder.names()}):
            yield Finding(LOST, f"{experiment}: {folder.path} does not have {name}")
    for replica in servers.replicas:
        try:
            yield from _differences(experiment, replica, served, kept)
        except ServerError as e:
            yield Finding(UNREACHABLE, f"{experiment}: {e}")


def _differences(experiment: str, replica: VllmServer, served: Served, kept: list[str]) -> Iterator[Finding]:
    listed = replica.models()
    for name in kept:
        if name not in listed:
            yield Finding(LOST, f"{experiment}: {replica.shown} does not list {name}")
    if served.name in listed and served.probe and not answers_as_probed(replica, served.name, served.probe):
        yield Finding(
            WRONG, f"{experiment}: {replica.shown} answers to {served.name} otherwise than when it was verified"
        )


def strangers(servers: Servers, known: Collection[str]) -> Iterator[Finding]:
    """Yield adapters on servers that no experiment serves or keeps for a rollback.

    Args:
        servers: The servers of an experiment.
        known: Names that serve, and those before them, of all experiments.
    """
    for folder in servers.folders:
        for name in folder.names():
            if name not in known:
                yield Finding(FOREIGN, f"{folder.path} has {name}, which is no champion")
    for replica in servers.replicas:
        try:
            listed = replica.models()
        except ServerError:
            continue  # reported as unreachable
        for name, model in listed.items():
            if model.parent and name not in known:
                yield Finding(FOREIGN, f"{replica.shown} serves {name}, which is no champion")

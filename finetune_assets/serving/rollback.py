"""Moves the alias back to an adapter that is still loaded, after a rollback of the champion. No bytes are moved."""

from dataclasses import replace

from finetune_assets.artifacts.champions import Record
from finetune_assets.serving.errors import ServerError
from finetune_assets.serving.servers import Servers
from finetune_assets.serving.state import ROLLED_BACK, Served, ServedRecords
from finetune_assets.serving.verify import answers_as_probed
from finetune_assets.store.artifacts import ArtifactStore


class NotLoaded(ServerError):
    """An adapter cannot serve at once, because a server does not have it or answers otherwise than when verified."""


def move_back(store: ArtifactStore, champion: Record, servers: Servers, by: str) -> Served:
    """Let the servers answer with a champion that served before.

    Each server is asked for one row, whose log-probability must be that of the verification.

    Args:
        store: Store of the records.
        champion: The champion.
        servers: The experiment's servers.
        by: User.

    Returns:
        The record of what serves; the current one, if it names the champion already.

    Raises:
        NotLoaded: if a server does not have the adapter; what serves is unchanged.
    """
    records = ServedRecords(store, champion.experiment)
    history = records.history()
    earlier = [record for record in history if record.adapter == champion.adapter]
    if not earlier:
        raise NotLoaded(f"adapter {champion.adapter[:12]} was never served")
    target, current = earlier[-1], history[-1]
    if target.name == current.name:
        return current
    for server in servers.every:
        if target.name not in server.names():
            raise NotLoaded(f"{server.shown} does not have {target.name} any more")
    for replica in servers.replicas:
        if target.probe and not answers_as_probed(replica, target.name, target.probe):
            raise NotLoaded(f"{replica.shown} answers to {target.name} otherwise than when it was verified")
    record = replace(target, action=ROLLED_BACK, champion=champion.number, previous=current.name, by=by)
    record = records.append(record, current.number)
    for folder in servers.folders:
        folder.write_alias(record)
    return record

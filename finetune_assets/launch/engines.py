"""Which engine runs a job: what its experiment says, or else the environment.

FINETUNE_LAUNCHER: `local` (default), `slurm` or `kubernetes`, for experiments whose `launcher.engine` is `auto`.
"""

import os
from typing import Literal, get_args

from finetune_assets.config.cluster import Launcher as Settings
from finetune_assets.errors import UserError
from finetune_assets.worker import warm
from finetune_assets.worker.job import JobSpec

Engine = Literal["local", "slurm", "kubernetes"]


class Launcher:
    """Runs jobs wherever each is to run. Assets know no more of it."""

    def engine(self, spec: JobSpec) -> Engine:
        """Where a job runs.

        Raises:
            UserError: if FINETUNE_LAUNCHER names no engine, or that engine cannot run it.
        """
        chosen = _chosen(spec.settings)
        if chosen == "local" and spec.nodes[0] > 1:
            raise UserError(
                f"launcher.nodes: {spec.nodes[0]} machines need launcher.engine (or FINETUNE_LAUNCHER) slurm or "
                "kubernetes; on this machine it is 1"
            )
        if chosen != "local" and spec.store.startswith("file://") and not os.environ.get("FINETUNE_SHARED"):
            raise UserError(
                f"FINETUNE_STORE: '{spec.store}' is a folder of this machine, and jobs of {chosen} run on others; use "
                "s3://bucket/prefix, or set FINETUNE_SHARED=1 if all of them share that folder"
            )
        return chosen

    def prepare(self, settings: Settings) -> None:
        """Let what workers need be imported while something else is done, where their engine is this machine.

        Raises:
            UserError: if FINETUNE_LAUNCHER names no engine.
        """
        if _chosen(settings) == "local":
            warm.prepare()


def _chosen(settings: Settings) -> Engine:
    if settings.engine != "auto":
        return settings.engine
    chosen = os.environ.get("FINETUNE_LAUNCHER") or "local"
    if chosen not in get_args(Engine):
        raise UserError(f"FINETUNE_LAUNCHER: '{chosen}' is no engine; use one of {', '.join(get_args(Engine))}")
    return chosen  # type: ignore[return-value]

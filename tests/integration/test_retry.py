"""A training that dies in the night is gone on with by itself."""

import os
import signal
import threading

import dagster as dg
import pytest
from integration.daemon import first_steps, ranks_of
from projects import TestProject
from waiting import wait_for

from finetune_assets.assets import materialization
from finetune_assets.definitions import defs

STEPS, SAVED = 20, 3


@pytest.mark.soak
@pytest.mark.system
def test_run_whose_worker_is_killed_goes_on_by_itself(project: TestProject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(materialization, "RETRY_SECONDS", 0.1)
    overrides = [f"training.max_steps={STEPS}", f"training.save_steps={SAVED}", "training.logging_steps=1"]
    with dg.DagsterInstance.ephemeral() as instance:
        killer = threading.Thread(target=_kill_the_rank, args=[project])
        killer.start()
        done = dg.materialize(
            [asset for asset in defs.assets or [] if isinstance(asset, dg.AssetsDefinition)],
            selection=dg.AssetSelection.assets("lora_adapter").upstream(),
            resources=dict(defs.resources or {}),
            partition_key="demo",
            instance=instance,
            run_config={"resources": {"project": {"config": {"overrides": overrides}}}},
            raise_on_error=False,
        )
        killer.join()
        again = [event.step_key for event in done.all_events if event.is_step_up_for_retry]
        begun = first_steps(instance, done.run_id, STEPS)
    assert done.success
    assert again == ["lora_adapter"]
    assert begun[0] == 1
    assert len(begun) == 2
    assert begun[1] > SAVED
    assert begun[1] % SAVED == 1, "it begins after what was saved last"
    assert len(project.published("adapters")) == 1
    assert not project.leftovers()


def _kill_the_rank(project: TestProject) -> None:
    """Once there is a checkpoint to go on from."""
    wait_for(lambda: any(project.store_root.rglob("checkpoints/**/manifest.json")), 240)
    (rank,) = ranks_of(project)
    os.kill(rank, signal.SIGKILL)

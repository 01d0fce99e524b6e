"""The GPU that a plan is for, as NVML describes it."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from training.conftest import configured

from finetune_assets.errors import UserError
from finetune_assets.preflight import device
from finetune_assets.worker import gpus


class Driver(SimpleNamespace):
    """Stands in for `pynvml`."""

    def __init__(self, major: int) -> None:
        self.queried: list[Any] = []
        self.ended = 0
        super().__init__(
            NVMLError=RuntimeError,
            nvmlInit=lambda: None,
            nvmlShutdown=self._end,
            nvmlDeviceGetHandleByIndex=lambda index: self._query("index", index),
            nvmlDeviceGetHandleByUUID=lambda uuid: self._query("uuid", uuid),
            nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=80 << 30),
            nvmlDeviceGetCudaComputeCapability=lambda handle: (major, 0),
            nvmlDeviceGetName=lambda handle: "NVIDIA H100 80GB HBM3",
        )

    def _query(self, kind: str, name: Any) -> str:
        self.queried.append((kind, name))
        return "handle"

    def _end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize(("visible", "query"), [(["3", "1"], ("index", 3)), (["GPU-8f2a"], ("uuid", "GPU-8f2a"))])
@pytest.mark.parametrize(("major", "bf16"), [(9, True), (7, False)])
def test_the_first_visible_gpu_is_planned_for(
    monkeypatch: pytest.MonkeyPatch, visible: list[str], query: Any, major: int, bf16: bool
) -> None:
    driver = Driver(major)
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setattr(gpus, "visible", lambda: visible)
    found = device.device_of(configured())
    assert driver.queried == [query]
    assert driver.ended == 1
    assert (found.kind, found.bytes, found.processes, found.bf16) == ("cuda", 80 << 30, len(visible), bf16)
    assert found.name == "NVIDIA H100 80GB HBM3"
    assert found.usable == int(0.9 * (80 << 30))


def test_a_gpu_without_nvml_has_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(gpus, "visible", lambda: ["0"])
    with pytest.raises(UserError, match=r"hardware\.gpu"):
        device.device_of(configured())

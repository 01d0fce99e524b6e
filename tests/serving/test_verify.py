"""Servers are verified by numbers; what they answer with instead is diagnosed, and the adapter before serves on."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from servers.vllm import Vllm
from serving.conftest import WRONG, World
from tiers import tiered

from finetune_assets.serving import vllm as client
from finetune_assets.serving.errors import (
    BASE,
    ERROR,
    LEAK,
    OTHER,
    OTHER_BASE,
    PREVIOUS,
    SCALE,
    STALE,
    TEMPLATE,
    TIMEOUT,
    TOKEN,
)
from finetune_assets.serving.state import ServedRecords
from finetune_assets.serving.vllm import VllmServer

COMPLETIONS, CHAT, LOAD = "/v1/completions", "/v1/chat/completions", "/v1/load_lora_adapter"
QUESTION = [5, 6, 7, 8]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "TIMEOUT_SECONDS", 5.0)
    monkeypatch.setattr(client, "PAUSE_SECONDS", 0.01)


@dataclass(frozen=True)
class Fault:
    """A way in which a server misbehaves, and what it is diagnosed as."""

    behaviour: Callable[[str, str], dict[str, Any]]
    diagnosis: str


FAULTS = {
    "as base": Fault(lambda first, other: {"answers_as": ""}, BASE),
    "as previous": Fault(lambda first, other: {"answers_as": first}, PREVIOUS),
    "as another experiment's": Fault(lambda first, other: {"answers_as": other}, OTHER),
    "half scale": Fault(lambda first, other: {"scale": 0.5}, SCALE),
    "rsLoRA read as LoRA": Fault(lambda first, other: {"scale": 32**-0.5}, SCALE),
    "one and a half scale": Fault(lambda first, other: {"scale": 1.5}, SCALE),
    "wrong template": Fault(lambda first, other: {"template": WRONG}, TEMPLATE),
    "stale cache": Fault(lambda first, other: {"stale": True}, STALE),
    "chat as previous": Fault(lambda first, other: {"answers_as": first, "only_chat": True}, PREVIOUS),
    "unload leaks": Fault(lambda first, other: {"leaks": True}, LEAK),
    "500 at loading": Fault(lambda first, other: {"failing": {LOAD: 500}}, ERROR),
    "500 at answers": Fault(lambda first, other: {"failing": {COMPLETIONS: 500}}, ERROR),
    "404 at loading": Fault(lambda first, other: {"failing": {LOAD: 404}}, OTHER_BASE),
    "another base's name": Fault(lambda first, other: {"base_name": "another"}, OTHER_BASE),
    "token": Fault(lambda first, other: {"token": "another"}, TOKEN),
    "timeout": Fault(lambda first, other: {"hangs": 0.6}, TIMEOUT),
}
LIKE_OTHERS = {"as previous", "rsLoRA read as LoRA", "one and a half scale", "500 at loading", "another base's name"}
"""Faults with the diagnosis of another one, for `make soak`."""


@pytest.mark.parametrize("name", tiered(FAULTS, system=FAULTS.keys() - LIKE_OTHERS))
def test_each_fault_is_diagnosed_and_the_adapter_before_serves_on(
    world: World, vllm: Vllm, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = FAULTS[name]
    world.configure(vllm.url, experiment="other")
    world.promote("c", experiment="other")
    other = world.serve("other").name
    world.configure(vllm.url)
    world.promote("a")
    first = world.serve()
    assert first.passed, first
    before = VllmServer(vllm.url).logprob(first.name, QUESTION, 9)

    if fault.diagnosis == TIMEOUT:
        monkeypatch.setattr(client, "TIMEOUT_SECONDS", 0.2)
    for setting, value in fault.behaviour(first.name, other).items():
        setattr(vllm, setting, value)
    world.promote("b", against="a")
    failed = world.serve()
    (verdict,) = failed.verdicts.values()
    assert verdict.diagnosis.split(" demo")[0].split(" other")[0] == fault.diagnosis, verdict
    if fault.diagnosis == OTHER:
        assert verdict.diagnosis == f"{OTHER} {other}"
    if fault.diagnosis in (BASE, PREVIOUS, OTHER, SCALE):
        assert {"distance_to_challenger", "distance_to_base", "distance_to_previous"} <= verdict.numbers.keys()
    assert not failed.passed
    assert not failed.moved
    current = ServedRecords(world.project.store, "demo").current()
    assert current
    assert current.name == first.name
    assert first.name in vllm.adapters

    monkeypatch.setattr(client, "TIMEOUT_SECONDS", 5.0)
    vllm.well()
    if fault.diagnosis == TIMEOUT:
        time.sleep(1)  # until the requests that were given up are answered
    if fault.diagnosis != TOKEN:
        vllm.base_name = "demo-base"
    assert VllmServer(vllm.url).logprob(first.name, QUESTION, 9) == before
    if fault.diagnosis not in (ERROR, TIMEOUT, TOKEN):
        assert failed.name not in vllm.adapters, "unloaded"
    again = world.serve()
    assert again.passed, "the fault was the only reason"
    assert again.moved

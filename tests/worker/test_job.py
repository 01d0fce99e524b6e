"""Specifications of jobs, which whoever may write to the store may change before a machine reads them."""

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from finetune_assets.artifacts.kinds import ADAPTERS, BASE_MODELS
from finetune_assets.store.artifacts import ArtifactRef
from finetune_assets.store.objects import ObjectStorage
from finetune_assets.worker import job, warm
from finetune_assets.worker.job import JobInvalid, JobSpec, from_json
from finetune_assets.worker.process import FORKSERVER, OFF
from finetune_assets.worker.remote import RemoteJob

REVISION = "0" * 40
ATTEMPT = "20261127T101112Z-0123abcd"


def ref(kind: str, name: str) -> ArtifactRef:
    return ArtifactRef(kind, name, name, f"file:///store/me/{kind}/{name}/{ATTEMPT}", 3, 0)


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    base = ref(BASE_MODELS.folder, f"local/My model, v2/{REVISION}")
    return JobSpec(
        module="finetune_assets.training",
        config="a: 1\n",
        inputs={"base-model": base, "dataset": ref("tokenized", "d" * 64), "raw-0": ref("raw", "e" * 64)},
        kind=ADAPTERS.folder,
        fingerprint="a" * 64,
        made_from={"fingerprint": "a" * 64, "overrides": ["x=1"], "champion": None},
        store=f"file://{tmp_path}/store",
        namespace="me",
        cache=str(tmp_path / "cache"),
        processes="auto",
        nodes=(1, 4),
        cache_limit=10**11,
        scratch=True,
    )


def test_what_is_written_is_read(spec: JobSpec) -> None:
    assert from_json(spec.to_json()) == spec


@pytest.mark.parametrize("worker", ["training", "evaluation", "merging"])
def test_every_input_of_a_worker_is_one_of_a_job(worker: str) -> None:
    flags = {
        flag.removeprefix("--").replace("-N", "-0")
        for action in import_module(f"finetune_assets.{worker}.cli").parser()._actions
        for flag in action.option_strings
    }
    assert "base-model" in flags
    no_input = {"-h", "help", "config", "made-from", "uris", "bases", "output", "scratch"}
    assert {flag for flag in flags - no_input if not job.INPUT.fullmatch(flag)} == set()


INVALID: list[tuple[str, Any]] = [
    ("module", "platform"),
    ("module", "finetune_assets.training; id"),
    ("module", "finetune_assets"),
    ("module", None),
    ("module", ["finetune_assets.training"]),
    ("fingerprint", "../../x"),
    ("fingerprint", ".."),
    ("fingerprint", ""),
    ("fingerprint", "a" * 65),
    ("fingerprint", "a\n"),
    ("fingerprint", {"a": 1}),
    ("kind", "../champions"),
    ("kind", "adapter"),
    ("namespace", "../you"),
    ("namespace", "a/b"),
    ("store", "http://elsewhere/"),
    ("store", "/etc"),
    ("store", ["file:///store"]),
    ("cache", ""),
    ("cache", 7),
    ("cache", "/cache\0x"),
    ("cache_limit", "10GB"),
    ("cache_limit", -1),
    ("cache_limit", True),
    ("processes", "2; id"),
    ("processes", 2),
    ("processes", "0"),
    ("nodes", [2, 1]),
    ("nodes", [1]),
    ("nodes", ["1", "1"]),
    ("nodes", 1),
    ("rendezvous_seconds", "600"),
    ("rendezvous_seconds", 0),
    ("replace", "yes"),
    ("scratch", 1),
    ("keep_checkpoints", 10.5),
    ("ignore_checkpoints", None),
    ("config", {"a": 1}),
    ("made_from", []),
    ("inputs", []),
    ("settings", {}),
    ("environment", {"LD_PRELOAD": "/x.so"}),
]


@pytest.mark.parametrize(("key", "value"), INVALID, ids=lambda value: repr(value)[:30])
def test_invalid_value_is_named(spec: JobSpec, key: str, value: Any) -> None:
    tree = {**json.loads(spec.to_json()), key: value}
    with pytest.raises(JobInvalid) as error:
        from_json(json.dumps(tree))
    assert key in str(error.value)
    assert ascii(value) in str(error.value) or key in ("settings", "environment")
    assert len(str(error.value).splitlines()) == 1
    assert not error.value.retriable


INVALID_INPUTS: list[tuple[str, str, Any]] = [
    ("output", "", None),
    ("config", "", None),
    ("made-from", "", None),
    ("../x", "", None),
    ("raw-", "", None),
    ("adapter-0 --output", "", None),
    ("dataset", "kind", "../.."),
    ("dataset", "kind", "jobs"),
    ("dataset", "name", "../../x"),
    ("dataset", "name", "/etc"),
    ("dataset", "name", ""),
    ("dataset", "uri", "file:///store/me/tokenized/d/.."),
    ("dataset", "uri", "file:///store/me/tokenized/d/x"),
    ("dataset", "uri", 7),
    ("dataset", "files", "3"),
    ("dataset", "size", -1),
    ("dataset", "content", "abc"),
    ("dataset", "fingerprint", {"a": 1}),
    ("dataset", "trusted", True),
]


@pytest.mark.parametrize(("name", "key", "value"), INVALID_INPUTS, ids=lambda value: repr(value)[:30])
def test_invalid_input_is_named(spec: JobSpec, name: str, key: str, value: Any) -> None:
    tree = json.loads(spec.to_json())
    tree["inputs"][name] = {**tree["inputs"]["dataset"], **({key: value} if key else {})}
    with pytest.raises(JobInvalid) as error:
        from_json(json.dumps(tree))
    assert name in str(error.value)
    assert key in str(error.value)


@pytest.mark.parametrize("name", sorted({"module", "fingerprint", "inputs", "store", "made_from"}))
def test_missing_key_is_named(spec: JobSpec, name: str) -> None:
    tree = json.loads(spec.to_json())
    del tree[name]
    with pytest.raises(JobInvalid, match=name):
        from_json(json.dumps(tree))


def refusal(text: str) -> str:
    """The error of a job's specification, which must be `JobInvalid`; empty if it is valid."""
    try:
        from_json(text)
    except JobInvalid as e:
        return str(e)
    return ""


def test_any_text_ends_in_one_line(spec: JobSpec) -> None:
    """200 texts: jobs with one change each, and some that are no job or nested as deep as a parser goes."""
    draw, began = random.Random(22), time.monotonic()
    hostile = [
        None,
        True,
        -1,
        10**400,
        1e308,
        "",
        "..",
        "../x",
        "\x1b[2J",
        "\0",
        [],
        {},
        [[]],
        {"a": {"b": []}},
        "x" * 10**6,
    ]
    texts = ["", "[]", "null", "[" * 100_000, '{"a":' * 100_000, "\ud800", "{", '{"inputs": 1e999}']
    whole = json.loads(spec.to_json())
    while len(texts) < 200:
        tree = json.loads(spec.to_json())
        where = tree if draw.random() < 0.5 else tree["inputs"][draw.choice([*tree["inputs"]])]
        key = draw.choice([*where, "more", "../x"])
        if draw.random() < 0.2:
            where.pop(key, None)
        else:
            where[key] = draw.choice(hostile)
        if tree != whole:
            texts.append(json.dumps(tree))
    lines = [line for text in texts if (line := refusal(text))]
    assert all(line.isprintable() and len(line) < 1000 for line in lines)
    assert len(lines) > 150, "the rest changed what may be anything, such as the configuration"
    assert time.monotonic() - began < 5


def test_own_worker_is_allowed_by_name(spec: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = {**json.loads(spec.to_json()), "module": "mine.worker"}
    monkeypatch.setenv("FINETUNE_WORKER_MODULES", "other, mine.worker")
    assert from_json(json.dumps(tree)).module == "mine.worker"
    monkeypatch.setenv("FINETUNE_WORKER_MODULES", ",")
    assert job.modules() == {*job.MODULES}
    with pytest.raises(JobInvalid, match="FINETUNE_WORKER_MODULES"):
        from_json(json.dumps(tree))


@pytest.mark.parametrize(
    "change", [{"fingerprint": "../../../precious"}, {"module": "platform", "inputs": {}, "processes": None}], ids=str
)
def test_bootstrap_does_nothing_of_an_invalid_job(spec: JobSpec, tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis").touch()
    path, result = tmp_path / "job.json", tmp_path / "result.json"
    path.write_text(json.dumps({**json.loads(spec.to_json()), "ignore_checkpoints": True, **change}))
    process = warm.start("finetune_assets.worker.bootstrap", [str(path), str(result)], os.environ)
    assert process.wait(120) == 1
    answer = json.loads(result.read_text())
    assert next(iter(change)) in answer["error"]
    assert not answer["retriable"]
    assert (tmp_path / "precious" / "thesis").exists()
    assert not (tmp_path / "cache").exists()


def node(remote: RemoteJob, *digest: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "finetune_assets.worker.node", *remote.arguments[:3], *digest]
    return subprocess.run(command, env={**os.environ, FORKSERVER: OFF}, capture_output=True, text=True, timeout=120)


def test_job_that_was_changed_in_the_store_is_not_run(spec: JobSpec, tmp_path: Path) -> None:
    remote = RemoteJob.begin(spec)
    assert remote.digest == hashlib.sha256(spec.to_json().encode()).hexdigest()
    assert remote.spec() == spec
    objects = ObjectStorage(spec.store)
    changed = {**json.loads(spec.to_json()), "cache": str(tmp_path / "elsewhere")}
    from_json(json.dumps(changed))  # nothing but its hash tells
    objects.put(f"{remote.prefix}/job.json", json.dumps(changed).encode())
    with pytest.raises(JobInvalid, match=remote.digest):
        remote.spec()
    ran = node(remote, remote.digest)
    assert ran.returncode == 1
    outcome = remote.outcome()
    assert isinstance(outcome, job.JobFailed)
    assert all(fact in str(outcome) for fact in (remote.id, remote.digest))
    assert not (tmp_path / "elsewhere").exists()
    assert not (tmp_path / "cache").exists()
    assert node(remote).returncode != 0, "and none runs without a hash"
    with pytest.raises(JobInvalid):
        RemoteJob(spec.store, "me", remote.id).spec()


@pytest.mark.parametrize(
    "answer",
    [
        b"{",
        b"[]",
        b"[" * 100_000,
        b'{"ref": {"kind": "adapters"}}',
        b'{"ref": {"kind": "x", "name": "a", "fingerprint": "a", "uri": "u", "files": 1, "size": 1}}',
        b'{"error": "x"}',
        b'{"error": ["x"], "retriable": true, "specificity": 0, "when": 1.0}',
        b'{"error": "x", "retriable": true, "specificity": "9", "when": 1.0}',
    ],
    ids=lambda answer: answer[:30].decode(),
)
def test_outcome_that_no_machine_wrote_is_named(spec: JobSpec, answer: bytes) -> None:
    remote = RemoteJob.begin(spec)
    ObjectStorage(spec.store).put(f"{remote.prefix}/answer-0.json", answer)
    with pytest.raises(JobInvalid, match=remote.id) as error:
        remote.outcome()
    assert len(str(error.value).splitlines()) == 1


def test_outcomes_are_read_as_they_were_written(spec: JobSpec) -> None:
    remote = RemoteJob.begin(spec)
    assert remote.outcome() is None
    remote.answer(1, {"error": "no room", "retriable": True, "specificity": 2})
    failed = remote.outcome()
    assert isinstance(failed, job.JobFailed)
    assert (str(failed), failed.retriable, failed.specificity) == ("no room", True, 2)
    remote.answer(0, {"ref": ref("adapters", "a" * 64).to_dict()})
    remote.answer(2, {"ref": None})
    assert remote.outcome() == ref("adapters", "a" * 64)

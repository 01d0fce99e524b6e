"""Sensor that compares servers with champions: restarted servers get their adapters again, and people get alerts."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import dagster as dg

from finetune_assets.artifacts.champions import Champions
from finetune_assets.automation import heartbeat
from finetune_assets.automation.alerts import AlertError, send_alert
from finetune_assets.automation.loaded_experiments import loaded_experiments
from finetune_assets.config.errors import ConfigError
from finetune_assets.config.loading import Experiment, experiment_files, load_experiment
from finetune_assets.errors import UserError
from finetune_assets.resources import deployment
from finetune_assets.resources.raw_versions import PARTITION_TAG
from finetune_assets.serving.drift import REPAIRABLE, Finding, compare, strangers
from finetune_assets.serving.servers import Servers, servers_of
from finetune_assets.serving.state import Served, ServedRecords

SERVED_ADAPTER = dg.AssetKey("served_adapter")
EVERY_SECONDS = 30
ATTEMPTS, PAUSE_SECONDS = 3, 60.0
"""Runs that are started for one difference, and the pause after the first, multiplied by four each time."""
TICK_SECONDS, TIMEOUT_SECONDS = 40.0, 5.0
"""Time limits of a tick and of one answer of a server, in seconds; Dagster ends a tick after 60."""
UNFINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


@dataclass
class Memory:
    """Cursor of the sensor.

    Attributes:
        seen: Texts of the findings at the last tick.
        alerted: Texts that an alert was sent for.
        attempts: Number of runs started for each experiment's differences.
        paused_until: Time of the next run at the earliest, by experiment.
        started: Number of started runs, of which each has its own key.
    """

    seen: list[str] = field(default_factory=list)
    alerted: list[str] = field(default_factory=list)
    attempts: dict[str, int] = field(default_factory=dict)
    paused_until: dict[str, float] = field(default_factory=dict)
    started: int = 0


@dg.sensor(
    target=dg.AssetSelection.assets(SERVED_ADAPTER),
    minimum_interval_seconds=EVERY_SECONDS,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Compares what each server lists and answers with the champions, for experiments with `serving` "
    "settings. Materializes `served_adapter` for a champion that is not served and for a server that lost its "
    "adapters, at most three times each, and alerts if that does not help or if a server has an adapter that is no "
    "champion.",
)
def serving_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult:
    memory, now = Memory(**json.loads(context.cursor or "{}")), time.time()
    served = [*_served_experiments(context)]
    known = {name for _, record, _ in served if record for name in (record.name, record.previous) if name}
    loaded = loaded_experiments(context, SERVED_ADAPTER)
    found: list[Finding] = []
    requests = []
    for experiment, record, servers in served:
        if time.time() - now > TICK_SECONDS:
            context.log.warning(f"Not compared in this tick: {experiment.name}")
            continue
        if _is_running(context.instance, experiment.name):
            continue
        findings = _findings(experiment, record, servers, known)
        found += findings
        if experiment.name in loaded and (request := _request(memory, experiment.name, findings, now)):
            requests.append(request)
    _alert(context, memory, found)
    heartbeat.beat("serving_sensor")
    texts = "; ".join(finding.text for finding in found)
    cursor = json.dumps(asdict(memory))
    if requests:
        return dg.SensorResult(run_requests=requests, cursor=cursor)
    return dg.SensorResult(
        skip_reason=texts or f"{len(served)} experiments are served as they should be", cursor=cursor
    )


def _served_experiments(
    context: dg.SensorEvaluationContext,
) -> Iterator[tuple[Experiment, Served | None, Servers]]:
    """Experiments with servers that are subscribed or were served before, with what serves."""
    configs, store = deployment.configs(), deployment.store()
    for name in experiment_files(configs):
        try:
            experiment = load_experiment(configs, name)
            servers = servers_of(experiment.config, deployment.root(), TIMEOUT_SECONDS)
            record = ServedRecords(store, name).current() if servers else None
        except (ConfigError, UserError) as e:
            context.log.warning(str(e))
            continue
        if servers and (record or experiment.config.subscribed):
            yield experiment, record, servers


def _findings(experiment: Experiment, record: Served | None, servers: Servers, known: set[str]) -> list[Finding]:
    champion = Champions(deployment.store(), experiment.name).current()
    differences = [*compare(experiment.name, champion, record, servers)] if champion else []
    return [*differences, *strangers(servers, known)]


def _is_running(instance: dg.DagsterInstance, experiment: str) -> bool:
    """Whether a run that serves the experiment's champion has not ended."""
    wanted = dg.RunsFilter(statuses=UNFINISHED, tags={PARTITION_TAG: experiment})
    return any(
        not run.asset_selection or SERVED_ADAPTER in run.asset_selection for run in instance.get_runs(filters=wanted)
    )


def _request(memory: Memory, experiment: str, findings: list[Finding], now: float) -> dg.RunRequest | None:
    """A run that repairs the differences of an experiment, unless `ATTEMPTS` runs did not."""
    if not any(finding.kind in REPAIRABLE for finding in findings):
        memory.attempts.pop(experiment, None)
        memory.paused_until.pop(experiment, None)
        return None
    attempts = memory.attempts.get(experiment, 0)
    if attempts >= ATTEMPTS or now < memory.paused_until.get(experiment, 0.0):
        return None
    memory.attempts[experiment] = attempts + 1
    memory.paused_until[experiment] = now + PAUSE_SECONDS * 4**attempts
    memory.started += 1
    return dg.RunRequest(
        run_key=f"{experiment}-{memory.started}-{int(now)}", partition_key=experiment, asset_selection=[SERVED_ADAPTER]
    )


def _alert(context: dg.SensorEvaluationContext, memory: Memory, found: list[Finding]) -> None:
    """Alert once for each difference that two successive ticks have found: a run or a restart may end meanwhile."""
    texts = {finding.text: finding for finding in found}
    for text in texts:
        context.log.warning(text)
    memory.alerted = [text for text in memory.alerted if text in texts]
    for text in [text for text in texts if text in memory.seen and text not in memory.alerted]:
        try:
            send_alert(f"serving: {texts[text].kind}", text)
        except AlertError as e:
            context.log.error(str(e))
            continue  # retried at the next tick
        memory.alerted.append(text)
    memory.seen = sorted(texts)

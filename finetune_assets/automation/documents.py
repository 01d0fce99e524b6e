"""Automatic materialization of `retrieval_index`: a sensor that watches the documents of each set."""

import json
import time
from collections import defaultdict
from dataclasses import asdict

import dagster as dg

from finetune_assets.artifacts.document_lineage import DocumentLineage
from finetune_assets.automation import heartbeat
from finetune_assets.automation.change_detection import SensorCursor, observe
from finetune_assets.automation.experiments import EACH_TIME
from finetune_assets.automation.loaded_experiments import loaded_experiments
from finetune_assets.automation.settings_hash import retrieval_of_experiments
from finetune_assets.config.documents import load_documents
from finetune_assets.config.raw_data_schema import Arrivals
from finetune_assets.errors import UserError
from finetune_assets.resources import deployment
from finetune_assets.resources.project import AUTOMATIC_TAG, Project
from finetune_assets.resources.raw_versions import configured_source, newest_good

RETRIEVAL_INDEX = dg.AssetKey("retrieval_index")
INDEX_TAG = "finetune/documents_version"
UNUSED = "No subscribed experiment retrieves passages"
NO_RAW_DATA = "Waiting for raw data that has passed its checks"
NOT_LOADED = "Waiting for Dagster to reload the definitions: no experiment that they contain retrieves from this set"


@dg.sensor(
    target=dg.AssetSelection.assets(RETRIEVAL_INDEX),
    minimum_interval_seconds=EACH_TIME,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Watches the documents of subscribed experiments (configs/documents/) every five seconds and "
    "materializes `retrieval_index` once for each new version of a set. The experiments are then tokenized again, "
    "and their champions evaluated again; training follows only with data.retrieval.retrain.",
)
def documents_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult:
    stored = json.loads(context.cursor) if context.cursor else {}
    users, loaded = _users(), loaded_experiments(context, RETRIEVAL_INDEX)
    # Sets that no experiment uses at present keep theirs: numbers of run keys must not begin again
    memory = {name: SensorCursor(**stored.get(name, {})) for name in sorted({*stored, *users})}
    messages, requests = {}, []
    for name in sorted(users):
        user = next((experiment for experiment in users[name] if experiment in loaded), None)
        if user is None:
            messages[name] = NOT_LOADED
            continue
        try:
            documents = _documents(context.instance, name)
            if documents is None:
                messages[name] = NO_RAW_DATA
                continue
            arrivals = Arrivals(quiet_seconds=0 if documents.config.from_contexts else documents.config.quiet_seconds)
            observation = observe(documents, memory[name], arrivals, time.time())
        except UserError as e:  # of this set alone; the others are still watched
            context.log.warning(str(e))
            messages[name] = f"not read: {e}"
            continue
        memory[name], messages[name] = observation.seen, observation.message
        if observation.starts:
            requests.append(_request(name, user, observation.seen))
    heartbeat.beat("documents_sensor")
    cursor = json.dumps({name: asdict(seen) for name, seen in memory.items()})
    reason = "; ".join(f"{name}: {message}" for name, message in messages.items()) or UNUSED
    return dg.SensorResult(run_requests=requests, skip_reason=None if requests else reason, cursor=cursor)


def _users() -> dict[str, list[str]]:
    """Subscribed experiments that retrieve from each document set, by name of the set."""
    users = defaultdict[str, list[str]](list)
    for experiment, retrieval in sorted(retrieval_of_experiments().items()):
        users[retrieval.documents].append(experiment)
    return users


def _documents(instance: dg.DagsterInstance, name: str) -> DocumentLineage | None:
    """A document set; None if its documents are contexts of raw data that is not there yet.

    Contexts are those of the newest good version of the raw data, which is in the store.
    """
    config = load_documents(deployment.configs(), name)
    project = Project()
    if not config.from_contexts:
        return project.documents(name, asks_hub=True)
    version = newest_good(instance, configured_source())
    return DocumentLineage(name, config, project.raw(version=version)) if version else None


def _request(name: str, experiment: str, seen: SensorCursor) -> dg.RunRequest:
    request: dg.RunRequest = dg.RunRequest(
        run_key=f"{name}-{seen.number}-{seen.version}",
        partition_key=experiment,
        tags={AUTOMATIC_TAG: "true", INDEX_TAG: seen.version[:12]},
    )
    return request

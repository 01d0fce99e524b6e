"""One machine's part of a cluster job: `python -m finetune_assets.worker.node STORE NAMESPACE JOB SHA256`.

SHA256 is the hash of the job's specification when it was submitted. A specification that was changed in the store since
then is rejected before anything in it is used.

FINETUNE_NODE_CACHE: node-local folder for fetched artifacts and running jobs. Environment variables in it, such as
    `$TMPDIR/finetune`, are expanded on the node. Default: FINETUNE_CACHE of the machine that runs Dagster.
"""

from finetune_assets.worker.process import FORKSERVER, OFF, die_with_parent

die_with_parent()

import os
import sys
from dataclasses import replace

from finetune_assets.worker.bootstrap import answer_of, prepare
from finetune_assets.worker.job import JobSpec
from finetune_assets.worker.remote import TERMINATED, RemoteJob
from finetune_assets.worker.rendezvous import Place


def main() -> None:
    prepare()
    os.environ[FORKSERVER] = OFF  # a fork server of the submitting machine does not exist here
    store, namespace, job_id, digest = sys.argv[1:]
    job, place = RemoteJob(store, namespace, job_id, digest), Place.from_environment()

    def spec() -> JobSpec:
        given = job.spec()
        return replace(given, cache=os.path.expandvars(os.environ.get("FINETUNE_NODE_CACHE") or given.cache))

    try:
        answer = answer_of(spec, place)
    except SystemExit:
        answer = TERMINATED
    job.answer(place.node, answer)
    if "error" in answer:
        print(answer["error"], file=sys.stderr)
    sys.exit("error" in answer)


if __name__ == "__main__":
    main()

"""One machine's part of a job on a cluster: `python -m finetune_assets.worker.node STORE NAMESPACE JOB`.

FINETUNE_NODE_CACHE: node-local folder for fetched artifacts and running jobs; variables of the node in it, such as
    `$TMPDIR/finetune`, are filled in there. By default FINETUNE_CACHE of the machine that Dagster runs on.
"""

from finetune_assets.worker.process import FORKSERVER, OFF, die_with_parent

die_with_parent()

import os
import sys
from dataclasses import replace

from finetune_assets.worker.bootstrap import answer_of, prepare
from finetune_assets.worker.remote import TOLD_TO_END, RemoteJob
from finetune_assets.worker.rendezvous import Place


def main() -> None:
    prepare()
    os.environ[FORKSERVER] = OFF  # what the environment of the machine that asks says of its own is not for here
    job, place = RemoteJob(sys.argv[1], sys.argv[2], sys.argv[3]), Place.from_environment()
    spec = job.spec()
    cache = os.path.expandvars(os.environ.get("FINETUNE_NODE_CACHE") or spec.cache)
    try:
        answer = answer_of(replace(spec, cache=cache), place)
    except SystemExit:
        answer = TOLD_TO_END
    job.answer(place.node, answer)
    if "error" in answer:
        print(answer["error"], file=sys.stderr)
    sys.exit("error" in answer)


if __name__ == "__main__":
    main()

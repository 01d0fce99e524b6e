"""Jobs of a few lines, for every engine."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_assets.config.cluster import LauncherSettings
from finetune_assets.store.artifacts import open_store
from finetune_assets.worker.job import JobSpec

WORKER = """
import os, pathlib, sys
from finetune_assets.worker.process import run_worker
run_worker("worker_body")
"""
LINGERS = 120
"""For how many seconds a worker's child outlives it."""
BODIES = {
    "good": "def main():\n    (out() / 'x.txt').write_text(open(arg('dataset') + '/in.txt').read().upper())",
    "slow": "def main():\n    import time\n    (out() / 'started').touch(); time.sleep(8); (out() / 'x.txt').touch()",
    "of_two": "def main():\n    import time\n    (out() / 'started').touch(); time.sleep(20)\n"
    "    if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0': raise RuntimeError('the other is gone')\n"
    "    (out() / 'x.txt').write_text(os.environ['WORLD_SIZE'])",
    "user_error": "def main():\n    import finetune_assets.errors as e\n    raise e.UserError('rank: 0 is wrong')",
    "crash": "def main():\n    raise RuntimeError('the disk is on fire')",
    "import_error": "import no_such_module",
    "exit": "def main():\n    print('last words', file=sys.stderr); os._exit(7)",
    "one_rank": "def main():\n    import time\n"
    "    if os.environ['RANK'] == '1': raise RuntimeError('rank one is ill')\n    time.sleep(600)",
    "sleep": "def main():\n    import time\n    (out() / 'started').write_text(str(os.getpid())); time.sleep(600)",
    "told_to_end": "def main():\n    import signal, time\n    stop = []\n"
    "    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))\n"
    "    (out() / 'started').touch()\n"
    "    while not stop: time.sleep(0.1)\n"
    "    (out().parents[2] / f'told-{os.environ[\"RANK\"]}').touch(); sys.exit(3)",
    "lingering": f"def main():\n    import subprocess\n    child = subprocess.Popen(['sleep', '{LINGERS}'])\n"
    "    (out().parents[2] / 'lingers').write_text(str(child.pid))\n"
    "    raise RuntimeError('gone early')",
    "hub": "def main():\n    (out() / 'x.txt').write_text(os.environ['HF_HUB_OFFLINE'])",
}
HELPERS = """
import os, pathlib, sys
def arg(name): return sys.argv[sys.argv.index('--' + name) + 1]
def out(): return pathlib.Path(arg('output'))
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., JobSpec]:
    """Makes jobs that run one of BODIES."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "worker_main.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(modules), prepend=os.pathsep)
    monkeypatch.setenv("FINETUNE_WORKER_MODULES", "worker_main")
    store = open_store(os.environ.get("FINETUNE_STORE") or f"file://{tmp_path}/store", "me", tmp_path / "cache")
    data = tmp_path / "data"
    data.mkdir()
    (data / "in.txt").write_text("hello")
    ref = store.publish(data, "raw", "d", "d", {})

    def make(body: str, processes: str | None = "1", nodes: tuple[int, int] = (1, 1), **settings: Any) -> JobSpec:
        worker_body, text = modules / "worker_body.py", HELPERS + BODIES[body]
        if not worker_body.exists() or worker_body.read_text() != text:  # a worker may be importing it
            worker_body.write_text(text)
        return JobSpec(
            module="worker_main",
            config="a: 1\n",
            inputs={"dataset": ref},
            kind="adapters",
            fingerprint="f1",
            made_from={"data": "d"},
            store=store.url,
            namespace="me",
            cache=str(tmp_path / "cache"),
            processes=processes,
            nodes=nodes,
            settings=LauncherSettings(**settings),
        )

    return make

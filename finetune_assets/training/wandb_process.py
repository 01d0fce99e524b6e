"""Process that connects to Weights & Biases on behalf of a training, and outlives it until all data is written.

Rank 0 starts it as `python -m finetune_assets.training.wandb_process` (`tracking.py`). Messages are lines of JSON on
stdin and stdout. wandb's service process completes its local folder only if the owner of the run waits for it to
finish, which may require waiting for a server. This process can wait without blocking the training or its exit.
"""

import json
import os
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

from finetune_assets.display import shown_url, without_credentials

if TYPE_CHECKING:
    from wandb import Artifact, Run

START_SECONDS, INIT_SECONDS = 5.0, 30.0
"""Timeouts for a server to respond and to start a run. After that the run is recorded offline; training continues."""
FINISH_SECONDS = 8.0
"""Timeout for wandb to send the last lines; then it writes its local folder and exits."""
TRANSFER_SECONDS = 600.0
"""Timeout for a file, or a part of a large file."""
UPLOAD_SECONDS = 5
"""Interval of server probes during the upload of an artifact."""
Message = dict[str, Any]


def answers(server: str, seconds: float) -> bool:
    """Whether a server responds without a server error (5xx) within a timeout in seconds, DNS lookup included."""
    healthy = threading.Event()

    def probe() -> None:
        try:
            with urllib.request.urlopen(f"{server}/graphql", timeout=seconds):
                healthy.set()
        except urllib.error.HTTPError as e:
            if e.code < 500:
                healthy.set()
        except (OSError, ValueError, HTTPException):
            pass
        finally:
            finished.set()

    finished = threading.Event()
    threading.Thread(target=probe, daemon=True).start()
    finished.wait(seconds)
    return healthy.is_set()


class WandbClient:
    """A run of W&B, controlled by the messages of a training.

    Args:
        begin: `tracking.Begin` as a dictionary.
        out: Queue of messages to the training.
    """

    def __init__(self, begin: Message, out: "SimpleQueue[Message | None]") -> None:
        if server := os.environ.get("WANDB_BASE_URL"):
            # W&B's client authenticates with WANDB_API_KEY alone, and writes its settings to its folder
            os.environ["WANDB_BASE_URL"] = shown_url(server)
        import wandb

        self.wandb, self.begin, self.out = wandb, begin, out
        self.server = wandb.setup(wandb.Settings(silent=True)).settings.base_url
        self.why = ""
        self.run = self._start_run()
        self.artifacts: list[Artifact] = []
        for name, type_ in (("dataset", "dataset"), ("base_model", "model")):
            if begin.get(name):
                self._log_input(begin[name], type_)
        self.send(begun=self._run_info())

    def send(self, **message: Any) -> None:
        self.out.put(message)

    # ---- start

    def _start_run(self) -> "Run":
        if self.begin["mode"] == "online":
            try:
                return self._init_online()
            except Exception as e:  # of any type: training continues without W&B
                self.why = _text(e).splitlines()[0]
                self.wandb.teardown()  # its service process would continue with the failed run
        return self._init("offline", None)

    def _init_online(self) -> "Run":
        if not answers(self.server, START_SECONDS):
            raise ConnectionError(f"{self.server} is not responding")
        return self._init("online", "allow")

    def _init(self, mode: Literal["online", "offline"], resume: Literal["allow"] | None) -> "Run":
        settings = self.wandb.Settings(
            silent=True,
            console="off",
            stop_fn=lambda: None,  # the "Stop run" button would interrupt this process, not the training
            init_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
            x_file_transfer_timeout_seconds=TRANSFER_SECONDS,  # finish_timeout does not end file transfers
            x_file_transfer_retry_max=5,
            x_file_transfer_retry_wait_max_seconds=5,
            x_stats_pid=self.begin["pid"],
        )
        names = ("project", "entity", "name", "id", "config", "tags", "job_type")
        return self.wandb.init(
            mode=mode, resume=resume, settings=settings, **{name: self.begin.get(name) for name in names}
        )

    def _run_info(self) -> Message:
        """Location of the run, and the command that uploads its local folder."""
        online, folder = not self.run.offline, Path(self.run.settings.sync_dir)
        folders = folder if online else folder.with_name(f"offline-run-*-{self.run.id}*")
        links = {"url": shown_url(self.run.url), "server": self.server} if online else {}
        name = self.begin.get("artifact") or f"{self._adapter_name}:latest"
        artifact = f"{self.run.entity}/{self.run.project}/{name}"
        logged = {"artifact": artifact} if online and self.begin["log_model"] else {}
        sync = f"wandb beta sync {'--no-skip-online ' if online else ''}{folders}"
        return {"mode": "online" if online else "offline", **links, **logged, "folder": str(folder), "sync": sync} | (
            {"why": self.why} if self.why else {}
        )

    @property
    def _adapter_name(self) -> str:
        return f"adapter-{self.begin['id']}"

    def _log_input(self, used: Message, type_: str) -> None:
        """Log an input artifact of the run: its name, metadata and URI, never its files."""
        artifact = self.wandb.Artifact(used["name"], type=type_, metadata=used["metadata"])
        if used["uri"]:
            artifact.add_reference(used["uri"], checksum=False)
        # `Run.use_artifact` does the same, but waits for the server and fails offline
        self.artifacts.append(self.run._log_artifact(artifact, use_after_commit=True))

    # ---- messages of the training

    def record(self, numbers: Message, histograms: dict[str, tuple[list[float], list[float]]]) -> None:
        charts = {name: self.wandb.Histogram(np_histogram=bins) for name, bins in histograms.items()}
        step = numbers.pop("step")
        self.run.log({**numbers, **charts}, step=step)

    def summary(self, numbers: Message) -> None:
        self.run.summary.update(numbers)

    def adapter(self, folder: str, metadata: Message, name: str = "", aliases: Sequence[str] = ()) -> None:
        artifact = self.wandb.Artifact(name or self._adapter_name, type="model", metadata=metadata)
        artifact.add_dir(folder, skip_cache=True)  # copies the files: the folder is deleted after training
        self.send(staged=True)
        self.artifacts.append(self.run.log_artifact(artifact, aliases=list(aliases) or None))

    def finish(self, exit_code: int, preempted: bool = False) -> None:
        if preempted:
            self.run.mark_preempting()
        if not self.run.offline:
            self._upload()
        self.run.finish(exit_code=exit_code)

    def _upload(self) -> None:
        """Wait for the upload of the artifacts without a time limit, while the server is reachable."""
        from wandb.sdk.artifacts.exceptions import WaitTimeoutError

        for artifact in self.artifacts:
            while answers(self.server, START_SECONDS):
                try:
                    artifact.wait(timeout=UPLOAD_SECONDS)
                    self.send(line=f"Weights & Biases: uploaded {artifact.qualified_name}")
                    break
                except WaitTimeoutError:
                    continue
                except Exception as e:
                    self.send(line=f"Weights & Biases: failed to upload artifact {artifact.name}: {_text(e)}")
                    break


def _text(error: Exception) -> str:
    key = os.environ.get("WANDB_API_KEY")
    text = without_credentials(f"{type(error).__name__}: {error}")
    return text.replace(key, "(WANDB_API_KEY)") if key else text


def _read(incoming: "SimpleQueue[Message | None]") -> None:
    for line in sys.stdin:
        incoming.put(json.loads(line))
    incoming.put(None)
    # the training has ended: exit after a timeout, even if wandb is still waiting
    deadline = threading.Timer(TRANSFER_SECONDS, os._exit, (1,))
    deadline.daemon = True
    deadline.start()


def _write(out: "SimpleQueue[Message | None]", stream: int) -> None:
    with os.fdopen(stream, "w", encoding="utf-8") as output:
        for message in iter(out.get, None):
            try:
                print(json.dumps(message), file=output, flush=True)
            except OSError:  # the training has ended
                return


def main() -> None:
    """Process messages from stdin until a message finishes the run, or the training exits."""
    incoming: SimpleQueue[Message | None] = SimpleQueue()
    out: SimpleQueue[Message | None] = SimpleQueue()
    message_fd = os.dup(1)
    os.dup2(2, 1)  # keeps output of wandb out of the messages
    threading.Thread(target=_read, args=(incoming,), daemon=True).start()
    writer = threading.Thread(target=_write, args=(out, message_fd), daemon=True)
    writer.start()
    try:
        _follow(incoming, out)
    except Exception as e:
        out.put({"line": f"Weights & Biases: tracking disabled: {_text(e)}"})
    out.put({"done": True})
    out.put(None)
    writer.join()


def _follow(incoming: "SimpleQueue[Message | None]", out: "SimpleQueue[Message | None]") -> None:
    begin = incoming.get()
    if begin is None:
        return
    tracker = WandbClient(begin["begin"], out)
    for message in iter(incoming.get, None):
        for method, arguments in message.items():
            getattr(tracker, method)(**arguments)
        if "finish" in message:
            return
    tracker.finish(exit_code=1)


if __name__ == "__main__":
    main()

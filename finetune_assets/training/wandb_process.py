"""The process that talks to Weights & Biases for a training, and outlives it for as long as it has something to write.

`python -m finetune_assets.training.wandb_process`, started by rank 0 (`tracking.py`). Messages come and go as lines of
JSON. wandb's own process writes its local folder whole only if who holds the run sees to its end, and that may wait for
a server; here it may, while training goes on, or ends.
"""

import json
import os
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from wandb import Artifact, Run

START_SECONDS, INIT_SECONDS = 5.0, 30.0
"""How long a server may take to answer at all, and to begin a run, before it is recorded offline; training goes on."""
FINISH_SECONDS = 8.0
"""How long wandb tries to send the last lines; then it writes its local folder, and ends."""
TRANSFER_SECONDS = 600.0
"""How long one file, or part of a large one, may take."""
UPLOAD_SECONDS = 5
"""How often, while an artifact is sent, the server is asked whether it is still there."""
Message = dict[str, Any]


def answers(server: str, seconds: float) -> bool:
    """Whether a server says anything but that it is broken, within so many seconds, its name's look-up included."""
    good = threading.Event()

    def ask() -> None:
        try:
            with urllib.request.urlopen(f"{server}/graphql", timeout=seconds):
                good.set()
        except urllib.error.HTTPError as e:
            if e.code < 500:
                good.set()
        except (OSError, ValueError):
            pass
        finally:
            asked.set()

    asked = threading.Event()
    threading.Thread(target=ask, daemon=True).start()
    asked.wait(seconds)
    return good.is_set()


class Tracker:
    """One run of W&B, as a training tells it.

    Args:
        begin: `tracking.Begin` as a dictionary.
        out: Where what there is to know is written, for the training to read.
    """

    def __init__(self, begin: Message, out: "SimpleQueue[Message | None]") -> None:
        import wandb

        self.wandb, self.begin, self.out = wandb, begin, out
        self.server = wandb.setup(wandb.Settings(silent=True)).settings.base_url
        self.why = ""
        self.run = self._started()
        self.artifacts: list[Artifact] = []
        for name, type_ in (("dataset", "dataset"), ("base_model", "model")):
            self._use(begin[name], type_)
        self.tell(begun=self._told())

    def tell(self, **message: Any) -> None:
        self.out.put(message)

    # ---- the beginning

    def _started(self) -> "Run":
        if self.begin["mode"] == "online":
            try:
                return self._init_online()
            except Exception as e:  # of whatever kind: training does without
                self.why = _text(e).splitlines()[0]
                self.wandb.teardown()  # its process would go on with the run that could not begin
        return self._init("offline", None)

    def _init_online(self) -> "Run":
        if not answers(self.server, START_SECONDS):
            raise ConnectionError(f"{self.server} does not answer")
        return self._init("online", "allow")

    def _init(self, mode: Literal["online", "offline"], resume: Literal["allow"] | None) -> "Run":
        settings = self.wandb.Settings(
            silent=True,
            console="off",
            stop_fn=lambda: None,  # the button "Stop run" would interrupt this process, not the training
            init_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
            x_file_transfer_timeout_seconds=TRANSFER_SECONDS,  # the only requests that the former does not end
            x_file_transfer_retry_max=5,
            x_file_transfer_retry_wait_max_seconds=5,
            x_stats_pid=self.begin["pid"],
        )
        names = ("project", "entity", "name", "id", "config", "tags")
        return self.wandb.init(
            mode=mode, resume=resume, settings=settings, **{name: self.begin[name] for name in names}
        )

    def _told(self) -> Message:
        """What there is to know of the run: how to see it, and how to send what lies here."""
        online, folder = not self.run.offline, Path(self.run.settings.sync_dir)
        folders = folder if online else folder.with_name(f"offline-run-*-{self.run.id}*")
        seen = {"url": self.run.url, "server": self.server} if online else {}
        artifact = f"{self.run.entity}/{self.run.project}/{self._adapter_name}:latest"
        logged = {"artifact": artifact} if online and self.begin["log_model"] else {}
        sync = f"wandb beta sync {'--no-skip-online ' if online else ''}{folders}"
        return {"mode": "online" if online else "offline", **seen, **logged, "folder": str(folder), "sync": sync} | (
            {"why": self.why} if self.why else {}
        )

    @property
    def _adapter_name(self) -> str:
        return f"adapter-{self.begin['id']}"

    def _use(self, used: Message, type_: str) -> None:
        """Say what the run was made from: its name, metadata, and place, never its files."""
        artifact = self.wandb.Artifact(used["name"], type=type_, metadata=used["metadata"])
        if used["uri"]:
            artifact.add_reference(used["uri"], checksum=False)
        # `Run.use_artifact` does this and then waits for the server, and refuses offline
        self.artifacts.append(self.run._log_artifact(artifact, use_after_commit=True))

    # ---- what a training tells

    def record(self, numbers: Message, histograms: dict[str, tuple[list[float], list[float]]]) -> None:
        drawn = {name: self.wandb.Histogram(np_histogram=told) for name, told in histograms.items()}
        step = numbers.pop("step")
        self.run.log({**numbers, **drawn}, step=step)

    def summary(self, numbers: Message) -> None:
        self.run.summary.update(numbers)

    def adapter(self, folder: str, metadata: Message) -> None:
        artifact = self.wandb.Artifact(self._adapter_name, type="model", metadata=metadata)
        artifact.add_dir(folder, skip_cache=True)  # copies the files: the folder goes when training has ended
        self.tell(staged=True)
        self.artifacts.append(self.run.log_artifact(artifact))

    def finish(self, exit_code: int, preempted: bool = False) -> None:
        if preempted:
            self.run.mark_preempting()
        if not self.run.offline:
            self._upload()
        self.run.finish(exit_code=exit_code)

    def _upload(self) -> None:
        """Wait for the artifacts, however long it takes, while the server answers."""
        from wandb.sdk.artifacts.exceptions import WaitTimeoutError

        for artifact in self.artifacts:
            while answers(self.server, START_SECONDS):
                try:
                    artifact.wait(timeout=UPLOAD_SECONDS)
                    self.tell(say=f"Weights & Biases has {artifact.qualified_name}")
                    break
                except WaitTimeoutError:
                    continue
                except Exception as e:
                    self.tell(say=f"Weights & Biases did not take the artifact {artifact.name}: {_text(e)}")
                    break


def _text(error: Exception) -> str:
    key = os.environ.get("WANDB_API_KEY")
    text = f"{type(error).__name__}: {error}"
    return text.replace(key, "(the key)") if key else text


def _read(incoming: "SimpleQueue[Message | None]") -> None:
    for line in sys.stdin:
        incoming.put(json.loads(line))
    incoming.put(None)
    # the training has ended: whatever wandb still waits for, this process does too
    last = threading.Timer(TRANSFER_SECONDS, os._exit, (1,))
    last.daemon = True
    last.start()


def _write(out: "SimpleQueue[Message | None]", stream: int) -> None:
    with os.fdopen(stream, "w", encoding="utf-8") as told:
        for message in iter(out.get, None):
            try:
                print(json.dumps(message), file=told, flush=True)
            except OSError:  # the training has ended
                return


def main() -> None:
    """Do what comes on stdin until a message ends the run, or the training is gone."""
    incoming: SimpleQueue[Message | None] = SimpleQueue()
    out: SimpleQueue[Message | None] = SimpleQueue()
    told = os.dup(1)
    os.dup2(2, 1)  # what wandb prints is none of ours
    threading.Thread(target=_read, args=(incoming,), daemon=True).start()
    writer = threading.Thread(target=_write, args=(out, told), daemon=True)
    writer.start()
    try:
        _follow(incoming, out)
    except Exception as e:
        out.put({"say": f"Weights & Biases is left out: {_text(e)}"})
    out.put({"done": True})
    out.put(None)
    writer.join()


def _follow(incoming: "SimpleQueue[Message | None]", out: "SimpleQueue[Message | None]") -> None:
    begin = incoming.get()
    if begin is None:
        return
    tracker = Tracker(begin["begin"], out)
    for message in iter(incoming.get, None):
        for what, arguments in message.items():
            getattr(tracker, what)(**arguments)
        if "finish" in message:
            return
    tracker.finish(exit_code=1)


if __name__ == "__main__":
    main()

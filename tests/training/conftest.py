"""Trainings on the packaged model, small enough to run many."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from paths import ROOT
from raw import ingest
from training.models import CONFIGS, VOCABULARIES, save_model

from finetune_assets.config.loading import load_experiment
from finetune_assets.config.schema import ExperimentConfig, Tokenization
from finetune_assets.data.prepare import prepare_dataset
from finetune_assets.data.tokenization import load_tokenizer
from finetune_assets.sources.base_models import PACKAGED
from finetune_assets.sources.local import SAMPLE
from finetune_assets.training import precision
from finetune_assets.training.distributed import DistributedContext
from finetune_assets.training.precision import INSTRUCTIONS, MatrixRates
from finetune_assets.training.recipe import LoraFinetune
from finetune_assets.training.reporting import Reporter
from finetune_assets.training.state import TrainingPaths

ALONE = DistributedContext(rank=0, world=1, device=torch.device("cpu"))
FAST, SLOW = MatrixRates(bf16=158.0, fp32=57.0), MatrixRates(bf16=57.0, fp32=57.0)
"""Matrix rates that confirm and refute what a CPU's bfloat16 instructions promise."""
MADE_FROM = {"fingerprint": "f" * 64, "experiment": "demo", "base_model": "packaged/demo-base", "revision": "r"}
BASE: Path = PACKAGED["demo-base"]


def configured(*overrides: str) -> ExperimentConfig:
    return load_experiment(ROOT / "configs", "demo", ["training.max_steps=3", *overrides]).config


@pytest.fixture(autouse=True)
def without_bf16_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is float32 in this process, also on a machine whose CPU has instructions for bfloat16."""
    hidden = {**torch.cpu.get_capabilities(), **dict.fromkeys(INSTRUCTIONS, False)}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: hidden)


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[tuple[int, int]]]]:
    """Fakes a CPU's capabilities and measured rates; the shapes that are measured."""

    def fake(*capabilities: str, rates: MatrixRates = FAST) -> list[tuple[int, int]]:
        measured: list[tuple[int, int]] = []

        def measuring(*shape: int) -> MatrixRates:
            measured.append(shape)  # type: ignore[arg-type]
            return rates

        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(capabilities, True))
        monkeypatch.setattr(precision, "measure", measuring)
        precision._of_this_cpu.cache_clear()
        return measured

    yield fake
    precision._of_this_cpu.cache_clear()


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes tokenized datasets of 80 rows, each kind once."""
    raw = tmp_path_factory.mktemp("raw")
    rows = ingest(raw, SAMPLE)
    made: dict[str, Path] = {}

    def make(tokenization: Tokenization) -> Path:
        kind = repr(tokenization)
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("dataset")
            data = configured("data.num_samples=80").data
            data.tokenization = tokenization
            tokenizer = load_tokenizer(str(BASE), tokenization.added_tokens)
            prepare_dataset(rows, tokenizer, data, "salt", made[kind])
        return made[kind]

    return make


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of base models, each made once: `packaged`, or a tiny random one of `models.py`."""
    made = {"packaged": BASE}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = save_model({**CONFIGS, **VOCABULARIES}[name], tmp_path_factory.mktemp(name))
        return made[name]

    return make


def make_run(
    folder: Path, dataset: Callable[..., Path], *overrides: str, base: Path = BASE, warm_start: Path | None = None
) -> LoraFinetune:
    """A training that is ready to run, with its output and checkpoints below `folder`."""
    config = configured(*overrides)
    output = folder / "output"
    output.mkdir(parents=True, exist_ok=True)
    job = TrainingPaths(base, dataset(config.data.tokenization), output, folder / "scratch", MADE_FROM, warm_start)
    return LoraFinetune(job, config, ALONE, Reporter(print))


@pytest.fixture
def finetune(dataset: Callable[..., Path], tmp_path: Path) -> Callable[..., LoraFinetune]:
    """Makes trainings; `name` keeps their folders apart."""

    def make(*overrides: str, name: str = "run", warm_start: Path | None = None, base: Path = BASE) -> LoraFinetune:
        return make_run(tmp_path / name, dataset, *overrides, base=base, warm_start=warm_start)

    return make


@dataclass(frozen=True)
class FinishedRun:
    """A training that has ended, shared by the tests of a session.

    Attributes:
        run: The training; its log, model and output folder are only to be read.
        printed: The lines that it reported.
        files: Size and time of change of every file that it left.
    """

    run: LoraFinetune
    printed: list[str]
    files: dict[Path, tuple[int, int]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", self.current_files())

    def current_files(self) -> dict[Path, tuple[int, int]]:
        folder = self.run.job.output.parent
        stats = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
        return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


_FINISHED: dict[tuple[object, ...], FinishedRun] = {}


@pytest.fixture
def trained(
    dataset: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., FinishedRun]]:
    """Runs each training once a session; a test that changes the files of one fails."""
    used: list[FinishedRun] = []

    def make(*overrides: str, base: Path = BASE, warm_start: Path | None = None) -> FinishedRun:
        key = (overrides, base, warm_start)
        if key not in _FINISHED:
            run = make_run(tmp_path_factory.mktemp("trained"), dataset, *overrides, base=base, warm_start=warm_start)
            printed: list[str] = []
            run.reporter.write_line = printed.append
            run.run()
            _FINISHED[key] = FinishedRun(run, printed)
        used.append(_FINISHED[key])
        return _FINISHED[key]

    yield make
    for finished in used:
        assert finished.current_files() == finished.files, "this test changed a training that other tests read"

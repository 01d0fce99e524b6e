"""Dagster definitions, loaded by `workspace.yaml`.

Neither this module nor its imports load torch, transformers, peft, bitsandbytes or datasets.
"""

import warnings
from pathlib import Path

import dagster as dg
from dagster import BetaWarning, PreviewWarning

from finetune_assets.assets.adapter_evaluation import adapter_evaluation
from finetune_assets.assets.cached_base_model import cached_base_model
from finetune_assets.assets.champion_adapter import champion_adapter
from finetune_assets.assets.dolly_raw import dolly_raw
from finetune_assets.assets.experiment_report import experiment_report
from finetune_assets.assets.lora_adapter import lora_adapter
from finetune_assets.assets.merged_model import merged_model
from finetune_assets.assets.retrieval_index import retrieval_index
from finetune_assets.assets.served_adapter import served_adapter
from finetune_assets.assets.stacked_adapter import stacked_adapter
from finetune_assets.assets.tokenized_dataset import tokenized_dataset
from finetune_assets.assets.training_plan import training_plan
from finetune_assets.automation.alert_sensors import alert_on_failure, alert_on_standstill
from finetune_assets.automation.dead_runs import dead_runs_sensor
from finetune_assets.automation.documents import documents_sensor
from finetune_assets.automation.experiments import experiments_sensor
from finetune_assets.automation.raw_data import raw_data_schedule, raw_data_sensor
from finetune_assets.automation.serving import serving_sensor
from finetune_assets.launch.engines import Launcher
from finetune_assets.resources.io_manager import ArtifactIOManager
from finetune_assets.resources.project import Project

# Warnings about what Dagster creates itself: a message reader, references to code, and a selection of all assets
warnings.filterwarnings("ignore", r"Function `PipesMessageReader\.expected_writer_count`", PreviewWarning)
warnings.filterwarnings("ignore", r"Class `(LocalFileCodeReference|CodeReferencesMetadataValue)`", BetaWarning)
warnings.filterwarnings("ignore", r"Function `with_source_code_references`", BetaWarning)
warnings.filterwarnings("ignore", r"Parameter `include_sources` of function `AssetSelection\.all`", BetaWarning)

PACKAGE = Path(__file__).parent
prepare_data = dg.define_asset_job(
    "prepare_data",
    selection=["dolly_raw", "cached_base_model", "tokenized_dataset"],
    description="Reads the raw data, fetches the base model, and tokenizes the rows of an experiment. Needs no GPU.",
)
train_and_evaluate = dg.define_asset_job(
    "train_and_evaluate",
    selection=["training_plan", "lora_adapter", "adapter_evaluation", "champion_adapter"],
    description="Plans, trains, evaluates and promotes the adapter of an experiment whose data is prepared.",
)


def project_definitions() -> dg.Definitions:
    """The definitions of this project."""
    project = Project.configure_at_launch()
    return dg.Definitions(
        assets=dg.with_source_code_references(
            [
                dolly_raw,
                retrieval_index,
                cached_base_model,
                tokenized_dataset,
                training_plan,
                lora_adapter,
                adapter_evaluation,
                champion_adapter,
                served_adapter,
                merged_model,
                stacked_adapter,
                experiment_report,
            ]
        ),
        sensors=[
            raw_data_sensor,
            documents_sensor,
            experiments_sensor,
            serving_sensor,
            dead_runs_sensor,
            alert_on_failure,
            alert_on_standstill,
        ],
        schedules=[raw_data_schedule],
        jobs=[prepare_data, train_and_evaluate],
        resources={
            "project": project,
            "io_manager": ArtifactIOManager(project=project, others=dg.FilesystemIOManager()),
            "launcher": Launcher(),
        },
        # Heavy steps already run in separate processes; a process per step would add 2 s to each.
        executor=dg.in_process_executor,
    )


def users_definitions() -> dg.Definitions:
    """The definitions in `defs/`, as `dg` scaffolds them in a checkout; an installed wheel has none.

    Without any, Dagster's component system is not loaded, which takes as long as Dagster itself.
    """
    own = {path.name for path in (PACKAGE / "defs").iterdir()} - {"__init__.py", "README.md", "__pycache__"}
    if not own or not (PACKAGE.parent / "pyproject.toml").is_file():
        return dg.Definitions()
    return dg.load_from_defs_folder(path_within_project=PACKAGE)


defs = dg.Definitions.merge(project_definitions(), users_definitions())

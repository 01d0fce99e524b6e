"""One partition an experiment: the names of the files in `configs/experiments/`."""

import dagster as dg

from finetune_assets.config.loading import experiment_names
from finetune_assets.resources import deployment

experiments = dg.StaticPartitionsDefinition(experiment_names(deployment.configs()))

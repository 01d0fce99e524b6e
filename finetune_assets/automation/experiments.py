"""Asks every five seconds whether an asset of a subscribed experiment is to be made."""

import warnings

import dagster as dg

from finetune_assets.resources.project import AUTOMATIC_TAG

EACH_TIME = 3
"""Dagster's daemon comes by every five seconds; a sensor with an interval of five misses every other time."""

with warnings.catch_warnings():
    warnings.simplefilter("ignore", dg.BetaWarning)  # of use_user_code_server, which conditions of one's own need
    experiments_sensor = dg.AutomationConditionSensorDefinition(
        "experiments_sensor",
        target=dg.AssetSelection.all() - dg.AssetSelection.assets("dolly_raw"),
        minimum_interval_seconds=EACH_TIME,
        default_status=dg.DefaultSensorStatus.RUNNING,
        # From the start, as rows or settings may be others by then; what is still right is taken from the store
        run_tags={AUTOMATIC_TAG: "true", "dagster/retry_strategy": "ALL_STEPS"},
        emit_backfills=False,
        use_user_code_server=True,
        description="Materializes what subscribed experiments need after new raw data, and after a new or edited file "
        "in configs/experiments/. See the Automation tab of an asset for each evaluation.",
    )

"""Sensor that evaluates the automation conditions of subscribed experiments every five seconds."""

import warnings

import dagster as dg

from finetune_assets.resources.project import AUTOMATIC_TAG

EACH_TIME = 3
"""Minimum interval in seconds. Dagster's daemon evaluates sensors every five seconds, and a sensor with an interval of
five seconds misses every other tick."""

with warnings.catch_warnings():
    warnings.simplefilter("ignore", dg.BetaWarning)  # use_user_code_server, which custom conditions require
    experiments_sensor = dg.AutomationConditionSensorDefinition(
        "experiments_sensor",
        target=dg.AssetSelection.all() - dg.AssetSelection.assets("dolly_raw", "retrieval_index"),
        minimum_interval_seconds=EACH_TIME,
        default_status=dg.DefaultSensorStatus.RUNNING,
        # Retry all steps, because rows or settings may have changed since; unchanged artifacts are cache hits
        run_tags={AUTOMATIC_TAG: "true", "dagster/retry_strategy": "ALL_STEPS"},
        emit_backfills=False,
        use_user_code_server=True,
        description="Materializes what subscribed experiments need after new raw data, and after a new or edited file "
        "in configs/experiments/. See the Automation tab of an asset for each evaluation.",
    )

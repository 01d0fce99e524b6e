"""The registry of checks of `dolly_raw`, evaluated before other assets use the data.

A check of your own is a file in this folder and an entry in RAW_CHECKS.
"""

from finetune_assets.assets.raw_checks.check import RawCheck
from finetune_assets.assets.raw_checks.files import QUARANTINE, SCHEMA
from finetune_assets.assets.raw_checks.history import DRIFT, ROW_COUNT
from finetune_assets.assets.raw_checks.quality import DUPLICATES, LEAKAGE, NEAR_DUPLICATES
from finetune_assets.assets.raw_checks.sensitive import SENSITIVE

RAW_CHECKS: tuple[RawCheck, ...] = (
    SCHEMA,
    QUARANTINE,
    DUPLICATES,
    NEAR_DUPLICATES,
    LEAKAGE,
    SENSITIVE,
    ROW_COUNT,
    DRIFT,
)
BLOCKING = {check.name for check in RAW_CHECKS if check.blocking}

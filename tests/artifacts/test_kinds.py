"""The registry of artifact kinds is complete, and Dagster reads the same code versions as fingerprints."""

import dagster as dg

from finetune_assets.artifacts.kinds import KIND_OF, KINDS, RETENTION
from finetune_assets.config.schema import StoreConfig
from finetune_assets.definitions import defs


def test_every_asset_has_a_kind_whose_code_version_dagster_shows() -> None:
    graph = defs.resolve_asset_graph()
    shown = {key.to_user_string(): graph.get(key).code_version for key in graph.get_all_asset_keys()}
    assert shown == {asset: kind.code_version for asset, kind in KIND_OF.items()}


def test_no_two_kinds_share_a_folder_or_an_asset() -> None:
    assert len({kind.folder for kind in KINDS}) == len(KINDS)
    assert len(KIND_OF) == len([kind for kind in KINDS if kind.asset])


def test_inputs_that_are_assets_are_upstream_of_the_asset() -> None:
    """But for the plan, which is made before the adapter that its fingerprint names."""
    graph = defs.resolve_asset_graph()
    for asset, kind in KIND_OF.items():
        named = {name for name in kind.inputs if name in KIND_OF}
        upstream = {key.to_user_string() for key in graph.get_ancestor_asset_keys(dg.AssetKey(asset))}
        assert named <= upstream or asset == "training_plan", asset


def test_retention_names_settings_and_kinds_that_there_are() -> None:
    settings, folders = set(vars(StoreConfig())), {kind.folder for kind in KINDS}
    for rule in RETENTION.values():
        assert {rule.newest} <= {"", *settings}
        assert {rule.with_kept} <= {"", *folders}

"""Graphs in this process."""

import pytest
from integration.graph import Graph
from projects import TestProject

from finetune_assets.plots import style


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs in this process do not rasterize their plots, a quarter of their time: tests/plots, and the graphs of the
    command line, the daemon and the browser do."""
    monkeypatch.setattr(style, "png", lambda figure: b"")


@pytest.fixture
def graph(project: TestProject) -> Graph:
    """The graph of a project of this test alone."""
    return Graph()

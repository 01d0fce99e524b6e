"""Graphs in this process."""

import pytest
from integration.graph import Graph
from projects import TestProject


@pytest.fixture
def graph(project: TestProject) -> Graph:
    """The graph of a project of this test alone."""
    return Graph()

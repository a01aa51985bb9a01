"""What all tests share: the order in which their files are dealt out."""

import pytest

LONG = ("training_processes", "readme", "bench", "cli", "processes", "evaluate", "cost", "distill_scores", "distill")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files go first, so that processes that share the files end together."""
    items.sort(
        key=lambda item: LONG.index(name) if (name := item.path.stem.removeprefix("test_")) in LONG else len(LONG)
    )

import importlib

import pytest

from tests.faults import check_counts, run_cases


@pytest.mark.parametrize(
    "part, count", [("checkpoints", 200), ("arguments", 9999), ("state", 48), ("code", 40), ("side_by_side", 40)]
)
def test_some_of_the_campaign(part, count, tmp_path):
    """`python -m tests.faults` runs all of it."""
    counts, lines = run_cases(importlib.import_module(f"tests.faults.{part}").cases(count, 0, tmp_path))
    check_counts(counts, lines)
    assert counts["clear"] + counts["harmless"] > counts.total() / 2, lines

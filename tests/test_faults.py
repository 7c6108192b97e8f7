import pytest

from tests.faults import check_counts, checkpoints, run_cases


@pytest.mark.parametrize("part, count", [(checkpoints, 300)])
def test_campaign(part, count, tmp_path):
    """Nothing is silent, late, executed or hanging; `python -m tests.faults` runs all of it."""
    check_counts(*run_cases(part.cases(count, seed=0, folder=tmp_path)))

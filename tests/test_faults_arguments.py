from tests.faults import check_counts, run_cases
from tests.faults.arguments import cases


def test_some_of_the_bad_arguments(tmp_path):
    """`python -m tests.faults arguments` tries the whole table."""
    counts, lines = run_cases(cases(400, seed=0, folder=tmp_path))
    check_counts(counts, lines)
    assert counts["clear"] > 350 and counts["unclear"] <= 2, lines

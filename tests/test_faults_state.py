"""A few of each fault of the campaign in tests/faults."""

from tests.faults import check_counts, code, run_cases, state


def test_state(tmp_path):
    check_counts(*run_cases(state.cases(60, 0, tmp_path)))


def test_code(tmp_path):
    check_counts(*run_cases(code.cases(48, 0, tmp_path)))

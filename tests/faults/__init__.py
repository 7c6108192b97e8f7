"""Fault injection: what becomes of damaged files, bad arguments, planted programs, killed runs and shared objects.

A part is a module here with `cases(count, seed, folder)`, which yields names and functions; a function makes one fault
in `folder` and returns its outcome. `python -m tests.faults` runs all and prints a table; the tests run a few of each.
"""

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator


# clear: an error at once that names the file or argument, and what to do
# harmless: the result is as without the fault
# unseen: other values, which are as good as the right ones to anyone who does not have these
# unclear: an error at once, of another type or without the name
# silent: wrong without an error; late: an error only where the result is used; executed: foreign code was run
OUTCOMES = ("clear", "harmless", "unseen", "unclear", "silent", "late", "executed", "hanging")
NEVER = ("silent", "late", "executed", "hanging")

Case = tuple[str, Callable[[], str]]


def judge(error: BaseException, *names: str) -> str:
    """Whether an error is clear: a `ValueError`, or an `OSError` that is no bare one, which has one of the names."""
    clear = isinstance(error, (ValueError, OSError)) and any(re.search(name, str(error)) for name in names)
    return "clear" if clear else "unclear"


def limited(run: Callable[[], str], seconds: float = 20.0) -> str:
    """The outcome of a case, which is "hanging" if there is none in this time."""
    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.append(run()), daemon=True)
    thread.start()
    thread.join(seconds)
    return outcomes[0] if outcomes else "hanging" if thread.is_alive() else "unclear"


def run_cases(cases: Iterator[Case]) -> tuple[Counter, list[str]]:
    """Counts of the outcomes, and a line for each case that is neither clear nor harmless nor unseen."""
    counts, lines = Counter(), []
    for name, run in cases:
        outcome = run()
        assert outcome in OUTCOMES, outcome
        counts[outcome] += 1
        if outcome in ("unclear", *NEVER):
            lines.append(f"{outcome}: {name}")
    return counts, lines


def check_counts(counts: Counter, lines: list[str]) -> None:
    """The promise: nothing silent, late, executed or hanging, and under 2 % unclear."""
    assert not any(counts[outcome] for outcome in NEVER), "\n".join(lines)
    assert counts["unclear"] < 0.02 * counts.total(), "\n".join(lines)

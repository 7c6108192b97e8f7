"""python -m tests.faults [PART ...] [--count 2000] [--seed 0]: the whole campaign, and its table."""

import argparse
import gc
import importlib
import pkgutil
import tempfile
import time
from pathlib import Path

from . import OUTCOMES, run_cases


parts = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])]
parts = [part for part in parts if not part.startswith("_")]
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("parts", nargs="*", default=parts, help=f"default: all of {', '.join(parts)}")
parser.add_argument("--count", type=int, default=2000, help="cases of a part that draws them at random")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

print("| part | cases | " + " | ".join(OUTCOMES) + " | seconds |")
print("|---" * (len(OUTCOMES) + 3) + "|")
notes = []
gc.freeze()  # trainers collect garbage, which takes a second with all that is imported
for part in args.parts:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        cases = importlib.import_module(f"tests.faults.{part}").cases(args.count, args.seed, Path(folder))
        counts, lines = run_cases(cases)
    cells = [part, counts.total(), *(counts[outcome] for outcome in OUTCOMES), f"{time.monotonic() - began:.0f}"]
    print(f"| {' | '.join(map(str, cells))} |", flush=True)
    notes += [f"{part}, {line}" for line in lines]
print(*notes, sep="\n")

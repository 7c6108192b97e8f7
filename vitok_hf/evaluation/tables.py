"""A table of codecs on one data set, as Markdown and CSV, with pictures to look at."""

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from accelerate import PartialState

from ..data.held_out import Protocol
from .evaluator import ReconstructionEvaluator, Row
from .results import Result, check_comparable, save_results
from .visuals import plot_rates, save_examples


DIGITS = {
    "psnr": 2,
    "parameters_M": 1,
    "GMACs": 1,
    "E": 0,
    "compression": 1,
    "bytes": 0,
    "above_budget": 0,
    "memory_MB": 0,
}


def _columns(results: Sequence[Result], part: str) -> list[str]:
    return list(dict.fromkeys(name for result in results for name in getattr(result, part)))


def _number(name: str, value: float | None) -> str:
    return "" if value is None else f"{value:.{DIGITS.get(name, 3)}f}"


def _compare_to_vitok_v2(result: Result) -> str:
    """What keeps from comparing with the figures of ViTok-v2 (arXiv 2605.05331), where the table looks like theirs."""
    protocol, text = result.protocol, ""
    if "rFDD" in result.metrics:
        network = protocol.networks.get("dino", {}).get("name", "another network")
        text = f"rFDD is of {network}; that of ViTok-v2, of DINOv3-B at 512 px on 5,000 pictures, is another number. "
    if protocol.crop == Protocol.vitok_v2().crop:
        text += "Crop and filter are those of ViTok-v2; it compares values that are not rounded, and its SSIM is of "
        text += "values from -1 to 1, its rFID of pictures that are brought to 299 px by an antialiased filter."
    return text.strip()


def markdown_table(results: Sequence[Result]) -> str:
    """One row a result: metrics with their confidence intervals, and costs; below it, why cells are empty.

    Raises:
        ValueError: If the results cannot be compared, see `check_comparable`.
    """
    check_comparable(results)
    metrics, costs = _columns(results, "metrics"), _columns(results, "costs")
    lines = [f"| {' | '.join(['', *metrics, *costs])} |", "|---" * (1 + len(metrics) + len(costs)) + "|"]
    for result in results:
        cells = [result.name]
        for name in metrics:
            low, high = result.intervals.get(name, (None, None))
            interval = "" if low is None else f" [{_number(name, low)}, {_number(name, high)}]"
            cells.append(_number(name, result.metrics.get(name)) + interval)
        cells += [_number(name, result.costs.get(name)) for name in costs]
        lines.append(f"| {' | '.join(cells)} |")
    reasons = dict.fromkeys(f"{name}: {text}" for result in results for name, text in result.unavailable.items())
    texts = [f"No {reason.rstrip('.')}." for reason in reasons] + [*dict.fromkeys(map(_compare_to_vitok_v2, results))]
    return "\n".join([*lines, "", *texts]).rstrip() + "\n"


def write_csv(path: str | Path, results: Sequence[Result]) -> None:
    """The same as CSV, the bounds of the intervals in columns of their own.

    Raises:
        ValueError: If the results cannot be compared, see `check_comparable`.
    """
    check_comparable(results)
    metrics, costs = _columns(results, "metrics"), _columns(results, "costs")
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        bounds = [f"{name}_{bound}" for name in _columns(results, "intervals") for bound in ("low", "high")]
        writer.writerow(["name", "data", "num_items", *metrics, *bounds, *costs])
        for result in results:
            row = [result.name, result.data, result.num_items, *(result.metrics.get(name) for name in metrics)]
            for name in _columns(results, "intervals"):
                row += result.intervals.get(name, (None, None))
            writer.writerow(row + [result.costs.get(name) for name in costs])


def file_name(title: str) -> str:
    return re.sub(r"[^\w.-]+", "_", title)


def write_table(
    rows: Iterable[Row],
    evaluator: ReconstructionEvaluator,
    output_dir: Path,
    num_examples: int,
    earlier: Sequence[Result] = (),
    is_curve: bool = False,
) -> str:
    """Measures every row; writes results, pictures and the table, with the rows `earlier` too, and returns it.

    With `is_curve`, the rows of each model are rates, of which rates.png is a plot.

    Raises:
        ValueError: If results `earlier` are of other pictures or another protocol.
    """
    is_main, folder = PartialState().is_main_process, output_dir / file_name(evaluator.data_name)
    results: list[Result] = []
    for row in rows:
        result, values = evaluator.evaluate(row)
        results.append(result)
        if is_main:
            folder.mkdir(parents=True, exist_ok=True)
            save_results(folder / "results.json", results)
            examples = folder / file_name(row.name).strip("_")
            save_examples(examples, evaluator.data, row.codec, values["psnr"], num_examples)
        check_comparable([result, *earlier])
    results += earlier
    table = markdown_table(results)
    if is_main:
        (folder / "table.md").write_text(table)
        write_csv(folder / "table.csv", results)
        if is_curve:
            plot_rates(folder / "rates.png", results)
    return table

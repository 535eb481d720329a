"""Tables for the terminal and the same figures for a file."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from curve import Curve, bound
from measure import Sample, medians, ratios
from rich.table import Table
from workload import Workload

Samples = Mapping[str, Sequence[Sample]]


def figures_table(title: str, samples: Samples) -> Table:
    """Medians over the rounds: a column for each contestant."""
    columns = {name: medians(each) for name, each in samples.items()}
    table = Table("median of a round", *columns, title=title)
    for row in dict.fromkeys(row for column in columns.values() for row in column):
        values = [column.get(row) for column in columns.values()]
        table.add_row(row, *("" if value is None else f"{value:,.2f}" for value in values))
    return table


def shares(samples: Samples, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Ratios of output tokens/s, round by round."""
    return {f"{ours} / {theirs}": ratios(samples[ours], samples[theirs]) for ours, theirs in pairs}


def shares_table(found: Mapping[str, Sequence[float]]) -> Table:
    table = Table("output tokens/s, paired", "median", "least", "most", "rounds")
    for name, values in found.items():
        cells = (f"{value:.3f}" for value in (median(values), min(values), max(values)))
        table.add_row(name, *cells, str(len(values)))
    return table


def curve_table(curve: Curve) -> Table:
    table = Table("sequences", title="stage curve, ms (half the layers, one process, one core)")
    for head in ("c(b) alone", "c(b) two at once", "p(b) alone", "p(b) two at once"):
        table.add_column(head, justify="right")
    for alone, both in zip(curve.alone, curve.together, strict=True):
        seconds = (alone.decode_s, both.decode_s, alone.prefill_s, both.prefill_s)
        table.add_row(str(alone.sequences), *(f"{value * 1e3:,.1f}" for value in seconds))
    return table


def bounds(curve: Curve, workload: Workload, ours: Sequence[Sample], one: float) -> dict[str, Any]:
    """Shares of what two stages could do; `one` is one process's output tokens/s."""
    tokens = median(sample.tokens_per_s for sample in ours)
    decode = median(sample.decode_tokens_per_s for sample in ours)
    found: dict[str, Any] = {"share of twice one core": tokens / (2 * one)}
    for name, points in (("alone", curve.alone), ("two at once", curve.together)):
        best = bound(points, workload)
        found[f"stage bound, {name}, decode tokens/s"] = best.decode_tokens_per_s
        found[f"share of stage bound, {name}"] = decode / best.decode_tokens_per_s
        found[f"ideal of the whole workload, {name}, tokens/s"] = best.tokens_per_s
        found[f"share of the ideal, {name}"] = tokens / best.tokens_per_s
    return found


def values_table(title: str, values: Mapping[str, float]) -> Table:
    table = Table("figure", "value", title=title)
    for name, value in values.items():
        table.add_row(name, f"{value:,.3f}")
    return table


def as_json(samples: Samples) -> dict[str, Any]:
    return {
        name: {"median": medians(each), "rounds": [asdict(sample) for sample in each]}
        for name, each in samples.items()
    }


def curve_json(curve: Curve) -> dict[str, Any]:
    return asdict(curve)

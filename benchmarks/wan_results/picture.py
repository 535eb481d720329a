"""One picture for each load on each link: a column of a server, how busy its parts were."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .run import Run

WIDTH, HEIGHT, DPI = 3.6, 5.0, 70  # inches of a column


def why_not() -> str | None:
    """What keeps pictures from being drawn; None if nothing does."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        return "matplotlib is not installed: pip install -e '.[bench]'"
    return None


def draw(title: str, servers: Mapping[str, Sequence[Run]], file: Path) -> None:
    """Draw the first run of each server. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH * len(servers), HEIGHT), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=9)
    axes = figure.subplots(2, len(servers), sharex="col", sharey=True, squeeze=False)
    for column, (name, runs) in enumerate(servers.items()):
        _stages(axes[0][column], runs[0])
        _links(axes[1][column], runs[0])
        axes[0][column].set_title(f"{name}: {runs[0].tokens_per_s:.0f} tokens/s", fontsize=8)
    axes[0][0].set_ylabel("stages: share of time in steps", fontsize=7)
    axes[1][0].set_ylabel("links: share of their rate", fontsize=7)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, pil_kwargs={"optimize": True})


def _stages(axes: Any, run: Run) -> None:
    times = [seen.at_s for seen in run.occupancy]
    for index in range(max((len(seen.stages) for seen in run.occupancy), default=0)):
        shares = [
            seen.stages[index] if index < len(seen.stages) else None for seen in run.occupancy
        ]
        known = [float("nan") if share is None else share for share in shares]
        axes.plot(times, known, label=f"stage {index}", linewidth=0.9)
    _dress(axes)
    if any(seen.micro_batches for seen in run.occupancy):
        right = axes.twinx()
        steps = [seen.micro_batches or float("nan") for seen in run.occupancy]
        right.step(times, steps, where="post", color="black", linewidth=0.7, linestyle=":")
        right.set_ylim(0, 17)
        right.tick_params(labelsize=6)
        right.set_ylabel("micro-batches (dotted)", fontsize=6)


def _links(axes: Any, run: Run) -> None:
    times = [seen.at_s for seen in run.occupancy]
    for way in run.link_bytes:
        axes.plot(times, [seen.links[way] for seen in run.occupancy], label=way, linewidth=0.9)
    _dress(axes)
    axes.set_xlabel("seconds", fontsize=7)


def _dress(axes: Any) -> None:
    axes.set_ylim(0, 1.1)
    axes.tick_params(labelsize=6)
    axes.grid(alpha=0.3)
    if axes.get_lines():
        axes.legend(fontsize=6, loc="lower center", ncols=2)
    else:
        where = {"ha": "center", "transform": axes.transAxes}
        axes.text(0.5, 0.5, "not known, or none", fontsize=7, **where)

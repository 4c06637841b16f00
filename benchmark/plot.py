"""Turns the tables of results into a Markdown table and learning curves.

    python benchmark/plot.py                                    # all tables in benchmark/results
    python benchmark/plot.py benchmark/results/marks.csv --labels default random-prey

Writes results/table.md: final mean returns of one agent of a side (1,000 greedy episodes; where the label ends in
`training` the last 1,000 exploring ones), with 95% intervals over seeds by Student's t. And results/TABLE_GAME.png:
learning curves, means over seeds with the same intervals, with published scores (tables.py) as lines.
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import numpy as np
from scipy import stats
from tables import ROOT, UsageError, last_point, levels, read_tables, sides

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


def interval(values: list[float]) -> tuple[float, float]:
    """Of the mean, 95%, by Student's t; nan for a single value."""
    if len(values) < 2:
        return float("nan"), float("nan")
    if np.ptp(values) == 0:  # where the t statistic is not defined
        return values[0], values[0]
    return tuple(stats.ttest_1samp(values, 0).confidence_interval(0.95))


def markdown(runs: dict) -> str:
    """The table of final results."""
    head = ["label", "game", "script", "side", "steps", "seeds", "mean return", "95% interval"]
    head += ["min", "max", "median minutes", "commit"]
    lines = [head, ["---"] * len(head)]
    for (_, script, env_id, label), seeds in runs.items():
        of_sides = {}
        for rows in seeds.values():
            for side, points in sides(rows).items():
                if last := last_point(points):
                    of_sides.setdefault(side, []).append(last)
        for side, lasts in of_sides.items():
            steps, returns, seconds = zip(*lasts, strict=True)
            done = [r for s, r in zip(steps, returns, strict=True) if s == max(steps)]
            low, high = interval(done)
            commits = sorted({row["commit"] for rows in seeds.values() for row in rows})
            missing = f" of {len(seeds)}" if len(done) < len(seeds) else ""
            cells = [
                label,
                env_id,
                script,
                side,
                f"{max(steps):,}",
                f"{len(done)}{missing}",
                f"**{np.mean(done):.2f}**",
            ]
            cells += [f"{low:.2f} to {high:.2f}" if len(done) > 1 else "-", f"{min(done):.2f}", f"{max(done):.2f}"]
            lines.append([*cells, f"{np.median(seconds) / 60:.0f}", " ".join(commits)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def curves(name: str, env_id: str, groups: dict, path: Path) -> None:
    """One picture of one game: a plot for each script and side, a line for each label."""
    plots = {}
    for (script, label), seeds in groups.items():
        for rows in seeds.values():
            for side, points in sides(rows).items():
                for (step, episodes), (value, _) in points.items():
                    if episodes < 1_000 or label.endswith("training"):
                        plots.setdefault((script, side), {}).setdefault(label, {}).setdefault(step, []).append(value)
    plots = dict(sorted(plots.items()))
    figure, all_axes = plt.subplots(1, len(plots), figsize=(5 * len(plots), 3.6), squeeze=False, layout="constrained")
    for axes, ((script, side), labels) in zip(all_axes[0], plots.items(), strict=True):
        drawn = {}
        for label, by_step in labels.items():
            steps = sorted(by_step)
            low, high = zip(*(interval(by_step[step]) for step in steps), strict=True)
            (line,) = axes.plot(
                steps, [np.mean(by_step[s]) for s in steps], label=f"{label} ({len(by_step[steps[0]])})"
            )
            axes.fill_between(steps, low, high, alpha=0.25, color=line.get_color(), linewidth=0)
            drawn |= {level: None for level in levels(script, env_id, label, side)}
        for value, whose in drawn:
            axes.axhline(value, color="gray", linewidth=0.8, linestyle="--")
            axes.text(
                1,
                value,
                whose,
                fontsize=7,
                color="dimgray",
                ha="right",
                va="bottom",
                transform=axes.get_yaxis_transform(),
            )
        seen = [value for by_step in labels.values() for values in by_step.values() for value in values] + [
            v for v, _ in drawn
        ]
        margin = 0.05 * (max(seen) - min(seen)) + 1e-3
        axes.set_ylim(min(seen) - margin, max(seen) + margin)  # the interval of two seeds may be very wide
        axes.set(title=f"{script}: {env_id}, {side}", xlabel="environment steps", ylabel="return of one agent")
        axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
        axes.legend(fontsize=7, title="label (seeds)", title_fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", type=Path, metavar="CSV")
    parser.add_argument("--labels", nargs="+", help="these labels only")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmark/results", help="where the files go")
    options = parser.parse_args(arguments)
    try:
        runs = read_tables(options.tables)
        known = sorted({key[3] for key in runs})
        if unknown := sorted(set(options.labels or ()) - set(known)):
            raise UsageError(f"there is no label {', '.join(unknown)}, the labels are {', '.join(known)}")
    except UsageError as error:
        print(f"plot.py: {error}", file=sys.stderr)
        return 2
    runs = {key: seeds for key, seeds in runs.items() if not options.labels or key[3] in options.labels}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "table.md").write_text(markdown(runs))
    pictures = {}
    for (name, script, env_id, label), seeds in runs.items():
        pictures.setdefault((name, env_id), {})[script, label] = seeds
    for (name, env_id), groups in pictures.items():
        curves(name, env_id, groups, options.output / f"{name}_{env_id.replace('/', '_')}.png")
    print((options.output / "table.md").read_text(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

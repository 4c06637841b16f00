"""Turns the tables of results into a Markdown table and learning curves.

    python benchmark/plot.py                                    # all tables in benchmark/results
    python benchmark/plot.py benchmark/results/marks.csv --labels default random-prey
    python benchmark/plot.py --ablations                        # docs/ablations.md and its picture
    python benchmark/plot.py --scenarios                        # docs/scenarios.md and its picture

Writes results/table.md: final mean returns of one agent of a side (1,000 greedy episodes; where the label ends in
`training` the last 1,000 exploring ones), with 95% intervals over seeds by Student's t. And results/TABLE_GAME.png:
learning curves, means over seeds with the same intervals, with published scores (tables.py) as lines.

Two lists have a page of their own, written from what is done so far: the tables between the markers, and a picture.
--ablations is for lists/ablations.txt; a difference is to the same game's and script's default, seed by seed, as runs
of one seed are evaluated from the same starts, with Student's interval. --scenarios is for lists/all.txt and the runs
of two other lists that are the same.
"""

import argparse
import difflib
import re
import shlex
import sys
from pathlib import Path

import matplotlib
import numpy as np
from scipy import stats
from tables import FINAL_EPISODES, ROOT, UsageError, last_point, levels, read_tables, sides

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

ABLATIONS = ROOT / "benchmark/lists/ablations.txt"
BASELINES = "default-300k", "random-prey-300k"  # labels of what the other rows of a game are compared with
SCENARIOS = {"all": "default", "ablations": "default-300k", "crossplay": "default"}  # table to label
BLOCK = re.compile(r"(<!-- begin: plot.py --\w+ -->\n).*(<!-- end -->)", re.DOTALL)


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


def draw(axes, by_step: dict[int, list[float]], label: str, **style) -> None:
    """A learning curve: means over seeds, with intervals."""
    steps = sorted(by_step)
    low, high = zip(*(interval(by_step[step]) for step in steps), strict=True)
    means = [np.mean(by_step[step]) for step in steps]
    (line,) = axes.plot(steps, means, label=f"{label} ({len(by_step[steps[0]])})", **style)
    axes.fill_between(steps, low, high, alpha=0.25, color=line.get_color(), linewidth=0)
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))


def limits(shown: list[float]) -> tuple[float, float]:
    """Of an axis, by values alone: intervals of two or three seeds may lie far outside what there is to see."""
    margin = 0.05 * np.ptp(shown) + 1e-3
    return min(shown) - margin, max(shown) + margin


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
    most = max(map(len, plots.values()))
    size = 5 * len(plots), 3.6 + (most > 5) * 0.16 * most  # more labels than fit beside the curves stand below
    figure, all_axes = plt.subplots(1, len(plots), figsize=size, squeeze=False, layout="constrained")
    for axes, ((script, side), labels) in zip(all_axes[0], plots.items(), strict=True):
        drawn = {}
        axes.set_prop_cycle(color=plt.colormaps["tab10" if len(labels) <= 10 else "tab20"].colors)
        for label, by_step in labels.items():
            draw(axes, by_step, label)
            drawn |= {level: None for level in levels(script, env_id, label, side)}
        # Untrained play too may lie far outside
        seen = [v for by_step in labels.values() for step, values in by_step.items() for v in values if step > 0]
        seen = [*(seen or [v for by_step in labels.values() for v in by_step[0]]), *(v for v, _ in drawn)]
        low, high = limits(seen)
        axes.set_ylim(low, high)
        above = np.inf
        for value, whose in sorted(drawn, reverse=True):
            axes.axhline(value, color="gray", linewidth=0.8, linestyle="--")
            close = above - value < 0.05 * (high - low)  # two close ones must not cover each other
            place, beside = "top" if close else "center", axes.get_yaxis_transform()
            axes.text(1.02, value, whose, fontsize=7, color="dimgray", va=place, transform=beside)
            above = value
        axes.set_title(f"{env_id}, {side}\n{script}", fontsize=10)
        axes.set(xlabel="environment steps", ylabel="return of one agent")
        below = dict(loc="upper center", bbox_to_anchor=(0.5, -0.17)) if most > 5 else {}
        axes.legend(fontsize=7, title="label (seeds)", title_fontsize=7, **below)
    figure.savefig(path, dpi=120, bbox_inches="tight" if most > 5 else None)
    plt.close(figure)


# ---- Ablations -------------------------------------------------------------------------------------------------------
def variant(label: str) -> str:
    return "default" if label in BASELINES else label.removeprefix("random-prey-")


def ablations(runs: dict) -> tuple[dict, dict]:
    """Of the list, by game: variant to script to a side and seed to final return of one agent of it; and what has none
    yet: script to variants.

    A game's agent is one of its first side; all runs of a game count that have as many steps as the longest.
    """
    finals, missing = {}, {}
    for line in ABLATIONS.read_text().splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        script, env_id = words[0], words[words.index("--env-id") + 1]
        label = next(word for word in words if word.startswith("label=")).removeprefix("label=")
        lasts = []
        for about, seeds in runs.items():
            if about == (ABLATIONS.stem, script, env_id, label):
                found = [(seed, *each) for seed, rows in seeds.items() for each in sides(rows).items()]
                of_side = [(seed, last_point(points)) for seed, side, points in found if side == found[0][1]]
                lasts = [(seed, *last) for seed, last in of_side if last]
        by_variant = finals.setdefault(env_id, {})
        if lasts:
            steps = max(last[1] for last in lasts)
            returns = {seed: value for seed, step, value, _ in lasts if step == steps}
            by_variant.setdefault(variant(label), {})[script] = found[0][1], returns
        else:
            missing.setdefault(env_id, {}).setdefault(script, []).append(variant(label))
    return finals, missing


def scripts_of(*games: dict) -> list[str]:
    return sorted({script for by_variant in games for by_script in by_variant.values() for script in by_script})


def differences(returns: dict[int, float], plain: dict[int, float]) -> list[float]:
    """One for each seed that both have."""
    return [returns[seed] - plain[seed] for seed in returns if seed in plain]


def is_told(values: list[float]) -> bool:
    """Whether their mean's interval leaves out 0."""
    low, high = interval(values) if values else (0, 0)
    return low > 0 or high < 0


def difference(values: list[float]) -> str:
    """Their mean with its interval; in bold where that leaves out 0."""
    if not values:
        return ""
    mean, (low, high) = f"{np.mean(values):+.2f}", interval(values)
    between = f" ({low:+.2f} to {high:+.2f})" if len(values) > 1 else ""
    return (f"**{mean}**" if is_told(values) else mean) + between


def overview(finals: dict) -> str:
    """A table of all games: the difference where it is told, a dot where it is not."""
    columns = [(env_id, script) for env_id, by_variant in finals.items() for script in scripts_of(by_variant)]
    games = {env_id: re.fullmatch(r"(?:simple_)?(.+?)(?:_v\d+)?", env_id)[1] for env_id in finals}
    head = ["variant"] + [f"{games[env_id]}, {Path(script).stem.removeprefix('maddpg_')}" for env_id, script in columns]
    lines = [head, ["---"] * len(head)]
    for name in dict.fromkeys(name for by_variant in finals.values() for name in by_variant if name != "default"):
        cells = []
        for env_id, script in columns:
            _, plain = finals[env_id].get("default", {}).get(script, ("", {}))
            _, returns = finals[env_id].get(name, {}).get(script, ("", {}))
            values = differences(returns, plain)
            cells.append(f"**{np.mean(values):+.2f}**" if is_told(values) else "·" if values else "")
        lines.append([name, *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def ablations_block(runs: dict) -> str:
    """What stands between the markers of docs/ablations.md."""
    finals, missing = ablations(runs)
    if not any(finals.values()):
        return (
            "No run is finished yet. `python benchmark/sweep.py benchmark/lists/ablations.txt` makes them,\n"
            "`python benchmark/plot.py --ablations` the tables.\n"
        )
    text = ""
    if any("default" in by_variant for by_variant in finals.values()):
        text = (
            "The difference to the default, seed by seed, where its 95% interval leaves out 0; a dot where it does\n"
            "not. Empty: not run, or no option of that script.\n\n"
            f"{overview(finals)}\n"
            "In the picture a large dot is the mean difference, filled where 0 lies outside its interval, small dots\n"
            "are the seeds'; a variant has the same row in all games, and the axes are linear from -1 to 1, beyond\n"
            "that logarithmic.\n\n"
            "![differences](ablations.png)\n\n"
        )
    text += (
        f"In the tables: means of {FINAL_EPISODES:,} greedy episodes (95% interval over seeds, number of seeds), and\n"
        "the difference to the default, seed by seed (95% interval), in bold where 0 lies outside.\n"
    )
    for env_id, by_variant in finals.items():
        if scripts := scripts_of(by_variant):
            side = next(iter(next(iter(by_variant.values())).values()))[0]
            head = ["variant"] + [c for script in scripts for c in (Path(script).stem, "difference")]
            lines = [head, ["---"] * len(head)]
            for name, by_script in by_variant.items():
                cells = [name]
                for script in scripts:
                    _, returns = by_script.get(script, ("", {}))
                    _, plain = by_variant.get("default", {}).get(script, ("", {}))
                    low, high = interval(values := [*returns.values()])
                    between = f"{low:.2f} to {high:.2f}, " if len(values) > 1 else ""
                    cells.append(f"{np.mean(values):.2f} ({between}{len(values)})" if values else "")
                    cells.append("" if name == "default" else difference(differences(returns, plain)))
                lines.append(cells)
            text += f"\n### {env_id}: return of one {side}\n\n"
            text += "".join(f"| {' | '.join(line)} |\n" for line in lines)
        if left := [f"{Path(script).stem} {', '.join(names)}" for script, names in missing.get(env_id, {}).items()]:
            text += f"\nVariants not run yet, or not to the end, in {env_id}: {'; '.join(left)}.\n"
    return text


def ablations_picture(runs: dict, path: Path) -> None:
    """Plots of every game that has its default, one for each script: the tables' differences, each seed's a small dot,
    their mean a large one, filled where its interval leaves out 0. A variant has the same row in all games."""
    finals = {env_id: by_variant for env_id, by_variant in ablations(runs)[0].items() if "default" in by_variant}
    shown = {}  # script to game to variant to each seed's difference
    for script in scripts_of(*finals.values()):
        for env_id, by_variant in finals.items():
            _, plain = by_variant["default"].get(script, ("", {}))
            variants = {name: differences(by[script][1], plain) for name, by in by_variant.items() if script in by}
            of_game = {name: values for name, values in variants.items() if name != "default" and values}
            shown.setdefault(script, {})[env_id] = of_game
    names = {script: list(dict.fromkeys(sum(map(list, by_game.values()), []))) for script, by_game in shown.items()}
    heights = [1 + 0.22 * len(rows) for rows in names.values()]
    size = 1.5 + 4.5 * len(finals), sum(heights)
    figure, all_axes = plt.subplots(
        len(shown), len(finals), figsize=size, height_ratios=heights, sharey="row", squeeze=False, layout="constrained"
    )
    for axes_of_script, (script, by_game) in zip(all_axes, shown.items(), strict=True):
        for axes, (env_id, variants) in zip(axes_of_script, by_game.items(), strict=True):
            axes.set(title=f"{Path(script).stem}: {env_id}", xlabel="final return of one agent less the default's")
            for name, values in variants.items():
                y = names[script].index(name)
                axes.hlines(y, *interval(values), color="C0")
                axes.plot(np.mean(values), y, "o", color="C0", markerfacecolor="C0" if is_told(values) else "white")
                axes.plot(values, [y] * len(values), ".", color="black", markersize=3)
            axes.axvline(0, color="gray", linewidth=0.8, linestyle="--")
            seen = [-1, 1, *sum(variants.values(), [])]
            axes.set_xscale("symlog", linthresh=1)  # from -1 to 1 linear: most differences are small, a few huge
            axes.set_xticks(ticks := [-100, -30, -10, -3, -1, -0.5, 0, 0.5, 1, 3, 10], [f"{tick:g}" for tick in ticks])
            axes.grid(alpha=0.3)
            axes.set_xlim(1.5 * min(seen), 1.5 * max(seen))  # an interval may be wider
        axes.set_yticks(range(len(names[script])), names[script], fontsize=8)
        axes.set_ylim(max(len(names[script]), 1) - 0.5, -0.5)  # from the top down, also where only the default has run
    figure.savefig(path, dpi=100)
    plt.close(figure)


# ---- All scenarios ---------------------------------------------------------------------------------------------------
def scenarios(runs: dict) -> dict[str, dict]:
    """Game to side to script to (step, episodes) to seed to the return of one agent."""
    found = {}
    for (table, script, env_id, label), seeds in runs.items():
        for seed, rows in seeds.items() if SCENARIOS.get(table) == label else ():
            for side, points in sides(rows).items():
                by_point = found.setdefault(env_id, {}).setdefault(side, {}).setdefault(script, {})
                for at, (value, _) in points.items():
                    by_point.setdefault(at, {})[seed] = value
    return dict(sorted(found.items()))


def scenarios_block(runs: dict) -> str:
    """What stands between the markers of docs/scenarios.md: untrained networks and the ends of runs, for each side."""
    head = ["game", "side", "script", "untrained", "trained", "95% interval", "seeds"]
    lines = [head, ["---"] * len(head)]
    for env_id, of_sides in scenarios(runs).items():
        for side, scripts in of_sides.items():
            for script, by_point in sorted(scripts.items()):
                step, episodes = max(by_point)
                if episodes >= FINAL_EPISODES:
                    ended = by_point[step, episodes]  # seeds, others may be on their way
                    before, after = [by_point[min(by_point)][seed] for seed in ended], list(ended.values())
                    low, high = interval(after)
                    between = f"{low:.1f} to {high:.1f}" if len(after) > 1 else ""
                    kind = Path(script).stem.removeprefix("maddpg_")
                    cells = [env_id, side, kind, f"{np.mean(before):.1f}", f"{np.mean(after):.1f}", between]
                    lines.append([*cells, str(len(after))])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n![learning curves](scenarios.png)\n"


def scenarios_picture(runs: dict, path: Path) -> None:
    """Small learning curves, one plot for each game and side, a line for each script."""
    plots = [(env_id, *of) for env_id, of_sides in scenarios(runs).items() for of in of_sides.items()]
    columns, rows = 4, -(-len(plots) // 4)
    size = 3 * columns, 2.3 * rows
    figure, all_axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axes in all_axes.flat[len(plots) :]:
        axes.remove()
    for axes, (env_id, side, scripts) in zip(all_axes.flat, plots, strict=False):
        seen = []
        for script, by_point in sorted(scripts.items()):
            curve = {step: values for (step, episodes), values in by_point.items() if episodes < FINAL_EPISODES}
            by_step = {step: list(values.values()) for step, values in curve.items()}
            kind = Path(script).stem.removeprefix("maddpg_")
            draw(axes, by_step, kind, color={"continuous": "C0", "discrete": "C1"}[kind])
            seen += [value for values in by_step.values() for value in values]
        axes.set_ylim(limits(seen))
        axes.set_title(f"{env_id}, {side}", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=6)
    figure.savefig(path, dpi=100)
    plt.close(figure)


# ---- The pages -------------------------------------------------------------------------------------------------------
def write_page(name: str, runs: dict, folder: Path) -> None:
    """docs/NAME.md, what stands between its markers, and docs/NAME.png."""
    block, picture = {
        "ablations": (ablations_block, ablations_picture),
        "scenarios": (scenarios_block, scenarios_picture),
    }[name]
    page = folder / f"{name}.md"
    if not page.exists() or not BLOCK.search(page.read_text()):
        raise UsageError(f"{page} has no block that begins with <!-- begin: plot.py --{name} -->")
    text = block(runs)
    page.write_text(BLOCK.sub(lambda found: found[1] + text + found[2], page.read_text()))
    if f"({name}.png)" in text:
        picture(runs, folder / f"{name}.png")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", type=Path, metavar="CSV")
    parser.add_argument("--labels", nargs="+", help="these labels only")
    parser.add_argument("--ablations", action="store_true", help="the page of lists/ablations.txt instead")
    parser.add_argument("--scenarios", action="store_true", help="the page of lists/all.txt instead")
    parser.add_argument("--output", type=Path, help="where the files go; default: benchmark/results, or docs")
    options = parser.parse_args(arguments)
    page = "ablations" if options.ablations else "scenarios" if options.scenarios else None
    output = options.output or ROOT / ("docs" if page else "benchmark/results")
    try:
        runs = read_tables(options.tables)
        if page:
            write_page(page, runs, output)
            return 0
        known = sorted({key[3] for key in runs})
        if unknown := sorted(set(options.labels or ()) - set(known)):
            near = difflib.get_close_matches(unknown[0], known, cutoff=0)
            raise UsageError(f"there is no label {', '.join(unknown)}; the nearest to the first are {', '.join(near)}")
    except UsageError as error:
        print(f"plot.py: {error}", file=sys.stderr)
        return 2
    if options.labels:
        runs = {key: seeds for key, seeds in runs.items() if key[3] in options.labels}
    elif not options.tables:
        runs = {key: seeds for key, seeds in runs.items() if key[0] not in ("ablations", "all")}
    output.mkdir(parents=True, exist_ok=True)
    (output / "table.md").write_text(markdown(runs))
    pictures = {}
    for (name, script, env_id, label), seeds in runs.items():
        pictures.setdefault((name, env_id), {})[script, label] = seeds
    for (name, env_id), groups in pictures.items():
        curves(name, env_id, groups, output / f"{name}_{env_id.replace('/', '_')}.png")
    print((output / "table.md").read_text(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

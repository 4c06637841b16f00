"""What the policies do in the game, beside their returns, and how soon they reach the published scores.

    python benchmark/physical.py                                # all runs in benchmark/runs, all tables of results
    python benchmark/physical.py benchmark/runs/*spread* --episodes 1000

Plays saved models greedily with mpe2's `benchmark_data` and writes results/physical.csv, a row for each run and
quantity, means over the episodes, sums over their steps; rows of other runs, whose models may be gone, stay:

    simple_spread             distance     of the landmarks to the nearest agent, summed over landmarks
                              collisions   touches, summed over agents, so that each counts twice
    simple_tag                touches      of predators and prey, summed over predators
    simple_speaker_listener   solved       1 where the mean return is -8 (continuous) or -9.5 (discrete) or more, else 0

and results/reached.csv: the step and wall-clock time at which each published score (tables.py) was reached, by seed,
the first of two evaluations in a row that are at or above it, since one of 100 episodes may be lucky, or else the last
one, of 1,000 if the run is done. Empty where that is below.
"""

import argparse
import csv
import functools
import itertools
import json
import sys
from pathlib import Path

import numpy as np
from crossplay import Player
from tables import ROOT, UsageError, count, levels, read_tables, sides

SOLVED = {"maddpg_continuous": -8.0, "maddpg_discrete": -9.5}


def measure(run: Player, episodes: int, seed: int) -> dict[str, float]:
    """The quantities of one run."""
    script, env_id, seen = run.script, run.args.env_id, []
    wanted = env_id.startswith(("simple_spread", "simple_tag", "simple_speaker_listener"))
    if not wanted:
        return {}
    kwargs = json.loads(run.args.env_kwargs) | {"benchmark_data": True}
    relaxed = getattr(run.args, "relaxed", True)
    games = script.Games(functools.partial(script.make_game, env_id, kwargs, continuous_actions=relaxed), 10)
    for game in games.games:  # take down the data that come with every step
        step = game.step

        def watched(actions, step=step):
            result = step(actions)
            seen.append([result[4][agent]["benchmark_data"] for agent in run.agents])
            return result

        game.step = watched
    returns, steps = script.evaluate(run.networks, games, episodes, seed, run.networks.random_agents)
    played = steps / games.games[0].unwrapped.max_cycles  # episodes, as many as asked for or a few more
    if env_id.startswith("simple_spread"):
        data = np.array(seen, float)  # steps, agents, (reward, collisions, distance, occupied landmarks)
        return {"distance": data[:, 0, 2].sum() / played, "collisions": data[:, :, 1].sum() / played}
    if env_id.startswith("simple_tag"):
        return {"touches": np.array(seen, float).sum() / played}
    return {"solved": float(returns[:, 0].mean() >= SOLVED[script.__name__])}


def reached(runs: dict) -> list[list]:
    """Rows of reached.csv."""
    rows = []
    for (name, script, env_id, label), seeds in runs.items():
        for seed, of_run in sorted(seeds.items()):
            for side, points in sides(of_run).items():
                curve = [(at[0], mean, f"{time:.1f}") for at, (mean, time) in sorted(points.items())]
                for value, whose in levels(script, env_id, label, side):
                    twice = [
                        (step, seconds)
                        for (step, mean, seconds), (_, then, _) in itertools.pairwise([*curve, curve[-1]])
                        if min(mean, then, curve[-1][1]) >= value
                    ]
                    step, seconds = twice[0] if twice else ("", "")
                    rows.append([name, script, env_id, label, seed, side, whose, f"{value:.2f}", step, seconds])
    return rows


def write(path: Path, columns: str, rows: list[list]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([columns.split(","), *rows])
    print(f"{path}: {len(rows)} rows")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--tables", nargs="*", type=Path, default=[], metavar="CSV", help="default: all in results")
    parser.add_argument("--episodes", type=count, default=1_000)
    parser.add_argument("--seed", type=int, default=30_000, help="of the episodes")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmark/results", help="where the files go")
    options = parser.parse_args(arguments)
    done = [path.parent for path in sorted((ROOT / "benchmark/runs").glob("*/final.json"))]
    folders = options.runs or [folder for folder in done if not (folder / "scripts").exists()]  # patched: not these
    rows = []
    try:
        import torch

        torch.set_num_threads(1)
        for folder in folders:
            run = Player(folder)
            for quantity, value in measure(run, options.episodes, options.seed).items():
                about = [f"{run.script.__name__}.py", run.args.env_id, folder.name, run.args.seed]
                about += [run.args.total_timesteps, " ".join(run.args.random_agents)]
                rows.append([*about, quantity, f"{value:.4f}", options.episodes])
        path, names = options.output / "physical.csv", {folder.name for folder in folders}
        before = list(csv.reader(path.read_text().splitlines()))[1:] if path.exists() else []
        columns = "script,env_id,run,seed,total_timesteps,random_agents,quantity,value,episodes"
        write(path, columns, [row for row in before if row[2] not in names] + rows)
        columns = "table,script,env_id,label,seed,side,score_of,score,global_step,wall_clock_s"
        write(options.output / "reached.csv", columns, reached(read_tables(options.tables)))
    except UsageError as error:
        print(f"physical.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

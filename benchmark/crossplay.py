"""Lets one run's side play against another's: every pair of seeds, greedy.

    python benchmark/crossplay.py --ours RUN [RUN ...] --theirs RUN [RUN ...]
    python benchmark/crossplay.py --maddpg RUN [RUN ...] --ddpg RUN [RUN ...] --episodes 1000

A side is the agents whose names differ in their number only, such as adversary_0 and adversary_1 against agent_0; a
game must have two. RUN is a run folder with model.pt, or a folder of sweep.py that holds one. Runs must be of one
script, game and network size.

The first form plays each side of --ours against the other side of --theirs, and the other way round. The second makes
the paper's 2 x 2 table: who plays the first side, who the second. Where both learned together in one run, as in
lists/crossplay.txt, give the runs whose first, and whose second side is meant:

    python benchmark/crossplay.py --first maddpg RUN RUN --first ddpg RUN --second maddpg RUN --second ddpg RUN RUN

The 95% interval (Student's t) is over runs, not pairs, which share runs: over the first or the second side's, whichever
is wider, each averaged over whom it met. Where there is one pair it is over the episodes.
Rows are appended to results/crossplay_pairs.csv.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

import numpy as np
from plot import interval
from tables import ROOT, UsageError, count, load_script, side_of

COLUMNS = ["env_id", "side", "first", "second", "pairs", "episodes", "episodic_return", "low", "high", "runs"]


class Player:
    """The saved networks of a run."""

    def __init__(self, folder: Path):
        found = [folder / "model.pt"] if (folder / "model.pt").exists() else sorted(folder.glob("runs/*/model.pt"))
        if not found:
            raise UsageError(f"there is no model.pt in {folder}")
        import torch

        try:
            kind = torch.load(found[-1], weights_only=True)["kind"].split()[0]
            self.script = load_script(kind)
            saved = self.script.load(str(found[-1].parent), "model.pt")
            self.args = self.script.Args(**saved["args"] | {"cuda": False})
        except Exception as error:
            raise UsageError(f"{found[-1]}: {error}".splitlines()[0]) from error
        self.folder, self.agents = found[-1].parent, saved["agents"]
        soft = saved["args"].get("relaxed") and self.args.gumbel_temperature
        self.game = kind, self.args.env_id, json.loads(self.args.env_kwargs), soft
        self.games = self.script.Games(self.script.game_maker(self.args), 10)
        self.networks = self.script.Networks(self.games, self.args)
        try:
            self.networks.load_state_dict(saved["networks"])
        except RuntimeError as error:
            raise UsageError(f"{found[-1]} is of another version of {kind}.py, see the commit of its rows") from error
        self.sides = list(dict.fromkeys(map(side_of, self.agents)))


def join(first: Player, second: Player):
    """Networks with the first side's rows from `first` and the others from `second`."""
    import torch

    if first.game != second.game or first.args.hidden_dim != second.args.hidden_dim:
        raise UsageError(f"{first.folder} and {second.folder} differ in script, game, network size or --relaxed")
    if len(first.sides) != 2:
        raise UsageError(f"{first.args.env_id} has the sides {', '.join(first.sides)}, cross-play needs two")
    networks = first.script.Networks(first.games, first.args)
    is_first = torch.tensor([side_of(agent) == first.sides[0] for agent in first.agents])
    parts = [player.networks.actor.state_dict() for player in (first, second)]
    rows = {name: is_first.view(-1, *[1] * (value.dim() - 1)) for name, value in parts[0].items()}
    mixed = {name: torch.where(rows[name], value, parts[1][name]) for name, value in parts[0].items()}
    networks.actor.load_state_dict(mixed)
    at_random = [p.script.match_agents(p.args.random_agents, p.agents) for p in (first, second)]
    return networks, torch.where(is_first, *at_random)


def play(firsts: list[Player], seconds: list[Player], episodes: int, seed: int) -> dict[str, np.ndarray]:
    """Returns of one agent of each side: [first runs, second runs, episodes]."""
    results = {}
    for first in firsts:
        for second in seconds:
            networks, at_random = join(first, second)
            at_random = at_random if at_random.any() else None
            returns, _ = first.script.evaluate(networks, first.games, episodes, seed, at_random)
            for side in first.sides:
                values = returns[:, [side_of(agent) == side for agent in first.agents]].mean(1)
                results.setdefault(side, []).append(values)
    return {side: np.reshape(values, (len(firsts), len(seconds), -1)) for side, values in results.items()}


def widest(values: np.ndarray) -> tuple[float, float]:
    """The wider of the intervals over the first and over the second runs, each averaged over whom they met."""
    if values.shape[:2] == (1, 1):
        return interval(values[0, 0].tolist())
    found = [interval(values.mean((1 - axis, 2)).tolist()) for axis in (0, 1) if values.shape[axis] > 1]
    return max(found, key=lambda bounds: bounds[1] - bounds[0])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--ours", "--theirs", "--maddpg", "--ddpg"):
        parser.add_argument(name, nargs="+", type=Path, default=[], metavar="RUN")
    for name in ("--first", "--second"):
        parser.add_argument(name, nargs="+", action="append", default=[], metavar=("NAME", "RUN"))
    parser.add_argument("--episodes", type=count, default=1_000, help="of each pair of runs")
    parser.add_argument("--seed", type=int, default=20_000, help="of the episodes")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmark/results/crossplay_pairs.csv")
    options = parser.parse_args(arguments)
    groups = {n: getattr(options, n) for n in ("ours", "theirs", "maddpg", "ddpg") if getattr(options, n)}
    try:
        import torch

        torch.set_num_threads(1)
        for names in ([name for name, *_ in side] for side in (options.first, options.second)):
            if len(set(names)) < len(names):
                raise UsageError(f"a name stands for all runs of its side, give each once: {', '.join(names)}")
        first = {name: list(map(Path, runs)) for name, *runs in options.first} or groups
        second = {name: list(map(Path, runs)) for name, *runs in options.second} or groups
        if not all([*first.values(), *second.values()]) or not first or not second:
            raise UsageError("give runs with --ours and --theirs, --maddpg and --ddpg, or --first and --second")
        players = {p: Player(p) for p in [*sum(first.values(), []), *sum(second.values(), [])]}
        print(f"{'first side':14}{'second side':14}{'side':12}{'pairs':>6}{'return of one agent':>22}")
        for a, runs_a in first.items():
            for b, runs_b in second.items():
                if {a, b} in ({"ours"}, {"theirs"}):
                    continue
                sides = play([players[p] for p in runs_a], [players[p] for p in runs_b], options.episodes, options.seed)
                runs = " ".join(players[p].folder.name for p in [*runs_a, *runs_b])
                for side, values in sides.items():
                    low, high = widest(values)
                    mean, pairs = values.mean(), len(runs_a) * len(runs_b)
                    print(f"{a:14}{b:14}{side:12}{pairs:6}{mean:10.2f} ({low:.2f} to {high:.2f})")
                    game, numbers = players[runs_a[0]].args.env_id, [f"{x:.4f}" for x in (mean, low, high)]
                    write(options.output, [game, side, a, b, pairs, options.episodes, *numbers, runs])
    except UsageError as error:
        print(f"crossplay.py: {error}", file=sys.stderr)
        return 2
    return 0


def write(path: Path, row: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with open(path, "a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, row] if new else [row])


if __name__ == "__main__":
    sys.exit(main())

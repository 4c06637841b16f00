"""The tables of results: what sweep.py writes, from the event files of the runs, and the other programs read."""

import argparse
import csv
import importlib.util
import json
import math
import os
import re
import statistics
import sys
from collections import deque
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ["script", "env_id", "label", "seed", "global_step", "wall_clock_s"]
COLUMNS += ["agent", "episodic_return", "episodes", "commit"]
FINAL_EPISODES, FINAL_SEED = 1_000, 10_000  # of the last evaluation: episodes, and what is added to the run's seed
WINDOW = 25  # points of charts/episodic_return in a row of relaxed-training: of 1,000 steps or 40 episodes of mpe2 each


class UsageError(Exception):
    """A mistake of the user's, in one line. The commands exit with status 2."""


def count(text: str) -> int:
    """An argparse type: a whole number of things, at least one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, not {text}")
    return int(text)


def append(path: Path, columns: list[str], lines: list[list]) -> None:
    """Lines at the end of a CSV, which begins with the names of its columns."""
    begins = not path.exists()
    with open(path, "a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([columns] * begins + lines)


def load_script(name: str, folder: Path = ROOT):
    """The module of one of the two scripts, or of its copy elsewhere, which can import the repository's games."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    if folder == ROOT:
        return importlib.import_module(Path(name).stem)
    spec = importlib.util.spec_from_file_location(str(folder / Path(name).stem), folder / name)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Table:
    """A CSV of results. Whole rows are written at a time, and no row twice, by one process; others are `readers`."""

    def __init__(self, path: Path, reader: bool = False):
        try:
            self.path, self.rows, text = path, {}, path.read_text() if path.exists() else ""
        except UnicodeDecodeError as error:
            raise UsageError(f"{path} is no table: {error}") from error
        whole = text[: text.rfind("\n") + 1]  # a row that was being written when all ended has no line end
        for number, row in enumerate(csv.reader(whole.splitlines()), 1):
            if row != COLUMNS if number == 1 else not self.is_row(row):
                raise UsageError(f"{path}:{number}: this is no row of {','.join(COLUMNS)}")
            if number > 1:
                self.rows.setdefault(self.key(row), row)
        if not reader and (text != whole or not whole):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.rewrite()

    @staticmethod
    def is_row(row: list[str]) -> bool:
        if len(row) != len(COLUMNS):
            return False
        values = dict(zip(COLUMNS, row, strict=True))
        try:
            _ = [int(values[name]) for name in ("seed", "global_step", "episodes")]
            return all(math.isfinite(float(values[name])) for name in ("wall_clock_s", "episodic_return"))
        except ValueError:
            return False

    @staticmethod
    def key(row: list) -> tuple:
        values = dict(zip(COLUMNS, map(str, row), strict=True))
        return tuple(values[name] for name in COLUMNS if name not in ("wall_clock_s", "episodic_return", "commit"))

    def append(self, rows: list[list]) -> None:
        new = {self.key(row): list(map(str, row)) for row in rows if self.key(row) not in self.rows}
        if new:
            self.rows |= new
            with open(self.path, "ab", buffering=0) as file:  # one write for all of them
                file.write("".join(",".join(row) + "\n" for row in new.values()).encode())
                os.fsync(file.fileno())

    def remove(self, *run: str) -> None:
        """Removes the rows of a script, game, label and seed."""
        kept = {key: row for key, row in self.rows.items() if key[:4] != run}
        if len(kept) < len(self.rows):
            self.rows = kept
            self.rewrite()

    def rewrite(self) -> None:
        new = self.path.with_suffix(".tmp")
        new.write_text("".join(",".join(row) + "\n" for row in [COLUMNS, *self.rows.values()]))
        new.replace(self.path)


class Curve:
    """The points in the event files of a run, read further with every `read`: (tag, step) to (value, seconds)."""

    def __init__(self, folder: Path):
        self.folder, self.files, self.points, self.step = folder, {}, {}, 0

    def read(self) -> None:
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

        for path in sorted(self.folder.glob("runs/*/events.out.tfevents.*")):
            state = self.files.setdefault(path, {"loader": LegacyEventFileLoader(str(path)), "offset": 0.0})
            for event in state["loader"].Load():
                first = state.setdefault("first", event.wall_time)
                if event.HasField("session_log"):  # the run went on from a checkpoint before this step
                    before = [seconds for (_, step), (_, seconds) in self.points.items() if step < event.step]
                    state["offset"] = max(before, default=0.0)
                for value in event.summary.value:
                    if value.HasField("simple_value"):
                        self.step = event.step
                        point = value.simple_value, state["offset"] + event.wall_time - first
                        self.points[value.tag, event.step] = point


def result_rows(run, label: str) -> list[list]:
    """The rows of a `Run` of sweep.py so far, by step."""
    tag, rows, training = "eval/episodic_return", [], label.endswith("training")
    if training:
        tag = "charts/episodic_return"
    points = [(step, name, *point) for (name, step), point in run.curve.points.items() if name.startswith(tag)]
    windows = {}
    for step, name, value, seconds in sorted(points):
        agent, episodes = name.removeprefix(tag).strip("/") or "sum", run.eval_episodes
        if training:
            windows.setdefault(agent, deque(maxlen=WINDOW)).append(value)
            if len(windows[agent]) < WINDOW or step % (WINDOW * 1_000) >= 1_000:
                continue
            value, episodes = sum(windows[agent]) / WINDOW, 40 * WINDOW
        rows.append([step, seconds, agent, value, episodes])
    final = run.folder / "final.json"
    if final.exists() and not training:
        last = json.loads(final.read_text())
        seconds = max(seconds for _, _, _, seconds in points)
        rows += [[last["step"], seconds, agent, value, FINAL_EPISODES] for agent, value in last["returns"].items()]
    about = run.script, run.env_id, label, run.seed
    return [[*about, step, f"{s:.1f}", agent, f"{value:.4f}", n, run.commit] for step, s, agent, value, n in rows]


# ---- Reading ---------------------------------------------------------------------------------------------------------
# Published scores of games in which all agents want the same, or the opponent is fixed, converted to this environment:
# script, game, how the label begins, side (as in `sides`), return of one agent, whose and after how many steps, source.
# On GitHub: openai/maddpg, google/maddpg-replication, wsjeon/maddpg-rllib, uoe-agents/epymarl, agi-brain/xuance,
# PKU-MARL/HARL, legalaspro/maddpg-zoo-torch. simple_spread of OpenAI's environment and of EPyMARL pays each agent
# -(3 G + C + 75) an episode, with G the summed distances and C the contacts, mpe2 -(3 G + C) / 6 on average; in mpe2 a
# position follows a step later, for which another 1.2 is taken off, but of google's logs beside relaxed actions. It
# costs two policies that played in both 0.8 (results/lag.csv). Those logs have -40 and -33 for DDPG, sum of 3 agents,
# which no picture shows.
LEVELS = [
    ("continuous", "simple_spread_v3", "", "agent", -9.0, "XuanCe MADDPG, 5M", "XuanCe's benchmark curves, 5 seeds"),
    ("continuous", "simple_spread_v3", "", "agent", -10.2, "legalaspro, 1.5M", "maddpg-zoo-torch's data, 1 seed"),
    ("continuous", "simple_spread_v3", "", "agent", -8.1, "script: i to landmark i", "simulated on mpe2 1.1.1"),
    ("discrete", "simple_spread_v3", "", "agent", -12.1, "openai/maddpg, 1.5M", "maddpg-rllib's plots, 10 runs"),
    ("discrete", "simple_spread_v3", "", "agent", -8.9, "google's log, 5M", "google/maddpg-replication: -23 / 3 - 1.2"),
    ("discrete", "simple_spread_v3", "", "agent", -9.8, "QMIX, 2M", "EPyMARL, arXiv 2006.07869"),
    ("discrete", "simple_spread_v3", "", "agent", -8.4, "MAPPO, 10M", "EPyMARL, arXiv 2006.07869"),
    ("discrete", "simple_spread_v3", "relaxed", "agent", -35 / 3, "google's log, 625k", "google/maddpg-replication"),
    ("discrete", "simple_spread_v3", "relaxed", "agent", -12.1, "openai/maddpg, 1.5M", "maddpg-rllib's plots, 10 runs"),
    ("discrete", "simple_spread_v3", "relaxed", "agent", -27 / 3, "google's log, 1.5M", "google/maddpg-replication"),
    # In the original's own reward, -(3 distances + contacts + 3) a step: 2 * (-35) - 75, 2 * (-27) - 75, and
    # 6 * (-12.1 + 1.2) - 75, where 1.2 is what it costs here that a position moves a step later
    ("discrete", "simple_spread_v3", "original", "agent", -145.0, "google's log, 625k", "google/maddpg-replication"),
    ("discrete", "simple_spread_v3", "original", "agent", -129.0, "google's log, 1.5M", "google/maddpg-replication"),
    ("discrete", "simple_spread_v3", "original", "agent", -140.4, "openai/maddpg, 1.5M", "maddpg-rllib, 10 runs"),
    ("continuous", "simple_speaker_listener_v4", "", "listener", -6.9, "HARL MADDPG", "HARL's learning curves"),
    ("continuous", "simple_speaker_listener_v4", "", "listener", -6.3, "HARL MATD3, 5M", "HARL's learning curves"),
    ("discrete", "simple_speaker_listener_v4", "", "listener", -8.2, "EPyMARL MADDPG", "arXiv 2006.07869"),
    (
        "discrete",
        "simple_speaker_listener_v4",
        "",
        "listener",
        -8.4,
        "openai/maddpg, good runs",
        "maddpg-rllib's plots",
    ),
    ("continuous", "simple_reference_v3", "", "agent", -16.9 / 2, "HARL MADDPG, 5M", "HARL's curves, team -16.9"),
    ("continuous", "simple_reference_v3", "", "agent", -13.9 / 2, "HARL MATD3, 5M", "HARL's curves, team -13.9"),
    ("continuous", "simple_tag_v3", "random-prey", "adversary", 73.0, "script: greedy chasers", "benchmark/chasers.py"),
    (
        "continuous",
        "simple_tag_v3",
        "random-prey",
        "adversary",
        90.6,
        "script: leading chasers",
        "benchmark/chasers.py",
    ),
    ("discrete", "simple_tag_v3", "random-prey", "adversary", 44.6, "script: greedy chasers", "benchmark/chasers.py"),
    ("discrete", "simple_tag_v3", "random-prey", "adversary", 65.8, "script: leading chasers", "benchmark/chasers.py"),
    # A prey that learns too is another in every run, so these are in the README alone: predators' +9.5, openai/maddpg's
    # reward logs, and +15.7, continuous, legalaspro/maddpg-zoo-torch's data
]


def levels(script: str, env_id: str, label: str, side: str) -> list[tuple[float, str]]:
    """Published scores to compare with: mean return of one agent, and whose. The labels relaxed-... and
    original-...training have levels of their own.
    """
    own = re.match(r"relaxed|original\S*-training$", label)
    return [
        (value, whose)
        for kind, game, start, of, value, whose, _ in LEVELS
        if (script, env_id, side) == (f"maddpg_{kind}.py", game, of)
        and label.startswith(start)
        and bool(own) == (start in ("relaxed", "original"))
    ]


def side_of(agent: str) -> str:
    return re.sub(r"_?\d+$", "", agent)


def sides(rows: list[dict]) -> dict[str, dict]:
    """Rows of one run by side, the agents whose names differ in their number only: to (step, episodes) to a point.

    A point is the mean return of one agent of the side and the wall-clock time. Sides come by name; one whose returns
    equal those of a side before it is left out, as in games where all get one reward.
    """
    found = {}
    for row in rows:
        if row["agent"] != "sum":
            at = int(row["global_step"]), int(row["episodes"])
            point = float(row["episodic_return"]), float(row["wall_clock_s"])
            found.setdefault(side_of(row["agent"]), {}).setdefault(at, []).append(point)
    means = {}
    for side in sorted(found):
        points = {at: tuple(map(statistics.fmean, zip(*p, strict=True))) for at, p in found[side].items()}
        if not any(same_returns(points, before) for before in means.values()):
            means[side] = points
    return means


def same_returns(points: dict, others: dict) -> bool:
    """But for rounding: sums over agents come in another order."""
    return points.keys() == others.keys() and all(abs(points[at][0] - others[at][0]) < 0.01 for at in points)


def read_tables(paths: list[Path]) -> dict[tuple[str, str, str, str], dict[int, list[dict]]]:
    """Rows of these tables of results, of all in results/ if none is named: (table, script, game, label) to seed."""
    if not paths:
        head = ",".join(COLUMNS)
        paths = [p for p in sorted((ROOT / "benchmark/results").glob("*.csv")) if p.read_text().startswith(head)]
    runs = {}
    for path in paths:
        if not path.exists():
            raise UsageError(f"there is no {path}")
        for row in Table(path, reader=True).rows.values():
            row = dict(zip(COLUMNS, row, strict=True))
            key = path.stem, row["script"], row["env_id"], row["label"]
            runs.setdefault(key, {}).setdefault(int(row["seed"]), []).append(row)
    return runs


def last_point(points: dict) -> tuple[int, float, float] | None:
    """Step, return and time of the run's last rows, if it has them: its 1,000 episodes."""
    finals = [(at[0], *point) for at, point in sorted(points.items()) if at[1] >= FINAL_EPISODES]
    return finals[-1] if finals else None

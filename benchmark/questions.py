"""The figures of docs/questions.md, 6 and 7: putting lists together, and four replay buffers.

    python benchmark/questions.py           # about two minutes
    python benchmark/questions.py --quick   # a test of this program: few rows, nothing is written

Every repeat measures all candidates of a question in turn, so that a machine that slows down slows all of them; a ratio
divides two figures of one repeat, and what is printed is the median of the repeats. Needs about 4 GiB of memory.
"""

import csv
import datetime
import gc
import importlib.metadata
import random
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import maddpg_continuous as maddpg

BATCH, NUM_ENVS = 1024, 25
COLUMNS = ["date", "torch", "numpy", "question", "rows", "candidate", "repeat", "microseconds", "ratio"]


@dataclass
class Args:
    repeats: int = 7
    """repeats of every measurement"""
    seconds: float = 0.05
    """seconds for which each candidate is measured in a repeat, or once where that takes longer"""
    rows: tuple[int, ...] = (10_000, 1_000_000)
    """rows in the replay buffers, which are full"""
    output: Path = Path(__file__).parent / "results" / "questions.csv"
    """file that the figures are appended to"""
    quick: bool = False
    """two repeats with 1,100 rows, nothing written"""


class TupleDeque:
    """`collections.deque` of one tuple per step; a sample without replacement."""

    def __init__(self, rows: list[tuple]):
        self.steps = deque(rows, maxlen=len(rows))

    def add(self, *fields: np.ndarray) -> None:
        for step in zip(*fields, strict=True):
            self.steps.append(tuple(field.copy() for field in step))

    def sample(self, batch_size: int) -> maddpg.Transitions:
        steps = random.sample(self.steps, batch_size)
        return maddpg.Transitions(*(torch.from_numpy(np.array(field)) for field in zip(*steps, strict=True)))


class TupleRing:
    """A list of one tuple per step, overwritten at a ring index; a sample with replacement."""

    def __init__(self, rows: list[tuple]):
        self.steps, self.position = list(rows), 0

    def add(self, *fields: np.ndarray) -> None:
        for step in zip(*fields, strict=True):
            self.steps[self.position] = tuple(field.copy() for field in step)
            self.position = (self.position + 1) % len(self.steps)

    def sample(self, batch_size: int) -> maddpg.Transitions:
        steps = random.choices(self.steps, k=batch_size)
        return maddpg.Transitions(*(torch.from_numpy(np.array(field)) for field in zip(*steps, strict=True)))


class FieldArrays:
    """One NumPy array for each field of each agent; a sample with replacement, the same steps for all agents."""

    def __init__(self, size: int, fields: maddpg.Transitions):
        agents = range(fields.rewards.shape[1])
        self.arrays = [[np.resize(field[:, i], (size, *field.shape[2:])) for i in agents] for field in fields]
        self.size, self.position = size, 0

    def add(self, *fields: np.ndarray) -> None:
        index = (self.position + np.arange(len(fields[0]))) % self.size
        for arrays, field in zip(self.arrays, fields, strict=True):
            for i, array in enumerate(arrays):
                array[index] = field[:, i]
        self.position = (self.position + len(index)) % self.size

    def sample(self, batch_size: int) -> maddpg.Transitions:
        index = np.random.randint(self.size, size=batch_size)
        batches = ([torch.from_numpy(array[index]) for array in arrays] for arrays in self.arrays)
        return maddpg.Transitions(*(torch.stack(batch, 1) for batch in batches))


def seconds_per_call(function: Callable[[], object], seconds: float) -> float:
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds or not calls:
        function()
        calls += 1
    return (time.perf_counter() - start) / calls


def measure(question: str, rows: int, candidates: dict[str, Callable[[], object]], args: Args) -> list[list]:
    """Times the candidates in turn; ratios are to the last of them."""
    lines = []
    gc.collect()
    gc.disable()
    for function in candidates.values():
        function()
    for repeat in range(args.repeats):
        times = {name: seconds_per_call(function, args.seconds) for name, function in candidates.items()}
        base = times[list(candidates)[-1]]
        lines += [
            [question, rows, name, repeat, f"{value * 1e6:.2f}", f"{value / base:.3f}"] for name, value in times.items()
        ]
    gc.enable()
    print(f"\n{question}, {rows:,} rows")
    for name in candidates:
        of_name = [line for line in lines if line[2] == name]
        value, ratio = (statistics.median(float(line[column]) for line in of_name) for column in (4, 5))
        print(f"    {name:42}{value:14,.1f} us{ratio:12,.2f}")
    return lines


def lists(args: Args) -> list[list]:
    arrays = list(np.random.rand(BATCH, 54).astype(np.float32))
    tensors = [torch.from_numpy(array.copy()) for array in arrays]
    scalars = [tensor[0].clone() for tensor in tensors]
    to_array = {
        "np.array(list of tensors)": lambda: np.array(tensors),
        "np.stack(list of arrays)": lambda: np.stack(arrays),
        "np.array(list of arrays)": lambda: np.array(arrays),
    }
    to_tensor = {
        "torch.tensor(list of arrays)": lambda: torch.tensor(arrays),
        "torch.tensor(nested list of floats)": lambda: torch.tensor([array.tolist() for array in arrays]),
        "torch.stack(list of tensors)": lambda: torch.stack(tensors),
        "torch.from_numpy(np.array(list of arrays))": lambda: torch.from_numpy(np.array(arrays)),
    }
    of_scalars = {
        "torch.tensor(list of 0-d tensors)": lambda: torch.tensor(scalars),
        "torch.tensor([s.item() for s in tensors])": lambda: torch.tensor([scalar.item() for scalar in scalars]),
        "torch.stack(list of 0-d tensors)": lambda: torch.stack(scalars),
    }
    lines = measure("list to array", BATCH, to_array, args)
    lines += measure("list to tensor", BATCH, to_tensor, args)
    return lines + measure("numbers to tensor", BATCH, of_scalars, args)


def buffers(size: int, args: Args) -> list[list]:
    games = maddpg.Games(maddpg.game_maker(maddpg.Args(env_id="simple_spread_v3")), 1)
    shapes = maddpg.ReplayBuffer(1, games, torch.device("cpu")).shapes
    fields = maddpg.Transitions(*(np.random.rand(1_000, *shape).astype(np.float32) for shape in shapes))
    steps = [tuple(field[row % 1_000].copy() for field in fields) for row in range(size)]
    one_array = maddpg.ReplayBuffer(size, games, torch.device("cpu"))
    for _ in range(size // 1_000):
        one_array.add(*fields)
    one_array.added = size
    candidates = {
        "deque of tuples": TupleDeque(steps),
        "list of tuples, ring index": TupleRing(steps),
        "arrays per field and agent": FieldArrays(size, fields),
        "one array for all (ReplayBuffer)": one_array,
    }
    del steps
    new = [field[:NUM_ENVS] for field in fields]
    adds = {name: lambda rb=rb: rb.add(*new) for name, rb in candidates.items()}
    samples = {name: lambda rb=rb: rb.sample(BATCH) for name, rb in candidates.items()}
    draws = {
        "np.random.choice(size, 1024, replace=False)": lambda: np.random.choice(size, BATCH, replace=False),
        "np.random.randint(size, size=1024)": lambda: np.random.randint(size, size=BATCH),
    }
    lines = measure("add 25 steps", size, adds, args)
    lines += measure("sample 1024 steps", size, samples, args)
    return lines + measure("draw 1024 indices", size, draws, args)


def main(args: Args) -> None:
    torch.set_num_threads(1)
    if args.quick:
        args.repeats, args.rows = 2, (1_100,)
    lines = lists(args)
    for size in args.rows:
        lines += buffers(size, args)
    if not args.quick:
        args.output.parent.mkdir(exist_ok=True)
        about = [datetime.date.today(), *(importlib.metadata.version(name) for name in ("torch", "numpy"))]
        first = not args.output.exists()
        with open(args.output, "a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([COLUMNS] * first + [[*about, *line] for line in lines])


if __name__ == "__main__":
    main(tyro.cli(Args))

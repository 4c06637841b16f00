"""How fast the scripts are beside the bare simulator and beside the bare matrix products of their own algorithm.

    pip install -r requirements.txt -r benchmark/requirements.txt
    python benchmark/speed.py             # about 15 minutes on two quiet cores
    python benchmark/speed.py --quick     # a test of this program, into a temporary folder
    python benchmark/speed.py --report    # speed.md and speed.png once more, from the rows in results/speed.csv

Everything runs in this one process, on one thread of PyTorch, except the workers of `--num-workers`, which are real
processes. After a burn-in, every repeat measures all quantities, and what is compared takes turns in short slices; a
ratio divides two figures of the same repeat, so that a machine that slows down slows both. Quantities:

bare simulator        `mpe2.simple_tag_v3.parallel_env()`: its steps, with its resets; random actions, drawn beforehand
make_game, Games      the same for the scripts' own simulator, and for the joint environment of one game around it
action choice         from a NumPy observation of one game to NumPy actions, exploration included, as training does it
bare products         `torch.bmm` on contiguous random tensors, results written in place, for every product that a round
                      needs: each in the faster of its two layouts, A B or (A B)^T = B^T A^T. In the continuous actors'
                      loss the critics' gradient reaches all columns of the joint input, or the acting agent's
                      action's only; the discrete one asks the critics for every option, without a gradient
update                one round, `rb.sample` and `update`; of a million-row buffer that is full or holds 2,000 rows
many agents           one round of 3, 12 and 48 agents of a made-up game, over its GFLOP (own action's columns)
training              both scripts' `main` itself, from the 800th step on, in steps per second. Its buffer is full from
                      the start (random numbers, a million rows) and takes the time stamps; logging is in, evaluation
                      and checkpoints are not. Its ratio is to the mean of the bare simulator just before and after
time to a score       steps to the first evaluation at or above it, a mean over the seeds of results/marks.csv, over the
                      ratio of training with default flags: the steps of the bare simulator in the same time
one training step     the discrete script with num_envs 1, with a stopwatch on its parts
memory                a million-row buffer, and this process's resident size before and after it is filled
hardware              with --compile, one round of the discrete script on the processor, eager and compiled; with --cuda
                      on the GPU, and eager on the processor beside it, and training with default flags on both
"""

import contextlib
import csv
import datetime
import functools
import gc
import importlib.metadata
import io
import itertools
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, namedtuple
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import matplotlib
import numpy as np
import pettingzoo
import psutil
import torch
import tyro
from gymnasium import spaces
from mpe2 import simple_spread_v3, simple_tag_v3
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import maddpg_continuous
import maddpg_discrete

HERE = Path(__file__).resolve().parent
SCRIPTS = {"discrete": maddpg_discrete, "continuous": maddpg_continuous}
CPU = torch.device("cpu")
BATCH = 1024
BUFFER_ROWS, FEW_ROWS = 1_000_000, 2_000
BURN_IN = 800  # steps of a training run before the clock starts; 800 divides by every num_envs and train_frequency here
PARTS = ("simulator", "joint arrays", "action choice", "learning", "storing and logging")
PACKAGES = ("torch", "numpy", "gymnasium", "pettingzoo", "mpe2")
GROUPS = ("simulators", "updates", "agents", "training", "memory", "hardware")
# num_envs, num_workers, hidden_dim, train_frequency
RUNS = (
    (1, 0, 64, 100),
    *((num_envs, num_workers, 64, 100) for num_envs in (8, 16, 32, 100, 200) for num_workers in (0, 1, 2)),
    *((num_envs, num_workers, 128, 25) for num_envs in (8, 25) for num_workers in (0, 1)),
    (1, 0, 64, 25),
    (1, 0, 128, 25),
)

SCORES = (
    (-10.2, 0.8e6),
    (-9.0, 1.3e6),
)  # simple_spread_v3, continuous, one agent's return: the mark in the bare simulator's steps
LEARNING_STEPS = 50_000, 100_000, 150_000, 200_000, 400_000, 600_000
GPU_TEXT = """\
One round of the discrete script in simple_tag_v3, in ms; then training with default flags, in steps per second: 25
games, and 20 for each worker with a worker for every core but one. Eager, a GPU spends a small round on being handed
its kernels one by one; compiled, they are one CUDA graph. Compiled rounds draw other random numbers than eager ones, of
the same distribution. `cpu` is the machine of all other figures, `cpu beside` that of the GPU; both learn with one
thread. What is empty was not measured, and of the GPU's machine training was run once, compiled twice.

Of the ways to compile, in one run: `torch.compile` alone takes 1.5 times the eager time, with `reduce-overhead` 0.73 (a
round has many parts for it, which Python joins), a CUDA graph of the eager round 0.12, of the compiled one 0.09."""
TRIED = """\
Each by a program of its own that is not kept, beside the way taken, so these are no rows:

- another library for the products (`mm`, oneDNN's linear layer, NumPy's OpenBLAS): 70 to 97 GFLOPS, all within 20 %
- the hidden layers without the transposed layout of `StackedLinear`: a round is 20 to 45 % slower
- 512 rows at a time through the critics in the actors' loss: that pass 10 to 20 % faster, a round 0 to 3 %
- the simulator's world without its agents' turns: 4 to 15 % of the simulator's time, by its private methods
- leaner joint arrays in `Games`: 10 of 47 microseconds a step
- Python's garbage collector off, or its objects frozen, while training: nothing
- `--compile` on a CPU: the rows below, 80 to 97 % of the eager time; eager stays the default"""
DEFAULT_RUN = "simple_spread_v3, continuous, default flags"

Row = namedtuple("Row", "quantity setting value unit reference ratio", defaults=("", ""))
Functions = dict[str, Callable[[], object]]


@dataclass
class Args:
    repeats: int = 5
    """repeats of every measurement"""
    seconds: float = 0.6
    """seconds that each quantity is measured in a repeat, training runs apart"""
    steps: int = 4_000
    """environment steps of a training run on the clock, best a multiple of 800"""
    only: tuple[str, ...] = GROUPS
    """groups to measure: simulators, updates, agents, training, memory, hardware. Rows of others stay in the CSV"""
    compile: bool = False
    """measure compiled updates too (a C++ compiler, a minute for each setting)"""
    cuda: bool = False
    """measure on the GPU too"""
    quick: bool = False
    """two short repeats, to test this program: the figures mean little. Writes to a temporary folder"""
    report: bool = False
    """measure nothing, write the report from the CSV"""
    output: Path | None = None
    """folder of results/speed.csv, speed.md and speed.png. Default: this file's"""

    def __post_init__(self):
        if unknown := set(self.only) - set(GROUPS):
            sys.exit(f"--only: there is no group {', '.join(unknown)}, the groups are {', '.join(GROUPS)}")
        if self.quick:
            self.repeats, self.seconds, self.steps = 2, 0.1, 800


# ---- Measuring -------------------------------------------------------------------------------------------------------
def beside(functions: Functions, seconds: float, slices: int = 6, wait: Callable = lambda: None) -> dict[str, float]:
    """Seconds per call of every function, called for `seconds` each; in turn, to and fro, in `slices` slices.

    `wait` ends a slice on the clock, for devices that work on after a call has returned.
    """
    spent, calls = Counter(), Counter()
    for turn in range(slices):
        for name, function in list(functions.items())[:: -1 if turn % 2 else 1]:
            start = time.perf_counter()
            while True:
                function()
                calls[name] += 1
                if time.perf_counter() - start >= seconds / slices:
                    break
            wait()
            spent[name] += time.perf_counter() - start
    return {name: spent[name] / calls[name] for name in functions}


def make(script: ModuleType) -> Callable[[], pettingzoo.ParallelEnv]:
    return functools.partial(script.make_game, "simple_tag_v3", {}, continuous_actions=script is maddpg_continuous)


def bare_game(kind: str) -> pettingzoo.ParallelEnv:
    return simple_tag_v3.parallel_env(continuous_actions=kind == "continuous")


def game_stepper(game: pettingzoo.ParallelEnv) -> Callable[[], None]:
    """A function that makes one step of `game`, with a reset where its episode is over."""
    agents = game.possible_agents
    moves = itertools.cycle([{agent: game.action_space(agent).sample() for agent in agents} for _ in range(997)])
    game.reset(seed=1)

    def step() -> None:
        if not game.agents:
            game.reset()
        game.step(next(moves))

    return step


def games_stepper(script: ModuleType) -> Callable[[], object]:
    games = script.Games(make(script), 1)
    games.reset(seed=1)
    actions = itertools.cycle([games.action_space.sample() for _ in range(997)])
    return lambda: games.step(next(actions))


def chooser(script: ModuleType, hidden_dim: int) -> Callable[[], np.ndarray]:
    """The lines of `main` between an observation and the step that it leads to, after `learning_starts`."""
    games, args = script.Games(make(script), 1), script.Args(hidden_dim=hidden_dim)
    networks, data = script.Networks(games, args), games.reset(seed=1)[0]
    exploration = args.gumbel_temperature if script is maddpg_discrete else args.exploration_noise

    def once() -> np.ndarray:
        with torch.inference_mode():
            obs = torch.from_numpy(data["obs"]).to(CPU)
            actions = script.choose(networks.actor, obs, exploration, networks.random_agents).cpu().numpy()
        assert np.isfinite(actions).all()
        actions *= data["alive"][:, :, None]
        return actions

    return once


def simulators(args: Args) -> Iterator[Iterable[Row]]:
    """The simulators and the action choice, all in turn; yields one repeat's rows after the other."""
    functions = {}
    for kind, script in SCRIPTS.items():
        functions["bare simulator", kind] = game_stepper(bare_game(kind))
        functions["make_game", kind] = game_stepper(make(script)())
        functions["Games of one game", kind] = games_stepper(script)
        for hidden_dim in 64, 128:
            functions["action choice", f"{kind}, 2x{hidden_dim}"] = chooser(script, hidden_dim)
    beside(functions, args.seconds / 2)
    while True:
        seconds = beside(functions, args.seconds)
        rows = []
        for (quantity, setting), time_taken in seconds.items():
            kind = setting.split(",")[0]
            reference, bare = f"bare simulator, {kind}", seconds["bare simulator", kind]
            if quantity == "action choice":
                rows.append(Row(quantity, setting, 1e3 * time_taken, "ms", reference, time_taken / bare))
            else:
                rows.append(Row(quantity, setting, 1 / time_taken, "steps/s", reference, bare / time_taken))
        yield rows


# ---- A round of updates and its bare matrix products -----------------------------------------------------------------
def round_products(games, hidden_dim: int, batch: int, own_columns: bool) -> list[tuple[int, int, int, int]]:
    """Every matrix product that a round needs, (n, rows, inner, columns): n of [rows, inner] x [inner, columns].

    Widths are those of the stack, agents' padding included; the joint input has none.
    """
    (n, obs_dim), action_dim = games.obs_mask.shape, games.action_mask.shape[1]
    joint_dim = int(games.obs_mask.sum() + games.action_mask.sum())

    def layers(*widths: int) -> tuple[list, list, list]:
        pairs = list(itertools.pairwise(widths))
        forward = [(n, batch, i, o) for i, o in pairs]
        return forward, [(n, i, batch, o) for i, o in pairs], [(n, batch, o, i) for i, o in pairs]

    forward, weights, inputs = layers(joint_dim, hidden_dim, hidden_dim, 1)
    critics = forward + forward + weights + inputs[1:]  # the targets', then forward and backward
    first = (n, batch, hidden_dim, action_dim) if own_columns else inputs[0]
    through_critics = [*forward, first, *inputs[1:]]
    if hasattr(games, "n_choices"):  # discrete actors: forward alone, from the second layer on for each option
        rows = action_dim * batch
        later = [(n, rows, action_dim, hidden_dim), (n, rows, hidden_dim, hidden_dim), (n, rows, hidden_dim, 1)]
        through_critics = [forward[0], *later]
    forward, weights, inputs = layers(obs_dim, hidden_dim, hidden_dim, action_dim)
    return critics + through_critics + forward + forward + weights + inputs[1:]


def gflop(products: list[tuple[int, int, int, int]]) -> float:
    return sum(2 * n * rows * inner * columns for n, rows, inner, columns in products) / 1e9


def product(n: int, rows: int, inner: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Both factors and the result of the faster of the two layouts, by the best of ten calls in turn."""
    layouts = [
        (torch.rand(n, r, inner), torch.rand(n, inner, c), torch.empty(n, r, c))
        for r, c in ((rows, columns), (columns, rows))
    ]
    best = [float("inf")] * 2
    for _, (i, (a, b, out)) in itertools.product(range(10), enumerate(layouts)):
        start = time.perf_counter()
        torch.bmm(a, b, out=out)
        best[i] = min(best[i], time.perf_counter() - start)
    return layouts[best.index(min(best))]


def bare_products(products: list[tuple[int, int, int, int]]) -> Callable[[], None]:
    tensors = [product(*shape) for shape in products]

    def once() -> None:
        for a, b, out in tensors:
            torch.bmm(a, b, out=out)

    return once


def fill(rb, rows: int) -> None:
    """Stores `rows` random steps by the buffer's own `add`, 1,000 at a time."""
    rng, n = np.random.default_rng(1), 1_000
    (agents, obs_dim), action_dim = rb.shapes.obs, rb.shapes.actions[1]
    obs, next_obs = rng.standard_normal((2, n, agents, obs_dim), np.float32)
    actions = np.eye(action_dim, dtype=np.float32)[rng.integers(action_dim, size=(n, agents))]
    ones = np.ones((n, agents), np.float32)
    for _ in range(rows // n):
        rb.add(obs, next_obs, actions, rng.standard_normal((n, agents), np.float32), 0 * ones, ones, ones)


@functools.cache
def full_rows() -> Tensor:
    """The rows of a full million-row buffer of simple_tag_v3. Both scripts' rows are alike, and this one is shared."""
    return filled_rows(maddpg_discrete, make(maddpg_discrete))


def filled_rows(script: ModuleType, make_game: Callable[[], pettingzoo.ParallelEnv]) -> Tensor:
    rb = script.ReplayBuffer(BUFFER_ROWS, script.Games(make_game, 1), CPU)
    fill(rb, BUFFER_ROWS)
    return rb.rows


def shared_buffer(script: ModuleType, games, added: int, device: torch.device = CPU):
    """A replay buffer with a million rows of which `added` are in use."""
    rb = script.ReplayBuffer(1, games, device)
    rb.rows, rb.added = full_rows().to(device), added
    return rb


def learner(script: ModuleType, games, rb, hidden_dim: int, batch: int = BATCH, learn=None) -> Callable[[], object]:
    """One round as in `main`, with networks and optimisers of its own; `learn` is `update`, or compiled."""
    args = script.Args(hidden_dim=hidden_dim, batch_size=batch, cuda=rb.rows.is_cuda)
    learn = learn or script.update
    networks = script.Networks(games, args).to(rb.rows.device)
    rates = (networks.actor, args.actor_learning_rate), (networks.critic, args.critic_learning_rate)
    adam = functools.partial(torch.optim.Adam, fused=True, capturable=args.cuda)
    optimizers = tuple(adam(network.parameters(), lr=rate) for network, rate in rates)
    return lambda: learn(networks, optimizers, rb.sample(batch), args)


def update_setting(kind: str, hidden_dim: int) -> tuple[str, Functions, list[float]]:
    """Name, functions that take turns, and GFLOP by both counts of one comparison of a round with its products."""
    script = SCRIPTS[kind]
    games = script.Games(make(script), 1)
    products = [round_products(games, hidden_dim, BATCH, own_columns) for own_columns in (False, True)]
    functions = {
        "full": learner(script, games, shared_buffer(script, games, BUFFER_ROWS), hidden_dim),
        "few": learner(script, games, shared_buffer(script, games, FEW_ROWS), hidden_dim),
        "all columns": bare_products(products[0]),
        "own columns": bare_products(products[1]),
    }
    return f"{kind}, 2x{hidden_dim}", functions, [gflop(shapes) for shapes in products]


def updates(args: Args) -> Iterator[Iterable[Row]]:
    """A round of updates, with a full and a nearly empty buffer, beside its bare matrix products."""
    settings = [update_setting(kind, hidden_dim) for kind in SCRIPTS for hidden_dim in (64, 128)]
    for _, functions, _ in settings:
        beside(functions, args.seconds / 2)
    while True:
        rows = []
        for name, functions, gflops in settings:
            seconds = beside(functions, args.seconds)
            ms = {key: 1e3 * value for key, value in seconds.items()}
            for columns, amount in zip(("all columns", "own columns"), gflops, strict=True):
                rows += [
                    Row(f"bare products, {columns}", name, ms[columns], "ms"),
                    Row(f"work, {columns}", name, amount, "GFLOP"),
                    Row(
                        f"update over bare products, {columns}",
                        name,
                        ms["full"],
                        "ms",
                        f"bare products, {columns}",
                        ms["full"] / ms[columns],
                    ),
                ]
            few = f"update, {FEW_ROWS:,} rows"
            rows.append(Row(few, name, ms["few"], "ms"))
            rows.append(Row(f"update, {BUFFER_ROWS:,} rows", name, ms["full"], "ms", few, ms["full"] / ms["few"]))
        yield rows


# ---- Many agents -----------------------------------------------------------------------------------------------------
class MadeUpGame(pettingzoo.ParallelEnv):
    """Spaces without a game: `n` agents that see 18 numbers and choose among 5 actions, as in simple_spread_v3."""

    metadata = {"name": "made_up", "render_modes": []}
    render_mode = None

    def __init__(self, n: int):
        self.agents, self.possible_agents = [], [f"agent_{i}" for i in range(n)]
        self.observation_space = lambda agent: spaces.Box(-np.inf, np.inf, (18,))
        self.action_space = lambda agent: spaces.Discrete(5)


def agents(args: Args) -> Iterator[Iterable[Row]]:
    """A round of 3, 12 and 48 agents: milliseconds per GFLOP, and 48 over the others."""
    functions, work = {}, {}
    for n in 3, 12, 48:
        games = maddpg_discrete.Games(functools.partial(MadeUpGame, n), 1)
        rb = maddpg_discrete.ReplayBuffer(5_000, games, CPU)
        fill(rb, 5_000)
        functions[n] = learner(maddpg_discrete, games, rb, 64)
        work[n] = gflop(round_products(games, 64, BATCH, own_columns=True))
    beside(functions, 0.1, 1)
    while True:
        ms = {n: 1e3 * seconds for n, seconds in beside(functions, args.seconds, 2).items()}
        each = {n: ms[n] / work[n] for n in ms}
        yield [
            *(Row("update, many agents", f"{n} agents", ms[n], "ms") for n in ms),
            *(Row("work, many agents", f"{n} agents", work[n], "GFLOP") for n in ms),
            *(Row("time over work", f"{n} agents", each[n], "ms/GFLOP") for n in ms),
            *(
                Row("time over work, growth", f"48 agents over {n}", each[48], "ms/GFLOP", f"{n} agents", each[48] / x)
                for n, x in each.items()
                if n != 48
            ),
        ]


# ---- The whole training loop -----------------------------------------------------------------------------------------
class Stopwatch:
    """Charges all time to the part of the training step that it falls in. `wrap` marks where parts begin and end."""

    def __init__(self):
        self.spent, self.part, self.since = Counter(), PARTS[-1], time.perf_counter()

    def switch(self, part: str) -> None:
        now = time.perf_counter()
        self.spent[self.part] += now - self.since
        self.part, self.since = part, now

    def wrap(self, function: Callable, during: str, after: str) -> Callable:
        @functools.wraps(function)
        def timed(*args, **kwargs):
            if self.part == "learning":  # the target actors' choice
                return function(*args, **kwargs)
            self.switch(during)
            result = function(*args, **kwargs)
            self.switch(after)
            return result

        return timed

    def wrap_game(self, make_game: Callable) -> Callable:
        def timed_game(*args, **kwargs):
            game = make_game(*args, **kwargs)
            game.step, game.reset = (self.wrap(f, "simulator", "joint arrays") for f in (game.step, game.reset))
            return game

        return timed_game

    @contextlib.contextmanager
    def on(self, script: ModuleType) -> Iterator[None]:
        """The action choice lasts from `choose` to the step of the games, less what is learned in between."""
        choice, learning, storing = PARTS[2:]
        with contextlib.ExitStack() as stack:
            for owner, name, wrapped in (
                (script, "make_game", self.wrap_game(script.make_game)),
                (script, "choose", self.wrap(script.choose, choice, choice)),
                (script, "update", self.wrap(script.update, learning, choice)),
                (script.ReplayBuffer, "sample", self.wrap(script.ReplayBuffer.sample, learning, choice)),
                (script.Games, "step", self.wrap(script.Games.step, "joint arrays", storing)),
            ):
                stack.enter_context(mock.patch.object(owner, name, wrapped))
            yield


def timed_buffer(script: ModuleType, rows: Tensor, stopwatch: Stopwatch) -> type:
    """The script's replay buffer, full of `rows` from the start, that notes the time after every step stored."""

    class TimedBuffer(script.ReplayBuffer):
        def __init__(self, size: int, *args):
            super().__init__(1, *args)
            if size > 1:  # `main` makes one of a single row to see how large that is
                self.rows, self.added = rows.to(self.rows.device), BUFFER_ROWS
                TimedBuffer.first = TimedBuffer.last = None

        def add(self, *fields: np.ndarray) -> None:
            super().add(*fields)
            steps = self.added - BUFFER_ROWS
            if steps >= BURN_IN:
                stopwatch.switch(stopwatch.part)
                TimedBuffer.last = steps, time.perf_counter(), stopwatch.spent.copy()
                TimedBuffer.first = TimedBuffer.first or TimedBuffer.last

    return TimedBuffer


def train(
    script: ModuleType, rows: Tensor, steps: int, split: bool = False, **flags: Any
) -> tuple[float, dict[str, float]]:
    """Runs `main` of a script: seconds per step on the clock and, with `split`, those of every part."""
    not_measured = {"learning_starts": 0, "eval_episodes": 1, "eval_frequency": 10**9, "checkpoint_frequency": 0}
    args, stopwatch = script.Args(total_timesteps=BURN_IN + steps, **not_measured, **flags), Stopwatch()
    buffer, nowhere = timed_buffer(script, rows, stopwatch), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(stack.enter_context(tempfile.TemporaryDirectory())))
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(contextlib.redirect_stderr(nowhere))
        if split:
            stack.enter_context(stopwatch.on(script))
        stack.enter_context(mock.patch.object(script, "ReplayBuffer", buffer))
        script.main(args)
    (step_0, time_0, spent_0), (step_1, time_1, spent_1) = buffer.first, buffer.last
    gc.collect()
    multiprocessing.active_children()  # reaps the workers
    each = {part: (spent_1[part] - spent_0[part]) / (step_1 - step_0) for part in PARTS}
    return (time_1 - time_0) / (step_1 - step_0), each


def training(args: Args) -> Iterator[Iterable[Row]]:
    """`main` in every setting, with the bare simulator before and after, and last its step's parts."""
    kinds = [(kind, {"bare": game_stepper(bare_game(kind))}, full_rows()) for kind in SCRIPTS]
    spread = {"bare": game_stepper(simple_spread_v3.parallel_env(continuous_actions=True))}
    rows = filled_rows(maddpg_continuous, functools.partial(maddpg_continuous.make_game, "simple_spread_v3", {}, True))
    for _, functions, _ in kinds:
        beside(functions, args.seconds)
    while True:
        yield itertools.chain(*(one_by_one(args, *kind) for kind in kinds), default_run(args, spread, rows))


def default_run(args: Args, functions: Functions, rows: Tensor) -> Iterator[Row]:
    before = beside(functions, args.seconds, 1)["bare"]
    seconds, _ = train(maddpg_continuous, rows, args.steps, env_id="simple_spread_v3")
    bare = (before + beside(functions, args.seconds, 1)["bare"]) / 2
    yield Row("bare simulator beside training", DEFAULT_RUN, 1 / bare, "steps/s")
    yield Row("training", DEFAULT_RUN, 1 / seconds, "steps/s", "bare simulator beside training", bare / seconds)


def one_by_one(args: Args, kind: str, functions: Functions, rows: Tensor) -> Iterator[Row]:
    before = beside(functions, args.seconds, 1)["bare"]
    for setting, split in [(setting, False) for setting in RUNS] + [(RUNS[0], True)] * (kind == "discrete"):
        flags = zip(("num_envs", "num_workers", "hidden_dim", "train_frequency"), setting, strict=True)
        seconds, parts = train(SCRIPTS[kind], rows, args.steps, split, **dict(flags))
        after = beside(functions, args.seconds, 1)["bare"]
        bare = (before + after) / 2
        before = after
        name = run_name(kind, setting)
        if split:
            yield Row(
                "one training step", "bare simulator beside it", 1e3 * bare, "ms", "the whole step", bare / seconds
            )
            for part in PARTS:
                yield Row("one training step", part, 1e3 * parts[part], "ms", "the whole step", parts[part] / seconds)
        else:
            yield Row("bare simulator beside training", name, 1 / bare, "steps/s")
            yield Row("training", name, 1 / seconds, "steps/s", "bare simulator beside training", bare / seconds)


def run_name(kind: str, setting: tuple[int, int, int, int]) -> str:
    num_envs, num_workers, hidden_dim, every = setting
    return f"{kind}, num_envs {num_envs}, num_workers {num_workers}, 2x{hidden_dim}, a round every {every} steps"


# ---- Memory and other hardware ---------------------------------------------------------------------------------------
def memory() -> list[Row]:
    """Measured once and first, while nothing else has been allocated."""
    process, unit = psutil.Process(), 2**30
    before = process.memory_info().rss / unit
    size = full_rows().nbytes / unit
    after = process.memory_info().rss / unit
    name = f"replay buffer of {BUFFER_ROWS:,} steps"
    return [
        Row("memory", name, size, "GiB"),
        Row("memory", "resident size before the buffer is filled", before, "GiB"),
        Row("memory", "resident size after", after, "GiB"),
        Row("memory", "what resident size grew by", after - before, "GiB", name, (after - before) / size),
    ]


def compiler_works(device: torch.device) -> bool:
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.rand(8, device=device))
    except Exception as error:
        print(f"compiled rows on {device} skipped: no compiler ({str(error).strip().splitlines()[0][:80]})")
        return False
    return True


def hardware(args: Args) -> Iterator[tuple[int, Row]]:
    """Rows of one round and, with a GPU, of training, each with its repeat."""
    gpu = torch.cuda.get_device_name() if args.cuda and torch.cuda.is_available() else None
    if args.cuda and not gpu:
        print("rows on a GPU skipped: PyTorch finds none")
    if gpu:
        yield from rounds_on(args, gpu, torch.device("cuda"), args.compile)
        yield from training_on(args, f"{gpu}, eager", cuda=True)
        yield from training_on(args, f"{gpu}, compiled", cuda=True, compile=True) if args.compile else ()
        yield from rounds_on(args, f"cpu beside {gpu}", CPU, compiling=False)
        yield from training_on(args, f"cpu beside {gpu}, eager")
    elif args.compile:
        yield from rounds_on(args, "cpu", CPU, compiling=True)


def rounds_on(args: Args, where: str, device: torch.device, compiling: bool) -> Iterator[tuple[int, Row]]:
    """A round of each width and batch, eager and as --compile has it; of the smallest what else was tried, too.

    All repeats of a setting at once, as each compiles anew.
    """
    script, wait = maddpg_discrete, (lambda: None) if device == CPU else torch.cuda.synchronize
    games = script.Games(make(script), 1)
    rb = shared_buffer(script, games, BUFFER_ROWS, device)
    compiling = compiling and compiler_works(device)
    for hidden_dim, batch in itertools.product((64, 256), (1024, 16_384)):
        ways = {"eager": script.update}
        if compiling:
            torch.compiler.reset()
            learn = torch.compile(script.update)
            ways["compiled"] = learn if device == CPU else script.OneLaunch(learn)
            if device != CPU and (hidden_dim, batch) == (64, 1024):
                ways["torch.compile alone"] = learn
                ways["torch.compile in mode reduce-overhead"] = torch.compile(script.update, mode="reduce-overhead")
                ways["one CUDA graph of the eager round"] = script.OneLaunch(script.update)
        functions = {how: learner(script, games, rb, hidden_dim, batch, learn) for how, learn in ways.items()}
        for function in functions.values():
            for _ in range(5):  # the first rounds compile and record
                function()
        beside(functions, args.seconds / 2, 1, wait)
        for repeat in range(args.repeats):
            seconds = beside(functions, args.seconds, wait=wait)
            for how, value in seconds.items():
                quantity = "update, hardware" if how in ("eager", "compiled") else "update, other ways"
                setting = f"{where}, {how}, 2x{hidden_dim}, batch {batch:,}"
                yield repeat, Row(quantity, setting, 1e3 * value, "ms", "eager", value / seconds["eager"])


def training_on(args: Args, where: str, **flags: bool) -> Iterator[tuple[int, Row]]:
    """Both scripts' `main` with default flags, and with 20 games for each worker, a worker for every core but one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for (kind, script), repeat in itertools.product(SCRIPTS.items(), range(args.repeats)):
        functions = {"bare": game_stepper(bare_game(kind))}
        for num_envs, num_workers in (25, None), (20 * max(cores - 1, 1), cores - 1):
            torch.compiler.reset()
            before, steps = beside(functions, args.seconds, 1)["bare"], max(args.steps, 40 * num_envs)
            seconds, _ = train(script, full_rows(), steps, num_envs=num_envs, num_workers=num_workers, **flags)
            bare = (before + beside(functions, args.seconds, 1)["bare"]) / 2
            setting = f"{where}, {kind}, default flags but num_envs {num_envs}"
            yield repeat, Row("training, hardware", setting, 1 / seconds, "steps/s", "bare simulator", bare / seconds)


# ---- The CSV ---------------------------------------------------------------------------------------------------------
def machine() -> dict[str, str | int]:
    """The columns that say when, with what and where."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or "unknown",
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in PACKAGES},
        "cpu model": names[0].split(":", 1)[1].strip() if names else platform.processor(),
        "cores": cores,
    }


COLUMNS = (*Row._fields[:2], "repeat", *Row._fields[2:], "date", "commit", "python", *PACKAGES, "cpu model", "cores")


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, old: list[dict], new: list[dict]) -> None:
    """The new rows, after those old ones whose quantity and setting were not measured again."""
    again = {(row["quantity"], row["setting"]) for row in new}
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([row for row in old if (row["quantity"], row["setting"]) not in again] + new)


def as_line(row: Row, repeat: int, columns: dict) -> dict:
    numbers = {name: f"{getattr(row, name):.6g}" if getattr(row, name) != "" else "" for name in ("value", "ratio")}
    ratio = f"{row.ratio:8.3f} of {row.reference}" if row.ratio != "" else ""
    print(f"{repeat}  {row.quantity}: {row.setting:60} {row.value:10.4g} {row.unit:9} {ratio}", flush=True)
    return {**row._asdict(), **numbers, "repeat": repeat, **columns}


def measure(args: Args, path: Path) -> None:
    """All groups in every repeat; the CSV is written after each."""
    torch.set_num_threads(1)
    maddpg_continuous.keep_freed_memory()  # as training does
    torch.manual_seed(1)
    old, new, columns = read(path), [], machine()
    if "memory" in args.only:
        new += [as_line(row, 0, columns) for row in memory()]
    groups = [f(args) for f in (simulators, updates, agents, training) if f.__name__ in args.only]
    for repeat in range(args.repeats):
        for group in groups:
            new += [as_line(row, repeat, columns) for row in next(group)]
        write(path, old, new)
    if "hardware" in args.only:
        for repeat, row in hardware(args):
            new.append(as_line(row, repeat, columns))
            write(path, old, new)


# ---- The report ------------------------------------------------------------------------------------------------------
class Results:
    """The rows of a CSV, asked for by quantity and setting: lists over the repeats."""

    def __init__(self, path: Path):
        self.rows = read(path)
        self.settings = dict.fromkeys((row["quantity"], row["setting"]) for row in self.rows)

    def get(self, quantity: str, setting: str, column: str) -> list[float]:
        rows = (r for r in self.rows if (r["quantity"], r["setting"]) == (quantity, setting))
        return [float(row[column]) for row in rows if row[column]]

    def median(self, quantity: str, setting: str, column: str = "value") -> float:
        return statistics.median(self.get(quantity, setting, column) or [float("nan")])

    def of(self, quantity: str) -> list[str]:
        return [setting for q, setting in self.settings if q == quantity]

    def unit(self, quantity: str, setting: str) -> str:
        return next(r["unit"] for r in self.rows if (r["quantity"], r["setting"]) == (quantity, setting))


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def spread(values: list[float]) -> str:
    """Median (min–max)"""
    if not values:
        return ""
    if min(values) == max(values):
        return number(values[0])
    return f"{number(statistics.median(values))} ({number(min(values))}–{number(max(values))})"


def marks(results: Results) -> list[tuple[str, str, list[float], float, bool]]:
    """What, the mark in words, its repeats, the bound, and whether it is a lower one."""
    update = "update over bare products, all columns"
    own = "update over bare products, own columns"
    full, growth = f"update, {BUFFER_ROWS:,} rows", "time over work, growth"
    table = []
    for kind in SCRIPTS:
        one, every_25 = run_name(kind, RUNS[0]), run_name(kind, RUNS[-2])
        runs = [run_name(kind, run) for run in RUNS if run[2:] == (64, 100)]
        best = max(runs, key=lambda name: results.median("training", name, "ratio"))
        for what, name, bound in (
            (f"one process, one environment, {kind}", one, 0.75),
            (f"best setting: {best}", best, 1.4),
            (f"a round every 25 steps, one environment, {kind}", every_25, 0.45),
        ):
            table.append((what, f"ratio >= {bound}", "training", name, "ratio", bound, True))
    for kind, hidden_dim in itertools.product(SCRIPTS, (64, 128)):
        name = f"{kind}, 2x{hidden_dim}"
        table.append((f"one round of updates, {name}", "<= 1.5 x its bare products", update, name, "ratio", 1.5, False))
    name = "continuous, 2x64"
    table.append((f"the same, own action's columns only, {name}", "<= 1.5 x these", own, name, "ratio", 1.5, False))
    for kind in SCRIPTS:
        setting = f"{kind}, 2x64"
        table.append((f"action choice, {setting}", "<= 0.08 ms", "action choice", setting, "value", 0.08, False))
    mark = "a nearly empty one's time, within 5 %"
    for kind in SCRIPTS:
        setting = f"{kind}, 2x64"
        table.append((f"a full buffer of a million rows, {setting}", mark, full, setting, "ratio", 1.05, False))
    for n in 3, 12:
        setting = f"48 agents over {n}"
        table.append((f"time over arithmetic, {setting}", "no growth, <= 1", growth, setting, "ratio", 1.0, False))
    return [(what, mark, results.get(q, s, column), bound, low) for what, mark, q, s, column, bound, low in table]


def mark_table(results: Results) -> Iterator[str]:
    yield "| | mark | measured, median (min–max) | reached |"
    yield "|---|---|---|---|"
    for what, mark, values, bound, low in marks(results):
        median = statistics.median(values) if values else float("nan")
        reached = "yes" if (median >= bound if low else median <= bound) else "no"
        yield f"| {what} | {mark} | {spread(values) or 'not measured'} | {reached if values else ''} |"
    size, before, after = (results.median("memory", setting) for setting in [*results.of("memory"), "", "", ""][:3])
    yield (
        f"| memory, a million steps of simple_tag_v3 | no second copy | buffer {size:.2f} GiB; resident size "
        f"{before:.2f} GiB before, {after:.2f} GiB after | {'yes' if after - before < 1.05 * size else 'no'} |"
    )
    ratio = results.median("training", DEFAULT_RUN, "ratio")
    if DEFAULT_RUN not in results.of("training"):
        yield f"| time to a published score, {DEFAULT_RUN} | | not measured | |"
        return
    for score, mark in SCORES:
        steps = steps_to(score)
        mean = statistics.mean(steps) if steps else float("nan")
        yield (
            f"| to {score} in {DEFAULT_RUN} | the time of {mark / 1e6:.1f} million steps of the bare simulator | "
            f"{mean / ratio / 1e6:.2f} million: {number(mean)} steps, mean of {len(steps)} seeds, at a ratio of "
            f"{spread(results.get('training', DEFAULT_RUN, 'ratio'))} | {'yes' if mean / ratio <= mark else 'no'} |"
        )


def learning_table() -> Iterator[str]:
    """One agent's greedy return in simple_spread_v3 by steps, one environment beside 25."""
    yield "| simple_spread_v3 | " + " | ".join(f"{step:,}" for step in LEARNING_STEPS) + " |"
    yield "|---|" + "---|" * len(LEARNING_STEPS)
    for kind in SCRIPTS:
        for table, label, what in (
            ("trials", "num-envs-1", "num_envs 1, two seeds to 200,000"),
            ("marks", "default-600k", "num_envs 25, five seeds"),
        ):
            rows = read(HERE / "results" / f"{table}.csv")
            key = f"maddpg_{kind}.py", "simple_spread_v3", label, "sum", "100"
            cells = []
            for step in LEARNING_STEPS:
                fields = "script", "env_id", "label", "agent", "episodes"
                found = [r for r in rows if tuple(r[f] for f in fields) == key and int(r["global_step"]) == step]
                cells.append(spread([float(row["episodic_return"]) / 3 for row in found]))
            yield f"| {kind}, {what} | " + " | ".join(cells) + " |"


def steps_to(score: float) -> list[float]:
    """Each seed's steps to the first evaluation at or above `score`, infinity where it has none, by marks.csv."""
    first = {}
    for row in read(HERE / "results" / "marks.csv"):
        run = row["script"], row["env_id"], row["label"], row["agent"]
        if run == ("maddpg_continuous.py", "simple_spread_v3", "default-600k", "sum"):
            reached = int(row["global_step"]) if float(row["episodic_return"]) / 3 >= score else float("inf")
            first[row["seed"]] = min(reached, first.get(row["seed"], reached))
    return list(first.values())


def paragraph(results: Results) -> str:
    """What the time is spent on, in the figures of the split step."""
    part = {name: results.median("one training step", name) for name in PARTS}
    share = {name: f"{part[name]:.3f} ms ({100 * part[name] / sum(part.values()):.0f} %)" for name in PARTS}
    bare = results.median("one training step", "bare simulator beside it")
    update = results.median("update over bare products, all columns", "discrete, 2x64")
    times = results.median("update over bare products, all columns", "discrete, 2x64", "ratio")
    work = results.median("work, all columns", "discrete, 2x64")
    products = results.median("bare products, all columns", "discrete, 2x64")
    return (
        "With one environment, 2x64, a round every 100 steps and a stopwatch, a step of the discrete script takes "
        f"{sum(part.values()):.3f} ms beside {bare:.3f} ms for a step of the bare simulator. "
        f"Of it the simulator takes {share['simulator']}, which "
        f"no learning code can save: what it gains on the bare one comes from leaving out the wrappers of every turn. "
        f"The joint arrays around it take {share['joint arrays']}, the action choice {share['action choice']}, "
        f"learning {share['learning']}, storing and logging {share['storing and logging']}. In turn with the rest each "
        f"part takes longer than over and over by itself, as the action choice shows. A round alone takes "
        f"{update:.1f} ms, {times:.2f} times its bare matrix products ({products:.1f} ms for {work:.2f} GFLOP); the "
        "rest is what stands between them: activations, the Gumbel-softmax, the batch's gather, Adam and the targets."
    )


def all_table(results: Results) -> Iterator[str]:
    yield "| quantity | setting | median (min–max) | unit | ratio, median (min–max) | to |"
    yield "|---|---|---|---|---|---|"
    references = {(row["quantity"], row["setting"]): row["reference"] for row in results.rows}
    for (quantity, setting), reference in references.items():
        values, ratios = (spread(results.get(quantity, setting, column)) for column in ("value", "ratio"))
        yield f"| {quantity} | {setting} | {values} | {results.unit(quantity, setting)} | {ratios} | {reference} |"


def hardware_table(results: Results, quantity: str) -> Iterator[str]:
    """Medians: a line for each piece of hardware, eager and compiled, a column for each setting."""
    settings = [setting.split(", ", 2) for setting in results.of(quantity)]
    columns = sorted({what for _, _, what in settings}, key=lambda what: [*map(int, re.findall(r"\d+", what)), what])
    yield f"| {quantity.split(',')[0]} | " + " | ".join(columns) + " |"
    yield "|---|" + "---|" * len(columns)
    for where, how in dict.fromkeys((where, how) for where, how, _ in settings):
        values = [results.get(quantity, f"{where}, {how}, {what}", "value") for what in columns]
        yield f"| {where}, {how} | " + " | ".join(number(statistics.median(v)) if v else "" for v in values) + " |"


def machines(results: Results) -> Iterator[str]:
    keys = [column for column in COLUMNS[COLUMNS.index("commit") :] if column != "date"]
    for values in dict.fromkeys(tuple(row[key] for key in keys) for row in results.rows):
        facts = dict(zip(keys, values, strict=True))
        repeats = 1 + max(int(r["repeat"]) for r in results.rows if tuple(r[key] for key in keys) == values)
        versions = ", ".join(f"{name} {facts[name]}" for name in ("python", *PACKAGES))
        yield f"- {facts['cpu model']}, {facts['cores']} cores, commit {facts['commit']}, {repeats} repeats; {versions}"
    if all(setting.startswith("cpu") for setting in results.of("update, hardware")):
        yield "- It has not run on a GPU: those rows are missing below (`--only hardware --cuda --compile` adds them)."
    else:
        yield "- It has run on Linux, on no GPU but those below, and on none with the PyTorch of requirements.txt."
    if not any("compiled" in setting for setting in results.of("update, hardware")):
        yield "- Compiled updates have not been measured (`--only hardware --compile` adds them)."


def draw(results: Results, path: Path) -> None:
    """One training step's time as a stacked bar, above the bare simulator's."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 2.6), layout="constrained")
    left = 0.0
    for part, colour in zip(PARTS, ("0.55", "0.75", "tab:orange", "tab:blue", "tab:green"), strict=True):
        width = results.median("one training step", part)
        axes.barh(1, width, left=left, color=colour, label=f"{part} {width:.3f} ms")
        left += width
    bare = results.median("one training step", "bare simulator beside it")
    axes.barh(0, bare, color="0.9", edgecolor="0.5", label=f"bare simulator {bare:.3f} ms")
    axes.set_yticks([1, 0], ["one training step", "bare simulator step"])
    axes.set_xlabel("ms per environment step: simple_tag_v3, num_envs 1, 2x64, a round of 1,024 every 100 steps")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def report(folder: Path) -> None:
    """Writes speed.md and, where a training step was split, speed.png from results/speed.csv."""
    results = Results(folder / "results" / "speed.csv")
    if not results.rows:
        sys.exit(f"{folder / 'results' / 'speed.csv'} holds no measurements")
    split = bool(results.of("one training step"))
    lines = ["# Speed", ""]
    lines += ["`python benchmark/speed.py` measures this, and its docstring says how. A ratio of training is training"]
    lines += ["steps per second over those of the bare `simple_tag_v3.parallel_env()` measured beside it: all four"]
    lines += ["agents learning, batch 1,024, a full buffer of a million rows, one thread of PyTorch.", ""]
    lines += [*machines(results), "", "## Marks", "", *mark_table(results), ""]
    lines += ["## What the time is spent on", "", paragraph(results), "", "![](speed.png)", ""] if split else []
    if any(not setting.startswith("cpu") for setting in results.of("update, hardware")):
        lines += ["## On a GPU", "", GPU_TEXT, "", *hardware_table(results, "update, hardware"), ""]
        lines += [*hardware_table(results, "training, hardware"), ""]
    lines += ["## Tried, not taken", "", TRIED, ""]
    lines += ["## Learning, with one environment and with many", ""]
    lines += [
        "A round sees the same number of steps, collected in another order. Greedy return of one agent, 100 episodes,"
    ]
    lines += ["each seed with start states of its own:", "", *learning_table(), ""]
    lines += ["## Everything measured", "", *all_table(results), ""]
    (folder / "speed.md").write_text("\n".join(lines))
    if split:
        draw(results, folder / "speed.png")
    print(f"wrote {folder / 'speed.md'}")


def main(args: Args) -> None:
    folder = args.output or (Path(tempfile.mkdtemp(prefix="speed_")) if args.quick and not args.report else HERE)
    if not args.report:
        measure(args, folder / "results" / "speed.csv")
    report(folder)


if __name__ == "__main__":
    main(tyro.cli(Args))

"""docs/questions.md, 8: a critic with one joint input against separate encoders for observations and actions.

    python benchmark/encoders.py                              # about twelve minutes
    python benchmark/encoders.py --steps 600000 --seeds 1 2 3 4 5
    python benchmark/encoders.py --steps 0                    # the time per update only
    python benchmark/encoders.py --quick                      # a test of this program, nothing is written

Both kinds train maddpg_continuous.py on simple_spread_v3 for the same number of updates and differ in `Critic` alone.
The time per update is measured in turns; its ratio divides two figures of one repeat.
"""

import csv
import datetime
import importlib.metadata
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import maddpg_continuous as maddpg

COLUMNS = ["date", "torch", "quantity", "critic", "seed or repeat", "updates", "value"]


@dataclass
class Args:
    steps: int = 50_000
    """environment steps of a training run, 0 for none"""
    seeds: tuple[int, ...] = (1, 2)
    """seeds of the training runs, for both kinds"""
    repeats: int = 9
    """repeats of the time per update, 20 updates each"""
    output: Path = Path(__file__).resolve().parent / "results" / "encoders.csv"
    """file that the figures are appended to"""
    quick: bool = False
    """one short run of each kind, nothing written"""


class SeparateCritic(maddpg.Critic):
    """Half of the first layer's units see all observations, half all actions; then the same layers as before.

    Only for agents that all have central critics and stay to the end, as in simple_spread_v3: `change` may change
    actions alone.
    """

    def __init__(self, obs_mask: Tensor, action_mask: Tensor, hidden_dim: int, central: Tensor):
        super().__init__(obs_mask, action_mask, hidden_dim, central)
        n_agents = len(obs_mask)
        del self.layer_1
        self.obs_layer = maddpg.StackedLinear(torch.ones(n_agents, obs_mask.numel()), hidden_dim // 2)
        self.action_layer = maddpg.StackedLinear(torch.ones(n_agents, action_mask.numel()), hidden_dim // 2)
        self.register_buffer("own_actions", torch.arange(action_mask.numel()).view_as(action_mask))

    def forward(self, obs: Tensor, actions: Tensor, change: Tensor | None = None) -> Tensor:
        n_agents = obs.shape[1]
        from_obs = self.obs_layer(obs.flatten(1).expand(n_agents, -1, -1))
        from_actions = self.action_layer(actions.flatten(1).expand(n_agents, -1, -1))
        if change is not None:
            weight = self.action_layer.weight[self.agent, self.own_actions]
            by_columns = change[:, :, -weight.shape[1] :].permute(1, 2, 0)  # of actions alone
            from_actions = torch.baddbmm(from_actions.mT, weight.mT, by_columns).mT
        x = torch.cat([from_obs.mT, from_actions.mT], 1).relu_().mT
        return self.layer_3(self.layer_2(x, relu=True))[:, :, 0].T


KINDS = {"separate encoders": SeparateCritic, "one joint input": maddpg.Critic}


def learning_starts(steps: int) -> int:
    return min(maddpg.Args.learning_starts, steps // 2)


def train(kind: type, seed: int, steps: int) -> float:
    """The greedy return after training, summed over agents, mean of 100 episodes."""
    args = maddpg.Args(
        env_id="simple_spread_v3",
        total_timesteps=steps,
        learning_starts=learning_starts(steps),
        checkpoint_frequency=0,
        num_workers=0,
        seed=seed,
    )
    here = os.getcwd()
    with mock.patch.object(maddpg, "Critic", kind), tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            networks, _, _ = maddpg.main(args)
        finally:
            os.chdir(here)
    games = maddpg.Games(maddpg.game_maker(args), 10)
    returns, _ = maddpg.evaluate(networks, games, 100, 1_000 + seed, None)
    return returns.sum(1).mean().item()


def learner(kind: type):
    """A function that makes one round of updates on a buffer of random steps."""
    torch.manual_seed(0)
    args = maddpg.Args(env_id="simple_spread_v3")
    games = maddpg.Games(maddpg.game_maker(args), 1)
    with mock.patch.object(maddpg, "Critic", kind):
        networks = maddpg.Networks(games, args)
    optimizers = tuple(
        torch.optim.Adam(network.parameters(), lr=1e-3, fused=True) for network in (networks.actor, networks.critic)
    )
    rb = maddpg.ReplayBuffer(10_000, games, torch.device("cpu"))
    rb.rows.uniform_()
    rb.added = len(rb.rows)
    return lambda: maddpg.update(networks, optimizers, rb.sample(args.batch_size), args)


def write(lines: list[list], args: Args) -> None:
    if args.quick:
        return
    args.output.parent.mkdir(exist_ok=True)
    first = not args.output.exists()
    about = [datetime.date.today(), importlib.metadata.version("torch")]
    with open(args.output, "a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([COLUMNS] * first + [[*about, *line] for line in lines])


def main(args: Args) -> None:
    torch.set_num_threads(1)
    if args.quick:
        args.steps, args.seeds, args.repeats = min(args.steps, 2_000), (1,), 2
    lines, updates = [], 20
    learners = {name: learner(kind) for name, kind in KINDS.items()}
    for repeat in range(-1, args.repeats):
        for name, learn in learners.items():
            start = time.perf_counter()
            for _ in range(updates):
                learn()
            if repeat >= 0:  # the first round is burn-in
                milliseconds = 1e3 * (time.perf_counter() - start) / updates
                lines.append(["ms per update", name, repeat, updates, f"{milliseconds:.3f}"])
    write(lines, args)
    times = [[float(line[-1]) for line in lines if line[1] == name] for name in KINDS]
    ratio = statistics.median(separate / joint for separate, joint in zip(*times, strict=True))
    print(f"time per update, separate encoders over one joint input: {ratio:.2f}", flush=True)

    rounds = (args.steps - learning_starts(args.steps)) // maddpg.Args.train_frequency
    for seed in args.seeds if args.steps else ():
        for name, kind in KINDS.items():
            value = train(kind, seed, args.steps)
            write([["greedy return, sum over agents", name, seed, rounds, f"{value:.3f}"]], args)
            print(f"{name}, seed {seed}, {rounds} updates: {value:.1f}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))

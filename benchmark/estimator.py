"""What the discrete actors learn from, beside the exact gradient: three estimators on trained networks.

    python benchmark/estimator.py RUN RUN ...          # run folders of maddpg_discrete.py; about half a minute each
    python benchmark/estimator.py RUN --quick          # a test of this program, nothing is written

With n actions, agent i's expected value in a state is sum_j p_j Q_i(..., j, ...), p the softmax of its logits, the
others' actions as played. Its exact gradient with respect to the logits is p_j (Q_j - sum_k p_k Q_k). What the
estimators give instead, over many samples of the noise, is

- straight-through: the critic is asked for a one-hot sample, the gradient is passed on to the Gumbel-softmax vector. So
  it is the critic's slope *at* an action, which no data pins down, in place of the difference *between* actions
- vector: the critic is asked for the Gumbel-softmax vector, between the actions that it has learned about
- weighted: the critic is asked for every action, and the vector weighs the answers. So does the script

States are those of exploring play, without each episode's first ten steps. States that an agent's own observation does
not tell apart are one to its actor (a speaker sees a goal, and not where the listener is), so their gradients are
summed before the comparison. Of an agent's gradient g, over all states, and the exact one e the table has

- size: <g, e> / <e, e>, the share of the exact gradient that arrives
- cosine: <g, e> / (|g| |e|), below 0 where it points away
- noise: the deviation of a single sample's gradient, over |e|
"""

import csv
import datetime
import importlib.metadata
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import maddpg_discrete as maddpg

KINDS = ["straight-through", "vector", "weighted"]
REPEATS = 100  # noise samples at once
COLUMNS = ["date", "torch", "run", "agent", "estimator", "temperature", "states", "samples", "size", "cosine", "noise"]


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]]
    """run folders, or their model.pt"""
    temperatures: tuple[float, ...] = (1.0, 0.25)
    """temperatures of the softmax, for all three"""
    states: int = 300
    """states of exploring play"""
    samples: int = 1_000
    """noise samples in each state, a multiple of 100"""
    output: Path = Path(__file__).resolve().parent / "results" / "estimator.csv"
    """file that the figures are appended to"""
    quick: bool = False
    """few states and samples, nothing written"""


def played(networks: maddpg.Networks, games: maddpg.Games, states: int) -> tuple[Tensor, Tensor]:
    """Observations and actions of exploring play, [states, n_agents, ...] each."""
    steps, data = [], games.reset(seed=1)[0]
    length = 0
    while len(steps) * len(games.games) < states:
        obs = torch.from_numpy(data["obs"])
        actions = maddpg.choose(networks.actor, obs, 1.0, networks.random_agents)
        if length >= 10:
            steps.append((obs, actions))
        data, *_ = games.step(actions.numpy())
        length = 0 if data["done"].any() else length + 1
    return tuple(torch.cat(tensors)[:states] for tensors in zip(*steps, strict=True))


def q_of_actions(networks: maddpg.Networks, obs: Tensor, actions: Tensor) -> Tensor:
    """Q_i at each of agent i's actions, the others' as played: [batch, n_agents, action_dim]."""
    q_values = networks.critic(obs, actions, networks.actor.one_hots - actions)
    return q_values.unflatten(0, (-1, len(obs))).movedim(0, 2)


def exact_gradient(networks: maddpg.Networks, obs: Tensor, actions: Tensor) -> Tensor:
    """p_j (Q_j - sum_k p_k Q_k), [states, n_agents, action_dim]; zero where padded."""
    p = (networks.actor(obs) + networks.actor.padding_logits).softmax(2)
    q = q_of_actions(networks, obs, actions)
    return p * (q - (p * q).sum(2, keepdim=True))


def sampled_gradient(networks: maddpg.Networks, obs: Tensor, actions: Tensor, kind: str, temperature: float) -> Tensor:
    """The gradient of Q_i with respect to agent i's logits, with one sample of the noise for each row."""
    logits = networks.actor(obs).requires_grad_(True)
    gumbel = -torch.empty_like(logits).exponential_().log()
    vector = ((logits + gumbel) / temperature + networks.actor.padding_logits).softmax(2) * networks.actor.action_mask
    if kind == "weighted":
        value = vector * q_of_actions(networks, obs, actions)
    else:
        one_hot = torch.zeros_like(vector).scatter_(2, vector.argmax(2, keepdim=True), 1.0)
        own = vector if kind == "vector" else one_hot + vector - vector.detach()
        value = networks.critic(obs, actions, own - actions)
    return torch.autograd.grad(value.sum(), logits)[0]


def measure(run: str, args: Args) -> list[list]:
    saved = maddpg.load(run, "model.pt")
    games = maddpg.Games(maddpg.game_maker(maddpg.Args(**saved["args"])), 10)
    if games.n_choices > 1 or games.relaxed:
        raise maddpg.UsageError(f"{run}: the exact gradient needs one choice per agent")
    networks = maddpg.Networks(games, maddpg.Args(**saved["args"])).requires_grad_(False)
    networks.restore(saved)
    obs, actions = played(networks, games, args.states)
    exact, lines = exact_gradient(networks, obs, actions), []
    name = "{exp_name}/{env_id}/{seed}/{total_timesteps}".format(**saved["args"])
    about = [datetime.date.today(), importlib.metadata.version("torch"), name]
    for kind in KINDS:
        for temperature in args.temperatures:
            total, square = torch.zeros_like(exact), torch.zeros_like(exact)
            for _ in range(args.samples // REPEATS):
                batch = obs.repeat(REPEATS, 1, 1), actions.repeat(REPEATS, 1, 1)
                gradient = sampled_gradient(networks, *batch, kind, temperature).unflatten(0, (REPEATS, -1))
                total += gradient.sum(0)
                square += gradient.square().sum(0)
            mean = total / args.samples
            for i, agent in enumerate(games.agents):
                if not networks.learns[i]:
                    continue
                _, group = torch.unique(obs[:, i], dim=0, return_inverse=True)
                g, e, single = (
                    torch.zeros(len(obs), values.shape[2]).index_add_(0, group, values[:, i])
                    for values in (mean, exact, square / args.samples - mean**2)
                )
                cross, length = (g * e).sum().item(), e.norm().item()
                figures = cross / length**2, cross / (g.norm().item() * length), single.sum().sqrt().item() / length
                line = [agent, kind, temperature, len(obs), args.samples]
                lines.append([*about, *line, *(f"{x:.3f}" for x in figures)])
                print(f"{name} {agent:12} {kind:17} {temperature}  size %.2f  cosine %.2f  noise %.1f" % figures)
    return lines


def main(args: Args) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    np.random.seed(1)
    if args.samples < REPEATS or args.samples % REPEATS:
        sys.exit(f"estimator.py: --samples {args.samples} must be a multiple of {REPEATS}")
    if args.quick:
        args.states, args.samples = 50, REPEATS
    for run in args.runs:
        try:
            lines = measure(run, args)
        except maddpg.UsageError as error:
            print(f"estimator.py: {error}", file=sys.stderr)
            sys.exit(2)
        if not args.quick:
            first = not args.output.exists()
            with open(args.output, "a", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows([COLUMNS] * first + lines)


if __name__ == "__main__":
    main(tyro.cli(Args))

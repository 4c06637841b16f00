"""Why a short discount learns sooner: what trained critics say of an action, beside what happens after it.

    python benchmark/discount.py RUN RUN ...           # runs of maddpg_discrete.py in simple_spread_v3; minutes each
    python benchmark/discount.py RUN --quick           # a test of this program, nothing is written

States are those of exploring play. In each one agent tries every action, the others' as played; from there on all
explore, in 16 copies of the game with noise of their own, the same noise after every action. The mean over the copies
of sum_k gamma^k r_k, over 60 steps without a time limit, is what Q_i stands for. The table has

- values: the correlation of Q_i with that mean, over states and actions
- error: the root of their mean squared difference
- effect: the deviation of that mean over the actions of one state, which is all that an actor can learn from
- actions: the correlation of Q_i and the mean, each less its average over the state's actions
- reliability: of these means, from the two halves of the copies; `actions` can hardly exceed its root
- undiscounted: the correlation, over the actions of one state, of the mean with that of the undiscounted rest of the
  episode of 25 steps, by which policies are judged
"""

import csv
import datetime
import functools
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

COPIES, HORIZON, EPISODE = 16, 60, 25
COLUMNS = ["date", "torch", "run", "gamma", "states", "values", "error", "effect", "actions", "reliability"]
COLUMNS += ["undiscounted"]


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]]
    """run folders, or their model.pt"""
    states: int = 100
    """states in which an agent tries its actions"""
    output: Path = Path(__file__).resolve().parent / "results" / "discount.csv"
    """file that the figures are appended to"""
    quick: bool = False
    """four states, nothing written"""


def explore(networks: maddpg.Networks, obs: Tensor, gumbel: Tensor) -> Tensor:
    """One-hot samples of the policies, with this noise: [batch, n_agents, n_options]."""
    logits = networks.actor(obs) + gumbel
    return torch.zeros_like(logits).scatter_(2, logits.argmax(2, keepdim=True), 1.0)


def gumbel_noise(*shape: int) -> Tensor:
    return -torch.empty(shape).exponential_().log()


def put(games: maddpg.Games, world) -> None:
    """Begins an episode of all games in the state of this simple_spread world."""
    games.reset(seed=1)
    for game in games.games:
        for entity, other in zip(game.unwrapped.world.entities, world.entities, strict=True):
            entity.state.p_pos, entity.state.p_vel = other.state.p_pos.copy(), other.state.p_vel.copy()


def tried(networks: maddpg.Networks, games: maddpg.Games, source: maddpg.Games, gamma: float, seed: int) -> np.ndarray:
    """Of one state and agent: Q_i [n_options] above discounted and undiscounted returns [2 * copies, n_options]."""
    rng, (data, _) = np.random.default_rng(seed), source.reset(seed=seed)
    n_agents, n_options = networks.actor.action_mask.shape
    step, i = rng.integers(EPISODE), rng.integers(n_agents)
    for _ in range(step):
        obs = torch.from_numpy(data["obs"])
        data, *_ = source.step(explore(networks, obs, gumbel_noise(1, n_agents, n_options)).numpy())
    obs = torch.from_numpy(data["obs"])
    actions = explore(networks, obs, gumbel_noise(1, n_agents, n_options))
    q_values = networks.critic(obs, actions, networks.actor.one_hots - actions)[:, i]
    put(games, source.games[0].unwrapped.world)
    actions = actions.repeat(COPIES, n_options, 1, 1)
    actions[:, :, i] = torch.eye(n_options)
    discounted, rest = np.zeros((2, COPIES, n_options))
    for k in range(HORIZON):
        data, *_ = games.step(actions.flatten(0, 1).numpy())
        rewards = data["rewards"][:, i].reshape(COPIES, n_options).astype(float)
        discounted += gamma**k * rewards
        rest += rewards * (k < EPISODE - step)
        gumbel = gumbel_noise(COPIES, 1, n_agents, n_options).expand(-1, n_options, -1, -1)
        actions = explore(networks, torch.from_numpy(data["obs"]), gumbel.flatten(0, 1)).unflatten(0, (COPIES, -1))
    return np.concatenate([q_values.numpy()[None], discounted, rest])


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return np.corrcoef(a.ravel(), b.ravel())[0, 1]


def effect(values: np.ndarray) -> np.ndarray:
    """Less the average over a state's actions, the last dimension."""
    return values - values.mean(-1, keepdims=True)


def measure(run: str, states: int) -> list:
    saved = maddpg.load(run, "model.pt")
    args = maddpg.Args(**saved["args"])
    if args.env_id != "simple_spread_v3" or args.relaxed:
        raise maddpg.UsageError(f"{run}: this takes discrete runs of simple_spread_v3")
    make = functools.partial(maddpg.make_game, args.env_id, {"max_cycles": 10_000}, continuous_actions=False)
    games, source = maddpg.Games(make, COPIES * 5), maddpg.Games(make, 1)
    networks = maddpg.Networks(source, args).requires_grad_(False)
    networks.restore(saved)
    table = np.stack([tried(networks, games, source, args.gamma, seed) for seed in range(states)])
    q_values, copies, rest = table[:, 0], table[:, 1 : COPIES + 1], table[:, COPIES + 1 :].mean(1)
    returns = copies.mean(1)
    halves = correlation(effect(copies[:, ::2].mean(1)), effect(copies[:, 1::2].mean(1)))
    figures = [correlation(q_values, returns), ((q_values - returns) ** 2).mean() ** 0.5, effect(returns).std()]
    figures += [correlation(effect(q_values), effect(returns)), 2 * halves / (1 + halves)]
    figures += [correlation(effect(returns), effect(rest))]
    name = "{exp_name}/{env_id}/{seed}/{total_timesteps}".format(**saved["args"])
    print(f"{name} gamma {args.gamma}:", ", ".join(f"{c} {x:.3f}" for c, x in zip(COLUMNS[5:], figures, strict=True)))
    about = [datetime.date.today(), importlib.metadata.version("torch"), name, args.gamma, states]
    return [*about, *(f"{x:.3f}" for x in figures)]


def main(args: Args) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    rows = [measure(run, 4 if args.quick else args.states) for run in args.runs]
    if not args.quick:
        new = not args.output.exists()
        with open(args.output, "a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS] * new + rows)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except maddpg.UsageError as error:
        print(f"discount.py: {error}", file=sys.stderr)
        sys.exit(2)

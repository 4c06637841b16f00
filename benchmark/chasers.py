"""What scripted predators have in simple_tag_v3 against a random prey, for both kinds of action.

    python benchmark/chasers.py

Every predator pushes with all its force towards where the prey will be after `lead` seconds, if both keep their
velocity; a step takes 0.1. Discrete actions push along the longer axis, continuous ones along both. A lead of 0 is the
greedy chaser, which overshoots. Plays them by the scripts' own `evaluate` and writes results/chasers.csv: means of one
predator's return over the episodes, and their standard errors.
"""

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.stats import sem
from tables import ROOT, count, load_script
from torch import Tensor

LEADS = 0.0, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5


def chase(obs: Tensor, lead: float) -> Tensor:
    """Forces along mpe2's actions, none, left, right, down, up, the largest of them 1: [batch, n_agents, 5].

    A predator's `obs` begins with its own velocity and ends with the prey's relative position and its velocity.
    """
    aim = obs[..., 12:14] + lead * (obs[..., 14:16] - obs[..., :2])
    x, y = (aim / aim.abs().amax(-1, keepdim=True).clamp(min=1e-9)).unbind(-1)
    return torch.stack([torch.zeros_like(x), -x, x, -y, y], -1).clamp(min=0)


def chaser(name: str, lead: float) -> Callable[[Tensor], Tensor]:
    """`chase` as an actor of the script `name`: forces are logits there, or continuous actions -1 to 1 for 0 to 1."""
    return lambda obs: chase(obs, lead) if name == "maddpg_discrete" else chase(obs, lead) * 2 - 1


def predators_return(name: str, actor: Callable[[Tensor], Tensor], episodes: int, seed: int) -> np.ndarray:
    """One predator's returns where `actor` acts in place of the networks of the script `name`: [episodes]."""
    script = load_script(name)
    args = script.Args(env_id="simple_tag_v3", random_agents=("agent",), num_workers=0)
    games = script.Games(script.game_maker(args), 10)
    networks = script.Networks(games, args)
    networks.actor.forward = actor
    return script.evaluate(networks, games, episodes, seed, networks.random_agents)[0][:, 0]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=count, default=2_000)
    parser.add_argument("--seed", type=int, default=1, help="of the episodes")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmark/results", help="where the file goes")
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    with open(args.output / "chasers.csv", "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["script", "lead", "episodes", "episodic_return", "standard_error"])
        for name in "maddpg_continuous", "maddpg_discrete":
            for lead in LEADS:
                returns = predators_return(name, chaser(name, lead), args.episodes, args.seed)
                error = sem(returns)
                table.writerow([f"{name}.py", lead, len(returns), f"{returns.mean():.2f}", f"{error:.2f}"])
                print(f"{name}.py, lead {lead}: {returns.mean():.1f} +- {error:.1f}")


if __name__ == "__main__":
    main()

"""What predators that plan have in simple_tag_v3 against a random prey: more than this is not known to be in the game.

    python benchmark/planner.py

They see what the three of them see together, know the physics, and plan by the cross-entropy method: of a number of
random sequences of joint actions, each played on against a prey that acts at random, the best tenth says how the next
are drawn. They push along one axis at a time, as the discrete script's agents must. More sequences find better plans,
so it is no upper bound. Played by `evaluate` of maddpg_discrete.py; rows are appended to results/planner.csv: the mean
of one predator's return over the episodes, and its standard error. 100 episodes take about ten minutes.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from chasers import predators_return
from scipy.stats import sem
from tables import ROOT, append, count
from torch import Tensor

COLUMNS = ["sequences", "horizon", "iterations", "episodes", "episodic_return", "standard_error"]
SIZE, ACCELERATION, MAX_SPEED = np.array([[0.075, 3, 1]] * 3 + [[0.05, 4, 1.3]]).T  # three predators and the prey
DIRECTION = np.array([[0.0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]])  # of mpe2's actions
LANDMARK, TOUCH = 0.2, 0.075 + 0.05


def contact(apart: np.ndarray, least: np.ndarray) -> np.ndarray:
    """Force on the first of two bodies `apart` [..., 2] from each other that should be `least` apart: [..., 2]."""
    distance = np.linalg.norm(apart, axis=-1)
    return (100 * 1e-3 * np.logaddexp(0, (least - distance) / 1e-3) / distance)[..., None] * apart


def move(position: np.ndarray, velocity: np.ndarray, landmarks: np.ndarray, actions: np.ndarray) -> tuple:
    """Positions and velocities [..., 4, 2] after one step of mpe2's `World`; landmarks [..., 2, 2], actions [..., 4].

    Positions move by the velocities before the step, as there.
    """
    apart = position[..., :, None, :] - position[..., None, :, :]
    between = contact(apart + 9 * np.eye(4)[..., None], SIZE[:, None] + SIZE)  # no body touches itself
    fixed = contact(position[..., :, None, :] - landmarks[..., None, :, :], SIZE[:, None] + LANDMARK)
    force = DIRECTION[actions] * ACCELERATION[:, None] + between.sum(-2) + fixed.sum(-2)
    faster = 0.75 * velocity + 0.1 * force
    too_fast = np.linalg.norm(faster, axis=-1) / MAX_SPEED
    return position + 0.1 * velocity, faster / np.maximum(too_fast, 1)[..., None]


def seen(obs: np.ndarray) -> tuple:
    """Positions and velocities [games, 4, 2] and landmarks [games, 2, 2], from `obs` [games, 4, 16]."""
    first = obs[:, 0]
    position = np.concatenate([obs[:, :3, 2:4], (first[:, 2:4] + first[:, 12:14])[:, None]], 1)
    velocity = np.concatenate([obs[:, :3, :2], first[:, None, 14:16]], 1)
    return position, velocity, first[:, None, 2:4] + first[:, 4:8].reshape(-1, 2, 2)


class Planner:
    """Called as an actor is, with `obs` [games, 4, 16] of one step after the other: logits [games, 4, 5]."""

    def __init__(self, sequences: int, horizon: int, iterations: int, seed: int):
        self.sequences, self.horizon, self.iterations = sequences, horizon, iterations
        self.rng = np.random.default_rng(seed)

    def __call__(self, obs: Tensor) -> Tensor:
        position, velocity, landmarks = seen(obs.double().numpy())
        none = np.full((len(obs), 3, self.horizon, 5), 0.2)
        if not velocity.any():  # the first step of the episodes
            self.chances = none
        # One step of the last plan is over; what it said may be wrong by now
        self.chances = 0.5 * np.concatenate([self.chances[:, :, 1:], none[:, :, :1]], 2) + 0.5 * none
        for _ in range(self.iterations):
            below = self.chances.cumsum(-1)[:, None, ..., :4]
            plans = (self.rng.random((len(obs), self.sequences, 3, self.horizon, 1)) > below).sum(-1)
            scores = self.scores(position, velocity, landmarks, plans)
            best = np.argsort(-scores, axis=1)[:, : max(self.sequences // 10, 5), None, None]
            chosen = np.take_along_axis(plans, best, 1)
            self.chances = 0.3 * self.chances + 0.7 * np.stack([(chosen == k).mean(1) for k in range(5)], -1)
        logits = np.concatenate([self.chances[:, :, 0], none[:, :1, 0]], 1)
        return torch.from_numpy(logits).float()

    def scores(self, position: np.ndarray, velocity: np.ndarray, landmarks: np.ndarray, plans: np.ndarray):
        """Touches in the steps of each plan, less a little of the mean distances: [games, sequences]."""
        shape = plans.shape[:2]
        position, velocity = (np.broadcast_to(of[:, None], (*shape, 4, 2)) for of in (position, velocity))
        scores = np.zeros(shape)
        for step in range(self.horizon):
            prey = self.rng.integers(0, 5, (*shape, 1))
            actions = np.concatenate([plans[..., step], prey], -1)
            position, velocity = move(position, velocity, landmarks[:, None], actions)
            distance = np.linalg.norm(position[..., :3, :] - position[..., 3:, :], axis=-1)
            scores += (distance < TOUCH).sum(-1) - 0.05 * distance.sum(-1) / self.horizon
        return scores


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=count, default=3_000, help="drawn at a time")
    parser.add_argument("--horizon", type=count, default=8, help="steps that they are long")
    parser.add_argument("--iterations", type=count, default=4, help="how often they are drawn in each step of the game")
    parser.add_argument("--episodes", type=count, default=100)
    parser.add_argument("--seed", type=int, default=1, help="of the episodes and the planner")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmark/results", help="where the file goes")
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    planner = Planner(args.sequences, args.horizon, args.iterations, args.seed)
    returns = predators_return("maddpg_discrete", planner, args.episodes, args.seed)
    row = [args.sequences, args.horizon, args.iterations, len(returns), f"{returns.mean():.2f}", f"{sem(returns):.2f}"]
    print(*(f"{name} {value}" for name, value in zip(COLUMNS, row, strict=True)), sep=", ")
    append(args.output / "planner.csv", COLUMNS, [row])


if __name__ == "__main__":
    main()

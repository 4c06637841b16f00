"""What trained predators could still gain by single actions in simple_tag_v3, and whether their critics know.

    python benchmark/improvement.py RUN RUN ...        # run folders of maddpg_discrete.py against a random prey

Three plays of the same episodes, each by `evaluate` of maddpg_discrete.py: the greedy policy as it is, and twice with
one predator's action changed in every step, the one that promises most, by the discounted values of

- the critics, each asked for its own predator's actions, the mean over the prey's
- rollouts: the game played on for `--horizon` steps, `--rollouts` times, with the physics of planner.py, the predators
  greedy and the prey at random, the same prey for all actions

Where the policy has converged to its critics and they are right, neither gains. Where rollouts gain and the critics do
not, it is the critics that stand in the way. Both know what the predators see together, an actor its part alone. What
is in its reach, `--fits` tries: so many times, the actors are trained on by rollouts' values in place of the critics',
in `--steps` steps of their own play, and then play the episodes as they are, the greedy policy ("fitted actors").

Rows are appended to results/improvement.csv: the mean of one predator's return over the episodes, and its standard
error. A run takes about two minutes, and four more for each fit.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from planner import TOUCH, move, seen
from scipy.stats import sem
from tables import ROOT, append, count, load_script
from torch import Tensor

maddpg = load_script("maddpg_discrete")
COLUMNS = ["run", "values", "horizon", "rollouts", "episodes", "episodic_return", "standard_error"]


def observed(position: np.ndarray, velocity: np.ndarray, landmarks: np.ndarray) -> Tensor:
    """What `seen` was read from, of the predators; the prey's row is zeros: [games, 4, 16]."""
    obs = torch.zeros(len(position), 4, 16)
    for i in range(3):
        apart = np.concatenate([landmarks, np.delete(position, i, 1)], 1) - position[:, i : i + 1]
        parts = velocity[:, i], position[:, i], apart.reshape(-1, 10), velocity[:, 3]
        obs[:, i] = torch.from_numpy(np.concatenate(parts, 1))
    return obs


class Improved:
    """The greedy policy but for the one action whose change promises most: called as an actor is.

    By the critics where there are no `rollouts`.
    """

    def __init__(self, networks, policy, gamma: float, horizon: int, rollouts: int, seed: int):
        self.networks, self.policy = networks, policy
        self.gamma, self.horizon, self.rollouts = gamma, horizon, rollouts
        self.rng = np.random.default_rng(seed)

    def __call__(self, obs: Tensor) -> Tensor:
        greedy = self.policy(obs).argmax(2)
        values = (self.by_rollouts if self.rollouts else self.by_critics)(obs, greedy)
        gain, best = (values - values.gather(2, greedy[:, :3, None])).flatten(1).max(1)
        game = (gain > 0).nonzero()[:, 0]
        greedy[game, best[game] // 5] = best[game] % 5
        return torch.eye(5)[greedy]

    def by_critics(self, obs: Tensor, greedy: Tensor) -> Tensor:
        """Q_i at each of predator i's actions, the other predators greedy: [games, 3, 5]."""
        total = torch.zeros(len(obs), 4, 5)
        for prey in range(5):
            actions = torch.eye(5)[greedy]
            actions[:, 3] = torch.eye(5)[prey]
            change = self.networks.actor.one_hots - actions
            total += self.networks.critic(obs, actions, change).unflatten(0, (5, -1)).movedim(0, 2)
        return total[:, :3] / 5

    def by_rollouts(self, obs: Tensor, greedy: Tensor) -> Tensor:
        """Discounted returns after each of predator i's actions, the other predators greedy: [games, 3, 5]."""
        shape = len(obs), 3, 5, self.rollouts
        position, velocity, landmarks = (
            np.broadcast_to(of[:, None, None, None], (*shape, *of.shape[1:])).reshape(-1, *of.shape[1:])
            for of in seen(obs.double().numpy())
        )
        actions = greedy.numpy()[:, None, None, None].repeat(3, 1).repeat(5, 2).repeat(self.rollouts, 3)
        for i in range(3):
            actions[:, i, :, :, i] = np.arange(5)[:, None]
        actions, returns = actions.reshape(-1, 4), np.zeros(np.prod(shape))
        for step in range(self.horizon):
            if step:
                actions = self.policy(observed(position, velocity, landmarks)).argmax(2).numpy()
            prey = self.rng.integers(0, 5, (len(obs), 1, 1, self.rollouts))
            actions[:, 3] = np.broadcast_to(prey, shape).reshape(-1)
            position, velocity = move(position, velocity, landmarks, actions)
            distance = np.linalg.norm(position[:, :3] - position[:, 3:], axis=2)
            returns += self.gamma**step * 10 * (distance < TOUCH).sum(1)
        return torch.from_numpy(returns.reshape(shape).mean(3))


def fit(actor, improved: Improved, games, random_agents: Tensor, steps: int, seed: int) -> None:
    """Trains `actor`, the policy of `improved`, by rollouts' values of its actions in `steps` steps of its own play.

    Every second episode is played greedily, the others by samples. The loss is that of MADDPG's actors, with the exact
    probabilities as weights, over 20 passes.
    """
    met, values = [], []
    data, _ = games.reset(seed=seed)
    for step in range(steps // len(data["obs"])):
        obs = torch.from_numpy(data["obs"].copy())
        with torch.no_grad():
            met.append(obs)
            values.append(improved.by_rollouts(obs, actor(obs).argmax(2)))
            actions = maddpg.choose(actor, obs, step // 25 % 2, random_agents)
        data, *_ = games.step(actions.numpy())
    obs, values = torch.cat(met), torch.cat(values).float()
    advantages = values - values.mean(2, keepdim=True)
    actor.requires_grad_(True)
    optimizer = torch.optim.Adam(actor.parameters(), lr=1e-3)
    for rows in (rows for _ in range(20) for rows in torch.randperm(len(obs)).split(512)):
        logits = actor(obs[rows])[:, :3]
        loss = 1e-3 * (logits**2).mean() - (logits.softmax(2) * advantages[rows]).sum(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    actor.requires_grad_(False)


def measure(run: str, args: argparse.Namespace) -> list[list]:
    saved = maddpg.load(run, "model.pt")
    trained = maddpg.Args(**saved["args"])
    if trained.env_id != "simple_tag_v3" or trained.random_agents != ("agent",) or trained.relaxed:
        raise maddpg.UsageError(f"{run}: must be a run of simple_tag_v3 with --random-agents agent, without --relaxed")
    games = maddpg.Games(maddpg.game_maker(trained), 10)
    networks = maddpg.Networks(games, trained).requires_grad_(False)
    networks.restore(saved)
    actor, policy, lines = networks.actor, networks.actor.forward, []
    name = "{exp_name}/{env_id}/{seed}/{total_timesteps}".format(**saved["args"])
    by_rollouts = args.horizon, args.rollouts
    plays = [("none", 0, 0), ("critics", 0, 0), ("rollouts", *by_rollouts)]
    plays += [(f"fitted actors, {k + 1}", *by_rollouts) for k in range(args.fits)]
    for k, (values, *rolled) in enumerate(plays):
        improved = Improved(networks, policy, trained.gamma, *rolled, args.seed)
        actor.forward = improved if values in ("critics", "rollouts") else policy
        if values.startswith("fitted"):
            torch.manual_seed(args.seed + k)
            fit(actor, improved, games, networks.random_agents, args.steps, args.seed + k)  # in other episodes
        returns = maddpg.evaluate(networks, games, args.episodes, args.seed, networks.random_agents)[0][:, 0]
        mean, error = f"{returns.mean():.2f}", f"{sem(returns):.2f}"
        lines.append([name, values, *rolled, len(returns), mean, error])
        print(f"{name}, {values}: {mean} +- {error}", flush=True)
    return lines


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or their model.pt")
    parser.add_argument("--horizon", type=count, default=10, help="steps that a rollout goes on")
    parser.add_argument("--rollouts", type=count, default=16, help="for each action")
    parser.add_argument("--fits", type=count, default=0, help="how often actors are trained by rollouts' values")
    parser.add_argument("--steps", type=count, default=15_000, help="of play that a fit learns from")
    parser.add_argument("--episodes", type=count, default=200)
    parser.add_argument("--seed", type=int, default=1, help="of the episodes and the rollouts")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmark/results", help="where the file goes")
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    for run in args.runs:
        try:
            lines = measure(run, args)
        except maddpg.UsageError as error:
            print(f"improvement.py: {error}", file=sys.stderr)
            sys.exit(2)
        append(args.output / "improvement.csv", COLUMNS, lines)


if __name__ == "__main__":
    main()

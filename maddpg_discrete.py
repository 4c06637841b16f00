# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "numpy==2.4.6", "gymnasium==1.4.0", "pettingzoo==1.27.0", "mpe2==1.1.1", "tyro==1.0.17",
#     "tensorboard==2.21.0", "tqdm==4.70.1", "psutil==7.2.2", "pillow==13.0.0",
# ]
# ///
"""MADDPG for discrete actions in one file: Multi-Agent Deep Deterministic Policy Gradient, Lowe et al. 2017.

Every agent i has an actor mu_i(o_i) that sees its own observation alone and, in training only, a critic
Q_i(x, a_1, ..., a_N) that sees everyone's observations x = (o_1, ..., o_N) and actions (https://arxiv.org/abs/1706.02275).

    pip install torch numpy gymnasium pettingzoo mpe2 tyro tensorboard tqdm psutil pillow
    python maddpg_discrete.py --env-id simple_tag_v3
    tensorboard --logdir runs

All agents learn as one stack: a parameter has a leading agent dimension, and one batched matrix product serves all.
Observations and actions are padded to the widest agent; masks keep the padding out of every result. Shapes:

    obs, next_obs      [batch, n_agents, obs_dim]
    actions            [batch, n_agents, action_dim]  in [-1, 1] or one-hot (--relaxed: soft), mapped by `Games`
    rewards            [batch, n_agents]
    terminations       [batch, n_agents]              1 where the agent's own end cuts the bootstrap, never a time limit
    alive, next_alive  [batch, n_agents]              1 where the agent acts; 1 where it is still there afterwards

An agent that has left has zeros in all of them.

The twins maddpg_continuous.py and maddpg_discrete.py differ in what their actions require and in nothing else;
docs/continuous_to_discrete.diff shows it. docs/maddpg.md explains details, docs/adapting.md has patches to build on.
"""

import argparse
import contextlib
import copy
import ctypes
import difflib
import errno
import functools
import importlib.util
import json
import math
import os
import random
import re
import signal
import sys
import time
import warnings
import zipfile
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pettingzoo
import psutil
import torch
import tyro
from gymnasium import spaces
from mpe2.all_modules import mpe_environments
from pettingzoo.env_registry.exceptions import FailedToImport
from pettingzoo.utils.conversions import aec_to_parallel
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

LOG_FREQUENCY = 1_000  # environment steps between two points of the charts
EVAL_SEEDS = 2**32  # added to the run's seed, so that evaluation plays none of training's episodes
LONGEST_EPISODE = 30_000  # steps (Atari: 27,000); in a game without a time limit a policy may walk in circles for ever


class UsageError(Exception):
    """Ends the command with status 2 and one line, its message, that says what is wrong and what to do."""


# ---- Arguments -------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    env_id: str = "simple_tag_v3"
    """Gymnasium id (Pendulum-v1), mpe2 scenario (simple_tag_v3), PettingZoo id (sisl/multiwalker-v9), or a module that
    has a `parallel_env` (my_package.my_game)"""
    env_kwargs: str = "{}"
    """keyword arguments of the environment, as JSON: '{"max_cycles": 50}'"""
    total_timesteps: int = 100_000
    """environment steps, over all games, rounded down to a multiple of num_envs; in one step every agent acts once. The
    default is a first look of minutes (original code: 1.5 million)"""
    seed: int = 1
    """seed of networks, noise, batches and games"""
    exp_name: str = Path(__file__).stem
    """name of this experiment, part of the run folder's name"""
    ddpg_agents: tuple[str, ...] = ()
    """agents whose critic sees only their own observation and action: a full name, or a prefix for all that begin so"""
    random_agents: tuple[str, ...] = ()
    """agents that act uniformly at random and learn nothing, named likewise: `agent` is the prey of simple_tag"""

    hidden_dim: int = 128
    """units in each of two hidden layers (original code: 64, for the paper's figures 128)"""
    actor_learning_rate: float = 1e-3
    """Adam step size of the actors (paper: 1e-2, with a round every 100 steps)"""
    critic_learning_rate: float = 1e-3
    """Adam step size of the critics (paper: 1e-2)"""
    gamma: float = 0.8
    """discount per step (paper: 0.95). 0.8 looks about 5 steps ahead, best where actions pay off soon, as in
    simple_spread; longer plans, as in Pendulum-v1, and chases, as in simple_tag, want 0.95 to 0.99"""
    tau: float = 0.01
    """fraction of the way that the target networks move in each round, Polyak averaging (original code: the same)"""
    batch_size: int = 1024
    """steps in the batch of a round, drawn with replacement, the same for all agents (original code: one each)"""
    buffer_size: int = 100_000
    """steps that the replay buffer holds: fewer forget old policies and the random start sooner, more keep variety.
    Discrete: 100,000, since the start's random messages teach that messages mean nothing (original code: 1 million)"""
    learning_starts: int = 10_000
    """environment steps of random play before the first round (original code: 25,600, played by the policies)"""
    train_frequency: int = 25
    """environment steps per round of updates (original code: 100)"""
    gumbel_temperature: float = 1.0
    """temperature of the softmax in the actors' loss, with --relaxed everywhere; one-hot samples do not depend on it"""
    logit_regularization: float = 1e-3
    """weight of the mean squared logit in the actors' loss; keeps policies from hardening for good"""
    relaxed: bool = False
    """act with the softmax vector itself on mpe2's continuous actions, as the original code did"""
    max_grad_norm: float = 0.0
    """largest gradient norm of an agent's network, 0 for no clipping (original code: 0.5 for each variable)"""

    num_envs: int = 25
    """games played side by side; with workers, all of them play a step while the rounds that are due are learned"""
    num_workers: int | None = None
    """processes that play them, a divisor of num_envs or 0 for none; results do not depend on it. Default: at most one
    per core, 4 games or more each (one alone: 20 or more). One thread learns: let spare cores train other seeds"""
    torch_threads: int = 1
    """CPU threads of PyTorch: with networks this small more are slower, many times so beside other programs"""
    cuda: bool = False
    """learn on the GPU: an H100 makes 4 times the steps of a CPU thread, 7 with --compile, 20 with 300 games as well"""
    compile: bool = False
    """compile `update`, on a GPU into one CUDA graph (needs a C++ compiler and about a minute)"""
    checkpoint_frequency: int = 200_000
    """environment steps between checkpoints, which hold everything, the replay buffer too; 0 for none"""
    resume: str | None = None
    """run folder to go on with from its checkpoint, as if it had never stopped; --total-timesteps may grow"""
    evaluate: str | None = None
    """run folder whose final policies are played greedily instead of training"""
    capture_video: bool = False
    """save a GIF of greedy episodes with every evaluation (no display needed)"""
    render: bool = False
    """with --evaluate: play in render mode human, in which games show a window"""
    eval_frequency: int | None = None
    """environment steps between greedy evaluations. Default: 20 times those of one evaluation (mpe2: 50,000)"""
    eval_episodes: int = 100
    """episodes of an evaluation, in games and with seeds of its own"""
    track: bool = False
    """log to Weights & Biases as well, to the project and entity that WANDB_PROJECT and WANDB_ENTITY name"""

    def __post_init__(self):
        for names, low, high in (
            ("total_timesteps hidden_dim train_frequency torch_threads eval_frequency eval_episodes", 1, math.inf),
            ("buffer_size", 1, math.inf),
            ("actor_learning_rate critic_learning_rate max_grad_norm checkpoint_frequency", 0, math.inf),
            ("seed", 0, 2**32 - 1),
            ("gumbel_temperature", 0.01, math.inf),
            ("logit_regularization", 0, math.inf),
            ("gamma tau", 0, 1),
            ("num_envs", 1, min(self.total_timesteps, self.buffer_size)),
            ("num_workers", 0, self.num_envs),
            ("batch_size", 1, self.buffer_size),
            ("learning_starts", 0, self.total_timesteps),
        ):
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not (low <= value <= high and math.isfinite(value)):
                    bounds = f"lie between {low} and {high}" if high < math.inf else f"be a number of {low} or more"
                    raise UsageError(f"--{name.replace('_', '-')} is {value}, but must {bounds}")
        try:
            if not isinstance(json.loads(self.env_kwargs), dict):
                raise ValueError
        except ValueError as error:
            hint = "is no JSON object like '{\"max_cycles\": 50}'"
            raise UsageError(f"--env-kwargs {self.env_kwargs} {hint}") from error
        if self.num_workers is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            least = {0: 0, 1: 20}  # fewest games for so many workers; for others 4 each
            fitting = (w for w in range(cores + 1 if cores > 1 else 1) if self.num_envs >= least.get(w, 4 * w))
            self.num_workers = max(w for w in fitting if self.num_envs % max(w, 1) == 0)
        if self.num_workers and self.num_envs % self.num_workers:
            raise UsageError(f"--num-envs {self.num_envs} must be a multiple of --num-workers {self.num_workers}")


# ---- The environment: from --env-id to games with joint arrays -------------------------------------------------------
class OneAgentGame(pettingzoo.ParallelEnv):
    """A Gymnasium environment as a game of one agent, `agent_0`: MADDPG becomes DDPG."""

    def __init__(self, env: gym.Env):
        self.env, self.metadata, self.render_mode = env, env.metadata, env.render_mode
        self.agents, self.possible_agents = [], ["agent_0"]
        self.observation_space = lambda agent: env.observation_space
        self.action_space = lambda agent: env.action_space
        self.render, self.close = env.render, env.close

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        self.agents = self.possible_agents[:]
        return tuple({"agent_0": result} for result in self.env.reset(seed=seed, options=options))

    def step(self, actions: dict) -> tuple[dict, dict, dict, dict, dict]:
        observation, reward, terminated, truncated, info = self.env.step(actions["agent_0"])
        self.agents = [] if terminated or truncated else self.agents
        return tuple({"agent_0": result} for result in (observation, reward, terminated, truncated, info))


def make_game(
    env_id: str, env_kwargs: dict[str, Any], continuous_actions: bool, render_mode: str | None = None
) -> pettingzoo.ParallelEnv:
    """One game: a Gymnasium id, an mpe2 scenario, a PettingZoo id or a module with `parallel_env`, in that order.

    Raises `UsageError` where there is none of that name, a package is missing, or `env_kwargs` do not suit it.
    """
    scenarios = {name.removeprefix("mpe/"): module for name, module in mpe_environments.items()}
    defaults = {"continuous_actions": continuous_actions} if env_id in scenarios else {}
    defaults |= {"render_mode": render_mode} if render_mode else {}
    if env_id in gym.registry:
        make = functools.partial(gym.make, env_id, disable_env_checker=True)
    elif env_id in scenarios:
        make = scenarios[env_id].raw_env
    elif env_id in pettingzoo.parallel_registry:
        make = functools.partial(pettingzoo.make, "parallel", env_id)
    else:
        sys.path.append(os.getcwd())
        try:
            name = env_id.strip(".") or "?"  # no relative or empty one
            make = getattr(importlib.import_module(name), "parallel_env", None)
            if not make:
                raise ImportError("the module has no parallel_env")
        except ImportError as error:  # any other error of a user's module is shown with its traceback
            names = [*scenarios, *pettingzoo.parallel_registry, *gym.registry]
            near = difflib.get_close_matches(re.split("[./]", env_id)[-1], names, cutoff=0)
            hint = f"the nearest names are {', '.join(near)}"
            missing = error.name if isinstance(error, ModuleNotFoundError) and error.name else env_id
            if not f"{env_id}.".startswith(f"{missing}."):
                hint = f"try pip install {missing}"
            if env_id in pettingzoo.aec_registry:
                hint = "its agents move in turn, it has no parallel interface"
            raise UsageError(f"--env-id {env_id} is no game ({error}); {hint}") from error
    try:
        game = make(**defaults | env_kwargs)
    except (gym.error.DependencyNotInstalled, FailedToImport, ImportError) as error:
        raise UsageError(f"--env-id {env_id}: {error}") from error
    except Exception as error:
        if not env_kwargs and not render_mode:
            raise
        flag, kwargs = "--env-kwargs " * bool(env_kwargs), json.dumps(defaults | env_kwargs)
        raise UsageError(f"{env_id} with {flag}{kwargs}: {error}") from error
    if env_id in scenarios:
        # raw_env gives the transitions of `parallel_env`, without wrappers around every agent's turn. Each turn calls
        # `last` for an observation that nobody reads, so it makes none.
        game.last = functools.partial(game.last, observe=False)
        game = aec_to_parallel(game)
    elif isinstance(game, gym.Env):
        game = OneAgentGame(game)
    agents = getattr(game, "possible_agents", None)
    if not isinstance(game, pettingzoo.ParallelEnv) or not agents or not all(isinstance(a, str) for a in agents):
        raise UsageError(f"--env-id {env_id}: parallel_env must give a ParallelEnv whose possible_agents are strings")
    return game


def game_maker(args: Args) -> Callable[..., pettingzoo.ParallelEnv]:
    """`make_game` for the game that `args` name."""
    return functools.partial(make_game, args.env_id, json.loads(args.env_kwargs), continuous_actions=args.relaxed)


class Games(gym.Env):
    """`num_games` copies of one game, played in step, as one Gymnasium environment with joint arrays.

    Its observation holds `obs` and `alive` (who acts) for the coming step, a new episode's first after an automatic
    reset, and what the last step led to: `next_obs` (final observations where `done`), `rewards`, `terminations`,
    `next_alive` (0 after an agent's termination or after it was truncated alone, 1 where a time limit ends the game for
    all). Shapes are [num_games, n_agents, ...], with zeros where padded or gone. Gymnasium's reward and end are unused.

    Every episode resets with a seed of its own, made from the seed of `reset`, the game's number (from `first_game`)
    and the episode's number, so that games do not depend on how they are shared out among processes.

    An episode without end is cut off after `LONGEST_EPISODE` steps, as by a time limit of the game.

    Raises `UsageError` for spaces that the networks cannot use.
    """

    def __init__(self, make: Callable[[], pettingzoo.ParallelEnv], num_games: int, first_game: int = 0):
        self.games, self.first_game = [make() for _ in range(num_games)], first_game
        self.metadata = getattr(self.games[0], "metadata", {})
        self.agents = list(self.games[0].possible_agents)
        self.obs_spaces = [self.games[0].observation_space(agent) for agent in self.agents]
        self.action_spaces = [self.games[0].action_space(agent) for agent in self.agents]
        for agent, space in zip(self.agents, self.obs_spaces, strict=True):
            if isinstance(space, spaces.Dict) and "action_mask" in space.spaces:
                raise UsageError(f"{agent}'s observation has an action_mask, which is not supported")
            if not space.is_np_flattenable or spaces.flatdim(space) > 10_000:
                raise UsageError(f"{agent}'s observation {space} is no array of up to 10,000 numbers: wrap it")
        self.obs_mask = pad_mask([spaces.flatdim(space) for space in self.obs_spaces])
        self.relaxed = all(isinstance(space, spaces.Box) for space in self.action_spaces)
        choices = [self._choices(i) for i in range(len(self.agents))]
        self.n_choices = max(map(len, choices))
        options = [n for agent_choices in choices for n in agent_choices + [0] * (self.n_choices - len(agent_choices))]
        self.action_mask = pad_mask(options).reshape(len(self.agents), -1)  # [n_agents, n_choices * most options]

        self.action_space = spaces.Box(0, 1, (num_games, *self.action_mask.shape))
        shapes = {"obs": self.obs_mask.shape, "next_obs": self.obs_mask.shape}
        shapes |= dict.fromkeys(("alive", "rewards", "terminations", "next_alive"), (len(self.agents),))
        boxes = {key: spaces.Box(-np.inf, np.inf, (num_games, *shape)) for key, shape in shapes.items()}
        self.observation_space = spaces.Dict(boxes | {"done": spaces.MultiBinary(num_games)})

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict[str, np.ndarray], dict]:
        """Begins episode 0 of every game, or replays episodes in progress, `options["histories"]` of all workers'."""
        super().reset(seed=seed)
        self.seed, self.histories = int(self.np_random.integers(2**31)), [[] for _ in self.games]
        data = {key: np.zeros(space.shape, space.dtype) for key, space in self.observation_space.items()}
        self.alive = data["alive"]
        for g in range(len(self.games)):
            episode, *played = options["histories"][self.first_game + g] if options else [0]
            self.histories[g] = [episode - 1]
            self._next_episode(g, data)
            for actions in played:
                self._step_game(g, np.array(actions, np.float32), data)
        return data, {}

    def step(self, actions: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict]:
        """One step of all games; `actions` [num_games, n_agents, action_dim], any in range for agents that are gone."""
        if not self.action_space.contains(actions):
            raise UsageError(f"actions are not in {self.action_space} but {actions.ravel()}: has training diverged?")
        data = {key: np.zeros(space.shape, space.dtype) for key, space in self.observation_space.items()}
        for g in range(len(self.games)):
            self._step_game(g, actions[g], data)
        self.alive = data["alive"]
        return data, 0.0, False, False, {}

    def _step_game(self, g: int, actions: np.ndarray, data: dict[str, np.ndarray]) -> None:
        game, acts = self.games[g], self.alive[g].nonzero()[0]
        acting = [self.agents[i] for i in acts]
        moves = actions if self.relaxed else actions.reshape(len(actions), self.n_choices, -1).argmax(2)
        observations, rewards, terminations, truncations, _ = game.step(
            {self.agents[i]: self._move(i, moves[i]) for i in acts}
        )
        self.histories[g].append(actions.tolist())
        staying = [agent for agent in game.agents if not (terminations.get(agent) or truncations.get(agent))]
        if staying and len(self.histories[g]) > LONGEST_EPISODE:
            warnings.warn(f"cut off an episode of {LONGEST_EPISODE} steps: has the game no time limit?", stacklevel=1)
            staying = []
        self._write(observations, {*acting, *staying}, data["next_obs"][g])
        data["rewards"][g, acts] = [rewards[agent] for agent in acting]
        data["terminations"][g, acts] = [terminations[agent] for agent in acting]
        # If all that are left are truncated at once, a time limit, they bootstrap as if still there; one alone is gone
        at_limit = [] if staying else [agent for agent in acting if not terminations[agent]]
        data["next_alive"][g] = [agent in staying or agent in at_limit for agent in self.agents]
        if staying:
            data["alive"][g] = [agent in staying for agent in self.agents]
            data["obs"][g] = data["next_obs"][g] * data["alive"][g, :, None]
        else:
            data["done"][g] = 1
            self._next_episode(g, data)

    def _move(self, i: int, move: np.ndarray) -> Any:
        space = self.action_spaces[i]
        if not self.relaxed:
            move = space.start + move[: math.prod(space.shape)].reshape(space.shape)
            return move.astype(space.dtype) if space.shape else int(move)
        return move[self.action_mask[i]].astype(space.dtype).reshape(space.shape)

    def _choices(self, i: int) -> list[int]:
        """How many options agent i's choices have; mpe2's continuous actions choose a force, a message, or both."""
        space, world = self.action_spaces[i], getattr(self.games[0].unwrapped, "world", None)
        if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
            return np.ravel(space.n if isinstance(space, spaces.Discrete) else space.nvec).tolist()
        if not hasattr(world, "dim_p") or not self.relaxed:
            raise UsageError(f"{self.agents[i]}'s actions are {space}, not Discrete; Box is for maddpg_continuous.py")
        forces = 2 * world.dim_p + 1 if world.agents[i].movable else 0
        return [n for n in (forces, spaces.flatdim(space) - forces) if n]

    def _next_episode(self, g: int, data: dict[str, np.ndarray]) -> None:
        episode = self.histories[g][0] + 1
        self.histories[g] = [episode]
        seed = np.random.SeedSequence((self.seed, self.first_game + g, episode)).generate_state(1)[0] >> 1
        observations, _ = self.games[g].reset(seed=int(seed))
        self._write(observations, self.games[g].agents, data["obs"][g])
        data["alive"][g] = [agent in self.games[g].agents for agent in self.agents]

    def _write(self, observations: dict[str, Any], agents: Sequence[str] | set[str], rows: np.ndarray) -> None:
        for agent, space, row in zip(self.agents, self.obs_spaces, rows, strict=True):
            if agent in agents:
                flat = spaces.flatten(space, observations[agent])
                row[: len(flat)] = flat


def check_finite(data: dict[str, np.ndarray], agents: Sequence[str], when: str) -> None:
    """Raises `UsageError` for a NaN or infinity in what `Games` gave. Losses, weights: `log`, `check_networks`."""
    for name in ("rewards", "next_obs", "obs"):
        if not np.isfinite(data[name]).all():
            agent = agents[np.argwhere(~np.isfinite(data[name]))[0][1]]
            raise UsageError(f"the game gave {agent} {name} that are not finite, after {when}")


def pad_mask(widths: Sequence[int]) -> np.ndarray:
    """[n_agents, max(widths)]: true where agent i has that entry, false where it is padding."""
    return np.arange(max(widths)) < np.array(widths)[:, None]


def match_agents(names: Sequence[str], agents: list[str]) -> Tensor:
    """[n_agents], true for those that `names` mean: the agent of that name or, without one, all that begin with it."""
    for name in names:
        if not any(agent.startswith(name) for agent in agents):
            raise UsageError(f"there is no agent {name}, the agents are {', '.join(agents)}")
    prefixes = tuple(name for name in names if name not in agents)
    return torch.tensor([agent in names or agent.startswith(prefixes) for agent in agents])


# ---- Networks: all agents of a game as one stack ---------------------------------------------------------------------
class StackedLinear(nn.Module):
    """One linear layer per agent, y_i = x_i W_i + b_i, and a ReLU if asked for: [n_agents, batch, in] to [..., out].

    `inputs` [n_agents, in] tells an agent's true inputs from padding. Initialised as `nn.Linear`, uniform within
    1 / sqrt(fan_in), by each agent's own fan-in; weights of padded inputs are zero.
    """

    def __init__(self, inputs: Tensor, out_dim: int):
        super().__init__()
        bound = inputs.sum(1).clamp(min=1).rsqrt()[:, None, None]
        self.weight = nn.Parameter((torch.rand(*inputs.shape, out_dim) * 2 - 1) * bound * inputs[:, :, None])
        self.bias = nn.Parameter((torch.rand(len(inputs), 1, out_dim) * 2 - 1) * bound)

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        if x.shape[1] < 32:
            y = torch.baddbmm(self.bias, x, self.weight)
            return y.relu_() if relu else y
        # In large batches the transposed product is several times faster for few outputs: actions, a Q value
        y = torch.baddbmm(self.bias.mT, self.weight.mT, x.mT)
        return (y.relu_() if relu else y).mT


class Actor(nn.Module):
    """Logits of mu_i(o_i) of every agent, of `n_choices` softmaxes: [batch, n_agents, obs_dim] to [..., action_dim]."""

    def __init__(self, obs_mask: Tensor, action_mask: Tensor, hidden_dim: int, n_choices: int, relaxed: float):
        super().__init__()
        self.n_choices, self.relaxed = n_choices, relaxed
        hidden = torch.ones(len(obs_mask), hidden_dim)
        self.layer_1 = StackedLinear(obs_mask.float(), hidden_dim)
        self.layer_2 = StackedLinear(hidden, hidden_dim)
        self.layer_3 = StackedLinear(hidden, action_mask.shape[1])
        self.register_buffer("action_mask", action_mask.float())
        self.register_buffer("padding_logits", torch.where(action_mask, 0.0, -1e9))
        # For the actors' loss, row j: option j as a one-hot vector, and the options of its choice, which j replaces
        n = action_mask.shape[1] // n_choices
        self.register_buffer("one_hots", torch.eye(n * n_choices)[:, None, None], persistent=False)
        self.register_buffer("replaced", torch.eye(n_choices).kron(torch.ones(n, n))[:, None, None], persistent=False)

    def forward(self, obs: Tensor) -> Tensor:
        x = self.layer_2(self.layer_1(obs.transpose(0, 1), relu=True), relu=True)
        return self.layer_3(x).transpose(0, 1) * self.action_mask


class Critic(nn.Module):
    """Q_i(x, a_1, ..., a_N) of every agent: [batch, n_agents].

    All critics read the same joint input: everyone's observations, then everyone's actions, without padding. `change`
    [batch, n_agents, obs_dim + action_dim], or of actions alone, alters agent i's own entries, for critic i alone: in
    the actors' loss, from the stored action to another. As the first layer is linear, that takes one small product, not
    a joint input for each critic. Changes [n, batch, ...] give n * batch rows of values, change by change. Critics that
    are not `central` see their own agent alone (DDPG).
    """

    def __init__(self, obs_mask: Tensor, action_mask: Tensor, hidden_dim: int, central: Tensor):
        super().__init__()
        agent = torch.arange(len(obs_mask))[:, None]
        true = torch.cat([obs_mask.flatten(), action_mask.flatten()])
        owner = torch.cat([agent.expand_as(obs_mask).flatten(), agent.expand_as(action_mask).flatten()])[true]
        visible = (owner == agent) | central[:, None]
        place = (true.cumsum(0) - 1).clamp(min=0)  # of each padded entry in the joint input; of padding itself: any
        own_obs, own_actions = place.split([obs_mask.numel(), action_mask.numel()])
        hidden = torch.ones(len(obs_mask), hidden_dim)
        self.layer_1 = StackedLinear(visible.float(), hidden_dim)
        self.layer_2 = StackedLinear(hidden, hidden_dim)
        self.layer_3 = StackedLinear(hidden, 1)
        self.register_buffer("agent", agent)
        self.register_buffer("true", true.nonzero()[:, 0])  # [joint_dim]
        self.register_buffer("visible", visible.float()[:, :, None])  # [n_agents, joint_dim, 1]
        self.register_buffer("own", torch.cat([own_obs.view_as(obs_mask), own_actions.view_as(action_mask)], 1))

    def forward(self, obs: Tensor, actions: Tensor, change: Tensor | None = None) -> Tensor:
        joint = torch.cat([obs.flatten(1), actions.flatten(1)], 1).index_select(1, self.true)
        weight = self.layer_1.weight * self.visible
        x = torch.baddbmm(self.layer_1.bias.mT, weight.mT, joint.T.expand(len(weight), -1, -1))
        xs = [x]
        if change is not None:
            own = weight[self.agent, self.own[:, -change.shape[-1] :]].mT  # row i: agent i's own only
            # One change after the other, faster on CPUs than all at once
            xs = [torch.baddbmm(x, own, each.permute(1, 2, 0)) for each in change.flatten(0, -3).split(len(obs))]
        return torch.cat([self.layer_3(self.layer_2(x.relu_().mT, relu=True))[:, :, 0].T for x in xs])


class Networks(nn.Module):
    """Actors and critics of all agents with their targets, and masks of who learns and who acts at random."""

    def __init__(self, games: Games, args: Args):
        super().__init__()
        self.agents = games.agents
        masks = torch.from_numpy(games.obs_mask), torch.from_numpy(games.action_mask)
        self.actor = Actor(*masks, args.hidden_dim, games.n_choices, games.relaxed * args.gumbel_temperature)
        self.critic = Critic(*masks, args.hidden_dim, central=~match_agents(args.ddpg_agents, games.agents))
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        at_random = match_agents(args.random_agents, games.agents)
        self.register_buffer("random_agents", at_random if at_random.any() else None, persistent=False)
        self.register_buffer("learns", (~at_random).float(), persistent=False)

    def restore(self, saved: dict[str, Any]) -> None:
        """`load_state_dict` of what `load` returned; `UsageError` where that is of another game or another script."""
        if saved["agents"] != self.agents:  # in another order they might load
            raise UsageError(f"the saved agents are {', '.join(saved['agents'])}, the game's {', '.join(self.agents)}")
        try:
            self.load_state_dict(saved["networks"])
        except RuntimeError as error:
            raise UsageError(f"the saved networks are of another kind: {' '.join(str(error).split())[:300]}") from error


def gumbel_softmax(actor: Actor, logits: Tensor, temperature: float, soft: bool = False) -> Tensor:
    """Samples of softmax(logits), one-hot; or, `soft`, softmax((logits + g) / temperature), which has a gradient.

    g = -log(-log(u)), u uniform in (0, 1), is Gumbel noise; the largest entry is the sample (Jang et al. 2017, Maddison
    et al. 2017). Temperature 0: no noise, greedy. `actor.relaxed` > 0 makes all soft, and is greedy play's temperature.
    """
    if temperature > 0:
        uniform = torch.rand_like(logits).clamp_(min=torch.finfo(logits.dtype).tiny)  # the log of 0 would be infinite
        logits = logits - uniform.log_().neg_().log_()
    choices = (logits + actor.padding_logits).contiguous().unflatten(2, (actor.n_choices, -1))
    if soft or actor.relaxed:
        actions = (choices / (temperature or actor.relaxed)).movedim(0, 3).softmax(2).movedim(3, 0)  # batch last: fast
    else:
        actions = torch.zeros_like(choices).scatter_(3, choices.argmax(3, keepdim=True), 1.0)
    return actions.flatten(2) * actor.action_mask


def choose(actor: Actor, obs: Tensor, exploration: float, random_agents: Tensor | None) -> Tensor:
    """Every agent's action, with noise of its own for each game and dimension: [batch, n_agents, action_dim].

    Exploration 0 is without noise, greedy. Discrete: any other samples the policy, which is how it explores. Agents for
    which `random_agents` [n_agents] is true act uniformly at random instead (with --relaxed: the softmax of noise).
    """
    actions = gumbel_softmax(actor, actor(obs), exploration)
    if random_agents is not None:
        uniform = gumbel_softmax(actor, torch.zeros_like(actions), 1.0)
        actions = torch.where(random_agents[:, None], uniform, actions)
    return actions


# ---- Replay buffer ---------------------------------------------------------------------------------------------------
Transitions = namedtuple("Transitions", "obs next_obs actions rewards terminations alive next_alive")


class ReplayBuffer:
    """The last `size` steps. A step is one row of one array, so that drawing a batch is one gather."""

    def __init__(self, size: int, games: Games, device: torch.device):
        obs, action = games.obs_mask.shape, games.action_mask.shape
        self.shapes = Transitions(obs, obs, action, *[obs[:1]] * 4)
        self.widths = [math.prod(shape) for shape in self.shapes]
        self.rows = torch.zeros(size, sum(self.widths), device=device)  # on a CPU memory is taken only as it fills
        self.added = 0

    def add(self, *fields: np.ndarray) -> None:
        """Copies the fields of `Transitions`, each [num_envs, n_agents, ...], over the oldest rows."""
        new = np.concatenate([field.reshape(len(field), -1) for field in fields], axis=1, dtype=np.float32)
        index = torch.arange(self.added, self.added + len(new), device=self.rows.device) % len(self.rows)
        self.rows.index_copy_(0, index, torch.from_numpy(new).to(self.rows.device))
        self.added += len(new)

    def sample(self, batch_size: int) -> Transitions:
        """`batch_size` steps, drawn uniformly with replacement, the same for all agents."""
        index = torch.randint(min(self.added, len(self.rows)), (batch_size,), device=self.rows.device)
        fields = self.rows.index_select(0, index).split(self.widths, dim=1)
        return Transitions(*(field.view(-1, *shape) for field, shape in zip(fields, self.shapes, strict=True)))


# ---- Losses and the update -------------------------------------------------------------------------------------------
def mean_alive(values: Tensor, alive: Tensor) -> Tensor:
    """Each agent's mean over the steps in which it acted: [batch, n_agents] to [n_agents]."""
    return (values * alive).sum(0) / alive.sum(0).clamp(min=1)


@torch.no_grad()
def td_targets(networks: Networks, data: Transitions, args: Args) -> Tensor:
    """y_i = r_i + gamma (1 - terminated_i) Q'_i(x', mu'_1(o'_1), ..., mu'_N(o'_N)): [batch, n_agents].

    Discrete: mu' is a sample, not the likeliest. Agents that have left are zeros in x' and among the actions. One that
    was truncated alone still bootstraps from its last observation, which its own critic alone sees.
    """
    next_actions = choose(networks.target_actor, data.next_obs, args.gumbel_temperature, networks.random_agents)
    there = data.next_alive[:, :, None]
    own = torch.cat([data.next_obs, next_actions], 2) * (1 - there)
    next_q_values = networks.target_critic(data.next_obs * there, next_actions * there, own)
    return data.rewards + args.gamma * (1 - data.terminations) * next_q_values


def critic_loss(networks: Networks, data: Transitions, args: Args) -> tuple[Tensor, Tensor]:
    """(Q_i(x, a_1, ..., a_N) - y_i)^2, and Q_i for the log: means over the steps in which i acted, [n_agents] each."""
    q_values = networks.critic(data.obs, data.actions)
    td_errors = q_values - td_targets(networks, data, args)
    return mean_alive(td_errors**2, data.alive), mean_alive(q_values.detach(), data.alive)


def actor_loss(networks: Networks, data: Transitions, args: Args) -> Tensor:
    """-Q_i at agent i's new action (discrete: at each, weighed), the others' from the buffer: means, [n_agents].

    The change puts agent i's action alone into Q_i, so that no critic's gradient reaches another agent's actor; the
    critics are constants here.
    """
    logits = networks.actor(data.obs)
    y = gumbel_softmax(networks.actor, logits, args.gumbel_temperature, soft=True)
    # -sum_j y_j Q_i(..., j, ...): Q_i is asked for one-hot actions alone, as it has learned, and the gradient is y's
    change, weights = networks.actor.one_hots - data.actions * networks.actor.replaced, y.movedim(2, 0)
    if networks.actor.relaxed:  # here Q_i has learned about soft actions: it is asked for y itself
        change, weights = (y - data.actions)[None], 1.0
    networks.critic.requires_grad_(False)
    # data.actions has no graph, and row i of the change enters Q_i alone: see Critic.forward
    q_values = networks.critic(data.obs, data.actions, change)
    networks.critic.requires_grad_(True)
    q_values = (q_values.unflatten(0, (len(change), -1)) * weights).sum(0)  # over j; several choices add up
    q_values -= args.logit_regularization * (logits**2).sum(2) / networks.actor.action_mask.sum(1)
    return mean_alive(-q_values, data.alive)


def step_optimizer(optimizer: torch.optim.Optimizer, losses: Tensor, max_grad_norm: float) -> None:
    """One step on the sum of the agents' losses: as they share no parameter, it equals one step for each agent."""
    optimizer.zero_grad()
    losses.sum().backward()
    if max_grad_norm > 0:
        grads = [parameter.grad for parameter in optimizer.param_groups[0]["params"]]
        norms = sum(grad.square().sum((1, 2), keepdim=True) for grad in grads).sqrt()  # [n_agents, 1, 1]
        for grad in grads:
            grad.mul_((max_grad_norm / norms).clamp(max=1))
    optimizer.step()


def update(networks: Networks, optimizers: tuple, data: Transitions, args: Args) -> dict[str, Tensor]:
    """One round: a step of all critics, a step of all actors, a move of all targets. Returns each agent's losses.

    `optimizers` are the actors' and the critics'. The actors' loss is built after the critics have stepped: a step
    changes weights in place, and a graph from before it can not be differentiated any more ("modified by an inplace
    operation").
    """
    actor_optimizer, critic_optimizer = optimizers
    critic_losses, q_values = critic_loss(networks, data, args)
    step_optimizer(critic_optimizer, critic_losses * networks.learns, args.max_grad_norm)
    actor_losses = actor_loss(networks, data, args)
    step_optimizer(actor_optimizer, actor_losses * networks.learns, args.max_grad_norm)
    with torch.no_grad():
        for online, target in (networks.actor, networks.target_actor), (networks.critic, networks.target_critic):
            for parameter, target_parameter in zip(online.parameters(), target.parameters(), strict=True):
                target_parameter.lerp_(parameter, args.tau)  # Polyak: target + tau (online - target)
    return {"critic_loss": critic_losses.detach(), "q_values": q_values, "actor_loss": actor_losses.detach()}


class OneLaunch:
    """`update` as one CUDA graph: all its kernels go to a GPU in one call; a small round spends most time on calls.

    A replay runs no Python and finds everything at the addresses of the recording: each batch is copied into the
    recorded one, branches and numbers of Python stay as they were, and the next round overwrites the losses. Three
    rounds come before, in which PyTorch compiles and sets itself up.
    """

    def __init__(self, learn: Callable[..., dict[str, Tensor]]):
        self.learn, self.rounds, self.graph, self.stream = learn, 0, torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def __call__(self, networks: Networks, optimizers: tuple, data: Transitions, args: Args) -> dict[str, Tensor]:
        self.rounds += 1
        if self.rounds < 4:  # on the stream of the recording: what autograd keeps of a round remembers its stream
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                losses = self.learn(networks, optimizers, data, args)
            torch.cuda.current_stream().wait_stream(self.stream)
            return losses
        if self.rounds == 4:
            self.data = data
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.losses = self.learn(networks, optimizers, data, args)
        for recorded, new in zip(self.data, data, strict=True):
            recorded.copy_(new)
        self.graph.replay()
        return self.losses


# ---- Evaluation ------------------------------------------------------------------------------------------------------
@torch.inference_mode()
def evaluate(
    networks: Networks, games: Games, episodes: int, seed: int, random_agents: Tensor | None
) -> tuple[np.ndarray, int]:
    """Undiscounted returns of greedy episodes, [episodes, n_agents], and the environment steps that they took.

    `games` are the evaluation's own and begin anew from `seed`. If they divide `episodes`, each counts equally often,
    so that short ones are not preferred. Training's random numbers are left as they were.
    """
    n_games, device = len(games.games), networks.learns.device
    returns, running, steps = [[] for _ in range(n_games)], np.zeros((n_games, len(games.agents))), 0
    with torch.random.fork_rng([device] * networks.learns.is_cuda):
        torch.manual_seed(seed)
        data, _ = games.reset(seed=seed)
        check_finite(data, games.agents, "evaluation's reset")
        while min(map(len, returns)) * n_games < episodes:
            actions = choose(networks.actor, torch.from_numpy(data["obs"]).to(device), 0.0, random_agents)
            data = games.step(actions.cpu().numpy())[0]
            check_finite(data, games.agents, f"evaluation's step {steps}")
            running += data["rewards"]
            steps += n_games
            for g in data["done"].nonzero()[0]:
                returns[g].append(running[g].copy())
                running[g] = 0
    return np.array([episode for nth in zip(*returns, strict=False) for episode in nth][:episodes]), steps


def by_side(agents: Sequence[str], returns: Sequence[float]) -> dict[str, str]:
    """The mean return of each side: of the agents whose names differ in their number only."""
    sides = [re.sub(r"_?\d+$", "", agent) for agent in agents]
    return {side: f"{np.mean([r for s, r in zip(sides, returns, strict=True) if s == side]):.1f}" for side in sides}


def save_film(networks: Networks, make: Callable[..., pettingzoo.ParallelEnv], path: Path, seed: int) -> None:
    """Saves a GIF of five greedy episodes, labelled: every step, of long ones fewer; no display is needed."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    games, film, every = Games(functools.partial(make, render_mode="rgb_array"), 1), [], 1
    step, returns = games.games[0].step, {}

    def filmed_step(actions: dict[str, Any]) -> tuple:
        nonlocal every
        result, (episode, *played) = step(actions), games.histories[0]
        if not played:
            returns.clear()
        for agent, reward in result[1].items():
            returns[agent] = returns.get(agent, 0) + reward
        if len(played) % every:
            return result
        picture = games.games[0].render()
        if picture is None:
            raise UsageError("--capture-video: the game's render() returns no picture")
        picture = ImageOps.contain(Image.fromarray(picture), (350, 350))
        picture = ImageOps.expand(picture, (0, 16, 0, 0), "white")
        sides = " ".join(f"{side} {value}" for side, value in by_side(list(returns), list(returns.values())).items())
        title = f"episode {episode + 1} step {len(played) + 1} {sides}"
        ImageDraw.Draw(picture).text((4, 2), title, "black")
        film.append(picture.quantize(64))
        if len(film) > 200:  # of long episodes not every step
            del film[1::2]
            every *= 2
        return result

    games.games[0].step = filmed_step
    evaluate(networks, games, 5, seed, networks.random_agents)
    frame_ms = every * 1000 / games.metadata.get("render_fps", 10)
    try:
        film[0].save(path, save_all=True, append_images=film[1:], duration=frame_ms, loop=0)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error}") from error
    print(f"saved {path}")


# ---- Checkpoints -----------------------------------------------------------------------------------------------------
def save(state: dict[str, Any], path: Path) -> None:
    """Writes `path` wholly or not at all, and keeps the file before as *_previous.pt; `UsageError` where it cannot."""
    new = path.with_suffix(".tmp")
    try:
        with open(new, "wb") as file:
            torch.save({"kind": f"{Path(__file__).stem} {path.name}"} | state, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            path.replace(path.with_stem(f"{path.stem}_previous"))
        new.replace(path)
    except (OSError, RuntimeError) as error:
        new.unlink(missing_ok=True)
        raise UsageError(f"{path} cannot be written ({error}); the one written before it is intact") from error


def load(path: str, name: str) -> dict[str, Any]:
    """What `save` wrote to `path` or `path`/`name`: verified, and tensors and plain values only, so it holds no code.

    Raises `UsageError` for a file that is missing, damaged, or none of this script's, and names the one before it.
    """
    file = Path(path) / name if Path(path).is_dir() else Path(path)
    previous = file.with_stem(f"{file.stem}_previous")
    if not file.exists() and previous.exists():  # killed between the two renames
        file = previous
    try:
        with zipfile.ZipFile(file) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"its part {damaged} is damaged")
        state = torch.load(file, map_location="cpu", weights_only=True)
        if state["kind"] != f"{Path(__file__).stem} {name}":
            raise ValueError(f"it is a {state['kind']}, not a {Path(__file__).stem} {name}")
        if unknown := state["args"].keys() - Args.__annotations__.keys():
            raise ValueError(f"it was made with {', '.join(sorted(unknown))}, which this script does not have")
    except Exception as error:  # whatever a damaged file makes of zipfile and unpickler
        hint = f"; the one before it is {previous}" if previous.exists() and previous != file else ""
        raise UsageError(f"{file} cannot be used: {error}{hint}".replace("\n", " ")) from error
    return state


# ---- Training --------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def start_games(make: Callable[[], pettingzoo.ParallelEnv], args: Args) -> Iterator[tuple[gym.Env, list[int]]]:
    """The games of training, played here or by worker processes, and a list that takes up Ctrl-C and SIGTERM.

    The workers end with the block, whatever ends it; one that dies before that raises `UsageError`.
    """
    envs, stops, share = None, [], args.num_envs // max(args.num_workers, 1)
    # Both signals are ignored at first, which the workers inherit
    handlers = {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        shares = [functools.partial(Games, make, share, w * share) for w in range(args.num_workers)]
        if shares:
            envs = object.__new__(gym.vector.AsyncVectorEnv)
            envs.__init__(shares)  # apart, so that workers are known, and killed below, where this fails
        else:
            envs = Games(make, share)
        for number in handlers:
            # The first signal ends training after the step or evaluation in progress, the second ends it at once
            signal.signal(number, lambda n, _: sys.exit(128 + n) if stops else stops.append(n))
        yield envs, stops
    except (EOFError, ConnectionError) as error:
        exits = [process.join(1) or process.exitcode for process in getattr(envs, "processes", [])]
        if not any(exits):  # the game's own error
            raise
        raise UsageError(f"a worker died (exit codes {exits}; -9: killed, perhaps for want of memory)") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        raise UsageError(f"the run cannot be written: {error}; the checkpoint written last is intact") from error
    finally:
        for process in getattr(envs, "processes", []):
            process.kill()
            envs.closed = True
        for number, handler in handlers.items():
            signal.signal(number, handler)


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed, which spares every round its page faults. Does nothing on other systems."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        for option, size in (-1, 2**30), (-3, 2**25):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(option, size)


def main(args: Args) -> tuple[Networks, ReplayBuffer, Path]:
    """Trains; returns networks, replay buffer and run folder. Wrong arguments raise `UsageError`, nothing written.

    It takes up Ctrl-C and SIGTERM, as only a process's main thread can.
    """
    if args.cuda and not torch.cuda.is_available():
        hint = "which this run needs" if args.resume else "leave the flag out"
        raise UsageError(f"--cuda: PyTorch finds no GPU, {hint}")
    if args.track and not importlib.util.find_spec("wandb"):
        raise UsageError("--track needs Weights & Biases: pip install wandb")
    if args.render:
        raise UsageError("--render goes with --evaluate; --capture-video records while training")
    saved = load(args.resume, "checkpoint.pt") if args.resume else None
    may_change = (
        "resume num_workers torch_threads checkpoint_frequency capture_video track eval_frequency eval_episodes"
    )
    for name, was in saved["args"].items() if saved else ():
        now = getattr(args, name)
        if now != was and name not in may_change.split() and not (name == "total_timesteps" and now > was):
            raise UsageError(f"--resume: --{name.replace('_', '-')} was {was} and cannot become {now}")
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.torch_threads)
    keep_freed_memory()
    make = game_maker(args)
    if args.capture_video:
        make(render_mode="rgb_array")  # refuses games that do not take it, before anything is written
    eval_games = Games(make, min(args.eval_episodes, 10))
    if args.relaxed != eval_games.relaxed:
        raise UsageError("--relaxed goes with mpe2's continuous actions, and only with them")
    agents, networks, eval_seed = eval_games.agents, Networks(eval_games, args), args.seed + EVAL_SEEDS
    if saved:
        networks.restore(saved)
    about = {"args": asdict(args) | {"resume": None}, "agents": agents}
    begins_at = saved["progress"][0] if saved else 0
    last_step = args.total_timesteps // args.num_envs * args.num_envs
    bar = tqdm(initial=begins_at, total=last_step, unit=" steps", dynamic_ncols=True, delay=0.1)
    with bar, start_games(make, args) as (envs, stops):  # workers start before CUDA does
        if args.num_workers and any(names != agents for names in envs.get_attr("agents")):
            raise UsageError(f"--env-id {args.env_id}: possible_agents must have the same order in every process")
        device = torch.device("cuda" if args.cuda else "cpu")
        networks.to(device)
        # One Adam for all agents: it works element by element, and they share no parameter
        adam = functools.partial(torch.optim.Adam, fused=True, capturable=args.cuda)  # by a CUDA graph
        actor_optimizer = adam(networks.actor.parameters(), lr=args.actor_learning_rate)
        critic_optimizer = adam(networks.critic.parameters(), lr=args.critic_learning_rate)
        optimizers = actor_optimizer, critic_optimizer
        learn = torch.compile(update) if args.compile else update
        learn = OneLaunch(learn) if args.compile and args.cuda else learn
        size, row_bytes = min(args.buffer_size, args.total_timesteps), ReplayBuffer(1, eval_games, device).rows.nbytes
        memory = torch.cuda.mem_get_info()[0] if args.cuda else psutil.virtual_memory().available
        gib = size * row_bytes / 2**30
        held = len(saved["rows"]) if saved and not args.cuda else 0  # in memory already
        if max(size - held, held) * row_bytes > memory:  # for a moment of resuming rows are there twice
            hint = "which is not free" if saved else f"{memory // row_bytes} would fit"
            raise UsageError(f"--buffer-size {size} takes {gib:.1f} GiB, {hint}")
        rb = ReplayBuffer(size, eval_games, device)

        name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}".replace("/", "_")
        run = Path(args.resume or Path("runs") / name)
        run = run.parent if saved and not run.is_dir() else run  # a checkpoint's path was given
        try:
            while not saved:
                try:
                    run.mkdir(parents=True)
                    break
                except FileExistsError:  # another run of this second
                    run = run.with_name(f"{run.name}_")
            if args.track:
                import wandb  # before the writer, so that its points are sent

                wandb.init(name=run.name, config=asdict(args), sync_tensorboard=True, save_code=True)
            writer = SummaryWriter(run, purge_step=saved and begins_at + 1)
        except OSError as error:
            raise UsageError(f"the run folder {run} cannot be written: {error.strerror}") from error
        writer.add_text("arguments", "\n".join(f"    {name} = {value}" for name, value in asdict(args).items()))
        print(f"{run}: {', '.join(agents)}; the replay buffer takes {gib:.2f} GiB when full")

        def log(name: str, values: Tensor | np.ndarray, with_sum: bool = False) -> None:
            for agent, value in zip(agents, values.tolist(), strict=True):
                if not math.isfinite(value):
                    raise UsageError(f"{name} of {agent} is {value} at step {global_step}: training has diverged")
                writer.add_scalar(f"{name}/{agent}", value, global_step)
            if with_sum:
                writer.add_scalar(name, values.sum(), global_step)

        def evaluate_and_log() -> tuple[np.ndarray, int]:
            returns, steps = evaluate(networks, eval_games, args.eval_episodes, eval_seed, networks.random_agents)
            log("eval/episodic_return", returns.mean(0), with_sum=True)
            if args.capture_video:
                save_film(networks, make, run / f"step_{global_step}.gif", eval_seed)
            return returns.mean(0), steps

        shapes = {key: (args.num_envs, *space.shape[1:]) for key, space in eval_games.observation_space.items()}

        def join(result: tuple) -> dict[str, np.ndarray]:  # one worker's games after the other's
            return {key: array.reshape(shapes[key]) for key, array in result[0].items()}

        def check_networks() -> None:
            if not all(tensor.isfinite().all() for tensor in (*networks.parameters(), *losses.values())):
                raise UsageError(f"weights or losses are not finite at step {global_step}: training has diverged")

        def checkpoint() -> None:
            check_networks()
            writer.flush()
            histories = envs.get_attr("histories") if args.num_workers else [envs.histories]
            state = {
                "networks": networks.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "rows": rb.rows if rb.added >= len(rb.rows) else rb.rows[: rb.added].clone(),
                "added": rb.added,
                "random": torch.get_rng_state(),
                "cuda_random": torch.cuda.get_rng_state() if args.cuda else None,
                "histories": [history for games in histories for history in games],
                "progress": (global_step, rounds, time.time() - start, losses, ended, evaluated_at, eval_frequency),
                "arrays": [*map(torch.from_numpy, (data["obs"], returns, lengths, random_play, untrained, trained))],
            }
            save({**about, **state}, run / "checkpoint.pt")

        global_step, rounds, seconds, losses, ended = 0, 0, 0.0, {}, []
        returns, lengths = np.zeros((args.num_envs, len(agents))), np.zeros(args.num_envs)
        everyone = torch.ones(len(agents), dtype=torch.bool, device=device)
        seed = [args.seed] * args.num_workers if args.num_workers else args.seed
        data = join(envs.reset(seed=seed, options=saved and {"histories": saved["histories"]}))
        if saved:
            for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            rb.added, rows = saved["added"], saved.pop("rows")
            rb.rows[: len(rows)] = rows
            del rows
            global_step, rounds, seconds, losses, ended, evaluated_at, eval_frequency = saved["progress"]
            last_obs, returns, lengths, random_play, untrained, trained = (t.numpy() for t in saved["arrays"])
            eval_frequency = args.eval_frequency or eval_frequency
            changed = (data["obs"] != last_obs).any((1, 2))
            if changed.any():
                print(f"{args.env_id} does not repeat itself under one seed: episodes in progress begin anew")
                histories = [[h[0] + 1] if c else h for h, c in zip(saved["histories"], changed, strict=True)]
                data = join(envs.reset(seed=seed, options={"histories": histories}))
                returns[changed] = lengths[changed] = 0
            torch.set_rng_state(saved["random"])
            if args.cuda:
                torch.cuda.set_rng_state(saved["cuda_random"])
        else:
            random_play = evaluate(networks, eval_games, args.eval_episodes, eval_seed, everyone)[0].mean(0)
            untrained, eval_steps = evaluate_and_log()
            trained, evaluated_at, eval_frequency = untrained, 0, args.eval_frequency or 20 * eval_steps
        check_finite(data, agents, f"step {global_step}")
        start = time.time() - seconds

        while global_step < last_step and not stops:
            # Choose, and let the workers begin the step
            random_agents = everyone if global_step < args.learning_starts else networks.random_agents
            with torch.inference_mode():
                obs = torch.from_numpy(data["obs"]).to(device)
                actions = choose(networks.actor, obs, args.gumbel_temperature, random_agents).cpu().numpy()
            if not np.isfinite(actions).all():
                raise UsageError(f"actions are not finite at step {global_step}: training has diverged")
            actions *= data["alive"][:, :, None]  # of agents that are gone zeros are stored
            if args.num_workers:
                envs.step_async(actions.reshape(envs.action_space.shape))

            # Meanwhile learn from what is stored
            while rounds < (global_step - args.learning_starts) // args.train_frequency:
                losses = learn(networks, optimizers, rb.sample(args.batch_size), args)
                rounds += 1

            # Store what the step has led to: the final observation, not the next episode's first
            after = join(envs.step_wait() if args.num_workers else envs.step(actions))
            check_finite(after, agents, f"step {global_step}")
            results = after["rewards"], after["terminations"], data["alive"], after["next_alive"]
            rb.add(data["obs"], after["next_obs"], actions, *results)
            data = after
            global_step += args.num_envs

            # Log, evaluate and save
            returns += data["rewards"]
            lengths += 1
            for g in data["done"].nonzero()[0]:
                ended.append([*returns[g].tolist(), lengths[g].item()])
                returns[g] = lengths[g] = 0
            if global_step % LOG_FREQUENCY < args.num_envs:
                for name, values in losses.items():
                    log(f"losses/{name}", values)
                if ended:
                    *means, length = np.mean(ended, axis=0)
                    log("charts/episodic_return", np.array(means), with_sum=True)
                    writer.add_scalar("charts/episodic_length", length, global_step)
                    bar.set_postfix(by_side(agents, means), refresh=False)
                    ended = []
                writer.add_scalar("charts/SPS", global_step / (time.time() - start), global_step)
                bar.update(global_step - bar.n)
            if global_step % eval_frequency < args.num_envs:
                (trained, eval_steps), evaluated_at = evaluate_and_log(), global_step
                eval_frequency = args.eval_frequency or max(eval_frequency, 20 * eval_steps)  # longer episodes now
            due = args.checkpoint_frequency and global_step % args.checkpoint_frequency < args.num_envs
            if due and global_step < last_step:
                checkpoint()

        bar.update(global_step - bar.n)
        if not stops and evaluated_at != global_step:
            trained, evaluated_at = evaluate_and_log()[0], global_step
        checkpoint() if args.checkpoint_frequency else check_networks()
        writer.close()
    save({**about, "networks": networks.state_dict(), "step": global_step}, run / "model.pt")
    if stops:
        hint = f"; go on with --resume {run}" if args.checkpoint_frequency else ""
        print(f"stopped at step {global_step}{hint}", file=sys.stderr)
        sys.exit(128 + stops[0])
    print(f"\nmean greedy return, {args.eval_episodes} episodes    random play    untrained      trained")
    for agent, *values in zip(agents, random_play, untrained, trained, strict=True):
        print(f"{agent:34}" + "".join(f"{value:13.2f}" for value in values))
    if not rounds:
        print("nothing was learned: no round of updates was due, see --learning-starts and --train-frequency")
    return networks, rb, run


def play(args: Args) -> np.ndarray:
    """Plays the policies of the run `args.evaluate` greedily; prints means +- 1.96 standard errors.

    Returns the episodes' returns, [episodes, n_agents].
    """
    if args.render and sys.platform == "linux" and not os.environ.keys() & {"DISPLAY", "WAYLAND_DISPLAY"}:
        raise UsageError("--render needs a display; --capture-video does not")
    torch.set_num_threads(args.torch_threads)
    make = game_maker(args)
    games = Games(functools.partial(make, render_mode="human") if args.render else make, 1 if args.render else 10)
    networks, eval_seed = Networks(games, args), args.seed + EVAL_SEEDS
    saved = load(args.evaluate, "model.pt")
    networks.restore(saved)
    returns, _ = evaluate(networks, games, args.eval_episodes, eval_seed, networks.random_agents)
    step = saved.get("step", "an unknown step")  # older files do not say
    print(f"policies of step {step}: mean greedy return +- 1.96 standard errors, {len(returns)} episodes")
    for agent, values in zip(games.agents, returns.T, strict=True):
        error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else math.nan
        print(f"{agent:34}{values.mean():13.2f} +- {1.96 * error:.2f}")
    if args.capture_video:
        run = Path(args.evaluate)
        save_film(networks, make, (run if run.is_dir() else run.parent) / "evaluation.gif", eval_seed)
    return returns


if __name__ == "__main__":
    try:
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--resume")
        parser.add_argument("--evaluate")
        given = parser.parse_known_args()[0]  # then what else is not given is as it was in that run
        if given.resume and given.evaluate:
            raise UsageError("--resume goes on training, --evaluate plays: give one of them")
        old = (given.resume, "checkpoint.pt") if given.resume else (given.evaluate, "model.pt")
        arguments = tyro.cli(Args, default=Args(**load(*old)["args"])) if old[0] else tyro.cli(Args)
        play(arguments) if arguments.evaluate else main(arguments)
    except UsageError as usage_error:
        print(f"{Path(__file__).name}: {usage_error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # while evaluating: training ends in order
        sys.exit(130)

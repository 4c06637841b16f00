"""Small games for the tests, as a user would write them: `parallel_env(kind, ...)` makes one."""

import copy

import numpy as np
from gymnasium import spaces
from pettingzoo import ParallelEnv


class Game(ParallelEnv):
    """Random observations and rewards, agents that leave by a plan, and a record of everything that was played.

    `plans` are used in turn, an episode each: agent -> (step, "terminated" or "truncated"). After `length` steps all
    that are left are truncated. What it hands out and is handed is overwritten at the next step, as some games do.
    """

    metadata = {"name": "game", "render_modes": []}
    render_mode = None
    made = []  # every game, in the order in which they were made

    def __init__(self, observation_spaces, action_spaces, plans=({},), length=5):
        self.observation_spaces, self.action_spaces = observation_spaces, action_spaces
        self.possible_agents, self.agents = list(observation_spaces), []
        self.plans, self.length, self.episode, self.history, self.handed = plans, length, -1, [], {}
        Game.made.append(self)

    def observation_space(self, agent):
        return self.observation_spaces[agent]

    def action_space(self, agent):
        return self.action_spaces[agent]

    def reset(self, seed=None, options=None):
        self.rng = np.random.default_rng(seed)
        for space in self.observation_spaces.values():
            space.seed(int(self.rng.integers(2**31)))
        self.agents, self.steps, self.episode = self.possible_agents[:], 0, self.episode + 1
        observations = self.observe(self.agents)
        self.history.append(("reset", seed, copy.deepcopy(observations)))
        return observations, {agent: {} for agent in self.agents}

    def step(self, actions):
        assert set(actions) == set(self.agents), f"{set(actions)} act, but {self.agents} are there"
        acting, plan = self.agents, self.plans[self.episode % len(self.plans)]
        received = copy.deepcopy(actions)
        for action in actions.values():
            if isinstance(action, np.ndarray):
                action[...] = 99
        self.steps += 1
        ends = {agent: how for agent, (step, how) in plan.items() if step == self.steps}
        if self.steps == self.length:
            ends = {agent: "truncated" for agent in acting} | ends
        observations = self.observe(acting)
        rewards = {agent: float(self.rng.normal()) for agent in acting}
        terminations = {agent: ends.get(agent) == "terminated" for agent in acting}
        truncations = {agent: ends.get(agent) == "truncated" for agent in acting}
        self.agents = [agent for agent in acting if agent not in ends]
        results = observations, rewards, terminations, truncations
        self.history.append(("step", received, *copy.deepcopy(results)))
        return *results, {agent: {} for agent in acting}

    def observe(self, agents):
        for observation in self.handed.values():
            if isinstance(observation, np.ndarray):
                observation[...] = 7
        self.handed = {agent: self.observation_spaces[agent].sample() for agent in agents}
        return self.handed


def mixed(discrete, plans=None, length=5):
    """Three agents with observations, actions and bounds of different kinds, which leave early in different ways."""
    observation_spaces = {
        "scout": spaces.Dict({"place": spaces.Box(-np.inf, np.inf, (2,)), "lamp": spaces.Discrete(3, start=5)}),
        "scout_1": spaces.Tuple((spaces.MultiBinary(2), spaces.MultiDiscrete([2, 3]))),
        "guard": spaces.Box(0, 9, (2, 2), np.uint8),
    }
    if discrete:
        actions = spaces.Discrete(3, start=-1), spaces.MultiDiscrete([2, 4], start=[1, -2]), spaces.Discrete(2)
    else:
        actions = (
            spaces.Box(np.array([-1, 0], np.float32), np.array([3, 0.5], np.float32)),
            spaces.Box(np.array([[5.0, -7.0], [0.0, 1.0]]), np.array([[7.0, -6.0], [0.1, 2.0]]), dtype=np.float64),
            spaces.Box(-0.25, 1, (1,)),
        )
    plans = plans or (
        {"scout": (2, "terminated"), "scout_1": (3, "truncated")},
        {"scout_1": (1, "terminated"), "guard": (4, "terminated"), "scout": (4, "truncated")},
        {},
    )
    return Game(observation_spaces, dict(zip(observation_spaces, actions, strict=True)), plans, length)


class Memory(ParallelEnv):
    """Episodes of two steps: each agent sees a bit and answers; the next observation shows whether it was right, and
    pays 1 only then, whatever it does. The best return is 1; it takes the target to carry the reward back a step.
    """

    metadata = {"name": "memory", "render_modes": []}
    render_mode = None

    def __init__(self, discrete):
        self.discrete, self.possible_agents, self.agents = discrete, ["left", "right"], []
        self.space = spaces.Box(-1, 1, (3,))
        self.actions = spaces.Discrete(2) if discrete else spaces.Box(0, 2, (1,))

    def observation_space(self, agent):
        return self.space

    def action_space(self, agent):
        return self.actions

    def reset(self, seed=None, options=None):
        self.agents, self.late = self.possible_agents[:], False
        self.bits = np.random.default_rng(seed).integers(2, size=2)
        return {a: np.array([2 * b - 1, 0, 0], np.float32) for a, b in zip(self.agents, self.bits, strict=True)}, {}

    def step(self, actions):
        agents, late, self.late = self.agents, self.late, True
        rewards = dict.fromkeys(agents, 0.0)
        if late:
            rewards, self.agents = dict(zip(agents, self.right, strict=True)), []
        else:
            answers = np.array([float(np.ravel(actions[a])[0]) for a in agents])
            answers = answers if self.discrete else answers / 2
            self.right = (1 - np.abs(answers - self.bits)).tolist()
        observations = {a: np.array([0, r, 1], np.float32) for a, r in zip(agents, self.right, strict=True)}
        return observations, rewards, dict.fromkeys(agents, late), dict.fromkeys(agents, False), {}


def parallel_env(kind="mixed", discrete=False, **kwargs):
    """A game by its name. The names after `memory` are games that the scripts must refuse."""
    narrow, box = spaces.Box(-1, 1, (2,)), spaces.Box(-1, 1, (2,))
    actions = spaces.Discrete(3) if discrete else box
    observations = {
        "picture": spaces.Box(0, 255, (210, 160, 3), np.uint8),
        "text": spaces.Text(5),
        "sequence": spaces.Sequence(narrow),
        "masked": spaces.Dict({"observation": narrow, "action_mask": spaces.MultiBinary(3)}),
    }
    refused = {
        "infinite": spaces.Box(-np.inf, np.inf, (2,)),
        "half_infinite": spaces.Box(0, np.inf, (2,)),
        "whole_numbers": spaces.Box(0, 7, (2,), np.int64),
        "tuple_actions": spaces.Tuple((spaces.Discrete(2), box)),
        "discrete_actions": spaces.Discrete(3),
        "box_actions": box,
    }
    if kind == "mixed":
        return mixed(discrete, **kwargs)
    if kind == "memory":
        return Memory(discrete)
    if kind == "no_game":
        return object()
    return Game({"agent_0": observations.get(kind, narrow)}, {"agent_0": refused.get(kind, actions)})

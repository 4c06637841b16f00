import numpy as np
from gymnasium import spaces
from pettingzoo import ParallelEnv


class Meeting(ParallelEnv):
    """A walker and a runner on a line of `size` places are to meet. Each sees its own place, then the other's."""

    metadata = {"name": "meeting", "render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(self, size=20, render_mode=None):
        self.size, self.render_mode = size, render_mode
        self.possible_agents, self.agents = ["walker", "runner"], []
        self.sight = spaces.Box(0, 1, (2,))
        self.moves = {"walker": spaces.Discrete(3, start=-1), "runner": spaces.Discrete(7, start=-3)}

    def observation_space(self, agent):
        return self.sight

    def action_space(self, agent):
        return self.moves[agent]

    def reset(self, seed=None, options=None):
        self.agents, self.steps = self.possible_agents[:], 0
        self.places = np.random.default_rng(seed).integers(self.size, size=2)
        return self.observe(), {agent: {} for agent in self.agents}

    def step(self, actions):
        agents, self.steps = self.agents, self.steps + 1
        self.places = np.clip(self.places + [actions[agent] for agent in agents], 0, self.size - 1)
        distance = abs(int(self.places[0] - self.places[1]))
        met, late = distance == 0, self.steps == 25
        results = [dict.fromkeys(agents, value) for value in (-distance / self.size, met, late, {})]
        self.agents = [] if met or late else agents
        return self.observe(), *results

    def observe(self):
        places = (self.places / (self.size - 1)).astype(np.float32)
        return {"walker": places, "runner": places[::-1]}

    def render(self):
        picture = np.full((1, self.size, 3), 255, np.uint8)
        picture[0, self.places] = [[200, 0, 0], [0, 0, 200]]
        return picture.repeat(16, 0).repeat(16, 1)


parallel_env = Meeting

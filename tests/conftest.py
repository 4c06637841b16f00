"""What all tests share. The environment variable MADDPG_DIR names another folder to take the two scripts from."""

import functools
import importlib
import json
import os
import sys
from pathlib import Path

import games as small_games
import pytest
import torch

ROOT = Path(os.environ.get("MADDPG_DIR", Path(__file__).parent.parent)).resolve()
sys.path.insert(0, str(ROOT))
SCENARIOS = [
    "simple_v3",
    "simple_adversary_v3",
    "simple_crypto_v3",
    "simple_push_v3",
    "simple_reference_v3",
    "simple_speaker_listener_v4",
    "simple_spread_v3",
    "simple_tag_v3",
    "simple_world_comm_v3",
    "simple_line_v1",
    "simple_formation_v1",
    "collect_treasure_v1",
]


@pytest.fixture(params=["maddpg_continuous", "maddpg_discrete"])
def script(request):
    """One of the two scripts, imported."""
    return importlib.import_module(request.param)


@pytest.fixture
def continuous():
    return importlib.import_module("maddpg_continuous")


@pytest.fixture
def discrete():
    return importlib.import_module("maddpg_discrete")


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    """Every test works in a folder of its own, with import path, random numbers and users' games as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_game", raising=False)
    monkeypatch.setattr(sys, "path", sys.path[:])
    torch.manual_seed(0)
    small_games.Game.made.clear()
    return tmp_path


class Uniform:
    """In place of `torch.rand_like`: uniform numbers of its own, kept in `drawn` for the oracle to use again."""

    def __init__(self, seed):
        self.generator, self.drawn = torch.Generator().manual_seed(seed), []

    def __call__(self, like, **_):
        self.drawn.append(torch.rand(like.shape, dtype=like.dtype, generator=self.generator))
        return self.drawn[-1].clone()


@pytest.fixture
def uniform(monkeypatch):
    noise = Uniform(3)
    monkeypatch.setattr(torch, "rand_like", noise)
    return noise


def is_discrete(script):
    return script.__name__ == "maddpg_discrete"


def make_args(script, **changes):
    """Arguments of a small run; `env_id` may be a kind of the tests' own games."""
    small = dict(hidden_dim=16, batch_size=32, total_timesteps=300, learning_starts=100, train_frequency=20, num_envs=1)
    small |= dict(eval_episodes=2, env_id="mixed") | changes
    if small["env_id"] in ("mixed", "memory"):
        kwargs = {"kind": small["env_id"], "discrete": is_discrete(script)} | json.loads(small.get("env_kwargs", "{}"))
        small |= dict(env_id="games", env_kwargs=json.dumps(kwargs))
    return script.Args(**small)


def make_games(script, env_id="mixed", num_games=1, first_game=0, relaxed=False, **env_kwargs):
    """`Games` of one of the tests' own games, or of a scenario."""
    if env_id in ("mixed", "memory"):
        make = functools.partial(small_games.parallel_env, env_id, is_discrete(script), **env_kwargs)
    else:
        make = functools.partial(script.make_game, env_id, env_kwargs, not is_discrete(script) or relaxed)
    return script.Games(make, num_games, first_game)


def stored(rb):
    """The filled rows of a replay buffer, in the order in which they came, as numpy `Transitions`."""
    rows = rb.rows[: min(rb.added, len(rb.rows))]
    fields = [field.reshape(-1, *shape) for field, shape in zip(rows.split(rb.widths, 1), rb.shapes, strict=True)]
    return type(rb.shapes)(*(field.cpu().numpy() for field in fields))

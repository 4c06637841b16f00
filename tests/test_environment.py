"""`make_game`, `OneAgentGame` and `Games`: from an id to joint arrays.

Mistakes put in, each of which makes a test here fail: a time limit passed on as a termination; the next episode's
observation in `next_obs`; the first agent's bounds used for all; -1 .. 1 sent into Box(0, 1); a Discrete space's start
forgotten; an agent that has left still alive, or its observation still there; the others' next_alive cut with a
termination of one; seeds that are not used, or are the same for all games or episodes; an exact agent name that also
matches longer ones.
"""

import functools
import warnings

import gymnasium as gym
import numpy as np
import pytest
from conftest import SCENARIOS, is_discrete, make_games
from games import Game, parallel_env
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from pettingzoo.test import parallel_api_test


def random_actions(script, games, rng):
    """Valid joint actions: one-hot in each choice, or anywhere in [-1, 1]."""
    actions = rng.uniform(-1, 1, games.action_space.shape)
    if is_discrete(script):
        scores = np.where(games.action_mask, actions, -9).reshape(*actions.shape[:2], games.n_choices, -1)
        actions = (scores == scores.max(3, keepdims=True)).reshape(actions.shape) * games.action_mask
    return actions.astype(np.float32)


# ---- make_game -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("continuous_actions", [False, True], ids=["discrete", "continuous"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenarios_play_as_their_parallel_env(discrete, scenario, continuous_actions):
    """The faster way to make them gives the same transitions, over whole episodes of several seeds."""
    module = discrete.mpe_environments[f"mpe/{scenario}"]
    ours = discrete.make_game(scenario, {"max_cycles": 6}, continuous_actions)
    theirs = module.parallel_env(max_cycles=6, continuous_actions=continuous_actions)
    assert ours.possible_agents == theirs.possible_agents
    for seed in range(3):
        rng = np.random.default_rng(seed)
        compare(ours.reset(seed=seed)[0], theirs.reset(seed=seed)[0])
        while theirs.agents:
            assert ours.agents == theirs.agents
            actions = {}
            for agent in theirs.agents:
                space = theirs.action_space(agent)
                assert space == ours.action_space(agent)
                actions[agent] = rng.uniform(0, 1, space.shape).astype(np.float32)
                if not continuous_actions:
                    actions[agent] = int(rng.integers(space.n))
            for mine, other in zip(ours.step(dict(actions))[:4], theirs.step(dict(actions))[:4], strict=True):
                compare(mine, other)
        assert ours.agents == []


def compare(mine, other):
    assert mine.keys() == other.keys()
    for agent, value in other.items():
        np.testing.assert_array_equal(mine[agent], value)


def test_ids_in_their_order(script, working_folder):
    """A Gymnasium id, a scenario, a PettingZoo id, a module in the working folder; arguments reach them all."""
    make = functools.partial(script.make_game, continuous_actions=not is_discrete(script))
    pendulum = make("Pendulum-v1", {"g": 3.0})
    assert isinstance(pendulum, script.OneAgentGame) and pendulum.possible_agents == ["agent_0"]
    assert pendulum.env.unwrapped.g == 3.0
    tag = make("simple_tag_v3", {"num_good": 2})
    assert tag.possible_agents == ["adversary_0", "adversary_1", "adversary_2", "agent_0", "agent_1"]
    assert isinstance(tag.action_space("agent_0"), spaces.Discrete if is_discrete(script) else spaces.Box)
    assert make("sisl/multiwalker-v9", {"n_walkers": 2}).possible_agents == ["walker_0", "walker_1"]
    (working_folder / "folder").mkdir()
    for name in "a_game_of_mine.py", "folder/a_game.py":
        (working_folder / name).write_text("import games\nparallel_env = games.parallel_env\n")
        game = make(name.removesuffix(".py").replace("/", "."), {"kind": "memory"})
        assert game.possible_agents == ["left", "right"]


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1"])
def test_one_agent_game_passes_pettingzoos_check(script, env_id):
    game = script.OneAgentGame(gym.make(env_id))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parallel_api_test(game, num_cycles=100)
    alone = gym.make(env_id)
    rng = np.random.default_rng(0)
    obs = alone.reset(seed=4)[0]
    np.testing.assert_array_equal(game.reset(seed=4)[0]["agent_0"], obs)
    while game.agents:
        action = np.float32(rng.uniform(-2, 2, 1)) if env_id == "Pendulum-v1" else int(rng.integers(2))
        for mine, other in zip(game.step({"agent_0": action}), alone.step(action), strict=True):
            np.testing.assert_array_equal(mine["agent_0"], other)


@pytest.mark.parametrize("env_id", ["mixed", "simple_world_comm_v3"])
def test_games_pass_gymnasiums_check(script, env_id):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(make_games(script, env_id, 2), skip_render_check=True)


def test_agent_names(script):
    """An exact name matches itself alone, another all that begin with it, an unknown one is refused."""
    agents = ["adversary", "adversary_0", "adversary_1", "agent_0"]
    for names, matched in (
        ((), [0, 0, 0, 0]),
        (("adversary",), [1, 0, 0, 0]),
        (("adversary_",), [0, 1, 1, 0]),
        (("adv",), [1, 1, 1, 0]),
        (("adversary_1", "ag"), [0, 0, 1, 1]),
    ):
        assert script.match_agents(names, agents).tolist() == [bool(m) for m in matched]
    with pytest.raises(script.UsageError, match="nobody.*adversary_0"):
        script.match_agents(("adversary", "nobody"), agents)


# ---- Observations and actions ----------------------------------------------------------------------------------------
def one_hot(value, n):
    return np.eye(n)[value].tolist()


def flat_by_hand(agent, observation):
    """The mixed game's observations as flat numbers, Dict entries in the order of their names."""
    if agent == "scout":
        return one_hot(observation["lamp"] - 5, 3) + observation["place"].tolist()
    if agent == "scout_1":
        bits, (first, second) = observation
        return bits.tolist() + one_hot(first, 2) + one_hot(second, 3)
    return observation.ravel().tolist()


def test_observations_of_all_kinds_are_flattened(script):
    games = make_games(script)
    order = list(games.obs_spaces[0].spaces)
    data, _ = games.reset(seed=3)
    _, _, observations = Game.made[0].history[-1]
    assert games.obs_mask.sum(1).tolist() == [5, 7, 4]
    for i, agent in enumerate(games.agents):
        flat = flat_by_hand(agent, observations[agent])
        if agent == "scout" and order == ["place", "lamp"]:
            flat = flat[3:] + flat[:3]
        np.testing.assert_allclose(data["obs"][0, i], flat + [0] * (7 - len(flat)), rtol=1e-6)


def test_actions_reach_each_agents_own_bounds(continuous):
    """-1 and 1 become exactly each agent's own low and high, 0 the middle; dtype, shape and bounds are the space's."""
    games = make_games(continuous)
    games.reset(seed=0)
    for value in -1.0, 1.0, 0.0, 0.3, -0.9999999, 0.9999999:
        games.reset(seed=0)
        games.step(np.full(games.action_space.shape, value, np.float32))
        for agent, received in Game.made[0].history[-1][1].items():
            space = games.games[0].action_space(agent)
            assert received.dtype == space.dtype and space.contains(received)
            share = (np.float32(value).astype(float) + 1) / 2
            np.testing.assert_allclose(received, space.low + share * (space.high - space.low), atol=1e-6)
            if abs(value) == 1:
                np.testing.assert_array_equal(received, space.high if value == 1 else space.low)


def test_actions_of_scenarios_lie_in_0_to_1(continuous):
    games = make_games(continuous, "simple_world_comm_v3")
    received = []
    step = games.games[0].step
    games.games[0].step = lambda actions: received.append(actions) or step(actions)
    games.reset(seed=0)
    for value in -1.0, 1.0, 0.5:
        games.step(np.full(games.action_space.shape, value, np.float32))
        for agent, action in received[-1].items():
            assert action.shape == games.games[0].action_space(agent).shape
            np.testing.assert_array_equal(action, np.float32((value + 1) / 2))


def test_discrete_actions_are_integers_with_the_spaces_start(discrete):
    games = make_games(discrete)
    for first in range(3):
        for second in range(4):
            games.reset(seed=0)
            actions = np.zeros(games.action_space.shape, np.float32)
            most = actions.shape[2] // games.n_choices
            actions[0, 0, first] = actions[0, 1, first % 2] = actions[0, 1, most + second] = actions[0, 2, 1] = 1
            games.step(actions)
            received = Game.made[0].history[-1][1]
            assert received["scout"] == first - 1 and type(received["scout"]) is int
            assert received["guard"] == 1 and type(received["guard"]) is int
            np.testing.assert_array_equal(received["scout_1"], [1 + first % 2, second - 2])
            assert games.games[0].action_space("scout_1").contains(received["scout_1"])


def test_wrong_joint_actions_are_refused(script):
    games = make_games(script)
    games.reset(seed=0)
    for actions in (
        np.full(games.action_space.shape, 1.5, np.float32),
        np.full(games.action_space.shape, np.nan, np.float32),
        np.zeros(games.action_space.shape[1:], np.float32),
    ):
        with pytest.raises((ValueError, script.UsageError), match="are not in"):
            games.step(actions)


# ---- Ends ------------------------------------------------------------------------------------------------------------
def play(script, steps, seed=0, **kwargs):
    """What `Games` of one mixed game returned in every step, beside that game's own record."""
    games, rng = make_games(script, **kwargs), np.random.default_rng(seed)
    datas = [games.reset(seed=seed)[0]]
    datas += [games.step(random_actions(script, games, rng))[0] for _ in range(steps)]
    return games, datas, games.games[0].history if hasattr(games.games[0], "history") else None


def test_early_leavers(script):
    """Two episodes, step by step: who acts, whose bootstrap is cut, whom the others still meet."""
    _, datas, _ = play(script, 9)

    def column(key):
        return [data[key][0].astype(int).tolist() for data in datas[1:]]

    assert datas[0]["alive"][0].tolist() == [1, 1, 1]
    # scout terminated in step 2, scout_1 truncated alone in step 3, the guard by the time limit in step 5; then scout_1
    # terminated in step 1, and in step 4 the guard terminated while the scout is truncated
    ended = [[0, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]], [[0, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1]]
    after = [[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 1], [0, 0, 1]], [[1, 0, 1], [1, 0, 1], [1, 0, 1], [1, 0, 0]]
    alive = [[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 1], [1, 1, 1]], [[1, 0, 1], [1, 0, 1], [1, 0, 1], [1, 1, 1]]
    assert column("terminations") == ended[0] + ended[1]
    assert column("next_alive") == after[0] + after[1]
    assert column("alive") == alive[0] + alive[1]
    assert [int(data["done"][0]) for data in datas[1:]] == [0, 0, 0, 0, 1, 0, 0, 0, 1]


def test_agents_that_left_are_zeros_and_final_observations_are_kept(script):
    games, datas, history = play(script, 14)
    assert [entry[0] for entry in history].count("reset") == 4
    steps = [(n, entry) for n, entry in enumerate(history) if entry[0] == "step"]
    for data, before, (n, (_, received, observations, rewards, *_)) in zip(datas[1:], datas, steps, strict=False):
        acted = before["alive"][0].astype(bool)
        assert [agent in received for agent in games.agents] == acted.tolist()
        for i, agent in enumerate(games.agents):
            shown = spaces.flatten(games.obs_spaces[i], observations[agent]) if acted[i] else np.zeros(0)
            np.testing.assert_allclose(data["next_obs"][0, i], np.pad(shown, (0, 7 - len(shown))), rtol=1e-6)
            assert data["rewards"][0, i] == pytest.approx(rewards.get(agent, 0), rel=1e-6)
            if not data["alive"][0, i]:
                assert (data["obs"][0, i] == 0).all()
        if data["done"][0]:
            first = history[n + 1][2]
            for i, agent in enumerate(games.agents):
                shown = spaces.flatten(games.obs_spaces[i], first[agent])
                np.testing.assert_allclose(data["obs"][0, i, : len(shown)], shown, rtol=1e-6)
            assert not np.array_equal(data["obs"], data["next_obs"])
        else:
            np.testing.assert_array_equal(data["obs"][0], data["next_obs"][0] * data["alive"][0, :, None])


def test_time_limits(script):
    """The end of time cuts no bootstrap, and everyone is still met in the final observation."""
    limits = {"simple_spread_v3": {"max_cycles": 4}}
    limits |= {"CartPole-v1" if is_discrete(script) else "Pendulum-v1": {"max_episode_steps": 4}}
    for env_id, limit in limits.items():
        _, datas, _ = play(script, 12, env_id=env_id, **limit)
        assert [int(data["done"][0]) for data in datas[1:]] == [0, 0, 0, 1] * 3
        assert all(not data["terminations"].any() and data["next_alive"].all() for data in datas[1:])


def test_a_fallen_pole_is_a_termination(discrete):
    _, datas, _ = play(discrete, 60, env_id="CartPole-v1")
    ends = [data for data in datas[1:] if data["done"][0]]
    assert ends and all(data["terminations"].all() and not data["next_alive"].any() for data in ends)


# ---- Seeds -----------------------------------------------------------------------------------------------------------
def joint_play(script, all_games, seed, steps=12):
    """Everything that several `Games` return, one below the other, under the same actions."""
    rng, whole = np.random.default_rng(5), make_games(script, num_games=sum(len(games.games) for games in all_games))
    datas = [[games.reset(seed=seed)[0] for games in all_games]]
    for _ in range(steps):
        actions = random_actions(script, whole, rng)
        shares = np.split(actions, np.cumsum([len(games.games) for games in all_games])[:-1])
        datas.append([games.step(share)[0] for games, share in zip(all_games, shares, strict=True)])
    return [{key: np.concatenate([part[key] for part in parts]) for key in parts[0]} for parts in datas]


def test_games_do_not_depend_on_how_they_are_spread(script):
    whole = joint_play(script, [make_games(script, num_games=4)], seed=3)
    halves = [make_games(script, num_games=2), make_games(script, num_games=2, first_game=2)]
    for data, other in zip(whole, joint_play(script, halves, seed=3), strict=True):
        for key in data:
            np.testing.assert_array_equal(data[key], other[key])


def test_seeds(script):
    """The same seed, the same games; another seed, another game, another episode: another seed to reset with."""
    first, again, other = (joint_play(script, [make_games(script, num_games=3)], seed) for seed in (3, 3, 4))
    for data, repeated in zip(first, again, strict=True):
        for key in data:
            np.testing.assert_array_equal(data[key], repeated[key])
    assert not np.array_equal(first[0]["obs"], other[0]["obs"])
    seeds = [entry[1] for game in Game.made for entry in game.history if entry[0] == "reset"]
    third = len(seeds) // 3
    assert len(set(seeds[:third])) == third
    assert seeds[:third] == seeds[third : 2 * third]
    assert not set(seeds[:third]) & set(seeds[2 * third :])
    assert all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)


def test_a_game_alone_in_a_process_is_the_same_game(script):
    """Gymnasium's own vector environment plays them as this process does."""
    make = functools.partial(parallel_env, "mixed", is_discrete(script))
    both = [functools.partial(script.Games, make, 2, 2 * w) for w in range(2)]
    expected = joint_play(script, [each() for each in both], seed=3, steps=6)
    envs = gym.vector.AsyncVectorEnv(both)
    try:
        rng = np.random.default_rng(5)
        datas = [envs.reset(seed=[3, 3])[0]]
        reference = make_games(script, "mixed", 4)
        for _ in range(6):
            datas.append(envs.step(random_actions(script, reference, rng).reshape(envs.action_space.shape))[0])
    finally:
        envs.close()
    for data, other in zip(datas, expected, strict=True):
        for key, value in other.items():
            np.testing.assert_array_equal(data[key].reshape(value.shape), value)


# ---- Agents that come late -------------------------------------------------------------------------------------------
class LateComer(Game):
    """Its second agent is there from the second step on."""

    def reset(self, seed=None, options=None):
        observations, infos = super().reset(seed, options)
        self.agents = ["early"]
        return {"early": observations["early"]}, {"early": infos["early"]}

    def step(self, actions):
        results = super().step(actions)
        if self.steps == 1:
            self.agents = ["early", "late"]
            results[0]["late"] = self.observation_spaces["late"].sample()
        return results


def test_an_agent_that_comes_late_is_met_from_the_step_before(script):
    """It is in everyone's targets as soon as it is there: next_alive of a step says who acts in the one after."""
    box, actions = spaces.Box(-1, 1, (2,)), spaces.Discrete(3) if is_discrete(script) else spaces.Box(-1, 1, (2,))
    spaces_of = dict.fromkeys(("early", "late"), box), dict.fromkeys(("early", "late"), actions)
    games, rng = script.Games(lambda: LateComer(*spaces_of), 1), np.random.default_rng(1)
    data = [games.reset(seed=1)[0]]
    data += [games.step(random_actions(script, games, rng))[0] for _ in range(4)]
    assert [step["alive"][0].tolist() for step in data[:2]] == [[1, 0], [1, 1]]
    for before, after in zip(data[1:], data[2:], strict=False):
        assert (before["next_alive"] == before["alive"]).all() and after["next_alive"].all()
    assert np.abs(data[1]["next_obs"][0, 1]).max() > 0

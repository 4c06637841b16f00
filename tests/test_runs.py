"""Whole runs: `main` in this process, compared with what the games recorded, and the scripts as commands.

Mistakes put in, each of which makes a test here fail: the next episode's observation stored as next_obs; the stored
action not the executed one; no exploration noise; an unused seed (of games, of networks); evaluation that samples, that
plays in the training games, or that uses training's random numbers; a round too many or too few; games of several
workers in another order; a model saved before training.
"""

import copy
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SCENARIOS, is_discrete, make_args, make_games, stored
from games import Game, mixed
from gymnasium import spaces
from PIL import Image, ImageDraw
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PLAY_ALL = """
import json, runpy, sys
script, commands = sys.argv[1], json.loads(sys.argv[2])
for command in commands:
    sys.argv = [script, *command]
    runpy.run_path(script, run_name="__main__")
"""


def weights(networks):
    return {name: value.clone() for name, value in networks.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def events(run):
    """All scalars of a run: name -> list of (step, value)."""
    accumulator = EventAccumulator(str(run), size_guidance={"scalars": 0})
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}


# ---- The buffer and what was played ----------------------------------------------------------------------------------
def executed(games, i, received):
    """The stored form of an action that the game received."""
    space, row = games.action_spaces[i], np.zeros(games.action_mask.shape[1])
    if isinstance(space, spaces.Box):
        row[: received.size] = ((received - space.low) / (space.high - space.low) * 2 - 1).ravel()
    else:
        choices = [received - space.start] if isinstance(space, spaces.Discrete) else received - space.start
        for number, choice in enumerate(choices):
            row[number * (len(row) // games.n_choices) + choice] = 1
    return row


def played(games, history):
    """A game's own record as rows of the replay buffer, written from the meaning of each field."""
    rows, before, gone = [], None, set()
    for entry in history:
        if entry[0] == "reset":
            before, gone = entry[2], set()
            continue
        _, received, observations, rewards, terminations, truncations = entry
        acting = [agent for agent in games.agents if agent not in gone]
        assert set(received) == set(acting)
        gone |= {agent for agent in acting if terminations[agent] or truncations[agent]}
        row = {key: np.zeros(shape) for key, shape in zip(("obs", "next_obs"), [games.obs_mask.shape] * 2, strict=True)}
        row["actions"] = np.zeros(games.action_mask.shape)
        row |= {key: np.zeros(len(games.agents)) for key in ("rewards", "terminations", "alive", "next_alive")}
        for i, agent in enumerate(games.agents):
            if agent in acting:
                width = games.obs_mask[i].sum()
                row["obs"][i, :width] = spaces.flatten(games.obs_spaces[i], before[agent])
                row["next_obs"][i, :width] = spaces.flatten(games.obs_spaces[i], observations[agent])
                row["actions"][i] = executed(games, i, received[agent])
                row["rewards"][i], row["terminations"][i] = rewards[agent], terminations[agent]
                row["alive"][i] = 1
                everyone_gone = len(gone) == len(games.agents)
                row["next_alive"][i] = agent not in gone or (everyone_gone and truncations[agent])
        rows.append(row)
        before = observations
    return rows


@pytest.mark.parametrize("num_envs", [1, 4])
def test_the_buffer_holds_what_was_played(script, num_envs):
    """Row by row, through learning and evaluations: observations, executed actions, rewards, ends."""
    _, rb, _ = script.main(make_args(script, num_envs=num_envs, num_workers=0, eval_frequency=100))
    steps = [sum(entry[0] == "step" for entry in game.history) for game in Game.made]
    training = [game for game, number in zip(Game.made, steps, strict=True) if number == 300 // num_envs]
    assert len(training) == num_envs and len(Game.made) > num_envs
    games, data = make_games(script), stored(rb)
    histories = [played(games, game.history) for game in training]
    assert len(data.obs) == 300
    for n in range(300):
        for key, expected in histories[n % num_envs][n // num_envs].items():
            np.testing.assert_allclose(getattr(data, key)[n], expected, rtol=1e-5, atol=1e-5, err_msg=f"{n} {key}")


def test_exploration(script):
    """Uniform play up to learning_starts, then the policy with noise of its own for every game, agent and dimension."""
    args = dict(env_id="simple_spread_v3", num_envs=4, total_timesteps=800, learning_starts=400, train_frequency=10**6)
    networks, rb, _ = script.main(make_args(script, **args, num_workers=0))
    data = stored(rb)
    with torch.no_grad():
        greedy = script.choose(networks.actor, torch.from_numpy(data.obs), 0.0, None).numpy()
    random_part, policy_part = data.actions[:400], (data.actions - greedy)[400:]
    if is_discrete(script):
        np.testing.assert_allclose(random_part.mean(0), 0.2, atol=0.09)
        assert 0.3 < np.abs(policy_part).max(2).mean() < 1
    else:
        np.testing.assert_allclose(random_part.std(0), math.sqrt(1 / 3), rtol=0.15)
        assert np.abs(random_part).max() > 0.99
        np.testing.assert_allclose(policy_part.std(0), 0.1, rtol=0.2)
    by_step = data.actions[400:].reshape(100, 4, -1)
    assert np.abs(by_step[:, 0] - by_step[:, 1]).mean() > 0.01


@pytest.mark.parametrize("num_envs", [1, 3, 4])
def test_number_of_rounds(script, monkeypatch, num_envs):
    """As many as train_frequency says, none before learning_starts, and each within one joint step of its time."""
    rounds, filled, update, sample = [], [], script.update, script.ReplayBuffer.sample
    monkeypatch.setattr(script, "update", lambda *inputs: rounds.append(filled[-1]) or update(*inputs))
    spy = lambda rb, size: filled.append(rb.added) or sample(rb, size)  # noqa: E731
    monkeypatch.setattr(script.ReplayBuffer, "sample", spy)
    args = dict(num_envs=num_envs, num_workers=0, total_timesteps=300, learning_starts=103, train_frequency=7)
    run_of(script, **args, env_id="memory")
    last = -(-300 // num_envs) * num_envs
    assert (last - num_envs - 103) // 7 <= len(rounds) <= (last - 103) // 7
    for n, step in enumerate(rounds, 1):
        assert 0 <= step - (103 + 7 * n) < num_envs
    run_of(script, **args | {"learning_starts": 300}, env_id="memory")
    assert len(filled) == len(rounds)


# ---- The same again --------------------------------------------------------------------------------------------------
def run_of(script, **changes):
    """Weights, buffer and folder of a run; the folder is renamed, as two runs of one second would share its name."""
    networks, rb, run = script.main(make_args(script, **changes))
    return weights(networks), rb.rows.clone(), Path(shutil.move(run, f"{run}_{time.monotonic_ns()}"))


def test_seeds(script):
    """The same seed gives the same weights, buffer and events, times apart; another seed other ones, from the start."""
    args = dict(env_id="simple_spread_v3", total_timesteps=1000, learning_starts=500)
    first, again, other = (run_of(script, **args, seed=seed) for seed in (5, 5, 6))
    assert same(first[0], again[0]) and torch.equal(first[1], again[1])
    logs = [events(result[2]) for result in (first, again, other)]
    for log in logs:
        log.pop("charts/SPS")
    assert logs[0] == logs[1] and len(logs[0]) > 10
    assert logs[0]["charts/episodic_return"] != logs[2]["charts/episodic_return"]
    assert logs[0]["losses/critic_loss/agent_0"] != logs[2]["losses/critic_loss/agent_0"]
    for name, value in first[0].items():
        if name.endswith(("weight", "bias")):
            assert not torch.equal(value, other[0][name])
    assert not torch.equal(first[1][0], other[1][0])


def test_initial_networks_depend_on_the_seed(script, capsys):
    """Before the first round, which these runs are too short for, and say so."""
    args = dict(total_timesteps=20, learning_starts=20, env_id="memory")
    first, second = (script.main(make_args(script, **args, seed=seed))[0] for seed in (1, 2))
    for part in "actor", "critic":
        assert not torch.equal(getattr(first, part).layer_1.weight, getattr(second, part).layer_1.weight)
    assert capsys.readouterr().out.count("nothing was learned: no round") == 2
    script.main(make_args(script))
    assert "nothing was learned" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "cores, expected",
    [
        (1, {1: 0, 16: 0, 25: 0, 200: 0}),
        (2, {1: 0, 7: 0, 8: 2, 9: 0, 16: 2, 25: 1, 200: 2}),
        (16, {8: 2, 16: 4, 25: 5, 300: 15}),
    ],
)
def test_default_number_of_workers(script, cores, expected, monkeypatch):
    """One worker is worth its hand-over with many games only, several play at the same time, a lone core has none."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert {num_envs: script.Args(num_envs=num_envs).num_workers for num_envs in expected} == expected


def test_workers_change_nothing(script):
    """With 0, 1 and 2 processes the weights and the buffer are bit-identical."""
    results = [run_of(script, num_envs=4, num_workers=number) for number in (0, 1, 2)]
    for other in results[1:]:
        assert same(results[0][0], other[0]) and torch.equal(results[0][1], other[1])


def test_evaluation_changes_nothing(script):
    """Whatever its frequency and number of episodes, training's weights and buffer are bit-identical."""
    plain = run_of(script)
    often = run_of(script, eval_frequency=20)
    longer = run_of(script, eval_episodes=7)
    for other in often, longer:
        assert same(plain[0], other[0]) and torch.equal(plain[1], other[1])
    counts = [len(events(run)["eval/episodic_return"]) for _, _, run in (plain, often)]
    assert counts[0] < counts[1] and counts[1] >= 15


# ---- Evaluation ------------------------------------------------------------------------------------------------------
def test_evaluate_is_greedy_and_touches_no_random_numbers(script):
    networks = script.Networks(make_games(script), make_args(script))
    weights_before = weights(networks)

    def returns(seed, random_agents=None):
        return script.evaluate(networks, make_games(script, num_games=2), 5, seed, random_agents)[0]

    state, numpy_state = torch.get_rng_state(), copy.deepcopy(np.random.get_state()[1])
    first = returns(3)
    assert torch.equal(torch.get_rng_state(), state) and np.array_equal(np.random.get_state()[1], numpy_state)
    assert first.shape == (5, 3)
    torch.manual_seed(99)
    np.testing.assert_array_equal(first, returns(3))
    assert not np.array_equal(first, returns(4))
    assert same(weights(networks), weights_before)

    everyone, state = torch.tensor([True, True, True]), torch.get_rng_state()
    random_play = returns(3, everyone)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(98)
    np.testing.assert_array_equal(random_play, returns(3, everyone))


def test_evaluate_sends_the_greedy_actions_and_sums_their_rewards(script):
    """By the games' own record: every action is the policy's, every return a whole episode's undiscounted sum."""
    networks = script.Networks(make_games(script), make_args(script))
    games = make_games(script, num_games=2)
    returns = script.evaluate(networks, games, 6, 3, None)[0]
    sums = []
    for game in games.games:
        rows, episodes = played(games, game.history), []
        obs = torch.tensor(np.array([row["obs"] for row in rows]), dtype=torch.float32)
        with torch.no_grad():
            greedy = script.choose(networks.actor, obs, 0.0, None).numpy()
        for row, action in zip(rows, greedy, strict=True):
            np.testing.assert_allclose(row["actions"], action * row["alive"][:, None], atol=1e-5)
        steps = iter(rows)
        for entry in game.history:
            if entry[0] == "reset":
                episodes.append(np.zeros(3))
            else:
                episodes[-1] += next(steps)["rewards"]
        sums.append(episodes)
    for n in range(6):
        np.testing.assert_allclose(returns[n], sums[n % 2][n // 2], rtol=1e-5)


def test_evaluation_weighs_long_episodes_as_short_ones(script):
    """Each game counts with equally many episodes, though some games' episodes are ten times as long."""
    games = make_games(script, num_games=2)
    for game, length in zip(games.games, (2, 20), strict=True):
        game.plans, game.length = ({},), length
    networks = script.Networks(games, make_args(script))
    returns = script.evaluate(networks, games, 4, 3, None)[0]
    for n in range(4):
        rows = played(games, games.games[n % 2].history)
        length = (2, 20)[n % 2]
        episode = np.sum([row["rewards"] for row in rows[n // 2 * length : (n // 2 + 1) * length]], 0)
        np.testing.assert_allclose(returns[n], episode, rtol=1e-5)


# ---- Commands --------------------------------------------------------------------------------------------------------
SMALL = ["--learning-starts", "200", "--batch-size", "32", "--hidden-dim", "16"]
SMALL += ["--eval-episodes", "2", "--train-frequency", "100", "--total-timesteps", "1000", "--num-envs", "1"]


def command(script, *arguments, prefix=()):
    """The script as a command in the working folder."""
    file = str(ROOT / f"{script.__name__}.py")
    line = [sys.executable, *prefix, file, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(line, capture_output=True, text=True, timeout=300, env=environment)


def check_run(script, run, full=True):
    """Every key of the logs, finite numbers, the arguments, and a model that plays as it did in the last evaluation."""
    log = events(run)
    saved = torch.load(run / "model.pt", weights_only=True)
    args, agents = script.Args(**saved["args"]), saved["agents"]
    per_agent = ["eval/episodic_return"]
    if full:
        per_agent += ["charts/episodic_return", "losses/critic_loss", "losses/q_values", "losses/actor_loss"]
        assert {"charts/episodic_return", "charts/episodic_length", "charts/SPS", "eval/episodic_return"} <= log.keys()
    for name in per_agent:
        assert {f"{name}/{agent}" for agent in agents} <= log.keys()
    assert all(math.isfinite(value) for values in log.values() for _, value in values)

    relaxed = getattr(args, "relaxed", False)
    continuous = relaxed or not is_discrete(script)
    kwargs = json.loads(args.env_kwargs)
    games = script.Games(lambda: script.make_game(args.env_id, kwargs, continuous), min(args.eval_episodes, 10))
    networks = script.Networks(games, args)
    networks.load_state_dict(saved["networks"])
    seed = args.seed + script.EVAL_SEEDS
    returns = script.evaluate(networks, games, args.eval_episodes, seed, networks.random_agents)[0].mean(0)
    for agent, value in zip(agents, returns, strict=True):
        assert log[f"eval/episodic_return/{agent}"][-1][1] == pytest.approx(value, rel=1e-6)
    total = log["eval/episodic_return"][-1]
    assert total == (pytest.approx(args.total_timesteps, abs=args.num_envs), pytest.approx(returns.sum(), rel=1e-5))


def only_run(*expected):
    (run,) = Path("runs").iterdir()
    for part in expected:
        assert part in run.name
    return run


def test_every_scenario(script):
    """All twelve, through the command line, one after the other in one process."""
    commands = [["--env-id", scenario, *SMALL] for scenario in SCENARIOS]
    result = command(script, json.dumps(commands), prefix=("-c", PLAY_ALL))
    assert result.returncode == 0, result.stderr
    runs = list(Path("runs").iterdir())
    assert len(runs) == len(SCENARIOS)
    for run in runs:
        check_run(script, run)


OTHERS = [
    ["--env-id", "gym", "--env-kwargs", '{"max_episode_steps": 50}'],
    ["--env-id", "sisl", "--env-kwargs", '{"max_cycles": 20}', "--total-timesteps", "250"],
    ["--env-id", "simple_speaker_listener_v4", "--num-envs", "4", "--num-workers", "2"],
    ["--env-id", "simple_tag_v3", "--ddpg-agents", "adversary", "--env-kwargs", '{"max_cycles": 10}'],
    ["--env-id", "simple_tag_v3", "--random-agents", "agent", "adversary_1", "--max-grad-norm", "0.5"],
]


def test_other_flags(script):
    """A Gymnasium id, a PettingZoo id, several games with workers, DDPG agents, random agents, relaxed actions."""
    names = {"gym": "CartPole-v1", "sisl": "sisl/pursuit-v5"}
    if not is_discrete(script):
        names = {"gym": "Pendulum-v1", "sisl": "sisl/multiwalker-v9"}
    commands = [[names.get(part, part) for part in flags] for flags in OTHERS]
    if is_discrete(script):
        commands += [["--env-id", id, "--relaxed"] for id in ("simple_reference_v3", "simple_world_comm_v3")]
    commands = [[*SMALL, *c, "--exp-name", f"run{n}"] for n, c in enumerate(commands)]
    result = command(script, json.dumps(commands), prefix=("-c", PLAY_ALL))
    assert result.returncode == 0, result.stderr
    runs = {run.name.split("__")[1]: run for run in Path("runs").iterdir()}
    assert len(runs) == len(commands)
    for name, run in runs.items():
        check_run(script, run, full=name != "run1")  # too short for a point of the charts
    assert runs["run1"].name.startswith(names["sisl"].replace("/", "_"))


def test_a_users_game(script, working_folder):
    """A module in the working folder whose agents leave early, as a command of its own."""
    shutil.copy(Path(__file__).parent / "games.py", working_folder / "my_game.py")
    kwargs = json.dumps({"discrete": is_discrete(script)})
    result = command(script, "--env-id", "my_game", "--env-kwargs", kwargs, *SMALL, "--seed", "7")
    assert result.returncode == 0, result.stderr
    for agent in "scout", "scout_1", "guard":
        assert re.search(rf"^{agent} +-?\d+\.\d+ +-?\d+\.\d+ +-?\d+\.\d+$", result.stdout, re.M)
    assert "random play" in result.stdout
    check_run(script, only_run("my_game__", f"__{script.__name__}__7__"))


def test_interrupt(script):
    """Ctrl-C ends the run cleanly: no traceback, the model saved, workers gone."""
    flags = ["--env-id", "simple_v3", "--num-envs", "2", "--num-workers", "1" if is_discrete(script) else "0"]
    flags += [*SMALL[:-2], "--total-timesteps", "10000000"]
    line = [sys.executable, str(ROOT / f"{script.__name__}.py"), *flags]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(Path().glob("runs/*/events*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1.5)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    saved = torch.load(only_run("simple_v3") / "model.pt", weights_only=True)
    assert saved["agents"] == ["agent_0"]
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_the_saved_model_is_the_trained_one(script):
    networks, _, run = script.main(make_args(script, env_id="simple_spread_v3"))
    saved = torch.load(Path(run) / "model.pt", weights_only=True)
    assert same(weights(networks), saved["networks"])
    other = script.Networks(make_games(script, "simple_spread_v3"), script.Args(**saved["args"]))
    other.load_state_dict(saved["networks"])
    obs = torch.randn(50, 3, 18)
    assert torch.equal(script.choose(networks.actor, obs, 0.0, None), script.choose(other.actor, obs, 0.0, None))
    assert saved["args"]["env_id"] == "simple_spread_v3"


def test_others_may_act_at_random_when_a_model_is_played(script, capsys):
    """--evaluate with --random-agents: the trained guard beside scouts at random, whoever was so in training."""
    run = script.main(make_args(script, random_agents=("guard",)))[2]
    saved = script.load(str(run), "model.pt")

    def play(*names):
        args = script.Args(**saved["args"] | {"random_agents": names, "evaluate": str(run), "eval_episodes": 20})
        return script.play(args)

    games = make_games(script, num_games=10)
    networks = script.Networks(games, make_args(script))
    networks.load_state_dict(saved["networks"])
    for names, mask in ((), None), (("scout",), [True, True, False]), (("guard",), [False, False, True]):
        mask = mask and torch.tensor(mask)
        assert np.array_equal(play(*names), script.evaluate(networks, games, 20, 1 + script.EVAL_SEEDS, mask)[0])
        assert "policies of step 300: " in capsys.readouterr().out


def test_film_of_a_long_game(script, tmp_path):
    """Every other step when there are more than 200, and so on: pictures stay few while it plays, the pace is kept."""
    game = mixed(is_discrete(script), plans=({},), length=90)
    drawn = []
    game.render = lambda: drawn.append(game.steps) or np.full((20, 20, 3), game.steps, np.uint8)
    networks = script.Networks(script.Games(lambda: game, 1), make_args(script))
    script.save_film(networks, lambda **_: game, tmp_path / "film.gif", 1)
    film = Image.open(tmp_path / "film.gif")
    assert 100 < film.n_frames <= 200 < len(drawn) < 350
    shown = sum((film.seek(n), film.info["duration"])[1] for n in range(film.n_frames))
    assert shown == pytest.approx(450 * 100, rel=0.05)  # milliseconds: 10 steps a second
    game.length = 1
    with pytest.raises(script.UsageError, match="cannot be written"):
        script.save_film(networks, lambda **_: game, tmp_path / "nowhere" / "film.gif", 1)
    game.render = lambda: None  # as of a game that takes `render_mode` and draws nothing
    with pytest.raises(script.UsageError, match="returns no picture"):
        script.save_film(networks, lambda **_: game, tmp_path / "film.gif", 1)


def test_film_of_a_game_that_an_agent_joins(script, tmp_path, monkeypatch):
    """The label's return of an agent that comes in an episode's second step is of that episode alone."""
    game = mixed(is_discrete(script), plans=({},), length=3)
    reset, step, labels = game.reset, game.step, []

    def late_reset(**kwargs):
        observations, infos = reset(**kwargs)
        game.agents = ["scout", "scout_1"]
        return observations, infos

    def joined_step(actions):
        results = step(actions)
        if game.steps == 1:
            results[0].update(game.observe(game.agents + ["guard"]))
            game.agents.append("guard")
        return results

    game.reset, game.step, game.render = late_reset, joined_step, lambda: np.zeros((20, 20, 3), np.uint8)
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, place, label, *_: labels.append(label))
    networks = script.Networks(script.Games(lambda: game, 1), make_args(script))
    game.history.clear()
    script.save_film(networks, lambda **_: game, tmp_path / "film.gif", 1)
    assert len(labels) == 15
    paid = [entry[3]["guard"] for entry in game.history if entry[0] == "step" and "guard" in entry[3]]
    sums = [f"{sum(paid[n : n + 2]):.1f}" for n in range(0, 10, 2)]
    assert [label.split("guard ")[-1] for label in labels[2::3]] == sums
    assert not any("guard" in label for label in labels[::3])


def test_film_shows_every_step_to_the_last(script, tmp_path, monkeypatch):
    """A picture after each step of five episodes, the last of each before the game begins anew, labelled as it is."""
    labels, returns = [], []
    evaluate = script.evaluate
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, place, label, *_: labels.append(label))
    monkeypatch.setattr(script, "evaluate", lambda *args: returns.append(evaluate(*args)))
    args = script.Args(env_id="simple_adversary_v3")
    make = script.game_maker(args)
    networks = script.Networks(script.Games(make, 1), args)
    script.save_film(networks, make, tmp_path / "film.gif", 1)
    ((episodes, _),) = returns
    assert [label.split(" adversary")[0] for label in labels] == [
        f"episode {episode} step {step}" for episode in range(1, 6) for step in range(1, 26)
    ]
    for (adversary, good, _), label in zip(episodes, labels[24::25], strict=True):
        assert label.endswith(f"adversary {adversary:.1f} agent {good:.1f}")
    film = Image.open(tmp_path / "film.gif")
    assert film.n_frames > 60 and (tmp_path / "film.gif").stat().st_size < 1_000_000  # equal pictures become one

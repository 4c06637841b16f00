"""What a user gets wrong: one line on standard error, exit status 2, nothing written under runs/."""

import importlib
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, is_discrete, make_args, make_games
from games import Memory

MODULES = {
    "needs_more": "import a_package_that_is_missing\nparallel_env = None",
    "needs_more_of_it": "import needs_more_of\nparallel_env = None",
    "turn_based": "def env():\n    pass",
    "mine": "import games\nparallel_env = games.parallel_env",
    "blind": "def parallel_env():\n    pass",
    "faulty": "parallel_env = None.game",
    "numbered": "import games\ndef parallel_env():\n    game = games.Memory(True)\n"
    "    game.possible_agents = [0, 1]\n    return game",
    "file_missing": "def parallel_env():\n    open('nothing_of_that_name')",
}

# arguments, and what the line must say
BOTH = {
    "unknown_id": (["--env-id", "simple_tga_v3"], ["simple_tga_v3", "simple_tag_v3"]),
    "unknown_version": (["--env-id", "sisl/multiwalker-v8"], ["sisl/multiwalker-v8", "multiwalker-v9"]),
    "moved_scenario": (["--env-id", "pettingzoo.mpe.simple_tag_v3"], ["simple_tag_v3", "mpe2"]),
    "picture": (["--env-id", "mine", "--env-kwargs", '{"kind": "picture"}'], ["agent_0", "10,000"]),
    "sequence": (["--env-id", "mine", "--env-kwargs", '{"kind": "sequence"}'], ["agent_0", "Sequence"]),
    "action_mask": (["--env-id", "mine", "--env-kwargs", '{"kind": "masked"}'], ["agent_0", "action_mask"]),
    "no_game": (["--env-id", "mine", "--env-kwargs", '{"kind": "no_game"}'], ["mine", "ParallelEnv"]),
    "numbered": (["--env-id", "numbered"], ["numbered", "possible_agents are strings"]),
    "not_parallel": (["--env-id", "turn_based"], ["turn_based", "parallel_env"]),
    "classic": (["--env-id", "classic/chess_v6"], ["classic/chess_v6"]),
    "in_turn": (["--env-id", "classic/chess-v6"], ["classic/chess-v6", "no parallel interface"]),
    "missing_package": (["--env-id", "needs_more"], ["pip install", "a_package_that_is_missing"]),
    "missing_like_itself": (["--env-id", "needs_more_of_it"], ["pip install needs_more_of"]),
    "no_buffer": (["--buffer-size", "0"], ["--buffer-size", "0"]),
    "large_buffer": (
        ["--buffer-size", "1000000000000", "--total-timesteps", "1000000000000"],
        ["--buffer-size", "would fit"],
    ),
    "bad_json": (["--env-kwargs", "{max_cycles: 5}"], ["--env-kwargs", "JSON"]),
    "json_number": (["--env-kwargs", "5"], ["--env-kwargs", "JSON"]),
    "json_list": (["--env-kwargs", "[]"], ["--env-kwargs", "JSON"]),
    "render_alone": (["--render"], ["--render", "--evaluate"]),
    "unknown_key": (["--env-kwargs", '{"max_cycle": 5}'], ["--env-kwargs", "max_cycle"]),
    "no_pictures": (["--env-id", "blind", "--capture-video"], ["render_mode", "blind"]),
    "batch_0": (["--batch-size", "0"], ["--batch-size", "0"]),
    "batch_and_buffer": (["--batch-size", "500", "--buffer-size", "499"], ["--batch-size", "499"]),
    "gamma": (["--gamma", "1.5"], ["--gamma", "1.5"]),
    "gamma_nan": (["--gamma", "nan"], ["--gamma", "nan"]),
    "tau": (["--tau", "-0.1"], ["--tau", "-0.1"]),
    "learning_starts": (["--learning-starts", "101", "--total-timesteps", "100"], ["--learning-starts", "100"]),
    "train_frequency": (["--train-frequency", "0"], ["--train-frequency"]),
    "hidden_dim": (["--hidden-dim", "0"], ["--hidden-dim"]),
    "num_envs": (["--num-envs", "0"], ["--num-envs"]),
    "games_and_buffer": (["--num-envs", "9", "--buffer-size", "8", "--batch-size", "1"], ["--num-envs", "8"]),
    "workers": (["--num-envs", "3", "--num-workers", "2"], ["--num-envs", "--num-workers"]),
    "more_workers_than_games": (["--num-envs", "3", "--num-workers", "5"], ["--num-workers", "3"]),
    "eval_episodes": (["--eval-episodes", "0"], ["--eval-episodes"]),
    "learning_rate": (["--actor-learning-rate", "-1"], ["--actor-learning-rate"]),
    "infinite_rate": (["--critic-learning-rate", "inf"], ["--critic-learning-rate", "inf"]),
    "seed": (["--seed", "-1"], ["--seed"]),
    "large_seed": (["--seed", "5000000000"], ["--seed"]),
    "ddpg_agent": (["--ddpg-agents", "wolf"], ["wolf", "adversary_0", "agent_0"]),
    "random_agent": (["--random-agents", "agent_0", "adversary_7"], ["adversary_7", "adversary_0"]),
}
CONTINUOUS = {
    "other_kind": (["--env-id", "CartPole-v1"], ["maddpg_discrete.py"]),
    "other_kind_of_a_user": (
        ["--env-id", "mine", "--env-kwargs", '{"kind": "discrete_actions"}'],
        ["maddpg_discrete.py", "agent_0"],
    ),
    "infinite": (["--env-id", "mine", "--env-kwargs", '{"kind": "infinite"}'], ["agent_0", "bounded"]),
    "half_infinite": (["--env-id", "mine", "--env-kwargs", '{"kind": "half_infinite"}'], ["agent_0", "bounded"]),
    "whole": (["--env-id", "mine", "--env-kwargs", '{"kind": "whole_numbers"}'], ["agent_0", "float"]),
    "noise": (["--exploration-noise", "-0.1"], ["--exploration-noise"]),
}
DISCRETE = {
    "other_kind": (["--env-id", "Pendulum-v1"], ["maddpg_continuous.py"]),
    "other_kind_of_a_user": (
        ["--env-id", "mine", "--env-kwargs", '{"kind": "box_actions"}'],
        ["maddpg_continuous.py", "agent_0"],
    ),
    "relaxed_elsewhere": (["--env-id", "CartPole-v1", "--relaxed"], ["--relaxed", "mpe2"]),
    "temperature": (["--gumbel-temperature", "0"], ["--gumbel-temperature"]),
    "regularization": (["--logit-regularization", "-1"], ["--logit-regularization"]),
}
CASES = [("maddpg_continuous", name, *case) for name, case in (BOTH | CONTINUOUS).items()]
CASES += [("maddpg_discrete", name, *case) for name, case in (BOTH | DISCRETE).items()]


@pytest.fixture(autouse=True)
def modules(working_folder):
    for name, text in MODULES.items():
        (working_folder / f"{name}.py").write_text(text)
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


def run_here(name, arguments, monkeypatch, capsys):
    """The script's command line in this process: its exit status and what it wrote on standard error."""
    file = str(ROOT / f"{name}.py")
    small = ["--total-timesteps", "200", "--learning-starts", "0", "--eval-episodes", "1"]  # if it is not refused
    monkeypatch.setattr(sys, "argv", [file, *small, *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(file, run_name="__main__")
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize("name, case, arguments, parts", CASES, ids=[f"{case[0][7:]}-{case[1]}" for case in CASES])
def test_one_line_and_status_2(name, case, arguments, parts, monkeypatch, capsys):
    status, line = run_here(name, arguments, monkeypatch, capsys)
    assert status == 2
    assert line.endswith("\n") and line.count("\n") == 1, line
    for part in parts:
        assert part in line
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", ["maddpg_continuous", "maddpg_discrete"])
def test_unsupported_actions_are_not_sent_to_the_other_twin(name, monkeypatch, capsys):
    """Neither script can play a Tuple of actions, so neither may say that the other one does."""
    arguments = ["--env-id", "mine", "--env-kwargs", '{"kind": "tuple_actions"}']
    status, line = run_here(name, arguments, monkeypatch, capsys)
    assert status == 2 and line.count("\n") == 1 and "Tuple" in line
    assert "use maddpg_" not in line


@pytest.mark.parametrize("name", ["maddpg_continuous", "maddpg_discrete"])
def test_runs_that_cannot_be_written(name, monkeypatch, capsys):
    Path("runs").write_text("a file")
    status, line = run_here(name, ["--env-id", "simple_v3", "--eval-episodes", "1"], monkeypatch, capsys)
    assert status == 2 and line.count("\n") == 1 and "runs" in line
    assert Path("runs").read_text() == "a file"


@pytest.mark.parametrize("name", ["maddpg_continuous", "maddpg_discrete"])
def test_optional_packages_and_devices(name, monkeypatch, capsys):
    """Without a GPU and without wandb, as they are on most machines."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    status, line = run_here(name, ["--track"], monkeypatch, capsys)
    assert status == 2 and line.count("\n") == 1 and "pip install wandb" in line
    monkeypatch.undo()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    status, line = run_here(name, ["--cuda"], monkeypatch, capsys)
    assert status == 2 and line.count("\n") == 1 and "--cuda" in line


@pytest.mark.parametrize("name", ["maddpg_continuous", "maddpg_discrete"])
def test_a_resumed_run_gets_one_line_too(name, monkeypatch, capsys):
    """Its GPU is not there; its memory does not suffice for what it grows to; it was made by a changed script."""
    script = importlib.import_module(name)
    run = script.main(make_args(script))[2]
    checkpoint = script.load(str(run), "checkpoint.pt")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    capsys.readouterr()

    def resume(*arguments, **args):
        script.save(checkpoint | {"args": checkpoint["args"] | args}, run / "checkpoint.pt")
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--resume", str(run), *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
        line = capsys.readouterr().err
        assert end.value.code == 2 and line.count("\n") == 1, line
        return line

    assert "this run needs" in resume(cuda=True)
    assert "policy_noise" in resume(policy_noise=0.2)
    assert "give one" in resume("--evaluate", str(run))
    row_bytes = checkpoint["rows"][0].nbytes
    for steps, needed in (400, 300), (1000, 700):  # 300 rows to copy, or 700 more than there were
        monkeypatch.setattr(
            "psutil.virtual_memory", lambda free=needed - 1: SimpleNamespace(available=free * row_bytes)
        )
        assert f"--buffer-size {steps} takes" in resume("--total-timesteps", str(steps))
        monkeypatch.setattr("psutil.virtual_memory", lambda free=needed: SimpleNamespace(available=free * row_bytes))
        script.save(checkpoint, run / "checkpoint.pt")
        script.main(script.Args(**checkpoint["args"] | {"resume": str(run), "total_timesteps": steps}))
        capsys.readouterr()


def test_agents_in_another_order_are_refused(script, monkeypatch):
    """Their networks have the same shapes, and would play each other's part: resumed, played, in worker processes."""
    run = script.main(make_args(script, env_id="memory"))[2]
    parent, made = os.getpid(), Memory.__init__

    def turned(self, *args):
        made(self, *args)
        self.possible_agents.reverse()

    def turned_elsewhere(self, *args):
        made(self, *args)
        self.possible_agents.sort(reverse=os.getpid() != parent)

    files = {*run.iterdir()}
    monkeypatch.setattr(Memory, "__init__", turned)
    for command, end in (script.main, dict(resume=str(run))), (script.play, dict(evaluate=str(run))):
        with pytest.raises(script.UsageError, match="saved agents are left, right, the game's right, left"):
            command(make_args(script, env_id="memory", **end))
    assert {*run.iterdir()} == files
    monkeypatch.setattr(Memory, "__init__", turned_elsewhere)
    with pytest.raises(script.UsageError, match="same order in every process"):
        script.main(make_args(script, env_id="memory", num_workers=1))


@pytest.mark.filterwarnings("ignore:cut off an episode")
def test_an_episode_without_end_is_cut_off(script, monkeypatch):
    """As by a time limit of the game, with a warning: the bootstrap stays. One that ends in its last step is not."""
    networks = script.Networks(make_games(script), make_args(script))
    monkeypatch.setattr(script, "LONGEST_EPISODE", 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        script.evaluate(networks, make_games(script, plans=({},), length=5), 2, 1, None)
    games = make_games(script, plans=({},), length=10**9)
    with pytest.warns(UserWarning, match="an episode of 5 steps"):
        assert script.evaluate(networks, games, 2, 1, None)[1] == 10
    games.reset(seed=1)
    *_, last = (games.step(games.action_space.sample())[0] for _ in range(5))
    assert last["done"] == 1 and last["next_alive"].all() and not last["terminations"].any() and last["alive"].all()
    assert not np.array_equal(last["next_obs"], last["obs"])  # the final observation, and the next episode's first
    assert games.histories == [[1]]


def test_ctrl_c_ends_playing_in_order(script, monkeypatch, capsys):
    """Status 130 and no traceback; training, which saves first, has tests of its own."""
    run = script.main(make_args(script))[2]
    capsys.readouterr()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("games.Game.step", interrupted)
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--evaluate", str(run)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / f"{script.__name__}.py"), run_name="__main__")
    assert end.value.code == 130 and capsys.readouterr().err == ""


@pytest.mark.parametrize("env_id, error", [("faulty", AttributeError), ("file_missing", FileNotFoundError)])
def test_errors_of_a_users_game_are_shown(script, env_id, error):
    """With their traceback: one line would hide where in his module it is."""
    with pytest.raises(error):
        script.main(script.Args(env_id=env_id))


def test_game_that_loses_its_file_is_not_a_full_disk(script, monkeypatch):
    def step(*_):
        raise FileNotFoundError("the game's own")

    monkeypatch.setattr(script.Games, "_step_game", step)
    with pytest.raises(FileNotFoundError, match="the game's own"):
        script.main(script.Args(env_id="simple_v3", total_timesteps=100, learning_starts=0, num_workers=0))


def test_main_raises_usage_error(script):
    """The same mistakes from Python: an exception to catch, not an exit."""
    wrong = [dict(gamma=1.5), dict(env_id="nothing_of_that_name"), dict(random_agents=("wolf",)), dict(env_kwargs="{")]
    wrong += [dict(env_id="Pendulum-v1" if is_discrete(script) else "CartPole-v1"), dict(batch_size=0)]
    for arguments in wrong:
        with pytest.raises(script.UsageError):
            script.main(script.Args(**arguments))
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "arguments",
    [["--env-id", "simple_tga_v3"], ["--gamma", "1.5"], ["--random-agents", "wolf"]],
    ids=["id", "number", "agent"],
)
def test_as_a_command(arguments):
    """A real process: nothing else stands on standard error either."""
    line = [sys.executable, str(ROOT / "maddpg_discrete.py"), *arguments]
    result = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=60)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("maddpg_discrete.py: ")
    assert not Path("runs").exists()

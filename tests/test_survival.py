"""Runs that are killed, stopped, damaged or left without room: a few of each case of benchmark/survive.py.

The slow test makes all of them: python -m pytest -m slow tests/test_survival.py
"""

import csv
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, is_discrete, make_args

SURVIVE = Path(__file__).parent.parent / "benchmark" / "survive.py"
FEW = [  # the twins share what plays and saves, so that each case is tried in one of them at least
    ["--scripts", "maddpg_continuous", "--n", "2", "--modes", "4 games", "--parts", "kill"],
    ["--scripts", "maddpg_discrete", "--n", "2", "--modes", "4 games, 2 workers", "--parts", "kill"],
    ["--scripts", "maddpg_continuous", "--cases", "8", "--parts", "damage", "seconds"],
]


def survive(folder, *arguments):
    """Rows of the benchmark's table."""
    out = folder / "survive.csv"
    line = [sys.executable, str(SURVIVE), *arguments, "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MADDPG_DIR": str(ROOT)}
    result = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=folder)
    assert out.exists(), result.stderr
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert rows, result.stderr
    return rows


def check(rows):
    assert not [row for row in rows if row["passed"] != row["tried"]]


@pytest.mark.parametrize("arguments", FEW, ids=["games", "workers", "damage"])
def test_a_few(working_folder, arguments):
    """Resumed runs are bit-identical; damaged checkpoints are refused or load unchanged; no process is left over."""
    check(survive(working_folder, *arguments))


@pytest.mark.slow
def test_all(script, working_folder):
    check(survive(working_folder, "--scripts", script.__name__))


def test_a_folder_of_this_second_is_not_shared(script):
    """Whatever stands in the place of the run folder stays as it is."""
    args, now = make_args(script, total_timesteps=100), int(time.time())
    taken = [Path("runs") / f"games__{args.exp_name}__1__{now + n}" for n in range(60)]
    for folder in taken:
        folder.mkdir(parents=True)
    run = Path(script.main(args)[2])
    assert run.name.endswith("_") and (run / "checkpoint.pt").exists()
    assert not any(list(folder.iterdir()) for folder in taken)


@pytest.mark.parametrize("what", ["add_scalar", "flush", "close"])
def test_no_room_for_the_logs(script, monkeypatch, what):
    """TensorBoard's writer fails like any other: one line, not a traceback, and the last checkpoint is there."""

    def fail(*_, **__):
        if list(Path("runs").glob("*/checkpoint.pt")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(script.SummaryWriter, what, fail)
    with pytest.raises(script.UsageError, match="No space left"):
        script.main(make_args(script, total_timesteps=2000, checkpoint_frequency=200))
    (run,) = Path("runs").iterdir()
    assert script.load(str(run), "checkpoint.pt")["added"] > 0


def test_no_room_for_the_first_checkpoint(script, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(script.UsageError, match="checkpoint.pt cannot be written"):
        script.main(make_args(script))
    (run,) = Path("runs").iterdir()
    assert not list(run.glob("checkpoint*"))


@pytest.mark.parametrize("frequency", [20, 0])
def test_nothing_is_saved_that_is_not_finite(script, frequency):
    """Neither weights nor, through an initial observation, the replay buffer; without checkpoints no model either."""
    with pytest.raises(script.UsageError, match="diverged"):
        script.main(make_args(script, critic_learning_rate=1e30, checkpoint_frequency=frequency))
    for file in Path("runs").glob("*/*.pt"):
        saved = torch.load(file, weights_only=True)
        assert all(value.isfinite().all() for value in saved["networks"].values())
    assert not list(Path("runs").glob("*/model.pt"))


def test_evaluation_on_resume(script):
    """--eval-frequency may change, and the resumed run keeps to it; a finished run evaluates no step twice."""
    run = script.main(make_args(script, env_id="memory", eval_frequency=150))[2]
    script.main(make_args(script, env_id="memory", eval_frequency=50, total_timesteps=400, resume=str(run)))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(run))
    log.Reload()
    assert [event.step for event in log.Scalars("eval/episodic_return")] == [0, 150, 300, 350, 400]


def test_resume_as_a_command(script, monkeypatch):
    """A flag given with --resume is checked beside the run's own arguments, not beside the defaults."""
    run = script.main(make_args(script, env_id="simple_v3", num_envs=4, num_workers=0))[2]
    flags = ["--resume", str(run), "--total-timesteps", "400", "--num-workers", "2"]
    line = [sys.executable, str(ROOT / f"{script.__name__}.py"), *flags]
    result = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert script.load(str(run), "checkpoint.pt")["added"] == 400


def test_resume_from_a_checkpoint_s_path(script):
    """Also after a kill between the two renames, when that very file is not there: the run goes on in its folder."""
    run = script.main(make_args(script, env_id="simple_v3"))[2]
    checkpoint = run / "checkpoint.pt"
    checkpoint.rename(run / "checkpoint_previous.pt")
    args = make_args(script, env_id="simple_v3", total_timesteps=400, resume=str(checkpoint))
    assert script.main(args)[2] == run
    assert script.load(str(checkpoint), "checkpoint.pt")["added"] == 400


def test_a_worker_that_dies_at_its_start(script, working_folder):
    """One of two workers ends while its games are made: one line, status 2, and the other is not waited for."""
    (working_folder / "dies.py").write_text(
        "import multiprocessing, os\nfrom mpe2 import simple_v3\n\n\ndef parallel_env():\n"
        "    if multiprocessing.current_process().name.endswith('-1'):\n        os._exit(9)\n"
        f"    return simple_v3.parallel_env(continuous_actions={not is_discrete(script)})\n"
    )
    line = [sys.executable, str(ROOT / f"{script.__name__}.py"), "--env-id", "dies", "--num-workers", "2"]
    result = subprocess.run([*line, "--num-envs", "4"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    (told,) = [line for line in result.stderr.splitlines() if line.startswith(script.__name__)]
    assert "a worker died" in told and "9" in told


ENDLESS = """
import numpy as np
from gymnasium import spaces
from pettingzoo import ParallelEnv


class Game(ParallelEnv):
    metadata, render_mode, possible_agents = {"name": "endless"}, None, ["one"]

    def __init__(self, discrete):
        self.actions = spaces.Discrete(2) if discrete else spaces.Box(-1, 1, (1,))

    observation_space = lambda self, agent: spaces.Box(-1, 1, (1,))
    action_space = lambda self, agent: self.actions

    def reset(self, seed=None, options=None):
        self.agents = ["one"]
        return {"one": np.zeros(1, np.float32)}, {}

    def step(self, actions):
        return {"one": np.zeros(1, np.float32)}, {"one": 0.0}, {"one": False}, {"one": False}, {}


parallel_env = Game
"""


def test_a_second_signal_ends_at_once(script, working_folder):
    """Also in an evaluation whose episodes never end, where the first one has to wait."""
    (working_folder / "endless.py").write_text(ENDLESS)
    kwargs = json.dumps({"discrete": script.__name__ == "maddpg_discrete"})
    line = [sys.executable, str(ROOT / f"{script.__name__}.py"), "--env-id", "endless", "--env-kwargs", kwargs]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not list(Path("runs").glob("*/events*")) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        stderr = process.communicate(timeout=20)[1]
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in stderr


@pytest.mark.parametrize("flag", ["cuda", "track"])
def test_a_model_serves_where_it_was_not_trained(script, flag, monkeypatch):
    """One trained on a GPU, or logged to Weights & Biases, plays on a machine without."""
    run = script.main(make_args(script))[2]
    saved = script.load(str(run), "model.pt")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    args = script.Args(**saved["args"] | {flag: True, "evaluate": str(run), "eval_episodes": 3})
    assert script.play(args).shape == (3, 3)

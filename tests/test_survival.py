"""Runs that are killed, stopped, damaged or left without room: a few of each case of benchmark/survive.py.

The slow test makes all of them: python -m pytest -m slow tests/test_survival.py
"""

import csv
import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_args

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


def test_a_checkpoint_never_holds_what_is_not_finite(script):
    """Neither the weights nor, through an initial observation, the replay buffer."""
    with pytest.raises(script.UsageError, match="diverged"):
        script.main(make_args(script, critic_learning_rate=1e30, checkpoint_frequency=20))
    for file in Path("runs").glob("*/*.pt"):
        saved = torch.load(file, weights_only=True)
        assert all(value.isfinite().all() for value in saved["networks"].values())


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

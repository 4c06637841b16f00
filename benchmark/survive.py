"""Kills, stops and damages runs of the two scripts in every way it can, and checks that nothing is lost.

    python benchmark/survive.py                       # everything; N = 20 killed runs for each script and mode
    python benchmark/survive.py --n 2 --parts kill --scripts maddpg_discrete

Every run is a process of its own, in a folder of its own. To save the time of the imports it is forked from this
process, which has imported the libraries and never uses their threads; apart from that it is the command.

"Identical" means bit for bit, against one run that was never stopped: networks with their targets, optimizers, replay
buffer, random state, episodes in progress, the logged numbers still to be averaged, the table printed at the end, and
all TensorBoard scalars, each step standing once. Wall time is left out (charts/SPS: its steps only are compared).

Each row of the table is a check: how many cases were tried, how many passed, and what the first failure was.
"""

import atexit
import contextlib
import csv
import functools
import importlib
import logging
import math
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

HERE = Path(__file__).resolve().parent
ROOT = Path(os.environ.get("MADDPG_DIR", HERE.parent)).resolve()
SCRIPTS = ("maddpg_continuous", "maddpg_discrete")
LIMIT = 300  # seconds after which a process counts as hanging
STEPS = 1200
SMALL = "--env-id simple_speaker_listener_v4 --hidden-dim 16 --batch-size 64 --learning-starts 300 --buffer-size 1000"
SMALL += " --eval-episodes 2 --eval-frequency 400 --checkpoint-frequency 210"
MODES = {
    "1 game": "--num-envs 1 --num-workers 0",
    "4 games": "--num-envs 4 --num-workers 0",
    "4 games, 2 workers": "--num-envs 4 --num-workers 2",
    "relaxed": "--num-envs 4 --num-workers 0 --relaxed",
}
GAME = '''
import os
import numpy as np
from gymnasium import spaces
from pettingzoo import ParallelEnv


class Game(ParallelEnv):
    """Two agents, episodes of 10 steps. `fault` says what goes wrong: in games `first` to `last` (in the order in which
    they were made), in step 3 of all episodes from number `episode` on."""

    metadata = {"name": "faulty", "render_modes": []}
    render_mode = None
    made = 0

    def __init__(self, discrete, fault, first, last, episode):
        self.fault = fault if first <= Game.made <= last else ""
        Game.made += 1
        self.faulty_episode, self.episode, self.discrete = episode, -1, discrete
        self.possible_agents, self.agents = ["left", "right"], []

    def observation_space(self, agent):
        return spaces.Box(-np.inf, np.inf, (3,))

    def action_space(self, agent):
        return spaces.Discrete(3) if self.discrete else spaces.Box(-1, 1, (2,))

    def observe(self):
        return {a: self.rng.normal(size=3).astype(np.float32) for a in self.possible_agents}

    def reset(self, seed=None, options=None):
        self.rng = np.random.default_rng(None if self.fault == "unrepeatable" else seed)
        self.agents, self.steps, self.episode = self.possible_agents[:], 0, self.episode + 1
        observations = self.observe()
        if self.fault == "reset" and self.episode >= self.faulty_episode:
            observations["right"][1] = np.nan
        return observations, {}

    def step(self, actions):
        self.steps += 1
        observations, rewards = self.observe(), {a: float(self.rng.normal()) for a in self.agents}
        if self.episode >= self.faulty_episode and self.steps == 3:
            if self.fault == "observation":
                observations["right"][1] = np.nan
            if self.fault == "reward":
                rewards["right"] = np.inf
        over = self.steps == 10
        ends = dict.fromkeys(self.agents, over)
        self.agents = [] if over else self.agents
        return observations, rewards, dict.fromkeys(ends, False), ends, {}


def parallel_env(discrete=False, fault="", first=0, last=10**9, episode=0):
    return Game(discrete, fault, first, last, episode)
'''


@dataclass
class Args:
    n: int = 20
    """killed runs for each script and mode"""
    cases: int = 50
    """damaged checkpoints for each script, half truncated, half with a flipped bit"""
    scripts: tuple[str, ...] = SCRIPTS
    """scripts to test"""
    modes: tuple[str, ...] = tuple(MODES)
    """modes of the killed runs"""
    parts: tuple[str, ...] = ()
    """parts to run; default: all"""
    seed: int = 1
    """seed of the moments and bytes"""
    out: Path = HERE / "results" / "survive.csv"
    """the table; rows of the same script, mode and check are replaced, others are kept"""


# ---- Processes -------------------------------------------------------------------------------------------------------
class Process:
    """One run of a script's command line in `folder`, in a session of its own; `before` is called in it first."""

    def __init__(self, script, flags, folder, before=None):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.began, self.status = time.monotonic(), None
        self.files = [Path(f"{self.folder}.{name}") for name in ("out", "err")]  # not on a disk that a check fills
        self.pid = os.fork()
        if self.pid == 0:
            self._child(script, flags, before)

    def _child(self, script, flags, before):
        status = 1
        try:
            os.setsid()
            os.chdir(self.folder)
            for number, file in enumerate(self.files, 1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            path = sys.modules[script].__file__
            sys.argv = [path, *map(str, flags)]
            if before:
                before()
            runpy.run_path(path, run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                atexit._run_exitfuncs()
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status if isinstance(status, int) else 1)

    def poll(self):
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def wait(self, until=lambda: False, limit=LIMIT):
        """Waits for the process's end or for `until`; true where it ended."""
        end = time.monotonic() + limit
        while self.poll() is None and not until():
            if time.monotonic() > end:
                os.killpg(self.pid, signal.SIGKILL)
                raise AssertionError(f"still running after {limit} s")
            time.sleep(0.002)
        return self.status is not None

    def kill(self, number=signal.SIGKILL, group=False):
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)

    def members(self):
        """The living processes of its session, the main one left out."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                if os.getsid(process.pid) == self.pid != process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def gone(self, limit=10):
        """Seconds until no process of its session is left; fails after `limit`."""
        began = time.monotonic()
        while left := self.members():
            if time.monotonic() - began > limit:
                self.kill(group=True)
                raise AssertionError(f"{len(left)} orphans after {limit} s")
            time.sleep(0.02)
        return time.monotonic() - began

    @property
    def out(self):
        return self.files[0].read_text()

    @property
    def err(self):
        """What stands on standard error besides the progress bar."""
        text = re.sub(r"[^\r\n]*?steps/s[^\]]*\]", "\n", self.files[1].read_text())
        return "\n".join(line for line in re.split("[\r\n]", text) if line.strip())

    def run(self):
        """The only run folder, or None."""
        runs = sorted((self.folder / "runs").glob("*"))
        assert len(runs) < 2, f"{len(runs)} run folders"
        return runs[0] if runs else None


def finish(*process, **options):
    run = Process(*process, **options)
    run.wait()
    return run


def one_line(process, *parts):
    """The command ended with status 2 and one line that has all the parts."""
    line = process.err
    assert process.status == 2, f"exit status {process.status}: {line[-200:]}"
    assert "\n" not in line and line.startswith("maddpg_"), f"not one line: {line[-300:]}"
    for part in parts:
        assert part in line, f"{part!r} is not in: {line}"
    process.gone()


def done(process):
    assert process.status == 0, f"exit status {process.status}: {process.err[-300:]}"
    process.gone()


# ---- Comparison ------------------------------------------------------------------------------------------------------
def checkpoint(run, name="checkpoint.pt"):
    """A checkpoint without its one entry of wall time."""
    saved = torch.load(Path(run) / name, weights_only=True)
    saved["progress"] = [value for number, value in enumerate(saved["progress"]) if number != 2]
    return saved


def difference(first, second, path=""):
    """Where two nests of containers and tensors differ first, or None."""
    if type(first) is not type(second):
        return f"{path}: {type(first).__name__} and {type(second).__name__}"
    if isinstance(first, dict):
        if list(first) != list(second):
            return f"{path}: keys"
        return next(filter(None, (difference(first[key], second[key], f"{path}/{key}") for key in first)), None)
    if isinstance(first, (list, tuple)):
        if len(first) != len(second):
            return f"{path}: lengths {len(first)} and {len(second)}"
        pairs = enumerate(zip(first, second, strict=True))
        return next(filter(None, (difference(*pair, f"{path}/{n}") for n, pair in pairs)), None)
    if isinstance(first, torch.Tensor):
        equal = first.dtype == second.dtype and torch.equal(first, second)
    else:
        equal = first == second
    return None if equal else f"{path} differs"


def finite(value):
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(finite, value))
    if isinstance(value, torch.Tensor):
        return bool(value.isfinite().all())
    return not isinstance(value, float) or math.isfinite(value)


def scalars(run):
    """Tag -> list of (step, value), of charts/SPS the steps only."""
    accumulator = EventAccumulator(str(run), size_guidance={"scalars": 0})
    accumulator.Reload()
    result = {}
    for tag in sorted(accumulator.Tags()["scalars"]):
        points = [(event.step, event.value) for event in accumulator.Scalars(tag)]
        result[tag] = [(step, 0.0) for step, _ in points] if tag == "charts/SPS" else points
    return result


def identical(process, reference, extra=()):
    """`process` finished and left exactly what `reference` left. `extra` (tag prefix, step) points are allowed."""
    done(process)
    run, run_before = process.run(), reference.run()
    problem = difference(checkpoint(run), checkpoint(run_before))
    names = [torch.load(folder / "model.pt", weights_only=True) for folder in (run, run_before)]
    problem = problem or difference(*names, "model")
    assert not problem, problem
    mine, theirs = scalars(run), scalars(run_before)
    for tag, points in mine.items():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)), f"{tag} has the steps {steps}"
        if extra and tag.startswith(extra[0]):
            mine[tag] = [point for point in points if point[0] != extra[1]]
    problem = difference(mine, theirs, "scalars")
    assert not problem, problem
    tables = [one.out[one.out.index("mean greedy return") :] for one in (process, reference)]
    assert tables[0] == tables[1], "the printed tables differ"


# ---- The table -------------------------------------------------------------------------------------------------------
@dataclass
class Check:
    script: str
    mode: str
    check: str
    tried: int = 0
    passed: int = 0
    notes: list = field(default_factory=list)
    failures: list = field(default_factory=list)

    @contextlib.contextmanager
    def case(self):
        self.tried += 1
        try:
            yield
            self.passed += 1
        except (Exception, AssertionError) as error:
            self.failures.append(f"{type(error).__name__}: {error}".replace("AssertionError: ", "").replace("\n", " "))
            print(f"    case {self.tried} failed: {self.failures[-1][:600]}", flush=True)


COLUMNS = ["script", "mode", "check", "tried", "passed", "note", "commit"]


def commit():
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10", "--exclude", "*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


class Bench:
    """The parts. Each takes a script and yields its `Check`s when they are complete."""

    def __init__(self, args, folder):
        self.args, self.folder, self.count = args, folder, 0
        self.random = random.Random(args.seed)

    def new(self):
        self.count += 1
        return self.folder / str(self.count)

    def flags(self, mode, steps=STEPS):
        return [*SMALL.split(), *MODES[mode].split(), "--total-timesteps", steps]

    @functools.cache  # noqa: B019
    def reference(self, script, mode, steps=STEPS):
        """A run that was never stopped. Tests do not write into its folder."""
        process = finish(script, self.flags(mode, steps), self.new())
        process.seconds = time.monotonic() - process.began
        done(process)
        return process

    def copy(self, process):
        """A new folder with a copy of a process's run; returns the folder and the run in it."""
        folder = self.new()
        shutil.copytree(process.folder / "runs", folder / "runs")
        return folder, folder / "runs" / process.run().name

    def game(self):
        folder = self.new()
        folder.mkdir(parents=True)
        (folder / "faulty_game.py").write_text(GAME)
        return folder

    def faulty(self, script, **kwargs):
        kwargs = {"discrete": script == "maddpg_discrete"} | kwargs
        text = "{" + ", ".join(
            f'"{k}": {str(v).lower() if isinstance(v, bool) else repr(v)}' for k, v in kwargs.items()
        )
        flags = ["--env-id", "faulty_game", "--env-kwargs", text.replace("'", '"') + "}", "--num-envs", 1]
        return [*SMALL.split()[2:], *flags, "--num-workers", 0, "--total-timesteps", STEPS]

    # -- Killed
    def survive(self, script, mode, aim):
        """One run killed, resumed, perhaps killed again, until it is done; how often it was killed."""
        reference, folder, kills = self.reference(script, mode), self.new(), 0
        flags = self.flags(mode)
        while True:
            runs = list((folder / "runs").glob("*"))
            if runs and not list(runs[0].glob("checkpoint*.pt")):  # killed before there was anything to resume
                shutil.rmtree(runs[0])
                runs = []
            process = Process(script, ["--resume", runs[0]] if runs else flags, folder)
            if kills and self.random.random() < 0.4:
                process.wait()
                break
            ended = False
            if aim == "writing":
                begun = runs and (runs[0] / "checkpoint.tmp").exists() and (runs[0] / "checkpoint.tmp").stat().st_mtime
                for _ in range(self.random.randint(1, 4)):
                    ended = process.wait(lambda begun=begun: self.writes(folder, begun)) or ended
                    begun = 0
                    time.sleep(self.random.choice((0, 0.001, 0.003, 0.01, 0.03)))
            else:
                end = time.monotonic() + self.random.uniform(0, reference.seconds)
                ended = process.wait(lambda end=end: time.monotonic() > end)
            if ended:
                break
            process.kill()
            process.wait()
            process.gone()
            kills += process.status == -signal.SIGKILL
            if process.status == 0:
                break
        identical(process, reference)
        return kills

    @staticmethod
    def writes(folder, before):
        """Whether a checkpoint is being written, not the rest of one from before the kill."""
        try:
            return next(folder.glob("runs/*/checkpoint.tmp")).stat().st_mtime != before
        except (StopIteration, OSError):
            return False

    def kill(self, script):
        for mode in self.args.modes:
            if mode == "relaxed" and script != "maddpg_discrete":
                continue
            for aim in "moment", "writing":
                check = Check(
                    script, mode, f"SIGKILL at a random {aim}" if aim == "moment" else "SIGKILL while writing"
                )
                kills = 0
                for _ in range((self.args.n + (aim == "moment")) // 2):
                    with check.case():
                        kills += self.survive(script, mode, aim)
                check.notes.append(f"{kills} kills")
                yield check
        check = Check(script, "1 game", "SIGKILL between the two renames")
        with check.case():
            process = Process(script, self.flags("1 game"), self.new())
            ended = process.wait(lambda: list(process.folder.glob("runs/*/checkpoint_previous.pt")))
            process.kill()
            process.wait()
            assert not ended, "too fast"
            run = process.run()
            if (run / "checkpoint.pt").exists():
                (run / "checkpoint.pt").replace(run / "checkpoint_previous.pt")
            identical(finish(script, ["--resume", run], process.folder), self.reference(script, "1 game"))
        yield check

    # -- Damaged
    def damage(self, script):
        module, reference = importlib.import_module(script), self.reference(script, "4 games")
        folder, run = self.copy(reference)
        file = run / "checkpoint.pt"
        whole, original = file.read_bytes(), checkpoint(run)
        half = self.args.cases // 2
        kinds = {"truncated": range(half), "one bit flipped": range(self.args.cases - half)}
        for kind, numbers in kinds.items():
            check, refused = Check(script, "4 games", f"checkpoint {kind}"), 0
            for n in numbers:
                with check.case():
                    place = int((n + self.random.random()) / len(numbers) * len(whole))
                    data = bytearray(whole[: 0 if n == 0 else place] if kind == "truncated" else whole)
                    if kind != "truncated":
                        data[place] ^= 1 << self.random.randrange(8)
                    file.write_bytes(data)
                    try:
                        module.load(str(run), "checkpoint.pt")
                    except module.UsageError as error:
                        refused += 1
                        assert "checkpoint_previous.pt" in str(error) and "\n" not in str(error), str(error)
                        if n % 6 == 0:
                            one_line(finish(script, ["--resume", run], folder), "checkpoint_previous.pt")
                    else:
                        problem = difference(checkpoint(run), original)
                        assert not problem, f"byte {place}: {problem}"
            check.notes.append(f"{refused} refused, {check.tried - refused} loaded unchanged")
            yield check
        check = Check(script, "4 games", "a damaged checkpoint's predecessor resumed")
        with check.case():
            identical(finish(script, ["--resume", run / "checkpoint_previous.pt"], folder), reference)
        yield check
        check = Check(script, "4 games", "foreign files refused")
        other = next(name for name in SCRIPTS if name != script)
        for text in other, "model.pt", "a text file", "nothing":
            with check.case():
                folder, run = self.copy(self.reference(other if text == other else script, "4 games"))
                target = run / "model.pt" if text == "model.pt" else run
                if text in ("a text file", "nothing"):
                    (run / "checkpoint_previous.pt").unlink()
                    (run / "checkpoint.pt").unlink()
                if text == "a text file":
                    (run / "checkpoint.pt").write_text("hello")
                one_line(finish(script, ["--resume", target], folder), other if text == other else "")
        yield check

    # -- Nowhere to write
    def disk(self, script):
        reference = self.reference(script, "4 games")
        size = (reference.run() / "checkpoint.pt").stat().st_size

        def good(process, run):
            module = importlib.import_module(script)
            module.load(str(run), "checkpoint.pt")
            identical(finish(script, ["--resume", run], process.folder), reference)

        check = Check(script, "4 games", "file-size limit reached while writing")
        for share in 0.7, 0.9:
            with check.case():
                limit = int(share * size)
                before = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
                process = finish(script, self.flags("4 games"), self.new(), before=before)
                one_line(process, "checkpoint.pt cannot be written")
                good(process, process.run())
        yield check
        for fill in False, True:
            check = Check(script, "4 games", "disk full" + (", not a byte left for the logs either" if fill else ""))
            folder = self.new()
            folder.mkdir()
            limit = 16 * size if fill else int(2.2 * size)
            mount = ["mount", "-t", "tmpfs", "-o", f"size={limit}", "tmpfs", str(folder)]
            if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
                check.notes.append("not tried: no tmpfs can be mounted here")
                yield check
                continue
            try:
                with check.case():
                    process = Process(script, self.flags("4 games"), folder)
                    if fill:
                        process.wait(lambda p=process: list(p.folder.glob("runs/*/checkpoint.pt")))
                        with contextlib.suppress(OSError), open(folder / "filler", "wb", buffering=0) as filler:
                            while True:
                                filler.write(bytes(4096))
                    process.wait()
                    status, err = process.status, process.err
                    (folder / "filler").unlink(missing_ok=True)
                    run = process.run()
                    assert list(run.glob("checkpoint*.pt")), "no checkpoint"
                    assert status == 2, f"exit status {status}: {err[-300:]}"
                    one_line(process, "cannot be written")
                    subprocess.run(["mount", "-o", f"remount,size={64 * size}", str(folder)], check=True)
                    good(process, run)
            finally:
                subprocess.run(["umount", "-l", str(folder)], capture_output=True)
            yield check
        check = Check(script, "4 games", "folders that cannot be written")
        with check.case():  # a file in place of the folder
            folder = self.new()
            folder.mkdir()
            (folder / "runs").write_text("a file")
            one_line(finish(script, self.flags("4 games"), folder), "cannot be written")
        nobody = (lambda: os.setuid(65534)) if os.geteuid() == 0 else None
        with check.case():  # read-only from the start
            folder = self.new()
            (folder / "runs").mkdir(parents=True)
            self.open_to(nobody, folder)
            (folder / "runs").chmod(0o555)
            one_line(finish(script, self.flags("4 games"), folder, before=nobody), "cannot be written")
        with check.case():  # read-only after the first checkpoint
            folder = self.new()
            folder.mkdir()
            self.open_to(nobody, folder)
            process = Process(script, self.flags("4 games"), folder, before=nobody)
            process.wait(lambda: list(folder.glob("runs/*/checkpoint_previous.pt")))
            process.run().chmod(0o555)
            process.wait()
            process.run().chmod(0o777)
            one_line(process, "cannot be written")
            good(process, process.run())
        yield check

    def open_to(self, user, folder):
        if user:
            self.folder.chmod(0o777)
            for path in (folder, folder / "runs"):
                if path.exists():
                    path.chmod(0o777)

    # -- Stopped
    def stop(self, script):
        for mode in "4 games", "4 games, 2 workers":
            check = Check(script, mode, "SIGTERM and Ctrl-C")
            for number in signal.SIGTERM, signal.SIGINT:
                for group in False, True:
                    with check.case():
                        for wait in self.random.uniform(0, 0.5), self.random.uniform(0, 0.2), 0.05, 0, 0, 0:
                            process = Process(script, self.flags(mode), self.new())
                            process.wait(lambda p=process: list(p.folder.glob("runs/*/checkpoint.pt")))
                            end = time.monotonic() + wait * self.reference(script, mode).seconds
                            if not process.wait(lambda end=end: time.monotonic() > end):  # else: ended too early
                                break
                        process.kill(number, group)
                        process.wait()
                        assert process.status == 128 + number, f"{process.status}: {process.err[-200:]}"
                        assert "stopped at step" in process.err and "Traceback" not in process.err, process.err
                        process.gone()
                        again = finish(script, ["--resume", process.run()], process.folder)
                        identical(again, self.reference(script, mode))
            yield check
        check = Check(script, "1 game", "SIGTERM in the last evaluation")
        with check.case():
            flags = [*self.flags("1 game"), "--eval-episodes", 100, "--eval-frequency", 10**6]
            reference = finish(script, flags, self.new())
            process = Process(script, flags, self.new())
            process.wait(lambda: self.at_end(process))
            process.kill(signal.SIGTERM)
            process.wait()
            if process.status != 0:
                assert process.status == 128 + signal.SIGTERM, f"{process.status}: {process.err[-200:]}"
                process = finish(script, ["--resume", process.run()], process.folder)
            identical(process, reference)
        yield check
        check = Check(script, "1 game", "SIGKILL in the last evaluation")
        with check.case():
            process = Process(script, flags, self.new())
            process.wait(lambda: self.at_end(process))
            process.kill()
            process.wait()
            identical(finish(script, ["--resume", process.run()], process.folder), reference)
        yield check

    @staticmethod
    def at_end(process):
        """Whether the last checkpoint before the end has been there for a while."""
        file = next(process.folder.glob("runs/*/checkpoint.pt"), None)
        with contextlib.suppress(Exception):
            if checkpoint(file.parent)["progress"][0] > STEPS - 210:
                time.sleep(0.5)
                return True
        time.sleep(0.05)
        return False

    def workers(self, script):
        mode = "4 games, 2 workers"
        check = Check(script, mode, "a worker killed with SIGKILL")
        for n in range(2):
            with check.case():
                process = Process(script, self.flags(mode, 10**6), self.new())
                process.wait(lambda p=process: list(p.folder.glob("runs/*/checkpoint.pt")))
                workers = process.members()
                assert len(workers) == 2, f"{len(workers)} workers"
                workers[n].kill()
                began = time.monotonic()
                process.wait(limit=30)
                check.notes.append(f"{time.monotonic() - began:.1f} s")
                one_line(process, "worker", "-9")
        yield check
        for method in "fork", "spawn":
            check = Check(script, mode, f"main process killed with SIGKILL, workers by {method}: no orphans")
            with check.case():
                before = functools.partial(importlib.import_module("multiprocessing").set_start_method, method, True)
                process = Process(script, self.flags(mode, 10**6), self.new(), before=before)
                process.wait(lambda p=process: list(p.folder.glob("runs/*/checkpoint.pt")))
                assert len(process.members()) >= 2
                process.kill()
                process.wait()
                check.notes.append(f"all gone after {process.gone():.1f} s")
            yield check

    # -- Other ways to go on
    def extend(self, script):
        for mode in self.args.modes:
            if mode == "relaxed" and script != "maddpg_discrete":
                continue
            check = Check(script, mode, "a finished run extended equals one of that length")
            for steps in 800, 740:
                with check.case():
                    folder, run = self.copy(self.reference(script, mode, steps))
                    process = finish(script, ["--resume", run, "--total-timesteps", STEPS], folder)
                    # the evaluation at the first end is one that the longer run does not make
                    identical(process, self.reference(script, mode), ("eval/", steps) if steps == 740 else ())
            yield check
        check = Check(script, "1 game", "a finished run resumed as it is")
        with check.case():
            folder, run = self.copy(self.reference(script, "1 game"))
            identical(finish(script, ["--resume", run], folder), self.reference(script, "1 game"))
        yield check

    def changed(self, script):
        check = Check(script, "1 game", "changed flags refused by name")
        folder, run = self.copy(self.reference(script, "1 game"))
        flags = {"env-id": "simple_v3", "seed": 2, "hidden-dim": 17, "gamma": 0.9, "tau": 0.5, "batch-size": 65}
        flags |= {"buffer-size": 999, "learning-starts": 301, "train-frequency": 24, "num-envs": 3, "exp-name": "other"}
        flags |= {
            "actor-learning-rate": 0.1,
            "critic-learning-rate": 0.1,
            "max-grad-norm": 0.5,
            "random-agents": "speaker_0",
        }
        flags |= {"env-kwargs": '{"max_cycles": 5}', "ddpg-agents": "listener_0", "total-timesteps": STEPS - 1}
        flags |= {"gumbel-temperature": 2} if script == "maddpg_discrete" else {"exploration-noise": 0.2}
        for name, value in flags.items():
            with check.case():
                one_line(finish(script, ["--resume", run, f"--{name}", value], folder), f"--{name} was")
        yield check
        check = Check(script, "1 game", "flags that may change do")
        with check.case():
            folder, run = self.copy(self.reference(script, "1 game", 800))
            new = ["--eval-frequency", 100, "--total-timesteps", STEPS]
            done(finish(script, ["--resume", run, *new], folder))
            steps = [step for step, _ in scalars(run)["eval/episodic_return"] if step > 800]
            assert steps == [900, 1000, 1100, 1200], f"--eval-frequency 100: evaluations at {steps}"
        yield check

    def seconds(self, script):
        check = Check(script, "1 game", "two runs of one second have two folders")
        with check.case():
            for _ in range(10):
                folder = self.new()
                while time.time() % 1 > 0.1:
                    time.sleep(0.01)
                flags = [*SMALL.split(), *MODES["1 game"].split(), "--total-timesteps", 300]
                pair = [Process(script, flags, folder) for _ in range(2)]
                for process in pair:
                    process.wait()
                    assert process.status == 0, process.err[-300:]
                runs = sorted((folder / "runs").glob("*"))
                assert len(runs) == 2, f"{len(runs)} run folders"
                if runs[1].name == f"{runs[0].name}_":
                    problem = difference(checkpoint(runs[0]), checkpoint(runs[1]))
                    assert not problem, problem
                    break
            else:
                raise AssertionError("the two never began in the same second")
        yield check

    # -- Games that misbehave
    def games(self, script):
        check = Check(script, "1 game", "a game that does not repeat itself: one warning")
        with check.case():
            process = Process(script, self.faulty(script, fault="unrepeatable"), self.game())
            process.wait(lambda: list(process.folder.glob("runs/*/checkpoint_previous.pt")))
            process.kill()
            process.wait()
            again = finish(script, ["--resume", process.run()], process.folder)
            done(again)
            count = (again.out + again.err).count("does not repeat itself")
            assert count == 1, f"{count} warnings"
            assert checkpoint(again.run())["added"] == STEPS
        yield check
        cases = {  # the first two games are evaluation's, the third is training's
            "reward": dict(fault="reward", first=2, episode=40),
            "observation": dict(fault="observation", first=2, episode=40),
            "observation after a reset": dict(fault="reset", first=2, episode=40),
            "very first observation": dict(fault="reset", first=2),
            "reward in evaluation": dict(fault="reward", last=1, episode=4),
            "observation in evaluation": dict(fault="observation", last=1, episode=4),
            "first observation in evaluation": dict(fault="reset", last=1),
        }
        for name, kwargs in cases.items():
            check = Check(script, "1 game", f"NaN or infinity: {name}")
            with check.case():
                process = finish(script, self.faulty(script, **kwargs), self.game())
                for file in process.folder.glob("runs/*/checkpoint*.pt"):
                    assert finite(checkpoint(file.parent, file.name)), f"{file.name} holds a NaN"
                if "valuation" in name:
                    one_line(process, "step")
                else:
                    one_line(process, "right", "step")
            yield check
        check = Check(script, "1 game", "training that diverges: one line, no NaN in a checkpoint")
        for rate in 1e30, 1e6:
            for kind in "critic", "actor":
                with check.case():
                    flags = [*self.flags("1 game"), f"--{kind}-learning-rate", rate]
                    process = finish(script, flags, self.new())
                    for file in process.folder.glob("runs/*/*.pt"):
                        assert finite(torch.load(file, weights_only=True)), f"{file.name} holds a NaN"
                    if process.status != 0:
                        one_line(process, "step")
        yield check

    # -- What it costs
    def cost(self, script):
        check = Check(
            script, "default flags", "a full buffer's checkpoint: at most 3% of the training time between two"
        )
        with check.case():
            module, folder = importlib.import_module(script), self.new()
            folder.mkdir()
            args = module.Args()
            games = module.Games(module.game_maker(args), 1)
            rb = module.ReplayBuffer(args.buffer_size, games, torch.device("cpu"))
            for rows in rb.rows.split(10_000):
                rows.normal_()
            times = []
            for _ in range(2):
                began = time.monotonic()
                module.save({"rows": rb.rows}, folder / "checkpoint.pt")
                times.append(time.monotonic() - began)
            del rb
            size = (folder / "checkpoint.pt").stat().st_size
            flags = ["--total-timesteps", 12_000, "--learning-starts", 2000, "--eval-episodes", 2]
            flags += ["--checkpoint-frequency", 0]
            process = finish(script, flags, self.new())
            done(process)
            accumulator = EventAccumulator(str(process.run()), size_guidance={"scalars": 0})
            accumulator.Reload()
            points = [(e.step, e.wall_time) for e in accumulator.Scalars("charts/SPS") if e.step >= 4000]
            rate = (points[-1][0] - points[0][0]) / (points[-1][1] - points[0][1])
            between = args.checkpoint_frequency / rate
            share = max(times) / between
            check.notes.append(
                f"{size / 1e6:.0f} MB in {times[0]:.1f} and {times[1]:.1f} s; {between:.0f} s of training "
                f"({rate:.0f} steps/s); {share:.1%}"
            )
            assert share <= 0.03, check.notes[0]
        yield check


PARTS = ["games", "kill", "disk", "stop", "workers", "extend", "damage", "seconds", "changed", "cost"]


def write(path, rows):
    """Writes the rows over those of the same script, mode and check."""
    key = lambda row: (row["script"], row["mode"], row["check"])  # noqa: E731
    old = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    rows = {key(row): row for row in [*old, *rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())
    return list(rows.values())


def table(rows):
    """The rows as a Markdown table, twins side by side."""
    lines = ["| mode | check | continuous | discrete | note |", "|---|---|---|---|---|"]
    checks = dict.fromkeys((row["mode"], row["check"]) for row in rows)
    for mode, name in checks:
        found = {row["script"]: row for row in rows if (row["mode"], row["check"]) == (mode, name)}
        cells = [f"{row['passed']} of {row['tried']}" if (row := found.get(s)) else "" for s in SCRIPTS]
        notes = " / ".join(found[s]["note"] for s in SCRIPTS if s in found and found[s]["note"])
        lines.append(f"| {mode} | {name} | {' | '.join(cells)} | {notes} |")
    return "\n".join(lines)


def main(args):
    """Runs the parts, prints and writes the table; true where every case passed."""
    torch.set_num_threads(1)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every purge after a resume
    known = {"parts": PARTS, "modes": MODES, "scripts": SCRIPTS}
    for name, all_of_them in known.items():
        if unknown := [value for value in getattr(args, name) if value not in all_of_them]:
            print(f"survive.py: --{name} {unknown[0]!r} is none of {', '.join(all_of_them)}", file=sys.stderr)
            sys.exit(2)
    version, rows = commit(), []
    folder = Path(tempfile.mkdtemp(prefix="survive"))  # no TemporaryDirectory, which the forked runs would delete
    for script in SCRIPTS:  # copied, so that they may be edited meanwhile
        shutil.copy(ROOT / f"{script}.py", folder)
    sys.path.insert(0, str(folder))
    for module in (*SCRIPTS, "torch._dynamo", "tyro._cli"):  # torch._dynamo: what the first optimizer imports
        importlib.import_module(module)
    try:
        bench = Bench(args, folder)
        for part in args.parts or PARTS:
            for script in args.scripts:
                began = time.monotonic()
                for check in getattr(bench, part)(script):
                    note = "; ".join(check.notes + [f"failed: {failure[:160]}" for failure in check.failures[:1]])
                    row = dict(zip(COLUMNS, [check.script, check.mode, check.check], strict=False))
                    row |= {"tried": check.tried, "passed": check.passed, "note": note, "commit": version}
                    rows.append(row)
                    spent, began = time.monotonic() - began, time.monotonic()
                    counts = f"{check.passed:3} of {check.tried:3}"
                    print(
                        f"{counts}  {script[7:]:10}  {check.mode}: {check.check}  {note}  ({spent:.0f} s)", flush=True
                    )
                    write(args.out, rows[-1:])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{table(write(args.out, []))}")
    return all(row["passed"] == row["tried"] for row in rows)


if __name__ == "__main__":
    sys.exit(not main(tyro.cli(Args)))

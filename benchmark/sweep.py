"""Runs lists of training runs on Ray and appends their evaluations to CSV files as they come.

    python benchmark/sweep.py benchmark/lists/marks.txt benchmark/lists/gamma.txt
    python benchmark/sweep.py benchmark/lists/all.txt --address HOST:6379      # on a Ray cluster, see README.md

A list is a text file with one line for some runs: a script, its flags as on the command line, the seeds, a label:

    # Comments begin like this; quotes work as in a shell. Without label=, the label is default.
    maddpg_discrete.py --total-timesteps 1000000 --random-agents agent seeds=1-3,7 label=random-prey

Runs begin in the order of the lines. In one list a script, game, label and seed may occur together once. The label
`default` (or `default-...`, for another length) is for default flags: only the game and the number of steps may differ.
A label that ends in `training` takes exploring returns of training, means of the last 1,000 episodes, not greedy ones.

    maddpg_discrete.py --env-id simple_spread_v3 patch=benchmark/ablations/terminal.patch seeds=1-3 label=terminal

`patch=` names a unified diff of the scripts, relative to the repository, or several with commas between, applied in
that order; one in `docs/recipes` is applied to the line's script, whichever it names. Such a run trains, and is played
by, copies of the scripts under its folder, with the diffs applied; it needs git, and a label that does not begin with
`default`.

Every run is a process of its own, with one thread, in a folder of its own under --folder, named after script, game,
seed and a hash of flags and patch, so that lists share runs. A run whose process or Ray worker is lost is begun again
from its last checkpoint; so is everything that was interrupted, when the command is given again. A run is done when
final.json lies in its folder or the CSV has its last rows; delete both to make it again, or give a line whose flags
or patch you change another label. The columns of the CSV:

    script,env_id,label,seed,global_step,wall_clock_s,agent,episodic_return,episodes,commit

`agent` is a name or `sum`. The last rows of a run are 1,000 greedy episodes of the saved model, with start states of
their own (--evaluate RUN --seed SEED+10000). `wall_clock_s` is the time since the run's first TensorBoard event; in a
resumed run, the time up to the checkpoint plus the time since it went on. `commit` is the one checked out when the run
began, with `-dirty` where script or patch had uncommitted changes, and `+` between the commits of a resumed run.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import fcntl
import hashlib
import importlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

from tables import FINAL_EPISODES, FINAL_SEED, ROOT, WINDOW, Curve, Table, UsageError, count, load_script, result_rows

ATTEMPTS = 5  # how often a run may be lost before it counts as failed
FREE = {"env_id", "env_kwargs", "total_timesteps", "num_workers", "torch_threads", "checkpoint_frequency", "compile"}
NOT_IN_LISTS = {"--seed", "--resume", "--evaluate", "--render", "--cuda", "--track"}


# ---- Lists and tables ------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Run:
    """One script with flags and a seed. `targets` are the tables that want its rows, each with its label.

    `patch` names diffs of the scripts, relative to the repository, and `diff` is what they held when they were read.
    """

    script: str
    flags: list[str]
    seed: int
    env_id: str
    steps: int
    eval_episodes: int
    folder: Path
    targets: list[tuple[Table, str]]
    patch: str = ""
    diff: bytes = b""
    attempts: int = 0
    commit: str = ""
    curve: Curve | None = None


def read_list(path: Path, folder: Path, table: Table) -> list[Run]:
    """The runs of a list. `UsageError` names file and line of the first mistake."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    runs, seen = [], {}
    for number, line in enumerate(lines, 1):
        try:
            words = shlex.split(line, comments=True)
            for run in parse_line(words, folder, table) if words else []:
                key = run.script, run.env_id, run.targets[0][1], run.seed
                if key in seen:
                    raise UsageError(f"{', '.join(map(str, key))} is in line {seen[key]} already: give it a label")
                seen[key] = number
                runs.append(run)
        except (UsageError, ValueError) as error:
            raise UsageError(f"{path}:{number}: {error}") from error
    return runs


def parse_line(words: list[str], folder: Path, table: Table) -> list[Run]:
    script, *words = words
    if not re.fullmatch(r"\w+\.py", script) or not (ROOT / script).exists():
        raise UsageError(f"there is no script {script} in {ROOT}")
    settings = dict(word.split("=", 1) for word in words if re.match(r"(seeds|label|patch)=", word))
    flags = [word for word in words if not re.match(r"(seeds|label|patch)=", word)]
    if "seeds" not in settings or not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", settings["seeds"]):
        raise UsageError("seeds= is missing or broken: write seeds=1-5 or seeds=1,2,7")
    bounds = [part.split("-") for part in settings["seeds"].split(",")]
    seeds = [seed for bound in bounds for seed in range(int(bound[0]), int(bound[-1]) + 1)]
    if any(int(bound[0]) > int(bound[-1]) for bound in bounds):
        raise UsageError(f"seeds={settings['seeds']} goes downwards: write seeds=1-5")
    label = settings.get("label", "default")
    if not re.fullmatch(r"[\w.-]+", label):
        raise UsageError(f"label={label} may have letters, digits, '.', '_' and '-' only")
    if given := NOT_IN_LISTS.intersection(re.split("=", flag)[0] for flag in flags):
        raise UsageError(f"{', '.join(given)} does not belong in a list: write seeds=1-5, or give --gpus to sweep.py")
    patch, diff = settings.get("patch", ""), b""
    if "patch" in settings:
        if label.startswith("default"):
            raise UsageError(f"label={label} is for the scripts as they are, give a patch another label")
        try:
            for path in patch.split(","):
                recipe = path.startswith("docs/recipes/")
                lines = (ROOT / path).read_bytes()
                diff += re.sub(rb"\bmaddpg_\w+\.py", script.encode(), lines) if recipe else lines
        except OSError as error:
            raise UsageError(f"patch={patch} cannot be read: {error.strerror}") from error

    import tyro

    with tempfile.TemporaryDirectory() as copies:
        module, said = load_patched(script, patch, diff, Path(copies)) if patch else load_script(script), io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                args = tyro.cli(module.Args, args=flags)
            module.Networks(module.Games(module.game_maker(args), 1), args)
        except SystemExit as error:
            raise UsageError(" ".join(re.sub(r"[╭╮╰╯│─]", " ", said.getvalue()).split())[:300]) from error
        except module.UsageError as error:
            raise UsageError(error) from error
    if args.eval_episodes >= FINAL_EPISODES:
        raise UsageError(f"--eval-episodes {args.eval_episodes}: {FINAL_EPISODES} and more are a run's last rows alone")
    plain = dataclasses.asdict(module.Args())
    changed = [name for name, value in dataclasses.asdict(args).items() if value != plain[name] and name not in FREE]
    if re.match(r"default(-|$)", label) and changed:
        raise UsageError(f"label={label} is for default flags, give --{changed[0].replace('_', '-')} another label")
    code = hashlib.sha256(" ".join(flags).encode() + diff).hexdigest()[:8]
    name = f"{Path(script).stem}__{args.env_id.replace('/', '_')}__{{}}__{code}"
    about = args.env_id, args.total_timesteps // args.num_envs * args.num_envs, args.eval_episodes
    return [Run(script, flags, s, *about, folder / name.format(s), [(table, label)], patch, diff) for s in seeds]


def copy_scripts(patch: str, diff: bytes, folder: Path) -> None:
    """Copies the scripts into `folder`, over copies made before, and applies the diff to them."""
    folder.mkdir(parents=True, exist_ok=True)
    for script in ROOT.glob("maddpg_*.py"):
        shutil.copy(script, folder)
    # Inside a repository `git apply` would pass over files that it does not think below the current folder
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment["GIT_CEILING_DIRECTORIES"] = str(folder.resolve().parent)
    try:
        subprocess.run(["git", "apply"], cwd=folder, env=environment, input=diff, check=True, capture_output=True)
    except OSError as error:
        raise UsageError(f"patch={patch} needs git: {error}") from error
    except subprocess.CalledProcessError as error:
        raise UsageError(f"patch={patch} does not apply: {' '.join(error.stderr.decode().split())}") from error


def load_patched(script: str, patch: str, diff: bytes, folder: Path):
    """The module of a script's patched copy, which is made in `folder`."""
    copy_scripts(patch, diff, folder)
    if (folder / script).read_bytes() == (ROOT / script).read_bytes():
        raise UsageError(f"patch={patch} changes nothing in {script}")
    try:
        return load_script(script, folder)
    except Exception as error:
        raise UsageError(f"patch={patch}: {script} cannot be imported with it: {error}") from error


def has_last_rows(run: Run, table: Table, label: str) -> bool:
    start = (run.script, run.env_id, label, str(run.seed))
    if label.endswith("training"):
        steps = str(run.steps // (WINDOW * 1_000) * WINDOW * 1_000)
        return (*start, steps, "sum", str(40 * WINDOW)) in table.rows
    return (*start, str(run.steps), "sum", str(FINAL_EPISODES)) in table.rows


# ---- Running ---------------------------------------------------------------------------------------------------------
def train(root: str, script: str, flags: list[str], seed: int, folder: str, steps: int) -> tuple[bool, str]:
    """Trains, or goes on with, one run and plays its policies; whether all went well or was lost, and what was said.

    `root` is where the script lies: the repository, or the run's own patched copies.

    The training process gets SIGTERM, and saves a checkpoint, when the Ray worker that started it dies. Until it has
    ended it holds the lock of the run's folder, for which the run's next attempt waits.
    """
    folder, environment = Path(folder), os.environ | {"OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "30"}
    # A game of the user's lies in the repository, which a patched copy does not
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    sys.path[:0] = [root, str(ROOT)]
    module = importlib.import_module(Path(script).stem)  # before it trains: somebody may edit the script meanwhile
    with open(folder / "lock", "w") as lock, open(folder / "log.txt", "a") as log:
        fcntl.flock(lock, fcntl.LOCK_EX)
        runs = [path for path in folder.glob("runs/*") if path.is_dir()]
        resumable = [run for run in runs if list(run.glob("checkpoint*.pt"))]
        if resumable:
            words = ["--resume", str(resumable[0]), *(["--num-workers", "0"] if "--num-workers" not in flags else [])]
        else:
            shutil.rmtree(folder / "runs", ignore_errors=True)
            words = [*([] if "--num-workers" in flags else ["--num-workers", "0"]), *flags, "--seed", str(seed)]
        command = [sys.executable, str(Path(root) / script), *words]
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            pass_fds=[lock.fileno()],
            start_new_session=True,  # Ray kills the worker's group
            preexec_fn=end_with_parent if sys.platform == "linux" else None,
        )
        code = process.wait()
        if code:
            said = (folder / "log.txt").read_text().strip().splitlines() or [""]
            return code < 0 or code > 128, f"exit status {code}: {said[-1]}"
        run = next(path for path in folder.glob("runs/*") if path.is_dir())
        args = module.Args(**module.load(str(run), "model.pt")["args"])
        changes = {"evaluate": str(run), "eval_episodes": FINAL_EPISODES, "seed": seed + FINAL_SEED}
        args = dataclasses.replace(args, **changes, capture_video=False)
        with contextlib.redirect_stdout(log):
            returns = module.play(args).mean(0).tolist()
        agents = module.Games(module.game_maker(args), 1).agents
        values = dict(zip(agents, returns, strict=True)) | {"sum": sum(returns)}
        new = folder / "final.tmp"
        new.write_text(json.dumps({"step": steps, "returns": values, "run": run.name}))
        new.replace(folder / "final.json")
        for path in [*run.glob("checkpoint*"), *run.glob("model_previous.pt")]:
            path.unlink()
    return False, ""


def end_with_parent() -> None:
    """Called in a new process: goes on in a child of it, which gets one SIGTERM when that process or its parent ends.

    A Ray worker that ends could send one for each of its threads, and a second one ends training without a checkpoint;
    and Ray kills its workers' children, but not their children.
    """
    libc = ctypes.CDLL(None)
    libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if child := os.fork():
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255)
    libc.prctl(1, signal.SIGTERM)


def note_commit(run: Run, begins: bool) -> None:
    """Adds the commit that is checked out to the run's; a run that goes on may have several."""
    git = ["git", "--no-optional-locks", "-C", str(ROOT)]
    try:
        commit = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True, stderr=-3).strip()
        paths = [run.script, *filter(None, run.patch.split(","))]
        changes = subprocess.check_output([*git, "status", "--porcelain", "--", *paths], text=True, stderr=-3)
        commit += "-dirty" if changes.strip() else ""
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    if begins:
        run.commit = commit
    elif commit not in run.commit.split("+"):
        run.commit += f"+{commit}"
    (run.folder / "commit").write_text(run.commit)


def wait_for(lock: Path, seconds: float) -> None:
    """Waits until no process of a lost attempt holds the lock of its run, which takes as long as to save."""
    until = time.time() + seconds
    with open(lock, "w") as file:
        while time.time() < until:
            with contextlib.suppress(OSError):
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            time.sleep(0.2)


@contextlib.contextmanager
def hold(path: Path):
    """Holds a lock file with this process's id; a lock ends with its process, whatever ends that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise UsageError(f"another sweep (process {file.read().strip()}) holds {path}; wait or stop it") from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def sweep(options: argparse.Namespace, locks: contextlib.ExitStack) -> int:
    """Runs all lists; returns the number of failed runs."""
    import ray
    from tqdm import tqdm

    folder, runs = options.folder.resolve(), {}
    names = [path.stem for path in options.lists]
    if missing := [path for path in options.lists if not path.is_file()]:
        raise UsageError(f"{missing[0]} cannot be read: there is no such file")
    if len(set(names)) < len(names):
        raise UsageError(f"two lists of one name would share a table: {', '.join(names)}")
    for path in [folder / "sweep.lock", *(options.results / f"{name}.lock" for name in names)]:
        locks.enter_context(hold(path))
    for path, name in zip(options.lists, names, strict=True):
        for run in read_list(path, folder, Table(options.results / f"{name}.csv")):
            if runs.setdefault(run.folder, run) is not run:
                runs[run.folder].targets += run.targets
    pending, lost, failed = deque(), 0, []
    bar = tqdm(total=sum(run.steps for run in runs.values()), unit=" steps", unit_scale=True, dynamic_ncols=True)

    def write(run: Run) -> None:
        run.curve = run.curve or Curve(run.folder)
        run.curve.read()
        for table, label in run.targets:
            table.append(result_rows(run, label))

    for run in runs.values():
        with contextlib.suppress(OSError):
            run.commit = (run.folder / "commit").read_text()
        if all(has_last_rows(run, *target) for target in run.targets):
            bar.update(run.steps)
        elif (run.folder / "final.json").exists():
            write(run)
            bar.update(run.steps)
        else:
            pending.append(run)
    if not pending:
        bar.close()
        return 0

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    parallel = options.parallel or (None if options.address else len(os.sched_getaffinity(0)))
    local = {} if options.address else {"num_cpus": parallel, "include_dashboard": False, "object_store_memory": 2**27}
    try:
        ray.init(options.address or "local", logging_level="error", log_to_driver=False, **local)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(f"Ray does not start: {' '.join(str(error).split())}") from error
    there = ray.cluster_resources()
    if options.gpus > there.get("GPU", 0):
        raise UsageError(f"--gpus {options.gpus:g}: Ray sees {there.get('GPU', 0):g}")
    parallel = parallel or int(there["CPU"])
    task = ray.remote(num_cpus=1, num_gpus=options.gpus, max_retries=0, max_calls=1)(train)

    def begin(run: Run):
        run.folder.mkdir(parents=True, exist_ok=True)
        run.attempts += 1
        run.curve = None
        wait_for(run.folder / "lock", 60)
        begins = not list(run.folder.glob("runs/*/checkpoint*.pt"))
        if begins:
            shutil.rmtree(run.folder / "runs", ignore_errors=True)
            for table, label in run.targets:
                table.remove(run.script, run.env_id, label, str(run.seed))
        note_commit(run, begins)
        root = run.folder / "scripts" if run.patch else ROOT
        if run.patch:
            copy_scripts(run.patch, run.diff, root)
        flags = run.flags + (["--cuda"] if options.gpus else [])
        return task.remote(str(root), run.script, flags, run.seed, str(run.folder), run.steps)

    finished, running = bar.n, {}
    while pending or running:
        while pending and len(running) < parallel:
            run = pending.popleft()
            try:
                running[begin(run)] = run
            except UsageError as error:
                failed.append(run)
                bar.write(f"{run.folder.name}: failed ({error})")
        ended, _ = ray.wait(list(running), timeout=options.poll) if running else ([], [])
        for run in running.values():
            if next(run.folder.glob("runs/*/events*"), None):
                write(run)
        for ref in ended:
            run = running.pop(ref)
            try:
                again, said = ray.get(ref)
            except ray.exceptions.RayTaskError as error:
                again, said = False, str(error.cause or error).strip().splitlines()[-1]
            except ray.exceptions.RayError as error:
                again, said = True, type(error).__name__
            if again and run.attempts < ATTEMPTS:
                lost += 1
                pending.appendleft(run)
                bar.write(f"{run.folder.name}: lost ({said}), begins again from its checkpoint")
            elif said:
                failed.append(run)
                bar.write(f"{run.folder.name}: failed ({said}), see {run.folder / 'log.txt'}")
            else:
                finished += run.steps
        now = finished + sum(run.curve.step for run in running.values() if run.curve)
        bar.update(now - bar.n)
        bar.set_postfix(running=len(running), waiting=len(pending), failed=len(failed), lost=lost)
    bar.close()
    ray.shutdown()
    return len(failed)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lists", nargs="+", type=Path, metavar="LIST")
    parser.add_argument("--folder", type=Path, default=ROOT / "benchmark/runs", help="where the runs are kept")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmark/results", help="where the CSVs are")
    parser.add_argument("--address", help="a Ray cluster's, HOST:6379 or auto; all its machines must share the folders")
    parser.add_argument("--parallel", type=count, help="runs at a time; default: the number of cores")
    parser.add_argument("--gpus", type=float, default=0, help="share of a GPU for each run, which then gets --cuda")
    parser.add_argument("--poll", type=float, default=5, help="seconds between two looks at the runs")
    options = parser.parse_args(arguments)
    try:
        with contextlib.ExitStack() as locks:
            return 1 if sweep(options, locks) else 0
    except UsageError as error:
        print(f"sweep.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sweep.py: stopped; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

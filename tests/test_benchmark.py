"""The benchmark's programs: mistakes get one line, and what is interrupted is neither lost nor doubled.

Mistakes put in, each of which makes a test here fail: a table without its check for rows that are there already; an
unfinished last row kept; no lock; a run folder named without the patch's content; a patch applied as part of the
repository around it, which changes nothing; a patched script's run played by the script as it is.
"""

import csv
import difflib
import functools
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

for package in ("ray", "scipy", "matplotlib"):
    pytest.importorskip(package, reason="pip install -r benchmark/requirements.txt")

psutil = pytest.importorskip("psutil")
BENCHMARK = ROOT / "benchmark"
if not BENCHMARK.exists():
    pytest.skip("another folder's scripts, without the benchmark", allow_module_level=True)
SMALL = "--env-id simple_v3 --hidden-dim 16 --batch-size 32 --learning-starts 500 --train-frequency 100"
LINE = f"maddpg_discrete.py {SMALL} --total-timesteps 1000 seeds=1 label=small"


@pytest.fixture
def programs(monkeypatch):
    """The programs of the benchmark, importable."""
    monkeypatch.syspath_prepend(str(BENCHMARK))
    import sweep
    import tables

    return SimpleNamespace(sweep=sweep, tables=tables)


def command(folder, *lists, **kwargs):
    words = [sys.executable, BENCHMARK / "sweep.py", *lists, "--folder", folder / "runs", "--results", folder]
    words += ["--poll", "0.5", "--parallel", "1"]
    # A shell's background job ignores Ctrl-C, and so would what it starts
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(list(map(str, words)), text=True, preexec_fn=heed, **kwargs)


def rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def patch(path, script, old, new):
    """A diff of a script, as a file."""
    text = (ROOT / script).read_text()
    assert text.count(old) == 1
    changed = text.replace(old, new).splitlines(True)
    path.write_text("".join(difflib.unified_diff(text.splitlines(True), changed, f"a/{script}", f"b/{script}")))
    return path


# ---- Lists -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "line, words",
    [
        ("maddpg_none.py seeds=1", "no script maddpg_none.py"),
        (f"{LINE} --gama 0.9", "--gama"),
        (f"{LINE} --hidden-dim x", "hidden-dim"),
        ("maddpg_discrete.py --env-id simple_tug_v3 seeds=1", "simple_tag_v3"),
        (f"{LINE} --random-agents wolf", "no agent wolf"),
        ("maddpg_discrete.py label=default", "seeds= is missing"),
        (f"{LINE} seeds=1-", "seeds= is missing or broken"),
        (f"{LINE} seeds=1-15-20", "seeds= is missing or broken"),
        (f"{LINE} seeds=1,5-3", "seeds=1,5-3 goes downwards"),
        (f"{LINE} --eval-episodes 1000", "--eval-episodes 1000"),
        ("maddpg_discrete.py --gamma 0.9 seeds=1", "label=default is for default flags"),
        (f"{LINE} label=a,b", "label=a,b"),
        (f"{LINE} --seed 3", "--seed does not belong"),
        (f'{LINE} --env-kwargs "broken', "No closing quotation"),
        (LINE.replace("--gamma", "--tau"), "in line 2 already"),
        (f"{LINE} patch=benchmark/none.patch", "patch=benchmark/none.patch cannot be read"),
        (f"{LINE} patch=", "patch= cannot be read"),
        (f"{LINE} patch=LICENSE", "patch=LICENSE does not apply"),
        (f"{LINE} patch=benchmark/ablations/terminal.patch label=default-terminal", "give a patch another label"),
        (f"{LINE} patch=benchmark/ablations/terminal.patch label=defaults", "give a patch another label"),
        (f"{LINE} patch=benchmark/ablations/unscaled.patch", "unscaled.patch changes nothing in maddpg_discrete.py"),
        (f"{LINE} patch=benchmark/ablations/terminal.patch --gama 0.9", "--gama"),
    ],
)
def test_a_mistake_in_a_list_gets_one_line_with_its_place(programs, tmp_path, capsys, line, words):
    path = tmp_path / "runs.txt"
    path.write_text(f"# a comment\n{LINE}\n{line}\n")
    assert programs.sweep.main([str(path), "--folder", str(tmp_path / "f"), "--results", str(tmp_path / "r")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and f"{path}:3: " in said[0] and words in said[0]
    assert not list((tmp_path / "f").glob("maddpg*"))


def test_a_list_names_its_runs(programs, tmp_path):
    path = tmp_path / "runs.txt"
    path.write_text(f"# comment\n\n{LINE.replace('seeds=1', 'seeds=1-2,7')}  # more\nmaddpg_discrete.py seeds=1\n")
    runs = programs.sweep.read_list(path, tmp_path, None)
    assert [run.seed for run in runs] == [1, 2, 7, 1] and len({run.folder for run in runs}) == 4
    assert [run.env_id for run in runs] == ["simple_v3"] * 3 + ["simple_tag_v3"]
    assert [run.targets[0][1] for run in runs] == ["small"] * 3 + ["default"] and runs[0].steps == 1000


def test_a_patch_and_its_content_name_the_run(programs, tmp_path):
    """The same text under another name is the same run. Flags of the patch's own are known; a broken script is not."""
    old = "    tau: float = 0.01\n"
    first = patch(tmp_path / "a.patch", "maddpg_discrete.py", old, "    tau: float = 0.02\n")
    second = patch(tmp_path / "b.patch", "maddpg_discrete.py", old, '    wide: bool = False\n    """no"""\n' + old)
    shutil.copy(first, tmp_path / "c.patch")
    lines = [LINE, *(f"{LINE}{name} patch={tmp_path}/{name}.patch" for name in "abc")]
    lines[2] += " --wide"
    (tmp_path / "runs.txt").write_text("\n".join(lines))
    plain, a, b, c = programs.sweep.read_list(tmp_path / "runs.txt", tmp_path, None)
    assert a.folder == c.folder and len({run.folder for run in (plain, a, b)}) == 3
    assert (a.patch, a.diff) == (str(first), first.read_bytes()) and (plain.patch, plain.diff) == ("", b"")
    assert b.flags[-1] == "--wide" and b.script == "maddpg_discrete.py"
    folder = a.folder
    patch(first, "maddpg_discrete.py", old, "    tau: float = 0.03\n")
    assert programs.sweep.read_list(tmp_path / "runs.txt", tmp_path, None)[1].folder != folder
    patch(second, "maddpg_discrete.py", old, "    tau: float = \n")
    with pytest.raises(
        programs.tables.UsageError, match=r"runs.txt:3: .*b\.patch: maddpg_discrete.py cannot be imported"
    ):
        programs.sweep.read_list(tmp_path / "runs.txt", tmp_path, None)


def test_patches_apply_one_after_the_other(programs, tmp_path):
    """The second may need what the first has left."""
    old, new = "    tau: float = 0.01\n", "    tau: float = 0.02\n"
    first = patch(tmp_path / "a.patch", "maddpg_discrete.py", old, new)
    second = tmp_path / "b.patch"
    second.write_text(first.read_text().replace("0.02", "0.03").replace(f"-{old}", f"-{new}"))
    (tmp_path / "runs.txt").write_text(f"{LINE} patch={first},{second}\n")
    (run,) = programs.sweep.read_list(tmp_path / "runs.txt", tmp_path, None)
    programs.sweep.copy_scripts(run.patch, run.diff, tmp_path / "copies")
    assert "    tau: float = 0.03\n" in (tmp_path / "copies/maddpg_discrete.py").read_text()
    (tmp_path / "runs.txt").write_text(f"{LINE} patch={second},{first}\n")
    with pytest.raises(programs.tables.UsageError, match="does not apply"):
        programs.sweep.read_list(tmp_path / "runs.txt", tmp_path, None)


def test_a_recipe_is_applied_to_the_script_of_the_line(programs, tmp_path):
    line = f"{LINE} patch=docs/recipes/sharing.patch"
    (tmp_path / "runs.txt").write_text(f"{line}\n{line.replace('discrete', 'continuous')}\n")
    for run in programs.sweep.read_list(tmp_path / "runs.txt", tmp_path, None):
        programs.sweep.copy_scripts(run.patch, run.diff, tmp_path / run.script)
        copies = (tmp_path / run.script).iterdir()
        assert [c.name for c in copies if c.read_bytes() != (ROOT / c.name).read_bytes()] == [run.script]


def test_scripts_are_patched_inside_and_outside_of_a_repository(programs, tmp_path, monkeypatch):
    """By what diff or git writes, also where git is told of another repository; and again over the copies."""
    subprocess.run(["git", "init", "-q", tmp_path / "repository"], check=True)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "repository/.git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "repository"))
    by_diff = patch(tmp_path / "a.patch", "maddpg_discrete.py", "tau: float = 0.01", "tau: float = 0.02").read_bytes()
    by_git = b"diff --git a/maddpg_discrete.py b/maddpg_discrete.py\n" + by_diff
    for folder in tmp_path / "plain", tmp_path / "repository/runs/scripts":
        for diff in by_diff, by_git:
            programs.sweep.copy_scripts("a.patch", diff, folder)
            assert sorted(path.name for path in folder.iterdir()) == ["maddpg_continuous.py", "maddpg_discrete.py"]
            assert "tau: float = 0.02" in (folder / "maddpg_discrete.py").read_text()
            assert (folder / "maddpg_continuous.py").read_text() == (ROOT / "maddpg_continuous.py").read_text()


def test_the_lists_are_right(programs, tmp_path):
    for path in (BENCHMARK / "lists").glob("*.txt"):
        assert programs.sweep.read_list(path, tmp_path, None), path


# ---- Tables ----------------------------------------------------------------------------------------------------------
ROW = ["a.py", "game", "default", 1, 100, 1.5, "sum", -3.25, 10, "abc"]


def test_no_row_comes_twice_and_an_unfinished_one_is_dropped(programs, tmp_path):
    path = tmp_path / "t.csv"
    table = programs.tables.Table(path)
    later = [*ROW[:4], 200, *ROW[5:]]
    table.append([ROW])
    table.append([ROW, later])
    with open(path, "a") as file:
        file.write("a.py,game,def")
    table = programs.tables.Table(path)
    table.append([[*ROW[:5], 9.9, *ROW[6:]], later])
    assert [row["global_step"] for row in rows(path)] == ["100", "200"] and path.read_text().endswith("abc\n")
    table.remove("a.py", "game", "default", "1")
    assert rows(path) == [] == rows(path)


@pytest.mark.parametrize(
    "place, value",
    [(3, "one"), (4, "1.5"), (5, "?"), (5, "inf"), (7, "-26.x"), (7, "nan"), (8, ""), (9, "abc,d")],
)
def test_a_broken_row_gets_one_line(programs, tmp_path, capsys, place, value):
    """A number that is none, or a column too many."""
    path, runs = tmp_path / "t.csv", tmp_path / "t.txt"
    runs.write_text(LINE)
    words = [str(runs), "--folder", str(tmp_path / "runs"), "--results", str(tmp_path)]
    programs.tables.Table(path).append([ROW])
    path.write_text(path.read_text() + ",".join(map(str, [*ROW[:place], value, *ROW[place + 1 :]])) + "\n")
    assert programs.sweep.main(words) == 2
    assert re.fullmatch(r"sweep\.py: \S*t\.csv:3: [^\n]+\n", capsys.readouterr().err)
    path.write_bytes(b"\xff")
    assert programs.sweep.main(words) == 2
    assert re.fullmatch(r"sweep\.py: \S*t\.csv is no table: [^\n]+\n", capsys.readouterr().err)


def test_a_reader_leaves_a_row_that_is_being_written(programs, tmp_path):
    path = tmp_path / "t.csv"
    programs.tables.Table(path).append([ROW])
    path.write_text(before := path.read_text() + "a.py,game,def")
    ((seeds, *_),) = programs.tables.read_tables([path]).values()
    assert seeds == 1 and path.read_text() == before


def test_a_list_that_is_not_there_leaves_nothing(programs, tmp_path, capsys):
    words = [str(tmp_path / "none.txt"), "--folder", str(tmp_path / "f"), "--results", str(tmp_path / "r")]
    assert programs.sweep.main(words) == 2
    assert "none.txt cannot be read" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, words", [("--address nowhere", "Ray does not start"), ("--gpus 99", "--gpus 99: Ray")])
def test_what_ray_has_not_gets_one_line(tmp_path, flags, words):
    (tmp_path / "small.txt").write_text(LINE)
    process = command(tmp_path, tmp_path / "small.txt", *flags.split(), stderr=subprocess.PIPE)
    try:
        said = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert process.returncode == 2 and "Traceback" not in said and f"sweep.py: {words}" in said


def test_original_cadence_is_not_the_original(programs):
    """The levels in the original's own reward are for runs in its environment alone, and those have no others."""
    about = "maddpg_discrete.py", "simple_spread_v3"
    own = [value for value, _ in programs.tables.levels(*about, "original-training", "agent")]
    assert own == [-145.0, -129.0, -140.4]
    for label in ("original-ddpg-training", "original-128-training"):
        assert own == [value for value, _ in programs.tables.levels(*about, label, "agent")]
    for label in "original-cadence", "default":
        assert [value for value, _ in programs.tables.levels(*about, label, "agent")] == [-12.1, -8.9, -9.8, -8.4]


@pytest.mark.parametrize("lock", ["runs/sweep.lock", "small.lock"])
def test_two_sweeps_on_one_folder_do_not_mix(programs, tmp_path, lock):
    """Nor on one table, with folders of their own."""
    with programs.sweep.hold(tmp_path / lock):
        (tmp_path / "small.txt").write_text(LINE)
        process = command(tmp_path, tmp_path / "small.txt", stderr=subprocess.PIPE)
        try:
            said = process.communicate(timeout=120)[1].strip().splitlines()
        finally:
            process.kill()
    assert process.returncode == 2 and len(said) == 1 and f"process {os.getpid()}" in said[0]
    with programs.sweep.hold(tmp_path / lock):
        pass


# ---- Whole sweeps ----------------------------------------------------------------------------------------------------
def training(process, script="maddpg_discrete.py"):
    """The training process of a sweep."""
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if any(word.endswith(script) for word in child.cmdline()[:2]):
                return child
        except psutil.Error:
            continue


def wait_until(condition, process, seconds=240):
    until = time.time() + seconds
    while time.time() < until and process.poll() is None:
        if found := condition():
            return found
        time.sleep(0.3)
    raise AssertionError(f"nothing in {seconds} s, or the sweep ended with {process.poll()}")


PAID = '        data["rewards"][g, acts] = [rewards[agent] for agent in acting]\n'


def test_a_patched_script_plays_its_run_itself(tmp_path):
    """Training's evaluations and the last rows are the patched script's: there a step pays 7, and has 25 steps. It
    finds a game of the user's own too."""
    patch(tmp_path / "a.patch", "maddpg_discrete.py", PAID, PAID.replace("rewards[agent] for", "7.0 for"))
    line = f"{LINE} patch={tmp_path}/a.patch\n"
    (tmp_path / "small.txt").write_text(line + line.replace("simple_v3", "docs.recipes.my_game"))
    process = command(tmp_path, tmp_path / "small.txt", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.wait(120) == 0, process.stderr.read()
    found = rows(tmp_path / "small.csv")
    assert {row["episodes"] for row in found if row["env_id"] == "docs.recipes.my_game"} == {"100", "1000"}
    found = [row for row in found if row["env_id"] == "simple_v3"]
    assert {(row["script"], row["label"], float(row["episodic_return"])) for row in found} == {
        ("maddpg_discrete.py", "small", 175.0)
    }
    assert [row["episodes"] for row in found if row["agent"] == "sum"] == ["100", "100", "1000"]
    (final,) = (tmp_path / "runs").glob("maddpg_discrete__simple_v3__1__*/final.json")
    assert json.loads(final.read_text())["returns"]["sum"] == 175 and list(final.parent.glob("scripts/*.py"))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere training is not told that its Ray worker has ended")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_sweep_has_saved(tmp_path, number):
    """Training writes a checkpoint before it ends, long before its first one is due."""
    (tmp_path / "small.txt").write_text("maddpg_discrete.py --env-id simple_v3 --total-timesteps 300000 seeds=1\n")
    process = command(tmp_path, tmp_path / "small.txt", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: list(tmp_path.glob("runs/maddpg*/runs/*/events*")), process)
    child = training(process)
    time.sleep(3)
    process.send_signal(number)
    process.wait(60)
    psutil.wait_procs([child], timeout=60)
    assert list(tmp_path.glob("runs/maddpg*/runs/*/checkpoint.pt"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, "original"])
def test_a_killed_worker_and_a_killed_sweep_lose_nothing(tmp_path, name):
    """The rows equal those of an undisturbed run, whatever is killed: the Ray worker, training itself, the sweep."""
    flags = "--total-timesteps 40000 --checkpoint-frequency 2000 --eval-frequency 4000 --eval-episodes 10"
    flags += f" patch=benchmark/ablations/{name}.patch" if name else ""
    (tmp_path / "small.txt").write_text(f"maddpg_discrete.py {SMALL} {flags} seeds=1 label=small\n")
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for name in ("calm", "wild"):
        (tmp_path / name).mkdir()
    calm = command(tmp_path / "calm", tmp_path / "small.txt", **quiet)
    assert calm.wait(300) == 0

    wild = tmp_path / "wild"
    process = command(wild, tmp_path / "small.txt", **quiet)

    def saved(after):
        found = list(wild.glob("runs/maddpg*/runs/*/checkpoint.pt"))
        return found and found[0].stat().st_mtime > after and training(process)

    first = wait_until(lambda: saved(0), process)
    first.parent().parent().kill()  # the Ray worker
    second = wait_until(lambda: (found := training(process)) and found.pid != first.pid and found, process)
    assert not first.is_running() or first.status() == psutil.STATUS_ZOMBIE
    wait_until(lambda: saved(time.time() - 1), process)
    second.send_signal(signal.SIGKILL)  # training itself
    third = wait_until(lambda: (found := training(process)) and found.pid != second.pid and found, process)
    process.kill()
    process.wait()
    psutil.wait_procs([third], timeout=30)
    process = command(wild, tmp_path / "small.txt", **quiet)
    assert process.wait(300) == 0

    def results(folder):
        return sorted((r["global_step"], r["agent"], r["episodes"], r["episodic_return"]) for r in rows(folder))

    assert results(wild / "small.csv") == results(tmp_path / "calm" / "small.csv")
    assert len(list(wild.glob("runs/maddpg*/runs/*/events*"))) >= 3  # it went on, did not begin again
    assert not list(wild.glob("runs/maddpg*/runs/*/checkpoint*")) and list(wild.glob("runs/maddpg*/runs/*/model.pt"))
    seconds = [float(row["wall_clock_s"]) for row in rows(wild / "small.csv") if row["agent"] == "sum"]
    assert seconds == sorted(seconds)
    before = (wild / "small.csv").read_text()
    assert command(wild, tmp_path / "small.txt", **quiet).wait(120) == 0 and (wild / "small.csv").read_text() == before


# ---- estimator.py ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder of the game in which one agent chooses among 3 messages, the other among 5 moves."""
    folder = tmp_path_factory.mktemp("trained")
    flags = f"{SMALL} --env-id simple_speaker_listener_v4 --total-timesteps 1000 --eval-episodes 1 --num-workers 0"
    subprocess.run([sys.executable, ROOT / "maddpg_discrete.py", *flags.split()], cwd=folder, check=True)
    return next(folder.glob("runs/*"))


@pytest.fixture
def estimator(monkeypatch, discrete):
    monkeypatch.syspath_prepend(str(BENCHMARK))
    import estimator

    return estimator


def loaded(discrete, run):
    saved = discrete.load(str(run), "model.pt")
    args = discrete.Args(**saved["args"])
    games = discrete.Games(discrete.game_maker(args), 4)
    networks = discrete.Networks(games, args).requires_grad_(False)
    networks.load_state_dict(saved["networks"])
    for parameter in networks.parameters():
        parameter.mul_(3)  # so that Q bends between the corners
    return games, networks


def test_exact_gradient(estimator, discrete, trained):
    """The gradient of sum_j p_j Q_i(..., j, ...), Q asked once for each action of each agent alone."""
    games, networks = loaded(discrete, trained)
    obs, actions = estimator.played(networks, games, 40)
    exact = estimator.exact_gradient(networks, obs, actions)
    for i, n in enumerate([3, 5]):
        logits = networks.actor(obs)[:, i, :n].requires_grad_()
        value = 0
        for j in range(n):
            chosen = actions.clone()
            chosen[:, i] = 0
            chosen[:, i, j] = 1
            value = value + logits.softmax(1)[:, j] * networks.critic(obs, chosen)[:, i]
        torch.testing.assert_close(exact[:, i, :n], torch.autograd.grad(value.sum(), logits)[0])
    assert exact[:, 0, 3:].eq(0).all()


def test_estimators(estimator, discrete, trained):
    """Vector and weighted come near the exact gradient as the temperature falls; each asks Q where it says it does."""
    games, networks = loaded(discrete, trained)
    obs, actions = (tensor[:3] for tensor in estimator.played(networks, games, 40))
    exact = estimator.exact_gradient(networks, obs, actions)
    many = obs.repeat(20_000, 1, 1), actions.repeat(20_000, 1, 1)
    for kind in "vector", "weighted":
        errors = []
        for temperature in 1.0, 0.05:
            gradient = estimator.sampled_gradient(networks, *many, kind, temperature).unflatten(0, (-1, 3)).mean(0)
            errors.append(((gradient - exact).norm() / exact.norm()).item())
        assert errors[1] < 0.2 and errors[1] < errors[0]

    class Curved(torch.nn.Module):  # Q = sum_j w_j a_j^2: 2 w_j at action j, w_j - w_k between two actions
        def forward(self, obs, actions, change):
            return ((actions + change) ** 2 * (1 + torch.arange(5))).sum(-1).flatten(0, -2)

    networks.critic, weights = Curved(), 1 + torch.arange(5)
    slopes = {
        "weighted": lambda y, one_hot: weights.expand_as(y),
        "vector": lambda y, one_hot: 2 * weights * y,
        "straight-through": lambda y, one_hot: 2 * weights * one_hot,
    }
    for kind in estimator.KINDS:
        torch.manual_seed(3)
        found = estimator.sampled_gradient(networks, obs, actions, kind, 0.7)
        torch.manual_seed(3)
        logits = networks.actor(obs).requires_grad_()
        noise = -torch.empty_like(logits).exponential_().log()
        y = ((logits + noise) / 0.7 + networks.actor.padding_logits).softmax(2)
        one_hot = torch.nn.functional.one_hot(y.argmax(2), 5)
        (expected,) = torch.autograd.grad(y, logits, slopes[kind](y.detach(), one_hot).float())
        torch.testing.assert_close(found, expected)


def test_estimator_runs(trained, tmp_path):
    command = [sys.executable, BENCHMARK / "estimator.py", trained, "--output", tmp_path / "figures.csv"]
    quick = subprocess.run([*command, "--quick"], capture_output=True, text=True, check=True)
    assert len(quick.stdout.splitlines()) == 12 and not (tmp_path / "figures.csv").exists()
    subprocess.run([*command, "--states", "50", "--samples", "100"], capture_output=True, text=True, check=True)
    lines = rows(tmp_path / "figures.csv")
    assert {(line["agent"], line["estimator"], line["temperature"]) for line in lines} == {
        (agent, kind, temperature)
        for agent in ("speaker_0", "listener_0")
        for kind in ("straight-through", "vector", "weighted")
        for temperature in ("1.0", "0.25")
    }


def test_a_run_that_is_not_there_gets_one_line(tmp_path):
    command = [sys.executable, BENCHMARK / "estimator.py", tmp_path / "none", "--quick"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.startswith("estimator.py: ")


def test_encoders_learn(monkeypatch):
    """Both kinds of critics make a round, finite and with a gradient for the actors."""
    monkeypatch.syspath_prepend(str(BENCHMARK))
    import encoders

    for kind in encoders.KINDS.values():
        losses = [encoders.learner(kind)() for _ in range(2)]
        assert all(torch.isfinite(values).all() for each in losses for values in each.values())
    args = encoders.maddpg.Args(env_id="simple_spread_v3")
    games = encoders.maddpg.Games(encoders.maddpg.game_maker(args), 1)
    masks = torch.from_numpy(games.obs_mask), torch.from_numpy(games.action_mask)
    critic = encoders.SeparateCritic(*masks, 16, torch.ones(3, dtype=torch.bool))
    obs, actions, change = torch.rand(7, 3, 18), torch.rand(7, 3, 5), torch.rand(7, 3, 5)
    changed = critic(obs, actions, change)
    for i in range(3):  # a change is agent i's own, to critic i alone
        others = actions.clone()
        others[:, i] += change[:, i]
        torch.testing.assert_close(changed[:, i], critic(obs, others)[:, i])


def test_an_unknown_part_gets_one_line():
    command = [sys.executable, BENCHMARK / "survive.py", "--parts", "kil"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("survive.py: --parts 'kil' is none of games, kill")


# ---- discount.py -----------------------------------------------------------------------------------------------------
@pytest.fixture
def discount(monkeypatch, discrete):
    monkeypatch.syspath_prepend(str(BENCHMARK))
    import discount

    return discount


def test_returns_after_each_action(discount, discrete, monkeypatch):
    """Without noise: what Q_i is asked, and each action's returns, beside an episode played again for every action."""
    monkeypatch.setattr(discount, "gumbel_noise", torch.zeros)
    make = functools.partial(discrete.make_game, "simple_spread_v3", {"max_cycles": 99}, False)
    games, source, plain = (discrete.Games(make, n) for n in (80, 1, 1))
    torch.manual_seed(2)
    networks = discrete.Networks(source, discrete.Args(hidden_dim=16)).requires_grad_(False)
    for seed in 3, 4:
        rng = np.random.default_rng(seed)
        step, i = rng.integers(25), rng.integers(3)
        q_values, *returns = discount.tried(networks, games, source, 0.9, seed)
        discounted, rest = np.split(np.array(returns), 2)
        assert discounted.shape == (16, 5) and np.array_equal(discounted, discounted[:1].repeat(16, 0))
        for option in range(5):
            data, _ = plain.reset(seed=seed)
            rewards = []
            for k in range(step + 60):
                obs = torch.from_numpy(data["obs"])
                actions = discrete.choose(networks.actor, obs, 0.0, None)
                if k == step:
                    actions[0, i] = torch.eye(5)[option]
                    assert q_values[option] == pytest.approx(networks.critic(obs, actions)[0, i].item(), abs=1e-5)
                data, *_ = plain.step(actions.numpy())
                rewards.append(float(data["rewards"][0, i]))
            expected = sum(0.9**k * r for k, r in enumerate(rewards[step:]))
            assert discounted[0, option] == pytest.approx(expected, abs=1e-4)
            assert rest[0, option] == pytest.approx(sum(rewards[step:25]), abs=1e-4)
        assert np.ptp(discounted[0]) > 1e-3


def test_discount_runs(discount, trained, monkeypatch):
    """Figures of critics that are right but for a constant, and of ones that know states, but not what actions do."""
    known = np.random.default_rng(0).normal(size=(50, 1, 5)) + np.arange(50)[:, None, None]
    networks = SimpleNamespace(requires_grad_=lambda _: networks, restore=lambda _: None)
    saved = {"args": vars(discount.maddpg.Args(env_id="simple_spread_v3")), "networks": 0}
    monkeypatch.setattr(discount.maddpg, "load", lambda *_: saved)
    monkeypatch.setattr(discount.maddpg, "Networks", lambda *_: networks)
    for right in True, False:

        def tried(networks, games, source, gamma, seed, right=right):
            q_values = known[seed] if right else known[seed].mean(1, keepdims=True).repeat(5, 1)
            return np.concatenate([q_values + 1, *[known[seed].repeat(16, 0)] * 2])

        monkeypatch.setattr(discount, "tried", tried)
        with np.errstate(invalid="ignore"):
            figures = dict(zip(discount.COLUMNS[3:], map(float, discount.measure("run", 50)[3:]), strict=True))
        assert figures["error"] == pytest.approx(1 if right else 1.34, abs=0.05)
        assert figures["actions"] == pytest.approx(1 if right else 0, abs=0.01, nan_ok=True)
        assert figures["reliability"] == figures["undiscounted"] == 1 and figures["values"] > 0.99
        assert figures["effect"] == pytest.approx(0.9, abs=0.1) and figures["states"] == 50
    command = [sys.executable, BENCHMARK / "discount.py", trained, "--quick"]
    wrong = subprocess.run(command, capture_output=True, text=True)
    assert wrong.returncode == 2 and "simple_spread_v3" in wrong.stderr and len(wrong.stderr.splitlines()) == 1


# ---- The other programs ----------------------------------------------------------------------------------------------
def train(folder, flags):
    folder.mkdir()
    words = f"{SMALL} --total-timesteps 1000 --eval-episodes 1 --num-workers 0 {flags}".split()
    subprocess.run([sys.executable, ROOT / "maddpg_discrete.py", *words], cwd=folder, check=True)
    return next(folder.glob("runs/*"))


def test_crossplay_lets_each_side_play_by_its_own_run(monkeypatch, tmp_path):
    """In what is joined of two runs the adversary acts as in the first and the others as in the second."""
    monkeypatch.syspath_prepend(str(BENCHMARK))
    import crossplay

    runs = [train(tmp_path / str(seed), f"--env-id simple_adversary_v3 --seed {seed}") for seed in (1, 2)]
    first, second = map(crossplay.Player, runs)
    networks, _ = crossplay.join(first, second)
    obs = torch.randn(50, 3, 10)
    joined, ours, theirs = (n(obs) for n in (networks.actor, first.networks.actor, second.networks.actor))
    assert torch.equal(joined[:, 0], ours[:, 0]) and torch.equal(joined[:, 1:], theirs[:, 1:])
    assert not torch.isclose(ours, theirs).all(2).any()
    returns, _ = first.script.evaluate(networks, first.games, 20, 7, None)
    played = crossplay.play([second, first], [second], 20, 7)
    np.testing.assert_allclose(played["adversary"][1, 0], returns[:, 0])
    np.testing.assert_allclose(played["agent"][1, 0], returns[:, 1:].mean(1))


def test_crossplay_refuses_other_actions(monkeypatch, tmp_path, capsys):
    """Soft ones against one-hot ones; and a name that is given twice."""
    monkeypatch.syspath_prepend(str(BENCHMARK))
    import crossplay

    hard, soft = (
        train(tmp_path / flag, f"--env-id simple_adversary_v3 --{flag}") for flag in ("no-relaxed", "relaxed")
    )
    output = ["--episodes", "10", "--output", str(tmp_path / "pairs.csv")]
    assert crossplay.main(["--ours", str(hard), "--theirs", str(soft), *output]) == 2
    assert "--relaxed" in capsys.readouterr().err
    words = ["--first", "a", str(hard), "--first", "a", str(hard), "--second", "b", str(hard)]
    assert crossplay.main([*words, *output]) == 2 and "give each once: a, a" in capsys.readouterr().err
    assert not (tmp_path / "pairs.csv").exists()


# ---- physical.py -----------------------------------------------------------------------------------------------------
def test_what_is_counted_explains_the_returns(monkeypatch, tmp_path, trained):
    """A touch pays each predator 10; in simple_spread -(3 distance + collisions) / 6 is an agent's return."""
    monkeypatch.syspath_prepend(str(BENCHMARK))
    import physical

    tag, spread = (train(tmp_path / name, f"--env-id {name}") for name in ("simple_tag_v3", "simple_spread_v3"))

    def measured(folder):
        run = physical.Player(folder)
        returns, _ = run.script.evaluate(run.networks, run.games, 30, 5, None)
        return physical.measure(run, 30, 5), returns.mean(0)

    found, returns = measured(tag)
    assert found["touches"] > 0 and found["touches"] * 10 == pytest.approx(returns[0])
    found, returns = measured(spread)
    assert found["collisions"] > 0
    assert -(3 * found["distance"] + found["collisions"]) / 6 == pytest.approx(returns.mean())
    assert measured(trained)[0] == {"solved": 0.0}  # after 1,000 steps


def test_physical_keeps_the_rows_of_runs_that_are_gone(monkeypatch, tmp_path, trained):
    monkeypatch.syspath_prepend(str(BENCHMARK))
    import physical

    (tmp_path / "none.csv").write_text(
        "script,env_id,label,seed,global_step,wall_clock_s,agent,episodic_return,episodes,commit\n"
    )
    words = [str(trained), "--episodes", "10", "--tables", str(tmp_path / "none.csv"), "--output", str(tmp_path)]
    header = "script,env_id,run,seed,total_timesteps,random_agents,quantity,value,episodes\n"
    gone, old = "maddpg_discrete.py,g,gone,1,9,,touches,1.5,10", f"maddpg_discrete.py,g,{trained.name},1,9,,touches,9,9"
    (tmp_path / "physical.csv").write_text(f"{header}{gone}\n{old}\n")
    assert physical.main(words) == 0
    kept, new = (tmp_path / "physical.csv").read_text().splitlines()[1:]
    assert kept == gone and f"{trained.name},1,1000,,solved,0.0000,10" in new


def test_a_score_is_reached_by_two_evaluations_in_a_row_and_at_the_end(monkeypatch):
    """XuanCe's -9.0: one lucky evaluation does not count, nor do two of a run whose end is below."""
    monkeypatch.syspath_prepend(str(BENCHMARK))
    import physical

    def reached(*curve):
        names = "global_step", "episodes", "episodic_return", "wall_clock_s"
        run = [dict(zip(names, map(str, row), strict=True)) | {"agent": "agent_0"} for row in curve]
        runs = {("marks", "maddpg_continuous.py", "simple_spread_v3", "default"): {11: run}}
        (found,) = [row for row in physical.reached(runs) if row[7] == "-9.00"]
        return found[-2:]

    lucky, twice, end = (50, 100, -8.9, 1), (150, 100, -9, 3), (250, 1000, -8.5, 5)
    below, again = (100, 100, -9.1, 2), (200, 100, -8.8, 4)
    assert reached(lucky, below, twice, again, end) == [150, "3.0"]
    assert reached(lucky, below, end) == [250, "5.0"]
    assert reached(twice, again, (250, 1000, -9.2, 5)) == ["", ""]


def test_scripted_chasers_touch_the_prey(monkeypatch, tmp_path):
    """With a force along a wrong axis or away from the prey they have about 0.5, greedy ones 73 and 45."""
    monkeypatch.syspath_prepend(str(BENCHMARK))
    import chasers

    monkeypatch.setattr(chasers, "LEADS", (0.0, 0.1))
    chasers.main(["--episodes", "50", "--output", str(tmp_path)])
    assert [(row["script"], row["lead"]) for row in rows(tmp_path / "chasers.csv")] == [
        (f"{script}.py", lead) for script in ("maddpg_continuous", "maddpg_discrete") for lead in ("0.0", "0.1")
    ]
    greedy_c, leading_c, greedy_d, leading_d = (float(r["episodic_return"]) for r in rows(tmp_path / "chasers.csv"))
    assert 55 < greedy_c < leading_c and 30 < greedy_d < leading_d < leading_c


def test_the_planner_knows_the_physics(monkeypatch):
    """Bodies in contact with each other and with landmarks, faster than they may be; mpe2 is the oracle."""
    monkeypatch.syspath_prepend(str(BENCHMARK))
    import planner
    from mpe2 import simple_tag_v3

    def state():
        return [np.array([getattr(agent.state, name) for agent in world.agents]) for name in ("p_pos", "p_vel")]

    rng, touched = np.random.default_rng(0), 0
    for seed in range(50):
        game = simple_tag_v3.raw_env()
        game.reset(seed=seed)
        world, landmarks = game.world, np.array([landmark.state.p_pos for landmark in game.world.landmarks])
        for agent in world.agents:
            agent.state.p_pos, agent.state.p_vel = rng.uniform(-0.2, 0.2, 2), rng.normal(size=2)
        for _ in range(3):
            position, velocity = state()
            actions = rng.integers(0, 5, 4)
            for agent, action in zip(world.agents, actions, strict=True):
                game._set_action([action], agent, game.action_space(agent.name))
            world.step()
            np.testing.assert_allclose(planner.move(position, velocity, landmarks, actions), state(), atol=1e-12)
            distances = np.linalg.norm(state()[0][:3] - state()[0][3], axis=-1)
            touched += sum(world.agents[n].size + world.agents[3].size > d for n, d in enumerate(distances))
    assert touched > 20


def test_the_planner_plays_what_it_sees(monkeypatch, tmp_path):
    """Towards the prey, along each axis; then a few episodes, in which greedy chasers would have 45."""
    monkeypatch.syspath_prepend(str(BENCHMARK))
    import planner

    obs = torch.zeros(4, 4, 16)
    obs[..., 4:8], obs[..., 12:14] = 5, torch.tensor([[-0.5, 0], [0.5, 0], [0, -0.5], [0, 0.5]])[:, None]
    obs[:, 1:3, 2:4] = torch.tensor([[3.0, 3], [-3, 3]])  # two predators far away
    assert planner.Planner(500, 6, 4, seed=1)(obs)[:, 0].argmax(-1).tolist() == [1, 2, 3, 4]
    words = ["--sequences", "100", "--horizon", "6", "--iterations", "3", "--episodes", "10", "--output", str(tmp_path)]
    planner.main(words)
    planner.main(words)
    first, second = rows(tmp_path / "planner.csv")
    assert first == second and float(first["episodic_return"]) > 45


def test_what_single_actions_would_bring(monkeypatch, discrete):
    """By rollouts of chasers, mpe2 the oracle, the prey doing nothing; by critics, asked for every joint action."""
    monkeypatch.syspath_prepend(str(BENCHMARK))
    import improvement
    from chasers import chase
    from mpe2 import simple_tag_v3

    torch.manual_seed(1)
    args = discrete.Args(env_id="simple_tag_v3", random_agents=("agent",), num_workers=0)
    networks = discrete.Networks(discrete.Games(discrete.game_maker(args), 1), args).requires_grad_(False)
    improved = improvement.Improved(networks, lambda obs: chase(obs, 0), 0.7, horizon=6, rollouts=2, seed=1)
    improved.rng = SimpleNamespace(integers=lambda low, high, size: np.zeros(size, int))

    def act(obs):
        return chase(torch.from_numpy(obs), 0).argmax(2)

    def start(seed):
        game, rng = simple_tag_v3.parallel_env(), np.random.default_rng(seed)
        game.reset(seed=seed)
        for agent in game.unwrapped.world.agents:
            agent.state.p_pos, agent.state.p_vel = rng.uniform(-0.4, 0.4, 2), rng.uniform(-0.3, 0.3, 2)
        return game

    def seen(game):
        obs = np.zeros((1, 4, 16), np.float32)
        for i, agent in enumerate(game.possible_agents):
            row = game.unwrapped.observe(agent)
            obs[0, i, : len(row)] = row
        return obs

    differ = 0
    for seed in range(20):
        obs = seen(start(seed))
        again = improvement.observed(*improvement.seen(obs.astype(float)))
        np.testing.assert_allclose(again[:, :3], obs[:, :3], atol=1e-6)
        greedy = act(obs)
        expected = np.zeros((1, 3, 5))
        for i in range(3):
            for k in range(5):
                game, value = start(seed), 0
                actions = greedy[0].clone()
                actions[i] = k
                for step in range(6):
                    actions[3] = 0
                    moves = dict(zip(game.possible_agents, actions.tolist(), strict=True))
                    value += 0.7**step * game.step(moves)[1]["adversary_0"]
                    actions = act(seen(game))[0].clone()
                expected[0, i, k] = value
        values = improved.by_rollouts(torch.from_numpy(obs), greedy)
        np.testing.assert_allclose(values, expected, atol=1e-6)
        chosen = improved(torch.from_numpy(obs)).argmax(2)
        changed = (chosen != greedy).nonzero()
        gains = expected - np.take_along_axis(expected, greedy[:, :3, None].numpy(), 2)
        assert len(changed) == (gains.max() > 1e-6)
        if len(changed):
            i = changed[0, 1]
            assert gains[0, i, chosen[0, i]] == pytest.approx(gains.max())
            differ += 1
    assert differ > 3, differ

    q_values = improved.by_critics(torch.from_numpy(obs), greedy)
    for i in range(3):
        for k in range(5):
            actions = torch.eye(5)[greedy].repeat(5, 1, 1)
            actions[:, i], actions[:, 3] = torch.eye(5)[k], torch.eye(5)
            expected = networks.critic(torch.from_numpy(obs).repeat(5, 1, 1), actions)[:, i].mean()
            torch.testing.assert_close(q_values[0, i, k], expected)


def test_actors_are_fitted_to_what_rollouts_say(monkeypatch, discrete):
    """Where they say that pushing towards the prey is best, that is what the actors do, in other states too."""
    monkeypatch.syspath_prepend(str(BENCHMARK))
    import improvement
    from chasers import chase

    torch.manual_seed(1)
    args = discrete.Args(env_id="simple_tag_v3", random_agents=("agent",), num_workers=0)
    games = discrete.Games(discrete.game_maker(args), 10)
    networks = discrete.Networks(games, args).requires_grad_(False)
    improved = SimpleNamespace(by_rollouts=lambda obs, greedy: chase(obs, 0)[:, :3].double())
    improvement.fit(networks.actor, improved, games, networks.random_agents, 10_000, seed=1)
    data, _ = games.reset(seed=2)
    for _ in range(20):
        obs = torch.from_numpy(data["obs"])
        data, *_ = games.step(discrete.choose(networks.actor, obs, 0.0, networks.random_agents).numpy())
    obs = torch.from_numpy(data["obs"])
    assert (networks.actor(obs).argmax(2) == chase(obs, 0).argmax(2))[:, :3].float().mean() > 0.75
    assert not any(p.requires_grad for p in networks.parameters())


def test_improvement_runs(monkeypatch, tmp_path, trained, capsys):
    """Of networks that know nothing yet, rollouts make chasers; a run of another game gets one line."""
    monkeypatch.syspath_prepend(str(BENCHMARK))
    import improvement

    flags = f"{SMALL} --env-id simple_tag_v3 --random-agents agent --total-timesteps 500 --num-workers 0"
    subprocess.run([sys.executable, ROOT / "maddpg_discrete.py", *flags.split()], cwd=tmp_path, check=True)
    words = [str(next(tmp_path.glob("runs/*"))), "--episodes", "10", "--horizon", "8", "--rollouts", "4"]
    words += ["--fits", "1", "--steps", "200", "--output", str(tmp_path)]
    improvement.main(words)
    improvement.main(words)
    made = rows(tmp_path / "improvement.csv")
    names = ["none", "critics", "rollouts", "fitted actors, 1"]
    assert [row["values"] for row in made] == names * 2 and made[:4] == made[4:]
    none, _, rollouts, _ = (float(row["episodic_return"]) for row in made[:4])
    assert rollouts > none + 10
    with pytest.raises(SystemExit, match="2"):
        improvement.main([str(trained), "--output", str(tmp_path)])
    assert "must be a run of simple_tag_v3" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["planner", "--sequences", "0"], ["chasers", "--episodes", "-1"]])
def test_what_must_be_counted_begins_at_one(monkeypatch, capsys, tmp_path, words):
    """Nothing is played, and no row written, with none of them."""
    monkeypatch.syspath_prepend(str(BENCHMARK))
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(words[0]).main([*words[1:], "--output", str(tmp_path)])
    assert f"{words[1]}: must be" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_sides_that_get_one_reward_are_one(monkeypatch):
    """Though their sums differ by a rounding and their clocks by a moment; other returns stay apart."""
    monkeypatch.syspath_prepend(str(BENCHMARK))
    import tables

    def row(agent, value, seconds):
        return dict(global_step="50", episodes="100", agent=agent, episodic_return=value, wall_clock_s=seconds)

    assert list(tables.sides([row("speaker_0", "-7.0001", "3.1"), row("listener_0", "-7.0", "3.2")])) == ["listener"]
    found = tables.sides([row("agent_0", "-4", "3"), row("adversary_0", "5", "3"), row("adversary_1", "7", "3")])
    assert found == {"adversary": {(50, 100): (6, 3)}, "agent": {(50, 100): (-4, 3)}}

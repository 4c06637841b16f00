"""The recipes of docs/adapting.md: a patch applies, stays clean, trains, resumes bit by bit, and does what it says.

Mistakes put in, each of which makes a test here fail: a norm over the agents; a shared weight beside one that is not; a
target of the twins' mean, or of one; smoothing without its clip; an actor that moves every round; uniform draws under a
priority's name; weights that do not undo the draw; priorities that a checkpoint leaves out; lines after a checkpoint
kept twice.
"""

import csv
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, is_discrete, make_args, make_games
from torch import nn

REPOSITORY = Path(__file__).resolve().parent.parent
RECIPES = REPOSITORY / "docs" / "recipes"
SCRIPTS = ["maddpg_continuous", "maddpg_discrete"]
PATCHES = {path.stem: SCRIPTS for path in sorted(RECIPES.glob("*.patch"))}
PATCHES |= {"matd3": SCRIPTS[:1], "matd3_discrete": SCRIPTS[1:]}
EACH = [(name, script) for name, scripts in PATCHES.items() for script in scripts]
TOGETHER = [("sharing", "prioritised_replay"), ("layer_norm", "prioritised_replay"), ("matd3", "sharing")]
TOGETHER += [(name, "csv_logger") for name in PATCHES if name not in ("csv_logger", "matd3_discrete")]

FLAGS = ["--env-id", "games", "--total-timesteps", "2000", "--checkpoint-frequency", "1500", "--num-envs", "5"]
FLAGS += ["--learning-starts", "500", "--train-frequency", "20", "--batch-size", "64", "--hidden-dim", "16"]
FLAGS += ["--eval-episodes", "2", "--num-workers", "0", "--max-grad-norm", "0.5"]
FLAGS += ["--ddpg-agents", "scout_1", "--random-agents", "guard"]
TRAIN_AND_RESUME = """
import json, os, pathlib, runpy, shutil, sys, traceback
said = {}
for script, *flags in json.loads(sys.argv[1]):
    folder = pathlib.Path(script).with_suffix("")
    folder.mkdir()
    os.chdir(folder)
    try:
        sys.argv = [script, *flags]
        runpy.run_path(script, run_name="__main__")
        shutil.move(*folder.glob("runs/*"), "run")
        shutil.copytree("run", "resumed")
        sys.argv = [script, "--resume", "resumed/checkpoint_previous.pt"]
        runpy.run_path(script, run_name="__main__")
        said[script] = "well"
    except BaseException:
        said[script] = traceback.format_exc()
print(json.dumps(said))
"""


def in_folder(folder, *line, text=None, seconds=60):
    """Runs a command there. `git apply` in a repository's folder would pass over files outside of it: hide those."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"OMP_NUM_THREADS": "1", "GIT_CEILING_DIRECTORIES": str(Path(folder).resolve().parent)}
    environment["PYTHONPATH"] = str(Path(__file__).parent)
    return subprocess.run(
        line, cwd=folder, env=environment, input=text, capture_output=True, text=True, timeout=seconds
    )


def apply(name, script, folder):
    """`git apply` to a copy of the script in `folder`, as the page says it: for its twin, with the name exchanged."""
    if not (folder / f"{script}.py").exists():
        shutil.copy(ROOT / f"{script}.py", folder)
    text = (RECIPES / f"{name}.patch").read_text()
    if script == "maddpg_discrete":
        text = "\n".join(line.replace("continuous", "discrete", 1) for line in text.split("\n"))
    result = in_folder(folder, "git", "apply", text=text)
    assert result.returncode == 0, f"{name}.patch does not apply to {script}.py any more: {result.stderr}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """For every patch a folder with the patched scripts."""
    made = {name: tmp_path_factory.mktemp(name) for name in PATCHES}
    for name, script in EACH:
        apply(name, script, made[name])
    return made


@pytest.fixture(scope="module")
def trained(folders):
    """Trains and resumes every patched script, in one process; a patch's folder, in which its scripts have theirs."""
    commands = []
    for name, script in EACH:
        plan = {"scout": (2, "terminated"), "scout_1": (3, "truncated")}  # the same in every episode
        kwargs = json.dumps({"kind": "mixed", "discrete": script == "maddpg_discrete", "plans": [plan]})
        commands.append([str(folders[name] / f"{script}.py"), *FLAGS, "--env-kwargs", kwargs])
    result = in_folder(folders[name], sys.executable, "-c", TRAIN_AND_RESUME, json.dumps(commands), seconds=300)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout.splitlines()[-1])

    def folder(name):
        for script in PATCHES[name]:
            path = folders[name] / f"{script}.py"
            assert said[str(path)] == "well", f"{path}: {said[str(path)]}"
        return folders[name]

    return folder


@pytest.fixture
def patched(folders):
    """Imports a patched script, under the name of the script."""

    def load(name, script):
        spec = importlib.util.spec_from_file_location(script, folders[name] / f"{script}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def checkpoint(folder, script, run="run"):
    return torch.load(folder / script / run / "checkpoint.pt", weights_only=True)


def moved(networks, before):
    """Which of the networks have other parameters than in `before`."""
    now = networks.state_dict()
    return {key.split(".")[0] for key, value in now.items() if not torch.equal(value, before[key])}


def batch_of(module, games, size):
    """Random steps, in which all of `Transitions` matter."""
    rb = module.ReplayBuffer(size, games, torch.device("cpu"))
    rb.rows.normal_()
    rb.added = size
    fields = [field.reshape(-1, *shape) for field, shape in zip(rb.rows.split(rb.widths, 1), rb.shapes, strict=True)]
    bits = {f: torch.randint(2, (size, len(games.agents))).float() for f in ("terminations", "alive", "next_alive")}
    data = module.Transitions(*fields)._replace(**bits)
    masks = {"obs": games.obs_mask, "next_obs": games.obs_mask, "actions": games.action_mask}
    return data._replace(**{name: getattr(data, name) * torch.from_numpy(mask) for name, mask in masks.items()})


# ---- Every patch -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "script"), EACH)
def test_patch_applies_by_patch_too(name, script, folders, working_folder):
    """`patch FILE PATCH`, to a copy of any name, makes the same text as `git apply`."""
    if not shutil.which("patch"):
        pytest.skip("there is no patch program")
    shutil.copy(ROOT / f"{script}.py", working_folder / "my_maddpg.py")
    result = in_folder(working_folder, "patch", "my_maddpg.py", str(RECIPES / f"{name}.patch"))
    assert result.returncode == 0, f"{name}.patch does not apply to {script}.py any more: {result.stdout}"
    assert "fuzz" not in result.stdout
    assert (working_folder / "my_maddpg.py").read_text() == (folders[name] / f"{script}.py").read_text()


def test_patched_scripts_are_clean(folders):
    paths = [str(folders[name] / f"{script}.py") for name, script in EACH] + [str(RECIPES)]
    for line in (["check"], ["format", "--check"]):
        line = [sys.executable, "-m", "ruff", *line, "--no-cache", "--config", str(REPOSITORY / "pyproject.toml")]
        result = in_folder(REPOSITORY, *line, *paths)
        assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("names", TOGETHER, ids="+".join)
def test_patches_that_go_together(names, working_folder):
    for name in names:
        apply(name, SCRIPTS[0], working_folder)
    compile((working_folder / f"{SCRIPTS[0]}.py").read_text(), "both", "exec")


@pytest.mark.parametrize("name", PATCHES)
def test_patched_scripts_train_and_resume(name, trained):
    """Finite losses; a run that goes on from its checkpoint ends with the networks, optimizers and buffer of one that
    was never stopped."""
    folder = trained(name)
    for script in PATCHES[name]:
        whole, resumed = (checkpoint(folder, script, run) for run in ("run", "resumed"))
        losses = whole["progress"][3]
        assert losses.keys() == {"critic_loss", "q_values", "actor_loss"}
        assert all(math.isfinite(value) for values in losses.values() for value in values.tolist())
        assert whole["added"] == 2000 and whole["progress"][1] > 70  # steps, rounds
        for key in whole.keys() & {"networks", "optimizers", "rows", "priorities", "random"}:
            torch.testing.assert_close(resumed[key], whole[key], rtol=0, atol=0)


def test_the_page_shows_every_recipe():
    """Each file by a link, each patch with its size and its scripts, the game as it is."""
    page = (REPOSITORY / "docs" / "adapting.md").read_text()
    assert all(f"(recipes/{path.name})" in page for path in RECIPES.glob("*.*"))
    assert f"```python\n{(RECIPES / 'my_game.py').read_text()}```" in page
    for name, scripts in PATCHES.items():
        lines = (RECIPES / f"{name}.patch").read_text().splitlines()[2:]
        counts = " | ".join(str(sum(line[0] == sign for line in lines)) for sign in "+-")
        kind = "both" if len(scripts) == 2 else scripts[0].removeprefix("maddpg_")
        assert f"[{name}.patch](recipes/{name}.patch) | {kind} | {counts} |" in page, (name, counts)


# ---- Your own game ---------------------------------------------------------------------------------------------------
def test_own_game(working_folder, monkeypatch):
    """PettingZoo's own check, a picture, and a run from the working folder that learns to meet."""
    from pettingzoo.test import parallel_api_test

    shutil.copy(RECIPES / "my_game.py", working_folder)
    monkeypatch.syspath_prepend(working_folder)
    game = importlib.import_module("my_game").parallel_env(size=5)
    parallel_api_test(game, num_cycles=100)
    game.reset(seed=1)
    assert game.render().shape == (16, 80, 3)
    flags = "--total-timesteps 5000 --learning-starts 1000 --train-frequency 10 --num-envs 10 --num-workers 0"
    flags += " --batch-size 64 --hidden-dim 32 --eval-episodes 20 --actor-learning-rate 0.003"
    flags += " --critic-learning-rate 0.003 --checkpoint-frequency 0 --env-id my_game"
    result = in_folder(working_folder, sys.executable, str(ROOT / "maddpg_discrete.py"), *flags.split())
    assert result.returncode == 0, result.stderr
    for agent in "walker", "runner":
        random_play, _, greedy = map(float, re.search(rf"^{agent}((?: +\S+){{3}})$", result.stdout, re.M)[1].split())
        assert greedy > -2 > -4 > random_play


# ---- Layer norm ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["layer_norm", None])
@pytest.mark.parametrize("size", [5, 50])
def test_layer_norm(name, size, script, patched):
    """With it, and not without, the first layer's scale is of no consequence, for each agent and step by itself."""
    module = patched(name, script.__name__) if name else script
    games = make_games(module)
    networks = module.Networks(games, make_args(module)).double()
    data = batch_of(module, games, size)
    obs, actions = data.obs.double(), data.actions.double()
    change = torch.cat([torch.zeros_like(obs), torch.rand_like(actions)], 2)

    def outputs():
        return networks.actor(obs), networks.critic(obs, actions), networks.critic(obs, actions, change)

    with torch.no_grad():
        before = outputs()
        for layer in networks.actor.layer_1, networks.critic.layer_1:
            for parameter in layer.parameters():
                parameter.mul_(torch.tensor([3.0, 10.0, 30.0])[:, None, None])
        same = [torch.allclose(new, old, atol=1e-3) for new, old in zip(outputs(), before, strict=True)]
    assert same == [name == "layer_norm"] * 3


# ---- Parameter sharing -----------------------------------------------------------------------------------------------
def stacks(module, n_agents):
    masks = torch.ones(n_agents, 7, dtype=torch.bool), torch.ones(n_agents, 4, dtype=torch.bool)
    actor = module.Actor(*masks, 16, *([1, False] if is_discrete(module) else []))
    return actor, module.Critic(*masks, 16, central=torch.ones(n_agents, dtype=torch.bool))


def test_sharing_has_one_network_for_all(script, patched):
    """But for the id, one row of weights for each agent, and the critic's joint input, it does not grow with them."""
    module = patched("sharing", script.__name__)
    few, many = stacks(module, 2), stacks(module, 9)
    for n_agents, networks in (2, few), (9, many):
        assert all(network.layer_1.bias.shape == (n_agents, 1, 16) for network in networks)
    for small, large in zip(few, many, strict=True):
        by_agent = {"layer_1.bias"} | ({"layer_1.weight"} if small is few[1] else set())
        for name, parameter in small.named_parameters():
            assert name in by_agent or (len(parameter) == 1 and parameter.shape == large.get_parameter(name).shape)
    assert [n.layer_1.weight.shape for n in (few[1], many[1])] == [(1, 2 * 11, 16), (1, 9 * 11, 16)]
    assert stacks(script, 9)[0].layer_1.weight.shape[0] == 9


@pytest.mark.parametrize("size", [5, 50])
def test_sharing_is_a_network_that_reads_a_one_hot_id(size, script, patched):
    """Actors and critics equal one plain network of the inputs and the id; so equal observations differ by it alone."""
    module = patched("sharing", script.__name__)
    actor, critic = stacks(module, 3)
    obs = torch.randn(size, 1, 7).expand(-1, 3, -1)  # all see the same
    actions = torch.rand(size, 3, 4)
    joint = torch.cat([obs.flatten(1), actions.flatten(1)], 1)
    for stack, inputs, outputs in (actor, obs[:, 0], actor(obs)), (critic, joint, critic(obs, actions)):
        layers = [stack.layer_1, stack.layer_2, stack.layer_3]
        first = torch.cat([layers[0].weight[0], layers[0].bias[:, 0]])
        for i in range(3):
            one_hot = nn.functional.one_hot(torch.tensor([i] * size), 3).float()
            x = (torch.cat([inputs, one_hot], 1) @ first).relu()
            x = (x @ layers[1].weight[0] + layers[1].bias[0]).relu()
            x = x @ layers[2].weight[0] + layers[2].bias[0]
            if stack is critic:
                x = x[:, 0]
            elif not is_discrete(script):
                x = x.tanh()
            torch.testing.assert_close(outputs[:, i], x, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(outputs[:, 0], outputs[:, 1], atol=1e-3)
        with torch.no_grad():
            layers[0].bias.copy_(layers[0].bias[:1].clone().expand(3, -1, -1))  # the same id for all
        outputs = actor(obs) if stack is actor else critic(obs, actions)
        torch.testing.assert_close(outputs, outputs[:, :1].expand_as(outputs))


def test_sharing_clips_the_norm_of_the_shared_network(script, patched):
    module = patched("sharing", script.__name__)
    networks = module.Networks(make_games(module), make_args(module))
    optimizer = torch.optim.SGD(networks.actor.parameters(), lr=0.0)
    module.step_optimizer(optimizer, networks.actor(torch.randn(50, *networks.actor.action_mask.shape[:1], 7)), 1e-3)
    total = sum(parameter.grad.square().sum() for parameter in networks.actor.parameters()).sqrt()
    assert total.item() == pytest.approx(1e-3, rel=1e-4)


# ---- MATD3 -----------------------------------------------------------------------------------------------------------
@pytest.fixture(params=["matd3", "matd3_discrete"])
def matd3(request, patched):
    return patched(request.param, *PATCHES[request.param])


def test_matd3_targets_use_the_lower_of_two_critics(matd3):
    args = make_args(matd3, random_agents=("guard",))
    games = make_games(matd3)
    networks, data = matd3.Networks(games, args), batch_of(matd3, games, 200)
    twins = networks.critic(data.obs, data.actions)
    assert twins.shape == (2, 200, 3) and not torch.allclose(twins[0], twins[1], atol=1e-2)
    torch.manual_seed(5)
    targets = matd3.td_targets(networks, data, args)
    torch.manual_seed(5)
    noise = (args.gumbel_temperature,) if is_discrete(matd3) else (args.policy_noise,)
    clip = () if is_discrete(matd3) else (args.noise_clip,)
    next_actions = matd3.choose(networks.target_actor, data.next_obs, *noise, networks.random_agents, *clip)
    there = data.next_alive[:, :, None]
    own = torch.cat([data.next_obs, next_actions], 2) * (1 - there)
    first, second = (critic(data.next_obs * there, next_actions * there, own) for critic in networks.target_critic)
    expected = data.rewards + args.gamma * (1 - data.terminations) * torch.minimum(first, second)
    torch.testing.assert_close(targets, expected)
    losses, q_values = matd3.critic_loss(networks, data._replace(terminations=torch.ones_like(first)), args)
    errors = [matd3.mean_alive((q - data.rewards) ** 2, data.alive) for q in twins]
    torch.testing.assert_close(losses, errors[0] + errors[1])
    torch.testing.assert_close(q_values, matd3.mean_alive(twins[0], data.alive))


def test_matd3_smooths_the_target_actions_within_the_clip(patched):
    """And no random agent's: they act uniformly, in the target too."""
    matd3 = patched("matd3", "maddpg_continuous")
    networks = matd3.Networks(make_games(matd3), make_args(matd3))
    with torch.no_grad():
        networks.target_actor.layer_3.weight.mul_(0)
        networks.target_actor.layer_3.bias.mul_(0)  # greedy: 0
    obs, mask = torch.randn(4000, 3, 7), networks.actor.action_mask.bool().expand(4000, -1, -1)
    small, wide = (matd3.choose(networks.target_actor, obs, noise, None, 0.5)[mask] for noise in (0.2, 5.0))
    assert small.std().item() == pytest.approx(0.2, rel=0.05) and small.abs().max() == 0.5
    assert wide.abs().max() == 0.5 and (wide.abs() == 0.5).float().mean() > 0.9
    random_agents = torch.tensor([True, False, False])
    uniform = matd3.choose(networks.target_actor, obs, 0.2, random_agents, 0.5)[:, 0][mask[:, 0]]
    assert uniform.abs().max() > 0.99 and uniform.std().item() == pytest.approx(1 / 3**0.5, rel=0.05)


def test_matd3_updates_actors_and_targets_every_second_round(matd3, monkeypatch):
    networks = matd3.Networks(games := make_games(matd3), args := make_args(matd3))
    optimizers = [torch.optim.Adam(n.parameters(), lr=1e-3) for n in (networks.actor, networks.critic)]
    data = batch_of(matd3, games, 64)
    for with_actors, expected in (False, {"critic"}), (True, {"critic", "actor", "target_critic", "target_actor"}):
        before = {name: value.clone() for name, value in networks.state_dict().items()}
        losses = matd3.update(networks, optimizers, data, args, with_actors)
        assert moved(networks, before) == expected and ("actor_loss" in losses) == with_actors

    rounds, update = [], matd3.update
    monkeypatch.setattr(matd3, "update", lambda *inputs: rounds.append(inputs[-1]) or update(*inputs))
    matd3.main(make_args(matd3))
    assert rounds == [False, True] * (len(rounds) // 2) + [False] * (len(rounds) % 2) and len(rounds) > 5


# ---- Prioritised replay ----------------------------------------------------------------------------------------------
def test_priorities_are_the_probabilities_and_the_weights_undo_them(script, patched):
    module = patched("prioritised_replay", script.__name__)
    rb = module.ReplayBuffer(100, make_games(module), torch.device("cpu"))
    rb.rows[:, 0] = torch.arange(100)  # obs' first entry tells the row
    rb.added = 40
    errors = torch.rand(40) * 3
    rb.prioritize(torch.arange(40), errors, alpha=0.6)
    expected = errors**0.6 / (errors**0.6).sum()
    batch = rb.sample(200_000, beta=1.0)
    assert torch.equal(batch.obs[:, 0, 0].long(), batch.index)
    drawn = torch.bincount(batch.index, minlength=100) / 200_000
    torch.testing.assert_close(drawn[:40], expected, rtol=0.1, atol=5e-4)
    assert drawn[40:].sum() == 0  # not filled yet
    share = torch.zeros(40).index_add_(0, batch.index, batch.weights[:, 0])
    assert share.std() / share.mean() < 0.05 and batch.weights.max() == 1  # every row counts alike
    assert (rb.sample(50, beta=0.0).weights == 1).all()
    part = rb.sample(1000, beta=0.5)
    ratio = part.weights[:, 0] * (expected[part.index] ** 0.5)
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


def test_new_steps_have_the_highest_priority(script, patched):
    module = patched("prioritised_replay", script.__name__)
    games = make_games(module)
    rb = module.ReplayBuffer(4, games, torch.device("cpu"))
    step = [field[:1].numpy() for field in batch_of(module, games, 1)]
    rb.add(*step)
    assert rb.priorities.tolist() == [1, 0, 0, 0]
    rb.prioritize(torch.tensor([0]), torch.tensor([9.0]), alpha=0.5)
    for _ in range(4):
        rb.add(*step)
    assert rb.priorities.tolist() == pytest.approx([3.0] * 4)


def test_weights_enter_the_critics_loss_alone(script, patched):
    module = patched("prioritised_replay", script.__name__)
    args, games = make_args(module, gamma=0.0, random_agents=("guard",)), make_games(module)
    networks, data = module.Networks(games, args), batch_of(module, games, 64)
    weights = torch.rand(64, 1)
    batch = module.Batch(*data, torch.arange(64), weights)
    losses, _, sizes = module.critic_loss(networks, batch, args)
    errors = networks.critic(data.obs, data.actions) - data.rewards
    torch.testing.assert_close(losses, module.mean_alive(weights * errors**2, data.alive))
    learners = torch.tensor([1.0, 1.0, 0.0])
    torch.testing.assert_close(sizes, (errors.abs() * data.alive * learners).sum(1) / 3)


def test_training_leaves_high_priorities_where_td_errors_are_high(script, patched, trained):
    module = patched("prioritised_replay", script.__name__)
    saved = checkpoint(trained("prioritised_replay"), script.__name__)
    args, games = module.Args(**saved["args"] | {"env_kwargs": "{}"}), make_games(module)
    networks, rb = module.Networks(games, args), module.ReplayBuffer(2000, games, torch.device("cpu"))
    networks.load_state_dict(saved["networks"])
    rb.rows[:], rb.priorities[:], rb.added = saved["rows"], saved["priorities"], saved["added"]
    fields = rb.rows.split(rb.widths, 1)
    data = module.Transitions(*(f.view(-1, *shape) for f, shape in zip(fields, rb.shapes, strict=True)))
    _, _, sizes = module.critic_loss(networks, module.Batch(*data, None, torch.ones(2000, 1)), args)
    learned = saved["priorities"] < saved["priorities"].max()
    assert learned.float().mean() > 0.5
    assert torch.corrcoef(torch.stack([saved["priorities"][learned], sizes[learned]]))[0, 1] > 0.5
    high = sizes > sizes[learned].median()
    drawn = rb.sample(20_000, beta=0.5).index
    assert (high & learned)[drawn].sum() > 1.3 * (~high & learned)[drawn].sum()


# ---- Loggers ---------------------------------------------------------------------------------------------------------
def lines(text):
    header, *rows = csv.reader(text.splitlines())
    assert header == ["tag", "step", "value"]
    return {(tag, int(step)): float(value) for tag, step, value in rows}, len(rows)


def events(run):
    result = in_folder(run, sys.executable, str(RECIPES / "to_csv.py"), str(run))
    assert result.returncode == 0, result.stderr
    return lines(result.stdout)


def test_tensorboard_to_csv(trained):
    """Every point once, of a run that was resumed too; the last evaluation's is the one in the event file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = trained("layer_norm") / "maddpg_continuous"
    whole, count = events(folder / "run")
    assert count == len(whole) > 20
    accumulator = EventAccumulator(str(folder / "run")).Reload()
    assert whole["eval/episodic_return", 2000] == accumulator.Scalars("eval/episodic_return")[-1].value
    resumed, count = events(folder / "resumed")
    assert count == len(resumed) and resumed.keys() == whole.keys()
    assert all(resumed[key] == value for key, value in whole.items() if key[0] != "charts/SPS")


def test_csv_logger_writes_what_tensorboard_would(trained):
    """The same tags and steps, no event file, and after a resume no line twice."""
    for script in SCRIPTS:
        folder = trained("csv_logger") / script
        assert not list(folder.rglob("events*"))
        whole, count = lines((folder / "run" / "scalars.csv").read_text())
        resumed, resumed_count = lines((folder / "resumed" / "scalars.csv").read_text())
        assert count == resumed_count == len(whole)
        assert {k: v for k, v in whole.items() if k[0] != "charts/SPS"} == {
            k: v for k, v in resumed.items() if k[0] != "charts/SPS"
        }
        assert "env_id = games" in (folder / "run" / "arguments.txt").read_text()
    others, _ = events(trained("layer_norm") / SCRIPTS[1] / "run")
    assert whole.keys() == others.keys()


@pytest.mark.parametrize("unfinished", ["losses/cri", "charts/SPS,10", "charts/SPS,1000,63"])
def test_csv_logger_drops_a_line_that_was_being_written(script, patched, tmp_path, unfinished):
    head = "tag,step,value\ncharts/SPS,500,630.5\n"
    (tmp_path / "scalars.csv").write_text(head + unfinished)
    patched("csv_logger", script.__name__).CSVWriter(tmp_path, 2000).add_scalar("charts/SPS", 631.5, 2000)
    assert (tmp_path / "scalars.csv").read_text() == f"{head}charts/SPS,2000,631.5\n"


def test_csv_logger_goes_on_with_weights_and_biases(script, patched, working_folder, monkeypatch):
    (working_folder / "wandb.py").write_text("sent = []\ninit = dict\nlog = lambda *x, **y: sent.append((x, y))\n")
    monkeypatch.syspath_prepend(working_folder)
    try:
        _, _, run = patched("csv_logger", script.__name__).main(
            make_args(script, env_id="memory", total_timesteps=1000, track=True)
        )
        sent = sys.modules["wandb"].sent
    finally:
        sys.modules.pop("wandb", None)
    found, _ = lines((run / "scalars.csv").read_text())
    assert {(tag, kept["step"]): value for (point,), kept in sent for tag, value in point.items()} == found

"""The patches in benchmark/ablations: they apply to the scripts as they are, and change what docs/ablations.md says.

Mistakes put in, each of which makes a test here fail: a line of a script that a patch needs, reworded; a patch that is
empty for one of its scripts; random agents, or agents that are gone, acting by their networks in others-policy; its
`detach` left out; a batch for each agent without its mask; in original, targets moved after the whole round, or steps
of one optimiser for all; in its environment, position before velocity, or a contact too few; random play stored as what
the policy would do; a variant that the page does not name.
"""

import copy
import difflib
import functools
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, is_discrete, make_args, make_games, stored
from games import Game
from reference import parts, random_batch

BENCHMARK, PAGE = ROOT / "benchmark", ROOT / "docs/ablations.md"
if not BENCHMARK.exists():
    pytest.skip("another folder's scripts, without the benchmark", allow_module_level=True)
if not shutil.which("git"):
    pytest.skip("patches are applied by git", allow_module_level=True)
SCRIPTS = {"C": "maddpg_continuous.py", "D": "maddpg_discrete.py"}
PATCHES = {path.stem: path for path in sorted((BENCHMARK / "ablations").glob("*.patch"))}
PAIRS = [
    (name, file) for name, path in PATCHES.items() for file in SCRIPTS.values() if f"+++ b/{file}" in path.read_text()
]
# What these change is what is played or stored. All others change what a round makes of a batch.
OUTSIDE = {"no-exploration", "epsilon-greedy", "shared-noise", "policy-warmup", "batch-per-agent"}
OUTSIDE |= {"terminal", "next-episode", "stored-action", "unscaled", "learning-rate-decay", "original-environment"}
OUTSIDE |= {"n-step", "fading-noise", "adam-epsilon", "small-warmup", "averaged-actor"}


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARK))


@pytest.fixture
def plot(on_the_path):
    for package in ("scipy", "matplotlib"):
        pytest.importorskip(package, reason="pip install -r benchmark/requirements.txt")
    import plot

    return plot


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("patched")


@functools.cache
def load(name, file, folder):
    import sweep

    path = PATCHES[name]
    return sweep.load_patched(file, f"{path}", path.read_bytes(), folder / name)


def both(name, folder, kind="CD"):
    """The scripts that a patch changes: (plain, patched)."""
    import tables

    files = [file for other, file in PAIRS if other == name]
    assert files == [SCRIPTS[k] for k in kind], f"{name} changes {files}"
    for file in files:
        module = load(name, file, folder)
        module.__name__ = file.removesuffix(".py")  # what the tests' helpers look at
        yield tables.load_script(file), module


def build(script, env_id="mixed", **changes):
    args, games = make_args(script, env_id=env_id, **changes), make_games(script, env_id)
    torch.manual_seed(5)
    networks = script.Networks(games, args).double()
    for target in networks.target_actor, networks.target_critic:  # unlike the online ones, as after some rounds
        for parameter in target.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1 * (parameter != 0))
    return args, games, networks, random_batch(script, games, 60)


def optimizers(name, networks, args):
    stacks = (networks.actor, args.actor_learning_rate), (networks.critic, args.critic_learning_rate)
    if name != "original":
        return [torch.optim.Adam(stack.parameters(), rate) for stack, rate in stacks]
    agents = range(len(networks.learns))
    return [
        torch.optim.Adam([p.detach()[i : i + 1] for p in s.parameters()], rate) for i in agents for s, rate in stacks
    ]


def seeded(function, *inputs, seed=1):
    torch.manual_seed(seed)
    return function(*inputs)


def grads(stack):
    return [p.grad if p.grad is not None else torch.zeros_like(p) for p in stack.parameters()]


def played(script, steps=40, **changes):
    """The rows of a run whose networks stay as they are, and these networks."""
    settings = dict(total_timesteps=steps, learning_starts=10, actor_learning_rate=0.0, critic_learning_rate=0.0)
    settings |= dict(checkpoint_frequency=0, tau=0.0, train_frequency=steps)
    networks, rb, _ = script.main(make_args(script, **settings | changes))
    return stored(rb), networks


def greedy(script, networks, rows):
    obs = torch.from_numpy(rows.obs)
    with torch.no_grad():
        return script.choose(networks.actor, obs, 0.0, None).numpy() * rows.alive[:, :, None]


# ---- All of them -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", PATCHES)
def test_it_applies_to_the_scripts_as_they_are(name, folder):
    files = [file for other, file in PAIRS if other == name]
    assert files, f"{name}.patch changes neither script"
    for file in files:
        assert load(name, file, folder).Args().env_id, f"{name}.patch: {file}"
    for file in set(SCRIPTS.values()) - set(files):
        assert (folder / name / file).read_bytes() == (ROOT / file).read_bytes()
    assert PATCHES[name].read_text().split("---")[0].strip(), f"{name}.patch begins with what it is"


def test_the_patched_scripts_are_clean(folder):
    for name, file in PAIRS:
        load(name, file, folder)
    for words in ["check", "-q"], ["format", "--check", "-q"]:
        command = [sys.executable, "-m", "ruff", *words, "--no-cache", "--config", ROOT / "pyproject.toml", folder]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name, file", PAIRS)
def test_rounds_stay_finite_and_differ_where_they_must(name, file, folder):
    """From the same weights, with the same numbers: a round ends elsewhere if, and only if, the patch is about it."""
    ends = []
    for plain, script in both(name, folder, "".join(k for k, f in SCRIPTS.items() if (name, f) in PAIRS)):
        if script.__name__ + ".py" != file:
            continue
        for module in plain, script:
            args, _, networks, data = build(module, random_agents=("scout_1",), max_grad_norm=0.01)
            rates = optimizers(name if module is script else "", networks, args)
            torch.manual_seed(2)
            for _ in range(2):
                losses = module.update(networks, rates, data, args)
                assert losses.keys() == {"critic_loss", "q_values", "actor_loss"}
                assert all(value.shape == (3,) and value.isfinite().all() for value in losses.values())
            assert all(value.isfinite().all() for value in networks.state_dict().values())
            ends.append(networks.state_dict())
    same = all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert same == (name in OUTSIDE)


# ---- The action in the discrete script -------------------------------------------------------------------------------
def is_one_hot(games, actions):
    """By row and agent: each choice is one-hot (or the agent is gone)."""
    sums = [[actions[:, i, part].max(1)[0] == 1 for part in parts(games, i)] for i in range(actions.shape[1])]
    return torch.stack([torch.stack(of_agent).all(0) for of_agent in sums], 1)


def target_actions(script, networks, data, args):
    """What the target critic was asked about, where the agent is there."""
    seen = []
    hook = networks.target_critic.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    script.td_targets(networks, data, args)
    hook.remove()
    return seen[0]


def test_target_greedy(folder):
    ((plain, script),) = both("target-greedy", folder, "D")
    args, _, networks, data = build(script)
    for module, alike in (plain, False), (script, True):
        first, second = (seeded(module.td_targets, networks, data, args, seed=n) for n in (1, 2))
        assert torch.equal(first, second) == alike


def test_target_soft(folder):
    """A vector that sums up to one, not one-hot, with the same largest entry. Random agents keep to one-hot actions."""
    ((plain, script),) = both("target-soft", folder, "D")
    args, games, networks, data = build(script, random_agents=("guard",))
    data.next_alive[:] = 1
    hard, soft = (seeded(target_actions, module, networks, data, args) for module in (plain, script))
    assert is_one_hot(games, hard).all() and is_one_hot(games, soft)[:, 2].all()
    assert not is_one_hot(games, soft)[:, :2].any()
    for i in range(2):
        for part in parts(games, i):
            assert torch.equal(soft[:, i, part].argmax(1), hard[:, i, part].argmax(1))
            torch.testing.assert_close(soft[:, i, part].sum(1), torch.ones_like(soft[:, i, 0]))
    with torch.no_grad():
        assert is_one_hot(games, script.choose(networks.actor, data.obs, 1.0, None)).all()


@pytest.mark.parametrize("name", ["loss-soft", "straight-through"])
def test_the_vector_in_the_critic(folder, name):
    """The gradient of Q_i at the soft vector, or, as if it were there, that of Q_i at its one-hot sample."""
    ((plain, script),) = both(name, folder, "D")
    args, games, networks, data = build(script, logit_regularization=0.0)
    losses = seeded(script.actor_loss, networks, data, args)
    losses.sum().backward()
    found = grads(networks.actor)
    networks.zero_grad()
    logits = networks.actor(data.obs)
    soft = seeded(plain.gumbel_softmax, networks.actor, logits, args.gumbel_temperature, True)
    asked = soft.detach()
    if name == "straight-through":
        asked = seeded(plain.gumbel_softmax, networks.actor, logits.detach(), args.gumbel_temperature)
    asked.requires_grad_()
    values = []
    for i in range(3):
        actions = data.actions.clone()
        actions[:, i] = asked[:, i]
        values.append(plain.mean_alive(networks.critic(data.obs, actions), data.alive)[i])
    torch.testing.assert_close(losses, -torch.stack(values))
    (slope,) = torch.autograd.grad(-sum(values), asked)
    soft.backward(slope)
    for grad, expected in zip(found, grads(networks.actor), strict=True):
        torch.testing.assert_close(grad, expected)


def test_expected_value(folder):
    """The gradient of sum_j p_j Q_i(..., j, ...), summed over agent i's choices; no noise."""
    ((_, script),) = both("expected-value", folder, "D")
    args, games, networks, data = build(script, logit_regularization=0.0)
    for i in range(3):
        networks.zero_grad()
        loss = script.actor_loss(networks, data, args)[i]
        loss.backward()
        found = grads(networks.actor)
        networks.zero_grad()
        value = torch.zeros(len(data.obs))
        for part in parts(games, i):
            for p, entry in zip(networks.actor(data.obs)[:, i, part].softmax(1).T, part, strict=True):
                actions = data.actions.clone()
                actions[:, i, part] = 0
                actions[:, i, entry] = 1
                value = value + p * networks.critic(data.obs, actions)[:, i].detach()
        expected_loss = -script.mean_alive(value[:, None], data.alive[:, [i]])[0]
        torch.testing.assert_close(loss, expected_loss)
        expected_loss.backward()
        assert found[0].ne(0).any()
        for grad, expected in zip(found, grads(networks.actor), strict=True):
            torch.testing.assert_close(grad, expected)


def test_all_soft(folder):
    """Exploring and target actions are soft, with the same largest entry; the actors' loss is that of loss-soft."""
    ((plain, script),) = both("all-soft", folder, "D")
    args, games, networks, data = build(script)
    with torch.no_grad():
        for exploration in 1.0, 0.0:
            soft = seeded(script.choose, networks.actor, data.obs, exploration, None)
            networks.actor.relaxed = False
            hard = seeded(script.choose, networks.actor, data.obs, exploration, None)
            networks.actor.relaxed = True
            assert not is_one_hot(games, soft).any() and is_one_hot(games, hard).all()
            for i in range(3):
                for part in parts(games, i):
                    assert torch.equal(soft[:, i, part].argmax(1), hard[:, i, part].argmax(1))
    data.next_alive[:] = 1
    assert not is_one_hot(games, target_actions(script, networks, data, args)).any()
    other = load("loss-soft", "maddpg_discrete.py", folder)
    loss, expected = (seeded(module.actor_loss, networks, data, args) for module in (script, other))
    torch.testing.assert_close(loss, expected)


# ---- Exploring -------------------------------------------------------------------------------------------------------
def test_no_exploration(folder):
    ((plain, script),) = both("no-exploration", folder, "D")
    for module, alike in (plain, False), (script, True):
        rows, networks = played(module)
        assert np.array_equal(rows.actions[10:], greedy(plain, networks, rows)[10:]) == alike
        assert not np.array_equal(rows.actions[:10], greedy(plain, networks, rows)[:10])


def test_epsilon_greedy(folder):
    """One in ten decisions is uniform, for each agent alone; a random agent's all are."""
    ((plain, script),) = both("epsilon-greedy", folder, "D")
    rows, networks = played(script, 1500, random_agents=("guard",), eval_episodes=1)
    other = (rows.actions != greedy(plain, networks, rows)).any(2)[10:]
    alive = rows.alive[10:] == 1
    rates = [other[alive[:, i], i].mean() for i in range(3)]
    assert rates == pytest.approx([0.1 * 2 / 3, 0.1 * 7 / 8, 1 / 2], abs=0.04) and rates[0] > 0.03
    together = (other[:, 0] & other[:, 1])[alive[:, :2].all(1)].mean()
    assert together < 0.03


def test_shared_noise(folder):
    ((plain, script),) = both("shared-noise", folder, "C")
    _, _, networks, data = build(script)
    obs = data.obs[:1].expand(8, -1, -1)
    with torch.no_grad():
        for module, alike in (plain, False), (script, True):
            actions = module.choose(networks.actor, obs, 0.1, None)
            assert torch.equal(actions, actions[:1].expand_as(actions)) == alike
            assert not torch.equal(actions, module.choose(networks.actor, obs, 0.1, None))


def recorder(choose, asked):
    def recording(actor, obs, exploration, random_agents):
        asked.append((len(obs), random_agents))
        return choose(actor, obs, exploration, random_agents)

    return recording


def test_policy_warmup(folder, monkeypatch):
    """Training never asks for random play; without the patch it does in the first steps, for all."""
    for plain, script in *both("policy-warmup", folder), *both("original-start", folder, "D"):
        for module, random_steps in (plain, 10), (script, 0):
            asked = []
            with monkeypatch.context() as patched:
                patched.setattr(module, "choose", recorder(module.choose, asked))
                played(module)
            training = [who for games, who in asked if games == 1]  # evaluation plays two games
            assert len(training) == 40 and sum(who is not None for who in training) == random_steps


def test_small_warmup(folder):
    """Random actions reach a fifth of the range in the warm-up; a random agent's all of it from then on."""
    ((plain, script),) = both("small-warmup", folder, "C")
    for module, largest in (plain, 1.0), (script, 0.2):
        rows, _ = played(module, random_agents=("scout",))
        sizes = np.abs(rows.actions)
        assert 0.8 * largest < sizes[:10].max() <= largest and sizes[10:].max() > 0.8


def test_learning_rate_decay(folder, monkeypatch):
    """Both step sizes fall by the same share each step, from the flags' to the last round's near zero."""
    for plain, script in both("learning-rate-decay", folder):
        for module, last in (plain, 1.0), (script, 0.05):
            rates = []
            with monkeypatch.context() as patched:
                patched.setattr(
                    module, "update", lambda _, optimizers, *__, rates=rates: rates.append(rates_of(optimizers)) or {}
                )
                played(module, actor_learning_rate=0.5, critic_learning_rate=2.0, train_frequency=2, learning_starts=0)
            actor, critic = np.array(rates).T
            assert critic == pytest.approx(4 * actor)
            assert actor[0] == pytest.approx(0.5 * (1 - 2 / 40 * (module is script)))
            assert actor[-1] == pytest.approx(0.5 * last)


def test_fading_noise(folder, monkeypatch):
    """The noise on training's actions falls by the same share each step."""
    ((plain, script),) = both("fading-noise", folder, "C")
    for module, last in (plain, 1.0), (script, 1 / 40):
        asked = []
        with monkeypatch.context() as patched:
            choose = module.choose
            patched.setattr(module, "choose", lambda *inputs, a=asked, f=choose: a.append(inputs[1:3]) or f(*inputs))
            played(module, exploration_noise=0.5)
        noise = [exploration for obs, exploration in asked if len(obs) == 1]  # evaluation plays two games
        assert noise == pytest.approx(np.linspace(0.5, 0.5 * last, 40))


def test_adam_epsilon(folder, monkeypatch):
    for plain, script in both("adam-epsilon", folder):
        for module, epsilon in (plain, 1e-8), (script, 1e-4):
            seen = set()
            with monkeypatch.context() as patched:
                patched.setattr(
                    module,
                    "update",
                    lambda _, optimizers, *__, s=seen: s.update(o.defaults["eps"] for o in optimizers) or {},
                )
                played(module, train_frequency=2)
            assert seen == {epsilon}


def test_small_initial(folder):
    for plain, script in both("small-initial", folder):
        big, small = (build(module)[2] for module in (plain, script))
        for stack in "actor", "critic":
            for (name, was), now in zip(
                getattr(big, stack).named_parameters(), getattr(small, stack).parameters(), strict=True
            ):
                torch.testing.assert_close(now, was * (0.01 if "layer_3" in name else 1))


def test_original_start(folder):
    """Weights uniform within sqrt(6 / (inputs + outputs)), by each agent's own inputs, as TensorFlow's; biases 0."""
    ((_, script),) = both("original-start", folder, "D")
    _, games, networks, _ = build(script)
    joint = int(games.obs_mask.sum() + games.action_mask.sum())
    for stack, widths in (networks.actor, games.obs_mask.sum(1)), (networks.critic, [joint] * len(games.agents)):
        for layer in stack.layer_1, stack.layer_2, stack.layer_3:
            assert (layer.bias == 0).all()
            for weight, n in zip(layer.weight, widths, strict=True):
                bound = (6 / (n + weight.shape[1])) ** 0.5
                assert (weight[n:] == 0).all() and 0.8 * bound < weight[:n].abs().max() <= bound
            widths = [layer.weight.shape[2]] * len(games.agents)


def rates_of(optimizers):
    return [optimizer.param_groups[0]["lr"] for optimizer in optimizers]


# ---- The update ------------------------------------------------------------------------------------------------------
def test_others_policy(folder):
    """Q_i where all that learn and are there act by their policies; agent i's loss reaches actor i alone."""
    for plain, script in both("others-policy", folder):
        changes = {"logit_regularization": 0.0} if is_discrete(script) else {}
        args, games, networks, data = build(script, random_agents=("scout_1",), **changes)
        losses = seeded(script.actor_loss, networks, data, args)
        torch.manual_seed(1)
        own = others = networks.actor(data.obs).detach()
        if is_discrete(script):
            own = plain.gumbel_softmax(networks.actor, others, 1.0, soft=True)
            others = plain.gumbel_softmax(networks.actor, others, 1.0)
        actions = others * data.alive[:, :, None]
        actions[:, 1] = data.actions[:, 1]
        for i in 0, 2:
            values = networks.critic(data.obs, actions)
            if is_discrete(script):
                values = 0
                for part in parts(games, i):
                    for entry in part:
                        chosen = actions.clone()
                        chosen[:, i, part] = 0
                        chosen[:, i, entry] = 1
                        values = values + own[:, i, [entry]] * networks.critic(data.obs, chosen)
            torch.testing.assert_close(losses[i], plain.mean_alive(-values, data.alive)[i])
        for i in range(3):
            networks.zero_grad()
            script.actor_loss(networks, data, args)[i].backward()
            others = [j for j in range(3) if j != i]
            assert all(grad[others].eq(0).all() and grad[i].ne(0).any() for grad in grads(networks.actor))


def test_gradient_leak(folder):
    """Q_i where all that learn and are there act by their policies, whose gradient reaches all actors that learn."""
    for plain, script in both("gradient-leak", folder):
        changes = {"logit_regularization": 0.0} if is_discrete(script) else {}
        args, games, networks, data = build(script, random_agents=("scout_1",), **changes)
        losses = seeded(script.actor_loss, networks, data, args)
        torch.manual_seed(1)
        actions = networks.actor(data.obs).detach()
        if is_discrete(script):
            actions = plain.gumbel_softmax(networks.actor, actions, 1.0, soft=True)
        actions = actions * data.alive[:, :, None]
        actions[:, 1] = data.actions[:, 1]
        expected = plain.mean_alive(-networks.critic(data.obs, actions), data.alive)
        torch.testing.assert_close(losses[[0, 2]], expected[[0, 2]])
        for i in 0, 2:
            networks.zero_grad()
            script.actor_loss(networks, data, args)[i].backward()
            reached = [all(grad[j].ne(0).any() for grad in grads(networks.actor)) for j in range(3)]
            assert reached[0] and reached[2]
            assert all(grad.eq(0).all() for grad in grads(networks.critic))
        assert all(p.requires_grad for p in networks.critic.parameters())


def test_online_critic(folder):
    for plain, script in both("online-critic", folder):
        args, _, networks, data = build(script)
        cases = (plain, "critic", True), (plain, "target_critic", False)
        cases += (script, "critic", False), (script, "target_critic", True)
        for module, changed, alike in cases:
            before = seeded(module.td_targets, networks, data, args)
            with torch.no_grad():
                for parameter in getattr(networks, changed).parameters():
                    parameter.add_(torch.randn_like(parameter))
            assert torch.equal(seeded(module.td_targets, networks, data, args), before) == alike


def test_target_critic_loss(folder):
    """The actors' loss asks the target critics alone, as constants, and still reaches every actor."""
    for plain, script in both("target-critic-loss", folder):
        args, _, networks, data = build(script)
        for module, asked in (plain, "critic"), (script, "target_critic"):
            before = seeded(module.actor_loss, networks, data, args)
            networks.zero_grad()
            before.sum().backward()
            assert all(grad.abs().sum() > 0 for grad in grads(networks.actor))
            assert not any(grad.any() for grad in grads(networks.critic) + grads(networks.target_critic))
            for changed in "critic", "target_critic":
                with torch.no_grad():
                    for parameter in getattr(networks, changed).parameters():
                        parameter.add_(torch.randn_like(parameter))
                after = seeded(module.actor_loss, networks, data, args)
                assert torch.equal(after, before) == (changed != asked)
                before = after


def test_averaged_actor(folder):
    """An evaluation plays the target actors: as the plain one plays networks whose actors are these."""
    for plain, script in both("averaged-actor", folder):
        games = make_games(script, "simple_spread_v3")
        networks = script.Networks(games, make_args(script))
        for parameter in networks.target_actor.parameters():
            parameter.add_(torch.randn_like(parameter) * (parameter != 0))
        as_it_is, averaged = (module.evaluate(networks, games, 4, 7, None)[0] for module in (plain, script))
        networks.actor = networks.target_actor
        assert (plain.evaluate(networks, games, 4, 7, None)[0] == averaged).all()
        assert (as_it_is != averaged).any()


def test_delayed_actors(folder):
    """Actors and targets move in every second round, the critics in each."""
    for plain, script in both("delayed-actors", folder):
        for module, moving in (plain, [True] * 4), (script, [False, True] * 2):
            args, _, networks, data = build(module)
            rates = optimizers("", networks, args)
            for moves in moving:
                before = copy.deepcopy(networks)
                module.update(networks, rates, data, args)
                for name in "actor", "target_actor", "target_critic", "critic":
                    pairs = zip(getattr(before, name).parameters(), getattr(networks, name).parameters(), strict=True)
                    moved = any(not torch.equal(was, now) for was, now in pairs)
                    assert moved == (moves or name == "critic"), name


def test_deeper_critic(folder):
    """Q_i by three hidden layers, of the joint input and of one with agent i's own action changed."""
    for _, script in both("deeper-critic", folder):
        _, games, networks, data = build(script)
        critic, masks = networks.critic, (games.obs_mask, games.action_mask)
        layers = critic.layer_1, critic.layer_2, critic.deeper, critic.layer_3
        assert critic.deeper.weight.shape == critic.layer_2.weight.shape
        change = torch.randn(2, *data.actions.shape).double() * torch.from_numpy(games.action_mask)
        values = critic(data.obs, data.actions), *critic(data.obs, data.actions, change).split(len(data.obs))
        for i in range(len(networks.learns)):
            for each, q_values in zip((0 * change[0], *change), values, strict=True):
                actions = data.actions.clone()
                actions[:, i] += each[:, i]
                x = torch.cat([f[:, torch.from_numpy(m)] for f, m in zip((data.obs, actions), masks, strict=True)], 1)
                for layer in layers:
                    x = x @ layer.weight[i] + layer.bias[i]
                    x = x if layer is critic.layer_3 else x.relu()
                torch.testing.assert_close(q_values[:, i], x[:, 0])


def test_target_noise(folder):
    """The targets' actions are the policy's, with noise of 0.2 where that stays within the bounds."""
    ((plain, script),) = both("target-noise", folder, "C")
    args, games, networks, data = build(script)
    data.next_alive[:] = 1
    calm, noisy = (seeded(target_actions, module, networks, data, args) for module in (plain, script))
    assert torch.equal(calm, networks.target_actor(data.next_obs))
    for i in range(3):
        off = (noisy - calm)[:, i, games.action_mask[i]]
        inside = (noisy[:, i, games.action_mask[i]].abs() < 1) & (calm[:, i, games.action_mask[i]].abs() < 0.4)
        assert off[inside].std().item() == pytest.approx(0.2, rel=0.25) and noisy.abs().max() <= 1


def test_n_step(folder):
    """Rewards of three steps, fewer at an end of the game or agent; the bootstrap is discounted as many times."""
    leaving = {"scout": (2, "terminated")}, {"scout_1": (1, "terminated"), "guard": (4, "terminated")}, {}
    games = (25, dict(env_id="simple_spread_v3")), (5, dict(env_kwargs=json.dumps({"plans": leaving})))
    for plain, script in both("n-step", folder):
        for length, changes in games:
            right, far = (played(module, 60, gamma=0.5, **changes)[0] for module in (plain, script))
            for t in range(57):
                last = min(t + 2, t - t % length + length - 1)
                for name in "obs", "actions", "alive":
                    np.testing.assert_array_equal(getattr(far, name)[t], getattr(right, name)[t], err_msg=name)
                for name in "next_obs", "next_alive":
                    np.testing.assert_array_equal(getattr(far, name)[t], getattr(right, name)[last], err_msg=name)
                rewards, discount = 0.0, 1.0
                for n in range(t, last + 1):
                    rewards = rewards + discount * right.rewards[n]
                    discount = discount * 0.5 * (1 - right.terminations[n])
                np.testing.assert_allclose(far.rewards[t], rewards, rtol=1e-5)
                np.testing.assert_allclose(0.5 * (1 - far.terminations[t]), discount, rtol=1e-6)
        assert right.terminations.any()


def test_standardized_rewards(folder):
    for _, script in both("standardized-rewards", folder):
        args, _, networks, data = build(script, gamma=0.0)
        data.rewards.mul_(7).add_(3).mul_(data.alive)
        targets = script.td_targets(networks, data, args)
        for i in range(3):
            own = targets[data.alive[:, i] == 1, i]
            assert own.mean().item() == pytest.approx(0, abs=1e-6)
            assert own.std(correction=0).item() == pytest.approx(1, abs=1e-3)
        data.rewards.zero_()  # before the first touch in simple_tag
        assert script.td_targets(networks, data, args).eq(0).all()


def test_batch_per_agent(folder):
    """Three times the rows, in whose nth part agent n alone is alive; its losses are those of that part."""
    for plain, script in both("batch-per-agent", folder):
        args, games, networks, data = build(script)
        rb = script.ReplayBuffer(60, games, torch.device("cpu"))
        rb.add(*(field.numpy() for field in data))
        rows = seeded(plain.ReplayBuffer.sample, rb, 3 * 20)  # the same rows
        batch = seeded(rb.sample, 20)
        for name, field, expected in zip(batch._fields, batch, rows, strict=True):
            assert name == "alive" or torch.equal(field, expected)
        for i in range(3):
            part = slice(20 * i, 20 * i + 20)
            assert torch.equal(batch.alive[part, i], rows.alive[part, i]) and batch.alive[part, i].any()
            assert batch.alive[part].sum() == rows.alive[part, i].sum()
            own = type(rows)(*(field[part].double() for field in rows))
            losses = plain.critic_loss(networks, own, args)[1], script.critic_loss(networks, as_double(batch), args)[1]
            torch.testing.assert_close(losses[0][i], losses[1][i])


def as_double(data):
    return type(data)(*(field.double() for field in data))


def test_clip_per_variable(folder):
    """As `clip_grad_norm_` on every agent's rows of every parameter alone; 0 does not clip."""
    for _, script in both("clip-per-variable", folder):
        for limit in 0.5, 0.0:
            sizes = torch.tensor([100.0, 0.01, 3.0], dtype=torch.float64)
            stack = [torch.nn.Parameter(torch.randn(3, 4, k, dtype=torch.float64)) for k in (5, 1)]
            losses = sum(p.square().sum((1, 2)) for p in stack) * sizes
            expected = [grad.clone() for grad in torch.autograd.grad(losses.sum(), stack, retain_graph=True)]
            for grad in expected if limit else ():
                for i in range(3):
                    own = torch.nn.Parameter(torch.zeros_like(grad[i]))
                    own.grad = grad[i]
                    torch.nn.utils.clip_grad_norm_(own, limit)
            before = [p.detach().clone() for p in stack]
            script.step_optimizer(torch.optim.SGD(stack, 1.0), losses, limit)
            for p, start, grad in zip(stack, before, expected, strict=True):
                torch.testing.assert_close(start - p.detach(), grad, rtol=1e-4, atol=1e-9)


def test_scrambled(folder):
    """A row's Q values depend on other rows."""
    for plain, script in both("scrambled", folder):
        _, games, networks, data = build(script, "simple_spread_v3")
        for module, alike in (plain, True), (script, False):
            critic = module.Critic.forward
            before = critic(networks.critic, data.obs, data.actions)
            other = data.obs.clone()
            other[0] += 1
            after = critic(networks.critic, other, data.actions)
            assert torch.equal(before[1:], after[1:]) == alike


# ---- What is stored --------------------------------------------------------------------------------------------------
def test_terminal(folder):
    """The target of an episode's last step is its reward; plain, it has a bootstrap."""
    for plain, script in both("terminal", folder):
        for module, terminal in (plain, False), (script, True):
            args, _, networks, _ = build(module, "simple_spread_v3")
            games = make_games(module, "simple_spread_v3")
            data = games.reset(seed=1)[0]
            for _ in range(25):
                before = data
                assert not data["terminations"].any()
                data = games.step(games.action_space.sample())[0]
            assert data["done"].all() and data["next_alive"].all()
            fields = before["obs"], data["next_obs"], np.zeros((1, *games.action_mask.shape)), data["rewards"]
            fields += data["terminations"], before["alive"], data["next_alive"]
            batch = module.Transitions(*(torch.from_numpy(field).double() for field in fields))
            assert (module.td_targets(networks, batch, args) == batch.rewards).all() == terminal


def test_next_episode(folder):
    for plain, script in both("next-episode", folder):
        right, wrong = (played(module)[0] for module in (plain, script))
        for name, was, now in zip(right._fields, right, wrong, strict=True):
            assert name == "next_obs" or np.array_equal(was, now), name
        differs = (right.next_obs != wrong.next_obs).any((1, 2))
        assert 5 < differs.sum() < 30
        for n in differs[:-1].nonzero()[0]:
            np.testing.assert_array_equal(wrong.next_obs[n], right.obs[n + 1])


def test_stored_action(folder):
    """The games go as ever. Random play is stored as played; then without noise, or as the vector before the argmax."""
    for plain, script in both("stored-action", folder):
        changes = dict(random_agents=("guard",))
        (right, networks), (wrong, _) = (played(module, **changes) for module in (plain, script))
        for name, was, now in zip(right._fields, right, wrong, strict=True):
            assert name == "actions" or np.array_equal(was, now), name
        alive, games = right.alive[10:] == 1, make_games(script)
        np.testing.assert_array_equal(wrong.actions[:, 2], right.actions[:, 2])
        if is_discrete(script):
            for i in range(2):
                for part in parts(games, i):
                    was, now = right.actions[10:][alive[:, i], i], wrong.actions[10:][alive[:, i], i]
                    assert np.array_equal(was[:, part].argmax(1), now[:, part].argmax(1))
                    assert (now[:, part].max(1) < 1).all() and now[:, part].sum(1) == pytest.approx(1)
        else:
            np.testing.assert_array_equal(wrong.actions[:10], right.actions[:10])
            expected = greedy(plain, networks, right)[10:, :2]
            np.testing.assert_allclose(wrong.actions[10:, :2], expected, atol=1e-6)
            assert not np.allclose(right.actions[10:, :2], expected, atol=1e-3)


def test_unscaled(folder):
    ((_, script),) = both("unscaled", folder, "C")
    games = make_games(script)
    games.reset(seed=1)
    actions = games.action_space.sample()
    games.step(actions)
    received = Game.made[-1].history[-1][1]
    for i, agent in enumerate(games.agents):
        space = games.action_spaces[i]
        own = actions[0, i, games.action_mask[i]].reshape(space.shape)
        np.testing.assert_allclose(received[agent], np.clip(own, space.low, space.high), rtol=1e-6)


# ---- The original code's round ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("file", SCRIPTS.values())
def test_original_is_one_agent_after_the_other(file, folder):
    """Agent i's rows move as in a plain round on its batch, from what the agents before it have left, targets too."""
    clip = load("clip-per-variable", file, folder)
    script = next(module for _, module in both("original", folder) if module.__name__ + ".py" == file)
    args, games, networks, _ = build(script, "simple_tag_v3", max_grad_norm=0.01, tau=0.3)
    agents = range(len(games.agents))
    expected = copy.deepcopy(networks)
    copies = [copy.deepcopy(networks) for _ in agents]
    rates = [optimizers("", other, args) for other in copies]
    own = optimizers("original", networks, args)
    for n in range(3):
        data = random_batch(script, games, len(agents) * 20, seed=n)
        losses = seeded(script.update, networks, own, data, args)
        torch.manual_seed(1)
        for i in agents:
            batch = script.Transitions(*(field[20 * i : 20 * i + 20] for field in data))
            copies[i].load_state_dict(expected.state_dict())
            values = clip.update(copies[i], rates[i], batch, args)
            for key, value in losses.items():
                torch.testing.assert_close(value[i], values[key][i])
            with torch.no_grad():
                for parameter, after in zip(expected.parameters(), copies[i].parameters(), strict=True):
                    parameter[i] = after[i]
    for (name, parameter), after in zip(networks.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter, after, msg=name)


def test_original_environment(folder):
    """Each step against arithmetic on what the agents see: velocity, then position, then one reward for all.

    Where agents touch, the push is not computed, only its effect on the reward.
    """
    ((plain, script),) = both("original-environment", folder, "D")
    rng, touched, alone = np.random.default_rng(1), 0, 0
    for module in plain, script:
        game = module.make_game("simple_spread_v3", {}, continuous_actions=True)
        for seed in range(20):
            obs, _ = game.reset(seed=seed)
            while game.agents:
                before = np.stack(list(obs.values())).astype(float)
                actions = rng.dirichlet(np.full(5, 0.2), size=3)
                obs, rewards, *_ = game.step(dict(zip(game.agents, actions.astype("f"), strict=True)))
                after = np.stack(list(obs.values())).astype(float)
                velocity, position = after[:, :2], after[:, 2:4]
                moved_by = velocity if module is script else before[:, :2]
                np.testing.assert_allclose(position, before[:, 2:4] + 0.1 * moved_by, atol=1e-5)
                landmarks = position[:, None] + after[:, 4:10].reshape(3, 3, 2)  # as each of the agents sees them
                np.testing.assert_allclose(landmarks, landmarks[:1].repeat(3, 0), atol=1e-5)
                far = np.linalg.norm(position[:, None] - landmarks[0], axis=2).min(0).sum()
                apart = np.linalg.norm(position[:, None] - position, axis=2)
                contacts = (apart < 0.3).sum(1) - 1
                if (np.linalg.norm(before[:, None, 2:4] - before[:, 2:4], axis=2) + np.eye(3) > 0.4).all():
                    push = 0.5 * np.stack([actions[:, 2] - actions[:, 1], actions[:, 4] - actions[:, 3]], 1)
                    np.testing.assert_allclose(velocity, 0.75 * before[:, :2] + push, atol=1e-5)
                    alone += 1
                expected = np.full(3, -3 * far - contacts.sum() - 3) if module is script else -(far + contacts) / 2
                np.testing.assert_allclose(list(rewards.values()), expected, atol=1e-4)
                touched += contacts.sum() > 0
    assert touched > 20 and alone > 100
    game = script.make_game("simple_tag_v3", {}, continuous_actions=True)  # other games stay as they are
    assert "integrate_state" not in vars(game.unwrapped.world)


def test_original_goes_on_as_if_it_had_never_stopped(folder):
    for _, script in both("original", folder):
        changes = dict(env_id="memory", checkpoint_frequency=100, learning_starts=40, max_grad_norm=0.5)
        whole, _, _ = script.main(make_args(script, total_timesteps=200, **changes))
        _, _, run = script.main(make_args(script, total_timesteps=120, **changes))
        resumed, _, _ = script.main(make_args(script, total_timesteps=200, resume=str(run), **changes))
        start = seeded(script.Networks, make_games(script, "memory"), make_args(script, env_id="memory"))
        for name, value in resumed.state_dict().items():
            assert torch.equal(value, whole.state_dict()[name]), name
        assert any(not torch.equal(value, resumed.state_dict()[name]) for name, value in start.state_dict().items())


# ---- The list and the page -------------------------------------------------------------------------------------------
def lines(name):
    words = [line.split() for line in (BENCHMARK / "lists" / f"{name}.txt").read_text().splitlines()]
    return [dict(word.split("=", 1) for word in line if "=" in word) for line in words if line and line[0][0] != "#"]


def test_every_patch_is_in_a_list_under_its_name():
    used = set()
    for settings in lines("ablations"):
        if "patch" in settings:
            path = ROOT / settings["patch"]
            used.add(path.stem)
            assert settings["label"].removeprefix("random-prey-") == path.stem
    original = {"original", "original-start", "original-environment"}
    assert used >= PATCHES.keys() - original
    paths = [settings.get("patch", "") for name in ("parity", "original") for settings in lines(name)]
    assert set(",".join(filter(None, paths)).split(",")) == {f"benchmark/ablations/{name}.patch" for name in original}


def test_the_page_names_every_variant(plot):
    tables = re.findall(r"^\| variant \|.*\n(?:\|.*\n)+", PAGE.read_text().split("<!-- end -->")[1], re.M)
    named = [cell for table in tables for cell in re.findall(r"^\| ([^|]+) \|", table, re.M)]
    named = {re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", name) for cell in named for name in cell.split(", ")}
    wanted = {plot.variant(settings["label"]) for settings in lines("ablations")} - {"default"}
    assert named - {"variant"} == wanted


@pytest.mark.parametrize("name", ["ablations", "scenarios"])
def test_the_page_shows_what_the_tables_give(plot, name):
    block = getattr(plot, f"{name}_block")(plot.read_tables([]))
    shown = plot.BLOCK.search((PAGE.parent / f"{name}.md").read_text())
    expected = shown[1] + block + shown[2]
    said = "\n".join(difflib.unified_diff(shown[0].splitlines(), expected.splitlines(), lineterm=""))
    assert shown[0] == expected, f"python benchmark/plot.py --{name} mends this:\n{said}"


def test_an_unknown_label_gets_one_line(plot, tmp_path, capsys):
    assert plot.main(["--labels", "default", "gama-0.95", "--output", str(tmp_path)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "no label gama-0.95" in line and "gamma-0.95" in line.split("nearest")[1]
    assert not list(tmp_path.iterdir())


def test_scenarios_table_and_picture(plot, tmp_path):
    """Made-up runs: the tables and labels that count, untrained and trained, a run that is not at its end."""
    import tables

    def write(table, label, returns, steps=(0, 50_000, 300_000), first_seed=0):
        rows = [["maddpg_discrete.py", "simple_push_v3", label]] * len(returns)
        rows = [
            [*about, seed, step, 9.0, agent, last - 2 * (steps[-1] - step) / 100_000 + n, episodes, "abc"]
            for seed, (about, last) in enumerate(zip(rows, returns, strict=True), first_seed)
            for step in steps
            for episodes in ([100, 1000] if step == 300_000 else [100])
            for n, agent in enumerate(("adversary_0", "agent_0", "agent_1"))
        ]
        tables.Table(tmp_path / f"{table}.csv").append(rows)
        return tmp_path / f"{table}.csv"

    paths = [
        write("crossplay", "default", [-1.0, -2.0, -3.0]),
        write("ablations", "default", [50.0]),
        write("trials", "default", [60.0]),
    ]
    write("crossplay", "ddpg-both", [70.0])
    write("crossplay", "default", [40.0], steps=(0, 50_000), first_seed=3)
    block = plot.scenarios_block(plot.read_tables(paths))
    between = 4.30265 / 3**0.5  # t(2, 0.975) * deviation / sqrt(3)
    row = f"| -8.0 | -2.0 | {-2 - between:.1f} to {-2 + between:.1f} | 3 |"
    assert f"| simple_push_v3 | adversary | discrete {row}\n" in block
    row = f"| -6.5 | -0.5 | {-0.5 - between:.1f} to {-0.5 + between:.1f} | 3 |"
    assert f"| simple_push_v3 | agent | discrete {row}\n" in block
    assert block.count("simple_push_v3") == 2
    other = write("all", "default", [5.0], steps=(0, 50_000))
    assert "simple_push_v3" not in plot.scenarios_block(plot.read_tables([other]))

    page = tmp_path / "scenarios.md"
    page.write_text("before\n<!-- begin: plot.py --scenarios -->\n<!-- end -->\nafter\n")
    assert plot.main([str(paths[0]), "--scenarios", "--output", str(tmp_path)]) == 0
    assert page.read_text() == f"before\n<!-- begin: plot.py --scenarios -->\n{block}<!-- end -->\nafter\n"
    assert (tmp_path / "scenarios.png").stat().st_size > 10_000


def test_tables_and_picture(plot, tmp_path, monkeypatch):
    """Made-up runs: means, Student's intervals, of differences seed by seed too, what is missing; then a whole page."""
    import tables

    games = {
        "simple_spread_v3": ["default-300k", "terminal", "gamma-0.95", "ddpg"],
        "simple_tag_v3": ["random-prey-300k", "random-prey-terminal", "random-prey-gamma-0.95"],
    }
    wanted = [f"maddpg_discrete.py --env-id {game} seeds=1 label={of}\n" for game in games for of in games[game]]
    (tmp_path / "ablations.txt").write_text("".join(["# a comment\n", *wanted]))
    monkeypatch.setattr(plot, "ABLATIONS", tmp_path / "ablations.txt")
    assert plot.ablations_block({}).startswith("No run is finished yet. `python benchmark/sweep.py")

    def rows(game, label, returns, agents, episodes=1000):
        about = "maddpg_discrete.py", game, label
        each = [(seed, agent, value + n) for seed, value in enumerate(returns) for n, agent in enumerate(agents)]
        return [[*about, seed, 300_000, 9.0, agent, value, episodes, "abc"] for seed, agent, value in each]

    spread, tag = ("agent_0", "agent_1"), ("adversary_0", "agent_0")
    table = tables.Table(tmp_path / "ablations.csv")
    table.append(rows("simple_spread_v3", "default-300k", [-10.0, -11.0, -12.0], spread))
    table.append(rows("simple_spread_v3", "terminal", [-20.0, -20.5, -21.0, -30.0], spread)[::-1])
    table.append(rows("simple_spread_v3", "gamma-0.95", [-10.0], spread))
    table.append(rows("simple_spread_v3", "ddpg", [-10.0], spread, episodes=100))
    table.append(rows("simple_tag_v3", "random-prey-300k", [5.0], tag))
    table.append(rows("simple_tag_v3", "random-prey-gamma-0.95", [6.0], tag))
    runs = plot.read_tables([tmp_path / "ablations.csv"])
    assert "ablations.png" not in plot.ablations_block({key: runs[key] for key in runs if key[3] == "terminal"})
    block = plot.ablations_block(runs)
    between = 4.30265 / 3**0.5  # of three values one apart: t(2, 0.975) * deviation / sqrt(3)
    assert f"| default | -10.50 ({-10.5 - between:.2f} to {-10.5 + between:.2f}, 3) |  |" in block
    # Differences of the seeds that both have, in whatever order: -10, -9.5, -9
    low, high = (-9.5 + sign * between / 2 for sign in (-1, 1))
    assert f", 4) | **-9.50** ({low:+.2f} to {high:+.2f}) |" in block and "| terminal | -22.38 (" in block
    assert "| gamma-0.95 | -9.50 (1) | +0.00 |" in block
    assert "| default | 5.00 (1) |  |" in block and "### simple_tag_v3: return of one adversary" in block
    assert "### simple_spread_v3: return of one agent" in block and "ablations.png" in block
    missing = re.findall(r"^Variants not run yet, or not to the end, in (.+)$", block, re.M)
    assert missing == ["simple_spread_v3: maddpg_discrete ddpg.", "simple_tag_v3: maddpg_discrete terminal."]
    assert "| variant | spread, discrete | tag, discrete |\n| --- | --- | --- |\n" in block
    assert "|\n| terminal | **-9.50** |  |\n| gamma-0.95 | · | · |\n\n" in block

    figures = []
    monkeypatch.setattr(plot.plt, "close", figures.append)
    plot.ablations_picture(runs, tmp_path / "ablations.png")
    of_spread, of_tag = figures[0].axes
    assert [label.get_text() for label in of_spread.get_yticklabels()] == ["terminal", "gamma-0.95"]
    means = [line for line in of_spread.lines if line.get_marker() == "o"]
    assert [[*line.get_xdata()] for line in means] == [[-9.5], [0]]
    assert [line.get_markerfacecolor() for line in means] == ["C0", "white"]  # filled: 0 lies outside the interval
    assert [[*line.get_xdata()] for line in of_spread.lines if line.get_marker() == "."] == [[-9, -9.5, -10], [0]]
    (row,) = (line for line in of_tag.lines if line.get_marker() == "o")  # its own first, of the variants the second
    assert [*row.get_ydata()] == [*means[1].get_ydata()] == [1] and of_tag.get_ylim() == of_spread.get_ylim()

    page = tmp_path / "ablations.md"
    page.write_text("before\n<!-- begin: plot.py --ablations -->\nold\n<!-- end -->\nafter\n")
    for _ in range(2):
        assert plot.main([str(tmp_path / "ablations.csv"), "--ablations", "--output", str(tmp_path)]) == 0
        begin = "before\n<!-- begin: plot.py --ablations -->\n"
        assert page.read_text() == f"{begin}{block}<!-- end -->\nafter\n"
    assert (tmp_path / "ablations.png").stat().st_size > 10_000
    page.write_text("no markers\n")
    assert plot.main([str(tmp_path / "ablations.csv"), "--ablations", "--output", str(tmp_path)]) == 2

"""Actors, critics and the choice of actions, against plain networks and by what may depend on what.

Mistakes put in, each of which makes a test here fail: the batch and agent axes exchanged in the joint input; a critic
blind to its opponents; DDPG critics that see them; initial weights by the padded width; padding that reaches a softmax;
Gumbel noise without a guard (u = 0) and two-hot ties (`logits == max`); one noise vector shared by all games; a greedy
choice that samples; a single softmax over an agent's force and message; random agents that follow their policy.
"""

import math

import numpy as np
import pytest
import torch
from conftest import is_discrete, make_args, make_games
from reference import own_columns, parts, plain
from torch import nn

GAMES = ["mixed", "simple_tag_v3", "simple_speaker_listener_v4", "simple_world_comm_v3"]


def build(script, env_id="mixed", relaxed=False, double=True, **changes):
    games = make_games(script, env_id, relaxed=relaxed)
    networks = script.Networks(games, make_args(script, **changes))
    return games, networks.double() if double else networks


def inputs(games, batch, dtype=torch.float64):
    obs = torch.randn(batch, *games.obs_mask.shape, dtype=dtype) * torch.from_numpy(games.obs_mask)
    return obs, torch.rand(batch, *games.action_mask.shape, dtype=dtype) * torch.from_numpy(games.action_mask)


# ---- Stacks and plain networks ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("batch", [1, 31, 32, 100])
def test_stacked_linear_is_a_linear_layer_per_agent(script, batch):
    """Forward and gradients, in both branches of the product."""
    layer = script.StackedLinear(torch.ones(3, 7), 5).double()
    x = torch.randn(3, batch, 7, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    assert out.shape == (3, batch, 5)
    factors = torch.randn_like(out)
    (out * factors).sum().backward()
    for i in range(3):
        linear = nn.Linear(7, 5, dtype=torch.float64)
        linear.weight.data, linear.bias.data = layer.weight[i].detach().T, layer.bias[i, 0].detach()
        own = x[i].detach().clone().requires_grad_()
        torch.testing.assert_close(out[i], linear(own))
        (linear(own) * factors[i]).sum().backward()
        torch.testing.assert_close(x.grad[i], own.grad)
        torch.testing.assert_close(layer.weight.grad[i].T, linear.weight.grad)
        torch.testing.assert_close(layer.bias.grad[i, 0], linear.bias.grad)


@pytest.mark.parametrize("env_id", GAMES)
@pytest.mark.parametrize("batch", [3, 50])
def test_networks_are_plain_networks_per_agent(script, env_id, batch):
    """Forward and gradients of actors and critics; x is everyone's observation, then everyone's action."""
    games, networks = build(script, env_id)
    obs, actions = inputs(games, batch)
    outputs, q_values = networks.actor(obs), networks.critic(obs, actions)
    assert outputs.shape == actions.shape and q_values.shape == obs.shape[:2]
    factors = torch.randn_like(outputs), torch.randn_like(q_values)
    ((outputs * factors[0]).sum() + (q_values * factors[1]).sum()).backward()
    agents = range(len(games.agents))
    joint = [obs[:, j, games.obs_mask[j]] for j in agents] + [actions[:, j, games.action_mask[j]] for j in agents]
    for i in agents:
        actor = plain(networks.actor, i, games.obs_mask[i].nonzero()[0], games.action_mask[i].nonzero()[0])
        critic = plain(networks.critic, i, slice(None), slice(None))
        output, q = actor(obs[:, i, games.obs_mask[i]]), critic(torch.cat(joint, 1))[:, 0]
        output = output if is_discrete(script) else output.tanh()
        torch.testing.assert_close(outputs[:, i, games.action_mask[i]], output)
        torch.testing.assert_close(q_values[:, i], q)
        ((output * factors[0][:, i, games.action_mask[i]]).sum() + (q * factors[1][:, i]).sum()).backward()
        for net, stack, rows in ((actor, networks.actor, games.obs_mask[i]), (critic, networks.critic, slice(None))):
            torch.testing.assert_close(stack.layer_1.weight.grad[i][rows].T, net[0].weight.grad)
            torch.testing.assert_close(stack.layer_2.weight.grad[i].T, net[2].weight.grad)
            torch.testing.assert_close(stack.layer_2.bias.grad[i, 0], net[2].bias.grad)


def test_change_replaces_the_own_action_alone(script):
    """Q_i with `change` is Q_i of a joint input in which agent i's entries, and only they, are replaced.

    A change of actions alone leaves the observations, several changes give their batches one after the other.
    """
    games, networks = build(script, "simple_world_comm_v3")
    (obs, actions), (other_obs, other_actions) = inputs(games, 40), inputs(games, 40)
    q_values = networks.critic(obs, actions, torch.cat([other_obs - obs, other_actions - actions], 2))
    changes = torch.stack([other_actions - actions, torch.zeros_like(actions), actions])
    for_changes = networks.critic(obs, actions, changes).unflatten(0, (3, 40))
    for i in range(len(games.agents)):
        mine_obs, mine_actions = obs.clone(), actions.clone()
        mine_obs[:, i], mine_actions[:, i] = other_obs[:, i], other_actions[:, i]
        torch.testing.assert_close(q_values[:, i], networks.critic(mine_obs, mine_actions)[:, i])
        for found, own in zip(for_changes, (other_actions, actions, 2 * actions), strict=True):
            mine_actions[:, i] = own[:, i]
            torch.testing.assert_close(found[:, i], networks.critic(obs, mine_actions)[:, i])


# ---- What depends on what --------------------------------------------------------------------------------------------
def test_actors_see_their_own_observation_alone(script):
    games, networks = build(script)
    obs, _ = inputs(games, 40)
    obs.requires_grad_()
    for i in range(3):
        (grad,) = torch.autograd.grad(networks.actor(obs)[:, i].square().sum(), obs)
        assert [grad[:, j].ne(0).any().item() for j in range(3)] == [j == i for j in range(3)]


def test_critics_see_everyone_and_samples_stay_apart(script):
    """Q_i of a sample depends on every true entry of that sample, of every agent, and on no other sample."""
    games, networks = build(script, "simple_tag_v3")
    obs, actions = (tensor.requires_grad_() for tensor in inputs(games, 40))
    q_values = networks.critic(obs, actions)
    for i in range(len(games.agents)):
        gradients = torch.autograd.grad(q_values[5, i], (obs, actions), retain_graph=True)
        for tensor, mask in zip(gradients, masks(games), strict=True):
            assert torch.equal(tensor[5].ne(0), mask)
            tensor[5] = 0
            assert tensor.eq(0).all()


def masks(games):
    return torch.from_numpy(games.obs_mask), torch.from_numpy(games.action_mask)


def test_ddpg_critics_see_their_own_alone(script):
    """No value, no gradient and no initial weight of a DDPG critic has to do with the others; the rest see everyone."""
    games, networks = build(script, ddpg_agents=("scout", "guard"))
    obs, actions = (tensor.requires_grad_() for tensor in inputs(games, 40))
    q_values = networks.critic(obs, actions)
    for i, central in enumerate([False, True, False]):
        for tensor in torch.autograd.grad(q_values[:, i].sum(), (obs, actions), retain_graph=True):
            assert [tensor[:, j].ne(0).any().item() for j in range(3)] == [central or j == i for j in range(3)]
    q_values.square().sum().backward()
    for i in (0, 2):
        others = np.setdiff1d(np.arange(networks.critic.layer_1.weight.shape[1]), own_columns(games, i))
        assert networks.critic.layer_1.weight[i, others].eq(0).all()
        assert networks.critic.layer_1.weight.grad[i, others].eq(0).all()
        assert networks.critic.layer_1.weight.grad[i, own_columns(games, i)].ne(0).any(1).all()


@pytest.mark.parametrize("env_id", GAMES)
def test_padding_changes_nothing(script, env_id):
    games, networks = build(script, env_id)
    obs, actions = inputs(games, 40)
    before = networks.actor(obs), networks.critic(obs, actions)
    obs_mask, action_mask = masks(games)
    obs, actions = obs + 1e3 * ~obs_mask, actions + 1e3 * ~action_mask
    assert torch.equal(networks.actor(obs), before[0])
    assert torch.equal(networks.critic(obs, actions), before[1])
    assert before[0][:, ~action_mask].eq(0).all()
    for noise in 0.0, 1.0:
        assert script.choose(networks.actor, obs, noise, None)[:, ~action_mask].eq(0).all()


def test_initial_weights_by_own_fan_in(script):
    """As `nn.Linear` draws them: uniform within 1 / sqrt(fan-in), by the own width and, for DDPG, the own entries."""
    games, networks = build(script, hidden_dim=400, ddpg_agents=("scout",), double=False)
    joint = games.obs_mask.sum() + games.action_mask.sum()
    widths = {
        networks.actor: games.obs_mask.sum(1),
        networks.critic: [len(own_columns(games, 0)), joint, joint],
    }
    for stack, fan_ins in widths.items():
        for layer, fans in ((stack.layer_1, fan_ins), (stack.layer_2, [400] * 3), (stack.layer_3, [400] * 3)):
            for i, fan_in in enumerate(fans):
                weight = layer.weight[i].detach().flatten()
                weight = weight[weight != 0] * math.sqrt(fan_in)
                assert weight.abs().max() <= 1 + 1e-6 and weight.abs().max() > 0.98
                assert weight.std() == pytest.approx(1 / math.sqrt(3), rel=0.07)
                assert layer.bias[i].abs().max() <= 1 / math.sqrt(fan_in) + 1e-6
                assert layer.bias[i].ne(0).all()
        assert not torch.equal(stack.layer_2.weight[0], stack.layer_2.weight[1])
    counts = networks.actor.layer_1.weight.ne(0).any(2)
    assert torch.equal(counts, torch.from_numpy(games.obs_mask))


def test_targets_begin_as_copies(script):
    _, networks = build(script)
    for online, target in (networks.actor, networks.target_actor), (networks.critic, networks.target_critic):
        for p, target_p in zip(online.parameters(), target.parameters(), strict=True):
            assert torch.equal(p, target_p) and p.data_ptr() != target_p.data_ptr() and not target_p.requires_grad


# ---- Acting ----------------------------------------------------------------------------------------------------------
def assert_valid(script, games, actions):
    """Exactly one-hot for each choice, or within (-1, 1); zeros elsewhere."""
    actions = actions.detach()
    assert torch.isfinite(actions).all()
    for i in range(len(games.agents)):
        if is_discrete(script):
            for part in parts(games, i):
                assert (actions[:, i, part].eq(1).sum(1) == 1).all()
                assert (actions[:, i, part].eq(0).sum(1) == len(part) - 1).all()
        else:
            assert actions[:, i].abs().max() <= 1
        assert actions[:, i, ~games.action_mask[i]].eq(0).all()


def test_greedy_is_the_policy_itself(script):
    """No noise: the largest logit of each choice, or tanh; the same every time, and no random number is used."""
    games, networks = build(script, "simple_reference_v3" if is_discrete(script) else "simple_world_comm_v3")
    obs, _ = inputs(games, 50)
    state = torch.get_rng_state()
    actions = script.choose(networks.actor, obs, 0.0, None)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(actions, script.choose(networks.actor, obs, 0.0, None))
    assert_valid(script, games, actions)
    outputs = networks.actor(obs)
    for i in range(len(games.agents)):
        for part in parts(games, i):
            if is_discrete(script):
                assert torch.equal(actions[:, i, part].argmax(1), outputs[:, i, part].argmax(1))
            else:
                torch.testing.assert_close(actions[:, i, part], outputs[:, i, part])


def test_noise_differs_between_games_agents_and_dimensions(script):
    """With one observation everywhere and equal networks, noise is all that differs, and it differs everywhere."""
    games, networks = build(script, "simple_spread_v3")
    with torch.no_grad():
        for parameter in networks.actor.parameters():
            parameter.zero_()
    obs = torch.ones(4000, *games.obs_mask.shape, dtype=torch.float64)
    actions = script.choose(networks.actor, obs, 1.0 if is_discrete(script) else 0.1, None).detach()
    if is_discrete(script):
        moves = actions.argmax(2)  # uniform over five, independent between agents
        frequencies = torch.zeros(5, 5, 5)
        for a, b, c in moves.tolist():
            frequencies[a, b, c] += 1 / len(moves)
        assert frequencies.max() < 0.02 and frequencies.min() > 0.0015
    else:
        noise = actions.flatten(1).numpy()
        assert len(np.unique(noise)) > 0.99 * noise.size
        assert np.abs(np.corrcoef(noise.T) - np.eye(15)).max() < 0.08
        np.testing.assert_allclose(noise.std(0), 0.1, rtol=0.08)
        np.testing.assert_allclose(noise.mean(0), 0, atol=0.01)


def test_noise_stays_within_bounds(script):
    games, networks = build(script)
    obs, _ = inputs(games, 500)
    assert_valid(script, games, script.choose(networks.actor, obs, 5.0, None))


def test_random_agents_act_uniformly_whatever_their_policy(script):
    """With noise and without; the agents beside them act by their policy."""
    games, networks = build(script, random_agents=("scout_1",))
    with torch.no_grad():
        networks.actor.layer_3.bias.mul_(100)
    obs, _ = inputs(games, 4000)
    assert networks.random_agents.tolist() == [False, True, False]
    actions = script.choose(networks.actor, obs, 0.0, networks.random_agents).detach()
    greedy = script.choose(networks.actor, obs, 0.0, None).detach()
    assert torch.equal(actions[:, [0, 2]], greedy[:, [0, 2]])
    assert_valid(script, games, actions)
    assert_valid(script, games, script.choose(networks.actor, obs, 0.0, torch.ones(3, dtype=torch.bool)))  # all random
    for part in parts(games, 1):
        if is_discrete(script):
            np.testing.assert_allclose(actions[:, 1, part].mean(0).numpy(), 1 / len(part), atol=0.04)
        else:
            quarters = torch.stack([torch.histc(column, 4, -1, 1) for column in actions[:, 1, part].T]) / len(actions)
            np.testing.assert_allclose(quarters.numpy(), 0.25, atol=0.04)
            assert np.abs(np.corrcoef(actions[:, 1, part].T.numpy()) - np.eye(len(part))).max() < 0.08


# ---- Discrete actions ------------------------------------------------------------------------------------------------
def gumbel_actor(script, relaxed=False, env_id="mixed"):
    games, networks = build(script, env_id, relaxed, double=False)
    return games, networks.actor


@pytest.mark.parametrize("extreme", [0.0, 1e-45, 0.5, 1 - 2**-24, "mixture"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_gumbel_noise_is_safe(discrete, monkeypatch, extreme, scale):
    """Uniform numbers of 0 and right below 1, logits of any size: finite, exactly one-hot, with finite gradients."""

    def rand_like(x):
        if extreme == "mixture":
            return torch.tensor([0.0, 1e-45, 0.5, 1 - 2**-24])[torch.randint(4, x.shape)]
        return torch.full_like(x, extreme)

    monkeypatch.setattr(torch, "rand_like", rand_like)
    games, actor = gumbel_actor(discrete)
    logits = (torch.randn(200, *games.action_mask.shape) * scale).requires_grad_()
    for temperature in 0.01, 1.0:
        assert_valid(discrete, games, discrete.gumbel_softmax(actor, logits, temperature))
        actions = discrete.gumbel_softmax(actor, logits, temperature, soft=True)
        assert torch.isfinite(actions).all()
        (grad,) = torch.autograd.grad((actions * torch.randn_like(actions)).sum(), logits)
        assert torch.isfinite(grad).all()


def test_ties_are_one_hot(discrete):
    games, actor = gumbel_actor(discrete)
    assert_valid(discrete, games, discrete.gumbel_softmax(actor, torch.zeros(5, *games.action_mask.shape), 0.0))


def test_gumbel_samples_are_the_softmax_s(discrete):
    """The frequencies of the samples are softmax(logits) of each choice, at any temperature."""
    games, actor = gumbel_actor(discrete)
    logits = torch.randn(1, *games.action_mask.shape)
    for temperature in 0.3, 1.0, 4.0:
        samples = discrete.gumbel_softmax(actor, logits.expand(20000, -1, -1), temperature)
        assert_valid(discrete, games, samples)
        for i in range(3):
            for part in parts(games, i):
                torch.testing.assert_close(
                    samples[:, i, part].mean(0), logits[0, i, part].softmax(0), atol=0.02, rtol=0
                )


def test_relaxed_play_has_the_temperature_of_training(discrete):
    """The greedy action of --relaxed is softmax(logits / temperature), what training's is without noise."""
    args = make_args(discrete, env_id="simple_v3", relaxed=True, gumbel_temperature=0.1)
    networks = discrete.Networks(make_games(discrete, "simple_v3", relaxed=True), args)
    obs = torch.randn(50, 1, 4)
    expected = (networks.actor(obs) / 0.1).softmax(2)
    torch.testing.assert_close(discrete.choose(networks.actor, obs, 0.0, None), expected)


def test_soft_samples(discrete, uniform):
    """softmax((logits + g) / temperature) of each choice, padding aside, with its gradient; one-hot at its largest."""
    games, actor = gumbel_actor(discrete)
    logits = torch.randn(30, *games.action_mask.shape, requires_grad=True)
    factors = torch.randn(logits.shape)
    actions = discrete.gumbel_softmax(actor, logits, 0.7, soft=True)
    (grad,) = torch.autograd.grad((actions * factors).sum(), logits)
    one_hot = discrete.gumbel_softmax(actor, logits, 0.7)
    assert_valid(discrete, games, one_hot)
    noise, other_noise = (-torch.log(-torch.log(drawn)) for drawn in uniform.drawn)
    for i in range(3):
        expected = torch.zeros_like(grad[:, i])
        for part in parts(games, i):
            own = logits[:, i, part].detach().requires_grad_()
            soft = ((own + noise[:, i, part]) / 0.7).softmax(1)
            torch.testing.assert_close(actions[:, i, part], soft)
            expected[:, part] = torch.autograd.grad((soft * factors[:, i, part]).sum(), own)[0]
            assert torch.equal(one_hot[:, i, part].argmax(1), (own + other_noise[:, i, part]).argmax(1))
        torch.testing.assert_close(grad[:, i], expected)
        assert actions[:, i, ~games.action_mask[i]].eq(0).all()


@pytest.mark.parametrize("env_id", ["simple_reference_v3", "simple_world_comm_v3", "simple_speaker_listener_v4"])
def test_relaxed_actions_are_one_softmax_for_each_part(discrete, uniform, env_id):
    """Force (5 entries) and message (the rest) each sum to 1; greedy is the noise-free softmax."""
    games, actor = gumbel_actor(discrete, True, env_id)
    obs, _ = inputs(games, 60, torch.float32)
    sampled, greedy = (discrete.choose(actor, obs, temperature, None).detach() for temperature in (1.0, 0.0))
    logits, noise, both = actor(obs), -torch.log(-torch.log(uniform.drawn[0])), 0
    for i, space in enumerate(games.action_spaces):
        width = space.shape[0]
        sizes = [5, width - 5] if width > 5 else [width]
        both += len(sizes) == 2
        own = games.action_mask[i].nonzero()[0]
        assert len(own) == width
        for part in np.split(own, np.cumsum(sizes)[:-1]):
            torch.testing.assert_close(greedy[:, i, part], logits[:, i, part].softmax(1))
            torch.testing.assert_close(sampled[:, i, part], (logits + noise)[:, i, part].softmax(1))
            torch.testing.assert_close(sampled[:, i, part].sum(1), torch.ones(60))
        assert greedy[:, i, ~games.action_mask[i]].eq(0).all()
    assert both == {"simple_reference_v3": 2, "simple_world_comm_v3": 1, "simple_speaker_listener_v4": 0}[env_id]

"""The replay buffer, the targets, the losses and `update`, against the paper's equations and a loop over agents.

Mistakes put in, each of which makes a test here fail: the online critic, or the online actor, in the targets; targets
that never move; tau and 1 - tau exchanged; a truncation that cuts the bootstrap (1 - next_alive for 1 - terminations);
joint input scrambled by a wrong order of its axes; a critic blind to its opponents; agent i's loss reaching actor j
(the joint policy's action in place of the stored ones); the actors' loss reaching the critics; the padded width in the
logit regulariser; agents that are gone still in the losses, or their stale observations in the others' targets; one
gradient norm for all agents; random agents that learn; a buffer that keeps the newest rows only in part; samples drawn
from rows that are still empty.
"""

import numpy as np
import pytest
import torch
from conftest import is_discrete, make_args, make_games, stored
from reference import Reference, paper_losses, paper_targets, random_batch

GAMES = ["mixed", "simple_tag_v3", "simple_world_comm_v3"]


def build(script, env_id="mixed", relaxed=False, **changes):
    """Networks in double precision whose four parts all differ, and everything that goes with them."""
    args = make_args(script, **changes)
    games = make_games(script, env_id, relaxed=relaxed)
    networks = script.Networks(games, args).double()
    reference = Reference(
        script,
        networks,
        games,
        args,
        ddpg=[i for i, agent in enumerate(games.agents) if agent in args.ddpg_agents],
        at_random=[i for i, agent in enumerate(games.agents) if agent in args.random_agents],
    )
    with torch.no_grad():  # targets of their own, as after some training
        for stacks, nets in (
            ((networks.target_actor, networks.actor), reference.target_actors),
            ((networks.target_critic, networks.critic), reference.target_critics),
        ):
            for target, online in zip(stacks[0].parameters(), stacks[1].parameters(), strict=True):
                target.copy_(0.5 * online)
            for net in nets:
                for parameter in net.parameters():
                    parameter.mul_(0.5)
    return args, games, networks, reference


def optimizers(networks, args):
    return (
        torch.optim.Adam(networks.actor.parameters(), args.actor_learning_rate),
        torch.optim.Adam(networks.critic.parameters(), args.critic_learning_rate),
    )


def grads(stack):
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in stack.parameters()]


# ---- Values ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("env_id", GAMES)
@pytest.mark.parametrize("batch", [20, 40])
def test_targets_and_losses_are_the_papers(script, env_id, batch, uniform):
    """Numpy, a sample and an agent at a time; both branches of the batched product."""
    args, games, networks, reference = build(script, env_id)
    data = random_batch(script, games, batch)

    def drawn(n):
        return uniform.drawn[n].numpy() if is_discrete(script) else [None] * batch

    targets = script.td_targets(networks, data, args)
    expected = paper_targets(reference, data, drawn(-1))
    acted = data.alive.numpy() == 1
    np.testing.assert_allclose(targets.numpy()[acted], expected[acted], atol=1e-10)

    losses, q_values = script.critic_loss(networks, data, args)
    expected = paper_targets(reference, data, drawn(-1))
    actor_losses = script.actor_loss(networks, data, args)
    critic_expected, actor_expected = paper_losses(reference, data, expected, drawn(-1))
    np.testing.assert_allclose(losses.detach().numpy(), critic_expected, atol=1e-10)
    np.testing.assert_allclose(actor_losses.detach().numpy(), actor_expected, atol=1e-10)
    q = networks.critic(data.obs, data.actions).detach().numpy()
    means = [q[acted[:, i], i].mean() for i in range(len(games.agents))]
    np.testing.assert_allclose(q_values.numpy(), means, atol=1e-10)
    assert not targets.requires_grad and not q_values.requires_grad


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(max_grad_norm=0.05),
        dict(ddpg_agents=("scout",)),
        dict(random_agents=("scout_1",)),
        dict(gamma=0.99, tau=0.3, actor_learning_rate=3e-3, critic_learning_rate=2e-2),
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_update_is_a_loop_over_agents(script, changes, uniform):
    """Three rounds: summed losses and one Adam step equal separate losses, networks and Adam steps for each agent."""
    args, games, networks, reference = build(script, **changes)
    both = optimizers(networks, args)
    for n in range(3):
        data = random_batch(script, games, 50, seed=n)
        uniform.drawn.clear()
        losses = script.update(networks, both, data, args)
        expected = reference.update(data, uniform.drawn)
        for name, values in expected.items():
            np.testing.assert_allclose(losses[name].numpy(), values, atol=1e-8)
    assert max(reference.differences(networks).values()) < 1e-8


@pytest.mark.parametrize("relaxed", [False, True])
@pytest.mark.parametrize("env_id", ["simple_tag_v3", "simple_speaker_listener_v4", "simple_reference_v3"])
def test_update_in_a_scenario(script, env_id, relaxed, uniform):
    if relaxed and not is_discrete(script):
        pytest.skip("relaxed is the discrete script's")
    args, games, networks, reference = build(script, env_id, relaxed)
    data = random_batch(script, games, 50)
    script.update(networks, optimizers(networks, args), data, args)
    reference.update(data, uniform.drawn)
    assert max(reference.differences(networks).values()) < 1e-8


def test_learning_rates_of_main(script, monkeypatch):
    """`main` hands the actors' optimiser first, the critics' second, each with its own rate and all its parameters."""
    seen = []
    update = script.update
    monkeypatch.setattr(script, "update", lambda *inputs: seen.append(inputs) or update(*inputs))
    networks, _, _ = script.main(make_args(script, actor_learning_rate=0.004, critic_learning_rate=0.03))
    _, (actor_optimizer, critic_optimizer), _, _ = seen[0]
    for optimizer, stack, rate in ((actor_optimizer, networks.actor, 0.004), (critic_optimizer, networks.critic, 0.03)):
        (group,) = optimizer.param_groups
        assert group["lr"] == rate
        assert [id(p) for p in group["params"]] == [id(p) for p in stack.parameters()]


# ---- Who reaches whom ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("env_id", GAMES)
def test_gradients_stay_with_their_agent(script, env_id):
    """Agent i's actor loss reaches actor i alone and no critic; its critic loss reaches critic i alone and no actor."""
    args, games, networks, _ = build(script, env_id)
    data = random_batch(script, games, 40)
    for i in range(len(games.agents)):
        networks.zero_grad()
        script.actor_loss(networks, data, args)[i].backward()
        for grad in grads(networks.actor):
            others = [j for j in range(len(games.agents)) if j != i]
            assert grad[others].eq(0).all() and grad[i].ne(0).any()
        assert all(grad.eq(0).all() for grad in grads(networks.critic))
        networks.zero_grad()
        script.critic_loss(networks, data, args)[0][i].backward()
        for grad in grads(networks.critic):
            assert grad[others].eq(0).all() and grad[i].ne(0).any()
        assert all(grad.eq(0).all() for grad in grads(networks.actor))
        assert all(p.grad is None for p in networks.target_actor.parameters())
        assert all(p.grad is None for p in networks.target_critic.parameters())
    assert all(p.requires_grad for p in networks.critic.parameters())


def test_other_agents_actions_come_from_the_buffer(script):
    """Actor i's loss and gradient do not depend on actor j's weights."""
    args, games, networks, _ = build(script, "simple_tag_v3")
    data = random_batch(script, games, 40)
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        networks.zero_grad()
        loss = script.actor_loss(networks, data, args)
        loss.sum().backward()
        results.append([loss[0].item(), *(grad[0] for grad in grads(networks.actor))])
        with torch.no_grad():
            for parameter in networks.actor.parameters():
                parameter[1:] += torch.randn_like(parameter[1:])
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-12)
    for first, second in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(first, second)


def test_targets_come_from_the_target_networks(script):
    """New online networks change no target; new target networks, of actors or of critics, do."""
    args, games, networks, _ = build(script)
    data = random_batch(script, games, 40)

    def targets():
        torch.manual_seed(1)
        return script.td_targets(networks, data, args)

    before = targets()
    for online in networks.actor, networks.critic:
        with torch.no_grad():
            for parameter in online.parameters():
                parameter.add_(torch.randn_like(parameter))
        assert torch.equal(targets(), before)
    for target in networks.target_actor, networks.target_critic:
        with torch.no_grad():
            for parameter in target.parameters():
                parameter.add_(torch.randn_like(parameter))
        assert not torch.allclose(targets(), before)
        before = targets()


@pytest.mark.parametrize("tau", [0.0, 0.01, 1.0])
def test_polyak(script, tau):
    """Both targets become (1 - tau) target + tau online, with the online weights from after the step."""
    args, games, networks, _ = build(script, tau=tau)
    pairs = (networks.actor, networks.target_actor), (networks.critic, networks.target_critic)
    before = [[p.clone() for p in target.parameters()] for _, target in pairs]
    script.update(networks, optimizers(networks, args), random_batch(script, games, 40), args)
    for (online, target), olds in zip(pairs, before, strict=True):
        for p, target_p, old in zip(online.parameters(), target.parameters(), olds, strict=True):
            torch.testing.assert_close(target_p, (1 - tau) * old + tau * p)


# ---- Ends ------------------------------------------------------------------------------------------------------------
def test_terminations_cut_the_bootstrap_of_their_agent_alone(script):
    args, games, networks, _ = build(script)
    data = random_batch(script, games, 40)
    data = data._replace(terminations=torch.zeros_like(data.alive), next_alive=torch.ones_like(data.alive))
    torch.manual_seed(1)
    free = script.td_targets(networks, data, args)
    data.terminations[:, 1] = 1
    torch.manual_seed(1)
    cut = script.td_targets(networks, data, args)
    assert torch.equal(cut[:, 1], data.rewards[:, 1])
    assert torch.equal(cut[:, [0, 2]], free[:, [0, 2]])
    assert (free != data.rewards).all()


def test_an_agent_truncated_alone_bootstraps_from_its_own_last_observation(script):
    """Its own target depends on that observation; the other agents' targets do not, nor on its policy there."""
    args, games, networks, _ = build(script)
    data = random_batch(script, games, 40)
    data.terminations[:], data.alive[:], data.next_alive[:] = 0, 1, 1
    data.next_alive[:, 0] = 0
    data.next_obs[:] = torch.randn_like(data.next_obs) * torch.from_numpy(games.obs_mask)
    targets = []
    for _ in range(2):
        torch.manual_seed(1)
        targets.append(script.td_targets(networks, data, args))
        data.next_obs[:, 0] += torch.from_numpy(games.obs_mask[0])
    assert (targets[0][:, 0] != targets[1][:, 0]).all()
    assert torch.equal(targets[0][:, 1:], targets[1][:, 1:])


def test_agents_that_are_gone_count_nowhere(script):
    """What stands in a gone agent's fields changes nothing; losses are means over the steps in which it acted."""
    args, games, networks, _ = build(script)
    data = random_batch(script, games, 60)
    gone, left = data.alive == 0, (data.next_alive == 0) & (data.terminations == 1)

    def losses():
        torch.manual_seed(1)
        critic_losses, q_values = script.critic_loss(networks, data, args)
        return torch.stack([critic_losses, q_values, script.actor_loss(networks, data, args)]).detach()

    before = losses()
    data.rewards[gone] = 1e6
    data.terminations[gone] = 1
    data.next_obs[gone | left] = 1e3
    torch.testing.assert_close(losses(), before)

    for i in range(3):
        rows = data.alive[:, i] == 1
        alone = script.Transitions(*(field[rows] for field in data))
        torch.testing.assert_close(
            script.critic_loss(networks, alone, args)[1][i], script.critic_loss(networks, data, args)[1][i]
        )
    data.alive[:, 0] = 0
    assert torch.isfinite(losses()).all() and losses()[:, 0].eq(0).all()


# ---- The step --------------------------------------------------------------------------------------------------------
def test_gradients_are_clipped_for_each_agent(script):
    """As `clip_grad_norm_` on each agent's own parameters, large and small gradients alike; 0 does not clip."""
    sizes = torch.tensor([100.0, 0.01, 3.0])
    for limit in 0.5, 0.0:
        weight, bias = (torch.nn.Parameter(torch.randn(3, 4, k, dtype=torch.float64)) for k in (5, 1))
        expected = [torch.autograd.grad((p.square().sum((1, 2)) * sizes).sum(), p)[0] for p in (weight, bias)]
        for i in range(3):
            own = [torch.nn.Parameter(torch.zeros_like(grad[i])) for grad in expected]
            for parameter, grad in zip(own, expected, strict=True):
                parameter.grad = grad[i].clone()
            if limit:
                torch.nn.utils.clip_grad_norm_(own, limit)
            for parameter, grad in zip(own, expected, strict=True):
                grad[i] = parameter.grad
        before = [weight.detach().clone(), bias.detach().clone()]
        losses = (weight.square().sum((1, 2)) + bias.square().sum((1, 2))) * sizes
        script.step_optimizer(torch.optim.SGD([weight, bias], 1.0), losses, limit)
        for parameter, start, grad in zip((weight, bias), before, expected, strict=True):
            torch.testing.assert_close(start - parameter.detach(), grad, rtol=1e-4, atol=1e-9)


def test_random_agents_do_not_learn_and_the_others_do(script):
    args, games, networks, _ = build(script, random_agents=("scout_1",), max_grad_norm=0.5)
    before = {name: value.clone() for name, value in networks.state_dict().items()}
    both = optimizers(networks, args)
    for n in range(3):
        script.update(networks, both, random_batch(script, games, 40, seed=n), args)
    for part in "actor", "critic":
        for name, parameter in getattr(networks, part).named_parameters():
            changed = (parameter != before[f"{part}.{name}"]).flatten(1).any(1)
            assert changed.tolist() == [True, False, True], f"{part}.{name}"


def test_padding_stays_out_of_learning(script):
    """After rounds of updates the weights of padded inputs are still zero, and padded outputs have not moved."""
    args, games, networks, _ = build(script, "simple_world_comm_v3")
    before = networks.actor.layer_3.weight.detach().clone()
    both = optimizers(networks, args)
    for n in range(3):
        script.update(networks, both, random_batch(script, games, 40, seed=n), args)
    for actor in networks.actor, networks.target_actor:
        assert actor.layer_1.weight[~torch.from_numpy(games.obs_mask)].eq(0).all()
    padded = ~torch.from_numpy(games.action_mask)
    assert padded.any()
    after = networks.actor.layer_3.weight.detach()
    assert torch.equal(after.mT[padded], before.mT[padded])
    assert not torch.equal(after.mT[~padded], before.mT[~padded])


# ---- The replay buffer -----------------------------------------------------------------------------------------------
def rows_of(games, first, count):
    """Rows whose every number tells the step, the agent and the place."""
    shapes = [games.obs_mask.shape] * 2 + [games.action_mask.shape] + [(len(games.agents),)] * 4
    fields = [np.arange(np.prod(shape)).reshape(shape) / 64 + 8 * k for k, shape in enumerate(shapes)]
    return [np.stack([field + 100 * (first + n) for n in range(count)]) for field in fields]


def test_buffer_keeps_the_last_rows_in_order(script):
    games = make_games(script)
    rb = script.ReplayBuffer(10, games, torch.device("cpu"))
    everything = rows_of(games, 0, 24)
    for start in range(0, 24, 4):
        rb.add(*(field[start : start + 4] for field in everything))
        kept = sorted(range(max(0, start + 4 - 10), start + 4), key=lambda n: n % 10)
        for field, expected in zip(stored(rb), everything, strict=True):
            np.testing.assert_array_equal(field, expected[kept].astype(np.float32))


def test_samples_are_whole_rows_uniform_and_with_replacement(script):
    games = make_games(script)
    rb = script.ReplayBuffer(1000, games, torch.device("cpu"))
    everything = rows_of(games, 1, 7)
    rb.add(*everything)
    data = rb.sample(7000)
    assert type(data) is script.Transitions
    assert data._fields == ("obs", "next_obs", "actions", "rewards", "terminations", "alive", "next_alive")
    drawn = (data.rewards[:, 0] / 100).long().numpy() - 1
    assert np.bincount(drawn, minlength=7).min() > 850 and len(np.bincount(drawn)) == 7
    for field, expected in zip(data, everything, strict=True):
        np.testing.assert_array_equal(field.numpy(), expected[drawn].astype(np.float32))
    assert not torch.equal(data.rewards, rb.sample(7000).rewards)

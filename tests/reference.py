"""MADDPG written a second time, agent by agent, from the paper's equations: what the tests compare with.

`Reference` has plain torch networks per agent and an optimiser for each; `paper_*` are numpy, a sample at a time.
"""

import copy

import numpy as np
import torch
from gymnasium import spaces
from torch import nn


def choice_sizes(games, i):
    """How many options each of agent i's choices has; a continuous action is one part with all its numbers."""
    space = games.action_spaces[i]
    if isinstance(space, spaces.Discrete):
        return [int(space.n)]
    if isinstance(space, spaces.MultiDiscrete):
        return space.nvec.ravel().tolist()
    width = spaces.flatdim(space)
    return [5, width - 5] if getattr(games, "relaxed", False) and width > 5 else [width]  # mpe2: force and message


def parts(games, i):
    """Where agent i's choices lie among the padded action entries."""
    return np.split(games.action_mask[i].nonzero()[0], np.cumsum(choice_sizes(games, i))[:-1])


def random_batch(script, games, batch, seed=0, dtype=torch.float64):
    """Made-up transitions with everything that can happen: acting on, terminated, truncated alone, gone before."""
    rng, n_agents = np.random.default_rng(seed), len(games.agents)
    fate = rng.choice(["on", "terminated", "truncated", "gone"], p=[0.55, 0.15, 0.15, 0.15], size=(batch, n_agents))
    alive, next_alive, terminations = fate != "gone", fate == "on", fate == "terminated"
    obs, next_obs = rng.normal(size=(2, batch, *games.obs_mask.shape)) * games.obs_mask * alive[:, :, None]
    actions = np.zeros((batch, *games.action_mask.shape))
    for i in range(n_agents):
        for part in parts(games, i):
            if script.__name__ == "maddpg_discrete":
                actions[np.arange(batch), i, rng.choice(part, batch)] = 1
            else:
                actions[:, i, part] = rng.uniform(-1, 1, (batch, len(part)))
    fields = obs, next_obs, actions * alive[:, :, None], rng.normal(size=alive.shape) * alive
    fields += terminations, alive, next_alive
    return script.Transitions(*(torch.tensor(field.astype(float), dtype=dtype) for field in fields))


def plain(stack, i, inputs, outputs):
    """Agent i's network out of a stack, as plain linear layers on its own inputs and outputs."""
    layers = []
    for layer, rows, columns in (
        (stack.layer_1, inputs, slice(None)),
        (stack.layer_2, slice(None), slice(None)),
        (stack.layer_3, slice(None), outputs),
    ):
        weight, bias = layer.weight[i][rows][:, columns], layer.bias[i, 0, columns]
        linear = nn.Linear(*weight.shape, dtype=weight.dtype)
        linear.weight.data, linear.bias.data = weight.detach().T.clone(), bias.detach().clone()
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def own_columns(games, i):
    """Which entries of the joint input (all observations, then all actions, without padding) are agent i's."""
    obs_widths, action_widths = games.obs_mask.sum(1), games.action_mask.sum(1)
    obs = np.arange(obs_widths[i]) + obs_widths[:i].sum()
    return np.concatenate([obs, np.arange(action_widths[i]) + action_widths[:i].sum() + obs_widths.sum()])


class Reference:
    """A loop over agents, each with its own networks, its own losses, and its own two Adam optimisers."""

    def __init__(self, script, networks, games, args, ddpg=(), at_random=()):
        self.discrete, self.games, self.args = script.__name__ == "maddpg_discrete", games, args
        self.agents, self.ddpg, self.at_random = range(len(games.agents)), ddpg, at_random
        self.obs = [games.obs_mask[i].nonzero()[0] for i in self.agents]
        self.entries = [games.action_mask[i].nonzero()[0] for i in self.agents]
        self.seen = [own_columns(games, i) if i in ddpg else slice(None) for i in self.agents]
        self.actors = [plain(networks.actor, i, self.obs[i], self.entries[i]) for i in self.agents]
        self.critics = [plain(networks.critic, i, self.seen[i], slice(None)) for i in self.agents]
        self.target_actors, self.target_critics = copy.deepcopy(self.actors), copy.deepcopy(self.critics)
        adam = torch.optim.Adam
        self.actor_optimizers = [adam(net.parameters(), args.actor_learning_rate) for net in self.actors]
        self.critic_optimizers = [adam(net.parameters(), args.critic_learning_rate) for net in self.critics]

    def policy(self, actor, i, obs, uniform, soft=False):
        """Agent i's action, where discrete a one-hot sample or a soft one, and its logits."""
        output = actor(obs[:, i, self.obs[i]])
        if not self.discrete:
            return output.tanh(), output
        gumbel = -torch.log(-torch.log(uniform[:, i, self.entries[i]]))
        return self.sample((output + gumbel) / self.args.gumbel_temperature, i, soft), output

    def sample(self, scores, i, soft=False):
        pieces = []
        for score in scores.split(choice_sizes(self.games, i), 1):
            piece = score.softmax(1)
            if not soft and not self.games.relaxed:
                largest = piece.argmax(1)
                piece = torch.zeros_like(piece)
                piece[torch.arange(len(piece)), largest] = 1
            pieces.append(piece)
        return torch.cat(pieces, 1)

    def at_random_action(self, i, uniform):
        uniform = uniform[:, i, self.entries[i]]
        return self.sample(-torch.log(-torch.log(uniform)), i) if self.discrete else 2 * uniform - 1

    def q_value(self, critic, i, observations, actions):
        return critic(torch.cat([*observations, *actions], 1)[:, self.seen[i]])[:, 0]

    def value(self, i, own, observations, actions):
        """Q_i at agent i's action `own`; discrete: at each one-hot action of each choice, weighed by `own`."""
        if not self.discrete or self.games.relaxed:
            joint = [own if j == i else actions[j] for j in self.agents]
            return self.q_value(self.critics[i], i, observations, joint)
        total, start = 0, 0
        for size in choice_sizes(self.games, i):
            for entry in range(start, start + size):
                chosen = actions[i].clone()
                chosen[:, start : start + size] = 0
                chosen[:, entry] = 1
                joint = [chosen if j == i else actions[j] for j in self.agents]
                total = total + own[:, entry] * self.q_value(self.critics[i], i, observations, joint).detach()
            start += size
        return total

    def mean(self, values, alive):
        return values[alive == 1].sum() / max(int(alive.sum()), 1)

    def update(self, data, drawn):
        """A round. `drawn` are the uniform numbers that the script used, in its order. Returns the losses."""
        drawn, losses = list(drawn), {"critic_loss": [], "actor_loss": []}
        noise = drawn.pop(0) if self.discrete else None
        other_noise = drawn.pop(0) if len(self.at_random) else None
        with torch.no_grad():
            next_actions = [self.policy(net, i, data.next_obs, noise)[0] for i, net in enumerate(self.target_actors)]
            for i in self.at_random:
                next_actions[i] = self.at_random_action(i, other_noise)
        observations = [data.obs[:, j, self.obs[j]] for j in self.agents]
        actions = [data.actions[:, j, self.entries[j]] for j in self.agents]
        for i in self.agents:
            there = [data.next_alive[:, [j]] if j != i else 1 for j in self.agents]
            with torch.no_grad():
                next_x = [data.next_obs[:, j, self.obs[j]] * there[j] for j in self.agents]
                next_a = [next_actions[j] * there[j] for j in self.agents]
                next_q = self.q_value(self.target_critics[i], i, next_x, next_a)
                y = data.rewards[:, i] + self.args.gamma * (1 - data.terminations[:, i]) * next_q
            q = self.q_value(self.critics[i], i, observations, actions)
            loss = self.mean((q - y) ** 2, data.alive[:, i])
            losses["critic_loss"].append(loss.item())
            self.step(i, self.critics[i], self.critic_optimizers[i], loss)
        noise = drawn.pop(0) if self.discrete else None
        for i in self.agents:
            own, logits = self.policy(self.actors[i], i, data.obs, noise, soft=True)
            values = -self.value(i, own, observations, actions)
            if self.discrete:
                values = values + self.args.logit_regularization * (logits**2).mean(1)
            loss = self.mean(values, data.alive[:, i])
            losses["actor_loss"].append(loss.item())
            self.step(i, self.actors[i], self.actor_optimizers[i], loss)
        for online, target in (self.actors, self.target_actors), (self.critics, self.target_critics):
            for net, target_net in zip(online, target, strict=True):
                for p, target_p in zip(net.parameters(), target_net.parameters(), strict=True):
                    target_p.data = (1 - self.args.tau) * target_p.data + self.args.tau * p.data
        return losses

    def step(self, i, net, optimizer, loss):
        if i in self.at_random:
            return
        optimizer.zero_grad()
        for parameter, gradient in zip(net.parameters(), torch.autograd.grad(loss, net.parameters()), strict=True):
            parameter.grad = gradient
        if self.args.max_grad_norm:
            nn.utils.clip_grad_norm_(net.parameters(), self.args.max_grad_norm)
        optimizer.step()

    def differences(self, networks):
        """The largest difference of any weight from the stacked networks': {network: number}."""
        worst = {}
        for name, nets in (
            ("actor", self.actors),
            ("critic", self.critics),
            ("target_actor", self.target_actors),
            ("target_critic", self.target_critics),
        ):
            rows, columns = (self.obs, self.entries) if "actor" in name else (self.seen, [slice(None)] * len(nets))
            for i, net in enumerate(nets):
                stacked = plain(getattr(networks, name), i, rows[i], columns[i])
                pairs = zip(net.parameters(), stacked.parameters(), strict=True)
                worst[name] = max(worst.get(name, 0), *((a - b).abs().max().item() for a, b in pairs))
        return worst


# ---- The equations in numpy, a sample at a time ----------------------------------------------------------------------
def numpy_network(net, x):
    layers = [layer for layer in net if isinstance(layer, nn.Linear)]
    for layer in layers[:-1]:
        x = np.maximum(layer.weight.detach().numpy() @ x + layer.bias.detach().numpy(), 0)
    return layers[-1].weight.detach().numpy() @ x + layers[-1].bias.detach().numpy()


def numpy_policy(reference, actor, i, obs, uniform, soft=False):
    """mu_i(o_i) of one sample, and its logits; `uniform` are that sample's and agent's numbers."""
    output = numpy_network(actor, obs[i, reference.obs[i]])
    if not reference.discrete:
        return np.tanh(output), output
    scores, action, start = output - np.log(-np.log(uniform[i, reference.entries[i]])), [], 0
    for size in choice_sizes(reference.games, i):
        score = scores[start : start + size]
        if soft:
            weights = np.exp((score - score.max()) / reference.args.gumbel_temperature)
            action += (weights / weights.sum()).tolist()
        else:
            action += np.eye(size)[score.argmax()].tolist()
        start += size
    return np.array(action), output


def numpy_q(reference, critic, i, observations, actions):
    joint = np.concatenate([*observations, *actions])
    return numpy_network(critic, joint[reference.seen[i]])[0]


def paper_targets(reference, data, uniform):
    """y_i of every sample and agent."""
    d, n = [field.numpy() for field in data], len(reference.agents)
    targets = np.zeros(d[3].shape)
    for b, (_, next_obs, _, rewards, terminations, _, next_alive) in enumerate(zip(*d, strict=True)):
        for i in reference.agents:
            observations, actions = [], []
            for j in range(n):
                action = numpy_policy(reference, reference.target_actors[j], j, next_obs, uniform[b])[0]
                there = 1 if j == i else next_alive[j]
                observations.append(next_obs[j, reference.obs[j]] * there)
                actions.append(action * there)
            next_q = numpy_q(reference, reference.target_critics[i], i, observations, actions)
            targets[b, i] = rewards[i] + reference.args.gamma * (1 - terminations[i]) * next_q
    return targets


def paper_losses(reference, data, targets, uniform):
    """Both losses of every agent, with the critics as they are."""
    d, n = [field.numpy() for field in data], len(reference.agents)
    critic_losses, actor_losses = [[] for _ in range(n)], [[] for _ in range(n)]
    for b, (obs, _, stored_actions, _, _, alive, _) in enumerate(zip(*d, strict=True)):
        for i in alive.nonzero()[0]:
            observations = [obs[j, reference.obs[j]] for j in range(n)]
            actions = [stored_actions[j, reference.entries[j]] for j in range(n)]
            q = numpy_q(reference, reference.critics[i], i, observations, actions)
            critic_losses[i].append((q - targets[b, i]) ** 2)
            own, logits = numpy_policy(reference, reference.actors[i], i, obs, uniform[b], soft=True)
            stored, loss, start = actions[i], 0, 0
            for size in choice_sizes(reference.games, i) if reference.discrete else ():
                for entry in range(start, start + size):
                    actions[i] = np.where((np.arange(len(stored)) - start) // size == 0, 0, stored)
                    actions[i][entry] = 1
                    loss -= own[entry] * numpy_q(reference, reference.critics[i], i, observations, actions)
                start += size
            if reference.discrete:
                loss += reference.args.logit_regularization * np.mean(logits**2)
            else:
                actions[i] = own
                loss = -numpy_q(reference, reference.critics[i], i, observations, actions)
            actor_losses[i].append(loss)
    return np.array([np.mean(x) for x in critic_losses]), np.array([np.mean(x) for x in actor_losses])

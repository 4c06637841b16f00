"""Compiled rounds beside eager ones, and a GPU beside the CPU. Without a compiler, or a GPU, what needs it is skipped.

Mistakes put in, each of which makes a test here fail: rounds that are not compiled under --compile; a compiled round
that leaves the targets where they are; evaluation that reads every GPU's random numbers. On a GPU nothing was put in;
first rounds on the default stream made recording fail there, after six runs of one process, for which there is a test.
"""

import functools
import shutil

import numpy as np
import pytest
import torch
from conftest import is_discrete, make_args, stored
from reference import random_batch
from test_algorithm import build
from torch._inductor import config as inductor

CPU = "cpu"
GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")


def rounds(script, device, learn, number=20, seed=None, **changes):
    """Losses of every round, and all weights after the last, in double precision.

    Every round has data and random numbers of its own, or the data of `seed` and random numbers that go on.
    """
    torch.manual_seed(7)
    args, games, networks, _ = build(script, cuda=device == "cuda", **changes)
    networks.to(device)
    adam = functools.partial(torch.optim.Adam, fused=True, capturable=args.cuda)  # as in `main`
    rates = (networks.actor, args.actor_learning_rate), (networks.critic, args.critic_learning_rate)
    optimizers = tuple(adam(network.parameters(), lr=rate) for network, rate in rates)
    losses = []
    for n in range(number):
        data = random_batch(script, games, 50, seed=n if seed is None else seed)
        if seed is None:
            torch.manual_seed(n)
        results = learn(networks, optimizers, script.Transitions(*(field.to(device) for field in data)), args)
        losses.append([values.cpu().numpy() for values in results.values()])
    return np.array(losses), [parameter.detach().cpu().numpy() for parameter in networks.parameters()]


def assert_equal(these, those):
    np.testing.assert_allclose(these[0], those[0], atol=1e-7)
    for a, b in zip(these[1], those[1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)


@needs_compiler
@pytest.mark.parametrize("device", [CPU, GPU])
def test_compiled_rounds_are_the_eager_ones(script, device):
    torch.compiler.reset()
    learn = torch.compile(script.update)
    learn = learn if device == CPU else script.OneLaunch(learn)
    with inductor.patch(fallback_random=True):  # the eager random numbers
        assert_equal(rounds(script, device, learn), rounds(script, device, script.update))


@pytest.mark.parametrize("device", [GPU])
def test_recorded_rounds_draw_new_random_numbers(script, device):
    """Nothing is learned and the data stay: the losses of a sampled policy differ all the same, round by round."""
    torch.compiler.reset()
    frozen = dict(seed=1, number=10, tau=0.0, actor_learning_rate=0.0, critic_learning_rate=0.0)
    losses, _ = rounds(script, device, script.OneLaunch(torch.compile(script.update)), **frozen)
    assert len(np.unique(losses[:, 0], axis=0)) == (10 if is_discrete(script) else 1)


@pytest.mark.parametrize("changes", [dict(), dict(max_grad_norm=0.05, ddpg_agents=["scout"], random_agents=["guard"])])
@pytest.mark.parametrize("device", [GPU])
def test_recording_while_older_rounds_are_still_in_memory(script, device, changes):
    """Autograd's nodes of the first rounds are alive, as until Python collects its garbage: the stream is theirs."""
    held = []

    def learn(networks, optimizers, data, args):
        held.append(script.critic_loss(networks, data, args)[0] + script.actor_loss(networks, data, args))
        return script.update(networks, optimizers, data, args)

    recorded = script.OneLaunch(learn)
    assert_equal(rounds(script, device, recorded, **changes), rounds(script, device, learn, **changes))


@pytest.mark.parametrize("device", [GPU])
def test_rounds_on_a_gpu_are_those_of_the_cpu(script, device, monkeypatch):
    uniform = torch.rand_like
    monkeypatch.setattr(torch, "rand_like", lambda like, **_: uniform(like, device="cpu").to(like.device))
    assert_equal(rounds(script, device, script.update), rounds(script, "cpu", script.update))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("device", [CPU, GPU])
@inductor.patch(deterministic=True)
def test_a_run_resumes_as_if_it_had_not_stopped(script, device, compiling, num_workers):
    """Its weights and its steps, bit for bit, evaluations and checkpoints or none; its model plays alike on the CPU.

    Compiled without choosing kernels by their times on the GPU: each compilation may choose others, whose sums differ.
    """
    if device == CPU and compiling:
        pytest.skip("takes a minute and adds nothing")
    flags = dict(cuda=device == "cuda", compile=compiling, num_envs=4, num_workers=num_workers)
    flags["env_id"] = "simple_speaker_listener_v4"
    torch.compiler.reset()
    recorded = dict(eval_frequency=100, checkpoint_frequency=100)
    networks, rb, run = script.main(make_args(script, total_timesteps=600, **flags, **recorded))
    assert networks.learns.is_cuda == rb.rows.is_cuda == flags["cuda"]
    half = script.main(make_args(script, **flags))[2]
    resumed, resumed_rb, _ = script.main(make_args(script, total_timesteps=600, resume=str(half), **flags))
    for a, b in zip(networks.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(stored(rb), stored(resumed_rb), strict=True):
        assert np.array_equal(a, b)
    args = make_args(script, evaluate=str(run), eval_episodes=10, env_id=flags["env_id"])
    games = script.Games(script.game_maker(args), 10)
    returns, _ = script.evaluate(networks, games, 10, args.seed + script.EVAL_SEEDS, None)
    np.testing.assert_allclose(script.play(args), returns, rtol=1e-4)


@pytest.mark.parametrize("device", [CPU, GPU])
def test_evaluation_asks_only_its_own_device(script, device, monkeypatch):
    """On a machine with GPUs a run on the CPU leaves them alone: their random numbers are not even read."""
    asked, fork = [], torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: asked.append(len(devices)) or fork(devices))
    script.main(make_args(script, cuda=device == "cuda"))
    assert set(asked) == {int(device == "cuda")}


@pytest.mark.parametrize("device", [CPU, GPU])
def test_compile_is_for_the_update(script, device, monkeypatch):
    """`main` makes every round with the compiled update and, on a GPU, records it."""
    calls = []
    monkeypatch.setattr(torch, "compile", lambda learn: lambda *inputs: calls.append(learn) or learn(*inputs))
    script.main(make_args(script, compile=True, cuda=device == "cuda"))  # 9 rounds
    assert calls == [script.update] * (9 if device == CPU else 4)

"""It learns: a tiny game with a known optimum, and simple_spread beyond the reach of broken variants.

Mistakes put in, and what simple_spread's agents then earned each, in the continuous and the discrete script: the
actors' loss with the wrong sign (-71, -35); another row's action stored in place of the executed one (-56, -31);
observations reshaped across samples and agents (-27, -34); another row's reward (-32, -39); targets that never move
(-35, -37); obs as next_obs (-31, -29); critics that are not trained (-39, -53).
"""

from conftest import make_args, make_games


def greedy_return(script, networks, env_id, episodes):
    games = make_games(script, env_id, num_games=10)
    return script.evaluate(networks, games, episodes, 77, None)[0].mean(0)


def test_a_game_with_a_known_optimum_is_solved(script):
    """Random play earns 0.5 each. The reward comes a step after what earned it, so the targets must carry it back."""
    args = make_args(
        script,
        env_id="memory",
        total_timesteps=3000,
        learning_starts=300,
        train_frequency=4,
        batch_size=128,
        hidden_dim=32,
        actor_learning_rate=3e-3,
        critic_learning_rate=1e-2,
        tau=0.05,
    )
    networks, _, _ = script.main(args)
    assert greedy_return(script, networks, "memory", 100).min() > 0.97


SPREAD = dict(
    env_id="simple_spread_v3",
    num_envs=25,
    total_timesteps=20_000,
    learning_starts=4_000,
    train_frequency=8,
    batch_size=256,
    hidden_dim=64,
    actor_learning_rate=3e-3,
    critic_learning_rate=3e-3,
    eval_episodes=10,
)


def test_simple_spread_is_learned(script):
    """2,000 rounds earn -19.6 to -20.4 each; random play -25, an untrained policy -23 to -38."""
    networks, _, _ = script.main(make_args(script, **SPREAD))
    assert greedy_return(script, networks, "simple_spread_v3", 100).mean() > -22.5

"""It learns: a tiny game with a known optimum, and simple_spread beyond the reach of broken variants."""

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

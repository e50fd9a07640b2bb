"""The learning rate of every step, and which parameters decay."""

import pytest
import torch

from model import GPT, GPTConfig
from optimizer import OptimizerConfig, learning_rate, make_optimizer

CONFIG = OptimizerConfig(learning_rate=1.0, warmup_steps=10, decay=0.5)


def test_learning_rate_rises_stays_and_falls_to_almost_nothing():
    rates = [learning_rate(step, 100, CONFIG) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10:51] == [1.0] * 41
    assert rates[50:] == sorted(rates[50:], reverse=True)
    assert rates[75] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.02)


def test_length_of_the_run_does_not_matter_before_the_decay():
    for step in range(50):
        assert learning_rate(step, 100, CONFIG) == learning_rate(step, 10_000, CONFIG)


@pytest.mark.parametrize("max_steps", [1, 2, 3])
def test_short_run_still_learns(max_steps):
    assert all(learning_rate(step, max_steps, CONFIG) > 0 for step in range(max_steps))


def test_every_parameter_is_moved_and_only_matrices_decay():
    model = GPT(GPTConfig(8, 1, 1, 4), 5)
    optimizer = make_optimizer(model, OptimizerConfig(weight_decay=0.5))
    decaying, others = (group["params"] for group in optimizer.param_groups)
    assert len(decaying) + len(others) == len(list(model.parameters()))
    assert {p.dim() for p in decaying} == {2}
    assert {p.dim() for p in others} == {1}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]


def test_first_step_is_adamw_written_out():
    parameter = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(parameter.weight, 2.0)
    optimizer = make_optimizer(parameter, OptimizerConfig(learning_rate=0.1, weight_decay=0.5))
    parameter.weight.grad = torch.full_like(parameter.weight, 3.0)
    optimizer.step()
    # After one step the mean over the root of the mean square is the sign of the gradient.
    assert parameter.weight.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be more than 0"),
        ({"decay": 1.5}, "decay is 1.5"),
        ({"beta2": 1.0}, "beta2 is 1.0"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"grad_clip": 0.0}, "grad_clip is 0.0"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**settings)

"""AdamW with its parameter groups, and the learning rate of every step."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import nn


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights are moved."""

    learning_rate: Annotated[float, "highest learning rate of the run"] = 2e-3
    warmup_steps: Annotated[int, "steps in which the learning rate rises from 0"] = 50
    decay: Annotated[float, "share of the run, at its end, in which it falls to 0"] = 0.6
    weight_decay: Annotated[float, "pull of matrices and embeddings towards 0"] = 0.1
    beta1: Annotated[float, "memory of AdamW's mean of gradients"] = 0.9
    beta2: Annotated[float, "memory of AdamW's mean of squared gradients"] = 0.99
    grad_clip: Annotated[float, "gradients longer than this are shortened to it"] = 1.0

    def __post_init__(self):
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be more than 0")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; it must be 0 or more")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay is {self.decay}; it must be more than 0 and at most 1")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay is {self.weight_decay}; it must be 0 or more")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be from 0 to below 1")
        if not self.grad_clip > 0:
            raise ValueError(f"grad_clip is {self.grad_clip}; it must be more than 0")


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW over all parameters; only matrices and embeddings decay.

    "Decoupled Weight Decay Regularization" (Loshchilov and Hutter, 2019), algorithm 2.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        # Biases and norms only shift and scale: nothing is gained by keeping them small.
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)


def memory_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Return what AdamW remembers of each parameter once it has made a step, and in what shape."""
    return {
        f"{name}.{what}": shape
        for name, parameter in model.named_parameters()
        for what, shape in [
            ("step", torch.Size()),
            ("exp_avg", parameter.shape),
            ("exp_avg_sq", parameter.shape),
        ]
    }


def learning_rate(step: int, max_steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of a step: it rises, stays, and falls linearly to almost 0.

    Until it falls it does not depend on max_steps, so a run can still be made longer. "Scaling
    Laws and Compute-Optimal Training Beyond Fixed Training Durations" (Hägele et al., 2024).
    """
    rise = (step + 1) / (config.warmup_steps + 1)
    fall = (max_steps - step) / (config.decay * max_steps)
    return config.learning_rate * min(1.0, rise, fall)

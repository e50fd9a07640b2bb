"""Muon for the matrices of the blocks, AdamW for the rest, and the schedule of both."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

MOMENTUM_WARMUP = 300
# What a step makes of a higher rate may be no number in float32 any more.
LARGEST = 1e30


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights are moved."""

    optimizer: Annotated[
        Literal["muon", "adamw"], "muon: for the blocks' matrices, adamw for the rest"
    ] = "muon"
    learning_rate: Annotated[float, "highest learning rate of AdamW"] = 1.2e-2
    muon_learning_rate: Annotated[float, "highest learning rate of Muon"] = 0.02
    warmup_steps: Annotated[int, "steps in which the learning rates rise from 0"] = 20
    decay: Annotated[float, "share of the run, at its end, in which they fall to 0"] = 0.7
    weight_decay: Annotated[float, "pull of AdamW's matrices and embeddings towards 0"] = 0.1
    muon_momentum: Annotated[float, "memory of Muon's mean of gradients"] = 0.95
    beta1: Annotated[float, "memory of AdamW's mean of gradients"] = 0.9
    beta2: Annotated[float, "memory of AdamW's mean of squared gradients"] = 0.99
    grad_clip: Annotated[float, "gradients longer than this are shortened to it"] = 1.0

    def __post_init__(self):
        for name in ("learning_rate", "muon_learning_rate", "grad_clip"):
            if not 0 < getattr(self, name) <= LARGEST:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be more than 0, at most {LARGEST:g}"
                )
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; it must be 0 or more")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay is {self.decay}; it must be more than 0 and at most 1")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay is {self.weight_decay}; it must be 0 or more")
        for name, lowest in [("muon_momentum", 0.1), ("beta1", 0.0), ("beta2", 0.0)]:
            value = getattr(self, name)
            if not lowest <= value < 1:
                raise ValueError(f"{name} is {value}; it must be from {lowest:g} to below 1")


class Optimizer:
    """Parameters in groups, each with settings of its own, and what is remembered of them.

    It stands for torch.optim.Optimizer: making one of those imports torch's compiler, which takes
    longer than everything else that happens before the first step.
    """

    def __init__(self, param_groups: list[dict[str, Any]]):
        self.param_groups = param_groups
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}

    def step(self) -> None:
        """Move every parameter once."""
        raise NotImplementedError


class AdamW(Optimizer):
    """Means of gradients over roots of means of their squares, with decoupled weight decay.

    "Decoupled Weight Decay Regularization" (Loshchilov and Hutter, 2019), algorithm 2.
    """

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter; torch's function does the arithmetic."""
        for group in self.param_groups:
            parameters, (beta1, beta2) = group["params"], group["betas"]
            for parameter in parameters:
                if parameter not in self.state:
                    self.state[parameter] = {
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                        "step": torch.zeros((), device=parameter.device),
                    }
            memory = [self.state[parameter] for parameter in parameters]
            adamw(
                parameters,
                [parameter.grad for parameter in parameters],
                [of["exp_avg"] for of in memory],
                [of["exp_avg_sq"] for of in memory],
                [],
                [of["step"] for of in memory],
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=1e-8,
                maximize=False,
            )


class Muon(Optimizer):
    """Momentum whose every step is nearly an orthogonal matrix: all directions move equally far.

    A parameter made of several matrices, such as the joined projections to Q, K and V, is given
    as (parameter, how many), and each of them is orthogonalised by itself. "Muon: An optimizer
    for hidden layers in neural networks" (Jordan et al., 2024).
    """

    def __init__(
        self,
        matrices: Sequence[tuple[nn.Parameter, int]],
        lr: float,
        momentum: float,
        precision: torch.dtype,
    ):
        parameters = [parameter for parameter, _ in matrices]
        scalars = [torch.tensor(x, device=parameters[0].device) for x in (lr, momentum)]
        super().__init__([{"params": parameters, "lr": scalars[0], "momentum": scalars[1]}])
        self.parts = [parts for _, parts in matrices]
        self.precision = precision

    @torch.no_grad()
    def step(self) -> None:
        """Move each matrix along its orthogonalised momentum."""
        (group,) = self.param_groups
        parameters, mu = group["params"], group["momentum"]
        for parameter in parameters:
            if parameter not in self.state:
                self.state[parameter] = {"momentum": torch.zeros_like(parameter)}
        gradients = [parameter.grad for parameter in parameters]
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, [1 - mu] * len(momenta))
        # Nesterov's form looks one step ahead.
        ahead = torch._foreach_lerp(gradients, momenta, [mu] * len(momenta))
        pieces = [
            piece.to(self.precision)
            for matrix, parts in zip(ahead, self.parts, strict=True)
            for piece in matrix.chunk(parts)
        ]
        directions = iter(orthogonalize(pieces))
        for parameter, parts in zip(parameters, self.parts, strict=True):
            for piece in parameter.chunk(parts):
                # A tall matrix gets longer steps, so that its outputs change as much as others'.
                stretch = max(1, piece.size(0) / piece.size(1)) ** 0.5
                piece.addcmul_(next(directions), group["lr"], value=-stretch)


def orthogonalize(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Return for each matrix U S V^T roughly U V^T: all but tiny singular values become about 1.

    Five Newton-Schulz steps with the coefficients of Jordan et al. (2024): the polynomial
    a x + b x^3 + c x^5 of the matrix is that of its singular values. Matrices of one shape go
    through together, in a few large products instead of many small ones.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    batches: dict[torch.Size, list[int]] = defaultdict(list)
    # Of a matrix and its transpose, the flat one has the smaller X X^T.
    flat = [matrix.T if matrix.size(0) > matrix.size(1) else matrix for matrix in matrices]
    for i, matrix in enumerate(flat):
        batches[matrix.shape].append(i)
    directions = list(matrices)
    for indices in batches.values():
        X = torch.stack([flat[i] for i in indices])
        X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):
            A = X @ X.mT
            X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
        for i, direction in zip(indices, X, strict=True):
            directions[i] = direction if flat[i] is matrices[i] else direction.T
    return directions


def make_optimizers(
    model: nn.Module, config: OptimizerConfig, precision: torch.dtype
) -> list[Optimizer]:
    """Return the optimizers that share the parameters of a model between them.

    Muon moves the matrices inside the blocks, AdamW the rest: matrices and embeddings with weight
    decay, biases and norms, which only shift and scale, without.
    """
    with_muon, decaying, others = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            others.append(parameter)
        elif config.optimizer == "muon" and name.startswith("blocks."):
            # The projections to Q, K and V are three matrices that lie in one parameter.
            with_muon.append((parameter, 3 if name.endswith("qkv.weight") else 1))
        else:
            decaying.append(parameter)
    # What changes from step to step is a tensor beside the weights: a recorded step can read it.
    rate = torch.tensor(config.learning_rate, device=next(model.parameters()).device)
    settings = {"lr": rate, "betas": (config.beta1, config.beta2)}
    optimizers: list[Optimizer] = [
        AdamW(
            [
                {"params": decaying, "weight_decay": config.weight_decay, **settings},
                {"params": others, "weight_decay": 0.0, **settings},
            ]
        )
    ]
    if with_muon:
        muon = Muon(with_muon, config.muon_learning_rate, config.muon_momentum, precision)
        optimizers.append(muon)
    return optimizers


def memory_shapes(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, torch.Size]:
    """Return what optimizers remember of each parameter once they have moved it: "name.what"."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    shapes = {}
    for optimizer in optimizers:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            name, shape = names[parameter], parameter.shape
            if isinstance(optimizer, Muon):
                shapes[f"{name}.momentum"] = shape
            else:
                shapes |= {f"{name}.exp_avg": shape, f"{name}.exp_avg_sq": shape}
                shapes[f"{name}.step"] = torch.Size()
    return shapes


def schedule(step: int, max_steps: int, config: OptimizerConfig) -> float:
    """Return the share of the highest learning rates that a step has: up, level, down to almost 0.

    Until it falls it does not depend on max_steps, so a run can still be made longer. "Scaling
    Laws and Compute-Optimal Training Beyond Fixed Training Durations" (Hägele et al., 2024).
    """
    rise = (step + 1) / (config.warmup_steps + 1)
    fall = (max_steps - step) / (config.decay * max_steps)
    return min(1.0, rise, fall)


def set_schedule(
    optimizers: Iterable[Optimizer], step: int, max_steps: int, config: OptimizerConfig
) -> None:
    """Give every parameter group the learning rate, and Muon the momentum, of a step."""
    share = schedule(step, max_steps, config)
    # Young gradients are soon out of date, so at first the mean forgets faster.
    youth = max(0.0, 1 - step / MOMENTUM_WARMUP)
    for optimizer in optimizers:
        highest, groups = config.learning_rate, optimizer.param_groups
        if isinstance(optimizer, Muon):
            highest = config.muon_learning_rate
            groups[0]["momentum"].fill_(config.muon_momentum - 0.1 * youth)
        for group in groups:
            group["lr"].fill_(highest * share)

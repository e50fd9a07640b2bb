"""Muon for the matrices of the blocks, AdamW for the rest, and the schedule of both.

Shapes: N matrices of R rows and C columns.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

# Over its first 300 steps, Muon's momentum rises by 0.1, to `muon_momentum`.
MOMENTUM_WARMUP, MOMENTUM_RISE = 300, 0.1
# With a higher rate, a step may overflow float32.
LARGEST = 1e30
# Muon makes a matrix nearly orthogonal (`orthogonalize`, below) by four polynomials a x + b x^3 +
# c x^5, one after another: these are their a, b and c, fitted together by gradient descent, so that
# singular values from 0.004 to 1 end between 0.7 and 1.2. The original takes one polynomial five
# times (Jordan et al., 2024): after as many training steps, `tiny` to `medium` are at most 0.003
# nats lower with it, but a step of `small` took 0.95 of the time with four. `base` on a GPU has
# not been measured. Flat matrices go through two of them at a time, so their number is even.
NEWTON_SCHULZ = [
    (4.1602, -6.9075, 2.9066),
    (4.0914, -6.2744, 2.6016),
    (4.0615, -5.7067, 2.2324),
    (3.0643, -3.3785, 1.1520),
]


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights are updated."""

    optimizer: Annotated[
        Literal["muon", "adamw"], "muon: for the blocks' matrices, adamw for the rest"
    ] = "muon"
    learning_rate: Annotated[float, "highest learning rate of AdamW"] = 1.2e-2
    muon_learning_rate: Annotated[float, "highest learning rate of Muon"] = 0.02
    warmup_steps: Annotated[int, "steps in which the learning rates rise from 0"] = 20
    decay: Annotated[float, "share of the run, at its end, in which they fall to 0"] = 0.7
    weight_decay: Annotated[float, "pull of AdamW's matrices and embeddings towards 0"] = 0.1
    muon_weight_decay: Annotated[float, "pull of Muon's matrices towards 0"] = 0.04
    muon_momentum: Annotated[float, "memory of Muon's mean of gradients"] = 0.95
    muon_nu: Annotated[
        float, "largest share of Muon's mean in a step; the gradient has the rest"
    ] = 0.75
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
        for name in ("weight_decay", "muon_weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        for name, lowest in [("muon_momentum", MOMENTUM_RISE), ("beta1", 0.0), ("beta2", 0.0)]:
            value = getattr(self, name)
            if not lowest <= value < 1:
                raise ValueError(f"{name} is {value}; it must be from {lowest:g} to below 1")
        if not 0 <= self.muon_nu <= 1:
            raise ValueError(f"muon_nu is {self.muon_nu}; it must be from 0 to 1")


def as_one_vector(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Move parameters into one vector, one after another, and return it.

    What is done to the vector is done to all of them, in one operation instead of one for each: a
    step of `tiny` takes 0.9 of the time. Their former memory is no longer used.
    """
    vector = torch.cat([parameter.detach().flatten() for parameter in parameters])
    for parameter, part in zip(parameters, parts_of(vector, parameters), strict=True):
        parameter.data = part
    return vector


def parts_of(vector: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Return what a vector holds for each of some parameters, in their shapes."""
    parts = vector.split([parameter.numel() for parameter in parameters])
    return [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)]


class Optimizer:
    """Parameters in groups, each a vector with settings of its own, and what is remembered of them.

    It replaces torch.optim.Optimizer: making one of those imports torch's compiler, which takes
    longer than everything else that happens before the first step.
    """

    def __init__(self, param_groups: list[dict[str, Any]], remembered: Sequence[str]):
        self.param_groups = param_groups
        # What is remembered of each parameter lies in a vector of its group, as the weights do.
        self.state: dict[nn.Parameter, dict[str, Tensor]] = defaultdict(dict)
        for group in param_groups:
            group["weights"] = as_one_vector(group["params"])
            for what in remembered:
                group[what] = torch.zeros_like(group["weights"])
                parts = parts_of(group[what], group["params"])
                for parameter, part in zip(group["params"], parts, strict=True):
                    self.state[parameter][what] = part

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Move the weights of each group once, by a gradient that is a vector as they are."""
        raise NotImplementedError


class AdamW(Optimizer):
    """Means of gradients over roots of means of their squares, with decoupled weight decay.

    "Decoupled Weight Decay Regularization" (Loshchilov and Hutter, 2019), algorithm 2.
    """

    def __init__(self, param_groups: list[dict[str, Any]]):
        super().__init__(param_groups, ["exp_avg", "exp_avg_sq"])
        for group in param_groups:
            # One number would do; a checkpoint has one for each parameter.
            group["steps"] = group["weights"].new_zeros(len(group["params"]))
            for parameter, steps in zip(group["params"], group["steps"], strict=True):
                self.state[parameter]["step"] = steps

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """Move every parameter; torch's function does the arithmetic."""
        for group, gradient in zip(self.param_groups, gradients, strict=True):
            group["steps"] += 1
            beta1, beta2 = group["betas"]
            torch._fused_adamw_(
                [group["weights"]],
                [gradient],
                [group["exp_avg"]],
                [group["exp_avg_sq"]],
                [],
                [group["steps"][0]],
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
    for hidden layers in neural networks" (Jordan et al., 2024), with decoupled weight decay as in
    "Muon is Scalable for LLM Training" (Liu et al., 2025), and momentum after "Quasi-hyperbolic
    momentum and Adam for deep learning" (Ma and Yarats, 2019).
    """

    def __init__(
        self,
        matrices: Sequence[tuple[nn.Parameter, int]],
        config: OptimizerConfig,
        precision: torch.dtype,
    ):
        of_shape: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
        for parameter, n_matrices in matrices:
            of_shape[parameter.size(0) // n_matrices, parameter.size(1)].append(parameter)
        self.sizes = {shape: sum(p.numel() for p in alike) for shape, alike in of_shape.items()}
        # Matrices of one shape lie side by side.
        parameters = [parameter for alike in of_shape.values() for parameter in alike]
        highest = config.muon_learning_rate, config.muon_momentum
        lr, mu = (torch.tensor(x, device=parameters[0].device) for x in highest)
        decay, nu = config.muon_weight_decay, config.muon_nu
        group = {"params": parameters, "lr": lr, "mu": mu, "nu": nu, "weight_decay": decay}
        super().__init__([group], ["momentum"])
        self.precision = precision

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """Move each matrix along its orthogonalised momentum."""
        (group,), (gradient,) = self.param_groups, gradients
        group["momentum"].lerp_(gradient, 1 - group["mu"])
        # A step follows nu * mean + (1 - nu) * gradient: the newest gradient counts for more than
        # it does in the mean. Where nu is mu, that is Nesterov's momentum; with nu = 0.85, `small`,
        # 96 wide, ends 0.01 nats lower than with that, and with 0.75 and a weight decay of 0.04
        # lower by as much again.
        nu = group["mu"].clamp(max=group["nu"])
        blend = gradient.lerp(group["momentum"], nu).to(self.precision)
        directions = orthogonalize(self.matrices(blend))
        group["weights"].mul_(1 - group["lr"] * group["weight_decay"])
        for matrices, direction in zip(self.matrices(group["weights"]), directions, strict=True):
            # A tall matrix gets longer steps, so that its outputs change as much as others'.
            stretch = max(1, matrices.size(1) / matrices.size(2)) ** 0.5
            matrices.addcmul_(direction, group["lr"], value=-stretch)

    def matrices(self, vector: Tensor) -> list[Tensor]:
        """Return the matrices in a vector of the group, those of one shape together: (N, R, C)."""
        parts = vector.split(list(self.sizes.values()))
        return [part.view(-1, *shape) for part, shape in zip(parts, self.sizes, strict=True)]


def orthogonalize(batches: Sequence[Tensor]) -> list[Tensor]:
    """Return for each matrix U S V^T roughly U V^T: all but tiny singular values become about 1.

    Each batch is (N, R, C). Matrices of one shape go through together, in a few large products
    instead of many small ones.
    """
    # Of a matrix and its transpose, the flat one has the smaller X X^T.
    flat = [batch.mT if batch.size(1) > batch.size(2) else batch for batch in batches]
    alike: dict[torch.Size, list[int]] = defaultdict(list)
    for i, batch in enumerate(flat):
        alike[batch.shape[1:]].append(i)
    directions = list(batches)
    for indices in alike.values():
        X = torch.cat([flat[i] for i in indices])
        X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
        X = newton_schulz_of_flat(X) if 2 * X.size(1) <= X.size(2) else newton_schulz(X)
        for i, batch in zip(indices, X.split([len(flat[i]) for i in indices]), strict=True):
            directions[i] = batch if flat[i] is batches[i] else batch.mT
    return directions


def newton_schulz(X: Tensor) -> Tensor:
    """Return matrices (N, R, C) whose singular values went through all polynomials.

    The matrix that takes the place of X, a X + (b A + c A A) X with A = X X^T, has the polynomial
    of X's singular values.
    """
    for a, b, c in NEWTON_SCHULZ:
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X


def newton_schulz_of_flat(X: Tensor) -> Tensor:
    """Return the same but for rounding, faster for matrices at least twice as wide as high.

    Two polynomials at a time become one of A = X X^T, with fewer wide products. The first would
    make (a + P) X with P = b A + c A A. This, times its own transpose, is the second's A, which is
    A (a + P)^2 here, since polynomials of one matrix commute; R is to it what P is to A, and both
    together make (d + R)(a + P) X. For matrices four times as wide as high, it takes 0.75 of the
    time, and a step of `small` 0.98. In bfloat16 it rounds more coarsely: of random matrices 32
    high, some singular values reach 1.6 instead of 1.4.
    """
    for (a, b, c), (d, e, f) in zip(NEWTON_SCHULZ[::2], NEWTON_SCHULZ[1::2], strict=True):
        A = X @ X.mT
        P = torch.baddbmm(A, A, A, beta=b, alpha=c)
        for _ in range(2):
            A = torch.baddbmm(A, A, P, beta=a)  # times (a + P), twice
        R = torch.baddbmm(A, A, A, beta=e, alpha=f)
        Q = torch.baddbmm(R, R, P, beta=a).add_(P, alpha=d)
        X = torch.baddbmm(X, Q, X, beta=a * d)
    return X


def make_optimizers(
    model: nn.Module, config: OptimizerConfig, precision: torch.dtype, n_muons: int = 1
) -> list[Optimizer]:
    """Return the optimizers that share the parameters of a model between them.

    Muon moves the matrices inside the blocks, AdamW the rest: other matrices and embeddings with
    weight decay, biases and norms, which only shift and scale, without. Several Muons, which can
    go side by side, have about equal shares of the matrices. The weights are brought into
    vectors: optimizers made for the model earlier no longer update it.
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
    groups = [
        {"params": decaying, "weight_decay": config.weight_decay, **settings},
        {"params": others, "weight_decay": 0.0, **settings},
    ]
    adamw = AdamW([group for group in groups if group["params"]])
    if not with_muon:
        return [adamw]
    shares: list[list[tuple[nn.Parameter, int]]] = [[] for _ in range(n_muons)]
    # The largest first, so that small ones can make the shares equal.
    for parameter, n_matrices in sorted(with_muon, key=lambda matrix: -matrix[0].numel()):
        smallest = min(shares, key=lambda share: sum(matrix.numel() for matrix, _ in share))
        smallest.append((parameter, n_matrices))
    # What training has in one vector for all groups, such as a gradient, is in this order. Behind a
    # bias of odd length, matrices lie at odd addresses, for which a GPU has slow kernels only: then
    # a step of `base` takes 13.9 ms on an H100 instead of 7.3.
    return [*(Muon(share, config, precision) for share in shares if share), adamw]


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
    to_rise = MOMENTUM_RISE * max(0.0, 1 - step / MOMENTUM_WARMUP)
    for optimizer in optimizers:
        highest, groups = config.learning_rate, optimizer.param_groups
        if isinstance(optimizer, Muon):
            highest = config.muon_learning_rate
            groups[0]["mu"].fill_(config.muon_momentum - to_rise)
        for group in groups:
            group["lr"].fill_(highest * share)

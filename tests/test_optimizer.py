"""The schedule of a run, which optimizer moves which parameter, and how Muon moves it."""

import pytest
import torch

from checkpoint import optimizer_tensors
from model import GPT, GPTConfig
from optimizer import (
    NEWTON_SCHULZ,
    Muon,
    OptimizerConfig,
    make_optimizers,
    orthogonalize,
    parts_of,
    schedule,
    set_schedule,
)

CONFIG = OptimizerConfig(warmup_steps=10, decay=0.5)


def small_model() -> GPT:
    torch.manual_seed(1)
    return GPT(GPTConfig(8, 2, 1, 4), 5)


def test_learning_rate_rises_stays_and_falls_to_almost_nothing():
    shares = [schedule(step, 100, CONFIG) for step in range(100)]
    assert shares[:10] == sorted(shares[:10])
    assert shares[0] == pytest.approx(1 / 11)
    assert shares[10:51] == [1.0] * 41
    assert shares[50:] == sorted(shares[50:], reverse=True)
    assert shares[75] == pytest.approx(0.5)
    assert shares[99] == pytest.approx(0.02)


def test_length_of_the_run_does_not_matter_before_the_decay():
    for step in range(50):
        assert schedule(step, 100, CONFIG) == schedule(step, 10_000, CONFIG)


@pytest.mark.parametrize("max_steps", [1, 2, 3])
def test_short_run_still_learns(max_steps):
    assert all(schedule(step, max_steps, CONFIG) > 0 for step in range(max_steps))


def test_schedule_reaches_every_group():
    config = OptimizerConfig(learning_rate=0.5, muon_learning_rate=2.0, warmup_steps=0, decay=1)
    muon, adamw = make_optimizers(small_model(), config, torch.float32)
    set_schedule([muon, adamw], 50, 100, config)
    assert [group["lr"] for group in adamw.param_groups] == [0.25, 0.25]
    assert [group["lr"] for group in muon.param_groups] == [1.0]
    momenta = []
    for step in (0, 150, 300, 1000):
        set_schedule([muon, adamw], step, 2000, config)
        momenta.append(muon.param_groups[0]["mu"].item())
    assert momenta == pytest.approx([0.85, 0.9, 0.95, 0.95])


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_every_parameter_is_moved_by_one_optimizer(name):
    model = small_model()
    optimizers = make_optimizers(model, OptimizerConfig(optimizer=name), torch.float32)
    moved = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert len(moved) == len(set(moved)) == len(list(model.parameters()))
    adamw = optimizers[-1]
    decaying, others = (group["params"] for group in adamw.param_groups)
    assert {p.dim() for p in decaying} == {2}
    assert {p.dim() for p in others} == {1}
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.1, 0.0]
    in_blocks = {p for p in model.blocks.parameters() if p.dim() == 2}
    assert set(decaying) & in_blocks == (in_blocks if name == "adamw" else set())


def test_matrices_are_divided_equally_between_several_muons():
    model = small_model()
    *muons, adamw = make_optimizers(model, OptimizerConfig(), torch.float32, n_muons=2)
    groups = [group for optimizer in (*muons, adamw) for group in optimizer.param_groups]
    moved = [parameter for group in groups for parameter in group["params"]]
    assert len(moved) == len(set(moved)) == len(list(model.parameters()))
    first, second = (len(muon.param_groups[0]["weights"]) for muon in muons)
    assert first == second == sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2) / 2
    matrices = sum(p.dim() == 2 for p in model.blocks.parameters())
    as_many = make_optimizers(model, OptimizerConfig(), torch.float32, n_muons=matrices + 1)
    assert len(as_many) == matrices + 1  # and AdamW is one of them


def test_projections_to_q_k_and_v_are_three_matrices():
    model = small_model()
    muon, _ = make_optimizers(model, OptimizerConfig(), torch.float32)
    pieces = {
        batch.shape[1:]: list(batch) for batch in muon.matrices(muon.param_groups[0]["weights"])
    }
    for block in model.blocks:
        for matrix in (*block.attention.qkv.weight.chunk(3), block.attention.projection.weight):
            assert sum(torch.equal(matrix, piece) for piece in pieces[4, 4]) == 1
        assert sum(torch.equal(block.feed_forward.up.weight, x) for x in pieces[16, 4]) == 1
        assert sum(torch.equal(block.feed_forward.down.weight, x) for x in pieces[4, 16]) == 1


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_parameters_and_what_is_remembered_of_them_lie_in_vectors(name):
    model = small_model()
    before = [parameter.clone() for parameter in model.parameters()]
    optimizers = make_optimizers(model, OptimizerConfig(optimizer=name), torch.float32)
    assert all(map(torch.equal, model.parameters(), before))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for i, part in enumerate(parts_of(group["weights"], group["params"])):
                assert part.data_ptr() == group["params"][i].data_ptr()
            for what in optimizer.state[group["params"][0]].keys() - {"step"}:
                for i, part in enumerate(parts_of(group[what], group["params"])):
                    assert part.data_ptr() == optimizer.state[group["params"][i]][what].data_ptr()
        optimizer.step([torch.ones_like(group["weights"]) for group in optimizer.param_groups])
    assert not any(map(torch.equal, model.parameters(), before))
    assert all(tensor.any() for tensor in optimizer_tensors(model, optimizers).values())


def test_first_step_of_adamw_written_out():
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(layer.weight, 2.0)
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5)
    (adamw,) = make_optimizers(layer, config, torch.float32)
    adamw.step([torch.tensor([3.0])])
    # After one step the mean over the root of the mean square is the sign of the gradient.
    assert layer.weight.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1, rel=1e-6)


@pytest.mark.parametrize("shape", [(6, 6), (24, 6), (6, 24)])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_orthogonalized_matrix_keeps_its_directions_and_evens_out_their_lengths(
    shape, dtype, rounding
):
    torch.manual_seed(1)
    matrix = torch.randn(shape)
    U, _, V = torch.linalg.svd(matrix, full_matrices=False)
    ((result,),) = orthogonalize([matrix.to(dtype)[None]])
    assert result.dtype == dtype
    # In the basis of its singular vectors it is diagonal, with entries near 1.
    core = U.T @ result.float() @ V.T
    values = core.diagonal()
    torch.testing.assert_close(core, values.diag(), rtol=0, atol=rounding)
    assert (values > 0.6).all()
    assert (values < 1.3).all()


@pytest.mark.parametrize("shape", [(6, 11), (6, 12), (24, 6)])
def test_singular_values_go_through_one_polynomial_after_another(shape):
    torch.manual_seed(1)
    matrix = torch.randn(shape, dtype=torch.float64)
    U, values, V = torch.linalg.svd(matrix, full_matrices=False)
    values /= values.norm()
    for a, b, c in NEWTON_SCHULZ:
        values = a * values + b * values**3 + c * values**5
    ((result,),) = orthogonalize([matrix[None]])
    # What keeps a matrix of zeros from being divided by zero changes others a little, too.
    torch.testing.assert_close(result, U @ values.diag() @ V, rtol=0, atol=1e-6)


def test_all_but_tiny_singular_values_become_about_one():
    values = torch.logspace(-2.4, 0, 500, dtype=torch.float64)
    lengths = torch.stack([values, (1 - values**2).sqrt()], dim=1)
    # Of length 1 already, so dividing by it changes nothing.
    (results,) = orthogonalize([torch.diag_embed(lengths)])
    assert results[:, 0, 0].min() > 0.69
    assert results[:, 0, 0].max() < 1.21


def test_matrices_of_all_shapes_are_orthogonalized_together_as_if_alone():
    torch.manual_seed(1)
    batches = [torch.randn(shape) for shape in [(2, 4, 4), (1, 16, 4), (3, 4, 16), (2, 3, 3)]]
    together = orthogonalize(batches)
    for batch, results in zip(batches, together, strict=True):
        for matrix, result in zip(batch, results, strict=True):
            torch.testing.assert_close(result, orthogonalize([matrix[None]])[0][0])


@pytest.mark.parametrize(("nu", "share"), [(0.7, 0.7), (1.0, 0.9)])
def test_two_steps_of_muon_written_out(nu, share):
    torch.manual_seed(1)
    qkv, up = torch.nn.Parameter(torch.zeros(12, 4)), torch.nn.Parameter(torch.zeros(16, 4))
    config = OptimizerConfig(
        muon_learning_rate=0.5, muon_momentum=0.9, muon_nu=nu, muon_weight_decay=0.2
    )
    muon = Muon([(qkv, 3), (up, 1)], config, torch.float32)
    expected, means = [torch.zeros(12, 4), torch.zeros(16, 4)], [0.0, 0.0]
    for _ in range(2):
        gradients = []
        for i, parameter in enumerate((qkv, up)):
            gradient = torch.randn_like(parameter)
            gradients.append(gradient.flatten())
            means[i] = 0.9 * means[i] + 0.1 * gradient
            blend = share * means[i] + (1 - share) * gradient
            pieces = blend.split(4) if i == 0 else [blend]
            stretch = 1 if i == 0 else 2
            direction = torch.cat([orthogonalize([p[None]])[0][0] for p in pieces])
            expected[i] = 0.9 * expected[i] - 0.5 * stretch * direction
        muon.step([torch.cat(gradients)])
    torch.testing.assert_close(qkv.detach(), expected[0])
    torch.testing.assert_close(up.detach(), expected[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be more than 0"),
        ({"decay": 1.5}, "decay is 1.5"),
        ({"beta2": 1.0}, "beta2 is 1.0"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"weight_decay": -1.0}, "^weight_decay is -1.0"),
        ({"muon_weight_decay": -1.0}, "muon_weight_decay is -1.0"),
        ({"muon_nu": 1.1}, "muon_nu is 1.1; it must be from 0 to 1"),
        ({"grad_clip": 0.0}, "grad_clip is 0.0"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**settings)

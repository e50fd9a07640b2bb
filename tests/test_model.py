"""The network against its formulas, its cache against its absence."""

import gc
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model import (
    GPT,
    VECTOR_BYTES,
    GPTConfig,
    KVCache,
    Linear,
    SamplingConfig,
    attention,
    causal_mask,
    draw,
    drop,
    dropout_from,
    long_mask,
)

GREEDY = SamplingConfig(temperature=0)


def small_model(block_size: int = 8, dropout: float = 0.0) -> GPT:
    """A model in double precision whose choices are far from ties."""
    torch.manual_seed(1)
    config = GPTConfig(block_size, n_layer=2, n_head=2, n_embd=8, dropout=dropout)
    model = GPT(config, vocab_size=11).double()
    # Large matrices make for decided and varied choices, small shifts for a visible bias.
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter)
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def take(model: GPT, ids, count: int, **options) -> list[int]:
    with closing(model.generate(ids, GREEDY, **options)) as stream:
        return [int(i) for i in itertools.islice(stream, count)]


@pytest.mark.parametrize(
    ("shape", "published"),
    [
        ({"block_size": 8, "n_layer": 3, "n_head": 4, "n_embd": 32}, 437_764),
        ({"block_size": 256, "n_layer": 6, "n_head": 6, "n_embd": 384}, 15_466_756),
    ],
)
def test_sizes_are_the_published_ones(shape, published):
    V = 6148
    with torch.device("meta"):
        total, in_blocks = GPT(GPTConfig(**shape), V).count_parameters()
    T, L, d = shape["block_size"], shape["n_layer"], shape["n_embd"]
    assert total == published == V * (2 * d + 1) + T * d + L * (12 * d**2 + 10 * d) + 2 * d
    assert in_blocks == L * (12 * d**2 + 10 * d)


@pytest.mark.parametrize("positions", [None, [4, 5], [0, 3, 1]])
@pytest.mark.parametrize("S", [6, VECTOR_BYTES // 8])  # in columns, and in rows or fused
def test_attention_is_the_formula_written_out(S, positions):
    torch.manual_seed(1)
    B, H, D = 2, 3, 5
    mask, places = None, range(S)
    if positions is not None:
        mask, places = causal_mask(S, torch.float64, torch.device("cpu"))[positions], positions
    query, key, value = (torch.randn(B, H, n, D).double() for n in (len(places), S, S))
    result = attention(query, key, value, mask)
    for b, h, (t, place) in itertools.product(range(B), range(H), enumerate(places)):
        visible = range(place + 1)
        scores = [query[b, h, t].dot(key[b, h, s]) / math.sqrt(D) for s in visible]
        total = sum(math.exp(score) for score in scores)
        expected = sum(math.exp(score) / total * value[b, h, s] for s, score in enumerate(scores))
        torch.testing.assert_close(result[b, h, t], expected)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("masked", [False, True])  # without mask and dropout, attention is fused
def test_all_forms_of_attention_have_the_same_gradients(monkeypatch, dropout, masked):
    mask = causal_mask(8, torch.float64, torch.device("cpu")) if masked else None
    results = []
    for fewest in (0, 9 * 8):  # in rows or fused, and in columns
        monkeypatch.setattr("model.VECTOR_BYTES", fewest)
        torch.manual_seed(1)
        inputs = [torch.randn(2, 3, 8, 5).double().requires_grad_() for _ in range(3)]
        result = attention(*inputs, mask, dropout)
        results.append([result, *torch.autograd.grad(result.square().sum(), inputs)])
    torch.testing.assert_close(*results)


def test_whole_network_is_the_textbook_written_out():
    model, ids = small_model(), torch.tensor([[3, 1, 4, 1, 5]])
    weights = model.state_dict()

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = weights["token_embedding.weight"][ids] + weights["position_embedding.weight"][:5]
    for i in range(2):
        y = norm(x, f"blocks.{i}.attention_norm")
        query, key, value = linear(y, f"blocks.{i}.attention.qkv").split(8, dim=2)
        heads = []
        for h in range(2):
            q, k, v = (part[0, :, 4 * h : 4 * h + 4] for part in (query, key, value))
            mask = torch.full((5, 5), -math.inf, dtype=torch.float64).triu(1)
            heads.append((q @ k.T / math.sqrt(4) + mask).softmax(1) @ v)
        x = x + linear(torch.cat(heads, dim=1), f"blocks.{i}.attention.projection")
        y = linear(norm(x, f"blocks.{i}.feed_forward_norm"), f"blocks.{i}.feed_forward.up")
        x = x + linear(y.clamp(min=0), f"blocks.{i}.feed_forward.down")
    torch.testing.assert_close(model(ids), linear(norm(x, "norm"), "head"))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("out_features", [1, 7, 12])
@pytest.mark.parametrize("leading", [(1,), (1, 1), (3, 2)])
def test_linear_is_the_product_for_one_row_and_for_many(out_features, leading, bias):
    torch.manual_seed(1)
    layer, x = Linear(5, out_features, bias), torch.randn(*leading, 5)
    expected = x @ layer.weight.T + (layer.bias if bias else 0)
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)


def test_future_never_changes_the_past():
    model, ids = small_model(), torch.arange(8)[None]
    changed = ids.clone()
    changed[0, 5:] = 9
    torch.testing.assert_close(model(ids)[:, :5], model(changed)[:, :5], rtol=0, atol=0)
    assert not torch.equal(model(ids)[:, 5:], model(changed)[:, 5:])


def test_untrained_model_is_about_as_good_as_guessing():
    torch.manual_seed(1)
    V = 65
    ids = torch.randint(V, (16, 65))
    logits = GPT(GPTConfig(block_size=64), V)(ids[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(V), abs=0.3)


def test_cache_gives_what_one_pass_gives():
    model, ids = small_model(), torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    caches, lengths = model.empty_caches(1), [3, 1, 2, 2]
    parts = zip(ids.split(lengths, dim=1), torch.arange(8).split(lengths), strict=True)
    logits = [model(part, positions, caches) for part, positions in parts]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids))


@pytest.mark.parametrize("prompt_length", [1, 7, 8, 24])
@pytest.mark.parametrize("block_size", [1, 7, 8])
@pytest.mark.parametrize("keys_multiple", [3, 64])
def test_cached_and_uncached_text_are_equal_far_beyond_the_context(
    monkeypatch, prompt_length, block_size, keys_multiple
):
    monkeypatch.setattr("model.KEYS_MULTIPLE", keys_multiple)
    model, count = small_model(block_size), 8 * block_size
    prompt = torch.randint(11, (1, prompt_length), generator=torch.Generator().manual_seed(2))
    read = []
    model.register_forward_hook(lambda *_: read.append(1))
    cached = take(model, prompt, count)
    # Most of it is written by what was recorded of the network, and not by itself.
    assert len(read) < 0.7 * count
    assert cached == take(model, prompt, count, cached=False)
    assert len(set(cached)) > 1 or block_size == 1


def test_full_window_starts_again_with_its_newest_half():
    model, prompt = small_model(), torch.tensor([[3, 1, 4, 1, 5, 9]])
    written = prompt[0].tolist()
    # Positions of the window's first character: 0 until 9 are there, then the last 4 stay, ...
    for start, end in [
        (0, 6),
        (0, 7),
        (0, 8),
        (5, 9),
        (5, 10),
        (5, 11),
        (5, 12),
        (5, 13),
        (10, 14),
    ]:
        assert len(written) == end
        written.append(int(model(torch.tensor([written[start:end]]))[0, -1].argmax()))
    assert take(model, prompt, 9) == written[6:]


def test_rows_of_a_batch_do_not_mix():
    model = small_model()
    prompts = torch.tensor([[1, 2, 3], [7, 8, 9]])
    with closing(model.generate(prompts, GREEDY)) as stream:
        rows = torch.stack(list(itertools.islice(stream, 20)), dim=1).tolist()
    assert rows == [take(model, prompt[None], 20) for prompt in prompts]


def test_each_row_needs_a_generator():
    generators = [torch.Generator()]
    with pytest.raises(ValueError, match="2 rows need as many generators, not 1"):
        next(small_model().generate(torch.tensor([[1], [2]]), GREEDY, generators))


def test_closed_stream_leaves_no_cache_behind():
    gc.collect()
    gc.disable()  # what is left behind in a circle would stay until it comes
    try:
        take(small_model(), torch.tensor([[1]]), 40)
        assert not any(type(thing) is KVCache for thing in gc.get_objects())
    finally:
        gc.enable()


def test_generate_switches_dropout_off_and_on_again():
    model = small_model(dropout=0.5)
    model.train()
    assert take(model, torch.tensor([[1]]), 20) == take(model, torch.tensor([[1]]), 20)
    assert model.training


@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_drop_keeps_the_mean_and_drops_its_share(p):
    torch.manual_seed(1)
    n = 1_000_003
    dropped = drop(torch.ones(n), p)
    share = min(round(256 * p), 255) / 256
    zeros = (dropped == 0).float()
    # Each eighth element comes from the same byte of a word.
    for mean in (zeros.mean(), *(zeros[i::8].mean() for i in range(8))):
        assert mean.item() == pytest.approx(share, abs=5 * (share * (1 - share) * 8 / n) ** 0.5)
    assert dropped.max().item() == pytest.approx(1 / (1 - share))
    assert drop(torch.ones(3, 5), 0.0).sum() == 15


@pytest.mark.parametrize("n", [1_000, 1_000_003])
def test_what_is_dropped_depends_on_the_seed_only_and_differs_from_place_to_place(n):
    def masks(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [drop(torch.ones(n), 0.5) == 0 for _ in range(12)]

    first, other = masks(1), masks(2)
    assert all(map(torch.equal, first, masks(1)))  # with what was kept from the first time
    long_mask.cache_clear()
    assert all(map(torch.equal, first, masks(1)))
    for several in (first, other, [first[0], other[0]]):
        pairs = list(itertools.combinations(several, 2))
        both = torch.cat([a & b for a, b in pairs]).float().mean().item()
        assert both == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / (n * len(several) / 2)) ** 0.5)


def test_dropout_draws_from_the_generator_of_its_thread():
    def dropped() -> Tensor:
        return drop(torch.ones(1000), 0.5) == 0

    def dropped_there() -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(dropped).result()

    torch.manual_seed(1)
    here, there = dropped(), dropped_there()
    torch.manual_seed(1)
    with dropout_from(torch.Generator().manual_seed(2)):
        assert not torch.equal(dropped(), here)
        # Another thread and what comes after draw as if nothing had been drawn here.
        assert torch.equal(dropped_there(), here)
    assert torch.equal(dropped(), there)


def test_dropout_changes_training_only():
    model, ids = small_model(dropout=0.5), torch.tensor([[1, 2, 3]])
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


@pytest.mark.parametrize(
    ("settings", "possible"),
    [
        ({"temperature": 0}, {2}),
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 1}, {2}),
        ({"top_k": 3}, {0, 2, 4}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.39}, {2}),
        ({"top_p": 0.41}, {2, 4}),
        ({"top_p": 0.99}, {0, 1, 2, 3, 4}),
        ({"min_p": 0.45}, {2, 4, 0}),
        ({"min_p": 1.0}, {2}),
        ({"top_k": 3, "top_p": 0.5}, {2, 4}),
        # At temperature 1/2 the probabilities are squared: 0.16 of 0.285 is more than half.
        ({"temperature": 0.5, "top_p": 0.5}, {2}),
    ],
)
def test_draw_keeps_the_likeliest(settings, possible):
    probabilities = torch.tensor([0.2, 0.05, 0.4, 0.1, 0.25])
    sampling = SamplingConfig(**{"temperature": 1.0, **settings})
    ids = draw(probabilities.log().expand(4000, 5), sampling, noise_of(4000))
    assert set(ids.tolist()) == possible


def noise_of(n: int) -> torch.Tensor:
    return torch.empty(n, 5).exponential_(generator=torch.Generator().manual_seed(1))


def test_draw_follows_the_probabilities():
    probabilities = torch.tensor([0.2, 0.05, 0.4, 0.1, 0.25])
    sampling = SamplingConfig(temperature=0.5)
    n = 100_000
    ids = draw(probabilities.log().expand(n, 5), sampling, noise_of(n))
    expected = probabilities**2 / (probabilities**2).sum()
    standard_errors = (expected * (1 - expected) / n).sqrt()
    assert ((ids.bincount() / n - expected).abs() < 4 * standard_errors).all()


def test_more_characters_than_the_context_are_refused():
    with pytest.raises(ValueError, match="9 characters are more than block_size 8"):
        small_model()(torch.zeros(1, 9, dtype=torch.long))


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (GPTConfig, {"n_embd": 30, "n_head": 4}, "choose an n_head that divides it, or n_embd 32"),
        (GPTConfig, {"n_layer": 0}, "n_layer is 0; it must be at least 1"),
        (GPTConfig, {"dropout": 1.0}, "dropout is 1.0"),
        (SamplingConfig, {"temperature": -0.1}, "temperature is -0.1"),
        (SamplingConfig, {"top_k": 0}, "top_k is 0; it must be at least 1"),
        (SamplingConfig, {"top_p": 0.0}, "top_p is 0.0"),
        (SamplingConfig, {"min_p": 1.5}, "min_p is 1.5"),
    ],
)
def test_impossible_settings_are_refused(config, settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)

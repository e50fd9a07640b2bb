"""The network: a transformer decoder that predicts the next character of a text.

One legend for the shapes at the ends of lines: B batch, T time (positions), C channels,
H heads, D head size (C / H), V vocabulary, S positions to look back on (T, or those of a cache).
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphs import Recorded

# When writing, attention reads a multiple of this many keys, not always those of a whole context:
# for 64 texts, that would take half of the time of `base`.
KEYS_MULTIPLE = 64
# On a CPU, rows of scores shorter than a vector register (of AVX-512) are taken number by number:
# for the 8 keys of `tiny`, a softmax then takes twelve times as long as one down columns that lie
# side by side.
VECTOR_BYTES = 64
# What dropout draws from on a CPU; each thread has a value of its own.
DROPOUT_GENERATOR = ContextVar("generator of dropout", default=torch.default_generator)
# For how many positions random numbers are drawn at once; what a seed writes depends on it.
NOISE_AT_ONCE = 16


@dataclass(frozen=True)
class GPTConfig:
    """The shape of the network."""

    block_size: Annotated[int, "context: characters the model looks back on"] = 128
    n_layer: Annotated[int, "number of transformer blocks"] = 4
    n_head: Annotated[int, "number of attention heads in each block"] = 4
    n_embd: Annotated[int, "width: channels for each character"] = 128
    dropout: Annotated[float, "share of activations dropped while training"] = 0.0

    def __post_init__(self):
        for name in ("block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        # Deeper than any that trains: so a checkpoint cannot claim a model that takes long to make.
        if self.n_layer > 1000:
            raise ValueError(f"n_layer is {self.n_layer}; it must be at most 1000")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}; choose an n_head "
                f"that divides it, or n_embd {math.ceil(self.n_embd / self.n_head) * self.n_head}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and less than 1")


@dataclass(frozen=True)
class SamplingConfig:
    """How the next character is drawn."""

    temperature: Annotated[float, "below 1 safer, above 1 wilder, 0 the likeliest"] = 0.8
    top_k: Annotated[int | None, "draw from the k likeliest characters only"] = None
    top_p: Annotated[float | None, "draw from the likeliest that together reach p"] = None
    min_p: Annotated[float | None, "leave out those below p times the likeliest"] = None

    def __post_init__(self):
        if not 0 <= self.temperature <= 1e30:  # more may be infinite as float32
            raise ValueError(
                f"temperature is {self.temperature}; it must be from 0 (greedy) to 1e30"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be more than 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must be from 0 to 1")


@dataclass
class KVCache:
    """What one attention layer has computed of earlier positions, so that it need not do it again.

    These are keys and values, (B, H, S, D) each, with room for S positions. Where new ones go is
    told by a tensor and not by a counter: then each step consists of the same operations, and can
    be recorded.
    """

    key: Tensor
    value: Tensor

    def update(self, positions: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put in T positions (T,), (B, H, T, D) each, and return all there are, (B, H, S, D)."""
        self.key[:, :, positions] = key
        self.value[:, :, positions] = value
        return self.key, self.value

    def first(self, S: int) -> "KVCache":
        """Return the cache of the first S positions, in the same memory."""
        return KVCache(self.key[:, :, :S], self.value[:, :, :S])


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Return softmax(Q K^T / sqrt(D) + mask) V, (B, H, T, D).

    query is (B, H, T, D), key and value are (B, H, S, D), mask is (T, S). None stands for the
    causal mask, with T = S. From "Attention Is All You Need" (Vaswani et al., 2017), equation 1.
    """
    B, H, T, D = query.shape
    S = key.size(2)
    in_rows = S * query.element_size() >= VECTOR_BYTES
    simple = mask is None and dropout == 0 and query.dtype != torch.bfloat16
    if query.is_cuda or (query.device.type == "cpu" and in_rows and simple):
        # Fused kernels never store the scores. With the CPU's, in float32, an evaluation takes 0.9
        # of the time, training 0.8 of the memory. In bfloat16, its gradient takes six times as long
        # as what follows; with dropout, torch draws number by number; with a mask, when writing, it
        # is no faster.
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None
        )
    if mask is None:
        mask = causal_mask(T, query.dtype, query.device)
    # One product for all heads also scales and adds the mask, which saves two passes over scores.
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))  # (B * H, T or S, D)
    scale = 1 / math.sqrt(D)
    if in_rows:
        scores = torch.baddbmm(mask.expand(B * H, T, S), query, key.mT, alpha=scale)
        weights = scores.softmax(dim=2)  # (B * H, T, S)
    else:
        scores = torch.baddbmm(mask.mT.expand(B * H, S, T), key, query.mT, alpha=scale)
        columns = scores.transpose(0, 1).contiguous()  # (S, B * H, T)
        weights = columns.softmax(dim=0).permute(1, 2, 0)  # (B * H, T, S)
    weights = drop(weights, dropout)
    return (weights @ value).unflatten(0, (B, H))  # (B, H, T, D)


@functools.lru_cache(maxsize=4)
def causal_mask(T: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what takes the future out of scores: (T, T), minus infinity there and 0 elsewhere."""
    # Row t stands at position t, and whatever lies right of that is its future.
    return torch.full((T, T), -math.inf, dtype=dtype, device=device).triu(1)


def drop(x: Tensor, p: float) -> Tensor:
    """Set a share p of the elements to zero and scale up the rest to the same mean: dropout.

    On a CPU torch draws each of them by itself, which takes longer than all else in a step of
    `base`. Here, every mask is cut from a random place of a long one, drawn once for each seed and
    length; in training, each part of a step has a seed, and the masks of earlier steps are dropped.
    """
    if p == 0 or x.device.type != "cpu":
        return F.dropout(x, p)
    generator, places = DROPOUT_GENERATOR.get(), 2**16 + x.numel() // 8
    start = int(torch.randint(places, (), generator=generator))
    mask = long_mask(generator.initial_seed(), x.numel() + places, p, x.dtype)
    return x * mask[start : start + x.numel()].view(x.shape)


@contextlib.contextmanager
def dropout_from(generator: torch.Generator) -> Iterator[None]:
    """On a CPU, let dropout in this thread draw from a generator other than torch's own."""
    token = DROPOUT_GENERATOR.set(generator)
    try:
        yield
    finally:
        DROPOUT_GENERATOR.reset(token)


@functools.lru_cache(maxsize=16)  # four parts of a batch with four lengths each
def long_mask(seed: int, length: int, p: float, dtype: torch.dtype) -> Tensor:
    """Return random factors for dropout; a share p of them, to the nearest 1/256, is 0."""
    # A generator of its own, so that the result does not depend on what else was drawn.
    generator = torch.Generator().manual_seed(seed)
    words = torch.empty(math.ceil(length / 8), dtype=torch.int64)
    words.random_(-(2**63), None, generator=generator)
    dropped = min(round(256 * p), 255)  # of the 256 values of a byte
    keep = words.view(torch.uint8)[:length] >= dropped
    return keep.to(dtype).mul_(256 / (256 - dropped))


class Dropout(nn.Module):
    """Dropout while training, nothing otherwise."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return drop(x, self.p) if self.training else x


class Linear(nn.Linear):
    """A linear layer that on a CPU is fast for a single character, too.

    Writing character by character, a product reads every weight once. MKL's product of a matrix
    and one row does that slowly on AMD processors. As a batch of equal parts, as many as threads
    allow, it is four times as fast.
    """

    def forward(self, x: Tensor) -> Tensor:
        one_row = x.numel() == self.in_features
        if not one_row or x.device.type != "cpu" or torch.is_grad_enabled():
            return super().forward(x)
        parts = math.gcd(self.out_features, torch.get_num_threads())
        weight = self.weight.unflatten(0, (parts, -1))  # (parts, out / parts, in)
        # The row as a transposed matrix: laid out as a plain column, it takes five times as long.
        y = torch.bmm(weight, x.reshape(1, 1, -1).mT.expand(parts, -1, 1))
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


class SelfAttention(nn.Module):
    """Every position gathers what it needs from itself and the positions before it."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.projection = Linear(config.n_embd, config.n_embd)
        self.dropout = Dropout(config.dropout)

    def forward(
        self, x: Tensor, mask: Tensor | None, positions: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        heads = self.qkv(x).unflatten(2, (3, self.n_head, -1))  # (B, T, 3, H, D)
        query, key, value = (part.transpose(1, 2) for part in heads.unbind(2))  # (B, H, T, D)
        if cache is not None:
            key, value = cache.update(positions, key, value)  # (B, H, S, D) each
        dropout = self.dropout.p if self.training else 0.0
        x = attention(query, key, value, mask, dropout)  # (B, H, T, D)
        x = x.transpose(1, 2).flatten(2)  # (B, T, C)
        return self.dropout(self.projection(x))


class FeedForward(nn.Module):
    """Every position thinks for itself about what it has gathered."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.up = Linear(config.n_embd, 4 * config.n_embd)
        self.down = Linear(4 * config.n_embd, config.n_embd)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(F.relu(self.up(x))))


class Block(nn.Module):
    """Attention, then feed-forward, each added to the stream of vectors that it reads.

    The stream runs through all blocks (a residual connection: He et al., 2015).
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.n_embd)
        self.attention = SelfAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.n_embd)
        self.feed_forward = FeedForward(config)

    def forward(
        self, x: Tensor, mask: Tensor | None, positions: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), mask, positions, cache)
        return x + self.feed_forward(self.feed_forward_norm(x))


class GPT(nn.Module):
    """A character-level GPT: `model(ids)` gives the logits of every next character."""

    def __init__(self, config: GPTConfig, vocab_size: int):
        super().__init__()
        if vocab_size < 1:
            raise ValueError(f"vocab_size is {vocab_size}; it must be at least 1")
        self.config = config
        self.vocab_size = vocab_size
        self.token_embedding = nn.Embedding(vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)
        self.head = Linear(config.n_embd, vocab_size)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the initial weights; norms start as the identity, biases at zero.

        Each block adds two outputs to the stream, so their projections are scaled down by
        sqrt(2 n_layer) to keep its variance near that of the embeddings ("Language Models are
        Unsupervised Multitask Learners", Radford et al., 2019, section 2.3).
        """
        # Models this narrow learn faster from 1 / sqrt(3 C) than from GPT-2's 0.02: with AdamW,
        # `small` is at 1.72 instead of 1.81 nats after 2 million characters of Shakespeare.
        std = 1 / math.sqrt(3 * self.config.n_embd)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith(("projection.weight", "down.weight")):
                nn.init.normal_(parameter, std=std / math.sqrt(2 * self.config.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=std)

    def forward(
        self, ids: Tensor, positions: Tensor | None = None, caches: Sequence[KVCache] | None = None
    ) -> Tensor:
        """Return logits (B, T, V) for ids (B, T), which stand at positions 0 to T - 1.

        With caches of S positions, they stand at the positions given (T,), each below S, and
        attend to what the caches hold of earlier ones, too.
        """
        T, block_size = ids.size(1), self.config.block_size
        if block_size < T:
            raise ValueError(f"{T} characters are more than block_size {block_size}")
        if caches is None:
            mask, caches = None, [None] * len(self.blocks)
            position_vectors = self.position_embedding.weight[:T]  # (T, C)
        else:
            key = caches[0].key
            future = torch.arange(key.size(2), device=key.device) > positions[:, None]  # (T, S)
            mask = key.new_zeros(future.shape).masked_fill(future, -math.inf)
            position_vectors = self.position_embedding(positions)  # (T, C)
        x = self.dropout(self.token_embedding(ids) + position_vectors)  # (B, T, C)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, mask, positions, cache)
        return self.head(self.norm(x))  # (B, T, V)

    def empty_caches(self, B: int) -> list[KVCache]:
        """Return a cache for each block, with room for a whole context of B texts."""
        config, weight = self.config, self.head.weight
        shape = B, config.n_head, config.block_size, config.n_embd // config.n_head
        return [KVCache(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in self.blocks]

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        sampling: SamplingConfig,
        generators: Sequence[torch.Generator] | None = None,
        cached: bool = True,
        unwritten: Sequence[int] = (),
    ) -> Iterator[Tensor]:
        """Continue ids (B, T) without end, yielding the next ids (B,) one position at a time.

        Each row has a generator of its own, so that but for rounding it does not depend on those
        beside it; without any, torch's own is drawn from.

        A cached key has its position in it, so the window cannot slide: when it is full, its newest
        half is read again from position 0. `cached=False` follows the same rule but reads the
        whole window for every character: the slow answer that the cache must agree with. The ids
        in `unwritten` are read, but never drawn.
        """
        block_size, device = self.config.block_size, ids.device
        if generators is None:
            generators = [None] * len(ids)
        elif len(generators) != len(ids):
            raise ValueError(f"{len(ids)} rows need as many generators, not {len(generators)}")
        caches = self.empty_caches(len(ids))

        # A recording has fixed shapes (few, as S is rounded up) and reads `start` anew, a tensor.
        start = torch.zeros((), dtype=torch.long, device=device)

        @functools.cache
        def reader(T: int, S: int) -> Recorded:
            """Return what reads ids (B, T) from `start` on, attending to the first S positions."""
            visible, offsets = [cache.first(S) for cache in caches], torch.arange(T, device=device)
            return Recorded(lambda ids: self(ids, start + offsets, visible)[:, -1], device)

        forbidden = torch.zeros(self.vocab_size, device=device)
        forbidden[list(unwritten)] = -math.inf
        was_training = self.training
        self.eval()
        try:
            window, n_read = ids[:, -block_size:], 0
            for noise in exponential_noise(self.vocab_size, generators, device):
                if window.size(1) > block_size:
                    window, n_read = window[:, -((block_size + 1) // 2) :], 0
                if cached:
                    length = window.size(1)
                    S = min(math.ceil(length / KEYS_MULTIPLE) * KEYS_MULTIPLE, block_size)
                    start.fill_(n_read)
                    logits = reader(length - n_read, S)(window[:, n_read:])  # (B, V)
                    n_read = length
                else:
                    logits = self(window)[:, -1]  # (B, V)
                next_ids = draw(logits + forbidden, sampling, noise)
                yield next_ids
                window = torch.cat((window, next_ids[:, None]), dim=1)
        finally:
            self.train(was_training)

    def count_parameters(self) -> tuple[int, int]:
        """Return how many parameters there are: in total, and in the blocks."""
        total = sum(parameter.numel() for parameter in self.parameters())
        return total, sum(parameter.numel() for parameter in self.blocks.parameters())


def exponential_noise(
    V: int, generators: Sequence[torch.Generator | None], device: torch.device
) -> Iterator[Tensor]:
    """Yield exponentially distributed numbers (B, V) without end, each row from its generator."""
    while True:
        # For some positions at once, because a GPU waits for Python at each row.
        noise = torch.empty(len(generators), NOISE_AT_ONCE, V, device=device)
        for row, generator in zip(noise, generators, strict=True):
            row.exponential_(generator=generator)
        yield from noise.unbind(dim=1)


def draw(logits: Tensor, sampling: SamplingConfig, noise: Tensor) -> Tensor:
    """Draw one id (B,) from each row of logits (B, V); noise (B, V) is exponentially distributed.

    noise / p is a waiting time with rate p, and it is the shortest of them with probability p: the
    one whose p / noise is the largest.
    """
    # So close to 0, dividing by the temperature would overflow.
    if sampling.temperature < 1e-4:
        return logits.argmax(dim=1)
    logits, ids = logits.float(), None
    if sampling.top_k is not None or sampling.top_p is not None:
        # Likeliest first, so that both rules keep a prefix of the row.
        V = logits.size(1)
        logits, ids = logits.topk(min(sampling.top_k or V, V), dim=1)
        noise = noise.gather(1, ids)
    probabilities = (logits / sampling.temperature).softmax(dim=1)
    keep = torch.ones_like(probabilities, dtype=torch.bool)
    if sampling.top_p is not None:
        likelier = probabilities.cumsum(dim=1) - probabilities
        keep &= likelier < sampling.top_p
    if sampling.min_p is not None:
        keep &= probabilities >= sampling.min_p * probabilities.amax(dim=1, keepdim=True)
    choice = (probabilities * keep / noise).argmax(dim=1, keepdim=True)  # (B, 1)
    return (choice if ids is None else ids.gather(1, choice)).squeeze(1)

"""Which device and which precision a script uses, and why; and when its memory is too small."""

import re
import sys
from typing import Literal

import torch
from torch import Tensor, nn

try:
    import resource
except ImportError:  # Windows
    resource = None

Device = Literal["auto", "cuda", "mps", "cpu"]
Precision = Literal["auto", "float32", "bfloat16"]

# Narrower than this, products are too small for bfloat16 to make up for its conversions: on two
# cores a step of `tiny` (32 wide) takes 1.5 times as long as in float32; one of a model 64 wide,
# 0.65 times.
NARROWEST_BFLOAT16 = 64


def choose_device(wanted: Device) -> tuple[torch.device, str]:
    """Return the device that a script runs on, and the reason in a few words."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if wanted == "auto":
        best = next(name for name, usable in available.items() if usable)
        why = "the best there is here" if best != "cpu" else "no GPU that torch can use"
        return torch.device(best), why
    if not available[wanted]:
        usable = " or ".join(name for name, is_usable in available.items() if is_usable)
        raise ValueError(f"torch finds no {wanted} device here; it can use {usable}")
    return torch.device(wanted), "as asked"


def choose_precision(
    wanted: Precision, device: torch.device, n_embd: int
) -> tuple[torch.dtype, str]:
    """Return the type of the numbers that are multiplied in training, and the reason."""
    if wanted != "auto":
        return getattr(torch, wanted), "as asked"
    if device.type == "mps":
        return torch.float32, "bfloat16 is not reliable on Apple GPUs"
    if not _multiplies_bfloat16(device):
        return torch.float32, "no fast bfloat16 here"
    if device.type == "cpu" and n_embd < NARROWEST_BFLOAT16:
        return torch.float32, f"faster than bfloat16 for a model {n_embd} wide"
    return torch.bfloat16, f"this {'GPU' if device.type == 'cuda' else 'processor'} is fast at it"


def to_device(model: nn.Module, device: torch.device) -> None:
    """Bring a GPT to a device.

    An Apple GPU, some of whose operations have been wrong, has to make of one window what the CPU
    makes of it, with the cache and without; ValueError if it makes something else.
    """
    ids = torch.arange(model.config.block_size)[None] % model.vocab_size  # (1, T)
    expected = logits_of(model, ids) if device.type == "mps" else None
    model.to(device)
    if expected is not None:
        refuse_other_logits(logits_of(model, ids.to(device)).cpu(), expected, device)


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Return what a GPT makes of ids (B, T), all at once and in two parts, (B, 2T, V)."""
    was_training = model.training
    model.eval()
    caches, positions = model.empty_caches(len(ids)), torch.arange(ids.size(1), device=ids.device)
    parts = zip(ids.chunk(2, dim=1), positions.chunk(2), strict=True)
    logits = [model(ids), *(model(part, places, caches) for part, places in parts)]
    model.train(was_training)
    return torch.cat(logits, dim=1)


def refuse_other_logits(logits: Tensor, expected: Tensor, device: torch.device) -> None:
    """Raise ValueError if logits are not those expected, but for rounding."""
    # Float32 rounds to a millionth, and some layers add that up.
    difference = ((logits - expected).norm() / expected.norm()).item()
    if not difference < 1e-3:
        raise ValueError(
            f"on {device} the model gives other numbers than on the CPU (they are off by "
            f"{difference:.1%}); use --device cpu"
        )


def peak_memory(device: torch.device) -> str:
    """Say how much memory this process has used at most so far, on the GPU if it uses one."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 1e6:,.0f} MB on the GPU"
    if resource is None:
        return "cannot be told on this system"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS, KiB elsewhere
    return f"{peak * (1 if sys.platform == 'darwin' else 1024) / 1e6:,.0f} MB"


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has_instructions = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    # oneDNN, which multiplies, may have been told to use nothing newer than AVX2: then a step of
    # `small` takes twelve times as long in bfloat16 as in float32.
    return (
        has_instructions
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


# What torch says on Linux, macOS and Windows, CUDA's libraries, what no address can reach, and
# Python where there is no room for a thread.
NO_MEMORY = (
    "allocate memory|out of memory|not enough memory|bad_alloc|ALLOC_FAILED|Storage size|"
    "can't start new thread"
)


class DoesNotFitError(MemoryError):
    """Something does not fit into memory; the message is a sentence for people."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error is about memory: on a CPU, torch raises a RuntimeError among others."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and re.search(NO_MEMORY, str(error)) is not None
    )

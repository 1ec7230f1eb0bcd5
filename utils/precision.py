"""How a network is computed: precision, memory layout and compilation.

Weights and the optimizer always stay in float32.  So does the residual path behind an RPReLU,
except with bfloat16_residual.  Before the first RPReLU, and in networks without one (Bi-Real-18,
MeliusNet29), it is in bfloat16 as well.
"""

import torch
from torch import nn

from utils.binarize import RPReLU

PRECISIONS = ("float32", "tf32", "bfloat16", "bfloat16_residual")


def set_precision(precision: str) -> None:
    """float32 means float32, also on GPUs that would take TF32 for convolutions unasked.

    cuDNN tries its algorithms and keeps the fastest, as in the released code; not where
    `torch.use_deterministic_algorithms` asks for the same bits again.
    """
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    allowed = precision != "float32"
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context that forward passes run in: convolutions and `fc` in bfloat16, if asked for."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision.startswith("bfloat16"))


def emulates_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is slower there than float32: GPUs before Ampere, x86 without AVX-512."""
    if device.type == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def place(model: nn.Module, config, device: torch.device) -> nn.Module:
    """Move a network in place, and set the precision of its residual path.

    Activations take the memory layout of the kernels by themselves.
    """
    for layer in model.modules():
        if isinstance(layer, RPReLU):
            layer.low_precision = config.precision == "bfloat16_residual"
        # Not shifts, which are 4-D too: DDP warns where gradients have other strides.
        if config.channels_last and isinstance(layer, nn.Conv2d):
            layer.to(memory_format=torch.channels_last)
    return model.to(device)


def compiled(model: nn.Module, config) -> nn.Module:
    """`model` with its passes compiled by torch.compile, or itself; parameters are shared."""
    if not config.compile:
        return model
    # Each size of a batch is compiled anew, for all networks of a class: student and teacher.
    torch._dynamo.config.recompile_limit = 64
    # Otherwise the last, smaller batch of an epoch would make all later ones take slower code.
    return torch.compile(model, dynamic=False)

"""Which device a process computes on."""

import os
import re
import shutil
import subprocess
import warnings
from pathlib import Path

import torch

from utils.run.errors import UserError

DEVICES = ("auto", "cuda", "cpu")
DRIVER = Path("/proc/driver/nvidia/version")


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """`wanted` of DEVICES; auto is this process's GPU, or the CPU where no GPU can be expected.

    Raises:
        UserError: more processes than GPUs, or no GPU that torch can use where one was expected.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a driver too old, which is named below
        usable = torch.cuda.is_available()
    if usable and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this machine has no GPU of its own:"
            f" start at most {torch.cuda.device_count()}"
        )
    if usable:
        return torch.device("cuda", local_rank)
    expected = _expected_gpu()
    if wanted == "cuda" and not expected:
        raise UserError(
            "--device cuda was given, but no NVIDIA driver or GPU is to be seen:"
            " install a driver, unset CUDA_VISIBLE_DEVICES, or pass --device cpu"
        )
    if expected:
        raise UserError(
            f"{expected}, but torch can use no GPU: the driver is for CUDA {_driver_cuda()}, torch"
            f" {torch.__version__} for CUDA {torch.version.cuda or 'none'}: install another wheel"
            " of torch (docs/training.md says which), or pass --device cpu"
        )
    return torch.device("cpu")


def _expected_gpu() -> str:
    """What promises a GPU, in words; empty for nothing, or where the GPUs are hidden."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"CUDA_VISIBLE_DEVICES is {visible}" if visible not in ("", "-1") else ""
    for name in ("SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE"):
        if os.environ.get(name):
            return f"{name} is {os.environ[name]}"
    return "an NVIDIA driver is installed" if DRIVER.exists() or shutil.which("nvidia-smi") else ""


def _driver_cuda() -> str:
    try:
        listing = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        listing = ""
    version = re.search(r"CUDA Version: *([\d.]+)", listing)
    return version[1] if version else "unknown (nvidia-smi does not tell)"

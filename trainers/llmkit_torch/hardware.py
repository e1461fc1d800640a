"""What the hardware can compute: whether bf16 pays, and the peak rate that MFU is a fraction of."""

from __future__ import annotations

import time

import torch

#: dense bf16 FLOP/s from data sheets, by a part of the device's name
GPU_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 5090": 210e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def pick_device(name: str | None) -> torch.device:
    """The device asked for, else CUDA, else Apple's GPU, else the CPU. Raises ValueError where it is not there."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def has_fast_bf16(device: torch.device) -> bool:
    """Does the hardware multiply bf16 natively? Elsewhere bf16 autocast works but is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        features = torch.cpu.get_capabilities()
        return bool(features.get("avx512_bf16") or features.get("amx_bf16") or features.get("bf16"))
    return False


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s: a GPU's from its data sheet (bf16), a CPU's as measured on one large matrix product."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for part, peak in GPU_PEAKS.items() if part in name), None)
    if device.type != "cpu":
        return None
    n = 1024
    a, b = torch.randn(n, n, dtype=dtype), torch.randn(n, n, dtype=dtype)
    best = float("inf")
    for _ in range(4):  # the first includes setting up the library
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def describe(device: torch.device, dtype: str) -> str:
    """For people: "cpu (2 threads), fp32"."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {dtype}"
    threads = f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else ""
    return f"{device}{threads}, {dtype}"

"""What accelerators can do, as their makers publish it."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chip:
    """The limits of one chip.

    Attributes:
      flops: bfloat16 operations per second.
      hbm: bytes of memory.
      bandwidth: of that memory, bytes per second.
      link: of one port of the interconnect in one direction, bytes per second; a torus axis has two ports.
      source: where the figures are published.
    """

    flops: float
    hbm: float
    bandwidth: float
    link: float
    source: str


_CLOUD = "docs.cloud.google.com/tpu/docs/"
CHIPS = {  # by the start of JAX's `device_kind`; the first match counts
    "TPU v4": Chip(275e12, 32e9, 1228e9, 50e9, _CLOUD + "v4"),
    "TPU v5 lite": Chip(197e12, 16e9, 819e9, 50e9, _CLOUD + "v5e"),
    "TPU v5": Chip(459e12, 95e9, 2765e9, 100e9, _CLOUD + "v5p"),
    "TPU v6 lite": Chip(918e12, 32e9, 1638e9, 100e9, _CLOUD + "v6e"),
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 40e9, 1555e9, 25e9, "NVIDIA A100 datasheet"),
    "NVIDIA A100": Chip(312e12, 80e9, 2039e9, 25e9, "NVIDIA A100 datasheet"),
    "NVIDIA H100": Chip(989e12, 80e9, 3350e9, 25e9, "NVIDIA H100 datasheet (SXM, dense)"),
}


def chip(device: Any) -> Chip | None:
    """The chip of a JAX device, or None where its figures are not known (a CPU, say)."""
    return next((found for name, found in CHIPS.items() if device.device_kind.startswith(name)), None)


def peak_flops(device: Any) -> float | None:
    """Its bfloat16 operations per second, for the share of them that a model uses (MFU)."""
    found = chip(device)
    return found.flops if found else None

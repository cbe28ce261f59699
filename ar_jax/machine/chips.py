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
      dcn: a chip's part of the data centre's network between slices, bytes per second; 0 where it is not published.
    """

    flops: float
    hbm: float
    bandwidth: float
    link: float
    source: str
    dcn: float = 0.0


_CLOUD = "docs.cloud.google.com/tpu/docs/"
_V5E = Chip(197e12, 16e9, 819e9, 50e9, _CLOUD + "v5e", 3.125e9)
_V5P = Chip(459e12, 95e9, 2765e9, 100e9, _CLOUD + "v5p")
_V6E = Chip(918e12, 32e9, 1638e9, 100e9, _CLOUD + "v6e", 12.5e9)
# By JAX's `device_kind`, in full: an H100 on PCIe is not one on SXM. Datasheets of GPUs give operations on sparse matrices;
# these are half of them. The link of a GPU is one NVLink, or the PCIe slot where it has none.
CHIPS = {
    "TPU v4": Chip(275e12, 32e9, 1228e9, 50e9, _CLOUD + "v4"),
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    # half a chip, for JAX counts each of its two TensorCores, with its own half of the memory, as a device
    "TPU7x": Chip(1153.5e12, 96e9, 3690e9, 100e9, _CLOUD + "tpu7x"),
    "NVIDIA L4": Chip(121e12, 24e9, 300e9, 32e9, "NVIDIA L4 datasheet (dense)"),
    "NVIDIA A100-PCIE-40GB": Chip(312e12, 40e9, 1555e9, 25e9, "NVIDIA A100 datasheet"),
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 40e9, 1555e9, 25e9, "NVIDIA A100 datasheet"),
    "NVIDIA A100 80GB PCIe": Chip(312e12, 80e9, 1935e9, 25e9, "NVIDIA A100 datasheet"),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80e9, 2039e9, 25e9, "NVIDIA A100 datasheet"),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80e9, 3350e9, 25e9, "NVIDIA H100 datasheet (SXM, dense)"),
    "NVIDIA H100 PCIe": Chip(756e12, 80e9, 2000e9, 25e9, "NVIDIA H100 datasheet (PCIe, dense)"),
    "NVIDIA H100 NVL": Chip(835e12, 94e9, 3900e9, 25e9, "NVIDIA H100 datasheet (NVL, dense)"),
    "NVIDIA H200": Chip(989e12, 141e9, 4800e9, 25e9, "NVIDIA H200 datasheet (SXM, dense)"),
    "NVIDIA H200 NVL": Chip(835e12, 141e9, 4800e9, 25e9, "NVIDIA H200 datasheet (NVL, dense)"),
    "NVIDIA B200": Chip(2250e12, 180e9, 8000e9, 50e9, "NVIDIA DGX B200 datasheet (dense, of one of eight)"),
}


def chip(device: Any) -> Chip | None:
    """The chip of a JAX device, or None where its figures are not known (a CPU, say)."""
    return CHIPS.get(device.device_kind)


def peak_flops(device: Any) -> float | None:
    """Its bfloat16 operations per second, for the share of them that a model uses (MFU)."""
    found = chip(device)
    return found.flops if found else None


def unknown(device: Any) -> str:
    """What is said in place of a share of a peak that nobody published."""
    return f"no figures of {device.device_kind} in ar_jax/machine/chips.py"

"""One place that builds the mesh and decides where arrays live."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tp")
BATCH = P(("data", "fsdp"))


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Sizes of the device mesh's axes; -1 (once) fills with the devices left over."""

    data: int = -1
    """Copies of the model, each with its share of the batch."""
    fsdp: int = 1
    """Parts every parameter is split into; each also takes a share of the batch."""
    tp: int = 1
    """Tensor parallelism: parts of every matrix product."""


def make_mesh(shape: MeshShape = MeshShape(), devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh over all devices.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [shape.data, shape.fsdp, shape.tp]
    rest = math.prod(size for size in sizes if size != -1)
    fits = len(devices) % rest == 0 if -1 in sizes and rest else rest == len(devices)
    if sizes.count(-1) > 1 or min(sizes) < -1 or not fits:
        raise ValueError(
            f"mesh (data, fsdp, tp) = {tuple(sizes)} does not fit {len(devices)} devices; the sizes must multiply to "
            f"that number, and at most one may be -1 (fill)"
        )
    sizes = [len(devices) // rest if size == -1 else size for size in sizes]
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, BATCH)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def shard(tree: Any, mesh: jax.sharding.Mesh, rules: Sequence[tuple[str, P]] = (), smallest: int = 2**10) -> Any:
    """Shardings of a tree of arrays or shapes.

    Args:
      tree: parameters, optimiser state, a whole `TrainState`.
      mesh: from `make_mesh`.
      rules: (pattern searched in the leaf's path, spec of its last axes); the first match wins. A leaf no rule
        matches splits its largest divisible axis over fsdp.
      smallest: arrays of fewer numbers stay whole.
    Raises:
      ValueError: a rule matches no leaf.
    """
    unused = dict(rules)

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, spec in rules:
            if re.search(pattern, name) and leaf.ndim >= len(spec):
                unused.pop(pattern, None)
                return NamedSharding(mesh, P(*[None] * (leaf.ndim - len(spec)), *spec))
        parts = mesh.shape["fsdp"]
        divisible = [(size, -axis) for axis, size in enumerate(leaf.shape) if size % parts == 0 and size >= parts]
        if parts == 1 or not divisible or np.prod(leaf.shape) < smallest:
            return NamedSharding(mesh, P())
        axis = -max(divisible)[1]
        return NamedSharding(mesh, P(*[None] * axis, "fsdp"))

    shardings = jax.tree_util.tree_map_with_path(one, tree)
    if unused:
        raise ValueError(f"sharding rule {next(iter(unused))!r} matches no parameter")
    return shardings


def put_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """This process's share of a batch, as part of the global one."""
    where = batch_sharding(mesh)
    with jax.transfer_guard("allow"):  # of several processes' arrays, JAX takes this for an implicit transfer
        return {name: jax.make_array_from_process_local_data(where, value) for name, value in batch.items()}

"""One place that builds the mesh and decides where arrays live."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ar_jax.machine import shares
from ar_jax.typing import Array, Within

AXES = ("data", "fsdp", "tp")
BATCH = ("data", "fsdp")  # mesh axes that divide a batch

# (pattern searched in a parameter's path, spec of its last axes). A network's rules only say what tp divides; fsdp is
# added by `shard`.
Rules = Sequence[tuple[str, P]]


Part = Annotated[int, Within(-1, 2**24)]


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Sizes of the device mesh's axes; -1 (once) fills with the devices left over."""

    data: Part = -1
    """Copies of the model, each with its share of the batch."""
    fsdp: Part = 1
    """Parts every parameter is split into; each also takes a share of the batch."""
    tp: Part = 1
    """Tensor parallelism: parts of every matrix product."""


def make_mesh(shape: MeshShape = MeshShape(), devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh over all devices. Networks find it by `jax.set_mesh`.

    TPU slices, which only the data centre's network joins, lie along `data`: nothing but gradients crosses it.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or `data` not to that of TPU slices.
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
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if sizes[0] % slices:
        raise ValueError(
            f"mesh.data is {sizes[0]} on {slices} TPU slices; it must be a multiple of their number, for fsdp and tp stay "
            "within a slice"
        )
    # neighbours on a TPU's torus become neighbours on an axis; an axis may be part of one of the torus
    if slices == 1:
        placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        within, across = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1)
        placed = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(placed, AXES, axis_types=(AxisType.Auto,) * 3)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, P(BATCH))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def shard(tree: Any, mesh: jax.sharding.Mesh, rules: Rules = (), smallest: int = 2**10) -> Any:
    """Shardings of a tree of arrays or shapes.

    The first rule that matches a leaf gives the spec of its last axes. Unless that names fsdp, fsdp splits the largest
    axis that it divides and that has no spec yet.

    Args:
      tree: parameters, optimiser state, a whole `TrainState`.
      mesh: from `make_mesh`.
      rules: of the networks in the tree.
      smallest: arrays of fewer numbers stay whole where no rule speaks of them.
    Raises:
      ValueError: a rule matches no leaf, or an axis cannot be divided as its rule says.
    """
    unused = {pattern for pattern, _ in rules}

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec, pattern = _ruled(path, leaf, rules)
        unused.discard(pattern)
        for size, axes in zip(leaf.shape, spec):
            if size % (parts := _parts(mesh, axes)):
                raise ValueError(
                    f"{name} has an axis of {size}, which mesh axis {axes} of {parts} does not divide; choose another "
                    f"--mesh.{axes}"
                )
        fsdp = mesh.shape["fsdp"]
        free = [(size, -axis) for axis, size in enumerate(leaf.shape) if spec[axis] is None and size % fsdp == 0 < size]
        if fsdp > 1 and free and np.prod(leaf.shape) >= smallest and "fsdp" not in spec:
            spec[-max(free)[1]] = "fsdp"
        while spec and spec[-1] is None:
            spec.pop()
        return NamedSharding(mesh, P(*spec))

    shardings = jax.tree_util.tree_map_with_path(one, tree)
    if unused:
        raise ValueError(f"sharding rule {min(unused)!r} matches no parameter")
    return shardings


def gathered(tree: Any, rules: Rules = ()) -> Any:
    """Parameters whole on every device but for what `rules` divide, on the mesh in use; without one, as they are.

    For loops of many calls: with parameters split by `shard`, every call would gather them anew.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return tree

    def one(path, leaf):
        return jax.lax.with_sharding_constraint(leaf, P(*_ruled(path, leaf, rules)[0]))

    return jax.tree_util.tree_map_with_path(one, tree)


def constrain(x: Array, *axes: str | tuple[str, ...] | None) -> Array:
    """Divides the first axes of an array over mesh axes, on the mesh in use (`jax.set_mesh`); without one, does nothing.

    Axes that do not divide evenly (one example at initialisation, say) are left to the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    axes = [shares.others(names) for names in axes]
    spec = [name if size % _parts(mesh, name) == 0 else P.UNCONSTRAINED for size, name in zip(x.shape, axes)]
    return jax.lax.with_sharding_constraint(x, P(*spec))


def platform() -> str:
    """Of the devices that a traced function is for: those of the mesh in use, else the default ones."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _ruled(path, leaf, rules):
    """The spec of a leaf by the first rule that matches, and its pattern."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    for pattern, last in rules:
        if re.search(pattern, name) and leaf.ndim >= len(last):
            return [None] * (leaf.ndim - len(last)) + list(last), pattern
    return [None] * leaf.ndim, None


def _parts(mesh, axes):
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[name] for name in names)


def batch_rows(mesh: jax.sharding.Mesh, batch: int, name: str = "batch") -> np.ndarray:
    """The rows of a batch that this process's devices hold, int [rows].

    Raises:
      ValueError: the batch (by this `name`) cannot be divided.
    """
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch < 1 or batch % shares:
        raise ValueError(f"{name} is {batch}; it must be a positive multiple of the {shares} batch shares of the mesh")
    held = batch_sharding(mesh).addressable_devices_indices_map((batch,)).values()
    return np.unique(np.concatenate([np.arange(batch)[rows] for rows in held]))


def batch_part(mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """Which part of every batch this process's devices hold, of how many; processes that hold the same rows have the same.

    Raises:
      ValueError: processes hold some of their rows together and others not.
    """
    shares, held = mesh.shape["data"] * mesh.shape["fsdp"], {}
    for device, (rows,) in batch_sharding(mesh).devices_indices_map((shares,)).items():
        held.setdefault(device.process_index, set()).update(range(shares)[rows])
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    if sum(map(len, parts)) > shares:
        raise ValueError(
            f"on the mesh {dict(mesh.shape)} processes share some rows of a batch and not others, so shards cannot be dealt "
            "out; set data.shards to all, or choose another mesh"
        )
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def padded(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, np.ndarray]:
    """A whole batch whose rows the mesh divides evenly: its rows once more behind the last, with a weight of 0 in "valid".

    Work on rows that do not divide would be done by all devices, with memory for all of it on each.
    """
    images = len(next(iter(batch.values())))
    more = -images % (mesh.shape["data"] * mesh.shape["fsdp"])
    if not more:
        return batch
    batch = {"valid": np.ones(images, np.float32)} | batch
    again = {name: np.take(rows, np.arange(images + more), axis=0, mode="wrap") for name, rows in batch.items()}
    return again | {"valid": np.where(np.arange(images + more) < images, again["valid"], 0).astype(np.float32)}


def put_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch (see `batch_rows`), as part of the global one."""
    where = batch_sharding(mesh)
    with jax.transfer_guard("allow"):  # of several processes' arrays, JAX takes this for an implicit transfer
        return {name: jax.make_array_from_process_local_data(where, value) for name, value in batch.items()}


def whole(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Arrays on a mesh as numpy arrays, on every process."""
    gathered = jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(tree)
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), gathered)


def put(tree: Any, where: Any) -> Any:
    """Whole arrays, the same on every process, on the devices of a mesh.

    Args:
      where: a sharding, or a tree of them.
    """

    def one(x, where):
        if where.is_fully_addressable:
            return jax.device_put(x, where)
        x = np.asarray(x)  # device_put would gather the arrays of all processes to compare them
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    return jax.tree.map(one, tree, jax.tree.broadcast(where, tree))

"""What a compiled program does, read from its optimised HLO text: operations, memory traffic, collectives.

XLA's own `cost_analysis` counts the body of a loop once and on-chip buffers as memory; here loops count as often as they
run, and only buffers in HBM count, padded to their tiles.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator

import numpy as np

BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}  # others end in their number of bits
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
KERNELS = {"splash_mha_fwd": 2, "splash_mha_dkv": 5}  # matrix products among all rows, counted without the mask
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota", "partition-id", "replica-id",
    "while", "call", "conditional", "optimization-barrier", "domain", "add-dependency",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array: element type, sizes, and how it lies in memory."""

    kind: str
    sizes: tuple[int, ...]
    layout: str = ""

    @property
    def on_chip(self) -> bool:
        return bool(re.search(r"S\([1-46-9]\)", self.layout))  # 0 is HBM, 5 the host's memory

    @functools.cached_property
    def bytes(self) -> float:
        """In memory, with the padding of a TPU's tiles."""
        sizes = list(self.sizes)
        order, tile = re.match(r"[\d,]*", self.layout)[0], re.search(r"T\((\d+),(\d+)\)", self.layout)
        if tile and len(sizes) > 1 and order:
            minor = [int(axis) for axis in order.split(",")[:2]]
            for axis, multiple in zip(minor, (int(tile[2]), int(tile[1]))):
                sizes[axis] = -(-sizes[axis] // multiple) * multiple
        bits = BITS.get(self.kind) if self.kind in BITS else int(re.search(r"\d+", self.kind)[0])
        return math.prod(sizes) * bits / 8

    @property
    def hbm(self) -> float:
        return 0.0 if self.on_chip else self.bytes


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO."""

    name: str
    shapes: tuple[Shape, ...]
    op: str
    operands: tuple[str, ...]
    text: str

    def called(self) -> list[str]:
        found = re.findall(r"(?:calls|to_apply|body|condition|(?:true|false)_computation)=%?([\w.\-]+)", self.text)
        for several in re.findall(r"(?:called|branch)_computations=\{([^}]*)\}", self.text):
            found += re.findall(r"%?([\w.\-]+)", several)
        return found

    def attribute(self, name: str) -> str:
        found = re.search(rf"[ ,]{name}=(\{{[^}}]*\}}|[^, ]+)", self.text)
        return found[1].strip("{}") if found else ""

    @property
    def source(self) -> str:
        """Where in the model it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""


@dataclasses.dataclass
class Work:
    """What (a part of) a program does.

    Attributes:
      flops: multiplications and additions of matrix products and convolutions.
      bytes: to and from HBM.
      collectives: bytes that this device receives (all-gather) or sends, by kind; an all-reduce counts twice.
      seconds: sum over instructions of the longer of computing and moving, given the chip's limits.
      network: seconds of the collectives, given the interconnect's.
    """

    flops: float = 0.0
    bytes: float = 0.0
    collectives: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    seconds: float = 0.0
    network: float = 0.0

    def add(self, other: "Work", times: float = 1) -> None:
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        self.seconds += times * other.seconds
        self.network += times * other.network
        for kind, amount in other.collectives.items():
            self.collectives[kind] += times * amount


class Program:
    """A parsed module.

    Args:
      text: of `compiled.as_text()`.
    Attributes:
      unknown: loops of which the text does not say how often they run; `work` counts them once.
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        self.unknown: set[str] = set()
        current = None
        for line in text.splitlines():
            if opening := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
                current = self.computations.setdefault(opening[2], {})
                self.entry = opening[2] if opening[1] else self.entry
            elif line == "}":
                current = None
            elif current is not None and (parsed := _parse(line)):
                current[parsed.name] = parsed
        if not self.entry:
            raise ValueError("no ENTRY computation in the HLO text")

    def work(
        self,
        peak: float = math.inf,
        bandwidth: float = math.inf,
        network: Callable[[list[int]], float] = lambda group: math.inf,
    ) -> dict[str, Work]:
        """What one run of the program does, by the operation of the model that it comes from, the longest first.

        Args:
          peak: operations per second of the chip.
          bandwidth: bytes per second of its HBM.
          network: bytes per second that a device receives in a collective among these devices.
        """
        parts: dict[str, Work] = collections.defaultdict(Work)
        seen = set()
        for instruction, computation, times in self._run(self.entry, 1):
            work = Work(self._flops(instruction, computation), self._traffic(instruction, computation))
            work.seconds = max(work.flops / peak, work.bytes / bandwidth)
            for channel, kind, amount, group in self._collectives(instruction, computation):
                if (channel, computation) not in seen:  # an asynchronous one is spread over several instructions
                    seen.add((channel, computation))
                    work.collectives[kind] += amount
                    work.network += amount / network(group)
            parts[instruction.source or instruction.op].add(work, times)
        return dict(sorted(parts.items(), key=lambda part: -part[1].seconds))

    def _run(self, name: str, times: float) -> Iterator[tuple[Instruction, str, float]]:
        """Instructions that are run one after the other, and how often."""
        for instruction in self.computations[name].values():
            if instruction.op in ("while", "call", "conditional", "async-start"):
                parts = [list(self._run(part, times * self._trips(instruction))) for part in instruction.called()]
                if instruction.op == "conditional":  # the longest of its branches
                    parts = [max(parts, key=len)]
                for part in parts:
                    yield from part
            elif instruction.op not in FREE:
                yield instruction, name, times

    def _trips(self, instruction: Instruction) -> int:
        if instruction.op != "while":
            return 1
        if known := re.search(r"known_trip_count[^\d]*(\d+)", instruction.text):
            return int(known[1])
        # a TPU's text does not say it: the counter starts at 0 and is compared with a constant
        condition, body = (
            list(self.computations[re.search(rf"{name}=%?([\w.\-]+)", instruction.text)[1]].values())
            for name in ("condition", "body")
        )
        bounds = [bound for i in condition if (bound := _constant(i)) is not None]
        if len(bounds) != 1:
            self.unknown.add(instruction.source or instruction.name)
            return 1
        index = next((i.attribute("index") for i in condition if i.op == "get-tuple-element"), "")
        return -(-bounds[0] // _rise(body, index))

    def _shapes(self, computation: str, name: str) -> tuple[Shape, ...]:
        found = self.computations[computation].get(name)
        return found.shapes if found else ()

    def _flops(self, instruction: Instruction, computation: str) -> float:
        if instruction.op == "dot":
            sizes = self._shapes(computation, instruction.operands[0])[0].sizes
            axes = [int(a) for a in instruction.attribute("lhs_contracting_dims").split(",") if a]
            return 2 * math.prod(instruction.shapes[0].sizes) * math.prod(sizes[a] for a in axes)
        if instruction.op == "convolution":
            lhs, rhs = (self._shapes(computation, name)[0].sizes for name in instruction.operands[:2])
            return _convolution(instruction, lhs, rhs)
        if instruction.op == "custom-call":
            for kernel, products in KERNELS.items():
                if kernel in instruction.name:  # among its operands are query, key and value rows [b h q e], of one image [h q e]
                    shapes = [self._shapes(computation, name)[0] for name in instruction.operands]
                    rows = [shape.sizes for shape in shapes if shape.kind in ("f32", "bf16", "f16")]
                    rows = [sizes for sizes in rows if len(sizes) == 4] or [(1, *x) for x in rows if len(x) == 3]
                    (b, h, q, e), (_, _, r, _) = rows[:2]
                    return 2.0 * products * b * h * q * r * e
            return 0.0
        if instruction.op == "fusion":
            inner = instruction.called()[0]
            return sum(self._flops(i, inner) for i in self._inside(inner))
        return 0.0

    def _inside(self, computation: str) -> list[Instruction]:
        return list(self.computations[computation].values())

    def _collectives(self, instruction: Instruction, computation: str) -> Iterator[tuple[str, str, float, list[int]]]:
        """Channel, kind, bytes and first group of devices of the collectives in an instruction; no group is all of them."""
        kind = instruction.op.removesuffix("-start")
        if kind in COLLECTIVES:
            operands = sum(s.bytes for name in instruction.operands for s in self._shapes(computation, name))
            results = sum(s.bytes for s in instruction.shapes)
            if instruction.op.endswith("-start") and kind == "all-gather":
                results -= operands
            amount = {"all-gather": results, "all-reduce": 2 * operands}.get(kind, operands)
            yield instruction.attribute("channel_id") or instruction.name, kind, amount, _group(instruction.text)
        elif instruction.op == "send" and "megascale" in instruction.text:  # what a TPU slice gives to the others
            sent = sum(s.bytes for s in self._shapes(computation, instruction.operands[0]))
            yield instruction.attribute("channel_id"), "between slices", sent, []
        elif instruction.op == "fusion":
            inner = instruction.called()[0]
            scattered = any(i.op == "dynamic-slice" and i.text.lstrip().startswith("ROOT") for i in self._inside(inner))
            for i in self._inside(inner):
                for channel, kind, amount, group in self._collectives(i, inner):
                    if kind == "all-reduce" and scattered:  # how a TPU program writes it
                        kind, amount = "reduce-scatter", amount / 2
                    yield channel, kind, amount, group

    def _traffic(self, instruction: Instruction, computation: str) -> float:
        """Bytes an instruction moves to and from HBM."""
        op = instruction.op
        if op.endswith("-done"):
            return 0.0
        operands = [self._shapes(computation, name) for name in instruction.operands]
        if op == "fusion":
            inner = instruction.called()[0]
            reads = sum(
                min(self._read(inner, i), sum(s.bytes for s in shapes)) if any(not s.on_chip for s in shapes) else 0
                for i, shapes in enumerate(operands)
            )
            writes = sum(
                0 if shape.on_chip else min(amount, shape.bytes)
                for amount, shape in zip(self._written(inner), instruction.shapes)
            )
            return reads + writes
        if op in ("copy-start", "slice-start", "dynamic-slice-start"):
            moved = instruction.shapes[0] if op == "copy-start" else instruction.shapes[1]
            return sum(
                moved.bytes
                for shape in (*operands[0], instruction.shapes[0 if op == "copy-start" else 1])
                if not shape.on_chip
            )
        if op in ("dynamic-slice", "slice", "gather"):
            return sum(s.bytes * (not operands[0][0].on_chip) + s.hbm for s in instruction.shapes)
        if op == "dynamic-update-slice":
            return sum(s.hbm for s in operands[1]) + (0 if instruction.shapes[0].on_chip else operands[1][0].bytes)
        if op == "custom-call" and re.search(r'custom_call_target="(Async|Alloc|Concat|Assume)', instruction.text):
            return 0.0
        return sum(s.hbm for shapes in operands for s in shapes) + sum(s.hbm for s in instruction.shapes)

    @functools.cache  # noqa: B019
    def _users(self, computation: str) -> dict[str, list[Instruction]]:
        users = collections.defaultdict(list)
        for instruction in self.computations[computation].values():
            for name in instruction.operands:
                users[name].append(instruction)
        return users

    def _read(self, computation: str, index: int) -> float:
        """Bytes that a fused computation reads of its parameter."""
        for instruction in self.computations[computation].values():
            if instruction.op == "parameter" and f"parameter({index})" in instruction.text:
                return self._used(computation, instruction.name)
        return 0.0

    def _used(self, computation, name):
        amount = 0.0
        for user in self._users(computation)[name]:
            if user.op == "bitcast":
                amount += self._used(computation, user.name)
            elif user.op in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                amount += user.shapes[0].bytes
            elif user.op == "dynamic-update-slice" and user.operands[0] == name:
                continue
            elif user.op == "fusion":
                amount += sum(
                    self._read(user.called()[0], i) for i, operand in enumerate(user.operands) if operand == name
                )
            elif _asynchronous(user) or user.op in ("tuple", "get-tuple-element"):
                continue
            else:
                return sum(s.bytes for s in self._shapes(computation, name))
        return amount

    def _written(self, computation: str) -> list[float]:
        """Bytes that a fused computation writes of each of its results."""
        instructions = self.computations[computation]
        root = next(i for i in instructions.values() if i.text.lstrip().startswith("ROOT"))
        if root.op == "tuple":
            return [self._result(instructions, instructions[name])[0] for name in root.operands]
        return self._result(instructions, root)

    def _result(self, instructions, instruction):
        if instruction.op == "bitcast":
            return self._result(instructions, instructions[instruction.operands[0]])
        if instruction.op == "dynamic-update-slice":
            return [instructions[instruction.operands[1]].shapes[0].bytes]
        if instruction.op == "parameter" or _asynchronous(instruction):
            return [0.0] * len(instruction.shapes)
        if instruction.op == "get-tuple-element":
            index = int(re.search(r"index=(\d+)", instruction.text)[1])
            return [self._result(instructions, instructions[instruction.operands[0]])[index]]
        if instruction.op == "fusion":
            return self._written(instruction.called()[0])
        return [s.bytes for s in instruction.shapes]


def _asynchronous(instruction):
    return instruction.op in COLLECTIVES or "AsyncCollective" in instruction.text


def _constant(instruction: Instruction | None) -> int | None:
    found = instruction and re.search(r"[su]32\[\]\S* constant\((\d+)\)", instruction.text)
    return int(found[1]) if found else None


def _rise(body: list[Instruction], index: str) -> int:
    """By how much a loop's counter, this part of its tuple, rises: loops over the slices of a weight are unrolled by two."""
    named, result = {i.name: i for i in body}, body[-1]
    if index and result.op == "tuple":
        counter = named.get(result.operands[int(index)])
        if counter and counter.op == "add":
            return next((n for name in counter.operands if (n := _constant(named.get(name)))), 1)
    return 1


def _parse(line: str) -> Instruction | None:
    found = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*)$", line)
    if not found:
        return None
    rest = found[2]
    if rest.startswith("("):
        depth, end = 0, 0
        for end, character in enumerate(rest):  # noqa: B007
            depth += (character == "(") - (character == ")")
            if not depth:
                break
        shapes, rest = rest[: end + 1], rest[end + 1 :]
    else:
        shapes, _, rest = rest.partition(" ")
    call = re.match(r"\s*([\w\-]+)\(((?:[^()]|\([^()]*\))*)\)", rest)
    if not call:
        return None
    arrays = re.findall(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?", shapes)
    parsed = tuple(Shape(kind, tuple(int(n) for n in sizes.split(",") if n), layout) for kind, sizes, layout in arrays)
    return Instruction(found[1], parsed, call[1], tuple(re.findall(r"%([\w.\-]+)", call[2])), line)


def _convolution(instruction: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> float:
    """Operations of a convolution, without those that only meet padding."""
    left, right, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text).groups()
    window = dict(part.split("=") for part in instruction.attribute("window").split() if "=" in part)
    spatial = sorted(label for label in out if label.isdigit())

    def each(name: str, default: Callable[[int], str]) -> list[str]:
        return window[name].split("x") if name in window else [default(i) for i in range(len(spatial))]

    pads = each("pad", lambda i: "0_0")
    stride, lhs_dilate, rhs_dilate = (
        [int(n) for n in each(name, lambda i: "1")] for name in ("stride", "lhs_dilate", "rhs_dilate")
    )
    flops = 2 * instruction.shapes[0].sizes[out.index("b")] * instruction.shapes[0].sizes[out.index("f")]
    flops *= rhs[right.index("i")]
    for i, label in enumerate(spatial):
        size, kernel = lhs[left.index(label)], rhs[right.index(label)]
        low = int(pads[i].split("_")[0])
        pairs = 0
        for o in range(instruction.shapes[0].sizes[out.index(label)]):
            for k in range(kernel):
                place = o * stride[i] + k * rhs_dilate[i] - low
                pairs += place % lhs_dilate[i] == 0 and 0 <= place // lhs_dilate[i] < size
        flops *= pairs
    return float(flops)


def _group(text: str) -> list[int]:
    """Devices of the first replica group, by their place in the mesh."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return [int(n) for n in found[1].split(",") if n]
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _ids(found[3], found[4]).reshape(int(found[1]), int(found[2]))[0].tolist()
    mesh = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
    if found := re.search(mesh, text):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        ids = _ids(found[2] or str(math.prod(axes.values())), found[3]).reshape(list(axes.values()))
        grouped = re.findall(r"'(\w+)'", found[4])
        return ids[tuple(slice(None) if name in grouped else 0 for name in axes)].ravel().tolist()
    return []


def _ids(sizes: str, order: str | None) -> np.ndarray:
    """0, 1, 2... in an array of these sizes, its axes then reordered; flat."""
    shape = [int(n) for n in sizes.split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return (ids.transpose([int(n) for n in order.split(",")]) if order else ids).ravel()

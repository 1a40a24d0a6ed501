"""Reads a compiled program: what its collectives move, and what it reads and writes in memory.

XLA's own `cost_analysis` counts the body of a loop once; here a body counts as often as it runs."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "f4e2m1fn": 0.5, "c64": 8, "c128": 16, "token": 0, "opaque": 0}
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
NOTHING = {
    "parameter",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "constant",
    "after-all",
    "partition-id",
    "replica-id",
    "iota",
}


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    def attribute(self, key: str) -> str | None:
        """A computation's name, by the attribute that names it."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None


@dataclasses.dataclass
class Traffic:
    """Of one run of the program, per device, in bytes. collectives: received, by kind. memory: read and written in the
    device's main memory (a register or a scratchpad is not). loops: those whose length is not known."""

    collectives: dict[str, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
    memory: float = 0.0
    loops: int = 0


class Module:
    """A compiled module, from `compiled.as_text()`."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        partitions = re.search(r"num_partitions=(\d+)", text[:100_000])
        self.partitions = int(partitions[1]) if partitions else 1
        current: list[Instruction] | None = None
        for line in text.splitlines():
            if current is None or not line.startswith(" "):
                head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line)
                if head:
                    current = self.computations.setdefault(head[2], [])
                    if head[1]:
                        self.entry = head[2]
                continue
            instruction = _instruction(line)
            if instruction is not None:
                current.append(instruction)
        self._shapes = {name: {i.name: i.shape for i in body} for name, body in self.computations.items()}

    def traffic(self, loop: int = 1) -> Traffic:
        """loop: how often a loop runs whose length does not stand in the program (a decode loop's, say)."""
        self._loop = loop
        found = Traffic()
        self._begun: set[str] = set()
        self._walk(self.entry, 1.0, found, inside=False)
        return found

    def _walk(self, name: str, times: float, found: Traffic, inside: bool) -> None:
        """inside: of a fusion, whose values stay in registers."""
        for i in self.computations.get(name, ()):
            kind = i.opcode.removesuffix("-start")
            if kind in COLLECTIVES and not i.opcode.endswith("-done") and not (inside and self._again(i)):
                found.collectives[kind] += times * self._received(name, i, kind)
                found.memory += times * size(i.shape, scratch=False) if inside else 0.0
            if i.opcode == "while":
                trips = self._trips(name, i)
                found.loops += trips is None
                for part in ("body", "condition"):
                    self._walk(i.attribute(part) or "", times * (self._loop if trips is None else trips), found, inside)
            elif i.opcode == "fusion":
                if not inside:
                    found.memory += times * self._fusion(name, i)
                self._walk(i.attribute("calls") or "", times, found, inside=True)
            elif i.opcode == "conditional":
                for branch in re.findall(
                    r"%([\w.\-]+)",
                    re.search(r"branch_computations=\{([^}]*)\}", i.rest)[1] if "branch_computations" in i.rest else "",
                ):
                    self._walk(branch, times, found, inside)
            elif i.opcode in ("call", "async-start"):
                self._walk(i.attribute("to_apply") or i.attribute("calls") or "", times, found, inside)
            elif not inside and i.opcode not in NOTHING and not i.opcode.endswith("-done"):
                found.memory += times * self._moved(name, i)

    def _again(self, i: Instruction) -> bool:
        """Whether it is a further step of a collective that runs on beside several fusions: each shows it whole."""
        channel = re.search(r"channel_id=(\d+)", i.rest)
        known = channel is not None and channel[1] in self._begun
        self._begun |= {channel[1]} if channel else set()
        return known

    def _received(self, name: str, i: Instruction, kind: str) -> float:
        """Bytes that one device gets from others, if every link is used once (rings and trees move as much)."""
        operands = sum(size(self._shapes[name].get(o, "")) for o in i.operands)
        if kind.startswith("collective"):
            return operands
        n = _group(i.rest, self.partitions)
        if kind == "all-gather":
            return operands * (n - 1)
        if kind == "all-reduce":
            return 2.0 * operands * (n - 1) / n
        return operands * (n - 1) / n

    def _fusion(self, name: str, i: Instruction) -> float:
        """What a fusion reads and writes: of what it only slices, or updates in place, the part alone; not what a
        collective makes that runs on beside it."""
        body = self.computations.get(i.attribute("calls") or "", [])
        shapes = self._shapes.get(i.attribute("calls") or "", {})
        carried = {part for u in body if u.opcode in COLLECTIVES for part in _plain(u.shape)}
        kept = lambda shape: sum(_bytes(*p) for p in _arrays(shape) if "S(1)" not in p[2] and _key(p) not in carried)
        parameters = {int(p.operands[0]): p.name for p in body if p.opcode == "parameter" and p.operands}
        moved = 0.0
        for position, operand in enumerate(i.operands):
            whole = kept(self._shapes[name].get(operand, ""))
            uses = [u for u in body if parameters.get(position) in u.operands]
            if (
                whole
                and uses
                and all(u.opcode in ("dynamic-slice", "gather") and u.operands[0] == parameters[position] for u in uses)
            ):
                whole = min(whole, sum(size(u.shape) for u in uses))
            elif (
                whole
                and uses
                and all(u.opcode == "dynamic-update-slice" and u.operands[0] == parameters[position] for u in uses)
            ):
                whole = 0.0
            moved += whole
        root = next((u for u in body if u.root), None)
        written = kept(i.shape)
        if written and root is not None and root.opcode == "dynamic-update-slice":
            written = min(written, 2 * size(shapes.get(root.operands[1], "")))
        return moved + written

    def _moved(self, name: str, i: Instruction) -> float:
        of = lambda o: size(self._shapes[name].get(o, ""), scratch=False)
        out = size(i.shape, scratch=False)
        if i.opcode in ("dynamic-slice", "gather", "slice"):
            return 2 * out
        if i.opcode in ("dynamic-update-slice", "scatter"):
            return 2 * of(i.operands[1 if i.opcode == "dynamic-update-slice" else -1])
        if i.opcode == "custom-call" and "AllocateBuffer" in i.rest:
            return 0.0
        if i.opcode == "slice-start":  # ((source), part, context)
            part = list(_arrays(i.shape))[len(i.operands)]
            return _bytes(*part) + size(i.shape, scratch=False) - sum(map(of, i.operands))
        if i.opcode == "copy-start":  # (destination, source, context)
            kind, dims, layout = next(_arrays(i.shape))
            return sum(map(of, i.operands)) + (0.0 if "S(1)" in layout else _bytes(kind, dims))
        return sum(map(of, i.operands)) + out

    def _trips(self, name: str, loop: Instruction) -> float | None:
        """How often a loop of computation `name` runs: XLA says it, or its condition compares a counter with a
        constant."""
        known = re.search(r'known_trip_count[^}]*?"?n"?:"?(\d+)', loop.rest)
        if known:
            return float(known[1])
        condition = self.computations.get(loop.attribute("condition") or "", [])
        root = next((i for i in condition if i.root), None)
        if root is not None and root.opcode == "fusion":
            inner = self.computations.get(root.attribute("calls") or "", [])
            condition, root = [*condition, *inner], next((i for i in inner if i.root), None)
        if root is None or root.opcode != "compare" or not re.search(r"direction=(LT|NE)", root.rest):
            return None
        limits = [i for i in condition if i.opcode == "constant" and re.match(r"[su]\d+\[\]", i.shape)]
        counters = {i.attribute("index") for i in condition if i.opcode == "get-tuple-element"}
        if len(limits) != 1 or len(counters) != 1:
            return None
        index = int(counters.pop() or 0)
        body = {i.name: i for i in self.computations.get(loop.attribute("body") or "", [])}
        root = next((i for i in body.values() if i.root), None)
        by = _increment(body, root.operands[index], str(index)) if root is not None and root.opcode == "tuple" else None
        before = {i.name: i for i in self.computations[name]}
        start = before.get(loop.operands[0])
        start = before.get(start.operands[index]) if start is not None and start.opcode == "tuple" else None
        begin = float(start.operands[0]) if start is not None and start.opcode == "constant" else 0.0
        return math.ceil((float(limits[0].operands[0]) - begin) / (by or 1.0))


def _increment(body: dict[str, Instruction], name: str, index: str) -> float | None:
    """What a loop's body adds to its counter: constants, along the way back to it."""
    i = body.get(name)
    if i is None:
        return None
    if i.opcode == "get-tuple-element":
        return 0.0 if i.attribute("index") == index else None
    if i.opcode in ("copy", "bitcast"):
        return _increment(body, i.operands[0], index)
    if i.opcode != "add":
        return None
    for one, other in (i.operands, i.operands[::-1]):
        constant, rest = body.get(one), _increment(body, other, index)
        if constant is not None and constant.opcode == "constant" and rest is not None:
            return float(constant.operands[0]) + rest
    return None


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if head is None:
        return None
    at = head.end()
    end = _close(line, at) if line[at] == "(" else line.index(" ", at)
    shape = line[at:end]
    call = re.match(r"\s*([\w\-]+)\(", line[end:])
    if call is None:
        return None
    opened = end + call.end() - 1
    closed = _close(line, opened)
    inner = line[opened + 1 : closed - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", inner)) or tuple(filter(None, [inner.strip()]))
    return Instruction(head[2], shape, call[1], operands, line[closed:], bool(head[1]))


def _close(line: str, opened: int) -> int:
    """Behind the bracket that closes the one at `opened`."""
    depth = 0
    for at in range(opened, len(line)):
        depth += {"(": 1, ")": -1}.get(line[at], 0)
        if depth == 0:
            return at + 1
    return len(line)


def _arrays(shape: str) -> Iterator[tuple[str, list[int], str]]:
    for kind, dims, layout in re.findall(r"([a-z][a-z0-9]*)\[([0-9,<=]*)\](\{[^}]*\})?", shape):
        yield kind, [int(n.lstrip("<=")) for n in dims.split(",") if n], layout


def size(shape: str, scratch: bool = True) -> float:
    """Bytes of a shape in HLO, of a tuple's parts together. scratch: those too that lie in the chip's scratchpad
    (memory space 1)."""
    return sum(_bytes(*part) for part in _arrays(shape) if scratch or "S(1)" not in part[2])


def _bytes(kind: str, dims: list[int], layout: str = "") -> float:
    bits = re.match(r"[a-z]+(\d+)", kind)
    return math.prod(dims) * BYTES.get(kind, int(bits[1]) / 8 if bits else 0)


def _key(part: tuple[str, list[int], str]) -> tuple[str, tuple[int, ...]]:
    return part[0], tuple(part[1])


def _plain(shape: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from map(_key, _arrays(shape))


def _group(rest: str, everyone: int) -> int:
    """Devices that take part in a collective together. Raises ValueError for a form that is not known."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    if listed:
        return len(listed[1].split(","))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", rest)
    if iota:
        return int(iota[2])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", rest)
    if named:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if "replica_groups={}" in rest:
        return everyone
    raise ValueError(f"replica groups of an unknown form: {rest[:200]}")

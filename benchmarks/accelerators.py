"""Reading compiled programs for accelerators that are not there: cycles and kernels.

A program's text is a list of computations; an instruction may run others. What is
counted here is counted along the entry computation. A loop counts as often as it is
known to turn, or `UNKNOWN_TURNS` times where nothing is known: the orthonormalisation
passes over its panels until they are good enough, which takes two passes for most.
"""

import collections
import re
from collections.abc import Iterator
from typing import NamedTuple

UNKNOWN_TURNS = 2

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_KIND = re.compile(r"^\s+(?:ROOT )?%[\w.\-]+ = .*? ([a-z][a-z\-]*)\(")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_BODY = re.compile(r"body=%([\w.\-]+)")
_APPLIED = re.compile(r"to_apply=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRUE_FALSE = re.compile(r"(?:true|false)_computation=%([\w.\-]+)")
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


class Program(NamedTuple):
    """The computations of a compiled program, by name, as lines of text."""

    entry: str
    computations: dict[str, list[str]]

    @classmethod
    def read(cls, text: str) -> "Program":
        entry, name, found = "", "", {}
        for line in text.splitlines():
            if header := _HEADER.match(line):
                name = header[2]
                found[name] = []
                entry = name if header[1] else entry
            elif name:
                found[name].append(line)
        return cls(entry, found)

    def instructions(self, name: str) -> Iterator["Instruction"]:
        for line in self.computations.get(name, []):
            if kind := _KIND.match(line):
                yield Instruction(kind[1], line)


class Instruction(NamedTuple):
    kind: str
    line: str

    @property
    def turns(self) -> int | None:
        """How often a loop is known to turn."""
        found = _TRIPS.search(self.line)
        return int(found[1]) if found else None

    @property
    def target(self) -> str:
        """What a custom call calls."""
        found = _TARGET.search(self.line)
        return found[1] if found else ""

    @property
    def branches(self) -> list[str]:
        if found := _BRANCHES.search(self.line):
            return [name.strip().lstrip("%") for name in found[1].split(",")]
        return _TRUE_FALSE.findall(self.line)

    def runs(self) -> tuple[list[str], int]:
        """The computations of a loop or a call, and how often each runs."""
        if self.kind == "while":
            return _BODY.findall(self.line), self.turns or UNKNOWN_TURNS
        if self.kind == "call":
            return _APPLIED.findall(self.line), 1
        return [], 1


class Cost(NamedTuple):
    """The estimate of a TPU's compiler, and calls that carry none."""

    cycles: int
    calls: dict[str, int]


# They carry no estimate of their own: a factor, and its inverse by blocks.
_UNESTIMATED = ("Cholesky", "InvertDiagBlocksLowerTriangular")


def tpu_cost(text: str) -> Cost:
    """Cycles of a scheduled TPU program; of a conditional, its dearest branch."""
    program = Program.read(text)

    def cost(name: str) -> Cost:
        cycles, calls = 0, collections.Counter()
        for instruction in program.instructions(name):
            inner, times = instruction.runs()
            if instruction.branches:
                dearest = max(instruction.branches, key=lambda n: cost(n).cycles)
                inner = [dearest]
            if inner:
                for part in map(cost, inner):
                    cycles += times * part.cycles
                    for key, count in part.calls.items():
                        calls[key] += times * count
                continue
            if own := _CYCLES.search(instruction.line):
                cycles += int(own[1])
            if instruction.target in _UNESTIMATED:
                calls[instruction.target] += 1
        return Cost(cycles, dict(calls))

    return cost(program.entry)


# What a GPU launches one kernel for; a fusion is one, whatever it holds.
_KERNELS = (
    "concatenate",
    "copy",
    "dot",
    "dynamic-slice",
    "dynamic-update-slice",
    "fusion",
    "pad",
    "reduce",
    "transpose",
)
_FACTORIZATIONS = ("cholesky", "potrf", "triangular", "trsm", "geqrf", "syevd", "gesvd")


def gpu_counts(text: str) -> dict[str, int]:
    """What one run of a GPU's program launches.

    `kernels` are fusions, products, copies and library calls; `open_loops` those whose
    length is known only at run time, each turn of which asks the host, and
    `factorization_calls` the calls that factorise or solve, each a matrix or a batch.
    """
    program = Program.read(text)

    def visit(name: str) -> collections.Counter[str]:
        counts: collections.Counter[str] = collections.Counter()
        for instruction in program.instructions(name):
            inner, times = instruction.runs()
            inner = inner or instruction.branches[:1]
            if instruction.kind == "while" and instruction.turns is None:
                counts["open_loops"] += 1
            elif instruction.kind == "custom-call":
                counts["kernels"] += 1
                target = instruction.target.lower()
                if any(name in target for name in _FACTORIZATIONS):
                    counts["factorization_calls"] += 1
            elif instruction.kind in _KERNELS:
                counts["kernels"] += 1
            for other in inner:
                for key, value in visit(other).items():
                    counts[key] += times * value
        return counts

    counts = visit(program.entry)
    keys = ("kernels", "open_loops", "factorization_calls")
    return {key: counts[key] for key in keys}

"""Bytes that a compiled program sends, read from its text.

The text is a list of computations. A collective in a loop's body runs as often as the
loop does, which the compiler notes where it knows (`known_trip_count`); loops of
unknown length (the passes of the orthonormalisation) count once, and so does each
branch of a conditional. A TPU's compiler writes a collective that it runs beside other
work once in each fusion that it runs beside, under one channel: it counts once.
"""

import math
import re
from collections import Counter

_KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2}
_BYTES |= {"s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8}

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_LIMIT = re.compile(r"s32\[\]\S* constant\((\d+)\)")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(_KINDS)})(-start)?\(")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[(\d+),(\d+)\])")


def collective_bytes(text: str) -> dict[str, int]:
    """Bytes of each kind of collective in one run, on one device.

    Counted is the larger side: what an all-gather gives, what a reduce-scatter takes,
    what an all-reduce takes and gives.

    Example:
        >>> collective_bytes('''ENTRY %main (x: f32[8]) -> f32[8] {
        ...   ROOT %y = f32[8]{0} all-reduce(%x), replica_groups={{0,1}}
        ... }''')
        {'all-reduce': 32}
    """
    entry, computations = _computations(text)
    totals: Counter[str] = Counter()
    homes: dict[str, str] = {}  # the computation that each channel counts in
    pending = [(entry, 1)]
    while pending:
        name, times = pending.pop()
        for line in computations.get(name, ()):
            found, channel = _COLLECTIVE.search(line), _CHANNEL.search(line)
            if found and (not channel or homes.setdefault(channel[1], name) == name):
                totals[found[2]] += times * _payload(line, found)
            runs = _trips(line, computations)
            pending += [(called, times * runs) for called in _calls(line)]
    return dict(totals)


def largest_arrays(text: str) -> list[tuple[str, int]]:
    """Kind and elements of each collective, as it is written: its largest array.

    What an all-to-all exchanges is one array, though it may be written in pieces.

    Example:
        >>> largest_arrays("ROOT %y = (f32[8]{0}, f32[2,5]{1,0}) all-reduce(%x, %z)")
        [('all-reduce', 10)]
    """

    def size(collective: re.Match[str]) -> int:
        pieces = [_elements(shape) for _, shape in _ARRAY.findall(collective[1])]
        return sum(pieces) if collective[2] == "all-to-all" else max(pieces)

    found = [_COLLECTIVE.search(line) for line in text.splitlines()]
    return [(match[2], size(match)) for match in found if match]


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
    """The name of the entry, and the lines of each computation."""
    entry, name, found = "", "", {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name = header[2]
            found[name] = []
            entry = name if header[1] else entry
        elif name:
            found[name].append(line)
    return entry, found


def _calls(line: str) -> list[str]:
    """Computations that an instruction runs."""
    if "async-done" in line or "async-update" in line:
        return []
    names = _CALLED.findall(line)
    for branches in _BRANCHES.findall(line):
        names += re.findall(r"%?([\w.\-]+)", branches)
    return names


def _trips(line: str, computations: dict[str, list[str]]) -> int:
    """How often a loop runs; a TPU's text tells it by the condition alone.

    A condition that is one comparison with a constant counts; any other does not.
    """
    if " while(" not in line:
        return 1
    if known := _TRIPS.search(line):
        return int(known[1])
    condition = _CONDITION.search(line)
    lines = computations.get(condition[1], []) if condition else []
    plain = any("ROOT" in x and " compare(" in x for x in lines)
    limits = [int(n) for x in lines for n in _LIMIT.findall(x)]
    return limits[0] if plain and len(limits) == 1 else 1


def _payload(line: str, found: re.Match[str]) -> int:
    """Bytes of a collective; an asynchronous one's type holds its operand too."""
    sizes = [_array_bytes(*array) for array in _ARRAY.findall(found[1])]
    if found[3] and found[2] != "all-reduce":
        return int(max(sizes, default=0))
    scale = _group_size(line) if found[2] == "reduce-scatter" else 1
    return int(sum(sizes) * scale)


def _group_size(line: str) -> int:
    if mesh := _MESH_GROUPS.search(line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes.get(n, 1)) for n in re.findall(r"'(\w+)'", mesh[2]))
    groups = _GROUPS.search(line)
    if groups is None:
        return 1
    return int(groups[3]) if groups[3] else groups[1].count(",") + 1


def _array_bytes(dtype: str, shape: str) -> float:
    return _BYTES.get(dtype, 0) * _elements(shape)


def _elements(shape: str) -> int:
    return math.prod(int(n) for n in shape.split(",") if n)

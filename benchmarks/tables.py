"""Results as Markdown tables."""

from collections.abc import Callable
from typing import Any

Rows = list[dict[str, Any]]


# In the order of their state, largest last.
_OPTIMIZERS = (
    "adamw",
    "ldadamw-none",
    "ldadamw-recovery-8bit",
    "ldadamw-recovery",
    "ldadamw-int4",
    "ldadamw-int8",
    "ldadamw-float32",
)


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """A table; the first column is text, the others are numbers."""
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def mib(size: float) -> str:
    return f"{size / 2**20:,.1f}"


def gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _against(row: dict[str, Any], rows: Rows, field: str, *same: str) -> str:
    """The field over AdamW's, among the rows that agree in `same`."""
    for peer in rows:
        if peer["optimizer"] == "adamw" and all(peer[k] == row[k] for k in same):
            return f"{row[field] / peer[field]:.2f}"
    return ""


def step_time_table(result: dict[str, Any]) -> str:
    def cells(row: dict[str, Any]) -> list[str]:
        torch, adamw = row.get("ratio_to_torch"), row.get("ratio_to_adamw")
        products = row.get("products_of_step")
        return [
            row["optimizer"],
            f"{1e3 * row['median_seconds']:.1f}",
            f"{adamw:.2f}" if adamw else "",
            f"{1 / torch:.2f}" if torch else "",
            f"{products:.2f}" if products else "",
            mib(row["state_bytes"]) if "state_bytes" in row else "",
        ]

    heads = ["optimizer", "ms a step", "time / AdamW's", "speed / torch's"]
    heads += ["five products / step", "state MiB"]
    rows = [row for row in result["rows"] if row["optimizer"] != "gemm"]
    rates = [row["gflops_per_second"] for row in result["rows"] if row not in rows]
    told = "".join(f"\nA plain product ran at {rate:.0f} GFLOP/s.\n" for rate in rates)
    return markdown(heads, [cells(row) for row in rows]) + told


def training_step_table(result: dict[str, Any]) -> str:
    heads = ["optimizer", "ms a step", "time / first's", "peak MiB"]
    rows = [
        [
            row["optimizer"],
            f"{1e3 * row['median_seconds']:.1f}",
            f"{row['ratio']:.3f}",
            mib(row["peak"]),
        ]
        for row in result["rows"]
    ]
    return markdown(heads, rows)


def bare_memory_table(result: dict[str, Any]) -> str:
    heads = ["optimizer", "layers", "state MiB", "temporaries MiB", "largest matrices"]
    rows = [
        [
            row["optimizer"],
            str(row["layers"]),
            mib(row["state_bytes"]),
            mib(row["temporary_bytes"]),
            f"{row['temporaries_in_largest_matrices']:.2f}",
        ]
        for row in result["rows"]
    ]
    return markdown(heads, rows)


def accumulation_table(result: dict[str, Any]) -> str:
    heads = ["optimizer", "micro-batches", "temporaries MiB", "peak MiB"]
    rows = [
        [
            row["optimizer"],
            str(row["micro_batches"]),
            mib(row["temporaries_bytes"]),
            mib(row["peak_bytes"]),
        ]
        for row in result["rows"]
    ]
    return markdown(heads, rows)


def embedding_table(result: dict[str, Any]) -> str:
    heads = ["moments", "arguments MiB", "temporaries MiB", "peak MiB"]
    names = ("arguments_bytes", "temporaries_bytes", "peak_bytes")
    rows = [
        [row["moments"], *(mib(row[name]) for name in names)] for row in result["rows"]
    ]
    if "cycles" in result["rows"][0]:
        heads.append("cycles")
        for cells, row in zip(rows, result["rows"], strict=True):
            cells.append(f"{row['cycles']:,}")
    return markdown(heads, rows)


def whole_memory_table(result: dict[str, Any]) -> str:
    rows, same = result["rows"], "scan_layers"
    heads = ["optimizer", "layers", "state MiB", "temporaries MiB", "peak MiB"]
    heads += ["peak / AdamW's", "compiler's peak / AdamW's"]
    heads += ["compile CPU s", "compile / AdamW's"]
    cells = [
        [
            row["optimizer"],
            "scanned" if row["scan_layers"] else "unrolled",
            mib(row["state_bytes"]),
            mib(row["temporaries_bytes"]),
            mib(row["peak_bytes"]),
            _against(row, rows, "peak_bytes", same),
            _against(row, rows, "compiler_peak_bytes", same),
            f"{row['compile_cpu_seconds']:.0f}",
            _against(row, rows, "compile_cpu_seconds", same),
        ]
        for row in rows
    ]
    return markdown(heads, cells)


def compile_time_table(result: dict[str, Any]) -> str:
    heads = ["optimizer", "layers", "seconds", "time / AdamW's"]
    rows = [
        [
            row["optimizer"],
            str(row["layers"]),
            f"{row['median_seconds']:.2f}",
            f"{row['ratio_to_adamw']:.2f}",
        ]
        for row in result["rows"]
    ]
    return markdown(heads, rows)


def plan_table(result: dict[str, Any]) -> str:
    heads = [
        "model, chips",
        "optimizer",
        "rank",
        "layers",
        "parameters GiB",
        "state GiB",
    ]
    heads += ["temporaries GiB", "peak GiB", "fits", "sent GiB", "compile s"]

    def order(row: dict[str, Any]) -> tuple[Any, ...]:
        kind, count = row["chips"].split("-")
        billions = int(row["model"].removesuffix("b"))
        case = (billions, kind, int(count), row["tensor"], -row["layers"])
        return *case, _OPTIMIZERS.index(row["optimizer"]), -row["rank"]

    def cells(row: dict[str, Any]) -> list[str]:
        tensor = f", tensor {row['tensor']}" if row["tensor"] > 1 else ""
        case = [f"{row['model']}, {row['chips']}{tensor}"]
        case += [row["optimizer"], str(row["rank"] or ""), str(row["layers"])]
        if "peak_bytes" not in row:
            return [*case, "", "", "", "refused", "no", "", ""]
        fields = ("parameter_bytes", "state_bytes", "temporary_bytes", "peak_bytes")
        return [
            *case,
            *(gib(row[field]) for field in fields),
            "yes" if row["fits"] else "no",
            gib(row["collective_bytes"]),
            f"{row['compile_cpu_seconds']:.0f}",
        ]

    return markdown(heads, [cells(row) for row in sorted(result["rows"], key=order)])


def slice_table(result: dict[str, Any]) -> str:
    """The smallest slice of each kind on which a whole model fits, of those compiled.

    A rank below the largest tried, or weights split over tensor axes, is told.
    """
    depth: dict[str, int] = {}
    for row in result["rows"]:
        depth[row["model"]] = max(row["layers"], depth.get(row["model"], 0))
    rows = [row for row in result["rows"] if row["layers"] == depth[row["model"]]]
    variants = list(dict.fromkeys(row["optimizer"] for row in rows))
    cases = dict.fromkeys((row["model"], row["chips"].split("-")[0]) for row in rows)

    def smallest(model: str, kind: str, variant: str) -> str:
        tried = [
            (int(row["chips"].split("-")[1]), row["tensor"], -row["rank"], row["fits"])
            for row in rows
            if (row["model"], row["optimizer"]) == (model, variant)
            and row["chips"].startswith(kind)
        ]
        if not tried:
            return "not compiled"
        fitting = [case for case in tried if case[-1]]
        if not fitting:
            return f"more than {max(tried)[0]}"
        count, tensor, rank, _ = min(fitting)
        notes = [f"tensor {tensor}"] if tensor > 1 else []
        if rank > min(case[2] for case in tried):
            notes.append(f"rank {-rank}")
        return f"{count} ({', '.join(notes)})" if notes else str(count)

    lines = [
        [f"{model}, {kind}", *(smallest(model, kind, v) for v in variants)]
        for model, kind in cases
    ]
    return markdown(["model, chips", *variants], lines)


def circumstances(result: dict[str, Any]) -> str:
    """Where the numbers come from, in one line."""
    machine, versions = result["machine"], result["versions"]
    loads = [row.get("load_average", [0])[0] for row in result["rows"]]
    shared = ""
    if max(loads, default=0) > 1.5 * machine["cores"]:
        shared = f" The machine was shared (load up to {max(loads):.0f})."
    packages = ", ".join(f"{k} {v}" for k, v in versions.items())
    return (
        f"`{result['command']}` · {result['date'][:10]} · {machine['processor']}, "
        f"{machine['cores']} cores, {machine['device_kind']} · {packages}.{shared}\n"
    )


TABLES: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("step_time-", step_time_table),
    ("training_step-cpu", training_step_table),
    ("training_step-gpu", training_step_table),
    ("memory-cpu", bare_memory_table),
    ("memory-accumulation", accumulation_table),
    ("memory-embedding", embedding_table),
    ("memory-tpu-compile", whole_memory_table),
    ("compile_time", compile_time_table),
    ("plan", plan_table),
)

"""The benchmarks at the smallest sizes: they run, and what they read is right."""

import json
import os
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from benchmarks import collectives, common, draw, memory, plan, step_time, tables
from examples.flax_lm import presets


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder for results, and the devices that the tests have."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "use_device", lambda *_, **__: None)
    return tmp_path


def run(monkeypatch, main, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    main()


def test_step_time_compares_with_adamw(results, monkeypatch):
    few = ["--size", "tiny", "--layers", "1", "--rank", "4", "--rounds", "2"]
    names = ["--optimizers", "adamw", "ldadamw-float32"]
    run(monkeypatch, step_time.main, *few, *names)
    result = json.loads((results / "step_time-cpu-tiny-r4-float32.json").read_text())
    adamw, ldadamw, gemm = result["rows"]
    assert adamw["ratio_to_adamw"] == 1
    assert "products_of_step" not in adamw
    rate = gemm["gflops_per_second"] * 1e9
    assert rate == pytest.approx(2 * 128**3 / gemm["median_seconds"])
    assert ldadamw["products_of_step"] > 0
    assert ldadamw["median_seconds"] > 0
    assert ldadamw["state_bytes"] < adamw["state_bytes"]
    assert {"command", "date", "machine", "versions"} <= result.keys()
    table = tables.step_time_table(result)
    assert "ldadamw-float32" in table
    assert "gemm" not in table
    assert "GFLOP/s" in table


def test_each_interval_is_a_contestant_of_its_own():
    names = ("adamw", "ldadamw-recovery")
    options = step_time.Options(optimizers=names, intervals=(1, 5))
    assert list(step_time.optimizers(options)) == [
        "adamw",
        "ldadamw-recovery, interval 1",
        "ldadamw-recovery, interval 5",
    ]


def test_the_five_products_of_every_matrix_are_counted():
    shapes = {"0": {"mlp": {"up": (8, 16), "down": (16, 8)}}}
    assert step_time.five_products(shapes, 4) == 2 * 5 * (2 * 8 * 16 * 4)
    assert step_time.five_products(shapes, 99) == 2 * 5 * (2 * 8 * 16 * 8)


def test_torch_has_the_allocator_of_this_process(monkeypatch):
    """None by default; else glibc's variables, by the names that it reads."""
    plain = step_time.allocator_environment(False)
    assert plain == os.environ
    kept = step_time.allocator_environment(True)
    assert {k: v for k, v in kept.items() if k not in plain} == {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
        "MALLOC_ARENA_MAX": "1",
    }


def test_memory_counts_temporaries_in_matrices(results, monkeypatch):
    monkeypatch.setitem(common.SIZES, "130m", presets.Size(32, 64, 4, 4, 1))
    few = ["--layers", "1", "--rank", "4", "--variants", "adamw", "ldadamw-none"]
    run(monkeypatch, memory.main, *few)
    result = json.loads((results / "memory-cpu.json").read_text())
    assert [row["optimizer"] for row in result["rows"]] == ["adamw", "ldadamw-none"]
    ldadamw = result["rows"][1]
    matrices = ldadamw["temporary_bytes"] / (4 * 32 * 64)
    assert ldadamw["temporaries_in_largest_matrices"] == matrices


def test_interleaved_rounds_alternate_and_leave_out_the_warm_up():
    calls = []

    def contestant(name):
        return lambda: calls.append(name) or float(len(calls))

    seconds = common.interleave({n: contestant(n) for n in "ab"}, rounds=2, warmup=1)
    assert "".join(calls) == "baabba"
    assert seconds == {"a": [3.0, 6.0], "b": [4.0, 5.0]}


def test_a_resumed_table_keeps_its_rows(results):
    options = memory.Options()
    common.Table("kept", options).add({"optimizer": "adamw", "layers": 4})
    table = common.Table("kept", options, resume=True)
    assert table.has(optimizer="adamw", layers=4)
    assert not table.has(optimizer="adamw", layers=48)


def test_collective_bytes_counts_loops_as_often_as_they_run():
    mesh = jax.make_mesh((8,), ("x",), (AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, P("x", None))
    whole = jax.NamedSharding(mesh, P())

    def step(x):
        def body(total, _):
            return jax.lax.with_sharding_constraint(total @ total, whole), None

        start = jax.lax.with_sharding_constraint(x.T @ x, whole)  # one all-reduce
        return jax.lax.scan(body, start, length=5)[0]

    x = jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=sharding)
    text = jax.jit(step).lower(x).compile().as_text()
    assert collectives.collective_bytes(text) == {"all-reduce": 4 * 4 * 4}
    looped = """
%body (x: f32[8]) -> f32[8] {
  ROOT %y = f32[8]{0} all-gather(%x), replica_groups={{0,1}}, dimensions={0}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  ROOT %w = f32[8] while(%x), body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""
    assert collectives.collective_bytes(looped) == {"all-gather": 5 * 4 * 8}


def test_a_collective_beside_other_work_counts_once():
    """Its start and its end are fusions of their own, under the same channel."""
    gather = "= f32[8] all-gather(%x), channel_id={}, replica_groups={{{{0,1}}}}"
    text = f"""
%start (x: f32[4]) -> f32[8] {{
  ROOT %a {gather.format(1)}
}}

%end (x: f32[4]) -> f32[8] {{
  ROOT %b {gather.format(1)}
}}

ENTRY %main (x: f32[4]) -> f32[8] {{
  %s = f32[8] fusion(%x), kind=kCustom, calls=%start
  %e = f32[8] fusion(%s), kind=kCustom, calls=%end
  ROOT %c {gather.format(2)}
}}
"""
    assert collectives.collective_bytes(text) == {"all-gather": 2 * 4 * 8}


def test_plan_names_every_row_once():
    options = plan.Options(models=("1b", "7b"), rank=(64, 128))
    cases = plan.cases(options)
    assert len({tuple(case.items()) for case in cases}) == len(cases)
    assert {case["layers"] for case in cases if case["model"] == "7b"} == {32}


def test_smallest_slice_tells_what_it_takes():
    def row(chips, optimizer, fits, rank=64, tensor=1, layers=2):
        case = {"model": "1b", "chips": chips, "optimizer": optimizer, "rank": rank}
        return case | {"tensor": tensor, "layers": layers, "fits": fits}

    rows = [
        row("v5e-4", "adamw", False, rank=0),
        row("v5e-16", "adamw", True, rank=0, layers=1),
        row("v5e-16", "ldadamw-int8", True),
        row("v5e-4", "ldadamw-int8", False),
        row("v5e-4", "ldadamw-int8", True, rank=16, tensor=2),
        row("v5p-4", "ldadamw-int8", True),
    ]
    lines = tables.slice_table({"rows": rows}).splitlines()[2:]
    assert lines == [
        "| 1b, v5e | more than 4 | 4 (tensor 2, rank 16) |",
        "| 1b, v5p | not compiled | 4 |",
    ]
    lines = tables.plan_table({"rows": rows}).splitlines()[2:]
    chips = [line.split(" | ")[0] for line in lines]
    assert chips[:2] == ["| 1b, v5e-4", "| 1b, v5e-4"]
    assert chips[-1] == "| 1b, v5p-4"


def test_draw_fills_only_what_is_marked():
    page = "before <!-- a -->old<!-- /a --> after"
    assert draw.fill(page, "a", "new") == ("before <!-- a -->\nnew\n<!-- /a --> after")
    assert draw.fill(page, "b", "new") == page

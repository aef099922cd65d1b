"""What an accelerator would run: counted rightly, and no more of it than there was.

The programs of a TPU and of a GPU are compiled where `libtpu` and jax's CUDA plugin are
installed; no device is needed. Counts are held against limits, times never.
"""

import dataclasses
import importlib.util
import json
import sys

import jax
import pytest

from benchmarks import accelerators, common, gpu_program, programs, tpu_cycles

TPU = """
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%body (arg: (f32[8], s32[])) -> (f32[8], s32[]) {
  %p = f32[8]{0} fusion(%arg), kind=kLoop, backend_config={"estimated_cycles":"10"}
  %c = f32[8,8] custom-call(%p), custom_call_target="Cholesky"
  ROOT %t = (f32[8], s32[]) tuple(%p, %c)
}

%cheap (x: f32[8]) -> f32[8] {
  ROOT %a = f32[8] fusion(%x), backend_config={"estimated_cycles":"1"}
}

%dear (x: f32[8]) -> f32[8] {
  ROOT %b = f32[8] fusion(%x), backend_config={"estimated_cycles":"500"}
}

ENTRY %main.1 (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %s = f32[8] fusion(%x), backend_config={"estimated_cycles":"1000"}
  %w = (f32[8], s32[]) while(%s), condition=%cond, body=%body
  %v = (f32[8], s32[]) while(%s), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"5"},"estimated_cycles":"99999"}
  ROOT %i = f32[8] conditional(%w, %v), branch_computations={%cheap, %dear}
}
"""

GPU = """
HloModule jit_step, is_scheduled=true

%fused (x: f32[8]) -> f32[8] {
  ROOT %e = f32[8]{0} dot(%x, %x)
}

%body (arg: (f32[8], s32[])) -> (f32[8], s32[]) {
  %p = f32[8]{0} fusion(%arg), kind=kLoop, calls=%fused
  %c = (f32[8,8], s8[1]) custom-call(%p), custom_call_target="cusolver_potrf_ffi"
  ROOT %t = (f32[8], s32[]) tuple(%p, %c)
}

ENTRY %main.1 (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %g = (f32[8], s8[1]) custom-call(%x), custom_call_target="__cublas$gemm"
  %w = (f32[8], s32[]) while(%g), condition=%cond, body=%body
  %v = (f32[8], s32[]) while(%g), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  ROOT %k = f32[8]{0} copy(%v)
}
"""


def test_cycles_count_loops_as_often_as_they_turn_and_the_dearest_branch():
    """1000, twice and five times a body of 10 with one factor, and 500."""
    cost = accelerators.tpu_cost(TPU)
    assert cost == (1000 + 2 * 10 + 5 * 10 + 500, {"Cholesky": 7})


def test_kernels_are_what_is_launched_and_open_loops_those_of_unknown_length():
    """A product, a copy, and five turns of a fusion and a factor; none in a fusion."""
    assert accelerators.gpu_counts(GPU) == {
        "kernels": 2 + (2 + 3) * 2,
        "open_loops": 1,
        "factorization_calls": 5,
    }


def test_layers_are_stacked_in_one_leaf_each():
    shapes = common.stacked(common.llama_matrices("tiny", 3))
    assert shapes["attention"]["key"] == (3, 128, 64)
    assert len(common.shapes_of(shapes)) == 7


def installed(*packages: str) -> bool:
    def found(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:
            return False

    return any(map(found, packages))


needs_tpu = pytest.mark.skipif(not installed("libtpu"), reason="libtpu not installed")
needs_gpu = pytest.mark.skipif(
    not installed("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"),
    reason="jax's CUDA plugin not installed",
)


def rows(monkeypatch, tmp_path, question, *arguments: str) -> list[dict]:
    """The rows of a benchmark that ran with these arguments."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(jax, "device_count", lambda: 1)  # as the command finds it
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    question.main()
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert result["machine"]["device_kind"] == "compiled only"
    return result["rows"]


@needs_tpu
def test_a_tpu_factorises_all_matrices_together(monkeypatch, tmp_path):
    """Three matrices take as many Cholesky calls as one, and few of them."""
    options = ["--m=256", "--n=512", "--rank=64", "--layers=3"]
    options += ["--variants", "adamw", "ldadamw-none", "--factorizations=together"]
    adamw, ldadamw = rows(monkeypatch, tmp_path, tpu_cycles, *options)
    assert adamw["calls"] == {}
    assert adamw["ratio"] == 1
    assert 1 <= ldadamw["calls"]["Cholesky"] <= 6
    assert ldadamw["ratio"] == ldadamw["cycles"] / adamw["cycles"] < 9


@needs_gpu
def test_a_gpu_factorises_all_matrices_together(monkeypatch, tmp_path):
    """The limits of 24 layers hold for 2: nothing of it grows with the layers."""
    options = ["--size=60m", "--layers=2", "--rank=64"]
    options += ["--variants", "adamw", "ldadamw-float32"]
    adamw, ldadamw = rows(monkeypatch, tmp_path, gpu_program, *options)
    assert (adamw["open_loops"], adamw["factorization_calls"]) == (0, 0)
    assert ldadamw["open_loops"] <= 2
    assert ldadamw["factorization_calls"] <= 12
    assert ldadamw["kernels_a_matrix"] <= 30
    assert ldadamw["temporaries_of_parameters"] <= 0.8


@needs_gpu
@pytest.mark.parametrize("layers", [["--layers=2"], ["--layers=8", "--stacked"]])
def test_leaves_in_turn_hold_the_temporaries_of_one(monkeypatch, tmp_path, layers):
    """Also with an error of few bits, which is decoded when its leaf's turn comes."""
    options = ["--size=60m", "--rank=64", "--factorizations=in_turn", *layers]
    options += ["--variants", "ldadamw-float32", "ldadamw-int8", "--consume-gradients"]
    for row in rows(monkeypatch, tmp_path, gpu_program, *options):
        assert row["temporaries_of_parameters"] <= 0.5
        assert row["consume_gradients"]


def test_the_options_of_a_row_are_its_case():
    options = tpu_cycles.Options(residual="none", precision="highest", layers=4)
    case = options.case("ldadamw-int8", m=8)
    assert case["residual"] == "none"
    assert options.case("adamw")["residual"] == ""


def test_a_row_is_not_found_by_a_case_that_says_less(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    changed = [{"consume_gradients": True}, {"precision": "highest"}, {"layers": 3}]
    plain = gpu_program.Options()
    table = common.Table("rows", plain)
    for change in changed:
        case = dataclasses.replace(plain, **change).case("ldadamw-int8")
        table.add(case)
        assert table.has(**case)
        assert not table.has(**plain.case("ldadamw-int8"))
    assert programs.nbytes(common.abstract_tree({"a": (2, 3)}, "bfloat16")) == 12

"""LDAdam for JAX: Adam in a low-rank subspace that moves every step."""

from ldadam_optax._accumulation import (
    Accumulated,
    accumulate_gradients,
    error_accumulator,
)
from ldadam_optax._alias import ldadam, ldadamw
from ldadam_optax._diagnostics import LeafDiagnostics, diagnostics
from ldadam_optax._dimension_numbers import (
    LDAdamDimensionNumbers,
    WeightDimensionNumbers,
)
from ldadam_optax._error import convert_error, ldadam_error
from ldadam_optax._fields import ScaleByLDAdamState
from ldadam_optax._flax import einsum_dimension_numbers, flax_dimension_numbers
from ldadam_optax._haliax import haliax_dimension_numbers
from ldadam_optax._ranks import propose_ranks
from ldadam_optax._report import LeafMemory, MemoryReport, memory_report
from ldadam_optax._routing import dimension_numbers_by_name
from ldadam_optax._sharding import state_specs
from ldadam_optax._torch import from_torch
from ldadam_optax._transform import scale_by_ldadam
from ldadam_optax._weights import (
    RoundStochasticallyState,
    round_weights_stochastically,
)

__all__ = [
    "Accumulated",
    "LDAdamDimensionNumbers",
    "LeafDiagnostics",
    "LeafMemory",
    "MemoryReport",
    "RoundStochasticallyState",
    "ScaleByLDAdamState",
    "WeightDimensionNumbers",
    "accumulate_gradients",
    "convert_error",
    "diagnostics",
    "dimension_numbers_by_name",
    "einsum_dimension_numbers",
    "error_accumulator",
    "flax_dimension_numbers",
    "from_torch",
    "haliax_dimension_numbers",
    "ldadam",
    "ldadam_error",
    "ldadamw",
    "memory_report",
    "propose_ranks",
    "round_weights_stochastically",
    "scale_by_ldadam",
    "state_specs",
]

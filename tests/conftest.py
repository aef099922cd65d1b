"""What every test runs under: eight CPU devices, strict ranks, fixed seeds."""

import os

import hypothesis
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

# Before the first use of a device. LAPACK on a batch waits for threads of the pool in
# which eight devices wait already, so the pool has to be larger than the machine.
os.environ.setdefault("NPROC", "32")
# Compiling is most of the time: without these passes it takes a quarter as long, and
# the mathematics is the same. XLA_FLAGS of the caller, empty ones too, replace these.
QUICK_TO_COMPILE = ["--xla_backend_optimization_level=0"]
if jax.__version_info__ < (0, 11):  # later ones have no other emitters
    QUICK_TO_COMPILE.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(QUICK_TO_COMPILE))
jax.config.update("jax_num_cpu_devices", 8)
# Collectives of steps in flight together starve each other of threads on few cores.
jax.config.update("jax_cpu_enable_async_dispatch", False)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compiling dominates: few examples, the same ones on every run.
hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None
)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture
def x64():
    """Float64 for the length of one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def any_rank_promotion():
    """For code of others that broadcasts (1-D against 2-D) on purpose."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def compile_once(tmp_path_factory: pytest.TempPathFactory):
    """Let runs of the same program share what was compiled."""
    changes = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in changes}
    for settings in (changes, before):
        compilation_cache.reset_cache()
        for name, value in settings.items():
            jax.config.update(name, value)
        if settings is changes:
            yield

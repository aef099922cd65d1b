"""LAPACK's factorisations of a batch, which on some CPUs must not be one call.

jaxlib from 0.10.1 to 0.11.0 shares a batch out among XLA's threads and waits for them
on one of these threads. Steps of stacked layers have a call for each leaf, and as many
calls side by side as there are threads wait for each other for ever. One matrix a call
does not wait. To delete with jaxlib 0.11.0; `test_compilation` shows it.
"""

from collections.abc import Callable

import jax
from jaxlib.version import __version_info__ as jaxlib_version

_CALLS_WAIT = jaxlib_version < (0, 11, 1)


def one_by_one(
    function: Callable[[jax.Array], jax.Array], matrices_mn: jax.Array
) -> jax.Array:
    """``function`` of a batch of matrices, ``(..., m, n)``, on a CPU in as many calls.

    In one call where that is safe; and where a batch may be split over devices, as a
    loop would gather it. ``NPROC``, the number of XLA's threads, helps there.
    """
    batch_shape = matrices_mn.shape[:-2]
    if not batch_shape or not _CALLS_WAIT or jax.device_count() > 1:
        return function(matrices_mn)

    def looped(matrices_mn):
        flat = matrices_mn.reshape(-1, *matrices_mn.shape[-2:])
        results = jax.lax.map(function, flat)
        return results.reshape(*batch_shape, *results.shape[1:])

    return jax.lax.platform_dependent(matrices_mn, cpu=looped, default=function)

"""What is compiled: traces, decompositions, copies, donated buffers."""

import functools
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    assert_trees_close,
    gradients_like,
    last,
    memory_first,
    params_like,
    run,
)

from ldadam_optax import LDAdamDimensionNumbers, ldadamw

SETTINGS = {"rank": 2, "weight_decay": 0.01}


def compiled_step(params, donate=(), **options):
    tx = ldadamw(1e-2, **{**SETTINGS, **options})

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    return jax.jit(step, donate_argnums=donate).lower(params, state, params).compile()


def decompositions(compiled) -> set[str]:
    """Names of the LAPACK calls that decompose a matrix iteratively."""
    calls = set(re.findall(r'custom_call_target="([^"]*)"', compiled.as_text()))
    iterative = re.compile("gesdd|gesvd|syevd|heevd|geev|svd|eigh", re.IGNORECASE)
    return {name for name in calls if iterative.search(name)}


@pytest.mark.parametrize("options", [{}, {"residual": "none"}])
def test_compiled_step_holds_no_svd_by_default(options):
    assert not decompositions(compiled_step(params_like(), **options))


@pytest.mark.parametrize("options", [{"subspace": "svd"}, {"subspace_init": "svd"}])
def test_compiled_step_holds_an_svd_where_asked(options):
    """The search above does find one."""
    assert decompositions(compiled_step(params_like(), **options))


def test_no_transposed_copy_of_a_matrix():
    """Either orientation is a matter of which axis a product contracts."""
    for shape in ((48, 80), (80, 48)):
        text = compiled_step({"w": jnp.ones(shape)}).as_text()
        turned = r"\w+\[{},{}\][^=\n]*\btranspose\(".format(*reversed(shape))
        assert not re.search(turned, text)


def test_donation_aliases_everything():
    """Every buffer of parameters and state is reused; nothing is aliased twice."""
    params = params_like()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = compiled_step(params, donate=(0, 1))
    tx = ldadamw(1e-2, **SETTINGS)
    state = tx.init(params)
    bytes_of = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    aliased = compiled.memory_analysis().alias_size_in_bytes
    assert aliased == bytes_of(params) + bytes_of(state)


def test_in_turn_takes_fewer_temporaries_than_together():
    """For a scheduler that minimises memory, as those of accelerators do."""
    tests = str(Path(__file__).parent)
    source = "import test_compilation; test_compilation.print_temporaries()"
    printed = subprocess.run(
        [sys.executable, "-c", source],
        env=memory_first() | {"PYTHONPATH": tests},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    in_turn, together = (float(matrices) for matrices in printed.split())
    assert in_turn < 1.5
    assert in_turn < 0.7 * together


def print_temporaries():
    """Temporaries of a step on twelve matrices, in sizes of the largest of them."""
    shapes = 4 * ((96, 96), (96, 256), (256, 96))
    params = {f"{i}": jnp.ones(shape) for i, shape in enumerate(shapes)}
    options = {"rank": 8, "residual": "none"}
    for order in ("in_turn", "together"):
        compiled = compiled_step(params, (0, 1), factorizations=order, **options)
        print(compiled.memory_analysis().temp_size_in_bytes / (4 * 96 * 256))


@pytest.mark.parametrize("options", [{}, {"residual": "recovery"}])
def test_a_stack_is_updated_in_place(options, monkeypatch):
    """No copy of all slices for each of them, in the loop over slices."""
    monkeypatch.setattr("ldadam_optax._schedule._LARGE_MATRIX", 1)
    monkeypatch.setattr(jax, "device_count", lambda: 1)  # the stack is not split
    params = {"w": jnp.ones((5, 24, 40))}
    numbers = LDAdamDimensionNumbers(reduction_axis=-2, output_axis=-1)
    compiled = compiled_step(
        params,
        donate=(0, 1),
        factorizations="in_turn",
        weight_dimension_numbers=numbers,
        **options,
    )
    program, entry = compiled.as_text().split("\nENTRY ")
    assert "f32[5,24,40]" in program  # the loop has the stacks
    assert not re.findall(r"= f32\[5,(?:24|2),40\]\S* copy\(", program)
    assert " while(" in entry


def test_state_does_not_alias_the_parameters():
    """Donating both at once is an error where two of them share a buffer."""
    params = params_like()
    tx = ldadamw(1e-2, **SETTINGS)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for grads in gradients_like(params):
        params, state = step(params, state, grads)
    assert np.isfinite(params["dense"]["kernel"]).all()


def test_scan_over_steps():
    params = params_like()
    grads = gradients_like(params)
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *grads)
    tx = ldadamw(1e-2, **SETTINGS)

    def body(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (scanned, _), _ = jax.lax.scan(body, (params, tx.init(params)), stacked)
    looped, _ = last(run(tx, params, grads))
    assert_trees_close(scanned, looped, rtol=1e-4, atol=1e-5)


def test_vmap_over_models():
    """An ensemble: the optimizer itself mapped over a leading axis."""
    params = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params_like())
    grads = jax.tree.map(
        lambda g: jnp.stack([g, -3 * g]), gradients_like(params_like())[0]
    )
    tx = ldadamw(1e-2, **SETTINGS)
    state = jax.vmap(tx.init)(params)
    updates, _ = jax.jit(jax.vmap(tx.update))(grads, state, params)
    alone = jax.tree.map(lambda x: x[1], (grads, state, params))
    expected, _ = tx.update(*alone)
    assert_trees_close(jax.tree.map(lambda u: u[1], updates), expected, atol=1e-5)


class VariantsTest(chex.TestCase):
    """With jit and without, on a device and from the host: the same step."""

    @chex.variants(
        with_jit=True, without_jit=True, with_device=True, without_device=True
    )
    def test_update_is_the_same(self):
        params, tx = params_like(), ldadamw(1e-2, **SETTINGS)
        [grads], state = gradients_like(params, count=1), tx.init(params)
        updates, new_state = self.variant(tx.update)(grads, state, params)
        expected, expected_state = jax.jit(tx.update)(grads, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(new_state, expected_state)
        chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-7)
        chex.assert_tree_all_finite(new_state)


SIDE_BY_SIDE = """
import jax, jax.numpy as jnp
from ldadam_optax._cholesky import inverse_cholesky
grams_rr = list(jnp.broadcast_to(jnp.eye(96), (4, 8, 96, 96)))
step = jax.jit(lambda grams_rr: [inverse_cholesky(gram_rr) for gram_rr in grams_rr])
for _ in range(20):
    jax.block_until_ready(step(grams_rr))
"""


def test_stacks_side_by_side_do_not_wait_for_each_other_for_ever():
    """As many stacks as XLA has threads and more: jaxlib 0.10 waits in each."""
    subprocess.run(
        [sys.executable, "-c", SIDE_BY_SIDE],
        env=os.environ | {"NPROC": "2", "JAX_PLATFORMS": "cpu"},
        check=True,
        timeout=120,
    )

"""The oracle itself: the NumPy reading against the recorded torch runs."""

import golden_files
import numpy as np
import pytest
from reference import AdamVector, LDAdamMatrix, descend


def matrix_or_vector(shape, options):
    if len(shape) == 2:
        return LDAdamMatrix(tuple(shape), **options)
    adam = {name: options[name] for name in ("b1", "b2", "eps")}
    return AdamVector(tuple(shape), **adam)


@pytest.mark.parametrize("name", golden_files.NAMES)
def test_reference_follows_the_recorded_run(name):
    golden = golden_files.load(name)
    leaves = [matrix_or_vector(s, golden.options) for s in golden.meta["shapes"]]
    params = golden.values("p", 0)

    for t in range(golden.steps):
        grads = golden.values("g", t)
        for i, leaf in enumerate(leaves):
            direction = leaf.step(grads[i])
            params[i] = descend(
                params[i], direction, golden.learning_rate, golden.weight_decay
            )
        for i, expected in golden.values("p", t + 1).items():
            np.testing.assert_allclose(params[i], expected, rtol=0, atol=1e-9)
        for i, expected in golden.values("e", t + 1).items():
            actual = leaves[i].error_as_stored()
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-9)


def test_every_recorded_run_is_read():
    assert len(golden_files.NAMES) == 8
    with_errors = [n for n in golden_files.NAMES if golden_files.load(n).values("e", 1)]
    assert set(golden_files.NAMES) - set(with_errors) == {"no_error_feedback"}

"""Each loop of examples/loops.py comes to the loss that it states."""

import pytest

from examples import loops

# Flax broadcasts biases freely.
pytestmark = pytest.mark.usefixtures("any_rank_promotion")


@pytest.mark.parametrize("loop", loops.LOOPS, ids=lambda loop: loop.__name__)
def test_loop(loop):
    assert loop()[-1] < loops.LOOPS[loop]

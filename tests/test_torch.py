"""A published LDAdamW taken over in mid-run, from numbers that it recorded."""

import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ldadam_state

from ldadam_optax import LDAdamDimensionNumbers, from_torch, ldadam_error, ldadamw

FILE = pathlib.Path(__file__).parent / "torch_state" / "torch_state.npz"
NAMES = ("wide/kernel", "tall/kernel", "square/kernel", "wide/bias")
# The square matrix was compressed along torch's rows, the columns of the kernel.
SPECS = {
    "wide": {"kernel": LDAdamDimensionNumbers(), "bias": None},
    "tall": {"kernel": LDAdamDimensionNumbers()},
    "square": {"kernel": LDAdamDimensionNumbers(1, 0)},
}


class Tensor:
    """What the converter asks of torch's tensors."""

    def __init__(self, array):
        self.array, self.dtype = array, "torch.float64"

    def detach(self):
        return self

    cpu = detach

    def numpy(self):
        return self.array


class Recorded:
    """The file as torch would give it."""

    def __init__(self, wrap=np.asarray):
        with np.load(FILE) as file:
            self.arrays = {key: file[key] for key in file.files}
        self.options = json.loads(str(self.arrays.pop("meta")))
        state, self.errors = {}, {}
        for i in range(len(NAMES)):
            one = {"m": wrap(self.arrays[f"m_{i}"]), "v": wrap(self.arrays[f"v_{i}"])}
            one["beta1"] = self.options["betas"][0]
            if f"ortho_{i}" in self.arrays:
                ortho = wrap(self.arrays[f"ortho_{i}"])
                one["previous_projector"] = types.SimpleNamespace(ortho_matrix=ortho)
                one["left_proj"] = bool(self.arrays[f"left_{i}"])
                one["error_feedback"] = True
                self.errors[i] = wrap(self.arrays[f"e_{i}"])
            state[i] = one
        groups = [{"params": [0, 1, 2]}, {"params": [3]}]
        self.state_dict = {"state": state, "param_groups": groups}

    def tree(self, letter, step):
        """Parameters or gradients as a Flax model would hold them."""
        flat = [self.arrays[f"{letter}{step}_{i}"].T for i in range(len(NAMES))]
        wide, tall, square, bias = map(jnp.asarray, flat)
        return {
            "wide": {"kernel": wide, "bias": bias},
            "tall": {"kernel": tall},
            "square": {"kernel": square},
        }

    def optimizer(self, learning_rate=None, **options):
        b1, b2 = self.options["betas"]
        return ldadamw(
            learning_rate or self.options["lr"],
            b1=b1,
            b2=b2,
            rho=self.options["rho"],
            weight_decay=self.options["weight_decay"],
            **{"rank": self.options["rank"], "weight_dimension_numbers": SPECS}
            | options,
        )

    def convert(self, state, params, **changes):
        arguments = {
            "completed_steps": self.options["done"],
            "errors": self.errors,
            "weight_dimension_numbers": SPECS,
        }
        names = changes.pop("names", NAMES)
        return from_torch(self.state_dict, names, state, params, **arguments | changes)


@pytest.mark.parametrize("wrap", [np.asarray, Tensor])
def test_torchs_next_steps(wrap, x64):
    """The parameters that torch came to, step by step, in float64."""
    recorded = Recorded(wrap)
    done, after = recorded.options["done"], recorded.options["after"]
    tx = recorded.optimizer(lambda count: recorded.options["lr"])
    params = recorded.tree("p", done)
    state = recorded.convert(tx.init(params), params)
    matrices = {module: specs["kernel"] for module, specs in SPECS.items()}
    errors = ldadam_error(ldadam_state(state), weight_dimension_numbers=matrices)
    np.testing.assert_allclose(
        errors["wide"]["kernel"], recorded.arrays["e_0"].T, atol=1e-12
    )
    update = jax.jit(tx.update)
    for t in range(done, done + after):
        updates, state = update(recorded.tree("g", t), state, params)
        params = optax.apply_updates(params, updates)
        jax.tree.map(
            lambda a, e: np.testing.assert_allclose(a, e, rtol=0, atol=1e-9),
            params,
            recorded.tree("p", t + 1),
        )
    counts = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.int32]
    assert counts
    assert all(count == done + after for count in counts)


def test_a_stack_of_matrices(x64):
    """A leaf with a batch axis takes a parameter of torch for each matrix."""
    recorded = Recorded()
    del recorded.state_dict["state"][3]
    recorded.state_dict["param_groups"] = [{"params": [0, 0, 1, 2]}]
    kernel = recorded.tree("p", recorded.options["done"])["wide"]["kernel"]
    params = {"stack": jnp.stack([kernel, kernel], axis=1)}
    numbers = LDAdamDimensionNumbers(0, 2)
    tx = recorded.optimizer(weight_dimension_numbers=numbers)
    changes = {"names": ("stack", "stack", None, None)}
    changes["weight_dimension_numbers"] = numbers
    state = ldadam_state(recorded.convert(tx.init(params), params, **changes))
    alone_tx = recorded.optimizer()
    params = recorded.tree("p", recorded.options["done"])
    recorded = Recorded()
    alone = ldadam_state(recorded.convert(alone_tx.init(params), params))
    for i in range(2):
        np.testing.assert_array_equal(state.mu["stack"][i], alone.mu["wide"]["kernel"])
        np.testing.assert_array_equal(
            state.error["stack"][:, i], alone.error["wide"]["kernel"]
        )


def test_one_b1_for_all():
    recorded = Recorded()
    recorded.state_dict["state"][1]["beta1"] = 0.5
    params = recorded.tree("p", recorded.options["done"])
    with pytest.raises(ValueError, match="One b1"):
        recorded.convert(recorded.optimizer().init(params), params)


@pytest.mark.parametrize(
    ("options", "changes", "match"),
    [
        ({}, {"names": NAMES[:3]}, "Torch has 4 parameters, names has 3"),
        ({}, {"names": (*NAMES[:3], "bias")}, r"names has \['bias'\]"),
        ({}, {"names": (*NAMES[:3], None)}, "'wide/bias' has state here"),
        ({}, {"errors": None}, "'.*/kernel': pass errors"),
        ({}, {"transposed": False}, "'square/kernel': torch compressed the rows"),
        ({}, {"names": (NAMES[1], NAMES[0], *NAMES[2:])}, "is a matrix of"),
        ({"rank": 2}, {}, "give the optimizer torch's rank"),
        ({"error_dtype": "bfloat16"}, {}, "must be float32 or float64"),
        ({"mu_dtype": "int8"}, {}, "Moments in int8"),
    ],
)
def test_what_does_not_fit_is_told(options, changes, match):
    recorded = Recorded()
    params = recorded.tree("p", recorded.options["done"])
    state = recorded.optimizer(**options).init(params)
    with pytest.raises(ValueError, match=match):
        recorded.convert(state, params, **changes)

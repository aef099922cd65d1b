"""Records ``torch_state.npz``: a published LDAdamW in mid-run, and its next steps.

    pip install torch==2.13.0 && pip install --no-deps zij==0.1.1
    python tests/torch_state/record.py

The state is that of ``state_dict()``, array by array, with what the class keeps
elsewhere: the steps done and the errors in ``.grad``. Everything is float64; the class
computes QR and SVD in float32, which is replaced for the recording.
"""

import json
import pathlib

import numpy as np
import torch
from zij.contrib.memory_efficient import ldadamw

DONE, AFTER, RANK = 3, 4, 3
# As nn.Linear has its weights, (out, in): wide, tall, square; and a bias.
SHAPES = [(6, 12), (10, 5), (7, 7), (6,)]
OPTIONS = {"lr": 0.02, "betas": (0.9, 0.97), "weight_decay": 0.1, "rho": 0.8}


def svd_in_float64(projector, grad, svd_lowrank=False):
    left, _, right = torch.linalg.svd(grad, full_matrices=False)
    rank = projector.rank
    columns = projector.proj_type == "left"
    projector.ortho_matrix = left[:, :rank] if columns else right[:rank]


def main() -> None:
    ldadamw._gram_schmidt = lambda matrix: torch.linalg.qr(matrix)[0]
    ldadamw._LowRankProjector.get_orthogonal_matrix_svd = svd_in_float64
    torch.set_default_dtype(torch.float64)
    rng = np.random.default_rng(0)
    draw = lambda shape: torch.tensor(rng.normal(size=shape))
    params = [torch.nn.Parameter(draw(shape)) for shape in SHAPES]
    groups = [
        {"params": params[:3], "enable_lowrank": True},
        {"params": params[3:], "enable_lowrank": False},
    ]
    optimizer = ldadamw.LDAdamW(groups, rank=RANK, **OPTIONS)
    recorded = {}
    for t in range(DONE + AFTER):
        optimizer.zero_grad()
        for i, p in enumerate(params):
            grad = draw(p.shape)
            p.grad = grad.clone() if p.grad is None else p.grad + grad
            if t >= DONE:
                recorded[f"g{t}_{i}"] = grad.numpy()
        optimizer.step()
        if t + 1 >= DONE:
            for i, p in enumerate(params):
                recorded[f"p{t + 1}_{i}"] = p.detach().numpy().copy()
        if t + 1 == DONE:
            recorded |= state_of(optimizer, params)
    options = OPTIONS | {"rank": RANK, "done": DONE, "after": AFTER}
    path = pathlib.Path(__file__).with_name("torch_state.npz")
    np.savez_compressed(path, meta=json.dumps(options), **recorded)


def state_of(optimizer, params) -> dict[str, np.ndarray]:
    arrays = {}
    for i, one in optimizer.state_dict()["state"].items():
        arrays[f"m_{i}"], arrays[f"v_{i}"] = (one[k].numpy().copy() for k in "mv")
        if "previous_projector" in one:
            projector = one["previous_projector"].ortho_matrix
            arrays[f"ortho_{i}"] = projector.numpy().copy()
            arrays[f"left_{i}"] = np.asarray(one["left_proj"])
            arrays[f"e_{i}"] = params[i].grad.numpy().copy()
    return arrays


if __name__ == "__main__":
    main()

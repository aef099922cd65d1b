"""The published torch LDAdamW (`zij`), one step for each line read. No JAX in here.

Arguments: device, threads, rank, dtype, then the matrices' sizes. Answers the
version first, then the seconds of each step.
"""

import importlib.metadata
import sys
import time

import torch  # pyright: ignore[reportMissingImports]
from zij.contrib.memory_efficient.ldadamw import (  # pyright: ignore[reportMissingImports]
    LDAdamW,
)


def main() -> None:
    device, threads, rank, dtype, *sizes = sys.argv[1:]
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    shapes = [tuple(map(int, size.split("x"))) for size in sizes]
    make = {"device": device, "dtype": getattr(torch, dtype)}
    params = [torch.nn.Parameter(torch.randn(shape, **make)) for shape in shapes]
    grads = [[torch.randn(shape, **make) for shape in shapes] for _ in range(2)]
    optimizer = LDAdamW(params, lr=1e-3, rank=int(rank))
    zij = importlib.metadata.version("zij")
    print(f"torch {torch.__version__}, zij {zij}", flush=True)
    for count, _ in enumerate(sys.stdin):
        print(seconds_of_step(optimizer, params, grads[count % 2]), flush=True)


def seconds_of_step(optimizer, params, grads) -> float:
    """Time `step` alone: the code keeps its error in `.grad`, to which we add."""
    with torch.no_grad():
        for param, grad in zip(params, grads, strict=True):
            if param.grad is None:
                param.grad = grad.clone()
            else:
                param.grad.add_(grad)
    synchronize(params[0])
    start = time.perf_counter()
    optimizer.step()
    synchronize(params[0])
    return time.perf_counter() - start


def synchronize(param) -> None:
    if param.is_cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

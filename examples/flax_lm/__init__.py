"""A Llama-style language model in Flax NNX, trained with LDAdam; see `train.py`."""

import ctypes
import platform

if platform.libc_ver()[0] == "glibc":
    # XLA's buffers on the CPU come from malloc, which by default hands large ones back
    # to the system at once: a third of a step went into mapping them again. Have it
    # keep them. The numbers are malloc.h's M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX;
    # they count before NumPy and JAX start their threads.
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-8, 1)):
        ctypes.CDLL(None).mallopt(option, value)

"""Launches of Triton kernels that were compiled before, without Triton's look-up of which one.

Triton looks at every argument of every launch to find the kernel that was compiled for such
arguments, which takes longer than the work of a few rows. Here a caller says what the kernel
depends on beside where its tensors lie.
"""

from torch import Tensor

ALIGNED = 16  # bytes; Triton compiles separate kernels for aligned and other pointers
MOST = 4096  # the most compiled kernels in the cache

_compiled: dict[tuple, object] = {}
_direct = [True]  # whether compiled kernels accept the same arguments as kernels


def launch(kernel, programs: int, key: tuple, arguments: tuple, **options) -> None:
    """Launch a kernel on one axis of programs.

    Args:
        kernel: of `triton.jit`.
        programs: number of programs.
        key: everything that a compiled kernel depends on (sizes, constants, options, device),
            without its tensors' types and alignment; other arguments are not specialized.
        arguments: in the kernel's order, its constants included.
        options: `num_warps`, `num_stages`.
    """
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    aligned = all(tensor.data_ptr() % ALIGNED == 0 for tensor in tensors)
    key = kernel, *key, *(tensor.dtype for tensor in tensors)
    compiled = _compiled.get(key) if aligned and _direct[0] else None
    if compiled is not None:
        try:
            compiled[programs, 1, 1](*arguments)
            return
        except TypeError:  # raised before anything is launched
            _direct[0] = False
    new_kernel = kernel[(programs,)](*arguments, **options, enable_fp_fusion=False)
    if aligned and new_kernel is not None and len(_compiled) < MOST:  # the interpreter returns None
        _compiled[key] = new_kernel

"""Kernels that were compiled before are launched again, with stand-ins for Triton's."""

import pytest
import torch

from helpers.quantization import int8_cuda


class Kernel:
    """As of `triton.jit`: launched by `kernel[grid](…)`, which returns what it compiled."""

    def __init__(self, *, fails=False):
        self.looked_up, self.direct, self.fails = [], [], fails

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.looked_up.append((grid, arguments, options))
            return Compiled(self)

        return run


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def run(*arguments):
            if self.kernel.fails:
                raise TypeError("function takes exactly 9 arguments")
            self.kernel.direct.append((grid, arguments))

        return run


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(int8_cuda, "_compiled", {})
    monkeypatch.setattr(int8_cuda, "_direct", [True])


def test_a_second_launch_takes_the_compiled_kernel_with_its_own_arguments():
    kernel, (x, y) = Kernel(), torch.zeros(2, 32)
    int8_cuda.launch(kernel, 3, (32,), (x, 32), num_warps=4)
    int8_cuda.launch(kernel, 5, (32,), (y, 32), num_warps=4)
    assert len(kernel.looked_up) == 1
    grid, (given, size) = kernel.direct[0]
    assert (grid, given.data_ptr(), size) == ((5, 1, 1), y.data_ptr(), 32)


def test_another_key_or_kernel_is_looked_up():
    kernel, other, x = Kernel(), Kernel(), torch.zeros(32)
    for each, key in ((kernel, 32), (kernel, 16), (other, 32)):
        int8_cuda.launch(each, 1, (key,), (x, key), num_warps=4)
    assert (len(kernel.looked_up), len(other.looked_up)) == (2, 1)
    assert not kernel.direct + other.direct


def test_another_type_is_looked_up():
    kernel = Kernel()
    for dtype in (torch.float32, torch.bfloat16):
        int8_cuda.launch(kernel, 1, (), (torch.zeros(32, dtype=dtype),), num_warps=4)
    assert len(kernel.looked_up) == 2


def test_a_tensor_that_is_not_aligned_never_meets_a_kernel_compiled_for_aligned_ones():
    kernel, x = Kernel(), torch.zeros(32)
    for each in (x[1:], x, x[1:], x):
        int8_cuda.launch(kernel, 1, (), (each,), num_warps=4)
    assert len(kernel.looked_up) == 3
    assert [given[0].data_ptr() for _, given in kernel.direct] == [x.data_ptr()]


def test_a_triton_whose_compiled_kernels_take_other_arguments_is_asked_every_time():
    kernel, x = Kernel(fails=True), torch.zeros(32)
    for _ in range(3):
        int8_cuda.launch(kernel, 1, (), (x,), num_warps=4)
    assert (len(kernel.looked_up), len(kernel.direct)) == (3, 0)

"""`compare_samples` in the interpreter: which bits it keeps, what it notices, and what it does not read."""

import pytest
import torch

from res2net_fused._native import library
from res2net_fused.backends.cpu.settings import operators
from res2net_fused.backends.triton.kernels.compare_samples import ROWS
from res2net_fused.backends.triton.samples import compare_samples, keep_samples, sample_table

SLOTS = 8
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool]


def random(*shape, dtype=torch.float32, seed=0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def noticed(*tables):
    slots = torch.zeros(SLOTS, dtype=torch.int64)
    compare_samples(torch.cat(tables), slots)
    return slots.tolist()


def kept(tensors, number=3):
    table = sample_table(tensors, number)
    keep_samples(table, torch.zeros(SLOTS, dtype=torch.int64))
    assert noticed(table) == [0] * SLOTS
    return table


def tensors_of(dtype):
    weight = random(6, 4, 3, 3, dtype=dtype)
    return [weight, weight.to(memory_format=torch.channels_last), random(7, dtype=dtype)[2:], weight.transpose(0, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_are_those_that_cpus_keep(dtype):
    tensors = tensors_of(dtype)
    table = kept(tensors)
    if not library.cpu_library().loaded:
        pytest.skip(library.cpu_library().reason)
    count = 16 * len(tensors)
    bits = table[:, 2].flatten()
    own = torch.cat([values.view(torch.uint8).view(-1, 8)[:, : dtype.itemsize].flatten() for values in bits[:count].split(16)])
    assert torch.equal(own, operators.cpu_samples(tensors)) and not bits[count:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_changed_bit_of_any_sample_is_noticed(dtype):
    tensors = [tensor.clone() for tensor in tensors_of(dtype)]
    table = kept(tensors)
    for tensor in tensors:
        before = tensor.clone()
        tensor.copy_(tensor == 0)
        assert noticed(table)[3] == 3
        tensor.copy_(before)
        assert noticed(table) == [0] * SLOTS


def test_minus_zero_and_nan_are_bits():
    values = torch.tensor([0.0, float("nan")])
    table = kept([values])
    values[0] = -0.0
    assert noticed(table)[3] == 3


def test_each_block_is_noticed_by_its_number():
    blocks = [[random(40, dtype=torch.float32, seed=i * 9 + k) for k in range(40)] for i in range(3)]
    tables = [kept(tensors, number) for number, tensors in zip((4, 13, 6), blocks, strict=True)]
    assert {len(table) for table in tables} == {-(-40 * 16 // ROWS)}
    blocks[1][39][-1] += 1  # in its table's second part
    assert noticed(*tables) == [0, 0, 0, 0, 0, 13, 0, 0]
    blocks[2][0][0] += 1
    assert noticed(*tables) == [0, 0, 0, 0, 0, 13, 6, 0]


def test_what_lies_outside_its_storage_is_not_read():
    freed, short, turned = random(64), random(64), random(8, 8).t()
    freed.untyped_storage().resize_(0)
    short.untyped_storage().resize_(100)
    turned.untyped_storage().resize_(100)
    strange = [freed, short, turned, torch.empty(0), torch.zeros(2, dtype=torch.complex128), torch.zeros(1, 1, 1, 1, 2)]
    table = sample_table(strange, 5)
    assert not table[:, 0].any() and not (table[:, 1] & 15).any()
    assert noticed(table) == [0] * SLOTS


def test_what_lies_beside_is_another_ones():
    flat = torch.zeros(12, dtype=torch.float16)
    table = kept([flat[3:5]])
    flat[:3], flat[5:] = 7, 7
    assert noticed(table) == [0] * SLOTS

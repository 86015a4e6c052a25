"""Attention folded block by block, in any order and over processes, is the attention of one machine."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.functional import scaled_dot_product_attention

from saccade import SaccadeError
from saccade.papers.unified_sequence import blockwise_attention, empty, finish, fold, ring_attention

LENGTHS = {2: (5, 8), 3: (4, 7, 2)}


def tensors(tokens, dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(2, 3, tokens, 4, dtype=dtype) for _ in range(4)]


@pytest.mark.parametrize("block", [1, 3, 13, 50])
def test_blocks_of_any_size(block):
    q, k, v, _ = tensors(13)
    torch.testing.assert_close(blockwise_attention(q, k, v, block), scaled_dot_product_attention(q, k, v))
    with pytest.raises(SaccadeError, match="block=0"):
        blockwise_attention(q, k, v, 0)


def test_order_does_not_matter_and_large_scores_do_not_overflow():
    q, k, v, _ = tensors(12)
    q = 200 * q
    wanted = scaled_dot_product_attention(q, k, v)
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        sums = empty(q, v)
        for part in order:
            sums = fold(sums, q, k[:, :, 4 * part:4 * part + 4], v[:, :, 4 * part:4 * part + 4], 0.5)
        torch.testing.assert_close(finish(sums)[0], wanted)
    half = [x.bfloat16() for x in tensors(64)[:3]]
    exact = scaled_dot_product_attention(*(x.double() for x in half))
    assert (blockwise_attention(*half, 8).double() - exact).abs().max() < 0.01  # the sums are float32


def worker(rank, workers, folder, causal):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{causal}", rank=rank, world_size=workers)
    lengths = LENGTHS[workers]
    here = slice(sum(lengths[:rank]), sum(lengths[:rank + 1]))
    q, k, v, slope = tensors(sum(lengths))
    mine = [x[:, :, here].clone().requires_grad_() for x in (q, k, v)]
    out = ring_attention(*mine, causal=causal)
    out.backward(slope[:, :, here])
    torch.save([out.detach(), *(x.grad for x in mine)], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("workers, causal", [(2, False), (3, True)])
def test_over_processes(workers, causal, tmp_path):
    mp.spawn(worker, (workers, str(tmp_path), causal), nprocs=workers)
    q, k, v, slope = tensors(sum(LENGTHS[workers]))
    whole = [x.requires_grad_() for x in (q, k, v)]
    out = scaled_dot_product_attention(*whole, is_causal=causal)
    out.backward(slope)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(workers)]
    for number, wanted in enumerate((out.detach(), q.grad, k.grad, v.grad)):
        torch.testing.assert_close(torch.cat([part[number] for part in parts], 2), wanted)


def test_alone():
    q, k, v, _ = tensors(9)
    torch.testing.assert_close(ring_attention(q, k, v, causal=True),
                               scaled_dot_product_attention(q, k, v, is_causal=True))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: ring_attention(*x), leaves)

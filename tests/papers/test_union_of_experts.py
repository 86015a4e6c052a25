"""Union of Experts: who takes which token, images alone and in a batch, the packed form against the masked one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from saccade import SaccadeError, Site, record
from saccade.papers.union_of_experts import Router, SelectiveAttention, UnionOfMlps, packed
from tests.contracts.registered import randomised


def test_every_expert_takes_as_many_as_the_fullest():
    """Chosen tokens, then the first of those that chose others; a batch of one is what the authors' code does."""
    torch.manual_seed(0)
    router, x = Router(8, 4, 2, 1.0, 0.0, batched=False), torch.randn(3, 11, 8)
    taken, gates, total = router(x)
    torch.testing.assert_close(gates.sum(-1), torch.ones(3, 11))
    torch.testing.assert_close(total[..., 0], gates.sum(-1))
    for image in range(3):
        chosen = gates[image].T > 0
        places = int(chosen.sum(1).max())
        for expert in range(4):
            mine = chosen[expert].nonzero()[:, 0].tolist()
            free = [token for token in range(11) if token not in mine][:places - len(mine)]
            assert taken[image, expert].nonzero()[:, 0].tolist() == sorted(mine + free)
        assert torch.equal(router(x[image:image + 1])[0][0], taken[image])
    router.batched = True
    assert router(x)[0].sum(-1).unique().tolist() == [int(taken.sum(-1).max())]
    tokens, none = packed(router(x)[0])
    assert none is None and (tokens.diff() > 0).all()


@pytest.mark.parametrize("batched", [False, True])
def test_packed_and_masked_are_one(batched):
    torch.manual_seed(0)
    attention = randomised(SelectiveAttention(Site(16, 4), batched=batched)).double()
    mlp = randomised(UnionOfMlps(16, batched=batched)).double()
    x = torch.randn(3, 5, 4, 16, dtype=torch.float64)
    model = torch.nn.Sequential(attention, mlp)
    with record(model):
        masked = model(x)
    torch.testing.assert_close(model(x), masked)


def test_mlp_token_by_token():
    torch.manual_seed(0)
    mlp, x = randomised(UnionOfMlps(8, 12, experts=3, top=1)).double(), torch.randn(1, 7, 8, dtype=torch.float64)
    taken, gates, _ = mlp.router(x)
    for token in range(7):
        wanted = torch.zeros(8, dtype=torch.float64)
        for expert in range(3):
            if taken[0, expert, token]:
                gate, value = (x[0, token] @ mlp.enter[way, expert] + mlp.enter_bias[way, expert, 0] for way in (0, 1))
                wanted += (F.silu(gate) * value) @ mlp.leave[expert] + mlp.leave_bias[expert]
        torch.testing.assert_close(mlp(x)[0, token], wanted * gates[0, token].sum())


def test_what_makes_no_sense_is_one_line():
    with pytest.raises(SaccadeError, match="top=5 of 4 experts"):
        SelectiveAttention(Site(16, 4), top=5)
    with pytest.raises(SaccadeError, match="3 experts do not divide 32"):
        UnionOfMlps(16, experts=3)


def test_the_gradient_of_the_sum_of_gates_does_not_cancel():
    """It is epsilon / (S + epsilon)^2 of the scores' own: a millionth, and in float32 still right."""
    router = Router(8, 4, 2, 1.0, 1e-6, batched=False)
    x, pull = torch.randn(3, 11, 8), torch.randn(3, 11, 1)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        router.zero_grad()
        router.to(dtype)
        (router(x.to(dtype))[2] * pull.to(dtype)).sum().backward()
        gradients.append(router.gate.weight.grad.double())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-10)

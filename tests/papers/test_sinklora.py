"""What the golden of shifted sparse attention does not show: sinks, both sides of the wrap, odd runs, the cache."""

from __future__ import annotations

import pytest
import torch

from saccade import SaccadeError, Site, record
from saccade.papers.sinklora import HeavyHitterCache, SinkFixedAttention
from tests.contracts.registered import randomised


def sees(i, j, shifted, count, length, sinks, causal, cyclic):
    """Whether token i sees token j, said in words rather than tables."""
    if causal and not cyclic and j > i:
        return False
    if j < sinks or (i < sinks and not causal):
        return not causal or j <= i
    start = -(-length // 2) if shifted else 0
    run = [((n - start) % count) // length for n in (i, j)]
    if run[0] != run[1]:
        return False
    if not cyclic:
        return (i < start) == (j < start)
    return not causal or (j - start) % count <= (i - start) % count


@pytest.mark.parametrize("count", [16, 13, 3])
@pytest.mark.parametrize("heads", [3, 4])
@pytest.mark.parametrize("options", [
    {}, {"causal": True}, {"sinks": 0}, {"sinks": 0, "cyclic": True}, {"groups": 1}, {"sinks": 2, "cyclic": True},
], ids=str)
def test_who_sees_whom(count, heads, options):
    mixer = torch.nn.Sequential(randomised(SinkFixedAttention(Site(12, heads, grid=(count,)), **options)).double())
    x = torch.randn(2, count, 12, dtype=torch.float64)
    with torch.no_grad(), record(mixer) as r:
        watched = mixer(x)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), watched)
    one = mixer[0]
    length = max(count // one.groups, 1)
    q, k, v = one.qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    logits, rows = q @ k.mT * q.shape[-1] ** -0.5, torch.arange(count)
    for head in range(heads):
        shifted = head >= heads // 2
        for i in range(count):
            for j in range(count):
                if not sees(i, j, shifted, count, length, min(one.sinks, count), one.causal, one.cyclic):
                    logits[:, head, i, j] = -torch.inf
    weights = logits.softmax(-1)
    if one.cyclic and not one.sinks and length % 2:  # as published: the shifted heads' rows return one place early
        weights = torch.cat([weights[:, :heads // 2], weights[:, heads // 2:, (rows + 1) % count]], 1)
    torch.testing.assert_close(r["0"].dense(batch=2), weights.detach())
    torch.testing.assert_close(watched, one.proj((weights @ v).transpose(1, 2).flatten(2)).detach())


@pytest.mark.parametrize("causal", [False, True])
def test_a_watcher_s_weights_decide(causal):
    """What it hands back mixes the values, and slopes of the output reach the weights."""
    mixer = torch.nn.Sequential(randomised(SinkFixedAttention(Site(8, 2, grid=(13,)), causal=causal)).double().eval())
    x = torch.randn(1, 13, 8, dtype=torch.float64)
    with record(mixer, change=lambda name, weights: weights * torch.tensor([2.0, 0.0]).view(1, 2, 1, 1)):
        found = mixer(x)
    _, _, v = mixer[0].qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    with record(mixer, attached=True) as r:
        out = mixer(x)
    weights = r["0"].parts[0].weights
    doubled = torch.cat([2 * (weights @ v)[:, 0], 0 * v[:, 1]], -1)
    torch.testing.assert_close(found, mixer[0].proj(doubled))
    slope = torch.autograd.grad(out[0, 5].sum(), weights)[0]
    wanted = torch.einsum("hd,hnd->hn", mixer[0].proj.weight.sum(0).view(2, 4), v[0])
    seen = weights[0, :, 5] > 0
    torch.testing.assert_close(slope[0, :, 5][seen], wanted[seen])


@pytest.mark.parametrize("count", [28, 32])
def test_the_published_form_in_rolls(count):
    """Runs of 7 and of 8 tokens: half of the heads rolled by -7 // 2 = -4, and back by 3."""
    mixer = SinkFixedAttention(Site(8, 2, grid=(count,)), sinks=0, causal=True, cyclic=True).double()
    x, length = torch.randn(1, count, 8, dtype=torch.float64), count // 4
    q, k, v = (part.clone() for part in mixer.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4))
    for each in (q, k, v):
        each[:, 1] = each[:, 1].roll(-length // 2, 1)
    q, k, v = (each.unflatten(2, (4, length)) for each in (q, k, v))
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    out = ((q @ k.mT / 2).masked_fill(hidden, -torch.inf).softmax(-1) @ v).flatten(2, 3)
    out[:, 1] = out[:, 1].roll(length // 2, 1)
    torch.testing.assert_close(mixer(x), mixer.proj(out.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("cyclic", [False, True])
def test_only_the_cyclic_shift_shows_the_future(cyclic):
    mixer = randomised(SinkFixedAttention(Site(8, 2, grid=(16,)), causal=True, cyclic=cyclic)).double()
    x = torch.randn(1, 16, 8, dtype=torch.float64)
    moved = x.clone()
    moved[0, 15] += 1
    with torch.no_grad():
        change = (mixer(moved) - mixer(x)).abs().amax(-1)[0, :15]
    assert bool(change[:2].any()) == cyclic and not change[2:].any()


def test_grouped_heads_share_keys():
    mixer = randomised(SinkFixedAttention(Site(8, 4, grid=(12,)), kv_heads=2, rotary=100.0)).double()
    whole = SinkFixedAttention(Site(8, 4, grid=(12,)), rotary=100.0).double()
    q, k, v = mixer.qkv.weight.split([8, 4, 4])
    with torch.no_grad():
        whole.qkv.weight.copy_(torch.cat([q, *(each.view(2, 2, 8).repeat_interleave(2, 0).flatten(0, 1)
                                               for each in (k, v))]))
        whole.proj.weight.copy_(mixer.proj.weight)
        x = torch.randn(1, 12, 8, dtype=torch.float64)
        torch.testing.assert_close(mixer(x), whole(x))
    site = Site(8, 4, grid=(12,))
    assert whole.cost(site, (12,)) - mixer.cost(site, (12,)) == 12 * 8 * 8


def slow_cache(q, k, v, heavy, recent):
    """One head, one step at a time, all in lists."""
    kept, received, outputs = [], {}, []
    for step in range(len(q)):
        kept.append(step)
        received[step] = 0.0
        weights = torch.softmax(torch.stack([q[step] @ k[j] for j in kept]) * q.shape[-1] ** -0.5, 0)
        outputs.append(sum(w * v[j] for w, j in zip(weights, kept)))
        for w, j in zip(weights.tolist(), kept):
            received[j] += w
        old = kept[:-recent]
        best = sorted(sorted(old, key=lambda j: -received[j])[:heavy])
        kept = best + kept[-recent:]
    return torch.stack(outputs)


@pytest.mark.parametrize(("heavy", "recent"), [(2, 3), (0, 4), (3, 1), (50, 1)])
def test_the_cache_in_loops(heavy, recent):
    q, k, v = (3 * torch.randn(2, 3, 20, 4, dtype=torch.float64) for _ in range(3))
    cache = HeavyHitterCache(heavy, recent)
    out = torch.cat([cache.attend(*(each[:, :, step:step + 1] for each in (q, k, v))) for step in range(20)], 2)
    assert cache.keys.shape[2] == min(20, heavy + recent)
    for image in range(2):
        for head in range(3):
            wanted = slow_cache(q[image, head], k[image, head], v[image, head], heavy, recent)
            torch.testing.assert_close(out[image, head], wanted)


def test_a_cache_that_keeps_all_is_causal_attention():
    """Several tokens at once, as of a prompt, and then one by one."""
    q, k, v = (torch.randn(2, 3, 11, 4, dtype=torch.float64) for _ in range(3))
    cache = HeavyHitterCache(5, 6)
    out = torch.cat([cache.attend(*(each[:, :, here] for each in (q, k, v)))
                     for here in (slice(7), slice(7, 8), slice(8, 11))], 2)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out, wanted)


def test_what_makes_no_sense_is_one_line():
    with pytest.raises(SaccadeError, match="kv_heads=3 does not divide 4"):
        SinkFixedAttention(Site(8, 4), kv_heads=3)
    with pytest.raises(SaccadeError, match="groups=0"):
        SinkFixedAttention(Site(8, 4), groups=0)
    with pytest.raises(SaccadeError, match="recent=0"):
        HeavyHitterCache(4, 0)

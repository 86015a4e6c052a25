"""FIT against loops, and by what it lets pass between groups."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F

from saccade import SaccadeError, create_model
from saccade.core.record import record
from saccade.papers.fit import FIT, AutoregressiveFIT, DenoisingFIT, time_code
from saccade.parts.interleaved import parse_layers
from saccade.parts.pixels import image_of
from saccade.tools.measure import count_macs
from tests.contracts.registered import randomised


def attention(x, context, q, k, v, proj, heads):
    """One head and one query after another."""
    queries, keys, values = q(x), k(context), v(context)
    width = queries.shape[-1] // heads
    out = torch.zeros_like(queries)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        for i in range(len(x)):
            scores = torch.stack([queries[i, part] @ key for key in keys[:, part]]) / width**0.5
            out[i, part] = sum(weight * value for weight, value in zip(scores.softmax(0), values[:, part]))
    return proj(out)


def part_of(layer, number, of):
    weights, biases = layer.weight.chunk(of)[number], layer.bias.chunk(of)[number]
    return lambda x: F.linear(x, weights, biases)


def layer(block, x, heads):
    normed, qkv = block.norm1(x), block.mixer.qkv
    x = x + attention(normed, normed, *(part_of(qkv, number, 3) for number in range(3)), block.mixer.proj, heads)
    return x + block.mlp(block.norm2(x))


def exchange(block, x, context):
    return x + attention(block.norm(x), block.context_norm(context), block.q, part_of(block.kv, 0, 2),
                         part_of(block.kv, 1, 2), block.proj, block.heads)


def slow(model, image, side, count):
    """The whole encoder, group after group."""
    tokens = model.stem(image)[0]
    rows, columns = tokens.shape[0] // side, tokens.shape[1] // side
    x = {(r, c): tokens[r * side:(r + 1) * side, c * side:(c + 1) * side].flatten(0, 1) + model.positions.position
         for r in range(rows) for c in range(columns)}
    z = {group: model.positions.latents[0][group].view(count, -1) for group in x}
    for block in model.blocks:
        for group in x:
            for local in block.local:
                x[group] = layer(local, x[group], local.site.heads)
        if block.read is not None:
            z = {group: exchange(block.read, z[group], x[group]) for group in x}
            every = torch.cat(list(z.values()))
            for over in block.over:
                every = layer(over, every, over.site.heads)
            z = dict(zip(z, every.split(count), strict=True))
        if block.write is not None:
            x = {group: exchange(block.write, x[group], z[group]) for group in x}
    out = torch.empty_like(tokens)
    for (r, c), value in x.items():
        out[r * side:(r + 1) * side, c * side:(c + 1) * side] = value.unflatten(0, (side, side))
    return out, torch.stack(list(z.values()))


@pytest.mark.parametrize("layers", ["(1)1(1)1(1)", "(2)1(1)2", "(2)"])
def test_equal_to_loops(layers):
    model = randomised(create_model("fit_nano", layers=layers, img_size=(16, 24))).double().eval()
    image = torch.randn(1, 3, 16, 24, dtype=torch.float64)
    with torch.no_grad():
        x, z = slow(model, image, 2, 3)
        torch.testing.assert_close(model.features(image)[-1][0].movedim(0, -1), x, rtol=1e-9, atol=1e-9)
        last = model.norm(z if model.reads_latents else x).flatten(0, 1).mean(0)
        torch.testing.assert_close(model(image)[0], model.head.fc(last), rtol=1e-9, atol=1e-9)


def moved(layers, feature):
    """Which of the 4 x 4 groups of the last map feel a change of the patches of group (1, 2)."""
    model = randomised(create_model("fit_nano", layers=layers)).double().eval()
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    other = image.clone()
    other[..., 8:16, 16:24] += torch.randn(8, 8, dtype=torch.float64)
    with torch.no_grad():
        change = (model.features(image)[feature] - model.features(other)[feature]).abs().sum((0, 1))
    return change.unflatten(0, (4, 2)).unflatten(-1, (4, 2)).sum((1, 3)) > 1e-12


def test_groups_meet_in_the_latents_alone():
    """Without global layers, or before a write, groups are apart: global layers at the end never reach x."""
    own = torch.zeros(4, 4, dtype=torch.bool)
    own[1, 2] = True
    assert torch.equal(moved("(2)", -1), own) and torch.equal(moved("(1)2", -1), own)
    assert moved("(1)1(1)", -1).all() and moved("(1)1(1)1(1)", 0).all()


def test_the_latents_know_the_whole_image_at_the_end():
    model = randomised(create_model("fit_nano", layers="(1)1")).double().eval()
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    model.forward_features(image)[0, :, 0, 0].sum().backward()  # one latent of one group
    assert (image.grad.unflatten(2, (4, 8)).unflatten(4, (4, 8)).abs().amax((0, 1, 3, 5)) > 0).all()


def test_groups_of_equal_codes_can_change_places():
    model = randomised(create_model("fit_nano")).double().eval()
    with torch.no_grad():
        model.positions.latents.copy_(model.positions.latents[:, :1, :1].expand_as(model.positions.latents))
        image = torch.randn(1, 3, 32, 32, dtype=torch.float64)
        turned = model.features(image.roll((8, 16), (2, 3)))[-1]
        torch.testing.assert_close(turned, model.features(image)[-1].roll((2, 4), (2, 3)), rtol=1e-9, atol=1e-9)


def test_padding_is_not_seen():
    """An image that fills no group: what is beyond its patches does not count."""
    model = randomised(create_model("fit_nano")).double().eval()
    image = torch.randn(1, 3, 20, 36, dtype=torch.float64)
    seen = []
    model.blocks[0].local[0].register_forward_hook(lambda module, inputs, out: seen.append(out))
    with torch.no_grad():
        out = model.features(image)[0]
        block, x = model.blocks[0], seen[0]
        z = model.positions(model.stem(image))[1].unflatten(1, (3, 5))
        edge = exchange(block.read, z[0, 2, 4], x[0, 4:, 8:].flatten(0, 1))  # a group of one token
    assert out.shape == (1, 32, 5, 9)
    read = []
    block.read.register_forward_hook(lambda module, inputs, out: read.append(out))
    with torch.no_grad():
        model(image)
    torch.testing.assert_close(read[0].unflatten(0, (3, 5))[2, 4], edge, rtol=1e-9, atol=1e-9)


def test_multiply_adds_and_parameters():
    """Attention costs t n^2 + (t m)^2 + 2 t n m, projections what is linear; parameters do not grow with the image."""
    settings = dict(layers="(2)3(1)", dim=24, latent_dim=40, heads=2, latent_heads=2, latents=3, window=4, patch=4)
    model = create_model("fit_nano", **settings, img_size=64, num_classes=10)
    t, n, m, d, e, linear = 16, 16, 3, 24, 40, 0
    linear += t * n * (3 * 16) * d + 3 * t * n * 12 * d**2  # patches; three local layers with MLPs of ratio 4
    linear += 3 * t * m * 12 * e**2  # global layers
    linear += t * (m * e * d + n * d * 2 * d + m * d * e)  # read: q, kv, proj
    linear += t * (n * d * d + m * e * 2 * d + n * d * d)  # write
    quadratic = 3 * t * n**2 * 2 * d + 3 * (t * m) ** 2 * 2 * e + 2 * t * n * m * 2 * d
    assert count_macs(model, (torch.randn(1, 3, 64, 64),)) == linear + quadratic + d * 10
    larger = create_model("fit_nano", **settings, img_size=128, num_classes=10)
    grown = sum(p.numel() for p in larger.parameters()) - sum(p.numel() for p in model.parameters())
    assert grown == (64 - 16) * m * e


def autoregressive():
    torch.manual_seed(0)
    model = AutoregressiveFIT(11, 12, 24, 36, 2, 3, "(1)1(2)2(1)", latents=2, group=4)
    return randomised(model).double().eval()


@pytest.mark.parametrize("length", [12, 10, 17])
def test_autoregressive_scores_depend_on_earlier_tokens_alone(length):
    model = autoregressive()
    with torch.no_grad():
        x, z = model.positions(torch.randn(1, length, 24, dtype=torch.float64))
        for place in range(length):
            other = x.clone()
            other[:, place] += torch.randn(24, dtype=torch.float64)
            (a, b), (c, d) = (x, z), (other, z)
            for block in model.blocks:
                (a, b), (c, d) = block(a, b), block(c, d)
            change = (a - c).abs().amax((0, 2))
            assert not change[:place].any()
            assert change[place] > 0 and (place // 4 == (length - 1) // 4 or change[-1] > 0)


def test_the_first_group_is_written_to_from_a_constant():
    """From zeros, whatever the tokens are: their norm's bias is all that comes."""
    model = autoregressive()
    write, block = [], model.blocks[0]
    block.write.register_forward_hook(lambda module, inputs, out: write.append((out - inputs[0])[0]))
    tokens = torch.randint(0, 11, (2, 12))
    with torch.no_grad():
        scores = model(tokens)
    value = block.write.proj(part_of(block.write.kv, 1, 2)(block.write.context_norm.bias))
    torch.testing.assert_close(write[0], value.expand(4, -1), rtol=1e-9, atol=1e-9)
    assert scores.shape == (2, 12, 11)


def test_recorded_attention_stays_in_its_group():
    """Five by nine tokens in groups of two by two: each row sums to one, over tokens of the own group alone."""
    model, image = randomised(create_model("fit_nano")).eval(), torch.randn(2, 3, 20, 36)
    with torch.no_grad():
        plain = model(image)
        with record(model) as seen:
            torch.testing.assert_close(model(image), plain)
    weights = seen["blocks.0.local.0.mixer"].dense(batch=2)
    group = torch.arange(5)[:, None] // 2 * 5 + torch.arange(9) // 2
    same = group.flatten()[:, None] == group.flatten()
    assert weights.shape == (2, 2, 45, 45) and torch.equal(weights > 0, same.expand_as(weights))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 45))


def test_layers_are_read():
    assert parse_layers("(2)4(2)4(2)") == [(2, 4), (2, 4), (2, 0)] and parse_layers("(12)3") == [(12, 3)]
    for wrong in ("(2)(2)", "2(4)", "", "(2)4)", "(2)0(2)"):
        with pytest.raises(SaccadeError, match=re.escape(f"layers={wrong!r}")):
            parse_layers(wrong)


def test_local_layers_take_any_mixer():
    model = create_model("fit_nano", mixer={"blocks.1.*": "pooling"})
    kinds = [type(layer.mixer).__name__ for block in model.blocks for layer in block.local]
    assert isinstance(model, FIT) and kinds == ["GroupAttention", "Pooling", "GroupAttention"]


def denoiser(**options):
    torch.manual_seed(0)
    settings = dict(dim=16, latent_dim=32, heads=2, latent_heads=4, layers="(1)1(1)1(1)", latents=3, window=2, patch=4,
                    img_size=(16, 24))
    return randomised(DenoisingFIT(**settings | options)).double().eval()


def test_the_denoiser_in_loops():
    """Group after group; all latents attend to the time and the condition once they have read."""
    model, image = denoiser(condition_dim=5), torch.randn(1, 3, 16, 24, dtype=torch.float64)
    time, condition = torch.tensor([0.3], dtype=torch.float64), torch.randn(1, 2, 5, dtype=torch.float64)
    previous = torch.randn(1, 6, 3, 32, dtype=torch.float64)
    with torch.no_grad():
        tokens = model.stem(image)[0]
        x = {(r, c): tokens[2 * r:2 * r + 2, 2 * c:2 * c + 2].flatten(0, 1) + model.positions.position
             for r in range(2) for c in range(3)}
        start = model.before_norm(previous + model.before(previous))[0]
        z = {group: model.positions.latents[0][group].view(3, 32) + start[number] for number, group in enumerate(x)}
        context = torch.cat([model.time(time_code(time, 8)), model.condition(condition)[0]])
        for block in model.blocks:
            x = {group: layer(block.local[0], value, 2) for group, value in x.items()}
            if block.read is not None:
                z = {group: exchange(block.read, z[group], x[group]) for group in x}
                every = layer(block.over[0], exchange(block.inform, torch.cat(list(z.values())), context), 4)
                z = dict(zip(z, every.split(3), strict=True))
                x = {group: exchange(block.write, x[group], z[group]) for group in x}
        rows = [torch.cat([x[r, c].unflatten(0, (2, 2)) for c in range(3)], 1) for r in range(2)]
        guess = model.guess(model.norm(torch.cat(rows))).flatten(0, 1)[None]
        got, latents = model(image, time, condition, previous)
    torch.testing.assert_close(got, image_of(guess, 4, (4, 6)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(latents[0], torch.stack(list(z.values())), rtol=1e-9, atol=1e-9)


def test_time_code():
    """Of mean 0 and variance 1; the angles go from 1000 t down."""
    code = time_code(torch.tensor([0.25, 1.0]), 64)
    torch.testing.assert_close(code.mean(-1), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(code.square().mean(-1), torch.ones(2))
    raw = torch.tensor([[fun(1000 * t / 10000 ** (i / 64)) for fun in (math.sin, math.cos) for i in range(0, 64, 2)]
                        for t in (0.25, 1.0)])
    torch.testing.assert_close(code, (raw - raw.mean(-1, keepdim=True)) / raw.std(-1, correction=0, keepdim=True),
                               rtol=1e-3, atol=1e-3)


def test_self_conditioning_starts_as_nothing():
    """Before training, what the step before left is not seen; then the second step's guess depends on it."""
    torch.manual_seed(0)
    model = DenoisingFIT(16, 32, 2, 4, "(1)1(1)", latents=3, window=2, patch=4, img_size=16).eval()
    image, time = torch.randn(2, 3, 13, 18), torch.rand(2)
    with torch.no_grad():
        guess, latents = model(image, time)
        torch.testing.assert_close(model(image, time, previous=latents)[0], guess)
        model.before_norm.weight.fill_(1)
        assert (model(image, time, previous=latents)[0] - guess).abs().max() > 1e-4
        assert guess.shape == image.shape and (model(image, time / 2)[0] - guess).abs().max() > 1e-6


def test_a_denoiser_learns_to_see_noise():
    """A step of a few gradients on one noisy pattern lowers the error; every parameter is reached."""
    torch.manual_seed(0)
    model = DenoisingFIT(16, 32, 2, 4, "(1)1(1)", latents=2, window=2, patch=4, img_size=16, condition_dim=3)
    randomised(model)
    clean, noise = torch.ones(4, 3, 16, 16), torch.randn(4, 3, 16, 16)
    time, condition = torch.rand(4), torch.randn(4, 1, 3)
    mixed = (1 - time).sqrt()[:, None, None, None] * clean + time.sqrt()[:, None, None, None] * noise
    optimizer, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    for _ in range(12):
        guess, latents = model(mixed, time, condition)
        loss = (model(mixed, time, condition, latents.detach())[0] - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(value.grad is not None and value.grad.abs().max() > 0 for value in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_a_denoiser_without_its_condition_is_one_line():
    image, time = torch.randn(1, 3, 16, 24, dtype=torch.float64), torch.rand(1, dtype=torch.float64)
    with pytest.raises(SaccadeError, match="give a condition .B, S, 5."):
        denoiser(condition_dim=5)(image, time)
    with pytest.raises(SaccadeError, match="condition_dim is 0"):
        denoiser()(image, time, torch.randn(1, 1, 5, dtype=torch.float64))
    with pytest.raises(SaccadeError, match="latent_dim=36"):
        denoiser(latent_dim=36)

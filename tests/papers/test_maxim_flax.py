"""MAXIM's own checkpoints: trees of flax in NumPy's archives, their names, shapes and numbers."""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from saccade import SaccadeError, create_model
from saccade.core.index import index
from saccade.core.load import load
from saccade.papers.maxim import SIZES
from tests.test_cli import run

Shapes = dict[str, tuple[int, ...]]


def below(name: str, tree: Shapes) -> Shapes:
    return {f"{name}/{path}": shape for path, shape in tree.items()}


def dense(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}/kernel": (inputs, outputs), f"{name}/bias": (outputs,)}


def conv(name: str, inputs: int, outputs: int, side: int) -> Shapes:
    return {f"{name}/kernel": (side, side, inputs, outputs), f"{name}/bias": (outputs,)}


def layer_norm(name: str, dim: int) -> Shapes:
    return {f"{name}/scale": (dim,), f"{name}/bias": (dim,)}


def gated_mlp(kind: str, dim: int, tokens: int) -> Shapes:
    unit = layer_norm("intermediate_layernorm", dim) | dense("Dense_0", tokens, tokens)
    return below(f"{kind}GmlpLayer", layer_norm("LayerNorm", dim) | dense("in_project", dim, 2 * dim)
                 | below(f"{kind}GatingUnit", unit) | dense("out_project", dim, dim))


def multi_axis(dim: int, side: int) -> Shapes:
    return (layer_norm("LayerNorm_in", dim) | dense("in_project", dim, 2 * dim) | gated_mlp("Grid", dim, side**2)
            | gated_mlp("Block", dim, side**2) | dense("out_project", 2 * dim, dim))


def squeeze(dim: int) -> Shapes:
    return below("channel_attention", conv("Conv_0", dim, dim // 4, 1) | conv("Conv_1", dim // 4, dim, 1))


def level(inputs: int, dim: int, side: int, bottleneck: bool = False) -> Shapes:
    tree = conv("input_proj" if bottleneck else "Conv_0", inputs, dim, 1)
    inner = (below("channel_mixing", dense("Dense_0", dim, dim) | dense("Dense_1", dim, dim)) if bottleneck
             else conv("conv1", dim, dim, 3) | conv("conv2", dim, dim, 3))
    for group in range(2):
        tree |= below(f"SplitHeadMultiAxisGmlpLayer_{group}", multi_axis(dim, side))
        tree |= below(f"channel_attention_block_1{'_' if bottleneck else ''}{group}",
                      layer_norm("LayerNorm", dim) | inner | squeeze(dim))
    return tree


def cross_gating(x_dim: int, y_dim: int, dim: int, side: int, upsample: bool) -> Shapes:
    tree = conv("ConvTranspose_0", y_dim, dim, 2) if upsample else {}
    tree |= conv("Conv_0", x_dim, dim, 1) | conv("Conv_1", dim if upsample else y_dim, dim, 1)
    for axis in "xy":
        tree |= layer_norm(f"LayerNorm_{axis}", dim) | dense(f"in_project_{axis}", dim, dim)
        tree |= below(f"SplitHeadMultiAxisGating_{axis}",
                      layer_norm("LayerNorm_in", dim) | dense("in_project", dim, 2 * dim)
                      | dense("Dense_0", side**2, side**2) | dense("Dense_1", side**2, side**2)
                      | dense("out_project", 2 * dim, dim))
        tree |= dense(f"out_project_{axis}", dim, dim)
    return tree


def network(features: int, stages: int, scales: int = 3) -> Shapes:
    """The paths and shapes that the authors' network makes, three levels deep, supervised at so many scales."""
    dims, sides, tree, resized = [features, 2 * features, 4 * features], [16, 16, 8], {}, 0
    for stage in range(stages):
        unet: Shapes = {}
        for i, (dim, side) in enumerate(zip(dims, sides, strict=True)):
            finer, coarser = dims[max(i - 1, 0)], dims[min(i + 1, 2)]
            encoder = level(finer + (dim if i < scales else 0), dim, side) | conv("Conv_1", dim, dim, 4)
            if stage:
                encoder |= below("cross_gating_block", cross_gating(dim, dim, dim, side, False))
            decoder = conv("ConvTranspose_0", coarser, dim, 2)
            decoder |= below("UNetEncoderBlock_0", level(4 * dim, dim, side))
            unet |= below(f"encoder_block_{i}", encoder) | below(f"decoder_block_{i}", decoder)
            unet |= below(f"cross_gating_block_{i}", cross_gating(3 * dim, coarser, dim, side, True))
            if i < scales:
                unet |= conv(f"input_conv_{i}", 3, dim, 3)
                if stage:
                    unet |= below(f"input_fuse_sam_{i}", cross_gating(dim, dim, dim, side, False))
                unet |= conv(f"output_conv_{i}", dim, 3, 3) if stage == stages - 1 else below(
                    f"supervised_attention_module_{i}",
                    conv("Conv_0", dim, dim, 3) | conv("Conv_1", dim, 3, 3) | conv("Conv_2", 3, dim, 3))
        for i in range(2):
            unet |= below(f"global_block_{i}", level(dims[2], dims[2], 8, bottleneck=True))
        tree |= {f"stage_{stage}_{path}": shape for path, shape in unet.items()}
        for sources in (dims, dims[::-1]):  # of the encoder from the finest, of the skips as they came: coarsest first
            for dim in reversed(dims):
                for source in sources:
                    tree |= below(f"UpSampleRatio_{resized}", conv("Conv_0", source, dim, 1))
                    resized += 1
    return tree


def drawn(shapes: Shapes) -> dict[str, NDArray[np.float32]]:
    """Numbers drawn from the names: norms about one, biases about zero, kernels of the size of their inputs."""
    state = {}
    for path, shape in shapes.items():
        value = np.random.RandomState(zlib.crc32(path.encode())).standard_normal(shape)
        scale = 0.1 if len(shape) == 1 else 1 / math.sqrt(math.prod(shape[:-1]))
        state[path] = (value * scale + path.endswith("scale")).astype(np.float32)
    return state


@pytest.mark.parametrize(("features", "stages", "millions"), [
    (32, 1, 6.108515), (32, 2, 13.353830), (32, 3, 20.599145), (64, 1, 19.361219), (64, 2, 40.839110),
    (64, 3, 62.317001),
])  # fmt: skip
def test_the_tree_is_the_authors(features: int, stages: int, millions: float) -> None:
    """The authors' code notes the parameters of each size with one supervised scale."""
    assert sum(map(math.prod, network(features, stages, scales=1).values())) == round(millions * 1e6)


@pytest.mark.parametrize("name", SIZES)
def test_every_size_takes_the_tree(name: str) -> None:
    """Every path is used, nothing is dropped, and the model has no parameter beyond them."""
    shapes = network(SIZES[name]["dim"], SIZES[name]["num_stages"])
    with torch.device("meta"):
        model = create_model(name)
        state = {path: torch.empty(shape) for path, shape in shapes.items()}
    report = load(model, state)
    assert (report.format, report.loaded, report.of) == ("flax", len(shapes), len(shapes))
    assert not report.left and not report.dropped and not report.fresh and not report.resized
    assert sum(value.numel() for value in model.parameters()) == sum(map(math.prod, shapes.values()))


@pytest.fixture(scope="module")
def state() -> dict[str, NDArray[np.float32]]:
    return drawn(network(8, 2))


@pytest.mark.parametrize("root", ["", "params/", "opt/target/", "opt/target/params/"])
def test_numbers_land_where_they_belong(root: str, state: dict[str, NDArray[np.float32]], tmp_path: Path) -> None:
    moments = {f"opt/state/param_states/{path}/grad_ema": value + 1 for path, value in state.items()}
    beside = moments | {"opt/state/step": np.int64(9)} if root.startswith("opt/") else {}
    np.savez(tmp_path / "checkpoint.npz", **{root + path: value for path, value in state.items()}, **beside)
    ours = create_model("maxim_s2", dim=8, checkpoint_path=tmp_path / "checkpoint.npz").state_dict()
    encoder, decoder = "stage_0_encoder_block_0", "stage_1_decoder_block_2"

    def same(name: str, wanted: NDArray[np.float32]) -> None:
        np.testing.assert_array_equal(ours[name].numpy(), wanted)

    same("unets.0.encoders.0.fc.weight", state[f"{encoder}/Conv_0/kernel"][0, 0].T)  # a 1x1 convolution
    same("unets.0.downs.0.weight", state[f"{encoder}/Conv_1/kernel"].transpose(3, 2, 0, 1))
    up = state[f"{decoder}/ConvTranspose_0/kernel"]
    for row, column in np.ndindex(2, 2):  # flax reads a transposed kernel from its end
        np.testing.assert_array_equal(ours["unets.1.ups.2.weight"][:, :, row, column], up[1 - row, 1 - column])
    same("unets.1.ups.2.bias", state[f"{decoder}/ConvTranspose_0/bias"])
    gated = f"{decoder}/UNetEncoderBlock_0/SplitHeadMultiAxisGmlpLayer_1/GridGmlpLayer"
    same("unets.1.decoders.2.mixers.1.whole.mix.weight", state[f"{gated}/GridGatingUnit/Dense_0/kernel"].T)
    same("unets.1.decoders.2.mixers.1.whole.norm.weight", state[f"{gated}/LayerNorm/scale"])
    same("unets.1.decoders.2.mixers.1.whole.norm.bias", state[f"{gated}/LayerNorm/bias"])


# What the authors' code (google-research/maxim@3c82651, under flax 0.12.8) makes of `drawn` and the picture below, by
# stage and from the coarsest scale: the standard deviation, and five values evenly spaced over (C, H, W).
PICTURES = (
    (12.0949, (-3.484909, -0.364877, 16.53187, 7.993952, 3.186061)),
    (8.33446, (1.500684, 12.77028, -1.52826, 3.21253, 3.743214)),
    (7.71785, (5.624714, -6.323832, -7.221586, 12.92318, -2.17821)),
    (122.458, (7.756649, -89.96462, -129.0211, 67.905, 93.52473)),
    (117.474, (56.08838, -33.25341, 152.3019, -94.02129, 47.05234)),
    (135.339, (6.780328, -60.06403, 170.5562, -55.11755, 42.94685)),
)


def test_it_computes_what_the_authors_code_computes(state: dict[str, NDArray[np.float32]], tmp_path: Path) -> None:
    np.savez(tmp_path / "checkpoint.npz", **{f"opt/target/{path}": value for path, value in state.items()})
    model = create_model("maxim_s2", dim=8, checkpoint_path=tmp_path / "checkpoint.npz").eval()
    image = np.random.RandomState(7).random_sample((1, 64, 128, 3)).astype(np.float32)
    with torch.no_grad():
        stages = model.stages(torch.from_numpy(image).movedim(-1, 1))
    for picture, (spread, values) in zip([picture for stage in stages for picture in stage], PICTURES, strict=True):
        places = np.linspace(0, picture.numel() - 1, 5).round().astype(int)
        np.testing.assert_allclose(picture.flatten().numpy()[places], values, rtol=0, atol=1e-4 * spread)
        assert abs(picture.double().std(correction=0).item() / spread - 1) < 1e-4


def test_what_does_not_fit_is_named(state: dict[str, NDArray[np.float32]], tmp_path: Path) -> None:
    """No path is passed over: one too many and one too few are both told."""
    renamed = {path.replace("UpSampleRatio_35", "UpSampleRatio_36"): value for path, value in state.items()}
    np.savez(tmp_path / "checkpoint.npz", **renamed)
    with pytest.raises(SaccadeError, match=r"2 entries of the model are not in the file .*; 2 entries of the file are "
                                           r"not in the model \(UpSampleRatio_36/Conv_0/kernel, Up"):
        create_model("maxim_s2", dim=8, checkpoint_path=tmp_path / "checkpoint.npz")


def test_the_commands_take_it(capsys: pytest.CaptureFixture[str], tmp_path: Path,
                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SACCADE_CACHE", str(tmp_path / "cache"))
    entry = {"source": "https://example.org/checkpoint.npz", "layout": "flax"}
    monkeypatch.setitem(index()["papers"]["maxim"]["weights"], "maxim_s1", entry)
    state, file = drawn(network(32, 1)), tmp_path / "checkpoint.npz"
    for scale in range(3):
        for path in ("kernel", "bias"):  # what adds nothing gives the picture back
            state[f"stage_0_output_conv_{scale}/{path}"][:] = 0
    np.savez(file, **{f"opt/target/{path}": value for path, value in state.items()})
    Image.effect_noise((70, 40), 60).convert("RGB").save(tmp_path / "in.png")
    code, _, told = run(capsys, "restore", tmp_path / "in.png", tmp_path / "out.png", "--model", "maxim_s1",
                        "--checkpoint", file)
    assert code == 0, told
    assert Image.open(tmp_path / "out.png").tobytes() == Image.open(tmp_path / "in.png").tobytes()
    code, _, told = run(capsys, "restore", tmp_path / "in.png", tmp_path / "other.png", "--model", "maxim_s2",
                        "--checkpoint", file)
    assert code == 2 and "is a checkpoint of maxim_s1, not of maxim_s2: give --model maxim_s1" in told
    code, out, told = run(capsys, "weights", "import", file, "--model", "maxim_s1")
    assert code == 0 and out.startswith("maxim_s1: "), told
    ours = create_model("maxim_s1", pretrained=True).state_dict()
    np.testing.assert_array_equal(ours["unets.0.downs.0.bias"], state["stage_0_encoder_block_0/Conv_1/bias"])

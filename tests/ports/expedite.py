"""Expedite's operators, a plain transformer on clusters, and SAM's encoder on the clusters of its windows."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionEncoder

from saccade import apply
from saccade.core.keymap import KeyMap, within
from saccade.papers.expedite import cluster, reconstruct
from saccade.parts.plain import MMSEGMENTATION, Plain
from tests.ports.port import Function, Port, key_map

SAM: KeyMap = (
    (r"pos_embed", "pos_embed"),
    (r"patch_embed\.proj\.(.*)", r"patch_embed.projection.\1"),
    (r"blocks\.(\d+)\.norm(\d)\.(.*)", r"layers.\1.layer_norm\2.\3"),
    (r"blocks\.(\d+)\.(.*)", r"layers.\1.\2"),
    (r"neck\.0\.(.*)", r"neck.conv1.\1"),
    (r"neck\.1\.(.*)", r"neck.layer_norm1.\1"),
    (r"neck\.2\.(.*)", r"neck.conv2.\1"),
    (r"neck\.3\.(.*)", r"neck.layer_norm2.\1"),
)


class AfterTheNorm(nn.Module):
    """The authors' segmentor gives the tokens back after the backbone's last norm."""

    def __init__(self, host: Plain) -> None:
        super().__init__()
        self.host = host
        host.blocks[-1].ends = False

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        clusters = self.host.forward_features(image)[:, 1:]
        hourglass, grid = self.host.blocks[-1].hourglass, self.host.grid
        return clusters.unflatten(1, hourglass.cells(grid)), hourglass.grow(clusters).unflatten(1, grid)


class WithClusters(nn.Module):
    """SAM's encoder, and what its last layer makes of the clusters, before it gives the tokens back."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        hook = self.encoder.layers[-1]._layer[0].register_forward_hook(lambda *call: seen.append(call[-1]))
        out = self.encoder(image).last_hidden_state
        hook.remove()
        return out, seen[0]


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    match golden["source"]["object"]:
        case "TokenClusteringBlock":
            module = Function(partial(cluster, cells=tuple(args["num_spixels"]), rounds=args["n_iters"],
                                      temperature=args["temperture"], window=args["window_size"]))
            return Port(module, key_map(()), lambda inputs: (inputs["x"].movedim(1, -1),),
                        lambda result: {"centroids": result})
        case "TokenReconstructionBlock":
            module = Function(partial(reconstruct, nearest=args["cfg"]["k"], temperature=args["cfg"]["temperture"]))
            return Port(module, key_map(()), lambda inputs: (inputs["x"], inputs["before"], inputs["after"]))
        case "HourglassImageEncoderViT":
            return sam(args, golden["outputs"])
    return plain(args)


def plain(args: dict[str, Any]) -> Port:
    stage, back = args["cluster_cfg"]["stage"], args["reconstruction_cfg"]
    host = Plain(args["embed_dims"], args["num_layers"], args["num_heads"], patch=args["patch_size"], num_classes=0,
                 img_size=tuple(args["img_size"]))
    count = stage["num_spixels"]
    apply(host, "expedite", keep=count / host.position[0, 1:].shape[0], start=args["cluster_cfg"]["location"] + 1,
          rounds=stage["n_iters"], temperature=stage["temperture"], window=stage["window_size"], nearest=back["k"])
    return Port(AfterTheNorm(host), key_map(within(MMSEGMENTATION, r"backbone\.", "host.")), outputs=lambda result: {
        "out": result[0].movedim(-1, 1), "recon": result[1].movedim(-1, 1)})


def sam(args: dict[str, Any], wanted: dict[str, Any]) -> Port:
    encoder = SamVisionEncoder(SamVisionConfig(
        hidden_size=args["embed_dim"], output_channels=args["out_chans"], num_hidden_layers=args["depth"],
        num_attention_heads=args["num_heads"], image_size=args["img_size"], patch_size=args["patch_size"],
        mlp_dim=int(args["mlp_ratio"] * args["embed_dim"]), global_attn_indexes=args["global_attn_indexes"],
        window_size=args["window_size"], use_rel_pos=args["use_rel_pos"], qkv_bias=args["qkv_bias"]))
    apply(encoder, "expedite", keep=args["hourglass_num_cluster"] / args["window_size"] ** 2,
          start=args["hourglass_clustering_location"], rounds=args["hourglass_cluster_iters"],
          temperature=args["hourglass_temperture"], window=args["hourglass_cluster_window_size"],
          nearest=args["hourglass_reconstruction_k"])
    last = f"block{args['depth'] - 1}"
    taps = {name: f"encoder.layers.{name.removeprefix('block')}" for name in wanted if name not in ("out", last)}
    return Port(WithClusters(encoder), key_map(within(SAM, "", "encoder.")),
                outputs=lambda result: {"out": result[0], last: result[1]}, taps=taps)

"""LocalMamba's mixer, with and without a class token in the middle."""

from __future__ import annotations

import torch

from saccade import Site
from saccade.papers.local_mamba import LocalMamba, inserted, mixer_names, taken_out
from tests.ports.mamba import settings
from tests.ports.port import Port, as_grid, as_tokens, key_map


def build(golden: dict) -> Port:
    args = golden["source"]["args"]
    site = Site(args["d_model"], grid=tuple(args.get("token_size", (14, 14))))
    mixer = LocalMamba(site, args["directions"], **settings(args))
    rename = key_map(mixer_names(len(args["directions"])))
    if not args.get("use_middle_cls_token"):
        return Port(mixer, rename, as_grid(site.grid), as_tokens)
    half = torch.Size(site.grid).numel() // 2

    def inputs(values):
        tokens, prefix = taken_out(next(iter(values.values())), 1, half)
        return tokens.unflatten(1, site.grid), prefix

    return Port(mixer, rename, inputs, lambda result: {"out": inserted(result[0].flatten(1, 2), result[1], half)})

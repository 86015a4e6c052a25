"""Gaussian adaptive attention: one head, several, and the block of several layers."""

from __future__ import annotations

from saccade import Site
from saccade.golden import make_inputs
from saccade.papers.gaam import AUTHORS, AXES, GaussianAdaptive, GaussianBlock
from tests.ports.port import Port, key_map


def build(golden: dict) -> Port:
    args, what = golden["source"]["args"], golden["source"]["object"]
    x = next(iter(make_inputs(golden).values()))
    site = Site(x.shape[-1], grid=tuple(x.shape[1:-1]))
    names = {number % 3: name for name, number in AXES.items()}  # the tokens are axis 1 or -2, the channels 2 or -1
    if what == "GaussianBlock":
        axes = [names[axis % 3] for axis in args["norm_axes"]]
        return Port(GaussianBlock(site, axes, args["num_heads"], args["num_gaussians"]), key_map(AUTHORS))
    heads = args["num_heads"] if what.startswith("MultiHead") else 1
    return Port(GaussianAdaptive(site, args["num_gaussians"], names[args["norm_axis"] % 3], heads), key_map(AUTHORS))

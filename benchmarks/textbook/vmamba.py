"""VMamba's cross-scan, way by way and token by token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.textbook.mamba import scan
from saccade.papers.vmamba import CrossScan


def cross_scan(mixer: CrossScan, x: Tensor) -> Tensor:
    """Rows, columns, rows from the end, columns from the end."""
    B, H, W, _ = x.shape
    inner, gate = mixer.in_proj(x).chunk(2, -1)
    u = F.silu(mixer.conv(inner))
    rows, columns = u.flatten(1, 2), u.transpose(1, 2).flatten(1, 2)
    bias, rates, skip = (value.unflatten(0, (4, -1)) for value in (mixer.dt_bias, mixer.A_log, mixer.D))
    outputs = []
    for way, line in enumerate([rows, columns, rows.flip(1), columns.flip(1)]):
        weight = mixer.x_proj.weight.unflatten(0, (4, -1))[way]
        r, b, c = (line @ weight.T).split(mixer.split, -1)
        dt = F.softplus(r @ mixer.dt_weight[way].T + bias[way])
        outputs.append(scan(line, dt, -torch.exp(rates[way]), b, c) + skip[way] * line)
    y = outputs[0] + outputs[2].flip(1)
    y = y.view(B, H, W, -1) + (outputs[1] + outputs[3].flip(1)).view(B, W, H, -1).transpose(1, 2)
    return mixer.out_proj(mixer.norm(y) * F.silu(gate))

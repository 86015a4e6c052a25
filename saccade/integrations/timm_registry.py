"""Every backbone of saccade under timm's `create_model`, for the programs that take timm's names.

    saccade.register_with_timm()
    timm.create_model("saccade_rmt_t", features_only=True)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from saccade.core.build import create_model
from saccade.core.features import Backbone
from saccade.core.index import is_backbone, list_models, model_paper, paper_module
from saccade.core.optional import optional

timm = optional("timm", extra="train")

PREFIX = "saccade_"
# What timm's create_model hands to every model and only its own weights need.
_TIMM_ONLY = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "scriptable", "exportable", "no_jit")


def register_with_timm(pattern: str = "*") -> list[str]:
    """Put the models that a shell pattern picks into timm's registry, as `saccade_NAME`; gives the names.

    `timm.create_model("saccade_NAME", ...)` is then `saccade.create_model("NAME", ...)`: `num_classes`, `in_chans`,
    `img_size`, `drop_path_rate`, `global_pool`, `features_only`, `out_indices`, `pretrained`, and whatever else the
    model understands. The model has timm's `default_cfg`, so that `timm.data.resolve_model_data_config(model)` works.
    Registering twice is harmless. Needs timm (`pip install saccade[train]`).
    """
    names = [name for name in list_models(pattern) if is_backbone(name)]
    for name in names:
        if not timm.is_model(PREFIX + name):
            timm.models.register_model(_entry(name))
    return [PREFIX + name for name in names]


def _entry(name: str) -> Callable[..., Backbone]:
    """The function that timm's registry wants: its name is the model's."""

    def build(pretrained: bool = False, **options: Any) -> Backbone:
        sizes = paper_module(model_paper(name)).SIZES[name]
        options = {key: value for key, value in options.items() if key not in _TIMM_ONLY}
        model: Any = create_model(name, pretrained=pretrained, **options)
        model.default_cfg = model.pretrained_cfg = _data_settings(**sizes | options)
        return model

    build.__name__ = build.__qualname__ = PREFIX + name
    return build


def _data_settings(
    img_size: int | tuple[int, int] = 224, in_chans: int = 3, num_classes: int = 1000, **_: Any
) -> dict[str, Any]:
    """What timm's data pipeline reads of a model."""
    side = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    return dict(input_size=(in_chans, *side), num_classes=num_classes, interpolation="bicubic", crop_pct=0.9,
                mean=timm.data.IMAGENET_DEFAULT_MEAN, std=timm.data.IMAGENET_DEFAULT_STD, fixed_input_size=False)

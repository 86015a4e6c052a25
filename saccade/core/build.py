"""Names to modules: `create_model` and `create_mixer`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from saccade.core.errors import SaccadeError
from saccade.core.features import Backbone, FeaturesOnly
from saccade.core.index import index, is_backbone, mixer_paper, model_paper, paper_module, resolve_model
from saccade.core.load import load
from saccade.core.names import closest, matching
from saccade.core.site import MixerFactory, Site

# A mixer said by the caller: a name, a factory, one per stage, or one per pattern of module names.
MixerSpec = str | MixerFactory | Sequence["str | MixerFactory"] | Mapping[str, "str | MixerFactory"]

# What every builder understands beyond its own options.
COMMON = ("num_classes", "in_chans", "img_size", "drop_path_rate", "global_pool", "mixer")


def create_model(
    name: str,
    *,
    checkpoint_path: str | Path | None = None,
    fresh: Sequence[str] = (),
    pretrained: bool = False,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    mixer: MixerSpec | None = None,
    **options: Any,
) -> Backbone:
    """Build a registered model: `create_model("biformer_tiny", num_classes=10, img_size=(192, 256))`.

    Options that all models know: num_classes (0: no head), in_chans, img_size (the native grid; any size runs),
    drop_path_rate, global_pool ("avg", "max", "gem", "ggem", "" for none, "token" where there is a class token, or a
    callable channels -> Module), prefix_mode (Plain). `mixer` replaces the token mixers: a name, a callable
    `site -> Module`, a list with one per stage, or a dict {pattern of module names: mixer}; further options go to the
    named mixer. `checkpoint_path` loads the authors', timm's or our own weights, every key accounted for (`fresh` lists
    what shall not be loaded); the report is `model.load_report`. `pretrained` does so with those that the card names,
    downloaded and checked (`saccade weights`); where it names none that is an error, never random weights.
    `features_only` gives a model that returns the maps of the stages `out_indices` as a list. Raises SaccadeError for
    unknown names and options.
    """
    name = resolve_model(name)
    module = paper_module(model_paper(name))
    settings = {**module.SIZES[name], **options}
    builder = getattr(module, settings.pop("builder", model_paper(name)))
    if mixer is not None:
        mixer_options = {key: settings.pop(key) for key in options if key not in _accepted(builder)}
        settings["mixer"] = _resolve(mixer, mixer_options)
    _check_options(name, builder, settings)
    if features_only:
        if not is_backbone(name):
            raise SaccadeError(f"{name} is no backbone: it gives no feature maps, so leave features_only out")
        settings["num_classes"] = 0
    model: Backbone = builder(**settings)
    model.name = name
    if features_only:
        model = FeaturesOnly(model, out_indices)
    elif out_indices is not None:
        raise SaccadeError("out_indices chooses feature maps: it needs features_only=True")
    if pretrained:
        if checkpoint_path is not None:
            raise SaccadeError("pretrained=True and checkpoint_path are two sources of weights: give one")
        from saccade.core.weights import weights_file

        checkpoint_path = weights_file(name)
    if checkpoint_path is not None:
        model.load_report = load(model, checkpoint_path, fresh)
    elif fresh:
        raise SaccadeError("fresh lists what a checkpoint shall not set: it needs checkpoint_path or pretrained=True")
    return model


def create_mixer(name: str, site: Site, **options: Any) -> nn.Module:
    """Build a registered token mixer for a place: `create_mixer("neighborhood", Site(64, heads=2), kernel=5)`."""
    return mixer_factory(name, **options)(site)


def mixer_factory(name: str, **options: Any) -> MixerFactory:
    """The callable `site -> Module` of a registered mixer with its options bound."""
    paper = mixer_paper(name)
    module = paper_module(paper)
    factory = getattr(module, module.CARD.mixers[name])
    known = [key for key in inspect.signature(factory).parameters if key not in ("self", "site")]
    for key in options:
        if key not in known:
            raise SaccadeError(f"mixer {name!r} has no option {key!r}{closest(key, known) or f'; it has {known}'}")
    return partial(factory, **options)


def choose_mixer(spec: Any, default: MixerFactory | Sequence[MixerFactory]) -> Callable[[Site, str], nn.Module]:
    """How a backbone builds the mixer of the block called `name` at `site`: the caller's word, else the paper's own."""

    def build(site: Site, name: str) -> nn.Module:
        chosen = _at(default, site)
        if isinstance(spec, Mapping):
            for pattern, factory in spec.items():
                if matching([name, f"{name}.mixer"], pattern):
                    chosen = factory
        elif spec is not None:
            chosen = _at(spec, site)
        return chosen(site)

    return build


def hybrid_mixer(own: MixerFactory, spec: Any) -> Any:
    """`mixer=` of a hybrid's host: the caller's word, else the hybrid's `own`, as for blocks that no pattern names."""
    return {"*": own, **spec} if isinstance(spec, Mapping) else own if spec is None else spec


def check_patterns(spec: Any, names: Sequence[str]) -> None:
    """Raise where a pattern of a `mixer={pattern: ...}` dict picks none of the blocks `names`."""
    if isinstance(spec, Mapping):
        for pattern in spec:
            if not matching([*names, *(f"{name}.mixer" for name in names)], pattern):
                raise SaccadeError(f"mixer pattern {pattern!r} matches no block{closest(pattern, names)}")


def _at(factories: MixerFactory | Sequence[MixerFactory], site: Site) -> MixerFactory:
    if callable(factories):
        return factories
    if site.stage >= len(factories):
        raise SaccadeError(f"{len(factories)} mixers are given, one a stage, and the model has a stage {site.stage}")
    return factories[site.stage]


def _resolve(spec: MixerSpec, options: dict[str, Any]) -> Any:
    if isinstance(spec, str):
        return mixer_factory(spec, **options)
    if options:
        raise SaccadeError(f"{sorted(options)} cannot be given to several mixers: bind them with functools.partial")
    if isinstance(spec, Mapping):
        return {pattern: mixer_factory(one) if isinstance(one, str) else one for pattern, one in spec.items()}
    if callable(spec):
        return spec
    return [mixer_factory(one) if isinstance(one, str) else one for one in spec]


def native_size(name: str) -> Any:
    """The image size that a registered model is made for, in pixels: one side of a square, or all sides."""
    return paper_module(model_paper(name)).SIZES[resolve_model(name)].get("img_size", 224)


def accepted(name: str) -> set[str]:
    """The options that a registered model takes."""
    module = paper_module(model_paper(name))
    return _accepted(getattr(module, module.SIZES[resolve_model(name)].get("builder", model_paper(name))))


def _accepted(builder: Callable[..., Any]) -> set[str]:
    """A builder's own options and, where it passes others on, those that all backbones know."""
    parameters = inspect.signature(builder).parameters.values()
    own = {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
    return own if len(own) == len(parameters) else {*own, *COMMON, "prefix_mode"}


def _check_options(name: str, builder: Callable[..., Any], settings: dict[str, Any]) -> None:
    accepted = _accepted(builder)
    for key in settings:
        if key not in accepted:
            raise SaccadeError(f"{name} has no option {key!r}{closest(key, accepted)}")


def info(name: str) -> dict[str, Any]:
    """The card of a model, mixer or paper, as plain data."""
    known = index()
    if name in known["papers"]:
        return dict(known["papers"][name])
    if name in known["mixers"]:
        return dict(known["papers"][known["mixers"][name]])
    return dict(known["papers"][model_paper(name)])

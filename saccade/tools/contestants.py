"""Who takes part in a contest: names become builders, and the references that always run beside them."""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from saccade.core.apply import apply, parse_method
from saccade.core.build import create_model
from saccade.core.errors import SaccadeError
from saccade.core.index import mixer_paper, resolve_model
from saccade.core.names import closest
from saccade.core.optional import optional
from saccade.core.origin import Origin, of_model
from saccade.core.weights import is_obtainable
from saccade.learn.pretrained import open_pretrained
from saccade.learn.runs import origin_of

timm = optional("timm", extra="train")

MAJORITY, NEIGHBORS = "majority class", "pixel k-NN"
SMALL = 64  # pictures up to this side get the narrow ResNet with a 3x3 stem
NARROW = (16, 32, 64, 128)  # its channels: a ResNet-18 at a quarter of its width


@dataclass(frozen=True)
class Contestant:
    """One row of the result.

    `build(classes, pretrained)` makes its network (0 classes: without a head); what is no network has none. `weights`
    says whether trained ones are published, `identity` tells two versions of a user's file apart, `registered` is how
    `create_model` makes one of ours: {"model", "options"}, and `origin` tells whose the trained weights are. Where a
    `method` is applied to a trained network, `host` is the contestant whose weights it takes: it trains nothing of its
    own.
    """

    name: str
    kind: str
    build: Callable[[int, bool], nn.Module] | None = None
    weights: bool = False
    identity: str = ""
    registered: dict[str, Any] | None = None
    host: Contestant | None = None
    method: str | None = None
    origin: Origin = Origin()

    def begins(self, start: str) -> Origin:
        """Where the weights come from that it has before it is trained; a user's file gives its own at every start."""
        return self.origin if start != "scratch" or self.identity and self.registered is None else Origin()

    @property
    def folder(self) -> str:
        """The name in letters that every file system takes, with a digest where that changed it."""
        plain = re.sub(r"[^A-Za-z0-9_.+-]+", "-", self.name)
        return plain if plain == self.name else f"{plain}-{hashlib.sha256(self.name.encode()).hexdigest()[:6]}"


def contestants(
    models: Sequence[str], mixers: Sequence[str], img_size: int, methods: Sequence[str] = ()
) -> list[Contestant]:
    """The named models, each of ours also with each mixer (`swin_nano+neighborhood`), and then with each method.

    Methods (`evit:keep=0.7`) are applied after training, `deit_nano+evit:keep=0.7`, to all of them.

    A name is one of ours, `timm:NAME` or `file.py:function`; the function takes `num_classes` (0 asks for features)
    and, where it wants them, `in_chans` and `img_size`, and returns a network, with weights or without. Unknown names
    raise SaccadeError.
    """
    if not models:
        raise SaccadeError("no model is named: give --models, as in --models swin_nano,convnext_nano")
    for names in (models, mixers, methods):
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise SaccadeError(f"{', '.join(repeated)} is named twice: name each once")
    ours = [name for name in models if not name.startswith("timm:") and ".py:" not in name]
    if mixers and not ours:
        raise SaccadeError(f"--mixers {','.join(mixers)}: mixers go into our own models, and none of --models is one")
    for mixer in mixers:
        mixer_paper(mixer)
    pairs = [(name, mixer) for name in models for mixer in (None, *(mixers if name in ours else ()))]
    for method in methods:
        parse_method(method)
    hosts = [_contestant(name, mixer, img_size) for name, mixer in pairs]
    return [each for host in hosts for each in (host, *(_reduced(host, method) for method in methods))]


def _reduced(host: Contestant, method: str) -> Contestant:
    """A contestant with a method applied after its training."""
    name, options = parse_method(method)

    def build(classes: int, pretrained: bool) -> nn.Module:
        assert host.build is not None
        model = host.build(classes, pretrained)
        keys = set(model.state_dict())
        apply(model, name, **options)
        if set(model.state_dict()) != keys:
            raise SaccadeError(f"{name} adds weights that are to be trained: it cannot be applied after training")
        return model

    return replace(host, name=f"{host.name}+{method}", build=build, registered=None, host=host, method=method)


def pretrained_contestants(named: Sequence[str], img_size: int) -> list[Contestant]:
    """Pre-trainings as contestants: each of `named` reads LABEL=FOLDER, a folder that `saccade pretrain` made."""
    found = []
    for one in named:
        label, equals, place = one.partition("=")
        if not (label and equals and place):
            raise SaccadeError(f"--checkpoint {one}: write LABEL=FOLDER, as in mae=runs/mae,rotnet=runs/rotnet")
        opened = open_pretrained(Path(place))
        identity = hashlib.sha256(opened.weights.read_bytes()).hexdigest()[:16]
        build = partial(_from_pretrained, opened.name, opened.weights, img_size)
        found.append(Contestant(label, "model", build, weights=True, identity=identity,
                                registered={"model": opened.name, "options": {"img_size": img_size}},
                                origin=origin_of(Path(place))))
    if len({each.name for each in found}) < len(found):
        raise SaccadeError("--checkpoint names two folders alike: give each a label of its own")
    return found


def _from_pretrained(model: str, weights: Path, img_size: int, classes: int, pretrained: bool) -> nn.Module:
    if not pretrained:
        return create_model(model, num_classes=classes, img_size=img_size)
    fresh = ("head*",) if classes else ()
    return create_model(model, num_classes=classes, img_size=img_size, checkpoint_path=weights, fresh=fresh)


def references(img_size: int, start: str) -> list[Contestant]:
    """Who always runs beside them: the majority class, pixel k-NN and a ResNet that suits the pictures."""
    if img_size <= SMALL and start == "scratch":  # the narrow one has no published weights to start from
        network = Contestant("narrow ResNet", "reference", partial(_narrow_resnet, timm.models.resnet))
    else:
        network = replace(_from_timm("resnet18", img_size), name="ResNet-18", kind="reference")
    return [Contestant(MAJORITY, "reference"), Contestant(NEIGHBORS, "reference"), network]


def start_of(named: Sequence[Contestant]) -> str:
    """How they begin where nobody says: with a probe of their weights where all have some, else from scratch."""
    return "probe" if all(each.weights for each in named) else "scratch"


def _contestant(name: str, mixer: str | None, img_size: int) -> Contestant:
    if name.startswith("timm:"):
        return replace(_from_timm(name.removeprefix("timm:"), img_size), name=name)
    if ".py:" in name:
        return _from_file(name, img_size)
    model = resolve_model(name)
    options: dict[str, Any] = {"img_size": img_size} | ({} if mixer is None else {"mixer": mixer})

    def build(classes: int, pretrained: bool) -> nn.Module:
        fresh = ("head*",) if pretrained and classes else ()  # the head is for other classes, however many
        return create_model(model, num_classes=classes, pretrained=pretrained, fresh=fresh, **options)

    obtainable = is_obtainable(model)
    return Contestant(name if mixer is None else f"{name}+{mixer}", "model", build, weights=obtainable,
                      registered={"model": model, "options": options},
                      origin=of_model(model) if obtainable else Origin())


def check_timm(name: str) -> None:
    """Raise where timm has no model of that name."""
    if not timm.models.is_model(name):
        hint = closest(name, timm.list_models()) or "; timm.list_models() shows all"
        raise SaccadeError(f"timm has no model {name!r}{hint}")


def _from_timm(name: str, img_size: int) -> Contestant:
    check_timm(name)

    def build(classes: int, pretrained: bool) -> Any:
        try:
            return timm.create_model(name, pretrained=pretrained, num_classes=classes, img_size=img_size)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            return timm.create_model(name, pretrained=pretrained, num_classes=classes)  # it knows no native size

    settings = timm.models.get_pretrained_cfg(name)
    if not (settings and settings.has_weights):
        return Contestant(name, "model", build)
    origin = Origin(f"timm: {settings.hf_hub_id or settings.url}", licence=settings.license or "unknown")
    return Contestant(name, "model", build, weights=True, origin=origin)


def _from_file(name: str, img_size: int) -> Contestant:
    path_text, _, function = name.rpartition(":")
    path = Path(path_text)
    if not path.is_file():
        raise SaccadeError(f"{name}: there is no file {path}")
    module = _run_file(path)
    make = getattr(module, function, None)
    if not callable(make):
        known = [key for key, value in vars(module).items()
                 if callable(value) and getattr(value, "__module__", "") == module.__name__]
        raise SaccadeError(f"{name}: {path} has no function {function!r}{closest(function, known)}")
    parameters = inspect.signature(make).parameters.values()
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    names = {parameter.name for parameter in parameters}
    if not takes_all and "num_classes" not in names:
        raise SaccadeError(f"{name}: {function} takes no num_classes: it must, to be told how many classes there are")

    def build(classes: int, pretrained: bool) -> nn.Module:
        options = {"num_classes": classes, "in_chans": 3, "img_size": img_size}
        model: nn.Module = make(**{key: value for key, value in options.items() if takes_all or key in names})
        if classes == 0:
            model.num_classes = 0  # type: ignore[assignment]  # says to `extract` that it returns features
        return model

    return Contestant(name, "model", build, identity=hashlib.sha256(path.read_bytes()).hexdigest()[:16],
                      origin=Origin(f"as {function} of {path.name} makes it"))


def _run_file(path: Path) -> ModuleType:
    """The file as a module, with its own folder on the path as when it is run as a script."""
    called = f"saccade_contestant_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = spec_from_file_location(called, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[called] = module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise SaccadeError(f"{path} cannot be run: {reason(error)}") from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def reason(error: BaseException) -> str:
    """An error in one line: what it says, after its kind where that is not our own."""
    said = re.sub(r"\x1b\[[0-9;]*m", "", (str(error).strip() or "no message").splitlines()[0])  # colours of a terminal
    return said if isinstance(error, SaccadeError) else f"{type(error).__name__}: {said}"


def _narrow_resnet(resnet: Any, classes: int, pretrained: bool) -> nn.Module:
    model: nn.Module = resnet.ResNet(resnet.BasicBlock, (2, 2, 2, 2), num_classes=classes, stem_type="deep",
                                     stem_width=NARROW[0] // 2, channels=NARROW)
    model.conv1 = nn.Conv2d(3, NARROW[0], 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model

"""One contestant's work in a contest: calibrated, its learning rate chosen, trained with each seed, asked once."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from saccade.core.checkpoint import write_safetensors
from saccade.core.errors import SaccadeError
from saccade.core.files import write_whole
from saccade.learn.data import ImageSet
from saccade.learn.loop import Progress
from saccade.learn.probe import Probed, extract, linear_probe, neighbour_probe, reference_predictions
from saccade.learn.runs import CARD
from saccade.learn.train import Recipe, fit, predict_logits
from saccade.tools.contestants import Contestant

RATES = {"scratch": (3e-4, 1e-3, 3e-3), "finetune": (3e-5, 1e-4, 3e-4)}
RATE_SHARE = 3  # a learning rate is tried for this fraction of the epochs, with the first seed
UNMIRRORED = frozenset({"digits"})  # sets in which a mirrored picture is another thing
HEAD = "head.safetensors"  # of a probe
CALIBRATION_EPOCHS, CALIBRATION_SECONDS = 3, 3.0  # whichever is over first

Watch = Callable[[float, str], None]  # how many epochs of this trial are done, and what is going on


@dataclass(frozen=True)
class Arena:
    """What is the same for all contestants."""

    images: ImageSet
    out: Path
    start: str
    img_size: int
    batch_size: int
    seeds: int
    epochs: int = 1

    @property
    def rate_epochs(self) -> int:
        """Epochs for which each learning rate is tried, on a whole schedule of its own."""
        return -(-self.epochs // RATE_SHARE)

    def work(self, entrant: Contestant) -> int:
        """Epochs that a contestant trains in all."""
        if entrant.build is None or entrant.host is not None or self.start == "probe":
            return 0
        return len(RATES[self.start]) * self.rate_epochs + self.seeds * self.epochs

    def recipe(self, rate: float, seed: int, epochs: int) -> Recipe:
        """The same for all, but for the learning rate and the seed."""
        return Recipe(epochs=epochs, batch_size=self.batch_size, learning_rate=rate, img_size=self.img_size, seed=seed,
                      flip=self.images.name not in UNMIRRORED)

    def folder(self, entrant: Contestant) -> Path:
        """Where a contestant's runs are kept."""
        return self.out / "runs" / entrant.folder

    def model(self, entrant: Contestant) -> nn.Module:
        """A contestant as its training begins."""
        assert entrant.build is not None
        return entrant.build(len(self.images.classes), self.start == "finetune")


@dataclass(frozen=True)
class Answers:
    """What one seed of a contestant says of the test images, and how it came to that."""

    seed: int
    predicted: list[int]
    val_accuracy: float | None = None
    seconds: float | None = None
    learning_rate: float | None = None
    curves: dict[str, list[float]] | None = None
    by_neighbours: list[int] | None = None  # beside the linear classifier's, after a probe


def check(arena: Arena, entrant: Contestant) -> None:
    """Build a contestant once and put a blank picture in, so that what cannot take part says so at the start."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = arena.model(entrant)
        if not isinstance(model, nn.Module):
            raise SaccadeError(f"it is a {type(model).__name__}: a torch.nn.Module is needed")
        found = model.eval()(torch.zeros(2, 3, arena.img_size, arena.img_size))
    shape, wanted = getattr(found, "shape", type(found).__name__), (2, len(arena.images.classes))
    if shape != wanted:
        raise SaccadeError(f"it returns {tuple(shape) if isinstance(found, Tensor) else shape} for two pictures and "
                           f"{wanted[1]} classes: scores {wanted} are needed")


def seconds_per_epoch(arena: Arena, entrant: Contestant) -> float:
    """How long an epoch takes, from the first epochs or steps of a training that is thrown away."""
    moments: list[float] = []  # ends of steps
    starts: list[float] = []  # those of them that end the first step of an epoch
    steps = 0

    def watch(progress: Progress) -> None:
        nonlocal steps
        steps = progress.steps
        moments.append(time.perf_counter())
        if progress.step == 1:
            starts.append(moments[-1])
        if len(starts) > CALIBRATION_EPOCHS or (len(moments) > 2 and moments[-1] - moments[0] > CALIBRATION_SECONDS):
            raise _Enough

    with tempfile.TemporaryDirectory() as folder:
        try:
            recipe = arena.recipe(RATES[arena.start][0], 0, CALIBRATION_EPOCHS + 1)
            fit(lambda: arena.model(entrant), arena.images, recipe, Path(folder), progress=watch)
        except _Enough:
            pass
    if len(starts) > 1:
        return (starts[-1] - starts[0]) / (len(starts) - 1)
    step = (moments[-1] - moments[0]) / (len(moments) - 1)
    # A step is a forward and a backward pass, which takes twice as long; validation is a forward pass.
    return step * (steps + len(arena.images.val) / arena.batch_size / 3)


class _Enough(Exception):
    """The speed is known."""


def choose_rate(arena: Arena, entrant: Contestant, watch: Watch) -> float:
    """The rate of RATES with the best validation accuracy (then loss) after a short training; kept on disk.

    A rate whose loss is not finite is out; where all are, SaccadeError.
    """
    folder = arena.folder(entrant)
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "rate.json"
    if kept.exists():
        return float(json.loads(kept.read_text())["learning_rate"])
    scores: dict[float, tuple[float, float]] = {}
    problem: SaccadeError | None = None
    for number, rate in enumerate(RATES[arena.start]):
        def report(progress: Progress, rate: float = rate, before: int = number * arena.rate_epochs) -> None:
            watch(before + _done(progress), f"learning rate {rate:g}")
        try:
            curves = fit(lambda: arena.model(entrant), arena.images, arena.recipe(rate, 0, arena.rate_epochs),
                         folder / f"rate-{rate:g}", progress=report).curves
            scores[rate] = (curves["val_accuracy"][-1], -curves["val_loss"][-1])
        except SaccadeError as error:
            problem = error
    if not scores:
        raise problem or SaccadeError("no learning rate was tried")
    best = max(scores, key=lambda rate: scores[rate])
    tried = {f"{rate:g}": {"val_accuracy": score[0], "val_loss": -score[1]} for rate, score in scores.items()}
    write_whole(kept, json.dumps({"learning_rate": best, "epochs": arena.rate_epochs, "tried": tried}, indent=1))
    for rate in RATES[arena.start]:
        shutil.rmtree(folder / f"rate-{rate:g}", ignore_errors=True)
    return best


def trained_answers(arena: Arena, entrant: Contestant, seed: int, rate: float, watch: Watch) -> Answers:
    """Train one seed and ask it about the test images, once; kept on disk, with its weights.

    The folder of one of ours is a run as `saccade train` makes them, so `saccade predict` and `saccade export` take it.
    """
    folder = arena.folder(entrant) / f"seed-{seed}"
    if (kept := _kept(folder)) is not None:
        return kept
    fitted = fit(lambda: arena.model(entrant), arena.images, arena.recipe(rate, seed, arena.epochs), folder,
                 progress=lambda progress: watch(_done(progress), f"seed {seed}"))
    predicted = predict_logits(fitted.model, arena.images.test, img_size=arena.img_size, batch_size=arena.batch_size)
    if not predicted.isfinite().all():
        raise SaccadeError("its outputs are not finite")
    if entrant.registered is not None:
        options = entrant.registered["options"] | {"num_classes": len(arena.images.classes)}
        card = {"model": entrant.registered["model"], "options": options, "classes": arena.images.classes,
                "mean": Recipe.mean, "std": Recipe.std}
        write_whole(folder / CARD, json.dumps(card, indent=1, ensure_ascii=False))
    accuracy = fitted.curves["val_accuracy"][-1]
    return _keep(folder, Answers(seed, predicted.argmax(1).tolist(), accuracy, fitted.seconds, rate, fitted.curves))


def probed_answers(arena: Arena, entrant: Contestant) -> Answers:
    """Classifiers on the frozen features of published weights, asked about the test images; kept on disk."""
    folder = arena.folder(entrant) / "probe"
    if (kept := _kept(folder)) is not None:
        return kept
    assert entrant.build is not None
    began, images = time.perf_counter(), arena.images
    with torch.random.fork_rng(devices=[]):
        model = entrant.build(0, True).to(device())
    train, val, test = (extract(model, split, img_size=arena.img_size, batch_size=arena.batch_size)
                        for split in (images.train, images.val, images.test))
    known = train, images.train.labels, val, images.val.labels
    head, by_neighbours = linear_probe(*known), neighbour_probe(*known, test).argmax(1).tolist()
    with torch.no_grad():
        predicted = head(test).argmax(1).tolist()
    write_safetensors(folder / HEAD, head.state_dict(), {"format": "pt"})
    return _keep(folder, Answers(0, predicted, seconds=time.perf_counter() - began, by_neighbours=by_neighbours))


def reduced_answers(arena: Arena, entrant: Contestant) -> list[Answers]:
    """What a trained contestant says of the test images with a method applied, with each seed; kept on disk.

    The accuracy on validation is that of the method, too: weights are chosen by it as by any contestant's.
    """
    assert entrant.host is not None and entrant.build is not None
    found = []
    for seed in range(arena.seeds):
        folder = arena.folder(entrant) / f"seed-{seed}"
        if (kept := _kept(folder)) is None:
            with torch.random.fork_rng(devices=[]):
                model = entrant.build(len(arena.images.classes), False)
            model.load_state_dict(load_file(_weights(arena, entrant, seed)))
            model.to(device()).eval()
            val, test = (predict_logits(model, split, img_size=arena.img_size, batch_size=arena.batch_size)
                         for split in (arena.images.val, arena.images.test))
            if not (val.isfinite().all() and test.isfinite().all()):
                raise SaccadeError("its outputs are not finite")
            right = (val.argmax(1) == torch.tensor(arena.images.val.labels, device=val.device)).double().mean()
            kept = _keep(folder, Answers(seed, test.argmax(1).tolist(), float(right)))
        found.append(kept)
    return found


def _weights(arena: Arena, entrant: Contestant, seed: int) -> Path:
    """Where the weights of a seed are: those of the host, of a contestant that takes them."""
    return arena.folder(entrant.host or entrant) / f"seed-{seed}" / "weights.safetensors"


def unlearned_answers(arena: Arena, entrants: Sequence[Contestant]) -> list[Answers]:
    """What the majority class and pixel k-NN, in this order, say of the test images; kept on disk."""
    folders = [arena.folder(entrant) for entrant in entrants]
    kept = [_kept(folder) for folder in folders]
    if None in kept:
        found = reference_predictions(arena.images)
        kept = [_keep(folder, Answers(0, found[key].argmax(1).tolist()))
                for folder, key in zip(folders, ("majority", "pixel knn"), strict=True)]
    return [one for one in kept if one is not None]


def _kept(folder: Path) -> Answers | None:
    path = folder / "answers.json"
    return Answers(**json.loads(path.read_text())) if path.exists() else None


def _keep(folder: Path, found: Answers) -> Answers:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "answers.json", json.dumps(asdict(found)))
    return found


def _done(progress: Progress) -> float:
    return progress.epoch - 1 + progress.step / progress.steps


def final_model(arena: Arena, entrant: Contestant, found: list[Answers]) -> tuple[nn.Module, Path | None]:
    """A network as it ended, in eval mode, and its file: of the seed that did best on validation.

    After a probe it is the published network with the linear classifier on its features, and has no file.
    """
    assert entrant.build is not None
    if arena.start == "probe":
        kept = load_file(arena.folder(entrant) / "probe" / HEAD)
        head = nn.utils.skip_init(nn.Linear, kept["weight"].shape[1], kept["weight"].shape[0])
        head.load_state_dict(kept)
        with torch.random.fork_rng(devices=[]):
            return Probed(entrant.build(0, True), head).to(device()).eval(), None
    with torch.random.fork_rng(devices=[]):
        model = entrant.build(len(arena.images.classes), False)
    path = _weights(arena, entrant, best_seed(found))
    model.load_state_dict(load_file(path))
    return model.to(device()).eval(), path


def best_seed(found: Sequence[Answers]) -> int:
    """The seed whose weights are kept: the best on validation."""
    return max(found, key=lambda one: one.val_accuracy or 0.0).seed


def device() -> torch.device:
    """Where contestants run: a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

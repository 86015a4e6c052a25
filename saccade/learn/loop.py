"""The one training path: whatever is learned, the result depends on the recipe alone.

Every random number of an epoch (order, augmentation, drop path, masks) follows from (seed, epoch). The state after each
epoch is kept in one file that is replaced in one step, so a run that was killed goes on from its last finished epoch
and ends with the same bits as a run that was left alone. Several processes share each batch: picture i of an epoch is
the same picture, augmented the same way, however many there are.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from saccade.core.errors import SaccadeError
from saccade.core.files import fill_whole, write_whole
from saccade.core.optional import optional
from saccade.learn.reproducible import claim, describe, reproducible, seed_of, tensors

fabric = optional("lightning.fabric", extra="train")
strategies = optional("lightning.fabric.strategies", extra="train")
torchmetrics = optional("torchmetrics", extra="train")
timm_optim = optional("timm.optim", extra="train")
timm_scheduler = optional("timm.scheduler", extra="train")

PRECISIONS = ("32-true", "bf16-mixed")
STRATEGIES = ("auto", "ddp", "fsdp")


@dataclass(frozen=True)
class BaseRecipe:
    """What decides a run's result whatever is learned."""

    epochs: int = 20
    batch_size: int = 64  # pictures a step, over all processes
    learning_rate: float = 1e-3  # of AdamW, at the end of the warm-up; falls to 0 along a cosine
    seed: int = 0
    weight_decay: float = 0.05
    warmup: float = 1.0  # epochs of linear rise, at most half of all
    clip: float = 1.0  # largest norm of a gradient
    accumulate: int = 1  # parts that a process works through one after the other before each step
    precision: str = "32-true"  # or bf16-mixed

    def __post_init__(self) -> None:
        self.above_zero("epochs", "batch_size", "learning_rate", "accumulate")
        if self.precision not in PRECISIONS:
            raise SaccadeError(f"precision is {self.precision!r}: choose {' or '.join(PRECISIONS)}")

    def above_zero(self, *names: str) -> None:
        for name in names:
            if not getattr(self, name) > 0:
                raise SaccadeError(f"{name} is {getattr(self, name)}: it must be above 0")

    def batch_at(self, epoch: int) -> int:
        """Pictures a step in an epoch (from 0)."""
        return self.batch_size


@dataclass(frozen=True)
class SquaresRecipe(BaseRecipe):
    """The same where whole pictures are shown, as normalised squares."""

    img_size: int = 32
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.above_zero("img_size")


@dataclass(frozen=True)
class Machines:
    """Where a run happens: processes a node, nodes, and how they share the work.

    "ddp" keeps a copy of all in each process, "fsdp" parts weights, gradients and the optimizer's state among them.
    """

    devices: int = 1
    nodes: int = 1
    strategy: str = "auto"

    def __post_init__(self) -> None:
        for name in ("devices", "nodes"):
            if getattr(self, name) < 1:
                raise SaccadeError(f"{name} is {getattr(self, name)}: 1 or more are needed")
        if self.strategy not in STRATEGIES:
            raise SaccadeError(f"there is no strategy {self.strategy!r}: choose {', '.join(STRATEGIES)}")

    def start(self, precision: str) -> Any:
        """The Fabric of this process, the others started."""
        count = self.devices * self.nodes
        if count == 1:
            return fabric.Fabric(devices=1, precision=precision)
        strategy = (
            strategies.ModelParallelStrategy(_shard, count, 1, save_distributed_checkpoint=False)
            if self.strategy == "fsdp" else strategies.DDPStrategy(find_unused_parameters=True)
        )
        runner = fabric.Fabric(
            devices=self.devices, num_nodes=self.nodes, strategy=strategy, precision=precision
        )
        runner.launch()
        return runner


def first_process() -> bool:
    """Whether this process is the one that writes and speaks for all."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def _shard(model: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=mesh["data_parallel"])
    return model


@dataclass(frozen=True)
class Progress:
    """Where a run stands, after a step; epochs and steps (of this epoch) count from 1."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    val_accuracy: float | None  # after the epoch before, where there is one


class Pictures(Protocol):
    """What an epoch shows: what is i-th in it follows from the epoch's seed, not from who asks, nor when.

    However long an epoch is (`begin` may change it with the batch), it has as many steps as the others.
    """

    def begin(self, epoch: int, seed: int) -> None: ...

    def __len__(self) -> int: ...

    def loader(self, batch_size: int, sampler: Sampler[int]) -> DataLoader[Any]: ...


@dataclass(frozen=True)
class Task:
    """What is learned.

    `loss(network, *batch)` gives named scalars, "loss" among them, of a batch (inputs, targets) as the loader makes it;
    `measure(network)` what else is noted after an epoch, the network in evaluation mode. `kept` names the module inside
    `network` whose weights are the result ("": all of it).
    """

    network: nn.Module
    pictures: Pictures
    fingerprint: str
    loss: Callable[[nn.Module, Any, Tensor], dict[str, Tensor]]
    measure: Callable[[nn.Module], dict[str, float]]
    after_step: Callable[[float], None] | None = None
    kept: str = ""


@dataclass(frozen=True)
class Outcome:
    """A finished run: the module that was kept, in eval mode, a list a curve, seconds of training in all."""

    model: nn.Module
    curves: dict[str, list[float]]
    seconds: float


def run(
    make_task: Callable[[], Task],
    recipe: BaseRecipe,
    folder: Path,
    machines: Machines,
    progress: Callable[[Progress], None] | None = None,
) -> Outcome:
    """Train the task into a folder; go on where an earlier call was stopped, read what is finished.

    The folder receives recipe.json, last.ckpt (while training), then weights.safetensors and curves.json. Raises
    SaccadeError where the loss is not finite, or where the folder holds another run. Random numbers are torch's; the
    caller's state of them is as before afterwards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights, curves = folder / "weights.safetensors", folder / "curves.json"
    with reproducible():
        torch.manual_seed(seed_of(recipe.seed))
        task = make_task()
        mine = asdict(recipe) | {"images": task.fingerprint, "model": describe(task.network)}
        runner = machines.start(recipe.precision)
        with runner.rank_zero_first():
            claim(folder / "recipe.json", mine)
        if not runner.broadcast(weights.exists() and curves.exists()):
            state = _train(runner, task, recipe, folder / "last.ckpt", progress)
            found = tensors(task.network.get_submodule(task.kept))
            if runner.global_rank == 0:
                written = json.dumps({"seconds": state["seconds"], "curves": state["curves"]}, indent=1)
                with _room(folder):
                    fill_whole(weights, lambda path: save_file(found, path))
                    write_whole(curves, written)
            runner.barrier()
            if machines.strategy == "fsdp":  # what was parted is no ordinary module any more
                task = make_task()
    if runner.global_rank == 0:
        (folder / "last.ckpt").unlink(missing_ok=True)
    model = task.network.get_submodule(task.kept)
    model.load_state_dict(load_file(weights))
    return Outcome(model.to(runner.device).eval(), **json.loads(curves.read_text()))


def _train(
    runner: Any,
    task: Task,
    recipe: BaseRecipe,
    checkpoint: Path,
    progress: Callable[[Progress], None] | None,
) -> dict[str, Any]:
    """Train the epochs that the checkpoint lacks, in place; returns the state with curves and seconds."""
    processes = runner.world_size
    for batch in {recipe.batch_at(epoch) for epoch in range(recipe.epochs)}:
        if batch % processes:
            raise SaccadeError(f"a batch of {batch} cannot be shared by {processes} processes: choose a multiple of "
                               "their number")
    steps = len(_epoch(runner, task.pictures, recipe, 0))

    network = runner.setup_module(task.network)
    optimizer = timm_optim.create_optimizer_v2(task.network, "adamw", recipe.learning_rate, recipe.weight_decay)
    warm = int(steps * min(recipe.warmup, recipe.epochs / 2))
    schedule = timm_scheduler.CosineLRScheduler(  # a function of the step number alone: nothing of it to keep
        optimizer,
        t_initial=max(2, steps * recipe.epochs - warm),  # of 1 timm complains
        warmup_t=warm,
        warmup_lr_init=recipe.learning_rate / 100,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    optimizer = runner.setup_optimizers(optimizer)
    curves: dict[str, list[float]] = {"epoch": []}
    state: dict[str, Any] = {"model": network, "optimizer": optimizer, "curves": curves, "seconds": 0.0}
    if runner.broadcast(checkpoint.exists()):
        runner.load(checkpoint, state, weights_only=True)
        curves = state["curves"]

    for epoch in range(len(curves["epoch"]), recipe.epochs):
        began = time.perf_counter()
        torch.manual_seed(seed_of(recipe.seed, epoch, runner.global_rank))
        loader = _epoch(runner, task.pictures, recipe, epoch)
        network.train()
        means: dict[str, Any] = {}
        for step, batch in enumerate(loader):
            inputs, targets = runner.to_device(batch)
            schedule.step_update(epoch * steps + step)
            values = _gradients(runner, network, task, recipe, inputs, targets)
            check_finite(values["loss"], epoch, step, recipe)
            runner.clip_gradients(network, optimizer, max_norm=recipe.clip, error_if_nonfinite=False)
            optimizer.step()
            optimizer.zero_grad()
            if task.after_step is not None:
                task.after_step((epoch * steps + step + 1) / (steps * recipe.epochs))
            for name, value in values.items():
                means.setdefault(name, torchmetrics.MeanMetric().to(runner.device)).update(value)
            if progress is not None:
                accuracy = curves["val_accuracy"][-1] if epoch and "val_accuracy" in curves else None
                progress(Progress(epoch + 1, recipe.epochs, step + 1, steps, values["loss"].item(), accuracy))

        network.eval()
        measured = task.measure(network)
        if hasattr(task.network, "reshard"):  # parted weights were put together to measure
            task.network.reshard()  # type: ignore[operator]
        for name, number in measured.items():
            if name.endswith("loss"):
                check_finite(torch.tensor(number), epoch, steps - 1, recipe)
        averages = {f"train_{name}": float(metric.compute()) for name, metric in means.items()}
        for name, number in ({"epoch": epoch + 1} | averages | measured).items():
            curves.setdefault(name, []).append(number)
        state["seconds"] += time.perf_counter() - began
        _keep(runner, checkpoint, state)
    return state


def _epoch(runner: Any, pictures: Pictures, recipe: BaseRecipe, epoch: int) -> DataLoader[Any]:
    """This process's share of an epoch's batches."""
    processes = runner.world_size
    pictures.begin(epoch, seed_of(recipe.seed, epoch))
    sampler: DistributedSampler[int] = DistributedSampler(
        cast(Any, pictures), processes, runner.global_rank, seed=seed_of(recipe.seed) >> 2, drop_last=True
    )
    sampler.set_epoch(epoch)
    return pictures.loader(min(recipe.batch_at(epoch) // processes, len(sampler)), sampler)


def _gradients(
    runner: Any, network: nn.Module, task: Task, recipe: BaseRecipe, inputs: Any, targets: Tensor
) -> dict[str, Tensor]:
    """The named scalars of a batch, its gradient left in the parameters; worked through in parts."""
    totals: dict[str, Tensor] = {}
    parts = list(zip(_chunks(inputs, recipe.accumulate), targets.chunk(recipe.accumulate), strict=True))
    for number, (some, theirs) in enumerate(parts):
        share = len(theirs) / len(targets)
        waits = runner.world_size > 1 and number + 1 < len(parts)
        with runner.no_backward_sync(network, enabled=waits):
            values = task.loss(network, some, theirs)
            runner.backward(values["loss"] * share if len(parts) > 1 else values["loss"])
        for name, value in values.items():
            totals[name] = totals.get(name, 0.0) + value.detach() * share
    return totals


def _chunks(inputs: Any, count: int) -> list[Any]:
    """A batch in parts: a tensor, or each of several by its name."""
    if isinstance(inputs, Tensor):
        return list(inputs.chunk(count))
    names, parts = list(inputs), zip(*(tensor.chunk(count) for tensor in inputs.values()), strict=True)
    return [dict(zip(names, part, strict=True)) for part in parts]


def _keep(runner: Any, checkpoint: Path, state: dict[str, Any]) -> None:
    """All processes take part; the file is replaced in one step by the first."""
    if runner.world_size == 1:
        with _room(checkpoint.parent):
            fill_whole(checkpoint, lambda path: runner.save(path, state))
        return
    part = checkpoint.with_name(f"{checkpoint.name}.part")
    with _room(checkpoint.parent):
        runner.save(part, state)
    runner.barrier()
    if runner.global_rank == 0:
        part.replace(checkpoint)
    runner.barrier()


@contextmanager
def _room(folder: Path) -> Iterator[None]:
    """Tell in one line that a disk is full."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SaccadeError(f"{folder} could not be written ({reason}): make room and do the same again, it goes on "
                           "from its last finished epoch") from error


def check_finite(loss: Tensor, epoch: int, step: int, recipe: BaseRecipe) -> None:
    """Stop where a loss is not finite: epoch, step (from 0) and remedy are named."""
    if not math.isfinite(loss):
        raise SaccadeError(
            f"loss became {float(loss)} at epoch {epoch + 1}, step {step + 1}: "
            f"lower the learning rate (it is {recipe.learning_rate:g})"
        )

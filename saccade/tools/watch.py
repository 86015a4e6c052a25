"""What a long command shows: bars on a terminal, and anywhere one plain line for each thing that is finished."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from saccade.learn.loop import Progress as Step


class Watch:
    """The terminal, or the file that stands in for it."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()

    def line(self, text: str) -> None:
        """Print one line, as it is."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Show that something of unknown length goes on."""
        if not self.console.is_terminal:
            yield
            return
        with self.console.status(text):
            yield

    @contextmanager
    def bar(self, text: str, total: float) -> Iterator[Bar]:
        """Show how much of `total` is done."""
        columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal, transient=True) as progress:
            yield Bar(progress, progress.add_task(text, total=total))

    @contextmanager
    def epochs(self, doing: str, model: str, total: int) -> Iterator[Callable[[Step], None]]:
        """A bar over the epochs of a training, and what is to be called after each step."""
        with self.bar(f"{doing} {model}", total) as bar:
            yield lambda now: bar.at(now.epoch - 1 + now.step / now.steps,
                                     f"{model} epoch {now.epoch}/{now.epochs}, loss {now.loss:.3f}")


class Bar:
    """A bar that several pieces of work fill one after the other."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self.progress, self.task = progress, task
        self.before = 0.0

    def at(self, done: float, text: str | None = None) -> None:
        """So much of the present piece is done."""
        self.progress.update(self.task, completed=self.before + done, description=text)

    def ended(self, work: float) -> None:
        """The present piece, of that size, is over."""
        self.before += work
        self.at(0)

    def share(self, done: int, total: int) -> None:
        """`done` of `total`, for a bar that has one piece of size 1."""
        self.at(done / total)

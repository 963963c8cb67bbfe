"""The progress of training: a live line in a terminal, plain lines elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

QUIET_SECONDS = 10.0  # the time between plain lines


class Progress:
    """Shows the metrics of each chunk: meta-steps per second, time left, training and latest validation metrics.

    Args:
        steps: The number of meta-steps of the training.
        console: Where to print.
        standardised: The name of the target if training standardises it. The lines then say so.
    """

    def __init__(self, steps: int, console: Console, standardised: str | None = None):
        self._console, self._steps = console, steps
        self._validation = ""
        self._of = f"on standardised {standardised}: " if standardised else ""
        self._spoke = 0.0
        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("compiling", total=steps)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def report(self, row: dict[str, float]) -> None:
        """Shows the metrics of a chunk.

        Args:
            row: The metrics by name, with the meta-step as "step".
        """
        validated = [f"{k.removeprefix('validation/')} {v:.4f}" for k, v in row.items() if k.startswith("validation/")]
        if validated:
            self._validation = " | validation " + " ".join(validated)
        train = " ".join(f"{k.removeprefix('train/')} {v:.4f}" for k, v in row.items() if k.startswith("train/"))
        text = f"{row['steps_per_second']:.1f} steps/s | {self._of}{train}{self._validation}"
        self._bar.update(self._task, completed=row["step"], description=text)
        now = time.monotonic()
        last = row["step"] == self._steps
        if not self._console.is_terminal and (validated or last or now - self._spoke > QUIET_SECONDS):
            self._spoke = now
            self._console.print(f"{int(row['step'])}/{self._steps} {text}", highlight=False, soft_wrap=True)

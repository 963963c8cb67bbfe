"""Figures for TensorBoard, as a file of events.

tensorboardX's own writer hands events to a thread that waits by the wall clock: where the clock is set back, it waits
for hours, and training with it. And its files are named by the second, so that a quick restart writes over the file
before. Its records and messages are used here, without the thread.
"""

import socket
import time
from pathlib import Path
from typing import Any

from metaprior.core.extras import extra


class Events:
    """An event file of its own in `folder`, after those that are there.

    after: the meta-step to go on from; TensorBoard then drops what earlier files hold beyond it.
    """

    def __init__(self, folder: Path, after: int | None = None):
        with extra("cli", "Writing figures for TensorBoard"):
            from tensorboardX.proto import event_pb2
            from tensorboardX.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files by their names' order, whatever the clock said when they were made.
        numbers = [int(part) for file in folder.glob("*tfevents*") if (part := file.name.split(".")[3]).isdecimal()]
        number = max([int(time.time()), *(n + 1 for n in numbers)])
        self._messages: Any = event_pb2
        self._file: Any = RecordWriter(str(folder / f"events.out.tfevents.{number:010d}.{socket.gethostname()}"))
        self._put(file_version="brain.Event:2")
        if after is not None and numbers:
            restart = self._messages.SessionLog(status=self._messages.SessionLog.START)
            self._put(step=after + 1, session_log=restart)
        self._file.flush()

    def write(self, row: dict[str, float]) -> None:
        """A row of figures at row["step"], on its way to the disk when this returns."""
        with extra("cli", "Writing figures for TensorBoard"):
            from tensorboardX.summary import scalar

        for name, value in row.items():
            if name != "step":
                self._put(step=int(row["step"]), summary=scalar(name, value))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _put(self, **content: Any) -> None:
        self._file.write(self._messages.Event(wall_time=time.time(), **content).SerializeToString())

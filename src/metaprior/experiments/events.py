"""Metrics for TensorBoard, written to an event file.

This uses tensorboardX's records and messages, but not its writer, which has two problems. It passes events to a thread
that waits by the wall clock: if the clock is set back, the thread and the training wait for hours. And its file names
have a resolution of one second, so a quick restart overwrites the previous file.
"""

import socket
import time
from pathlib import Path
from typing import Any

from metaprior.core.extras import extra


class Events:
    """A new event file, whose name sorts after those that are in the folder.

    Args:
        folder: The folder of the event files.
        after: The meta-step that training continues from. TensorBoard then ignores later events in earlier files.
    """

    def __init__(self, folder: Path, after: int | None = None):
        with extra("cli", "Writing metrics for TensorBoard"):
            from tensorboardX.proto import event_pb2
            from tensorboardX.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files in the order of their names, so a new number must be the largest.
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
        """Writes the metrics of a chunk and flushes the file.

        Args:
            row: The metrics by name, with the meta-step as "step".
        """
        with extra("cli", "Writing metrics for TensorBoard"):
            from tensorboardX.summary import scalar

        for name, value in row.items():
            if name != "step":
                self._put(step=int(row["step"]), summary=scalar(name, value))
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _put(self, **content: Any) -> None:
        self._file.write(self._messages.Event(wall_time=time.time(), **content).SerializeToString())

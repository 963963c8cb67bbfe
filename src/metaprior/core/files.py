"""Atomic writes of files, locks between processes, and errors of the file system in one sentence."""

import errno
import hashlib
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ADVICE = {
    errno.ENOSPC: "free some disk space",
    errno.EDQUOT: "free some of your disk quota",
    errno.EACCES: "choose a folder that you may write to, or change its permissions",
    errno.EPERM: "choose a folder that you may write to, or change its permissions",
    errno.EROFS: "choose a folder on a disk that is not read-only",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ENOTDIR: "a file stands where a folder is needed; choose another path",
    errno.EEXIST: "a file stands where a folder is needed; choose another path",
    errno.ENOENT: "a folder of the path is missing; create it, or choose another path",
    errno.EISDIR: "a folder stands where a file is needed; choose another path",
    errno.EIO: "the disk failed; check it, or choose a folder on another one",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
}


def explained(error: OSError, path: Path | str | None = None) -> str:
    """Describes an error of the file system in one sentence: the path, the system's message, and what to do.

    Args:
        error: The error.
        path: The path; None takes that of the error.
    """
    where = path if path is not None else error.filename
    said = error.strerror or str(error) or type(error).__name__
    advice = ADVICE.get(error.errno or 0)
    return (f"{where}: " if where is not None else "") + said + (f"; {advice}." if advice else ".")


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Context manager for an atomic write: yields a path in the same folder to write to.

    If the block succeeds, the new file replaces `path`; otherwise it is removed. Readers see the old file or the new
    one. At the end, both the content and the name have reached the disk. A device or a pipe, such as /dev/stdout, is
    written to directly. For a link, its target is replaced.

    Args:
        path: The file to write.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    path = path.resolve() if path.is_symlink() else path
    # A short name, so that it is valid in the file system whenever that of `path` is.
    partial = path.with_name(f"{partial_prefix()}{uuid.uuid4().hex[:8]}{path.suffix}")
    remove_partials(path.parent)
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    except OSError as error:
        error.filename = str(path)  # instead of the temporary file, or no file
        raise
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _mark() -> str:
    """Returns the first part of the names of this machine's partial files. Several machines may share a folder."""
    return f".partial-{hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]}-"


def partial_prefix() -> str:
    """Returns the first part of the names of this process's partial files and folders (see `remove_partials`)."""
    return f"{_mark()}{os.getpid()}-"


def remove_partials(folder: Path) -> None:
    """Removes the partial files that killed processes of this machine left in a folder.

    Args:
        folder: The folder.
    """
    for partial in folder.glob(f"{_mark()}*"):
        if not _alive(partial.name.removeprefix(_mark()).partition("-")[0]):
            with suppress(OSError):
                shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def write_atomically(path: Path, text: str) -> None:
    """Writes a text atomically (see `beside`).

    Args:
        path: The file.
        text: Its content.
    """
    with beside(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's names, have reached the disk.

    Args:
        path: The file or folder.
    """
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # the file system does not support it
            raise
    finally:
        os.close(opened)


def check_output(path: Path, option: str, file: bool = False) -> None:
    """Checks, before any work, that a folder or a file can be created and written to. It creates nothing.

    Args:
        path: The folder or file.
        option: The option that names it, for the message.
        file: Whether it is a file.

    Raises:
        ValueError: It cannot be created or written to.
    """
    try:
        if path.exists() and path.is_dir() == file:
            raise OSError(errno.EISDIR if file else errno.ENOTDIR, os.strerror(errno.EISDIR if file else errno.ENOTDIR))
        place = path.parent if file else path
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(place, os.W_OK | os.X_OK):
            read_only = hasattr(os, "statvfs") and os.statvfs(place).f_flag & os.ST_RDONLY
            why = errno.EROFS if read_only else errno.EACCES
            raise OSError(why, os.strerror(why))
    except OSError as error:
        raise ValueError(f"{option}: {explained(error, path)}") from error


class Locked(ValueError):
    """Another process holds the lock."""


class Lock:
    """The system's lock on a file, for one process at a time. It ends with the process that holds it.

    The file's text names its holder, for messages. If the file system has no locks (some network file systems), the
    text decides: a holder on this machine counts while its process is alive, and a holder on another machine counts
    until the file is deleted.
    """

    def __init__(self, path: Path, what: str):
        """Takes the lock.

        Args:
            path: The file, which is created if needed.
            what: What is locked: the first words of the message.

        Raises:
            Locked: Another process holds it. The message names the process and its machine.
        """
        self._pid = os.getpid()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
        try:
            self._take(path, what)
        except BaseException:
            os.close(self._file)
            self._file = None
            raise

    def _take(self, path: Path, what: str) -> None:
        assert self._file is not None
        pid, _, host = os.read(self._file, 200).decode(errors="replace").strip().partition(" ")
        holder = f"process {pid or '(unknown)'} on {host or 'this machine'}"
        holder = "this process" if (pid, host) == (str(os.getpid()), socket.gethostname()) else holder
        message = f"{what} is being trained by {holder}; wait until it ends, or stop it first."
        try:
            if fcntl is None:
                raise OSError(errno.ENOTSUP, "no locks here")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Locked(message) from error
        except OSError as error:
            if host and (host != socket.gethostname() or _alive(pid)):
                raise Locked(f"{message} If it has ended, delete {path}.") from error
        os.ftruncate(self._file, 0)
        os.lseek(self._file, 0, os.SEEK_SET)
        os.write(self._file, f"{os.getpid()} {socket.gethostname()}\n".encode())

    def release(self) -> None:
        """Releases the lock. Further calls do nothing."""
        if self._file is not None:
            if self._pid == os.getpid():  # a forked child must not erase its parent's text
                with suppress(OSError):
                    os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file = None

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self.release()


def _alive(pid: str) -> bool:
    if os.name == "nt":
        return True  # on Windows, os.kill would end the process
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except OSError:
        return True
    return True

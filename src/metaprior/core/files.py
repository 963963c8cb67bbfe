"""Files that are whole or not there: written beside and renamed, locked by one process, errors told in a sentence."""

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
    """One sentence: the path, what the system says, and what to do about it."""
    where = path if path is not None else error.filename
    said = error.strerror or str(error) or type(error).__name__
    advice = ADVICE.get(error.errno or 0)
    return (f"{where}: " if where is not None else "") + said + (f"; {advice}." if advice else ".")


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A path to write to in the same folder; it becomes `path` if the block ends well, and is removed if it does not.

    Readers see the old file or the new one. Both the content and the name have reached the disk at the end. A device or
    a pipe, such as /dev/stdout, is written to as it is; a link's target is what is replaced.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    path = path.resolve() if path.is_symlink() else path
    # Short, so that any name that the file system takes for `path` can be written this way.
    partial = path.with_name(f"{partial_prefix()}{uuid.uuid4().hex[:8]}{path.suffix}")
    remove_partials(path.parent)
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    except OSError as error:
        error.filename = str(path)  # not of the file beside it, nor none at all
        raise
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _mark() -> str:
    """How the names of this machine's partial files start; a folder may be shared by several."""
    return f".partial-{hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]}-"


def partial_prefix() -> str:
    """How the names of this process's partial files and folders start (see `remove_partials`)."""
    return f"{_mark()}{os.getpid()}-"


def remove_partials(folder: Path) -> None:
    """Remove what processes of this machine were writing in a folder when they were killed."""
    for partial in folder.glob(f"{_mark()}*"):
        if not _alive(partial.name.removeprefix(_mark()).partition("-")[0]):
            with suppress(OSError):
                shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def write_atomically(path: Path, text: str) -> None:
    """Write a text whole or not at all (see `beside`)."""
    with beside(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Have the disk keep a file's content, or a folder's names, before going on."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot
            raise
    finally:
        os.close(opened)


def check_output(path: Path, option: str, file: bool = False) -> None:
    """Raise a ValueError, before any work, where a folder (or a file) cannot be made or written to; makes nothing."""
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
    """One process at a time: the system's lock on a file, which ends with the process that holds it.

    The file also says who holds it, for messages. Where the file system has no locks (some network file systems), this
    text decides: a holder on this machine counts while its process is alive, one on another machine until the file is
    deleted.

    Raises:
        Locked: naming the process and the machine that hold it.
    """

    def __init__(self, path: Path, what: str):
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
        """Let others have it; again is harmless."""
        if self._file is not None:
            if self._pid == os.getpid():  # a forked child leaves the text to its parent
                with suppress(OSError):
                    os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file = None

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self.release()


def _alive(pid: str) -> bool:
    if os.name == "nt":
        return True  # where asking would end it
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except OSError:
        return True
    return True

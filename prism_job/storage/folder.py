"""A store in a local folder, and `local_errors`, which translates the errors of the file system."""

import contextlib
import errno
import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from prism_job.errors import DataError, RequestError, TransientError
from prism_job.storage.objects import Listed

_UMASK = os.umask(0)
os.umask(_UMASK)
# mkstemp makes files that only their owner may read; a shared store needs what the umask allows.


class LocalFolder:
    """A put writes a file beside the target, syncs it, and renames it."""

    def __init__(self, uri: str) -> None:
        self.root = Path(uri)

    def uri(self, key: str) -> str:
        return str(self.root / key)

    def local_path(self, key: str) -> Path | None:
        return self.root / key

    def get(self, key: str) -> bytes:
        with local_errors(self.uri(key)):
            return (self.root / key).read_bytes()

    def download(self, key: str, path: Path, tag: str | None = None) -> None:
        with local_errors(self.uri(key)):
            shutil.copyfile(self.root / key, path)

    @contextlib.contextmanager
    def as_file(self, key: str) -> Iterator[Path]:
        with local_errors(self.uri(key)):
            yield self.root / key

    def put(self, key: str, content: bytes) -> None:
        self._commit(key, io.BytesIO(content))

    def put_file(self, key: str, path: Path) -> None:
        with path.open("rb") as source:
            self._commit(key, source)

    def _commit(self, key: str, source: IO[bytes]) -> None:
        target = self.root / key
        with local_errors(self.uri(key), writing=True):
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, unfinished = tempfile.mkstemp(dir=target.parent, prefix=".put-")
            try:
                with os.fdopen(handle, "wb") as file:
                    shutil.copyfileobj(source, file, 2**20)
                    file.flush()
                    os.fsync(file.fileno())
                Path(unfinished).chmod(0o666 & ~_UMASK)
                os.replace(unfinished, target)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(unfinished)
                raise
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def list(self, prefix: str = "") -> Iterator[Listed]:
        # Only the folder part of the prefix is walked: a listing of one extractor must not stat all the others.
        start = self.root / prefix.rpartition("/")[0]
        with local_errors(str(start)):
            keys = []
            walked: set[str] = set()
            for folder, folders, names in os.walk(start, onerror=_raise_unless_missing, followlinks=True):
                folders.sort()
                if os.path.realpath(folder) in walked:  # a link back to a parent
                    folders.clear()
                    continue
                walked.add(os.path.realpath(folder))
                for name in names:
                    key = (Path(folder) / name).relative_to(self.root).as_posix()
                    if key.startswith(prefix) and not name.startswith(".put-"):
                        keys.append(key)
        for key in sorted(keys):
            with local_errors(self.uri(key)):
                stat = (self.root / key).stat()
            yield Listed(key, stat.st_size, str(stat.st_mtime_ns), stat.st_mtime)

    def exists(self, key: str) -> bool:
        with local_errors(self.uri(key)):
            return (self.root / key).exists()

    def delete(self, keys: Sequence[str]) -> None:
        # Folders stay: another process may have just created one for its put.
        for key in keys:
            with local_errors(self.uri(key)):
                (self.root / key).unlink(missing_ok=True)


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


_TRANSIENT = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.EBUSY}


@contextlib.contextmanager
def local_errors(where: str, *, writing: bool = False) -> Iterator[None]:
    """Translates an OSError into one of the three families; names `where`."""
    try:
        yield
    except FileNotFoundError as error:
        if writing:
            fix = "choose a folder that can be created and written"
            raise RequestError("cannot be written: no such folder", where=where, fix=fix) from error
        fix = "check the path; was the file deleted during the run, or does a link point to nothing?"
        raise DataError("no such file", where=where, fix=fix) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fix = "free some space or choose another folder, then run again: finished units are kept"
            raise TransientError("no space left on the device", where=where, fix=fix) from error
        if error.errno in _TRANSIENT:
            fix = "look at the disk or network mount, then run again: finished units are kept"
            raise TransientError(f"cannot be read or written now: {error.strerror}", where=where, fix=fix) from error
        raise RequestError(
            f"cannot be read or written: {error.strerror}", where=where, fix="check the path and its permissions"
        ) from error

"""The SQLite file of a cache, and the connection to it."""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
import stat
import threading
import time
import weakref
from pathlib import Path  # typer reads the annotations
from typing import TYPE_CHECKING, TypeVar

from openai_eval_client._runtime import mind_forks
from openai_eval_client.errors import ValidationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


T = TypeVar("T")

APPLICATION_ID = int.from_bytes(b"OEvC", "big")  # https://www.sqlite.org/pragma.html#pragma_application_id
SCHEMA_VERSION = 1
_COLUMNS = "key BLOB PRIMARY KEY, created REAL NOT NULL, value BLOB NOT NULL, checksum BLOB NOT NULL"
_TABLES = {name: f"CREATE TABLE {name} ({_COLUMNS})" for name in ("answers", "journal")}

_BUSY_TIMEOUT = 0.5  # seconds SQLite itself waits for another process, at each try
_PATIENCE = 10.0  # seconds until opening gives up
_PAUSE = 0.02
# What passes by itself: SQLITE_BUSY, SQLITE_LOCKED, SQLITE_PROTOCOL. Python 3.10 has no error codes.
_PASSING = ("database is locked", "database table is locked", "locking protocol")


class Database:
    """A file that holds our tables, and nothing else ever."""

    def __init__(self, path: str | Path, *, read_only: bool = False) -> None:
        self.name = os.fspath(path)
        self.path = Path(os.path.realpath(path))
        self.read_only = read_only
        self._log = Path(f"{self.path}-wal")
        self._status: os.stat_result

    def prepare(self) -> None:
        """Make the file where there is none; else see that it is ours."""
        with self._refusing():
            if not self.path.exists():
                self._create()
            self._status = self._recognised()
            with contextlib.closing(retry_while_locked(self.connect, _PATIENCE)) as connection:
                self._check_writable(connection)

    def look(self, read: Callable[[sqlite3.Connection], T]) -> T:
        """Read a file that exists, also while others use it; leave no file beside it."""
        with self._refusing():
            if not self.path.exists():
                raise self.unusable("there is no such file")
            self._status = self._recognised()
            if not self._log.exists():  # nobody has it open; SQLite would leave its side files there
                with contextlib.suppress(sqlite3.DatabaseError):
                    found = self._read("immutable=1", read)
                    if not self._log.exists() and self._is_unchanged():
                        return found
            return retry_while_locked(lambda: self._read_in_use(read), _PATIENCE)

    def _read_in_use(self, read: Callable[[sqlite3.Connection], T]) -> T:
        try:
            return self._read("mode=ro", read)
        except sqlite3.OperationalError:
            if not self._is_at_rest():
                raise
        return self._read("immutable=1", read)  # in a directory where SQLite cannot make its side files

    def _read(self, mode: str, read: Callable[[sqlite3.Connection], T]) -> T:
        with contextlib.closing(self._open(mode)) as connection:
            return read(connection)

    def _is_unchanged(self) -> bool:
        now, before = self.path.stat(), self._status
        return (now.st_mtime_ns, now.st_size) == (before.st_mtime_ns, before.st_size)

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        """Name the file in whatever is wrong with it."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise self.unusable(f"cannot be used: {error}") from None
        except (
            sqlite3.DatabaseError,
            UnicodeDecodeError,
        ) as error:  # also SQLite's words, where it quotes damage
            raise self.damaged(error) from None
        except OSError as error:
            raise self.unusable(f"cannot be used: {error.strerror or error}") from None

    def connect(self) -> sqlite3.Connection:
        """Open the file, which exists."""
        try:
            return self._open("mode=rw")
        except sqlite3.OperationalError:
            if not self.read_only or not self._is_at_rest():
                raise
        return self._open("immutable=1")  # in a directory where SQLite cannot make its side files

    def unusable(self, why: str) -> ValidationError:
        """Return the error that says so, naming the file."""
        return ValidationError(f"cache={self.name!r}: {why}", field="cache")

    def damaged(self, error: object) -> ValidationError:
        """Return the error for a file that SQLite cannot make sense of, or not as we made it."""
        return self.unusable(
            f"damaged, or no cache of this package ({error}). It was left as it is: move or restore it",
        )

    def is_there(self) -> bool:
        """Return whether the file is still the one that was looked at first."""
        # SQLite would apply the log of the old file to one that took its place.
        try:
            return os.path.samestat(self.path.stat(), self._status)
        except OSError:
            return False

    def _create(self) -> None:
        """Make the file under another name and then give it its own: nobody ever sees half of it."""
        if self.read_only:
            raise self.unusable("does not exist, and write=False")
        if _size(self._log) and not self.path.exists():  # SQLite would take it for the new file's
            why = f"is gone, but not what {self._log} still holds of it: bring it back, or delete that file"
            raise self.unusable(why)
        new = self.path.with_name(f"{self.path.name}.{secrets.token_hex(8)}.new")
        file = os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            new.chmod(0o600)  # whatever the umask; SQLite gives its side files the same mode
            _fill(new)
            os.fsync(file)
            self._give_name(new)
        finally:
            os.close(file)
            new.unlink(missing_ok=True)

    def _give_name(self, new: Path) -> None:
        try:
            os.link(new, self.path)
        except FileExistsError:
            return  # another process was faster; theirs is as good
        except OSError:  # a file system without hard links
            if not os.path.lexists(self.path):
                new.rename(self.path)

    def _recognised(self) -> os.stat_result:
        """See whose file it is, without leaving a trace on one that is not ours."""
        status = self.path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise self.unusable("is not a regular file")
        if not status.st_size:
            raise self.unusable("is empty, which a cache never is: delete it to start a new one")
        try:
            application, version = self._marks("immutable=1")
        except sqlite3.DatabaseError:  # also where another process just moves its pages
            application, version = self._marks("mode=ro")
        self._check_marks(application, version)
        return status

    def _marks(self, mode: str) -> tuple[int, int]:
        with contextlib.closing(self._raw(mode)) as connection:
            return _pragma(connection, "application_id"), _pragma(connection, "user_version")

    def _check_marks(self, application: int, version: int) -> None:
        if application != APPLICATION_ID:
            raise self.unusable("is an SQLite database of another program; it was left as it is")
        if version > SCHEMA_VERSION:
            raise self.unusable(
                f"was made by a newer version of this package (format {version}, this one knows "
                f"{SCHEMA_VERSION}); it was left as it is",
            )

    def _open(self, mode: str) -> sqlite3.Connection:
        connection = self._raw(mode)
        try:
            connection.execute("PRAGMA synchronous = FULL")  # committed also means: survives a power cut
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA cell_size_check = ON")
            connection.execute(f"PRAGMA query_only = {int(self.read_only)}")
            self._check_marks(_pragma(connection, "application_id"), _pragma(connection, "user_version"))
            self._check_tables(connection)
        except BaseException:
            connection.close()
            raise
        connection.text_factory = bytes  # where damage makes a text of a value, it need not decode
        return connection

    def _check_tables(self, connection: sqlite3.Connection) -> None:
        tables = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL")
        if dict(tables.fetchall()) != _TABLES:
            raise self.damaged("its tables are not as they were made")

    def _raw(self, mode: str) -> sqlite3.Connection:
        return sqlite3.connect(
            f"{self.path.as_uri()}?{mode}",
            uri=True,
            isolation_level=None,
            timeout=_BUSY_TIMEOUT,
            check_same_thread=False,
        )

    def _check_writable(self, connection: sqlite3.Connection) -> None:
        if self.read_only:
            return
        try:
            connection.execute("DELETE FROM journal WHERE key IS NULL")  # none: it only takes the lock
        except sqlite3.OperationalError as error:
            if not is_passing(error):
                raise self.unusable(
                    f"cannot be written ({error}); CacheConfig(write=False) only reads it",
                ) from None

    def _is_at_rest(self) -> bool:
        """Return whether all there is stands in the file itself, and nothing in the log beside it."""
        return not _size(self._log)


def _fill(path: Path) -> None:
    """Make our tables in an empty file that nobody else knows of."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA journal_mode = MEMORY")
        connection.execute("BEGIN")
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        for table in _TABLES.values():
            connection.execute(table)
        connection.execute("COMMIT")
        connection.execute("PRAGMA journal_mode = WAL")


def retry_while_locked(action: Callable[[], T], seconds: float) -> T:
    """Do it again while another process is in the way, for so many seconds at most."""
    give_up = time.monotonic() + seconds
    while True:
        try:
            return action()
        except sqlite3.OperationalError as error:
            if not is_passing(error) or time.monotonic() > give_up:
                raise
        time.sleep(_PAUSE)


def is_passing(error: sqlite3.Error) -> bool:
    """Return whether only another process was in the way."""
    return any(text in str(error) for text in _PASSING)


def _size(path: Path) -> int:
    """Return the size of a file in bytes; 0 where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    (value,) = connection.execute(f"PRAGMA {name}").fetchone()
    return int(value)


class Connection:
    """Opened when needed, lent to one thread at a time, closed before a fork and with its owner."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._open: list[sqlite3.Connection] = []  # one at most
        weakref.finalize(self, _close, self._open)  # also at the interpreter's end
        mind_forks(self)

    @contextlib.contextmanager
    def lent(self) -> Iterator[sqlite3.Connection]:
        """Lend it; whatever goes wrong is undone, and the next one gets a new one."""
        with self._lock:
            try:
                yield self._current()
            except BaseException:
                _close(self._open)
                raise

    def close(self) -> None:
        """Close it once nobody uses it; lending it again opens it again."""
        with self._lock:
            _close(self._open)

    def before_fork(self) -> None:
        """Close it: SQLite's locks do not survive a fork, https://www.sqlite.org/howtocorrupt.html."""
        self._lock.acquire()
        _close(self._open)

    def after_fork(self, *, child: bool) -> None:  # noqa: ARG002  # the same on both sides
        """Let it be used again."""
        self._lock.release()

    def _current(self) -> sqlite3.Connection:
        if not self._database.is_there():
            raise sqlite3.OperationalError("the file is gone, or another is in its place")
        if not self._open:
            self._open.append(self._database.connect())
        return self._open[0]


def _close(connections: list[sqlite3.Connection]) -> None:
    while connections:
        connections.pop().close()

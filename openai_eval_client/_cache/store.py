"""One SQLite file of answers and the journal of jobs: everything is committed before a write returns."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sqlite3
import stat
import threading
import time
import weakref
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openai_eval_client._log import warn
from openai_eval_client._runtime import Background, FileLock, mind_forks
from openai_eval_client.errors import ValidationError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    Statement = tuple[str, tuple[Any, ...]]

_APPLICATION_ID = int.from_bytes(b"OEvC", "big")  # https://www.sqlite.org/pragma.html#pragma_application_id
_FORMAT = 2  # a file of format 1 may hold entries with keys of version 1
_COLUMNS = "key BLOB PRIMARY KEY, created REAL NOT NULL, value BLOB NOT NULL, checksum BLOB NOT NULL"
_TABLES = {name: f"CREATE TABLE {name} ({_COLUMNS})" for name in ("answers", "journal")}
# Seconds that SQLite itself waits for another user of the file.
_PATIENCE_TO_OPEN = 10.0
_PATIENCE_TO_TRY_WRITING = 0.5
_COUNT_KEYS = "SELECT count(*) FROM {0} INDEXED BY sqlite_autoindex_{0}_1"
_AND_ENTRIES = "UNION ALL SELECT count(*) FROM {0} NOT INDEXED"  # in twenty times as many pages
_KEYS_ONLY = 256_000_000  # bytes from which that would take a moment: 0.1 s


class Database:
    """A file that holds our tables and nothing else; made where there is none."""

    def __init__(self, path: str | Path, *, read_only: bool = False) -> None:
        self.name = os.fspath(path)
        self.path = Path(os.path.realpath(path))
        self.format = _FORMAT
        self._read_only = read_only
        self._wal = Path(f"{self.path}-wal")  # what SQLite has committed and not yet moved into the file
        try:
            if not self.path.exists():
                self._create()
            self._status = self._recognise()
            with contextlib.closing(self.connect(_PATIENCE_TO_OPEN)) as connection:
                if not read_only:  # else it has what can be read of it
                    self._check_pages(connection)
                    self._check_writable(connection)
        except sqlite3.OperationalError as error:
            raise self.unusable(f"cannot be used: {error}") from None
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # SQLite's message may quote damage
            raise self.damaged(error) from None
        except OSError as error:
            raise self.unusable(f"cannot be used: {error.strerror or error}") from None

    def connect(self, patience: float) -> sqlite3.Connection:
        """Open the file, which exists, waiting so many seconds for its other users."""
        try:
            return self._open("mode=rw", patience)
        except sqlite3.OperationalError:
            if not self._read_only or _size(self._wal):
                raise
        return self._open("immutable=1", patience)  # in a directory where SQLite cannot make its side files

    def unusable(self, why: str) -> ValidationError:
        """Return the error for a file that cannot be used, naming it."""
        return ValidationError(f"cache={self.name!r}: {why}", field="cache")

    def damaged(self, error: object) -> ValidationError:
        """Return the error for a file that SQLite cannot read, or whose content is not as it was written."""
        why = f"damaged, or no cache of this package ({error}). It was left as it is: move or restore it"
        rest = "; with CacheConfig(write=False), what can still be read of a cache answers"
        return self.unusable(why if self._read_only else f"{why}{rest}")

    def is_there(self) -> bool:
        """Return whether the file is still the one that was opened first."""
        # SQLite would apply the log of the old file to one that took its place.
        try:
            return os.path.samestat(self.path.stat(), self._status)
        except OSError:
            return False

    def _create(self) -> None:
        """Make the file under another name, then give it its own: no other process ever sees half of it."""
        if self._read_only:
            raise self.unusable("does not exist, and write=False creates none")
        if _size(self._wal) and not self.path.exists():  # SQLite would take it for the new file's
            why = f"is gone, but {self._wal} still holds a part of it: restore it, or delete that file"
            raise self.unusable(why)
        new = self.path.with_name(f"{self.path.name}.{secrets.token_hex(8)}.new")
        file = os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            new.chmod(0o600)  # whatever the umask; SQLite gives its side files the same mode
            _fill(new)
            os.fsync(file)
            try:
                os.link(new, self.path)
            except FileExistsError:
                pass  # another process was faster; its file is as good
            except OSError:  # a file system without hard links
                if not os.path.lexists(self.path):
                    new.rename(self.path)
        finally:
            os.close(file)
            new.unlink(missing_ok=True)

    def _recognise(self) -> os.stat_result:
        """Refuse a file that is not ours, without leaving a trace on it."""
        status = self.path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise self.unusable("is not a regular file")
        if not status.st_size:
            raise self.unusable("is empty, which a cache never is: delete it to start a new one")
        try:
            with contextlib.closing(self._raw("immutable=1")) as connection:
                self._check_marks(connection)
        except sqlite3.DatabaseError:  # also where another process is just moving pages into it
            with contextlib.closing(self._raw("mode=ro")) as connection:
                self._check_marks(connection)
        return status

    def _check_marks(self, connection: sqlite3.Connection) -> None:
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (self.format,) = connection.execute("PRAGMA user_version").fetchone()
        if application != _APPLICATION_ID:
            raise self.unusable("is an SQLite database of another program; it was left as it is")
        if self.format > _FORMAT:
            versions = f"format {self.format}, this one knows {_FORMAT}"
            why = f"was made by a newer version of this package ({versions}); it was left as it is"
            raise self.unusable(why)
        if self.format < 1:
            raise self.damaged(f"format {self.format}")

    def _open(self, mode: str, patience: float) -> sqlite3.Connection:
        with contextlib.ExitStack() as stack:
            connection = stack.enter_context(contextlib.closing(self._raw(mode, patience)))
            connection.execute("PRAGMA synchronous = FULL")  # committed also means: survives a power cut
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA cell_size_check = ON")
            connection.execute(f"PRAGMA query_only = {int(self._read_only)}")
            self._check_marks(connection)
            tables = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL")
            if dict(tables.fetchall()) != _TABLES:
                raise self.damaged("its tables are not as they were made")
            stack.pop_all()  # it stays open
        connection.text_factory = bytes  # where damage makes a text of a value, it need not decode
        return connection

    def _raw(self, mode: str, patience: float = _PATIENCE_TO_OPEN) -> sqlite3.Connection:
        uri = f"{self.path.as_uri()}?{mode}"
        return sqlite3.connect(uri, timeout=patience, isolation_level=None, check_same_thread=False, uri=True)

    def _check_pages(self, connection: sqlite3.Connection) -> None:
        """Find pages that SQLite cannot read before anything is asked."""
        # Counting looks at the head of every page but those on which long values go on.
        counts = _COUNT_KEYS if self._status.st_size > _KEYS_ONLY else f"{_COUNT_KEYS} {_AND_ENTRIES}"
        for table in _TABLES:
            (keys,), *rows = connection.execute(counts.format(table))
            if rows not in ([], [(keys,)]):
                raise self.damaged(f"{keys} keys, but {rows[0][0]} entries")

    def _check_writable(self, connection: sqlite3.Connection) -> None:
        _set_patience(connection, _PATIENCE_TO_TRY_WRITING)
        try:
            connection.execute("DELETE FROM journal WHERE key IS NULL")  # no row: it only takes the lock
        except sqlite3.OperationalError as error:
            if not _is_locked(error):
                why = f"cannot be written ({error}); CacheConfig(write=False) only reads it"
                raise self.unusable(why) from None


def _fill(path: Path) -> None:
    """Make our tables in an empty file that no other process knows of."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        marks = f"PRAGMA application_id = {_APPLICATION_ID}; PRAGMA user_version = {_FORMAT}"
        connection.executescript("PRAGMA synchronous = OFF; PRAGMA journal_mode = MEMORY")
        connection.executescript(f"BEGIN; {marks}; {'; '.join(_TABLES.values())}; COMMIT")
        connection.execute("PRAGMA journal_mode = WAL")


def _set_patience(connection: sqlite3.Connection, seconds: float) -> None:
    """Set how long SQLite waits for another user of the file."""
    # Its own wait covers all that we meet: a transaction begins as a reader or as the writer, and never turns
    # from one into the other, which is what SQLite refuses at once for fear of a deadlock.
    connection.execute(f"PRAGMA busy_timeout = {round(seconds * 1000)}")


def _is_locked(error: sqlite3.Error) -> bool:
    """Return whether only another user of the file was in the way."""
    return "database is locked" in str(error)  # SQLITE_BUSY; Python 3.10 has no error codes


def _size(path: Path) -> int:
    """Return the size of a file in bytes; 0 where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


class Connection:
    """Opened when needed, lent to one thread at a time, closed before a fork and with its owner."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._next_in_line = threading.Lock()  # held while waiting for `_lock`: no thread takes it twice
        self._open: list[sqlite3.Connection] = []  # one at most
        weakref.finalize(self, _close, self._open)  # also at the interpreter's end
        mind_forks(self)

    @contextlib.contextmanager
    def lent(self, patience: float) -> Iterator[sqlite3.Connection]:
        """Lend it, to wait so many seconds for other users; after an error the next one lent is a new one."""
        with self._next_in_line:
            self._lock.acquire()
        try:
            connection = self._current(patience)
            _set_patience(connection, patience)
            yield connection
        except BaseException:
            _close(self._open)
            raise
        finally:
            self._lock.release()

    def close(self) -> None:
        """Close it once no thread uses it; lending it again opens it again."""
        with self._lock:
            _close(self._open)

    def before_fork(self) -> None:
        """Close it: SQLite's locks do not survive a fork, https://www.sqlite.org/howtocorrupt.html."""
        self._next_in_line.acquire()
        self._lock.acquire()
        _close(self._open)

    def after_fork(self, *, child: bool) -> None:  # noqa: ARG002  # the same on both sides
        """Let it be used again."""
        self._lock.release()
        self._next_in_line.release()

    def _current(self, patience: float) -> sqlite3.Connection:
        if not self._database.is_there():
            raise sqlite3.OperationalError("the file is gone, or another is in its place")
        if not self._open:
            self._open.append(self._database.connect(patience))
        return self._open[0]


def _close(connections: list[sqlite3.Connection]) -> None:
    while connections:
        connections.pop().close()


_PATIENCE = 60.0  # seconds to wait for another user of the file
_SLICE = 1.0  # of them at a time: a fork has to wait for the end of one
_LITTLE_PATIENCE = 0.5  # seconds for each write after one that waited in vain, until one succeeds

_GET = "SELECT created, value, checksum FROM {} WHERE key = ?"
_PUT = "INSERT OR REPLACE INTO {} (key, created, value, checksum) VALUES (?, ?, ?, ?)"
_DELETE = "DELETE FROM journal WHERE key = ?"


class Store:
    """One file of kept values, used by any number of tasks, event loops, threads and processes at once.

    Writes that wait at the same time are committed together, by a thread of their own; reads likewise.
    """

    def __init__(self, path: str | Path, *, read_only: bool = False, patience: float = _PATIENCE) -> None:
        self._database = Database(path, read_only=read_only)
        self._read_only = read_only
        self._reader, self._writer = Connection(self._database), Connection(self._database)
        self._reads = Background("openai_eval_client reads", self._read)
        self._writes = Background("openai_eval_client writes", self._write)
        self._patience = self._write_patience = patience
        self._warned: set[str] = set()
        self._closed = False

    @property
    def has_version_1(self) -> bool:
        """Whether there may be entries with keys of version 1: earlier versions made the file."""
        return self._database.format == 1

    async def get(self, key: bytes, *, since: float = 0.0) -> bytes | None:
        """Return what was kept under a key since a time; None where there is nothing."""
        try:
            row = await self._do(self._reads, (_GET.format("answers"), (key,)))
        except (sqlite3.DatabaseError, UnicodeDecodeError, RuntimeError) as error:
            passes = isinstance(error, sqlite3.OperationalError | RuntimeError)
            if not passes and not self._read_only:  # asked again, all of it could neither be kept nor found
                raise self._database.damaged(error) from None
            self._warn("cache %s cannot be read (%s): asking again", error)
            return None
        if row is not None and not _is_intact(key, row):
            self._warn("cache %s: an answer is damaged (%s): asking again", "wrong checksum")
            return None
        return row[1] if row is not None and row[0] >= since else None

    async def put(self, key: bytes, value: bytes) -> bool:
        """Keep a value and return once it is committed; False where it could not be."""
        try:
            await self._do(self._writes, _put("answers", key, value))
        except Exception as error:  # noqa: BLE001  # the answer is paid for: it is handed on in any case
            self._warn("cache %s cannot be written (%s): the run goes on, its answers are not kept", error)
            return False
        return True

    async def journal_get(self, key: str) -> dict[str, Any] | None:
        """Return an entry of the journal, None where there is none."""
        name = key.encode()
        row = await self._do_journal(self._reads, (_GET.format("journal"), (name,)))
        if row is None:
            return None
        if not _is_intact(name, row):
            raise self._database.damaged(f"wrong checksum of {key!r} in the journal")
        entry: dict[str, Any] = json.loads(row[1])
        return entry

    async def journal_put(self, key: str, value: dict[str, Any]) -> None:
        """Write an entry of the journal, in place of an older one, and return once it is committed."""
        await self._do_journal(self._writes, _put("journal", key.encode(), json.dumps(value).encode()))

    async def journal_delete(self, key: str) -> None:
        """Remove an entry of the journal, if it is there, and return once that is committed."""
        await self._do_journal(self._writes, (_DELETE, (key.encode(),)))

    @contextlib.asynccontextmanager
    async def exclusive(self, name: str) -> AsyncIterator[None]:
        """Wait for a name, and hold it alone among all users of this file, in this process and others."""
        # The lock ends with the process, also when that is killed.
        digest = blake2b(name.encode(), digest_size=8).hexdigest()
        path = self._database.path
        async with contextlib.AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(FileLock(path.with_name(f"{path.name}-{digest}.lock")))
            except OSError as error:
                raise self._database.unusable(f"no lock beside it: {error.strerror or error}") from None
            yield

    def close(self) -> None:
        """Finish what is waiting and close the file; blocks as long as that takes."""
        self._closed = True
        self._reads.finish()
        self._writes.finish()
        self._reader.close()
        self._writer.close()

    async def _do(self, background: Background, statement: Statement) -> Any:
        if self._closed:
            raise sqlite3.OperationalError("it was closed")
        return await background.do(statement)

    async def _do_journal(self, background: Background, statement: Statement) -> Any:
        try:
            return await self._do(background, statement)
        except (sqlite3.Error, RuntimeError) as error:
            what = "read" if background is self._reads else "written"
            raise self._database.unusable(f"the journal cannot be {what}: {error}") from None

    def _read(self, statements: Sequence[Statement]) -> list[Any]:
        """Return the row of each statement; on the thread of the reads."""
        with self._reader.lent(self._patience) as connection:
            connection.execute("BEGIN")
            rows = [_row(connection, statement) for statement in statements]
            connection.execute("ROLLBACK")  # COMMIT would fail where one of them met damage
            return rows

    def _write(self, statements: Sequence[Statement]) -> list[Exception | None]:
        """Commit all statements together, else one by one those that can be; on the thread of the writes."""
        try:
            self._commit(statements)
        except Exception as error:
            if len(statements) == 1:
                return [error]
            if isinstance(error, sqlite3.OperationalError):  # a lock, a full disk: the same for each
                raise
            return [outcome for each in statements for outcome in self._write([each])]
        return [None] * len(statements)

    def _commit(self, statements: Sequence[Statement]) -> None:
        deadline = time.monotonic() + self._write_patience
        while True:
            left = max(deadline - time.monotonic(), 0.0)
            try:
                with self._writer.lent(min(left, _SLICE)) as connection:
                    connection.execute("BEGIN IMMEDIATE")
                    for statement in statements:
                        connection.execute(*statement)
                    connection.execute("COMMIT")
            except sqlite3.OperationalError as error:
                if _is_locked(error) and left > _SLICE:
                    continue
                if _is_locked(error):
                    self._write_patience = min(self._patience, _LITTLE_PATIENCE)
                raise
            self._write_patience = self._patience
            return

    def _warn(self, message: str, why: object) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warn(message, self._database.name, why, event="cache_failed")


def _put(table: str, key: bytes, value: bytes) -> Statement:
    created = time.time()
    return _PUT.format(table), (key, created, value, _checksum(key, created, value))


def _checksum(key: bytes, created: float, value: bytes) -> bytes:
    return blake2b(b"%s %s " % (key, created.hex().encode()) + value, digest_size=16).digest()


def _is_intact(key: bytes, row: Any) -> bool:
    """Return whether a row is as it was written."""
    created, value, checksum = row
    has_types = isinstance(created, float) and isinstance(value, bytes)
    return has_types and checksum == _checksum(key, created, value)


def _row(connection: sqlite3.Connection, statement: Statement) -> Any:
    """Return a row, or the error where that part of the file is damaged."""
    try:
        return connection.execute(*statement).fetchone()
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        return error

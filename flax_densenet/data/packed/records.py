"""ArrayRecord files open for random access by many threads."""

import collections
import contextlib
import os
import threading
from typing import Any

from flax_densenet import errors
from flax_densenet.system import platforms

# Records one by one, as random access needs them; images are compressed already.
WRITER_OPTIONS = 'group_size:1,uncompressed'
# One record at a time gains nothing from more threads.
_READER_OPTIONS = 'readahead_buffer_size:0,max_parallelism:0'
_BUFFER = 8192
_AHEAD = 2**23  # bytes


def check_installed():
    """Raises if the packages of the extra `packed` are missing."""
    with errors.extra('packed', 'packed data'):
        import msgpack  # noqa: F401
        from array_record.python import array_record_module  # noqa: F401


def records(path: str):
    """Yields the records of a shard in order.

    Raises:
      RuntimeError: it is damaged.
    """
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(path)
    try:
        for _ in range(reader.num_records()):
            yield reader.read()
    finally:
        with contextlib.suppress(RuntimeError):  # was raised before
            reader.close()


class Pool:
    """ArrayRecord files that are opened when needed, for any number of threads.

    The first read also starts a thread that reads all files sequentially, if they fit
    into half of the free memory. For a disk that is far less work than small reads.

    Args:
      paths: of the files.
      counts: number of records in each.
    """

    def __init__(self, paths: list[str], counts: list[int]):
        self._paths, self._counts = paths, counts
        self.__setstate__({})

    def __getstate__(self):
        return {'_paths': self._paths, '_counts': self._counts}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._lock = threading.Lock()
        # Open files by shard, the most recently used last.
        self._open: dict[int, Any] = collections.OrderedDict()
        self._ahead = None
        # The rest is reserved for other files of the program.
        files = platforms.max_open_files()
        self._most = 4096 if files is None else max(16, min(4096, files - 256))

    def read(self, shard: int, position: int) -> bytes:
        """Reads a record; raises RuntimeError or ValueError if it cannot."""
        # Reading a list releases the GIL; `seek` does not.
        return self._reader(shard).read([position])[0]

    def _reader(self, shard):
        with self._lock:
            if self._ahead is None:
                self._ahead = threading.Thread(
                    target=_read_ahead, args=[self._paths], daemon=True
                )
                self._ahead.start()
            reader = self._open.get(shard)
            if reader is not None:
                self._open.move_to_end(shard)
                return reader
        from array_record.python import array_record_module

        reader = array_record_module.ArrayRecordReader(
            self._paths[shard],
            options=_READER_OPTIONS,
            file_reader_buffer_size=_BUFFER,
        )
        if not reader.ok() or reader.num_records() != self._counts[shard]:
            raise ValueError(f'it does not hold {self._counts[shard]} records')
        with self._lock:
            # An evicted file is closed when the last thread has read from it.
            self._open[shard] = reader
            if len(self._open) > self._most:
                self._open.popitem(last=False)
        return reader


def _read_ahead(paths):
    """Makes the system cache the files, if they fit into its memory."""
    with contextlib.suppress(OSError):  # readers of the file will get the same error
        if sum(map(os.path.getsize, paths)) > _free_memory() / 2:
            return
        for path in paths:
            with open(path, 'rb', buffering=0) as file:
                handle = file.fileno()
                for start in range(0, os.fstat(handle).st_size, _AHEAD):
                    os.posix_fadvise(handle, start, _AHEAD, os.POSIX_FADV_WILLNEED)
                    # Waits for the previous piece, so that other reads get their turn.
                    os.pread(handle, 1, max(0, start - 1))


def _free_memory() -> int:
    """Bytes of available memory; 0 if unknown."""
    if hasattr(os, 'posix_fadvise') and os.path.exists('/proc/meminfo'):
        with open('/proc/meminfo') as file:
            for line in file:
                if line.startswith('MemAvailable:'):
                    return int(line.split()[1]) * 1024
    return 0

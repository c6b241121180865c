"""Packs images into ArrayRecord shards (`pack`); `reader` describes the format.

The images are divided into shards by their sizes before anything is written, so the
same images give the same files, whatever the number of threads. A shard is written to a
temporary file, moved into place, and read back before it is recorded as complete. A
pack that was interrupted resumes with the complete shards.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import shutil
import threading

import numpy as np
import safetensors.numpy
from tqdm import tqdm

from flax_densenet.data import label_options, sources
from flax_densenet.data.packed import manifest as manifest_lib
from flax_densenet.data.packed import plan as pack_plan
from flax_densenet.data.packed import reader as packed_reader
from flax_densenet.data.packed import records
from flax_densenet.errors import UserError, printable
from flax_densenet.system import atomic, lock
from flax_densenet.system import paths as paths_lib

_LOGGER = logging.getLogger(__name__)

PROGRESS, SKIPPED = 'progress.jsonl', 'skipped.txt'
KINDS = ('folder', 'tar')
_MIB = 2**20


class _Stopped(Exception):
    """Another shard could not be written."""


def pack(
    source: str,
    out: str,
    *,
    labels: str = '',
    bad_images: str = 'error',
    table: label_options.Options | None = None,
    threads: int = 4,
    options: pack_plan.Options | None = None,
) -> manifest_lib.Manifest:
    """Packs a source into a folder, or resumes an interrupted pack.

    Args:
      Args: source: `folder:PATH` or `tar:PATH`, see `dataset.load_source`.
      out: a new folder, or the folder of a pack of the same images.
      labels, bad_images: see `dataset.load_source`.
      table: how to read the table of labels.
      threads: number of shards that are written at a time.
      options: sizes of shards and images.

    Raises:
      UserError: the source, the folder or an image cannot be used, or the disk is full.
    """
    options = options or pack_plan.Options()
    kind, _, name = source.partition(':')
    if kind not in KINDS:
        raise UserError(
            f'data.source={source}: pack takes folder:PATH or tar:PATH'
            + ('; TFDS keeps its sets in shards already' if kind == 'tfds' else '')
        )
    if labels and kind != 'folder':
        raise UserError(f'data.labels={labels} needs data.source=folder:PATH')
    records.check_installed()
    _check_out(out)
    listing = sources.SOURCES[kind](
        name, bad_images=bad_images, labels=labels, table=table
    )
    stored = pack_plan.Images(listing, paths_lib.expand(name), options)
    with lock.hold(out, flag='--out', doing='packs'):
        return _Packer(source, out, stored).run(threads)


def verify(name: str) -> manifest_lib.Manifest:
    """Compares every file of a pack with its SHA-256.

    Args:
      name: the folder, as in `data.source=packed:NAME`.

    Raises:
      UserError: a file is damaged; names the first one.
    """
    reader = packed_reader.load(name)
    shards = reader.manifest.shards
    paths = [os.path.join(reader.folder, shard.file) for shard in shards]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        sums = pool.map(manifest_lib.sha256, paths)
        for shard, path, actual in zip(shards, paths, sums, strict=True):
            if actual != shard.sha256:
                pool.shutdown(cancel_futures=True)
                raise UserError(
                    f'{path} is damaged (its SHA-256 differs); {manifest_lib.REMEDY}'
                )
    return reader.manifest


def _check_out(out):
    """Raises `UserError` for a folder with other files than those of a pack."""
    try:
        inside = set(os.listdir(out)) if os.path.lexists(out) else set()
    except OSError as error:
        raise UserError(f'--out={out} cannot be used ({error.strerror})') from error
    ours = {manifest_lib.FILE, PROGRESS, lock.FILE}
    if inside and not inside & ours:
        raise UserError(
            f'--out={out} holds other files ({sorted(inside)[0]}); choose a new folder'
        )


class _Packer:
    """Writes one pack: plans its shards, finds complete ones, writes the others."""

    def __init__(self, source: str, out: str, stored: pack_plan.Images):
        self.source, self.out, self.images = source, out, stored
        self.listing = stored.listing
        self._stop, self._noting = threading.Event(), threading.Lock()
        # Hashes and names of the records by shard, for the index.
        self._read: dict[str, tuple[np.ndarray, list[bytes]]] = {}

    def run(self, threads) -> manifest_lib.Manifest:
        for name in os.listdir(self.out):
            # From an interrupted pack.
            if name.startswith('.') and name.endswith('.part'):
                os.unlink(os.path.join(self.out, name))
        jobs, size = pack_plan.plan(self.images)
        self._check_space(size)
        complete = self._find_complete(jobs, threads)
        left = [job for job in jobs if job.file not in complete]
        if complete:
            _LOGGER.info(
                f'{self.out}: {len(complete)} of {len(jobs)} shards are complete'
            )
        try:
            complete |= self._write_all(
                left, threads, sum(len(j.indices) for j in jobs)
            )
            return self._finish(jobs, [complete[job.file] for job in jobs])
        except OSError as error:
            raise _explain(error, self.out) from error

    def _check_space(self, need):
        there = sum(
            entry.stat().st_size
            for entry in os.scandir(self.out)
            if entry.name.endswith(pack_plan.SUFFIX)
        )
        free = shutil.disk_usage(self.out).free + there
        if need > free:
            raise UserError(
                f'--out={self.out}: the images take about {need / _MIB:,.0f} MiB, '
                f'{free / _MIB:,.0f} are free; choose another disk or a smaller '
                '--max_side'
            )

    def _find_complete(self, jobs, threads) -> dict[str, manifest_lib.Shard]:
        """The complete shards of an earlier pack of the same images, by file."""
        noted = _read_progress(os.path.join(self.out, PROGRESS))
        done = os.path.exists(os.path.join(self.out, manifest_lib.FILE))
        if done:
            shards = manifest_lib.load(self.out).shards
            if [s.fingerprint for s in shards] != [job.fingerprint for job in jobs]:
                raise UserError(
                    f'--out={self.out} holds a pack of other images or settings; '
                    'choose a new folder, or remove it'
                )
            noted |= {shard.file: shard for shard in shards}

        def is_valid(job):
            shard = noted.get(job.file)
            path = os.path.join(self.out, job.file)
            if shard is None or shard.fingerprint != job.fingerprint:
                return False
            if not os.path.exists(path) or manifest_lib.sha256(path) != shard.sha256:
                return False
            self._read_back(job)
            return True

        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            kept = zip(jobs, pool.map(is_valid, jobs), strict=True)
            return {
                job.file: noted[job.file] for job, is_complete in kept if is_complete
            }

    def _write_all(self, jobs, threads, total) -> dict[str, manifest_lib.Shard]:
        """Writes shards, and records each one that is complete."""
        written = {}
        done = total - sum(len(job.indices) for job in jobs)
        with (
            tqdm(
                total=total,
                initial=done,
                desc='packing',
                unit=' images',
                disable=None,
            ) as progress,
            open(os.path.join(self.out, PROGRESS), 'a', encoding='utf-8') as notes,
            concurrent.futures.ThreadPoolExecutor(threads) as pool,
        ):
            futures = [pool.submit(self._write, job, progress, notes) for job in jobs]
            notes.write('\n')  # ends a line that was cut short
            try:
                for future in concurrent.futures.as_completed(futures):
                    shard = future.result()
                    written[shard.file] = shard
            finally:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
        return written

    def _write(self, job, progress, notes) -> manifest_lib.Shard:
        """Writes a shard, reads it back and records it."""
        from array_record.python import array_record_module

        path = os.path.join(self.out, job.file)
        part = os.path.join(self.out, f'.{job.file}.part')
        try:
            writer = array_record_module.ArrayRecordWriter(part, records.WRITER_OPTIONS)
            with contextlib.closing(writer):
                for index in job.indices:
                    if self._stop.is_set():
                        raise _Stopped
                    writer.write(self.images.record(index))
                    progress.update()
            with open(part, 'rb') as file:
                os.fsync(file.fileno())
            os.replace(part, path)
            atomic.sync_folder(self.out)
        except RuntimeError as error:  # any error of the writer
            full = os.strerror(errno.ENOSPC) in str(error)
            reason = ' '.join(str(error).split())[:200]
            code = errno.ENOSPC if full else errno.EIO
            raise OSError(code, reason, part) from error
        finally:
            with contextlib.suppress(OSError):  # moved, or never written
                os.unlink(part)
        self._read_back(job)
        shard = manifest_lib.Shard(
            file=job.file,
            part=job.part,
            count=len(job.indices),
            bytes=os.path.getsize(path),
            sha256=manifest_lib.sha256(path),
            fingerprint=job.fingerprint,
        )
        with self._noting:
            notes.write(json.dumps(dataclasses.asdict(shard)) + '\n')
            notes.flush()
            os.fsync(notes.fileno())
        return shard

    def _read_back(self, job):
        """Checks that a shard has the records of its images; keeps hashes and names."""
        path, names, hashes = os.path.join(self.out, job.file), [], []
        try:
            for index, record in zip(job.indices, records.records(path), strict=True):
                fields = packed_reader.from_record(record)
                names.append(fields['name'])
                hashes.append(fields['source'])
                if fields['name'] != self.images.name(index):
                    raise ValueError(f'{os.fsdecode(fields["name"])} in another place')
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f'{path} was written and cannot be read back ({error}); the disk may '
                'be damaged: use another --out'
            ) from error
        hashes = np.frombuffer(b''.join(hashes), np.uint8).reshape(len(names), -1)
        self._read[job.file] = hashes, names

    def _finish(self, jobs, shards) -> manifest_lib.Manifest:
        """Writes the index and then the manifest, which completes the pack."""
        order = np.concatenate([job.indices for job in jobs])
        names = [name for job in jobs for name in self._read[job.file][1]]
        tensors = {
            'labels': self.images.reader.labels[order],
            'sources': np.concatenate([self._read[job.file][0] for job in jobs]),
            'names': np.frombuffer(b''.join(names), np.uint8),
            'name_ends': np.cumsum([0, *map(len, names)], dtype=np.int64),
        }
        if self.listing.groups is not None:
            tensors['groups'] = self.listing.groups[order].astype(np.int64)
        for name, values in self.images.reader.subgroups.items():
            tensors |= packed_reader.subgroup_tensors(name, values[order])
        index = safetensors.numpy.save(tensors)
        self._save(packed_reader.INDEX, index)
        if self.listing.skipped:
            lines = ''.join(f'{printable(line)}\n' for line in self.listing.skipped)
            self._save(SKIPPED, lines.encode())
        manifest = manifest_lib.Manifest(
            source=printable(self.source),
            class_names=tuple(self.listing.class_names),
            multi_label=self.listing.multi_label,
            has_test=self.listing.test is not None,
            shorter_side=self.images.options.max_side,
            index_bytes=len(index),
            index_sha256=hashlib.sha256(index).hexdigest(),
            shards=tuple(shards),
        )
        self._save(manifest_lib.FILE, manifest.to_json().encode())
        expected = {shard.file for shard in shards}
        for name in os.listdir(self.out):  # including shards of an earlier plan
            if name == PROGRESS or (
                name.endswith(pack_plan.SUFFIX) and name not in expected
            ):
                os.unlink(os.path.join(self.out, name))
        return manifest

    def _save(self, name, content):
        with atomic.replacing(os.path.join(self.out, name), 'wb') as file:
            file.write(content)


def _read_progress(path) -> dict[str, manifest_lib.Shard]:
    """The shards that were recorded as complete; ignores truncated lines."""
    noted = {}
    with contextlib.suppress(FileNotFoundError), open(path, 'rb') as file:
        for line in file:
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
                shard = manifest_lib.to_shard(json.loads(line))
                noted[shard.file] = shard
    return noted


def _explain(error, out):
    """One line about a full or failing disk."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f'--out={out}: the disk is full; free some space, and run the same '
            'command to resume'
        )
    return UserError(
        f'--out={out} cannot be written ({error.strerror}); fix that, and run the '
        'same command to resume'
    )

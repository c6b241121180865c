"""Predictions to the screen and to files, each row as soon as it is known.

Nothing is kept but the row at hand: what has to be known as a whole (an array's length)
waits in a temporary file beside the output. An output gets its name when it is
complete; until then it is called NAME.part.
"""

import contextlib
import itertools
import os
import re
import sys
import tempfile
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from flax_densenet.errors import UserError
from flax_densenet.inference import feature_files, predictor, row_formats
from flax_densenet.inference.prediction import Prediction


@contextlib.contextmanager
def _failing_as(what):
    """A full disk and the like as one line; a closed pipe stays what it is."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f'{what} cannot be written ({reason})') from error


class _Rows:
    """`--format` to `--out`, or to standard output.

    Text is UTF-8 with a path's own bytes, whatever the locale is.
    """

    def __init__(self, path, form):
        self.form, self.part = form, None
        # Rows, and the bytes that they take: at once, as a signal may come at any time.
        self.done = 0, 0
        self.what = 'standard output' if path is None else f'--out={path}'
        with _failing_as(self.what):
            self.file = self._open(path)

    def _open(self, path):
        text = dict(encoding='utf-8', errors='surrogateescape', newline='')
        if path is None:
            if sys.stdout is None:
                raise UserError('standard output is closed; name a file with --out')
            sys.stdout.flush()
            return open(sys.stdout.fileno(), 'w', closefd=False, **text)
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe or a device
            return open(path, 'w', **text)
        self.part = f'{os.path.realpath(path)}.part'
        return open(self.part, 'w', **text)

    def start(self, model, top):
        with _failing_as(self.what):
            make = row_formats.FORMATS[self.form]
            self.write_row = make(self.file, model.class_names, top)

    def write(self, found):
        with _failing_as(self.what):
            self.write_row(found)
            self.file.flush()  # whoever reads along, or after a stop, has whole rows
            self.done = self.done[0] + 1, self.file.buffer.tell() if self.part else 0

    def finish(self):
        with _failing_as(self.what):
            self.file.close()
            if self.part:
                os.replace(self.part, self.part.removesuffix('.part'))
        self.part = None

    def give_up(self):
        """What is done of hours of work stays, by another name."""
        count, size = self.done
        with contextlib.suppress(OSError):
            self.file.close()
        if self.part and count:
            with contextlib.suppress(OSError):
                os.truncate(self.part, size)
            print(f'{self.part} has the {count} rows so far', file=sys.stderr)
        elif self.part:
            os.unlink(self.part)


class _Pictures:
    """`--explain`: a JPEG for each image, named by its row and its file."""

    def __init__(self, folder):
        self.folder, self.what, self.row = folder, f'--explain={folder}', 0
        self.made = not os.path.exists(folder)
        with _failing_as(self.what):
            os.makedirs(folder, exist_ok=True)
            if os.listdir(folder):
                raise UserError(
                    f'{self.what} holds files already; name a new or an empty folder'
                )
            # Found out here, not after the first batch.
            tempfile.TemporaryFile(dir=folder).close()

    def start(self, model, top):
        pass

    def write(self, found):
        self.row += 1
        if found.error:
            return
        # Of the file only letters and digits (of any language) and no more than fit
        # into 255 bytes: nothing that could lead out of the folder.
        stem = os.fsencode(os.path.splitext(os.path.basename(found.path))[0])
        stem = re.sub(r'[^\w-]+', '_', stem.decode('utf-8', 'replace'))[:48]
        with _failing_as(self.what):
            name = f'{self.row:06}_{stem}.jpg'
            found.explanation.save(os.path.join(self.folder, name))

    def finish(self):
        pass

    def give_up(self):
        if self.made:
            with contextlib.suppress(OSError):  # it holds pictures
                os.rmdir(self.folder)


class _Features:
    """`--features`: of the images that could be read."""

    def __init__(self, path):
        self.what = f'--features={path}'
        with _failing_as(self.what):
            self.writer = feature_files.Writer(path)

    def start(self, model, top):
        self.size = model.feature_size

    def write(self, found):
        if found.error is None:
            with _failing_as(self.what):
                self.writer.write(found.path, found.features)

    def finish(self):
        with _failing_as(self.what):
            self.writer.finish(self.size)

    def give_up(self):
        self.writer.close()


class Outputs:
    """Where predictions go; a context that completes the files or leaves them.

    Attributes:
      explain, features: whether maps and features are wanted.
      on_screen: whether a person sees the rows as they come.
    """

    def __init__(
        self,
        *,
        out: str | None = None,
        form: str | None = None,
        top: int = 5,
        explain: str | None = None,
        features: str | None = None,
    ):
        """Checks all and opens all, so that nothing of it fails after long work.

        Args:
          out: file of the rows; None: standard output.
          form: a key of `row_formats.FORMATS`; None: by the ending of `out`, else
          `table`.
          top: classes of a row, the most likely first.
          explain: a new or empty folder for a picture of each image.
          features: a file of all features (see `feature_files`).

        Raises:
          UserError: a value that cannot be used, or a place that cannot be written.
        """
        form = form or {'.csv': 'csv', '.jsonl': 'jsonl'}.get(
            os.path.splitext(out or '')[1], 'table'
        )
        if form not in row_formats.FORMATS:
            raise UserError(
                f'--format={form} is not one of --mode=predict; use '
                f'{", ".join(row_formats.FORMATS)}'
            )
        if top < 1:
            raise UserError(f'--top={top} must be at least 1')
        if features and out and os.path.realpath(features) == os.path.realpath(out):
            raise UserError(f'--out and --features are both {out}; name two files')
        self.top, self.explain, self.features = top, bool(explain), bool(features)
        self._unfinished = contextlib.ExitStack()
        self._writers: list[Any] = []
        with self._unfinished as stack:
            for make, place in ((_Features, features), (_Pictures, explain)):
                if place:
                    self._add(make(place))
            self._add(_Rows(out, form))
            self.on_screen = out is None and sys.stdout.isatty()
            self._unfinished = stack.pop_all()

    def _add(self, writer):
        self._writers.append(writer)
        self._unfinished.callback(writer.give_up)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        with self._unfinished:
            if kind is None:
                for writer in self._writers:
                    writer.finish()
                self._unfinished.pop_all()

    def start(self, model):
        """Writes what stands before the rows."""
        for writer in self._writers:
            writer.start(model, min(self.top, len(model.class_names)))

    def write(self, found: Prediction):
        """One image's row, picture and features."""
        for writer in self._writers:
            writer.write(found)


def run(
    model: predictor.Predictor,
    paths: Iterable[str],
    outputs: Outputs,
    *,
    threads: int = 4,
    class_name: str | None = None,
    total: int | None = None,
) -> int:
    """Predicts for files and writes all that is wanted of them.

    Args:
      paths: of image files, taken as they are needed.
      threads: that read and decode.
      class_name: what pictures explain; by default each image's most likely class.
      total: how many paths there are, where it is known; for the progress bar.

    Returns:
      How many files could not be read; a last line on standard error says it too.
    """
    cam_class = -1 if class_name is None else model.class_index(class_name)
    paths = iter(paths)
    first = list(itertools.islice(paths, 1))  # an error here comes before any row
    outputs.start(model)
    stream = model.stream(
        itertools.chain(first, paths),
        threads=threads,
        features=outputs.features,
        cams=outputs.explain,
        cam_class=cam_class,
    )
    count = failed = 0
    # No bar where stderr is a file (None), nor where the rows themselves are seen.
    quiet = outputs.on_screen or None
    with (
        contextlib.closing(stream),
        tqdm(total=total, unit=' images', disable=quiet, leave=False) as bar,
    ):
        for found in stream:
            outputs.write(found)
            count += 1
            failed += found.error is not None
            bar.update()
    if failed:
        left_out = ', and features are of the others' if outputs.features else ''
        print(f'{failed} of {count} files could not be read{left_out}', file=sys.stderr)
    return failed

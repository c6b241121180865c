"""Writes predictions to the screen and to files, row by row.

Only the current row is in memory. Arrays are collected in a temporary file next to the
output, since their length must be written first. An output is called NAME.part until it
is complete.
"""

import collections
import contextlib
import itertools
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from flax_densenet.errors import UserError, printable
from flax_densenet.inference import explain as explain_lib
from flax_densenet.inference import feature_files, predictor, row_formats
from flax_densenet.inference.prediction import Prediction
from flax_densenet.system import result_folders
from flax_densenet.weights import conformal

_LOGGER = logging.getLogger(__name__)


@contextlib.contextmanager
def _failing_as(what):
    """Turns errors such as a full disk into a `UserError`, except a closed pipe."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f'{what} cannot be written ({reason})') from error


class _Rows:
    """Writes rows in `--format` to `--out` or standard output.

    Text is UTF-8 and keeps the bytes of paths, whatever the locale.
    """

    def __init__(self, path, form, coverage):
        self.form, self.coverage, self.part = form, coverage, None
        # The number of rows and bytes, set together, since a signal can come any time.
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
            self.write_row = make(
                self.file,
                model.class_names,
                top,
                model.value_name,
                row_formats.Columns(
                    getattr(model, 'thresholds', None) is not None,
                    model.scores_unusual,
                    self.coverage,
                ),
            )

    def write(self, prediction):
        with _failing_as(self.what):
            self.write_row(prediction)
            self.file.flush()  # so that readers always see complete rows
            self.done = self.done[0] + 1, self.file.buffer.tell() if self.part else 0

    def finish(self):
        with _failing_as(self.what):
            self.file.close()
            if self.part:
                os.replace(self.part, self.part.removesuffix('.part'))
        self.part = None

    def give_up(self):
        """Keeps the finished rows under another name."""
        count, size = self.done
        with contextlib.suppress(OSError):
            self.file.close()
        if self.part and count:
            with contextlib.suppress(OSError):
                os.truncate(self.part, size)
            _LOGGER.warning('%s has the %d rows so far', self.part, count)
        elif self.part:
            os.unlink(self.part)


class _Pictures:
    """Writes a JPEG per image for `--explain`, named by its row and its file."""

    def __init__(self, folder):
        self.folder, self.what, self.row = folder, f'--explain={folder}', 0
        self.made = not os.path.exists(folder)
        with _failing_as(self.what):
            os.makedirs(folder, exist_ok=True)
            if set(os.listdir(folder)) - {result_folders.MARK}:
                raise UserError(
                    f'{self.what} already has files; name a new or an empty folder'
                )
            # If this fails, it fails here rather than after the first batch.
            tempfile.TemporaryFile(dir=folder).close()
            result_folders.mark(folder)  # so that it never becomes a class in training

    def start(self, model, top):
        pass

    def write(self, prediction):
        self.row += 1
        if prediction.error:
            return
        # Only letters and digits (of any language), so that the name cannot leave the
        # folder, and no more than fit into 255 bytes.
        stem = os.fsencode(os.path.splitext(os.path.basename(prediction.path))[0])
        stem = re.sub(r'[^\w-]+', '_', stem.decode('utf-8', 'replace'))[:48]
        with _failing_as(self.what):
            name = f'{self.row:06}_{stem}.jpg'
            prediction.explanation.save(os.path.join(self.folder, name))

    def finish(self):
        pass

    def give_up(self):
        with contextlib.suppress(OSError):
            if set(os.listdir(self.folder)) <= {result_folders.MARK}:
                result_folders.clear_mark(self.folder)
                if self.made:
                    os.rmdir(self.folder)


class _Features:
    """Writes the features of all readable images for `--features`."""

    def __init__(self, path):
        self.what = f'--features={path}'
        with _failing_as(self.what):
            self.writer = feature_files.Writer(path)

    def start(self, model, top):
        self.size = model.feature_size

    def write(self, prediction):
        if prediction.error is None:
            with _failing_as(self.what):
                self.writer.write(prediction.path, prediction.features)

    def finish(self):
        with _failing_as(self.what):
            self.writer.finish(self.size)

    def give_up(self):
        self.writer.close()


_BY_ENDING = {'.csv': 'csv', '.jsonl': 'jsonl', '.txt': 'table', '': 'table'}


def _choose_format(out, form):
    """The format of the rows: as given, or by the ending of the file."""
    if form and form not in row_formats.FORMATS:
        raise UserError(
            f'--format={form} is not one of predict; use '
            f'{", ".join(row_formats.FORMATS)}'
        )
    if out is None or (os.path.exists(out) and not os.path.isfile(out)):  # a pipe
        return form or 'table'
    ending = os.path.splitext(out)[1].lower()
    own = _BY_ENDING.get(ending)
    if own is None and form is None:
        raise UserError(
            f'--out={out}: no format has the ending {ending}; use .csv, .jsonl or .txt '
            f'(a table), or name one with --format={", ".join(row_formats.FORMATS)}'
        )
    if ending in ('.csv', '.jsonl') and form not in (None, own):
        raise UserError(
            f'--format={form}: --out={out} ends with {ending}; use another ending or '
            f'--format={own}'
        )
    return form or own


class Outputs:
    """The outputs of a prediction: a context that completes or discards the files.

    Attributes:
      explain: whether maps are needed.
      features: whether features are needed.
      on_screen: whether rows are printed to a terminal.
    """

    def __init__(
        self,
        *,
        out: str | None = None,
        form: str | None = None,
        top: int = 5,
        explain: str | None = None,
        features: str | None = None,
        coverage: float | None = None,
    ):
        """Checks and opens everything, so that errors come before the slow part.

        Args:
          out: file for the rows; None for standard output.
          form: a key of `row_formats.FORMATS`; None to use the extension of `out`:
            `.csv`, `.jsonl`, or `.txt` or none for `table`.
          top: number of classes in a row, the most likely first.
          explain: a new or empty folder for a picture of each image.
          features: a file for all features (see `feature_files`).
          coverage: coverage of the sets of classes in the rows; None for no sets.

        Raises:
          UserError: an argument is invalid, or an output cannot be written.
        """
        if features and out and os.path.realpath(features) == os.path.realpath(out):
            raise UserError(f'--out and --features are both {out}; name two files')
        form = _choose_format(out, form)
        if top < 1:
            raise UserError(f'--top={top} must be at least 1')
        if coverage is not None:
            conformal.check_coverage(coverage)
        self.coverage = coverage
        self.top, self.explain, self.features = top, bool(explain), bool(features)
        self._unfinished = contextlib.ExitStack()
        self._writers: list[Any] = []
        with self._unfinished as stack:
            for make, place in ((_Features, features), (_Pictures, explain)):
                if place:
                    self._add(make(place))
            self._add(_Rows(out, form, coverage))
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
        """Writes what precedes the rows.

        Raises:
          UserError: a coverage was chosen, but the model has no sets of classes.
        """
        if self.coverage is not None:
            model.check_coverage(self.coverage)
        for writer in self._writers:
            writer.start(model, min(self.top, len(model.class_names)))

    def write(self, prediction: Prediction):
        """Writes the row, the picture and the features of an image."""
        for writer in self._writers:
            writer.write(prediction)


def run(
    model: predictor.Predictor,
    paths: Iterable[str],
    outputs: Outputs,
    *,
    threads: int = 4,
    class_name: str | None = None,
    how: explain_lib.Options = explain_lib.DEFAULT,
    total: int | None = None,
) -> int:
    """Predicts files and writes all outputs.

    Args:
      model: the model.
      paths: paths of image files, consumed as they are needed.
      outputs: where to write.
      threads: number of threads that read and decode.
      class_name: the class that pictures explain; by default the most likely class of
        each image.
      how: the method that explains it.
      total: number of paths if known, for the progress bar.

    Returns:
      The number of unreadable files, which is also printed to standard error.
    """
    cam_class = -1 if class_name is None else model.class_index(class_name)
    paths = iter(paths)
    first = list(itertools.islice(paths, 1))  # an error here precedes all rows
    outputs.start(model)
    stream = model.stream(
        itertools.chain(first, paths),
        threads=threads,
        features=outputs.features,
        cams=outputs.explain,
        cam_class=cam_class,
        how=how,
    )
    count = failed = unusual = 0
    classes: collections.Counter[str] = collections.Counter()
    # No bar if stderr is a file (None), or if the rows are on the screen.
    quiet = outputs.on_screen or None
    with (
        contextlib.closing(stream),
        tqdm(total=total, unit=' images', disable=quiet, leave=False) as bar,
    ):
        for prediction in stream:
            outputs.write(prediction)
            count += 1
            failed += prediction.error is not None
            unusual += prediction.is_unusual or False
            classes.update(_predicted(prediction, model))
            bar.update()
    _LOGGER.info(_summarize(count - failed, classes))
    if unusual:
        _LOGGER.warning(
            f'{unusual} of {count - failed} images '
            f'{"does" if unusual == 1 else "do"} not look like the training images '
            '(unusual above 1); do not rely on their classes'
        )
    if failed:
        left_out = '; features are of the others only' if outputs.features else ''
        _LOGGER.warning('%d of %d files could not be read%s', failed, count, left_out)
    return failed


_COUNTED = 10  # classes that the summary names


def _predicted(prediction, model):
    """The most likely class, or all classes above their thresholds."""
    if prediction.error:
        return []
    if not getattr(model, 'multi_label', False):
        return [prediction.top(1)[0].class_name]
    return prediction.positive or []


def _summarize(count, classes):
    """`3 images: 2 bees, 1 ants`."""
    line = f'{count} image{"" if count == 1 else "s"}'
    named = [f'{n} {printable(name)}' for name, n in classes.most_common(_COUNTED)]
    if len(classes) > _COUNTED:
        named.append(f'{len(classes) - _COUNTED} more classes')
    return f'{line}: {", ".join(named)}' if named else line

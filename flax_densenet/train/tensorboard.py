"""TensorBoard: a run's metrics, pictures and settings in an event file of its folder.

`tensorboard --logdir ckpt` shows the runs of a folder by name. Events are numbered by
training steps, so those of a resumed run continue from its checkpoint, and events that
an earlier start wrote after that step are hidden.
"""

import contextlib
import json
import os
import time
from typing import Any

import numpy as np
from PIL import Image

from flax_densenet.checkpoints import epoch_records

# Tag -> field of an epoch's record. Charts in one row share a prefix.
SCALARS = {
    'accuracy/train': 'train_accuracy',
    'accuracy/val': 'val_accuracy',
    'accuracy/test': 'test_accuracy',
    'loss/train': 'train_loss',
    'loss/val': 'val_loss',
    'loss/test': 'test_loss',
    'learning_rate': 'learning_rate',
    'speed/images_per_second': 'images_per_second',
    'speed/input_wait_share': 'input_wait_share',
    'speed/peak_memory_gib': 'peak_memory_gib',
    'speed/memory_gib': 'memory_gib',
}
# Charts of TensorBoard's tab "Custom scalars", with several lines each.
_TOGETHER = {
    'Training, validation and test': {
        'Accuracy': ['Multiline', ['accuracy/train', 'accuracy/val', 'accuracy/test']],
        'Loss': ['Multiline', ['loss/train', 'loss/val', 'loss/test']],
    }
}
_BEST = ('accuracy', 'loss', 'mean_auroc')
# Points of `loss/step`: enough to see a curve. TensorBoard keeps a thousand per series.
_LOSSES_AN_EPOCH = 20


@contextlib.contextmanager
def open_writer(workdir: str, *, enabled: bool, start: int, steps_per_epoch: float):
    """A context with a `TensorBoardWriter` that writes into `workdir`, or nothing.

    Args:
      enabled: False for a writer that does nothing.
      start: steps taken before this start; events after them are written again.
      steps_per_epoch: decides how many of the losses are kept.
    """
    if not enabled:
        yield TensorBoardWriter(None)
        return
    from tensorboardX.event_file_writer import EventsWriter

    # Its SummaryWriter has a queue that is written later, so a killed run would lose
    # the events of its last checkpoint's epoch. File names contain the second and are
    # read in order; the step in the name sorts a quick restart after the first file.
    events = EventsWriter(os.path.join(workdir, 'events'), f'.{start:09}')
    try:
        yield TensorBoardWriter(
            events,
            first=start + 1,
            every=max(1, round(steps_per_epoch / _LOSSES_AN_EPOCH)),
        )
    finally:
        events.close()


class TensorBoardWriter:
    """Writes the events of a run.

    Args:
      events: a tensorboardX EventsWriter, or None to write nothing.
      first: the first step of this start; earlier events of this and later steps are
        hidden.
      every: number of steps between two losses that are written.
    """

    def __init__(self, events, *, first: int = 1, every: int = 1):
        self._events = events
        self._first = first
        self._every = every
        if events is not None:
            from tensorboardX.proto.event_pb2 import SessionLog

            # The first such event that TensorBoard reads hides nothing, so the first
            # start needs one as well.
            self._write(first, session_log=SessionLog(status=SessionLog.START))

    def add_config(self, config):
        """Shows all settings as text, and as hyperparameters for comparing runs."""
        if self._events is None:
            return
        from tensorboardX import summary

        lines = json.dumps(config, indent=2).splitlines()
        text = '\n'.join(f'    {line}' for line in lines)  # Markdown shows it unchanged
        self._write(self._first, summary=summary.text('config', text))
        # With tensorboardX's list of the experiment, TensorBoard would not find by
        # itself which fields differ.
        _, start, _ = summary.hparams(flatten(config), {})
        self._write(self._first, summary=start)
        self._write(self._first, summary=summary.custom_scalars(_TOGETHER))

    def add_picture(self, tag: str, path: str):
        """Shows an image file."""
        if self._events is None:
            return
        from tensorboardX import summary

        with Image.open(path) as image:
            pixels = np.asarray(image.convert('RGB'))
        shown = summary.image(tag, pixels, dataformats='HWC')
        self._write(self._first, summary=shown)

    def add_results(self, workdir: str):
        """Shows the confusion matrix of the best epoch, if it was drawn."""
        path = os.path.join(workdir, 'confusion.png')
        if os.path.exists(path):
            self.add_picture('confusion_matrix', path)

    def add_images(self, tag: str, images):
        """Shows images uint8 `[N, H, W, 3]`, each at its full size."""
        if self._events is None:
            return
        from tensorboardX import summary

        for number, image in enumerate(images):
            shown = summary.image(f'{tag}/{number}', image, dataformats='HWC')
            self._write(self._first, summary=shown)

    def add_loss(self, step: int, loss: float):
        """Records the loss of a step, counted from 1; one of every few is written."""
        if step % self._every == 0:
            self._add('loss/step', loss, step)

    def add_epoch(self, record, best):
        """Shows the record of an epoch, and the best record so far.

        Args:
          record: as in `metrics.jsonl`.
          best: the record of the best epoch.
        """
        step = record['step']
        for tag, value in scalars_of(record).items():
            self._add(tag, value, step)
        part = epoch_records.part_of(best)
        for name in _BEST:
            self._add(f'best/{part}_{name}', epoch_records.get(best, name), step)

    def add_end(self):
        """Marks the run as finished."""
        if self._events is None:
            return
        from tensorboardX import summary

        _, _, end = summary.hparams({}, {})
        self._write(self._first, summary=end)

    def _add(self, tag, value, step):
        if self._events is None or value is None:
            return
        from tensorboardX import summary

        self._write(step, summary=summary.scalar(tag, value))

    def _write(self, step, **what):
        from tensorboardX.proto.event_pb2 import Event

        self._events.write_event(Event(step=step, wall_time=time.time(), **what))
        self._events.flush()


def scalars_of(record: dict[str, Any]) -> dict[str, float]:
    """The values shown for an epoch, by tag.

    Args:
      record: as in `metrics.jsonl`.
    """
    found = {tag: record.get(name) for tag, name in SCALARS.items()}
    found['auroc/mean'] = epoch_records.get(record, 'mean_auroc')
    areas = epoch_records.get(record, 'auroc', {})
    found |= {f'auroc/{name}': area for name, area in areas.items()}
    return {tag: value for tag, value in found.items() if value is not None}


def flatten(config: dict[str, Any]) -> dict[str, Any]:
    """`{'section.field': value}` for values that hyperparameters can have."""
    flat = {}
    for section, fields in config.items():
        fields = fields if isinstance(fields, dict) else {'': fields}
        for name, value in fields.items():
            known = value is None or isinstance(value, str | bool | int | float)
            name = f'{section}.{name}' if name else section
            flat[name] = value if known else str(value)
    return flat

"""Ctrl-C and SIGTERM: training finishes its step, saves, and exits.

A signal sets a flag that training checks between steps. When nothing would be lost
(before the first step, while the report is written), it ends the program by an
exception instead. A second signal ends it at once: a thread waits for it, since Python
itself would not handle it before the end of a long compilation.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading

_LOGGER = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# What an exception may take to end what is in the way of it.
_PATIENCE_SECONDS = 2.0


class Stopped(KeyboardInterrupt):
    """Training was ended by a signal; the text tells how to resume.

    Attributes:
      exit_status: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, signum: int, how: str):
        name = signal.Signals(signum).name
        super().__init__(f'stopped by {name}: {how}')
        self.exit_status = 128 + signum


class Stop:
    """Whether to stop; only `stop_gently` ever sets it.

    Attributes:
      signum: the signal that this process got, else 0.
      agreed: the signal for which all processes stop at the same step, else 0.
    """

    def __init__(self):
        self.signum = 0
        self.agreed = 0
        self._busy = self._was_busy = False
        self._over = threading.Event()

    @property
    def asked(self) -> bool:
        """True once a signal came."""
        return bool(self.signum)

    @contextlib.contextmanager
    def busy(self):
        """Inside, signals only set the flag, since state must be saved first."""
        self._busy = self._was_busy = True
        try:
            yield
        finally:
            self._busy = False
        if self.asked:
            raise self.stopped(self._saved())

    def stopped(self, what: str) -> Stopped:
        """The exception to raise.

        Args:
          what: what is saved.
        """
        how = f'{what}; run the same command to resume'
        return Stopped(self.agreed or self.signum, how)

    def _handle(self, signum, frame):
        self.signum = self.signum or signum
        if not self._busy:
            raise self.stopped(self._saved())

    def _saved(self):
        """The text about what is saved, for `stopped`."""
        if self._was_busy:
            return 'training so far is saved'
        return 'nothing was trained in this start'

    def _watch(self, reader):
        """Reads a byte for each signal, in a separate thread; 0 ends it."""
        heard = False
        while signum := int.from_bytes(os.read(reader, 1)):
            if signum not in _SIGNALS:
                continue
            if heard:
                self._leave()
            heard, self.signum = True, signum
            doing = 'finishing this step and saving; ' if self._busy else ''
            _LOGGER.error(
                '\n%s: %sa second signal exits at once',
                signal.Signals(signum).name,
                doing,
            )
            if not self._busy and not self._over.wait(_PATIENCE_SECONDS):
                if self._busy:  # the first step had begun; it will save
                    continue
                _LOGGER.error('%s', self.stopped(self._saved()))
                self._leave()

    def _leave(self):
        for child in multiprocessing.active_children():
            child.kill()
        sys.stdout.flush()
        os._exit(128 + self.signum)


@contextlib.contextmanager
def stop_gently():
    """A context with a `Stop` that Ctrl-C and SIGTERM set; restores their handlers.

    To be used in the main thread.
    """
    stop = Stop()
    reader, writer = os.pipe()
    if hasattr(os, 'set_blocking'):  # on Windows from Python 3.12 on
        os.set_blocking(writer, False)
    before = {signum: signal.signal(signum, stop._handle) for signum in _SIGNALS}
    wakeup = signal.set_wakeup_fd(writer)
    watcher = threading.Thread(target=stop._watch, args=[reader], daemon=True)
    watcher.start()
    # A terminal's Ctrl-C reaches the decoding processes too. They inherit this mask and
    # go on, since the step that is to be finished may need them. The watcher, which
    # started before, takes the signal.
    has_masks = hasattr(signal, 'pthread_sigmask')  # Windows does not
    if has_masks:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield stop
    finally:
        stop._busy = True  # nothing is raised any more
        stop._over.set()
        if has_masks:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.set_wakeup_fd(wakeup)
        for signum, handler in before.items():
            signal.signal(signum, handler)
        os.write(writer, b'\0')
        watcher.join()
        os.close(reader)
        os.close(writer)

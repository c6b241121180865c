"""Starts many trainings quickly: imports everything once, then forks for each.

Reads a line of JSON at a time: `{"args": [...], "log": PATH}` starts `launch.py` with
these arguments and answers with its process number, `{"wait": NUMBER}` answers with how
it ended.
"""

import base64
import importlib
import json
import os
import sys

# A PNG of one pixel.
PIXEL = base64.b64decode(
    'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAA'
    'AABJRU5ErkJggg=='
)


def _save_samples(workdir, *_, **__):
    with open(os.path.join(workdir, 'samples.png'), 'wb') as file:
        file.write(PIXEL)


def main():
    import launch

    # What a training imports as it goes; no thread and no device starts by it.
    for name in ('sklearn.datasets', 'orbax.checkpoint', 'flax_densenet.train.fit'):
        importlib.import_module(name)
    # Drawing takes a second of a training's few, and the tests are not about it.
    if os.environ.get('FAULTS') != 'full':
        report = importlib.import_module('flax_densenet.report.plots')
        report.save_curves = lambda workdir, records: None
        report.save_samples = _save_samples

    for line in sys.stdin:
        ask = json.loads(line)
        if 'wait' in ask:
            _, status = os.waitpid(ask['wait'], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        number = os.fork()
        if not number:
            log = os.open(ask['log'], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for handle in (1, 2):
                os.dup2(log, handle)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.exit(launch.main(['launch.py', *ask['args']]))
        print(number, flush=True)


if __name__ == '__main__':
    main()

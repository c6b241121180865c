"""Experiment trackers: Weights & Biases, MLflow and Trackio.

Each gets the settings, the metrics of every epoch and, at the end, the report and the
best checkpoint. Without a login they write only to this machine. A tracker that fails
is left out with a warning and does not affect the run. `trackers.json` in the run's
folder has the names under which a resumed run continues.
"""

import contextlib
import dataclasses
import io
import json
import logging
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from flax_densenet import errors
from flax_densenet.checkpoints import reader as checkpoint_reader
from flax_densenet.errors import UserError
from flax_densenet.system import atomic
from flax_densenet.train import tensorboard

_LOGGER = logging.getLogger(__name__)
FILE = 'trackers.json'
PROJECT = 'flax_densenet'
_TRACKIO_SERVERS = 'TRACKIO_SPACE_ID', 'TRACKIO_SERVER_URL'
_FILE_STORE = 'MLFLOW_ALLOW_FILE_STORE'
# Files that are sent when a run has ended, besides the best checkpoint.
FILES = (
    'report.html',
    'curves.png',
    'config.json',
    'metrics.jsonl',
    'environment.json',
)


@dataclasses.dataclass(frozen=True)
class About:
    """A run as trackers show it.

    Attributes:
      name: name of its folder; for a run of a sweep, the folder below the sweep's.
      group: the sweep's folder, else ''.
      folder: folder of the run.
      config: settings by full name: text, numbers, booleans and None.
      identity: what `start` returned before the run was resumed, or None.
    """

    name: str
    group: str
    folder: str
    config: dict[str, Any]
    identity: str | None


class Tracker(Protocol):
    """The protocol of a tracker; one object for each start of a run."""

    def start(self, about: About) -> str:
        """Begins or continues the run; returns what identifies it from now on."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Sends the metrics of an epoch."""

    def send(self, files: list[str], checkpoint: str) -> None:
        """Sends files and a folder."""

    def finish(self, failed: bool) -> None:
        """Ends this start."""


class Wandb:
    """Weights & Biases."""

    def start(self, about):

        mode, place = os.environ.get('WANDB_MODE'), os.path.join(about.folder, 'wandb')
        if mode is None and not _has_wandb_login():
            mode = 'offline'
            os.environ.setdefault('WANDB_ERROR_REPORTING', 'false')
            if not about.identity:
                _LOGGER.info(
                    f'wandb: no login, so the run is kept in {place}; to upload it: '
                    f'`wandb login`, then `wandb sync {place}/offline-run-*`'
                )
        try:
            self._run = _init_wandb(about, mode)
        except Exception as error:  # of any kind: a key, the network
            if mode is not None:
                raise
            text = ' '.join(str(error).split())[:200] or type(error).__name__
            _LOGGER.warning(
                f'warning: wandb: {text}; so the run is kept in {place}; to upload it: '
                f'`wandb sync {place}/offline-run-*`'
            )
            self._run = _init_wandb(about, 'offline')
        return self._run.id

    def log(self, step, metrics):
        self._run.log(metrics, step=step)

    def send(self, files, checkpoint):
        import wandb

        for kind, paths in (('report', files), ('model', [checkpoint])):
            artifact = wandb.Artifact(f'{kind}-{self._run.id}', type=kind)
            for path, name in _find_files(paths):
                artifact.add_file(path, name)
            self._run.log_artifact(artifact, aliases=['best'])

    def finish(self, failed):
        self._run.finish(exit_code=int(failed))


def _init_wandb(about, mode):
    import wandb

    return wandb.init(
        project=os.environ.get('WANDB_PROJECT', PROJECT),
        name=about.name,
        group=about.group or None,
        id=about.identity,
        resume='allow',
        dir=about.folder,
        config=about.config,
        mode=mode,
        settings=wandb.Settings(silent=True, console='off'),
    )


def _has_wandb_login():
    """Whether wandb would find a key; `wandb.login` would connect to find out."""
    import wandb
    from requests import utils

    settings = wandb.setup().settings
    hosts = [settings.base_url]
    if settings.base_url == wandb.Settings().base_url:
        hosts.append('https://api.wandb.ai')  # as it was called before
    return (
        bool(settings.api_key)
        or 'WANDB_IDENTITY_TOKEN_FILE' in os.environ
        or any(map(utils.get_netrc_auth, hosts))
    )


def _find_files(paths):
    """Files, and those in folders, each with its name below its folder."""
    for path in map(pathlib.Path, paths):
        inside = sorted(path.rglob('*')) if path.is_dir() else [path]
        base = path if path.is_dir() else path.parent
        for file in inside:
            if file.is_file():
                yield str(file), file.relative_to(base).as_posix()


class Mlflow:
    """MLflow: the server of `MLFLOW_TRACKING_URI`, else files next to the run."""

    def start(self, about):
        address = os.environ.get('MLFLOW_TRACKING_URI')
        if address is None:
            os.environ.setdefault('MLFLOW_DISABLE_TELEMETRY', 'true')
        elif not about.identity:
            _LOGGER.info(f'mlflow: the run is sent to {address}')
        # Without a server, half a minute instead of four, and no line for each attempt.
        os.environ.setdefault('MLFLOW_HTTP_REQUEST_MAX_RETRIES', '4')
        logging.getLogger('urllib3.connectionpool').setLevel(logging.ERROR)
        # About each table of a new database.
        logging.getLogger('mlflow.store.db').setLevel(logging.WARNING)
        root = pathlib.Path(about.folder).absolute().parent
        if about.group:
            root = pathlib.Path(about.folder[: -len(about.name)]).absolute().parent
        if address is None:
            address = f'sqlite:///{root / "mlflow.db"}'
            if not about.identity:
                _LOGGER.info(
                    f'mlflow: no MLFLOW_TRACKING_URI, so the run is kept in {root}; to '
                    f'see it: `mlflow ui --backend-store-uri {address}`'
                )
        self._client = _mlflow_client(address)
        name = os.environ.get('MLFLOW_EXPERIMENT_NAME', PROJECT)
        found = self._client.get_experiment_by_name(name)
        place = None
        if address.startswith('sqlite:'):
            place = (root / 'mlartifacts').as_uri()
        experiment = (
            found.experiment_id
            if found
            else self._client.create_experiment(name, artifact_location=place)
        )
        if about.identity:
            self._id = about.identity
            self._client.update_run(self._id, status='RUNNING')
        else:
            tags = {}
            if about.group:
                tags = {'mlflow.parentRunId': self._parent(experiment, about.group)}
            made = self._client.create_run(experiment, run_name=about.name, tags=tags)
            self._id = made.info.run_id
        self._add_params(about.config)
        return self._id

    def _parent(self, experiment, group):
        """The parent run of a sweep's runs."""
        key = f'{PROJECT}.sweep'
        found = self._client.search_runs([experiment], f"tags.`{key}` = '{group}'")
        if not found:
            found = [self._client.create_run(experiment, run_name=group,
                                             tags={key: group})]  # fmt: skip
            self._client.set_terminated(found[0].info.run_id)
        return found[0].info.run_id

    def _add_params(self, config):
        from mlflow.entities import Param

        known = self._client.get_run(self._id).data.params
        new = [Param(k, str(v)[:500]) for k, v in config.items() if k not in known]
        for first in range(0, len(new), 100):
            self._client.log_batch(self._id, params=new[first : first + 100])

    def log(self, step, metrics):
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(
            self._id, [Metric(k, float(v), now, step) for k, v in metrics.items()]
        )

    def send(self, files, checkpoint):
        for path in files:
            self._client.log_artifact(self._id, path)
        self._client.log_artifacts(self._id, checkpoint, 'best')

    def finish(self, failed):
        self._client.set_terminated(self._id, 'FAILED' if failed else 'FINISHED')


def _mlflow_client(address):
    from mlflow import MlflowClient

    try:
        return MlflowClient(tracking_uri=address)
    except Exception as error:
        if _FILE_STORE not in str(error):
            raise
        raise ValueError(
            f'MLFLOW_TRACKING_URI={address} is a folder, to which it writes only with '
            f'{_FILE_STORE}=true; use sqlite:///FILE or a server instead'
        ) from error


class Trackio:
    """Trackio: runs stay on this machine unless the environment names a server."""

    def start(self, about):
        import trackio
        from trackio import utils

        self._trackio = trackio
        self._is_local = not any(map(os.environ.get, _TRACKIO_SERVERS))
        name = about.identity or '-'.join(filter(None, (about.group, about.name)))
        project = os.environ.get('TRACKIO_PROJECT', PROJECT)
        with self._quiet():
            self._run = trackio.init(
                project=project,
                name=name,
                group=about.group or None,
                space_id=os.environ.get('TRACKIO_SPACE_ID'),
                config=about.config,
                resume='allow',
                embed=False,
            )
        if self._is_local and not about.identity:
            _LOGGER.info(
                f'trackio: the run is kept in {utils.TRACKIO_DIR}; to see it: `trackio '
                f'show --project {project}`'
            )
        return name

    def _quiet(self):
        """Leaves out what Trackio prints about runs on this machine."""
        target = io.StringIO() if self._is_local else sys.stdout
        return contextlib.redirect_stdout(target)

    def log(self, step, metrics):
        self._trackio.log(metrics, step=step)

    def send(self, files, checkpoint):
        for path in files:
            self._trackio.save(path)
        self._trackio.save(os.path.join(checkpoint, '**'))

    def finish(self, failed):
        with self._quiet():
            self._trackio.finish()


TRACKERS: dict[str, Callable[[], Tracker]] = {
    'wandb': Wandb,
    'mlflow': Mlflow,
    'trackio': Trackio,
}


def parse(text: str) -> list[str]:
    """The names in `train.trackers`.

    >>> parse('')
    []

    Raises:
      UserError: one is not known, or its package is not installed.
    """
    names = [name.strip() for name in text.split(',') if name.strip()]
    for name in names:
        if name not in TRACKERS:
            raise UserError(
                f'train.trackers={text}: {name} is not known; use some of '
                f'{",".join(TRACKERS)}'
            )
        if not errors.is_installed(name):
            raise errors.MissingExtraError(
                f'train.trackers={name} needs {name}: '
                f"pip install 'flax_densenet[{name}]'"
            )
    return list(dict.fromkeys(names))


def metrics_of(record: dict[str, Any]) -> dict[str, float]:
    """The values that trackers log for an epoch, by their TensorBoard names."""
    return tensorboard.scalars_of(record) | {'epoch': record['epoch']}


class Tracked:
    """The trackers of a run; each call goes to those that still work."""

    def __init__(self, workdir: str, trackers: dict[str, Tracker]):
        self._workdir, self._trackers = workdir, trackers

    def start(self, config: dict[str, Any]):
        """Begins or continues the run in all of them.

        Args:
          config: settings by full name.
        """
        known = _load(self._workdir)
        name, group = _place(self._workdir)
        for key in list(self._trackers):
            about = About(name, group, self._workdir, config, known.get(key))
            known[key] = self._try(key, 'start', about) or known.get(key)
        with atomic.replacing(os.path.join(self._workdir, FILE)) as file:
            json.dump({k: v for k, v in known.items() if v}, file, indent=2)

    def call(self, method: str, *arguments: Any):
        """Calls a method of all of them."""
        for key in list(self._trackers):
            self._try(key, method, *arguments)

    def _try(self, key, method, *arguments):
        try:
            return getattr(self._trackers[key], method)(*arguments)
        except Exception as error:  # of any kind: the network, a remote store
            text = ' '.join(str(error).split())[:200] or type(error).__name__
            _LOGGER.warning(
                f'warning: {key} failed ({text}) and gets no more data from this run; '
                'training continues'
            )
            del self._trackers[key]
            return None


def _load(workdir):
    try:
        with open(os.path.join(workdir, FILE), encoding='utf-8') as file:
            found = json.load(file)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _place(workdir):
    """The name of a run, and the sweep to which it belongs."""
    path = pathlib.Path(workdir).absolute()
    for parent in path.parents[:3]:
        if (parent / 'sweep.json').is_file():
            return path.relative_to(parent).as_posix(), parent.name
    return path.name, ''


@contextlib.contextmanager
def open_trackers(
    workdir: str, names: list[str], config: dict[str, Any]
) -> Iterator[Tracked]:
    """A context in which trackers follow a run.

    Args:
      names: some of TRACKERS; empty for none.
      config: settings by full name.
    """
    tracked = Tracked(workdir, {name: TRACKERS[name]() for name in names})
    if names:
        tracked.start(config)
    failed = True
    try:
        yield tracked
        failed = False
    finally:
        tracked.call('finish', failed)


def send_files(workdir: str, names: list[str], config: dict[str, Any]):
    """Sends the report and the best checkpoint of a finished run.

    Args:
      names, config: as in `open_trackers`.
    """
    known = _load(workdir)
    names = [name for name in names if name in known]  # the others never started
    if not names:
        return
    step = checkpoint_reader.find_step(workdir, 'best')
    best = checkpoint_reader.folder_of(workdir, checkpoint_reader.Checkpoint(step))
    files = [os.path.join(workdir, name) for name in FILES]
    with open_trackers(workdir, names, config) as tracked:
        tracked.call('send', [path for path in files if os.path.isfile(path)], best)

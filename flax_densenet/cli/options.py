"""Commands and their flags as data, for parsing, checks and --help."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from absl import flags as absl_flags
from ml_collections import ConfigDict, config_flags

from flax_densenet.cli import recipes
from flax_densenet.errors import UserError
from flax_densenet.system import paths

_PATH_FIELDS = {'data.labels', 'data.tfds_dir'}
_DEFINE = {
    str: absl_flags.DEFINE_string,
    int: absl_flags.DEFINE_integer,
    float: absl_flags.DEFINE_float,
    bool: absl_flags.DEFINE_bool,
    list: absl_flags.DEFINE_multi_string,
}


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag of a command.

    Attributes:
      help: shown by --help.
      kind: str, int, float, bool, or list for a flag that can be given several times.
      value: placeholder for its value in --help.
      default_text: shown instead of a default that is None or empty.
      alias: another name.
      is_path: whether its value is a local path, which is checked before anything else.
    """

    name: str
    help: str
    kind: type = str
    default: Any = None
    value: str = ''
    default_text: str = ''
    alias: str = ''
    is_path: bool = False

    def define(self, values: absl_flags.FlagValues):
        """Registers the flag with absl."""
        default = [] if self.kind is list else self.default
        _DEFINE[self.kind](self.name, default, self.help, flag_values=values)
        if self.alias:
            absl_flags.DEFINE_alias(self.alias, self.name, flag_values=values)


@dataclasses.dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
      summary: one line for the list of commands.
      run: function that runs it and returns the exit status, None for 0.
      usage: its arguments, such as `MODEL FILES...`.
      details: paragraphs for --help.
      examples: (what it does, arguments) for --help.
      flags: its flags, by group.
      place: function from positional arguments to (flag, value) pairs; None if it takes
        no arguments.
      implied: function from the given flags, by name, to the (flag, value) pairs that
        they imply; None if they imply nothing.
      fields: which settings (`--config.FIELD=VALUE`) apply, for --help; empty if the
        command has no settings.
    """

    name: str
    summary: str
    run: Callable[['Invocation'], int | None]
    usage: str = ''
    details: tuple[str, ...] = ()
    examples: tuple[tuple[str, str], ...] = ()
    flags: dict[str, tuple[Flag, ...]] = dataclasses.field(default_factory=dict)
    place: Callable[[list[str]], list[tuple[str, str]]] | None = None
    implied: Callable[[dict[str, str | None]], list[tuple[str, str]]] | None = None
    fields: str = ''

    def all_flags(self) -> dict[str, Flag]:
        """All flags, by name and by alias."""
        found = {}
        for flag in (flag for group in self.flags.values() for flag in group):
            found[flag.name] = flag
            if flag.alias:
                found[flag.alias] = flag
        return found


@dataclasses.dataclass(frozen=True)
class Invocation:
    """A command with its parsed arguments.

    Attributes:
      flags: values of the command's flags, as attributes.
      recipe: the recipe named with --config; None if it was not given.
      config_arguments: `--config=...` and `--config.FIELD=...` as given.
      positionals: arguments that are not flags.
    """

    command: Command
    flags: absl_flags.FlagValues
    recipe: recipes.Recipe | None
    config_arguments: tuple[str, ...]
    positionals: tuple[str, ...]

    @property
    def config(self) -> ConfigDict:
        """The recipe with the fields from the command line."""
        return self.flags.config

    @property
    def fields(self) -> dict[str, Any]:
        """`config` as nested dicts of plain values."""
        return to_dict(self.config)

    @property
    def overrides(self) -> dict[str, Any]:
        """Fields set on the command line, by full name."""
        return config_flags.get_override_values(self.flags['config'])

    @property
    def workdir(self) -> str:
        """--workdir; by default ckpt/ and the name of the recipe."""
        if self.flags.workdir:
            from flax_densenet.weights import published

            if self.command.name != 'train' and published.is_name(self.flags.workdir):
                return self.flags.workdir  # a model in place of a run
            return paths.resolve(self.flags.workdir, '--workdir=')
        return default_workdir(self.recipe)

    def path(self, flag: str) -> str | None:
        """The resolved value of a flag that is a path; None if it was not given."""
        value = self.flags[flag].value
        return value and paths.resolve(value, f'--{flag}=')

    def check_paths(self):
        """Raises `UserError` for an unusable path, before the long work.

        Such paths are addresses of buckets, and paths with a user or variable that does
        not exist.
        """
        for flag in self.command.all_flags().values():
            if flag.is_path and flag.kind is list:
                for text in self.flags[flag.name].value:
                    for one in text.split(','):
                        paths.resolve(one, f'--{flag.name}=')
            elif flag.is_path and flag.name == 'workdir':
                _ = self.workdir
            elif flag.is_path:
                self.path(flag.name)
        fields = self.overrides if self.command.fields else {}
        for name in _PATH_FIELDS & fields.keys():
            paths.resolve(fields[name] or '', f'{name}=')
        paths.resolve_source(fields.get('data.source') or '')


def default_workdir(recipe: recipes.Recipe | None) -> str:
    """ckpt/ and the name of the recipe."""
    name = pathlib.Path(recipe.path).stem if recipe else 'base'
    return str(pathlib.Path('ckpt', name))


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """A ConfigDict as nested dicts of plain values; tuples stay tuples."""
    return {
        name: dict(value) if isinstance(value, dict) else value
        for name, value in config.to_dict().items()
    }


WORKDIR = Flag(
    'workdir',
    'Folder of the run, with its checkpoints, metrics and report.',
    value='FOLDER',
    default_text='ckpt/NAME, with the name of the recipe',
    is_path=True,
)
OF_WEIGHTS = (
    Flag(
        'class_names',
        'Class names in the order of the outputs, for weights that do not name them: '
        'A,B,... or a file with a name per line or a JSON list or object. A network '
        'with one output takes two: negative and positive.',
        value='NAMES',
        default_text='as in the weights',
    ),
    Flag(
        'outputs',
        'Meaning of the outputs: softmax (one class per image), sigmoid (each class '
        'independently) or none (shown without conversion).',
        value='KIND',
        default_text='as in the weights, else softmax',
    ),
)
RAW = Flag(
    'raw',
    "Use the network's own outputs, without the calibration, thresholds and limits "
    'that were fitted after training.',
    kind=bool,
    default=False,
)
VERIFICATION_FILES = Flag(
    'files',
    'Images to verify the file on, as a file, folder or pattern. Can be given several '
    'times.',
    kind=list,
    value='FILES',
    default_text="the run's own images",
)
EXPLAIN = (
    Flag(
        'explain_method',
        'Method for the heat maps: gradcam, gradcam++, hirescam, layercam (finer); or, '
        'slower, occlusion or integrated_gradients.',
        value='METHOD',
        default_text='gradcam',
    ),
    Flag(
        'explain_steps',
        'Steps of integrated_gradients; more steps are more accurate.',
        kind=int,
        value='N',
        default_text='32',
    ),
    Flag(
        'explain_patches',
        'Patches of occlusion along the shorter side; they overlap by half, so 7 look '
        'at 169 versions of a square image.',
        kind=int,
        value='N',
        default_text='7',
    ),
)
LICENSES = (
    Flag('license', 'License of the weights, such as cc-by-4.0.', value='NAME'),
    Flag('data_license', 'License of the data.', value='NAME'),
)
MEASURED_PRECISION = Flag(
    'precision',
    'Precision of the computation: float32, bfloat16, or auto, which measures both, '
    'uses bfloat16 if it costs at most 0.1 points, and saves the choice for predict '
    'and serve.',
    value='PRECISION',
    default_text="the model's own",
)
PRECISION = Flag(
    'precision',
    'Precision of the computation: float32, bfloat16, or auto, which uses bfloat16 if '
    'it is faster here and eval or report with --precision=auto has measured that it '
    'costs at most 0.1 points.',
    value='PRECISION',
    default_text='auto',
)
COVERAGE = Flag(
    'coverage',
    'Also list a set of classes per image that contains the true class for this share '
    'of images like the validation images, such as 0.9 (conformal sets; '
    'docs/unusual.md).',
    kind=float,
    value='SHARE',
)
OTHERS = Flag(
    'others',
    'Images that show none of the classes, as a folder, file or pattern, to measure '
    'how well the score of unusual images separates them from the others '
    '(docs/unusual.md).',
    value='FOLDER',
)
CLUSTER = (
    Flag(
        'distributed',
        'This is one of several processes, one per machine or GPU. They find each '
        'other through Cloud TPU, Open MPI 5 (needs mpi4py), Slurm, or Kubernetes '
        '(Indexed Job or JobSet; needs the package kubernetes). Anywhere else, give '
        'the next three flags. Under Slurm and Open MPI each process uses one GPU.',
        kind=bool,
        default=False,
    ),
    Flag(
        'coordinator_address',
        'Address of process 0, the same for all processes.',
        value='HOST:PORT',
        default_text='$JAX_COORDINATOR_ADDRESS',
        alias='coordinator',
    ),
    Flag('num_processes', 'Number of processes.', kind=int, value='N'),
    Flag('process_id', 'Index of this process, from 0.', kind=int, value='N'),
    Flag(
        'initialization_timeout',
        'Seconds to wait for all processes to start.',
        kind=int,
        default=300,
        value='SECONDS',
    ),
    Flag(
        'heartbeat_timeout_seconds',
        'If a process does not respond for this many seconds, the others stop.',
        kind=int,
        default=30,
        value='SECONDS',
    ),
)
SEVERAL_PROCESSES: dict[str, tuple[Flag, ...]] = {
    'Several processes (docs/scaling.md)': CLUSTER
}


def explain_options(invocation: Invocation, needs: str = ''):
    """The `explain.Options` from the flags in `EXPLAIN`.

    Args:
      needs: a flag without which they have no effect, such as `explain`.

    Raises:
      UserError: the flags have no effect, or a value is out of range.
    """
    from flax_densenet.inference import explain

    names = [flag.name for flag in EXPLAIN]
    values = [invocation.flags[name].value for name in names]
    for name, value in zip(names, values, strict=True):
        if needs and value is not None and not invocation.flags[needs].value:
            raise UserError(f'--{name} needs --{needs}=FOLDER')
    method, steps, patches = values
    first, second, third = (f'--{name}' for name in names)
    shown = first, second, third
    return explain.make(method, steps=steps, patches=patches, names=shown)

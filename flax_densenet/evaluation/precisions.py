"""Measures a trained model in the chosen precision, or in both."""

from flax_densenet import settings as settings_lib
from flax_densenet.data import notes
from flax_densenet.distributed import mesh
from flax_densenet.evaluation import results
from flax_densenet.models import folded
from flax_densenet.weights import precision as precision_lib
from flax_densenet.weights import trained as trained_lib


def of_data(
    trained: trained_lib.Trained,
    path: str,
    settings: settings_lib.Settings,
    precision: str | None,
):
    """`results.of_data` in a precision.

    `auto` measures float32 and bfloat16 if bfloat16 is faster here, saves the
    measurement for `predict` and `serve`, and uses bfloat16 if it is as accurate.

    Args:
      precision: one of `precision.CHOICES`; None for the model's own.

    Returns:
      The model as it was measured, and the result of `results.of_data`.

    Raises:
      UserError: the precision is unknown, or as for `results.of_data`.
    """
    precision_lib.check(precision)
    if precision == 'auto':
        return _both(trained, path, settings)
    if precision:
        trained = precision_lib.to(trained, precision)
    return trained, *results.of_data(trained, path, settings)


def _both(trained, path, settings):
    if reason := folded.why_bfloat16_is_slow(trained.module):
        _say(f'measuring only in {trained.module.dtype}: {reason}')
        return trained, *results.of_data(trained, path, settings)
    models = {name: precision_lib.to(trained, name) for name in ('float32', 'bfloat16')}
    source, found, trained_on = results.of_data(models['float32'], path, settings)
    loader = settings.loader
    again = results.collect(
        models['bfloat16'],
        found.examples,
        found.class_names,
        batch_size=loader.batch_size,
        threads=loader.threads,
        workers=loader.workers,
    )
    measured = {'float32': found, 'bfloat16': again}
    metrics = {name: result.metrics for name, result in measured.items()}
    record = precision_lib.make_record(trained, metrics)
    precision_lib.save(path, record)
    chosen = 'bfloat16' if precision_lib.is_accurate(record) else 'float32'
    line = f'bfloat16: {precision_lib.describe(record)}; using {chosen}'
    if trained.step is not None:
        line += ', and so do predict and serve unless --precision is given'
    _say(line)
    return models[chosen], source, measured[chosen], trained_on


def _say(line):
    if mesh.is_writer():
        notes.say(line)

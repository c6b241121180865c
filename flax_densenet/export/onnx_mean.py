"""Adds the logits of the mean probabilities of several networks to an ONNX graph."""

import math

import numpy as np


def mean_logits(graph, logits: list[str], outputs: str) -> str:
    """Adds `ensemble.mean_logits`; returns the name of the output `[N, C]`.

    Args:
      logits: names of the logits of each network, `[N, C]`.
      outputs: `softmax`, `sigmoid` or `none`.
    """
    if outputs == 'none':
        return graph.add('Mean', *logits, name='mean_logits')
    if outputs == 'sigmoid':
        return _of_sigmoids(graph, logits)
    logs = [graph.add('LogSoftmax', x, axis=-1, name='log_softmax') for x in logits]
    mean = _log_mean(graph, logs, 'log_mean')
    # The amount that each softmax subtracted, the same for all classes.
    pairs = zip(logits, logs, strict=True)
    taken = [graph.add('Sub', x, log, name='log_sums') for x, log in pairs]
    return graph.add('Add', mean, graph.add('Mean', *taken), name='mean_logits')


def _of_sigmoids(graph, logits):
    sides = []
    for name in ('positive', 'negative'):
        logs = []
        for x in logits:
            if name == 'positive':
                x = graph.add('Neg', x, name='negated')
            y = graph.add('Softplus', x, name=f'{name}.softplus')
            logs.append(graph.add('Neg', y, name=f'{name}.log_sigmoid'))
        sides.append(_log_mean(graph, logs, f'{name}.log_mean'))
    return graph.add('Sub', *sides, name='mean_logits')


def _log_mean(graph, logs, name):
    """The logarithm of a mean, from the logarithms of its terms."""
    rows = [graph.add('Unsqueeze', x, np.array([0]), name=f'{name}.row') for x in logs]
    rows = graph.add('Concat', *rows, axis=0, name=f'{name}.rows')
    options = {'axes': [0], 'keepdims': 0, 'name': f'{name}.sum'}
    total = graph.add('ReduceLogSumExp', rows, **options)
    return graph.add('Sub', total, np.float32(math.log(len(logs))), name=name)

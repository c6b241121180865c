"""Adds the score of unusual images (`weights.unusual`) to an ONNX graph."""

from collections.abc import Sequence

import numpy as np

from flax_densenet.export.onnx_graph import Graph
from flax_densenet.weights import unusual as unusual_lib
from flax_densenet.weights import unusual_members

OUTPUT = 'unusual'


def add(
    graph: Graph,
    score: unusual_lib.Unusual,
    pooled: str,
    logits: str,
    *,
    name: str = OUTPUT,
) -> str:
    """Adds the score; returns the name of its output, float32 `[N]`.

    Args:
      graph: the graph to extend.
      score: the fitted score.
      pooled: name of the pooled features, `[N, F]`.
      logits: name of the logits without calibration, `[N, C]`.
      name: the wanted name of the output.
    """
    if score.method in ('both', 'energy'):
        energy = plain = _energy(graph, logits, several=score.several)
    if score.method != 'energy':
        points = _points(graph, score, pooled)
        distance = _distance(graph, points, score.references, score.neighbor)
        plain = distance
    if score.method == 'both':
        weights = score.energy_weight, score.distance_weight
        parts = [
            graph.add('Mul', part, np.array(weight, np.float32), name=f'{part}.part')
            for part, weight in zip((energy, distance), weights, strict=True)
        ]
        plain = graph.add('Add', *parts, name='both')
    plain = graph.add(
        'Sub', plain, np.array(score.middle, np.float32), name='above_middle'
    )
    scale = np.array(1 / (score.limit - score.middle), np.float32)
    return graph.add('Mul', plain, scale, name=name)


def add_of_members(
    graph: Graph,
    score: unusual_members.MembersUnusual,
    members: Sequence[tuple[str, str]],
) -> str:
    """Adds the score of an ensemble; returns the name of its output, float32 `[N]`.

    Args:
      graph: the graph to extend.
      score: the fitted score.
      members: names of the pooled features and the (calibrated) logits of each member.
    """
    names = []
    for own, found, (pooled, logits) in zip(
        score.members, score.calibrations, members, strict=True
    ):
        if found is not None and own.needs_logits:
            logits = revert(graph, logits, found.scale, found.bias)
        one = add(graph, own, pooled, logits, name='unusual_of_member')
        row = graph.add('Unsqueeze', one, np.array([1]), name='unusual_of_member.row')
        names.append(row)
    rows = graph.add('Concat', *names, axis=1, name='unusual_of_members')
    count = np.array([score.place + 1])
    lowest = graph.add('TopK', rows, count, largest=0, outputs=2, name='lower_half')
    return graph.add('ReduceMax', lowest, axes=(-1,), keepdims=0, name=OUTPUT)


def revert(graph: Graph, logits: str, scale, bias) -> str:
    """Adds `Calibration.revert`; returns the name of the logits, `[N, C]`."""
    scale, bias = np.array(scale, np.float32), np.array(bias, np.float32)
    x = graph.add('Sub', logits, bias, name='without_bias')
    return graph.add('Div', x, scale, name='logits_before_calibration')


def _energy(graph, logits, *, several):
    if several:
        found = graph.add('Softplus', logits, name='softplus')
        found = _sum(graph, found, 'softplus.sum', keepdims=0)
    else:
        found = graph.add(
            'ReduceLogSumExp', logits, axes=(-1,), keepdims=0, name='logsumexp'
        )
    return graph.add('Neg', found, name='energy')


def _points(graph, score, pooled):
    if score.method == 'neighbor':
        return graph.add('LpNormalization', pooled, axis=-1, p=2, name='of_length_1')
    centered = graph.add('Sub', pooled, score.mean[None], name='features.centered')
    directions = np.float32(score.directions)
    along = graph.add('MatMul', centered, directions.T, name='features.along')
    along = graph.add('Mul', along, score.gains[None], name='features.gains')
    along = graph.add('MatMul', along, directions, name='features.back')
    whitened = graph.add('Add', centered, along, name='features.whitened')
    return graph.add('Mul', whitened, np.float32(score.scale), name='features.scaled')


def _distance(graph, points, references, neighbor):
    references = np.float32(references)
    squares = graph.add('Mul', points, points, name='features.squares')
    squares = _sum(graph, squares, 'features.length', keepdims=1)
    lengths = (references * references).sum(-1)[None]
    squares = graph.add('Add', squares, lengths, name='lengths')
    products = graph.add('MatMul', points, -2 * references.T, name='products')
    squares = graph.add('Add', squares, products, name='squares')
    if neighbor > 1:
        count = np.array([neighbor])
        squares = graph.add(
            'TopK', squares, count, largest=0, outputs=2, name='neighbors'
        )
        nearest = graph.add(
            'ReduceMax', squares, axes=(-1,), keepdims=0, name='neighbor'
        )
    else:
        nearest = graph.add(
            'ReduceMin', squares, axes=(-1,), keepdims=0, name='nearest'
        )
    nearest = graph.add('Max', nearest, np.float32(0), name='nearest.positive')
    return graph.add('Sqrt', nearest, name='distance')


def _sum(graph, x, name, *, keepdims):
    return graph.add('ReduceSum', x, np.array([-1]), keepdims=keepdims, name=name)

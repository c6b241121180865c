"""Which images a report shows, and their pictures as text that a page can hold."""

import base64
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from flax_densenet.data import dataset, deep_picture
from flax_densenet.evaluation import results
from flax_densenet.inference import overlay
from flax_densenet.inference import predictor as predictor_lib

THUMBNAIL, PICTURE = 72, 176  # sides in pixels, of a cell's image and of a mistake's
CELL_IMAGES = 24  # of a cell of the confusion matrix
CELL_BYTES = 3_000_000  # that all cells' images may take in the page


def to_uri(image: np.ndarray, side: int) -> str:
    """An image `[H, W, 1 or 3]` as a WebP `data:` address, no side above `side`."""
    image = deep_picture.to_uint8(image)
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.convert('RGB').save(buffer, 'WEBP', quality=78, method=4)
    return f'data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}'


def pick_samples(
    examples: dataset.Examples, labels: np.ndarray, most: int
) -> list[int]:
    """Positions of images, in turn of every class, until there are `most`.

    Args:
      labels: of the examples, `[N]` or `[N, L]`.
    """
    if labels.ndim == 2:
        return list(range(min(most, len(labels))))
    order = np.argsort(labels, kind='stable')
    counts = np.bincount(labels)
    place = np.arange(len(order)) - (np.cumsum(counts) - counts)[labels[order]]
    return order[np.argsort(place, kind='stable')][:most].tolist()


def pick_mistakes(found: results.Results, most: int) -> list[dict[str, Any]]:
    """The wrong answers with the highest probability, the worst first.

    Returns:
      For each `row`, `predicted` and `true` (classes) and `probability`. With several
      labels per image `true` equals `predicted`, and `present` tells whether it is
      there.
    """
    if found.multi_label:
        known = ~np.isnan(found.labels)
        wrong = known & ((found.probabilities > 0.5) != (found.labels > 0.5))
        return _label_rows(found, wrong, np.abs(found.probabilities - 0.5), most)
    rows = np.flatnonzero(found.predicted != found.labels)
    order = np.argsort(-found.confidence[rows], kind='stable')
    return _class_rows(found, rows[order][:most])


def pick_uncertain(found: results.Results, most: int) -> list[dict[str, Any]]:
    """The images with the least difference of the two most likely classes.

    With several labels: the answers closest to a probability of a half. As
    `pick_mistakes`.
    """
    if found.multi_label:
        known = ~np.isnan(found.labels)
        return _label_rows(found, known, -np.abs(found.probabilities - 0.5), most)
    margin = np.array([np.subtract(*_two_best(row)) for row in found.probabilities])
    return _class_rows(found, np.argsort(margin, kind='stable')[:most])


def _two_best(row):
    if len(row) < 2:
        return row[0], 0.0
    return np.partition(row, -2)[:-3:-1]


def _class_rows(found, rows):
    predicted = found.predicted
    return [
        {
            'row': int(row),
            'predicted': int(predicted[row]),
            'true': int(found.labels[row]),
            'probability': float(found.confidence[row]),
            'true_probability': float(found.probabilities[row, found.labels[row]]),
        }
        for row in rows
    ]


def _label_rows(found, wanted, order, most):
    places = np.argwhere(wanted)
    keys = order[wanted]
    return [
        {
            'row': int(row),
            'predicted': int(label),
            'true': int(label),
            'present': bool(found.labels[row, label] > 0.5),
            'probability': float(found.probabilities[row, label]),
        }
        for row, label in places[np.argsort(-keys, kind='stable')][:most]
    ]


def add_pictures(
    rows: Sequence[dict[str, Any]],
    found: results.Results,
    predictor: predictor_lib.Predictor,
):
    """Adds `image`, `predicted_map` and, if it was a mistake, `true_map` to each row.

    Every host has to call it, as the maps are computed on all devices.
    """
    size = predictor.batch_size
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        batch = np.stack([found.examples[row['row']]['image'] for row in part])
        maps = {
            kind: predictor.cams(batch, [row[kind] for row in part])
            for kind in ('predicted', 'true')
        }
        for place, (row, image) in enumerate(zip(part, batch, strict=True)):
            row['image'] = to_uri(image, PICTURE)
            row['name'] = found.name(row['row'])
            for kind, cams in maps.items():
                if kind == 'predicted' or row['true'] != row['predicted']:
                    laid = overlay.overlay(image, cams[place])
                    row[f'{kind}_map'] = to_uri(laid, PICTURE)


def make_cells(found: results.Results, classes) -> dict[str, list[dict[str, Any]]]:
    """Images of the cells of a confusion matrix, the surest answers first.

    Pictures go to all cells in turn, those of mistakes first, until they take
    `CELL_BYTES`; the rest is named only.

    Args:
      classes: that the matrix has.

    Returns:
      `{'true,predicted': [{'name', 'probability', 'image'}, ...]}`.
    """
    inside = set(map(int, classes))
    predicted, confidence = found.predicted, found.confidence
    cells: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in np.argsort(-confidence, kind='stable').tolist():
        place = int(found.labels[row]), int(predicted[row])
        cell = cells.setdefault(place, [])
        if inside.issuperset(place) and len(cell) < CELL_IMAGES:
            cell.append({'row': row, 'probability': round(float(confidence[row]), 4)})
    left = CELL_BYTES
    for item in _in_turn(cells):
        item['name'] = found.name(item['row'])
        if left > 0:
            image = found.examples[item['row']]['image']
            item['image'] = to_uri(image, THUMBNAIL)
            left -= len(item['image'])
    return {
        f'{true},{predicted}': [
            {key: value for key, value in item.items() if key != 'row'} for item in cell
        ]
        for (true, predicted), cell in cells.items()
        if cell
    }


def _in_turn(cells) -> Iterator[dict[str, Any]]:
    """First images of the wrong cells, of the right ones, then the second ones, ..."""
    order = sorted(cells, key=lambda place: (place[0] == place[1], place))
    for turn in range(CELL_IMAGES):
        for place in order:
            if turn < len(cells[place]):
                yield cells[place][turn]

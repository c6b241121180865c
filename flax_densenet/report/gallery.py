"""Selects the images of a report, and embeds their pictures as text."""

import base64
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from flax_densenet.data import bands, deep_picture, labeled_images
from flax_densenet.evaluation import results
from flax_densenet.inference import explain, originals, overlay
from flax_densenet.inference import predictor as predictor_lib
from flax_densenet.report import render

# Sides in pixels: image in a cell, heat map, original, and smallest heat map.
THUMBNAIL, PICTURE, LARGE, SMALLEST = 112, 240, 448, 128
CELL_IMAGES = 24  # images per cell of the confusion matrix
CELL_BYTES = 3_000_000  # bytes for the images of all cells in the page


def to_uri(image: np.ndarray, side: int, *, strong: bool = False) -> str:
    """An image `[H, W, C]` as a WebP `data:` address, no side above `side`.

    Args: strong: compress less, as steep colors in heat maps need.
    """
    image = deep_picture.to_uint8(image)
    shown = image[..., 0] if image.shape[-1] == 1 else bands.to_visible(image)
    picture = Image.fromarray(shown)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.convert('RGB').save(buffer, 'WEBP', quality=85 if strong else 78, method=4)
    return f'data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}'


def pick_samples(
    examples: labeled_images.Examples, labels: np.ndarray, most: int
) -> list[int]:
    """Positions of images, from each class in turn, until there are `most`.

    Args:
      labels: labels of the examples, `[N]` or `[N, L]`.
    """
    if labels.ndim == 2:
        return list(range(min(most, len(labels))))
    order = np.argsort(labels, kind='stable')
    counts = np.bincount(labels)
    place = np.arange(len(order)) - (np.cumsum(counts) - counts)[labels[order]]
    return order[np.argsort(place, kind='stable')][:most].tolist()


def pick_mistakes(found: results.Results, most: int) -> list[dict[str, Any]]:
    """The wrong predictions with the highest probability, the worst first.

    Returns:
      A mapping for each: `row`, `predicted` and `true` (classes) and `probability`.
      With several labels per image `true` equals `predicted`, and `present` is whether
      the image has it.
    """
    if found.multi_label:
        known = ~np.isnan(found.labels)
        wrong = known & (found.positive != (found.labels > 0.5))
        return _label_rows(found, wrong, _from_threshold(found), most)
    rows = np.flatnonzero(found.predicted != found.labels)
    order = np.argsort(-found.confidence[rows], kind='stable')
    return _class_rows(found, rows[order][:most])


def pick_uncertain(found: results.Results, most: int) -> list[dict[str, Any]]:
    """The images with the least difference of the two most likely classes.

    With several labels: the answers closest to their thresholds. As `pick_mistakes`;
    for right answers, `rival` is the second most likely class.
    """
    if found.multi_label:
        known = ~np.isnan(found.labels)
        return _label_rows(found, known, -_from_threshold(found), most)
    margin = np.array([np.subtract(*_two_best(row)) for row in found.probabilities])
    rows = _class_rows(found, np.argsort(margin, kind='stable')[:most])
    for row in rows:
        if row['predicted'] == row['true'] and len(found.class_names) > 1:
            others = found.probabilities[row['row']].copy()
            others[row['predicted']] = -1
            row['rival'] = int(others.argmax())
    return rows


def _from_threshold(found):
    """The distance of probabilities from their thresholds, as a share of the range."""
    limits = [0.5 if value is None else value for value in found.thresholds]
    limits = np.clip(limits, 1e-6, 1 - 1e-6)
    away = found.probabilities - limits
    return np.abs(away) / np.where(away > 0, 2 * (1 - limits), 2 * limits)


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
            'positive': bool(found.positive[row, label]),
            'probability': float(found.probabilities[row, label]),
        }
        for row, label in places[np.argsort(-keys, kind='stable')][:most]
    ]


def add_pictures(
    rows: Sequence[dict[str, Any]],
    found: results.Results,
    predictor: predictor_lib.Predictor,
    how: explain.Options = explain.DEFAULT,
):
    """Adds `image`, `name` and `maps` to each row.

    `maps` are of the predicted class and, where it was a mistake, of the true one, or
    of the `rival` of a right answer: each the `class`, `image` and `share`, its highest
    value as a share of the higher of both. All are of the original image; what the
    model does not see of it is darkened.

    Every host has to call it, as the maps are computed on all devices.
    """
    size = predictor.batch_size
    originals = originals_of(found.examples)
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        batch = np.stack([found.examples[row['row']]['image'] for row in part])
        first = [row['predicted'] for row in part]
        second = [row.get('rival', row['true']) for row in part]
        maps = [predictor.cams(batch, classes, how) for classes in (first, second)]
        for place, row in enumerate(part):
            # One map where both are the same class.
            cams = {first[place]: maps[0][place], second[place]: maps[1][place]}
            row['name'] = found.name(row['row'])
            image, box = originals(row['row'])
            row['image'] = to_uri(image, LARGE)
            row['maps'] = _draw_maps(image, box, cams)


def _draw_maps(image, box, cams):
    """The maps `{class: map}` on a common scale."""
    tops = {of: overlay.top_of(cam) for of, cam in cams.items()}
    top = max(tops.values())
    small = _resize(image, min(1.0, PICTURE / max(image.shape[:2])))
    scale = small.shape[1] / image.shape[1], small.shape[0] / image.shape[0]
    box = tuple(side * scale[place % 2] for place, side in enumerate(box))
    return [
        {
            'class': of,
            'share': tops[of] / top if top > 0 else 0.0,
            'image': to_uri(
                overlay.overlay(small, cam, top=top, box=box), PICTURE, strong=True
            ),
        }
        for of, cam in cams.items()
    ]


def _resize(image, scale):
    """At least `SMALLEST` pixels a side, so that a map on a tiny image is smooth."""
    picture = Image.fromarray(image)
    scale = max(scale, min(SMALLEST / max(image.shape[:2]), 16))
    size = tuple(max(1, round(n * scale)) for n in picture.size)
    kind = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return np.asarray(picture.resize(size, kind))


def originals_of(examples: labeled_images.Examples):
    """A function from positions to originals and the part that the model sees.

    Returns:
      For a position, uint8 `[H, W, 3]`, upright, and the part of it (left, top, right,
      bottom) in pixels. For data sets that keep no originals, the images as the model
      gets them.
    """
    pictures = examples.as_pictures()

    def load(position):
        picture = pictures[position]['image']
        if isinstance(picture, np.ndarray):
            image = bands.to_visible(deep_picture.to_uint8(picture))
            return np.ascontiguousarray(image), (0, 0, *image.shape[1::-1])
        return originals.show(picture, examples.preparation, side=LARGE)

    return load


def make_cells(found: results.Results, classes) -> dict[str, list[dict[str, Any]]]:
    """Images of the cells of a confusion matrix, the most confident predictions first.

    Pictures are added to all cells in turn, mistakes first, up to `CELL_BYTES`; the
    remaining images are only named.

    Args:
      classes: the classes in the matrix.

    Returns:
      `{'true,predicted': [{'row', 'name', 'probability', 'image'}, ...]}`.
    """
    cells = _rows_of_cells(found, classes)
    left = CELL_BYTES
    for item in _in_turn(cells):
        item['name'] = found.name(item['row'])
        if left > 0:
            image = found.examples[item['row']]['image']
            item['image'] = to_uri(image, THUMBNAIL)
            left -= len(item['image'])
    return {
        f'{true},{predicted}': cell for (true, predicted), cell in cells.items() if cell
    }


def pick_in_cells(found: results.Results, classes, *, most: int, known) -> list[dict]:
    """Mistakes in the cells of a confusion matrix, in the form of `pick_mistakes`.

    Args:
      classes: the classes in the matrix.
      most: maximum number, as evenly over the cells as possible.
      known: rows to leave out.
    """
    rows = [
        item['row']
        for item in _in_turn(_rows_of_cells(found, classes))
        if found.labels[item['row']] != found.predicted[item['row']]
    ]
    return _class_rows(found, [row for row in rows if row not in known][:most])


def _rows_of_cells(found, classes):
    inside = set(map(int, classes))
    predicted, confidence = found.predicted, found.confidence
    cells: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in np.argsort(-confidence, kind='stable').tolist():
        place = int(found.labels[row]), int(predicted[row])
        cell = cells.setdefault(place, [])
        if inside.issuperset(place) and len(cell) < CELL_IMAGES:
            shown = render.probability(float(confidence[row]))
            cell.append({'row': row, 'probability': shown})
    return cells


def _in_turn(cells) -> Iterator[dict[str, Any]]:
    """The first images of wrong cells, of right cells, then the second ones, ..."""
    order = sorted(cells, key=lambda place: (place[0] == place[1], place))
    for turn in range(CELL_IMAGES):
        for place in order:
            if turn < len(cells[place]):
                yield cells[place][turn]

"""What the server answers: the model described, and predictions as JSON."""

import base64
import dataclasses
import io
import math
from typing import Any

import numpy as np
from PIL import Image
from starlette.exceptions import HTTPException

from flax_densenet.inference import overlay
from flax_densenet.models import naming
from flax_densenet.serving import batcher, guard, queries


def describe_model(predictor, *, name: str, limits: guard.Limits) -> dict[str, Any]:
    """The answer of /model."""
    trained, preparation = predictor.trained, predictor.preparation
    variant = trained.variant
    return {
        'name': name,
        'classes': list(predictor.class_names),
        'multi_label': predictor.multi_label,
        'value': predictor.value_name,
        'unusual': _describe_unusual(predictor),
        'sets': None if predictor.sets is None else list(predictor.sets.counts),
        'variant': variant,
        'network': naming.describe(
            trained.module, variant, channels=preparation.channels
        ),
        'image_size': preparation.size,
        'channels': preparation.channels,
        'resize': preparation.resize,
        'crop_fraction': preparation.crop_fraction,
        'window': preparation.window,
        'bit_depth': preparation.bit_depth,
        'epoch': trained.epoch,
        'step': trained.step,
        **predictor.describe_decisions(),
        'figures': {
            name: value
            for name, value in trained.metrics.items()
            # JSON has no NaN, but the loss of a failed training is NaN.
            if name.startswith(('val_', 'test_')) and math.isfinite(value)
        },
        'limits': dataclasses.asdict(limits),
    }


def describe_version(model: dict[str, Any]) -> dict[str, Any]:
    """The part of `describe_model` that predictions carry."""
    return {name: model[name] for name in ('name', 'epoch', 'step')}


def _describe_unusual(predictor):
    """How unusual images are scored, without the arrays; None if they are not."""
    if not predictor.scores_unusual:
        return None
    found = predictor.trained.decisions.unusual
    return {
        'method': found.method,
        'limit': 1.0,
        'usual_share': found.share,
        'training_images': found.train_count,
        'validation_images': found.val_count,
    }


def describe_prediction(
    predictor,
    image: np.ndarray,
    result: batcher.BatchResult,
    wanted: queries.Query,
) -> dict[str, Any]:
    """The answer of /predict, without the model and the time.

    Args:
      image: uint8 `[H, W, C]`, as the network sees it.

    Raises:
      HTTPException: 500, the outputs of the model are not finite.
    """
    probabilities, names = result.probabilities, predictor.class_names
    if not np.isfinite(probabilities).all():
        raise HTTPException(
            500, 'the outputs of the model are not finite: its training diverged'
        )
    order = np.argsort(-probabilities, kind='stable')
    value = predictor.value_name
    told: dict[str, Any] = {
        'predictions': [
            {'class': names[i], value: float(probabilities[i])}
            for i in order[: wanted.top]
        ]
    }
    positive = predictor.positive_of(probabilities)
    if positive is not None:
        told['positive'] = list(positive)
    if result.unusual is not None:
        told['unusual'] = result.unusual
        told['is_unusual'] = result.unusual > 1
    if wanted.coverage is not None:
        inside = predictor.sets.contains(probabilities[None], wanted.coverage)
        told['set'] = [names[i] for i in order if inside[0, i]]
    if wanted.of is not None and result.cam is not None:
        of = order[0] if wanted.of == batcher.MOST_LIKELY else wanted.of
        told |= {'explained': names[of], 'method': wanted.how.method}
        # 0 if nothing in the image supports the class: the map is empty.
        told['map_peak'] = float(result.cam.max())
        if wanted.picture == 'overlay':
            picture = overlay.overlay(image, result.cam)
        else:
            picture = overlay.layer(result.cam, image.shape[:2])
        told[wanted.picture] = _to_data_url(picture)
    return told


def _to_data_url(picture):
    """uint8 `[H, W, 3 or 4]` as `data:image/png;base64,...`."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, 'PNG')
    return 'data:image/png;base64,' + base64.b64encode(file.getvalue()).decode()

"""Classifies images with an exported .onnx file, without JAX or this project.

    pip install onnxruntime pillow
    python onnx_predict.py model.onnx photo.jpg ...

The metadata of the file has the preparation of images and the class names. Pixels equal
those of flax_densenet, except for 16-bit gray and very large images.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

COVERAGE = '0.9'
WAY = ('image_size', 'channels', 'resize', 'crop_fraction', 'interpolation')


def prepare(file, meta):
    """An image file as input of the model: uint8 `[1, height, width, channels]`."""
    sides, box = [int(n) for n in meta['image_size'].split(',')], None
    size = sides[-1], sides[0]  # width and height
    whole = [int(n / float(meta['crop_fraction'])) for n in size]
    with Image.open(file) as image:
        image.draft(None, [2 * n for n in whole])  # large JPEG: at a half, a quarter
        image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert('RGBA')
        page = Image.new('RGBA', image.size, 'white')
        image = Image.alpha_composite(page, image)
    image = image.convert('RGB')
    if meta['resize'] == 'crop':  # a central crop, else the whole image
        limit = int(whole[0] * image.height < whole[1] * image.width)
        to_whole = int if whole[0] == whole[1] else round
        shape = [to_whole(whole[limit] * n / image.size[limit]) for n in image.size]
        start = [round((n - m) / 2) for n, m in zip(shape, size, strict=True)]
        scale = [n / m for n, m in zip(image.size, shape, strict=True)]
        ends = start + [n + m for n, m in zip(start, size, strict=True)]
        box = [n * m for n, m in zip(ends, scale * 2, strict=True)]
    if image.size != size:
        filter_ = Image.Resampling[meta['interpolation'].upper()]
        image = image.resize(size, filter_, box)
    pixels = np.asarray(image.convert('L') if meta['channels'] == '1' else image)
    return pixels.reshape(1, size[1], size[0], -1)


def main(model, *files):
    """Prints the most likely classes of each file; returns the exit status."""
    try:
        session = onnxruntime.InferenceSession(model)
        meta = session.get_modelmeta().custom_metadata_map
        labels = json.loads(meta['labels'])
        [meta[name] for name in WAY]
        if meta['channels'] not in ('1', '3'):
            raise ValueError(f'images of {meta["channels"]} channels are not read here')
        outputs = [one.name for one in session.get_outputs()]
        taken = [(one.name, one.type) for one in session.get_inputs()]
        if taken != [('image', 'tensor(uint8)')]:
            raise ValueError(f'expects {taken}, not a uint8 image')
    except Exception as error:  # onnxruntime's errors have no other base class
        return f'{model} is not an exported model ({" ".join(str(error).split())})'
    unread = 0
    for file in files:
        try:
            image = prepare(file, meta)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as why:
            print(f'{file}: cannot be read ({why})', file=sys.stderr)
            unread = 1
            continue
        found = dict(zip(outputs, session.run(None, {'image': image}), strict=True))
        print(f'{file}: {describe(found, labels, meta)}')
    return unread


def describe(found, labels, meta):
    """The most likely classes, the prediction set, and whether the image is unusual."""
    shares = found['probabilities'][0]
    order = np.argsort(-shares, kind='stable')
    line = ', '.join(f'{labels[i]} {shares[i]:.1%}' for i in order[:5])
    if 'set_thresholds' in meta:
        # For 90% of images like the validation images, the right class is in the set.
        inside = shares >= json.loads(meta['set_thresholds'])[COVERAGE]
        if not json.loads(meta['multi_label']):
            inside[order[0]] = True
        names = ', '.join(labels[i] for i in order if inside[i])
        line += f'; set for {float(COVERAGE):.0%}: {names or "none"}'
    if 'unusual' in found and found['unusual'][0] > 1:
        line += f'; not like the training images ({found["unusual"][0]:.1f})'
    return line


if __name__ == '__main__':
    if len(sys.argv) < 3:
        sys.exit('usage: python onnx_predict.py model.onnx photo.jpg ...')
    sys.exit(main(*sys.argv[1:]))

"""Classifies images with an exported .onnx file, in 20 lines.

    python onnx_in_20_lines.py model.onnx photo.jpg ...

`onnx_predict.py` prepares images exactly as in training and reports errors.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1])
meta = session.get_modelmeta().custom_metadata_map
labels = json.loads(meta['labels'])
height, width = (2 * [int(n) for n in meta['image_size'].split(',')])[:2]
filter_ = Image.Resampling[meta['interpolation'].upper()]
for path in sys.argv[2:]:
    image = ImageOps.exif_transpose(Image.open(path)).convert('RGB')
    if meta['resize'] == 'crop':
        bleed = (1 - float(meta['crop_fraction'])) / 2  # cropped at each edge
        image = ImageOps.fit(image, (width, height), filter_, bleed)
    image = image.resize((width, height), filter_)
    image = image.convert('L' if meta['channels'] == '1' else 'RGB')
    batch = np.asarray(image).reshape(1, height, width, -1)  # uint8 [N, H, W, C]
    (row,) = session.run(['probabilities'], {'image': batch})[0]
    print(path, *(f'{labels[n]} {row[n]:.1%}' for n in np.argsort(-row)[:3]))

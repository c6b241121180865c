"""Classifies images with an exported .onnx file, in 20 lines.

    python onnx_in_20_lines.py model.onnx photo.jpg ...

`onnx_predict.py` does it to the last bit as in training, and says what went wrong.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1])
meta = session.get_modelmeta().custom_metadata_map
labels, side = json.loads(meta['labels']), int(meta['image_size'])
filter_ = Image.Resampling[meta['interpolation'].upper()]
whole = int(side / float(meta['crop_fraction']))
bleed = (1 - side / whole) / 2  # left out at each edge
for path in sys.argv[2:]:
    image = ImageOps.exif_transpose(Image.open(path)).convert('RGB')
    if meta['resize'] == 'crop':
        image = ImageOps.fit(image, (side, side), filter_, bleed)
    image = image.resize((side, side), filter_)
    image = image.convert('L' if meta['channels'] == '1' else 'RGB')
    batch = np.asarray(image).reshape(1, side, side, -1)  # uint8 [N, H, W, C]
    (row,) = session.run(['probabilities'], {'image': batch})[0]
    print(path, *(f'{labels[n]} {row[n]:.1%}' for n in np.argsort(-row)[:3]))

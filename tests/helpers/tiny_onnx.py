"""Small ONNX files like those of `export`, for the examples that read them."""

import json
import pathlib

import numpy as np

LABELS = ('ants', 'bees', 'wasps', 'beetles', 'flies', 'moths')
SIZE = 32


def write_onnx(
    path,
    *,
    labels=LABELS,
    size=SIZE,
    channels=3,
    multi_label=False,
    outputs=None,
    dtype='uint8',
    **metadata,
):
    """Writes a classifier that distinguishes images by their brightest positions.

    Args:
      outputs: number of probabilities, if it differs from the number of labels.
      dtype: dtype of the input; exported models use `uint8`.
      **metadata: changes to the usual `metadata_props`; None removes one.

    Returns:
      The path as a string.
    """
    import onnx
    from onnx import helper

    rng = np.random.default_rng(0)
    grid, outputs = 8, outputs or len(labels)
    weights = 0.5 * rng.standard_normal((grid * grid * channels, outputs))
    constants = {
        'mean': np.float32([0.5] * channels),
        'full': np.float32([255.0]),
        'weights': weights.astype(np.float32),
    }
    step = size // grid
    nodes = [
        helper.make_node('Cast', ['image'], ['float'], to=onnx.TensorProto.FLOAT),
        helper.make_node('Div', ['float', 'full'], ['unit']),
        helper.make_node('Sub', ['unit', 'mean'], ['normal']),
        helper.make_node('Transpose', ['normal'], ['planes'], perm=[0, 3, 1, 2]),
        helper.make_node(
            'MaxPool',
            ['planes'],
            ['pooled'],
            kernel_shape=[step] * 2,
            strides=[step] * 2,
        ),
        helper.make_node('Flatten', ['pooled'], ['flat']),
        helper.make_node('MatMul', ['flat', 'weights'], ['logits']),
        helper.make_node(
            'Sigmoid' if multi_label else 'Softmax', ['logits'], ['probabilities']
        ),
    ]
    element = getattr(onnx.TensorProto, dtype.upper())
    shape, classes = ['batch', size, size, channels], ['batch', outputs]
    float_ = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        'tiny',
        [helper.make_tensor_value_info('image', element, shape)],
        [helper.make_tensor_value_info('probabilities', float_, classes)],
        [onnx.numpy_helper.from_array(a, name) for name, a in constants.items()],
    )
    opsets = [helper.make_opsetid('', 17)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    properties = {
        'labels': json.dumps(labels),
        'image_size': size,
        'channels': channels,
        'resize': 'stretch',
        'crop_fraction': 1.0,
        'interpolation': 'bilinear',
        'mean': json.dumps([0.5] * channels),
        'std': json.dumps([1.0] * channels),
        'multi_label': json.dumps(multi_label),
        'variant': 'tiny',
    } | metadata
    properties = {key: str(v) for key, v in properties.items() if v is not None}
    helper.set_model_props(made, properties)
    onnx.checker.check_model(made)
    pathlib.Path(path).write_bytes(made.SerializeToString())
    return str(path)


def probabilities(path, image):
    """The output of onnxruntime, `[classes]`, for uint8 `[S, S, C]`."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    return session.run(['probabilities'], {'image': image[None]})[0][0]

"""Explanations beside pytorch-grad-cam and captum, on a network with the same weights.

`make test-slow` runs them, with the peers.
"""

import numpy as np
import pytest

from flax_densenet import load_trained
from flax_densenet.inference import explain
from helpers import torch_networks
from helpers.marks import exhaustive_after

torch = pytest.importorskip('torch')
CLASSES = [0, 3, 6]


class Whole(torch.nn.Module):
    """torchvision's DenseNet with its last ReLU as a module that can be hooked."""

    def __init__(self, model):
        super().__init__()
        self.features, self.relu = model.features, torch.nn.ReLU()
        self.pool = torch.nn.AdaptiveAvgPool2d(1)
        self.flatten, self.classifier = torch.nn.Flatten(), model.classifier

    def forward(self, x):
        x = self.pool(self.relu(self.features(x)))
        return self.classifier(self.flatten(x))


@pytest.fixture(scope='module')
def case(tmp_path_factory):
    """Ours, torch's, images as pixels and as torch's normalized tensor.

    Logits are of some size, as pytorch-grad-cam adds 1e-6 to squared gradients.
    """
    torchvision = torch_networks.import_torchvision()
    pytest.importorskip('pytorch_grad_cam')
    pytest.importorskip('captum')
    model = torch_networks.small(torchvision, num_classes=7)
    with torch.no_grad():
        model.classifier.weight.mul_(3000)
    path = tmp_path_factory.mktemp('explain') / 'x.pth'
    torch.save(model.state_dict(), path)
    data = {'image_size': (48, 64), 'mean': (0.5, 0.4, 0.3), 'std': (0.2, 0.25, 0.3)}
    ours = load_trained(path, batch_size=4, data=data)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3), np.uint8)
    mean, std = (np.array(data[name], np.float32) for name in ('mean', 'std'))
    images = (pixels / np.float32(255) - mean) / std
    images = torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2)
    return ours, Whole(model).eval(), pixels, images.contiguous()


def maps_of_grad_cam_package(kind, model, layer, images):
    """Unscaled, of the size of the layer."""
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    targets = [ClassifierOutputTarget(n) for n in CLASSES]
    with kind(model=model, target_layers=[layer]) as cam:
        cam(images, targets)
        kept = cam.activations_and_grads
        activations, gradients = (
            parts[0].cpu().numpy() for parts in (kept.activations, kept.gradients)
        )
        maps = cam.get_cam_image(images, layer, targets, activations, gradients, False)
    return np.maximum(maps, 0)


def assert_same(found, expected, tolerance=1e-4):
    assert found.shape == expected.shape and (expected.max((1, 2)) > 0).all()
    # A map of its own for each image, so that the comparison has teeth.
    assert np.abs(expected[0] - expected[1]).max() > 1e-2 * expected.max()
    assert np.abs(found - expected).max() < tolerance * expected.max()


@pytest.mark.parametrize(
    'method, layer, size',
    [
        ('gradcam', 'features', (6, 8)),
        ('gradcam++', 'relu', (6, 8)),
        ('hirescam', 'relu', (6, 8)),
        ('hirescam', 'features', (6, 8)),
        ('layercam', 'features.transition1.relu', (12, 16)),
    ],
)
def test_maps_of_layers(method, layer, size, case):
    import pytorch_grad_cam

    ours, model, pixels, images = case
    kinds = {
        'gradcam': pytorch_grad_cam.GradCAM,
        'gradcam++': pytorch_grad_cam.GradCAMPlusPlus,
        'hirescam': pytorch_grad_cam.HiResCAM,
        'layercam': pytorch_grad_cam.LayerCAM,
    }
    hooked = model.get_submodule(layer)
    expected = maps_of_grad_cam_package(kinds[method], model, hooked, images)
    found = ours.cams(pixels, CLASSES, explain.make(method))
    assert found.shape[1:] == size
    assert_same(found, expected)


def test_grad_cam_beside_captum(case):
    from captum.attr import LayerGradCam

    ours, model, pixels, images = case
    peer = LayerGradCam(model, model.features)
    expected = peer.attribute(images, CLASSES, relu_attributions=True)
    assert_same(ours.cams(pixels, CLASSES), expected[:, 0].detach().numpy())


@pytest.mark.parametrize('patches', exhaustive_after(1, [7, 3]))
def test_occlusion(patches, case):
    from captum.attr import Occlusion

    ours, model, pixels, images = case
    side = -(-48 // patches)
    expected = Occlusion(model).attribute(
        images,
        sliding_window_shapes=(3, side, side),
        strides=(3, max(1, side // 2), max(1, side // 2)),
        target=CLASSES,
        baselines=0,
        perturbations_per_eval=16,
    )
    options = explain.make('occlusion', patches=patches)
    found = [
        ours.perturbations.occlusion(image, chosen, options)
        for image, chosen in zip(pixels, CLASSES, strict=True)
    ]
    expected = expected[:, 0].detach().numpy()
    assert expected.min() < 0
    assert_same(np.stack(found), expected)
    found = ours.cams(pixels, CLASSES, options)
    assert_same(found, np.maximum(expected, 0))


@pytest.mark.parametrize('steps', exhaustive_after(1, [4, 32]))
def test_integrated_gradients(steps, case):
    from captum.attr import IntegratedGradients

    ours, model, pixels, images = case
    expected = IntegratedGradients(model).attribute(
        images, target=CLASSES, n_steps=steps, internal_batch_size=8
    )
    expected = expected.sum(1).detach().numpy()
    options = explain.make('integrated_gradients', steps=steps)
    found = [
        ours.perturbations.integrate(image, chosen, options)
        for image, chosen in zip(pixels, CLASSES, strict=True)
    ]
    assert_same(np.stack(found), expected, 1e-3)

"""Augmentations beside torchvision v2's: `make test-slow` has them.

On photographs of hymenoptera where they are at hand, else on made images.
"""

import importlib.util

import jax
import numpy as np
import pytest
from PIL import Image

from flax_densenet.data import images as images_lib
from flax_densenet.data.augment import color, geometry, mixing, policies
from helpers import lazy
from helpers.paths import SHARED

torch = pytest.importorskip('torch')
stats = lazy.module('scipy.stats')


@pytest.fixture(scope='module')
def v2():
    if importlib.util.find_spec('torchvision') is None:
        pytest.skip('torchvision is not installed')
    from benchmarks import torch_models

    torch_models.import_torchvision()
    from torchvision.transforms import v2

    return v2


def _made(seed):
    """Waves of all colors with some noise."""
    y, x = np.mgrid[:90, :120] / 12
    rng = np.random.default_rng(seed)
    bands = [np.sin(x * rng.uniform() + y * rng.uniform() + n) for n in range(3)]
    pixels = 110 + 90 * np.stack(bands, -1) + rng.normal(0, 8, (90, 120, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


@pytest.fixture(scope='module', params=['photographs', 'made', 'gray'])
def pictures(request):
    folder = SHARED / 'data' / 'hymenoptera'
    if request.param == 'made':
        return [_made(seed) for seed in range(3)]
    if not folder.exists():
        pytest.skip('data/hymenoptera is not here (FLAX_DENSENET_SHARED)')
    paths = sorted(folder.rglob('*.jpg'))[::80]
    shape = images_lib.Preparation(160, channels=1 if request.param == 'gray' else 3)
    return [
        geometry.as_picture(images_lib.load_image(str(path), shape)) for path in paths
    ]


def array(picture):
    return np.asarray(picture).astype(int)


def assert_same(ours, theirs, picture):
    np.testing.assert_array_equal(array(ours), array(theirs))
    assert ours.mode == picture.mode


@pytest.mark.parametrize('factor', [0.0, 0.6, 1.0, 1.7])
@pytest.mark.parametrize('name', ['brightness', 'contrast', 'saturation'])
def test_colors(v2, pictures, name, factor):
    ours = getattr(color, f'adjust_{name}')
    theirs = getattr(v2.functional, f'adjust_{name}')
    for picture in pictures:
        assert_same(ours(picture, factor), theirs(picture, factor), picture)
        if factor in (0.6, 1.7) and not (name == 'saturation' and picture.mode == 'L'):
            assert (array(ours(picture, factor)) != array(picture)).any()


@pytest.mark.parametrize('shift', [-0.5, -0.1, 0.0, 0.03, 0.37])
def test_hue(v2, pictures, shift):
    """As on tensors; on Pillow images theirs rounds hue and saturation to 8 bits."""
    for picture in pictures:
        ours = array(color.adjust_hue(picture, shift))
        if picture.mode == 'L':
            np.testing.assert_array_equal(ours, array(picture))
            continue
        tensor = v2.functional.pil_to_tensor(picture)
        theirs = v2.functional.adjust_hue(tensor, shift).permute(1, 2, 0).numpy()
        assert np.abs(ours - theirs).max() <= 1
        rounded = array(v2.functional.adjust_hue(picture, shift))
        assert np.abs(ours - rounded).max() <= 12
        assert np.abs(ours - rounded).mean() < 1.5
        if abs(shift) > 0.01:
            assert np.abs(ours - array(picture)).mean() > 0.3


NAMES = {
    'saturation': 'Color',
    'autocontrast': 'AutoContrast',
    'shear_x': 'ShearX',
    'shear_y': 'ShearY',
    'translate_x': 'TranslateX',
    'translate_y': 'TranslateY',
}


@pytest.mark.parametrize('wide', [False, True])
@pytest.mark.parametrize('name', policies.OPERATIONS)
def test_operations_of_the_policies(v2, pictures, name, wide):
    """Each at several strengths, these too from torchvision's own tables."""
    transform = v2.TrivialAugmentWide() if wide else v2.RandAugment()
    their_name = NAMES.get(name, name.capitalize())
    make_magnitudes, signed = transform._AUGMENTATION_SPACE[their_name]
    operation = policies.OPERATIONS[name]
    assert signed == operation.signed
    assert len(policies.OPERATIONS) == len(transform._AUGMENTATION_SPACE)
    for picture in pictures:
        magnitudes = make_magnitudes(31, picture.height, picture.width)
        for place in (0, 4, 9, 17, 30):
            theirs = 0.0 if magnitudes is None else float(magnitudes[place])
            amount = theirs * (255 if name == 'solarize' else 1)
            amount = int(amount) if name == 'posterize' else amount
            found = operation.amount(place / 30, picture, wide)
            assert found == pytest.approx(amount, rel=1e-6, abs=1e-6)
            for sign in (1, -1) if signed else (1,):
                assert_same(
                    operation.function(picture, sign * amount),
                    transform._apply_image_or_video_transform(
                        picture, their_name, sign * theirs, 'nearest', transform._fill
                    ),
                    picture,
                )


def test_randaugment_as_a_whole(v2):
    """Of many draws the same share of each brightness comes out."""
    picture, policy = _made(0), policies.parse('randaugment')
    torch.manual_seed(0)
    theirs = [v2.RandAugment()(picture) for _ in range(800)]
    ours = [
        policies.apply(picture, np.random.default_rng(seed), policy)
        for seed in range(800)
    ]
    for measure in (np.mean, np.std):
        found = [[measure(array(image)) for image in group] for group in (ours, theirs)]
        assert stats.ks_2samp(*found).pvalue > 1e-3


def test_jitter_as_a_whole(v2):
    picture = _made(0)
    torch.manual_seed(0)
    transform = v2.ColorJitter(0.4, 0.4, 0.4, 0.1)
    strengths = color.parse((0.4, 0.4, 0.4, 0.1))
    theirs = [transform(picture) for _ in range(500)]
    ours = [
        color.jitter(picture, np.random.default_rng(seed), strengths)
        for seed in range(500)
    ]
    for measure in (np.mean, np.std, lambda x: x[..., 0].mean() - x[..., 2].mean()):
        found = [[measure(array(image)) for image in group] for group in (ours, theirs)]
        assert stats.ks_2samp(*found).pvalue > 1e-3


def test_crops_have_the_same_distribution(v2):
    torch.manual_seed(0)
    blank = torch.zeros(3, 150, 200)
    transform = v2.RandomResizedCrop(8)
    theirs = [transform.make_params([blank]) for _ in range(2000)]
    names = ('top', 'left', 'height', 'width')
    theirs = np.array([[part[name] for name in names] for part in theirs])
    ours = []
    for seed in range(2000):
        left, top, right, bottom = geometry.crop_part(
            (200, 150), np.random.default_rng(seed)
        )
        ours.append((top, left, bottom - top, right - left))
    ours = np.array(ours)
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3


@pytest.mark.parametrize(('height', 'width'), [(32, 32), (64, 40)])
def test_erased_boxes_have_the_same_distribution(v2, height, width):
    torch.manual_seed(0)
    transform, blank = v2.RandomErasing(p=1), torch.zeros(3, height, width)
    theirs = [transform.make_params([blank]) for _ in range(2000)]
    theirs = np.array([[box[name] for name in 'ijhw'] for box in theirs])
    numbers = jax.random.uniform(jax.random.key(0), (2000, mixing._NUMBERS))
    top, left, bottom, right = np.asarray(
        mixing.draw_boxes(numbers, height, width, 1.0)
    ).T
    ours = np.stack([top, left, bottom - top, right - left], -1)
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    areas = [(boxes[:, 2] * boxes[:, 3]) for boxes in (ours, theirs)]
    assert stats.ks_2samp(*areas).pvalue > 1e-3
    # A share of another size would be seen.
    assert stats.ks_2samp(1.1 * areas[0], areas[1]).pvalue < 1e-3
    half = np.asarray(mixing.draw_boxes(numbers, height, width, 0.5))
    assert abs((half[:, 2] > half[:, 0]).mean() - 0.5) < 0.05


LABELS = np.arange(6, dtype=np.int32) % 3


def batch_of(pictures):
    pixels = [np.asarray(picture.resize((48, 32))) for picture in pictures]
    pixels = [pixel.reshape(32, 48, -1) for pixel in pixels]
    return np.stack((pixels * 6)[:6])


def theirs_by(transform, params, pixels, partners):
    """torchvision's images and labels, with its `roll(1)` turned into our partners."""
    found = []
    for row, partner in enumerate(partners):
        # Of two images the first one is rolled into the second.
        pair = torch.from_numpy(pixels[[partner, row]]).permute(0, 3, 1, 2).float()
        labels = torch.from_numpy(LABELS[[partner, row]]).long()
        transform.make_params = lambda _: params
        images, soft = transform(pair, labels)
        found.append((images[1].permute(1, 2, 0).numpy(), soft[1].numpy()))
    return map(np.stack, zip(*found, strict=True))


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('kind', ['mixup', 'cutmix'])
def test_pairs(v2, pictures, kind, seed):
    """The same images and soft labels, given the same share or box."""
    pixels, key = batch_of(pictures), jax.random.key(seed)
    mean = (0.5,) * pixels.shape[-1]
    fields = mixing.Mixing(**{kind: 1.0})
    ours = jax.device_get(
        jax.jit(lambda x, key: mixing.mix(x, key, fields, mean=mean))(pixels, key)
    )
    if kind == 'mixup':
        transform = v2.MixUp(num_classes=3)
        params = {'lam': float(ours.weights[0])}
    else:
        transform = v2.CutMix(num_classes=3)
        numbers = jax.random.uniform(jax.random.fold_in(key, mixing._KEY), (5,))
        share = mixing._from_beta(numbers[1], 1.0)
        box = mixing.cut_box(numbers[2:4], share, 32, 48)
        top, left, bottom, right = (int(x) for x in box)
        area = (bottom - top) * (right - left) / (32 * 48)
        params = {'box': (left, top, right, bottom), 'lam_adjusted': 1 - area}
    theirs, soft = theirs_by(transform, params, pixels, ours.partners)
    np.testing.assert_allclose(ours.images, theirs, rtol=1e-5, atol=1e-4)
    share, eye = ours.weights[:, None], np.eye(3)
    found = share * eye[LABELS] + (1 - share) * eye[LABELS[ours.partners]]
    np.testing.assert_allclose(found, soft, atol=1e-6)


def test_boxes_of_cutmix_have_the_same_distribution(v2):
    torch.manual_seed(0)
    transform, blank = v2.CutMix(num_classes=3), torch.zeros(2, 3, 32, 48)
    theirs = [transform.make_params([blank])['box'] for _ in range(1500)]
    theirs = np.array(theirs)[:, [1, 0, 3, 2]]
    numbers = jax.random.uniform(jax.random.key(1), (1500, 3))
    shares = mixing._from_beta(numbers[:, 0], 1.0)
    cut = jax.vmap(lambda center, share: mixing.cut_box(center, share, 32, 48))
    ours = np.asarray(cut(numbers[:, 1:], shares))
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3

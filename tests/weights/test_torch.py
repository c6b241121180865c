"""Beside the real torchvision, timm and torchxrayvision: `make test-slow` has them."""

import argparse
import resource
import time

import jax
import numpy as np
import pytest

from flax_densenet import load_trained
from flax_densenet.errors import UserError
from flax_densenet.export import formats
from flax_densenet.inference import predictor
from flax_densenet.weights import operating_points, trained, weight_file
from helpers import torch_networks
from helpers.marks import exhaustive_after
from helpers.torch_networks import shake, small

torch = pytest.importorskip('torch')


@pytest.fixture(scope='module')
def torchvision():
    return torch_networks.import_torchvision()


def assert_same_function(model, found, size=(64, 64), channels=3):
    """Features and logits equal to 1e-4 of their spread, or better."""
    images = np.random.default_rng(1).standard_normal((2, *size, channels))
    images = images.astype(np.float32)
    with torch.inference_mode():
        x = torch.from_numpy(images).permute(0, 3, 1, 2)
        features = model.features(x).permute(0, 2, 3, 1).numpy()
        logits = model(x).numpy()
    run = jax.jit(found.module.apply, static_argnames='method')
    ours = run(found.variables, images, method='features')
    assert np.abs(ours - features).max() < 1e-4 * features.std()
    ours = run(found.variables, images)
    assert np.abs(ours - logits).max() < 1e-4 * logits.std()


@pytest.mark.parametrize('form', ['zip', 'legacy', 'whole', 'nested', 'half'])
def test_forms_of_files(form, torchvision, tmp_path):
    model, path = small(torchvision), str(tmp_path / 'x.pth')
    state = model.state_dict()
    if form == 'whole':
        torch.save(model, path)
    elif form == 'nested':  # as timm's training saves it
        checkpoint = {
            'epoch': 3,
            'arch': 'densenet121',
            'args': argparse.Namespace(lr=0.1, model='densenet121'),
            'metric': np.float64(0.5),
            'optimizer': torch.optim.SGD(model.parameters(), 0.1).state_dict(),
            'state_dict': {k: torch.zeros_like(v) for k, v in state.items()},
            'state_dict_ema': {f'module.{k}': v for k, v in state.items()},
        }
        torch.save(checkpoint, path)
    elif form == 'half':
        torch.save({k: v.half() if v.is_floating_point() else v
                    for k, v in state.items()}, path)  # fmt: skip
        model = small(torchvision)
        model.load_state_dict(torch.load(path))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == 'zip')
    found = weight_file.load(path)
    assert (found.family, found.num_classes) == ('torchvision', 1000)
    assert_same_function(model, found)


def test_views_and_strides(torchvision, tmp_path):
    """Tensors that share a storage, or lie in it in another order."""
    model = small(torchvision).to(memory_format=torch.channels_last)
    state = model.state_dict()
    both = torch.cat([state['features.norm5.weight'], state['features.norm5.bias']])
    half = len(both) // 2
    state['features.norm5.weight'], state['features.norm5.bias'] = both.split(half)
    torch.save(state, tmp_path / 'x.pth')
    assert_same_function(model, weight_file.load(str(tmp_path / 'x.pth')))


def test_a_class_of_ones_own_is_refused(tmp_path):
    class Mine(torch.nn.Module):
        pass

    Mine.__qualname__ = 'Mine'
    globals()['Mine'] = Mine
    torch.save(Mine(), tmp_path / 'x.pth')
    with pytest.raises(UserError, match=r'needs .*Mine.*torch.save\(model.state_dict'):
        weight_file.load(str(tmp_path / 'x.pth'))


def test_cut_files(torchvision, tmp_path):
    for number, new in enumerate([True, False]):
        path = tmp_path / f'{number}.pth'
        state = small(torchvision).state_dict()
        torch.save(state, path, _use_new_zipfile_serialization=new)
        whole = path.read_bytes()
        for share in (0.1, 0.5, 0.9, 0.999):
            path.write_bytes(whole[: int(share * len(whole))])
            with pytest.raises(UserError, match='not a valid torch file'):
                weight_file.load(str(path))


def as_trained(module, variables):
    fields = dict(variant='densenet121', growth_rate=8, block_sizes=(2, 2))
    metadata = {
        'model': fields | {'stem_features': 16},
        'class_names': [str(n) for n in range(module.num_classes)],
        'image_size': 224,
        'mean': [0.5] * 3,
        'std': [0.5] * 3,
        'data': {'mean': [0.5] * 3},
    }
    return trained.Trained(module, variables, metadata, {}, 0, None)


@pytest.mark.parametrize('form', ['torch', 'safetensors'])
def test_export(form, torchvision, tmp_path):
    """What torchvision loads strictly computes the same, another epsilon included."""
    first = small(torchvision, num_classes=7)
    torch.save(first.state_dict(), tmp_path / 'a.pth')
    found = weight_file.load(str(tmp_path / 'a.pth'))
    module = found.module.clone(epsilon=1.001e-5)
    path = str(tmp_path / {'torch': 'b.pth', 'safetensors': 'b.safetensors'}[form])
    formats.save(path, as_trained(module, found.variables), form)
    if form == 'torch':
        state = torch.load(path, weights_only=True)
    else:
        state = pytest.importorskip('safetensors.torch').load_file(path)
    other = small(torchvision, num_classes=7)
    other.load_state_dict(state, strict=True)
    other.eval()
    images = np.random.default_rng(1).standard_normal((2, 61, 47, 3)).astype('f4')
    ours = jax.jit(module.apply)(found.variables, images)
    with torch.inference_mode():
        theirs = other(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    assert np.abs(ours - theirs).max() < 1e-4 * theirs.std()
    assert jax.tree.all(
        jax.tree.map(
            np.array_equal,
            weight_file.load(path).variables['params'],
            found.variables['params'],
        )
    )


def torch_cams(model, images, classes):
    """Grad-CAM as torch's users write it: a hook at `features`, then autograd."""
    kept = []

    def keep(module, arguments, output):
        output.retain_grad()
        kept.append(output)
        return output.clone()  # torchvision's ReLU behind it works in place

    handle = model.features.register_forward_hook(keep)
    logits = model(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous())
    handle.remove()
    chosen = logits.argmax(1) if classes is None else torch.tensor(classes)
    logits.gather(1, chosen[:, None]).sum().backward()
    (maps,) = kept
    weights = maps.grad.mean((2, 3), keepdim=True)
    return torch.relu((weights * maps).sum(1)).detach().numpy()


@pytest.mark.parametrize('classes', [None, [0, 3, 6]])
def test_grad_cam(classes, torchvision, tmp_path):
    """From the file of weights and uint8 images on."""
    model = small(torchvision, num_classes=7)
    torch.save(model.state_dict(), tmp_path / 'x.pth')
    ours = load_trained(tmp_path / 'x.pth', batch_size=4)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), np.uint8)
    mean = np.array(weight_file.IMAGENET_MEAN, np.float32)
    std = np.array(weight_file.IMAGENET_STD, np.float32)
    images = (pixels / np.float32(255) - mean) / std
    expected = torch_cams(model, images.astype(np.float32), classes)
    assert expected.shape == (3, 28, 28) and (expected.max((1, 2)) > 0).all()
    found = ours.cams(pixels, classes)
    assert np.abs(found - expected).max() < 1e-4 * expected.max()
    # Of another class it is another map, so that the comparison has teeth.
    other = torch_cams(model, images.astype(np.float32), [1, 1, 1])
    assert np.abs(other - expected).max() > 1e-2 * expected.max()


@pytest.mark.slow
@pytest.mark.parametrize(
    'depth',
    exhaustive_after(0, [121, 161, 169, 201]),
)
def test_full_size(depth, torchvision, tmp_path):
    """In, then out to torchvision and timm, bit for bit."""
    name = f'densenet{depth}'
    torch.manual_seed(0)
    model = shake(getattr(torchvision.models, name)(weights=None))
    path = str(tmp_path / 'x.pth')
    torch.save(model.state_dict(), path)
    before = peak_bytes()
    found = weight_file.load(path)
    grown = peak_bytes() - before
    assert found.fields == {'variant': name}
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(found.variables))
    if name == 'densenet121':
        assert grown < 2.2 * size, grown / size
        taken = processor_time(lambda: weight_file.load(path))
        make = getattr(torchvision.models, name)
        reference = processor_time(lambda: make(weights=None))
        assert taken < 5 * reference, (taken, reference)
    assert_same_function(model, found, size=(97, 131))
    arrays = formats.torch_arrays(found.module, found.variables)
    tensors = {key: torch.from_numpy(np.array(array)) for key, array in arrays.items()}
    state = model.state_dict()
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[key], state[key]) for key in state)
    getattr(torchvision.models, name)(weights=None).load_state_dict(tensors)
    timm = pytest.importorskip('timm')
    other = timm.create_model(name, pretrained=False)
    other.load_state_dict(tensors, strict=True)
    other.eval()
    with torch.inference_mode():
        x = torch.randn(1, 3, 64, 64)
        assert torch.allclose(other(x), model(x), atol=1e-4)


def processor_time(call):
    """In seconds; other programs hardly change it."""
    started = time.process_time()
    call()
    return time.process_time() - started


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.slow
@pytest.mark.parametrize('whole', exhaustive_after(1, [True, False]))
def test_chest_x_rays(whole, torchvision, tmp_path):
    xrv = pytest.importorskip('torchxrayvision')
    torch.manual_seed(0)
    size = {}  # a DenseNet-121
    if whole:
        size = {'growth_rate': 12, 'block_config': (2, 3, 2, 2)}
        size |= {'num_init_features': 24}
    model = xrv.models.DenseNet(weights=None, in_channels=1, num_classes=18, **size)
    model = shake(model)
    pixels = np.random.default_rng(1).integers(0, 256, (2, 224, 224, 1), np.uint8)
    images = xrv.datasets.normalize(pixels.astype(np.float32), 255)
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    with torch.inference_mode():
        logits = model(images)
        # Sigmoids of both sides of the points, not all 0 and 1.
        for parameter in model.classifier.parameters():
            parameter.mul_(2 / logits.std())
        logits = model(images).numpy()
        raw_expected = torch.sigmoid(model(images)).numpy()
    model.op_threshs = torch.linspace(0.05, 0.95, 18)
    model.op_threshs[3] = torch.nan  # a finding that the network does not know
    model.pathologies = [f'finding {n}' for n in range(18)]
    path = str(tmp_path / 'x.pt')
    torch.save(model if whole else model.state_dict(), path)
    found = weight_file.load(path)
    assert found.family == 'torchxrayvision'
    assert found.class_names == (tuple(model.pathologies) if whole else None)
    scores = predictor.load_trained(path).compute(pixels)[0]
    raw = predictor.load_trained(path, outputs='sigmoid').compute(pixels)[0]
    with torch.inference_mode():
        assert np.abs(scores - model(images).numpy()).max() < 1e-4
    points = model.op_threshs.numpy()
    assert ((raw > 0.01) & (raw < points)).any()
    assert ((raw > points) & (raw < 0.99)).any()
    assert np.abs(raw - raw_expected).max() < 1e-5
    assert np.abs(scores - raw).max() > 0.1 and (scores[:, 3] == 0.5).all()
    logits_only = predictor.load_trained(path, outputs='none').compute(pixels)[0]
    assert np.abs(logits_only - logits).max() < 1e-4 * logits.std()


@pytest.mark.slow
def test_operating_points_of_published_files():
    xrv = pytest.importorskip('torchxrayvision')
    count = 0
    for known in {id(one): one for one in xrv.models.model_urls.values()}.values():
        if 'densenet' not in known['weights_url']:
            continue
        points = operating_points.of_file(known['weights_url'])
        theirs = torch.tensor(known['op_threshs'])
        sigmoids = torch.rand(50, 18)
        expected = xrv.models.op_norm(sigmoids, theirs).numpy()
        ours = operating_points.scale(sigmoids.numpy(), points)
        assert np.abs(ours - expected).max() < 1e-5
        count += 1
    assert count == 7


@pytest.mark.slow
def test_a_161_is_no_121(torchvision, tmp_path):
    from flax_densenet.models import factory
    from flax_densenet.settings import ModelSettings
    from flax_densenet.weights import transfer

    model = torchvision.models.densenet161(weights=None)
    torch.save(model.state_dict(), tmp_path / 'x.pth')
    found = weight_file.load(str(tmp_path / 'x.pth'))
    with pytest.raises(UserError, match='holds a densenet161 with growth_rate=48'):
        transfer.resolve_model(ModelSettings(variant='densenet121'), found)
    settled = transfer.resolve_model(ModelSettings(), found)
    assert factory.from_settings(settled, num_classes=1000) == found.module


@pytest.mark.slow
def test_another_network(torchvision, tmp_path):
    model = torchvision.models.resnet18(weights=None)
    torch.save(model.state_dict(), tmp_path / 'x.pth')
    with pytest.raises(UserError, match='holds no DenseNet: it has .* arrays'):
        weight_file.load(str(tmp_path / 'x.pth'))

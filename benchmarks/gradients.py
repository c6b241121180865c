"""Errors of the gradients of one training step, compared with PyTorch's.

  python -m benchmarks.gradients [--size=64] [--batch=8]

DenseNet-121, with the same weights, images and labels for both. The reference is
PyTorch in float64. The error of a gradient is the norm of the difference divided by the
norm of the reference. It prints a table with the median and the worst tensor of each
kind. The last line is a JSON object with the fraction of tensors with a larger error in
ours than in PyTorch, and the median ratio of the errors.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
PEERS = str(ROOT / '.venv-peers' / 'bin' / 'python')
CLASSES = 10


def torch_gradients(path):
    """Writes PyTorch's gradients in float64, float32 and under autocast to a file."""
    import torch

    from benchmarks import torch_models

    torch.set_num_threads(2)
    arrays = dict(np.load(path))
    images = torch.tensor(arrays.pop('images')).permute(0, 3, 1, 2)
    labels = torch.tensor(arrays.pop('labels')).long()
    state = {name: torch.tensor(array) for name, array in arrays.items()}
    densenet = torch_models.import_torchvision().models.densenet121
    found = {}
    for kind, dtype in (
        ('float64', torch.float64),
        ('float32', torch.float32),
        ('bfloat16', torch.float32),
    ):
        model = densenet(weights=None, num_classes=CLASSES)
        missing = model.load_state_dict(state, strict=False).missing_keys
        if any('running' not in name and 'tracked' not in name for name in missing):
            raise ValueError(f'no weights for {missing[0]}')
        model = model.to(dtype=dtype, memory_format=torch.channels_last)
        with torch.autocast('cpu', torch.bfloat16, enabled=kind == 'bfloat16'):
            logits = model(images.to(dtype, memory_format=torch.channels_last))
            loss = torch.nn.functional.cross_entropy(logits.to(dtype), labels)
        loss.backward()
        for name, parameter in model.named_parameters():
            found[f'{kind}/{name}'] = parameter.grad.double().numpy()
    np.savez(path, **found)


def _torch_name(path):
    """The name of a parameter in torchvision, such as `features.norm0.weight`."""
    *modules, leaf = (key.key for key in path)
    front = [] if modules[0] == 'classifier' else ['features']
    return '.'.join([*front, *modules, 'bias' if leaf == 'bias' else 'weight'])


def _torch_layout(array):
    return array.transpose({4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[array.ndim])


def _flat(tree):
    import jax

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_torch_name(path): _torch_layout(np.asarray(leaf)) for path, leaf in leaves}


def our_gradients(variables, images, labels, dtype):
    import jax
    import optax

    from flax_densenet import create_model

    module = create_model('densenet121', num_classes=CLASSES, dtype=dtype)

    @jax.jit
    @jax.grad
    def gradients(params):
        given = {**variables, 'params': params}
        logits, _ = module.apply(given, images, train=True, mutable=['batch_stats'])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    return _flat(gradients(variables['params']))


def kind_of(name, ndim):
    if 'classifier' in name:
        return 'classifier'
    if ndim == 1:
        return 'norm, scale' if name.endswith('weight') else 'norm, bias'
    if 'conv0' in name:
        return 'stem, 7x7'
    if 'transition' in name:
        return 'transition, 1x1'
    return 'layer, 1x1' if 'conv1' in name else 'layer, 3x3'


def errors_of(found, exact):
    """For each tensor: norm of the difference / norm of the exact gradient."""
    return {
        name: float(np.linalg.norm(found[name] - value) / np.linalg.norm(value))
        for name, value in exact.items()
    }


def make_table(ours, theirs, kinds):
    """Lines of a table: a row for each kind of tensor and one for all."""
    groups: dict[str, list[str]] = {}
    for name in ours:
        groups.setdefault(kinds[name], []).append(name)
    groups['all'] = list(ours)
    lines = [
        '| | tensors | ours: median, worst | PyTorch: median, worst | ours / PyTorch |',
        '|---|---|---|---|---|',
    ]
    for kind, names in groups.items():
        cells = [kind, str(len(names))]
        for errors in (ours, theirs):
            values = [errors[name] for name in names]
            cells.append(f'{np.median(values):.2g}, {max(values):.2g}')
        ratios = [ours[name] / theirs[name] for name in names]
        cells.append(
            f'{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})'
        )
        lines.append(f'| {" | ".join(cells)} |')
    return lines


def _shake(params, rng):
    """Moves norms away from 1 and 0, where some gradients would be exactly 0."""
    import jax

    def shake(leaf):
        noise = 0.2 * rng.standard_normal(leaf.shape) * (leaf.ndim == 1)
        return (leaf + noise).astype(np.float32)

    return jax.tree.map(shake, params)


def main(size, batch):
    from flax_densenet import create_model, init_variables

    variables = init_variables(create_model('densenet121', num_classes=CLASSES), 0)
    rng = np.random.default_rng(0)
    variables = {**variables, 'params': _shake(variables['params'], rng)}
    # Colored patches with noise, so that images differ in more than noise.
    patches = rng.standard_normal((batch, 8, 8, 3)).repeat(size // 8, 1)
    images = patches.repeat(size // 8, 2)
    images = (images + 0.3 * rng.standard_normal(images.shape)).astype(np.float32)
    labels = rng.integers(0, CLASSES, batch)
    with tempfile.TemporaryDirectory() as folder:
        path = f'{folder}/arrays.npz'
        np.savez(path, images=images, labels=labels, **_flat(variables['params']))
        command = [PEERS, '-m', 'benchmarks.gradients', '--torch', path]
        subprocess.run(command, check=True, cwd=ROOT)
        arrays = dict(np.load(path))

    def by_torch(dtype):
        pairs = ((key.partition('/'), value) for key, value in arrays.items())
        return {name: value for (kind, _, name), value in pairs if kind == dtype}

    exact, summary = by_torch('float64'), {}
    kinds = {name: kind_of(name, value.ndim) for name, value in exact.items()}
    for dtype in ('bfloat16', 'float32'):
        ours = errors_of(our_gradients(variables, images, labels, dtype), exact)
        theirs = errors_of(by_torch(dtype), exact)
        print(f'\n{dtype}\n', *make_table(ours, theirs, kinds), sep='\n')
        ratios = [ours[name] / theirs[name] for name in exact]
        summary[f'{dtype}_further_off'] = round(float(np.mean(np.array(ratios) > 1)), 3)
        summary[f'{dtype}_median_ratio'] = round(float(np.median(ratios)), 3)
    print(json.dumps(summary))


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--size', type=int, default=64)
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--torch', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.torch:
        torch_gradients(options.torch)
        sys.exit()
    main(options.size, options.batch)

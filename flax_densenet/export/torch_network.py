"""DenseNet and RDNet in PyTorch, from a state dict and the fields of the network.

torchvision and timm have classes for only some of our networks. These functions compute
all of them, to verify exported files.
"""

from typing import Any

from flax_densenet.weights import rdnet_names


def make(state: dict[str, Any], about: dict[str, Any]):
    """A function from normalized float32 images `[N, C, H, W]` to logits, as tensors.

    Args:
      state: `{key: tensor}` in any precision, with the keys of torchvision, or of timm
        for RDNet.
      about: the fields of the network, and its `family`.
    """
    import torch

    state = {name: tensor.float() for name, tensor in state.items()}
    network = _NETWORKS[about['family']](state, about)
    return torch.inference_mode()(network)


class _DenseNet:
    def __init__(self, state, about):
        self._state, self._about = state, about

    def __call__(self, x):
        from torch.nn import functional

        x = self._stem(x)
        last = len(self._about['block_sizes'])
        for number, size in enumerate(self._about['block_sizes'], start=1):
            for place in range(1, size + 1):
                x = self._layer(x, f'denseblock{number}.denselayer{place}')
            if number < last:
                x = self._norm_relu(x, f'transition{number}.norm')
                x = functional.avg_pool2d(self._conv(x, f'transition{number}.conv'), 2)
        x = self._pool(self._norm_relu(x, 'norm5', self._about['last_relu']))
        for number, _ in enumerate(self._about['hidden']):
            x = functional.relu(functional.linear(x, *self._linear(f'.{2 * number}')))
        place = f'.{2 * len(self._about["hidden"])}' if self._about['hidden'] else ''
        return functional.linear(x, *self._linear(place))

    def _linear(self, place):
        return [self._state[f'classifier{place}.{n}'] for n in ('weight', 'bias')]

    def _pool(self, x):
        import torch

        largest, mean = x.amax((2, 3)), x.mean((2, 3))
        found = {'mean': [mean], 'max': [largest], 'max_mean': [largest, mean]}
        return torch.cat(found[self._about['pooling']], 1)

    def _stem(self, x):
        from torch.nn import functional

        kind = self._about['stem']
        x = self._conv(x, 'conv0', 1 if kind == 'cifar' else 2)
        if kind == 'cifar':
            return x
        x = self._norm_relu(x, 'norm0')
        for number in (1, 2) if kind == 'deep' else ():
            x = self._norm_relu(self._conv(x, f'conv{number}'), f'norm{number}')
        if not self._about['blur_pool']:
            return functional.max_pool2d(x, 3, 2, 1)
        x = functional.max_pool2d(x, 3, 1, 1)
        row = x.new_tensor([1, 2, 1]) / 4
        blur = (row[:, None] * row).expand(x.shape[1], 1, 3, 3)
        x = functional.pad(x, (1, 1, 1, 1), mode='reflect')
        return functional.conv2d(x, blur, stride=2, groups=x.shape[1])

    def _layer(self, x, name):
        import torch

        y = self._conv(self._norm_relu(x, f'{name}.norm1'), f'{name}.conv1')
        if f'features.{name}.conv2.weight' in self._state:
            y = self._conv(self._norm_relu(y, f'{name}.norm2'), f'{name}.conv2')
        return torch.cat([x, y], 1)

    def _conv(self, x, name, stride=1):
        from torch.nn import functional

        weight = self._state[f'features.{name}.weight']
        return functional.conv2d(
            x, weight, stride=stride, padding=weight.shape[-1] // 2
        )

    def _norm_relu(self, x, name, relu=True):
        from torch.nn import functional

        mean, var, weight, bias = (
            self._state[f'features.{name}.{part}']
            for part in ('running_mean', 'running_var', 'weight', 'bias')
        )
        x = functional.batch_norm(x, mean, var, weight, bias, eps=1e-5)
        return functional.relu(x) if relu else x


class _RDNet:
    def __init__(self, state, about):
        self._state, self._about = state, about

    def __call__(self, x):
        import torch
        from torch.nn import functional

        x = self._conv(x, 'conv0', self._about['patch_size'])
        x = self._norm(x, 'norm0')
        for number, size in enumerate(self._about['block_sizes'], start=1):
            if number > 1:
                name = f'transition{number - 1}'
                halves = number - 1 in self._about['halvings']
                x = self._norm(x, f'{name}/norm')
                x = self._conv(x, f'{name}/conv', 2 if halves else 1)
            for place in range(1, size + 1):
                y = self._layer(x, f'denseblock{number}/denselayer{place}')
                x = torch.cat([x, y], 1)
        x = self._norm(x.mean((2, 3), keepdim=True), 'norm').flatten(1)
        return functional.linear(x, *self._of('classifier'))

    def _layer(self, x, name):
        from torch.nn import functional

        weight, bias = self._of(f'{name}/conv1')
        pad = weight.shape[-1] // 2
        y = functional.conv2d(x, weight, bias, padding=pad, groups=x.shape[1])
        y = functional.gelu(self._conv(self._norm(y, f'{name}/norm1'), f'{name}/conv2'))
        y = self._conv(y, f'{name}/conv3')
        if rdnet_names.torch_key(f'params/{name}/gate/kernel') in self._state:
            gate = self._conv(y.mean((2, 3), keepdim=True), f'{name}/gate')
            y = y * functional.hardsigmoid(gate)
        gamma = rdnet_names.torch_key(f'params/{name}/gamma')
        return y * self._state[gamma][:, None, None] if gamma in self._state else y

    def _of(self, name, leaf='kernel'):
        names = (f'params/{name}/{part}' for part in (leaf, 'bias'))
        return [self._state[rdnet_names.torch_key(one)] for one in names]

    def _conv(self, x, name, stride=1):
        from torch.nn import functional

        return functional.conv2d(x, *self._of(name), stride=stride)

    def _norm(self, x, name):
        from torch.nn import functional

        weight, bias = self._of(name, 'scale')
        y = x.permute(0, 2, 3, 1)
        y = functional.layer_norm(y, weight.shape, weight, bias, rdnet_names.EPSILON)
        return y.permute(0, 3, 1, 2)


_NETWORKS = {'densenet': _DenseNet, 'rdnet': _RDNet}  # by `Network.family`

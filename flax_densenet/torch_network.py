"""A DenseNet in torch from a state dict and the network's fields, in functions.

torchvision and timm have classes for the networks that they know; this computes any of
`model.DenseNet`, to verify what was exported.
"""

from typing import Any


def make(state: dict[str, Any], about: dict[str, Any]):
    """A function of float32 images `[N, C, H, W]` to logits, both of torch.

    Args:
      state: tensors by torchvision's keys, in any precision; of RDNet by timm's, whose
        class computes.
      about: `block_sizes`, `stem`, `blur_pool` of the network, its `variant` and
        `num_classes`.
    """
    import torch

    state = {name: tensor.float() for name, tensor in state.items()}
    if about['variant'].startswith('rdnet'):
        import timm

        network = timm.create_model(about['variant'], num_classes=about['num_classes'])
        network.load_state_dict(state, strict=True)
        network.eval()
    else:
        network = _Network(state, about)
    return torch.inference_mode()(network)


class _Network:
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
        x = self._norm_relu(x, 'norm5').mean((2, 3))
        weight, bias = (self._state[f'classifier.{n}'] for n in ('weight', 'bias'))
        return functional.linear(x, weight, bias)

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

    def _norm_relu(self, x, name):
        from torch.nn import functional

        mean, var, weight, bias = (
            self._state[f'features.{name}.{part}']
            for part in ('running_mean', 'running_var', 'weight', 'bias')
        )
        x = functional.batch_norm(x, mean, var, weight, bias, eps=1e-5)
        return functional.relu(x)

"""Imports run one way; every recipe is whole; nothing heavy is imported early."""

import ast
import importlib
import pathlib
import subprocess
import sys

import pytest
from conftest import ROOT

from configs import base
from flax_densenet import create_model, data, model, optimizers, rdnet, transfer

PACKAGE = ROOT / 'flax_densenet'
# module -> modules of the package that it may import.
EDGES = {
    '__init__': {'errors', 'model', 'predict'},
    'errors': set(),
    'augment': set(),
    'images': {'errors'},
    'sharding': {'errors'},
    'native_errors': set(),
    'cluster': {'errors', 'native_errors'},
    'agreement': {'sharding'},
    'checkpoint': {'errors'},
    'metadata': {'errors', 'checkpoint', 'images', 'views'},
    'faults': set(),
    'atomic': set(),
    'lock': {'errors'},
    'signals': set(),
    'tensorstore_json': set(),
    'saving': {'errors', 'atomic', 'checkpoint', 'cluster', 'history', 'sharding',
               'tensorstore_json'},
    'nonfinite': {'errors', 'atomic', 'cluster', 'data', 'setup', 'sharding', 'step'},
    'loop': {'agreement', 'averaging', 'board', 'checkpoint', 'cluster', 'nonfinite',
             'saving', 'setup', 'signals', 'state_shards', 'step'},
    'cpu_kernels': set(),
    'dense_block': {'errors', 'cpu_kernels'},
    'layers': {'dense_block'},
    'groups': {'errors'},
    'state_shards': {'sharding'},
    'depthwise': set(),
    'rdnet': {'errors', 'dense_block', 'depthwise', 'layers'},
    'rdnet_files': {'errors'},
    'model': {'errors', 'dense_block', 'groups', 'layers', 'rdnet'},
    'labels': {'errors'},
    'metrics': set(),
    'objective': {'errors', 'metrics'},
    'listing': {'errors', 'images'},
    'manifest': {'errors'},
    'record_files': set(),
    'packed': {'errors', 'manifest', 'record_files'},
    'tars': {'errors', 'images', 'listing'},
    'sources': {'errors', 'labels', 'listing', 'packed', 'tars'},
    'shards': {'errors', 'images', 'manifest', 'packed', 'sources'},
    'pack': {'errors', 'atomic', 'lock', 'manifest', 'packed', 'record_files', 'shards',
             'sources'},
    'hdf5': {'errors'},
    'keras_config': {'errors'},
    'keras_layers': set(),
    'keras_files': {'errors', 'hdf5', 'keras_config', 'keras_layers'},
    'balance': set(),
    'unread': {'errors'},
    'duplicates': {'errors'},
    'splits': {'errors', 'duplicates', 'packed', 'sources'},
    'data': {'errors', 'images', 'duplicates', 'sources', 'splits'},
    'colour': {'errors'},
    'policies': {'errors', 'colour'},
    'mixing': {'errors'},
    'sizes': {'errors', 'model'},
    'pipeline': {'errors', 'augment', 'balance', 'colour', 'data', 'policies',
                 'unread'},
    'samples': {'features', 'mixing', 'report', 'setup', 'step'},
    'phases': {'setup'},
    'pickles': set(),
    'torch_files': {'errors', 'pickles'},
    'timm_network': {'model', 'rdnet'},
    'timm_config': {'errors', 'checkpoint', 'images', 'metadata', 'model', 'rdnet',
                    'timm_network'},
    'weights': {'errors', 'checkpoint', 'keras_files', 'metadata', 'model',
                'rdnet_files', 'timm_config', 'torch_files'},
    'transfer': {'errors', 'weights'},
    'trained': {'errors', 'checkpoint', 'cluster', 'images', 'metadata', 'model',
                'sharding', 'views', 'weights'},
    'native_eval': {'cpu_kernels'},
    'folded': {'dense_block', 'layers', 'model', 'native_eval'},
    'compiled': {'explain', 'folded', 'sharding', 'trained', 'views'},
    'evaluate': {'errors', 'data', 'model', 'objective', 'pipeline', 'sharding',
                 'trained', 'unread', 'views'},
    'half': {'errors'},
    'stablehlo': {'errors', 'atomic', 'compiled', 'folded', 'half', 'model', 'trained'},
    'onnx_graph': {'errors', 'half'},
    'onnx_model': {'folded', 'model', 'onnx_graph', 'rdnet', 'trained'},
    'onnx_calibration': {'errors', 'model', 'onnx_model'},
    'onnx_int8': {'errors', 'model', 'onnx_calibration', 'onnx_graph', 'onnx_model'},
    'export': {'errors', 'evaluate', 'half', 'hub', 'keras_files', 'model',
               'onnx_graph', 'onnx_int8', 'onnx_model', 'rdnet_files', 'stablehlo',
               'weights'},
    'torch_network': {'rdnet_files'},
    'runtimes': {'torch_network', 'trained'},
    'verify': {'errors', 'evaluate', 'metrics', 'runtimes'},
    'sample_images': {'errors', 'evaluate', 'files', 'images', 'results'},
    'release': {'errors', 'card', 'evaluate', 'export', 'onnx_graph', 'onnx_int8',
                'sample_images', 'verify'},
    'card_facts': {'errors', 'evaluate', 'history', 'metrics', 'model', 'rdnet',
                   'results', 'timm_network', 'views', 'weights'},
    'card': {'errors', '__version__', 'atomic', 'card_facts', 'environment', 'evaluate',
             'render'},
    'hub': {'errors', 'card', 'evaluate', 'timm_config', 'weights'},
    'explain': {'model'},
    'environment': set(),
    'history': {'errors', 'checkpoint'},
    'render': {'errors', 'atomic'},
    'gallery': {'data', 'explain', 'predict', 'results'},
    'page': {'data', 'evaluate', 'gallery', 'history', 'metrics', 'predict', 'render',
             'report', 'results', 'sharding', 'views'},
    'compare': {'errors', 'checkpoint', 'history', 'page', 'render'},
    'results': {'errors', 'atomic', 'data', 'evaluate', 'metrics', 'sharding'},
    'answers': {'explain'},
    'predict': {'errors', 'answers', 'compiled', 'images', 'trained'},
    'files': {'errors', 'images'},
    'rows': {'answers', 'errors'},
    'feature_files': {'errors'},
    'shared_predictions': {'answers', 'cluster', 'predict'},
    'predictions': {'errors', 'answers', 'feature_files', 'predict', 'rows'},
    'batching': {'predict'},
    'guard': {'errors'},
    'web': {'errors', 'batching', 'explain', 'guard', 'images'},
    'serve': {'errors', 'web'},
    'report': {'atomic', 'checkpoint', 'evaluate', 'model'},
    'optimizers': {'errors', 'state_shards'},
    'averaging': {'errors'},
    'patience': {'checkpoint'},
    'views': {'errors'},
    'step': {'averaging', 'evaluate', 'mixing', 'model', 'objective', 'sharding',
             'state_shards'},
    'finetune': {'errors', 'model'},
    'features': {'errors', 'data', 'evaluate', 'model', 'pipeline', 'sharding'},
    'setup': {
        'errors', 'averaging', 'balance', 'checkpoint', 'cluster', 'data', 'features',
        'finetune', 'groups', 'metadata', 'mixing', 'model', 'objective', 'optimizers',
        'pipeline', 'saving', 'sharding', 'sizes', 'sources', 'state_shards', 'step',
        'transfer', 'views', 'weights',
    },
    'board': set(),
    'train': {'errors', 'agreement', 'atomic', 'averaging', 'board', 'checkpoint',
              'cluster', 'environment', 'evaluate',
              'history', 'lock', 'loop', 'page', 'patience', 'phases', 'report',
              'results', 'samples', 'saving', 'setup',
              'sharding', 'signals', 'state_shards', 'unread'},
    'space': {'errors'},
    'tuner': {'errors'},
    'book': {'errors', 'atomic'},
    'sweep_table': {'atomic', 'book', 'render'},
    'sweep_page': {'book', 'render', 'space', 'sweep_table'},
    'sweep_plan': {'errors', 'history', 'setup', 'space'},
    'sweep': {'errors', 'book', 'checkpoint', 'faults', 'history', 'lock', 'signals',
              'space', 'sweep_page', 'sweep_plan', 'sweep_table', 'train', 'tuner'},
    'lr_find': {'errors', 'checkpoint', 'report', 'setup', 'sharding'},
}  # fmt: skip
RECIPES = sorted(path.stem for path in (ROOT / 'configs').glob('*.py'))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == 'flax_densenet':
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module.startswith('flax_densenet.'):
                yield node.module.split('.')[1]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert not alias.name.startswith('flax_densenet'), alias.name


@pytest.mark.parametrize('path', sorted(PACKAGE.glob('*.py')), ids=lambda p: p.stem)
def test_imports(path):
    assert set(imports(path)) <= EDGES[path.stem]


def test_edges_have_no_cycle():
    left = dict(EDGES)
    while left:
        leaves = [name for name, uses in left.items() if not uses & left.keys()]
        assert leaves
        for name in leaves:
            del left[name]


def test_no_config_below_the_door():
    for path in PACKAGE.glob('*.py'):
        assert 'ml_collections' not in path.read_text()
        assert 'config.get(' not in path.read_text()


def test_heavy_packages_are_imported_where_needed():
    code = (
        'import sys, flax_densenet.sweep; '
        'heavy = {"torch", "keras", "tensorflow", "tensorflow_datasets", "sklearn", '
        '"matplotlib", "plotly", "jinja2", "tensorboardX", "optuna"}; '
        'print(sorted(heavy & set(sys.modules)))'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout == '[]\n', done.stderr


def fields(config, prefix=''):
    for name, value in config.items():
        if hasattr(value, 'items'):
            yield from fields(value, f'{prefix}{name}.')
        else:
            yield prefix + name


@pytest.mark.parametrize('name', RECIPES)
def test_recipes(name):
    """Only fields of base; a model and an optimizer come out; the page says how."""
    module = importlib.import_module(f'configs.{name}')
    config = module.get_config()
    assert set(fields(config)) == set(fields(base.get_config()))
    assert 'python launch.py' in module.__doc__
    assert create_model(num_classes=2, **transfer.settle_model(config.model, None))
    kwargs = dict(config.optimizer)
    ours = ('l2_penalty', 'layer_decay', 'head_multiplier', 'gradient_clip')
    for field in (*ours, 'shard_state'):
        kwargs.pop(field)
    names = ('learning_rate', 'schedule', 'drop_at', 'warmup_epochs')
    schedule = optimizers.make_schedule(
        **{n: kwargs.pop(n) for n in names},
        epochs=config.train.epochs,
        steps_per_epoch=10.0,
    )
    assert optimizers.make_optimizer(schedule, **kwargs)


def test_base_has_each_field_of_the_functions():
    """A field that a function gained and base.py forgot would be out of reach."""
    config = base.get_config()
    skip = {'num_classes', 'parent', 'name'}
    known = {
        name
        for network in (model.DenseNet, rdnet.RDNet)
        for name in network.__dataclass_fields__
    }
    assert set(config.model) == {'variant'} | known - skip
    loading = {'source', 'batch_size', 'mean', 'std', 'augment', 'threads', 'workers'}
    loading |= {'balance', 'colour_jitter', 'policy', 'erase', 'mixup', 'cutmix', 'tta'}
    loading |= {'size_schedule'}
    assert set(config.data) == loading | set(data.load_source.__kwdefaults__)


def test_birds():
    """The recipe to reproduce, field by field."""
    config = importlib.import_module('configs.birds').get_config()
    assert transfer.settle_model(config.model, None)['variant'] == 'densenet121'
    assert config.data.source == 'folder:data/bird_photos'
    assert (config.data.batch_size, config.train.epochs) == (4, 40)
    settled = transfer.settle_data(config.data, None)
    assert settled['mean'] == (0.485, 0.456, 0.406)
    assert (settled['resize'], settled['channels']) == ('stretch', 3)
    assert config.optimizer.learning_rate == 1e-4
    config = importlib.import_module('configs.birds_tf').get_config()
    assert config.model.padding == 'same'
    assert config.model.initializer == 'glorot_normal'
    assert (config.model.momentum, config.model.epsilon) == (0.99, 1e-3)
    assert config.optimizer.l2_penalty == 5e-5
    assert (config.data.batch_size, config.data.split_seed) == (8, 123)
    from flax_densenet import evaluate

    pixels = evaluate.normalise(
        pytest.importorskip('numpy').array([[[[0, 128, 255]]]], 'u1'),
        mean=config.data.mean,
        std=config.data.std,
    )
    assert pixels.ravel().tolist() == pytest.approx([0, 128, 255])


def test_no_file_of_another_project():
    assert pathlib.Path(ROOT / 'ckpt' / '.gitkeep').exists()

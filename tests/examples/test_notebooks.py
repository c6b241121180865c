"""The example notebooks run from a clean folder, without a network, to their end."""

import contextlib
import json
import os
import re

import pytest

from flax_densenet.export import formats
from helpers import file_hosts, weight_files
from helpers.marks import exhaustive_after
from helpers.paths import ROOT

NOTEBOOKS = sorted((ROOT / 'examples').glob('*.ipynb'))
DOWNLOADS = 'finetune_and_export'  # whose outputs depend on weights of the Hub


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_of_no_machine(path):
    """What is shown is whole, and names no folder of whoever ran it."""
    nbformat = pytest.importorskip('nbformat')
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert any(cell.get('outputs') for cell in notebook.cells) != (
        path.stem == DOWNLOADS
    )
    for cell in notebook.cells:
        for output in cell.get('outputs', ()):
            assert output.output_type in ('stream', 'display_data', 'execute_result')
            assert output.get('name') != 'stderr'
            text = output.get('text') or output.data.get('text/plain', '')
            assert not re.search(r'(?<![\w.])/\w', text), text


@contextlib.contextmanager
def play_hub(folder, monkeypatch):
    """The Hub on this machine, with a small network under the name of timm's."""
    module, variables = weight_files.tiny(num_classes=1000)
    made = folder / 'made'
    trained = weight_files.trained_of(module, variables)
    formats.save(str(made), trained, 'huggingface', formats.Options())
    config = json.loads((made / 'config.json').read_bytes())
    del config['flax_densenet'], config['label_names']
    arrays = formats.torch_arrays(module, variables)
    weight_files.write_safetensors(made / 'arrays', arrays)
    host = file_hosts.Host()
    host.put_repo(
        'timm/densenet121.ra_in1k',
        {
            'config.json': json.dumps(config).encode(),
            'model.safetensors': (made / 'arrays').read_bytes(),
        },
    )
    monkeypatch.setenv('HF_ENDPOINT', host.url)
    monkeypatch.setenv('HF_HOME', str(folder / 'hub'))
    monkeypatch.setenv('HF_HUB_DISABLE_XET', '1')
    try:
        yield
    finally:
        host.close()


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize(
    'path', exhaustive_after(1, NOTEBOOKS), ids=lambda path: path.stem
)
def test_notebook_runs(path, tmp_path, monkeypatch):
    nbformat = pytest.importorskip('nbformat')
    nbclient = pytest.importorskip('nbclient')
    for name in ('launch.py', 'configs', 'flax_densenet'):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / 'examples').mkdir()
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    monkeypatch.setenv('MPLBACKEND', 'module://matplotlib_inline.backend_inline')
    # Those of the tests: four devices, and compiled without optimization.
    monkeypatch.delenv('XLA_FLAGS')
    for name in ('http_proxy', 'https_proxy'):
        monkeypatch.setenv(name, 'http://127.0.0.1:9')  # nothing listens there
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    notebook = nbformat.read(path, 4)
    for cell in notebook.cells:  # how good the model gets is not the test's matter
        cell.source = re.sub(r'epochs ?= ?\d+', 'epochs=1', cell.source)
    folder = {'metadata': {'path': str(tmp_path / 'examples')}}
    client = nbclient.NotebookClient(
        notebook, kernel_name='python3', timeout=600, resources=folder
    )
    with play_hub(tmp_path, monkeypatch):
        client.execute()
    shown = [output for cell in notebook.cells for output in cell.get('outputs', ())]
    pictures = [one for one in shown if 'image/png' in one.get('data', {})]
    if path.stem == DOWNLOADS:
        assert len(pictures) == 2
        assert (tmp_path / 'ckpt' / DOWNLOADS / 'photos.onnx').exists()
    else:
        assert len(pictures) == 3
        assert os.listdir(tmp_path / 'ckpt' / 'notebook')

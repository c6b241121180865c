"""Model cards: what they say, what they do not know, names that try to break them."""

import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from flax_densenet import UserError, create_model, init_variables
from flax_densenet.data import images
from flax_densenet.evaluation import intervals, metrics
from flax_densenet.export import formats, model_card
from flax_densenet.weights import trained as trained_lib
from helpers.runs import plain, tiny_config
from helpers.weight_files import tiny, trained_of

NAMES = ('ants', 'bees')


def trained(names=NAMES, *, step=270, test=(0.9, 200), **metadata):
    """A model of a run that has 200 test images."""
    module = create_model('BC-L10k4', num_classes=len(names))
    metadata = {
        'model': {'variant': 'BC-L10k4', 'dtype': 'float32'},
        'class_names': list(names),
        'image_size': 32,
        'mean': [0.5] * 3,
        'std': [0.25] * 3,
        'data': {'source': 'folder:insects', 'resize': 'crop', 'crop_fraction': 0.8},
        'multi_label': False,
        'images': {'train': 1234, 'test': test[1]},
        'epoch': 6,
    } | metadata
    record = {'test_accuracy': test[0], 'test_loss': 0.321}
    return trained_lib.Trained(
        module, init_variables(module, 0), metadata, record, step, None
    )


def write_run(folder, *, step=270, source='folder:insects', names=NAMES):
    """The files of a run's folder that the card reads; returns the figures."""
    config = tiny_config(**{'data.batch_size': 16, 'train.label_smoothing': 0.1})
    config['init_from'] = '/home/somebody/densenet121.pth'
    (folder / 'config.json').write_text(json.dumps(plain(config)))
    (folder / 'environment.json').write_text('{"python": "3.11.9", "device": "H100"}')
    lines = [json.dumps({'epoch': n}) for n in range(1, 9)]
    (folder / 'metrics.jsonl').write_text('\n'.join(lines) + '\n')
    rng = np.random.default_rng(0)
    labels = rng.integers(0, len(names), 200)
    logits = rng.standard_normal((200, len(names)))
    logits[np.arange(200), labels] += 1
    figures = metrics.measure(logits, labels, names)
    figures = intervals.extend(figures, labels, metrics.softmax(logits))
    about = {'data': source, 'model': f'best checkpoint: epoch 6, step {step}'}
    (folder / 'eval.json').write_text(json.dumps(about | figures))
    return figures


def test_all_that_a_run_tells(tmp_path):
    figures = write_run(tmp_path)
    said = model_card.render(
        trained(),
        workdir=str(tmp_path),
        facts=[('Precision', 'float16'), ('Largest difference', '1e-3 | <b>')],
        file='out/insects.onnx',
        file_format='onnx',
        license='MIT',
    )
    share, (low, high) = figures['accuracy'], figures['accuracy_interval']
    between = f'{low:.1%} to {high:.1%}'
    ends = figures['intervals']['macro']['auroc']
    for part in (
        f'**{share:.1%}** (95% interval {between}) on 200 test images of',
        f'| {figures["macro"]["auroc"]:.3f} | {ends[0]:.3f} to {ends[1]:.3f} |',
        '1,234 images to train on, 200 to test on',
        '`ants`,\n`bees`\n',
        'the best of 8 on these same test images',
        '| `optimizer.learning_rate` | `0.003` |',
        '| `train.label_smoothing` | `0.1` |',
        'started from other weights, `densenet121.pth`',
        '| License of the weights | MIT |',
        '| License of the data | unknown |',
        r'| Largest difference | 1e-3 \| \<b\> |',
        'expected calibration error',
        "onnxruntime.InferenceSession('insects.onnx')",
        'Resize the shorter side to 40 pixels',
        '| python | ',
        '| device | - | H100 |',
    ):
        assert part in said, part
    assert 'somebody' not in said and not said.startswith('---')
    prose = re.sub(r'```.*?```', '', said, flags=re.S)
    assert not re.search(r'\bNone\b|Undefined|{{|{%', prose) and '\n\n\n' not in said
    bees = figures['classes'][1]
    low, high = metrics.wilson(round(bees['recall'] * bees['support']), bees['support'])
    (line,) = re.findall(r'\| `bees` \|.*', said)
    assert f'{bees["recall"]:.1%} ({low:.1%} to {high:.1%})' in line
    assert line.endswith(f' {bees["support"]} |')


def test_preparation_fits_the_file():
    """A file that normalizes by itself is not given normalized pixels."""
    options = {'file': 'x.onnx', 'file_format': 'onnx'}
    said = model_card.render(trained(), **options)
    assert 'normalization is inside the file' in said
    assert 'mean' not in said.split('## Preparing')[1].split('## Use')[0]
    assert '{taken.name: pixels[None]}' in said
    said = model_card.render(trained(), facts=[('inputs', 'normalized')], **options)
    assert 'inside the file' not in said and '/ 255 - [0.5, 0.5, 0.5]' in said


def test_title_and_source_are_public():
    data = {'source': 'folder:/home/somebody/photos/birds'}
    said = model_card.render(trained(data=data), hub=True, license='mit')
    assert '# BC-L10k4 for ants and bees\n' in said
    assert 'somebody' not in said and '`folder:birds`' in said
    assert '"type": "folder-birds"' in said and 'pip install flax_densenet' in said
    many = model_card.render(trained(tuple(map(str, range(9)))))
    assert many.startswith('# BC-L10k4 for 9 classes\n')


def test_precision_counts_what_was_said(tmp_path):
    """Its interval is of the images that the class was said of: the matrix's column."""
    figures = write_run(tmp_path)
    said = model_card.render(trained(), workdir=str(tmp_path))
    right, wrong = figures['confusion'][0][0], figures['confusion'][1][0]
    low, high = metrics.wilson(right, right + wrong)
    assert f'| `ants` | {right / (right + wrong):.1%} ({low:.1%} to' in said


def test_a_checkpoint_alone():
    """Its own accuracy, an interval by the number of test images, no classes."""
    said = model_card.render(trained())
    low, high = metrics.wilson(180, 200)
    assert f'**90.0%** (95% interval {low:.1%} to {high:.1%})' in said
    assert 'run `flax-densenet eval` before' in said
    assert 'calibration was not measured' in said
    assert 'The recipe is unknown' in said
    metadata = {k: v for k, v in trained().metadata.items() if k != 'images'}
    said = model_card.render(dataclasses.replace(trained(), metadata=metadata))
    assert '**90.0%** on the test images' in said


def test_nothing_known():
    found = dataclasses.replace(trained_of(*tiny()), metrics={}, step=None)
    said = model_card.render(found, file_format='torch', file='x.pth')
    for part in (
        'Unknown: the weights came',
        'Its training data is unknown',
        'recipe is unknown',
    ):
        assert part in said
    code = 'torchvision.models.DenseNet(growth_rate=4, block_config=(2, 3), '
    assert code + 'num_init_features=8, bn_size=2, num_classes=5)' in said
    assert '| growth_rate | `4`, different from' in said and '# DenseNet for 5' in said
    nameless = found.metadata | {'class_names': None}
    said = model_card.render(dataclasses.replace(found, metadata=nameless))
    assert 'The names of the 5 classes are unknown' in said


def test_figures_of_another_checkpoint_or_data(tmp_path):
    write_run(tmp_path, step=27)
    assert '**90.0%**' in model_card.render(trained(), workdir=str(tmp_path))
    figures = write_run(tmp_path, source='folder:mine')
    said = model_card.render(trained(), workdir=str(tmp_path))
    assert f'**{figures["accuracy"]:.1%}**' in said
    assert 'On 200 images of `folder:mine`.' in said
    assert 'optimistic' not in said


def test_several_labels():
    said = model_card.render(trained(multi_label=True))
    assert 'predicts a probability for each of 2 labels' in said
    assert '| Label accuracy |' in said and 'which a sigmoid turns' in said
    assert 'interval' not in said.split('## Model')[0]


@pytest.mark.parametrize('name', ['eval.json', 'config.json', 'metrics.jsonl'])
def test_files_of_a_run_that_are_none(name, tmp_path):
    write_run(tmp_path)
    (tmp_path / name).write_text('{"model": "best checkpoint: epoch 6, step 270"}')
    if name == 'eval.json':
        with pytest.raises(UserError, match='eval.json is not a file that eval writes'):
            model_card.render(trained(), workdir=str(tmp_path))
    (tmp_path / name).write_text('[1, 2}')
    with pytest.raises(
        UserError, match=f'{name} (is not valid JSON|cannot be read)'
    ) as caught:
        model_card.render(trained(), workdir=str(tmp_path))
    assert '\n' not in str(caught.value)


HOSTILE = (
    'a|b', '`code`', '``', '<script>alert(1)</script>', '[x](javascript:alert(1))',
    '![x](http://host/pixel.png)', '# title', '---', '* item', '1. item', 'line\nline',
    ' spaces ', 'a  b', '\\', '\\|', '&lt;', '_x_', '**x**', 'http://host/x',
    'www.host.org', '@someone', '$x$', '{{ 7 * 7 }}', '{% raw %}', '-->', '',
    'größe', '犬', '\u202egnp.exe', '\x1b[31m', 'x' * 300, '~~x~~',
)  # fmt: skip


@pytest.mark.parametrize('hub', [True, False])
def test_names_that_are_markdown(hub, tmp_path):
    """Each stays the text that it is: in the list, and in its row of the table."""
    markdown_it = pytest.importorskip('markdown_it')
    names = tuple(HOSTILE)
    write_run(tmp_path, names=names, source='folder:<b>|`x')
    data = {'source': 'folder:<b>|`x'}
    said = model_card.render(
        trained(names, data=data), workdir=str(tmp_path), license='<u>|x`', hub=hub,
        file='a`|<i>.x', facts=[('<s>|', '|**x** `<s>`\n')],
    )  # fmt: skip
    if hub:
        assert said.startswith('---\n')
        said = said.split('---\n', 2)[2]
    tokens = markdown_it.MarkdownIt('commonmark').enable('table').parse(said)
    kinds = [t.type for t in tokens]
    assert 'html_block' in kinds  # the marker
    shown, inside, heads = [], False, []
    cells = []
    for place, token in enumerate(tokens):
        if token.type == 'heading_open':
            heads.append(tokens[place + 1].content)
        if token.type == 'tr_open':
            cells.append(0)
        if token.type in ('td_open', 'th_open'):
            cells[-1] += 1
        for child in token.children or ():
            assert child.type not in ('image', 'em_open')
            if child.type == 'link_open':
                assert child.attrs['href'].startswith('https://arxiv.org/abs/')
            if child.type == 'html_inline':
                assert child.content in ('<code>', '</code>')
                inside = child.content == '<code>'
                if inside:
                    shown.append('')
            elif child.type == 'code_inline':
                shown.append(child.content)
            elif inside:
                shown[-1] += child.content
    assert len([h for h in heads if h.startswith(('Model', 'Use', 'Versions'))]) == 3
    assert set(cells) == {2, 3, 6}
    from flax_densenet.errors import printable

    for name in names:
        assert shown.count(printable(name)) == 2, name  # in the list, in the table


def header(said, tmp_path):
    cards = pytest.importorskip('huggingface_hub')
    path = tmp_path / 'README.md'
    path.write_text(said, encoding='utf-8')
    return cards.ModelCard.load(str(path)).data


def test_header_of_the_hub(tmp_path):
    figures = write_run(tmp_path)
    said = model_card.render(
        trained(), workdir=str(tmp_path), license='Apache-2.0', hub=True
    )
    data = header(said, tmp_path)
    assert (data.license, data.pipeline_tag) == ('apache-2.0', 'image-classification')
    assert data.library_name == 'flax_densenet'  # timm has no such network
    (result,) = data.eval_results
    assert result.metric_type == 'accuracy'
    assert result.metric_value == pytest.approx(figures['accuracy'])
    assert result.dataset_name == 'folder:insects'
    data = header(model_card.render(trained_of(*tiny()), hub=True), tmp_path)
    assert (data.license, data.library_name) == ('unknown', 'timm')
    odd = 'mine: "a"\n# \x00 \U0001f600 - [x]'
    source = {'source': odd}
    said = model_card.render(trained(data=source), license=odd, hub=True)
    data = header(said, tmp_path)
    shown = 'mine: "a"\\n# \\x00 \U0001f600 - [x]'
    assert (data.license, data.license_name) == ('other', shown)
    assert data.eval_results[0].dataset_name == shown


def test_a_card_of_somebody_else_stays(tmp_path):
    path = model_card.path_for(str(tmp_path / 'x.onnx'))
    assert path == str(tmp_path / 'MODEL_CARD.md')
    text = model_card.render(trained())
    model_card.check(path)
    model_card.save(path, text)
    model_card.save(path, text + '\n')
    edited = (text + '\nmine').replace(model_card.MARKER, '')
    (tmp_path / 'MODEL_CARD.md').write_text(edited)
    with pytest.raises(UserError, match='MODEL_CARD.md exists and was not'):
        model_card.save(path, text)
    assert (tmp_path / 'MODEL_CARD.md').read_text() == edited
    with pytest.raises(UserError, match='cannot be read'):
        model_card.check(str(tmp_path))


@pytest.mark.parametrize('second', ['b.onnx', 'a|b `c`.onnx'])
def test_each_file_of_a_folder_keeps_its_card(second, tmp_path):
    """The first one has the usual name, also when it is exported again."""
    first, second = (str(tmp_path / name) for name in ('a.onnx', second))

    def export(file):
        path = model_card.path_for(file)
        text = model_card.render(trained(), file=file, file_format='onnx')
        model_card.save(path, text)
        pathlib.Path(file).touch()
        return path

    usual, own = str(tmp_path / 'MODEL_CARD.md'), f'{second}.MODEL_CARD.md'
    assert [export(file) for file in (first, second)] == [usual, own]
    assert [export(file) for file in (second, first)] == [own, usual]
    # A file that somebody has removed needs no card.
    pathlib.Path(first).unlink()
    pathlib.Path(own).unlink()
    assert export(second) == usual
    assert model_card.path_for(first) == f'{first}.MODEL_CARD.md'
    assert export(second) == usual


def test_an_edited_card_of_another_file_is_no_obstacle(tmp_path):
    file = tmp_path / 'a.onnx'
    file.touch()
    text = model_card.render(trained(), file=str(file), file_format='onnx')
    usual = tmp_path / 'MODEL_CARD.md'
    usual.write_text(text.replace(model_card.MARKER, ''))
    path = model_card.path_for(str(tmp_path / 'b.onnx'))
    assert path == str(tmp_path / 'b.onnx.MODEL_CARD.md')
    model_card.check(path)
    with pytest.raises(UserError, match='was edited'):
        model_card.check(model_card.path_for(str(file)))


@pytest.mark.parametrize('resize', ['crop', 'stretch'])
@pytest.mark.parametrize('channels', [3, 1])
def test_the_code_prepares_images(resize, channels, tmp_path, monkeypatch):
    """What stands there gives what the model was trained with, to a pixel's edge."""
    rng = np.random.default_rng(0)
    soft = Image.fromarray(rng.integers(0, 255, (9, 12, 3), np.uint8))
    soft.resize((400, 300), Image.Resampling.BICUBIC).save(tmp_path / 'photo.jpg')
    data = {'resize': resize, 'crop_fraction': 0.875, 'interpolation': 'bicubic'}
    found = trained(data=data, mean=[0.4] * channels, std=[0.2] * channels)
    said = model_card.render(found, file='x.safetensors', file_format='safetensors')
    blocks = re.findall(r'```python\n(.*?)```', said, re.S)
    for block in blocks:
        compile(block, 'card', 'exec')
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(blocks[0], names)
    ours = images.load_image('photo.jpg', trained_lib.preparation_of(found.metadata))
    assert names['pixels'].shape == ours.shape == (32, 32, channels)
    difference = np.abs(names['pixels'].astype(int) - ours)
    assert difference.mean() < 1.5 and difference.max() < 12
    expected = np.asarray(
        trained_lib.normalize(ours[None], mean=(0.4,) * channels, std=(0.2,) * channels)
    )
    assert np.abs(names['x'] - expected[0]).max() < 0.3
    assert names['x'].dtype == np.float32


@pytest.mark.parametrize('key', model_card.FORMATS)
@pytest.mark.parametrize('variant', ['densenet121', 'BC-L10k4', 'rdnet_tiny'])
def test_every_format_has_code(key, variant):
    module = create_model(variant, num_classes=2)
    found = dataclasses.replace(
        trained(),
        module=module,
        metadata=trained().metadata | {'model': {'variant': variant}},
    )
    for facts in ((), [('inputs', 'normalized')]):
        said = model_card.render(
            found, file="a'b.weights.h5", file_format=key, facts=facts
        )
        for block in re.findall(r'```python\n(.*?)```', said, re.S):
            compile(block, key, 'exec')
    assert set(formats.FORMATS) <= set(model_card.FORMATS)

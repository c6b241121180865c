"""The server: what it answers, what it refuses, and that both stay bounded."""

import asyncio
import concurrent.futures
import dataclasses

import numpy as np
import pytest

from flax_densenet.inference import explain, overlay
from flax_densenet.inference import predictor as predictor_lib
from flax_densenet.serving import batcher as batcher_lib
from flax_densenet.weights import calibration, decisions, thresholds
from helpers import described
from helpers.servers import (
    JPEG,
    MULTIPART,
    NAMES,
    SIDE,
    as_array,
    ask,
    from_data_url,
    running,
)

pytest.importorskip('starlette')
pytest.importorskip('hypercorn')
pytest.importorskip('prometheus_client')
pytest.importorskip('python_multipart')


def test_page(port):
    answer = ask(port, '/')
    text = answer.body.decode()
    assert answer.headers['Content-Type'] == 'text/html; charset=utf-8'
    policy = answer.headers['Content-Security-Policy']
    nonce = policy.split("script-src 'nonce-")[1].split("'")[0]
    assert policy.startswith("default-src 'none'; ")
    assert text.count('<script') == text.count(f'nonce="{nonce}">') - 1 == 2
    assert nonce not in ask(port, '/').body.decode()
    assert '&lt;/script&gt;&lt;b&gt;' in text and '</script><b>' not in text
    assert '87.5% on the test images' in text
    assert '//' not in text.replace('// ', '')  # nothing is asked of another host
    assert answer.headers['X-Content-Type-Options'] == 'nosniff'
    assert 'Access-Control-Allow-Origin' not in answer.headers


def test_model_and_health(port):
    told = ask(port, '/model').json
    assert told['classes'] == list(NAMES)
    assert (told['name'], told['image_size'], told['step']) == ('bugs', SIDE, 7)
    assert told['figures'] == {'test_accuracy': 0.875}
    methods = [one['name'] for one in told['explain_methods']]
    assert methods == ['gradcam', 'layercam', 'occlusion']
    assert told['limits']['max_megabytes'] == 20
    assert ask(port, '/health').json == {'status': 'ok'}


def test_predict(port, expected):
    files, _, probabilities, _ = expected
    for file, row in zip(files, probabilities, strict=True):
        told = ask(port, '/predict?top=100', file).json
        assert set(told) == {'predictions', 'model', 'seconds'}
        assert told['model'] == {'name': 'bugs', 'epoch': 3, 'step': 7}
        assert told['seconds'] > 0
        np.testing.assert_allclose(as_array(told), row, atol=1e-5)
        shares = [p['probability'] for p in told['predictions']]
        assert shares == sorted(shares, reverse=True)
        first = ask(port, '/predict', file).json['predictions']
        assert first == told['predictions'][:5]
        assert len(ask(port, '/predict?top=2', file).json['predictions']) == 2


@pytest.mark.slow
def test_thresholds_and_calibration(trained, expected):
    """Answers name what is above its threshold, of calibrated probabilities."""
    files, _, probabilities, _ = expected
    logits = np.log(probabilities) / 2
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    limit = float(np.sort(shares[:, 1])[1:3].mean())
    found = decisions.Decisions(
        step=7,
        model='',
        classes=len(NAMES),
        data='bugs',
        part='val',
        count=9,
        calibration=calibration.Calibration(('temperature',), (0.5,), (0.0,)),
        thresholds=thresholds.Thresholds('f1', (None, limit) + (None,) * 5),
    )
    with running(dataclasses.replace(trained, decisions=found)) as port:
        described.check(port, '/model', ask(port, '/model'))
        told = ask(port, '/model').json
        assert told['thresholds'] == {'bees': limit}
        assert (told['threshold_rule'], told['calibration']) == (
            'f1',
            'temperature 2.00',
        )
        text = ask(port, '/').body.decode()
        assert 'calibrated (temperature 2.00)' in text
        positive = []
        for file, row in zip(files, shares, strict=True):
            answer = ask(port, '/predict?top=100', file)
            described.check(port, '/predict', answer)
            told = answer.json
            np.testing.assert_allclose(as_array(told), row, atol=1e-5)
            assert told['positive'] == (['bees'] if row[1] > limit else [])
            positive += told['positive']
        assert len(positive) == 2


def test_explain(port, expected):
    files, pixels, probabilities, cams = expected
    for file, image, cam in zip(files, pixels, cams, strict=True):
        told = ask(port, '/predict?explain=1&class=bees', file).json
        assert told['explained'] == 'bees'
        seen = from_data_url(told['overlay']).astype(int)
        assert np.abs(seen - overlay.overlay(image, cam)).max() <= 1
        assert told['map_peak'] == pytest.approx(cam.max(), rel=1e-3, abs=1e-6)
        layer = from_data_url(ask(port, '/predict?explain=map', file).json['map'])
        assert layer.shape == (SIDE, SIDE, 4)
    assert cams.max() > 0
    told = ask(port, '/predict?explain=1', files[0]).json
    assert told['explained'] == NAMES[probabilities[0].argmax()]


@pytest.mark.slow
@pytest.mark.parametrize('method', ['layercam', 'occlusion'])
def test_other_methods(method, port, trained, expected):
    """Several at once, among those of the usual method."""
    files, pixels, _, _ = expected
    model = predictor_lib.Predictor(trained, 4)
    cams = model.cams(pixels, [1] * 4, explain.make(method))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        queries = [f'explain=1&class=bees&method={m}' for m in (method, 'gradcam')]
        tasks = [
            pool.submit(ask, port, f'/predict?{query}', file)
            for file in files
            for query in queries
        ]
        told = [task.result().json for task in tasks]
    assert [one['method'] for one in told] == [method, 'gradcam'] * 4
    for answer, cam, image in zip(told[::2], cams, pixels, strict=True):
        assert answer['map_peak'] == pytest.approx(cam.max(), rel=1e-3, abs=1e-6)
        seen = from_data_url(answer['overlay']).astype(int)
        assert np.abs(seen - overlay.overlay(image, cam)).max() <= 2
    assert any(
        a['map_peak'] != b['map_peak']
        for a, b in zip(told[::2], told[1::2], strict=True)
    )


def test_together_as_alone(port, expected):
    files, _, probabilities, _ = expected
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        queries = ['/predict?top=9', '/predict?top=9&explain=1'] * 12
        tasks = [
            pool.submit(ask, port, query, files[i % 4])
            for i, query in enumerate(queries)
        ]
        for i, task in enumerate(tasks):
            answer = task.result()
            assert ('overlay' in answer.json) == bool(i % 2)
            np.testing.assert_allclose(
                as_array(answer.json), probabilities[i % 4], atol=1e-5
            )


def test_batches(trained, expected):
    """Those that come together are a batch; each gets its own answer and map."""
    _, pixels, probabilities, cams = expected
    counts = []

    async def main():
        batcher = batcher_lib.Batcher(trained, batch_size=4, on_batch=counts.append)
        assert not batcher.ready
        await batcher.warm_up()
        assert batcher.ready and not counts
        asked = [
            batcher.predict(pixels[i % 4], explain=1 if i % 3 == 0 else None)
            for i in range(7)
        ]
        found = await asyncio.gather(*asked)
        stays, leaves = (
            asyncio.create_task(batcher.predict(pixels[i])) for i in range(2)
        )
        await asyncio.sleep(0)
        leaves.cancel()  # a client that is gone ends nobody else's batch
        found.append(await stays)
        batcher.close()
        return found

    *found, stayed = asyncio.run(main())
    np.testing.assert_allclose(stayed.probabilities, probabilities[0], atol=1e-5)
    for i, answer in enumerate(found):
        np.testing.assert_allclose(
            answer.probabilities, probabilities[i % 4], atol=1e-5
        )
        assert (answer.cam is None) == (i % 3 != 0)
        if answer.cam is not None:
            np.testing.assert_allclose(answer.cam, cams[i % 4], atol=1e-4)
    assert counts == [4, 3, 2]


@pytest.mark.parametrize(
    ('path', 'body', 'options', 'status', 'message'),
    [
        ('/none', None, {}, 404, '/none does not exist; use /, /predict'),
        ('/predict', None, {}, 405, '/predict takes POST, not GET'),
        ('/model', b'x', {}, 405, '/model takes GET, HEAD, not POST'),
        ('/predict', b'', {}, 400, 'the file is empty'),
        ('/predict', b'a text', {}, 415, 'the file is not an image (JPEG, PNG'),
        ('/predict', JPEG[: len(JPEG) // 2], {}, 415, 'the file cannot be decoded'),
        ('/predict', JPEG, {'headers': MULTIPART}, 400, 'the form cannot be used'),
        ('/predict?top=0', JPEG, {}, 400, 'top=0 must be an integer of at least 1'),
        ('/predict?top=x', JPEG, {}, 400, 'top=x must be an integer'),
        ('/predict?top=' + '9' * 5000, JPEG, {}, 400, 'must be an integer'),
        ('/predict?explain=yes', JPEG, {}, 400, 'explain=yes must be 0, 1'),
        ('/predict?class=ants', JPEG, {}, 400, 'explain=1'),
        ('/predict?explain=1&class=ant', JPEG, {}, 400, 'did you mean ants?'),
        ('/predict?explain=1&class=q', JPEG, {}, 400, 'GET /model lists the classes'),
        ('/predict?method=layercam', JPEG, {}, 400, 'explain=1'),
        ('/predict?explain=1&method=x', JPEG, {}, 400, 'method=x is not known'),
        (
            *('/predict?explain=1&method=ig', JPEG, {}, 400),
            'integrated_gradients is not served here; use gradcam, layercam, occlus',
        ),
        ('/predict?tops=3', JPEG, {}, 400, 'tops= is not known; there are top,'),
        ('/', None, {'headers': {'Host': 'evil.example'}}, 403, 'use localhost'),
        ('/', None, {'headers': {'Host': 'localhost.evil.example'}}, 403, 'localhost'),
        ('/', None, {'headers': {'Host': 'hub.example'}}, 403, '--allowed_hosts'),
        ('/predict', JPEG, {'headers': {'Origin': 'null'}}, 403, 'other sites'),
        (
            '/predict',
            JPEG,
            {'headers': {'Origin': 'http://evil.example'}},
            403,
            'pages of other sites may not use this server',
        ),
        (
            '/predict',
            JPEG,
            {'headers': {'Sec-Fetch-Site': 'cross-site'}},
            403,
            'other sites',
        ),
    ],
)
def test_refusals(port, path, body, options, status, message):
    answer = ask(port, path, body, **options)
    assert answer.status == status
    assert message in answer.json['error']
    assert len(answer.body) < 400
    assert answer.headers['X-Content-Type-Options'] == 'nosniff'
    if status == 405:
        assert answer.headers['Allow']


@pytest.mark.parametrize(
    'headers',
    [
        {'Host': 'LocalHost:1'},
        {'Host': '[::1]:8000'},
        {'Host': '127.0.0.1', 'Origin': 'http://127.0.0.1'},
        {'Sec-Fetch-Site': 'same-origin', 'Origin': 'https://proxy'},
    ],
)
def test_own_pages_are_answered(port, headers):
    assert ask(port, '/predict', JPEG, headers=headers).status == 200


def test_metrics(port):
    def figure(name):
        lines = ask(port, '/metrics').body.decode().splitlines()
        found = [line.split()[-1] for line in lines if line.startswith(name + ' ')]
        return float(found[0]) if found else 0.0

    good = 'flax_densenet_requests_total{path="/predict",status="200"}'
    bad = 'flax_densenet_requests_total{path="/predict",status="415"}'
    computed = 'flax_densenet_images_total'
    before = [figure(name) for name in (good, bad, computed)]
    for body in (JPEG, JPEG, b'a text'):
        ask(port, '/predict', body)
    after = [figure(name) for name in (good, bad, computed)]
    assert np.subtract(after, before).tolist() == [2, 1, 2]
    assert figure('flax_densenet_ready') == 1
    assert figure('flax_densenet_images_held') == 0
    assert figure('flax_densenet_batch_images_sum') == after[2]
    assert figure('flax_densenet_request_seconds_count{path="/metrics"}') > 5

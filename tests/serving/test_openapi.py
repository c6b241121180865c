"""/openapi.json and /docs describe the answers that the server gives."""

import json
import re

import pytest

from flax_densenet.serving import guard, openapi, queries
from helpers import described
from helpers.servers import JPEG, TOKEN, ask

pytest.importorskip('starlette')
pytest.importorskip('hypercorn')
pytest.importorskip('prometheus_client')
pytest.importorskip('python_multipart')
jsonschema = pytest.importorskip('jsonschema')


@pytest.mark.parametrize(
    ('path', 'body', 'status'),
    [
        ('/', None, 200),
        ('/docs', None, 200),
        ('/openapi.json', None, 200),
        ('/model', None, 200),
        ('/health', None, 200),
        ('/metrics', None, 200),
        ('/predict', JPEG, 200),
        ('/predict?top=2&explain=1&method=layercam', JPEG, 200),
        ('/predict?explain=map&class=bees', JPEG, 200),
        ('/predict?top=0', JPEG, 400),
        ('/predict', b'', 400),
        ('/predict', b'a text', 415),
        ('/predict', bytes(20_000_001), 413),
    ],
)
def test_answers_are_as_described(port, path, body, status):
    answer = ask(port, path, body)
    assert answer.status == status
    described.check(port, path.partition('?')[0], answer)


def test_refusals_are_as_described(port, guarded_port):
    for path in guard.PATHS:
        body = JPEG if path == '/predict' else None
        answer = ask(port, path, body, headers={'Host': 'evil.example'})
        assert answer.status == 403
        described.check(port, path, answer)
    for path, body in ('/predict', JPEG), ('/model', None), ('/metrics', None):
        answer = ask(guarded_port, path, body)
        assert answer.status == 401
        described.check(guarded_port, path, answer)


def test_fields_that_are_not_described_are_found(port):
    """The comparison can fail: with a field more, one less, and a wrong type."""
    told = ask(port, '/predict', JPEG)
    whole = told.json
    less = {name: value for name, value in whole.items() if name != 'seconds'}
    for wrong in whole | {'more': 1}, less, whole | {'seconds': 'a'}:
        told.body = json.dumps(wrong)
        with pytest.raises(jsonschema.ValidationError):
            described.check(port, '/predict', told)
    with pytest.raises(KeyError):
        described.check(port, '/predict', ask(port, '/predict'))  # 405


def references(part):
    if isinstance(part, dict):
        yield from [part['$ref']] if '$ref' in part else []
        for value in part.values():
            yield from references(value)
    elif isinstance(part, list):
        for value in part:
            yield from references(value)


@pytest.mark.parametrize('needs_token', [False, True])
def test_document(needs_token):
    document = openapi.describe(root_path='/a', needs_token=needs_token)
    assert document['openapi'] == '3.1.0' and document['servers'] == [{'url': '/a'}]
    assert sorted(document['paths']) == sorted(guard.PATHS)
    names = [one['name'] for one in document['paths']['/predict']['post']['parameters']]
    assert names == list(queries.OPTIONS)
    schemas = document['components']['schemas']
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
        assert all(one['description'] for one in schema['properties'].values())
    found = {reference.rpartition('/')[2] for reference in references(document)}
    assert found == schemas.keys()
    ids = set()
    for path, methods in document['paths'].items():
        ((_, operation),) = methods.items()
        ids.add(operation['operationId'])
        is_open = path in (*guard._OPEN_PATHS, '/')
        assert (operation.get('security') == []) == is_open
        assert ('401' in operation['responses']) == (needs_token and not is_open)
        assert all(one['description'] for one in operation['responses'].values())
    assert len(ids) == len(guard.PATHS)
    assert (
        ('security' in document) == needs_token == ('securitySchemes' in str(document))
    )


def test_documentation_page(port, guarded_port):
    """It has all of the document, and nothing of another host."""
    document = ask(port, '/openapi.json').json
    answer = ask(port, '/docs')
    text = answer.body.decode()
    assert answer.headers['Content-Security-Policy'].startswith("default-src 'none'; ")
    assert not re.search(r"""(src|href)=["'](https?:)?//""", text)
    for path, methods in document['paths'].items():
        assert all(f'{method.upper()} {path}</code>' in text for method in methods)
    for one in document['paths']['/predict']['post']['parameters']:
        assert f'<code>{one["name"]}</code>' in text
    for status in document['paths']['/predict']['post']['responses']:
        assert f'<td>{status}</td>' in text
    for name, schema in document['components']['schemas'].items():
        assert f'id="{name}"' in text
        assert all(f'<code>{field}</code>' in text for field in schema['properties'])
    assert '<code>predictions[].class</code>' in text
    assert 'curl --data-binary' in text and 'urllib.request' in text
    assert 'await fetch(' in text
    assert 'Authorization' not in text
    text = ask(guarded_port, '/docs').body.decode()
    assert text.count('Authorization: ') == 3 and TOKEN not in text


@pytest.mark.parametrize('needs_token', [False, True])
def test_python_example(port, guarded_port, needs_token, tmp_path, monkeypatch, capsys):
    """It runs as it is, but for the address and the token."""
    (tmp_path / 'photo.jpg').write_bytes(JPEG)
    monkeypatch.chdir(tmp_path)
    code = openapi.make_examples(needs_token)['Python']
    used = guarded_port if needs_token else port
    code = code.replace(openapi.ADDRESS, f'http://127.0.0.1:{used}')
    exec(code.replace('Bearer TOKEN', f'Bearer {TOKEN}'), {})
    best = ask(port, '/predict', JPEG).json['predictions'][0]
    assert repr(best['class']) in capsys.readouterr().out

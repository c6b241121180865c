"""The description of the interface, for `/openapi.json` and `/docs`.

It describes the program, not the model: `GET /model` has the classes, methods and
limits.
"""

from typing import Any

from flax_densenet import _version

_DATA_URL = {'type': 'string', 'pattern': '^data:image/png;base64,'}
_PROBABILITY = {'type': 'number', 'minimum': 0, 'maximum': 1}
_NAMES = {'type': 'array', 'items': {'type': 'string'}}
_COUNT = {'type': 'integer', 'minimum': 0}
# What the address is in the examples; the page writes its own there.
ADDRESS = 'http://localhost:8000'


def _or_null(kind, text):
    return {'type': [kind, 'null'], 'description': text}


def _object(text, properties, required=None):
    """A schema that allows no other fields; by default all fields are required."""
    return {
        'type': 'object',
        'description': text,
        'properties': properties,
        'required': list(properties) if required is None else required,
        'additionalProperties': False,
    }


_ONE_CLASS = _object(
    'One class.',
    {
        'class': {'type': 'string', 'description': 'Its name.'},
        'probability': _PROBABILITY | {'description': 'Its probability.'},
        'value': {
            'type': 'number',
            'description': 'Its output, instead of a probability, for models whose '
            'outputs are not probabilities.',
        },
    },
    required=['class'],
) | {'oneOf': [{'required': ['probability']}, {'required': ['value']}]}
_VERSION = _object(
    'The model that computed the answer.',
    {
        'name': {'type': 'string', 'description': 'Name of the run or file.'},
        'epoch': _or_null('integer', 'Epoch of the checkpoint, if it is known.'),
        'step': _or_null('integer', 'Step of the checkpoint, if it is known.'),
    },
)
_PREDICTION = _object(
    'The answer to an image.',
    {
        'predictions': {
            'type': 'array',
            'items': _ONE_CLASS,
            'description': 'The most likely classes, the first one the most likely.',
        },
        'model': _VERSION,
        'seconds': {
            'type': 'number',
            'minimum': 0,
            'description': 'Time from the headers of the request to the answer, '
            'including the upload and waiting for other images.',
        },
        'positive': _NAMES
        | {'description': 'Classes above their thresholds, if the model has any.'},
        'unusual': {
            'type': 'number',
            'description': 'How unlike the training images the image is, if the model '
            'has this score; above 1 it is unusual.',
        },
        'is_unusual': {
            'type': 'boolean',
            'description': 'Whether `unusual` is above 1.',
        },
        'set': _NAMES | {'description': 'With `coverage`: the set of classes.'},
        'explained': {
            'type': 'string',
            'description': 'With `explain`: the class that the map explains.',
        },
        'method': {
            'type': 'string',
            'description': 'With `explain`: the method of the map.',
        },
        'map_peak': {
            'type': 'number',
            'description': 'With `explain`: largest value of the map before it is '
            'scaled; 0 if nothing in the image supports the class.',
        },
        'overlay': _DATA_URL
        | {'description': 'With `explain=1`: the image with the map, a PNG.'},
        'map': _DATA_URL
        | {'description': 'With `explain=map`: the map with transparency, a PNG.'},
    },
    required=['predictions', 'model', 'seconds'],
)
_MODEL = _object(
    'The model and the limits of the server.',
    {
        **_VERSION['properties'],
        'classes': _NAMES | {'description': 'Names of the classes.'},
        'multi_label': {
            'type': 'boolean',
            'description': 'Whether an image can have several classes or none.',
        },
        'value': {
            'enum': ['probability', 'value'],
            'description': 'Name of the field with the output of a class.',
        },
        'unusual': _or_null('object', 'How unusual images are scored.'),
        'sets': {
            'type': ['array', 'null'],
            'items': _COUNT,
            'description': 'Number of images that the sets of classes were fitted on.',
        },
        'variant': _or_null('string', 'Variant of the network.'),
        'network': {'type': 'string', 'description': 'The network in words.'},
        'image_size': {
            'type': ['integer', 'array'],
            'items': _COUNT,
            'description': 'Side of the resized image in pixels, or height and width.',
        },
        'channels': _COUNT | {'description': '3 for color, 1 for gray.'},
        'resize': {
            'enum': ['stretch', 'crop'],
            'description': 'Whether the network sees all of an image.',
        },
        'crop_fraction': _PROBABILITY
        | {'description': 'Share of the height and width that is kept, for `crop`.'},
        'window': {
            'type': ['array', 'null'],
            'items': {'type': 'number'},
            'description': 'Values that become black and white.',
        },
        'bit_depth': _COUNT | {'description': 'Bits of a channel that are used.'},
        'thresholds': _or_null('object', 'Thresholds by class.'),
        'threshold_rule': _or_null('string', 'The rule that chose them.'),
        'threshold_words': _or_null('string', 'The rule in words.'),
        'calibration': _or_null('string', 'How probabilities are calibrated.'),
        'figures': {
            'type': 'object',
            'additionalProperties': {'type': 'number'},
            'description': 'Metrics of the validation and test images.',
        },
        'limits': {
            'type': 'object',
            'additionalProperties': {'type': 'number'},
            'description': 'Limits on requests.',
        },
        'explain_methods': {
            'type': 'array',
            'items': _object(
                'A method for maps.',
                {
                    'name': {'type': 'string', 'description': 'For `method`.'},
                    'title': {'type': 'string', 'description': 'For people.'},
                },
            ),
            'description': 'The methods for maps, the default first.',
        },
    },
)
_HEALTH = _object(
    'Whether the model is ready.',
    {
        'status': {
            'enum': ['ok', 'starting'],
            'description': '`starting` while the model is being compiled.',
        },
        'error': {'type': 'string', 'description': 'Why it is not ready.'},
    },
    required=['status'],
)
_ERROR = _object(
    'What went wrong.',
    {'error': {'type': 'string', 'description': 'One line for people.'}},
)
_SCHEMAS = {
    'Prediction': _PREDICTION,
    'Model': _MODEL,
    'Health': _HEALTH,
    'Error': _ERROR,
}
_ERRORS = {
    400: 'An option or the form is wrong, or the body is empty.',
    401: 'The token is missing or wrong.',
    403: 'The host name, or the site of the page, is not allowed.',
    408: 'The image did not arrive in time.',
    413: 'The file, or the image in it, is too large.',
    415: 'The file is not an image, or is damaged.',
    500: 'The server or the model is defective; the log has the reason.',
    503: 'The server is full or starting; try again after `Retry-After` seconds.',
}
# Name, schema, description.
_OPTIONS = (
    (
        'top',
        {'type': 'integer', 'minimum': 1, 'maximum': 999_999, 'default': 5},
        'Number of classes in the answer.',
    ),
    (
        'explain',
        {'enum': ['0', '1', 'overlay', 'map'], 'default': '0'},
        'Adds a picture of what speaks for a class: `1` or `overlay` is the image '
        'with the map, `map` the map alone.',
    ),
    (
        'class',
        {'type': 'string'},
        'Class that the map explains; by default the most likely one.',
    ),
    (
        'method',
        {'type': 'string'},
        'Method of the map; `explain_methods` of /model lists them.',
    ),
    (
        'coverage',
        {'type': 'number', 'exclusiveMinimum': 0, 'exclusiveMaximum': 1},
        'Adds the set of classes that has the true one for this share of images.',
    ),
)
_FORM = {
    'type': 'object',
    'description': 'One file, under any name, and options, unless the address has '
    'them.',
    'properties': {
        'image': {'type': 'string', 'contentMediaType': 'application/octet-stream'},
        **{name: schema for name, schema, _ in _OPTIONS},
    },
}


def _refer(name):
    return {'schema': {'$ref': f'#/components/schemas/{name}'}}


def _responses(good, errors, needs_token):
    answers: dict[str, Any] = {'200': good}
    for status in errors:
        if status == 401 and not needs_token:
            continue
        answer: dict[str, Any] = {
            'description': _ERRORS[status],
            'content': {'application/json': _refer('Error')},
        }
        if status == 401:
            answer['headers'] = {'WWW-Authenticate': {'schema': {'type': 'string'}}}
        if status == 503:
            answer['headers'] = {'Retry-After': {'schema': _COUNT}}
        answers[str(status)] = answer
    return answers


def _json(name, text):
    return {'description': text, 'content': {'application/json': _refer(name)}}


def _text(kind, text):
    return {'description': text, 'content': {kind: {'schema': {'type': 'string'}}}}


def _get(name, summary, good, *, needs_token, errors=(401, 403, 500)):
    """An endpoint; one that needs no token has an empty `security`."""
    errors = [status for status in errors if needs_token is not None or status != 401]
    operation: dict[str, Any] = {
        'operationId': name,
        'summary': summary,
        'responses': _responses(good, errors, bool(needs_token)),
    }
    return {'get': operation | ({'security': []} if needs_token is None else {})}


def _predict(needs_token):
    return {
        'operationId': 'predict',
        'summary': 'The most likely classes of an image.',
        'parameters': [
            {'name': name, 'in': 'query', 'schema': schema, 'description': text}
            for name, schema, text in _OPTIONS
        ],
        'requestBody': {
            'required': True,
            'description': 'The bytes of an image file, or a form with one.',
            'content': {
                'application/octet-stream': {},
                'image/*': {},
                'multipart/form-data': {'schema': _FORM},
            },
        },
        'responses': _responses(
            _json('Prediction', 'The prediction.'), _ERRORS, needs_token
        ),
    }


def _health():
    found = _get(
        'health',
        'Whether the model is ready.',
        _json('Health', 'It is ready.'),
        needs_token=None,
    )
    found['get']['responses']['503'] = _json('Health', 'It is being compiled.') | {
        'headers': {'Retry-After': {'schema': _COUNT}}
    }
    return found


def _paths(needs_token):
    document = {'application/json': {'schema': {'type': 'object'}}}
    return {
        '/predict': {'post': _predict(needs_token)},
        '/model': _get(
            'model',
            'Classes, image size, methods, metrics and limits.',
            _json('Model', 'The model.'),
            needs_token=needs_token,
        ),
        '/health': _health(),
        '/metrics': _get(
            'metrics',
            'Counters for Prometheus.',
            _text('text/plain', 'The text format of Prometheus.'),
            needs_token=needs_token,
        ),
        '/': _get(
            'page',
            'The page to try the model in the browser.',
            _text('text/html', 'The page.'),
            needs_token=None,
        ),
        '/docs': _get(
            'docs',
            'This description for people.',
            _text('text/html', 'The page.'),
            needs_token=None,
        ),
        '/openapi.json': _get(
            'openapi',
            'This description for programs, in OpenAPI 3.1.',
            {'description': 'The description.', 'content': document},
            needs_token=None,
        ),
    }


def describe(*, root_path: str = '', needs_token: bool = False) -> dict[str, Any]:
    """The OpenAPI 3.1 document.

    Args:
      root_path: path prefix that a proxy adds.
      needs_token: whether requests have to send a token.
    """
    components: dict[str, Any] = {'schemas': _SCHEMAS}
    document: dict[str, Any] = {
        'openapi': '3.1.0',
        'info': {
            'title': 'flax-densenet serve',
            'version': _version.__version__,
            'description': 'Predictions of an image classifier.',
        },
        'servers': [{'url': root_path or '/'}],
        'paths': _paths(needs_token),
        'components': components,
    }
    if needs_token:
        components['securitySchemes'] = {'token': {'type': 'http', 'scheme': 'bearer'}}
        document['security'] = [{'token': []}]
    return document


def make_examples(needs_token: bool) -> dict[str, str]:
    """Programs that send `photo.jpg`, by language; their address is `ADDRESS`."""
    curl = "curl -H 'Authorization: Bearer TOKEN' " if needs_token else 'curl '
    python = javascript = ''
    if needs_token:
        python = "request.add_header('Authorization', 'Bearer TOKEN')\n"
        javascript = "  headers: { Authorization: 'Bearer TOKEN' },\n"
    return {
        'curl': f"{curl}--data-binary @photo.jpg '{ADDRESS}/predict?top=3'",
        'Python': f"""\
import json
import pathlib
import urllib.request

image = pathlib.Path('photo.jpg').read_bytes()
request = urllib.request.Request('{ADDRESS}/predict?top=3', data=image)
{python}with urllib.request.urlopen(request) as response:
    answer = json.load(response)
print(answer['predictions'][0])""",
        'JavaScript': f"""\
const response = await fetch('{ADDRESS}/predict?top=3', {{
  method: 'POST',
  body: file, // a File, such as input.files[0]
{javascript}}});
const answer = await response.json();
if (!response.ok) throw new Error(answer.error);
console.log(answer.predictions[0]);""",
    }

"""Answers of a server, checked by its own OpenAPI document."""

import json

from helpers.servers import ask

METHODS = {'/predict': 'post'}


def check(port, path, answer):
    """Raises if the description has no such answer, or the answer other fields."""
    import jsonschema

    document = ask(port, '/openapi.json').json
    method = METHODS.get(path, 'get')
    response = document['paths'][path][method]['responses'][str(answer.status)]
    kind = answer.headers['Content-Type'].partition(';')[0]
    schema = response['content'][kind]['schema']
    for name in response.get('headers', ()):
        assert name in answer.headers
    if kind == 'application/json':
        schema = schema | {'components': document['components']}
        validator = jsonschema.Draft202012Validator(schema)
        validator.check_schema(schema)
        validator.validate(json.loads(answer.body))

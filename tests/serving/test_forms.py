"""Images sent by a form, as curl -F and pages do."""

import socket

import numpy as np
import pytest

from helpers.servers import FORM, JPEG, answer_of, ask, form_of

pytest.importorskip('starlette')
pytest.importorskip('hypercorn')
pytest.importorskip('prometheus_client')
pytest.importorskip('python_multipart')


@pytest.mark.parametrize('name', ['image', 'file', 'größe'])
def test_form(port, name):
    body = form_of((name, 'photo 1.jpg', JPEG))
    told = ask(port, '/predict?top=3', body, headers=FORM).json
    expected = ask(port, '/predict?top=3', JPEG).json
    # All but the time that they took.
    assert told | {'seconds': 0} == expected | {'seconds': 0}


def test_form_with_options(port):
    """Fields are options; the address counts more; an empty second file is none."""
    body = form_of(('top', b'2'), ('image', 'a.jpg', JPEG), ('more', '', b''))
    assert len(ask(port, '/predict', body, headers=FORM).json['predictions']) == 2
    told = ask(port, '/predict?top=1&explain=map', body, headers=FORM).json
    assert len(told['predictions']) == 1 and told['map']


@pytest.mark.parametrize(
    ('body', 'headers', 'status', 'message'),
    [
        (form_of(('top', b'2')), FORM, 400, 'it has no file; send one, as with curl'),
        (form_of(('a', 'a', JPEG), ('b', 'b', JPEG)), FORM, 400, 'it has 2 files'),
        (form_of(('a', 'a.jpg', b'')), FORM, 400, 'the file in the form is empty'),
        (form_of(('a', 'a.jpg', b'text')), FORM, 415, 'the file is not an image'),
        (form_of(('a', 'a', JPEG), ('top', b'0')), FORM, 400, 'top=0 must be'),
        (form_of(('a', 'a', JPEG), ('b', b'0')), FORM, 400, 'b= is not known'),
        (form_of(('image', b'x' * 2000)), FORM, 400, 'send the image as a file'),
        (form_of(*[(f'a{i}', b'x') for i in range(30)]), FORM, 400, 'more than 16'),
        (form_of(('a', 'a', JPEG))[:-20], FORM, 400, 'it is cut off'),
        (
            form_of(('a', 'a', JPEG)).replace(b' name="a";', b''),
            FORM,
            400,
            'cannot be parsed',
        ),
        (JPEG, FORM, 400, 'cannot be parsed'),
        (b'', FORM, 400, 'the file is empty'),
        (JPEG, {'Content-Type': 'multipart/form-data'}, 400, 'has no boundary'),
        (JPEG, {'Content-Type': 'multipart/mixed; boundary=x'}, 400, 'must be multi'),
    ],
)
def test_forms_that_cannot_be_used(port, body, headers, status, message):
    answer = ask(port, '/predict', body, headers=headers)
    assert answer.status == status
    assert message in answer.json['error']
    assert len(answer.body) < 400


def test_damaged_forms_are_one_line(port):
    """Whatever bytes come: an answer with a reason, or the prediction."""
    rng = np.random.default_rng(0)
    whole = form_of(('top', b'2'), ('image', 'a.jpg', JPEG[:300]))
    for _ in range(150):
        body = bytearray(whole)
        for place in rng.integers(0, len(body), rng.integers(1, 6)):
            body[place] = rng.integers(0, 256)
        answer = ask(port, '/predict', bytes(body[rng.integers(0, 9) :]), headers=FORM)
        assert answer.status in (400, 415) and answer.json['error']


def test_large_form(strict_port):
    for length in 101_000, 130_000:
        body = form_of(('a', 'a', b'x' * length))
        assert ask(strict_port, '/predict', body, headers=FORM).status == 413
    assert half_form_is_refused(strict_port)


def half_form_is_refused(port):
    """By its length alone, before a byte of it came."""
    head = b'POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999\r\n'
    head += b'Content-Type: multipart/form-data; boundary=x\r\n\r\n'
    with socket.create_connection(('127.0.0.1', port), timeout=60) as connection:
        connection.sendall(head)
        connection.shutdown(socket.SHUT_WR)
        return answer_of(connection).status == 413

"""Parses forms from browsers (`multipart/form-data`) with an image and options.

Nothing is written to disk. The caller limits the number of bytes, and this module the
number of parts.
"""

import dataclasses
from typing import Any

from python_multipart import exceptions, multipart

# A form has one image and the options of /predict; browsers may add fields.
_MAX_PARTS = 16
# Longer text is not an option of /predict.
_MAX_TEXT = 1000
# Bytes for the headers of the parts, in addition to the image.
OVERHEAD_BYTES = 20_000


class FormError(ValueError):
    """A problem with a form, in words for the sender."""


@dataclasses.dataclass(frozen=True)
class Form:
    """The content of a form: the bytes of its one file, and text fields by name."""

    image: bytes
    fields: dict[str, str]


def is_form(content_type: str) -> bool:
    """Whether a body with this header is a multipart form.

    >>> is_form('Multipart/Form-Data; boundary=x'), is_form('image/png')
    (True, False)
    """
    return content_type.lower().startswith('multipart/')


def parse(content_type: str, body: bytes) -> Form:
    """Reads a whole form.

    Args:
      content_type: the header, which names the boundary between the parts.

    Raises:
      FormError: it is not a form, is cut off, or does not have exactly one file.
    """
    kind, options = multipart.parse_options_header(content_type)
    if kind != b'multipart/form-data':
        raise FormError('it must be multipart/form-data')
    if not options.get(b'boundary'):
        raise FormError('its header Content-Type has no boundary')
    files: list[Any] = []
    fields: dict[str, str] = {}
    ended: list[bool] = []

    def check_count():
        if len(files) + len(fields) >= _MAX_PARTS:
            raise FormError(f'it has more than {_MAX_PARTS} parts')

    def on_file(file):
        check_count()
        files.append(file)

    def on_field(field):
        check_count()
        name = field.field_name.decode('utf-8', 'replace')
        value = field.value or b''
        if len(value) > _MAX_TEXT:
            raise FormError(
                f'its part {name[:80]} is a long text; send the image as a file, as '
                'with -F image=@photo.jpg'
            )
        fields[name] = value.decode('utf-8', 'replace')

    try:
        parser = multipart.FormParser(
            'multipart/form-data',
            on_field,
            on_file,
            on_end=lambda: ended.append(True),
            boundary=options[b'boundary'],
            config={'MAX_MEMORY_FILE_SIZE': len(body) + 1},
        )
        parser.write(body)
        parser.finalize()
    except exceptions.FormParserError as error:
        raise FormError(f'it cannot be parsed ({error})'[:200]) from error
    if not ended:
        raise FormError('it is cut off')
    # An empty file field of a form is a file without name and bytes.
    files = [file for file in files if file.size or file.file_name]
    if len(files) != 1:
        raise FormError(
            f'it has {len(files) or "no"} file{"s" * (len(files) > 1)}; send one, as '
            'with curl -F image=@photo.jpg'
        )
    files[0].file_object.seek(0)
    return Form(files[0].file_object.read(), fields)

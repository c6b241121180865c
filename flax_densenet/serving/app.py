"""The model over HTTP: a page to try it in the browser, and JSON for programs.

`GET /` is the page, `POST /predict` takes the bytes of an image or a form with one,
`GET /model` describes the model, and `GET /health` and `GET /metrics` are for
monitoring. Errors are `{"error": "..."}` with a 4xx status for mistakes of the client
and 5xx for those of the server.

No more than `guard.Limits.max_requests` images are held at a time; further images are
refused before a byte of them is read.
"""

import asyncio
import base64
import concurrent.futures
import contextlib
import dataclasses
import difflib
import io
import math
import os
import pathlib
import re
import secrets
from collections.abc import Sequence

import jinja2
import numpy as np
import prometheus_client
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from flax_densenet.data import images
from flax_densenet.errors import UserError
from flax_densenet.inference import explain as explain_lib
from flax_densenet.inference import overlay, prediction
from flax_densenet.models import naming
from flax_densenet.serving import batcher, forms, guard

EXPLAIN = {'': '', '0': '', '1': 'overlay', 'overlay': 'overlay', 'map': 'map'}
_PAGE = pathlib.Path(__file__).with_name('templates') / 'serve.html'
# Images with more pixels are decoded one at a time: decoding takes up to 17 bytes per
# pixel.
_COMMON_PIXELS = 16_000_000
_RETRY = {'Retry-After': '1'}
_POLICY = (
    "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """The query of /predict, checked.

    It has the number of classes, the kind of picture, class and method of the map, and
    the coverage of the prediction set.
    """

    top: int
    picture: str
    of: int | None
    coverage: float | None = None
    how: explain_lib.Options = explain_lib.DEFAULT


class App:
    """The routes and their shared state."""

    def __init__(
        self,
        trained,
        *,
        name: str,
        limits: guard.Limits,
        access: guard.Access,
        explain: Sequence[explain_lib.Options] = (explain_lib.DEFAULT,),
    ):
        """Compiles nothing yet: `batcher.warm_up` does.

        Args:
          trained: a `trained.Trained`.
          name: display name of the model.
          limits: see `guard.Limits`.
          access: the host names and the root path of the server.
          explain: the methods for heat maps that requests can choose, the default
            first.
        """
        self.limits = limits
        self.figures = guard.Metrics()
        self.batcher = batcher.Batcher(
            trained,
            batch_size=batcher.BATCH_SIZE,
            on_batch=self.figures.count_batch,
            explain=explain,
        )
        self._explain = {how.method: how for how in explain}
        self._predictor = self.batcher.predictor
        self._model = _describe(self._predictor, name, limits)
        self._model['explain_methods'] = [
            {'name': how.method, 'title': how.title} for how in explain
        ]
        self._held = 0
        self._large = asyncio.Lock()
        self._threads = concurrent.futures.ThreadPoolExecutor(
            min(4, os.cpu_count() or 1), 'decode'
        )
        # Escapes class names.
        self._page = jinja2.Environment(
            autoescape=True, undefined=jinja2.StrictUndefined
        ).from_string(_PAGE.read_text('utf-8'))
        routes = Starlette(
            routes=[
                Route('/', self.page),
                Route('/predict', self.predict, methods=['POST']),
                Route('/model', self.model),
                Route('/health', self.health),
                Route('/metrics', self.metrics),
            ],
            exception_handlers={HTTPException: _reject, 500: _internal_error},
        )
        self.asgi = guard.RequestGuard(routes, figures=self.figures, access=access)

    def close(self):
        """Ends the threads once they have finished their current work."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.batcher.close()

    async def page(self, request: Request) -> Response:
        """The page, with a policy that blocks all external content."""
        nonce = secrets.token_urlsafe(16)
        text = self._page.render(
            nonce=nonce,
            model=self._model,
            formats=images.FORMATS,
            accept=','.join(sorted(images.EXTENSIONS)),
        )
        headers = {'Content-Security-Policy': _POLICY.format(nonce)}
        return HTMLResponse(text, headers=headers)

    async def model(self, request: Request) -> Response:
        """Classes, image size, metrics and limits."""
        return JSONResponse(self._model)

    async def health(self, request: Request) -> Response:
        """200 once every shape is compiled, 503 before."""
        if not self.batcher.ready:
            answer = {'status': 'starting', 'error': 'the model is being compiled'}
            return JSONResponse(answer, 503, headers=_RETRY)
        return JSONResponse({'status': 'ok'})

    async def metrics(self, request: Request) -> Response:
        """Prometheus' text format."""
        self.figures.ready.set(self.batcher.ready)
        self.figures.held.set(self._held)
        return Response(
            prometheus_client.generate_latest(self.figures.registry),
            media_type=prometheus_client.CONTENT_TYPE_LATEST,
        )

    async def predict(self, request: Request) -> Response:
        """The most likely classes of the image in the body; a picture on request."""
        wanted = self._parse_query(request.query_params)
        _check_headers(request.headers, self.limits)
        if not self.batcher.ready:
            raise HTTPException(503, 'the model is being compiled; try again', _RETRY)
        with self._slot():
            body = await self._read(request)
            content_type = request.headers.get('content-type', '')
            if forms.is_form(content_type):
                form = await self._on_thread(self._parse_form, content_type, body)
                body = form.image
                options = {**form.fields, **request.query_params}
                wanted = self._parse_query(options)
            image = await self._load(body)
            answer = await self.batcher.predict(
                image, explain=wanted.of, how=wanted.how
            )
            return JSONResponse(
                await self._on_thread(self._tell, image, answer, wanted)
            )

    def _parse_form(self, content_type, body):
        try:
            form = forms.parse(content_type, body)
        except forms.FormError as error:
            raise HTTPException(400, f'the form cannot be used: {error}') from error
        if len(form.image) > self.limits.max_bytes:
            raise HTTPException(413, _too_large(self.limits))
        if not form.image:
            raise HTTPException(400, 'the file in the form is empty')
        return form

    def _parse_query(self, query):
        known = ('top', 'explain', 'class', 'method', 'coverage')
        for name in query:
            if name not in known:
                raise HTTPException(
                    400, f'{name}= is not known; there are {", ".join(known)}'
                )
        top, names = query.get('top', '5'), self._predictor.class_names
        # A number of a thousand digits would also be slow to parse.
        if not re.fullmatch('[0-9]{1,6}', top) or int(top) < 1:
            raise HTTPException(400, f'top={top[:20]} must be an integer of at least 1')
        picture = EXPLAIN.get(query.get('explain', ''))
        if picture is None:
            raise HTTPException(
                400, f'explain={query["explain"][:20]} must be 0, 1 (overlay) or map'
            )
        of = batcher.MOST_LIKELY if picture else None
        if 'class' in query:
            if not picture:
                raise HTTPException(
                    400, 'class= names the class for a heat map, which needs explain=1'
                )
            if query['class'] not in names:
                raise HTTPException(400, _unknown_class(query['class'], names))
            of = names.index(query['class'])
        how = self._parse_method(query, picture)
        return _Wanted(int(top), picture, of, self._parse_coverage(query), how)

    def _parse_method(self, query, picture):
        if 'method' not in query:
            return next(iter(self._explain.values()))
        if not picture:
            raise HTTPException(
                400, 'method= selects the method for a heat map, which needs explain=1'
            )
        try:
            found = explain_lib.make(query['method']).method
        except UserError as error:
            raise HTTPException(400, str(error)) from error
        if found not in self._explain:
            raise HTTPException(
                400,
                f'method={found} is not served here; use {", ".join(self._explain)}; '
                'the flag --explain_method of serve adds methods',
            )
        return self._explain[found]

    def _parse_coverage(self, query):
        if 'coverage' not in query:
            return None
        text = query['coverage']
        if not re.fullmatch(r'0?\.[0-9]{1,6}', text) or not float(text):
            raise HTTPException(
                400, f'coverage={text[:20]} must be between 0 and 1, such as 0.9'
            )
        if self._predictor.sets is None:
            raise HTTPException(400, f'coverage={text}: {prediction.NO_SETS}')
        return float(text)

    @contextlib.contextmanager
    def _slot(self):
        if self._held >= self.limits.max_requests:
            raise HTTPException(
                503, f'{self._held} images are waiting; try again', _RETRY
            )
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    async def _read(self, request):
        # Not a list of chunks: for a client that sends single bytes it would be forty
        # times as large as the body.
        body, most = io.BytesIO(), _most_bytes(request.headers, self.limits)
        try:
            async with asyncio.timeout(self.limits.request_timeout_s):
                async for part in request.stream():
                    if body.tell() + len(part) > most:
                        raise HTTPException(413, _too_large(self.limits))
                    body.write(part)
        except TimeoutError as error:
            raise HTTPException(
                408,
                'the image did not arrive within '
                f'{self.limits.request_timeout_s:g} seconds',
            ) from error
        except ClientDisconnect as error:
            raise HTTPException(400, 'the client left') from error
        if not body.tell():
            raise HTTPException(400, 'the file is empty')
        return body.getvalue()

    async def _load(self, body):
        most = int(self.limits.max_megapixels * 1e6)
        common = min(most, _COMMON_PIXELS)
        try:
            try:
                return await self._on_thread(self._decode, body, common)
            except images.TooManyPixels:
                async with self._large:
                    return await self._on_thread(self._decode, body, most)
        except images.TooManyPixels as error:
            raise HTTPException(413, f'the image {error}') from error
        except UserError as error:
            raise HTTPException(415, f'the file {error}') from error

    def _decode(self, body, max_pixels):
        return self._predictor.load(body, max_pixels=max_pixels)

    async def _on_thread(self, function, *args):
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, function, *args)

    def _tell(self, image, answer, wanted):
        """The response of /predict, a dict for JSON."""
        probabilities, names = answer.probabilities, self._predictor.class_names
        if not np.isfinite(probabilities).all():
            raise HTTPException(
                500, 'the outputs of the model are not finite: its training diverged'
            )
        order = np.argsort(-probabilities, kind='stable')
        value = self._predictor.value_name
        told = {
            'predictions': [
                {'class': names[i], value: float(probabilities[i])}
                for i in order[: wanted.top]
            ]
        }
        positive = self._predictor.positive_of(probabilities)
        if positive is not None:
            told['positive'] = list(positive)
        if answer.unusual is not None:
            told['unusual'] = answer.unusual
            told['is_unusual'] = answer.unusual > 1
        if wanted.coverage is not None:
            inside = self._predictor.sets.contains(probabilities[None], wanted.coverage)
            told['set'] = [names[i] for i in order if inside[0, i]]
        if wanted.of is not None:
            of = order[0] if wanted.of == batcher.MOST_LIKELY else wanted.of
            told |= {'explained': names[of], 'method': wanted.how.method}
            # 0 if nothing in the image supports the class: the map is empty.
            told['map_peak'] = float(answer.cam.max())
            if wanted.picture == 'overlay':
                picture = overlay.overlay(image, answer.cam)
            else:
                picture = overlay.layer(answer.cam, image.shape[:2])
            told[wanted.picture] = _to_data_url(picture)
        return told


def _describe(predictor, name, limits):
    trained, preparation = predictor.trained, predictor.preparation
    return {
        'name': name,
        'classes': list(predictor.class_names),
        'multi_label': predictor.multi_label,
        'value': predictor.value_name,
        'unusual': _describe_unusual(predictor),
        'sets': None if predictor.sets is None else list(predictor.sets.counts),
        'variant': trained.metadata['model'].get('variant'),
        'network': naming.describe(
            trained.module,
            trained.metadata['model'].get('variant'),
            channels=preparation.channels,
        ),
        'image_size': preparation.size,
        'channels': preparation.channels,
        'resize': preparation.resize,
        'crop_fraction': preparation.crop_fraction,
        'window': preparation.window,
        'bit_depth': preparation.bit_depth,
        'epoch': trained.metadata.get('epoch'),
        'step': trained.step,
        **predictor.describe_decisions(),
        'figures': {
            name: value
            for name, value in trained.metrics.items()
            # JSON has no NaN, but the loss of a failed training is NaN.
            if name.startswith(('val_', 'test_')) and math.isfinite(value)
        },
        'limits': dataclasses.asdict(limits),
    }


def _describe_unusual(predictor):
    """How unusual images are scored, without the arrays; None if they are not."""
    if not predictor.scores_unusual:
        return None
    found = predictor.trained.decisions.unusual
    return {
        'method': found.method,
        'limit': 1.0,
        'usual_share': found.share,
        'training_images': found.train_count,
        'validation_images': found.val_count,
    }


def _check_headers(headers, limits):
    """Refuses requests by their headers, before any of the body is read."""
    length = headers.get('content-length', '0')
    most = _most_bytes(headers, limits)
    if length.isascii() and length.isdigit() and int(length) > most:
        raise HTTPException(413, _too_large(limits))


def _most_bytes(headers, limits):
    """Maximum size of a body: a form has more than the image."""
    form = forms.is_form(headers.get('content-type', ''))
    return limits.max_bytes + forms.OVERHEAD_BYTES * form


def _too_large(limits):
    return f'the file is larger than {limits.max_megabytes:g} MB'


def _unknown_class(name, names):
    close = difflib.get_close_matches(name[:80], names, 1)
    hint = f'did you mean {close[0]}?' if close else 'GET /model lists the classes'
    return f'class={name[:80]} is not a class of the model; {hint}'


def _to_data_url(picture):
    """uint8 `[H, W, 3 or 4]` as `data:image/png;base64,...`."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, 'PNG')
    return 'data:image/png;base64,' + base64.b64encode(file.getvalue()).decode()


def _reject(request, error):
    detail = error.detail
    if error.status_code == 404:
        detail = f'{request.url.path[:80]} does not exist; use {", ".join(guard.PATHS)}'
    elif error.status_code == 405:
        allowed = ', '.join(sorted(error.headers['Allow'].split(', ')))
        detail = f'{request.url.path} takes {allowed}, not {request.method[:20]}'
    return JSONResponse({'error': detail}, error.status_code, headers=error.headers)


def _internal_error(request, error):
    return JSONResponse({'error': 'internal error of the server; see its log'}, 500)

"""The model over HTTP: a page to try it in the browser, and JSON for programs.

`GET /` is the page, `POST /predict` takes the bytes of an image or a form with one,
`GET /model` describes the model, and `GET /health` and `GET /metrics` are for
monitoring. `GET /docs` and `GET /openapi.json` describe all of these. Errors are
`{"error": "..."}` with a 4xx status for mistakes of the client and 5xx for those of the
server.

No more than `guard.Limits.max_requests` images are held at a time; further images are
refused before a byte of them is read.
"""

import asyncio
import concurrent.futures
import contextlib
import io
import os
import time
from collections.abc import Sequence

import prometheus_client
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flax_densenet.data import images
from flax_densenet.errors import UserError
from flax_densenet.inference import explain as explain_lib
from flax_densenet.serving import access as access_lib
from flax_densenet.serving import (
    answers,
    batcher,
    forms,
    guard,
    openapi,
    pages,
    queries,
)

# Images with more pixels are decoded one at a time: decoding takes up to 17 bytes per
# pixel.
_COMMON_PIXELS = 16_000_000
_RETRY = {'Retry-After': '1'}


class App:
    """The routes and their shared state."""

    def __init__(
        self,
        trained,
        *,
        name: str,
        limits: guard.Limits,
        access: access_lib.Access,
        explain: Sequence[explain_lib.Options] = (explain_lib.DEFAULT,),
        log_requests: bool = False,
    ):
        """Compiles nothing yet: `batcher.warm_up` does.

        Args:
          trained: a `trained.Trained`.
          name: display name of the model.
          limits: see `guard.Limits`.
          access: who may use the server, and its root path.
          explain: the methods for heat maps that requests can choose, the default
            first.
          log_requests: whether each request is logged in one line.
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
        self._model = answers.describe_model(self._predictor, name=name, limits=limits)
        self._model['explain_methods'] = [
            {'name': how.method, 'title': how.title} for how in explain
        ]
        self._held = 0
        self._large = asyncio.Lock()
        self._threads = concurrent.futures.ThreadPoolExecutor(
            min(4, os.cpu_count() or 1), 'decode'
        )
        self._access = access
        self._pages = pages.Pages()
        self._openapi = openapi.describe(
            root_path=access.root_path, needs_token=access.token is not None
        )
        routes = Starlette(
            routes=[
                Route('/', self.page),
                Route('/predict', self.predict, methods=['POST']),
                Route('/model', self.model),
                Route('/health', self.health),
                Route('/metrics', self.metrics),
                Route('/docs', self.docs),
                Route('/openapi.json', self.schema),
            ],
            exception_handlers={HTTPException: _reject, 500: _internal_error},
        )
        self.asgi = guard.RequestGuard(
            routes, figures=self.figures, access=access, log_requests=log_requests
        )

    def close(self):
        """Ends the threads once they have finished their current work."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.batcher.close()

    async def page(self, request: Request) -> Response:
        """The page; without the token only a form that asks for it."""
        sent = request.headers.get('authorization')
        return self._pages.render(
            'serve.html',
            model=self._model if self._access.accepts_token(sent) else None,
            needs_token=self._access.token is not None,
            formats=images.FORMATS,
            accept=','.join(sorted(images.EXTENSIONS)),
        )

    async def docs(self, request: Request) -> Response:
        """The description of the interface for people."""
        return self._pages.render(
            'docs.html',
            api=self._openapi,
            examples=openapi.make_examples(self._access.token is not None),
            address=openapi.ADDRESS,
        )

    async def schema(self, request: Request) -> Response:
        """The description of the interface for programs."""
        return JSONResponse(self._openapi)

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
        started = time.monotonic()
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
            result = await self.batcher.predict(
                image, explain=wanted.of, how=wanted.how
            )
            answer = await self._on_thread(
                answers.describe_prediction, self._predictor, image, result, wanted
            )
            answer['model'] = answers.describe_version(self._model)
            answer['seconds'] = round(time.monotonic() - started, 4)
            return JSONResponse(answer)

    def _parse_query(self, options):
        return queries.parse(
            options,
            class_names=self._predictor.class_names,
            methods=self._explain,
            has_sets=self._predictor.sets is not None,
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

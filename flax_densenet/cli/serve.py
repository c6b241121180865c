"""`serve`: serves a model over HTTP, with a web page to drop images on."""

import pathlib

from flax_densenet.cli import arguments, options, trained_model


def run(invocation: options.Invocation):
    """Serves the best checkpoint, or init_from's weights, until it is stopped."""
    import jax

    from flax_densenet.distributed import mesh as mesh_lib
    from flax_densenet.inference import explain
    from flax_densenet.serving import server
    from flax_densenet.weights import trained as trained_lib

    path = trained_model.find(invocation)
    chosen = trained_model.choices(invocation)
    allowed = [f'data.{name}' for name in chosen.data]
    trained_model.check_fields(invocation, path, *allowed)
    server.check_installed()
    from flax_densenet.serving import access as access_lib
    from flax_densenet.serving import guard
    from flax_densenet.weights import precision as precision_lib

    flags = invocation.flags
    methods = explain.make_several(
        flags.explain_method,
        steps=flags.explain_steps,
        patches=flags.explain_patches,
        names=('--explain_method', '--explain_steps', '--explain_patches'),
    )
    precision_lib.check(flags.precision)
    names = [flag.name for flag in _LIMITS]
    limits = guard.Limits(**{name: getattr(flags, name) for name in names})
    token = access_lib.read_token(invocation.path('token_file'))
    # Checked before the model is loaded, since the port may be in use.
    with server.listen(flags.host, flags.port) as listener:
        access = server.make_access(
            listener,
            flags.allowed_hosts,
            flags.root_path,
            allow_origin=flags.allow_origin,
            token=token,
        )
        # Uses one device: a batch of a few images does not divide over several.
        mesh = mesh_lib.make_mesh(jax.local_devices()[:1])
        trained = trained_lib.load_trained(path, 'best', mesh=mesh, choices=chosen)
        trained = precision_lib.resolve(trained, path, flags.precision)
        trained.notes.tell()
        server.run(
            trained,
            listener,
            name=pathlib.Path(path).resolve().name,
            limits=limits,
            access=access,
            explain=methods,
            log_requests=flags.log_requests,
        )


_EXPLAIN = (
    options.Flag(
        'explain_method',
        'Methods for heat maps that visitors can choose, separated by commas, the '
        'default first: gradcam, gradcam++, hirescam, layercam; or, slower, occlusion '
        'or integrated_gradients. Each is compiled at the start.',
        kind=list,
        value='METHODS',
        default_text='gradcam',
    ),
    *options.EXPLAIN[1:],
)
_LIMITS = (
    options.Flag(
        'max_megabytes',
        'Largest file to accept, in MB.',
        kind=float,
        default=20.0,
        value='MB',
    ),
    options.Flag(
        'max_megapixels',
        'Largest image to decode, in megapixels.',
        kind=float,
        default=64.0,
        value='MP',
    ),
    options.Flag(
        'max_requests',
        'Maximum number of images to receive and process at the same time.',
        kind=int,
        default=32,
        value='N',
    ),
    options.Flag(
        'request_timeout_s',
        'Seconds to wait for an image to arrive.',
        kind=float,
        default=30.0,
        value='SECONDS',
    ),
)
COMMAND = options.Command(
    'serve',
    'Serve a trained model over HTTP, with a web page.',
    run,
    usage='MODEL',
    details=(
        'MODEL is the folder of a run, a file of weights or a folder of the Hugging '
        'Face Hub. docs/serve.md describes the page, the API and /metrics for '
        'Prometheus; the server describes its API at /docs and /openapi.json. Needs '
        'the extra: pip install "flax_densenet[serve]".',
    ),
    examples=(
        ('on this machine, port 8000', 'serve ckpt/birds'),
        (
            'with two kinds of heat maps',
            'serve ckpt/birds --explain_method=gradcam,layercam',
        ),
        (
            'for other machines as well, with a token',
            'serve ckpt/birds --host=0.0.0.0 --port=80 --token_file=token.txt',
        ),
    ),
    flags={
        'Model': (options.WORKDIR, *options.OF_WEIGHTS, options.RAW, options.PRECISION),
        'Maps': _EXPLAIN,
        'Address': (
            options.Flag(
                'host',
                'Address to listen on. 127.0.0.1 accepts only this machine.',
                default='127.0.0.1',
                value='ADDRESS',
            ),
            options.Flag(
                'port',
                'Port to listen on; 0 picks a free one.',
                kind=int,
                default=8000,
                value='PORT',
            ),
        ),
        'Access': (
            options.Flag(
                'token_file',
                'File with a token that requests have to send, as Authorization: '
                'Bearer TOKEN; the page asks for it. Without this flag, the '
                'environment variable FLAX_DENSENET_TOKEN is used.',
                value='FILE',
                default_text='no token',
                is_path=True,
            ),
            options.Flag(
                'allow_origin',
                'Sites whose pages may use the API from a browser, such as '
                'https://app.example.org, separated by commas; * allows all.',
                kind=list,
                value='ORIGINS',
                default_text='only its own page',
            ),
        ),
        'Log': (
            options.Flag(
                'log_requests',
                'Print a line for each request: time, method, path, status, duration '
                'and sizes.',
                kind=bool,
                default=False,
            ),
        ),
        'Behind a proxy': (
            options.Flag(
                'allowed_hosts',
                'Host names that a proxy forwards, such as hub.example.org or '
                '*.example.org, separated by commas.',
                kind=list,
                value='NAMES',
            ),
            options.Flag(
                'root_path',
                'Path prefix that a proxy adds.',
                default='',
                value='PATH',
            ),
        ),
        'Limits': _LIMITS,
    },
    place=arguments.place_model,
    fields='Only init_from applies; for weights that do not say how images are '
    'prepared, also data.mean, data.std, data.image_size, data.resize, '
    'data.crop_fraction, data.interpolation and data.channels.',
)

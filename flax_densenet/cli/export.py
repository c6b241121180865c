"""`export`: writes a trained model to a file for another program."""

from flax_densenet.cli import arguments, options, trained_model
from flax_densenet.errors import UserError
from flax_densenet.system import terminal


def run(invocation: options.Invocation):
    """Writes the best checkpoint, or weights of init_from, and verifies the file."""
    from flax_densenet.export import formats

    flags, out = invocation.flags, invocation.path('out')
    if not out:
        raise UserError('export needs the file to write: export MODEL FILE')
    file_format = flags.format or formats.by_ending(out)
    settings = formats.Options(flags.inputs, flags.precision, license=flags.license)
    formats.check_format(out, file_format, settings)
    path = trained_model.find(invocation)
    facts = trained_model.export(invocation, path, out, file_format, settings)
    terminal.say(f'{out}: the model of {path}')
    for name, value in facts:
        terminal.say(f'  {name}: {value}')


def _place(positionals):
    arguments.check_count(positionals, 'MODEL', 'FILE')
    return list(zip(('workdir', 'out'), positionals, strict=False))


COMMAND = options.Command(
    'export',
    'Write a trained model as ONNX, PyTorch, Keras, StableHLO, safetensors or a Hub '
    'folder.',
    run,
    usage='MODEL FILE',
    details=(
        'MODEL is the folder of a run or a file of weights. The format follows from '
        'the extension of FILE unless --format names it: .onnx, .safetensors, .pth or '
        '.pt (torch), .keras or .h5 (keras), .stablehlo. Before the file gets its '
        'name, it is opened with the program that it is for, and the outputs are '
        "compared with the model's. A model card is written with it.",
    ),
    examples=(
        ('ONNX', 'export ckpt/birds birds.onnx'),
        ('ONNX in 8-bit integers', 'export ckpt/birds birds.onnx --precision=int8'),
        (
            'a folder for the Hugging Face Hub',
            'export ckpt/birds birds --format=huggingface --license=mit',
        ),
    ),
    flags={
        'Model': (options.WORKDIR, *options.OF_WEIGHTS, options.RAW),
        'Output': (
            options.Flag('out', 'File or folder to write.', value='FILE', is_path=True),
            options.Flag(
                'format',
                'safetensors, torch, keras, onnx, stablehlo or huggingface (a folder).',
                value='FORMAT',
                default_text='by the extension of FILE',
            ),
            options.Flag(
                'inputs',
                'Input type: images (uint8, or uint16 if the model keeps more than 8 '
                'bits; outputs probabilities) or normalized (float, outputs logits).',
                value='TYPE',
                default_text='images for onnx and stablehlo, else normalized',
            ),
            options.Flag(
                'precision',
                'Precision of the stored weights: float32; float16 or bfloat16, half '
                'the size; or int8, which also computes in integers (onnx).',
                default='float32',
                value='TYPE',
            ),
        ),
        'Verification': (options.VERIFICATION_FILES,),
        'Model card': options.LICENSES,
    },
    place=_place,
    fields='Only init_from and data.* apply, for the images to verify on.',
)

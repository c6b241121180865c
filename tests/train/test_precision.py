"""bfloat16 activations: what stays float32 in a training step, from its program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_densenet import create_model, init_variables
from flax_densenet.train import fit, optimizers, step
from helpers.marks import slow_after
from helpers.runs import read_records, tiny_config

WAYS = slow_after(1, [{'batch_norm_group': 2}, {}, {'fast': False}, {'remat': 'none'}])


def equations(jaxpr):
    """All of a program, the inner ones too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in jax.tree.leaves(
                value, is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr')
            ):
                if hasattr(inner, 'eqns') or hasattr(inner, 'jaxpr'):
                    yield from equations(getattr(inner, 'jaxpr', inner))


def trace(dtype, **fields):
    """A step's program, and the shapes and types of what it returns."""
    fields |= {'dtype': dtype, 'kernel': 'xla'}
    module = create_model('BC-L10k4', num_classes=3, block_sizes=(1, 1), **fields)
    optimizer = optimizers.make_optimizer(
        0.1, name='adam', momentum=0, weight_decay=0.1
    )
    state = step.new_state(init_variables(module, 0), optimizer)
    batch = {
        'image': np.zeros((8, 8, 8, 3), np.uint8),
        'label': np.zeros(8, np.int32),
        'epoch': np.zeros(8, np.int32),
    }
    options = dict(mean=(0.5,) * 3, std=(0.2,) * 3, l2_penalty=0.1)
    take = step.make_train_step(
        module, optimizer, step.StepOptions(gradient_clip=1.0, **options)
    )
    differentiate = step.make_gradients(
        module, step.StepOptions(seed=0, frozen=0, **options)
    )
    program, results = jax.make_jaxpr(take, return_shape=True)(state, batch)
    return program, results, jax.eval_shape(differentiate, state, batch)


def operands(program, *names):
    return [
        equation.invars[0].aval.dtype
        for equation in equations(program.jaxpr)
        if equation.primitive.name in names
    ]


@pytest.mark.slow
@pytest.mark.parametrize('way', WAYS, ids=str)
def test_what_stays_float32(way):
    program, (state, loss), (gradients, rest) = trace('bfloat16', **way)
    for tree in (state, loss, gradients, rest):
        kinds = {leaf.dtype for leaf in jax.tree.leaves(tree)}
        assert kinds <= {np.dtype(name) for name in ('float32', 'int32', 'bool')}
    # Sums: of statistics, losses, their gradients, and the mean over positions.
    kinds = {jnp.dtype('float32'), jnp.dtype('int32')}
    assert set(operands(program, 'reduce_sum')) <= kinds
    # Softmax and batch norm's root.
    for name in ('exp', 'log', 'rsqrt', 'sqrt', 'reduce_max'):
        assert set(operands(program, name)) == {jnp.dtype('float32')}, name
    convolutions = operands(program, 'conv_general_dilated')
    assert convolutions and set(convolutions) == {jnp.dtype('bfloat16')}
    # The classifier, forward and two backward, is all that multiplies in float32.
    assert operands(program, 'dot_general').count(jnp.dtype('float32')) == 3


@pytest.mark.slow
def test_the_scan_sees_bfloat16():
    program = jax.make_jaxpr(jax.jit(lambda x: jnp.exp(jax.lax.reduce_sum_p.bind(
        x, axes=(0,), out_sharding=None
    ))))(jnp.zeros(3, jnp.bfloat16))  # fmt: skip
    assert operands(program, 'reduce_sum', 'exp') == [jnp.dtype('bfloat16')] * 2
    assert jnp.dtype('bfloat16') not in operands(trace('float32')[0], 'reduce_sum')


@pytest.mark.exhaustive
@pytest.mark.slow
def test_bfloat16_learns_as_float32(tmp_path):
    """Six epochs of digits: losses within a tenth, accuracies within 5 %; first 3 %.

    At a rate where another rounding grows slowly: at 1e-2 plain and fast layers, both
    in float32, ended three epochs up to 10 % apart, bfloat16 21 % (three seeds).
    """
    records = []
    for dtype in ('float32', 'bfloat16'):
        fields = {'model.dtype': dtype, 'data.batch_size': 32, 'train.epochs': 6}
        fields |= {'model.block_sizes': (1, 1, 1)}
        fit.fit(tiny_config(**fields), str(tmp_path / dtype))
        records.append(read_records(tmp_path / dtype))
    for one, other in zip(*records, strict=True):
        assert one['train_loss'] != other['train_loss']
        most = 0.03 if one['epoch'] <= 3 else 0.1
        assert other['train_loss'] == pytest.approx(one['train_loss'], rel=most)
    assert other['test_accuracy'] > 0.85
    assert other['test_accuracy'] == pytest.approx(one['test_accuracy'], abs=0.05)

"""The table of commands."""

from flax_densenet.cli import (
    calibrate,
    crossval,
    evaluate,
    export,
    lr_find,
    pack,
    predict,
    push,
    report,
    serve,
    settings,
    summary,
    sweep,
    train,
    weights,
)

# In the order of --help; the first is the default.
COMMANDS = {
    module.COMMAND.name: module.COMMAND
    for module in (
        *(train, evaluate, report, calibrate, predict, export, push, serve),
        *(crossval, sweep, lr_find, pack, summary, weights, settings),
    )
}

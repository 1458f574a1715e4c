"""One file a verb; each registers its arguments and runs with the parsed ones."""

from samv2.commands import (
    bootstrap,
    demo,
    doctor,
    evaluate,
    export,
    inspect_frame,
    train,
)

COMMANDS = (demo, bootstrap, train, evaluate, export, inspect_frame, doctor)

"""One file a verb; each registers its arguments and runs with the parsed ones."""

from samv2.commands import (
    ablate,
    bootstrap,
    demo,
    doctor,
    evaluate,
    export,
    inspect_frame,
    train,
)

COMMANDS = (
    demo,
    bootstrap,
    train,
    ablate,
    evaluate,
    export,
    inspect_frame,
    doctor,
)

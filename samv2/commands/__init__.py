"""One file a verb; each registers its arguments and runs with the parsed ones."""

from samv2.commands import (
    ablate,
    bootstrap,
    demo,
    doctor,
    evaluate,
    export,
    generate,
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
    generate,
    inspect_frame,
    doctor,
)

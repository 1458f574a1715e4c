"""One file a verb; each registers its arguments and runs with the parsed ones."""

from samv2.commands import (
    bench_federation,
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
    evaluate,
    export,
    inspect_frame,
    bench_federation,
    doctor,
)

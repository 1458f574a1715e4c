"""One file a verb; each registers its arguments and runs with the parsed ones."""

from samv2.commands import (
    bench_federation,
    bootstrap,
    demo,
    doctor,
    evaluate,
    export,
    inspect_frame,
    report,
    train,
)

COMMANDS = (
    demo,
    bootstrap,
    train,
    evaluate,
    report,
    export,
    inspect_frame,
    bench_federation,
    doctor,
)

"""One file a verb; each registers its arguments and runs with the parsed ones."""

from samv2.commands import (
    ablate,
    bench_federation,
    bootstrap,
    demo,
    doctor,
    evaluate,
    export,
    generate,
    inspect_frame,
    report,
    train,
)

COMMANDS = (
    demo,
    bootstrap,
    train,
    evaluate,
    generate,
    report,
    export,
    ablate,
    bench_federation,
    inspect_frame,
    doctor,
)

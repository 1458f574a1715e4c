"""One file a verb; each registers its arguments and runs with the parsed ones."""

from samv2.commands import bootstrap, demo, doctor, evaluate, export, train

COMMANDS = (demo, bootstrap, train, evaluate, export, doctor)

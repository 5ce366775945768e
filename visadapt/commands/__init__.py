"""The commands, one module each: `add_arguments(parser)` and `run(args) -> exit code`. No torch at import.

Nothing is defined here: `commands.list` would stand in for the builtin `list`.
"""

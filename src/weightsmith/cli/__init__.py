"""The command line: one short file per command, no logic of its own.

Nothing heavy is imported before a command runs, so `weightsmith --help` answers at once.
"""

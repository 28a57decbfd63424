"""Settings of the whole suite."""

from hypothesis import settings

# A busy machine must not fail a test, and a failure must come back on the next run.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")

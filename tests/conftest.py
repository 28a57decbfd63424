"""Settings of the whole suite."""

import signal

from hypothesis import settings

# A shell that runs the suite in the background ignores Ctrl-C for it, and all its children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine must not fail a test, and a failure must come back on the next run.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")

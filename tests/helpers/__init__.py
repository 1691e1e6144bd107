"""What several test files share. `tests` is on the path of Python: `from helpers.paths import ROOT`."""

"""Run folders: writing and reading them, and deleting what is not needed any more."""

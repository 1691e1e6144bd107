"""The command line. `app.py` lists the commands; each is in the module of its topic."""

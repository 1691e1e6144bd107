"""The interactive part of the report page: its data (`document.py`), its place (`page.py`), its program (`web/`)."""

"""The parquet files that W&B makes of a run's history."""

from __future__ import annotations

import io
import json


def parquet(lines: list[str]) -> bytes:
    """History rows -> one parquet file: a column a key, empty where a row lacks it."""
    import pyarrow as pa
    from pyarrow import parquet as files

    rows = [json.loads(line) for line in lines]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    columns = {key: pa.array([row.get(key) for row in rows]) for key in keys}
    columns["_step"] = pa.array([row["_step"] for row in rows], pa.int64())
    out = io.BytesIO()
    files.write_table(pa.table(columns), out)
    return out.getvalue()

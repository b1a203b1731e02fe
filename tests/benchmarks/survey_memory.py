"""The peak memory of a survey's prediction, for a given number of galaxies: python survey_memory.py COUNT CATALOG.

The galaxies are the catalog's, again and again under new names; the model is small, so that its own memory hides no
growth.
"""

import resource
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from zoobot_hf import ZoobotForImageClassification, ZoobotImageProcessor, read_galaxies, small_encoder_config
from zoobot_hf.prediction.survey import predict_survey


def main(count: int, catalog: str) -> None:
    galaxies = read_galaxies(catalog)
    rows = pd.DataFrame({"file_loc": [galaxies["file_loc"][i % len(galaxies)] for i in range(count)]})
    model = ZoobotForImageClassification(small_encoder_config(["no ring", "ring"]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "catalog.parquet"
        rows.assign(id_str=[f"galaxy_{i}" for i in range(count)]).to_parquet(path)
        started = time.perf_counter()
        predict_survey(model, ZoobotImageProcessor(64), path, Path(folder) / "out", shard_size=1000)
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{count} galaxies  peak memory {peak:.0f} MiB  {count / seconds:.0f} galaxies/s")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])

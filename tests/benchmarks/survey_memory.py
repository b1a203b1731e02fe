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

from zoobot_hf import EMBEDDED_ENCODER, ZoobotForImageClassification, image_processor_for, read_galaxies
from zoobot_hf.prediction.survey import predict_survey


def main(count: int, catalog: str) -> None:
    galaxies = read_galaxies(catalog)
    rows = pd.DataFrame({"file_loc": [galaxies["file_loc"][i % len(galaxies)] for i in range(count)]})
    model = ZoobotForImageClassification.from_pretrained(EMBEDDED_ENCODER, label_names=["no ring", "ring"])
    processor = image_processor_for(EMBEDDED_ENCODER)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "catalog.parquet"
        rows.assign(id_str=[f"galaxy_{i}" for i in range(count)]).to_parquet(path)
        started = time.perf_counter()
        predict_survey(model, processor, path, Path(folder) / "out", shard_size=1000)
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{count} galaxies  peak memory {peak:.0f} MiB  {count / seconds:.0f} galaxies/s")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])

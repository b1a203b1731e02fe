"""The speed of a head on stored embeddings, from Parquet files to Parquet files: python stored_predictions.py [COUNT].

The embeddings are random numbers, 640 of them in float16 for each galaxy, under the manifest of a run on drawn
galaxies; the encoder is a ConvNeXt of that size with random weights, and is never run on them.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from transformers import ConvNextConfig

from zoobot_hf import ZoobotConfig, ZoobotForImageClassification, ZoobotImageProcessor
from zoobot_hf.prediction.embeddings import embed_survey, predict_embeddings
from zoobot_hf.prediction.shards import Shard, shard_paths, write_shard

SIZE, SHARD, REPEATS = 640, 4096, 3


def write_embeddings(model, processor, folder, count):
    (folder / "images").mkdir()
    Image.new("RGB", (32, 32), "grey").save(folder / "images/galaxy.png")
    embed_survey(model, processor, folder / "images", folder / "embedded", shard_size=SHARD)
    path = folder / "embedded/manifest.json"
    manifest = {**json.loads(path.read_text()), "galaxies": count}
    path.write_text(json.dumps(manifest))
    generator = np.random.default_rng(0)
    for number, path in enumerate(shard_paths(folder / "embedded", manifest)):
        rows = range(number * SHARD, min((number + 1) * SHARD, count))
        values = generator.standard_normal((len(rows), SIZE), np.float32).astype(np.float16)
        lists = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), SIZE)
        names = [f"J{row:018d}" for row in rows]
        write_shard(path, Shard(pa.table({"id_str": names, "embedding": lists}), [], str(number)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int, nargs="?", default=500_000)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    encoder = ConvNextConfig(hidden_sizes=[16, 32, 64, SIZE], depths=[1, 1, 1, 1], image_size=32)
    model = ZoobotForImageClassification(ZoobotConfig(encoder, id2label={0: "no ring", 1: "ring"})).eval()
    processor = ZoobotImageProcessor(32)
    speeds = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_embeddings(model, processor, folder, options.count)
        for repeat in range(REPEATS):
            started = time.perf_counter()
            predict_embeddings(model, processor, folder / "embedded", folder / f"out{repeat}", device=options.device)
            speeds.append(options.count / (time.perf_counter() - started))
    print(
        f"{options.count} galaxies of {SIZE} dimensions, float16, {options.device}, {torch.get_num_threads()} threads: "
        f"{statistics.median(speeds):,.0f} galaxies/s (median of {REPEATS}: {min(speeds):,.0f} to {max(speeds):,.0f})"
    )


if __name__ == "__main__":
    main()

"""`zoobot-hf cache`: the embeddings that are kept on disk."""

import argparse

from ..training.embedding_cache import cache_folder, clear_cache, list_cache


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clear", action="store_true", help="delete them all")


def run(options: argparse.Namespace) -> int:
    if options.clear:
        print(f"{clear_cache() / 1e6:.1f} MB freed in {cache_folder()}")
        return 0
    files = list_cache()
    for file in files:
        print(
            f"{file.size / 1e6:10.1f} MB  {file.images:8} images x {file.views} views  {file.encoder}  {file.path.name}"
        )
    print(f"{sum(file.size for file in files) / 1e6:10.1f} MB in {cache_folder()}")
    return 0

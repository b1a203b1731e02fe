"""`zoobot-hf merge`: one table of the folder that predict wrote."""

import argparse
from pathlib import Path

from ..prediction.merge import TABLES, merge_predictions
from ..prediction.runs import read_finished
from .predict import check_table


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="what predict wrote and finished")
    parser.add_argument("--output", required=True, type=Path, help="the table: .parquet, .csv, .fits or .vot")
    parser.add_argument(
        "--table",
        choices=TABLES,
        default="predictions",
        help="for a decision tree also Galaxy Zoo's friendly and advanced tables (default: %(default)s)",
    )
    parser.add_argument("--catalog", type=Path, help="a catalog whose columns are joined by id_str")


def run(options: argparse.Namespace) -> int:
    check_table(options.output)
    count = merge_predictions(options.folder, options.output, table=options.table, catalog=options.catalog)
    total = read_finished(options.folder, contents="predictions")["galaxies"]
    print(f"{count if count == total else f'{count} of {total}'} galaxies: {options.output}")
    return 0

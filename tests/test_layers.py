"""The order of the house: a module imports only from modules above its own, and only at its top."""

import ast
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "zoobot_hf"

# From the top of the house down. models/ is stricter still: it imports nothing from the other folders.
ORDER = [
    "data.catalog",
    "data.images",
    "data.decision_tree",
    "data.dataset",
    "data.balance",
    "data.simulation",
    "data.population",
    "data.volunteers",
    "data.rings",
    "models.votes",
    "models.configuration_zoobot",
    "models.image_processing_zoobot",
    "models.heads",
    "models.lightning_checkpoint",
    "models.conversion",
    "models.checkpoint",
    "models.modeling_zoobot",
    "models.modeling_galaxy_zoo",
    "models.export",
    "evaluation.metrics",
    "evaluation.vote_metrics",
    "evaluation.tables",
    "evaluation.vote_tables",
    "evaluation.intervals",
    "evaluation.power_law",
    "evaluation.calibration",
    "evaluation.reliability",
    "evaluation.selection",
    "evaluation.scores",
    "evaluation.judgement",
    "evaluation.label_audit",
    "evaluation.plots",
    "evaluation.vote_plots",
    "evaluation.probability_plots",
    "publishing.model_card",
    "publishing.hub",
    "publishing.hub_dataset",
    "publishing.run_folder",
    "training.layer_fusion",
    "training.machine",
    "training.arguments",
    "training.augmentation",
    "training.depthwise",
    "training.reading",
    "training.embedding_cache",
    "training.linear_heads",
    "training.folds",
    "training.head_grid",
    "training.weight_averaging",
    "training.trainer",
    "training.stages",
    "training.vote_report",
    "training.cross_validation",
    "training.run_report",
    "training.finetuning",
    "training.label_efficiency",
    "prediction.tables",
    "prediction.galaxies",
    "prediction.archives",
    "prediction.hub_datasets",
    "prediction.pieces",
    "prediction.shards",
    "prediction.components",
    "prediction.runs",
    "prediction.survey",
    "prediction.embeddings",
    "prediction.merge",
    "commands.messages",
    "commands.options",
    "commands.inputs",
    "commands.finetune",
    "commands.demo",
    "commands.curve",
    "commands.predict",
    "commands.embed",
    "commands.merge",
    "commands.cache",
    "commands.push",
    "commands.export",
    "cli",
    "_registration",
]
CLOSED_FOLDER = "models"
# It makes the rest known to transformers, and is there so that nothing is imported before it is needed.
MODULES_THAT_IMPORT_LATE = {"_registration"}
# "module: imported name", where an import inside a function is allowed
IMPORTS_OF_OPTIONAL_EXTRAS = {"models.export: onnxruntime", "models.export: onnxscript"}
MODULES_ABOUT_RINGS = {"data.rings", "data.simulation", "data.population", "data.volunteers"}  # all but one draw them
FOLDERS_OF_ANY_GALAXY = ("data", "models", "training", "prediction")


def name_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = {name: path for name, path in PATHS.items() if path.name not in ("__init__.py", "__main__.py")}
FOLDERS = {name: path for name, path in PATHS.items() if path.name == "__init__.py" and name}


def parse(source):
    return ast.parse(source)


def absolute_name(node, module, *, is_folder=False):
    """The absolute name of what `from X import ...` has as X, for example "zoobot_hf.data.catalog"."""
    if node.level == 0:
        return node.module
    parts = ["zoobot_hf", *module.split(".")]
    base = parts[: len(parts) - node.level + is_folder]
    return ".".join([*base, *([node.module] if node.module else [])])


def imported_names(tree, module, *, is_folder=False):
    """Every dotted name that is imported anywhere in the tree, functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute_name(node, module, is_folder=is_folder)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def modules_imported_by(tree, module, *, is_folder=False):
    """The package's own modules among the imports; "" stands for the package itself."""
    for name in imported_names(tree, module, is_folder=is_folder):
        if name != "zoobot_hf" and not name.startswith("zoobot_hf."):
            continue
        parts = name.split(".")[1:]
        prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
        yield next((prefix for prefix in prefixes if prefix in ORDER or prefix in FOLDERS), "")


def imports_inside_functions(tree, module):
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return sorted({name for function in functions for name in imported_names(function, module)})


def is_allowed(importer, imported):
    if imported not in ORDER or importer not in ORDER:
        return False
    if importer.startswith(f"{CLOSED_FOLDER}.") and not imported.startswith(f"{CLOSED_FOLDER}."):
        return False
    return ORDER.index(imported) < ORDER.index(importer)


def test_every_module_has_its_place_in_the_order():
    assert sorted(set(MODULES) - set(ORDER)) == []


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_modules_above_its_own(module):
    tree = parse(MODULES[module].read_text())
    wrong = {imported for imported in modules_imported_by(tree, module) if not is_allowed(module, imported)}
    assert wrong == set(), f"{module} imports {sorted(wrong)}, which stands beside or below it."


@pytest.mark.parametrize("module", sorted(set(MODULES) - MODULES_THAT_IMPORT_LATE))
def test_no_import_stands_inside_a_function(module):
    inside = imports_inside_functions(parse(MODULES[module].read_text()), module)
    assert [name for name in inside if f"{module}: {name}" not in IMPORTS_OF_OPTIONAL_EXTRAS] == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_itself_imports_nothing_from_the_package(folder):
    assert list(modules_imported_by(parse(FOLDERS[folder].read_text()), folder, is_folder=True)) == []


def words_in_code(path):
    """The words of every name in a file, "ring_count" giving "ring" and "count"; no comments, no strings."""
    with tokenize.open(path) as file:
        names = [token.string for token in tokenize.generate_tokens(file.readline) if token.type == tokenize.NAME]
    return {word.lower() for name in names for word in name.split("_")}


@pytest.mark.parametrize("module", [name for name in MODULES if name.split(".")[0] in FOLDERS_OF_ANY_GALAXY])
def test_only_the_ring_files_say_ring(module):
    said = {"ring", "rings"} & words_in_code(MODULES[module])
    assert module in MODULES_ABOUT_RINGS or said == set()


@pytest.mark.parametrize(
    ("source", "module", "imported"),
    [
        ("from zoobot_hf.data.catalog import read_catalog", "data.dataset", {"data.catalog"}),
        ("from zoobot_hf.data import catalog", "data.dataset", {"data.catalog"}),
        ("import zoobot_hf.data.catalog", "cli", {"data.catalog"}),
        ("from .catalog import read_catalog", "data.dataset", {"data.catalog"}),
        ("from . import catalog", "data.dataset", {"data.catalog"}),
        ("from ..models.heads import build_head", "training.trainer", {"models.heads"}),
        ("from .models import heads", "cli", {"models.heads"}),
        ("def load():\n    from ..models import heads", "training.trainer", {"models.heads"}),
        ("from zoobot_hf.data import nothing_of_that_name", "cli", {"data"}),
        ("from zoobot_hf import finetune", "cli", {""}),
        ("import torch\nfrom datasets import Dataset", "cli", set()),
    ],
)
def test_each_way_of_importing_is_recognised(source, module, imported):
    assert set(modules_imported_by(parse(source), module)) == imported


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("training.trainer", "models.heads", True),
        ("models.heads", "training.trainer", False),
        ("models.heads", "data.catalog", False),
        ("data.catalog", "data.dataset", False),
        ("data.catalog", "data.catalog", False),
        ("cli", "", False),
    ],
)
def test_the_rule_tells_up_from_down(importer, imported, allowed):
    assert is_allowed(importer, imported) == allowed


def test_an_import_inside_a_function_is_found():
    tree = parse("class A:\n    def method(self):\n        import torch\n")
    assert imports_inside_functions(tree, "cli") == ["torch"]

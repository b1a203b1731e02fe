"""Galaxy Zoo's classifier, the Hugging Face way."""

import lazy_loader

from ._registration import register_when_imported

__version__ = "0.1.0"

# The public names are in __init__.pyi, and are imported when they are first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

register_when_imported()

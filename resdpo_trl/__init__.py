"""Direct Preference Optimization for language models and image classifiers, with one loss."""

__version__ = "0.1.0"

# transformers learns the classifiers' folders: pipeline("image-classification", model=FOLDER) after this import
from resdpo_trl.image import model as _model  # noqa: F401

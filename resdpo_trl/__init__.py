"""Direct Preference Optimization for language models and image classifiers, with one loss."""

__version__ = "0.1.0"

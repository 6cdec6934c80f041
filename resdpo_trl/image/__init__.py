"""Image classifiers. Importing this package registers them with transformers' auto classes and pipelines."""

from resdpo_trl.image import model as model

"""scikit-learn estimators over many small tasks."""

from metaprior.estimators.sklearn import MetaClassifier, MetaRegressor

__all__ = ["MetaClassifier", "MetaRegressor"]

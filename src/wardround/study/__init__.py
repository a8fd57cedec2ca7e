"""The study file and the sites file."""

from wardround.study.acquisition import Mask, MRIAcquisition
from wardround.study.schema import Study

__all__ = ["MRIAcquisition", "Mask", "Study"]

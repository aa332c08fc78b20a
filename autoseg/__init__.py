"""autoseg: from a folder of medical images and masks to the best segmentation model that the data allow.

Public names are imported on first use, so that `import autoseg` costs neither torch nor SimpleITK.
"""

__version__ = "0.1.0"
__all__ = ["__version__"]

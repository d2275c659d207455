"""The zoo: one family a file. Importing it registers what timm can hold, when timm can be found."""

from importlib.util import find_spec

if find_spec("timm") is not None:
    from slabformer.models import cswin, deit, pvt, pvt_v2, swin  # noqa: F401  (registers the families)

"""A tiny ViT pre-trained on procedurally drawn glyphs: the frozen foundation model of the demo.

Formula-driven pre-training (Kataoka et al., ACCV 2020) needs no data set; benchmarks/pretrain_glyph_vit.py draws the
glyphs, trains the weights and measures them. Importing this module registers `vit_glyph_patch4_32` with timm.
"""

from pathlib import Path
from typing import Any

from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model

GLYPH_WEIGHTS = Path(__file__).with_suffix(".safetensors")
"""Weights in float16 without a classification head; they load strictly into the model with `num_classes=0`."""

default_cfgs = generate_default_cfgs(
    {
        "vit_glyph_patch4_32.glyphs": {
            "file": str(GLYPH_WEIGHTS),
            "num_classes": 0,
            "input_size": (3, 32, 32),
            "fixed_input_size": True,
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        }
    }
)


@register_model
def vit_glyph_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT with 12 blocks of width 80 on 64 patches of 4 x 4 pixels; (B, 3, 32, 32) -> CLS features (B, 80).

    Args:
        pretrained: load GLYPH_WEIGHTS.
        kwargs: arguments of timm's VisionTransformer, e.g. `num_classes=0` for features.

    Example:
        >>> import timm
        >>> net = timm.create_model("vit_glyph_patch4_32", num_classes=0)
        >>> len(net.blocks), net.num_features
        (12, 80)
    """
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 80, "depth": 12, "num_heads": 4}
    return build_model_with_cfg(
        VisionTransformer,
        "vit_glyph_patch4_32",
        pretrained,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**shape, **kwargs},
    )

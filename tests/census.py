"""One model of each of timm's modules, the smallest that shows how its networks are built.

Where a module holds large networks only, they are made shallow and narrow, and where images are large, they are made
small. `CENSUS` maps timm's module to a model and its arguments, `NOT_CUT` to the model and the reason why it is no
chain of several blocks.
"""

from __future__ import annotations

from typing import Any


def small(model: str, *, size: int, told: bool = False, **arguments: Any) -> tuple[str, dict[str, Any]]:
    """A model and its arguments for square images that are smaller than its own, which would take most of the time.

    Args:
        size: pixels an edge; the grids of its first blocks stay above 8, below which their order is not looked at.
        told: the model is built for images of one size.
    """
    overlay = {"pretrained_cfg_overlay": {"input_size": (3, size, size)}}
    return model, arguments | overlay | ({"img_size": size} if told else {})


CENSUS: dict[str, tuple[str, dict[str, Any]]] = {
    "beit": ("beit_base_patch16_224", {"depth": 4}),
    "byoanet": small("eca_botnext26ts_256", size=128, told=True),
    "byobnet": ("test_byobnet", {}),
    "cait": ("cait_xxs24_224", {}),
    "coat": small("coat_tiny", size=128, told=True, parallel_depth=2),
    "convit": ("convit_tiny", {}),
    "convmixer": small("convmixer_768_32", size=96),
    "convnext": ("convnext_zepto_rms", {}),
    "cpubone": ("cpubone_nano", {}),
    "csatv2": ("csatv2", {}),
    "cspnet": ("cs3darknet_focus_s", {}),
    "cspnext": ("cspnext_tiny", {}),
    "davit": small("davit_tiny", size=128),
    "deepseek_vit": small("deepseek_vit_412m", size=126, told=True, depth=3, embed_dim=192, num_heads=3),
    "deit": ("deit_tiny_patch16_224", {}),
    "densenet": small("densenet121", size=128),
    "dla": ("dla34", {}),
    "dpn": small("dpn48b", size=128),
    "edgenext": ("edgenext_xx_small", {}),
    "efficientformer": ("efficientformer_l1", {}),
    "efficientformer_v2": small("efficientformerv2_s0", size=128, told=True),
    "efficientnet": ("mnasnet_050", {}),
    "efficientvim": ("efficientvim_m1", {}),
    "efficientvit_mit": ("efficientvit_b0", {}),
    "efficientvit_msra": ("efficientvit_m0", {}),
    "eva": ("eva02_tiny_patch14_224", {}),
    "fasternet": ("fasternet_t0", {}),
    "fastvit": ("fastvit_t8", {}),
    "focalnet": small("focalnet_tiny_srf", size=128),
    "gcvit": ("gcvit_xxtiny", {}),
    "gemma4_vit": ("gemma4_vit_167m", {"depth": 3, "pretrained_cfg_overlay": {"input_size": (3, 192, 192)}}),
    "ghostnet": ("ghostnet_050", {}),
    "hardcorenas": ("hardcorenas_b", {}),
    "hgnet": ("hgnetv2_b0", {}),
    "hiera": ("hiera_tiny_224", {}),
    "hieradet_sam2": small("sam2_hiera_tiny", size=256),
    "hrnet": small("hrnet_w18_small", size=128),
    "iformer": ("iformer_t", {}),
    "inception_next": ("inception_next_atto", {}),
    "inception_resnet_v2": small("inception_resnet_v2", size=128),
    "inception_v3": small("inception_v3", size=128),
    "inception_v4": small("inception_v4", size=128),
    "lcnetv2": ("lcnetv2_small", {}),
    "levit": ("levit_128s", {}),
    "lowformer": ("lowformer_b0", {}),
    "mambaout": ("test_mambaout", {}),
    "maxxvit": small("maxvit_pico_rw_256", size=128, told=True),
    "metaformer": ("caformer_s18", {}),
    "mlp_mixer": ("gmlp_ti16_224", {}),
    "mobilenetv3": ("mobilenetv3_small_050", {}),
    "mobilenetv5": small("mobilenetv5_base", size=128),
    "mobilevit": ("mobilevit_xxs", {}),
    "mvitv2": small("mvitv2_tiny", size=128, told=True),
    "naflexvit": ("naflexvit_base_patch16_parfac_gap", {"depth": 4}),
    "nasnet": ("nasnetalarge", {"pretrained_cfg_overlay": {"input_size": (3, 96, 96)}}),
    "nest": small("nest_tiny", size=128, told=True),
    "nextvit": small("nextvit_small", size=128),
    "nfnet": ("test_nfnet", {}),
    "pit": ("pit_ti_224", {}),
    "pnasnet": ("pnasnet5large", {"pretrained_cfg_overlay": {"input_size": (3, 96, 96)}}),
    "pvt_v2": ("pvt_v2_b0", {}),
    "qwen3_vit": (
        "qwen3_vit_88m",
        {"depth": 3, "embed_dim": 192, "num_heads": 3, "pretrained_cfg_overlay": {"input_size": (3, 192, 256)}},
    ),
    "rdnet": small("rdnet_tiny", size=128),
    "regnet": ("regnetx_002", {}),
    "repghost": ("repghostnet_050", {}),
    "repvit": ("repvit_m1", {}),
    "res2net": small("res2next50", size=128),
    "resnest": ("resnest14d", {}),
    "resnet": ("test_resnet", {}),
    "resnetv2": ("resnetv2_18", {}),
    "rexnet": small("rexnet_100", size=128),
    "selecsls": small("selecsls42", size=128),
    "senet": ("legacy_seresnet18", {}),
    "sequencer": ("sequencer2d_s", {"layers": (1, 1, 2, 1)}),
    "shvit": ("shvit_s1", {}),
    "sknet": small("skresnet18", size=128),
    "starnet": ("starnet_s050", {}),
    "swiftformer": ("swiftformer_xs", {}),
    "swin_transformer": ("swin_tiny_patch4_window7_224", {}),
    "swin_transformer_v2": small("swinv2_tiny_window16_256", size=128, told=True),
    "swin_transformer_v2_cr": small("swinv2_cr_tiny_224", size=112, told=True),
    "tiny_vit": ("tiny_vit_5m_224", {}),
    "tnt": ("tnt_s_legacy_patch16_224", {}),
    "tresnet": small("tresnet_m", size=128),
    "twins": small("twins_svt_small", size=128, told=True),
    "vgg": ("vgg11", {"mlp_ratio": 0.0625}),
    "visformer": ("visformer_tiny", {}),
    "vision_transformer": ("test_vit", {}),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", {}),
    "vision_transformer_relpos": ("test_vit_relpos", {}),
    "vision_transformer_sam": small(
        "samvit_base_patch16_224", size=256, told=True, depth=4, embed_dim=192, num_heads=3, global_attn_indexes=(1, 3)
    ),
    "vitamin": small("vitamin_small_224", size=112, told=True),
    "volo": small("volo_d1_224", size=112, told=True),
    "vovnet": ("ese_vovnet19b_slim_dw", {}),
    "xception": small("legacy_xception", size=128),
    "xception_aligned": small("xception41p", size=128),
    "xcit": ("xcit_nano_12_p8_224", {}),
}
QUICK = (
    "vision_transformer", "swin_transformer", "tiny_vit", "repvit", "edgenext", "efficientvit_mit", "hgnet",
    "metaformer", "mobilenetv3", "regnet", "pit", "dla",
)  # fmt: skip
IN_WINDOWS = {"nest_tiny"}
"""Their features are (windows, positions in a window, channels): what looks like a grid of an image is none."""
NOT_CUT = {
    "crossvit": ("crossvit_tiny_240", "two sets of tokens, of different sizes, go side by side through all blocks"),
}

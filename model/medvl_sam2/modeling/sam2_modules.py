"""SAM2's modules, sized by :class:`SliceConfig` and built in plain Python.

Only ``sam2.modeling.*`` is used (Apache-2.0, Ravi et al. 2024, arXiv 2408.00714). Importing the ``sam2`` package
initialises Hydra's process-wide state; :func:`build_sam2` undoes that, because MONAI Label and other Hydra users
share the process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from medvl_sam2.config import SliceConfig
from medvl_sam2.errors import ConfigError
from medvl_sam2.modeling.meta_device import ReadableLinspace


def build_sam2(config: SliceConfig) -> Any:
    """Return a ``SAM2Base`` whose prompt encoder takes extra (language) tokens and whose heads follow ``config``.

    Parameter names equal upstream's, so that published SAM2.1 checkpoints of the same sizes load.
    """
    _check(config)
    from hydra.core.global_hydra import GlobalHydra

    hydra_was_ready = GlobalHydra.instance().is_initialized()
    from sam2.modeling.backbones.hieradet import Hiera
    from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
    from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
    from sam2.modeling.memory_encoder import CXBlock, Fuser, MaskDownSampler, MemoryEncoder
    from sam2.modeling.position_encoding import PositionEmbeddingSine
    from sam2.modeling.sam.transformer import RoPEAttention

    if not hydra_was_ready:
        GlobalHydra.instance().clear()

    d, memory_dim = config.d_model, config.memory_dim
    with ReadableLinspace():
        trunk = Hiera(
            embed_dim=config.embed_dim,
            num_heads=config.num_heads,
            stages=config.stages,
            global_att_blocks=config.global_att_blocks,
            window_spec=config.window_spec,
            window_pos_embed_bkg_spatial_size=config.window_pos_embed_size,
        )
    neck = FpnNeck(
        position_encoding=PositionEmbeddingSine(num_pos_feats=d, normalize=True, scale=None, temperature=10000),
        d_model=d,
        backbone_channel_list=trunk.channel_list,
        fpn_top_down_levels=[2, 3],
        fpn_interp_model="nearest",
    )
    grid = config.image_size // 16

    def attention(**extra: Any) -> Any:
        return RoPEAttention(
            rope_theta=10000.0,
            feat_sizes=[grid, grid],
            embedding_dim=d,
            num_heads=1,
            downsample_rate=1,
            dropout=0.1,
            **extra,
        )

    layer = MemoryAttentionLayer(
        activation="relu",
        dim_feedforward=config.memory_ffn,
        dropout=0.1,
        pos_enc_at_attn=False,
        self_attention=attention(),
        d_model=d,
        pos_enc_at_cross_attn_keys=True,
        pos_enc_at_cross_attn_queries=False,
        cross_attention=attention(rope_k_repeat=True, kv_in_dim=memory_dim),
    )
    memory_encoder = MemoryEncoder(
        out_dim=memory_dim,
        in_dim=d,
        position_encoding=PositionEmbeddingSine(
            num_pos_feats=memory_dim, normalize=True, scale=None, temperature=10000
        ),
        mask_downsampler=MaskDownSampler(embed_dim=d, kernel_size=3, stride=2, padding=1),
        fuser=Fuser(
            CXBlock(dim=d, kernel_size=7, padding=3, layer_scale_init_value=1e-6, use_dwconv=True), num_layers=2
        ),
    )
    return _sized_base(config)(
        image_encoder=ImageEncoder(trunk=trunk, neck=neck, scalp=1),
        memory_attention=MemoryAttention(
            d_model=d, pos_enc_at_input=True, layer=layer, num_layers=config.memory_layers
        ),
        memory_encoder=memory_encoder,
        num_maskmem=config.num_maskmem,
        image_size=config.image_size,
        max_cond_frames_in_attn=config.max_cond_slices,
        sigmoid_scale_for_mem_enc=20.0,
        sigmoid_bias_for_mem_enc=-10.0,
        use_mask_input_as_output_without_sam=True,
        directly_add_no_mem_embed=True,
        no_obj_embed_spatial=True,
        use_high_res_features_in_sam=True,
        multimask_output_in_sam=True,
        iou_prediction_use_sigmoid=True,
        use_obj_ptrs_in_encoder=True,
        add_tpos_enc_to_obj_ptrs=True,
        proj_tpos_enc_in_obj_ptrs=True,
        use_signed_tpos_enc_to_obj_ptrs=True,
        only_obj_ptrs_in_the_past_for_eval=True,
        pred_obj_scores=True,
        pred_obj_scores_mlp=True,
        fixed_no_obj_ptr=True,
        multimask_output_for_tracking=True,
        use_multimask_token_for_obj_ptr=True,
        multimask_min_pt_num=0,
        multimask_max_pt_num=1,
        use_mlp_for_obj_ptr_proj=True,
    )


def _check(config: SliceConfig) -> None:
    """Catch the size combinations on which upstream fails late and without a reason."""
    if config.image_size % 32:
        raise ConfigError(f"image_size {config.image_size} must be a multiple of 32")
    if (config.image_size // 4) % config.window_spec[0]:
        raise ConfigError(f"window_spec[0]={config.window_spec[0]} must divide image_size/4={config.image_size // 4}")
    if config.d_model % 16 or config.d_model % config.memory_dim:
        raise ConfigError(f"d_model {config.d_model} must be a multiple of 16 and of memory_dim {config.memory_dim}")
    firsts, start = set(), 0
    for count in config.stages[:-1]:
        start += count
        firsts.add(start)
    pooled = firsts & set(config.global_att_blocks)
    if pooled:
        raise ConfigError(f"global_att_blocks {sorted(pooled)} are the pooling blocks of a stage; choose later blocks")


def _sized_base(config: SliceConfig) -> type[Any]:
    """Subclass of ``SAM2Base`` with head sizes from ``config`` (upstream hard-codes mlp 2048 and IoU hidden 256)."""
    from sam2.modeling.sam.mask_decoder import MaskDecoder
    from sam2.modeling.sam.prompt_encoder import PromptEncoder
    from sam2.modeling.sam.transformer import TwoWayTransformer
    from sam2.modeling.sam2_base import SAM2Base
    from sam2.modeling.sam2_utils import MLP

    class LanguagePromptEncoder(PromptEncoder):  # type: ignore[misc]
        """Upstream's prompt encoder plus per-row optional language tokens and per-row optional mask prompts."""

        def encode(
            self,
            points: torch.Tensor,
            labels: torch.Tensor,
            masks: torch.Tensor | None,
            mask_present: torch.Tensor | None,
            extra: torch.Tensor | None,
            extra_present: torch.Tensor | None,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """Points (B, P, 2) x-y pixels, labels (B, P), masks (B, 1, h, w), extra (B, L, C) -> sparse, dense."""
            sparse, dense = self(points=(points, labels), boxes=None, masks=masks)
            if masks is not None and mask_present is not None:
                empty = self.no_mask_embed.weight.reshape(1, -1, 1, 1)
                dense = torch.where(mask_present[:, None, None, None], dense, empty)
            if extra is not None:
                if extra_present is not None:
                    pad = self.not_a_point_embed.weight.reshape(1, 1, -1)
                    extra = torch.where(extra_present[:, None, None], extra, pad)
                sparse = torch.cat([sparse, extra], dim=1)
            return sparse, dense

    class SizedSAM2(SAM2Base):  # type: ignore[misc]
        def _build_sam_heads(self) -> None:
            d = self.hidden_dim
            self.sam_prompt_embed_dim = d
            self.sam_image_embedding_size = self.image_size // self.backbone_stride
            side = self.sam_image_embedding_size
            self.sam_prompt_encoder = LanguagePromptEncoder(
                embed_dim=d,
                image_embedding_size=(side, side),
                input_image_size=(self.image_size, self.image_size),
                mask_in_chans=16,
            )
            self.sam_mask_decoder = MaskDecoder(
                num_multimask_outputs=3,
                transformer=TwoWayTransformer(depth=2, embedding_dim=d, mlp_dim=config.decoder_mlp, num_heads=8),
                transformer_dim=d,
                iou_head_depth=3,
                iou_head_hidden_dim=d,
                use_high_res_features=True,
                iou_prediction_use_sigmoid=True,
                pred_obj_scores=True,
                pred_obj_scores_mlp=True,
                use_multimask_token_for_obj_ptr=True,
            )
            self.obj_ptr_proj = MLP(d, d, d, 3)
            self.obj_ptr_tpos_proj = nn.Linear(d, self.mem_dim)

    return SizedSAM2

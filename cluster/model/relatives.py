"""Models that look like those that are served and are not: what each is, and why it is refused."""

from __future__ import annotations

# model_type → what it is, and what of it is not here.
RELATIVES = {
    "deepseek_v2": "DeepSeek-V2 chooses experts by a softmax over them, where this family has sigmoids and a bias",
    "deepseek_v4": "DeepSeek-V4 compresses its cache along the sequence and mixes several residual streams, of which "
    "nothing is in this family",
    "glm_moe_dsa": "GLM-5 has DeepSeek-V3.2's sparse attention with an indexer of another rotation, which later "
    "versions share between layers",
    "glm5_next": "this GLM-5 has layers of linear attention between those of sparse attention",
    "glm4_moe": "GLM-4.5 to 4.7 have grouped-query attention with a key and a value for each head, and no latent; of "
    "them GLM-4.7-Flash alone (glm4_moe_lite) is of this family",
    "kimi_k3": "Kimi K3 has layers of linear attention (Kimi Delta Attention) between those with a latent",
    "kimi_linear": "Kimi Linear has layers of linear attention (Kimi Delta Attention) between those with a latent, "
    "whose state is no paged cache",
    "kimi_vl": "Kimi-VL is Moonlight with a vision tower; Moonlight by itself (deepseek_v3) is of this family",
    "longcat_flash": "LongCat-Flash has two attentions in a layer and experts that compute nothing",
    "mistral3": "this is a Mistral model behind a vision tower; of them Mistral Large 3 is near this family, with "
    "names of tensors and a tokenizer of its own",
    "mistral4": "this Mistral chooses experts by a softmax over them, where this family has sigmoids and a bias",
}
MISTRAL_FORMAT = (
    "is a checkpoint in Mistral's own format (Mistral Large 3 is one). Its architecture is near DeepSeek-V3's, but the "
    "names of its tensors, its scales of FP8 and its tokenizer (tekken.json) are of its own and not supported; "
    "config.json with one of the supported model_types is needed"
)

"softmax(QKᵀ/√d)V and nothing else: one door, several backends."
from flash_transformer.attention.functional import attention, attention_weights, backends, explain
from flash_transformer.attention.masks import AttentionMask
from flash_transformer.attention.multihead import (
    KeyValueCache,
    MultiHeadAttention,
    SemiParallelMultiHeadAttention,
    SequentialMultiHeadAttention,
    take_apart,
)
from flash_transformer.attention.packed import attention_varlen, pack, unpack

"The Transformer and its blocks."
from .blocks import DecoderBlock, EncoderBlock, FeedForward, Residual
from .embeddings import Embedding, TokenEmbedding, sinusoidal_positions
from .transformer import Transformer, TransformerConfig, attention_maps, load_weights, save_weights

"The Transformer, its blocks, and the models that are built of them."
from .blocks import DecoderBlock, EncoderBlock, FeedForward, Residual
from .embeddings import Embedding, TokenEmbedding, sinusoidal_positions
from .experts import MixtureOfExperts, mean_balance
from .generation import SampleConfig, generate, stream
from .language_models import FAMILY, CausalLM, Classifier, MaskedLM, build, configuration
from .positions import PositionBias, Rotary, alibi_slopes
from .pretrained import from_pretrained, pretrained_tokenizer, save_pretrained
from .transformer import Transformer, TransformerConfig, attention_maps, load_weights, save_weights

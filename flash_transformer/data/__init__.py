"Text in, batches of token ids out."
from .batches import (
    Batch,
    EncodedPairs,
    batches,
    encode_texts,
    join_pairs,
    pack_batches,
    padding_waste,
    plan_batches,
    row_length,
)
from .cleaning import RULES, Report, check_rules, first_occurrences, pair_hashes, taken_by
from .corpora import load_corpus
from .labelled import LabelledTexts, load_labelled, read_labelled, read_texts, toy_sentiment
from .prepare import DataConfig, Prepared, corpus_of, labelled_of, prepare, text_of, windows_of
from .streaming import StreamedPairs, read_split, stream
from .text import (
    EncodedText,
    MaskedText,
    encode_text,
    load_text,
    read_text,
    text_pieces,
    text_tokenizer,
)
from .tokenizers import BOS, EOS, MASK, PAD, UNK, TokenizerPair
from .toy import toy_corpus

"Decoding, the translator, and evaluation."
from .decoding import Hypothesis, beam_search, greedy_search, length_penalty
from .fast_decoding import FastTransformer, decoding_precision, fast_beam_search, fast_greedy_search
from .translator import DecodeConfig, Evaluation, Translator, evaluate, of_kind, open_run, score

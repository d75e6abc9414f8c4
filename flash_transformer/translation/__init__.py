"Decoding, the translator, and evaluation."
from .decoding import Hypothesis, beam_search, greedy_search, length_penalty
from .translator import DecodeConfig, Evaluation, Translator, evaluate, score

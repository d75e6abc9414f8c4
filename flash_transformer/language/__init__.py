"Language models at work: what a run folder of one is good for."
from .generator import TextGenerator, TextScore, score_text

"Language models at work: what a run folder of one is good for."
from .generator import TextGenerator, TextScore, score_text
from .reader import (
    ClassScore,
    GapScore,
    MaskFiller,
    TextClassifier,
    accuracy,
    class_logits,
    score_classes,
    score_gaps,
)

"""Untrained models and sentences of noise, for tests of decoding"""
import torch
from torch import nn

from flash_transformer.data import EOS, PAD
from flash_transformer.model import Transformer, TransformerConfig


def wild(seed, size=40, dtype=torch.float64, std=0.5, lean=1.0, **changes):
    "A random model with strong opinions and no clear winner; `lean` changes those about </s>"
    torch.manual_seed(seed)
    shape = dict(d_model=16, d_ff=32, heads=2, encoder_layers=1, decoder_layers=2, norm="pre",
                 tie_embeddings="none") | changes
    model = Transformer(TransformerConfig(source_vocab_size=size, target_vocab_size=size, **shape))
    for p in model.parameters(): nn.init.normal_(p, std=std)
    with torch.no_grad(): model.output.weight[EOS] *= lean
    return model.to(dtype).eval()


def sources(seed, lengths, size=40):
    "Ids with </s> at the end, padded, and how many each sentence has"
    g = torch.Generator().manual_seed(seed)
    rows = [torch.cat([torch.randint(4, size, (n - 1,), generator=g), torch.tensor([EOS])]) for n in lengths]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD), torch.tensor(lengths)


class Leaning(nn.Module):
    "Adds so much to the logit of </s>"
    def __init__(self, output, lean):
        super().__init__()
        self.output, self.lean = output, lean

    def forward(self, x):
        logits = self.output(x)
        logits[:, EOS] += self.lean
        return logits

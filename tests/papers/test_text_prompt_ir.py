"""TextPromptIR: what a sentence does, any picture, sentences by a text encoder."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from saccade import SaccadeError, create_model
from saccade.papers.text_prompt_ir import Prompted, embed, text_prompt_ir
from tests.contracts.registered import randomised


def narrow():
    torch.manual_seed(0)
    return randomised(text_prompt_ir(dim=8, depths=(1, 1, 1, 1), refine=1)).eval()


def test_a_prompt_scales_and_shifts_by_what_the_picture_shows():
    layer = randomised(Prompted(16, nn.Identity())).double()
    x, prompt = torch.randn(1, 3, 5, 16, dtype=torch.float64), torch.randn(1, 384, dtype=torch.float64)
    mean, (left, middle, right) = x[0].mean((0, 1)), layer.weigh.weight[0, 0]
    padded = torch.cat([mean.new_zeros(1), mean, mean.new_zeros(1)])
    shown = (left * padded[:-2] + middle * padded[1:-1] + right * padded[2:]).sigmoid()
    words = shown * layer.narrow(prompt)[0]
    torch.testing.assert_close(layer(x, prompt), layer.gamma(words) * x + layer.beta(words))


def test_any_size_alone_and_together_and_by_the_sentence():
    model, sentence = narrow(), torch.randn(2, 768)
    with torch.no_grad():
        for size in [(16, 24), (7, 9), (1, 5)]:
            image = torch.rand(2, 3, *size)
            out = model(image, sentence)
            assert out.shape == image.shape
            torch.testing.assert_close(torch.cat([model(a[None], b[None]) for a, b in zip(image, sentence)]), out,
                                       rtol=1e-4, atol=1e-5)
            assert not torch.allclose(model(image, sentence.flip(0)), out, atol=1e-3)


def test_a_sentence_is_needed():
    model = narrow()
    with pytest.raises(SaccadeError, match="sentence"):
        model(torch.rand(1, 3, 8, 8))
    with pytest.raises(SaccadeError, match=r"\(1, 5\)"):
        model(torch.rand(1, 3, 8, 8), torch.rand(1, 5))


def test_sentences_are_embedded_by_a_text_encoder():
    transformers = pytest.importorskip("transformers")
    settings = dict(num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=30)
    encoder = transformers.BertModel(transformers.BertConfig(hidden_size=768, **settings)).eval()

    def tokenizer(sentences, **_):
        longest = max(map(len, sentences))
        ids = [[1 + ord(letter) % 29 for letter in each] + [0] * (longest - len(each)) for each in sentences]
        ids = torch.tensor(ids)
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    with torch.no_grad():
        both, alone = embed(["remove rain", "haze"], encoder, tokenizer), embed(["haze"], encoder, tokenizer)
    torch.testing.assert_close(both[1:], alone)
    small = transformers.BertModel(transformers.BertConfig(hidden_size=16, **settings))
    with pytest.raises(SaccadeError, match="of 16 numbers"):
        embed(["haze"], small, tokenizer)


def test_registered():
    with torch.device("meta"):
        model = create_model("text_prompt_ir")
    assert [len(level) for level in model.encoder] == [4, 6, 6, 8] and model.scale == 1

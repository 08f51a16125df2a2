"""`plinth pretrain --family t5`: T5 on parallel text."""

from __future__ import annotations

from plinth.cli.pretrain_transformer import train
from plinth.models.encoder_decoder_config import EncoderDecoderConfig
from plinth.recipes.translation import TranslationConfig

# With a gate the feed-forward layer has three matrices: 704 gives about as many parameters as the transformer's 1024.
SHAPE = EncoderDecoderConfig(style="t5", activation="geglu", intermediate_size=704, norm_eps=1e-6)


def main(argv: list[str]) -> int:
    return train(argv, "t5", TranslationConfig(model=SHAPE, label_smoothing=0.0))

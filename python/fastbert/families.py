"""The relatives of BERT whose encoder is the same mathematics: what they call its keys and tensors."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

_NOTHING: Mapping[str, str | int] = MappingProxyType({})


class Family(NamedTuple):
    """How the files of a model_type differ from those of BERT. transformers 5.23, models/<model_type>/."""

    prefix: str
    """Before the names of the encoder's tensors in a model with a head."""
    absent: Mapping[str, int] = _NOTHING
    """BERT's key -> value where config.json lacks it, if not BERT's."""
    keys: Mapping[str, str] = _NOTHING
    """BERT's key -> key in config.json, if not BERT's."""
    names: tuple[tuple[str, str], ...] = ()
    """(part of a tensor's name, what it is in BERT's)"""
    skips_padding: bool = False
    """Positions count from pad_token_id + 1; the rows of the position table before that are not used."""
    has_token_types: bool = True
    """Else there is no table of token types, and nothing is added."""


_ROBERTA = Family("roberta", {"pad_token_id": 1}, skips_padding=True)

# model_type -> family
FAMILIES = {
    "bert": Family("bert"),
    "distilbert": Family(
        "distilbert",
        {"num_hidden_layers": 6},
        {
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
            "hidden_act": "activation",
        },
        (
            ("transformer.layer.", "encoder.layer."),
            (".attention.q_lin.", ".attention.self.query."),
            (".attention.k_lin.", ".attention.self.key."),
            (".attention.v_lin.", ".attention.self.value."),
            (".attention.out_lin.", ".attention.output.dense."),
            (".sa_layer_norm.", ".attention.output.LayerNorm."),
            (".ffn.lin1.", ".intermediate.dense."),
            (".ffn.lin2.", ".output.dense."),
            (".output_layer_norm.", ".output.LayerNorm."),
        ),
        has_token_types=False,
    ),
    "roberta": _ROBERTA._replace(absent={"pad_token_id": 1, "vocab_size": 50265}),
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
}

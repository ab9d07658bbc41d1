"""What every measure takes, a trained model with its data, and what every measure can ask of it:
how good it is.

A measure is a function ``f(trained) -> dict`` of numbers, strings, lists and None that ``json``
writes as they are. "applies" says whether it means anything for this model; where it does not,
"why" says so and nothing else is there. Equal models give equal numbers: chance comes from
train.seed.
"""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import numpy as np

from flexmemory.config import Config
from flexmemory.data import tokenizer as tokenizers
from flexmemory.data.shards import TokenShards, read_questions
from flexmemory.data.tokenizer import Tokenizer
from flexmemory.errors import UserError
from flexmemory.evals.perplexity import make_eval_step, perplexity
from flexmemory.evals.questions import answer_accuracy
from flexmemory.evals.rows import RowsOf
from flexmemory.models.blocks import layer_specs
from flexmemory.models.patterns import LayerSpec
from flexmemory.models.transformer import init_params
from flexmemory.run_folder import load_params
from flexmemory.tkv.format import memory_layers


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A model and its data. params as ``init_params`` gives them; questions of the data's synthetic
    sources, may be [].
    """

    cfg: Config
    params: dict
    val: TokenShards
    train: TokenShards
    tokenizer: Tokenizer
    questions: list[dict]
    workdir: Path | None = None  # the run folder; None for a model that has none

    @property
    def specs(self) -> tuple[LayerSpec, ...]:
        """The layers from input to output."""
        return layer_specs(self.cfg.model)

    @property
    def memory_layers(self) -> list[int]:
        """Layers that have a row, from input to output."""
        return memory_layers(self.cfg.model)

    def rng(self, measure: str) -> np.random.Generator:
        """Random numbers of the measure of that name, the same ones in every call."""
        return np.random.default_rng((self.cfg.train.seed, *measure.encode()))

    @functools.cached_property
    def fresh_params(self) -> dict:
        """The weights that the training began with: the control that tells what was learned from
        what any such model has.
        """
        return init_params(self.cfg.model, self.cfg.train.seed)


def load(workdir: str | Path) -> Trained:
    """The run folder's latest checkpoint and the data that it was trained on. Raises UserError
    where one is missing, damaged or not the other's.
    """
    cfg, params, _ = load_params(Path(workdir))
    tokenizer, data = tokenizers.load(workdir), cfg.data.path
    val = TokenShards(data, "val")
    if val.tokenizer_fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{workdir}: its data {data} were prepared again with another tokenizer"
            f" ({val.tokenizer_fingerprint}, the run's is {tokenizer.fingerprint}); prepare them as"
            " they were"
        )
    return Trained(
        cfg, params, val, TokenShards(data, "train"), tokenizer, read_questions(data), Path(workdir)
    )


def scores(
    trained: Trained,
    *,
    params: dict | None = None,
    rows_of: RowsOf | None = None,
    ffn_scale: float | jax.Array = 1.0,
) -> dict:
    """{"val_loss", "perplexity", "recall_acc", "reasoning_acc", "kinds": {kind: accuracy}} as a
    training's final evaluation has them; None where there are no such questions or the number is
    not finite. params: others than the model's; rows_of: of ``perplexity``, ffn_scale: of
    ``make_eval_step``.
    """
    params = trained.params if params is None else params
    found = perplexity(
        trained.cfg, params, trained.val, make_eval_step(trained.cfg, ffn_scale), rows_of=rows_of
    )
    answers = answer_accuracy(
        trained.cfg, params, trained.tokenizer, trained.questions, ffn_scale, rows_of
    )
    return {
        "val_loss": finite(found["loss"]),
        "perplexity": finite(found["perplexity"]),
        "recall_acc": answers.get("recall_acc"),
        "reasoning_acc": answers.get("reasoning_acc"),
        "kinds": answers.get("kinds", {}),
    }


def finite(x: float) -> float | None:
    return float(x) if math.isfinite(x) else None


def not_applicable(why: str) -> dict:
    return {"applies": False, "why": why}

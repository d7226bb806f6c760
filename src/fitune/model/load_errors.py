"""Explain in one message why a model or tokenizer cannot be loaded, with the way out."""

import pickle

from safetensors import SafetensorError

from fitune.config import ModelConfig
from fitune.errors import ModelError
from fitune.model.own_code import SWITCH
from fitune.model.source import Kind, out_of_reach


def brings_code(model: ModelConfig) -> ModelError:
    """Return the error for a model that works only with Python code of its own."""
    return ModelError(
        f"{model.source} works by its own code alone: read it, then set {SWITCH}=true to run it"
    )


def _with_causes(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    return chain


def unreadable(model: ModelConfig, kind: Kind, error: BaseException) -> ModelError:
    """Return a ModelError for an exception of transformers, tokenizers, gguf or safetensors."""
    if isinstance(error, ModelError):
        return error
    chain = _with_causes(error)
    first = " ".join(str(error).split())[:200] or type(error).__name__
    text = " ".join(str(link) for link in chain)
    if "trust_remote_code" in text:
        return brings_code(model)
    if kind == "gguf" and "gguf" in text and isinstance(error, ImportError):
        return ModelError(f"{model.source} needs the gguf package: pip install 'fitune[gguf]'")
    if kind == "hub" and isinstance(error, OSError):
        names = {type(link).__name__ for link in chain}
        if names & {"RepositoryNotFoundError", "GatedRepoError"}:
            return ModelError(f"the hub has no {model.source} that this account may read: {first}")
        return out_of_reach(model.source)
    if any(
        isinstance(link, pickle.UnpicklingError) or "weights_only" in str(link) for link in chain
    ):
        return ModelError(
            f"the weights of {model.source} are pickled and hold code or are damaged, so they are "
            "not read: give "
            "safetensors"
        )
    if isinstance(error, SafetensorError):
        return ModelError(
            f"the weights of {model.source} are damaged or incomplete ({first}): copy them again"
        )
    if kind == "directory" and "no file named" in text:
        return ModelError(
            f"{model.source} holds no weights (model.safetensors): set model.init=random to train from scratch"
        )
    if "model type" in text and ("not recognize" in text or "should have" in text.lower()):
        return ModelError(
            f"{model.source} has an architecture that this transformers does not know ({first})"
        )
    return ModelError(f"{model.source} cannot be read: {first}")

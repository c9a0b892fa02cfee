"""Beam search: a likely way to go on from a text up to the token that ends it."""

import numpy as np

from glyphgpt.inference.generate import Floats, Ids, LanguageModel


def search(model: LanguageModel, prompts: Ids, *, end: int, beam: int, max_new_tokens: int) -> list[Ids]:
    """Go on from prompts (B, T), all of one length, until the token `end`; return what came before it for each.

    At every step the `beam` best ways of each prompt are kept, by their mean log-probability per token, lest short ones
    win (the length penalty of Wu et al. 2016, section 7, with alpha = 1). A prompt is done when its best way has
    ended. A beam of 1 always takes the likeliest token. Shape letters: B prompts, K ways of each, V vocabulary.
    """
    B, K = len(prompts), beam
    cache = model.new_cache(B)
    logits = model.next_logits(prompts, cache).repeat(K, axis=0)  # (B K, V)
    cache.select(np.arange(B).repeat(K).tolist())
    ways = np.empty((B, K, 0), np.int64)
    total = np.full((B, K), -np.inf)  # log-probability of each way
    total[:, 0] = 0  # at first there is but one
    length = np.zeros((B, K), np.int64)
    ended = np.zeros((B, K), bool)
    for _ in range(max_new_tokens):
        chances = log_softmax(logits).reshape(B, K, -1)
        chances[ended] = -np.inf
        chances[ended, end] = 0  # what has ended stays as it is
        totals = total[..., None] + chances  # (B, K, V)
        lengths = length + ~ended
        order = np.argsort(-(totals / lengths[..., None]).reshape(B, -1), axis=-1, kind="stable")[:, :K]  # (B, K)
        parent, token = np.divmod(order, chances.shape[-1])
        total = np.take_along_axis(totals.reshape(B, -1), order, axis=-1)
        length, ended = (np.take_along_axis(each, parent, axis=-1) for each in (lengths, ended))
        ended |= token == end
        total[ended[:, 0], 1:] = -np.inf  # done: nothing overtakes the best way, however long the others take
        ways = np.concatenate((np.take_along_axis(ways, parent[..., None], axis=1), token[..., None]), axis=-1)
        if ended[:, 0].all():
            break
        rows = (np.arange(B)[:, None] * K + parent).ravel().tolist()
        if rows != list(range(B * K)):
            cache.select(rows)
        logits = model.next_logits(token.reshape(-1, 1), cache)
    return [way[: np.argmax(np.append(way, end) == end)] for way in ways[:, 0]]


def log_softmax(logits: Floats) -> Floats:
    """Turn logits (..., V) into log-probabilities, in float64."""
    logits = logits.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

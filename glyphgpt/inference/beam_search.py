"""Beam search: the most probable continuation of a prompt, up to an end token."""

import numpy as np

from glyphgpt.inference.generate import Ids, LanguageModel, log_softmax


def beam_search(model: LanguageModel, prompts: Ids, *, end: int, beam: int, max_new_tokens: int) -> list[Ids]:
    """Return the best continuation of each prompt (B, T), without the token `end` that ends it.

    At every step the `beam` best hypotheses of each prompt are kept, ranked by their mean log-probability per token so
    that short ones have no advantage (the length penalty of Wu et al. 2016, section 7, with alpha = 1). A prompt is
    finished when its best hypothesis is. A beam of 1 is greedy decoding. All prompts have the same length.

    Shape letters: B prompts, K hypotheses of each, V vocabulary.
    """
    B, K = len(prompts), beam
    cache = model.new_cache(B)
    logits = model.next_logits(prompts, cache).repeat(K, axis=0)  # (B K, V)
    cache.reorder(np.arange(B).repeat(K).tolist())
    hypotheses = np.empty((B, K, 0), np.int64)
    total = np.full((B, K), -np.inf)  # log-probability of each hypothesis
    total[:, 0] = 0  # there is only one at first
    length = np.zeros((B, K), np.int64)
    finished = np.zeros((B, K), bool)
    for _ in range(max_new_tokens):
        log_probs = log_softmax(logits).reshape(B, K, -1)
        log_probs[finished] = -np.inf
        log_probs[finished, end] = 0  # a finished hypothesis keeps its score
        totals = total[..., None] + log_probs  # (B, K, V)
        lengths = length + ~finished
        order = np.argsort(-(totals / lengths[..., None]).reshape(B, -1), axis=-1, kind="stable")[:, :K]  # (B, K)
        parent, token = np.divmod(order, log_probs.shape[-1])
        total = np.take_along_axis(totals.reshape(B, -1), order, axis=-1)
        length, finished = (np.take_along_axis(each, parent, axis=-1) for each in (lengths, finished))
        finished |= token == end
        total[finished[:, 0], 1:] = -np.inf  # nothing overtakes the best hypothesis, however long the others grow
        parents = np.take_along_axis(hypotheses, parent[..., None], axis=1)
        hypotheses = np.concatenate((parents, token[..., None]), axis=-1)
        if finished[:, 0].all():
            break
        rows = (np.arange(B)[:, None] * K + parent).ravel().tolist()
        if rows != list(range(B * K)):
            cache.reorder(rows)
        logits = model.next_logits(token.reshape(-1, 1), cache)
    return [best[: np.argmax(np.append(best, end) == end)] for best in hypotheses[:, 0]]

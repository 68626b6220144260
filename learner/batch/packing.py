"""Which completions are computed together: packs under a token budget, and packs over ranks. Needs
lengths only, so that no medium has to be decoded for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from avatar_rl.common.errors import ConfigError

#: A rank may have this many times the tokens of an even share before packs are made smaller.
UNEVEN = 1.1
#: Packs per rank that are tried, and how much larger than an even share of the tokens: first fit
#: seldom fills a pack to its last token.
_PARTS, _ROOM = (1, 2, 4), (1.0, 1.1, 1.25)


class Size(NamedTuple):
    """What packing needs to know of a completion."""

    key: tuple[str, bool]  # equal for completions that share their prompt: prompt id, hinted
    prompt_tokens: int
    tokens: int  # of the completion


def pack(sizes: Sequence[Size], budget: int, *, name: str = "learner") -> list[list[int]]:
    """Split completions into packs of at most ``budget`` tokens; a pack counts each prompt once.

    The completions of a prompt stay together where they fit one pack. Otherwise they are spread
    over several, and each of these computes the prompt anew. Then the largest pieces first, each
    into the first pack with room for it (first fit, decreasing). Deterministic: every rank packs
    the whole step and finds the same packs.

    Raises:
        ConfigError: A prompt and one of its completions exceed the budget, which is the key
            micro_batch_tokens of the config section ``name``.
    """
    pieces = [piece for run in _by_prompt(sizes) for piece in _pieces(run, sizes, budget, name)]
    pieces.sort(key=lambda piece: (-_tokens(piece, sizes), piece[0]))
    packs: list[list[int]] = []
    room: list[int] = []
    for piece in pieces:
        needed = _tokens(piece, sizes)
        place = next((i for i, left in enumerate(room) if left >= needed), None)
        if place is None:
            packs.append([])
            room.append(budget)
            place = len(packs) - 1
        packs[place] += piece
        room[place] -= needed
    return packs


def _by_prompt(sizes: Sequence[Size]) -> list[list[int]]:
    """Completions of each prompt, longest first."""
    runs: dict[tuple[str, bool], list[int]] = {}
    for i, size in enumerate(sizes):
        runs.setdefault(size.key, []).append(i)
    return [sorted(run, key=lambda i: (-sizes[i].tokens, i)) for run in runs.values()]


def _pieces(run: list[int], sizes: Sequence[Size], budget: int, name: str) -> list[list[int]]:
    """One prompt's completions, longest first, in as few packs as first fit finds."""
    longest = sizes[run[0]]
    if longest.prompt_tokens + longest.tokens > budget:
        raise ConfigError(
            f"prompt {longest.key[0]!r} of {longest.prompt_tokens} tokens and a completion of "
            f"{longest.tokens} exceed {name}.micro_batch_tokens {budget}, and one completion is "
            f"never split: raise it to at least {longest.prompt_tokens + longest.tokens}"
        )
    pieces: list[list[int]] = []
    room: list[int] = []
    for i in run:
        place = next((p for p, left in enumerate(room) if left >= sizes[i].tokens), None)
        if place is None:
            pieces.append([])
            room.append(budget - longest.prompt_tokens)
            place = len(pieces) - 1
        pieces[place].append(i)
        room[place] -= sizes[i].tokens
    return pieces


def _tokens(indices: Sequence[int], sizes: Sequence[Size]) -> int:
    """Tokens of these completions and of their distinct prompts."""
    prompts = {sizes[i].key: sizes[i].prompt_tokens for i in indices}
    return sum(prompts.values()) + sum(sizes[i].tokens for i in indices)


def split(sizes: Sequence[Size], budget: int, ranks: int) -> list[list[list[int]]]:
    """Packs per rank of a step.

    As few as the budget allows, where that keeps the ranks about equally busy. Otherwise smaller
    ones, so that a step that fits one pack is not left to one rank. That computes a prompt more
    than once where its completions go to several ranks, so it is done only where the busiest rank
    has at least a twentieth less to do. Deterministic. Raises ConfigError as ``pack`` does.
    """
    shares = share_out(pack(sizes, budget), sizes, ranks)
    if ranks == 1 or not sizes:
        return shares
    most, even = _busiest(shares, sizes), _tokens(range(len(sizes)), sizes) / ranks
    longest = max(size.prompt_tokens + size.tokens for size in sizes)
    smaller = (math.ceil(room * even / parts) for parts in _PARTS for room in _ROOM)
    for size in dict.fromkeys(max(longest, tokens) for tokens in smaller):
        if most <= UNEVEN * even:
            break
        if size < budget:
            candidate = share_out(pack(sizes, size), sizes, ranks)
            if (load := _busiest(candidate, sizes)) < 0.95 * most:
                shares, most = candidate, load
    return shares


def _busiest(shares: Sequence[Sequence[list[int]]], sizes: Sequence[Size]) -> int:
    """Tokens of the rank that has most."""
    return max(sum(_tokens(indices, sizes) for indices in share) for share in shares)


def share_out(
    packs: Sequence[list[int]], sizes: Sequence[Size], world_size: int
) -> list[list[list[int]]]:
    """Packs per rank, heaviest first onto the least loaded. Ranks may differ in count:
    ``TrainEngine.accumulate`` evens that out."""
    load = [0] * world_size
    shares: list[list[list[int]]] = [[] for _ in range(world_size)]
    weight = [_tokens(indices, sizes) for indices in packs]
    for index in sorted(range(len(packs)), key=lambda i: (-weight[i], i)):
        rank = min(range(world_size), key=lambda r: (load[r], r))
        load[rank] += weight[index]
        shares[rank].append(packs[index])
    return shares

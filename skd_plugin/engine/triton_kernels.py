"""The kernels of `TritonRows` (engine/triton_rows.py), each one pass over rows of logits, or as many as it says.

Shapes as there: N rows, P pieces of L entries.
"""

from __future__ import annotations

import triton
import triton.language as tl

ENTRIES = tl.constexpr(2048)  # of a row that a program reads at once
WARPS = 8  # of a program
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of an end token whose probability another has (core/end_event.py)


@triton.jit
def _row(values, stride, rows, joined, place, ENDS: tl.constexpr):
    """Where a row begins, and what its end tokens have together, if they are joined."""
    end = 0.0
    if ENDS > 0:
        end = tl.load(joined + place)
    return values + tl.load(rows + place).to(tl.int64) * stride, end


@triton.jit
def _read(row, ids, inside, ends, joined, ENDS: tl.constexpr):
    """Logits in float32, end tokens as one."""
    values = tl.load(row + ids, mask=inside, other=float("-inf")).to(tl.float32)
    for place in tl.static_range(ENDS):
        instead = joined if place == 0 else LOWEST
        values = tl.where(ids == tl.load(ends + place), instead, values)
    return values


@triton.jit
def rank_kernel(values, stride, rows, ends, joined, token, own, rank, size, ENDS: tl.constexpr):
    place = tl.program_id(0)
    row, end = _row(values, stride, rows, joined, place, ENDS)
    mine, my_id = tl.load(own + place), tl.load(token + place)
    before = tl.zeros([ENTRIES], tl.int32)
    for start in range(0, size, ENTRIES):
        ids = start + tl.arange(0, ENTRIES)
        inside = ids < size
        logits = _read(row, ids, inside, ends, end, ENDS)
        before += (inside & ((logits > mine) | ((logits == mine) & (ids < my_id)))).to(tl.int32)
    tl.store(rank + place, tl.sum(before, 0))


@triton.jit
def _mean_part(mass, values):
    """Of each piece the sum of values by their mass; what has none adds nothing."""
    return tl.sum(tl.where(mass == 0, 0.0, mass * values), 1)


@triton.jit
def _scaled(scale, value):
    return tl.where(scale == 0, 0.0, scale * value)


@triton.jit
def _base(highest):
    """What logits are looked at relative to; there may be none above -inf."""
    return tl.where(highest == float("-inf"), 0.0, highest)


@triton.jit
def _moved(scale, centred, mass, by):
    """A sum of logits by their mass, relative to another base; scale is what their mass is multiplied with there."""
    return _scaled(scale, centred + _scaled(mass, by))


@triton.jit(do_not_specialize=["count"])  # which changes with each step
def look_kernel(
    teacher, teacher_stride, teacher_rows, ends, teacher_joined,
    student, student_stride, student_rows, student_ends, student_joined,
    shifts, figures, teacher_highest, student_highest, piece_mass,
    size, pieces, count, inverse_temperature,
    ENDS: tl.constexpr, STUDENT_ENDS: tl.constexpr, LENGTH: tl.constexpr, PIECES: tl.constexpr, TEMPERED: tl.constexpr,
):  # fmt: skip
    """One row. Sums are kept apart for each of PIECES lanes, relative to the highest logit that the lane has met."""
    place = tl.program_id(0)
    teacher_row, teacher_end = _row(teacher, teacher_stride, teacher_rows, teacher_joined, place, ENDS)
    student_row, student_end = _row(student, student_stride, student_rows, student_joined, place, STUDENT_ENDS)
    shift = tl.load(shifts + place)

    highest = tl.full([PIECES], float("-inf"), tl.float32)
    own_highest = tl.full([PIECES], float("-inf"), tl.float32)
    mass = tl.zeros([PIECES], tl.float32)
    centred, apart, own_mass, own_centred = mass, mass, mass, mass

    for start in range(0, pieces, PIECES):
        piece = start + tl.arange(0, PIECES)
        ids = piece[:, None] * LENGTH + tl.arange(0, LENGTH)[None, :]
        inside = ids < size
        p = _read(teacher_row, ids, inside, ends, teacher_end, ENDS)
        q = _read(student_row, ids, inside, student_ends, student_end, STUDENT_ENDS)

        p_max, q_max = tl.max(p, 1), tl.max(q, 1)
        at = place.to(tl.int64) * pieces + piece
        tl.store(teacher_highest + at, p_max, mask=piece < pieces)
        tl.store(student_highest + at, q_max, mask=piece < pieces)
        p_below, q_below = p - _base(p_max)[:, None], q - _base(q_max)[:, None]
        p_mass, q_mass = tl.exp(p_below), tl.exp(q_below)
        p_sum, q_sum = tl.sum(p_mass, 1), tl.sum(q_mass, 1)
        if TEMPERED:
            tl.store(piece_mass + at, tl.sum(tl.exp(p_below * inverse_temperature), 1), mask=piece < pieces)
        else:
            tl.store(piece_mass + at, p_sum, mask=piece < pieces)

        higher, own_higher = tl.maximum(highest, p_max), tl.maximum(own_highest, q_max)
        base, own_base = _base(higher), _base(own_higher)
        old, new = tl.exp(highest - base), tl.exp(p_max - base)
        own_old, own_new = tl.exp(own_highest - own_base), tl.exp(q_max - own_base)
        p_centred, q_centred = _mean_part(p_mass, p_below), _mean_part(q_mass, q_below)
        centred = _moved(old, centred, mass, highest - base) + _moved(new, p_centred, p_sum, p_max - base)
        apart = _scaled(old, apart) + _scaled(new, _mean_part(p_mass, p - q - shift))
        mass = old * mass + new * p_sum
        own_centred = _moved(own_old, own_centred, own_mass, own_highest - own_base)
        own_centred += _moved(own_new, q_centred, q_sum, q_max - own_base)
        own_mass = own_old * own_mass + own_new * q_sum
        highest, own_highest = higher, own_higher

    top, own_top = tl.max(highest, 0), tl.max(own_highest, 0)
    base, own_base = _base(top), _base(own_top)
    old, own_old = tl.exp(highest - base), tl.exp(own_highest - own_base)
    to = figures + place
    tl.store(to, top)
    tl.store(to + count, tl.sum(old * mass, 0))
    tl.store(to + 2 * count, tl.sum(_moved(old, centred, mass, highest - base), 0))
    tl.store(to + 3 * count, tl.sum(_scaled(old, apart), 0))
    tl.store(to + 4 * count, own_top)
    tl.store(to + 5 * count, tl.sum(own_old * own_mass, 0))
    tl.store(to + 6 * count, tl.sum(_moved(own_old, own_centred, own_mass, own_highest - own_base), 0))


# A distribution after temperature and nucleus, and draws from it. Weights are those of one row relative to its highest
# logit, after its temperature; so none is above 1.


@triton.jit
def _weight(logits, base, temperature):
    """Of a temperature of 0 it is that of 1: the weights are not looked at."""
    return tl.exp((logits - base) / tl.where(temperature <= 0, 1.0, temperature))


@triton.jit(do_not_specialize_on_alignment=["rows"])
def pieces_kernel(
    values, stride, rows, ends, joined, temperature, highest, mass, size, pieces,
    ENDS: tl.constexpr, LENGTH: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Of PIECES pieces of a row the highest logit of each, and its mass relative to it."""
    place = tl.program_id(0)
    row, end = _row(values, stride, rows, joined, place, ENDS)
    piece = tl.program_id(1) * PIECES + tl.arange(0, PIECES)
    ids = piece[:, None] * LENGTH + tl.arange(0, LENGTH)[None, :]
    logits = _read(row, ids, ids < size, ends, end, ENDS)
    top = tl.max(logits, 1)
    weight = _weight(logits, _base(top)[:, None], tl.load(temperature + place))
    at = place.to(tl.int64) * pieces + piece
    tl.store(highest + at, top, mask=piece < pieces)
    tl.store(mass + at, tl.sum(weight, 1), mask=piece < pieces)


@triton.jit
def _order(logits):
    """Integers in the order of float32 numbers."""
    bits = tl.where(logits == 0, 0.0, logits).to(tl.uint32, bitcast=True)  # there is a zero below zero
    return tl.where(bits >> 31 > 0, ~bits, bits | 0x80000000)


@triton.jit
def nucleus_kernel(
    values, stride, rows, ends, joined, temperature, top_p, highest, mass, above, ties, edges, keeps, weights,
    size, pieces,
    ENDS: tl.constexpr, LENGTH: tl.constexpr, PIECES: tl.constexpr, ALL: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """What a row's nucleus is: of the entries above its edge all, of those at it `keep`, by their ids.

    The edge is found four bits at a time, from the highest on: the largest number such that the entries whose logits
    are not below it reach top_p. Each pass is over the pieces in which an entry may count, and so is the last, which
    adds up what is above the edge.
    """
    place = tl.program_id(0)
    row, end = _row(values, stride, rows, joined, place, ENDS)
    warmth, share = tl.load(temperature + place), tl.load(top_p + place)
    best, _, own, _ = _whole(place, warmth, highest, mass, ties, keeps, weights, pieces, ALL, False)
    base, total = _base(best), tl.sum(own, 0)
    target = share * total
    at_row = place.to(tl.int64) * pieces

    # Were all entries that weigh less than the share outside, spread over all of them, they would not be as much.
    least = base + tl.where(warmth <= 0, 1.0, warmth) * tl.log(tl.maximum((1 - share) * total / size / 2, 1e-38))
    edge = tl.where(share < 1, _order(least) >> (32 - BITS) << (32 - BITS), 0)
    digit = tl.arange(0, 16)
    width = tl.full([], 1 << 28, tl.uint32)
    for _ in range(0, tl.where(share < 1, BITS // 4, 0)):
        candidates = edge + digit.to(tl.uint32) * width
        is_number = (digit > 0) & (digit.to(tl.uint32) <= (0xFFFFFFFF - edge) // width)
        lowest = tl.min(tl.where(is_number, candidates, 0xFFFFFFFF), 0)
        reached = tl.zeros([PIECES * LENGTH, 16], tl.float32)
        for start in range(0, tl.where(_order(best) >= lowest, pieces, 0), PIECES):
            piece = start + tl.arange(0, PIECES)
            tops = tl.load(highest + at_row + piece, mask=piece < pieces, other=float("-inf"))
            if _order(tl.max(tops, 0)) >= lowest:
                ids = start * LENGTH + tl.arange(0, PIECES * LENGTH)
                logits = _read(row, ids, ids < size, ends, end, ENDS)
                weight = _weight(logits, base, warmth)
                reached += tl.where(_order(logits)[:, None] >= candidates[None, :], weight[:, None], 0.0)
        reaches = (tl.sum(reached, 0) >= target) & is_number
        edge += tl.sum(reaches.to(tl.uint32), 0) * width
        width = width >> 4

    mass_above = tl.zeros([PIECES], tl.float32)
    at_edge = tl.zeros([PIECES], tl.float32)
    for start in range(0, pieces, PIECES):
        piece = start + tl.arange(0, PIECES)
        tops = tl.load(highest + at_row + piece, mask=piece < pieces, other=float("-inf"))
        sums, equals = tl.zeros([PIECES], tl.float32), tl.zeros([PIECES], tl.int32)
        if _order(tl.max(tops, 0)) >= edge:
            ids = piece[:, None] * LENGTH + tl.arange(0, LENGTH)[None, :]
            logits = _read(row, ids, ids < size, ends, end, ENDS)
            weight, order = _weight(logits, base, warmth), _order(logits)
            equal = _at_edge(order, edge, BITS) & (ids < size)
            sums = tl.sum(tl.where(_above(order, edge, BITS), weight, 0.0), 1)
            equals = tl.sum(equal.to(tl.int32), 1)
            at_edge = tl.maximum(at_edge, tl.max(tl.where(equal, weight, 0.0), 1))
        tl.store(above + at_row + piece, sums, mask=piece < pieces)
        tl.store(ties + at_row + piece, equals, mask=piece < pieces)
        mass_above += sums

    weight = tl.max(at_edge, 0)
    missing = tl.ceil((target - tl.sum(mass_above, 0)) / tl.where(weight > 0, weight, 1.0))
    keep = tl.where(weight > 0, tl.minimum(tl.maximum(missing, 1.0), 1e9), 0.0)
    tl.store(edges + place, edge.to(tl.int32, bitcast=True))
    tl.store(keeps + place, keep.to(tl.int32))
    tl.store(weights + place, weight)


@triton.jit
def _above(order, edge, BITS: tl.constexpr):
    return (order >= edge) & (order - edge >> (32 - BITS) > 0)


@triton.jit
def _at_edge(order, edge, BITS: tl.constexpr):
    return (order >= edge) & (order - edge >> (32 - BITS) == 0)


@triton.jit
def _reach(own, sums, target, SIZE: tl.constexpr):
    """The first entry with a weight whose sum reaches the target; where rounding lets none reach it, the last."""
    place = tl.arange(0, SIZE)
    first = tl.min(tl.where((own > 0) & (sums >= target), place, SIZE), 0)
    return tl.minimum(first, tl.max(tl.where(own > 0, place, 0), 0))


@triton.jit
def _at(values, place, chosen):
    return tl.sum(tl.where(place == chosen, values, 0), 0)


@triton.jit
def _whole(place, warmth, highest, mass, ties, keeps, weights, pieces, ALL: tl.constexpr, NUCLEUS: tl.constexpr):
    """Of a row its highest logit; of each piece its highest, its mass that stays, and entries at the edge before it.

    `mass` is of what is above the edge, relative to the row's highest logit, where there is a NUCLEUS; else of a
    piece, relative to the piece's.
    """
    every = tl.arange(0, ALL)
    at = place.to(tl.int64) * pieces + every
    top = tl.load(highest + at, mask=every < pieces, other=float("-inf"))
    best = tl.max(top, 0)
    own = tl.load(mass + at, mask=every < pieces, other=0.0)
    before = tl.zeros([ALL], tl.int32)
    if NUCLEUS:
        tied = tl.load(ties + at, mask=every < pieces, other=0)
        before = tl.cumsum(tied, 0) - tied
        stay = tl.minimum(tl.maximum(tl.load(keeps + place) - before, 0), tied)
        own += stay.to(tl.float32) * tl.load(weights + place)
    else:
        own *= _weight(top, _base(best), warmth)
    return best, top, own, before


@triton.jit(do_not_specialize_on_alignment=["rows", "uniform"])
def draw_kernel(
    values, stride, rows, ends, joined, temperature, highest, mass, ties, edges, keeps, weights, uniform, token,
    size, pieces,
    ENDS: tl.constexpr, LENGTH: tl.constexpr, ALL: tl.constexpr, BITS: tl.constexpr, NUCLEUS: tl.constexpr,
):  # fmt: skip
    """One token of a row: the number falls into a piece, and then to an entry of it."""
    place = tl.program_id(0)
    row, end = _row(values, stride, rows, joined, place, ENDS)
    warmth = tl.load(temperature + place)
    greedy = warmth <= 0

    every, inside = tl.arange(0, ALL), tl.arange(0, LENGTH)
    best, top, own, tied_before = _whole(place, warmth, highest, mass, ties, keeps, weights, pieces, ALL, NUCLEUS)
    own = own.to(tl.float64)
    sums = tl.cumsum(own, 0)
    target = tl.load(uniform + place) * tl.max(sums, 0)
    piece = _reach(own, sums, target, ALL)
    own_sum = _at(own, every, piece)
    target = (target - (_at(sums, every, piece) - own_sum)) / own_sum  # as a share of the piece
    piece = tl.where(greedy, tl.min(tl.where(top == best, every, pieces - 1), 0), piece)

    ids = piece * LENGTH + inside
    logits = _read(row, ids, ids < size, ends, end, ENDS)
    weight = _weight(logits, _base(best), warmth)
    if NUCLEUS:
        order, edge = _order(logits), tl.load(edges + place).to(tl.uint32, bitcast=True)
        equal = (_at_edge(order, edge, BITS) & (ids < size)).to(tl.int32)
        stays = tl.cumsum(equal, 0) - equal + _at(tied_before, every, piece) < tl.load(keeps + place)
        weight = tl.where(_above(order, edge, BITS) | ((equal > 0) & stays), weight, 0.0)
    own = weight.to(tl.float64)
    sums = tl.cumsum(own, 0)
    entry = _reach(own, sums, tl.minimum(target, 1.0) * tl.max(sums, 0), LENGTH)
    entry = tl.where(greedy, tl.min(tl.where(logits == best, inside, LENGTH - 1), 0), entry)
    tl.store(token + place, tl.minimum(piece * LENGTH + entry, size - 1).to(tl.int64))


@triton.jit(do_not_specialize_on_alignment=["rows"])
def warp_kernel(
    values, stride, rows, ends, joined, temperature, highest, mass, ties, edges, keeps, weights, probs,
    size, pieces,
    ENDS: tl.constexpr, LENGTH: tl.constexpr, PIECES: tl.constexpr, ALL: tl.constexpr, BITS: tl.constexpr,
    NUCLEUS: tl.constexpr,
):  # fmt: skip
    """The probabilities of one row."""
    place = tl.program_id(0)
    row, end = _row(values, stride, rows, joined, place, ENDS)
    warmth = tl.load(temperature + place)
    greedy = warmth <= 0
    best, _, own, _ = _whole(place, warmth, highest, mass, ties, keeps, weights, pieces, ALL, NUCLEUS)
    total = tl.where(greedy, 1.0, tl.sum(own, 0))
    keep, passed = tl.full([], 1, tl.int32), tl.full([], 0, tl.int32)  # of the highest, of a temperature of 0
    if NUCLEUS:
        keep = tl.where(greedy, 1, tl.load(keeps + place))
        edge = tl.load(edges + place).to(tl.uint32, bitcast=True)
    for start in range(0, size, PIECES * LENGTH):
        ids = start + tl.arange(0, PIECES * LENGTH)
        logits = _read(row, ids, ids < size, ends, end, ENDS)
        above, equal = ids < size, ids < 0
        if NUCLEUS:
            order = _order(logits)
            above, equal = _above(order, edge, BITS), _at_edge(order, edge, BITS) & (ids < size)
        equal = tl.where(greedy, logits == best, equal).to(tl.int32)
        stays = (equal > 0) & (tl.cumsum(equal, 0) - equal + passed < keep)
        passed += tl.sum(equal, 0)
        weight = tl.where(tl.where(greedy, stays, stays | above), _weight(logits, _base(best), warmth), 0.0)
        tl.store(probs + place.to(tl.int64) * size + ids, weight / total, mask=ids < size)

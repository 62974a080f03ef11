"""What csrc/cpu/coding.inl, range_coder.inl and trellis.inl do, a number at a time in whole numbers of Python.

Nothing here imports loraspan: a stream that both write and read is one that the documents describe.
"""

from __future__ import annotations

import math

SYMBOLS, ESCAPE = 16, 15
CODED = 15
FLOOR = 2
WHOLE = 2**16 - 64
MOST_ZEROS = WHOLE // 16 * 15
FIRST_RATE, LAST_RATE, SLOWER = 6, 11, 64
LOW_FROM, MOST_LOW = 62, 12
SHAPES = [round(65536 * math.exp(-512 / 2 ** ((size + 0.5) / 4))) for size in range(30, LOW_FROM)]
BYTE = 2**32


class Model:
    def __init__(self, weights):
        self.below = [sum(weights[:i]) * WHOLE // sum(weights) for i in range(SYMBOLS)]
        self.seen, self.rate, self.slower = 0, FIRST_RATE, SLOWER

    def edges(self):
        return [below // 2 + FLOOR * i for i, below in enumerate(self.below)] + [2**CODED]

    def learn(self, symbol):
        self.seen += 1
        cut = self.seen * 0x9E3779B9 % 2**32 >> (32 - self.rate)
        for i in range(SYMBOLS):
            wanted = WHOLE if i > symbol else 0
            self.below[i] += (wanted - self.below[i] + cut) >> self.rate
        self.below[1] = min(self.below[1], MOST_ZEROS)
        if self.seen == self.slower and self.rate < LAST_RATE:
            self.rate, self.slower = self.rate + 1, 2 * self.slower + SLOWER


def normal(shape, odd):
    """Half the sizes, rounded down, of normal entries that are even, or odd."""
    square = shape * shape >> 16
    weights = [1 << 16, square if odd else 2 * shape]
    ratio = shape * square >> 16 if not odd else square * square >> 16
    for _ in range(SYMBOLS - 2):
        weights.append(weights[-1] * ratio >> 16)
        ratio = ratio * square >> 16
    return Model(weights)


class Models:
    def __init__(self):
        shapes = [SHAPES[max(size - 30, 0)] for size in range(LOW_FROM)]
        self.numbers = [[normal(shape, odd) for odd in (False, True)] for shape in shapes]
        self.sizes, self.ways = (Model([2 ** (SYMBOLS - i) for i in range(SYMBOLS)]) for _ in range(2))


class Writer:
    def __init__(self):
        self.low, self.range, self.front, self.back = 0, BYTE - 1, bytearray(), []

    def symbol(self, model, value):
        edges = model.edges()
        unit = self.range >> CODED
        self.low += unit * edges[value]
        self.range = unit * (edges[value + 1] - edges[value])
        if self.low >= BYTE:
            self.low -= BYTE
            number = int.from_bytes(self.front, "big") + 1
            self.front = bytearray(number.to_bytes(len(self.front), "big"))
        while self.range < 2**24:
            self.put()
            self.range <<= 8
        model.learn(value)

    def bits(self, value, count):
        self.back += [value >> i & 1 for i in range(count)]

    def put(self):
        self.front.append(self.low >> 24)
        self.low = (self.low << 8) % BYTE

    def end(self):
        for _ in range(4):
            self.put()
        back = [sum(bit << j for j, bit in enumerate(self.back[i : i + 8])) for i in range(0, len(self.back), 8)]
        return bytes(self.front) + bytes(reversed(back))


class Reader:
    def __init__(self, data):
        self.data, self.at, self.range = data, 4, BYTE - 1
        self.code = int.from_bytes(data[:4], "big")
        self.back = [byte >> i & 1 for byte in reversed(data) for i in range(8)]
        self.taken = 0

    def symbol(self, model):
        edges = model.edges()
        self.range >>= CODED
        value = max(i for i in range(SYMBOLS) if self.code >= self.range * edges[i])
        self.code -= self.range * edges[value]
        self.range *= edges[value + 1] - edges[value]
        while self.range < 2**24:
            self.code = self.code << 8 | self.data[self.at]
            self.range <<= 8
            self.at += 1
        model.learn(value)
        return value

    def bits(self, count):
        found = sum(self.back[self.taken + i] << i for i in range(count))
        self.taken += count
        return found


def log(value):
    """32 times the logarithm to base 2, rounded down, of the first 16 bits; 0 for 0."""
    if not value:
        return 0
    found = value.bit_length() - 1
    top = value >> (found - 15) if found > 15 else value << (15 - found)
    for _ in range(5):
        top = top * top >> 15
        found = 2 * found + (top >> 16)
        top >>= top >> 16
    return found


def log_weight(weight):
    """Of a float32; small ones are as good as the bits that they have in memory."""
    if weight < 2**-126:
        return 32 * -150 + log(int(weight * 2**149) | 2**23)
    mantissa, exponent = math.frexp(weight)
    return 32 * (exponent - 24) + log(int(mantissa * 2**24))


def model_of(size):
    """Which model numbers have, and how many low bits, from the logarithm of their mean square."""
    size = max(size + 256, 0) // 8
    if size < LOW_FROM:
        return size, 0
    return LOW_FROM - 8 + (size - LOW_FROM) % 8, min((size - LOW_FROM) // 8 + 1, MOST_LOW)


class Places:
    """By how much more than others numbers in each place of a row are, by the rows before."""

    def __init__(self, length):
        self.rows, self.squares = 1, [1024] * length

    def add(self, row):
        total = sum(number**2 for number in row)
        if total:
            self.rows += 1
            unit = 1024 * len(row) / total
            self.squares = [known + int(number**2 * unit) for known, number in zip(self.squares, row, strict=True)]

    def more(self):
        return [log(square) - log(1024 * self.rows) for square in self.squares]


def differ(table):
    if len(table) < 2:
        return False
    places = Places(len(table[0]))
    for row in table:
        places.add(row)
    return -sum(more + 1 for more in places.more()) * places.rows > 192 * len(table[0])


def next_state(state, index):
    return (state >> 1) ^ (0o515 >> 1 if state & 1 else 0) ^ (0o362 >> 1 if index & 1 else 0)


def is_path(row):
    state = 0
    for number in row:
        if number % 2 != state % 2:
            return False
        state = next_state(state, number // 2)
    return True


def way_of(row):
    return 1 if is_path(row) else 2 if is_path([-number for number in row]) else 0


def each_row(tables, known):
    """Give every table and row with the size that it has if its task has kept its step, and what is told the size."""
    level, firsts = 0, {}
    for t, table in enumerate(tables):
        weights, tasks = known[t] if known else ([1] * len(table), [0] * len(table))
        for i, row in enumerate(table):
            first = i == 0 or tasks[i - 1] != tasks[i]
            if first:
                level = firsts.get(tasks[i], level)
            weight = 2 * log_weight(weights[i])
            found = []
            yield t, row, level + weight, found.append
            if found[0]:
                level = found[0] - weight
                if first:
                    firsts[tasks[i]] = level


def sizes_of(mean, places):
    return [model_of(mean + more) for more in places.more()]


def encode(tables, known=()):
    """The bytes between those of the bits of tables and the checksum; tables are lists of rows, lists of numbers.

    What is known of tables is a list of weights and one of tasks for each.
    """
    models, out, table = Models(), Writer(), None
    for t, row, wanted, keep in each_row(tables, known):
        if t != table:
            table, places, apart = t, Places(len(row)), differ(tables[t])
            out.bits(int(apart), int(len(tables[t]) > 1))
        way = way_of(row)
        size = log(sum(number**2 for number in row) * (1 if way else 4))
        keep(size)
        out.symbol(models.ways, way)
        step = (size - wanted + 8) // 16
        turns = -2 * step - 1 if step < 0 else 2 * step
        out.symbol(models.sizes, min(turns, ESCAPE))
        told = wanted + 16 * step
        if turns >= ESCAPE:
            out.bits(size // 16, 7)
            told = size // 16 * 16
        sizes = sizes_of(told - log(len(row)), places)
        if apart:
            places.add(row)
        state = 0
        for number, (place, low) in zip(row if way < 2 else [-number for number in row], sizes, strict=True):
            size = abs(number) // 2 if way else abs(number)
            high = size >> low
            out.symbol(models.numbers[place][state & 1], min(high, ESCAPE))
            if high >= ESCAPE:
                rest = high - ESCAPE
                out.bits(rest.bit_length(), 4)
                out.bits(rest - 2 ** (rest.bit_length() - 1) if rest else 0, max(rest.bit_length() - 1, 0))
            out.bits(size % 2**low, low)
            if number:
                out.bits(int(number < 0), 1)
            state = next_state(state, number // 2) if way else 0
    return out.end()


def decode(data, shapes, known=()):
    models, reader, tables = Models(), Reader(data), [[[0] * length for _ in range(rows)] for rows, length in shapes]
    table = None
    for t, row, wanted, keep in each_row(tables, known):
        if t != table:
            table, places, apart = t, Places(len(row)), len(tables[t]) > 1 and reader.bits(1)
        way, turns = reader.symbol(models.ways), reader.symbol(models.sizes)
        step = -(turns + 1) // 2 if turns % 2 else turns // 2
        told = 16 * reader.bits(7) if turns == ESCAPE else wanted + 16 * step
        state = 0
        for i, (place, low) in enumerate(sizes_of(told - log(len(row)), places)):
            odd = state & 1
            high = reader.symbol(models.numbers[place][odd])
            if high == ESCAPE:
                length = reader.bits(4)
                high += reader.bits(length - 1) + 2 ** (length - 1) if length else 0
            size = (high << low) + reader.bits(low)
            if way:
                size = 2 * size + odd
            number = -size if size and reader.bits(1) else size
            row[i] = -number if way == 2 else number
            state = next_state(state, number // 2) if way else 0
        keep(log(sum(number**2 for number in row) * (1 if way else 4)))
        if apart:
            places.add(row)
    return tables


BEFORE = {(next_state(state, index), index): state for state in range(256) for index in (0, 1)}


def trellis(row):
    """The cheapest path, all ways to it tried step by step; in 64ths, ties for the even index, then the first state."""
    ways = {0: (0, ())}
    for x in row:
        size = int(abs(x) * 64 + 0.5) * (-1 if x < 0 else 1)
        steps = {(odd, index): nearest(size, odd, index) for odd in (0, 1) for index in (0, 1)}
        found = {}
        for (state, index), before in BEFORE.items():
            if before in ways:
                cost, path = ways[before]
                number, more = steps[before & 1, index]
                found.setdefault(state, []).append((cost + more, index, number, path))
        ways = {}
        for state, each in found.items():
            cost, _, number, path = min(each, key=lambda way: way[:2])
            ways[state] = cost, (path, number)
    _, _, path = min((cost, state, path) for state, (cost, path) in ways.items())
    numbers = []
    while path:
        path, number = path
        numbers.append(number)
    return numbers[::-1]


def nearest(size, odd, index):
    """The nearest number of a set, the larger of two as near, and the square of its distance in 256ths, cut off."""
    numbers = [n for n in range(size // 64 - 3, size // 64 + 5) if n % 4 == odd + 2 * index]
    number = max(numbers, key=lambda n: (-abs(size - 64 * n), n))
    return number, (size - 64 * number) ** 2 >> 4

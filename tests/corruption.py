"""Corruption of the bytes of a file, at offsets and in amounts drawn by chance."""

import random


def flip_a_bit(data: bytearray, chance: random.Random) -> bytes:
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return data


def flip_many_bits(data: bytearray, chance: random.Random) -> bytes:
    for _ in range(chance.randint(2, 1000)):
        flip_a_bit(data, chance)
    return data


def overwrite_a_block(data: bytearray, chance: random.Random) -> bytes:
    length = chance.randint(64, 4096)
    start = chance.randrange(max(len(data) - length, 1))
    data[start : start + length] = chance.randbytes(min(length, len(data) - start))
    return data


def cut_the_end_off(data: bytearray, chance: random.Random) -> bytes:
    near_the_end = chance.random() < 0.5
    return data[: chance.randrange(len(data) - 200 if near_the_end else 0, len(data))]


def add_to_the_end(data: bytearray, chance: random.Random) -> bytes:
    return data + chance.randbytes(chance.randint(1, 5000))


CORRUPTIONS = (flip_a_bit, flip_many_bits, overwrite_a_block, cut_the_end_off, add_to_the_end)

"""Counts are remembered by what they depend on, the latest of them."""

import threading

import torch

from cornstarch_hf.encoders.counting import MOST, CountCache, key_of


def test_keys_tell_shapes_of_features_and_values_of_the_rest():
    item = {"pixel_values": torch.zeros(1, 3, 4, 4), "grid": torch.tensor([[1, 2]]), "size": (1, 2)}
    assert key_of("a", item) == key_of("a", dict(reversed(item.items())))
    assert key_of("a", item) == key_of("a", item | {"pixel_values": torch.ones(1, 3, 4, 4)})
    for other in (
        {"pixel_values": torch.zeros(1, 3, 4, 5)},
        {"pixel_values": item["pixel_values"].half()},
        {"grid": torch.tensor([[2, 1]])},
        {"size": (2, 1)},
    ):
        assert key_of("a", item) != key_of("a", item | other)
    assert key_of("a", item) != key_of("b", item) and hash(key_of("a", item))


def test_the_one_asked_for_longest_ago_goes_first():
    cache = CountCache(most=2)
    cache.put("a", 1)
    cache.put("b", 0)
    assert cache.get("a") == 1 and cache.get("c") is None
    cache.put("c", 3)
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (1, None, 3) and len(cache) == 2
    assert CountCache().most == MOST == 4_096


def test_threads_share_it():
    cache, wrong = CountCache(most=8), []

    def use(seed):
        for i in range(3_000):
            key = (i * seed) % 13
            found = cache.get(key)
            if found not in (None, key):
                wrong.append(found)
            cache.put(key, key)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(cache) <= 8 + len(threads)

"""States on disk: one that is found continues as if it had never been away, or it is not found."""

import multiprocessing
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, make_prompt_cache

from flashmoe_mlx.checkpoint.identity import model_identity
from flashmoe_mlx.generation.prefix_store import PrefixStore
from tests.conftest import WriteFamily
from tests.support.oracle import streamed
from tests.support.serving import serve

PROMPT = list(range(5, 45))
MODEL, OTHER = "a" * 32, "b" * 32


@pytest.fixture(scope="module", params=["qwen3_5_moe", "qwen3_moe"])
def folder(request: pytest.FixtureRequest, checkpoint: WriteFamily) -> Path:
    """GatedDeltaNet layers and an attention layer, or attention alone."""
    return checkpoint(request.param)


@pytest.fixture(scope="module")
def hybrid(checkpoint: WriteFamily) -> Path:
    return checkpoint("qwen3_5_moe")


def read(folder: Path, tokens: list[int], cache: list[Any] | None = None) -> tuple[list[Any], mx.array]:
    """The cache and the logits after some tokens."""
    model = streamed(folder)
    cache = cache or make_prompt_cache(model)
    logits = model(mx.array(tokens)[None], cache=cache)
    mx.eval(logits, [layer.state for layer in cache])
    return cache, logits


def fill(nbytes: int = 256_000, value: float = 1) -> list[Any]:
    """A cache of some size, in steps of 256,000 bytes, made without a model."""
    cache = KVCache()
    values = mx.full((1, 1, nbytes // 1000, 125), value)
    cache.update_and_fetch(values, values)
    return [cache]


def test_a_restored_state_continues_with_the_same_bits(folder: Path, tmp_path: Path) -> None:
    """In a store that another process could have made."""
    cache, _ = read(folder, PROMPT[:25])
    assert PrefixStore(tmp_path / "new" / "store", 1 << 30, MODEL).store(PROMPT[:25], cache)
    _, expected = read(folder, PROMPT[25:], cache)
    found = PrefixStore(tmp_path / "new" / "store", 1 << 30, MODEL).longest(PROMPT)
    assert found and found[1] == 25
    assert mx.array_equal(read(folder, PROMPT[25:], found[0])[1], expected)
    # Without the state the logits differ.
    assert not mx.array_equal(read(folder, PROMPT[25:])[1], expected)


def test_half_precision_and_quantized_states_are_restored(tmp_path: Path) -> None:
    store = PrefixStore(tmp_path / "store", 1 << 30, MODEL)
    (cache,) = fill(value=0.3)
    cache.keys, cache.values = cache.keys.astype(mx.bfloat16), cache.values.astype(mx.bfloat16)
    store.store([1], [cache])
    found = store.longest([1])
    assert found and all(map(mx.array_equal, found[0][0].state[:2], cache.state[:2]))
    cache = KVCache()
    cache.update_and_fetch(mx.random.normal((1, 1, 8, 64)), mx.random.normal((1, 1, 8, 64)))
    cache = cache.to_quantized(group_size=64, bits=8)
    store.store([1, 2], [cache])
    found = store.longest([1, 2, 3])
    assert found and found[1] == 2 and found[0][0].bits == 8


def test_only_whole_prefixes_are_found(tmp_path: Path) -> None:
    store = PrefixStore(tmp_path / "store", 1 << 30, MODEL)
    for length in (3, 5, 9):
        assert store.store(PROMPT[:length], fill())
    lengths = {count: (store.longest(PROMPT[:count]) or (None, 0))[1] for count in range(11)}
    assert lengths == {0: 0, 1: 0, 2: 0, 3: 3, 4: 3, 5: 5, 6: 5, 7: 5, 8: 5, 9: 9, 10: 9}
    assert store.longest([*PROMPT[:4], 7, 7, 7, 7])[1] == 3  # type: ignore[index]
    assert store.longest(PROMPT, beyond=9) is None
    assert store.longest([7, *PROMPT[1:]]) is None


def test_states_of_other_models_are_not_found(tmp_path: Path) -> None:
    assert PrefixStore(tmp_path / "store", 1 << 30, MODEL).store(PROMPT, fill())
    other = PrefixStore(tmp_path / "store", 1 << 30, OTHER)
    assert other.longest(PROMPT) is None
    # Not even if a file is renamed to that of another model.
    (file,) = (tmp_path / "store").iterdir()
    file.rename(file.with_name(file.name.replace(MODEL, OTHER)))
    assert other.longest(PROMPT) is None
    assert list((tmp_path / "store").iterdir()) == []


def test_identity_differs_by_settings_weights_and_config(hybrid: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(hybrid, folder)
    seen = [model_identity(folder, {"experts_per_token": count}) for count in ("4", "2")]
    assert model_identity(folder, {"experts_per_token": "4"}) == seen[0]
    shard = next(folder.glob("model*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    seen.append(model_identity(folder, {"experts_per_token": "4"}))
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    seen.append(model_identity(folder, {"experts_per_token": "4"}))
    assert len(set(seen)) == 4


def test_damaged_files_are_deleted(tmp_path: Path) -> None:
    """A flipped byte anywhere, a truncated file, or one of something else."""
    store = PrefixStore(tmp_path / "store", 1 << 30, MODEL)
    store.store(PROMPT, fill())
    (file,) = (tmp_path / "store").iterdir()
    whole = file.read_bytes()
    flips = [bytes([*whole[:at], whole[at] ^ 0x10, *whole[at + 1 :]]) for at in range(0, len(whole), len(whole) // 40)]
    for content in [*flips, whole[:-1], whole[:1000], whole[:4], b"", b"heron" * 99]:
        file.write_bytes(content)
        assert store.longest(PROMPT) is None
        assert not file.exists()
    file.write_bytes(whole)
    assert store.longest(PROMPT)


def test_the_least_recently_used_files_make_room(tmp_path: Path) -> None:
    """A state that is larger than the limit is not written."""
    store = PrefixStore(tmp_path / "store", 1_000_000, MODEL)
    for count in range(3):
        assert store.store([count], fill())
        age(tmp_path / "store", 10 - count)
    assert 768_000 < store.nbytes <= 1_000_000
    assert store.longest([0])
    assert store.store([3], fill())
    assert [bool(store.longest([count])) for count in range(4)] == [True, False, True, True]
    assert not store.store([4], fill(1_024_000))
    assert store.nbytes <= 1_000_000
    assert PrefixStore(tmp_path / "store", 400_000, OTHER).store([0], fill())
    assert store.nbytes <= 400_000


def age(folder: Path, seconds: int) -> None:
    """Let the newest file look as if it had been used some seconds ago."""
    newest = max(folder.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    before = newest.stat().st_mtime - seconds
    os.utime(newest, (before, before))


def test_other_files_in_the_folder_are_neither_counted_nor_deleted(tmp_path: Path) -> None:
    store = PrefixStore(tmp_path / "store", 400_000, MODEL)
    weights = [tmp_path / "store" / name for name in ("model.safetensors", f"{MODEL}-1-model.safetensors")]
    for file in weights:
        file.write_bytes(bytes(1_000_000))
        os.utime(file, (0, 0))
    for count in range(3):
        assert store.store([count], fill())
    assert store.nbytes <= 400_000 and all(file.stat().st_size == 1_000_000 for file in weights)


def test_identity_differs_once_weights_were_changed_in_place(hybrid: Path, tmp_path: Path) -> None:
    """With a later time alone, and with the time set back, also if the hub's download metadata is there."""
    folder = tmp_path / "model"
    shutil.copytree(hybrid, folder)
    shard = next(folder.glob("model*.safetensors"))
    note = folder / ".cache" / "huggingface" / "download" / f"{shard.name}.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{'0' * 40}\n{'1' * 64}\n")
    seen = [model_identity(folder, {})]
    before = shard.stat()
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    seen.append(model_identity(folder, {}))
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns + 1000))
    seen.append(model_identity(folder, {}))
    assert len(set(seen)) == 3


def test_files_are_accessible_to_their_owner_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        PrefixStore(tmp_path / "store", 1 << 30, MODEL).store([1], fill())
    finally:
        os.umask(before)
    (file,) = (tmp_path / "store").iterdir()
    assert stat.S_IMODE((tmp_path / "store").stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    (tmp_path / "store").chmod(0o750)
    with pytest.raises(PermissionError, match="chmod 700"):
        PrefixStore(tmp_path / "store", 1 << 30, MODEL)


def test_unfinished_files_of_killed_processes_are_deleted(tmp_path: Path) -> None:
    PrefixStore(tmp_path / "store", 1 << 30, MODEL)
    (tmp_path / "store" / f".{MODEL}-1-ab.cd.unfinished.safetensors").write_text("half")
    PrefixStore(tmp_path / "store", 1 << 30, MODEL)
    assert list((tmp_path / "store").iterdir()) == []


def use(folder: Path, turn: int) -> None:
    """Store and look up in a folder that another process uses too."""
    store = PrefixStore(folder, 1_000_000, MODEL)
    tokens, cache = [turn % 7], fill(value=turn % 7)
    store.store(tokens, cache)
    found = store.longest(tokens)
    assert found is None or mx.array_equal(found[0][0].state[0], cache[0].state[0])


def use_often(folder: Path) -> None:
    for turn in range(30):
        use(folder, turn)


def test_two_processes_share_a_folder_and_its_limit(tmp_path: Path) -> None:
    other = multiprocessing.get_context("spawn").Process(target=use_often, args=(tmp_path / "store",))
    other.start()
    turn = 0
    while other.is_alive():
        use(tmp_path / "store", turn)
        turn += 3
    assert other.exitcode == 0
    store = PrefixStore(tmp_path / "store", 1_000_000, MODEL)
    assert 0 < store.nbytes <= 1_000_000
    assert any(store.longest([number]) for number in range(7))


def test_a_restarted_server_continues_from_the_preamble(folder: Path, tmp_path: Path) -> None:
    """With the same answer, and also if the files are damaged: then the preamble is computed again."""
    words = " ".join(f"Rule {number}: be brief." for number in range(60))
    messages = [{"role": "system", "content": words}, {"role": "user", "content": "What is a heron?"}]
    answers, cached = [], []
    for turn in range(3):
        if turn == 2:
            for file in tmp_path.glob("store/*"):
                file.write_bytes(file.read_bytes()[:-9])
        with serve(folder, open_prefix_store=lambda model: PrefixStore(tmp_path / "store", 1 << 30, MODEL)) as running:
            status, answer = running.chat(messages=messages, max_tokens=4)
        assert status == 200
        answers.append(answer["choices"][0]["message"]["content"])
        cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert answers[0] == answers[1] == answers[2] != ""
    assert cached[0] == cached[2] == 0 and cached[1] >= 512

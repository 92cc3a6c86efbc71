"""Text to tokens to batches: files, folders, globs, caches, order, errors."""

import errno
import gzip
import json
import lzma
from itertools import pairwise

import numpy as np
import pytest
import torch

from farfield.train import data as data_module
from farfield.train.codec import Bytes, Tokenizer, open_codec
from farfield.train.data import find_files, open_data
from farfield.train.generate import stream_text

TEXT = "".join(f"line {i}: größer ≥ 𝛼 {i * i}\n" for i in range(200))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def opened(text, tmp_path):
    return lambda **changes: open_data(**({"text": text, "tokens": 64, "cache": tmp_path / "cache"} | changes))


@pytest.fixture
def tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([TEXT], trainer)
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    return path


# Batches


def test_batches_depend_on_seed_and_number_only(opened):
    split = opened().train
    whole = torch.cat([split.batch(3, 0, 7)[0], split.batch(3, 7, 5)[0]])
    assert torch.equal(whole, split.batch(3, 0, 12)[0])
    assert torch.equal(opened().train.batch(3, 7, 5)[0], whole[7:])
    assert not torch.equal(split.batch(4, 0, 12)[0], whole)


def test_targets_are_the_next_tokens(opened):
    inputs, targets = opened().train.batch(0, 0, 4)
    assert inputs.shape == targets.shape == (4, 64)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    ids = opened().train.ids
    for row in torch.cat([inputs, targets[:, -1:]], 1).numpy():
        assert row.astype(np.uint8).tobytes() in ids.tobytes()


def test_every_pass_reads_each_window_once_from_another_start(opened):
    split = opened().train
    per_pass = split.windows - 1
    starts = [split._start(0, i) for i in range(3 * per_pass)]
    for p in range(3):
        once = sorted(starts[p * per_pass : (p + 1) * per_pass])
        assert {b - a for a, b in pairwise(once)} == {64}
    assert len({min(starts[p * per_pass : (p + 1) * per_pass]) % 64 for p in range(3)}) > 1
    assert max(starts) + 64 < len(split.ids)


def test_a_text_of_one_window_gives_it(tmp_path):
    path = tmp_path / "short"
    path.write_bytes(bytes(range(65)))
    (tmp_path / "held").write_bytes(bytes(range(65)))
    split = open_data(path, tokens=64, valid=tmp_path / "held", cache=tmp_path).train
    assert split.windows == 1
    assert torch.equal(split.batch(0, 5, 1)[1][0], torch.arange(1, 65))


def test_held_out_text_is_never_trained_on(opened):
    got = opened(held_out=0.25)
    raw = TEXT.encode()
    assert got.train.ids.tobytes() + got.valid.ids.tobytes() == raw
    assert abs(len(got.valid.ids) - len(raw) / 4) <= 1


def test_held_out_is_at_least_a_window(opened):
    assert opened(held_out=0.001).valid.windows == 1


def test_held_out_files_of_their_own(opened, tmp_path):
    held = tmp_path / "held.txt"
    held.write_text("x" * 500)
    got = opened(valid=held)
    assert bytes(got.valid.ids) == b"x" * 500
    assert len(got.train.ids) == len(TEXT.encode())


def test_windows_in_the_order_of_the_text(opened):
    split = opened().valid
    ids, sizes = split.window(0)
    assert torch.equal(ids, torch.from_numpy(split.ids[:65].astype(np.int64)))
    assert bool((sizes == 1).all())
    assert torch.equal(split.window(1)[0][0], ids[-1])


# Files


def test_files_folders_globs_and_compression(tmp_path):
    folder = tmp_path / "some"
    (folder / "deep" / ".git").mkdir(parents=True)
    (folder / "a.txt").write_text("a" * 10)
    (folder / "empty.txt").write_text("")
    (folder / "deep" / "b.md").write_text("b" * 10)
    (folder / "deep" / "binary").write_bytes(b"x\0y")
    (folder / "deep" / ".git" / "config").write_text("no")
    with gzip.open(folder / "c.gz", "wb") as file:
        file.write(b"c" * 10)
    (folder / "d.xz").write_bytes(lzma.compress(b"d" * 10))
    assert [f.name for f in find_files(folder)] == ["a.txt", "c.gz", "d.xz", "b.md"]
    assert [f.name for f in find_files(str(folder / "**" / "*.md"))] == ["b.md"]
    assert [f.name for f in find_files([folder / "a.txt", str(folder / "*.txt")])] == ["a.txt"]
    split = open_data(folder, tokens=4, cache=tmp_path / "cache", held_out=0.3)
    assert bytes(split.train.ids) + bytes(split.valid.ids) == b"a" * 10 + b"c" * 10 + b"d" * 10 + b"b" * 10


@pytest.mark.parametrize("what", ["missing.txt", "nothing/*.txt"])
def test_missing_text(tmp_path, what):
    with pytest.raises(FileNotFoundError, match="no such file, folder or glob") as error:
        open_data(tmp_path / what, tokens=8, cache=tmp_path)
    assert what in str(error.value)


def test_empty_text(tmp_path):
    (tmp_path / "empty").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="empty is empty"):
        open_data(tmp_path / "empty", tokens=8, cache=tmp_path)
    with pytest.raises(ValueError, match="no text in"):
        open_data(tmp_path / "folder", tokens=8, cache=tmp_path)
    with pytest.raises(ValueError, match="no text given"):
        open_data([], tokens=8, cache=tmp_path)


def test_text_shorter_than_a_window(opened):
    with pytest.raises(ValueError, match=r"training tokens, but a window of 100,000 needs 100,001.*or fewer"):
        opened(tokens=100_000)


def test_advice_on_short_text_works(tmp_path):
    (tmp_path / "short").write_text("x" * 100)
    with pytest.raises(ValueError, match=r"windows of 49 tokens or fewer"):
        open_data(tmp_path / "short", tokens=80, cache=tmp_path)
    assert open_data(tmp_path / "short", tokens=49, cache=tmp_path).train.windows == 1


def test_no_tokenizer_file(opened, tmp_path):
    pytest.importorskip("tokenizers")
    with pytest.raises(FileNotFoundError):
        opened(tokenizer=tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad.json: not a tokenizers JSON file"):
        opened(tokenizer=tmp_path / "bad.json")


# Cache


def test_cache_is_used_and_follows_the_text(opened, text, monkeypatch):
    first = opened()
    with monkeypatch.context() as patch:
        patch.setattr(data_module, "_write", lambda *_: pytest.fail("tokenized again"))
        assert opened().digest == first.digest
    text.write_text(TEXT + "more")
    assert opened().digest != first.digest


def test_cache_writes_are_atomic(opened, tmp_path, monkeypatch):
    class Full(Bytes):
        def pieces(self, stream):
            yield np.zeros(10, np.uint8), None
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(data_module, "open_codec", lambda _: Full())
        with pytest.raises(OSError, match=r"cannot keep tokens \(the disk is full\)") as error:
            opened()
    assert error.value.errno == errno.ENOSPC
    assert not list((tmp_path / "cache").iterdir())
    assert len(opened().train.ids) > 64


def test_cache_folder_that_cannot_be_written(opened, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="cannot keep tokens"):
        opened(cache=tmp_path / "file")


def test_default_cache_is_the_users(text, tmp_path, monkeypatch):
    monkeypatch.setenv("FARFIELD_CACHE", str(tmp_path / "mine"))
    open_data(text, tokens=64)
    (folder,) = (tmp_path / "mine").iterdir()
    assert json.loads((folder / "meta.json").read_text())["dtype"] == "uint8"


# Codecs


def test_tokenizer_round_trip_and_bytes(opened, tokenizer):
    codec = Tokenizer(tokenizer)
    assert codec.decode(codec.encode(TEXT)) == TEXT
    got = opened(tokenizer=tokenizer, held_out=0.3)
    assert got.codec.vocab == codec.vocab <= 300
    assert got.train.ids.dtype == np.uint16
    for split in (got.train, got.valid):
        assert split.sizes is not None
        assert len(split.sizes) == len(split.ids)
    sizes = np.concatenate([got.train.sizes, got.valid.sizes])
    assert sizes.sum() == len(TEXT.encode())


def test_bytes_dropped_by_a_normaliser_are_counted(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "words.json"))
    text = tmp_path / "text"
    text.write_text("a   b é\n" * 40 + "  ")
    got = open_data(text, tokens=4, tokenizer=tmp_path / "words.json", cache=tmp_path / "cache")
    total = int(got.train.sizes.sum() + got.valid.sizes.sum())
    assert total == text.stat().st_size


@pytest.mark.parametrize("kind", ["bytes", "tokenizer"])
def test_streams_never_cut_a_character(kind, tokenizer):
    codec = open_codec(None if kind == "bytes" else tokenizer)
    ids = [int(i) for i in codec.encode(TEXT)]
    pieces = list(stream_text(codec, iter(ids)))
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)


def test_unfinished_and_invalid_bytes_become_replacement_characters():
    pieces = list(stream_text(Bytes(), iter([0x61, 0xFF, 0x62, 0xE2, 0x82])))
    assert "".join(pieces) == "a\ufffdb\ufffd"

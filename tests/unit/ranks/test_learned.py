"""Calibrated packs that ranks share."""

from __future__ import annotations

import json
import multiprocessing
import random
import re
import time
from dataclasses import replace

import pytest
import torch
import transformers

import rac
from rac import cli
from rac.calibrate import leading, moments, outer, passes
from rac.calibrate.chain import UnfitError
from rac.encode.align import recipe
from rac.errors import OutputError, SourceError
from rac.linalg.triangular import triangular
from rac.ranks import Asked, How, finish, open_store, pack_rank
from support.models import TEXT, bert, tokenizer, write

QUICK = How(jobs=1, lease=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write("llama", path / "m")
    (path / "text.txt").write_text(TEXT * 3)
    return path


@pytest.fixture(scope="module", autouse=True)
def batches():
    """Of two sequences: four of the text."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(passes, "_ROWS", 128)
        yield


@pytest.fixture(scope="module")
def asked(folder):
    return Asked(bits=3.0, calibrate=[str(folder / "text.txt")], tokens=512, context=64, effort="fast")


@pytest.fixture(scope="module")
def alone(folder, asked):
    rac.pack(folder / "m", folder / "alone.rac", **asked.changed)
    return (folder / "alone.rac").read_bytes()


def start(folder, work, asked, rank, world):
    """A rank as a process: transformers loads one model at a time in each."""
    how = {"rank": rank, "world": world, "how": QUICK}
    process = multiprocessing.get_context("fork").Process(
        target=pack_rank, args=(folder / "m", work, asked), kwargs=how
    )
    process.start()
    return process


@pytest.mark.parametrize("url", ["", "memory://"])
def test_a_calibrated_pack_has_the_bytes_of_one_machine(folder, asked, alone, tmp_path, url):
    work = f"{url}{tmp_path}/work"
    pack_rank(folder / "m", work, asked, rank=1, world=2, how=QUICK)
    finish(work, tmp_path / "m.rac", how=QUICK)
    assert (tmp_path / "m.rac").read_bytes() == alone


@pytest.mark.slow  # up to seven processes that import torch: pytest -m slow tests/unit/ranks
@pytest.mark.parametrize("world", [1, 4, 7])
def test_any_number_of_ranks_calibrates_to_the_same_bytes(folder, asked, alone, tmp_path, world):
    work = tmp_path / "work"
    running = [start(folder, work, asked, rank, world) for rank in reversed(range(world))]
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0] * world
    finish(work, tmp_path / "m.rac", how=QUICK)
    assert (tmp_path / "m.rac").read_bytes() == alone


@pytest.fixture(scope="module")
def near(asked):
    """The same to a divergence."""
    return Asked(**asked.changed | {"bits": None, "kl": 0.01})


@pytest.fixture(scope="module")
def alone_near(folder, near):
    rac.pack(folder / "m", folder / "near.rac", **near.changed)
    return (folder / "near.rac").read_bytes()


def test_a_divergence_is_measured_by_all(folder, near, alone_near, tmp_path):
    work = tmp_path / "work"
    for process in [start(folder, work, near, rank, 3) for rank in range(3)]:
        process.join()
        assert process.exitcode == 0
    markers = [json.loads(p.read_text()) for p in work.glob("kl*/*.json")]
    assert len({m["key"] for m in markers}) > 1  # several scales
    assert len({m["item"] for m in markers}) > 3  # of several windows each
    finish(work, tmp_path / "m.rac", how=QUICK)
    assert (tmp_path / "m.rac").read_bytes() == alone_near


def test_who_finishes_a_divergence_needs_no_model(folder, near, alone_near, tmp_path, monkeypatch):
    work = tmp_path / "work"
    pack_rank(folder / "m", work, near, how=QUICK)
    tries = sorted(work.glob("scale*"), key=lambda p: p.stat().st_mtime)
    (tries[-1] / "00001.rac").unlink()  # it is made again, and nothing else
    monkeypatch.setattr("rac.ranks.diverging.Diverging._window", None)
    finish(work, tmp_path / "m.rac", how=QUICK)
    assert (tmp_path / "m.rac").read_bytes() == alone_near


def test_each_factor_is_found_by_one_rank(folder, asked, alone, tmp_path, monkeypatch):
    monkeypatch.setattr("rac.ranks.units.WIDE", 1)
    monkeypatch.setattr("rac.linalg.factors.SMALLEST", 1)
    work, found = tmp_path / "work", multiprocessing.get_context("fork").Value("i", 0)

    def counted(*given):
        with found:
            found.value += 1
        return triangular(*given)

    monkeypatch.setattr("rac.encode.align.recipe.triangular", counted)
    pack_rank(folder / "m", work, asked, how=QUICK)
    rows = [row for p in work.glob("units/*.json") for row in json.loads(p.read_text())["rows"]]
    quantised = [row for row in rows if not row[1]]
    assert 0 < found.value < len(quantised)  # query, key and value share one: it is found once, and not for each pass
    before = found.value
    finish(work, tmp_path / "m.rac", how=QUICK)
    assert found.value == before  # neither weights nor second moments are looked at again
    assert (tmp_path / "m.rac").read_bytes() == alone


def test_experts_that_are_many_have_the_bytes_of_one_machine(folder, asked, tmp_path, monkeypatch):
    """Their leading directions go from batch to batch through files, and are added in the order of one machine."""
    monkeypatch.setattr(moments, "OWN", 0)
    monkeypatch.setattr(leading, "RANK", 8)
    torch.manual_seed(0)
    small = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 128}
    many = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 256, "num_local_experts": 3}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**small, **many))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "m")
    tokenizer().save_pretrained(tmp_path / "m")
    rac.pack(tmp_path / "m", tmp_path / "alone.rac", **asked.changed)
    pack_rank(tmp_path / "m", tmp_path / "work", asked, rank=1, world=2, how=QUICK)
    finish(tmp_path / "work", tmp_path / "m.rac", how=QUICK)
    assert (tmp_path / "m.rac").read_bytes() == (tmp_path / "alone.rac").read_bytes()
    lossless = rac.pack(tmp_path / "m", tmp_path / "lossless.rac").stored
    assert (tmp_path / "m.rac").stat().st_size < 0.8 * lossless  # experts are quantised


def test_errors_fed_back_along_rows_have_the_bytes_of_one_machine(folder, asked, tmp_path, monkeypatch):
    monkeypatch.setattr(outer, "FEWEST", 0.0)  # so short a text says little
    monkeypatch.setattr(recipe, "PAYS", -1.0)
    asked = replace(asked, effort="max")
    rac.pack(folder / "m", tmp_path / "alone.rac", **asked.changed)
    pack_rank(folder / "m", tmp_path / "work", asked, rank=0, world=1, how=QUICK)
    finish(tmp_path / "work", tmp_path / "m.rac", how=QUICK)
    assert (tmp_path / "m.rac").read_bytes() == (tmp_path / "alone.rac").read_bytes()
    with rac.open(tmp_path / "m.rac") as f:
        assert f.archives[0].header["provenance"]["rows"] > 1


def test_a_sentence_encoder_has_the_bytes_of_one_machine(tmp_path):
    """Each of its lengths is a calibration that ranks share; what a sequence is projected on is its own."""
    model = tmp_path / "m"
    transformers.BertModel(bert().config).save_pretrained(model)
    tokenizer().save_pretrained(model)
    (model / "modules.json").write_text(json.dumps([{"path": "1_Pooling", "type": "x.Pooling"}]))
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "mean"}))
    asked = Asked(bits=3.0, tokens=384, effort="fast")
    rac.pack(model, tmp_path / "alone.rac", **asked.changed)
    running = [start(tmp_path, tmp_path / "work", asked, rank, 2) for rank in range(2)]
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0, 0]
    finish(tmp_path / "work", tmp_path / "m.rac", how=QUICK)
    assert (tmp_path / "m.rac").read_bytes() == (tmp_path / "alone.rac").read_bytes()
    with rac.open(tmp_path / "m.rac") as f:
        assert f.archives[0].header["provenance"]["calibrate"][0]["lengths"] == [16, 64, 256]


def test_ranks_that_are_killed_while_they_calibrate(folder, asked, alone, tmp_path):
    work, chance = tmp_path / "work", random.Random(1)
    running = [start(folder, work, asked, rank, 3) for rank in range(3)]
    for _ in range(3):
        time.sleep(0.3 + chance.random() / 2)
        rank = chance.randrange(3)
        running[rank].kill()
        running[rank].join()
        running[rank] = start(folder, work, asked, rank, 3)
    running[1].kill()
    for process in running:
        process.join()
    assert sorted(p.exitcode for p in running)[1:] == [0, 0]
    by = {json.loads(p.read_text())["owner"][:5] for p in work.glob("calibration0-*/*.json")}
    assert len(by) > 1  # several have done some of it
    finish(work, tmp_path / "m.rac", how=QUICK)
    assert (tmp_path / "m.rac").read_bytes() == alone


OTHERS = {
    "threads of torch (OMP_NUM_THREADS)": 64,
    "kernels of torch (instruction set)": "SVE256",
    "sums of torch (BLAS, processor)": "0123456789ab",
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_rank_that_would_find_other_numbers_is_refused(folder, asked, tmp_path, monkeypatch, name):
    work = tmp_path / "work"
    with monkeypatch.context() as m:
        m.setattr("rac.ranks.sharded._SharedPasses._go", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pack_rank(folder / "m", work, asked, how=QUICK)
    machine = work / "calibration0-machine.json"
    machine.write_text(json.dumps(json.loads(machine.read_text()) | {name: OTHERS[name]}))
    with pytest.raises(rac.OutputError, match=re.escape(f"calibrates with other {name}: {OTHERS[name]} there, ")):
        pack_rank(folder / "m", work, asked, how=QUICK)


def test_what_a_batch_has_left_is_made_again_where_it_is_damaged(folder, asked, alone, tmp_path, monkeypatch):
    work = tmp_path / "work"
    with monkeypatch.context() as m:
        m.setattr("rac.ranks.sharded._SharedPasses._backward", lambda self, i: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pack_rank(folder / "m", work, asked, how=QUICK)
    pieces = sorted(work.glob("calibration0-hidden-*/*.npy"))
    assert len(pieces) > 2
    pieces[0].unlink()
    for piece in pieces[1:]:
        piece.write_bytes(piece.read_bytes()[:-8])
    finish(work, tmp_path / "m.rac", how=QUICK)
    assert (tmp_path / "m.rac").read_bytes() == alone


def test_a_text_may_lie_elsewhere_but_is_the_same(folder, asked, tmp_path, capsys):
    other = tmp_path / "text.txt"
    other.write_text(TEXT * 3)
    given = ["--tokens", "512", "--context", "64", "--effort", "fast", "--work", str(tmp_path / "work")]
    pack_rank(folder / "m", tmp_path / "work", asked, how=QUICK)
    capsys.readouterr()
    assert cli.main(["pack", str(folder / "m"), "--bits", "3", "--calibrate", str(other), *given]) == 0
    other.write_text(TEXT * 2)
    assert cli.main(["pack", str(folder / "m"), "--bits", "3", "--calibrate", str(other), *given]) == 2
    assert "is the work folder of another job: texts" in capsys.readouterr().err


def test_what_is_wrong_with_a_calibration_is_said_by_each(folder, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("few")
    for rank in range(2):
        with pytest.raises(SourceError, match="tokens, at least"):
            pack_rank(
                folder / "m", tmp_path / "work", Asked(bits=3.0, calibrate=str(short)), rank=rank, world=2, how=QUICK
            )


def test_a_calibration_that_was_damaged_is_run_again(folder, asked, alone, tmp_path, monkeypatch):
    def unfit(*_):
        raise UnfitError("for one rank alone")

    monkeypatch.setattr("rac.ranks.sharded.Shared.run", unfit)
    work = tmp_path / "work"
    pack_rank(folder / "m", work, asked, how=QUICK)
    assert list(work.glob("calibration*/*.calibration"))
    for made in work.glob("calibration*/*.calibration"):
        data = bytearray(made.read_bytes())
        data[-100:] = bytes(100)
        made.write_bytes(data)
    finish(work, tmp_path / "m.rac", how=QUICK)
    assert (tmp_path / "m.rac").read_bytes() == alone


@pytest.mark.parametrize("url", ["", "memory://"])
def test_sums_that_were_damaged_are_added_up_again(folder, asked, alone, tmp_path, url):
    work = f"{url}{tmp_path}/work"
    pack_rank(folder / "m", work, asked, how=QUICK)
    store = open_store(work)
    sums = sorted(name for name in store.names("") if name.endswith("-sum"))
    files = [f"{name}/{file}" for name in sums for file in store.names(name) if file.startswith("second")]
    assert len(files) > 3
    for wrong, name in zip((b"", None, b"\0" * 999), files, strict=False):
        data = store.get(name)
        store.put(name, data[:-9] + b"poisoned!" if wrong is None else wrong)
    for number in range(len(store.names("units"))):  # so that they are asked for again
        store.put(f"units/{number:05}.json", b"")
    finish(work, tmp_path / "m.rac", how=QUICK)
    assert (tmp_path / "m.rac").read_bytes() == alone


def test_a_rank_that_cannot_read_the_model_does_not_go_on_without_a_text(folder, asked, tmp_path, monkeypatch):
    """Its own error is no reason to pack from the weights alone what others calibrate."""
    work, found = tmp_path / "work", passes.find
    auto = Asked(**asked.changed | {"calibrate": None})
    monkeypatch.setattr("rac.ranks.sharded._SharedPasses._go", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pack_rank(folder / "m", work, auto, how=QUICK)
    assert (work / "calibration0-machine.json").exists()

    def broken(*_):
        raise SourceError("cannot be read: Input/output error", file="m/model.safetensors")

    monkeypatch.setattr(passes, "find", broken)
    with pytest.raises(OutputError, match="Input/output error"):
        pack_rank(folder / "m", work, auto, rank=1, world=2, how=QUICK)
    assert not list(work.glob("scale*"))
    monkeypatch.setattr(passes, "find", found)


def test_another_version_of_torch_is_refused(folder, asked, tmp_path, monkeypatch):
    pack_rank(folder / "m", tmp_path, asked, how=QUICK)
    monkeypatch.setattr("rac.ranks.job.version", lambda package: "0.1" if package == "torch" else torch.__version__)
    with pytest.raises(rac.OutputError, match="there, 0.1 here|numpy"):
        pack_rank(folder / "m", tmp_path, asked, how=QUICK)

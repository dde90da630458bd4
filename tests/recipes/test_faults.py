"""Restarts and faults: damaged checkpoints and full disks. Nothing is lost, and the run says what it does."""

import copy
import errno
import math
import os
import resource
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from barrierlm import BarrierObjective, Constraint
from barrierlm.cli import main
from barrierlm.distributed import LostRankError, lost_ranks
from barrierlm.files import UNFINISHED, StorageError, make_folder, replacing
from barrierlm.recipes.best import BestWeights
from barrierlm.recipes.checkpoint import Checkpoints
from barrierlm.recipes.config import ConfigError, load_options
from barrierlm.recipes.finetune import finetune
from barrierlm.recipes.progress import MetricsFile

from .crash import equal
from .test_finetune import metrics, without_times


class Small:
    """A model of one weight with everything a checkpoint holds."""

    def __init__(self, folder: Path, *, upper: float = 1.0, best: bool = False, **run: Any) -> None:
        self.weight = torch.nn.Parameter(torch.zeros(300))
        self.optimizer = torch.optim.AdamW([self.weight], lr=0.1)
        self.objective = BarrierObjective(None, [Constraint("c", upper=upper)])
        self.said: list[str] = []
        accelerator = types.SimpleNamespace(is_main_process=True, process_index=0)
        self.best = BestWeights([self.weight]) if best else None
        self.checkpoints = Checkpoints(
            folder, accelerator, [self.weight], self.optimizer, self.objective, self.best, run=run, say=self.said.append
        )

    def step(self) -> None:
        x = torch.rand(())
        out = self.objective.combine((self.weight - x).square().mean(), {"c": self.weight.mean() + x})
        out.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.objective.step()

    def state(self) -> dict[str, Any]:
        objective, optimizer = self.objective.state_dict(), copy.deepcopy(self.optimizer.state_dict())
        return {"w": self.weight.detach().clone(), "objective": objective, "optimizer": optimizer}


@pytest.fixture
def three(tmp_path: Path) -> tuple[Path, dict[int, dict[str, Any]]]:
    """A folder after checkpoints of the steps 1, 2 and 3, and what they hold."""
    small, states = Small(tmp_path / "c"), {}
    for step in (1, 2, 3):
        small.step()
        states[step] = small.state()
        small.checkpoints.save(step)
    return tmp_path / "c", states


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def watch(patch: pytest.MonkeyPatch, seen: Callable[[str, Any], None]) -> None:
    """Call ``seen`` before every file operation of a checkpoint."""

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen(name, args)
            return real(*args, **kwargs)

        return call

    for owner, name in ((os, "replace"), (os, "fsync"), (Path, "unlink"), (torch, "save"), (Path, "mkdir")):
        patch.setattr(owner, name, watched(name, getattr(owner, name)))


def test_whatever_a_kill_leaves_loads(three, tmp_path: Path):
    """The folder as it was before each file operation of `save`, and with half a file: the newest whole one loads."""
    folder, states = three
    small, left, copies = Small(folder), [], iter(range(100))
    assert small.checkpoints.load() == 3
    small.step()
    states[4] = small.state()

    def snapshot(name: str, args: Any) -> None:
        if not left or left[-1] is not None:
            left.append(None)  # copying is no operation of the run
            copy = tmp_path / f"copy{next(copies)}"
            shutil.copytree(folder, copy)
            left[-1] = copy

    with pytest.MonkeyPatch.context() as patch:
        watch(patch, snapshot)
        small.checkpoints.save(4)
    assert len(left) >= 6
    half = tmp_path / "half"
    shutil.copytree(folder, half)
    whole = (half / "step-000004.pt").rename(half / f"{UNFINISHED}step-000004.pt")
    whole.write_bytes(whole.read_bytes()[:1000])
    found = []
    for place in [*left, half]:
        again = Small(place)
        found.append(again.checkpoints.load())
        assert again.said == []
        assert len([name for name in names(place) if name.startswith("step-")]) <= 2
        assert equal(again.state(), states[found[-1]])
        again.checkpoints.save(5)
        assert not [name for name in names(place) if name.startswith(UNFINISHED)]
    assert set(found[:-1]) == {3, 4}
    assert found[-1] == 3
    assert found[:-1] == sorted(found[:-1])


def test_the_data_is_on_the_disk_before_its_name_is(three):
    """What a loss of power would reorder: data, then the rename, then the folder, then the older ones go."""
    small, order = Small(three[0]), []
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, lambda name, args: order.append(name))
        small.checkpoints.save(4)
    order = [name for name in order if name != "mkdir"]
    assert order == ["save", "fsync", "replace", "fsync", "unlink", "fsync"]


def test_two_are_kept_in_the_order_of_their_numbers(three):
    folder, _ = three
    assert names(folder) == ["step-000002.pt", "step-000003.pt"]
    small = Small(folder)
    for step in (999_999, 1_000_000):
        small.checkpoints.save(step)
    assert names(folder) == ["step-1000000.pt", "step-999999.pt"]
    assert Small(folder).checkpoints.load() == 1_000_000


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "flipped":
        for place in range(len(data) // 2, len(data) // 2 + 128):  # more than the padding between records
            data[place] ^= 1
    elif how == "pickle":
        data = bytearray(b"cos\nsystem\n(S'touch hacked'\ntR.")
    elif how == "foreign":
        torch.save({"model": torch.zeros(2)}, path)
        return
    path.write_bytes({"truncated": data[: len(data) // 2], "empty": b""}.get(how, data))


DAMAGES = ["flipped", "truncated", "empty", "pickle", "foreign"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_falls_back_with_a_warning(three, how: str):
    folder, states = three
    damage(folder / "step-000003.pt", how)
    small = Small(folder)
    assert small.checkpoints.load() == 2
    assert equal(small.state(), states[2])
    (warning,) = small.said
    assert warning.startswith("Warning: damaged checkpoint set aside as *.damaged, going back to step 2.")
    assert "step-000003.pt: " in warning
    assert names(folder) == ["step-000002.pt", "step-000003.damaged"]
    small.checkpoints.save(3)
    assert Small(folder).checkpoints.load() == 3


@pytest.mark.parametrize("how", DAMAGES)
def test_nothing_to_go_back_to_is_one_clear_error(three, how: str):
    folder, _ = three
    for path in folder.iterdir():
        damage(path, how)
    small = Small(folder)
    before = small.state()
    with pytest.raises(ConfigError, match=r"no checkpoint can be read; allowed: a copy .*step-000003.pt: .*000002.pt"):
        small.checkpoints.load()
    assert equal(small.state(), before)
    assert names(folder) == ["step-000002.pt", "step-000003.pt"]
    assert not Path("hacked").exists()


@settings(max_examples=40)
@given(data=st.data())
def test_any_flipped_bit_or_cut_is_found_or_harmless(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    small = Small(folder)
    small.step()
    state = small.state()
    small.checkpoints.save(1)
    path = folder / "step-000001.pt"
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:place]
    else:
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    again = Small(folder)
    try:
        again.checkpoints.load()
    except ConfigError as error:
        assert "step-000001.pt" in str(error)  # noqa: PT017
    else:
        assert equal(again.state(), state)


def test_a_bit_that_makes_a_record_compressed(three):
    """The zip directory has no checksum of its own: zlib then fails in a way that is none of zipfile's errors."""
    folder, states = three
    path = folder / "step-000003.pt"
    content = bytearray(path.read_bytes())
    content[content.find(b"PK\x01\x02") + 10] ^= 8  # method: stored -> deflated
    path.write_bytes(content)
    small = Small(folder)
    assert small.checkpoints.load() == 2
    assert equal(small.state(), states[2])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run", None),
        ("weights", [None]),
        ("optimizer", None),
        ("random", []),
        ("random", [{}]),
        ("step", torch.ones(2)),
    ],
)
def test_an_edited_checkpoint_is_one_clear_error(three, key: str, value: Any):
    folder, _ = three
    path = folder / "step-000003.pt"
    torch.save(torch.load(path, weights_only=True) | {key: value}, path)
    with pytest.raises(ConfigError, match=r"step-000003.pt does not fit this run: \w+Error"):
        Small(folder).checkpoints.load()


ODD = [
    None,
    "x",
    3,
    -1,
    2.5,
    math.nan,
    [],
    {},
    [1.0],
    {"a": 1},
    torch.zeros(0),
    torch.zeros(7),
    torch.full((300,), math.nan),
]


def places(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to everything inside nested dicts, lists and tuples."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, item in inside:
        yield (*before, key)
        if not (isinstance(item, tuple) and len(item) > 50):  # Python's random state
            yield from places(item, (*before, key))


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """``value`` with ``new`` at the path."""
    if not path:
        return new
    items = dict(value) if isinstance(value, dict) else list(value)
    items[path[0]] = put(items[path[0]], path[1:], new)
    return tuple(items) if isinstance(value, tuple) else items


@settings(max_examples=150)
@given(data=st.data())
def test_whatever_is_replaced_in_a_whole_checkpoint_is_refused_or_harmless(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("c")
    small = Small(folder, best=True)
    small.step()
    assert small.best is not None
    small.best.update(small.objective.report(), 1.0)
    small.checkpoints.save(1)
    path = folder / "step-000001.pt"
    state = torch.load(path, weights_only=True)
    where = data.draw(st.sampled_from([place for place in places(state) if place[0] not in ("random", "weights")]))
    torch.save(put(state, where, data.draw(st.sampled_from(ODD))), path)
    again = Small(folder, best=True)
    try:
        again.checkpoints.load()
    except ConfigError:
        return
    again.step()
    assert again.best is not None
    again.best.update(again.objective.report(), 1.0)
    if again.best.copy is not None:
        with again.best.in_place():
            pass
    assert again.weight.isfinite().all()
    again.checkpoints.save(2)


def test_a_lost_rank_is_named_and_other_errors_are_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 3)
    with pytest.raises(LostRankError, match=r"rank 3 has lost another one.*Connection closed by peer"), lost_ranks():
        raise RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234\nand more")
    with pytest.raises(RuntimeError, match=r"^shapes") as other, lost_ranks():
        raise RuntimeError("shapes do not fit")
    assert type(other.value) is RuntimeError


def test_a_file_that_cannot_be_read_now_is_not_called_damaged(three, monkeypatch: pytest.MonkeyPatch):
    folder, _ = three
    before = names(folder)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *args, **kwargs: (_ for _ in ()).throw(MemoryError("no room")))
        with pytest.raises(ConfigError, match=r"cannot be read now \(MemoryError"):
            Small(folder).checkpoints.load()
    assert names(folder) == before
    assert Small(folder).checkpoints.load() == 3


def test_a_checkpoint_of_another_run_is_refused(three):
    folder, _ = three
    for other, message in (
        (Small(folder, rule="DualAscent"), r"was made with rule=None, this run has 'DualAscent'; allowed: the same"),
        (Small(folder, upper=2.0), "does not fit this run: state was saved for constraints"),
    ):
        with pytest.raises(ConfigError, match=message):
            other.checkpoints.load()
        assert other.said == []


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ("seed=3", "seed=0, this run has 3"),
        ("optim.learning_rate=0.1", "optim.learning_rate=0.0005, this run has 0.1"),
        ("objective.rule_options.patience=7", r"objective.rule_options={}, this run has {'patience': 7}"),
        ("constraints.length.upper=5", "constraints.length.upper=6.0, this run has 5.0"),
        ("constraints.kl.upper=5", "constraints.kl.cost=None, this run has 'kl'"),
        ("data", "training data="),
        ("optim.steps=5", None),
        ("evaluation.prompts=4", None),
        ("checkpoint_every=1", None),
    ],
)
def test_options_that_may_differ_on_resume(finished: tuple[list[str], Path], tmp_path: Path, change: str, refused: str):
    overrides, folder = finished
    shutil.copytree(folder, tmp_path / "run")
    overrides = [*overrides, f"output_dir={tmp_path / 'run'}", "resume=true"]
    if change == "data":
        source = Path(next(o for o in overrides if o.startswith("data.source=")).removeprefix("data.source="))
        (tmp_path / "pairs.jsonl").write_text(source.read_text().replace("w1 ", "w2 "))
        change = f"data.source={tmp_path / 'pairs.jsonl'}"
    if refused is None:
        finetune(load_options(None, [*overrides, change]))
    else:
        with pytest.raises(ConfigError, match=refused):
            finetune(load_options(None, [*overrides, change]))


@pytest.fixture(scope="module")
def finished(model_folder: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Options of a run with checkpoints, and its folder."""
    from .tiny import tiny_overrides

    folder = tmp_path_factory.mktemp("finished") / "run"
    overrides = [*tiny_overrides(model_folder, data_file, folder), "checkpoint_every=2", "save_model=false"]
    finetune(load_options(None, overrides))
    return overrides, folder


def test_a_damaged_newest_checkpoint_costs_steps_and_nothing_else(
    finished: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    overrides, folder = finished
    shutil.copytree(folder, tmp_path / "run")
    damage(tmp_path / "run" / "checkpoints" / "step-000004.pt", "flipped")
    finetune(load_options(None, [*overrides, f"output_dir={tmp_path / 'run'}", "resume=true"]))
    assert "going back to step 2." in capsys.readouterr().out
    assert without_times(metrics(tmp_path / "run")) == without_times(metrics(folder))


# ---- metrics.jsonl -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "kept"),
    [
        (b'{"step": 1}\n{"step": 2}\n{"step": 3}\n', 2),
        (b'{"step": 1}\n{"step": 2}\n{"st', 2),
        (b'{"step": 1}\n{"step": 2}', 2),
        (b'{"step": 1}\n{"st', 1),
        (b'{"step": 1}\n{"step": 3}\n', 1),
        (b'{"step": 1}\n\xff\xfe\n', 1),
        (b"", 0),
    ],
)
def test_metrics_after_a_resume_hold_each_step_once(tmp_path: Path, left: bytes, kept: int):
    (tmp_path / "metrics.jsonl").write_bytes(left)
    with MetricsFile(tmp_path, keep=2) as file:
        assert file.kept == kept
        file.write(3, {"x": 1.0})
    assert [row["step"] for row in metrics(tmp_path)] == [*range(1, kept + 1), 3]


# ---- a full disk ---------------------------------------------------------------------------------------


@contextmanager
def full_after(size: int) -> Iterator[None]:
    """The system refuses to let a file grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_older_checkpoint_whole(three):
    folder, states = three
    small = Small(folder)
    small.checkpoints.load()
    for size in (0, 1000, 4000):
        with (
            full_after(size),
            pytest.raises(
                StorageError, match=r"cannot write .*step-000004.pt: File too large; step-000003.pt is whole"
            ),
        ):
            small.checkpoints.save(4)
        assert names(folder) == ["step-000002.pt", "step-000003.pt"]
    again = Small(folder)
    assert again.checkpoints.load() == 3
    assert equal(again.state(), states[3])
    small.checkpoints.save(4)
    assert Small(folder).checkpoints.load() == 4


def test_a_full_disk_at_any_file_operation_of_a_checkpoint(three, tmp_path: Path):
    folder, states = three
    for at in range(100):
        copy = tmp_path / f"full{at}"
        shutil.copytree(folder, copy)
        small, left = Small(copy), iter(range(at))

        def full(name: str, args: Any, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")

        with pytest.MonkeyPatch.context() as patch:
            watch(patch, full)
            try:
                small.checkpoints.save(4)
                break
            except StorageError as error:
                assert "No space left on device" in str(error)  # noqa: PT017
        again = Small(copy)
        step = again.checkpoints.load()
        assert step in (3, 4)
        if step == 3:
            assert equal(again.state(), states[3])
    assert at >= 6


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "x"
    path.write_text("old")
    with full_after(3), pytest.raises(StorageError, match=r"cannot write .*x: File too large"), replacing(path) as file:
        file.write(b"longer than three")
    assert path.read_text() == "old"
    with pytest.raises(KeyError), replacing(path) as file:  # noqa: PT012
        file.write(b"new")
        raise KeyError
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x"]
    (tmp_path / f"{UNFINISHED}y").write_text("left by a kill")
    make_folder(tmp_path)
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("where", ["metrics.jsonl", "checkpoint"])
def test_the_run_says_that_the_disk_is_full_and_goes_on_after(
    finished: tuple[list[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: str,
):
    overrides, _folder = finished
    command = ["finetune", str(tmp_path / "empty.yaml"), *overrides, f"output_dir={tmp_path / 'run'}"]
    (tmp_path / "empty.yaml").write_text("")

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    saves = iter(range(10))
    real_save, real_write = torch.save, MetricsFile.write

    def save(*args: Any, **kwargs: Any) -> None:
        return full() if next(saves) == 1 else real_save(*args, **kwargs)

    def write(self: MetricsFile, step: int, row: dict[str, float]) -> None:
        if step == 3:
            real, self._file = self._file, open("/dev/full", "a")  # noqa: SIM115
            real.close()
        real_write(self, step, row)

    with monkeypatch.context() as patch:
        if where == "checkpoint":
            patch.setattr(torch, "save", save)
        else:
            patch.setattr(MetricsFile, "write", write)
        assert main(command) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("barrierlm: cannot write ")
    assert "No space left on device" in error
    assert main([*command, "resume=true"]) == 0
    rows = without_times(metrics(tmp_path / "run"))
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [name for name in names(tmp_path / "run") if name.startswith(UNFINISHED)] == []


# ---- kill -9 -------------------------------------------------------------------------------------------


def test_kill_and_resume():
    """`make crash` does 30, and one before every file operation."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
    command = [sys.executable, "-m", "tests.recipes.crash", "--kills", "3", "--seed", "1"]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed bit-equal: 3, lost: 0, corrupt: 0" in done.stdout

"""Training on a mesh, against training on one device."""

import re
import shutil
import signal

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from examples import language, optimizers, placement, recorder, train_gpt, training
from examples.text_data import load_corpus
from weyl_optax import state_shardings

SMALL = (
    "--runs adamw2 --steps 12 --warmup 3 --batch 16 --accumulate 2 --sequence-length 16 "
    "--dropout 0.1 --log-every 3 --validate-every 6 --validation-batches 1"
).split()


def run(out, *flags):
    flags = train_gpt.parse([*SMALL, "--out", str(out), *flags])
    train_gpt.main(flags, language.prepare(flags))


def lines(out):
    read = recorder.read_metrics(out, "adamw2")
    return [{k: v for k, v in line.items() if k != "steps_per_second"} for line in read]


def assert_close(found, expected):
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for a, b in zip(found, expected, strict=True):
        for key in ("loss", "val_loss", "qk_sigma"):
            np.testing.assert_allclose(a.get(key, 0), b.get(key, 0), rtol=1e-4)


def use_devices(monkeypatch, number):
    devices = jax.devices()[:number]
    monkeypatch.setattr(jax, "devices", lambda: devices)


@pytest.fixture(scope="module")
def on_eight(tmp_path_factory):
    """A whole run, and the folder of one that was stopped at step 6."""
    folder = tmp_path_factory.mktemp("run")
    run(folder / "whole", "--mesh", "data=2,fsdp=4")
    write = recorder.Recorder.write

    def stop(recorder, step, metrics):
        write(recorder, step, metrics)
        if step == 6:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder.Recorder, "write", stop)
        with pytest.raises(training.Stopped, match="saved at step 6"):
            run(folder / "stopped", "--mesh", "data=2,fsdp=4")
    return folder


@pytest.mark.slow
def test_a_mesh_gives_the_numbers_of_one_device(on_eight, tmp_path, monkeypatch, capsys):
    use_devices(monkeypatch, 1)
    run(tmp_path / "one")
    assert_close(lines(on_eight / "whole"), lines(tmp_path / "one"))


@pytest.mark.slow
def test_resumes_on_the_same_mesh_to_the_bit(on_eight, tmp_path, capsys):
    shutil.copytree(on_eight / "stopped", tmp_path / "out")
    run(tmp_path / "out", "--mesh", "data=2,fsdp=4", "--resume")
    assert lines(tmp_path / "out") == lines(on_eight / "whole")
    assert "adamw2 goes on after step 6 on the same devices, to the bit." in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_on_eight_devices_resumes_on_four(on_eight, tmp_path, monkeypatch, capsys):
    use_devices(monkeypatch, 4)
    shutil.copytree(on_eight / "stopped", tmp_path / "out")
    run(tmp_path / "out", "--mesh", "fsdp=4", "--resume")
    assert_close(lines(tmp_path / "out"), lines(on_eight / "whole"))
    assert "after step 6 on other devices, up to rounding." in capsys.readouterr().out


@pytest.fixture(scope="module")
def task():
    config = language.Config(batch=16, accumulate=2, sequence_length=16, mesh="data=2,fsdp=4")
    return language.make_task(config, load_corpus(None))


def test_the_largest_axis_that_is_no_layer_is_divided(task):
    specs = {
        "/".join(map(str, path)): variable[...].sharding.spec
        for path, variable in nnx.to_flat_state(nnx.state(task.model, nnx.Param))
    }
    assert specs["token_embedding/embedding"] == P("fsdp")  # (256, 128)
    assert specs["blocks/attention/query/kernel"] == P(None, "fsdp")  # (4, 128, 4, 32)
    assert specs["blocks/attention/out/kernel"] == P(None, None, None, "fsdp")  # (4, 4, 32, 128)
    assert specs["blocks/mlp/up/kernel"] == P(None, None, "fsdp")  # (4, 128, 512)
    assert specs["blocks/mlp/up/bias"] == P()  # (4, 512)
    mesh = placement.make_mesh("fsdp=8", 8)
    assert placement.leaf_sharding((), (100, 1001), mesh).spec == P()
    assert placement.leaf_sharding((), (104, 1001), mesh).spec == P("fsdp")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "adamw2", "muon_bound", "schedule_free", "lamb"])
def test_no_moment_is_ever_whole_on_a_device(task, name):
    config = optimizers.Settings()
    optimizer, _ = optimizers.make(name, config, 10, task.numbers)
    params = nnx.as_pure(nnx.state(task.model, nnx.Param))
    shardings = state_shardings(optimizer, params)
    init = jax.jit(optimizer.init, out_shardings=shardings).lower(params).compile()
    _, state, update = training.start(task.model, task.loss, optimizer)
    step = update.lower(state, training.next_batch(task, 2)).compile()
    kernels = [x for x in jax.tree.leaves(params["blocks"]) if not x.sharding.is_fully_replicated]
    divided = {x.shape: x.sharding for x in kernels}
    moments = [x for x in jax.tree.leaves(state["opt_state"]) if x.shape in divided]
    assert len(moments) >= len(kernels)
    for moment in moments:
        assert moment.sharding.is_equivalent_to(divided[moment.shape], moment.ndim)
    for shape in divided:
        whole = f"f32[{','.join(map(str, shape))}]"
        assert whole not in init.as_text()
        assert whole not in step.as_text()


def test_weights_are_gathered_and_activations_stay_where_they_are(task):
    _, state, update = training.start(task.model, task.loss, optax.sgd(0.1))
    text = update.lower(state, training.next_batch(task, 2)).compile().as_text()
    assert re.search(r"= f32\[128,4,32\]\S* all-gather", text)  # the query of a layer
    assert "all-to-all" not in text


def test_rows_are_over_all_devices(task):
    batch = training.next_batch(task, 2)
    assert batch.shape == (2, 8, 17)
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 1, 17)}


def test_by_default_as_many_devices_as_divide_the_rows():
    for rows, number in ((16, 8), (12, 6), (4, 4), (7, 7), (1, 1)):
        assert dict(placement.make_mesh(None, rows).shape) == {"data": number, "fsdp": 1}


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ("data=2", "2 devices, but there are 8. Write sizes whose product is 8"),
        ("tensor=8", "--mesh tensor=8: write data=N, fsdp=N or data=N,fsdp=M"),
        ("data=0", "write data=N"),
        ("data=2,data=4", "write data=N"),
        ("8", "write data=N"),
        ("data=4,fsdp=2", "8 devices do not divide the 4 examples .* a multiple of 8"),
    ],
)
def test_a_mesh_that_does_not_fit_is_an_error(axes, message):
    with pytest.raises(ValueError, match=message):
        placement.make_mesh(axes, 4)
